"""Low-rank adaptation of Mamba's packed projections, and how far mixed-precision fine-tuning strays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchgraft.language.mamba_lyapunov.exponents import is_selective
from torchgraft.language.mamba_lyapunov.growth import autocast_to

TARGETS: dict[str, tuple[str, ...]] = {
    "all": ("embeddings", "embed_tokens", "in_proj", "x_proj"),
    "buffers": ("in_proj", "x_proj"),
    "ssm": ("x_proj",),
}


def lora_targets(model: nn.Module, targets: Literal["all", "buffers", "ssm"] = "buffers") -> list[str]:
    """Names of the modules of a live model that a set of targets means.

    ``all``: embeddings, ``in_proj`` and ``x_proj``; ``buffers``: the last two (the paper's "SLL"; its exact list is
    unverified); ``ssm``: what gives Delta, B and C, ``x_proj``, or ``in_proj`` in Mamba-2, which has them there.
    ``out_proj``, which the paper adapts too, is in no set: transformers hands its weight to fused kernels past any
    adapter, and peft refuses it for Mamba.

    Raises:
        ValueError: for an unknown set.
        TypeError: for a model without Mamba mixers.
    """
    if targets not in TARGETS:
        raise ValueError(f"targets must be one of {', '.join(TARGETS)}, got {targets!r}")
    mixers = [name for name, module in model.named_modules() if is_selective(module)]
    if not mixers:
        raise TypeError(f"model must have Mamba or Mamba-2 mixers, and {type(model).__name__} has none")
    found = []
    for name, module in model.named_modules():
        parent, _, last = name.rpartition(".")
        in_mixer = parent in mixers and isinstance(module, nn.Linear)
        if last in TARGETS[targets] and (in_mixer or isinstance(module, nn.Embedding)):
            found.append(name)
    if not found:
        found = [f"{name}.in_proj" for name in mixers]
    return found


def mamba_lora_config(
    model: nn.Module,
    targets: Literal["all", "buffers", "ssm"] = "buffers",
    *,
    r: int = 8,
    alpha: int = 32,
    dropout: float = 0.05,
) -> Any:
    """A ``peft.LoraConfig`` for the packed projections of a Mamba or Mamba-2 model (section 5 of Halloran et al.).

    One low-rank update of a packed matrix gives all of its parts (Delta, B and C of ``x_proj``) rows of their own and
    the same A: adaptation that is tied, and merges without loss of speed. ``dt_proj``, ``A_log``, ``D`` and ``conv1d``
    stay as they are: ``dt_proj`` is read and never called, so an adapter there would do nothing.

    With mamba-ssm's fused training kernel, the weight of ``x_proj`` is read past the adapter, too: after a backward
    pass ask ``silent_adapters``, and disable the kernel if it names any. r = 8, alpha and dropout are
    defaults of ours within what the paper uses (unverified).

    Args:
        model: a transformers model.
        targets: see ``lora_targets``.
        r, alpha, dropout: as in peft.

    Raises:
        ValueError, TypeError: as ``lora_targets``.
    """
    from peft import LoraConfig

    return LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=lora_targets(model, targets), bias="none"
    )


def silent_adapters(model: nn.Module) -> list[str]:
    """Adapters that a backward pass did not reach: the names of ``lora_B`` parameters without a gradient.

    Call it after one ``loss.backward()`` of the peft model.

    Raises:
        ValueError: when there is no adapter, or no gradient anywhere.
    """
    adapters = {name: p for name, p in model.named_parameters() if "lora_B" in name or "lora_embedding_B" in name}
    if not adapters:
        raise ValueError("model has no LoRA adapter; wrap it with peft.get_peft_model first")
    if not any(p.grad is not None for p in model.parameters()):
        raise ValueError("no parameter has a gradient; call loss.backward() first")
    return [name for name, p in adapters.items() if p.grad is None or not p.grad.any()]


@dataclass(frozen=True)
class Tuning:
    """One way of fine-tuning.

    Attributes:
        dtype: of autocast: ``fp32``, ``bf16`` or ``fp16``.
        lora: makes a ``peft.LoraConfig`` of the model; None trains everything.
        lr: of AdamW.
    """

    dtype: str = "fp32"
    lora: Callable[[nn.Module], Any] | None = None
    lr: float = 1e-3


@dataclass(frozen=True)
class TunedModel:
    """What ``finetune_stability`` measured of one way.

    Attributes:
        loss: of evaluation, nats a token, in float32.
        loss_difference: its absolute difference from the reference's.
        kl: mean KL divergence of the next token's distribution from the reference's.
        seconds: of training.
    """

    loss: float
    loss_difference: float
    kl: float
    seconds: float


def finetune_stability(
    factory: Callable[[], nn.Module],
    batches: Sequence[Tensor],
    evaluation: Tensor,
    ways: Mapping[str, Tuning],
    reference: str,
) -> dict[str, TunedModel]:
    """Fine-tune copies of one model on the same batches in the same order, each in its own way, and compare.

    Args:
        factory: gives the model to begin with, the same at each call.
        batches: of ``input_ids`` (B, T), one for each step.
        evaluation: (B, T), on which all are judged in float32.
        ways: named.
        reference: the name of the one that others are compared with.

    Raises:
        ValueError: for a reference that is not among the ways, or no batches.
    """
    import time

    from peft import get_peft_model

    if reference not in ways or not batches:
        raise ValueError(f"reference must be one of {', '.join(ways)} and batches not empty, got {reference!r}")
    logits: dict[str, Tensor] = {}
    losses: dict[str, float] = {}
    seconds: dict[str, float] = {}
    for name, way in ways.items():
        model: Any = factory()
        if way.lora is not None:
            torch.manual_seed(0)
            model = get_peft_model(model, way.lora(model))
        device = next(model.parameters()).device.type
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=way.lr)
        scaler = torch.amp.GradScaler(device, enabled=way.dtype == "fp16")
        model.train()
        began = time.perf_counter()
        torch.manual_seed(1)
        for ids in batches:
            with autocast_to(way.dtype, device):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
            scaler.step(optimizer)
            scaler.update()
        seconds[name] = time.perf_counter() - began
        model.eval()
        with torch.no_grad():
            out = model(input_ids=evaluation, labels=evaluation, use_cache=False)
        losses[name], logits[name] = out.loss.item(), out.logits.float().log_softmax(-1).cpu()
    sure = logits[reference]
    return {
        name: TunedModel(
            losses[name],
            abs(losses[name] - losses[reference]),
            (sure.exp() * (sure - logits[name])).sum(-1).mean().item(),
            seconds[name],
        )
        for name in ways
    }


@dataclass(frozen=True)
class Task:
    """A few-shot task: examples of (question, options, place of the right one), and how an example reads."""

    examples: Sequence[tuple[str, Sequence[str], int]]
    template: str = "Question: {question}\nAnswer: {answer}\n\n"


@torch.no_grad()
def icl_gain(
    model: nn.Module, tokenizer: Any, tasks: Mapping[str, Task], shots: Sequence[int] = (1, 3, 5), *, seed: int = 0
) -> dict[str, dict[int, float]]:
    """Accuracy of each task with 0 and more examples before the question, and the gain in percent of the 0-shot score.

    An option's score is its mean log-probability a token after the question. "AIPSS" of the paper is the mean of these
    gains over tasks and shots (its exact tasks and shots are unverified).

    Args:
        model: causal.
        tokenizer: of it.
        tasks: named.
        shots: numbers of examples, at least 1 each.
        seed: of the choice of examples, which are never the question itself.

    Returns:
        By task: 0 gives the accuracy without examples, any other number of shots the gain in percent.

    Raises:
        ValueError: for shots below 1, tasks with too few examples, or a 0-shot accuracy of zero, to which no gain is
            relative.
    """
    if any(n < 1 for n in shots):
        raise ValueError(f"shots must be at least 1, got {list(shots)}")
    found: dict[str, dict[int, float]] = {}
    device = next(model.parameters()).device
    for name, task in tasks.items():
        if len(task.examples) <= max(shots):
            raise ValueError(f"task {name!r} has {len(task.examples)} examples, too few for {max(shots)} shots")
        scores = {}
        for n in (0, *shots):
            generator = torch.Generator().manual_seed(seed)
            right = 0
            for k, (question, options, answer) in enumerate(task.examples):
                others = [j for j in torch.randperm(len(task.examples), generator=generator).tolist() if j != k][:n]
                shown = "".join(
                    task.template.format(question=task.examples[j][0], answer=task.examples[j][1][task.examples[j][2]])
                    for j in others
                )
                begun = shown + task.template.split("{answer}")[0].format(question=question)
                told = []
                for option in options:
                    start = len(tokenizer(begun.rstrip())["input_ids"])
                    ids = torch.tensor([tokenizer(begun.rstrip() + " " + option)["input_ids"]], device=device)
                    log_probs = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
                    told.append(log_probs.gather(1, ids[0, 1:, None])[start - 1 :].mean().item())
                right += int(max(range(len(told)), key=told.__getitem__) == answer)
            scores[n] = right / len(task.examples)
        if scores[0] == 0:
            raise ValueError(f"task {name!r} has a 0-shot accuracy of zero, so that no gain is relative to it")
        found[name] = {0: scores[0], **{n: 100 * (scores[n] / scores[0] - 1) for n in shots}}
    return found

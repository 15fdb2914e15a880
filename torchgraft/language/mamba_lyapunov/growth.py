"""End to end: what becomes of a small change, and of lower precision."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchgraft.language.mamba_lyapunov.exponents import _decay, step_sizes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Growth:
    """What a change of length eps at one token becomes.

    Attributes:
        deviation: (layers + 1, T), length of the deviation of each layer's output (first: of what enters the first
            layer) divided by eps, mean over rows; zero before the change.
        at: the token that was changed.
    """

    deviation: Tensor
    at: int

    @property
    def after(self) -> Tensor:
        """(T - at,), of the last layer, from the changed token on."""
        return self.deviation[-1, self.at :]


@torch.no_grad()
def perturbation_growth(
    model: nn.Module,
    input_ids: Tensor,
    eps: float = 1e-3,
    at: int = 0,
    where: Literal["input", "state"] = "input",
    *,
    seed: int = 0,
) -> Growth:
    """How a small change at one token spreads to later ones; for any causal transformers model.

    Args:
        model: with ``get_input_embeddings``.
        input_ids: (B, T), no padding.
        eps: length of the change.
        at: the token whose embedding is changed (``input``), or after which the recurrent state is (``state``).
        where: ``input`` measures the whole network by running it twice; ``state`` gives the decay of a change of a
            Mamba layer's recurrent state with everything else the same, ``exp(sum Delta A)`` of the slowest state, by
            layer (no row for the input then).
        seed: of the direction.

    Raises:
        TypeError: with ``state``, for a model without selective mixers; for one that keeps no list of layers.
        ValueError: for a token that there is not, or eps that is not positive.

    Example:
        >>> from transformers import MambaConfig, MambaForCausalLM
        >>> model = MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=50)).eval()
        >>> perturbation_growth(model, torch.randint(0, 50, (1, 12)), at=3).deviation.shape
        torch.Size([3, 12])
    """
    if not 0 <= at < input_ids.shape[1]:
        raise ValueError(f"at must be one of {input_ids.shape[1]} tokens, got {at}")
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    if where == "state":
        with step_sizes(model) as found:
            model(input_ids=input_ids, use_cache=False)
        mixers = dict(model.named_modules())
        rows = []
        for name, delta in found.items():
            slowest = _decay(mixers[name]).amax(1).to(delta.device)
            logs = (delta * slowest)[:, at + 1 :].cumsum(1).amax(2)
            kept = torch.cat([logs.new_zeros(len(logs), 1), logs], 1).exp().mean(0)
            rows.append(torch.cat([kept.new_zeros(at), kept]).cpu())
        return Growth(torch.stack(rows), at)
    if where != "input":
        raise ValueError(f"where must be 'input' or 'state', got {where!r}")
    reading: Any = model
    embeds = reading.get_input_embeddings()(input_ids)
    direction = torch.randn(embeds.shape[-1], generator=torch.Generator().manual_seed(seed)).to(embeds)
    changed = embeds.clone()
    changed[:, at] += eps * direction / direction.norm()

    pairs = zip(_stream(model, embeds), _stream(model, changed), strict=True)
    return Growth(torch.stack([(b - a).float().norm(dim=-1).mean(0).cpu() / eps for a, b in pairs]), at)


def _stream(model: nn.Module, embeds: Tensor) -> list[Tensor]:
    """What enters the first block and leaves each; models do not agree on what ``output_hidden_states`` holds."""
    config: Any = model.config
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == config.num_hidden_layers]
    if not lists:
        raise TypeError(f"{type(model).__name__} keeps no list of its {config.num_hidden_layers} layers")
    found: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    with ExitStack() as undo:
        for block in lists[0]:
            undo.callback(block.register_forward_hook(keep).remove)
        model(inputs_embeds=embeds, use_cache=False)
    return [embeds, *found]


@dataclass(frozen=True)
class Divergence:
    """How far a lower precision is from the reference, by position.

    Attributes:
        kl: (T,), mean KL divergence of the next token's distribution from the reference's.
        top1: (T,), share of positions at which both name the same token.
        max_abs: (T,), largest difference of a logit.
    """

    kl: Tensor
    top1: Tensor
    max_abs: Tensor


def autocast_to(dtype: str, device: str) -> Any:
    """Autocast to a dtype by its short name; nothing for float32.

    Raises:
        ValueError: for an unknown name.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return nullcontext() if dtype == "fp32" else torch.autocast(device, DTYPES[dtype])


@torch.no_grad()
def precision_divergence(
    model: nn.Module,
    batches: Iterable[Tensor],
    dtypes: Sequence[str] = ("bf16", "fp16"),
    reference: str = "fp32",
) -> dict[str, Divergence]:
    """Compare forward passes under autocast with those of a reference precision, position by position.

    Autocast is what mixed-precision training runs; on a CPU it leaves more operations in float32 than on a GPU.

    Args:
        model: a causal transformers model in float32.
        batches: of ``input_ids`` (B, T), all of one length, no padding.
        dtypes: ``bf16``, ``fp16`` or ``fp32``.
        reference: what they are compared with; the same precision gives exactly zero.

    Raises:
        ValueError: for an unknown dtype, no batches, or lengths that differ.
    """
    device = next(model.parameters()).device.type
    sums: dict[str, list[Tensor]] = {}
    count, length = 0, None
    for ids in batches:
        if length is not None and ids.shape[1] != length:
            raise ValueError(f"batches must have one length, got {length} and {ids.shape[1]}")
        count, length = count + len(ids), ids.shape[1]

        def logits(dtype: str, ids: Tensor = ids) -> Tensor:
            with autocast_to(dtype, device):
                found: Tensor = model(input_ids=ids, use_cache=False).logits
            return found.float()

        sure = logits(reference)
        for dtype in dtypes:
            other = logits(dtype)
            p = sure.log_softmax(-1)
            kl = (p.exp() * (p - other.log_softmax(-1))).sum(-1).sum(0)
            same = (sure.argmax(-1) == other.argmax(-1)).float().sum(0)
            far = (sure - other).abs().amax((0, 2))
            if dtype in sums:
                old = sums[dtype]
                sums[dtype] = [old[0] + kl, old[1] + same, torch.maximum(old[2], far)]
            else:
                sums[dtype] = [kl, same, far]
    if not count:
        raise ValueError("batches must not be empty")
    return {
        dtype: Divergence(kl.cpu() / count, same.cpu() / count, far.cpu()) for dtype, (kl, same, far) in sums.items()
    }

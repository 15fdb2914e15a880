"""Response tuning with transformers' Trainer, whole or with peft."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from torchgraft.language.implicit_instruction.formats import IGNORED, ChatFormat

LEARNING_RATES = {"llama-2-7b": 1e-5, "olmo-7b": 3e-6}
EPOCHS: Mapping[str, Mapping[str, int]] = {
    "llama-2-7b": {
        "instruction": 15, "response": 5, "gsm8k": 7, "mbpp": 15, "chess": 15, "poetry": 15, "recipes": 20,
    },
    "olmo-7b": {"instruction": 15, "response": 7, "gsm8k": 7, "mbpp": 7, "chess": 20, "poetry": 5, "recipes": 20},
}  # fmt: skip


def published_settings(
    model: Literal["llama-2-7b", "olmo-7b"] = "llama-2-7b", data: str = "response", schedule: str = "code"
) -> dict[str, Any]:
    """The paper's training settings, for ``transformers.TrainingArguments(output_dir, **settings)``.

    Args:
        model: whose learning rate and epochs.
        data: ``instruction``, ``response``, ``gsm8k``, ``mbpp``, ``chess``, ``poetry`` or ``recipes``.
        schedule: ``code`` (linear to zero, 3 % warm-up: what the released scripts do) or ``paper`` (cosine to zero,
            10 % warm-up: what the text says). Which of the two gave the published numbers is not known.

    Returns:
        Learning rate, epochs, a batch of 64 in all on one device, schedule, no weight decay, bfloat16.

    Raises:
        ValueError: for other names.

    Example:
        >>> published_settings("olmo-7b", "gsm8k")["num_train_epochs"]
        7
    """
    if model not in LEARNING_RATES:
        raise ValueError(f"model must be one of {', '.join(LEARNING_RATES)}, got {model!r}")
    if data not in EPOCHS[model]:
        raise ValueError(f"data must be one of {', '.join(EPOCHS[model])}, got {data!r}")
    schedules = {"code": ("linear", 0.03), "paper": ("cosine", 0.1)}
    if schedule not in schedules:
        raise ValueError(f"schedule must be 'code' or 'paper', got {schedule!r}")
    kind, warm_up = schedules[schedule]
    return {
        "learning_rate": LEARNING_RATES[model], "num_train_epochs": EPOCHS[model][data], "weight_decay": 0.0,
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 64, "lr_scheduler_type": kind,
        "warmup_steps": warm_up, "bf16": True,
    }  # fmt: skip


def training_examples(
    dataset: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    chat: ChatFormat | None = None,
    *,
    column: str = "messages",
    max_length: int = 2048,
    too_long: Literal["error", "truncate"] = "error",
) -> list[dict[str, list[int]]]:
    """Conversations as ``input_ids``, ``labels`` and ``attention_mask``; labels are -100 outside of responses.

    Args:
        dataset: rows, such as a dataset of the ``datasets`` library.
        tokenizer: of transformers.
        chat: the format; ``ChatFormat()`` where None.
        column: where conversations are.
        max_length: tokens.
        too_long: what to do with longer ones; the paper truncates.

    Raises:
        ValueError: for no rows, a row without the column, one too long, or one in which nothing is left to train.

    Example:
        >>> from torchgraft.language.set_based_prompting import toy_model
        >>> rows = [{"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "Hi"}]}]
        >>> training_examples(rows, toy_model()[1])[0]["labels"][-3:]
        [72, 105, 256]
    """
    chat = chat or ChatFormat()
    if too_long not in ("error", "truncate"):
        raise ValueError(f"too_long must be 'error' or 'truncate', got {too_long!r}")
    examples = []
    for number, row in enumerate(dataset):
        if column not in row:
            raise ValueError(f"row {number} has no column {column!r}, only {sorted(row)}")
        example = chat.labels(tokenizer, row[column])
        length = len(example["input_ids"])
        if length > max_length:
            if too_long == "error":
                raise ValueError(f"row {number} has {length} tokens, more than max_length {max_length}; too_long=...")
            example = {name: values[:max_length] for name, values in example.items()}
            if all(label == IGNORED for label in example["labels"]):
                raise ValueError(f"row {number} has no response left within max_length {max_length}")
        examples.append(example)
    if not examples:
        raise ValueError("dataset has no rows")
    return examples


class ResponseCollator:
    """Pads examples on the right: a data collator for ``Trainer`` and for any data loader.

    Args:
        padding: token id to fill with; the mask hides it, so any will do.
    """

    def __init__(self, padding: int = 0) -> None:
        self.padding = padding

    def __call__(self, examples: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        """(B, T) each of ``input_ids``, ``labels`` and ``attention_mask``."""
        fill = {"input_ids": self.padding, "labels": IGNORED, "attention_mask": 0}
        width = max(len(example["input_ids"]) for example in examples)
        return {
            name: torch.tensor([[*e[name], *[value] * (width - len(e[name]))] for e in examples])
            for name, value in fill.items()
        }


def response_loss(logits: Float[Tensor, "b t v"], labels: Int[Tensor, "b t"]) -> Float[Tensor, ""]:
    """Negative log-likelihood a token of each response, then the mean over examples: each weighs the same.

    The official scripts do this by batches of one example and 32 steps of accumulation on two devices. transformers'
    own loss weighs every token the same instead, so that long responses count for more.

    Args:
        logits: (B, T, V), of the model that reads the conversations.
        labels: (B, T), -100 where no loss is taken; not shifted.

    Raises:
        ValueError: when an example has no label.

    Example:
        >>> labels = torch.tensor([[-100, 3, 1], [-100, 2, -100]])
        >>> round(response_loss(torch.zeros(2, 3, 4), labels).exp().item(), 6)  # uniform: one in four
        4.0
    """
    wanted = labels[:, 1:]
    counts = (wanted != IGNORED).sum(1)
    if not counts.all():
        empty = (counts == 0).nonzero()[:, 0].tolist()
        raise ValueError(f"labels must have something to train in every row, got none in rows {empty}")
    losses = nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2).float(), wanted, ignore_index=IGNORED, reduction="none"
    )
    return (losses.sum(1) / counts).mean()


def _recomputes(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def tune(
    model: Any,
    tokenizer: Any,
    dataset: Iterable[Mapping[str, Any]],
    arguments: Any,
    *,
    peft_config: Any = None,
    chat: ChatFormat | None = None,
    column: str = "messages",
    max_length: int = 2048,
    weighting: Literal["examples", "tokens"] = "examples",
) -> Any:
    """Finetune on responses with transformers' ``Trainer``; give it ``response_only`` data for response tuning.

    Args:
        model: a causal language model, trained in place; with adapters of peft already in it, these are trained.
        tokenizer: its tokenizer.
        dataset: conversations.
        arguments: ``transformers.TrainingArguments``, see ``published_settings``.
        peft_config: such as ``peft.LoraConfig(task_type="CAUSAL_LM")``: only adapters are trained, and the other
            weights no longer ask for gradients. The paper trains all weights.
        chat, column, max_length: as in ``training_examples``.
        weighting: ``examples`` (``response_loss``, as published), or ``tokens`` (transformers' own loss: all response
            tokens of a step weigh the same).

    Returns:
        The trained model in eval mode: the one given, or a peft model around it. When anything fails the weights,
        modules, gradients and modes of the given model are as they were.

    Raises:
        TypeError, ValueError: for a model without a head, a peft configuration for a model that has adapters already,
            more tokens than the model has positions or embeddings, another weighting, or data as in
            ``training_examples``; before anything is changed.
    """
    from transformers import Trainer

    head: Any = getattr(model, "get_output_embeddings", None)
    if not isinstance(model, nn.Module) or head is None or head() is None:
        raise TypeError(f"model must be a causal language model of transformers, got {type(model).__name__}")
    if peft_config is not None and hasattr(model, "peft_config"):
        raise TypeError("model has adapters of peft already; leave peft_config out to train them, or unload them first")
    if weighting not in ("examples", "tokens"):
        raise ValueError(f"weighting must be 'examples' or 'tokens', got {weighting!r}")
    examples = training_examples(dataset, tokenizer, chat, column=column, max_length=max_length)
    longest, highest = (max(f(e["input_ids"]) for e in examples) for f in (len, max))
    inner: Any = model
    positions, known = getattr(inner.config, "max_position_embeddings", None), inner.get_input_embeddings().weight
    if positions is not None and longest > positions:
        raise ValueError(f"dataset has a conversation of {longest} tokens, the model {positions} places")
    if highest >= len(known):
        raise ValueError(f"tokenizer gives ids up to {highest}, the model has {len(known)} embeddings; resize them")

    class EveryExample(Trainer):
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **more)
            self.model_accepts_loss_kwargs = False  # a mean of each batch, which Trainer then averages over the step

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            # a soft prompt stands before the conversation and has no labels
            loss = response_loss(outputs.logits[:, -labels.shape[1] :], labels)
            return (loss, outputs) if return_outputs else loss

    kind = EveryExample if weighting == "examples" else Trainer
    trained: list[tuple[Tensor, Tensor]] = []
    modes = [(module, module.training) for module in model.modules()]
    parts = [(module, name, child) for module in model.modules() for name, child in module.named_children()]
    recomputes = _recomputes(model)
    gradients = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    adapted: Any = model
    try:
        if peft_config is not None:
            from peft import get_peft_model

            adapted = get_peft_model(model, peft_config)
        # not of frozen weights, which are most of a model with adapters; nor where the training needs its memory
        changing = [p for p, _, _ in gradients if p.requires_grad]
        trained = [(t, t.detach().to("cpu", copy=True)) for t in (*changing, *model.buffers())]
        own, cached = dict(adapted.__dict__), getattr(inner.config, "use_cache", None)
        try:
            collator = ResponseCollator(getattr(tokenizer, "pad_token_id", None) or 0)
            kind(adapted, arguments, train_dataset=examples, data_collator=collator).train()
        finally:
            if cached is not None:
                inner.config.use_cache = cached
            if _recomputes(model) and not recomputes:
                # transformers 5 changed the name on its way
                named = "activation" if hasattr(inner, "activation_checkpointing_disable") else "gradient"
                getattr(inner, f"{named}_checkpointing_disable")()
                inner.disable_input_require_grads()
            # accelerate wraps ``forward`` for mixed precision; without this the model would go on in that precision
            for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
                if name not in own:
                    adapted.__dict__.pop(name, None)
                else:
                    adapted.__dict__[name] = own[name]
    except BaseException:
        # peft's own unload would leave the trained copies of ``modules_to_save``
        for module, name, child in parts:
            setattr(module, name, child)
        if adapted is not model:
            model.__dict__.pop("peft_config", None)
        with torch.no_grad():
            for tensor, value in trained:
                tensor.copy_(value)
        for p, needed, grad in gradients:
            p.requires_grad_(needed)
            p.grad = grad
        for module, training in modes:
            module.training = training
        raise
    return adapted.eval()

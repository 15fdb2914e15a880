"""Response tuning with transformers' Trainer, whole or with peft."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
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
) -> Any:
    """Finetune on responses with transformers' ``Trainer``; give it ``response_only`` data for response tuning.

    The loss is transformers' own: the mean over all response tokens of a batch (the paper writes a mean over
    examples, its code does this).

    Args:
        model: a causal language model, trained in place.
        tokenizer: its tokenizer.
        dataset: conversations.
        arguments: ``transformers.TrainingArguments``, see ``published_settings``.
        peft_config: such as ``peft.LoraConfig(task_type="CAUSAL_LM")``: only adapters are trained. The paper trains
            all weights.
        chat, column, max_length: as in ``training_examples``.

    Returns:
        The trained model in eval mode: the one given, or a peft model around it. When anything fails the weights and
        modules of the given model are as they were.

    Raises:
        TypeError, ValueError: for a model without a head, more tokens than it has positions or embeddings, or data as
            in ``training_examples``; before anything is changed.
    """
    from transformers import Trainer

    head: Any = getattr(model, "get_output_embeddings", None)
    if not isinstance(model, nn.Module) or head is None or head() is None:
        raise TypeError(f"model must be a causal language model of transformers, got {type(model).__name__}")
    examples = training_examples(dataset, tokenizer, chat, column=column, max_length=max_length)
    longest, highest = (max(f(e["input_ids"]) for e in examples) for f in (len, max))
    inner: Any = model
    positions, known = getattr(inner.config, "max_position_embeddings", None), inner.get_input_embeddings().weight
    if positions is not None and longest > positions:
        raise ValueError(f"dataset has a conversation of {longest} tokens, the model {positions} places")
    if highest >= len(known):
        raise ValueError(f"tokenizer gives ids up to {highest}, the model has {len(known)} embeddings; resize them")

    before, training = {name: value.clone() for name, value in model.state_dict().items()}, model.training
    needed = {name: p.requires_grad for name, p in model.named_parameters()}
    adapted: Any = model
    try:
        if peft_config is not None:
            from peft import get_peft_model

            adapted = get_peft_model(model, peft_config)
        collator = ResponseCollator(getattr(tokenizer, "pad_token_id", None) or 0)
        Trainer(adapted, arguments, train_dataset=examples, data_collator=collator).train()
    except BaseException:
        if adapted is not model:
            adapted.unload()
        model.load_state_dict(before)
        for name, p in model.named_parameters():
            p.requires_grad_(needed[name])
        model.train(training)
        raise
    return adapted.eval()

"""Frozen classifiers of any kind: their logits, and what goes into their last layer.

Dimensions: B images, d features, S source classes.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Batches = Iterable[Any] | tuple[Tensor, Tensor]


def is_transformers(module: nn.Module) -> bool:
    """Whether a module is a model of transformers, without importing transformers."""
    # where there is such a model its classes were imported; the package itself would import them when asked
    package = sys.modules.get("transformers.modeling_utils")
    return package is not None and isinstance(module, package.PreTrainedModel)


def freeze(backbone: nn.Module) -> None:
    """Turn gradients off and eval mode on, in place; a backbone in train mode is warned about."""
    if any(module.training for module in backbone.modules()):
        warnings.warn(
            "the backbone was in train mode, where batch norm and dropout make its answers depend on the batch; "
            "it is in eval mode now",
            stacklevel=2,
        )
        backbone.eval()
    backbone.requires_grad_(False)


@contextlib.contextmanager
def freezing(backbone: nn.Module) -> Iterator[None]:
    """``freeze`` for what follows and after it, undone when that raises."""
    if not isinstance(backbone, nn.Module):
        raise TypeError(f"backbone must be a torch.nn.Module, got {type(backbone).__name__}")
    modes = [(module, module.training) for module in backbone.modules()]
    learns = [(parameter, parameter.requires_grad) for parameter in backbone.parameters()]
    freeze(backbone)
    try:
        yield
    except BaseException:
        for module, mode in modes:
            module.training = mode
        for parameter, learned in learns:
            parameter.requires_grad_(learned)
        raise


def logits_of(output: Any) -> Tensor:
    """Logits (B, S) from whatever a classifier returned."""
    if not isinstance(output, Tensor):
        output = getattr(output, "logits", output[0] if isinstance(output, (tuple, list)) else None)
    if not isinstance(output, Tensor) or output.ndim != 2:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise TypeError(f"backbone must return logits of shape (B, classes), or an output with .logits, got {shape}")
    return output


def find_head(backbone: nn.Module, name: str | None = None) -> tuple[str, nn.Linear]:
    """The last linear layer of a classifier, by name or the last one that its modules list.

    Raises:
        ValueError: for a name that is no linear layer, and a backbone that has none.
    """
    if name is not None:
        found = dict(backbone.named_modules()).get(name)
        if not isinstance(found, nn.Linear):
            raise ValueError(
                f"head {name!r} is not a linear layer of {type(backbone).__name__}; name its last nn.Linear"
            )
        return name, found
    layers = [(n, m) for n, m in backbone.named_modules() if isinstance(m, nn.Linear)]
    if not layers:
        raise ValueError(f"{type(backbone).__name__} has no linear layer to read features before; name it, head='…'")
    return layers[-1]


def features_of(backbone: nn.Module, head: nn.Linear, x: Tensor) -> Tensor:
    """What goes into the last linear layer, shape (B, d)."""
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        output = backbone(x)
    finally:
        handle.remove()
    if len(seen) != 1 or seen[0].ndim != 2:
        what = f"was used {len(seen)} times" if len(seen) != 1 else f"takes shape {tuple(seen[0].shape)}"
        raise ValueError(f"the head must take features of shape (B, d) once per forward, but it {what}; name another")
    if logits_of(output).shape[1] != head.out_features:
        raise ValueError(
            f"the head found has {head.out_features} outputs, the backbone {logits_of(output).shape[1]} classes; "
            "name the last linear layer, head='…'"
        )
    return seen[0]


def batches_of(
    data: Batches, batch_size: int, generator: torch.Generator | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs (images, labels) from a loader, or from two tensors: shuffled when there is a generator.

    Raises:
        ValueError: for batches that are no such pairs, and a loader without any.
    """
    if isinstance(data, tuple):
        x, y = data
        order = torch.arange(len(x)) if generator is None else torch.randperm(len(x), generator=generator)
        for index in order.split(batch_size):
            yield x[index], y[index]
        return
    batch = None
    for batch in data:
        if isinstance(batch, Mapping) and {"pixel_values", "labels"} <= batch.keys():
            yield batch["pixel_values"], batch["labels"]
        elif isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(v, Tensor) for v in batch):
            yield batch[0], batch[1]
        else:
            keys = f" with keys {sorted(batch)}" if isinstance(batch, Mapping) else ""
            raise ValueError(
                "a loader must give (images, labels), two tensors, or a mapping with 'pixel_values' and 'labels', "
                f"got {type(batch).__name__}{keys}"
            )
    if batch is None:
        raise ValueError("the loader gave no batch; training needs at least one example")


def check_data(data: Batches) -> None:
    """Refuse data that can be gone through only once, and tensors that do not go together."""
    if isinstance(data, tuple):
        if len(data) != 2 or not all(isinstance(v, Tensor) for v in data) or len(data[0]) != len(data[1]):
            raise ValueError("data must be (images, labels), two tensors of equal length, or a loader of such pairs")
        if not len(data[0]):
            raise ValueError("data is empty; training needs at least one example")
    elif not isinstance(data, Iterable):
        raise TypeError(f"data must be (images, labels) or a loader of such pairs, got {type(data).__name__}")
    elif iter(data) is data:
        raise TypeError("data must be a loader that can be gone through once per epoch, got an iterator")

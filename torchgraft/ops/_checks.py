"""Checks of inputs that the operations share."""

from __future__ import annotations

import torch
from torch import Tensor


def check_floats(**tensors: Tensor | None) -> None:
    """Raise ``TypeError`` for a tensor that is not floating-point; ``None`` passes."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")


def check_shapes(**wanted: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Raise ``ValueError`` for a tensor of another shape than the one beside it; ``None`` passes."""
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tensor.shape != torch.Size(shape):
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")


def check_mask(mask: Tensor, x: Tensor) -> None:
    """Raise for a mask that is not boolean of shape (batch, length)."""
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be a boolean tensor, True where there is data, got {mask.dtype}")
    check_shapes(mask=(mask, tuple(x.shape[:2])))

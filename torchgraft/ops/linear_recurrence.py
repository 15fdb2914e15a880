"""Elementwise linear recurrences, real or complex: the scan of diagonal state spaces and gated linear RNNs.

``h_t = a_t h_{t-1} + b_t`` is the whole of S4D, DSS and S5 in scan mode, of LRU, RG-LRU, HGRN and of moving averages.
The sequence is cut into chunks that advance together, place by place; the states at their borders obey the same
recurrence, one chunk size coarser, and are found by the same function. So a sequence of length L takes about
``32 log(L) / log(32)`` steps of vectorised work and no loop over time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchgraft.ops._checks import check_mask, check_shapes

__all__ = ["linear_recurrence", "linear_recurrence_naive"]

_PLACES = 32


def linear_recurrence(
    a: Tensor, b: Tensor, *, initial_state: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """All states of ``h_t = a_t h_{t-1} + b_t``.

    Differentiable any number of times; the gradient is the same recurrence backwards.

    Args:
        a: factors, (B, L, *F), or (*F) when they do not change over time and examples. Real or complex.
        b: inputs, (B, L, *F).
        initial_state: state before the first step, (B, *F); zero without it. The last state of an earlier call, its
            ``[:, -1]``, continues it.
        mask: (B, L), True where there is data. Other places keep the state as it is.

    Returns:
        States, (B, L, *F): float32 or complex64, or double precision where an input has it.

    Raises:
        ValueError: for shapes that do not go together, or length zero.
        TypeError: for whole numbers, or a mask that is not boolean.

    Example:
        >>> a, b = torch.rand(8), torch.randn(2, 100, 8)
        >>> h = linear_recurrence(a, b)
        >>> torch.allclose(h[:, 50], a * h[:, 49] + b[:, 50], atol=1e-6)
        True
    """
    a, b, state = _prepared(a, b, initial_state)
    if mask is not None:
        check_mask(mask, b)
        mask = mask.view(*mask.shape, *[1] * (b.ndim - 2))
        a, b = torch.where(mask, a, torch.ones_like(a)), torch.where(mask, b, torch.zeros_like(b))
    if state is not None:
        b = torch.cat([(b[:, :1] + (a if a.ndim < b.ndim else a[:, :1]) * state[:, None]), b[:, 1:]], 1)
    return _Scan.apply(a, b)


def linear_recurrence_naive(a: Tensor, b: Tensor, *, initial_state: Tensor | None = None) -> Tensor:
    """The definition, one step after another; the reference of the tests."""
    a, b, state = _prepared(a, b, initial_state)
    h = torch.zeros_like(b[:, 0]) if state is None else state
    states = []
    for t in range(b.shape[1]):
        h = (a if a.ndim < b.ndim else a[:, t]) * h + b[:, t]
        states.append(h)
    return torch.stack(states, 1)


def _prepared(a: Tensor, b: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    for name, tensor in (("a", a), ("b", b), ("initial_state", state)):
        if tensor is not None and not (tensor.is_floating_point() or tensor.is_complex()):
            raise TypeError(f"{name} must be floating-point or complex, got {tensor.dtype}")
    if b.ndim < 3 or b.shape[1] == 0:
        raise ValueError(
            f"b must have shape (batch, length, features, ...) with a length of at least 1, got {tuple(b.shape)}"
        )
    if a.shape not in (b.shape, b.shape[2:]):
        raise ValueError(f"a must have shape {tuple(b.shape)} or {tuple(b.shape[2:])}, got {tuple(a.shape)}")
    check_shapes(initial_state=(state, (len(b), *b.shape[2:])))
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    if state is not None:
        dtype = torch.promote_types(dtype, state.dtype)
    return a.to(dtype), b.to(dtype), None if state is None else state.to(dtype)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        h = _scan(a, b)
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor]:
        a, h = ctx.saved_tensors
        # the state before the first step is zero, so its factor has no gradient
        before = F.pad(h[:, :-1].movedim(1, -1), (1, 0)).movedim(-1, 1)
        if a.ndim < h.ndim:
            db = _Scan.apply(a.conj(), dh.flip(1)).flip(1)
            return (db * before.conj()).sum((0, 1)), db
        # going backwards, the factor from place t + 1 to t is that of place t + 1
        later = torch.cat([torch.zeros_like(a[:, :1]), a.conj().flip(1)[:, :-1]], 1)
        db = _Scan.apply(later, dh.flip(1)).flip(1)
        return db * before.conj(), db


def _scan(a: Tensor, b: Tensor) -> Tensor:
    length = b.shape[1]
    constant = a.ndim < b.ndim
    if length <= _PLACES:
        h = b.clone()
        for t in range(1, length):
            h[:, t].addcmul_(a if constant else a[:, t], h[:, t - 1])
        return h
    chunks = -(-length // _PLACES)
    pad = chunks * _PLACES - length
    # (T, B, K, *F): the chunks of one place lie together
    h = _to_places(b, chunks, pad)
    if constant:
        # powers 1 .. T of the factor, each product as exact as the recurrence itself
        through = a.expand(_PLACES, *a.shape).cumprod(0)
        for j in range(1, _PLACES):
            h[j].addcmul_(a, h[j - 1])
        borders = _scan(through[-1], h[-1])
    else:
        through = _to_places(a, chunks, pad)
        for j in range(1, _PLACES):
            h[j].addcmul_(through[j], h[j - 1])
            through[j].mul_(through[j - 1])
        borders = _scan(through[-1], h[-1])
    entry = torch.cat([torch.zeros_like(borders[:, :1]), borders[:, :-1]], 1)
    for j in range(_PLACES):
        h[j].addcmul_(through[j], entry)
    batch, features = b.shape[0], b.shape[2:]
    return h.movedim(0, 2).reshape(batch, chunks * _PLACES, *features)[:, :length].contiguous()


def _to_places(x: Tensor, chunks: int, pad: int) -> Tensor:
    """(B, L, *F) to a fresh (T, B, K, *F)."""
    batch, features = x.shape[0], x.shape[2:]
    places = x.new_zeros(_PLACES, batch, chunks, *features)
    whole = chunks - 1 if pad else chunks
    places[:, :, :whole] = x[:, : whole * _PLACES].view(batch, whole, _PLACES, *features).movedim(2, 0)
    if pad:
        rest = x[:, whole * _PLACES :]
        places[: rest.shape[1], :, -1] = rest.movedim(1, 0)
    return places

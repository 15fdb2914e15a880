"""The selective scan of Mamba (Gu and Dao, 2023, arXiv 2312.00752, section 3), without a loop over time.

Legend: B batch, L length, D channels, N states of a channel, T places in a chunk, K chunks of a block.

``h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t``, ``y_t = C_t h_t + D x_t``, each channel with its own N states.

The sequence is cut into chunks of T. All chunks of a block advance together, place by place, from a zero state; a short
loop over the chunks gives each the state it really begins with; a second pass from there reads the outputs. Memory for
states is that of one block, forward and backward, and no more than a T-th of the states is kept in between.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchgraft.ops._checks import check_floats, check_mask, check_shapes

__all__ = ["selective_scan", "selective_scan_naive", "selective_scan_step"]

_PLACES = 16
# states of one block in elements; the passes over it should find it in the cache
_BLOCK = 1 << 22
_INPUTS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C"
_FORWARD = f"({_INPUTS}, Tensor state) -> (Tensor, Tensor, Tensor)"
_BACKWARD = f"(Tensor dy, Tensor dlast, {_INPUTS}, Tensor kept) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"


def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Selective state space of Mamba-1 over a whole sequence.

    Args:
        x: inputs, (B, L, D).
        delta: step sizes, (B, L, D), positive (after the softplus).
        A: real diagonal of the state matrices, (D, N), negative for a stable system (``-exp(A_log)``).
        B: input vectors, (B, L, N), shared by the channels.
        C: output vectors, (B, L, N), shared by the channels.
        D: skip weights, (D,).
        initial_state: (B, D, N), state before the first step, zero without it. The last state of an earlier
            call continues it.
        mask: (B, L), True where there is data. Other places leave the state as it is, and their output is zero.

    Returns:
        Outputs in the dtype of ``x``, and the last state in float32 (float64 for float64 inputs), in which all states
        are computed whatever the dtype of the inputs is.

    Raises:
        ValueError: for shapes that do not go together, or length zero.
        TypeError: for tensors that are not floating-point, or a mask that is not boolean.

    Example:
        >>> x, delta = torch.randn(2, 100, 8), torch.rand(2, 100, 8)
        >>> A, B, C = -torch.rand(8, 4), torch.randn(2, 100, 4), torch.randn(2, 100, 4)
        >>> y, state = selective_scan(x, delta, A, B, C)
        >>> begin, between = selective_scan(x[:, :60], delta[:, :60], A, B[:, :60], C[:, :60])
        >>> rest, last = selective_scan(x[:, 60:], delta[:, 60:], A, B[:, 60:], C[:, 60:], initial_state=between)
        >>> torch.allclose(torch.cat([begin, rest], 1), y, atol=1e-5), torch.allclose(last, state, atol=1e-5)
        (True, True)
    """
    x, delta, A, B, C, state, dtype = _prepared(x, delta, A, B, C, initial_state)
    if mask is not None:
        check_mask(mask, x)
        delta, x = delta.masked_fill(~mask[..., None], 0), x.masked_fill(~mask[..., None], 0)
    y, last, _ = _scan(delta * x, delta, A, B, C, state)
    if D is not None:
        y = y + x * D.to(x.dtype)
    if mask is not None:
        y = y.masked_fill(~mask[..., None], 0)
    return y.to(dtype), last


def selective_scan_step(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """One step of ``selective_scan``: the output and the new state; arguments as there, without the length."""
    wide = torch.promote_types(torch.float32, x.dtype)
    new = torch.exp(delta[..., None].to(wide) * A.to(wide)) * state + (delta * x)[..., None].to(wide) * B[:, None].to(
        wide
    )
    y = torch.einsum("bdn,bn->bd", new, C.to(wide))
    return (y if D is None else y + x * D).to(x.dtype), new


def selective_scan_naive(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, one step after another; the reference of the tests."""
    x, delta, A, B, C, state, dtype = _prepared(x, delta, A, B, C, initial_state)
    outputs = []
    for t in range(x.shape[1]):
        state = torch.exp(delta[:, t, :, None] * A) * state + (delta * x)[:, t, :, None] * B[:, t, None]
        outputs.append((state * C[:, t, None]).sum(-1))
    y = torch.stack(outputs, 1)
    return (y if D is None else y + x * D).to(dtype), state


def _prepared(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, torch.dtype]:
    """Checked inputs, in the dtype of the states, and the dtype of the outputs."""
    check_floats(x=x, delta=delta, A=A, B=B, C=C, initial_state=state)
    if x.ndim != 3 or x.shape[1] == 0:
        raise ValueError(
            f"x must have shape (batch, length, channels) with a length of at least 1, got {tuple(x.shape)}"
        )
    batch, length, channels = x.shape
    if A.ndim != 2 or len(A) != channels:
        raise ValueError(f"A must have shape (channels, states) with {channels} channels, got {tuple(A.shape)}")
    states = A.shape[1]
    check_shapes(
        delta=(delta, (batch, length, channels)),
        B=(B, (batch, length, states)),
        C=(C, (batch, length, states)),
        initial_state=(state, (batch, channels, states)),
    )
    wide = torch.promote_types(torch.float32, x.dtype)
    state = x.new_zeros(batch, channels, states, dtype=wide) if state is None else state.to(wide)
    return x.to(wide), delta.to(wide), A.to(wide), B.to(wide), C.to(wide), state, x.dtype


def _chunked(x: Tensor) -> Tensor:
    """(B, L, F) to (T, B, chunks, F), zeros behind the end: no step, no input."""
    batch, length, features = x.shape
    chunks = -(-length // _PLACES)
    x = torch.nn.functional.pad(x, (0, 0, 0, chunks * _PLACES - length))
    return x.view(batch, chunks, _PLACES, features).permute(2, 0, 1, 3).contiguous()


def _whole(x: Tensor, length: int) -> Tensor:
    """Back from ``_chunked``."""
    places, batch, chunks, features = x.shape
    return x.permute(1, 2, 0, 3).reshape(batch, chunks * places, features)[:, :length]


def _blocks(batch: int, chunks: int, channels: int, states: int) -> list[slice]:
    size = max(1, _BLOCK // (_PLACES * batch * channels * states))
    return [slice(i, min(i + size, chunks)) for i in range(0, chunks, size)]


def _decays(delta: Tensor, A: Tensor) -> Tensor:
    """(T, B, K, D) to (T, B, K, D, N)."""
    return (delta[..., None] * A).exp_()


def _entries(local: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The state at the border of every chunk (B, K, D, N), given what each adds on its own, and the one after all."""
    entries = torch.empty_like(local)
    for k in range(local.shape[1]):
        entries[:, k] = state
        state = torch.addcmul(local[:, k], decay[:, k], state)
    return entries, state


@torch.library.custom_op("torchgraft::selective_scan", mutates_args=(), schema=_FORWARD)
def _scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs (B, L, D), the last state, and the state before every chunk (B, chunks, D, N)."""
    batch, length, channels = u.shape
    u_, delta_, B_, C_ = (_chunked(x) for x in (u, delta, B, C))
    y = torch.empty_like(u_)
    kept = u.new_empty(batch, u_.shape[2], channels, A.shape[1])
    state = state.clone()
    for block in _blocks(batch, u_.shape[2], channels, A.shape[1]):
        ub, Bb, Cb = u_[:, :, block], B_[:, :, block], C_[:, :, block]
        a = _decays(delta_[:, :, block], A)
        h = ub[0, ..., None] * Bb[0, :, :, None]
        for j in range(1, _PLACES):
            h.mul_(a[j]).addcmul_(ub[j, ..., None], Bb[j, :, :, None])
        h, state = _entries(h, torch.exp(delta_[:, :, block].sum(0)[..., None] * A), state)
        kept[:, block] = h
        for j in range(_PLACES):
            h.mul_(a[j]).addcmul_(ub[j, ..., None], Bb[j, :, :, None])
            y[j, :, block] = (h @ Cb[j, ..., None]).squeeze(-1)
    return _whole(y, length).contiguous(), state, kept


@torch.library.custom_op("torchgraft::selective_scan_backward", mutates_args=(), schema=_BACKWARD)
def _scan_backward(
    dy: Tensor, dlast: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B, C and the first state."""
    batch, length, channels = u.shape
    u_, delta_, B_, C_, dy_ = (_chunked(x) for x in (u, delta, B, C, dy))
    du, ddelta, dB, dC = (torch.empty_like(x) for x in (u_, delta_, B_, C_))
    dA = torch.zeros_like(A)
    dstate = dlast.clone()
    for block in reversed(_blocks(batch, u_.shape[2], channels, A.shape[1])):
        ub, deltab, Bb, Cb, dyb = (x[:, :, block] for x in (u_, delta_, B_, C_, dy_))
        a = _decays(deltab, A)
        h = torch.empty_like(a)
        before = kept[:, block]
        for j in range(_PLACES):
            torch.mul(a[j], before if j == 0 else h[j - 1], out=h[j])
            h[j].addcmul_(ub[j, ..., None], Bb[j, :, :, None])
        g = torch.zeros_like(h[0])
        for j in reversed(range(_PLACES)):
            g.addcmul_(dyb[j, ..., None], Cb[j, :, :, None]).mul_(a[j])
        total = torch.exp(deltab.sum(0)[..., None] * A)
        g, dstate = _entries(g.flip(1), total.flip(1), dstate)
        g = g.flip(1)
        dlog = torch.zeros_like(g)
        for j in reversed(range(_PLACES)):
            g.addcmul_(dyb[j, ..., None], Cb[j, :, :, None])
            du[j, :, block] = (g @ Bb[j, ..., None]).squeeze(-1)
            dB[j, :, block] = (ub[j, :, :, None] @ g).squeeze(-2)
            dC[j, :, block] = (dyb[j, :, :, None] @ h[j]).squeeze(-2)
            g.mul_(a[j])
            change = g * (before if j == 0 else h[j - 1])
            dlog.addcmul_(change, deltab[j, ..., None])
            ddelta[j, :, block] = change.mul_(A).sum(-1)
        dA += dlog.sum((0, 1))
    du, ddelta, dB, dC = (_whole(x, length).contiguous() for x in (du, ddelta, dB, dC))
    return du, ddelta, dA, dB, dC, dstate


@_scan.register_fake
def _(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    chunks = (u.shape[1] + _PLACES - 1) // _PLACES
    return torch.empty_like(u), torch.empty_like(state), u.new_empty(u.shape[0], chunks, u.shape[2], A.shape[1])


@_scan_backward.register_fake
def _(
    dy: Tensor, dlast: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    du, ddelta, dA, dB, dC = (torch.empty_like(x) for x in (u, delta, A, B, C))
    return du, ddelta, dA, dB, dC, torch.empty_like(dlast)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    u, delta, A, B, C, _ = inputs
    ctx.save_for_backward(u, delta, A, B, C, output[2])


def _gradients(ctx: Any, dy: Tensor, dlast: Tensor, dkept: Tensor) -> tuple[Tensor, ...]:
    return _scan_backward(dy, dlast, *ctx.saved_tensors)


_scan.register_autograd(_gradients, setup_context=_save)

"""Product with a quasiseparable matrix in linear time (Hydra, Hwang et al., NeurIPS 2024, arXiv 2407.09941, section 3).

Legend: B batch, L length, H heads, P features of a head, G groups that share B and C, N states. Tensors with a
dimension of 2 hold the forward direction and the backward one, in this order.

``M_ij`` is ``c_{i-1}^T exp(sum_{j<k<i} delta_k A) b_j delta_j`` below the diagonal, the same with the backward
parameters and the order of time reversed above it, and free on it.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from torchgraft.ops._checks import check_floats, check_mask, check_shapes
from torchgraft.ops._precision import autocast_off
from torchgraft.ops.ssd import ssd

__all__ = ["Backend", "quasiseparable", "quasiseparable_matrix", "semiseparable_matrix"]

Backend = Literal["auto", "torch", "mamba_ssm"]

_FUSED = find_spec("mamba_ssm") is not None


def quasiseparable(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    diagonal: Tensor,
    *,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
    chunk_size: int = 64,
    backend: Backend = "auto",
) -> Tensor:
    """``y = M x`` for one quasiseparable matrix M for each head, without forming it.

    Two scans, one over the reversed sequence, run as one of twice the batch. Each output is moved by one step, so that
    neither touches the diagonal, which stays free: ``y = shift(scan(x)) + flip(shift(scan(flip(x)))) + diagonal x``.
    The vector that reads the state before step i is therefore ``C`` of step i - 1, as in the official code.

    Args:
        x: inputs, (B, L, H, P).
        delta: step sizes of both directions, (B, L, 2, H), positive (after the softplus).
        A: negative decay of each head, (H,), of both directions.
        B: input vectors, (B, L, 2, G, N); H must be a multiple of G.
        C: output vectors, (B, L, 2, G, N).
        diagonal: diagonal of M, (B, L, H).
        initial_state: (B, 2, H, P, N), state of each direction before its first step, zero without it.
        mask: (B, L), True where there is data. Other places are as if they were not there, wherever they stand: the
            state passes through, and their output is zero.
        chunk_size: places in a chunk of the scan; the result does not depend on it.
        backend: ``torch`` is ``torchgraft.ops.ssd``; ``mamba_ssm`` the fused kernels of that package, for CUDA;
            ``auto`` takes these where the package is installed and ``x`` is on a CUDA device.

    Returns:
        (B, L, H, P), in the dtype of ``x``; computed in float32, or float64 for float64 inputs.

    Raises:
        ValueError: for shapes that do not go together, length zero, or an unknown backend.
        TypeError: for tensors that are not floating-point, or a mask that is not boolean.
        RuntimeError: for ``backend="mamba_ssm"`` where it cannot run.

    Example:
        >>> x, delta, A = torch.randn(2, 100, 4, 8), torch.rand(2, 100, 2, 4), -torch.rand(4)
        >>> B, C = torch.randn(2, 100, 2, 1, 16), torch.randn(2, 100, 2, 1, 16)
        >>> quasiseparable(x, delta, A, B, C, torch.ones(2, 100, 4)).shape
        torch.Size([2, 100, 4, 8])
    """
    _check(x, delta, A, B, C, diagonal, initial_state)
    dtype, wide = x.dtype, torch.promote_types(torch.float32, x.dtype)
    # the scan is a long sum of products: autocast must not round its factors
    with autocast_off(x):
        x, delta, A, B, C, diagonal = (tensor.to(wide) for tensor in (x, delta, A, B, C, diagonal))
        if mask is not None:
            check_mask(mask, x)
            x, delta = x.masked_fill(~mask[..., None, None], 0), delta.masked_fill(~mask[..., None, None], 0)
            # whatever padding holds, times zero must be zero
            B, C = (t.masked_fill(~mask[..., None, None, None], 0) for t in (B, C))
            diagonal = diagonal.masked_fill(~mask[..., None], 0)
        state = None if initial_state is None else torch.cat(initial_state.unbind(1)).to(wide)
        y = _scan(
            torch.cat([x, x.flip(1)]), _one_batch(delta), A, _one_batch(B), _one_batch(C), state,
            chunk_size=chunk_size, backend=backend,
        )  # fmt: skip
        y = _shifted(y) if mask is None else _shifted_over_gaps(y, torch.cat([mask, mask.flip(1)]))
        forward, backward = y.chunk(2)
        y = forward + backward.flip(1) + x * diagonal[..., None]
    return y.to(dtype)


def _one_batch(t: Tensor) -> Tensor:
    """(B, L, 2, ...) to (2B, L, ...), the backward half in reversed time."""
    forward, backward = t.unbind(2)
    return torch.cat([forward, backward.flip(1)])


def _scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None, *, chunk_size: int,
    backend: Backend,
) -> Tensor:  # fmt: skip
    if backend not in ("auto", "torch", "mamba_ssm"):
        raise ValueError(f"backend must be 'auto', 'torch' or 'mamba_ssm', got {backend!r}")
    if backend == "torch" or (backend == "auto" and not (_FUSED and x.is_cuda)):
        return ssd(x, delta, A, B, C, initial_state=state, chunk_size=chunk_size)[0]
    if not _FUSED or not x.is_cuda:
        why = "x is not on a CUDA device" if _FUSED else "the package mamba_ssm is not installed"
        raise RuntimeError(f"backend='mamba_ssm' cannot run: {why}; use backend='torch'")
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return mamba_chunk_scan_combined(x, delta, A, B, C, chunk_size=chunk_size, initial_states=state)


def _shifted(y: Tensor) -> Tensor:
    """One step later, zero at the first."""
    return F.pad(y, (0, 0, 0, 0, 1, 0))[:, :-1]


def _shifted_over_gaps(y: Tensor, mask: Tensor) -> Tensor:
    """Each place gets the output of the last place before it that holds data, zero where there is none."""
    places = torch.arange(mask.shape[1], device=mask.device)
    last = F.pad(places.where(mask, -1).cummax(1).values[:, :-1], (1, 0), value=-1)
    found = y.take_along_dim(last.clamp(min=0)[..., None, None], 1)
    return found.masked_fill(((last < 0) | ~mask)[..., None, None], 0)


def semiseparable_matrix(
    delta: Float[Tensor, "B L H"], A: Float[Tensor, " H"], B: Float[Tensor, "B L G N"], C: Float[Tensor, "B L G N"]
) -> Float[Tensor, "B H L L"]:
    """The lower triangular matrix that one scan of Mamba-2 (``ssd`` without its D) multiplies with.

    ``M_ij = c_i^T exp(sum_{j<k<=i} delta_k A) b_j delta_j`` for ``i >= j``.

    Example:
        >>> delta, A, B = torch.rand(1, 5, 2), -torch.rand(2), torch.randn(1, 5, 1, 3)
        >>> semiseparable_matrix(delta, A, B, B).triu(1).abs().max().item()
        0.0
    """
    repeats = delta.shape[2] // B.shape[2]
    b, c = (t.transpose(1, 2).repeat_interleave(repeats, 1) for t in (B, C))
    decay = (delta * A).mT.cumsum(-1)
    causal = torch.ones(2 * decay.shape[-1:], dtype=torch.bool, device=delta.device).tril()
    between = (decay[..., :, None] - decay[..., None, :]).masked_fill(~causal, -torch.inf).exp()
    return (c @ b.mT) * between * delta.mT[..., None, :]


def quasiseparable_matrix(
    delta: Float[Tensor, "B L 2 H"],
    A: Float[Tensor, " H"],
    B: Float[Tensor, "B L 2 G N"],
    C: Float[Tensor, "B L 2 G N"],
    diagonal: Float[Tensor, "B L H"],
) -> Float[Tensor, "B H L L"]:
    """The matrix that ``quasiseparable`` multiplies with, for looking at; arguments as there.

    Example:
        >>> delta, A, B = torch.rand(1, 5, 2, 2), -torch.rand(2), torch.randn(1, 5, 2, 1, 3)
        >>> matrix = quasiseparable_matrix(delta, A, B, B, torch.ones(1, 5, 2))
        >>> matrix.diagonal(dim1=2, dim2=3).unique()
        tensor([1.])
    """
    both = semiseparable_matrix(_one_batch(delta), A, _one_batch(B), _one_batch(C))
    below, above = F.pad(both, (0, 0, 1, 0))[..., :-1, :].chunk(2)
    return below + above.flip(-1, -2) + torch.diag_embed(diagonal.mT)


def _check(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, diagonal: Tensor, state: Tensor | None
) -> None:  # fmt: skip
    check_floats(x=x, delta=delta, A=A, B=B, C=C, diagonal=diagonal, initial_state=state)
    if x.ndim != 4 or x.shape[1] == 0:
        raise ValueError(
            f"x must have shape (batch, length, heads, features) with a length of at least 1, got {tuple(x.shape)}"
        )
    batch, length, heads, features = x.shape
    if B.ndim != 5 or B.shape[3] == 0 or heads % B.shape[3]:
        raise ValueError(
            f"B must have shape (batch, length, 2, groups, states), its groups dividing {heads} heads, "
            f"got {tuple(B.shape)}"
        )
    groups, states = B.shape[3:]
    check_shapes(
        delta=(delta, (batch, length, 2, heads)),
        A=(A, (heads,)),
        B=(B, (batch, length, 2, groups, states)),
        C=(C, (batch, length, 2, groups, states)),
        diagonal=(diagonal, (batch, length, heads)),
        initial_state=(state, (batch, 2, heads, features, states)),
    )

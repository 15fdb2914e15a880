"""State space duality, the scan of Mamba-2 (Dao and Gu, 2024, arXiv 2405.21060, section 6), as matrix products.

Legend: B batch, L length, H heads, P features of a head, G groups that share B and C, N states, K chunks, T places of
a chunk.

``S_t = exp(delta_t A) S_{t-1} + delta_t x_t B_t^T``, ``y_t = S_t C_t + D x_t``, with one A for each head.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from torchgraft.ops._checks import check_floats, check_mask, check_shapes

__all__ = ["ssd", "ssd_naive", "ssd_step"]


def ssd(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Scan of Mamba-2 over a whole sequence.

    Inside a chunk it is masked attention with scores ``C B^T`` and decays; between chunks a state is carried.

    Args:
        x: inputs, (B, L, H, P).
        delta: step sizes, (B, L, H), positive (after the softplus).
        A: negative decay of each head, (H,), or of each head and place, (B, L, H), for decays that depend on the input.
        B: input vectors of each group, (B, L, G, N); H must be a multiple of G.
        C: output vectors of each group, (B, L, G, N).
        D: skip weights, (H,) or (H, P).
        initial_state: (B, H, P, N), state before the first step, zero without it. The last state of an earlier
            call continues it.
        mask: (B, L), True where there is data. Other places leave the state as it is, and their output is zero.
        chunk_size: places in a chunk; the result does not depend on it.

    Returns:
        Outputs in the dtype of ``x``, and the last state in float32 (float64 for float64 inputs), in which all is
        computed whatever the dtype of the inputs is.

    Raises:
        ValueError: for shapes that do not go together, length zero, or a chunk size below one.
        TypeError: for tensors that are not floating-point, or a mask that is not boolean.

    Example:
        >>> x, delta, A = torch.randn(2, 100, 4, 8), torch.rand(2, 100, 4), -torch.rand(4)
        >>> B, C = torch.randn(2, 100, 1, 16), torch.randn(2, 100, 1, 16)
        >>> y, state = ssd(x, delta, A, B, C)
        >>> y.shape, state.shape
        (torch.Size([2, 100, 4, 8]), torch.Size([2, 4, 8, 16]))
    """
    _check(x, delta, A, B, C, D, initial_state)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    dtype, wide = x.dtype, torch.promote_types(torch.float32, x.dtype)
    x, delta, A, B, C = (tensor.to(wide) for tensor in (x, delta, A, B, C))
    if mask is not None:
        check_mask(mask, x)
        delta, x = delta.masked_fill(~mask[..., None], 0), x.masked_fill(~mask[..., None, None], 0)
    batch, length, heads, features = x.shape
    groups, states = B.shape[2:]
    places = min(chunk_size, length)
    chunks = -(-length // places)
    pad = chunks * places - length

    # (B, K, H, T, ...) and (B, K, G, T, N); behind the end there is no step and no input
    u = F.pad(x * delta[..., None], (0, 0, 0, 0, 0, pad)).view(batch, chunks, places, heads, features).transpose(2, 3)
    decay = F.pad(delta * A, (0, 0, 0, pad)).view(batch, chunks, places, heads).transpose(2, 3).cumsum(-1)
    b, c = (F.pad(t, (0, 0, 0, 0, 0, pad)).view(batch, chunks, places, groups, states).transpose(2, 3) for t in (B, C))

    def per_head(t: Tensor) -> Tensor:
        """(B, K, G, ...) to (B, K, H, ...), without copying where it can."""
        return t[:, :, :, None].expand(-1, -1, -1, heads // groups, -1, -1).flatten(2, 3)

    causal = torch.ones(places, places, dtype=torch.bool, device=x.device).tril()
    between = (decay[..., :, None] - decay[..., None, :]).masked_fill(~causal, -torch.inf).exp()
    scores = per_head(c @ b.mT) * between
    inside = scores @ u

    # what each chunk adds to the state, and the state at the beginning of each
    until_end = (decay[..., -1:] - decay).exp()
    added = (u * until_end[..., None]).mT @ per_head(b)
    entry, last = _between_chunks(added, decay[..., -1], initial_state)
    outside = (per_head(c) @ entry.mT) * decay.exp()[..., None]

    y = (inside + outside).transpose(2, 3).reshape(batch, chunks * places, heads, features)[:, :length]
    if D is not None:
        y = y + x * (D if D.ndim == 2 else D[:, None]).to(wide)
    if mask is not None:
        y = y.masked_fill(~mask[..., None, None], 0)
    return y.to(dtype), last


def _between_chunks(
    added: Float[Tensor, "B K H P N"], decay: Float[Tensor, "B K H"], state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The state before each chunk, and the one after the last."""
    first = torch.zeros_like(added[:, :1]) if state is None else state[:, None].to(added.dtype)
    added = torch.cat([first, added], 1)
    total = F.pad(decay.transpose(1, 2), (1, 0)).cumsum(-1)
    places = total.shape[-1]
    causal = torch.ones(places, places, dtype=torch.bool, device=added.device).tril()
    weights = (total[..., :, None] - total[..., None, :]).masked_fill(~causal, -torch.inf).exp()
    states = torch.einsum("bhkj,bjhpn->bkhpn", weights, added)
    return states[:, :-1], states[:, -1]


def ssd_step(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """One step of ``ssd``: the output and the new state; arguments as there, without the length."""
    wide = torch.promote_types(torch.float32, x.dtype)
    repeats = x.shape[1] // B.shape[1]
    b, c = (t.to(wide).repeat_interleave(repeats, 1) for t in (B, C))
    u = (x * delta[..., None]).to(wide)
    state = torch.exp(delta.to(wide) * A.to(wide))[..., None, None] * state + u[..., None] * b[:, :, None]
    y = (state @ c[..., None]).squeeze(-1)
    if D is not None:
        y = y + x * (D if D.ndim == 2 else D[:, None])
    return y.to(x.dtype), state


def ssd_naive(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, *,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition, one step after another; the reference of the tests."""
    _check(x, delta, A, B, C, D, initial_state)
    wide = torch.promote_types(torch.float32, x.dtype)
    size = (len(x), x.shape[2], x.shape[3], B.shape[3])
    state = x.new_zeros(size, dtype=wide) if initial_state is None else initial_state.to(wide)
    outputs = []
    for t in range(x.shape[1]):
        y, state = ssd_step(x[:, t], delta[:, t], A[:, t] if A.ndim == 3 else A, B[:, t], C[:, t], D, state=state)
        outputs.append(y)
    return torch.stack(outputs, 1), state


def _check(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor | None
) -> None:  # fmt: skip
    check_floats(x=x, delta=delta, A=A, B=B, C=C, D=D, initial_state=state)
    if x.ndim != 4 or x.shape[1] == 0:
        raise ValueError(
            f"x must have shape (batch, length, heads, features) with a length of at least 1, got {tuple(x.shape)}"
        )
    batch, length, heads, features = x.shape
    if B.ndim != 4 or B.shape[2] == 0 or heads % B.shape[2]:
        raise ValueError(
            f"B must have shape (batch, length, groups, states), its groups dividing {heads} heads, "
            f"got {tuple(B.shape)}"
        )
    groups, states = B.shape[2:]
    check_shapes(
        delta=(delta, (batch, length, heads)),
        A=(A, (batch, length, heads) if A.ndim == 3 else (heads,)),
        B=(B, (batch, length, groups, states)),
        C=(C, (batch, length, groups, states)),
        initial_state=(state, (batch, heads, features, states)),
    )
    if D is not None and D.shape not in (torch.Size([heads]), torch.Size([heads, features])):
        raise ValueError(f"D must have shape {(heads,)} or {(heads, features)}, got {tuple(D.shape)}")

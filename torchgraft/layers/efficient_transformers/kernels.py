"""Attentions whose weights are a product of features, linear in the length.

Legend: B batch, H heads, N queries, S keys, D features, E value features, M mapped features, C chunk, T chunks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from torchgraft.layers.efficient_transformers.patterns import _positive


def kernel_attention(
    fq: Tensor, fk: Tensor, v: Tensor, *, causal: bool, level: Tensor | None = None, chunk: int = 128, floor: float = 0
) -> Tensor:
    """``sum_j w_ij v_j / sum_j w_ij`` with ``w_ij = fq_i . fk_j exp(level_i - level_j)``, never N x S.

    Args:
        fq: mapped queries (B, H, N, M).
        fk: mapped keys (B, H, S, M), 0 where padded.
        v: values (B, H, S, E).
        causal: j <= i alone, by chunks; needs N = S.
        level: (B, H, S), falling with time, causal only: what is older counts exp(level_i - level_j).
        chunk: changes speed and memory, never the result.
        floor: the least size of a denominator; 0 divides an empty sum by 1.

    Returns:
        (B, H, N, E).
    """
    v = torch.cat([v, v.new_ones(*v.shape[:-1], 1)], -1)
    y = _causal_product(fq, fk, v, level, chunk) if causal else fq @ (fk.transpose(-1, -2) @ v)
    below = y[..., -1:]
    if floor:
        below = torch.where(below < 0, below.clamp(max=-floor), below.clamp(min=floor))
    else:
        below = below.masked_fill(below == 0, 1)
    return y[..., :-1] / below


def _causal_product(q: Tensor, k: Tensor, v: Tensor, level: Tensor | None, chunk: int) -> Tensor:
    n = q.shape[2]
    chunk = min(chunk, n)
    fill = -n % chunk
    q, k, v = (F.pad(t, (0, 0, 0, fill)).unflatten(2, (-1, chunk)) for t in (q, k, v))
    inside = q @ k.transpose(-1, -2)
    if level is None:
        inside = inside.tril()
        before = (k.transpose(-1, -2) @ v).cumsum(2)
        before = F.pad(before, (0, 0, 0, 0, 1, -1))
        return (inside @ v + q @ before).flatten(2, 3)[:, :, :n]
    # the filling stands at the level of the last position, so that it changes nothing before it
    at = torch.cat([level, level[..., -1:].expand(*level.shape[:-1], fill)], -1).unflatten(2, (-1, chunk))
    end = at[..., -1]
    inside = inside * _falling(at, at).tril()
    state = k.transpose(-1, -2) @ (v * (end[..., None] - at).clamp(max=0).exp()[..., None])
    last = F.pad(end, (1, -1))  # the level at which each chunk begins; the first one has nothing before it
    carry = _falling(last, end).tril(-1)
    before = (carry @ state.flatten(3)).view_as(state)
    since = (at - last[..., None]).clamp(max=0).exp()[..., None]
    return (inside @ v + (q * since) @ before).flatten(2, 3)[:, :, :n]


def _falling(later: Tensor, earlier: Tensor) -> Tensor:
    return (later[..., :, None] - earlier[..., None, :]).clamp(max=0).exp()


def kernel_step(fq: Tensor, fk: Tensor, v: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One token of causal ``kernel_attention``: (B, H, M), (B, H, M), (B, H, E) and the state (B, H, M, E + 1)."""
    v = torch.cat([v, v.new_ones(*v.shape[:-1], 1)], -1)
    new = fk[..., :, None] * v[..., None, :]
    state = new if state is None else state + new
    y = (fq[..., None, :] @ state)[..., 0, :]
    return y[..., :-1] / y[..., -1:], state


def _hidden(x: Tensor, keep: Tensor | None, fill: float = 0) -> Tensor:
    """(B, H, S, …) with ``fill`` where padded."""
    return x if keep is None else x.masked_fill(~keep[:, None, :, None], fill)


def elu_features(x: Tensor) -> Tensor:
    """elu(x) + 1."""
    return F.elu(x) + 1


def linear(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, keep: Tensor | None, chunk: int = 128) -> Tensor:
    """Linear Transformer: features elu(x) + 1."""
    _positive(chunk=chunk)
    return kernel_attention(elu_features(q), _hidden(elu_features(k), keep), v, causal=causal, chunk=chunk)


def gaussian_features(
    count: int, dim: int, *, orthogonal: bool = True, seed: int | None = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Random directions (count, dim) of Performer and RFA, float32.

    With ``orthogonal`` the rows are orthogonal in groups of ``dim`` and have the norms of gaussian vectors, chi(dim).
    ``seed=None`` draws from torch's global generator.
    """
    _positive(count=count, dim=dim)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    if not orthogonal:
        return torch.randn(count, dim, generator=generator).to(device)
    squares = torch.randn(-(-count // dim), dim, dim, generator=generator)
    q, r = torch.linalg.qr(squares)
    # a Householder QR fixes signs; undone, or directions would not be uniform and the kernel's estimate biased
    rows = (q * r.diagonal(dim1=1, dim2=2).sign()[:, None]).transpose(1, 2).flatten(0, 1)[:count]
    return (rows * torch.randn(count, dim, generator=generator).norm(dim=1, keepdim=True)).to(device)


@torch.compiler.disable
def _draw(count: int, like: Tensor, seed: int) -> Tensor:
    return gaussian_features(count, like.shape[-1], seed=seed).to(like)


def _drawn(features: Tensor | None, count: int | None, like: Tensor, seed: int) -> Tensor:
    d = like.shape[-1]
    if features is None:
        return _draw(max(1, round(d * math.log(d))) if count is None else count, like, seed)
    if features.ndim != 2 or features.shape[1] != d:
        raise ValueError(f"features must have shape (count, {d}), got {tuple(features.shape)}")
    return features.to(like)


def performer(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, keep: Tensor | None, scale: float,
    features: Tensor | None = None, count: int | None = None, seed: int = 0, kernel: str = "softmax",
    eps: float = 1e-4, chunk: int = 128,
) -> Tensor:  # fmt: skip
    """FAVOR+: positive random features of the softmax kernel, or ``kernel="relu"``.

    ``features`` are the random directions (M, D), drawn from ``seed`` when not given, D log D of them by default. The
    scale of the scores is split over queries and keys, d^{-1/4} each. Causal attention subtracts a running maximum
    from the keys' exponents, so that no key can lower an earlier one; the published code subtracts one maximum of the
    whole sequence, through which later keys can push earlier ones to zero. ``eps`` is added to features whose largest
    is 1 / sqrt(M); the published code adds it before it divides, to features that it scales by other maxima, so the
    two agree at ``eps=0`` alone.
    """
    fq, fk, level = performer_features(
        q, k, causal=causal, keep=keep, scale=scale, features=_drawn(features, count, q, seed), kernel=kernel, eps=eps
    )
    return kernel_attention(fq, fk, v, causal=causal, level=level, chunk=chunk)


def performer_features(
    q: Tensor, k: Tensor, *, causal: bool, keep: Tensor | None, scale: float, features: Tensor, kernel: str, eps: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mapped queries and keys, and the level that belongs to the keys (causal softmax kernel alone)."""
    q, k = q * math.sqrt(scale), k * math.sqrt(scale)
    root = math.sqrt(len(features))
    if kernel == "relu":
        fq, fk = ((x @ features.T).relu() / root + eps for x in (q, k))
        return fq, _hidden(fk, keep), None
    if kernel != "softmax":
        raise ValueError(f"kernel must be 'softmax' or 'relu', got {kernel!r}")
    a, b = (x @ features.T - x.square().sum(-1, keepdim=True) / 2 for x in (q, k))
    fq = (a - a.amax(-1, keepdim=True)).exp() / root + eps
    top = _hidden(b, keep, torch.finfo(b.dtype).min).amax(-1, keepdim=True)
    top = top.cummax(2).values if causal else top.amax(2, keepdim=True)
    # where nothing has been seen yet the maximum is that of no key; padded keys may lie above it
    fk = _hidden((b - top).clamp(max=0).exp() / root + eps, keep)
    return fq, fk, -top[..., 0] if causal else None


def rfa_features(x: Tensor, features: Tensor) -> Tensor:
    """[sin(w x), cos(w x)] / sqrt(M) of the normalised x: (…, D) to (…, 2 M)."""
    angle = F.normalize(x, dim=-1) @ features.T
    return torch.cat([angle.sin(), angle.cos()], -1) / math.sqrt(len(features))


def rfa(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, keep: Tensor | None, features: Tensor | None = None,
    count: int | None = None, seed: int = 0, gate: Tensor | None = None, chunk: int = 128, floor: float = 1e-3,
) -> Tensor:  # fmt: skip
    """Random feature attention: sines and cosines of normalised queries and keys.

    ``gate`` (B, H, S) in 0..1, causal alone, forgets: S_t = g_t S_{t-1} + (1 - g_t) phi(k_t) v_t. The features can make
    a denominator small or negative; it is kept at least ``floor`` from 0.
    """
    w = _drawn(features, count, q, seed)
    fq, fk = rfa_features(q, w), _hidden(rfa_features(k, w), keep)
    level = None
    if gate is not None:
        if not causal:
            raise ValueError("gate needs causal=True: what is forgotten is the past")
        if gate.shape != k.shape[:3]:
            raise ValueError(f"gate must have shape {tuple(k.shape[:3])}, got {tuple(gate.shape)}")
        gate = gate.to(q.dtype)
        # padding neither adds nor forgets
        kept = gate if keep is None else gate.masked_fill(~keep[:, None], 1)
        level = kept.clamp(min=1e-6).log().cumsum(-1)
        fk = fk * (1 - gate)[..., None]
    return kernel_attention(fq, fk, v, causal=causal, level=level, chunk=chunk, floor=floor)


def efficient(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, keep: Tensor | None) -> Tensor:
    """Efficient attention: softmax over the features of q, softmax over the positions of k."""
    weights = _hidden(k, keep, torch.finfo(k.dtype).min).softmax(2)
    return q.softmax(-1) @ (_hidden(weights, keep).transpose(-1, -2) @ v)

"""Token mixing without query-key products, or with more than them: synthesizers, convolutions, FFT, AFT, memories.

Legend: B batch, H heads, N length, S keys, D features, E value features, K kernel width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from torchgraft.layers.efficient_transformers.kernels import _hidden
from torchgraft.layers.efficient_transformers.patterns import (
    _positive,
    normalised,
    pattern_attention,
    softmax_sums,
    span,
)
from torchgraft.ops.linear_recurrence import linear_recurrence


def tiled(work: Callable[..., Tensor], n: int, tile: int, *tensors: Tensor) -> Tensor:
    """``work(start, stop, *tensors)`` for tiles of rows, joined along axis 2; its insides are recomputed backward."""
    _positive(tile=tile)
    parts = [
        checkpoint(work, at, min(at + tile, n), *tensors, use_reentrant=False, preserve_rng_state=False)
        for at in range(0, n, tile)
    ]
    return torch.cat(parts, dim=2)


def _order(start: int, stop: int, keys: int, device: torch.device, shift: int = 0) -> Tensor:
    """Which keys come no later than rows start..stop, whose own key is ``shift`` further on."""
    i = torch.arange(start, stop, device=device)[:, None] + shift
    return torch.arange(keys, device=device) <= i


# ----------------------------------------------------------------- synthesizers


def synthesizer(logit_q: Tensor, logit_k: Tensor, v: Tensor, *, causal: bool, keep: Tensor | None) -> Tensor:
    """softmax(A C^T) V with logits that no pair of tokens forms: dense A = ReLU(W1 x), C = W2; factorised A, C free.

    Args:
        logit_q: A, (B or 1, H, N, R).
        logit_k: C, (H, at least S, R).
        v: values (B, H, S, E).
    """
    n = v.shape[2]
    mask = None if keep is None else keep[:, None, None]
    if causal and mask is not None:
        mask = mask & _order(0, n, n, v.device)
    a = logit_q.expand(len(v), -1, -1, -1)
    c = logit_k[:, :n].expand(len(v), -1, -1, -1)
    if mask is not None and causal:
        # rows that stand before every real key have nothing to attend to
        return _sdpa_or_zero(a, c, v, mask)
    return F.scaled_dot_product_attention(a, c, v, attn_mask=mask, is_causal=causal, scale=1.0)


def _sdpa_or_zero(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    some = mask.any(-1, keepdim=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask | ~some, scale=1.0).masked_fill(~some, 0)


def synthesizer_factorised(
    a: Tensor, b: Tensor, v: Tensor, *, causal: bool, keep: Tensor | None, tile: int = 64
) -> Tensor:
    """Factorised dense synthesizer: the logit of key j is a[j // len(b)] b[j % len(b)], both functions of x_i.

    ``a`` (B, H, N, X) and ``b`` (B, H, N, Y) with X Y at least N.
    """
    n = v.shape[2]

    def rows(start: int, stop: int, a: Tensor, b: Tensor, v: Tensor) -> Tensor:
        logits = (a[:, :, start:stop, :, None] * b[:, :, start:stop, None, :]).flatten(3)[..., :n]
        return normalised(softmax_sums(logits, _visible(start, stop, n, causal, keep, v), v))

    return tiled(rows, n, tile, a, b, v)


def synthesizer_random(weights: Tensor, v: Tensor, *, causal: bool, keep: Tensor | None, tile: int = 64) -> Tensor:
    """softmax(R) V with a free R (H, at least N, at least N)."""
    n = v.shape[2]

    def rows(start: int, stop: int, weights: Tensor, v: Tensor) -> Tensor:
        return normalised(softmax_sums(weights[:, start:stop, :n], _visible(start, stop, n, causal, keep, v), v))

    return tiled(rows, n, tile, weights, v)


def _visible(start: int, stop: int, n: int, causal: bool, keep: Tensor | None, like: Tensor) -> Tensor:
    rows = stop - start
    mask = torch.ones(1, 1, rows, n, dtype=torch.bool, device=like.device)
    if causal:
        mask = mask & _order(start, stop, n, like.device)
    return mask if keep is None else mask & keep[:, None, None]


# ----------------------------------------------------------------- convolutions, FFT


def light_convolution(
    v: Tensor, weights: Tensor, *, causal: bool = False, key_padding_mask: Tensor | None = None
) -> Tensor:
    """Lightweight convolution, or dynamic when the kernel depends on the position (Wu et al., 2019).

    Args:
        v: (B, H, N, E); all features of a head share a kernel.
        weights: (H, K) or (B, H, N, K), normalised here by a softmax over the kernel. Tap K - 1 is the position itself
            when causal, else tap K // 2 is.
        causal: see no later position.
        key_padding_mask: (B, N), True where padded: those positions count as 0, like what lies beyond the ends.

    Returns:
        (B, H, N, E).

    Raises:
        ValueError: for weights of another shape, or an even K without ``causal``.

    Example:
        >>> light_convolution(torch.randn(2, 4, 10, 8), torch.zeros(4, 3)).shape
        torch.Size([2, 4, 10, 8])
    """
    b, h, n, _ = v.shape
    width = weights.shape[-1]
    if weights.shape not in ((h, width), (b, h, n, width)):
        raise ValueError(f"weights must have shape ({h}, K) or ({b}, {h}, {n}, K), got {tuple(weights.shape)}")
    if not causal and width % 2 == 0:
        raise ValueError(f"weights must have an odd width unless causal, got {width}")
    taps = weights.softmax(-1)
    taps = taps[None, :, None] if weights.ndim == 2 else taps
    left = width - 1 if causal else width // 2
    x = F.pad(_hidden(v, None if key_padding_mask is None else ~key_padding_mask), (0, 0, left, width - 1 - left))
    total = x[:, :, :n] * taps[..., :1]
    for t in range(1, width):
        total = total + x[:, :, t : t + n] * taps[..., t : t + 1]
    return total


def fourier_mixing(x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
    """FNet: the real part of the discrete Fourier transform over positions and features.

    Half precision is transformed in float32, since transforms need it. Padding is honoured by a transform of each
    sample's real positions alone, which the published model does not do; padded positions give 0.

    Args:
        x: (B, N, C).
        key_padding_mask: (B, N), True where padded.

    Returns:
        (B, N, C), in the dtype of ``x``.

    Example:
        >>> fourier_mixing(torch.ones(1, 4, 8))[0, 0, 0]
        tensor(32.)
    """
    if key_padding_mask is not None and bool(key_padding_mask.any()):
        y = torch.zeros_like(x)
        real = ~key_padding_mask
        for length in real.sum(-1).unique().tolist():
            rows = (real.sum(-1) == length).nonzero()[:, 0]
            at = real[rows].nonzero()[:, 1].view(len(rows), length)
            y = y.index_put((rows[:, None], at), fourier_mixing(x[rows[:, None], at])) if length else y
        return y
    n, c = x.shape[1:]
    # features first, as a real transform; the other half of the spectrum mirrors this one
    half = torch.fft.fft(torch.fft.rfft(x.to(torch.promote_types(x.dtype, torch.float32)), dim=2), dim=1).real
    mirror = half[:, :, 1 : c - c // 2].flip(2)
    mirror = torch.cat([mirror[:, :1], mirror[:, 1:].flip(1)], 1) if n > 1 else mirror
    return torch.cat([half, mirror], 2).to(x.dtype)


# ----------------------------------------------------------------- attention-free transformer


def aft(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, keep: Tensor | None, bias: Tensor | None = None,
    bias_factors: tuple[Tensor, Tensor] | None = None, window: int | None = None, tile: int = 16,
) -> Tensor:  # fmt: skip
    """Attention-free transformer: sigmoid(q_t) . sum_s exp(k_s + w_ts) v_s / sum_s exp(k_s + w_ts), per feature.

    Args:
        q: (B, H, N, D), as k and v.
        bias: w (H, at least N, at least N), or none: AFT-simple, linear in the length.
        bias_factors: w as u @ z^T with both (H, at least N, rank).
        window: AFT-local: w counts only where |t - s| < window.
        tile: rows at once; their insides, tile x N x D, are recomputed backward.
    """
    n = k.shape[2]
    if v.shape[-1] != k.shape[-1] or q.shape != k.shape:
        raise ValueError(f"aft needs q, k and v of one shape, got {q.shape}, {k.shape} and {v.shape}")
    if bias is not None and bias_factors is not None:
        raise ValueError("aft takes bias or bias_factors, not both")
    given = [t for t in (bias, *(bias_factors or ())) if t is not None]
    for t in given:
        if t.ndim != 3 or len(t) != k.shape[1] or (bias is not None and t.shape[1] != t.shape[2]):
            raise ValueError(
                f"aft's position biases must have shape ({k.shape[1]}, L, L), or two factors ({k.shape[1]}, L, rank), "
                f"got {tuple(t.shape)}"
            )
        if t.shape[1] < n:
            raise ValueError(f"aft's position biases reach to {t.shape[1]} positions, got {n}")
    if window is not None:
        _positive(window=window)
        if not given:
            raise ValueError("window limits position biases, and aft was given none")
    low = torch.finfo(k.dtype).min
    if not given:
        y = _aft_simple(_hidden(k, keep, low), _hidden(v, keep), causal)
        return q.sigmoid() * y

    def rows(start: int, stop: int, k: Tensor, v: Tensor, *w: Tensor) -> Tensor:
        offset = w[0][:, start:stop, :n] if len(w) == 1 else w[0][:, start:stop] @ w[1][:, :n].transpose(-1, -2)
        if window is not None:
            t, s = torch.arange(start, stop, device=k.device)[:, None], torch.arange(n, device=k.device)
            offset = offset * ((t - s).abs() < window)
        seen = _visible(start, stop, n, causal, keep, v)
        x = (k[:, :, None] + offset[..., None]).masked_fill(~seen[..., None], low)
        return ((x.softmax(3) * v[:, :, None]).sum(3)).masked_fill(~seen.any(-1, keepdim=True), 0)

    return q.sigmoid() * tiled(rows, n, tile, k, v, *(t.to(k.dtype) for t in given))


def _aft_simple(k: Tensor, v: Tensor, causal: bool) -> Tensor:
    if not causal:
        return (k.softmax(2) * v).sum(2, keepdim=True)
    total = k.logcumsumexp(2)
    before = F.pad(total, (0, 0, 1, -1), value=torch.finfo(k.dtype).min)
    # the running mean: what there was, in the share it still has, and the new value
    decay, share = (before - total).exp(), (k - total).exp()
    shape = k.shape
    flat = [x.flatten(0, 1) for x in (decay, share * v)]
    return linear_recurrence(*flat).view(shape)


# ----------------------------------------------------------------- spans and memories


def span_weights(z: Tensor, ramp: float, distance: Tensor) -> Tensor:
    """m_z(x) = clamp((ramp + z - x) / ramp, 0, 1), z (H,), distance of any shape: (H, …)."""
    return ((ramp + z.view(-1, *[1] * distance.ndim) - distance) / ramp).clamp(0, 1)


def adaptive_span(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, keep: Tensor | None, scale: float, z: Tensor,
    ramp: float = 32, longest: int | None = None,
) -> Tensor:  # fmt: skip
    """Adaptive span: softmax weights times a soft ramp m_z(|i - j|), normalised; z (H,) is learned.

    ``longest`` bounds z, N by default: positions further than ``longest + ramp`` are not computed. A larger z is an
    error (not under ``torch.compile``, which cannot look at its values).
    """
    if z.shape != (q.shape[1],):
        raise ValueError(f"z must have shape ({q.shape[1]},), one span a head, got {tuple(z.shape)}")
    if not ramp > 0:
        raise ValueError(f"ramp must be positive, got {ramp}")
    n = q.shape[2]
    if longest is not None and longest < 0:
        raise ValueError(f"longest must not be negative, got {longest}")
    if longest is not None and not torch.compiler.is_compiling() and bool((z > longest).any()):
        raise ValueError(f"z must not exceed longest={longest}, beyond which nothing is computed, got {float(z.max())}")
    reach = min(n, math.ceil((n if longest is None else longest) + ramp))
    z = z.to(q.dtype)
    return pattern_attention(
        span(n, causal, reach=reach), q, k, v, keep=keep, scale=scale,
        soft=lambda i, j: span_weights(z, ramp, (i - j).abs().to(q.dtype)),
    )  # fmt: skip


def transformer_xl(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, keep: Tensor | None, scale: float, relative: Tensor,
    content_bias: Tensor | None = None, position_bias: Tensor | None = None, tile: int = 64,
) -> Tensor:  # fmt: skip
    """Transformer-XL: scores (q_i + u) . k_j + (q_i + w) . r_{i - j} over a memory and the segment itself.

    Args:
        q: (B, H, N, D), the segment.
        k: (B, H, M + N, D), as v: the memory first, gradients stopped by the caller.
        relative: r, projected encodings of the distances 0, 1, …, (H, at least M + N, D).
        content_bias: u (H, D), 0 where not given.
        position_bias: w (H, D), 0 where not given.
        tile: rows at once, recomputed backward.
    """
    if not causal:
        raise ValueError("transformer_xl is causal: its distances are of the past; pass causal=True")
    h, n, d = q.shape[1:]
    keys = k.shape[2]
    if keys < n:
        raise ValueError(f"k and v hold the memory and the segment, at least {n} positions, got {keys}")
    if relative.shape[0] != h or relative.shape[1] < keys or relative.shape[2] != d:
        raise ValueError(f"relative must have shape ({h}, at least {keys}, {d}), got {tuple(relative.shape)}")
    u = q.new_zeros(h, d) if content_bias is None else content_bias.to(q.dtype)
    w = q.new_zeros(h, d) if position_bias is None else position_bias.to(q.dtype)

    def rows(start: int, stop: int, q: Tensor, k: Tensor, v: Tensor, r: Tensor, u: Tensor, w: Tensor) -> Tensor:
        part = q[:, :, start:stop]
        i = torch.arange(start, stop, device=q.device)[:, None] + keys - n
        distance = i - torch.arange(keys, device=q.device)
        by_distance = (part + w[:, None]) @ r.transpose(-1, -2)
        position = by_distance.gather(-1, distance.clamp(min=0).expand(*by_distance.shape[:-1], keys))
        scores = ((part + u[:, None]) @ k.transpose(-1, -2) + position) * scale
        mask = distance >= 0
        return normalised(softmax_sums(scores, mask if keep is None else mask & keep[:, None, None], v))

    return tiled(rows, n, tile, q, k, v, relative.to(q.dtype)[:, :keys], u, w)

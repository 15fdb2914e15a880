"""Attentions through a few landmarks, projections, latents or pooled positions.

Legend: B batch, H heads, N queries, S keys, D features, E value features, M landmarks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from torchgraft.layers.efficient_transformers.kernels import _hidden
from torchgraft.layers.efficient_transformers.patterns import _positive, local, pattern_attention

_sdpa = F.scaled_dot_product_attention


def _padding(keep: Tensor | None) -> Tensor | None:
    return None if keep is None else keep[:, None, None]


def linformer(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, keep: Tensor | None, scale: float, e: Tensor, f: Tensor
) -> Tensor:
    """softmax(Q (E K)^T / sqrt d) (F V), with ``e`` and ``f`` of shape (rank, longest) or (H, rank, longest)."""
    for name, weight in (("e", e), ("f", f)):
        if weight.ndim not in (2, 3) or (weight.ndim == 3 and weight.shape[0] != k.shape[1]):
            raise ValueError(
                f"{name} must have shape (rank, longest) or (heads, rank, longest), got {tuple(weight.shape)}"
            )
        if weight.shape[-1] < k.shape[2]:
            raise ValueError(
                f"linformer's projections were made for at most {weight.shape[-1]} positions, got {k.shape[2]}; make "
                "the layer with a larger max_length, or cut the sequence"
            )
    n = k.shape[2]
    return _sdpa(
        q, e[..., :n].to(k.dtype) @ _hidden(k, keep), f[..., :n].to(v.dtype) @ _hidden(v, keep), scale=scale
    )  # fmt: skip


def pseudo_inverse(a: Tensor, iterations: int = 6) -> Tensor:
    """Moore-Penrose inverse of softmax matrices by the iteration of Razavi et al., third order."""
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    z = a.transpose(-1, -2) / (a.abs().sum(-2).amax(-1) * a.abs().sum(-1).amax(-1))[..., None, None]
    for _ in range(iterations):
        az = a @ z
        z = z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az))) / 4
    return z


def _segments(length: int, count: int, keep: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Averaging weights (B or 1, 1, count, length) of consecutive segments of the real positions, and who is empty."""
    if keep is None:
        keep = torch.ones(1, length, dtype=torch.bool, device=like.device)
    real = keep.sum(-1, keepdim=True)
    # segments of the real positions, wherever padding stands: a padded batch equals each sample alone
    rank = keep.long().cumsum(-1) - 1
    segment = rank * count // real.clamp(min=1)
    inside = (segment[:, None] == torch.arange(count, device=like.device)[:, None]) & keep[:, None]
    sizes = inside.sum(-1, keepdim=True)
    return (inside.to(like.dtype) / sizes.clamp(min=1))[:, None], (sizes == 0)[:, None]


def nystrom(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, keep: Tensor | None, scale: float, landmarks: int = 64,
    iterations: int = 6, conv: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Nystromformer: F A^+ (B V) with landmarks that are means of segments; ``conv`` (H, width) convolves V.

    Segments are of the real positions of each sample. Where the length is no multiple of ``landmarks`` they differ by
    one in size; the published code pads instead, and averages the padding in. The norms in the start of the inverse are
    those of each matrix, where the published code takes the largest of the batch by default.
    """
    _positive(landmarks=landmarks)
    mean, empty = _segments(k.shape[2], min(landmarks, k.shape[2]), keep, k)
    q_mean, k_mean = mean @ _hidden(q, keep), mean @ _hidden(k, keep)
    gone = empty.transpose(-1, -2)
    first = (q @ k_mean.transpose(-1, -2) * scale).masked_fill(gone, -torch.inf).softmax(-1)
    middle = (q_mean @ k_mean.transpose(-1, -2) * scale).masked_fill(gone, -torch.inf).softmax(-1)
    # landmarks of no position: the identity among themselves, so that the inverse is that of the others
    middle = torch.where(empty | gone, torch.eye(mean.shape[2], dtype=q.dtype, device=q.device), middle)
    last = _sdpa(q_mean, k, v, attn_mask=_padding(keep), scale=scale).masked_fill(empty, 0)
    y = first @ (pseudo_inverse(middle, iterations) @ last)
    if conv is not None:
        width = conv.shape[-1]
        if conv.ndim != 2 or len(conv) != v.shape[1] or width % 2 == 0:
            raise ValueError(f"conv must have shape ({v.shape[1]}, odd width), got {tuple(conv.shape)}")
        kernel = conv.to(v.dtype)[:, None, :, None]
        y = y + F.conv2d(_hidden(v, keep), kernel, padding=(width // 2, 0), groups=len(conv))
    return y


def induced(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, keep: Tensor | None, scale: float, latents: Tensor
) -> Tensor:
    """``latents`` (M, D) or (H, M, D) gather keys and values by attention; queries attend to what they gathered."""
    h, d = q.shape[1], q.shape[-1]
    fits = latents.ndim == 2 or (latents.ndim == 3 and len(latents) == h)
    if not fits or latents.shape[-1] != d or latents.shape[-2] < 1:
        raise ValueError(
            f"latents must have shape (count, {d}) or ({h}, count, {d}), count at least 1, got {tuple(latents.shape)}"
        )
    asked = latents.to(q.dtype).expand(len(q), q.shape[1], -1, -1)
    mask = _padding(keep)
    keys, values = (_sdpa(asked, k, x, attn_mask=mask, scale=scale) for x in (k, v))
    return _sdpa(q, keys, values, scale=scale)


def pooled(x: Tensor, stride: int, keep: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Means of ``stride`` consecutive real positions, (B, H, ceil(N / stride), D), and which of them are real."""
    _positive(stride=stride)
    n = x.shape[2]
    fill = -n % stride
    real = torch.ones(1, n, dtype=torch.bool, device=x.device) if keep is None else keep
    counts = F.pad(real, (0, fill)).unflatten(1, (-1, stride)).sum(-1)
    sums = F.pad(_hidden(x, keep), (0, 0, 0, fill)).unflatten(2, (-1, stride)).sum(3)
    return sums / counts.clamp(min=1).to(x.dtype)[:, None, :, None], None if keep is None else counts > 0


def funnel(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, keep: Tensor | None, scale: float, stride: int = 2
) -> Tensor:
    """Funnel: queries are means of ``stride`` positions, keys and values stay; the output is shorter."""
    return _sdpa(pooled(q, stride, keep)[0], k, v, attn_mask=_padding(keep), scale=scale)


def poolingformer(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, keep: Tensor | None, scale: float, window: int = 64,
    stride: int = 32,
) -> Tensor:  # fmt: skip
    """Two levels added up: blocks with their neighbours, and attention to keys and values pooled by ``stride``.

    After Poolingformer, whose second level projects the first one's output anew and looks at a wider window, where
    this one, made for given q, k and v, looks at all pooled positions.
    """
    near = pattern_attention(local(q.shape[2], False, window=window), q, k, v, keep=keep, scale=scale)
    keys, real = pooled(k, stride, keep)
    return near + _sdpa(q, keys, pooled(v, stride, keep)[0], attn_mask=_padding(real), scale=scale)

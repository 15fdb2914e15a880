"""What each attention is, written out with n x n matrices: for tests, and for reading.

Nothing here shares a computation with the fast forms, except features and assignments that are drawn at random.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchgraft.layers.efficient_transformers import clustering, low_rank, patterns
from torchgraft.layers.efficient_transformers.attention import attention_pattern, kind_named

__all__ = ["dense_equivalent"]


def _softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Rows that may see nothing are 0."""
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.where(mask.any(-1, keepdim=True), weights, 0)


def _mask(q: Tensor, k: Tensor, causal: bool, keep: Tensor | None) -> Tensor:
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    if causal:
        mask = mask.tril(k.shape[2] - q.shape[2])
    return mask[None, None] if keep is None else mask & keep[:, None, None]


def _labels(n: int, relative_keys: Tensor) -> Tensor:
    most = len(relative_keys) // 2
    return relative_keys[(torch.arange(n) - torch.arange(n)[:, None]).clamp(-most, most) + most]


def _pattern(kind: str) -> Callable[..., Tensor]:
    def dense(
        q: Tensor, k: Tensor, v: Tensor, *, causal: bool, keep: Tensor | None, scale: float,
        relative_keys: Tensor | None = None, rows: tuple[Tensor, Tensor, Tensor] | None = None, **options: Any,
    ) -> Tensor:  # fmt: skip
        n = q.shape[2]
        mask = _mask(q, k, causal, keep) & attention_pattern(kind, n, causal=causal, **options)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            scores = q @ k.transpose(-1, -2)
            if relative_keys is not None:
                scores = scores + torch.einsum("bhid,ijd->bhij", q, _labels(n, relative_keys))
            return _softmax(scores * scale, mask) @ v

        y = attend(q, k, v)
        if rows is not None:
            special = list(options["global_tokens"])
            y[:, :, special] = attend(*rows)[:, :, special]
        return y

    return dense


def _weighted(weights: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    weights = weights * mask
    return (weights @ v) / weights.sum(-1, keepdim=True)


def _linear(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, keep: Tensor | None, chunk: int = 128) -> Tensor:
    weights = (F.elu(q) + 1) @ (F.elu(k) + 1).transpose(-1, -2)
    return _weighted(weights, v, _mask(q, k, causal, keep))


def _performer(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, keep: Tensor | None, scale: float, features: Tensor,
    kernel: str = "softmax", eps: float = 1e-4, **_: Any,
) -> Tensor:  # fmt: skip
    mask, w = _mask(q, k, causal, keep), features.to(q)
    q, k = q * scale**0.5, k * scale**0.5
    if kernel == "relu":
        fq, fk = ((x @ w.T).relu() / math.sqrt(len(w)) + eps for x in (q, k))
        return _weighted(fq @ fk.transpose(-1, -2), v, mask)
    a, b = (x @ w.T - x.square().sum(-1, keepdim=True) / 2 for x in (q, k))
    fq = (a - a.amax(-1, keepdim=True)).exp() / math.sqrt(len(w)) + eps
    real = torch.ones(len(k), k.shape[2], dtype=torch.bool) if keep is None else keep
    peak = b.amax(-1).masked_fill(~real[:, None], -torch.inf)
    peak = peak.cummax(-1).values if causal else peak.amax(-1, keepdim=True).expand_as(peak)
    fk = (b - peak[..., None]).exp() / math.sqrt(len(w)) + eps
    fk = fk.masked_fill(~real[:, None, :, None], 0)
    older = (peak[..., None, :] - peak[..., :, None]).exp() if causal else torch.ones(())
    return _weighted(fq @ fk.transpose(-1, -2) * older.nan_to_num(0, 0, 0), v, mask)


def _rfa(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, keep: Tensor | None, features: Tensor,
    gate: Tensor | None = None, floor: float = 1e-3, **_: Any,
) -> Tensor:  # fmt: skip
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    # cos(w q - w k) is the product of the features
    angles = (q @ features.T.to(q))[..., :, None, :] - (k @ features.T.to(q))[..., None, :, :]
    weights = angles.cos().mean(-1) * _mask(q, k, causal, keep)
    if gate is not None:
        open_ = gate if keep is None else gate.masked_fill(~keep[:, None], 1)
        past = open_.log().cumsum(-1)
        weights = weights * (1 - gate)[..., None, :] * (past[..., :, None] - past[..., None, :]).tril().exp()
    below = weights.sum(-1, keepdim=True)
    return weights @ v / (below.sign() * below.abs().clamp(min=floor))


def _efficient(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, keep: Tensor | None) -> Tensor:
    scores = k if keep is None else k.masked_fill(~keep[:, None, :, None], -torch.inf)
    return (q.softmax(-1) @ scores.softmax(2).transpose(-1, -2)) @ v


def _linformer(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, keep: Tensor | None, scale: float, e: Tensor, f: Tensor
) -> Tensor:
    n = k.shape[2]
    if keep is not None:
        k, v = k * keep[:, None, :, None], v * keep[:, None, :, None]
    return (q @ (e[..., :n] @ k).transpose(-1, -2) * scale).softmax(-1) @ (f[..., :n] @ v)


def _nystrom(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, keep: Tensor | None, scale: float, landmarks: int = 64,
    iterations: int = 6, conv: Tensor | None = None,
) -> Tensor:  # fmt: skip
    y = torch.zeros_like(v)
    for b in range(len(q)):
        at = torch.arange(q.shape[2]) if keep is None else keep[b].nonzero()[:, 0]
        groups = [list(g) for g in torch.tensor_split(at, min(landmarks, len(at)))]
        groups = [[] for _ in groups]
        for rank, position in enumerate(at.tolist()):
            groups[rank * len(groups) // len(at)].append(position)
        qm, km = (torch.stack([x[b][:, g].mean(1) for g in groups], 1) for x in (q, k))
        parts = [(qm, k[b][:, at]), (qm, km), (q[b][:, at], km)]
        last, middle, first = ((x @ z.transpose(-1, -2) * scale).softmax(-1) for x, z in parts)
        y[b][:, at] = first @ low_rank.pseudo_inverse(middle, iterations) @ last @ v[b][:, at]
        if conv is not None:
            for t in range(conv.shape[1]):
                shifted = at + t - conv.shape[1] // 2
                inside = (shifted >= 0) & (shifted < q.shape[2])
                there = torch.zeros(v.shape[1], len(at), v.shape[3], dtype=v.dtype)
                there[:, inside] = v[b][:, shifted[inside]]
                if keep is not None:
                    there[:, inside] *= keep[b][shifted[inside]][:, None]
                y[b][:, at] += conv[:, t, None, None] * there
    return y


def _induced(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, keep: Tensor | None, scale: float, latents: Tensor
) -> Tensor:
    scores = torch.einsum("...md,bhnd->bhmn", latents, k) * scale
    gathered = _softmax(scores, torch.ones_like(scores, dtype=torch.bool) & (_mask(scores, k, False, keep)))
    return (q @ (gathered @ k).transpose(-1, -2) * scale).softmax(-1) @ gathered @ v


def _means(x: Tensor, stride: int, keep: Tensor | None) -> Tensor:
    real = torch.ones(len(x), x.shape[2], dtype=torch.bool) if keep is None else keep
    groups = range(0, x.shape[2], stride)
    rows = [
        [x[b][:, s : s + stride][:, real[b, s : s + stride]].sum(1) / max(1, int(real[b, s : s + stride].sum()))
         for s in groups] for b in range(len(x))
    ]  # fmt: skip
    return torch.stack([torch.stack(row, 1) for row in rows])


def _funnel(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, keep: Tensor | None, scale: float, stride: int = 2
) -> Tensor:
    pooled = _means(q, stride, keep)
    return _softmax(pooled @ k.transpose(-1, -2) * scale, _mask(pooled, k, False, keep)) @ v


def _poolingformer(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, keep: Tensor | None, scale: float, window: int = 64,
    stride: int = 32,
) -> Tensor:  # fmt: skip
    near = _pattern("local")(q, k, v, causal=False, keep=keep, scale=scale, window=window)
    keys, values = _means(k, stride, keep), _means(v, stride, keep)
    real = None
    if keep is not None:
        real = torch.stack([keep[:, s : s + stride].any(1) for s in range(0, keep.shape[1], stride)], 1)
    return near + _softmax(q @ keys.transpose(-1, -2) * scale, _mask(q, keys, False, real)) @ values


def _adaptive_span(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, keep: Tensor | None, scale: float, z: Tensor,
    ramp: float = 32, longest: int | None = None,
) -> Tensor:  # fmt: skip
    at = torch.arange(q.shape[2])
    soft = ((ramp + z[:, None, None] - (at[:, None] - at).abs()) / ramp).clamp(0, 1)
    weights = _softmax(q @ k.transpose(-1, -2) * scale, _mask(q, k, causal, keep)) * soft
    below = weights.sum(-1, keepdim=True)
    return weights @ v / torch.where(below == 0, 1, below)


def _transformer_xl(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, keep: Tensor | None, scale: float, relative: Tensor,
    content_bias: Tensor | None = None, position_bias: Tensor | None = None, tile: int = 64,
) -> Tensor:  # fmt: skip
    n, keys = q.shape[2], k.shape[2]
    u, w = (torch.zeros(q.shape[1], q.shape[3]).to(q) if x is None else x for x in (content_bias, position_bias))
    distance = (torch.arange(n)[:, None] + keys - n - torch.arange(keys)).clamp(min=0)
    scores = torch.einsum("bhid,bhjd->bhij", q + u[:, None], k)
    scores = scores + torch.einsum("bhid,hijd->bhij", q + w[:, None], relative[:, distance])
    return _softmax(scores * scale, _mask(q, k, True, keep)) @ v


def _aft(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, keep: Tensor | None, bias: Tensor | None = None,
    bias_factors: tuple[Tensor, Tensor] | None = None, window: int | None = None, tile: int = 16,
) -> Tensor:  # fmt: skip
    n = k.shape[2]
    w = torch.zeros(1, n, n).to(k) if bias is None else bias[:, :n, :n]
    if bias_factors is not None:
        w = bias_factors[0][:, :n] @ bias_factors[1][:, :n].transpose(-1, -2)
    if window is not None:
        at = torch.arange(n)
        w = torch.where((at[:, None] - at).abs() < window, w, 0)
    weights = (k[:, :, None] + w[..., None]).exp() * _mask(q, k, causal, keep)[..., None]
    return q.sigmoid() * (weights * v[:, :, None]).sum(3) / weights.sum(3)


def _reformer(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, keep: Tensor | None, chunk: int, rotations: Tensor, **_: Any
) -> Tensor:
    b, h, n, _d = q.shape
    y, chunk = torch.zeros_like(v), min(chunk, n)
    buckets = clustering.lsh_buckets(q, rotations, keep)
    for i_b in range(b):
        real = torch.ones(n, dtype=torch.bool) if keep is None else keep[i_b]
        last = (int(real.sum()) - 1) // chunk
        for i_h in range(h):
            place = torch.empty(len(buckets[0, 0]), n, dtype=torch.long)
            for r, bucket in enumerate(buckets[i_b, i_h]):
                order = sorted((int(own), t) for t, own in enumerate(bucket))
                for rank, (_own, t) in enumerate(order):
                    place[r, t] = rank // chunk
            outs, totals = [], []
            for r in range(len(place)):
                # how often a key is seen: in the own chunk, and in the one before (of another round at the start)
                own = (place[r][:, None] == place[r][None]).long()
                earlier = (place[r][:, None] - 1 == place[r][None]).long()
                first = (place[r][:, None] == 0) & (place[r - 1][None] == last)
                several = -(-n // chunk) > 1
                times = (own + (earlier + first.long()) * several) * real[None]
                if causal:
                    times = times.tril()
                scores = q[i_b, i_h] @ F.normalize(q[i_b, i_h], dim=-1).T
                weights = (scores.exp() * times).fill_diagonal_(0)
                # itself, where there is nothing else
                alone = (weights.sum(-1) == 0) * times.diagonal()
                weights = weights + torch.diag(alone.to(weights.dtype) * math.exp(-300))
                outs.append(weights @ v[i_b, i_h] / weights.sum(-1, keepdim=True).clamp(min=1e-200))
                totals.append(weights.sum(-1, keepdim=True).clamp(min=1e-200).log())
            mix = torch.stack(totals).softmax(0)
            y[i_b, i_h] = (mix * torch.stack(outs)).sum(0)
    return y


def _routing(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, keep: Tensor | None, scale: float, centroids: Tensor,
    window: int, **_: Any,
) -> Tensor:  # fmt: skip
    q, k = F.layer_norm(q, q.shape[-1:]), F.layer_norm(k, k.shape[-1:])
    total, times = torch.zeros_like(v), torch.zeros_like(v[..., :1])
    base = _mask(q, k, causal, keep)
    for c in range(centroids.shape[1]):

        def members(x: Tensor, c: int = c) -> Tensor:
            near = torch.einsum("bhnd,hd->bhn", x, centroids[:, c])
            if keep is not None:
                near = near.masked_fill(~keep[:, None], -torch.inf)
            inside = torch.zeros_like(near, dtype=torch.bool)
            inside.scatter_(-1, near.topk(min(window, x.shape[2])).indices, True)
            return inside if keep is None else inside & keep[:, None]

        mask = members(q)[..., :, None] & members(k)[..., None, :] & base
        heard = mask.any(-1, keepdim=True)
        total = total + _softmax(q @ k.transpose(-1, -2) * scale, mask) @ v
        times = times + heard
    return total / times.clamp(min=1)


def _sinkhorn(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, keep: Tensor | None, scale: float, block: int = 64,
    iterations: int = 8, temperature: float = 0.75, sort: Tensor | None = None,
) -> Tensor:  # fmt: skip
    b, h, n = q.shape[:3]
    block = min(block, n)
    count = -(-n // block)
    y = torch.zeros_like(v)
    for i_b in range(b):
        real = torch.ones(n, dtype=torch.bool) if keep is None else keep[i_b]
        pieces = [torch.arange(t * block, min(n, (t + 1) * block)) for t in range(count)]
        live = [t for t, p in enumerate(pieces) if real[p].any()]
        for i_h in range(h):

            def mean(x: Tensor, at: Tensor, real: Tensor = real, i_b: int = i_b, i_h: int = i_h) -> Tensor:
                at = at[real[at]]
                return x[i_b, i_h][at].sum(0) / max(1, len(at))

            asks = [mean(q, torch.arange(int(p[0]) + 1) if causal else p) for p in pieces]
            offers = [mean(k, p) for p in pieces]
            s = torch.zeros(count, count).to(q)
            for i in live:
                for j in live:
                    if not causal or j < i:
                        mapped = asks[i] if sort is None else asks[i] @ sort[i_h]
                        s[i, j] = (mapped @ offers[j] * scale / temperature).exp()
            for _ in range(iterations):
                below = s.cumsum(0) if causal else s.sum(0, keepdim=True)
                s = s / below.clamp(min=1e-200)
                s = s / s.sum(1, keepdim=True).clamp(min=1e-200)
            # the matrix that puts a mixture of earlier keys at each slot, written out
            move = torch.zeros(count * block, n).to(q)
            for i in range(count):
                for j in range(count):
                    for slot, t in enumerate(pieces[j].tolist()):
                        move[i * block + slot, t] = s[i, j] * real[t]
            keys, values, present = move @ k[i_b, i_h], move @ v[i_b, i_h], move.sum(1) > 0
            for t in range(n):
                i = t // block
                slots = [x for x in range(i * block, (i + 1) * block) if present[x]]
                own = [int(x) for x in pieces[i] if real[x] and (not causal or x <= t)]
                if not slots and not own:
                    continue
                keys_t = torch.cat([keys[slots], k[i_b, i_h][own]])
                values_t = torch.cat([values[slots], v[i_b, i_h][own]])
                y[i_b, i_h, t] = (keys_t @ q[i_b, i_h, t] * scale).softmax(0) @ values_t
    return y


_DENSE: dict[str, Callable[..., Tensor]] = {
    "linear": _linear, "performer": _performer, "rfa": _rfa, "efficient": _efficient, "linformer": _linformer,
    "nystrom": _nystrom, "induced": _induced, "funnel": _funnel, "poolingformer": _poolingformer,
    "adaptive_span": _adaptive_span, "transformer_xl": _transformer_xl, "aft": _aft, "reformer": _reformer,
    "routing": _routing, "sinkhorn": _sinkhorn,
    **{name: _pattern(name) for name in patterns.PATTERNS},
}  # fmt: skip


def dense_equivalent(kind: str) -> Callable[..., Tensor]:
    """The kind's definition with its n x n matrix (reformer, routing, sinkhorn: with loops) in place of its algorithm.

    Called like ``efficient_attention`` without ``kind``. Slow, quadratic, on CPU; random choices must be given:
    ``features`` (performer, rfa), ``rotations`` and ``chunk`` (reformer), ``centroids`` and ``window`` (routing).

    Example:
        >>> q = torch.randn(1, 2, 9, 4)
        >>> y = dense_equivalent("longformer")(q, q, q, window=20)
        >>> torch.allclose(y, F.scaled_dot_product_attention(q, q, q), atol=1e-6)
        True
    """
    kind_named(kind)

    def dense(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool = False,
        key_padding_mask: Tensor | None = None,
        scale: float | None = None,
        **options: Any,
    ) -> Tensor:
        keep = None if key_padding_mask is None else ~key_padding_mask
        if kind not in ("linear", "rfa", "efficient", "reformer", "aft"):
            options["scale"] = q.shape[-1] ** -0.5 if scale is None else scale
        y = _DENSE[kind](q, k, v, causal=causal, keep=keep, **options)
        if keep is not None and not kind_named(kind).cross and y.shape[2] == keep.shape[1]:
            y = y.masked_fill(~keep[:, None, :, None], 0)
        return y

    return dense

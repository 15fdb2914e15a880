"""Attentions within groups that the content forms: hashing, clusters, sorted blocks.

Legend: B batch, H heads, N length, D features, E value features, K clusters, W members, R rounds, T chunks, C chunk.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from torchgraft.layers.efficient_transformers.kernels import _hidden
from torchgraft.layers.efficient_transformers.patterns import _positive, normalised, softmax_sums

SELF, NEVER = -1e5, -1e9
"""Scores of a token with itself, and of what it may not see: the first is taken where there is nothing else."""


@torch.compiler.disable
def _normal(seed: int, like: Tensor, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(like)


def lsh_buckets(q: Tensor, rotations: Tensor, keep: Tensor | None) -> Tensor:
    """argmax [x R; -x R] for every round, (B, H, R, N); padding gets a bucket of its own, the last."""
    turned = torch.einsum("bhnd,hdrk->bhrnk", q.detach(), rotations)
    found = torch.cat([turned, -turned], -1).argmax(-1)
    return found if keep is None else found.masked_fill(~keep[:, None, None], 2 * rotations.shape[-1])


def reformer(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, keep: Tensor | None, chunk: int = 64, hashes: int = 1,
    buckets: int | None = None, seed: int = 0, rotations: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Reformer: keys are the normalised queries, tokens sorted by (hash, position) see their chunk and the one before.

    ``k`` must be ``q``. ``rotations`` (H, D, hashes, buckets / 2) are drawn from ``seed`` when not given. ``buckets``
    is twice the number of chunks by default, thus of the padded length: give it where batches are padded differently.
    The chunk before the first is the last one with a real token (of the round before), as in transformers, which
    however counts padding in. Scores are q . q / |q|, without 1 / sqrt(d), as there.
    """
    if k is not q:
        raise ValueError("reformer ties keys to queries: pass the same tensor as q and k")
    _positive(chunk=chunk, hashes=hashes)
    b, h, n, d = q.shape
    chunk = min(chunk, n)
    count = -(-n // chunk)
    if rotations is None:
        wanted = max(2, 2 * count) if buckets is None else buckets
        if wanted < 2 or wanted % 2:
            raise ValueError(f"buckets must be an even number of at least 2, got {wanted}")
        rotations = _normal(seed, q, h, d, hashes, wanted // 2)
    elif rotations.shape[:2] != (h, d) or rotations.ndim != 4:
        raise ValueError(f"rotations must have shape ({h}, {d}, hashes, buckets / 2), got {tuple(rotations.shape)}")
    hashes = rotations.shape[2]
    order = lsh_buckets(q, rotations.to(q), keep).argsort(dim=-1, stable=True)
    back = order.argsort(dim=-1)
    # filled up to whole chunks behind the last token
    at = F.pad(order, (0, -n % chunk), value=-1).view(b, h, hashes * count, chunk)

    def sorted_rows(x: Tensor) -> Tensor:
        rows = x.gather(2, at.clamp(min=0).flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1]))
        return rows.view(*at.shape, x.shape[-1])

    queries, values = sorted_rows(q), sorted_rows(v)
    real = at >= 0
    if keep is not None:
        real = real & keep[:, None].expand(-1, h, -1).gather(2, at.clamp(min=0).flatten(2)).view_as(at)
    keys = F.normalize(queries, dim=-1)
    if count > 1:
        keys, values, seen, real = (_with_previous(x, count, n, keep) for x in (keys, values, at, real))
    else:
        seen = at
    i, j = at[..., :, None], seen[..., None, :]
    blocked = ~real[..., None, :]
    if causal:
        blocked = blocked | (j > i)
    scores = (queries @ keys.transpose(-1, -2)).masked_fill(blocked, NEVER).masked_fill((i == j) & (j >= 0), SELF)
    each = scores.logsumexp(-1)
    y = scores.softmax(-1) @ values

    def unsorted(x: Tensor) -> Tensor:
        x = x.view(b, h, hashes, count * chunk, -1)[:, :, :, :n]
        return x.gather(3, back[..., None].expand(-1, -1, -1, -1, x.shape[-1]))

    return (unsorted(y) * unsorted(each).softmax(2)).sum(2)


def _with_previous(x: Tensor, count: int, n: int, keep: Tensor | None) -> Tensor:
    """Each chunk followed by the one before it: (B, H, T, C, …) to (B, H, T, 2 C, …)."""
    total, chunk = x.shape[2:4]
    before = torch.arange(total, device=x.device) - 1
    before = before % total
    if keep is None:
        past = x.index_select(2, before)
    else:
        last = (keep.sum(-1, keepdim=True).clamp(min=1) - 1) // chunk
        rounds = before // count
        begins = torch.arange(total, device=x.device) % count == 0
        index = torch.where(begins, rounds * count + last, before)
        index = index.view(len(x), 1, total, *[1] * (x.ndim - 3)).expand(-1, x.shape[1], -1, *x.shape[3:])
        past = x.gather(2, index)
    return torch.cat([x, past], dim=3)


def routing_members(x: Tensor, centroids: Tensor, window: int, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """Positions of the ``window`` nearest tokens of each centroid, in order, (B, H, K, W), and which are real."""
    near = torch.einsum("bhnd,hkd->bhkn", x.detach(), centroids)
    if keep is not None:
        near = near.masked_fill(~keep[:, None, None], -torch.inf)
    found = near.topk(min(window, x.shape[2]), dim=-1)
    at, order = found.indices.sort(-1)
    return at, found.values.gather(-1, order) > -torch.inf


def default_centroids(h: int, n: int, d: int, like: Tensor, clusters: int | None = None, seed: int = 0) -> Tensor:
    """Directions (H, clusters, D), about sqrt(n) of them, as long as layer-normalised tokens."""
    count = max(1, round(math.sqrt(n))) if clusters is None else clusters
    _positive(clusters=count)
    return F.normalize(_normal(seed, like, h, count, d), dim=-1) * math.sqrt(d)


def routing(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, keep: Tensor | None, scale: float,
    centroids: Tensor | None = None, clusters: int | None = None, window: int | None = None, seed: int = 0,
) -> Tensor:  # fmt: skip
    """Routing Transformer: the queries and keys nearest to each centroid attend to each other.

    Queries and keys are layer-normalised. ``centroids`` (H, K, D), drawn from ``seed`` when not given; ``window``
    members each, N / K by default. A query in several clusters gets the mean of their outputs, one in none 0.

    Causal attention gets no gradient from the future and no value of it. Which tokens are members, however, is decided
    over the whole sequence, in the paper too: outputs are not those of the prefix alone.
    """
    n, d = q.shape[2:]
    if centroids is None:
        centroids = default_centroids(q.shape[1], n, d, q, clusters, seed)
    if centroids.ndim != 3 or centroids.shape[0] != q.shape[1] or centroids.shape[2] != d:
        raise ValueError(f"centroids must have shape ({q.shape[1]}, clusters, {d}), got {tuple(centroids.shape)}")
    window = -(-n // centroids.shape[1]) if window is None else window
    _positive(window=window)
    q, k = F.layer_norm(q, (d,)), F.layer_norm(k, (d,))
    centroids = centroids.to(q)
    # clusters form what attends; padding must not be a member
    i, asks = routing_members(q, centroids, window, keep)
    j, real = routing_members(k, centroids, window, keep)

    def members(x: Tensor, at: Tensor) -> Tensor:
        rows = x.gather(2, at.flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1]))
        return rows.view(*at.shape, x.shape[-1])

    mask = real[..., None, :] & asks[..., :, None]
    if causal:
        mask = mask & (j[..., None, :] <= i[..., :, None])
    sums = softmax_sums(members(q, i) @ members(k, j).transpose(-1, -2) * scale, mask, members(v, j))
    y, heard = normalised(sums).flatten(2, 3), (sums[1] > 0).to(q.dtype).flatten(2, 3)
    at = i.flatten(2)[..., None]
    total = q.new_zeros(*q.shape[:3], v.shape[-1]).scatter_add(2, at.expand(-1, -1, -1, v.shape[-1]), y * heard)
    times = q.new_zeros(*q.shape[:3], 1).scatter_add(2, at, heard)
    return total / times.clamp(min=1)


def sinkhorn_matrix(logits: Tensor, allowed: Tensor, iterations: int, causal: bool) -> Tensor:
    """exp(logits) with rows and columns normalised in turn, 0 where not allowed.

    Causal: a column is normalised over the rows up to its own alone, so that no row depends on a later one.
    """
    low = torch.finfo(logits.dtype).min / 4
    x = logits.masked_fill(~allowed, low)
    for _ in range(iterations):
        below = x.logcumsumexp(-2) if causal else x.logsumexp(-2, keepdim=True)
        x = (x - below).masked_fill(~allowed, low)
        x = (x - x.logsumexp(-1, keepdim=True)).masked_fill(~allowed, low)
    return x.exp().masked_fill(~allowed, 0)


def sinkhorn(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, keep: Tensor | None, scale: float, block: int = 64,
    iterations: int = 8, temperature: float = 0.75, sort: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Sparse Sinkhorn attention: each block sees itself and a block that a soft permutation puts beside it.

    The permutation comes from the products of mean queries and mean keys of blocks, through ``sort`` (H, D, D) where
    given. Causal: a block sees whole earlier blocks, chosen by the queries up to its first token.
    """
    _positive(block=block)
    if sort is not None and sort.shape != (q.shape[1], q.shape[3], q.shape[3]):
        raise ValueError(f"sort must have shape {(q.shape[1], q.shape[3], q.shape[3])}, got {tuple(sort.shape)}")
    b, _, n, _ = q.shape
    block = min(block, n)
    fill = -n % block
    real = torch.ones(b, n, dtype=torch.bool, device=q.device) if keep is None else keep
    real = F.pad(real, (0, fill)).view(b, 1, -1, block)

    def blocked(x: Tensor) -> Tensor:
        return F.pad(_hidden(x, keep), (0, 0, 0, fill)).unflatten(2, (-1, block))

    qs, ks, vs = blocked(q), blocked(k), blocked(v)
    sizes = real.sum(-1)[..., None].clamp(min=1)
    if causal:
        # what a block's first token has seen: the blocks before it, and itself
        total = qs.sum(3).cumsum(2) - qs.sum(3) + qs[:, :, :, 0]
        seen = real.sum(-1).cumsum(-1) - real.sum(-1) + real[..., 0]
        asks = total / seen[..., None].clamp(min=1)
    else:
        asks = qs.sum(3) / sizes
    offers = ks.sum(3) / sizes
    if sort is not None:
        asks = asks @ sort.to(q.dtype)
    there = real.any(-1)
    allowed = there[..., :, None] & there[..., None, :]
    if causal:
        allowed = allowed.tril(-1)
    # at least one entry in every row, or its normalisation would be among entries that are not allowed
    some = allowed.any(-1, keepdim=True)
    s = sinkhorn_matrix(asks @ offers.transpose(-1, -2) * scale / temperature, allowed, iterations, causal)
    moved_k, moved_v = ((s @ x.flatten(3)).view_as(x) for x in (ks, vs))
    arrives = (s @ real.to(q.dtype) > 0) & some
    own = real[..., None, :].expand(-1, -1, -1, block, -1)
    if causal:
        own = own.tril()
    mask = torch.cat([arrives[..., None, :].expand(-1, -1, -1, block, -1), own.expand(-1, s.shape[1], -1, -1, -1)], -1)
    scores = qs @ torch.cat([moved_k, ks], 3).transpose(-1, -2) * scale
    y = normalised(softmax_sums(scores, mask, torch.cat([moved_v, vs], 3)))
    return y.flatten(2, 3)[:, :, :n]

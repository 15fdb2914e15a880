"""Attentions that are dense softmax attention under a sparse boolean pattern, in blocks: no n x n matrix appears.

A pattern is a rule ``allowed(i, j)`` on positions and a list of disjoint parts that together hold every allowed pair.
Each part is a batch of small dense products; their softmaxes are merged by their maxima and sums.

Legend: B batch, H heads, N length, D features, E value features, R residue classes, T blocks, C block, M keys of a
block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Rule = Callable[[Tensor, Tensor], Tensor]
"""From broadcastable positions of queries and keys to whether the pair is allowed."""
Sums = tuple[Tensor, Tensor, Tensor]
"""Weighted sum of values, sum of weights, and the maximum that both are relative to."""


@dataclass(frozen=True)
class Blocks:
    """Queries in blocks, each seeing the key blocks that its row of ``table`` names; -1 names none.

    With ``stride`` the sequence is first sorted into residue classes, and blocks are formed within each.
    """

    block: int
    table: Tensor
    only: Rule
    stride: int = 1


@dataclass(frozen=True)
class Keys:
    """A few keys that all queries look at."""

    positions: Tensor
    only: Rule


@dataclass(frozen=True)
class Rows:
    """A few queries whose row is computed against all keys, in place of what the other parts say of them."""

    positions: Tensor


@dataclass(frozen=True)
class Pattern:
    """The rule and the parts that cover it."""

    allowed: Rule
    parts: tuple[Blocks | Keys | Rows, ...]


def _every(i: Tensor, j: Tensor) -> Tensor:
    return (i >= 0) & (j >= 0)


def _neighbours(blocks: int, offsets: Sequence[int], wrap: bool = False) -> Tensor:
    """Key blocks at these offsets, -1 beyond the ends."""
    if wrap:
        offsets = sorted({o % blocks for o in offsets})
    table = torch.arange(blocks)[:, None] + torch.tensor(list(offsets))
    return table % blocks if wrap else table.masked_fill((table < 0) | (table >= blocks), -1)


def _ordered(rule: Rule, causal: bool) -> Rule:
    return (lambda i, j: rule(i, j) & (j <= i)) if causal else rule


def _member(positions: Tensor, n: int) -> Callable[[Tensor], Tensor]:
    table = torch.zeros(n, dtype=torch.bool)
    table[positions] = True
    # positions beyond the end are padding, masked elsewhere
    return lambda at: table.to(at.device)[at.clamp(max=n - 1)]


def _positive(**sizes: int) -> None:
    for name, size in sizes.items():
        # 2.0 would fail later, as the size of a tensor
        if not isinstance(size, Integral) or size < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {size!r}")


def local(n: int, causal: bool, *, window: int = 64, neighbours: int = 1) -> Pattern:
    """Same block of ``window`` positions, and ``neighbours`` blocks to each side (causal: to the left)."""
    _positive(window=window)
    if neighbours < 0:
        raise ValueError(f"neighbours must not be negative, got {neighbours}")
    offsets = range(-neighbours, 1 if causal else neighbours + 1)
    rule = _ordered(lambda i, j: (i // window - j // window).abs() <= neighbours, causal)
    return Pattern(rule, (Blocks(window, _neighbours(-(-n // window), offsets), _every),))


def blockwise(n: int, causal: bool, *, window: int = 64, shift: int = 1) -> Pattern:
    """Query block t sees key block t + shift, cyclic (BlockBERT, one permutation; 0 is the identity)."""
    _positive(window=window)
    blocks = -(-n // window)
    return Pattern(
        lambda i, j: j // window == (i // window + shift) % blocks,
        (Blocks(window, _neighbours(blocks, [shift], wrap=True), _every),),
    )


def strided(n: int, causal: bool, *, stride: int | None = None) -> Pattern:
    """Sparse Transformer, strided: the last ``stride`` positions, and every ``stride``-th; about sqrt(n) by default."""
    s = max(1, round(math.sqrt(n))) if stride is None else stride
    _positive(stride=s)
    rule = _ordered(lambda i, j: ((i - j).abs() < s) | ((i - j) % s == 0), causal)
    near = Blocks(s, _neighbours(-(-n // s), range(-1, 1 if causal else 2)), lambda i, j: (i - j).abs() < s)
    far = Blocks(-(-n // s), torch.zeros(1, 1, dtype=torch.long), lambda i, j: (i - j).abs() >= s, stride=s)
    return Pattern(rule, (near, far))


def fixed(n: int, causal: bool, *, stride: int | None = None, summary: int = 1) -> Pattern:
    """Sparse Transformer, fixed: the same block, and the last ``summary`` positions of every block."""
    s = max(1, round(math.sqrt(n))) if stride is None else stride
    _positive(stride=s, summary=summary)
    if summary > s:
        raise ValueError(f"summary must not exceed stride, got summary={summary} and stride={s}")
    rule = _ordered(lambda i, j: (i // s == j // s) | (j % s >= s - summary), causal)
    own = Blocks(s, _neighbours(-(-n // s), [0]), _every)
    columns = [j for j in range(n) if j % s >= s - summary]
    parts = (own, Keys(torch.tensor(columns), lambda i, j: i // s != j // s)) if columns else (own,)
    return Pattern(rule, parts)


def _indices(global_tokens: Any, n: int) -> Tensor:
    positions = torch.as_tensor(global_tokens, dtype=torch.long).reshape(-1).cpu()
    if positions.numel() and not (int(positions.min()) >= 0 and int(positions.max()) < n):
        raise ValueError(f"global_tokens must lie in 0..{n - 1}, got {positions.tolist()}")
    return positions.unique()


def longformer(
    n: int, causal: bool, *, window: int = 128, dilation: int = 1, global_tokens: Sequence[int] = ()
) -> Pattern:
    """``|i - j| <= window / 2`` (times ``dilation``), and global tokens that attend to all and are attended by all."""
    _positive(window=window, dilation=dilation)
    half, positions = window // 2, _indices(global_tokens, n)
    special = _member(positions, n)

    def near(i: Tensor, j: Tensor) -> Tensor:
        return ((i - j) % dilation == 0) & ((i - j).abs() <= half * dilation)

    rule = _ordered(lambda i, j: near(i, j) | special(i) | special(j), causal)
    block = min(max(half, 16), -(-n // dilation))
    reach = -(-half // block)
    table = _neighbours(-(-n // (block * dilation)), range(-reach, 1 if causal else reach + 1))
    if not positions.numel():
        return Pattern(rule, (Blocks(block, table, _every, dilation),))
    band = Blocks(block, table, lambda i, j: ~special(j), dilation)
    return Pattern(rule, (band, Keys(positions, _every), Rows(positions)))


def star(n: int, causal: bool, *, relay: int = 0) -> Pattern:
    """A ring of neighbours and one relay that attends to all and is attended by all (Star-Transformer)."""
    positions, others = _indices([relay], n), max(n - 1, 1)

    def on_ring(at: Tensor) -> Tensor:
        return at - (at > relay).long()

    def rule(i: Tensor, j: Tensor) -> Tensor:
        apart = (on_ring(i) - on_ring(j)).abs()
        return (torch.minimum(apart, others - apart) <= 1) | (i == relay) | (j == relay)

    # wide enough that the relay between two neighbours does not push them more than one block apart
    block = min(16, n)
    blocks = -(-n // block)
    # the last block may hold so little that a neighbour on the ring lies one block further
    offsets = range(-2, 3)
    band = Blocks(block, _neighbours(blocks, offsets, wrap=True), lambda i, j: j != relay)
    return Pattern(rule, (band, Keys(positions, _every), Rows(positions)))


def etc(n: int, causal: bool, *, radius: int = 64, global_tokens: int = 1) -> Pattern:
    """Extended Transformer Construction: the first ``global_tokens`` are global, the others see ``radius`` each way."""
    _positive(radius=radius, global_tokens=global_tokens)
    return longformer(n, causal, window=2 * radius, global_tokens=range(min(global_tokens, n)))


@torch.compiler.disable
def random_blocks(blocks: int, count: int, global_blocks: Sequence[int], seed: int) -> Tensor:
    """``count`` random key blocks for each query block, neither global nor within the window; -1 where none is left."""
    at = torch.arange(blocks)
    free = (at[:, None] - at).abs() > 1
    free[:, list(global_blocks)] = False
    chance = torch.rand(blocks, blocks, generator=torch.Generator().manual_seed(seed)).masked_fill(~free, -1)
    best = chance.topk(min(count, blocks), dim=-1)
    return best.indices.masked_fill(best.values < 0, -1)


def bigbird(
    n: int,
    causal: bool,
    *,
    block: int = 64,
    random: int = 3,
    global_blocks: int = 2,
    seed: int = 0,
    table: Any = None,
) -> Pattern:
    """A window of three blocks, global blocks at the start and the end, and random blocks.

    Of ``global_blocks`` the first half stands at the start (the odd one too), the rest at the end. ``table`` names the
    random key blocks of each query block, (blocks, random), in place of a draw from ``seed``.
    """
    _positive(block=block)
    if random < 0 or global_blocks < 0:
        raise ValueError(f"random and global_blocks must not be negative, got {random} and {global_blocks}")
    blocks = -(-n // block)
    first = min(-(-global_blocks // 2), blocks)
    whole = sorted({*range(first), *range(max(blocks - global_blocks // 2, 0), blocks)})
    drawn = random_blocks(blocks, random, whole, seed) if table is None else torch.as_tensor(table).long().cpu()
    if drawn.ndim != 2 or len(drawn) != blocks or (drawn.numel() and int(drawn.max()) >= blocks):
        raise ValueError(f"table must name blocks below {blocks} in {blocks} rows, got shape {tuple(drawn.shape)}")
    at = torch.arange(blocks)
    is_global = _member(torch.tensor(whole, dtype=torch.long), blocks)
    linked = torch.zeros(blocks, blocks + 1, dtype=torch.bool).scatter_(1, drawn.masked_fill(drawn < 0, blocks), True)
    linked = linked[:, :blocks] & ((at[:, None] - at).abs() > 1) & ~is_global(at)

    def rule(i: Tensor, j: Tensor) -> Tensor:
        # blocks beyond the end are padding, masked elsewhere
        a, b = (i // block).clamp(max=blocks - 1), (j // block).clamp(max=blocks - 1)
        return ((a - b).abs() <= 1) | is_global(a) | is_global(b) | linked.to(a.device)[a, b]

    # linked, as a list with -1 at its end
    order = linked.long().sort(dim=1, descending=True, stable=True)
    far = order.indices.masked_fill(order.values == 0, -1)[:, : max(int(linked.sum(1).max()), 1)]
    seen = torch.cat([_neighbours(blocks, [-1, 0, 1]), far], dim=1)
    tokens = torch.arange(n)
    tokens = tokens[is_global(tokens // block)]
    if not whole:
        return Pattern(rule, (Blocks(block, seen, _every),))
    band = Blocks(block, seen, lambda i, j: ~is_global((j // block).clamp(max=blocks - 1)))
    return Pattern(rule, (band, Keys(tokens, _every), Rows(tokens)))


def span(n: int, causal: bool, *, reach: int) -> Pattern:
    """All positions less than ``reach`` away."""
    block = min(max(reach, 16), n)
    return Pattern(
        _ordered(lambda i, j: (i - j).abs() < reach, causal),
        (Blocks(block, _neighbours(-(-n // block), range(-1, 1 if causal else 2)), _every),),
    )


PATTERNS: dict[str, Callable[..., Pattern]] = {
    make.__name__: make for make in (local, blockwise, strided, fixed, longformer, bigbird, star, etc)
}


def _arranged(x: Tensor, block: int, stride: int, dim: int) -> Tensor:
    """Axis ``dim`` of n positions becomes (residue classes, blocks, block), filled up with zeros."""
    n = x.shape[dim]
    length = -(-n // (block * stride)) * block * stride
    x = F.pad(x, [0, 0] * (x.ndim - 1 - dim) + [0, length - n])
    return x.unflatten(dim, (length // stride, stride)).transpose(dim, dim + 1).unflatten(dim + 1, (-1, block))


def _restored(x: Tensor, n: int) -> Tensor:
    """(B, H, R, T, C, E) back to (B, H, n, E)."""
    return x.flatten(3, 4).transpose(2, 3).flatten(2, 3)[:, :, :n]


def softmax_sums(scores: Tensor, mask: Tensor, values: Tensor, weights: Tensor | None = None) -> Sums:
    """Numerator, denominator and maximum of a masked softmax over the last axis; 0, 0 where nothing is allowed."""
    scores = scores.masked_fill(~mask, -torch.inf)
    top = scores.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    p = (scores - top).exp()
    if weights is not None:
        p = p * weights
    return p @ values, p.sum(-1, keepdim=True), top


def merged(a: Sums, b: Sums) -> Sums:
    """The softmax over two disjoint sets of keys from the sums over each."""
    top = torch.maximum(a[2], b[2])
    x, y = (a[2] - top).exp(), (b[2] - top).exp()
    return a[0] * x + b[0] * y, a[1] * x + b[1] * y, top


def normalised(sums: Sums) -> Tensor:
    """The softmax output; 0 where nothing was allowed."""
    return sums[0] / sums[1].masked_fill(sums[1] == 0, 1)


@dataclass(frozen=True)
class _Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    keep: Tensor | None
    allowed: Rule
    scale: float
    relative_keys: Tensor | None
    soft: Callable[[Tensor, Tensor], Tensor] | None

    def scores(self, q: Tensor, k: Tensor, i: Tensor, j: Tensor) -> Tensor:
        found = q @ k.transpose(-1, -2)
        if self.relative_keys is not None:
            most = len(self.relative_keys) // 2
            label = (j - i).clamp(-most, most) + most
            by_label = q @ self.relative_keys.to(q.dtype).T
            found = found + by_label.gather(-1, label.expand(*by_label.shape[:-1], label.shape[-1]))
        return found * self.scale

    def sums(self, q: Tensor, k: Tensor, v: Tensor, i: Tensor, j: Tensor, mask: Tensor) -> Sums:
        return softmax_sums(self.scores(q, k, i, j), mask, v, None if self.soft is None else self.soft(i, j))


def _blocks(x: _Inputs, part: Blocks) -> Sums:
    n, block, stride = x.q.shape[2], part.block, part.stride
    q, k, v = (_arranged(t, block, stride, 2) for t in (x.q, x.k, x.v))
    at = _arranged(torch.arange(n, device=x.q.device) + 1, block, stride, 0) - 1  # -1 at the filling
    table = part.table.to(x.q.device)
    seen = table.clamp(min=0)

    def keys(t: Tensor, dim: int) -> Tensor:
        if table.shape == (1, 1):
            return t
        # one copy per block: whole blocks move, never single positions
        return t.index_select(dim, seen.flatten()).unflatten(dim, seen.shape).flatten(dim + 1, dim + 2)

    j = keys(at, 1)
    valid = (j >= 0) & (table >= 0).repeat_interleave(block, dim=1)
    i, j = at[..., None], j[..., None, :]
    mask = valid[..., None, :] & x.allowed(i, j) & part.only(i, j)
    if x.keep is not None:
        mask = mask & keys(_arranged(x.keep, block, stride, 1), 2)[:, None, ..., None, :]
    found = x.sums(q, keys(k, 3), keys(v, 3), i, j, mask)
    return tuple(_restored(t, n) for t in found)  # type: ignore[return-value]


def _keys(x: _Inputs, part: Keys) -> Sums:
    here = part.positions.to(x.q.device)
    i, j = torch.arange(x.q.shape[2], device=x.q.device)[:, None], here[None]
    mask = x.allowed(i, j) & part.only(i, j)
    if x.keep is not None:
        mask = mask & x.keep[:, None, None, here]
    return x.sums(x.q, x.k[:, :, here], x.v[:, :, here], i, j, mask)


def _rows(x: _Inputs, part: Rows) -> Tensor:
    here = part.positions.to(x.q.device)
    i, j = here[:, None], torch.arange(x.k.shape[2], device=x.q.device)[None]
    mask = x.allowed(i, j)
    if x.keep is not None:
        mask = mask & x.keep[:, None, None]
    return normalised(x.sums(x.q[:, :, here], x.k, x.v, i, j, mask))


def pattern_attention(
    pattern: Pattern,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    keep: Tensor | None = None,
    scale: float | None = None,
    relative_keys: Tensor | None = None,
    soft: Callable[[Tensor, Tensor], Tensor] | None = None,
    rows: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Softmax attention over the allowed pairs of a pattern, exact; self-attention alone.

    Args:
        pattern: the rule and its parts.
        q: queries (B, H, N, D).
        k: keys (B, H, N, D).
        v: values (B, H, N, E).
        keep: (B, N), False where padded.
        scale: of the scores; 1 / sqrt(D) by default.
        relative_keys: (2 K + 1, D); the score gains q_i . a[clip(j - i, -K, K)] (Shaw et al., as ETC uses them).
        soft: multiplies the weights before they are normalised.
        rows: other queries, keys and values for the queries that see everything (Longformer's global projections).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    x = _Inputs(q, k, v, keep, pattern.allowed, scale, relative_keys, soft)
    total: Sums | None = None
    for part in pattern.parts:
        if not isinstance(part, Rows):
            found = _blocks(x, part) if isinstance(part, Blocks) else _keys(x, part)
            total = found if total is None else merged(total, found)
    assert total is not None
    y = normalised(total)
    for part in pattern.parts:
        if isinstance(part, Rows):
            own = x if rows is None else _Inputs(*rows, keep, pattern.allowed, scale, relative_keys, soft)
            y = y.index_copy(2, part.positions.to(y.device), _rows(own, part))
    return y

"""Which heads and hidden units to keep under a budget of operations or of measured time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from torchgraft.compression.optin.blocks import PrunableSpec
from torchgraft.compression.optin.cost import MacModel
from torchgraft.compression.optin.scoring import OptinScores

__all__ = ["BudgetError", "LatencyResult", "PruneMasks", "search_latency", "search_masks"]


class BudgetError(ValueError):
    """A budget that cannot be met; ``nearest`` is the smallest that can."""

    def __init__(self, message: str, nearest: float) -> None:
        super().__init__(message)
        self.nearest = nearest


@dataclass(frozen=True)
class PruneMasks:
    """What to keep, True for kept; one tensor per block.

    Attributes:
        heads, neurons: bool, shapes (heads,) and (neurons,).
        blocks: the specs they belong to.
        macs: multiply-accumulate operations of what is kept.
        ratio: ``macs`` over those of the whole model.
    """

    heads: tuple[Tensor, ...]
    neurons: tuple[Tensor, ...]
    blocks: tuple[PrunableSpec, ...]
    macs: float
    ratio: float

    def __str__(self) -> str:
        heads, neurons = ([int(m.sum()) for m in masks] for masks in (self.heads, self.neurons))
        return f"{100 * self.ratio:.1f} % of the operations: heads {heads}, hidden units {neurons}"


def _check_ratio(name: str, ratio: float) -> None:
    if not 0 < ratio <= 1:
        raise ValueError(f"{name} must lie above 0 and at most at 1, got {ratio}")


def _ranked(scores: tuple[Tensor, ...], costs: tuple[float, ...], per_operation: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, blocks and indices of all units, best first; equal scores keep their order."""
    flat = torch.cat([s.double() for s in scores])
    block = torch.cat([torch.full((len(s),), i) for i, s in enumerate(scores)])
    index = torch.cat([torch.arange(len(s)) for s in scores])
    by = flat / torch.tensor(costs, dtype=torch.float64)[block] if per_operation else flat
    order = by.argsort(descending=True, stable=True)
    return flat[order], block[order], index[order]


def _masks(sizes: tuple[int, ...], block: Tensor, index: Tensor) -> tuple[Tensor, ...]:
    made = [torch.zeros(size, dtype=torch.bool) for size in sizes]
    for i, mask in enumerate(made):
        mask[index[block == i]] = True
    return tuple(made)


def _made(scores: OptinScores, cost: MacModel, heads: tuple[Tensor, ...], neurons: tuple[Tensor, ...]) -> PruneMasks:
    bare = PruneMasks(heads, neurons, scores.blocks, 0.0, 0.0)
    macs = cost.total(bare)
    return PruneMasks(heads, neurons, scores.blocks, macs, macs / cost.base)


def search_masks(
    scores: OptinScores,
    cost: MacModel,
    flop_ratio: float,
    *,
    round_to: int = 1,
    layout: Literal["global", "uniform"] = "global",
    per_operation: bool = False,
    official: bool = False,
) -> PruneMasks:
    """The best split of a budget between heads and hidden units (Kwon et al. 2022, as OPTIN uses it).

    Heads and hidden units are ranked over the whole network. For every number n of heads the n best are kept and the
    rest of the budget goes to the best hidden units, as many as fit; the n with the largest sum of kept scores wins.
    What was not scored is kept, and its cost comes off the budget.

    Args:
        scores: of heads, hidden units, or both.
        cost: of the same blocks.
        flop_ratio: share of the whole model's operations that may be kept, above 0 and at most 1.
        round_to: hidden units of every block are kept in multiples of this: rounded down, then whole multiples are
            given to the blocks whose next units have the largest scores, as long as they fit.
        layout: ``uniform`` keeps the same share of heads and of hidden units in every block instead, each by score:
            the largest share that fits.
        per_operation: rank heads among heads, and hidden units among hidden units, by score over cost. Nothing changes
            where all blocks cost the same; where they do not (ResNets, Swin) the paper's ranking spends the budget on
            blocks whose units are dear.
        official: as in the released code, a number of heads that alone exceeds the budget is not skipped; the result
            may then cost more than asked for.

    Raises:
        ValueError: for a ratio outside (0, 1], or scores and costs of different models.
        BudgetError: when not even the cheapest choice fits; ``nearest`` is the ratio that does.

    Example:
        >>> blocks = (PrunableSpec("o", ("i",), "f", 2),)
        >>> scores = OptinScores((torch.tensor([1.0, 2.0]),), (torch.tensor([3.0, 1.0, 2.0]),), blocks, {}, 1, 0, 5)
        >>> search_masks(scores, MacModel((4.0,), (1.0,), (2,), (3,)), 0.6).neurons
        (tensor([ True, False,  True]),)
    """
    _check_ratio("flop_ratio", flop_ratio)
    if round_to < 1:
        raise ValueError(f"round_to must be at least 1, got {round_to}")
    if layout not in ("global", "uniform"):
        raise ValueError(f"layout must be 'global' or 'uniform', got {layout!r}")
    if len(scores.blocks) != len(cost.heads):
        raise ValueError(f"scores are of {len(scores.blocks)} blocks, costs of {len(cost.heads)}")
    for kind, sizes in (("heads", cost.heads), ("neurons", cost.neurons)):
        found = tuple(len(s) for s in scores.of(kind))  # type: ignore[arg-type]
        if kind in scores.targets and found != sizes:
            raise ValueError(f"scores are of {found} {kind}, costs of {sizes}")
    # a hair of slack, so that a budget of everything keeps everything in floating point
    budget = flop_ratio * cost.base * (1 + 1e-12)
    if layout == "uniform":
        heads, neurons = _uniform(scores, cost, budget)
    else:
        heads, neurons = _global(scores, cost, budget, official, per_operation)
    if round_to > 1:
        neurons = _rounded(scores, cost, budget, heads, neurons, round_to)
    return _made(scores, cost, heads, neurons)


def _all(sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.ones(size, dtype=torch.bool) for size in sizes)


def _unreachable(budget: float, least: float, cost: MacModel) -> BudgetError:
    nearest = least / cost.base
    return BudgetError(
        f"flop_ratio {budget / cost.base:.4g} cannot be met: what is always kept and the cheapest choice of the rest "
        f"cost {nearest:.4g} of the whole; the nearest that can be met is {nearest:.4g}",
        nearest,
    )


def _global(
    scores: OptinScores, cost: MacModel, budget: float, official: bool, per_operation: bool
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    spent = cost.fixed
    with_heads = "heads" in scores.targets and sum(cost.heads) > 0
    with_neurons = "neurons" in scores.targets and sum(cost.neurons) > 0
    zero = torch.zeros(1, dtype=torch.float64)
    head_value = head_cost = neuron_value = neuron_cost = zero
    if with_heads:
        h_score, h_block, h_index = _ranked(scores.heads, cost.head_macs, per_operation)
        # one head at least, as in the released search
        head_value, head_cost = h_score.cumsum(0), torch.tensor(cost.head_macs, dtype=torch.float64)[h_block].cumsum(0)
    else:
        spent += sum(n * c for n, c in zip(cost.heads, cost.head_macs, strict=True))
    if with_neurons:
        n_score, n_block, n_index = _ranked(scores.neurons, cost.neuron_macs, per_operation)
        neuron_value = torch.cat([zero, n_score.cumsum(0)])
        neuron_cost = torch.cat([zero, torch.tensor(cost.neuron_macs, dtype=torch.float64)[n_block].cumsum(0)])
    else:
        spent += sum(n * c for n, c in zip(cost.neurons, cost.neuron_macs, strict=True))
    left = budget - spent - head_cost
    if not bool((left >= 0).any()) and not official:
        raise _unreachable(budget, spent + float(head_cost[0]), cost)
    count = (torch.searchsorted(neuron_cost, left, right=True) - 1).clamp(min=0)
    value = head_value + neuron_value[count]
    if not official:
        value = value.masked_fill(left < 0, float("-inf"))
    # of equal values the one with more heads; the released search keeps the first it meets
    best = int(value.argmax()) if official else len(value) - 1 - int(value.flip(0).argmax())
    kept = best + 1
    heads = _masks(cost.heads, h_block[:kept], h_index[:kept]) if with_heads else _all(cost.heads)
    number = int(count[best])
    neurons = _masks(cost.neurons, n_block[:number], n_index[:number]) if with_neurons else _all(cost.neurons)
    return heads, neurons


def _uniform(scores: OptinScores, cost: MacModel, budget: float) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    def kept(share: float) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        made = []
        for kind, sizes in (("heads", cost.heads), ("neurons", cost.neurons)):
            if kind not in scores.targets:
                made.append(_all(sizes))
                continue
            masks = []
            for s in scores.of(kind):  # type: ignore[arg-type]
                mask = torch.zeros(len(s), dtype=torch.bool)
                mask[s.argsort(descending=True, stable=True)[: round(share * len(s))]] = True
                masks.append(mask)
            made.append(tuple(masks))
        return made[0], made[1]

    def price(share: float) -> float:
        return _made(scores, cost, *kept(share)).macs

    if price(0.0) > budget:
        raise _unreachable(budget, price(0.0), cost)
    steps = 4 * max(*cost.neurons, *cost.heads, 1)
    low, high = 0, steps
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if price(middle / steps) <= budget else (low, middle - 1)
    return kept(low / steps)


def _rounded(
    scores: OptinScores, cost: MacModel, budget: float, heads: tuple[Tensor, ...], neurons: tuple[Tensor, ...], to: int
) -> tuple[Tensor, ...]:
    if "neurons" not in scores.targets:
        return neurons
    orders = [s.argsort(descending=True, stable=True) for s in scores.neurons]
    counts = [int(mask.sum()) // to * to for mask in neurons]

    def made() -> tuple[Tensor, ...]:
        masks = [torch.zeros(size, dtype=torch.bool) for size in cost.neurons]
        for mask, order, count in zip(masks, orders, counts, strict=True):
            mask[order[:count]] = True
        return tuple(masks)

    left = budget - _made(scores, cost, heads, made()).macs
    while True:
        gains = {
            i: float(scores.neurons[i][orders[i][counts[i] : counts[i] + to]].sum())
            for i in range(len(counts))
            if counts[i] + to <= cost.neurons[i] and to * cost.neuron_macs[i] <= left
        }
        if not gains:
            return made()
        best = max(gains, key=lambda i: gains[i])
        counts[best] += to
        left -= to * cost.neuron_macs[best]


@dataclass(frozen=True)
class LatencyResult:
    """A search by measured time.

    Attributes:
        masks: what to keep.
        seconds: measured of the sliced model.
        dense_seconds: of the whole model.
        tried: every FLOP ratio that was measured, with its seconds.
    """

    masks: PruneMasks
    seconds: float
    dense_seconds: float
    tried: tuple[tuple[float, float], ...]


def search_latency(
    scores: OptinScores,
    cost: MacModel,
    measure: Callable[[PruneMasks | None], float],
    *,
    latency_ratio: float,
    steps: int = 6,
    **options: Any,
) -> LatencyResult:
    """The largest FLOP ratio whose sliced model meets a budget of measured time.

    Every candidate is sliced and timed as a whole, so the time that counts is the real one, with all that no operation
    count knows. The ratio is found by bisection, which assumes that fewer operations take no longer.

    Args:
        scores, cost: as in ``search_masks``.
        measure: seconds of the sliced model for masks, of the whole model for None.
        latency_ratio: share of the whole model's time that may be taken, above 0 and at most 1.
        steps: of the bisection.
        options: ``round_to``, ``layout`` and ``per_operation`` of ``search_masks``.

    Raises:
        ValueError: for a ratio outside (0, 1].
        BudgetError: when even the smallest model is slower; ``nearest`` is its ratio of times.
    """
    _check_ratio("latency_ratio", latency_ratio)
    dense = measure(None)
    budget = latency_ratio * dense
    if latency_ratio == 1:
        # what the whole model takes is the budget, whatever a second measurement would say
        whole = search_masks(scores, cost, 1.0, **options)
        if all(bool(mask.all()) for mask in (*whole.heads, *whole.neurons)):
            return LatencyResult(whole, dense, dense, ((1.0, dense),))
    try:
        search_masks(scores, cost, 1e-12, **options)
        least = 1e-12
    except BudgetError as error:
        least = error.nearest * (1 + 1e-9)
    tried: list[tuple[float, float]] = []

    def attempt(ratio: float) -> tuple[PruneMasks, float]:
        masks = search_masks(scores, cost, min(ratio, 1.0), **options)
        seconds = measure(masks)
        tried.append((masks.ratio, seconds))
        return masks, seconds

    best, taken = attempt(least)
    if taken > budget:
        raise BudgetError(
            f"latency_ratio {latency_ratio:.3g} cannot be met: the smallest model, {100 * best.ratio:.1f} % of the "
            f"operations, still takes {taken / dense:.3g} of the time, which is the nearest that can be met",
            taken / dense,
        )
    low, high = least, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        masks, seconds = attempt(middle)
        if seconds <= budget:
            best, taken, low = masks, seconds, middle
        else:
            high = middle
    return LatencyResult(best, taken, dense, tuple(tried))

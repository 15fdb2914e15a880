"""Two ways of doing the same work, timed side by side in one process."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """One size of a comparison.

    Args:
        size: what is varied, plain JSON values, for instance ``{"length": 4096, "pass": "forward"}``.
        ours: does one unit of work, takes no argument.
        peer: does the same unit of work the way a user would otherwise.
        peer_name: which peer this is, when a bench has several.
        make: not needed when the work is ready to run; otherwise called before timing and returns
            ``(ours, peer)``, so that the tensors of a large case exist only while it is measured.
        repeats: fewest repetitions of each side, where a peer needs minutes and the usual number would take an hour.
        memory: measure the peak memory too; the profile of a peer that loops over thousands of steps fills the machine.
    """

    size: Mapping[str, Any]
    ours: Callable[[], Any] | None = None
    peer: Callable[[], Any] | None = None
    peer_name: str = ""
    make: Callable[[], tuple[Callable[[], Any], Callable[[], Any]]] | None = None
    repeats: int | None = None
    memory: bool = True

    def __post_init__(self) -> None:
        ready = self.ours is not None and self.peer is not None
        if ready == (self.make is not None):
            raise ValueError("a case takes either ours= and peer=, or make=")


@dataclass
class Timing:
    """Seconds of each repetition and the peak of extra memory in one repetition, in bytes."""

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def median(self) -> float:
        """Median of the repetitions, in seconds."""
        return statistics.median(self.seconds)


def peak_bytes(work: Callable[[], Any], device: str = "cpu") -> int:
    """Peak of the memory that tensors of ``work`` hold at once, in bytes, beyond what was held before.

    On CPU this is exact bookkeeping of every allocation and release that torch's allocator reports; on CUDA it is
    the caching allocator's own peak.

    Example:
        >>> import torch
        >>> peak_bytes(lambda: torch.zeros(1000) + 1) >= 8000
        True
    """
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    from torch.profiler import ProfilerActivity, profile

    # what is garbage already must not be released on our account; setting it aside is far cheaper than collecting it
    gc.freeze()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
            work()
    finally:
        gc.unfreeze()
    held = peak = 0
    events = trace.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def compare(
    case: Case, *, device: str = "cpu", repeats: int = 5, seconds: float = 4.0, memory: bool = True
) -> dict[str, Any]:
    """Time both sides of a case in turn, ours, peer, ours, peer, …, and return the record of the case.

    Args:
        case: what to run.
        device: where it runs; CUDA is synchronised around every repetition.
        repeats: fewest repetitions of each side, if the case does not say; more follow until ``seconds`` are spent.
        seconds: about how long to go on, both sides together.
        memory: measure the peak memory too, in a separate untimed repetition, unless the case forbids it.

    Returns:
        ``size``, ``peer``, ``ours_s`` and ``peer_s`` (medians), ``ratio`` (median of the pairwise ratios
        ours / peer), ``ratio_spread`` (its least and greatest), ``repeats``, and the peaks in bytes.
    """
    import torch

    ours, peer = case.make() if case.make is not None else (case.ours, case.peer)
    assert ours is not None
    assert peer is not None
    on_cuda = torch.device(device).type == "cuda"

    def once(work: Callable[[], Any]) -> float:
        if on_cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if on_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    once(ours)
    once(peer)
    mine, theirs = Timing(), Timing()
    deadline = time.perf_counter() + seconds
    fewest = case.repeats or repeats
    while len(mine.seconds) < fewest or (time.perf_counter() < deadline and len(mine.seconds) < 200):
        # the order within a pair alternates, so that neither side always finds the other's caches
        first, second = ((ours, mine), (peer, theirs)) if len(mine.seconds) % 2 == 0 else ((peer, theirs), (ours, mine))
        first[1].seconds.append(once(first[0]))
        second[1].seconds.append(once(second[0]))
    if memory and case.memory:
        mine.peak_bytes, theirs.peak_bytes = peak_bytes(ours, device), peak_bytes(peer, device)
    ratios = [a / b for a, b in zip(mine.seconds, theirs.seconds, strict=True)]
    return {
        "size": dict(case.size),
        "peer": case.peer_name,
        "ours_s": mine.median,
        "peer_s": theirs.median,
        "ratio": statistics.median(ratios),
        "ratio_spread": [min(ratios), max(ratios)],
        "repeats": len(ratios),
        "peak_bytes_ours": mine.peak_bytes,
        "peak_bytes_peer": theirs.peak_bytes,
    }


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Exponent ``p`` of the power law ``y ~ x**p`` through the points, by least squares of the logarithms.

    Example:
        >>> round(slope([1, 2, 4], [3, 12, 48]), 6)
        2.0
    """
    import math

    if len(x) != len(y) or len(x) < 2:
        raise ValueError(f"x and y need the same length of at least 2, got {len(x)} and {len(y)}")
    lx, ly = [math.log(v) for v in x], [math.log(v) for v in y]
    mean_x, mean_y = statistics.fmean(lx), statistics.fmean(ly)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(lx, ly, strict=True)) / sum((a - mean_x) ** 2 for a in lx)

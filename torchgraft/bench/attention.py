"""Efficient attentions against SDPA and the eager formula: time and memory against the length."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchgraft.experiments import Case
from torchgraft.layers.efficient_transformers import efficient_attention

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Efficient attentions against SDPA: time and memory against the length"
OURS = "torchgraft.layers.efficient_transformers"
PEER = "torch SDPA"

FEATURES = 64
EAGER = "eager softmax"
KINDS: dict[str, dict[str, Any]] = {
    "longformer": {"window": 128, "global_tokens": (0,)},
    "local": {"window": 64},
    "bigbird": {"block": 32},
    "strided": {},
    "reformer": {"chunk": 64},
    "sinkhorn": {"block": 64},
    "routing": {},
    "linformer": {"rank": 128},
    "nystrom": {"landmarks": 64},
    "linear": {},
    "performer": {},
    "aft": {},
}
LINEAR = ("longformer", "linear", "performer")
"""Kinds timed at the longest length too."""


def _attend(kind: str, length: int, device: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    options = dict(KINDS.get(kind, {}))
    if kind == "linformer":
        rank = options.pop("rank")
        options |= {name: torch.randn(rank, length, device=device) / math.sqrt(length) for name in "ef"}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if kind == EAGER:
            return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        return efficient_attention(q, q if kind == "reformer" else k, v, kind, **options)

    return attend


def _work(attend: Callable[..., Tensor], length: int, device: str) -> Callable[[], object]:
    leaves = [torch.randn(1, 1, length, FEATURES, device=device, requires_grad=True) for _ in range(3)]

    def both() -> object:
        # reformer has no keys of its own
        return torch.autograd.grad(attend(*leaves).sum(), leaves, allow_unused=True)

    return both


def _case(kind: str, length: int, device: str) -> Case:
    return Case(
        {"length": length, "kind": kind},
        peer_name=PEER,
        make=lambda: (
            _work(_attend(kind, length, device), length, device),
            _work(F.scaled_dot_product_attention, length, device),
        ),
    )


def cases(quick: bool, device: str) -> list[Case]:
    """Forward and backward of every kind; on a GPU up to 64k."""
    if quick:
        return [_case(kind, 64, device) for kind in ("longformer", "performer")]
    lengths = [256, 1024, 4096] if device == "cpu" else [256, 1024, 4096, 16384]
    longest = 8192 if device == "cpu" else 65536
    found = [_case(kind, n, device) for n in lengths for kind in (EAGER, *KINDS)]
    return found + [_case(kind, longest, device) for kind in LINEAR]


def crossover(lengths: list[int], ratios: list[float]) -> float | None:
    """Length from which on ours is faster, between measured ones on logarithmic axes; none where it never is."""
    if ratios[-1] >= 1:
        return None
    at = len(ratios) - 1
    while at > 0 and ratios[at - 1] < 1:
        at -= 1
    if at == 0:
        return float(lengths[0])
    (x0, x1), (y0, y1) = (([math.log(v) for v in pair]) for pair in (lengths[at - 1 : at + 1], ratios[at - 1 : at + 1]))
    return math.exp(x0 + (x1 - x0) * y0 / (y0 - y1))


def _rows(record: Mapping[str, Any], kind: str) -> list[Mapping[str, Any]]:
    return [c for c in record["cases"] if c["size"]["kind"] == kind]


def figures(record: Mapping[str, Any]) -> Mapping[str, Figure]:
    """Time and peak memory against length, and from which length on each kind beats SDPA."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 5.2), layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=(1.2, 1.2, 0.8))
    kinds = [kind for kind in (EAGER, *KINDS) if _rows(record, kind)]
    colours = ["#999999", *[f"C{i}" for i in range(10)], "#000000", "#7a5195"]
    marks = "xosD^v<>Pp*hH"
    for column, (key, unit, label) in enumerate(
        [("{}_s", 1e3, "milliseconds, forward and backward"), ("peak_bytes_{}", 2**-20, "peak memory, MiB")]
    ):
        ax = axes[column]
        for kind, colour, mark in zip(kinds, colours, marks, strict=False):
            rows = _rows(record, kind)
            xs = [c["size"]["length"] for c in rows]
            ys = [c[key.format("ours")] * unit for c in rows]
            ax.loglog(xs, ys, f"{mark}-", color=colour, linewidth=1, markersize=4, label=kind)
        by_length: dict[int, list[float]] = {}
        for c in record["cases"]:
            by_length.setdefault(c["size"]["length"], []).append(c[key.format("peer")] * unit)
        xs = sorted(by_length)
        ax.loglog(xs, [sorted(by_length[x])[len(by_length[x]) // 2] for x in xs], "k--", linewidth=2.2, label="SDPA")
        ax.set(xlabel="length", ylabel=label)
        ax.set_xticks(xs, [f"{x:,}" for x in xs])
        ax.minorticks_off()
        ax.grid(True, which="major", alpha=0.3)
    axes[0].legend(frameon=False, fontsize=7, ncols=2)
    right = axes[2]
    for y, kind in enumerate(kinds):
        rows = _rows(record, kind)
        found = crossover([c["size"]["length"] for c in rows], [c["ratio"] for c in rows])
        right.text(0.02, y, kind, va="center", fontsize=9)
        right.text(
            0.98, y, "not up to the longest" if found is None else f"{found:,.0f}", va="center", ha="right", fontsize=9
        )
    right.set(ylim=(len(kinds), -1), xlim=(0, 1), xticks=[], yticks=[])
    right.set_title("faster than SDPA from this length on", fontsize=10)
    where = record["environment"]
    figure.suptitle(
        f"batch 1, one head of {FEATURES}, float32, {record['device']}, threads: {where['threads']}", fontsize=10
    )
    return {"attention": figure}

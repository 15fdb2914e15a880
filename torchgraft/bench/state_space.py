"""Every family of state space layers against softmax attention (SDPA): one layer, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from torchgraft.experiments import Case
from torchgraft.layers.state_space import FAMILIES, Attention, build_ssm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "State space layers of every family against softmax attention"
OURS = "torchgraft.layers.state_space"
PEER = "torch SDPA, as a layer with its projections and rotary positions"

WIDTH, STATES = 64, 16


def _work(layer: torch.nn.Module, length: int, device: str) -> Callable[[], object]:
    layer = layer.to(device)
    x = torch.randn(1, length, WIDTH, device=device, requires_grad=True)
    leaves = [x, *layer.parameters()]

    def work() -> object:
        return torch.autograd.grad(layer(x, return_state=False)[0].sum(), leaves)

    return work


def _case(name: str, length: int, device: str) -> Case:
    def make() -> tuple[Callable[[], object], Callable[[], object]]:
        states = STATES if FAMILIES[name].state_argument else None
        settings: dict[str, Any] = {"mamba2": {"head_dim": 32}, "mega": {"max_positions": length}}.get(name, {})
        settings |= {"l_kernel": length} if name in ("s4", "spade") else {}
        ours = build_ssm(name, WIDTH, states, l_max=length, **settings)
        return _work(ours, length, device), _work(Attention(WIDTH), length, device)

    return Case({"family": name, "length": length}, peer_name="SDPA", make=make)


def cases(quick: bool, device: str) -> list[Case]:
    """Two lengths for each family; Mega attends to everything, not in chunks."""
    names = ["s4d", "mamba"] if quick else [name for name in FAMILIES if name != "attention"]
    return [_case(name, length, device) for length in ([32] if quick else [512, 4096]) for name in names]


def crossover(x: list[float], ours: list[float], peer: list[float]) -> float | None:
    """Where two power laws through two points each meet; ``None`` when ours does not grow more slowly.

    Example:
        >>> round(crossover([1, 10], [4, 40], [1, 100]), 6)
        4.0
    """
    span = math.log(x[1] / x[0])
    slopes = [math.log(y[1] / y[0]) / span for y in (ours, peer)]
    if slopes[1] <= slopes[0]:
        return None
    return x[0] * math.exp(math.log(ours[0] / peer[0]) / (slopes[1] - slopes[0]))


def figures(record: Mapping[str, Any]) -> Mapping[str, Figure]:
    """Time and memory against length for every family beside SDPA, and the length from which it is faster."""
    from matplotlib.figure import Figure

    lengths = sorted({c["size"]["length"] for c in record["cases"]})
    names = list(dict.fromkeys(c["size"]["family"] for c in record["cases"]))
    by_name = {
        name: sorted((c for c in record["cases"] if c["size"]["family"] == name), key=lambda c: c["size"]["length"])
        for name in names
    }

    def said(found: float | None) -> str:
        """Within the lengths measured, or on which side of them."""
        if found is None or found > lengths[-1]:
            return f"not up to {lengths[-1]:,}"
        return f"below {lengths[0]:,}" if found < lengths[0] else f"{found:,.0f}"

    figure = Figure(figsize=(12.5, 6), layout="constrained")
    panels = [("{}_s", 1e3, "milliseconds"), ("peak_bytes_{}", 2**-20, "peak memory, MiB")]
    for ax, (key, scale, label) in zip(figure.subplots(1, 2), panels, strict=True):
        peers = [
            sorted(c[key.format("peer")] * scale for c in record["cases"] if c["size"]["length"] == length)
            for length in lengths
        ]
        middle = [values[len(values) // 2] for values in peers]
        ax.loglog(lengths, middle, "k*-", linewidth=2.4, label="SDPA")
        curves = {name: [c[key.format("ours")] * scale for c in by_name[name]] for name in names}
        for name in sorted(names, key=lambda name: -curves[name][-1]):
            text = name
            if len(lengths) > 1 and "_s" in key:
                text += f": {said(crossover(lengths, curves[name], middle))}"
            style = ("o-", "s--", "^:")[names.index(name) % 3]
            ax.loglog(
                lengths,
                curves[name],
                style,
                color=f"C{names.index(name) % 10}",
                label=text,
                markersize=4,
                linewidth=1.1,
            )
        ax.set_xlabel("length")
        ax.set_xticks(lengths, [f"{length:,}" for length in lengths])
        ax.minorticks_off()
        ax.set_ylabel(label)
        ax.grid(True, alpha=0.3)
        title = "faster than SDPA from length" if "_s" in key else ""
        ax.legend(
            frameon=False, fontsize=7, title=title, title_fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5)
        )  # fmt: skip
    threads = record["environment"]["threads"]
    figure.suptitle(
        f"one layer, forward+backward, batch 1, width {WIDTH}, float32, {record['device']}, threads: {threads}"
    )
    return {"state_space": figure}

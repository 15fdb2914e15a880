"""A Legendre memory unit in parallel against the same cell, and the LMU of 2019, one step after another."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.experiments import Case
from torchgraft.layers.lmuformer import LMUCell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Legendre memory units, parallel against step by step"
OURS = "torchgraft.layers.lmuformer.LMUCell"
PEER = "the same cell in a loop; the LMU of Voelker et al. (2019) in a loop, as common PyTorch versions have it"

BATCH, CHANNELS, HIDDEN, ORDER, THETA = 8, 64, 128, 128, 256
LOOP, FIRST = "the same cell, step by step", "LMU of 2019, step by step"


def same_in_a_loop(cell: LMUCell, x: Tensor) -> Tensor:
    """The plain cell as a recurrence: equal to ``cell(x)[0]``."""
    m = x.new_zeros(len(x), cell.memory_size)
    found = []
    for x_t in x.unbind(1):
        u = F.relu(cell.W_u(x_t))
        m = F.linear(m, cell.memory.A) + u * cell.memory.B
        found.append(F.relu(cell.W_h(torch.cat([m, x_t], -1))))
    return torch.stack(found, 1)


class FirstLMU(nn.Module):
    """The LMU of 2019 (equations 4, 6 and 7): what is written depends on the last output, so it cannot be parallel."""

    def __init__(self, cell: LMUCell) -> None:
        super().__init__()
        self.A, self.B = cell.memory.A, cell.memory.B
        self.e_x, self.e_h, self.e_m = (nn.Linear(n, 1, bias=False) for n in (CHANNELS, HIDDEN, ORDER))
        self.W_x, self.W_h, self.W_m = (nn.Linear(n, HIDDEN, bias=False) for n in (CHANNELS, HIDDEN, ORDER))

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) to (B, L, D)."""
        h, m = x.new_zeros(len(x), HIDDEN), x.new_zeros(len(x), ORDER)
        found = []
        for x_t in x.unbind(1):
            u = self.e_x(x_t) + self.e_h(h) + self.e_m(m)
            m = F.linear(m, self.A) + u * self.B
            h = torch.tanh(self.W_x(x_t) + self.W_h(h) + self.W_m(m))
            found.append(h)
        return torch.stack(found, 1)


def _work(module: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor, backward: bool) -> Callable[[], object]:
    leaves = [x, *module.parameters()]

    def forward() -> object:
        with torch.no_grad():
            return run(x)

    def both() -> object:
        return torch.autograd.grad(run(x).sum(), leaves)

    return both if backward else forward


def _case(length: int, backward: bool, peer: str, device: str) -> Case:
    def make() -> tuple[Callable[[], object], Callable[[], object]]:
        torch.manual_seed(0)
        cell = LMUCell(CHANNELS, HIDDEN, ORDER, THETA).to(device)
        x = torch.randn(BATCH, length, CHANNELS, device=device, requires_grad=backward)
        first = FirstLMU(cell).to(device)
        theirs = _work(cell, lambda x: same_in_a_loop(cell, x), x, backward)
        if peer == FIRST:
            theirs = _work(first, first, x, backward)
        return _work(cell, lambda x: cell(x)[0], x, backward), theirs

    size = {"length": length, "pass": "forward+backward" if backward else "forward"}
    return Case(size, peer_name=peer, make=make)


def cases(quick: bool, device: str) -> list[Case]:
    """Both loops at every length."""
    lengths = [32, 64] if quick else [64, 256, 1024, 2048, 4096]
    passes = [True] if quick else [False, True]
    return [_case(n, backward, peer, device) for peer, backward, n in itertools.product((LOOP, FIRST), passes, lengths)]


def figures(record: Mapping[str, Any]) -> Mapping[str, Figure]:
    """Time and peak memory against length, forward+backward, on logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    chosen = [c for c in record["cases"] if "+" in c["size"]["pass"]]
    kinds = (("{}_s", 1e3, "milliseconds"), ("peak_bytes_{}", 2**-20, "peak memory, MiB"))
    for ax, (key, scale, label) in zip(axes, kinds, strict=True):
        for peer, style, colour in ((LOOP, "s--", "#D55E00"), (FIRST, "^:", "#555555")):
            rows = [c for c in chosen if c["peer"] == peer]
            xs = [c["size"]["length"] for c in rows]
            if peer == LOOP:
                ax.loglog(xs, [c[key.format("ours")] * scale for c in rows], "o-", color="#0072B2", label="parallel")
            ax.loglog(xs, [c[key.format("peer")] * scale for c in rows], style, color=colour, label=peer)
        ax.set(xlabel="length", ylabel=label)
        ax.grid(True, which="major", alpha=0.3)
        ax.legend(frameon=False)
    where = record["environment"]
    figure.suptitle(
        f"forward+backward, batch {BATCH}, {CHANNELS} channels, memory and output of {HIDDEN}, float32, "
        f"{record['device']}, threads: {where['threads']}"
    )
    return {"lmu": figure}

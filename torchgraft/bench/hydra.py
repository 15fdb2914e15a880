"""A Hydra layer against a layer of softmax attention (SDPA), and against the Mamba-2 layer of transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchgraft.experiments import Case
from torchgraft.layers.hydra import HydraMixer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "A Hydra layer against an attention layer and a causal Mamba-2 layer"
OURS = "torchgraft.layers.hydra.HydraMixer"
PEER = "attention layer on torch SDPA; Mamba2Mixer of transformers"

WIDTH, STATES, HEADDIM = 128, 64, 64
SDPA, MAMBA = "attention (SDPA)", "Mamba2Mixer (transformers, one direction)"


class _Attention(nn.Module):
    """Projections and softmax attention, 2 heads of 64."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, HEADDIM)).permute(2, 0, 3, 1, 4)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _mamba() -> nn.Module:
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = Mamba2Config(
        hidden_size=WIDTH, state_size=STATES, head_dim=HEADDIM, num_heads=2 * WIDTH // HEADDIM, n_groups=1,
        chunk_size=64,
    )  # fmt: skip
    return Mamba2Mixer(config, layer_idx=0)


def _work(layer: nn.Module, length: int, backward: bool, device: str) -> Callable[[], object]:
    layer = layer.to(device)
    x = torch.randn(1, length, WIDTH, device=device, requires_grad=backward)
    leaves = [x, *layer.parameters()] if backward else []

    def forward() -> object:
        with torch.no_grad():
            return layer(x)

    def both() -> object:
        return torch.autograd.grad(layer(x).sum(), leaves, allow_unused=True)

    return both if backward else forward


def _case(length: int, backward: bool, peer: str, device: str) -> Case:
    def make() -> tuple[Callable[[], object], Callable[[], object]]:
        ours, other = HydraMixer(WIDTH, STATES, headdim=HEADDIM), _Attention() if peer == SDPA else _mamba()
        return _work(ours, length, backward, device), _work(other, length, backward, device)

    return Case({"length": length, "pass": "forward+backward" if backward else "forward"}, peer_name=peer, make=make)


def cases(quick: bool, device: str) -> list[Case]:
    """Attention at every length, Mamba-2 at three."""
    lengths = [32, 64] if quick else [256, 512, 1024, 2048, 4096, 8192]
    if device != "cpu" and not quick:
        lengths += [16384, 32768]
    passes = [True] if quick else [False, True]
    found = [_case(length, backward, SDPA, device) for backward in passes for length in lengths]
    return found + [_case(length, True, MAMBA, device) for length in ([64] if quick else [256, 1024, 4096])]


def figures(record: Mapping[str, Any]) -> Mapping[str, Figure]:
    """Time and peak memory against length, on logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7.5), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    for column, name in enumerate(["forward", "forward+backward"]):
        for row, (key, scale, label) in enumerate(
            [("{}_s", 1e3, "milliseconds"), ("peak_bytes_{}", 2**-20, "peak memory, MiB")]
        ):
            ax = axes[row][column]
            for peer, style, colour in ((SDPA, "s--", "#D55E00"), (MAMBA, "^:", "#555555")):
                rows = [c for c in record["cases"] if c["size"]["pass"] == name and c["peer"] == peer]
                xs = [c["size"]["length"] for c in rows]
                if peer == SDPA:
                    ax.loglog(xs, [c[key.format("ours")] * scale for c in rows], "o-", color="#0072B2", label="Hydra")
                if rows:
                    ax.loglog(xs, [c[key.format("peer")] * scale for c in rows], style, color=colour, label=peer)
            ax.set_ylabel(label)
            ax.grid(True, which="major", alpha=0.3)
            if row == 0:
                ax.set_title(name)
                ax.legend(frameon=False, fontsize=8)
            else:
                ax.set_xlabel("length")
            lengths = sorted({c["size"]["length"] for c in record["cases"]})
            ax.set_xticks(lengths, [f"{length:,}" for length in lengths], fontsize=8)
            ax.minorticks_off()
    where = record["environment"]
    figure.suptitle(
        f"one layer, batch 1, width {WIDTH}, {STATES} states, heads of {HEADDIM}, float32, "
        f"{record['device']}, threads: {where['threads']}"
    )
    return {"hydra": figure}

"""The spectral filter against one block of the vision transformer behind which it stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from torchgraft.experiments import Case
from torchgraft.language.eigenshield import EigenShield, SpectralFilter

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "The spectral filter against one block of a vision transformer"
OURS = "torchgraft.language.eigenshield.SpectralFilter"
PEER = "one ViT block (torch.nn.TransformerEncoderLayer)"


def _pair(
    batch: int, tokens: int, features: int, kept: int, device: str
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    rng = np.random.default_rng(0)
    # speed depends on how many directions are kept, not on which: no model needs to be loaded to fit a shield
    shield = EigenShield(noise=1.0, min_components=kept, margin="edge")
    shield.fit(rng.normal(size=(4 * features, features)) * np.where(np.arange(features) < kept, 4.0, 0.1))
    filtering = SpectralFilter(shield).to(device)
    block = nn.TransformerEncoderLayer(
        features, features // 64, 4 * features, activation="gelu", batch_first=True, norm_first=True
    )
    block = block.to(device).eval()
    z = torch.randn(batch, tokens, features, device=device)
    return torch.no_grad()(lambda: filtering(z)), torch.no_grad()(lambda: block(z))


def cases(quick: bool, device: str) -> list[Case]:
    """ViT-S, ViT-B and ViT-L at 197 and 257 tokens, for several numbers of directions kept."""
    if quick:
        sizes = [(1, 10, 64, 4)]
    else:
        sizes = [(1, 197, 384, k) for k in (8, 32, 128)]
        sizes += [(1, 197, 768, k) for k in (8, 32, 64, 128, 384, 600)]
        sizes += [(1, 257, 1024, k) for k in (8, 32, 128)]
        sizes += [(8, 197, 768, 32)]
    return [
        Case(
            {"batch": batch, "tokens": tokens, "features": features, "kept": kept},
            peer_name="one ViT block",
            make=partial(_pair, batch, tokens, features, kept, device),
        )
        for batch, tokens, features, kept in sizes
    ]


def figures(record: Mapping[str, Any]) -> Mapping[str, Figure]:
    """The filter's share of a block against the number of directions kept, with the count of operations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    ax = figure.subplots()
    rows = [case for case in record["cases"] if case["size"]["batch"] == 1]
    widths = sorted({case["size"]["features"] for case in rows})
    for width, colour, mark in zip(widths, ("#E69F00", "#0072B2", "#009E73"), "osv", strict=False):
        mine = sorted((c["size"]["kept"], 100 * c["ratio"]) for c in rows if c["size"]["features"] == width)
        ax.plot(*zip(*mine, strict=True), marker=mark, color=colour, label=f"{width} features, measured")
        tokens = next(c["size"]["tokens"] for c in rows if c["size"]["features"] == width)
        work = [100 * min(4 * k, 2 * width) / (24 * width + 4 * tokens) for k, _ in mine]
        ax.plot([k for k, _ in mine], work, ":", color=colour, linewidth=1)
    ax.axhline(1, color="#999999", linestyle="--", linewidth=1, label="target of 1 %")
    ax.plot([], [], ":", color="#000000", linewidth=1, label="by count of operations")
    ax.set(xscale="log", yscale="log", xlabel="directions kept", ylabel="time of the filter, % of one ViT block")
    ax.legend(frameon=False, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(f"{record['device']}, threads: {record['environment']['threads']}, batch 1", fontsize=10)
    return {"eigenshield": figure}

"""Anchoring against the models it stands in, and against rolling by interpolation as the official code does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.experiments import Case
from torchgraft.vision.polyphase_vit import make_shift_equivariant, polyphase_anchor
from torchgraft.vision.polyphase_vit.anchor import Norm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Anchored models against plain ones, and the anchor against a roll by grid sampling"
OURS = "torchgraft.vision.polyphase_vit"
PEER = "the unmodified model of transformers; the anchor as the official code forms it"

PLAIN, SAMPLED = "unmodified model", "norms of rearranged phases, grid_sample"
Work = Callable[[], Any]


def sampled_anchor(x: Tensor, p: int) -> Tensor:
    """The official formula, written anew: rearrange all phases, pad circularly, roll by nearest grid sampling."""
    B, _, H, W = x.shape
    phases = x.unfold(2, p, p).unfold(3, p, p).permute(0, 4, 5, 1, 2, 3).reshape(B, p * p, -1).contiguous()
    best = torch.linalg.vector_norm(phases, dim=2).argmax(1)
    padded = F.pad(x, (0, p - 1, 0, p - 1), "circular")
    move = torch.zeros(B, 2, 3, dtype=x.dtype, device=x.device)
    move[:, 0, 0] = move[:, 1, 1] = 1
    move[:, 0, 2] = best % p * 2 / padded.shape[3]
    move[:, 1, 2] = best // p * 2 / padded.shape[2]
    grid = F.affine_grid(move, list(padded.shape), align_corners=False)
    return F.grid_sample(padded, grid, "nearest", align_corners=False)[..., :H, :W]


def _vit(width: int, layers: int, side: int) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=max(1, width // 64),
        intermediate_size=4 * width, image_size=side, patch_size=16,
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


def _swin(side: int, window: int) -> nn.Module:
    from transformers import SwinConfig, SwinForImageClassification

    sizes = {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]}
    small = {"embed_dim": 12, "depths": [2, 2], "num_heads": [2, 2]}
    return SwinForImageClassification(
        SwinConfig(image_size=side, window_size=window, **(sizes if side >= 224 else small))
    ).eval()


def _beside_model(make: Callable[[], nn.Module], batch: int, side: int, device: str) -> tuple[Work, Work]:
    x = torch.randn(batch, 3, side, side, device=device)
    plain, poly = make().to(device), make_shift_equivariant(make()).to(device)
    return torch.no_grad()(lambda: poly(x)), torch.no_grad()(lambda: plain(x))


def _beside_sampling(batch: int, channels: int, side: int, patch: int, norm: Norm, device: str) -> tuple[Work, Work]:
    x = torch.randn(batch, channels, side, side, device=device)
    return lambda: polyphase_anchor(x, patch, norm), lambda: sampled_anchor(x, patch)


def cases(quick: bool, device: str) -> list[Case]:
    """Forward passes of whole models at 224 pixels, and the anchor alone on pixels and on tokens."""
    models: list[tuple[str, int, int, Callable[[], nn.Module]]]
    if quick:
        models = [("ViT", 1, 32, partial(_vit, 16, 1, 32)), ("Swin", 1, 32, partial(_swin, 32, 4))]
        maps = [(1, 3, 32, 16)]
    else:
        models = [
            ("ViT-Ti/16", 1, 224, partial(_vit, 192, 12, 224)),
            ("ViT-S/16", 1, 224, partial(_vit, 384, 12, 224)),
            ("ViT-B/16", 1, 224, partial(_vit, 768, 12, 224)),
            ("ViT-Ti/16", 8, 224, partial(_vit, 192, 12, 224)),
            ("Swin-T", 1, 224, partial(_swin, 224, 7)),
        ]
        maps = [(1, 3, 224, 16), (8, 3, 224, 16), (8, 3, 112, 16), (1, 3, 448, 16), (8, 96, 56, 7)]
    made = []
    for name, batch, side, make in models:
        size: dict[str, Any] = {"work": "model", "model": name, "batch": batch, "side": side}
        made.append(Case(size, peer_name=PLAIN, make=partial(_beside_model, make, batch, side, device)))
    for batch, channels, side, patch in maps:
        for norm in ("filtered", "l2"):
            size = {"work": "anchor", "norm": norm, "batch": batch, "channels": channels, "side": side, "patch": patch}
            work = partial(_beside_sampling, batch, channels, side, patch, norm, device)
            made.append(Case(size, peer_name=SAMPLED, make=work))
    return made


def figures(record: Mapping[str, Any]) -> Mapping[str, Figure]:
    """Overhead of whole models, and time of the anchor against the size of its input."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = [c for c in record["cases"] if c["size"]["work"] == "model"]
    for y, row in enumerate(rows):
        over, (low, high) = 100 * (row["ratio"] - 1), (100 * (r - 1) for r in row["ratio_spread"])
        left.plot([low, high], [y, y], "-", color="#999999", linewidth=1.2)
        left.plot([over], [y], "o", color="#D55E00")
        left.annotate(f"{over:.1f} %", (over, y), (0, 7), textcoords="offset points", ha="center", fontsize=8)
    left.set_yticks(range(len(rows)), [f"{c['size']['model']}, batch {c['size']['batch']}" for c in rows])
    left.set_ylim(-0.6, len(rows) - 0.3)
    left.axvline(10, color="#999999", linestyle=":", linewidth=1)
    left.set(xlabel="time added to the unmodified model, % (line: least and greatest)")
    for norm, mark in (("filtered", "o"), ("l2", "s")):
        found = [c for c in record["cases"] if c["size"].get("norm") == norm and c["size"]["channels"] == 3]
        found.sort(key=lambda c: c["size"]["batch"] * c["size"]["side"] ** 2)
        sizes = [c["size"]["batch"] * c["size"]["channels"] * c["size"]["side"] ** 2 / 1e3 for c in found]
        colour = "#D55E00" if norm == "filtered" else "#E69F00"
        right.loglog(sizes, [1e3 * c["ours_s"] for c in found], mark + "-", color=colour, label=f"ours, {norm}")
        if norm == "filtered":
            right.loglog(sizes, [1e3 * c["peer_s"] for c in found], "^--", color="#000000", label="by grid_sample")
    right.set(xlabel="thousand values in the batch (3 channels, patch 16)", ylabel="milliseconds")
    right.legend(frameon=False, fontsize=8)
    for ax in (left, right):
        ax.grid(alpha=0.3)
    figure.suptitle(f"{record['device']}, threads: {record['environment']['threads']}", fontsize=10)
    return {"polyphase_vit": figure}

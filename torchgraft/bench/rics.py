"""Choosing the crop against the network behind it, and against averaging over all crops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from torchgraft import zoo
from torchgraft.experiments import Case
from torchgraft.vision.rics import CropSelector, RICSModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Crop selection against the forward pass it stands before, and against averaging over crops"
OURS = "torchgraft.vision.rics"
PEER = "EfficientNet-lite0's forward pass; the mean over 25 crops"

FORWARD, AVERAGE = "forward pass alone", "mean over 25 crops"


def _selection(net: nn.Module, batch: int, window: int, crop: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    x, selector = torch.rand(batch, 3, window, window), CropSelector(crop)
    centre = x[..., :crop, :crop].contiguous()
    return torch.no_grad()(lambda: selector(x)), torch.no_grad()(lambda: net(centre))


def _voting(net: nn.Module, batch: int, window: int, crop: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    x, model = torch.rand(batch, 3, window, window), RICSModel(net, CropSelector(crop))
    places = torch.linspace(0, window - crop, 5).long().tolist()

    def average() -> Any:
        return sum(net(x[..., r : r + crop, c : c + crop].contiguous()) for r in places for c in places) / 25

    return torch.no_grad()(lambda: model(x)), torch.no_grad()(average)


def cases(quick: bool, device: str) -> list[Case]:
    """Selection alone beside the network's forward pass, and the whole beside test-time augmentation."""
    if quick:
        net: nn.Module = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        sizes = [(1, 40, 32)]
    else:
        net = zoo.load("efficientnet-lite0", device=device)
        sizes = [(1, 256, 224), (8, 256, 224), (1, 256, 192)]
    made = []
    for batch, window, crop in sizes:
        size: dict[str, Any] = {"batch": batch, "window": window, "crop": crop}
        make = partial(_selection, net.eval(), batch, window, crop)
        made.append(Case({"work": "selection"} | size, peer_name=FORWARD, make=make))
    batch, window, crop = sizes[0]
    size = {"work": "answer", "batch": batch, "window": window, "crop": crop}
    return [*made, Case(size, peer_name=AVERAGE, make=partial(_voting, net.eval(), batch, window, crop))]


def figures(record: Mapping[str, Any]) -> Mapping[str, Figure]:
    """Selection's share of a forward pass."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    ax = figure.subplots()
    rows = [c for c in record["cases"] if c["peer"] == FORWARD]
    shares = [100 * c["ratio"] for c in rows]
    ax.barh(range(len(rows)), shares, color="#0072B2")
    for y, share in enumerate(shares):
        ax.annotate(f"{share:.1f} %", (share, y), (5, 0), textcoords="offset points", va="center")
    labels = [f"{c['size']['batch']} × {c['size']['window']} px, crop {c['size']['crop']}" for c in rows]
    ax.set_yticks(range(len(rows)), labels)
    ax.set(xlabel="time of crop selection, % of the network's forward pass", xlim=(0, max(6.0, 1.3 * max(shares))))
    ax.axvline(5, color="#999999", linestyle=":", linewidth=1)
    ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{record['device']}, threads: {record['environment']['threads']}", fontsize=10)
    return {"rics": figure}

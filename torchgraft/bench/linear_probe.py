"""Linear probe on features computed once, against running the frozen network in every epoch as published."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.compression.lottery_reprogramming import LinearProbe
from torchgraft.experiments import Case

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Linear probe: features once against a forward pass in every epoch"
OURS = "torchgraft.compression.lottery_reprogramming.LinearProbe"
PEER = "the network in every epoch, as the official script does"

CLASSES, BATCH = 10, 128


def network(width: int) -> nn.Module:
    """Convolutions for 32 x 32 images of three channels, with a linear layer of 100 classes."""
    layers: list[nn.Module] = []
    inputs = 3
    for outputs, stride in ((width, 1), (2 * width, 2), (4 * width, 2), (4 * width, 1)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 100)).eval()


def published(net: nn.Sequential, x: Tensor, y: Tensor, epochs: int, device: str) -> nn.Linear:
    """Adam on the last layer, the frozen network run on every batch of every epoch."""
    body, width = net[:-1], net[-1].in_features
    layer = nn.Linear(width, CLASSES).to(device)  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [int(0.5 * epochs), int(0.72 * epochs)], 0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for index in torch.randperm(len(x), generator=generator).split(BATCH):
            with torch.no_grad():
                z = body(x[index].to(device))
            loss = F.cross_entropy(layer(z), y[index].to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        schedule.step()
    return layer


def _case(images: int, epochs: int, width: int, device: str) -> Case:
    def make() -> tuple[Callable[[], object], Callable[[], object]]:
        torch.manual_seed(0)
        net = network(width).to(device).requires_grad_(False)
        x, y = torch.rand(images, 3, 32, 32), torch.arange(images) % CLASSES

        def ours() -> object:
            return LinearProbe(net, CLASSES, size=32, mean=None, std=None).fit((x, y), epochs, batch_size=BATCH)

        def peer() -> object:
            return published(net, x, y, epochs, device)  # type: ignore[arg-type]

        return ours, peer

    size = {"images": images, "epochs": epochs, "width": width}
    return Case(size, peer_name="a forward pass in every epoch", make=make)


def cases(quick: bool, device: str) -> list[Case]:
    """Numbers of epochs up to the 100 of the paper, and images, for a small network."""
    if quick:
        return [_case(64, 2, 4, device), _case(64, 5, 4, device)]
    return [_case(128, epochs, 16, device) for epochs in (1, 3, 10, 30, 100)] + [_case(512, 30, 16, device)]


def figures(record: Mapping[str, Any]) -> Mapping[str, Figure]:
    """Seconds against epochs, on logarithmic axes."""
    from matplotlib.figure import Figure

    chosen = [c for c in record["cases"] if c["size"]["images"] == record["cases"][0]["size"]["images"]]
    epochs = [c["size"]["epochs"] for c in chosen]
    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    ax.loglog(epochs, [c["peer_s"] for c in chosen], "s--", color="#D55E00", label="a forward pass in every epoch")
    ax.loglog(epochs, [c["ours_s"] for c in chosen], "o-", color="#0072B2", label="features once (LinearProbe)")
    ax.set_xticks(epochs, [str(n) for n in epochs])
    ax.minorticks_off()
    ax.set(xlabel="epochs of training", ylabel="seconds in all")
    ax.grid(True, which="major", alpha=0.3)
    ax.legend(frameon=False)
    size, where = chosen[0]["size"], record["environment"]
    ax.set_title(
        f"{size['images']} images of 3 x 32 x 32, batches of {BATCH}, {record['device']}, "
        f"threads: {where['threads']}", fontsize=10,
    )  # fmt: skip
    return {"linear_probe": figure}

"""What recipes on small images share: a network, crops and flips, and shifts by a pixel."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Cnn(nn.Sequential):
    """Convolutions of 3 x 3 with batch norm, the first of stride two, halving the image after each but the last."""

    def __init__(self, inputs: int, channels: tuple[int, ...], classes: int) -> None:
        layers: list[nn.Module] = []
        for i, outputs in enumerate(channels):
            layers += [nn.Conv2d(inputs, outputs, 3, 1 if i else 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if i < len(channels) - 1 else []
            inputs = outputs
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def flipped(x: Tensor) -> Tensor:
    """A random flip of each of (B, C, H, W)."""
    flip = torch.rand(len(x), device=x.device) < 0.5
    return torch.where(flip[:, None, None, None], x.flip(3), x)


def cropped(x: Tensor) -> Tensor:
    """A random flip, and a random crop of the image padded by four, anew for each of (B, C, H, W)."""
    x = flipped(x)
    padded = F.pad(x, (4, 4, 4, 4))
    top, left = torch.randint(0, 9, (2, len(x), 1), device=x.device)
    rows = (top + torch.arange(x.shape[2], device=x.device))[:, :, None]
    columns = (left + torch.arange(x.shape[3], device=x.device))[:, None, :]
    each = torch.arange(len(x), device=x.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[each, rows, columns].permute(0, 3, 1, 2)


def shifted(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """An operation: by one pixel, up or down for the weaker half of the levels, to a side for the stronger."""
    rows, columns = (torch.where(chosen, sign, 0 * sign).long() + 1 for chosen in (level <= 0.5, level > 0.5))
    padded, (h, w) = F.pad(x, (1, 1, 1, 1)), x.shape[2:]
    return torch.stack([p[:, d : d + h, r : r + w] for p, d, r in zip(padded, rows, columns, strict=True)])


def coloured(x: Tensor) -> Tensor:
    """Grey images of 8 x 8 as three equal channels of 16 x 16; others as they are."""
    return x.expand(-1, 3, -1, -1).repeat_interleave(2, 2).repeat_interleave(2, 3) if x.shape[1] == 1 else x

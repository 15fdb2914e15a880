"""Objects cut out of their background: RGBA bytes and a box; how they are read, resized and pasted.

Resizing and pasting give the bytes that Pillow gives, so that a canvas of ours is a canvas of the published generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64, UInt8
from torch import Tensor

_BITS = 22  # Pillow's fixed-point weights of byte images


class Cutouts(NamedTuple):
    """A batch of objects on transparent canvases.

    Attributes:
        rgba: (B, 4, S, S) uint8, colours not multiplied by alpha, zero where alpha is zero.
        box: (B, 4) int64, left, top, width and height of where the object is, in pixels.
    """

    rgba: UInt8[Tensor, "B 4 S S"]
    box: Int64[Tensor, "B 4"]

    @property
    def rgb(self) -> UInt8[Tensor, "B 3 S S"]:
        """Colours."""
        return self.rgba[:, :3]

    @property
    def alpha(self) -> UInt8[Tensor, "B 1 S S"]:
        """Opacity."""
        return self.rgba[:, 3:]

    def at(self, rows: Tensor) -> Cutouts:
        """Some of them."""
        return Cutouts(self.rgba.index_select(0, rows), self.box.index_select(0, rows))

    def recoloured(self, rgb: UInt8[Tensor, "B 3 S S"]) -> Cutouts:
        """Other colours behind the same alpha."""
        return Cutouts(torch.cat([rgb * (self.alpha > 0), self.alpha], 1), self.box)


def check_cutouts(cutouts: Cutouts) -> None:
    """Refuse what is no batch of cut-outs.

    Raises:
        TypeError, ValueError: naming what came.
    """
    rgba, box = cutouts
    if rgba.dtype != torch.uint8:
        raise TypeError(f"rgba must be uint8, 0..255, got {rgba.dtype}")
    if rgba.ndim != 4 or rgba.shape[1] != 4:
        raise ValueError(f"rgba must have shape (B, 4, S, S), red, green, blue, alpha, got {tuple(rgba.shape)}")
    if rgba.shape[2] != rgba.shape[3]:
        raise ValueError(f"canvases must be square, got {rgba.shape[2]} x {rgba.shape[3]} pixels; pad them")
    if tuple(box.shape) != (len(rgba), 4) or box.dtype != torch.int64:
        raise ValueError(f"box must be int64 of shape ({len(rgba)}, 4), got {box.dtype} {tuple(box.shape)}")


def as_bytes(image: Any, channels: int, name: str) -> UInt8[Tensor, "C h w"]:
    """One image as bytes.

    Args:
        image: a Pillow image of mode RGB or RGBA, or a tensor (C, h, w), uint8 or floats in 0..1.
        channels: 3 or 4.
        name: what the message calls it.

    Raises:
        TypeError, ValueError: for another kind, rank, number of channels, mode, dtype or range, and for NaN.
    """
    if hasattr(image, "getbands"):
        wanted = "RGB" if channels == 3 else "RGBA"
        if image.mode != wanted:
            raise ValueError(f"{name} is a Pillow image of mode {image.mode!r}; use image.convert({wanted!r})")
        return torch.from_numpy(np.array(image)).movedim(-1, 0).contiguous()
    if not isinstance(image, Tensor):
        raise TypeError(f"{name} must be a tensor or a Pillow image, got {type(image).__name__}")
    if image.ndim != 3 or image.shape[0] != channels:
        kind = "red, green, blue, alpha" if channels == 4 else "red, green, blue"
        raise ValueError(f"{name} must have shape ({channels}, h, w), {kind}, got {tuple(image.shape)}")
    if 0 in image.shape:
        raise ValueError(f"{name} has no pixels, its shape is {tuple(image.shape)}")
    if image.dtype == torch.uint8:
        return image
    if not image.is_floating_point():
        raise TypeError(f"{name} must be uint8 in 0..255 or floats in 0..1, got {image.dtype}")
    if image.isnan().any():
        raise ValueError(f"{name} has NaN pixels")
    low, high = float(image.min()), float(image.max())
    if low < 0 or high > 1:
        raise ValueError(f"{name} has floats from {low:.4g} to {high:.4g}; scale them to 0..1, or give uint8")
    return (image * 255).round().to(torch.uint8)


def _square(image: Tensor, name: str) -> Tensor:
    if image.shape[1] != image.shape[2]:
        raise ValueError(f"{name} must be square, got {image.shape[1]} x {image.shape[2]} pixels; crop or pad it")
    return image


def pillow_resized(image: UInt8[Tensor, "C h w"], size: int) -> UInt8[Tensor, "C size size"]:
    """Pillow's bilinear resize, as the published generator prepares objects and backgrounds."""
    if tuple(image.shape[1:]) == (size, size):
        return image
    from PIL import Image

    picture = Image.fromarray(image.movedim(0, -1).contiguous().numpy())
    resized = picture.resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).movedim(-1, 0).contiguous()


def prepared_objects(objects: Sequence[Any], size: int, scale: float) -> Cutouts:
    """Square RGBA images, resized to the canvas, then made smaller around its centre.

    Raises:
        TypeError, ValueError: for images that are no square RGBA images.
    """
    images = [_square(as_bytes(image, 4, f"foreground {i}"), f"foreground {i}") for i, image in enumerate(objects)]
    rgba = torch.stack([pillow_resized(image.cpu(), size) for image in images])
    whole = Cutouts(rgba * (rgba[:, 3:] > 0), torch.tensor([[0, 0, size, size]]).repeat(len(rgba), 1))
    return scaled(whole, torch.full((len(rgba),), scale, dtype=torch.float64))


def prepared_backgrounds(images: Sequence[Any] | Tensor, size: int) -> UInt8[Tensor, "N 3 S S"]:
    """Square RGB images, resized to the canvas.

    Raises:
        TypeError, ValueError: for images that are no square RGB images.
    """
    found = [_square(as_bytes(image, 3, f"background {i}"), f"background {i}") for i, image in enumerate(images)]
    return torch.stack([pillow_resized(image.cpu(), size) for image in found])


def composite(cutouts: Cutouts, background: UInt8[Tensor, "B 3 S S"]) -> Float32[Tensor, "B 3 S S"]:
    """Objects over backgrounds: alpha * colour + (1 - alpha) * background, rounded to bytes as Pillow's paste rounds.

    Returns:
        Whole numbers 0..255.
    """
    # float32 is exact enough: a sum of two bytes weighted by alpha and 255 - alpha is never half-way between two bytes
    rgba, under = cutouts.rgba.float(), background.float()
    return rgba[:, :3].sub_(under).mul_(rgba[:, 3:].div_(255)).add_(under).round_()


def _bicubic(x: float) -> float:
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * -0.5 if x < 2 else 0.0


def _box(x: float) -> float:
    return 1.0 if -0.5 < x <= 0.5 else 0.0


_FILTERS: dict[str, tuple[Callable[[float], float], float]] = {"bicubic": (_bicubic, 2.0), "box": (_box, 0.5)}


@lru_cache(maxsize=64)
def resize_weights(before: int, after: int, kind: str) -> Float64[Tensor, "after before"]:
    """Weights of an antialiased resize along one side, in Pillow's fixed point: whole numbers of 2**-22.

    A pixel of the smaller image is the mean of the larger one under the filter, stretched to the size of the pixel.
    """
    kernel, support = _FILTERS[kind]
    step = before / after
    stretch = max(step, 1.0)
    weights = torch.zeros(after, before, dtype=torch.float64)
    for place in range(after):
        centre = (place + 0.5) * step
        first = max(int(centre - support * stretch + 0.5), 0)
        end = min(int(centre + support * stretch + 0.5), before)
        values = [kernel((i - centre + 0.5) * (1 / stretch)) for i in range(first, end)]
        total = 0.0
        for value in values:  # term after term: from Python 3.12 on, sum() corrects its roundings
            total += value
        for i, value in enumerate(values):
            weights[place, first + i] = math.trunc(value * (1 / total) * 2**_BITS + math.copysign(0.5, value))
    return weights


@lru_cache(maxsize=8)
def _scaling_table(size: int) -> Float64[Tensor, "sizes S S"]:
    """For every smaller size, the weights that put the smaller image into the centre of the canvas."""
    table = torch.zeros(size + 1, size, size, dtype=torch.float64)
    for after in range(1, size + 1):
        start = (size - after) // 2
        table[after, start : start + after] = resize_weights(size, after, "bicubic")
    return table


def inside_rows(rgba: UInt8[Tensor, "B 4 S S"]) -> Float64[Tensor, "B 4 S S"]:
    """In float64, with channels inside rows in memory, as ``separable`` multiplies them."""
    return rgba.transpose(1, 2).contiguous().double().transpose(1, 2)


def premultiplied(rgba: UInt8[Tensor, "B 4 S S"]) -> Float64[Tensor, "B 4 S S"]:
    """Colours times alpha, whole numbers."""
    x = inside_rows(rgba)
    x[:, :3].mul_(x[:, 3:]).div_(255).round_()
    return x


def divided_by_alpha(x: Float64[Tensor, "B 4 h w"]) -> UInt8[Tensor, "B 4 h w"]:
    """The way back, from whole numbers to bytes."""
    x = x.float()
    alpha = x[:, 3:]
    # Pillow leaves colours alone where alpha is nothing or all
    share = torch.where(alpha == 0, 255, alpha)
    x[:, :3].mul_(255).div_(share).floor_().clamp_(max=255)
    return x.to(torch.uint8)


def separable(
    x: Float64[Tensor, "B C h w"],
    weights: Float64[Tensor, "*B out h"],
    rounded: Callable[[Tensor], Tensor] | None = None,
) -> Float64[Tensor, "B C out out"]:
    """The same weights along each row, then along each column.

    In float64: with whole numbers below 2**53 every sum is exact, in whatever order a library takes it.
    """
    # with channels inside rows both products are plain ones, and nothing is copied between them
    inside = x.transpose(1, 2)
    along = inside.flatten(1, 2) @ weights.transpose(-1, -2)
    if rounded is not None:
        along = rounded(along)
    down = weights @ along.unflatten(1, inside.shape[1:3]).flatten(2)
    if rounded is not None:
        down = rounded(down)
    return down.unflatten(2, (x.shape[1], -1)).transpose(1, 2)


def fixed_point(x: Tensor) -> Tensor:
    """Sums of fixed-point weights times bytes, rounded to bytes, in place."""
    return x.add_(2 ** (_BITS - 1)).mul_(2.0**-_BITS).floor_().clamp_(0, 255)


def scaled(cutouts: Cutouts, factor: Float64[Tensor, " B"]) -> Cutouts:
    """Canvases made smaller by a factor of at most 1 and put into the centre of an empty one (bicubic, antialiased).

    As in the published code, the box moves by the canvas's margin: an object that is off the centre stays in its
    place in the smaller canvas, while its box keeps the offset it had.

    Raises:
        ValueError: for factors outside (0, 1] or a canvas that would have no pixel.
    """
    size = cutouts.rgba.shape[-1]
    if bool(((factor <= 0) | (factor > 1)).any()):
        raise ValueError(f"scale factors must lie in (0, 1], got {float(factor.min()):.4g} … {float(factor.max()):.4g}")
    after = (size * factor).round().long()
    if len(after) and int(after.min()) < 1:
        raise ValueError(f"a factor of {float(factor.min()):.4g} leaves no pixel of a canvas of {size}")
    weights = _scaling_table(size).to(factor.device).index_select(0, after)
    smaller = separable(premultiplied(cutouts.rgba), weights, fixed_point)
    # a resize to the same size is a copy, without the rounding of premultiplied colours
    same = (after == size)[:, None, None, None]
    rgba = torch.where(same, cutouts.rgba, divided_by_alpha(smaller))
    margin = ((size - after) // 2)[:, None]
    extent = (cutouts.box[:, 2:] * factor[:, None]).round().long()
    return Cutouts(rgba, torch.cat([cutouts.box[:, :2] + margin, extent], 1))


def picked(x: UInt8[Tensor, "B C S S"], rows: Int64[Tensor, "B h w"], columns: Int64[Tensor, "B h2 w2"]) -> Tensor:
    """Pixels taken from (row, column) of each image; what lies outside is transparent black."""
    size = x.shape[-1]
    inside = (rows >= 0) & (rows < size) & (columns >= 0) & (columns < size)
    index = (rows * size + columns).masked_fill(~inside, 0).flatten(1)[:, None]
    taken = x.flatten(2).gather(2, index.expand(-1, x.shape[1], -1))
    return taken.view_as(x) * inside[:, None]

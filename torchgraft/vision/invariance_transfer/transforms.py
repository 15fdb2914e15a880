"""The 18 transformations of Transforms-2D, batched (card 19; paper, section 3 and appendix).

Each is a module from cut-outs to cut-outs with its own random parameters per image. Where the published generator uses
Pillow alone, the bytes are Pillow's: scale, translate, flips, rotate, shear, brightness, grayscale, posterize, invert,
sharpen, contrast, pixelate, erasing. Blur and elastic differ by rounding, hue by Pillow's 8-bit hue.

Differences from the published code, each on purpose: colours behind a soft edge are not darkened anew by every
photometric step; noise saturates at white, where the published conversion to bytes wraps round to black.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch
from jaxtyping import Float32, Float64, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.vision.invariance_transfer.cutouts import (
    Cutouts,
    check_cutouts,
    divided_by_alpha,
    fixed_point,
    picked,
    premultiplied,
    resize_weights,
    scaled,
    separable,
)
from torchgraft.vision.invariance_transfer.draws import Draws

Range = tuple[float, float]
_CACHED = 16_384  # pixels of canvases, in all four channels a quarter of a megabyte of floats


class Transform(nn.Module):
    """A random change of cut-outs.

    Subclasses say how parameters are drawn and what they do; ``p`` is the share of images that is changed at all.

    Args:
        p: probability.

    Raises:
        ValueError: for a probability outside 0..1.
    """

    smallest: ClassVar[int] = 2
    """Smallest canvas."""

    def __init__(self, p: float = 1.0) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"p must lie in 0..1, got {p}")
        self.p = p

    def check_size(self, size: int) -> None:
        """Refuse a canvas that is too small.

        Raises:
            ValueError: naming both sizes.
        """
        if size < self.smallest:
            raise ValueError(f"{type(self).__name__} needs a canvas of {self.smallest} pixels or more, got {size}")

    def parameters_of(self, draws: Draws, size: int) -> dict[str, Tensor]:
        """Random parameters of a batch, keyword arguments of ``apply``."""
        return {}

    def change(self, cutouts: Cutouts, **parameters: Tensor) -> Cutouts:
        """The change itself, a plain function of its parameters."""
        raise NotImplementedError

    def forward(self, cutouts: Cutouts, draws: Draws | None = None) -> Cutouts:
        """Changed cut-outs; without ``draws``, the numbers come from torch's global generator."""
        check_cutouts(cutouts)
        size = cutouts.rgba.shape[-1]
        self.check_size(size)
        if draws is None:
            index = torch.arange(len(cutouts.rgba), device=cutouts.rgba.device)
            draws = Draws(int(torch.randint(2**62, ())), type(self).__name__, index)
        if self.p == 1:
            return self.change(cutouts, **self.parameters_of(draws, size))
        on = draws.chance(self.p).nonzero()[:, 0]
        if not len(on):
            return cutouts
        part = self.change(cutouts.at(on), **self.parameters_of(draws.at(on), size))
        return Cutouts(*(old.index_copy(0, on, new) for old, new in zip(cutouts, part, strict=True)))

    def extra_repr(self) -> str:
        """Settings."""
        kept = {k: v for k, v in vars(self).items() if not k.startswith("_") and k != "training"}
        return ", ".join(f"{k}={v}" for k, v in kept.items())


def _ordered(value: Range, name: str, low: float, high: float) -> Range:
    first, last = value
    if not low <= first <= last <= high:
        raise ValueError(f"{name} must be an ordered pair within {low:g}..{high:g}, got {value}")
    return float(first), float(last)


class Scale(Transform):
    """Smaller by a factor drawn from a range."""

    def __init__(self, factor: Range = (0.4, 1.0), p: float = 1.0) -> None:
        super().__init__(p)
        self.factor = _ordered(factor, "factor", 0.01, 1)

    def parameters_of(self, draws: Draws, size: int) -> dict[str, Tensor]:
        """factor (B,)."""
        return {"factor": draws.uniform(*self.factor)}

    def change(self, cutouts: Cutouts, factor: Float64[Tensor, " B"]) -> Cutouts:  # type: ignore[override]
        """See ``scaled``."""
        return scaled(cutouts, factor)


def _moved(cutouts: Cutouts, corner: Int64[Tensor, "B 2"]) -> Cutouts:
    """The box's upper left corner to another pixel; what leaves the canvas is lost."""
    rgba, box = cutouts
    shift = corner - box[:, :2]
    steps = torch.arange(rgba.shape[-1], device=rgba.device)
    rows, columns = steps[:, None] - shift[:, 1, None, None], steps[None, :] - shift[:, 0, None, None]
    return Cutouts(picked(rgba, rows, columns), torch.cat([corner, box[:, 2:]], 1))


class Translate(Transform):
    """The box to a random place of the canvas; whole pixels. A box that fills the canvas stays."""

    def parameters_of(self, draws: Draws, size: int) -> dict[str, Tensor]:
        """place (B, 2), in 0..1 of the room that the box has."""
        return {"place": torch.stack([draws.uniform(), draws.uniform()], 1)}

    def change(self, cutouts: Cutouts, place: Float64[Tensor, "B 2"]) -> Cutouts:  # type: ignore[override]
        """Move the box's upper left corner."""
        return _moved(cutouts, (place * (cutouts.rgba.shape[-1] - cutouts.box[:, 2:])).long())


class VerticalFlip(Transform):
    """Upside down."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__(p)

    def change(self, cutouts: Cutouts) -> Cutouts:  # type: ignore[override]
        """Flip the canvas; the box stays, as in the published code."""
        return Cutouts(cutouts.rgba.flip(2), cutouts.box)


class HorizontalFlip(Transform):
    """Left to right."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__(p)

    def change(self, cutouts: Cutouts) -> Cutouts:  # type: ignore[override]
        """Flip the canvas; the box stays, as in the published code."""
        return Cutouts(cutouts.rgba.flip(3), cutouts.box)


def _warped(rgba: UInt8[Tensor, "B 4 S S"], inverse: Float64[Tensor, "B 2 2"]) -> Tensor:
    """The canvas under a linear map around its centre, nearest pixel, by Pillow's 16-bit fixed point.

    ``inverse`` takes a place of the result, (x, y), to its place in the input.
    """
    size = rgba.shape[-1]
    centre = torch.full((2, 1), size / 2, dtype=torch.float64, device=rgba.device)
    offset = (centre - inverse @ centre)[..., 0]
    start = offset + 0.5 * inverse.sum(-1)
    steps, first = ((v * 65536 + 0.5).floor().long() for v in (inverse, start))
    places = torch.arange(size, device=rgba.device)
    x, y = places[None, None, :], places[None, :, None]

    def source(axis: int) -> Int64[Tensor, "B S S"]:
        step, begin = steps[:, axis, :, None, None], first[:, axis, None, None]
        return (begin + x * step[:, 0] + y * step[:, 1]) >> 16

    return picked(rgba, source(1), source(0))


class Rotate(Transform):
    """Around the canvas's centre, counter-clockwise, nearest pixel."""

    def __init__(self, degrees: Range = (0.0, 360.0), p: float = 1.0) -> None:
        super().__init__(p)
        self.degrees = _ordered(degrees, "degrees", -360, 360)

    def parameters_of(self, draws: Draws, size: int) -> dict[str, Tensor]:
        """degrees (B,)."""
        return {"degrees": draws.uniform(*self.degrees)}

    def change(self, cutouts: Cutouts, degrees: Float64[Tensor, " B"]) -> Cutouts:  # type: ignore[override]
        """Rotate; the box stays, as in the published code."""
        # fifteen decimals, as Pillow has it, make a quarter turn exact
        angle = degrees.deg2rad()
        cos, sin = angle.cos().round(decimals=15), angle.sin().round(decimals=15)
        inverse = torch.stack([cos, -sin, sin, cos], 1).view(-1, 2, 2)
        return Cutouts(_warped(cutouts.rgba, inverse), cutouts.box)


class Shear(Transform):
    """Along both axes, nearest pixel."""

    def __init__(self, degrees: Range = (-50.0, 50.0), p: float = 1.0) -> None:
        super().__init__(p)
        self.degrees = _ordered(degrees, "degrees", -89, 89)

    def parameters_of(self, draws: Draws, size: int) -> dict[str, Tensor]:
        """degrees (B, 2), along x and y."""
        return {"degrees": torch.stack([draws.uniform(*self.degrees), draws.uniform(*self.degrees)], 1)}

    def change(self, cutouts: Cutouts, degrees: Float64[Tensor, "B 2"]) -> Cutouts:  # type: ignore[override]
        """Shear by y, then by x, as torchvision composes them; the box stays."""
        x, y = degrees.deg2rad().tan().unbind(1)
        inverse = torch.stack([1 + x * y, x, y, torch.ones_like(x)], 1).view(-1, 2, 2)
        return Cutouts(_warped(cutouts.rgba, inverse), cutouts.box)


def _blended(base: Tensor, image: Tensor, factor: Float64[Tensor, " B"]) -> UInt8[Tensor, "B 3 S S"]:
    """base + factor * (image - base), cut to bytes as Pillow's blend cuts, by truncation."""
    start = base.float()
    mixed = start + factor.float()[:, None, None, None] * (image.float() - start)
    return mixed.clamp_(0, 255).to(torch.uint8)


def _grey(rgb: UInt8[Tensor, "B 3 S S"]) -> Tensor:
    """ITU-R 601 luma in Pillow's fixed point, int32 (B, 1, S, S)."""
    r, g, b = rgb.to(torch.int32).unbind(1)
    return ((19595 * r + 38470 * g + 7471 * b + 0x8000) >> 16)[:, None]


class Hue(Transform):
    """Turns the hue by a share of the circle, with kornia's HSV."""

    def __init__(self, share: Range = (-0.5, 0.5), p: float = 1.0) -> None:
        super().__init__(p)
        self.share = _ordered(share, "share", -0.5, 0.5)

    def parameters_of(self, draws: Draws, size: int) -> dict[str, Tensor]:
        """share (B,)."""
        return {"share": draws.uniform(*self.share)}

    def change(self, cutouts: Cutouts, share: Float64[Tensor, " B"]) -> Cutouts:  # type: ignore[override]
        """Turn the hue."""
        from kornia.color import hsv_to_rgb, rgb_to_hsv

        # what is transparent has no colour: half of the pixels at the usual size
        image, place = cutouts.alpha.flatten(1).nonzero().unbind(1)
        colours = cutouts.rgb.flatten(2)[image, :, place].T[None, :, None]
        hsv = rgb_to_hsv(colours / 255)
        hsv[:, 0] = (hsv[:, 0] + (2 * math.pi * share).float()[image]) % (2 * math.pi)
        turned = torch.zeros_like(cutouts.rgb).flatten(2)
        turned[image, :, place] = (hsv_to_rgb(hsv) * 255).round_().clamp_(0, 255).to(torch.uint8)[0, :, 0].T
        return cutouts.recoloured(turned.view_as(cutouts.rgb))


class Brightness(Transform):
    """Colours times a factor."""

    def __init__(self, factor: Range = (0.0, 2.0), p: float = 1.0) -> None:
        super().__init__(p)
        self.factor = _ordered(factor, "factor", 0, 100)

    def parameters_of(self, draws: Draws, size: int) -> dict[str, Tensor]:
        """factor (B,)."""
        return {"factor": draws.uniform(*self.factor)}

    def change(self, cutouts: Cutouts, factor: Float64[Tensor, " B"]) -> Cutouts:  # type: ignore[override]
        """Multiply."""
        return cutouts.recoloured(_blended(torch.zeros_like(cutouts.rgb), cutouts.rgb, factor))


class Contrast(Transform):
    """Colours away from, or towards, the mean grey of the canvas, transparent pixels counted as black."""

    def __init__(self, factor: Range = (0.0, 2.0), p: float = 1.0) -> None:
        super().__init__(p)
        self.factor = _ordered(factor, "factor", 0, 100)

    def parameters_of(self, draws: Draws, size: int) -> dict[str, Tensor]:
        """factor (B,)."""
        return {"factor": draws.uniform(*self.factor)}

    def change(self, cutouts: Cutouts, factor: Float64[Tensor, " B"]) -> Cutouts:  # type: ignore[override]
        """Blend with the mean."""
        mean = (_grey(cutouts.rgb).double().mean((1, 2, 3), keepdim=True) + 0.5).floor()
        return cutouts.recoloured(_blended(mean.expand_as(cutouts.rgb), cutouts.rgb, factor))


class Grayscale(Transform):
    """Luma in all three channels."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__(p)

    def change(self, cutouts: Cutouts) -> Cutouts:  # type: ignore[override]
        """Take the colours out."""
        return cutouts.recoloured(_grey(cutouts.rgb).to(torch.uint8).expand(-1, 3, -1, -1))


class Posterize(Transform):
    """Keeps the upper bits of every colour."""

    def __init__(self, bits: int = 1, p: float = 0.5) -> None:
        super().__init__(p)
        if bits not in range(1, 9):
            raise ValueError(f"bits must be 1 to 8, got {bits!r}")
        self.bits = bits

    def change(self, cutouts: Cutouts) -> Cutouts:  # type: ignore[override]
        """Drop the lower bits."""
        return cutouts.recoloured(cutouts.rgb & (256 - 2 ** (8 - self.bits)))


class Invert(Transform):
    """Negative colours."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__(p)

    def change(self, cutouts: Cutouts) -> Cutouts:  # type: ignore[override]
        """255 minus the colour."""
        return cutouts.recoloured(255 - cutouts.rgb)


class Sharpen(Transform):
    """Away from the smoothed image (3 x 3), by a factor; the outermost pixels stay."""

    smallest = 3

    def __init__(self, factor: float = 7.0, p: float = 0.5) -> None:
        super().__init__(p)
        if factor < 0:
            raise ValueError(f"factor must not be negative, got {factor}")
        self.factor = float(factor)

    def change(self, cutouts: Cutouts) -> Cutouts:  # type: ignore[override]
        """Blend away from the smoothed image."""
        x = cutouts.rgb.to(torch.int32)
        rows = x[:, :, :-2] + x[:, :, 1:-1] + x[:, :, 2:]
        around = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
        smooth = x.clone()
        # (sum of the nine + 4 of the middle) / 13, rounded
        smooth[:, :, 1:-1, 1:-1] = (2 * (around + 4 * x[:, :, 1:-1, 1:-1]) + 13) // 26
        factor = torch.full((len(x),), self.factor, dtype=torch.float64, device=x.device)
        return cutouts.recoloured(_blended(smooth, cutouts.rgb, factor))


def _taps(reach: int, sigma: Float64[Tensor, " B"]) -> Float64[Tensor, "B taps"]:
    """Weights of a Gaussian at 0 … reach pixels from its middle; with those of the other side they sum to one."""
    places = torch.arange(reach + 1, device=sigma.device)
    taps = (-0.5 * (places / sigma[:, None]) ** 2).exp()
    # beyond what a byte could show lie numbers so small that processors are a hundred times slower with them
    taps = torch.where(taps < 1e-20, 0.0, taps)
    return taps / (2 * taps.sum(1, keepdim=True) - taps[:, :1])


def _smoothing(size: int, reach: int, sigma: Float64[Tensor, " 1"]) -> Float64[Tensor, "S S"]:
    """Gaussian smoothing along one side as a matrix, the edge reflected."""
    places = torch.arange(-reach, reach + 1, device=sigma.device)
    source = (torch.arange(size, device=sigma.device)[:, None] + places).abs()
    source = (size - 1) - ((size - 1) - source).abs()
    taps = _taps(reach, sigma)[0, places.abs()]
    matrix = torch.zeros(size, size, dtype=torch.float64, device=sigma.device)
    return matrix.scatter_add_(1, source, taps.expand(size, -1))


def _blurred(rgba: UInt8[Tensor, "B 4 S S"], taps: Float32[Tensor, "B taps"]) -> UInt8[Tensor, "B 4 S S"]:
    """The same symmetric weights along columns and rows, the edge reflected.

    Sums of whole canvases, the same for every pixel wherever it stands in a batch, and several times faster than
    products with matrices that are mostly zero.
    """
    size, reach = rgba.shape[-1], taps.shape[1] - 1
    weights = taps[:, :, None, None, None]
    x = F.pad(rgba.float(), (reach,) * 4, mode="reflect")
    for axis in (2, 3):
        smooth = x.narrow(axis, reach, size) * weights[:, 0]
        for i in range(1, reach + 1):
            smooth += (x.narrow(axis, reach - i, size) + x.narrow(axis, reach + i, size)).mul_(weights[:, i])
        x = smooth
    return x.round_().to(torch.uint8)


class Blur(Transform):
    """Gaussian blur of all four channels, the edge reflected."""

    def __init__(self, kernel_size: int = 7, sigma: Range = (0.1, 1.5), p: float = 1.0) -> None:
        super().__init__(p)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
        self.kernel_size, self.sigma = kernel_size, _ordered(sigma, "sigma", 0.01, 100)

    def check_size(self, size: int) -> None:
        """The edge can only be reflected where there is enough of it."""
        if size <= self.kernel_size // 2:
            raise ValueError(
                f"Blur with a kernel of {self.kernel_size} needs a canvas of {self.kernel_size // 2 + 1} pixels or "
                f"more, got {size}"
            )

    def parameters_of(self, draws: Draws, size: int) -> dict[str, Tensor]:
        """sigma (B,)."""
        return {"sigma": draws.uniform(*self.sigma)}

    def change(self, cutouts: Cutouts, sigma: Float64[Tensor, " B"]) -> Cutouts:  # type: ignore[override]
        """Blur columns, then rows."""
        size, taps = cutouts.rgba.shape[-1], _taps(self.kernel_size // 2, sigma).float()
        # a few canvases at a time, so that their sums stay in the processor's cache
        count = max(_CACHED // size**2, 1) if sigma.device.type == "cpu" else max(len(sigma), 1)
        parts = zip(cutouts.rgba.split(count), taps.split(count), strict=True)
        return Cutouts(torch.cat([_blurred(rgba, weights) for rgba, weights in parts]), cutouts.box)


@lru_cache(maxsize=8)
def _clipped_normal(mean: float, std: float, device: torch.device) -> Float32[Tensor, " 65536"]:
    """Quantiles of a normal number clipped to 0..1, times 255, at 65,536 places: much finer than a byte."""
    places = (torch.arange(65536, dtype=torch.float64) + 0.5) / 65536
    normal = mean + std * torch.special.ndtri(places)
    return (255 * normal.clamp(0, 1)).float().to(device)


class Noise(Transform):
    """Adds normal noise that was clipped to 0..1 (so it only brightens), white at most."""

    def __init__(self, mean: float = 0.0, std: float = 1.0, p: float = 0.5) -> None:
        super().__init__(p)
        if std < 0:
            raise ValueError(f"std must not be negative, got {std}")
        self.mean, self.std = float(mean), float(std)

    def parameters_of(self, draws: Draws, size: int) -> dict[str, Tensor]:
        """noise (B, 3, S, S), in 0..255."""
        table = _clipped_normal(self.mean, self.std, draws.device)
        return {"noise": table[draws.shorts(3 * size * size)].view(-1, 3, size, size)}

    def change(self, cutouts: Cutouts, noise: Float32[Tensor, "B 3 S S"]) -> Cutouts:  # type: ignore[override]
        """Add and saturate."""
        return cutouts.recoloured((cutouts.rgb + noise).clamp_(max=255).to(torch.uint8))


class Pixelate(Transform):
    """Shrinks by box means and enlarges by repetition."""

    def __init__(self, shrink_to: float = 0.3, p: float = 0.5) -> None:
        super().__init__(p)
        self.shrink_to = _ordered((shrink_to, shrink_to), "shrink_to", 0.01, 1)[0]

    def check_size(self, size: int) -> None:
        """At least one pixel must be left."""
        if int(size * self.shrink_to) < 1:
            raise ValueError(f"Pixelate to {self.shrink_to} leaves no pixel of a canvas of {size}")

    def change(self, cutouts: Cutouts) -> Cutouts:  # type: ignore[override]
        """Down and up again."""
        size = cutouts.rgba.shape[-1]
        after = int(size * self.shrink_to)
        if after == size:
            return cutouts
        weights = resize_weights(size, after, "box").to(cutouts.rgba.device)
        small = divided_by_alpha(separable(premultiplied(cutouts.rgba), weights, fixed_point))
        source = ((torch.arange(size, device=small.device) + 0.5) * (after / size)).long()
        return Cutouts(small[:, :, source][..., source], cutouts.box)


class Elastic(Transform):
    """Moves every pixel by a smooth random field: uniform noise, smoothed by ``sigma``, times ``alpha`` / S.

    The field is in units of half a canvas; the published strength of 150 is meant for canvases of 32 pixels.
    """

    def __init__(self, alpha: float = 150.0, sigma: float = 5.0, p: float = 0.5) -> None:
        super().__init__(p)
        if not sigma > 0:
            raise ValueError(f"sigma must be positive, got {sigma}")
        self.alpha, self.sigma = float(alpha), float(sigma)

    def check_size(self, size: int) -> None:
        """The edge can only be reflected where there is enough of it."""
        reach = int(8 * self.sigma + 1) // 2
        if size <= reach:
            raise ValueError(
                f"Elastic with sigma {self.sigma} needs a canvas of {reach + 1} pixels or more, got {size}"
            )

    def parameters_of(self, draws: Draws, size: int) -> dict[str, Tensor]:
        """noise (B, 2, S, S), x and y, in -1..1."""
        noise = draws.shorts(2 * size * size).float() * (2 / 65536) + (1 / 65536 - 1)
        return {"noise": noise.view(-1, 2, size, size)}

    def change(self, cutouts: Cutouts, noise: Float32[Tensor, "B 2 S S"]) -> Cutouts:  # type: ignore[override]
        """Smooth the field and sample, bilinear; outside is transparent."""
        size = cutouts.rgba.shape[-1]
        sigma = torch.tensor([self.sigma], dtype=torch.float64, device=noise.device)
        smoothing = _smoothing(size, int(8 * self.sigma + 1) // 2, sigma)
        field = (separable(noise.double(), smoothing) * (self.alpha / size)).float()
        centres = (2 * torch.arange(size, device=noise.device) + 1) / size - 1
        grid = torch.stack([centres[None, None, :] + field[:, 0], centres[None, :, None] + field[:, 1]], -1)
        moved = F.grid_sample(cutouts.rgba.float(), grid, mode="bilinear", align_corners=False)
        return Cutouts(moved.round_().clamp_(0, 255).to(torch.uint8), cutouts.box)


class Erasing(Transform):
    """Makes a square transparent."""

    def __init__(self, square_size: int = 14, p: float = 0.5) -> None:
        super().__init__(p)
        if square_size < 1:
            raise ValueError(f"square_size must be positive, got {square_size}")
        self.square_size = square_size

    def check_size(self, size: int) -> None:
        """The square must be smaller than the canvas."""
        if size <= self.square_size:
            raise ValueError(
                f"Erasing a square of {self.square_size} needs a canvas of {self.square_size + 1} pixels or more, "
                f"got {size}"
            )

    def parameters_of(self, draws: Draws, size: int) -> dict[str, Tensor]:
        """place (B, 2) of the upper left corner, x and y, in 0..1 of the room that the square has."""
        return {"place": torch.stack([draws.uniform(), draws.uniform()], 1)}

    def change(self, cutouts: Cutouts, place: Float64[Tensor, "B 2"]) -> Cutouts:  # type: ignore[override]
        """Erase."""
        size = cutouts.rgba.shape[-1]
        corner = (place * (size - self.square_size)).long()
        steps = torch.arange(size, device=place.device)
        away = steps - corner[:, :, None]
        hit = (away >= 0) & (away < self.square_size)
        keep = ~(hit[:, 1, :, None] & hit[:, 0, None, :])
        return Cutouts(cutouts.rgba * keep[:, None], cutouts.box)


class Corner(Transform):
    """Smaller, and into the upper right corner: a fixed place beside the photo's own object (experiment C).

    Args:
        factor: of the size.
        place: of the box's left and top, as shares of the canvas.
    """

    def __init__(self, factor: float = 0.55, place: tuple[float, float] = (21 / 32, 2 / 32)) -> None:
        super().__init__()
        self.factor, self.place = _ordered((factor, factor), "factor", 0.01, 1)[0], place

    def change(self, cutouts: Cutouts) -> Cutouts:  # type: ignore[override]
        """Scale and move."""
        rgba, box = scaled(
            cutouts, torch.full((len(cutouts.box),), self.factor, dtype=torch.float64, device=cutouts.box.device)
        )
        corner = (torch.tensor(self.place, device=box.device) * rgba.shape[-1]).long().expand(len(box), -1)
        return _moved(Cutouts(rgba, box), corner)


class Wrapped(Transform):
    """A kornia augmentation, or any random function of float images (1, C, S, S) in 0..1, as a transformation.

    It draws from torch's global generator, which is seeded for each image and put back afterwards: deterministic by
    index, but one image at a time.

    Args:
        function: the augmentation.
        colour: it changes colours and gets three channels; otherwise it moves pixels and gets four.

    Raises:
        TypeError: for what cannot be called.
        ValueError: at a call, when the result has another shape or is not a number.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], colour: bool) -> None:
        super().__init__()
        if not callable(function):
            raise TypeError(f"function must be a kornia augmentation or another callable, got {function!r}")
        self.function, self.colour = function, colour

    def parameters_of(self, draws: Draws, size: int) -> dict[str, Tensor]:
        """seed (B,)."""
        return {"seed": draws.words(1)[:, 0] & (2**62 - 1)}

    def change(self, cutouts: Cutouts, seed: Int64[Tensor, " B"]) -> Cutouts:  # type: ignore[override]
        """One image after the other, each with its seed."""
        images = (cutouts.rgb if self.colour else cutouts.rgba) / 255
        made = []
        devices = [images.device] if images.is_cuda else []
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            for image, number in zip(images.split(1), seed.tolist(), strict=True):
                torch.manual_seed(number)
                made.append(self.function(image))
        for result in made:
            if not isinstance(result, Tensor) or result.shape != images[:1].shape or result.isnan().any():
                got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
                raise ValueError(f"the function must return numbers of shape {tuple(images[:1].shape)}, got {got}")
        changed = (torch.cat(made) * 255).round().clamp(0, 255).to(torch.uint8)
        return cutouts.recoloured(changed) if self.colour else Cutouts(changed, cutouts.box)


GEOMETRIC: dict[str, type[Transform]] = {
    "scale": Scale, "translate": Translate, "v_flip": VerticalFlip, "h_flip": HorizontalFlip, "rotate": Rotate,
    "shear": Shear,
}  # fmt: skip
PHOTOMETRIC: dict[str, type[Transform]] = {
    "hue": Hue, "brightness": Brightness, "grayscale": Grayscale, "posterize": Posterize, "invert": Invert,
    "sharpen": Sharpen,
}  # fmt: skip
CORRUPTION: dict[str, type[Transform]] = {
    "blur": Blur, "noise": Noise, "pixelate": Pixelate, "elastic": Elastic, "erasing": Erasing, "contrast": Contrast,
}  # fmt: skip
FAMILIES: Mapping[str, Mapping[str, type[Transform]]] = {
    "geometric": GEOMETRIC, "photometric": PHOTOMETRIC, "corruption": CORRUPTION,
}  # fmt: skip
TRANSFORMS = (*GEOMETRIC, *PHOTOMETRIC, *CORRUPTION)
"""Names of the 18 transformations, by family."""


def _known(name: str, among: Sequence[str], what: str) -> None:
    if name not in among:
        import difflib

        near = difflib.get_close_matches(str(name), among, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(among)}"
        raise ValueError(f"no {what} {name!r}; {hint}")


def transform(name: str, **overrides: Any) -> Transform:
    """One of the 18 transformations by name, with the paper's settings unless others are given.

    Args:
        name: one of ``TRANSFORMS``.
        overrides: settings of its class, such as ``degrees=(0, 90)`` or ``p=1``.

    Returns:
        A module from ``Cutouts`` to ``Cutouts``.

    Raises:
        ValueError: for an unknown name (the nearest is suggested) or a setting out of range.
        TypeError: for a setting that it does not have; names those it has.

    Example:
        >>> transform("rotate", degrees=(0, 90))
        Rotate(p=1.0, degrees=(0.0, 90.0))
    """
    import inspect

    _known(name, TRANSFORMS, "transformation")
    kind = {**GEOMETRIC, **PHOTOMETRIC, **CORRUPTION}[name]
    has = tuple(inspect.signature(kind).parameters)
    for key in overrides:
        if key not in has:
            raise TypeError(f"transformation {name!r} has no setting {key!r}; it has {', '.join(has)}")
    return kind(**overrides)


def family(name: str) -> str:
    """Family of a transformation: ``geometric``, ``photometric`` or ``corruption``.

    Raises:
        ValueError: for an unknown name.

    Example:
        >>> family("blur")
        'corruption'
    """
    _known(name, TRANSFORMS, "transformation")
    return next(key for key, members in FAMILIES.items() if name in members)


def sample_transform_sets(
    k: int, disjoint_from: Sequence[str] | None = None, mixed: bool = True, seed: int = 0
) -> tuple[str, ...]:
    """Draw a set of transformations, at random, or disjoint from another set.

    Sets from one family overlap in what they do even where their names differ (scale, shear and rotate all deform), so
    that "disjoint" means little for them; mixed sets take equally many of each family.

    Args:
        k: how many; a multiple of three if ``mixed``.
        disjoint_from: names that must not come.
        mixed: equally many of each family; otherwise any.
        seed: of the draw.

    Raises:
        ValueError: for an empty set, a number that cannot be split, or too few names that are left.

    Example:
        >>> first = sample_transform_sets(3, seed=1)
        >>> second = sample_transform_sets(3, disjoint_from=first, seed=1)
        >>> len(first), set(first) & set(second)
        (3, set())
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}; an empty set of transformations changes nothing")
    taken = set(disjoint_from or ())
    for name in taken:
        _known(name, TRANSFORMS, "transformation")
    generator = torch.Generator().manual_seed(seed)

    def drawn(names: Sequence[str], count: int, where: str) -> list[str]:
        left = [name for name in names if name not in taken]
        if len(left) < count:
            raise ValueError(f"want {count} transformations of {where}, but {len(left)} are left: {', '.join(left)}")
        return [left[i] for i in torch.randperm(len(left), generator=generator)[:count].tolist()]

    if not mixed:
        return tuple(drawn(TRANSFORMS, k, "all families"))
    if k % 3:
        raise ValueError(f"a mixed set takes equally many of three families, so k must be a multiple of 3, got {k}")
    return tuple(name for key, members in FAMILIES.items() for name in drawn(tuple(members), k // 3, key))


def nested_transform_sets(largest: int = 8, seed: int = 0) -> tuple[tuple[str, ...], ...]:
    """Sets of 1, 2, … transformations, each within the next (experiment B).

    Raises:
        ValueError: for a size outside 1..18.

    Example:
        >>> sets = nested_transform_sets(3)
        >>> [len(names) for names in sets], set(sets[0]) < set(sets[1])
        ([1, 2, 3], True)
    """
    if not 1 <= largest <= len(TRANSFORMS):
        raise ValueError(f"largest must be 1 to {len(TRANSFORMS)}, got {largest}")
    order = torch.randperm(len(TRANSFORMS), generator=torch.Generator().manual_seed(seed)).tolist()
    names = [TRANSFORMS[i] for i in order]
    return tuple(tuple(names[:n]) for n in range(1, largest + 1))

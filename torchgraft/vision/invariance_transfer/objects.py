"""Where objects and backgrounds come from: a masked image set, procedural shapes, noise, photos, the published set."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from torchgraft.datasets import DatasetNotFoundError, cache_folder
from torchgraft.vision.invariance_transfer.cutouts import as_bytes, pillow_resized

HUB = "tillspeicher/transforms_2d_base"


class BaseSet(NamedTuple):
    """The published objects and backgrounds.

    Attributes:
        foregrounds: for each object class its prototypes, RGBA uint8 (4, size, size).
        backgrounds: RGB uint8 (N, 3, size, size).
        names: of the classes.
    """

    foregrounds: list[list[Tensor]]
    backgrounds: UInt8[Tensor, "N 3 S S"]
    names: list[str]


def _colours(count: int, seed: int) -> Tensor:
    """Random colours that are neither dark nor pale, (count, 3) in 0..255."""
    generator = torch.Generator().manual_seed(seed)
    return 255 * (0.25 + 0.75 * torch.rand(count, 3, generator=generator))


def masked_objects(
    images: UInt8[Tensor, "N 1 h w"], seed: int = 0, coloured: bool = True
) -> list[UInt8[Tensor, "4 h w"]]:
    """Grey images on black, such as Fashion-MNIST or digits, as coloured cut-outs.

    An image's own grey is its shading, and its alpha: opaque from a quarter of full brightness on.

    Args:
        images: bytes.
        seed: of the colours.
        coloured: each object gets one random colour; otherwise it stays grey.

    Raises:
        TypeError, ValueError: for images of another dtype or shape.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8 in 0..255, got {images.dtype}")
    if images.ndim != 4 or images.shape[1] != 1:
        raise ValueError(f"images must be grey, of shape (N, 1, h, w), got {tuple(images.shape)}")
    grey = images.float()
    alpha = (4 * grey).clamp(max=255)
    paint = _colours(len(images), seed) if coloured else torch.full((len(images), 3), 255.0)
    rgb = paint[:, :, None, None] * (0.3 + 0.7 * grey / 255)
    return list(torch.cat([rgb * (alpha > 0), alpha], 1).round().to(torch.uint8))


def shape_objects(count: int, size: int = 32, seed: int = 0) -> list[UInt8[Tensor, "4 S S"]]:
    """Procedural objects: two-coloured blobs whose outline is a random sum of waves around a circle.

    Args:
        count: how many.
        size: of the canvas, in pixels.
        seed: of the shapes.

    Raises:
        ValueError: for no object, or a canvas of under four pixels.
    """
    if count < 1 or size < 4:
        raise ValueError(f"want at least one object of at least 4 pixels, got count={count}, size={size}")
    generator = torch.Generator().manual_seed(seed)
    centres = (2 * torch.arange(size) + 1) / size - 1
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    angle, radius = torch.atan2(y, x), torch.hypot(x, y)
    waves = torch.arange(1, 6)[:, None, None]
    made = []
    paints = _colours(2 * count, seed + 1).view(count, 2, 3)
    for i in range(count):
        strength = 0.5 * torch.rand(5, generator=generator)[:, None, None] / waves.sqrt()
        phase = 6.2832 * torch.rand(5, generator=generator)[:, None, None]
        outline = 0.6 + (strength * (waves * angle + phase).cos()).sum(0) * 0.5
        alpha = ((outline - radius) * size / 2 + 0.5).clamp(0, 1) * (radius < 1)
        tilt = 6.2832 * torch.rand(2, generator=generator)
        half = ((x * tilt[0].cos() + y * tilt[0].sin()) > 0.3 * tilt[1].sin()).float()
        rgb = paints[i, 0, :, None, None] * half + paints[i, 1, :, None, None] * (1 - half)
        made.append(torch.cat([rgb * (alpha > 0), 255 * alpha[None]]).round().to(torch.uint8))
    return made


def noise_objects(count: int, size: int = 32, seed: int = 0) -> list[UInt8[Tensor, "4 S S"]]:
    """Opaque squares of uniform noise, one for each class.

    The published ones read float numbers as bytes, which is not uniform; these are uniform bytes.
    """
    if count < 1 or size < 1:
        raise ValueError(f"want at least one object of at least one pixel, got count={count}, size={size}")
    generator = torch.Generator().manual_seed(seed)
    rgb = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    return list(torch.cat([rgb, torch.full_like(rgb[:, :1], 255)], 1))


def opaque_objects(
    images: UInt8[Tensor, "N 3 h w"], labels: Int64[Tensor, " N"], classes: Sequence[int] | None = None
) -> list[list[UInt8[Tensor, "4 h w"]]]:
    """Whole photos as objects that fill the canvas, to study augmentations of CIFAR, say, as transformations.

    Give them to ``Transforms2D`` with ``object_scale=1`` and ``backgrounds="black"``. Every image is a prototype of
    its class; ``translate`` has no room then and does nothing.

    Raises:
        ValueError: for a class without images, or lengths that differ.
    """
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images have {len(labels)} labels")
    rgba = torch.cat([images, torch.full_like(images[:, :1], 255)], 1)
    wanted = labels.unique().tolist() if classes is None else list(classes)
    made = [list(rgba[labels == label]) for label in wanted]
    for label, members in zip(wanted, made, strict=True):
        if not members:
            raise ValueError(f"class {label} has no images; there are {sorted(labels.unique().tolist())}")
    return made


def _from_folder(root: Path, size: int) -> BaseSet:
    from PIL import Image

    def read(path: Path, mode: str) -> Any:
        with Image.open(path) as image:
            return image.convert(mode)

    folders = sorted(path for path in (root / "foregrounds").iterdir() if path.is_dir())
    objects = [[read(path, "RGBA") for path in sorted(folder.iterdir())] for folder in folders]
    return _base_set(objects, [read(p, "RGB") for p in sorted((root / "backgrounds").iterdir())],
                     [folder.name for folder in folders], size)  # fmt: skip


def _from_hub(size: int) -> BaseSet:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise DatasetNotFoundError("The hub was not asked, since HF_HUB_OFFLINE is set.")
    try:
        from datasets import load_dataset
    except ImportError:
        raise DatasetNotFoundError("The hub needs the extra: pip install 'torchgraft[hub]'.") from None
    try:
        objects, photos = (load_dataset(HUB, part, split="train") for part in ("foregrounds", "backgrounds"))
    except Exception as error:  # the hub's client raises its own, httpx's and requests' errors
        raise DatasetNotFoundError(f"The hub said: {type(error).__name__}: {str(error)[:200]}") from error
    classes: dict[str, list[Any]] = {}
    for row in objects:
        classes.setdefault(str(row["label"]), []).append(row["image"].convert("RGBA"))
    names = sorted(classes)
    return _base_set([classes[n] for n in names], [row["image"].convert("RGB") for row in photos], names, size)


def _base_set(objects: Sequence[Sequence[Any]], photos: Sequence[Any], names: list[str], size: int) -> BaseSet:
    if not objects or not photos or not all(objects):
        raise ValueError(f"the set has {len(objects)} object classes and {len(photos)} backgrounds, or an empty class")

    def square(photo: Any) -> Any:
        side = min(photo.size)
        return photo.crop((0, 0, side, side))

    foregrounds = [[pillow_resized(as_bytes(image, 4, name), size) for image in members]
                   for name, members in zip(names, objects, strict=True)]  # fmt: skip
    backgrounds = torch.stack([pillow_resized(as_bytes(square(photo), 3, "background"), size) for photo in photos])
    return BaseSet(foregrounds, backgrounds, names)


def load_base_set(size: int = 32, folder: str | Path | None = None) -> BaseSet:
    """The published 61 objects and 867 nature photos, resized to the canvas.

    Looked for in ``folder``, else below ``TORCHGRAFT_DATA`` and the cache as ``images/transforms_2d_base``, else on
    the hub as ``tillspeicher/transforms_2d_base``. A folder holds ``foregrounds/<class>/*`` (RGBA) and
    ``backgrounds/*``. As published, objects are stretched to a square, and photos cut to one at the upper left.
    Classes are in alphabetical order (in the published code, in that of a Python set).

    Args:
        size: of the canvas, in pixels.
        folder: where you have it.

    Raises:
        DatasetNotFoundError: when it is nowhere; names the hub's dataset and the ways to bring it.
        ValueError: for an empty or damaged set.
    """
    data = os.environ.get("TORCHGRAFT_DATA")
    roots = [Path(folder)] if folder is not None else []
    if folder is None:
        roots = [r / "images/transforms_2d_base" for r in (*([Path(data)] if data else []), cache_folder() / "data")]
    for root in roots:
        if (root / "foregrounds").is_dir() and (root / "backgrounds").is_dir():
            return _from_folder(root, size)
    ways = (
        f"the objects of Transforms-2D are not in {' or '.join(map(str, roots))} (want foregrounds/<class>/*.png and "
        f"backgrounds/*); the hub has them as {HUB!r}."
    )
    if folder is not None:
        raise DatasetNotFoundError(ways)
    try:
        return _from_hub(size)
    except DatasetNotFoundError as error:
        raise DatasetNotFoundError(f"{ways} {error}") from error

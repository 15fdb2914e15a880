"""Making Transforms-2D images in batches against the usual way, image by image with Pillow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from torchgraft.experiments import Case
from torchgraft.vision.invariance_transfer import FAMILIES, TRANSFORMS, Transforms2D, shape_objects

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.random import Generator
    from PIL.Image import Image

TITLE = "Transforms-2D in batches against image by image with Pillow"
OURS = "torchgraft.vision.invariance_transfer.Transforms2D"
PEER = "the same transformations with Pillow, one image at a time"

Box = tuple[int, int, int, int]
Object = tuple["Image", Box]


def _scale(x: Object, factor: float) -> Object:
    from PIL import Image

    (image, box), size = x, x[0].width
    after = round(size * factor)
    start = (size - after) // 2
    canvas = Image.new("RGBA", (size, size))
    canvas.paste(image.resize((after, after)), (start, start))
    return canvas, (box[0] + start, box[1] + start, round(box[2] * factor), round(box[3] * factor))


def _translate(x: Object, u: float, v: float) -> Object:
    from PIL import Image

    (image, box), size = x, x[0].width
    left, top = int(u * (size - box[2])), int(v * (size - box[3]))
    canvas = Image.new("RGBA", (size, size))
    canvas.paste(image, (left - box[0], top - box[1]))
    return canvas, (left, top, box[2], box[3])


def _shear(image: Image, x: float, y: float) -> Image:
    from PIL import Image

    a, b = np.tan(np.radians([x, y]))
    c = image.width / 2
    matrix = (1 + a * b, a, c - (1 + a * b) * c - a * c, b, 1, c - b * c - c)
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)


def _colours(image: Image, change: Callable[[Image], Image]) -> Image:
    """Changes the colours behind the alpha."""
    changed = change(image.convert("RGB"))
    changed.putalpha(image.getchannel("A"))
    return changed


def _hue(image: Image, share: float) -> Image:
    from PIL import Image

    hue, saturation, value = image.convert("HSV").split()
    turned = Image.fromarray((np.asarray(hue).astype(int) + int(share * 255)).astype(np.uint8))
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


def _as_tensor(image: Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def _as_image(x: torch.Tensor) -> Image:
    from PIL import Image

    return Image.fromarray(x.round().clamp(0, 255).byte().permute(1, 2, 0).numpy())


def _gaussian(x: torch.Tensor, size: int, sigma: float) -> torch.Tensor:
    """(C, H, W), as torchvision blurs a Pillow image: one two-dimensional convolution of the reflected image."""
    taps = torch.exp(-0.5 * ((torch.arange(size) - size // 2) / sigma) ** 2)
    taps = taps / taps.sum()
    kernel = (taps[:, None] * taps).expand(len(x), 1, size, size)
    return F.conv2d(F.pad(x[None], (size // 2,) * 4, mode="reflect"), kernel, groups=len(x))[0]


def _noise(image: Image, noise: np.ndarray) -> Image:
    from PIL import Image

    return Image.fromarray((np.asarray(image) + 255 * noise.clip(0, 1)).clip(0, 255).astype(np.uint8))


def _pixelate(image: Image) -> Image:
    from PIL import Image

    after = int(0.3 * image.width)
    return image.resize((after, after), Image.Resampling.BOX).resize(image.size, Image.Resampling.NEAREST)


def _elastic(image: Image, noise: torch.Tensor) -> Image:
    size = image.width
    field = torch.stack([_gaussian(n[None], 41, 5.0)[0] for n in noise], -1) * 150 / size
    centres = (2 * torch.arange(size) + 1) / size - 1
    grid = torch.stack([centres.expand(size, size), centres[:, None].expand(size, size)], -1) + field
    return _as_image(F.grid_sample(_as_tensor(image)[None], grid[None], align_corners=False)[0])


def _erase(image: Image, u: float, v: float) -> Image:
    from PIL import Image

    room = image.width - 14
    mask = Image.new("1", image.size, 1)
    mask.paste(0, (int(u * room), int(v * room), int(u * room) + 14, int(v * room) + 14))
    canvas = Image.new("RGBA", image.size)
    canvas.paste(image, mask=mask)
    return canvas


def pillow_transform(name: str, x: Object, rng: Generator) -> Object:
    """One of the 18 transformations on one Pillow image, with random parameters."""
    from PIL import Image, ImageEnhance, ImageOps

    image, box = x
    half = name in ("v_flip", "h_flip", "grayscale", "posterize", "invert", "sharpen", "noise", "pixelate", "elastic",
                    "erasing")  # fmt: skip
    if half and rng.random() >= 0.5:
        return x
    u, v = rng.random(2)
    changes: dict[str, Callable[[], Image.Image]] = {
        "v_flip": lambda: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        "h_flip": lambda: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        "rotate": lambda: image.rotate(360 * u),
        "shear": lambda: _shear(image, 100 * u - 50, 100 * v - 50),
        "hue": lambda: _colours(image, lambda i: _hue(i, u - 0.5)),
        "brightness": lambda: _colours(image, lambda i: ImageEnhance.Brightness(i).enhance(2 * u)),
        "grayscale": lambda: _colours(image, lambda i: i.convert("L").convert("RGB")),
        "posterize": lambda: _colours(image, lambda i: ImageOps.posterize(i, 1)),
        "invert": lambda: _colours(image, ImageOps.invert),
        "sharpen": lambda: ImageEnhance.Sharpness(image).enhance(7),
        "blur": lambda: _as_image(_gaussian(_as_tensor(image), 7, 0.1 + 1.4 * u)),
        "noise": lambda: _colours(image, lambda i: _noise(i, rng.standard_normal((*i.size, 3), np.float32))),
        "pixelate": lambda: _pixelate(image),
        "elastic": lambda: _elastic(image, torch.from_numpy(rng.random((2, *image.size), np.float32)) * 2 - 1),
        "erasing": lambda: _erase(image, u, v),
        "contrast": lambda: _colours(image, lambda i: ImageEnhance.Contrast(i).enhance(2 * u)),
    }
    if name == "scale":
        return _scale(x, 0.4 + 0.6 * u)
    if name == "translate":
        return _translate(x, u, v)
    return changes[name](), box


def pillow_images(
    objects: Sequence[Object], backgrounds: Sequence[Image], names: Sequence[str], count: int, seed: int = 0
) -> torch.Tensor:
    """A batch (count, 3, S, S) in 0..1, made one image at a time."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        x = objects[int(rng.integers(len(objects)))]
        canvas = backgrounds[int(rng.integers(len(backgrounds)))].copy()
        for name in names:
            x = pillow_transform(name, x, rng)
        canvas.paste(x[0], mask=x[0])
        made.append(_as_tensor(canvas) / 255)
    return torch.stack(made)


def _sets() -> dict[str, tuple[str, ...]]:
    families = {name: tuple(members) for name, members in FAMILIES.items()}
    return {
        "none": (),
        "one of each family": ("rotate", "hue", "blur"),
        "two of each family": ("rotate", "hue", "blur", "translate", "invert", "pixelate"),
        **{f"all {name}": members for name, members in families.items()},
        "all 18": TRANSFORMS,
        **{name: (name,) for name in ("scale", "rotate", "translate", "hue", "invert", "blur", "pixelate", "elastic")},
    }


def _work(names: tuple[str, ...], size: int, count: int, device: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    from PIL import Image

    shapes = shape_objects(20, size)
    photos = torch.randint(0, 256, (50, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = Transforms2D(shapes, photos, names, 10**6, size, device=device)
    whole = [(Image.fromarray(s.permute(1, 2, 0).contiguous().numpy()), (0, 0, size, size)) for s in shapes]
    objects = [_scale(x, 0.7) for x in whole]
    backgrounds = [Image.fromarray(p.permute(1, 2, 0).contiguous().numpy()) for p in photos]
    batch = torch.randint(0, 10**6, (count,), generator=torch.Generator().manual_seed(1))
    return lambda: data.batch(batch), lambda: pillow_images(objects, backgrounds, names, count)


def cases(quick: bool, device: str) -> list[Case]:
    """Sets of transformations at 32 pixels, each transformation alone, and one larger canvas."""
    sets, count = _sets(), 4 if quick else 256
    if quick:
        sets = {"one of each family": sets["one of each family"]}
    made = []
    for label, names in sets.items():
        size = {"transforms": label, "number": len(names), "pixels": 32, "images": count}
        made.append(Case(size, peer_name=PEER, make=partial(_work, names, 32, count, device)))
    if not quick:
        for pixels in (64, 128):
            size = {"transforms": "one of each family", "number": 3, "pixels": pixels, "images": 64}
            made.append(Case(size, peer_name=PEER, make=partial(_work, sets["one of each family"], pixels, 64, device)))
    return made


def figures(record: Mapping[str, Any]) -> Mapping[str, Figure]:
    """Images a second, by set."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), layout="constrained")
    ax = figure.subplots()
    rows = record["cases"]
    for y, case in enumerate(rows):
        count = case["size"]["images"]
        ax.plot([count / case["peer_s"], count / case["ours_s"]], [y, y], "-", color="#BBBBBB", linewidth=1.5, zorder=1)
        ax.plot(count / case["peer_s"], y, "s", color="#777777", label="Pillow, image by image" if y == 0 else None)
        ax.plot(count / case["ours_s"], y, "o", color="#D55E00", label="batched" if y == 0 else None)
        ax.annotate(f"× {1 / case['ratio']:.1f}", (count / case["ours_s"], y), (8, 0), textcoords="offset points",
                    va="center", fontsize=8)  # fmt: skip
    labels = [
        c["size"]["transforms"] + (f", {c['size']['pixels']} px" if c["size"]["pixels"] != 32 else "") for c in rows
    ]
    ax.set_yticks(range(len(rows)), labels)
    ax.invert_yaxis()
    ax.axvline(5000, color="#999999", linestyle=":", linewidth=1)
    ax.set(xscale="log", xlabel="images a second; dotted: 5,000")
    ax.legend(frameon=False, loc="upper right")
    ax.spines[["top", "right"]].set_visible(False)
    threads = record["environment"]["threads"]
    figure.suptitle(f"Transforms-2D, 32 pixels unless said, {record['device']}, threads: {threads}", fontsize=10)
    return {"invariance_transfer": figure}

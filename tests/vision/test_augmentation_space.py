"""Every operation against Pillow, on which the published searches were made; bad input."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from torchgraft.vision.augmentation_space import AugmentationSpace

AUTO, TRIVIAL, WIDE = (
    AugmentationSpace.autoaugment17(32),
    AugmentationSpace.trivial(32),
    AugmentationSpace.trivial(32, wide=True),
)


@pytest.fixture(scope="module")
def images():
    """Smooth pictures with every byte value, so that a wrong pixel is a wrong number."""
    y, x = np.mgrid[0:32, 0:32]
    planes = [np.sin(x / a + k) + np.cos(y / b - k) for k, (a, b) in enumerate([(5, 7), (9, 4), (6, 11)])]
    base = np.stack([(p - p.min()) / np.ptp(p) * 255 for p in planes], -1)
    noise = np.random.default_rng(0).normal(0, 12, (4, 32, 32, 3))
    return torch.from_numpy((base + noise).clip(0, 255).astype(np.uint8)).permute(0, 3, 1, 2)


def pillow(images, change):
    made = [np.asarray(change(Image.fromarray(i.permute(1, 2, 0).numpy()))) for i in images]
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2)


def ours(space, name, images, level, sign=1.0):
    n = len(images)
    return space.apply(
        images, torch.full((n,), space.names.index(name)), torch.full((n,), level), torch.full((n,), sign)
    )


def affine(*matrix):
    return lambda image: image.transform(image.size, Image.Transform.AFFINE, matrix)


def enhance(kind):
    return lambda factor: lambda image: kind(image).enhance(factor)


PIXELS = [
    (AUTO, "autocontrast", 0.3, ImageOps.autocontrast),
    (AUTO, "invert", 0.3, ImageOps.invert),
    (AUTO, "equalize", 0.3, ImageOps.equalize),
    (AUTO, "flip", 0.3, ImageOps.mirror),
    (AUTO, "identity", 0.3, lambda image: image),
    *[(AUTO, "solarize", v, lambda image, v=v: ImageOps.solarize(image, 256 * v)) for v in (0.0, 0.25, 1.0)],
    *[(AUTO, "posterize", v, lambda image, v=v: ImageOps.posterize(image, int(4 + 4 * v))) for v in (0.0, 0.6, 1.0)],
    *[
        (AUTO, name, v, enhance(kind)(0.1 + 1.8 * v))
        for name, kind in [
            ("contrast", ImageEnhance.Contrast), ("color", ImageEnhance.Color),
            ("brightness", ImageEnhance.Brightness), ("sharpness", ImageEnhance.Sharpness),
        ]
        for v in (0.0, 0.5, 0.9)
    ],
    (TRIVIAL, "solarize", 0.5, lambda image: ImageOps.solarize(image, 128)),
    (TRIVIAL, "solarize", 0.0, lambda image: image),
    (TRIVIAL, "posterize", 1.0, lambda image: ImageOps.posterize(image, 4)),
    (WIDE, "posterize", 1.0, lambda image: ImageOps.posterize(image, 2)),
    (WIDE, "brightness", 0.0, enhance(ImageEnhance.Brightness)(0.01)),
]  # fmt: skip


@pytest.mark.parametrize(("space", "name", "level", "change"), PIXELS, ids=lambda v: v if isinstance(v, str) else "")
def test_pixel_operations_are_pillows_within_two_grey_levels(images, space, name, level, change):
    found, wanted = ours(space, name, images, level), pillow(images, change)
    assert (found.int() - wanted.int()).abs().max() <= 2


GEOMETRY = [
    (AUTO, "shear_x", 0.8, 1.0, affine(1, 0.18, 0, 0, 1, 0)),
    (AUTO, "shear_y", 0.8, -1.0, affine(1, 0, 0, -0.18, 1, 0)),
    (AUTO, "translate_x", 0.9, 1.0, affine(1, 0, 0.36 * 32, 0, 1, 0)),
    (AUTO, "translate_y", 0.1, 1.0, affine(1, 0, 0, 0, 1, -0.36 * 32)),
    (AUTO, "rotate", 0.9, 1.0, lambda image: image.rotate(24)),
    (TRIVIAL, "rotate", 0.5, -1.0, lambda image: image.rotate(-15)),
    (WIDE, "rotate", 1.0, 1.0, lambda image: image.rotate(135)),
    (TRIVIAL, "translate_x", 0.35, 1.0, affine(1, 0, 3, 0, 1, 0)),
    (WIDE, "shear_x", 1.0, 1.0, affine(1, 0.99, 0, 0, 1, 0)),
    (WIDE, "translate_y", 1.0, -1.0, lambda image: Image.new("RGB", image.size)),
]


@pytest.mark.parametrize(
    ("space", "name", "level", "sign", "change"), GEOMETRY, ids=lambda v: v if v in AUTO.names else ""
)
def test_geometry_takes_pillows_nearest_pixels(images, space, name, level, sign, change):
    found, wanted = ours(space, name, images, level, sign), pillow(images, change)
    # a pixel that falls on the border between two may go to either
    assert ((found != wanted).any(1)).float().mean() <= 0.03


def test_cutout_is_a_grey_square_of_the_given_side(images):
    torch.manual_seed(0)
    changed = (ours(AUTO, "cutout", images.repeat(50, 1, 1, 1), 1.0) != images.repeat(50, 1, 1, 1)).any(1)
    sides = changed.any(1).sum(1)
    assert sides.max() in (6, 7)
    assert (changed.sum((1, 2)) <= 49).all()
    assert (ours(AUTO, "cutout", images, 0.0) == images).all()


def test_each_image_has_its_own_operation_level_and_sign(images):
    index = torch.tensor([3, 9, 3, 12])
    level, sign = torch.tensor([0.2, 0.4, 0.6, 0.8]), torch.tensor([1.0, 1.0, -1.0, 1.0])
    together = TRIVIAL.apply(images, index, level, sign)
    alone = [TRIVIAL.apply(images[i : i + 1], index[i : i + 1], level[i : i + 1], sign[i : i + 1]) for i in range(4)]
    assert torch.equal(together, torch.cat(alone))
    every = TRIVIAL.apply_all(images, level[:, None].expand(-1, 14), sign[:, None].expand(-1, 14))
    assert torch.equal(together, every[torch.arange(4), index])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 13), st.floats(0, 1), st.sampled_from([-1.0, 1.0]), st.integers(5, 40), st.sampled_from([1, 3]))
def test_images_stay_images(index, level, sign, side, channels):
    x = torch.rand(2, channels, side, side + 3)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        args = torch.full((2,), index), torch.full((2,), level), torch.full((2,), sign)
        y = AugmentationSpace.trivial(side, wide=True).apply(x.to(dtype), *args)
        assert y.shape == x.shape
        assert y.dtype == dtype
        assert 0 <= y.min() <= y.max() <= 1


def test_any_data_and_own_operations():
    space = AugmentationSpace({"jitter": lambda x, level, sign: x + (level * sign)[:, None], "none": lambda x, *_: x})
    x = torch.zeros(3, 5)
    y = space.apply(x, torch.tensor([0, 1, 0]), torch.tensor([0.5, 0.5, 1.0]), torch.tensor([1.0, 1.0, -1.0]))
    assert y[:, 0].tolist() == [0.5, 0.0, -1.0]
    assert x.abs().max() == 0
    assert TRIVIAL.subset("rotate", "identity").names == ("rotate", "identity")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: AugmentationSpace({}), ValueError, "operations is empty"),
        (lambda x: AugmentationSpace.trivial(0), ValueError, "size"),
        (lambda x: TRIVIAL.subset("twist"), ValueError, "twist; there are identity"),
        (lambda x: ours(TRIVIAL, "rotate", x * 2 - 1, 0.5), ValueError, "augment before normalising"),
        (lambda x: ours(TRIVIAL, "rotate", x * float("nan"), 0.5), ValueError, r"\[0, 1\]"),
        (lambda x: ours(TRIVIAL, "rotate", x[:, :2], 0.5), ValueError, r"\(B, 3, H, W\)"),
        (lambda x: ours(TRIVIAL, "rotate", (x * 9).long(), 0.5), TypeError, "bytes"),
        (lambda x: ours(TRIVIAL, "rotate", x, 1.5), ValueError, "level"),
        (lambda x: ours(TRIVIAL, "rotate", x, 0.5, 0.5), ValueError, "sign"),
        (lambda x: TRIVIAL.apply(x, torch.tensor([14, 0]), torch.zeros(2)), ValueError, r"0\.\.13"),
        (lambda x: TRIVIAL.apply(x, torch.tensor([1]), torch.zeros(1)), ValueError, "equally many"),
        (lambda x: TRIVIAL.apply_all(x, torch.zeros(2, 3)), ValueError, r"\(2, 14\)"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.rand(2, 3, 8, 8))

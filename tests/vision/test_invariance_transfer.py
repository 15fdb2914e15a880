import hashlib
import itertools
import math
from functools import partial

import kornia
import numpy as np
import pandas
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from torchgraft import zoo
from torchgraft.bench import invariance_transfer as bench
from torchgraft.datasets import DatasetNotFoundError
from torchgraft.vision import invariance_transfer as it
from torchgraft.vision.invariance_transfer.cutouts import Cutouts, scaled
from torchgraft.vision.invariance_transfer.draws import Draws
from torchgraft.vision.invariance_transfer.transforms import Corner


def canvases(seed=0, n=8, size=32):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (n, 4, size, size), generator=g, dtype=torch.uint8)
    x[:, 3] = torch.where(torch.rand(n, size, size, generator=g) < 0.4, 0, x[:, 3])
    x[:, 3] = torch.where(torch.rand(n, size, size, generator=g) < 0.3, 255, x[:, 3])
    return x * (x[:, 3:] > 0)


BOXES = torch.tensor(
    [[0, 0, 32, 32], [5, 5, 22, 22], [3, 8, 20, 15], [0, 0, 32, 32], [5, 5, 22, 22], [3, 8, 20, 15], [10, 2, 9, 9],
     [5, 5, 22, 22]]
)  # fmt: skip
U = torch.rand(8, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def digest(x):
    return hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest()[:16]


def cutouts():
    return Cutouts(canvases(), BOXES)


# computed by scale_object, RandomScale, RandomTranslate, RandomPixelate._pixelate and RandomErase._erase of
# transforms_2d/transforms.py, tillspeicher/representation-invariance-transfer at bf9bd09, with torch.rand giving U
OFFICIAL = {
    "scale_object": "98d21b04f2e6e53a", "RandomScale": "4cbcaf3b3ebca2ed", "RandomTranslate": "f45465a77d678232",
    "RandomPixelate": "4bb482e79391bea3", "RandomErase": "d1d6370f4aa3e455",
}  # fmt: skip
# computed by torchvision 0.28 on Pillow images (rotate, affine, adjust_…, to_grayscale, posterize, invert), the other
# transformations of that file; colours where alpha is zero set to zero, as that file's _with_transparency does
TORCHVISION = {
    "rotate": "adcf9d18b92b4458", "shear": "a62d2f085ae8c630", "brightness": "77b92ab11d6024bb",
    "contrast": "27699cc13df05842", "grayscale": "5742550989af0240", "posterize": "2cf0822f3674c185",
    "invert": "73173356aea504fb", "sharpen": "012412fb9943dcb4",
}  # fmt: skip


def test_parity_with_the_official_geometry():
    factors = torch.tensor([0.4, 0.55, 0.7, 0.83, 0.99, 1.0, 0.61, 0.45], dtype=torch.float64)
    made = scaled(cutouts(), factors)
    assert digest(made.rgba) == OFFICIAL["scale_object"]
    assert made.box.tolist() == [
        [9, 9, 13, 13], [12, 12, 12, 12], [8, 13, 14, 10], [2, 2, 27, 27], [5, 5, 22, 22], [3, 8, 20, 15],
        [16, 8, 5, 5], [14, 14, 10, 10],
    ]  # fmt: skip
    assert digest(it.transform("scale").change(cutouts(), factor=0.4 + 0.6 * U[:, 0]).rgba) == OFFICIAL["RandomScale"]
    made = it.transform("translate").change(cutouts(), place=U)
    assert digest(made.rgba) == OFFICIAL["RandomTranslate"]
    assert made.box.tolist() == [
        [0, 0, 32, 32], [3, 3, 22, 22], [3, 14, 20, 15], [0, 0, 32, 32], [8, 4, 22, 22], [4, 5, 20, 15], [18, 5, 9, 9],
        [1, 3, 22, 22],
    ]  # fmt: skip
    assert digest(it.transform("pixelate").change(cutouts()).rgba) == OFFICIAL["RandomPixelate"]
    assert digest(it.transform("erasing").change(cutouts(), place=U).rgba) == OFFICIAL["RandomErase"]


@pytest.mark.parametrize("name", TORCHVISION)
def test_parity_with_torchvision_on_pillow(name):
    given_ = {
        "rotate": {"degrees": 360 * U[:, 0]}, "shear": {"degrees": 100 * U - 50}, "brightness": {"factor": 2 * U[:, 0]},
        "contrast": {"factor": 2 * U[:, 0]},
    }.get(name, {})  # fmt: skip
    made = it.transform(name).change(cutouts(), **given_)
    assert digest(made.rgba if it.family(name) == "geometric" else made.rgb) == TORCHVISION[name]


def pil(rgba):
    return Image.fromarray(rgba.permute(1, 2, 0).contiguous().numpy())


def unpil(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def test_the_bench_peer_does_the_same_work():
    x, box = canvases(), BOXES
    noise = torch.rand(8, 2, 32, 32, generator=torch.Generator().manual_seed(6)) * 2 - 1
    sigma = 0.1 + 1.4 * U[:, 0]
    for i in range(8):
        u, v = U[i].tolist()
        one, image = Cutouts(x[i : i + 1], box[i : i + 1]), pil(x[i])
        pairs = [
            (scaled(one, U[i : i + 1, 0] * 0.6 + 0.4), bench._scale((image, tuple(box[i].tolist())), u * 0.6 + 0.4)[0]),
            (it.transform("shear").change(one, degrees=100 * U[i : i + 1] - 50),
             bench._shear(image, 100 * u - 50, 100 * v - 50)),
            (it.transform("pixelate").change(one), bench._pixelate(image)),
            (it.transform("erasing").change(one, place=U[i : i + 1]), bench._erase(image, u, v)),
        ]  # fmt: skip
        for ours, peer in pairs:
            assert torch.equal(ours.rgba[0], unpil(peer))
        blurred = it.transform("blur").change(one, sigma=sigma[i : i + 1]).rgba[0].int()
        assert (blurred - bench._gaussian(x[i].float(), 7, sigma[i].item()).round()).abs().max() <= 1
        moved = it.transform("elastic").change(one, noise=noise[i : i + 1]).rgba[0].int()
        assert (moved - unpil(bench._elastic(image, noise[i])).int()).abs().max() <= 1
        hue = it.transform("hue").change(one, share=U[i : i + 1, 0] - 0.5).rgb[0].int()
        peer = unpil(bench._hue(image.convert("RGB"), u - 0.5)).int() * (x[i, 3:] > 0)
        assert (hue - peer).abs().float().mean() < 1.5, "Pillow has 256 hues"
    data = bench.pillow_images([(pil(x[0]), (0, 0, 32, 32))], [pil(x[1]).convert("RGB")], it.TRANSFORMS, 3)
    assert data.shape == (3, 3, 32, 32)


@pytest.mark.parametrize("size", [7, 16, 33])
@pytest.mark.parametrize("kernel", [1, 3, 7, 11])
def test_blur_is_a_convolution_in_float64(size, kernel):
    if kernel // 2 >= size:
        return
    x = Cutouts(canvases(2, 8, size), BOXES)
    sigma = torch.tensor([0.01, 0.1, 0.15, 0.5, 0.9, 1.5, 4.0, 100.0], dtype=torch.float64)
    made = it.transform("blur", kernel_size=kernel).change(x, sigma=sigma)
    places = torch.arange(kernel, dtype=torch.float64) - kernel // 2
    for rgba, found, s in zip(x.rgba, made.rgba, sigma, strict=True):
        taps = (-0.5 * (places / s) ** 2).exp()
        weights = torch.outer(taps, taps)[None, None] / taps.sum() ** 2
        padded = nn.functional.pad(rgba.double()[:, None], (kernel // 2,) * 4, mode="reflect")
        exact = nn.functional.conv2d(padded, weights)[:, 0]
        # the nearest byte, but for values that lie half-way between two of them
        assert (found - exact).abs().max() < 0.5 + 2e-4
    assert torch.equal(made.box, x.box)


def test_noise_is_that_of_a_clipped_normal():
    draws = Draws(0, "noise", torch.arange(400))
    noise = it.transform("noise").parameters_of(draws, 16)["noise"].double() / 255
    assert noise.min() == 0
    assert noise.max() == 1
    count = noise.numel()
    # E clip(N, 0, 1) = phi(0) - phi(1) + P(N > 1)
    mean = (1 - math.exp(-0.5)) / math.sqrt(2 * math.pi) + 0.158655
    assert noise.mean().item() == pytest.approx(mean, abs=4 * 0.4 / count**0.5)
    assert (noise == 0).double().mean().item() == pytest.approx(0.5, abs=4 * 0.5 / count**0.5)
    assert (noise < 0.5).double().mean().item() == pytest.approx(0.691462, abs=4 * 0.5 / count**0.5)
    white = Cutouts(torch.full((1, 4, 16, 16), 250, dtype=torch.uint8), torch.zeros(1, 4, dtype=torch.int64))
    assert int(it.transform("noise", p=1)(white).rgb.min()) >= 250, "it saturates, and does not wrap round"


HALF = ("v_flip", "h_flip", "grayscale", "posterize", "invert", "sharpen", "noise", "pixelate", "elastic", "erasing")
RANGES = {
    "scale": ("factor", 0.4, 1), "rotate": ("degrees", 0, 360), "shear": ("degrees", -50, 50),
    "hue": ("share", -0.5, 0.5),
    "brightness": ("factor", 0, 2), "contrast": ("factor", 0, 2), "blur": ("sigma", 0.1, 1.5),
    "translate": ("place", 0, 1),
    "erasing": ("place", 0, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", it.TRANSFORMS)
def test_statistics_over_two_thousand_draws(name):
    change = it.transform(name)
    if name in RANGES:
        key, low, high = RANGES[name]
        x = change.parameters_of(Draws(1, name, torch.arange(2000)), 32)[key].flatten()
        assert low <= x.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < x.max() <= high
        spread = (high - low) / math.sqrt(12)
        assert x.mean().item() == pytest.approx((low + high) / 2, abs=4 * spread / len(x) ** 0.5)
        assert x.std().item() == pytest.approx(spread, rel=0.05)
    if name in HALF:
        x = (
            canvases(n=1).repeat(2000, 1, 1, 1)[..., :24, :24]
            if name != "sharpen"
            else canvases(n=1).repeat(2000, 1, 1, 1)
        )
        changed = (
            (change(Cutouts(x, BOXES[:1].repeat(2000, 1)), Draws(1, name, torch.arange(2000))).rgba != x)
            .flatten(1)
            .any(1)
        )
        assert changed.double().mean().item() == pytest.approx(0.5, abs=4 * 0.5 / 2000**0.5)
    else:
        assert change.p == 1


@pytest.mark.parametrize("name", it.TRANSFORMS)
def test_families(name):
    assert name in it.FAMILIES[it.family(name)]
    x = cutouts()
    made = it.transform(name, **({"p": 1} if name in HALF else {}))(x, Draws(3, name, torch.arange(8)))
    assert made.rgba.dtype == torch.uint8
    assert made.rgba.shape == x.rgba.shape
    assert not torch.equal(made.rgba, x.rgba)
    if it.family(name) == "photometric" or name in ("contrast", "noise"):
        assert torch.equal(made.alpha, x.alpha)
        assert not (made.rgb * (made.alpha == 0)).any()
    if name in ("scale", "translate"):
        assert not torch.equal(made.box, x.box)
    else:
        assert torch.equal(made.box, x.box)


def test_the_box_holds_the_object():
    objects = [torch.full((4, 32, 32), 255, dtype=torch.uint8)]
    data = it.Transforms2D(objects, "black", ["translate", "scale", "translate"], 200)
    made, _, _, _ = data._scene(torch.arange(200))
    assert made.box.unique(dim=0).tolist() == [[5, 5, 22, 22]]
    moved = it.transform("translate")(made)
    for rgba, (left, top, width, height) in zip(moved.rgba, moved.box.tolist(), strict=True):
        rows, columns = rgba[3].nonzero().unbind(1)
        assert (columns.min(), rows.min()) == (left, top)
        assert (columns.max() + 1 - left, rows.max() + 1 - top) == (width, height)
    assert (moved.box[:, 0].min(), moved.box[:, 0].max()) == (0, 9)


def test_composition_is_alpha_blending():
    x, under = canvases(), torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    alpha = x[:, 3:].double() / 255
    expected = alpha * x[:, :3] + (1 - alpha) * under
    found = it.composite(Cutouts(x, BOXES), under)
    assert (found - expected).abs().max() <= 0.5
    for i in range(8):
        canvas = pil(under[i]).copy()
        canvas.paste(pil(x[i]), mask=pil(x[i]))
        assert torch.equal(found[i], unpil(canvas).float())


def make(transforms=("rotate", "hue", "blur"), n=60, backgrounds="noise", **kwargs):
    return it.Transforms2D(it.shape_objects(6), backgrounds, transforms, n, **kwargs)


@pytest.mark.parametrize("names", [*[(n,) for n in it.TRANSFORMS], it.TRANSFORMS])
def test_an_image_is_a_function_of_its_index(names):
    data = make(names)
    whole, labels = data.tensors()
    assert whole.shape == (60, 3, 32, 32)
    assert whole.dtype == torch.float32
    assert 0 <= whole.min() <= whole.max() <= 1
    order = torch.randperm(60)[:17]
    some, there = data.batch(order)
    assert torch.equal(some, whole[order])
    assert torch.equal(there, labels[order])
    image, label = data[int(order[0])]
    assert torch.equal(image, some[0])
    assert label == there[0]


def test_workers_and_global_numbers_do_not_matter():
    data = make()
    whole, labels = data.tensors()
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    again = make()
    torch.rand(5)
    assert torch.equal(again.tensors()[0], whole)
    torch.random.set_rng_state(before)
    data.batch(range(9))
    assert torch.equal(torch.random.get_rng_state(), before), "torch's global generator is not touched"
    for workers in (0, 2):
        found = list(DataLoader(data, batch_size=13, num_workers=workers))
        assert torch.equal(torch.cat([x for x, _ in found]), whole)
        assert torch.equal(torch.cat([y for _, y in found]), labels)
    assert torch.equal(torch.cat([x for x, _ in data.batches(7)]), whole)


def test_parts_and_seeds_are_apart():
    data = make(n=200)
    parts = [data.split(p).tensors() for p in ("train", "val", "test")]
    assert torch.equal(parts[0][0], data.tensors()[0])
    for i in range(3):
        for j in range(i):
            assert not (parts[i][0] == parts[j][0]).flatten(1).all(1).any()
            assert (parts[i][1] != parts[j][1]).double().mean() > 0.7
    other = data.replace(transforms_seed=5)
    assert torch.equal(other.tensors()[1], parts[0][1])
    assert not torch.equal(other.tensors()[0], parts[0][0])
    assert not torch.equal(other.split("test").tensors()[0], other.tensors()[0])
    counts = torch.bincount(make(n=6000).split("val")._drawn(range(6000), ())[-1], minlength=6)
    assert (counts - 1000).abs().max() < 4 * (1000 * 5 / 6) ** 0.5


def test_twins_differ_in_the_transformation_alone():
    pairs = make(("translate",)).twins()
    one, other, labels = pairs.batch(range(60))
    assert torch.equal(one, pairs.data.tensors()[0])
    assert torch.equal(labels, pairs.data.tensors()[1])
    objects, under, _, _ = pairs.data._scene(torch.arange(60))
    boxes = [pairs.data._transformed(objects, torch.arange(60), s).box for s in (0, 1)]
    places = torch.arange(32)
    inside = torch.zeros(60, 32, 32, dtype=torch.bool)
    for box in boxes:
        left, top, width, height = (v[:, None] for v in box.unbind(1))
        rows, columns = (places >= top) & (places < top + height), (places >= left) & (places < left + width)
        inside |= rows[:, :, None] & columns[:, None, :]
    outside = ~inside[:, None].expand_as(one)
    assert outside.any()
    assert torch.equal(one[outside], other[outside])
    assert torch.equal(one[outside], (under.float() / 255)[outside])
    assert (one != other).flatten(1).any(1).double().mean() > 0.9
    same = make(()).twins()
    assert torch.equal(*same.batch(range(60))[:2])
    image, twin, label = pairs[4]
    assert torch.equal(image, one[4])
    assert torch.equal(twin, other[4])
    assert label == labels[4]
    assert not torch.equal(make(("translate",)).twins(2)[4][1], twin)
    loaded = list(DataLoader(pairs, batch_size=32))
    assert torch.equal(torch.cat([b[1] for b in loaded]), other)


def test_label_correlation_and_availability():
    photos, labels = torch.randint(0, 256, (60, 3, 32, 32), dtype=torch.uint8), torch.arange(60) % 6
    options = dict(backgrounds=photos, background_labels=labels, n=3000)
    for c in (0.0, 0.8, 1.0):
        front, behind = (
            make((), label=k, fg_bg_correlation=c, **options)._drawn(range(3000), ())[-1]
            for k in ("foreground", "background")
        )
        rate = (front == behind).double().mean().item()
        assert rate == pytest.approx(c + (1 - c) / 6, abs=4 * 0.5 / 3000**0.5)
    data = make((), label="background", fg_availability=0.3, **options)
    images, _ = data.tensors()
    known = {tuple(p.flatten()[:20].tolist()) for p in photos}
    centre = data._scene(torch.arange(3000))[1].float() / 255
    bare = (images == centre).flatten(1).all(1).double().mean().item()
    assert bare == pytest.approx(0.7, abs=4 * 0.5 / 3000**0.5)
    assert len(known) == 60
    assert data.n_classes == 6


def test_several_prototypes_floats_and_pillow_images():
    a, b, c = it.shape_objects(3, 48)
    mixed = it.Transforms2D(
        [[a, b.float() / 255], pil(c)], [torch.rand(3, 40, 40), pil(a).convert("RGB")], n_samples=40
    )
    plain = it.Transforms2D([[a, b], c], [unpil(pil(a).convert("RGB"))], n_samples=40)
    assert mixed.n_classes == 2
    assert torch.equal(mixed._objects.rgba, plain._objects.rgba)
    shown = mixed._scene(torch.arange(40))[0].rgba
    assert sum((shown == o).flatten(1).all(1).any() for o in mixed._objects.rgba) == 3


def test_photos_as_objects():
    photos, labels = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8), torch.arange(12) % 4
    objects = it.opaque_objects(photos, labels, classes=[1, 3])
    data = it.Transforms2D(objects, "black", (), 50, object_scale=1)
    images, found = data.tensors()
    for image, label in zip(images, found, strict=True):
        assert (photos[labels == (1, 3)[int(label)]] == (image * 255).round()).flatten(1).all(1).any()


def test_sources_of_objects():
    grey = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    grey[:, :, 2:6, 2:6] = 200
    for rgba in it.masked_objects(grey):
        assert torch.equal(rgba[3] == 255, grey[0, 0] == 200)
        assert len(rgba[:3, 2:6, 2:6].flatten(1).unique(dim=1).T) == 1
    assert torch.equal(it.masked_objects(grey, coloured=False)[0][0], it.masked_objects(grey, coloured=False)[1][2])
    for rgba in it.shape_objects(4, 24) + it.noise_objects(2, 24):
        assert rgba.shape == (4, 24, 24)
        assert (rgba[3] > 0).double().mean() > 0.1
    assert all(torch.equal(a, b) for a, b in zip(it.shape_objects(4), it.shape_objects(4), strict=True))


def test_the_published_set(tmp_path, monkeypatch):
    for name in ("cat", "apple"):
        (tmp_path / "foregrounds" / name).mkdir(parents=True)
        pil(canvases(1, 1, 40)[0]).save(tmp_path / "foregrounds" / name / "0.png")
    (tmp_path / "backgrounds").mkdir()
    photo = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8)
    pil(photo).save(tmp_path / "backgrounds/0.png")
    found = it.load_base_set(24, tmp_path)
    assert found.names == ["apple", "cat"]
    assert found.backgrounds.shape == (1, 3, 24, 24)
    whole = pil(photo[:, :, :50]).resize((24, 24), Image.Resampling.BILINEAR)
    assert torch.equal(found.backgrounds[0], unpil(whole))
    data = it.Transforms2D(found.foregrounds, found.backgrounds, ["rotate"], 4, 24)
    assert data[0][0].shape == (3, 24, 24)
    monkeypatch.delenv("TORCHGRAFT_DATA", raising=False)
    monkeypatch.setenv("TORCHGRAFT_CACHE", str(tmp_path / "none"))
    with pytest.raises(DatasetNotFoundError, match=r"tillspeicher/transforms_2d_base.*HF_HUB_OFFLINE"):
        it.load_base_set()
    with pytest.raises(DatasetNotFoundError, match="tillspeicher/transforms_2d_base"):
        it.load_base_set(folder=tmp_path / "none")


def test_sets_of_transformations():
    for seed in range(20):
        first = it.sample_transform_sets(6, seed=seed)
        other = it.sample_transform_sets(6, first, seed=seed)
        assert not set(first) & set(other)
        for names in (first, other):
            assert sorted(map(it.family, names)) == sorted([*it.FAMILIES] * 2)
    assert len(set(it.sample_transform_sets(18, mixed=False))) == 18
    assert {it.sample_transform_sets(1, mixed=False, seed=s)[0] for s in range(200)} == set(it.TRANSFORMS)
    nested = it.nested_transform_sets(8, 3)
    assert all(set(a) < set(b) and len(b) == len(a) + 1 for a, b in itertools.pairwise(nested))
    # nested sets draw alike: the first transformations of a larger set are those of a smaller one
    one, two = (make(nested[n - 1])._transformed(cutouts(), torch.arange(8), 0) for n in (1, 1))
    assert torch.equal(one.rgba, two.rgba)


def test_class_relations():
    made = it.class_relations(40, 12, seed=2)
    goal = set(made["same"][1])
    assert all(set(target) == goal for _, target in made.values())
    assert set(made["same"][0]) == goal
    assert set(made["subset"][0]) < goal
    assert len(made["subset"][0]) == 4
    assert not set(made["disjoint"][0]) & goal
    assert len(made["disjoint"][0]) == 12
    assert set(made["superset"][0]) == goal | set(made["disjoint"][0])


@given(st.integers(-(2**60), 2**60), st.text(max_size=5), st.lists(st.integers(0, 2**40), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_draws_follow_the_index_alone(seed, stream, index):
    together = Draws(seed, stream, torch.tensor(index))
    first, second, field = together.uniform(2, 3), together.words(3), together.shorts(5)
    assert ((first >= 2) & (first < 3)).all()
    assert ((field >= 0) & (field < 65536)).all()
    alone = Draws(seed, stream, torch.tensor(index[-1:]))
    assert torch.equal(alone.uniform(2, 3), first[-1:])
    assert torch.equal(alone.words(3), second[-1:])
    assert torch.equal(together.at(torch.tensor([0])).words(2), Draws.at(together, torch.tensor([0])).words(2))


def test_draws_are_uniform_and_independent():
    index = torch.arange(40_000)
    streams = [Draws(s, k, index).uniform() for s, k in ((0, "a"), (0, "b"), (1, "a"))]
    streams.append(streams[0].roll(1))
    for i, x in enumerate(streams):
        counts = torch.histc(x, 20, 0, 1)
        assert ((counts - 2000) ** 2 / 2000).sum() < 43.8, "chi-squared, 19 degrees of freedom, p = 0.001"
        for y in streams[:i]:
            assert torch.corrcoef(torch.stack([x, y]))[0, 1].abs() < 4 / 40_000**0.5
    bits = Draws(0, "a", index[:2000]).words(1)
    ones = torch.stack([(bits >> k) & 1 for k in range(64)]).double().mean(1)
    assert (ones - 0.5).abs().max() < 4.5 * 0.5 / 2000**0.5


# --- the measure


def twins_of(x, y, size=None):
    return list(zip(x.split(size or len(x)), y.split(size or len(y)), strict=True))


def identity(x):
    return x


def test_score_of_identical_and_of_independent_images():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 4000, 6, generator=g, dtype=torch.float64)
    assert it.invariance_score(identity, twins_of(x, x, 500)) == 0
    assert it.invariance_score(identity, twins_of(x, y, 500)) == pytest.approx(1, abs=0.02)
    scores = it.invariance_scores(identity, twins_of(x + 3, x + 3, 500))
    assert scores["cka"] == pytest.approx(1, abs=1e-12)
    assert scores["cos"] > 1
    assert scores["dot"] > 1
    scores = it.invariance_scores(identity, twins_of(x + 3, y + 3, 500))
    assert scores["cos"] == pytest.approx(1, abs=0.01)
    assert scores["dot"] == pytest.approx(1, abs=0.02)
    assert abs(scores["cka"]) < 0.02


def test_score_is_unchanged_by_rotation_and_scale():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(64, 5, generator=g, dtype=torch.float64)
    y = x + torch.randn(64, 5, generator=g, dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(5, 5, generator=g, dtype=torch.float64))[0]
    before = it.invariance_scores(identity, twins_of(x, y, 16))
    after = it.invariance_scores(lambda z: 7 * z @ q, twins_of(x, y, 16))
    for metric in it.METRICS:
        assert after[metric] == pytest.approx(before[metric], rel=1e-10)
        assert it.invariance_score(identity, twins_of(x, y, 16), metric) == before[metric]


def test_score_equals_a_loop():
    # in a batch of two, each image meets the other one
    g = torch.Generator().manual_seed(2)
    x, y = torch.randn(2, 6, 3, generator=g, dtype=torch.float64)
    apart, other, products, crossed = [], [], [], []
    for a in range(0, 6, 2):
        apart.append(sum(math.dist(x[i], y[i]) for i in (a, a + 1)) / 2)
        other.append(sum(math.dist(x[i], x[2 * a + 1 - i]) for i in (a, a + 1)) / 2)
        products.append(sum(float(x[i] @ y[i]) for i in (a, a + 1)) / 2)
        crossed.append(sum(float(x[i] @ x[2 * a + 1 - i]) for i in (a, a + 1)) / 2)
    found = it.invariance_scores(identity, twins_of(x, y, 2), ("l2", "dot"))
    assert found["l2"] == pytest.approx(sum(apart) / sum(other), rel=1e-12)
    assert found["dot"] == pytest.approx(sum(products) / sum(crossed), rel=1e-12)


def test_no_image_is_compared_with_itself():
    # two far clusters of one image each: a fixed point would show as a distance of nothing
    x = torch.arange(7, dtype=torch.float64)[:, None] * 100
    for seed in range(50):
        found = it.invariance_score(identity, twins_of(x, x + 100), seed=seed)
        assert found <= 1, "the normaliser is at least the least distance of two images"


def test_linear_encoder_that_projects_a_coordinate_out():
    g = torch.Generator().manual_seed(3)
    x = torch.randn(100, 5, generator=g, dtype=torch.float64)
    moved = x.clone()
    moved[:, 2] += torch.randn(100, generator=g, dtype=torch.float64)
    blind, seeing = torch.eye(5, dtype=torch.float64), torch.eye(5, dtype=torch.float64)
    blind[2] = 0
    seeing[[0, 1, 3, 4]] = 0
    assert it.invariance_score(lambda z: z @ blind, twins_of(x, moved, 25)) == 0
    assert it.invariance_score(lambda z: z @ seeing, twins_of(x, moved, 25)) > 0.5
    # an image plus its mirror image does not see flips
    pairs = it.Transforms2D(it.shape_objects(5), "black", ["h_flip"], 64).twins()
    assert it.invariance_score(lambda z: (z + z.flip(3)).flatten(1), pairs) == 0
    assert it.invariance_score(lambda z: z.flatten(1), pairs) > 0.1


def naive_hsic(x, y):
    """Sums over distinct indices, as the estimator is defined."""
    k, l = x @ x.T, y @ y.T
    n = len(x)
    pairs = sum(k[i, j] * l[i, j] for i in range(n) for j in range(n) if i != j)
    triples = sum(k[i, j] * l[i, q] for i in range(n) for j in range(n) for q in range(n) if len({i, j, q}) == 3)
    fours = sum(
        k[i, j] * l[q, r]
        for i in range(n) for j in range(n) for q in range(n) for r in range(n) if len({i, j, q, r}) == 4
    )  # fmt: skip
    return pairs / (n * (n - 1)) + fours / (n * (n - 1) * (n - 2) * (n - 3)) - 2 * triples / (n * (n - 1) * (n - 2))


def test_hsic_and_cka():
    g = torch.Generator().manual_seed(4)
    x, y = torch.randn(6, 3, generator=g, dtype=torch.float64) + 2, torch.randn(6, 4, generator=g, dtype=torch.float64)
    assert it.unbiased_hsic(x, y).item() == pytest.approx(naive_hsic(x, y).item(), rel=1e-10)
    g = torch.Generator().manual_seed(3)
    a = torch.randn(40, 6, generator=g) + 1
    b = a + 0.5 * torch.randn(40, 6, generator=g)
    # exact.py and cka_minibatch.py (l2_distance, cosine_similarity, dot_product_similarity, MinibatchCKA over two
    # batches of 20, unbiased_linear_HSIC) of tillspeicher/representation-invariance-transfer at bf9bd09
    for metric, value in (("l2", 1.1279321908950806), ("cos", 0.9362257122993469), ("dot", 12.640092849731445)):
        assert it.similarity(a, b, metric).item() == pytest.approx(value, rel=1e-5)
    assert it.invariance_score(identity, twins_of(a, b, 20), "cka") == pytest.approx(0.8256928324699402, abs=1e-5)
    assert it.unbiased_hsic(a, b).item() == pytest.approx(6.332461357116699, rel=1e-5)


def test_collapsed_encoder():
    pairs = make(n=16).twins()
    for metric in ("l2", "cka"):
        with pytest.warns(UserWarning, match="collapsed"):
            assert math.isnan(it.invariance_score(lambda x: torch.zeros(len(x), 3), pairs, metric))


SMALL = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8
)


def vision_models():
    resnet = transformers.ResNetConfig(embedding_size=8, layer_type="basic", hidden_sizes=[8, 16], depths=[1, 1])
    vit = transformers.ViTConfig(**SMALL)
    dino = transformers.Dinov2Config(**{k: v for k, v in SMALL.items() if k != "intermediate_size"})
    return {
        "vit": (transformers.ViTModel(vit), None, 16),
        "vit without pooler": (transformers.ViTModel(vit, add_pooling_layer=False), None, 16),
        "vit layer": (transformers.ViTModel(vit), "layernorm", 16),
        "dino": (transformers.Dinov2Model(dino), None, 16),
        "resnet": (transformers.ResNetModel(resnet), None, 16),
        "classifier": (transformers.ViTForImageClassification(vit), it.measure.PENULTIMATE, 16),
        "cifar": (zoo.CifarResNet(8, 10), it.measure.PENULTIMATE, 64),
        "feature map": (nn.Conv2d(3, 5, 3), None, 5),
    }  # fmt: skip


def test_any_encoder():
    pairs = make(("rotate",), n=12).twins()
    batch = pairs.batch(range(12))[0]
    for name, (model, layer, width) in vision_models().items():
        model.train()
        first = next(model.parameters()).detach().clone()
        x = it.features(model, batch, layer)
        assert x.shape == (12, width), name
        assert all(m.training for m in model.modules()), "the mode is put back"
        assert torch.equal(it.features(model, batch[:1], layer)[0], x[0]) or torch.allclose(
            it.features(model, batch[:1], layer)[0], x[0], atol=1e-5
        ), "no statistics of the batch"
        score = it.invariance_score(model, pairs, layer=layer)
        assert 0 < score < 3
        assert torch.equal(first, next(model.parameters()))
        assert not model._forward_hooks
    net = zoo.CifarResNet(8, 10).eval()
    torch.testing.assert_close(it.features(net, batch, "penultimate"), net.features(batch).detach())
    vit = transformers.ViTModel(transformers.ViTConfig(**SMALL)).eval()
    hidden = vit(batch).last_hidden_state.detach()
    torch.testing.assert_close(it.features(vit, batch, pool="cls"), hidden[:, 0])
    torch.testing.assert_close(it.features(vit, batch, pool="mean"), hidden.mean(1))
    for dtype in (torch.float64, torch.bfloat16):
        cast = net.to(dtype)
        assert 0 < it.invariance_score(lambda x, c=cast, d=dtype: c.features(x.to(d)), pairs) < 2
    clip = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SMALL))
    table = it.invariance_matrix(
        {"clip": clip, "pixels": lambda x: x.flatten(1)}, ["blur", it.transform("shear", degrees=(0, 50))], make(n=12)
    )
    assert table.shape == (2, 2)
    assert list(table.columns) == ["blur", "Shear(p=1.0, degrees=(0.0, 50.0))"]
    assert (table.loc["pixels"] > 0).all()


def test_real_models():
    pairs = it.Transforms2D(it.shape_objects(4, 64), "noise", ["h_flip"], 8, 64).twins()
    try:
        net = zoo.load("efficientnet-lite0")
    except zoo.ModelNotFoundError as error:
        pytest.skip(str(error))
    scores = it.invariance_scores(lambda x: it.features(net, (x - 0.498) / 0.502, "penultimate"), pairs)
    assert 0 < scores["l2"] < 1 < scores["cos"]
    assert it.features(net, pairs.batch(range(2))[0], "penultimate").shape == (2, 1280)
    try:
        small = zoo.load("resnet20-cifar10")
    except zoo.ModelNotFoundError as error:
        pytest.skip(str(error))
    data = make(("h_flip",), n=128)
    flips = {
        name: it.invariance_score(lambda x: small.features(small.normalize(x)), data.replace(transforms=[name]).twins())
        for name in ("h_flip", "v_flip")
    }
    assert flips["h_flip"] < flips["v_flip"], "it was trained with horizontal flips alone"


def test_text_encoder():
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=128
    )
    model = transformers.BertModel(config, add_pooling_layer=False)

    def tokenizer(texts, padding, truncation, return_tensors):
        ids = [[ord(c) % 128 for c in text] for text in texts]
        longest = max(map(len, ids))
        mask = torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i in ids])
        return {"input_ids": torch.tensor([i + [0] * (longest - len(i)) for i in ids]), "attention_mask": mask}

    texts = ["a cat", "the dog barks", "rain", "it is late", "go home now", "x"]
    pairs = it.text_twins(tokenizer, texts, [t.upper() for t in texts], batch_size=4)
    assert [len(one["input_ids"]) for one, _ in pairs] == [3, 3]
    score = it.invariance_score(model, pairs)
    assert score > 0
    assert it.invariance_score(model, it.text_twins(tokenizer, texts, texts)) == 0
    # padding is no part of a text
    alone = it.features(model, tokenizer(["rain"], True, True, "pt"))
    together = it.features(model, tokenizer(["rain", "the dog barks"], True, True, "pt"))[:1]
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-4)


def test_kornia_augmentations():
    colour = it.Wrapped(kornia.augmentation.ColorJitter(0.5, 0.5, 0.5, 0.1, p=1.0), colour=True)
    moving = it.Wrapped(kornia.augmentation.RandomAffine(30.0, p=1.0), colour=False)
    data = make((colour, moving, "blur"), n=20)
    state = torch.random.get_rng_state()
    whole = data.tensors()[0]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(data.batch([7, 3])[0], whole[[7, 3]])
    assert torch.equal(colour(cutouts()).alpha, canvases()[:, 3:])
    assert not torch.equal(moving(cutouts()).alpha, canvases()[:, 3:])
    assert it.invariance_score(lambda x: x.flatten(1), data.twins()) > 0


def test_transfer():
    data = make((), n=300)
    pixels = lambda x: x.flatten(1)  # noqa: E731
    assert it.transfer_eval(pixels, data) > 0.9
    nothing = it.transfer_eval(lambda x: torch.ones(len(x), 1), data)
    assert nothing < 0.45
    few = it.transfer_eval(pixels, data, n=12)
    assert nothing <= few <= 1
    x, y = data.tensors()
    assert it.transfer_eval(pixels, ((x[:200], y[:200]), (x[200:], y[200:]))) > 0.9
    net = nn.Sequential(nn.Conv2d(3, 8, 5, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()).eval()
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = torch.random.get_rng_state()
    tuned = partial(it.transfer_eval, net, data, "finetune", 120, lr=1e-2, batch_size=40)
    accuracy = tuned(epochs=10)
    assert accuracy > tuned(epochs=0) + 0.3
    assert tuned(epochs=10) == accuracy
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())
    table = it.transfer_matrix(
        {"pixels": pixels, "net": net},
        {"same": data, "turned": data.replace(transforms=["rotate", "translate", "hue"])},
    )
    assert table.shape == (2, 2)
    assert table.loc["pixels", "same"] > table.loc["pixels", "turned"]


def test_relative_importance():
    rows = [
        (seed, transforms, n, 0.5 + (0.2 if transforms == "same" else 0) + (0.05 if n == 5000 else 0) + 0.01 * seed)
        for seed in (0, 1) for transforms in ("same", "disjoint", "none") for n in (1000, 5000)
    ]  # fmt: skip
    df = pandas.DataFrame(rows, columns=["seed", "transforms", "samples", "accuracy"])
    found = it.relative_importance(df, "samples")
    assert found["transforms"] == pytest.approx(0.2)
    assert found["factor"] == pytest.approx(0.05)
    assert found["ratio"] == pytest.approx(4)


def test_data_of_the_experiments():
    shapes = it.shape_objects(8)
    photos, labels = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8), torch.arange(40) % 4
    kinds = it.data_types(shapes[:4], shapes[4:], photos, 30)
    assert set(kinds) == {f"{a}-{b}" for a in ("op", "os", "rp", "rs") for b in ("img", "rand")}
    assert torch.equal(kinds["op-img"]._objects.rgba, kinds["op-rand"]._objects.rgba)
    assert len({digest(k._objects.rgba) for k in kinds.values()}) == 4
    made = it.relevance_data(shapes[:4], photos, labels, 30, correlations=(0, 1), availabilities=(0,))
    assert set(made) == {
        "objects on black",
        "objects",
        "images, correlation 0",
        "images, correlation 1",
        "images, availability 0",
    }
    bare, under = made["images, availability 0"], made["objects"]._scene(torch.arange(30))[1]
    assert torch.equal(bare.tensors()[0], under.float() / 255)
    one = made["images, correlation 1"]
    # the object in its corner, and nothing else of the photo hidden
    pasted = (one.tensors()[0] != under.float() / 255).any(1)
    assert pasted[:, :16, 18:].any()
    assert not pasted[:, 16:].any()
    assert not pasted[:, :, :18].any()
    assert Corner()(Cutouts(made["objects"]._objects.rgba, made["objects"]._objects.box)).box[0].tolist() == [
        21,
        2,
        12,
        12,
    ]


NAN = torch.full((4, 8, 8), torch.nan)
PHOTOS = torch.rand(2, 3, 8, 8)
PAIRS = [(torch.rand(5, 3), torch.rand(5, 3))]
FAR = torch.full((4, 8), torch.inf)
BELOW = (torch.rand(4, 3), torch.tensor([0, -1, 0, -1]))


class Keyword(nn.Module):
    def forward(self, x):
        return torch.nan_to_num(x).flatten(1)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: it.transform("rotat"), ValueError, "did you mean 'rotate'"),
        (lambda: it.family("turn"), ValueError, "no transformation 'turn'"),
        (lambda: it.transform("rotate", angle=3), TypeError, "it has degrees, p"),
        (lambda: it.transform("scale", factor=(0.5, 1.5)), ValueError, r"within 0.01..1"),
        (lambda: it.transform("rotate", degrees=(90, 0)), ValueError, "ordered pair"),
        (lambda: it.transform("invert", p=2), ValueError, "0..1"),
        (lambda: it.transform("posterize", bits=0), ValueError, "1 to 8"),
        (lambda: it.transform("blur", kernel_size=4), ValueError, "odd"),
        (lambda: it.transform("rotate")(Cutouts(torch.rand(1, 4, 8, 8), BOXES[:1])), TypeError, "uint8"),
        (lambda: it.transform("rotate")(Cutouts(canvases()[:, :3], BOXES)), ValueError, r"\(B, 4, S, S\)"),
        (lambda: it.transform("rotate")(Cutouts(canvases()[0], BOXES)), ValueError, r"\(B, 4, S, S\)"),
        (lambda: it.transform("rotate")(Cutouts(canvases()[..., :20], BOXES)), ValueError, "square, got 32 x 20"),
        (lambda: it.transform("rotate")(Cutouts(canvases(), BOXES[:3])), ValueError, r"shape \(8, 4\)"),
        (lambda: make(["erasing"], img_size=14), ValueError, "15 pixels or more, got 14"),
        (lambda: make(["elastic"], img_size=20), ValueError, "21 pixels or more, got 20"),
        (lambda: make(["pixelate"], img_size=3), ValueError, "no pixel"),
        (lambda: make(["blur"], img_size=3), ValueError, "4 pixels or more"),
        (lambda: make("rotate"), TypeError, r"use \['rotate'\]"),
        (lambda: make([lambda x: x]), TypeError, r"Wrapped\(\)"),
        # a Python set has another order in another process
        (lambda: make({"rotate", "hue"}), TypeError, "set"),
        (lambda: make(None), TypeError, "None"),
        (lambda: make(img_size=32.0), TypeError, "img_size"),
        (lambda: make(n=40.0), TypeError, "n_samples"),
        (lambda: make(sampling_seed=0.5), TypeError, "sampling_seed"),
        (lambda: make(transforms_seed="a"), TypeError, "transforms_seed"),
        (lambda: make().replace(transforms_seed=0.5), TypeError, "transforms_seed"),
        (lambda: it.Transforms2D([], "black"), ValueError, "foregrounds is empty"),
        (lambda: it.Transforms2D([[]], "black"), ValueError, "class 0 of foregrounds has no image"),
        (lambda: it.Transforms2D([torch.rand(3, 8, 8)], "black"), ValueError, r"0 must have shape \(4, h, w\)"),
        (lambda: it.Transforms2D([torch.rand(1, 4, 8, 8)], "black"), ValueError, r"shape \(4, h, w\)"),
        (lambda: it.Transforms2D([torch.rand(4, 8, 9)], "black"), ValueError, "square, got 8 x 9"),
        (lambda: it.Transforms2D([255 * torch.rand(4, 8, 8) + 2], "black"), ValueError, "scale them to 0..1"),
        (lambda: it.Transforms2D([torch.ones(4, 8, 8, dtype=torch.int32)], "black"), TypeError, "torch.int32"),
        (lambda: it.Transforms2D([NAN], "black"), ValueError, "NaN"),
        (lambda: it.Transforms2D([np.ones((4, 8, 8))], "black"), TypeError, "ndarray"),
        (lambda: it.Transforms2D([Image.new("L", (8, 8))], "black"), ValueError, "mode 'L'"),
        (lambda: it.Transforms2D([torch.zeros(4, 0, 0)], "black"), ValueError, "no pixels"),
        (lambda: make(backgrounds=torch.rand(2, 4, 8, 8)), ValueError, r"background 0 must have shape \(3, h, w\)"),
        (lambda: make(backgrounds=torch.rand(2, 3, 8, 9)), ValueError, "square"),
        (lambda: make(backgrounds="white"), ValueError, "'noise' or 'black'"),
        (lambda: make(backgrounds=[]), ValueError, "backgrounds is empty"),
        (lambda: make(n=0), ValueError, "at least 1 sample"),
        (lambda: make(fg_bg_correlation=2), ValueError, "probability"),
        (lambda: make(fg_bg_correlation=0.5), ValueError, "background_labels"),
        (lambda: make(label="background"), ValueError, "background_labels"),
        (lambda: make(fg_availability=0.5), ValueError, "label='background'"),
        (lambda: make(label="both"), ValueError, "'both'"),
        (lambda: make(object_scale=0), ValueError, "object_scale"),
        (lambda: make(background_labels=torch.zeros(3).long()), ValueError, "no classes"),
        (lambda: make(backgrounds=PHOTOS, background_labels=torch.zeros(3)), ValueError, r"shape \(2,\)"),
        (
            lambda: make(backgrounds=PHOTOS, background_labels=torch.tensor([0, 9]), fg_bg_correlation=0.5),
            ValueError, "6 object classes",
        ),
        (lambda: make()[60], IndexError, "0..59"),
        (lambda: make().batch([60]), IndexError, "0..59"),
        (lambda: make().batch([0.5]), ValueError, "whole numbers"),
        (lambda: make().batch(torch.ones(60, dtype=torch.bool)), ValueError, "whole numbers"),
        (lambda: make()[1:3], TypeError, r"batch\(range"),
        (lambda: make().twins()["a"], TypeError, "whole number"),
        (lambda: next(make().batches(0)), ValueError, "batch_size"),
        (lambda: next(make().twins().batches(0)), ValueError, "batch_size"),
        (lambda: make(backgrounds=PHOTOS, background_labels=[0, 1]), TypeError, "list"),
        (lambda: make().split("dev"), ValueError, "'dev'"),
        (lambda: make().twins(0), ValueError, "must not be 0"),
        (lambda: it.sample_transform_sets(0), ValueError, "empty set"),
        (lambda: it.sample_transform_sets(4), ValueError, "multiple of 3"),
        (lambda: it.sample_transform_sets(3, it.TRANSFORMS), ValueError, "0 are left"),
        (lambda: it.sample_transform_sets(3, ["turn"]), ValueError, "'turn'"),
        (lambda: it.nested_transform_sets(19), ValueError, "1 to 18"),
        (lambda: it.class_relations(10, 6), ValueError, "twice as many"),
        (lambda: it.masked_objects(torch.rand(2, 1, 8, 8)), TypeError, "uint8"),
        (lambda: it.masked_objects(canvases()), ValueError, r"\(N, 1, h, w\)"),
        (lambda: it.opaque_objects(canvases()[:, :3], torch.zeros(8).long(), [3]), ValueError, "class 3 has no images"),
        (lambda: it.Wrapped(3, True), TypeError, "callable"),
        (lambda: it.Wrapped(lambda x: x[..., :9], True)(cutouts()), ValueError, "must return"),
        (lambda: it.invariance_score(identity, make()), TypeError, r"\.twins\(\)"),
        (lambda: it.invariance_score(identity, make(()).twins()), ValueError, "empty set of transformations"),
        (lambda: it.invariance_score(nn.Flatten(), make([Corner()]).twins()), ValueError, "draw nothing"),
        (lambda: it.invariance_score(identity, PAIRS, "l1"), ValueError, "l2, cos, dot, cka"),
        (lambda: it.invariance_score(identity, []), ValueError, "twins is empty"),
        (lambda: it.invariance_score(identity, [torch.rand(5, 3)]), TypeError, "inputs, inputs"),
        (lambda: it.invariance_score(identity, [(torch.rand(5, 3), torch.rand(4, 3))]), ValueError, "5 and 4"),
        (lambda: it.invariance_score(identity, [(torch.rand(1, 3), torch.rand(1, 3))]), ValueError, "at least 2"),
        (lambda: it.invariance_score(identity, [(PHOTOS, PHOTOS)], "cka"), ValueError, "at least 4"),
        (lambda: it.invariance_score(identity, [(NAN, NAN)]), ValueError, "NaN pixels"),
        (lambda: it.invariance_score(lambda x: x / 0, PAIRS), ValueError, "finite"),
        (lambda: it.invariance_score(torch.nan_to_num, [(NAN * torch.inf, NAN)]), ValueError, "NaN"),
        (lambda: it.invariance_score(torch.nan_to_num, [(FAR, FAR)]), ValueError, "infinite"),
        (lambda: it.invariance_score(Keyword(), [({"x": NAN}, {"x": NAN})]), ValueError, "NaN pixels"),
        (lambda: it.invariance_score(lambda x: x[:3], PAIRS), ValueError, "row for each of 5"),
        (lambda: it.invariance_score(lambda x: None, PAIRS), TypeError, "NoneType"),
        (lambda: it.invariance_score(identity, 5), TypeError, "int"),
        (lambda: it.invariance_score(identity, PAIRS, batch_size=0), ValueError, "batch_size"),
        (lambda: it.invariance_matrix({"a": identity}, "blur", make()), TypeError, r"\['blur'\]"),
        (lambda: it.invariance_matrix({"a": identity}, ["blur", "blur"], make()), ValueError, "twice"),
        (lambda: it.invariance_score(nn.Identity(), PAIRS, layer="penultimate"), ValueError, "no linear layer"),
        (lambda: it.invariance_score(nn.Sequential(nn.ReLU()), PAIRS, layer="1"), ValueError, "no layer '1'"),
        (lambda: it.invariance_score(identity, PAIRS, layer="0"), TypeError, "needs a module"),
        (lambda: it.features(identity, torch.rand(5)), ValueError, "2, 3 or 4 dimensions"),
        (lambda: it.features(lambda x: {"logits": x}, torch.rand(5, 3)), TypeError, "layer='penultimate'"),
        (lambda: it.features(identity, torch.rand(5, 3), pool="max"), ValueError, "'max'"),
        (lambda: it.features(identity, torch.rand(5, 3), pool="pooler"), ValueError, "pooler_output"),
        (lambda: it.invariance_matrix({"a": identity}, [], make()), ValueError, "not empty"),
        (lambda: it.text_twins(identity, ["a", "b"], ["a"]), ValueError, "equally long"),
        (lambda: it.text_twins(identity, ["a", "b"], ["a", "b"], batch_size=0), ValueError, "batch_size"),
        (lambda: it.transfer_eval(identity, make(), "tune"), ValueError, "'tune'"),
        (lambda: it.transfer_eval(identity, make(), n=1), ValueError, "at least 2"),
        (lambda: it.transfer_eval(identity, (PAIRS[0], PAIRS[0]), n=9), ValueError, "more than the 5"),
        (lambda: it.transfer_eval(identity, ((NAN, torch.zeros(4)), PAIRS[0])), ValueError, "NaN pixels"),
        (lambda: it.transfer_eval(identity, ((FAR, torch.zeros(4).long()), PAIRS[0])), ValueError, "infinite"),
        (lambda: it.transfer_eval(identity, (PAIRS[0], PAIRS[0])), TypeError, "whole numbers"),
        (lambda: it.transfer_eval(nn.Flatten(), (BELOW, BELOW), "finetune"), ValueError, "0 or more"),
        (lambda: it.transfer_eval(nn.Flatten(), make(), "finetune", batch_size=0), ValueError, "batch_size"),
        (lambda: it.transfer_eval(nn.Flatten(), make(), "finetune", epochs=-1), ValueError, "epochs"),
        (lambda: it.transfer_eval(identity, make(), "finetune"), TypeError, "only a module"),
        (lambda: it.transfer_eval(nn.Flatten(), make(), "finetune", layer="0"), ValueError, "cut the encoder"),
        (lambda: it.probe((torch.rand(5, 3), torch.zeros(5)), PAIRS[0]), ValueError, "single class"),
        (lambda: it.transfer_matrix({}, {}), ValueError, "want encoders"),
        (lambda: it.relative_importance(pandas.DataFrame({"a": [1]}), "a"), ValueError, "no column 'transforms'"),
        (
            lambda: it.relative_importance(pandas.DataFrame({"transforms": ["same"], "n": 1, "accuracy": 1.0}), "n"),
            ValueError, "'same' and a 'disjoint'",
        ),
        (
            lambda: it.relevance_data(it.shape_objects(2), canvases()[:, :3], torch.arange(8) % 4, 5),
            ValueError, "as many objects as classes",
        ),
    ],
)  # fmt: skip
def test_wrong_inputs(call, error, words, without_shape_checks):
    with pytest.raises(error, match=words):
        call()

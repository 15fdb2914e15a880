import itertools
import warnings

import pytest
import torch
import transformers
from torch import nn

from torchgraft import zoo
from torchgraft.vision import rics
from torchgraft.vision.rics import (
    CropSelector,
    RICSImageProcessor,
    RICSModel,
    consistency_bound,
    crop_scores,
    crop_size_for,
    select_offsets,
    take_crops,
    translation_report,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def naive_scores(images, m, score, seed):
    """One crop after the other: the kernel on the nine pixels around its centre."""
    kernel = rics._kernel(score, images.shape[1], seed).to(images.dtype)
    K, L, s = images.shape[2] - m + 1, images.shape[3] - m + 1, kernel.shape[-1]
    out = torch.empty(len(images), K, L, dtype=images.dtype)
    for b, r, c in itertools.product(range(len(images)), range(K), range(L)):
        crop = images[b, :, r : r + m, c : c + m]
        top = m // 2 - s // 2
        value = (crop[:, top : top + s, top : top + s] * kernel).sum()
        out[b, r, c] = value.abs() if score == "abs_laplacian" else value
    return out


@pytest.mark.parametrize("score", rics.SCORES)
@pytest.mark.parametrize("m", [3, 8, 9])
def test_scores_equal_a_loop_over_all_crops(score, m):
    x = torch.rand(2, 3, 13, 15, dtype=torch.float64)
    torch.testing.assert_close(crop_scores(x, m, score, seed=3), naive_scores(x, m, score, 3), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("score", rics.SCORES)
def test_a_score_sees_only_its_crop(score):
    x = torch.rand(1, 3, 12, 12)
    before = crop_scores(x, 7, score)
    for r, c in itertools.product(range(6), repeat=2):
        other = torch.rand(1, 3, 12, 12)
        other[..., r : r + 7, c : c + 7] = x[..., r : r + 7, c : c + 7]
        assert crop_scores(other, 7, score)[0, r, c] == before[0, r, c]


@pytest.mark.parametrize("score", rics.SCORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_move_with_the_image_to_the_last_bit(score, dtype):
    x = torch.rand(2, 3, 45, 61).to(dtype)
    whole = crop_scores(x, 20, score)
    for dy, dx in itertools.product(range(4), repeat=2):
        part = crop_scores(x[..., dy : dy + 40, dx : dx + 50].contiguous(), 20, score)
        assert torch.equal(part, whole[:, dy : dy + part.shape[1], dx : dx + part.shape[2]])


@pytest.mark.parametrize("score", rics.SCORES)
@pytest.mark.parametrize("m", [(9, 11), (5, 4)])
def test_circular_choice_follows_every_roll(score, m):
    x = torch.rand(1, 3, 9, 11)
    selector = CropSelector(m, score, circular=True)
    crop, offset = selector(x)
    for dy, dx in itertools.product(range(9), range(11)):
        moved, place = selector(x.roll((dy, dx), (2, 3)))
        assert torch.equal(moved, crop)
        assert place.tolist() == [[(offset[0, 0] + dy) % 9, (offset[0, 1] + dx) % 11]]


@pytest.mark.parametrize("score", rics.SCORES)
@pytest.mark.parametrize("size", [5, (9, 11)])
def test_ties_do_not_break_the_circular_choice(score, size):
    """On images of two greys most scores tie, and the first in row-major order is another one after a roll."""
    x = torch.stack([(torch.rand(2, 9, 11) > 0.5).float(), torch.zeros(2, 9, 11), torch.zeros(2, 9, 11)])
    x[1, :, 2, 3] = x[1, :, 2, 7] = x[1, :, 6, 7] = 1
    x[2, :, ::3] = 1
    selector = CropSelector(size, score, circular=True)
    rolled = [x.roll(shift, (2, 3)) for shift in itertools.product(range(9), range(11))]
    crops = selector(torch.cat(rolled))[0].unflatten(0, (99, 3))
    assert torch.equal(crops, crops[:1].expand_as(crops))


def test_ties_are_broken_by_the_crop_alone():
    """Where several crops tie, the choice follows the content: on dots the closed form still holds."""
    x = (torch.rand(3000, 1, 34, 34) > 0.5).float()
    selector = CropSelector(24, "laplacian")
    a, b = selector(x[..., :33, :33]), selector(x[..., 1:, :33])
    same = (a[0] == b[0]).flatten(1).all(1).double().mean().item()
    assert same == pytest.approx(consistency_bound(33, 24), abs=3 * (0.25 / 3000) ** 0.5 + 0.01)
    x = torch.rand(1, 2, 12, 12)
    before = rics._crop_marks(x, (7, 7), circular=False)
    for r, c in itertools.product(range(6), repeat=2):
        other = torch.rand(1, 2, 12, 12)
        other[..., r : r + 7, c : c + 7] = x[..., r : r + 7, c : c + 7]
        marks = rics._crop_marks(other, (7, 7), circular=False)
        assert (marks == before).nonzero().tolist() == [[0, r, c]]


def test_half_precision_is_scored_in_single():
    x = torch.rand(100, 3, 40, 40).bfloat16()
    scores = crop_scores(x, 20)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, crop_scores(x.float(), 20))
    assert CropSelector(20)(x)[0].dtype == torch.bfloat16


def test_equal_places_give_equal_crops_and_outputs():
    x = torch.rand(40, 3, 34, 34)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    selector = CropSelector(24)
    a, b = x[..., :33, :33].contiguous(), x[..., 1:, :33].contiguous()
    crops_a, at_a = selector(a)
    crops_b, at_b = selector(b)
    same = (at_b + torch.tensor([1, 0]) == at_a).all(1)
    assert 20 < same.sum() < 40
    assert torch.equal(crops_a[same], crops_b[same])
    assert not torch.equal(crops_a[~same], crops_b[~same])
    model = RICSModel(net, selector)
    assert torch.equal(model(a[same]), model(b[same]))


def noise_rate(n, m, shift, count=4000):
    """Share of noise images in which the same content is chosen before and after a shift (or all shifts up to one)."""
    x = torch.randn(count, 1, n + 2, n + 2)
    selector = CropSelector(m)
    centre = selector.offsets(x[..., 1 : 1 + n, 1 : 1 + n])
    same = torch.ones(count, dtype=torch.bool)
    for dy, dx in shift:
        moved = selector.offsets(x[..., 1 + dy : 1 + dy + n, 1 + dx : 1 + dx + n])
        same &= (moved + torch.tensor([dy, dx]) == centre).all(1)
    return same.double().mean().item()


@pytest.mark.parametrize("m", [9, 15])
def test_the_bound_is_the_rate_on_noise(m):
    # neighbouring 3 x 3 responses of noise share pixels, which costs a little of the exchangeability
    three_errors = 3 * (0.25 / 4000) ** 0.5
    axis, diagonal = consistency_bound(18, m), consistency_bound(18, m, (1, -1))
    everywhere = [o for o in itertools.product((-1, 0, 1), repeat=2) if o != (0, 0)]
    worst = consistency_bound(18, m, worst_case=True)
    for expected, shifts in ((axis, [(1, 0)]), (axis, [(0, -1)]), (diagonal, [(1, -1)]), (worst, everywhere)):
        assert noise_rate(18, m, shifts) == pytest.approx(expected, abs=three_errors + 0.01)


def test_numbers_of_the_card():
    # card 05: n=256, K=33, 65, 97
    for m, axis, worst in ((224, 0.941, 0.78), (192, 0.970, 0.88), (160, 0.980, 0.92)):
        K = 256 - m + 1
        assert consistency_bound(256, m) == pytest.approx((K - 1) / (K + 1))
        assert consistency_bound(256, m) == pytest.approx(axis, abs=6e-4)
        assert consistency_bound(256, m, worst_case=True) == pytest.approx(((K - 2) / (K + 2)) ** 2)
        assert consistency_bound(256, m, worst_case=True) == pytest.approx(worst, abs=6e-3)
    assert consistency_bound(256, 192, (1, 1)) == pytest.approx(64 * 64 / (2 * 65 * 65 - 64 * 64))
    assert consistency_bound(10, 10) == 0
    assert consistency_bound(10, 10, (0, 0)) == 1


@pytest.mark.parametrize("worst", [False, True])
@pytest.mark.parametrize("shift", [1, 2, (1, 1)])
def test_crop_size_is_the_inverse(shift, worst):
    for level in (0.1, 0.5, 0.8):
        m = crop_size_for(128, level, shift, worst_case=worst)
        assert consistency_bound(128, m, shift, worst_case=worst) >= level
        assert m == 128 or consistency_bound(128, m + 1, shift, worst_case=worst) < level
    with pytest.raises(ValueError, match="the smallest, 3 pixels, reaches"):
        crop_size_for(16, 0.999)


def test_a_crop_of_the_whole_image_is_the_plain_model():
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 100, 4))
    x = torch.rand(3, 3, 10, 10)
    assert torch.equal(RICSModel(net, CropSelector(10))(x), net(x))


def test_ties_take_the_first_and_a_constant_image_is_warned_about():
    scores = torch.tensor([[[0.0, 2.0], [2.0, 1.0]]])
    assert select_offsets(scores).tolist() == [[0, 1]]
    with pytest.warns(UserWarning, match="same score"):
        assert CropSelector(5).offsets(torch.ones(1, 3, 8, 8)).tolist() == [[0, 0]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CropSelector(8)(torch.ones(1, 3, 8, 8))


def test_whole_numbers_are_bytes():
    x = torch.randint(0, 256, (2, 3, 12, 12), dtype=torch.uint8)
    crops, offsets = CropSelector(8)(x)
    again, same = CropSelector(8)(x / 255)
    assert torch.equal(crops, again)
    assert torch.equal(offsets, same)


def test_random_kernels_have_no_mean_and_follow_the_seed():
    for seed in (0, 1):
        assert abs(rics._kernel("random3x3", 3, seed).sum().item()) < 1e-5
    assert not torch.equal(rics._kernel("random3x3", 3, 0), rics._kernel("random3x3", 3, 1))
    x = torch.rand(1, 3, 20, 20)
    torch.testing.assert_close(crop_scores(x + 5, 10), crop_scores(x, 10), atol=1e-4, rtol=0)


def test_crops_are_the_same_where_the_image_goes_round_or_not():
    x, offsets = torch.rand(5, 3, 12, 14), torch.tensor([[0, 0], [5, 7], [2, 3], [5, 0], [1, 6]])
    crops = take_crops(x, offsets, (7, 7))
    # one path copies rows, the other gathers pixels
    assert torch.equal(crops, take_crops(x, offsets, (7, 7), circular=True))
    assert take_crops(x[:0], offsets[:0], 7).shape == (0, 3, 7, 7)


def test_gradients_reach_the_pixels_of_the_crop_alone():
    x = torch.rand(1, 3, 10, 10, dtype=torch.float64, requires_grad=True)
    crops, offset = CropSelector(6)(x)
    (crops**2).sum().backward()
    r, c = offset[0].tolist()
    inside = torch.zeros_like(x)
    inside[..., r : r + 6, c : c + 6] = 1
    torch.testing.assert_close(x.grad, 2 * x.detach() * inside)


def test_own_scores():
    class Centre(nn.Module):
        def forward(self, images):
            return images[:, 0, 3:-3, 3:-3]

    x = torch.rand(2, 3, 12, 14)
    crops, offsets = CropSelector(7, Centre())(x)
    for crop, (r, c) in zip(crops, offsets.tolist(), strict=True):
        assert crop[0, 3, 3] == x[:, 0, 3:-3, 3:-3][crops.eq(crop).flatten(1).all(1).nonzero()[0, 0]].max()
        assert 0 <= r <= 5
        assert 0 <= c <= 7


SMALL = dict(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
)
SIZES = dict(hidden_sizes=[8, 16], depths=[1, 1])


def _classifiers():
    return {
        "vit": transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL)),
        "resnet": transformers.ResNetForImageClassification(
            transformers.ResNetConfig(embedding_size=8, layer_type="basic", **SIZES)
        ),
        "convnext": transformers.ConvNextForImageClassification(
            transformers.ConvNextConfig(num_stages=2, patch_size=2, **SIZES)
        ),
    }


@pytest.mark.parametrize("family", ["vit", "resnet", "convnext"])
def test_transformers_classifiers_keep_their_outputs(family, tmp_path):
    net = _classifiers()[family].eval()
    model = RICSModel(net, CropSelector(20), resize_to=16, mean=(0.5,) * 3, std=(0.25,) * 3).eval()
    x = torch.rand(2, 3, 24, 28)
    out = model(x, labels=torch.tensor([0, 1]))
    assert isinstance(out, transformers.modeling_outputs.ModelOutput)
    assert out.loss.isfinite()
    crops = model.selector(x)[0]
    smaller = nn.functional.interpolate(crops, (16, 16), mode="bicubic", antialias=True)
    torch.testing.assert_close(out.logits, net(pixel_values=(smaller - 0.5) / 0.25).logits)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    model.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))


def test_encoders_and_bound_methods():
    dino = transformers.Dinov2Model(
        transformers.Dinov2Config(**{k: v for k, v in SMALL.items() if k != "intermediate_size"})
    )
    assert RICSModel(dino.eval(), CropSelector(16))(torch.rand(2, 3, 20, 20)).pooler_output.shape == (2, 16)
    text = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20)
    clip = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=SMALL, projection_dim=8)
    ).eval()
    report = translation_report(
        RICSModel(clip.get_image_features, CropSelector(16)), torch.rand(3, 3, 22, 22), similarity=0.99
    )
    assert report.predictions is None
    assert bool((report.agrees | ~report.same_crop).all()), "the same crop gives the same features"


def test_a_bound_method_brings_its_module_along():
    text = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20)
    clip = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=SMALL, projection_dim=8))
    model = RICSModel(clip.train().get_image_features, CropSelector(16)).double()
    assert next(clip.parameters()).dtype == torch.float64
    assert model.eval().training is clip.training is False
    assert model(torch.rand(1, 3, 20, 20, dtype=torch.float64)).pooler_output.dtype == torch.float64


def test_a_network_trained_by_others():
    try:
        net = zoo.load("efficientnet-lite0")
    except zoo.ModelNotFoundError as error:
        pytest.skip(str(error))
    model = RICSModel(net, CropSelector(56), resize_to=64, mean=(0.498,), std=(0.502,))
    photos = nn.functional.avg_pool2d(torch.rand(3, 3, 74, 74), 3, 1)
    report = translation_report(model, photos)
    assert report.predictions.shape == (3, 9)
    assert bool((report.agrees | ~report.same_crop).all())
    crops = model.selector(photos)[0]
    small = nn.functional.interpolate(crops, (64, 64), mode="bicubic", antialias=True)
    with torch.no_grad():
        torch.testing.assert_close(model(photos), net((small - 0.498) / 0.502))


@pytest.mark.parametrize("wrapped", [False, True])
def test_report_in_eval_mode_leaves_the_model_as_it_was(wrapped):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(4 * 36, 5))
    net.train()[0].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    model = RICSModel(net, CropSelector(8)) if wrapped else net
    images = torch.rand(6, 3, 12 if wrapped else 10, 12 if wrapped else 10)
    once, again = translation_report(model, images), translation_report(model, images)
    assert torch.equal(once.predictions, again.predictions)
    assert [m.training for m in net] == [False, True, True, True, True]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_report_on_outputs_of_several_kinds():
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 6))
    images = torch.rand(5, 3, 10, 10)
    expected = translation_report(net, images)
    found = translation_report(lambda x: {"logits": net(x)}, images)
    assert torch.equal(found.predictions, expected.predictions)
    resnet = transformers.ResNetModel(transformers.ResNetConfig(embedding_size=8, layer_type="basic", **SIZES)).eval()
    report = translation_report(RICSModel(resnet, CropSelector(20)), torch.rand(3, 3, 26, 26), similarity=1.0)
    # equal features are alike whatever rounding makes of their cosine
    assert bool((report.agrees | ~report.same_crop).all())
    with pytest.raises(ValueError, match="similarity"):
        translation_report(RICSModel(resnet, CropSelector(20)), torch.rand(3, 3, 26, 26))


def test_own_shifts_are_drawn_once():
    drawn = []

    def brighter(images, dy, dx, size):
        drawn.append((dy, dx))
        return images[..., 1 : 1 + size[0], 1 : 1 + size[1]] + torch.rand(1)

    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 6))
    report = translation_report(RICSModel(net, CropSelector(8)), torch.rand(5, 3, 14, 14), kind=brighter, window=12)
    assert drawn == list(report.offsets)
    assert report.same_crop is None, "what a shift of one's own does to places is not known"


@pytest.mark.parametrize("name", ["ViTImageProcessor", "CLIPImageProcessor", "BitImageProcessor"])
def test_image_processors(name):
    from PIL import Image

    made = getattr(transformers, name)
    size = {"height": 16, "width": 16} if name.startswith("ViT") else {"shortest_edge": 18}
    plain = made(size=size) if name.startswith("ViT") else made(size=size, crop_size={"height": 16, "width": 16})
    processor = RICSImageProcessor(plain, CropSelector(20))
    array = torch.randint(0, 256, (30, 26, 3), dtype=torch.uint8)
    photo = Image.fromarray(array.numpy())
    out = processor([photo, array.movedim(-1, 0)], return_tensors="pt").pixel_values
    assert out.shape == (2, 3, 16, 16)
    assert torch.equal(out[0], out[1])
    crop = CropSelector(20)(array.movedim(-1, 0)[None])[0][0]
    squared = Image.fromarray((crop * 255).round().to(torch.uint8).movedim(0, -1).numpy())
    expected = made(size={"height": 16, "width": 16}, do_center_crop=False)(squared, return_tensors="pt").pixel_values
    if not name.startswith("ViT"):
        torch.testing.assert_close(out[:1], expected)
    assert processor(photo, return_tensors="pt").pixel_values.shape == (1, 3, 16, 16)
    assert RICSImageProcessor(plain, CropSelector(20), window=24)(photo, return_tensors="pt").pixel_values.shape[0] == 1
    assert processor.image_mean == plain.image_mean
    assert torch.equal(processor.preprocess(photo, return_tensors="pt").pixel_values, out[:1])
    floats = array.movedim(-1, 0).numpy() / 255
    assert torch.equal(processor([floats], return_tensors="pt").pixel_values, out[:1])


def test_a_pipeline_takes_the_processor():
    from PIL import Image

    net = transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL)).eval()
    processor = RICSImageProcessor(
        transformers.ViTImageProcessor(size={"height": 16, "width": 16}), CropSelector((20, 18))
    )
    photo = Image.fromarray(torch.randint(0, 256, (30, 26, 3), dtype=torch.uint8).numpy())
    classify = transformers.pipeline("image-classification", model=net, image_processor=processor)
    best = net(**processor(photo, return_tensors="pt")).logits.softmax(-1).max().item()
    assert classify(photo)[0]["score"] == pytest.approx(best, abs=1e-6)


def test_compiles(without_shape_checks):
    x, selector = torch.rand(2, 1, 24, 24), CropSelector(16)
    expected, found = selector(x), torch.compile(selector, backend="eager")(x)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def naive_report(model, images, n, t, kind):
    agree = []
    top = (images.shape[-1] - n) // 2
    centre = images[..., top : top + n, top : top + n]
    for dy, dx in itertools.product(range(-t, t + 1), repeat=2):
        if kind == "realistic":
            x = images[..., top + dy : top + dy + n, top + dx : top + dx + n]
        elif kind == "cyclic":
            x = centre.roll((-dy, -dx), (2, 3))
        else:
            x = torch.zeros_like(centre)
            for r, c in itertools.product(range(n), repeat=2):
                if 0 <= r + dy < n and 0 <= c + dx < n:
                    x[..., r, c] = centre[..., r + dy, c + dx]
        agree.append(model(x).argmax(1))
    found = torch.stack(agree, 1)
    return found, found == found[:, len(agree) // 2, None]


@pytest.mark.parametrize("kind", ["realistic", "zero", "cyclic"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_report_equals_a_loop_over_offsets(kind, wrapped):
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * (64 if wrapped else 144), 6))
    model = RICSModel(net, CropSelector(8)) if wrapped else net
    images = torch.rand(20, 3, 16, 16)
    report = translation_report(model, images, torch.arange(20) % 6, max_shift=2, kind=kind, window=12, batch_size=7)
    predictions, agrees = naive_report(model, images, 12, 2, kind)
    assert torch.equal(report.predictions, predictions)
    assert torch.equal(report.agrees, agrees)
    assert report.fooled.any()
    assert report.accuracy == (predictions[:, 12] == torch.arange(20) % 6).double().mean().item()
    assert report.adversarial_consistency == pytest.approx(agrees.all(1).double().mean().item())
    moved = torch.cat([agrees[:, :12], agrees[:, 13:]], 1)
    assert report.mean_consistency == pytest.approx(moved.double().mean().item())
    assert report.per_offset()[(0, 0)] == 1
    if wrapped and kind == "realistic":
        assert 0 < report.same_crop_rate < 1
        assert bool((report.agrees | ~report.same_crop).all())


def test_cyclic_report_is_never_fooled():
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 144, 6))
    images = torch.rand(20, 3, 12, 12)
    report = translation_report(RICSModel(net, CropSelector(12, circular=True)), images, kind="cyclic", max_shift=3)
    assert report.adversarial_consistency == report.same_crop_rate == 1
    assert translation_report(net, images, kind="cyclic").adversarial_consistency < 1


def test_equal_crops_are_computed_once():
    seen = []

    class Net(nn.Module):
        def forward(self, x):
            seen.append(len(x))
            return x.flatten(1)[:, :4]

    report = translation_report(RICSModel(Net(), CropSelector(8)), torch.rand(5, 3, 30, 30))
    assert sum(seen) < 5 * 9 / 2
    assert report.agrees.shape == (5, 9)


SPOT = torch.rand(1, 3, 8, 8)
SPOT[0, 1, 0, 0] = torch.nan
PROCESSOR = RICSImageProcessor(transformers.ViTImageProcessor(size={"height": 16, "width": 16}), CropSelector(20))


def spoilt(x):
    return x.flatten(1) * torch.nan


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        # the score sees the middle of a crop alone, the classifier all of it
        (lambda: CropSelector(6)(SPOT), ValueError, "NaN"),
        (lambda: CropSelector(6)(SPOT.nan_to_num(torch.inf)), ValueError, "infinite"),
        (lambda: CropSelector(6)(torch.full((1, 3, 8, 8), 300)), ValueError, "0..255"),
        (lambda: CropSelector(6)(torch.full((1, 3, 8, 8), -1, dtype=torch.int16)), ValueError, "0..255"),
        (lambda: CropSelector(6)(torch.rand(1, 0, 8, 8)), ValueError, "at least one channel"),
        (lambda: CropSelector(6)(SPOT.numpy()), TypeError, "ndarray"),
        (lambda: CropSelector(2.5), ValueError, "positive int"),
        (lambda: CropSelector(True), ValueError, "positive int"),
        (lambda: RICSModel(nn.Flatten(), 5), TypeError, "CropSelector"),
        (lambda: RICSModel("resnet", CropSelector(5)), TypeError, "model must be"),
        (lambda: RICSModel(nn.Flatten(), CropSelector(5), mean=(0.5,), std=(0.0,)), ValueError, "positive"),
        (lambda: RICSModel(nn.Flatten(), CropSelector(5), mean=0.5, std=0.5), TypeError, "one number per channel"),
        (
            lambda: RICSModel(nn.Flatten(), CropSelector(5), mean=(0.5,), std=(0.5,))(255 * torch.rand(1, 3, 8, 8)),
            ValueError,
            "0..1",
        ),
        (lambda: PROCESSOR(255 * torch.rand(3, 30, 30)), ValueError, "scale them to 0..1"),
        (lambda: PROCESSOR(torch.rand(30, 30, 4).numpy()), ValueError, "1 or 3 channels"),
        (lambda: PROCESSOR("photo.jpg"), TypeError, "str"),
        (lambda: consistency_bound(8, 4, 1.5), ValueError, "whole numbers"),
        (lambda: crop_size_for((8, 8), 0.5), ValueError, "one number"),
        (lambda: translation_report(spoilt, torch.rand(2, 3, 8, 8)), ValueError, "NaN"),
        (lambda: translation_report(nn.Flatten(), SPOT), ValueError, "NaN"),
        (lambda: translation_report(lambda x: x.flatten(1)[:, :1], torch.rand(2, 3, 8, 8)), ValueError, "one logit"),
        (lambda: translation_report(lambda x: x.flatten(1)[:1], torch.rand(2, 3, 8, 8)), ValueError, "2 images"),
        (lambda: translation_report(lambda x: None, torch.rand(2, 3, 8, 8)), ValueError, "NoneType"),
        (lambda: translation_report(lambda x: (x.flatten(1),), torch.rand(2, 3, 8, 8)), ValueError, "tuple"),
        (lambda: translation_report(lambda x: {"logits": x}, torch.rand(2, 3, 8, 8)), ValueError, r"\(B, K\)"),
        (lambda: translation_report(nn.Flatten(), torch.rand(2, 3, 8, 8), similarity=2), ValueError, "-1..1"),
        (
            lambda: translation_report(spoilt, torch.rand(2, 3, 8, 8), torch.zeros(2), similarity=0.9),
            ValueError,
            "belong to classes",
        ),
        (lambda: CropSelector(9)(torch.rand(1, 3, 8, 8)), ValueError, "larger than the image"),
        (lambda: CropSelector(0), ValueError, "positive int"),
        (lambda: CropSelector(2)(torch.rand(1, 3, 8, 8)), ValueError, "smaller than the 3 x 3 kernel"),
        (lambda: CropSelector(5, "sobel"), ValueError, "random3x3, laplacian"),
        (lambda: CropSelector(5, 3), TypeError, "a module or a callable"),
        (lambda: CropSelector(5, lambda x: x[:, 0])(torch.rand(1, 3, 8, 8)), ValueError, r"shape \(1, 4, 4\)"),
        (lambda: CropSelector(5)(torch.full((1, 3, 8, 8), torch.nan)), ValueError, "NaN"),
        (lambda: CropSelector(5)(torch.rand(3, 8, 8)), ValueError, r"shape \(B, C, H, W\)"),
        (lambda: CropSelector(5)(torch.ones(1, 3, 8, 8, dtype=torch.bool)), TypeError, "0..255"),
        (lambda: take_crops(torch.rand(1, 3, 8, 8), torch.tensor([[4, 0]]), 5), ValueError, "must lie in"),
        (lambda: consistency_bound(8, 9), ValueError, "larger than the image"),
        (lambda: crop_size_for(8, 1.5), ValueError, "0..1"),
        (lambda: RICSModel(nn.Identity(), CropSelector(5), mean=(0.5,)), ValueError, "belong together"),
        (lambda: RICSModel(nn.Identity(), CropSelector(5), interpolation="area"), ValueError, "bicubic"),
        (
            lambda: RICSModel(nn.Flatten(), CropSelector(5), mean=(0.5,) * 4, std=(1.0,) * 4)(torch.rand(1, 3, 8, 8)),
            ValueError,
            "3 values",
        ),
        (lambda: translation_report(nn.Flatten(), torch.rand(1, 3, 2, 2)), ValueError, "no room"),
        (lambda: translation_report(nn.Flatten(), torch.rand(2, 3, 8, 8), torch.zeros(3)), ValueError, "labels"),
        (lambda: translation_report(nn.Flatten(), torch.rand(2, 3, 8, 8), kind="rotate"), ValueError, "'cyclic'"),
        (lambda: translation_report(nn.Flatten(), torch.rand(2, 3, 8, 8), window=8), ValueError, "10 or more"),
        (lambda: translation_report(nn.Identity(), torch.rand(2, 3, 8, 8)), ValueError, "logits or features"),
        (lambda: RICSImageProcessor(lambda x: x, CropSelector(20), window=10), ValueError, "smaller than the crop"),
    ],
)
def test_wrong_inputs(call, error, words, without_shape_checks):
    with pytest.raises(error, match=words):
        call()

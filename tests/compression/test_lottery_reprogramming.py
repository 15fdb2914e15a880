"""Prompts, label mapping and calibration; tickets and transfer have files of their own beside this one."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch.nn import functional as F

from torchgraft.compression.lottery_reprogramming import (
    IterativeLabelMapping,
    VisualPrompt,
    expected_calibration_error,
    fit_temperature,
    frequency_label_mapping,
    map_logits,
    mapping_counts,
    prepare_images,
    random_label_mapping,
    reliability,
    reliability_diagram,
)
from torchgraft.compression.lottery_reprogramming.prompting import IMAGENET_MEAN, IMAGENET_STD

# landskape-ai/Reprogram_LT at 2553baddb36cacadcae7309006ba7d1b23bcfe9e, run on the inputs of the tests below:
# first channel of ExpansiveVisualPrompt(5, zeros(2, 2)) and of its program's gradient, channel 1 of
# AdditiveVisualPrompt(4, 1), and the pairs of predictive_distribution_based_multi_label_mapping.
EXPANSIVE = [
    0.5, 0.698775, 0.712856, 0.535222, 0.319341, 0.277094, 0.430597, 0.658583, 0.728961, 0.601596, 0.367253, 0.268943,
    1.0, 0.540302, 0.729208, 0.657075, 0.428517, 0.416147, 0.989992, 0.537399, 0.713602, 0.69776, 0.497787, 0.300226,
    0.287905,
]  # fmt: skip
GRADIENT = [
    0.25, 0.113727, -0.085182, -0.24627, -0.142077, 0.056821, 0.235418, 0.169516, -0.028747, -0.218378, -0.194982,
    0.00087, 0.0, 0.0, 0.027001, -0.171178, -0.234521, 0.0, 0.0, 0.245793, 0.083401, -0.115511, -0.249985, -0.111943,
    0.086963,
]  # fmt: skip
ADDITIVE = [
    0.212097, -0.461397, -0.250987, 0.649877, 1.412945, 0.5, 0.5, -0.34622, -0.405578, 0.5, 0.5, 1.456376, 0.770906,
    -0.163634, -0.488032, 0.095962,
]  # fmt: skip
COUNTS = [[0, 2, 4, 1], [3, 0, 2, 4], [1, 3, 0, 2], [4, 1, 3, 0], [2, 4, 1, 3], [0, 2, 4, 1]]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def plain(*args, **kwargs):
    return VisualPrompt(*args, mean=None, std=None, **kwargs)


# --- prompts


def test_expansive_prompt_is_the_official_one():
    prompt = plain(5, 2)
    prompt.load_state_dict({"program": torch.sin(torch.arange(75.0)).view(3, 5, 5), "mask": prompt.mask})
    out = prompt(torch.cos(torch.arange(12.0)).abs().view(1, 3, 2, 2))
    (out * torch.cos(torch.arange(75.0)).view(1, 3, 5, 5)).sum().backward()
    torch.testing.assert_close(out[0, 0].flatten(), torch.tensor(EXPANSIVE), atol=1e-6, rtol=0)
    torch.testing.assert_close(prompt.program.grad[0].flatten(), torch.tensor(GRADIENT), atol=1e-6, rtol=0)


def test_additive_prompt_is_the_official_one_but_leaves_images_alone():
    prompt = plain(4, mode="additive", pad=1)
    prompt.program.data = torch.sin(torch.arange(48.0)).view(3, 4, 4)
    x = torch.full((1, 3, 4, 4), 0.5)
    torch.testing.assert_close(prompt(x)[0, 1].flatten(), torch.tensor(ADDITIVE), atol=1e-6, rtol=0)
    assert bool((x == 0.5).all())


def test_where_the_image_lies():
    x = torch.ones(1, 3, 8, 8)
    mask = plain(16, 8).mask
    assert mask[0, 4:12, 4:12].sum() == 0
    assert mask.sum() == 3 * (16**2 - 8**2)
    out = plain(16, 8)(x)
    assert torch.equal(out[:, :, 4:12, 4:12], x)
    assert bool((out[:, :, mask[0] == 1] == 0.5).all())
    # an odd frame has its extra pixel left and above
    odd = plain(16, 7)(torch.ones(1, 3, 7, 7))
    assert (odd[0, 0] == 1).nonzero().min() == 5
    assert (odd[0, 0] == 1).nonzero().max() == 11


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 7), st.booleans())
def test_only_the_frame_learns(inside, frame, random):
    prompt = plain(inside + frame, inside, init="randn" if random else "zero")
    x = torch.rand(2, 3, inside, inside, requires_grad=True)
    out = prompt(x)
    out.square().sum().backward()
    learns = prompt.mask.bool()
    assert bool((prompt.program.grad[~learns] == 0).all())
    assert bool((prompt.program.grad[learns] != 0).all())
    # every image pixel arrives once, untouched
    torch.testing.assert_close(x.grad, 2 * x.detach())


def test_additive_border():
    prompt = plain(7, mode="additive", pad=2)
    assert prompt.mask[0, 2:5, 2:5].sum() == 0
    assert prompt.mask.sum() == 3 * (49 - 9)
    assert plain(6, mode="additive", pad=3).mask.all()
    x = torch.rand(2, 3, 7, 7)
    assert torch.equal(prompt(x), x)  # starts from nothing


def test_normalisation_comes_last():
    x = torch.rand(2, 3, 4, 4)
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    torch.testing.assert_close(VisualPrompt(8, 4)(x), (plain(8, 4)(x) - mean) / std)
    additive = VisualPrompt(4, mode="additive", pad=1, init="randn")
    torch.testing.assert_close(additive(x), (x + additive.program * additive.mask - mean) / std)


def test_gradient_against_finite_differences():
    prompt = VisualPrompt(5, 2, init="randn").double()
    x = torch.rand(2, 3, 2, 2, dtype=torch.float64)

    def out(program):
        return torch.func.functional_call(prompt, {"program": program}, (x,))

    assert torch.autograd.gradcheck(out, prompt.program.detach().requires_grad_())


def test_grey_prompt_and_repr():
    prompt = plain(6, 4, channels=1)
    assert prompt(torch.rand(2, 1, 4, 4)).shape == (2, 1, 6, 6)
    assert "in_size=4" in repr(prompt)
    assert "pad=2" in repr(plain(6, mode="additive", pad=2))


def test_from_an_image_processor():
    from transformers import ViTImageProcessor

    processor = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5, 0.4, 0.3], image_std=[0.2] * 3)
    prompt = VisualPrompt.from_processor(processor, in_size=16)
    assert (prompt.out_size, prompt.in_size, prompt.mean) == (32, 16, (0.5, 0.4, 0.3))
    bare = VisualPrompt.from_processor(ViTImageProcessor(size={"height": 8, "width": 8}, do_normalize=False), 4)
    assert bare.mean is None
    with pytest.raises(ValueError, match="not one square"):
        VisualPrompt.from_processor(ViTImageProcessor(size={"height": 32, "width": 16}))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"out_size": 8, "in_size": 9}, "in_size must be positive and smaller than out_size=8"),
        ({"out_size": 8, "in_size": 8}, "no pixel is left to learn"),
        ({"out_size": 8, "in_size": 4, "pad": 2}, "pad belongs to"),
        ({"out_size": 8, "mode": "additive"}, "needs pad="),
        ({"out_size": 8, "mode": "additive", "pad": 5}, "pad must lie in 1..4"),
        ({"out_size": 8, "in_size": 4, "mode": "additive", "pad": 1}, "takes images of out_size=8"),
        ({"out_size": 8, "in_size": 4, "mode": "other"}, "mode must be"),
        ({"out_size": 8, "in_size": 4, "init": "ones"}, "init must be"),
        ({"out_size": 8, "in_size": 4, "mean": None}, "go together"),
        ({"out_size": 8, "in_size": 4, "channels": 1}, "one number per channel"),
        ({"out_size": 0, "in_size": 4}, "must be positive"),
    ],
)
def test_prompts_refuse(kwargs, message, without_shape_checks):
    with pytest.raises(ValueError, match=message):
        VisualPrompt(**kwargs)


@pytest.mark.parametrize("bad", [-0.2, 1.7, math.nan])
def test_images_outside_zero_to_one_are_refused(bad):
    x = torch.rand(2, 3, 4, 4)
    x[0, 0, 0, 0] = bad
    with pytest.raises(ValueError, match=r"must lie in 0\.\.1 before normalisation"):
        plain(8, 4)(x)
    with pytest.raises(ValueError, match=r"must lie in 0\.\.1"):
        prepare_images(x, 4)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match="prepare_images resizes"):
        plain(8, 4)(torch.rand(2, 3, 5, 5))


def test_preparing_images():
    grey = torch.randint(0, 256, (2, 1, 4, 4), dtype=torch.uint8)
    with pytest.warns(UserWarning, match="repeated to 3 channels"):
        out = prepare_images(grey, 4)
    assert torch.equal(out, (grey.float() / 255).expand(-1, 3, -1, -1))
    # halving averages every 2 x 2 block where the filter is a triangle of two pixels: check against PIL's definition
    ramp = torch.arange(8.0).view(1, 1, 1, 8).expand(1, 1, 8, 8) / 8
    small = prepare_images(ramp, 4, channels=1)
    torch.testing.assert_close(small[0, 0, 0, 1:3], torch.tensor([2.5, 4.5]) / 8)
    assert bool((small >= 0).all() and (small <= 1).all())


def test_preparing_refuses(without_shape_checks):
    with pytest.raises(TypeError, match=r"torch\.int64"):
        prepare_images(torch.zeros(1, 3, 4, 4, dtype=torch.long), 4)
    with pytest.raises(ValueError, match="have 4 channels, wanted 3"):
        prepare_images(torch.zeros(1, 4, 4, 4), 4)
    with pytest.raises(ValueError, match="shape"):
        prepare_images(torch.zeros(3, 4, 4), 4)
    with pytest.raises(ValueError, match="size must be"):
        prepare_images(torch.zeros(1, 3, 4, 4), 0)


# --- label mapping


def naive_mapping(counts, per_class):
    """The definition: again and again the largest entry whose row is free and whose column is not full."""
    rows, columns = counts.shape
    chosen, used = [[] for _ in range(columns)], set()
    while any(len(c) < per_class for c in chosen):
        best = None
        for s in range(rows):
            for t in range(columns):
                open_cell = s not in used and len(chosen[t]) < per_class
                if open_cell and (best is None or counts[s, t] > counts[best]):
                    best = s, t
        used.add(best[0])
        chosen[best[1]].append(best[0])
    return torch.tensor([sorted(c) for c in chosen])


def test_mapping_is_the_official_one():
    counts = torch.tensor(COUNTS)
    assert frequency_label_mapping(counts).tolist() == [3, 4, 0, 1]
    assert frequency_label_mapping(counts[:, :3], per_class=2).tolist() == [[1, 3], [2, 4], [0, 5]]


def test_counts_are_the_official_ones():
    # get_dist_matrix, at the same commit
    logits, y = torch.sin(torch.arange(240.0) * 1.3).view(40, 6), (torch.arange(40) * 7) % 4
    expected = [[0, 0, 3, 1], [2, 0, 0, 5], [6, 0, 0, 1], [2, 6, 0, 0], [0, 4, 5, 0], [0, 0, 2, 3]]
    assert mapping_counts(logits, y, 4).tolist() == expected
    assert frequency_label_mapping(logits, y, 4).tolist() == [2, 3, 4, 1]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 4), st.integers(0, 3), st.integers(0, 10**6))
def test_mapping_equals_the_definition_with_ties_and_empty_columns(columns, per_class, spare, high, seed):
    torch.manual_seed(seed)
    counts = torch.randint(0, high + 1, (columns * per_class + spare, columns))
    before = counts.clone()
    found = frequency_label_mapping(counts, per_class=per_class)
    assert torch.equal(found.view(columns, per_class), naive_mapping(counts, per_class))
    assert len(found.unique()) == columns * per_class
    assert torch.equal(counts, before)


def test_greedy_is_not_the_best_assignment():
    counts = torch.tensor([[10, 9], [9, 0]])
    greedy = frequency_label_mapping(counts)
    rows, columns = linear_sum_assignment(counts.numpy(), maximize=True)
    assert greedy.tolist() == [0, 1]
    assert counts[greedy, torch.arange(2)].sum() == 10
    assert counts[rows, columns].sum() == 18


def test_counts_with_absent_classes():
    logits = F.one_hot(torch.tensor([3, 3, 1, 0]), 5).float()
    y = torch.tensor([0, 0, 2, 2])
    counts = mapping_counts(logits, y, 4)
    expected = torch.zeros(5, 4, dtype=torch.long)
    expected[3, 0], expected[1, 2], expected[0, 2] = 2, 1, 1
    assert torch.equal(counts, expected)
    # classes 1 and 3 have no example: they get what is left, lowest first
    assert frequency_label_mapping(logits, y, 4).tolist() == [3, 1, 0, 2]


def test_reading_mapped_logits():
    logits = torch.randn(4, 6)
    assert torch.equal(map_logits(logits, torch.tensor([5, 0])), logits[:, [5, 0]])
    pairs = map_logits(logits, torch.tensor([[0, 1], [4, 5]]))
    torch.testing.assert_close(pairs, torch.stack([logits[:, :2].mean(1), logits[:, 4:].mean(1)], 1))


def test_random_mapping_is_distinct_and_seeded():
    one, two = (random_label_mapping(20, 6, 3, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(one, two)
    assert one.shape == (6, 3)
    assert len(one.unique()) == 18
    torch.manual_seed(0)
    assert random_label_mapping(20, 6).shape == (6,)


def test_intervals_of_iterative_mapping():
    assert [e for e in range(7) if IterativeLabelMapping(3).due(e)] == [0, 3, 6]
    with pytest.raises(ValueError, match="interval"):
        IterativeLabelMapping(0)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.zeros(3, 4, dtype=torch.long),), "4 target classes with 1 source classes each need 4"),
        ((torch.zeros(3, 2, dtype=torch.long), None, None, 2), "need 4 source classes, but the network has 3"),
        ((torch.tensor([[-1]]),), "must not be negative"),
        ((torch.zeros(2, 3),), "need y and num_classes"),
        ((torch.zeros(2, 3), torch.tensor([0, 3]), 3), r"must lie in 0\.\.2, got 0\.\.3"),
        ((torch.zeros(2, 3), torch.tensor([0, -1]), 3), r"must lie in 0\.\.2"),
        ((torch.zeros(2, 3), torch.tensor([0]), 3), "one label per example"),
        ((torch.zeros(3, 2, dtype=torch.long), torch.tensor([0, 1, 1]), 2), "already hold y"),
        ((torch.zeros(3, 2, dtype=torch.long), None, None, 0), "at least 1"),
    ],
)
def test_mapping_refuses(args, message, without_shape_checks):
    with pytest.raises(ValueError, match=message):
        frequency_label_mapping(*args)


def test_labels_must_be_whole_numbers(without_shape_checks):
    with pytest.raises(TypeError, match="whole numbers"):
        mapping_counts(torch.zeros(2, 3), torch.tensor([0.0, 1.0]), 3)


# --- calibration


def test_ece_by_hand():
    # bins of a fifth: (0.6, 0.8] holds 0.7 and 0.8, one right; (0.8, 1] holds 0.9 and 1, both right; (0.4, 0.6] 0.6
    top = torch.tensor([0.7, 0.8, 0.9, 1.0, 0.6], dtype=torch.float64)
    probs = torch.stack([top, 1 - top], 1)
    y = torch.tensor([0, 1, 0, 0, 1])
    expected = (2 * abs(0.5 - 0.75) + 2 * abs(1 - 0.95) + 1 * abs(0 - 0.6)) / 5
    assert expected_calibration_error(probs, y, bins=5).item() == pytest.approx(expected, abs=1e-12)
    found = reliability(probs, y, bins=5)
    assert found.counts.tolist() == [0, 0, 1, 2, 2]
    assert found.accuracy[3:].tolist() == [0.5, 1]
    assert found.accuracy[:2].isnan().all()


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_sure_classifier(bins):
    probs = F.one_hot(torch.zeros(8, dtype=torch.long), 3).double()
    y = torch.tensor([0, 0, 0, 0, 0, 1, 2, 1])
    assert expected_calibration_error(probs, y, bins).item() == pytest.approx(3 / 8)


def test_calibrated_classifier_has_almost_no_error():
    probs = (2 * torch.randn(100_000, 4)).softmax(1)
    y = torch.multinomial(probs, 1)[:, 0]
    assert expected_calibration_error(probs, y).item() < 0.01
    # and one that is too sure does not
    sharp = probs.pow(3) / probs.pow(3).sum(1, keepdim=True)
    assert expected_calibration_error(sharp, y).item() > 0.1


def test_ece_against_a_plain_loop():
    probs = torch.randn(300, 6, dtype=torch.float64).softmax(1)
    y = torch.randint(0, 6, (300,))
    total = 0.0
    for b in range(12):
        inside = [i for i in range(300) if b / 12 < probs[i].max().item() <= (b + 1) / 12]
        right = sum(int(probs[i].argmax() == y[i]) for i in inside)
        total += abs(right - sum(probs[i].max().item() for i in inside))
    assert expected_calibration_error(probs, y, 12).item() == pytest.approx(total / 300, abs=1e-12)


def test_ece_of_probabilities_is_that_of_the_official_package():
    # calibration.get_ece of uncertainty-calibration 0.1.4, which the official scripts import, given probabilities
    probs = (2 * torch.sin(torch.arange(1000.0) * 1.9)).view(200, 5).softmax(1)
    y = (torch.arange(200) * 3) % 5
    assert expected_calibration_error(probs, y, 15).item() == pytest.approx(0.3620107, abs=1e-6)
    assert expected_calibration_error(probs, y, 10).item() == pytest.approx(0.3620107, abs=1e-6)


def test_the_published_number_is_no_calibration_error():
    # logits instead of probabilities, and the mean over examples of the error of batches: the official scripts
    logits = 3 * torch.randn(256, 5)
    y = torch.randint(0, 5, (256,))
    with pytest.raises(ValueError, match="softmax"):
        expected_calibration_error(logits, y)
    probs = logits.softmax(1)
    whole = expected_calibration_error(probs, y).item()
    batches = sum(expected_calibration_error(p, t).item() for p, t in zip(probs.split(32), y.split(32), strict=True))
    assert batches / 256 < whole / 10
    assert batches / 8 > whole


def test_calibration_refuses(without_shape_checks):
    probs = torch.full((2, 2), 0.5)
    with pytest.raises(ValueError, match=r"must lie in 0\.\.1"):
        expected_calibration_error(probs, torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="bins"):
        expected_calibration_error(probs, torch.tensor([0, 1]), 0)
    with pytest.raises(ValueError, match="shape"):
        expected_calibration_error(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long))
    with pytest.raises(ValueError, match="probabilities"):
        expected_calibration_error(torch.full((2, 2), math.nan), torch.tensor([0, 1]))


def test_temperature_is_the_minimum_of_the_likelihood():
    logits = 3 * torch.randn(400, 5, dtype=torch.float64)
    y = torch.multinomial((logits / 3).softmax(1), 1)[:, 0]
    t = fit_temperature(logits, y)
    assert t == pytest.approx(3, rel=0.2)

    def nll(value):
        return F.cross_entropy(logits / value, y).item()

    assert nll(t) <= min(nll(t * 1.01), nll(t / 1.01))


def test_temperature_without_a_minimum():
    logits = torch.eye(3)
    with pytest.warns(UserWarning, match="no temperature"):
        assert fit_temperature(logits, torch.arange(3)) == pytest.approx(0.001)
    with pytest.warns(UserWarning, match="no temperature"):
        assert fit_temperature(torch.zeros(3, 3), torch.arange(3)) == pytest.approx(0.001)
    with pytest.warns(UserWarning, match="no temperature"):
        assert fit_temperature(-logits, torch.arange(3)) == pytest.approx(1000)
    with pytest.raises(ValueError, match="finite"):
        fit_temperature(torch.full((1, 2), math.inf), torch.tensor([0]))


def test_reliability_diagram_shows_what_was_measured():
    probs = torch.randn(200, 4).softmax(1)
    y = torch.randint(0, 4, (200,))
    figure = reliability_diagram(probs, y, bins=10)
    top, bottom = figure.axes
    assert sum(bar.get_height() for bar in bottom.patches) == 200
    found = reliability(probs, y, bins=10)
    drawn = torch.tensor(top.lines[1].get_ydata())
    torch.testing.assert_close(drawn, found.accuracy[found.counts > 0])
    assert "ECE" in top.get_title()
    assert reliability_diagram(probs, y, title="mine").axes[0].get_title() == "mine"

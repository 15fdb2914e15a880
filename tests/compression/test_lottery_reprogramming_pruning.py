"""Tickets, their controls, quantisation, and pruned models in files."""

import copy
import itertools
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from torchgraft.compression.lottery_reprogramming import (
    LinearProbe,
    ReprogrammedClassifier,
    VisualPrompt,
    apply_masks,
    lottery_ticket,
    magnitude_prune,
    make_permanent,
    prunable_weights,
    quantize_weights,
    random_masks,
    sparsity_report,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def network():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 5)
    )


def state_of(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def train(model, steps=3):
    x, y = torch.rand(20, 3, 6, 6), torch.arange(20) % 5
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


# --- tickets


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("rewind", [True, False])
def test_rounds_keep_four_fifths_of_what_is_left(scope, rewind):
    model = network()
    early = state_of(model)
    tickets = lottery_ticket(model, train, 5, rewind_to=early if rewind else None, scope=scope)
    total = 6 * 8 * 9 + 32 * 5
    assert [t.round for t in tickets] == list(range(6))
    assert not tickets[0].masks
    for before, ticket in itertools.pairwise(tickets):
        assert ticket.kept == pytest.approx(0.8**ticket.round, abs=6 / total)
        for name, mask in ticket.masks.items():
            # exact zeros, after momentum and weight decay too, and nothing else is zero
            assert torch.equal(ticket.state[name] == 0, ~mask)
            if before.masks:
                assert not (mask & ~before.masks[name]).any(), "a pruned weight came back"
            if scope == "layer":
                assert mask.double().mean().item() == pytest.approx(0.8**ticket.round, abs=3 / mask.numel())
    assert same(state_of(model), {name: tickets[-1].state[name] for name in early})
    assert early.keys() == tickets[-1].state.keys()


def test_masks_are_those_of_the_definition():
    """A naive form: rank what is left by magnitude after training, take away the least, go back, train again."""
    model, naive = network(), network()
    naive.load_state_dict(model.state_dict())
    early = state_of(model)
    names = ["3.weight", "6.weight"]
    finals = []

    def deterministic(m):
        torch.manual_seed(1)
        train(m)

    tickets = lottery_ticket(model, deterministic, 3, rate=0.3, rewind_to=early)
    masks = {name: torch.ones_like(early[name]) for name in names}
    for number in range(4):
        naive.load_state_dict(early)
        torch.manual_seed(1)
        x, y = torch.rand(20, 3, 6, 6), torch.arange(20) % 5
        optimizer = torch.optim.AdamW(naive.parameters(), lr=0.01, weight_decay=0.1)
        naive.train()
        weights = dict(naive.named_parameters())
        for _ in range(3):
            with torch.no_grad():
                for name in names:
                    weights[name].mul_(masks[name])
            optimizer.zero_grad()
            F.cross_entropy(naive(x), y).backward()
            for name in names:
                weights[name].grad.mul_(masks[name])
            optimizer.step()
        finals.append({name: weights[name].detach() * masks[name] for name in names})
        for name in names:
            torch.testing.assert_close(tickets[number].state[name], finals[-1][name], atol=1e-6, rtol=1e-5)
            if number:
                assert torch.equal(tickets[number].masks[name], masks[name].bool())
        left = torch.cat([finals[-1][name].abs()[masks[name] == 1] for name in names])
        threshold = left.sort().values[round(0.3 * len(left)) - 1]
        masks = {name: masks[name] * (finals[-1][name].abs() > threshold) for name in names}


def test_every_round_starts_from_the_early_weights():
    model = network()
    early = state_of(model)
    train(model)
    seen = []

    def watched(m):
        m.eval()
        m(torch.rand(1, 3, 6, 6))
        seen.append({name: (module.weight.detach().clone()) for name, module in prunable_weights(m).items()})
        assert torch.equal(m[1].running_mean, early["1.running_mean"])
        assert torch.equal(m[0].weight, early["0.weight"])
        train(m)

    tickets = lottery_ticket(model, watched, 2, rewind_to=early)
    for start, ticket in zip(seen, tickets, strict=True):
        for name, weight in start.items():
            mask = ticket.masks.get(name, torch.ones_like(weight, dtype=torch.bool))
            assert torch.equal(weight, early[name] * mask)


def test_without_rewinding_training_goes_on():
    model, seen = network(), []

    def watched(m):
        m(torch.rand(2, 3, 6, 6))
        seen.append(m[3].weight.detach().clone())
        train(m)

    tickets = lottery_ticket(model, watched, 2, keep=lambda n: n != 1)
    assert [t.round for t in tickets] == [0, 2]
    assert torch.equal(seen[1], tickets[0].state["3.weight"] * (seen[1] != 0))
    assert not torch.equal(seen[0] * (seen[1] != 0), seen[1])


def test_result_of_training_is_handed_on():
    results = iter("abc")
    assert [t.result for t in lottery_ticket(network(), lambda m: next(results), 2)] == ["a", "b", "c"]


def test_a_training_that_fails_leaves_a_plain_model():
    model = network()
    keys = set(model.state_dict())

    def fails(m):
        if "3.weight_orig" in m.state_dict():
            raise RuntimeError("no more memory")

    with pytest.raises(RuntimeError, match="no more memory"):
        lottery_ticket(model, fails, 2)
    assert set(model.state_dict()) == keys


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"rate": 1.0}, r"rate must be a share in \(0, 1\)"),
        ({"rounds": 60}, "would leave none of 592 weights"),
        ({"scope": "all"}, "scope must be"),
        ({"rewind_to": {}}, "must have the keys of model.state_dict"),
    ],
)
def test_tickets_refuse(change, message, without_shape_checks):
    model = network()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        lottery_ticket(model, train, **({"rounds": 2} | change))
    assert same(state_of(model), before)


def test_wrong_early_states_are_refused_and_change_nothing():
    model = network()
    before = state_of(model)
    for name, value, message in (
        ("6.weight", torch.zeros(4, 32), r"'6.weight' of shape \(4, 32\)"),
        ("6.bias", torch.full((5,), float("nan")), "'6.bias' that are not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            lottery_ticket(model, train, 2, rewind_to=before | {name: value})
    assert same(state_of(model), before)


def test_diverged_training_is_not_ranked():
    model = network()

    def diverges(m):
        with torch.no_grad():
            m[3].weight.fill_(float("inf"))

    with pytest.raises(ValueError, match=r"'3\.weight' has values that are not finite"):
        lottery_ticket(model, diverges, 2)


# --- one-shot pruning and masks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_one_shot_keeps_the_greatest_magnitudes(dtype, form):
    model = network().to(dtype).to(memory_format=form)
    old = state_of(model)
    masks = magnitude_prune(model, 0.25)
    both = torch.cat([old[name].flatten().abs() for name in ("3.weight", "6.weight")]).sort(descending=True).values
    assert sum(int(m.sum()) for m in masks.values()) == 148
    for name, mask in masks.items():
        assert torch.equal(model.state_dict()[name], old[name] * mask)
        assert bool((old[name].abs()[mask] >= both[147]).all())
        assert bool((old[name].abs()[~mask] <= both[147]).all())
    assert model[3].weight.is_contiguous(memory_format=form)
    assert torch.equal(model[0].weight, old["0.weight"])
    assert set(model.state_dict()) == set(old)


def test_layer_by_layer_and_keeping_all():
    model = network()
    for mask in magnitude_prune(model, 0.5, scope="layer", skip_first_conv=False).values():
        assert int(mask.sum()) == mask.numel() // 2
    whole = network()
    before = state_of(whole)
    assert all(bool(mask.all()) for mask in magnitude_prune(whole, 1.0).values())
    assert same(state_of(whole), before)


def test_the_official_count_of_sparsity():
    model = network()
    with torch.no_grad():
        model[0].weight.zero_()
        model[3].weight[:2].zero_()
        model[6].weight.zero_()
    report = sparsity_report(model, include_linear=False)
    assert report.layers == {"3.weight": (6 * 6 * 9, 8 * 6 * 9)}
    assert report.sparsity == 0.25
    assert "75.00% of 432" in str(report)
    assert sparsity_report(model).total == 592
    # torch's own pruning that is still active counts
    other = network()
    prune.random_unstructured(other[6], "weight", amount=40)
    assert sparsity_report(other).layers["6.weight"] == (120, 160)


def test_a_layer_that_dies_is_told():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[1].weight.mul_(1e-4)
    with pytest.warns(UserWarning, match=r"no weight is left of 1\.weight"):
        magnitude_prune(model, 0.5)


def test_pruning_refuses_and_changes_nothing(without_shape_checks):
    model = network()
    before = state_of(model)
    for kept, message in ((0, r"share in \(0, 1\]"), (1.2, r"share in \(0, 1\]"), (1e-4, "none of 592 weights")):
        with pytest.raises(ValueError, match=message):
            magnitude_prune(model, kept)
    with pytest.raises(ValueError, match="scope must be"):
        magnitude_prune(model, 0.5, scope="every")
    assert same(state_of(model), before)
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match=r"'0.weight' and '1.weight' are one tied parameter"):
        magnitude_prune(tied, 0.5)
    with pytest.raises(ValueError, match="no convolution or linear layer"):
        prunable_weights(nn.ReLU())
    with pytest.raises(ValueError, match="no convolution or linear layer"):
        prunable_weights(nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match="not a plain parameter"):
        magnitude_prune(nn.Sequential(nn.LazyLinear(3)), 0.5)
    with pytest.raises(ValueError, match="not a plain parameter"):
        magnitude_prune(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))), 0.5)
    broken = network()
    broken[6].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"'6\.weight' has values that are not finite"):
        magnitude_prune(broken, 0.5)


def test_masks_multiply_and_training_keeps_them():
    model = network()
    masks = magnitude_prune(copy.deepcopy(model), 0.3)
    old = state_of(model)
    apply_masks(model, {name: mask.float() for name, mask in masks.items()}, permanent=False)
    train(model)
    make_permanent(model)
    assert set(model.state_dict()) == set(old)
    for name, mask in masks.items():
        assert torch.equal(model.state_dict()[name] == 0, ~mask)
        assert not torch.equal(model.state_dict()[name], old[name] * mask)
    loaded = network()
    loaded.load_state_dict(old)
    apply_masks(loaded, masks)
    assert all(torch.equal(loaded.state_dict()[name], old[name] * mask) for name, mask in masks.items())


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({}, "masks is empty"),
        ({"6.wieght": torch.ones(5, 32)}, "no such weight; did you mean '6.weight'"),
        ({"module.model.conv1": torch.ones(1)}, "rename the keys"),
        ({"6.weight": torch.ones(32, 5)}, r"shape \(32, 5\), its weight \(5, 32\)"),
        ({"6.weight": torch.full((5, 32), float("nan"))}, "has NaN in it"),
        ({"6.weight": torch.full((5, 32), 0.5)}, "of 0 and 1 only"),
    ],
)
def test_wrong_masks_are_refused_and_change_nothing(masks, message):
    model = network()
    before = state_of(model)
    # a good one comes first: it must not have been applied
    good = {"3.weight": torch.zeros(8, 6, 3, 3)} if masks else {}
    with pytest.raises(ValueError, match=message):
        apply_masks(model, good | masks)
    assert same(state_of(model), before)


def test_random_masks_have_the_same_sparsity():
    masks = magnitude_prune(network(), 0.3)
    layer, again = random_masks(masks, 1), random_masks(masks, 1)
    for name, mask in masks.items():
        assert int(layer[name].sum()) == int(mask.sum())
        assert torch.equal(layer[name], again[name])
        assert not torch.equal(layer[name], mask)
    spread = random_masks(masks, 1, "global")
    assert sum(int(m.sum()) for m in spread.values()) == sum(int(m.sum()) for m in masks.values())
    assert [int(m.sum()) for m in spread.values()] != [int(m.sum()) for m in masks.values()]
    with pytest.raises(ValueError, match="masks is empty"):
        random_masks({}, 0, "global")


# --- quantisation


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("per_channel", [True, False])
def test_quantised_weights_are_the_nearest_on_the_grid(bits, per_channel):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 5, 2), nn.Linear(6, 7))
    magnitude_prune(model, 0.5, skip_first_conv=False)
    old = state_of(model)
    found = quantize_weights(model, bits, per_channel=per_channel)
    most = 2 ** (bits - 1) - 1
    for name, axis in (("0.weight", 0), ("1.weight", 1), ("2.weight", 0)):
        w = old[name].double()
        dims = [d for d in range(w.ndim) if d != axis]
        largest = w.abs().amax(dims, keepdim=True) if per_channel else w.abs().max()
        scale = largest / most
        expected = (w / scale).nan_to_num().round().clamp(-most, most) * scale
        new = model.state_dict()[name]
        torch.testing.assert_close(new, expected.float(), atol=1e-6, rtol=1e-5)
        assert bool((new[w == 0] == 0).all())
        assert found[name].error <= 0.5 + 1e-4
        assert found[name].scale.numel() == (w.shape[axis] if per_channel else 1)
    assert torch.equal(model[2].bias, old["2.bias"])


def test_quantisation_refuses_and_changes_nothing():
    model = network()
    model[6].weight.data[0, 0] = float("inf")
    before = state_of(model)
    with pytest.raises(ValueError, match=r"'6\.weight' has values that are not finite"):
        quantize_weights(model)
    with pytest.raises(ValueError, match=r"bits must lie in 2\.\.8"):
        quantize_weights(model, 16)
    assert same(state_of(model), before)
    zeros = nn.Linear(3, 2)
    nn.init.zeros_(zeros.weight)
    quantize_weights(zeros)
    assert bool((zeros.weight == 0).all())


# --- files


def test_a_pruned_model_gives_the_same_in_a_new_process_and_compiles(tmp_path):
    model = network()
    ticket = lottery_ticket(model, train, 3)[-1]
    model.eval()
    x, y = torch.rand(9, 3, 6, 6), torch.arange(9) % 3
    vp = ReprogrammedClassifier(model, VisualPrompt(6, 4), "ilm", 3).fit((x, y), 3)
    lp = LinearProbe(model, 3, size=6, seed=5).fit((x, y), 3)
    vp.calibrate(x, y)
    save_file(ticket.state, str(tmp_path / "ticket.safetensors"))
    save_file(ticket.masks, str(tmp_path / "masks.safetensors"))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    vp.save_adapter(tmp_path / "vp.safetensors")
    lp.save_adapter(tmp_path / "lp.safetensors")
    with torch.no_grad():
        answers = {"x": x, "net": model(x), "vp": vp.predict_proba(x), "lp": lp.predict_proba(x)}
    save_file(answers, str(tmp_path / "answers.safetensors"))
    code = f"""
import torch
from torch import nn
from safetensors.torch import load_file
from torchgraft.compression.lottery_reprogramming import *
at = {str(tmp_path)!r} + "/"
found = load_file(at + "answers.safetensors")
for state in (load_file(at + "ticket.safetensors"), torch.load(at + "state.pt", weights_only=True)):
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 5)
    ).eval()
    net.load_state_dict(state)
    masks = load_file(at + "masks.safetensors")
    assert all(torch.equal(net.state_dict()[name] != 0, mask) for name, mask in masks.items())
    vp = ReprogrammedClassifier(net, VisualPrompt(6, 4), "ilm", 3).load_adapter(at + "vp.safetensors")
    lp = LinearProbe(net, 3, size=6).load_adapter(at + "lp.safetensors")
    with torch.no_grad():
        assert torch.equal(net(found["x"]), found["net"])
    for name, model in (("vp", vp), ("lp", lp)):
        assert torch.equal(model.predict_proba(found["x"]), found[name])
assert abs(sparsity_report(net).kept - 0.8 ** 3) < 0.01
# here, since the shape checks of the tests cannot be traced
compiled = torch.compile(vp, backend="eager", fullgraph=True)
torch.testing.assert_close(compiled(found["x"]), vp(found["x"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-800:]


def test_a_pruned_transformers_model_goes_through_save_pretrained(tmp_path):
    from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=6, layer_type="basic")
    model = ResNetForImageClassification(config)
    early = state_of(model)

    def step(m):
        F.cross_entropy(m(torch.rand(4, 3, 32, 32)).logits, torch.arange(4)).backward()

    tickets = lottery_ticket(model, step, 4, rewind_to=early)
    model.eval().save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(x).logits, model(x).logits)
    assert sparsity_report(loaded).kept == pytest.approx(tickets[-1].kept)
    assert tickets[-1].kept == pytest.approx(0.8**4, abs=1e-3)

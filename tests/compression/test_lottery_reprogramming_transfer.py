"""Reprogrammed classifiers, linear probes, and the report over models, shots and methods."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchgraft import datasets, zoo
from torchgraft.compression.lottery_reprogramming import (
    IterativeLabelMapping,
    LinearProbe,
    ReprogrammedClassifier,
    VisualPrompt,
    few_shot_indices,
    frequency_label_mapping,
    magnitude_prune,
    map_logits,
    mapping_counts,
    plot_transfer,
    random_label_mapping,
    summarize_transfer,
    transfer_metrics,
    transfer_report,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def network(classes=8, channels=3):
    return nn.Sequential(
        nn.Conv2d(channels, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(24, 10), nn.ReLU(), nn.Linear(10, classes),
    ).eval()  # fmt: skip


def task(n=24, classes=3, size=6):
    """Images whose brightness tells the class."""
    y = torch.arange(n) % classes
    return ((torch.rand(n, 3, size, size) + y.view(-1, 1, 1, 1)) / (classes + 1)).clamp(0, 1), y


def state_of(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- visual prompts

# landskape-ai/Reprogram_LT at 2553baddb36cacadcae7309006ba7d1b23bcfe9e: the loop of experiments/cnn/ilm_vp.py without
# AMP, with its ExpansiveVisualPrompt and generate_label_mapping_by_frequency, on the network and images below
MAPPINGS = [[6, 4, 1], [1, 0, 2], [1, 0, 2], [1, 0, 2], [1, 0, 2], [1, 0, 2]]
LOSSES = [0.715469, 2.044653, 1.548332, 1.431488, 1.41316, 1.409555]
PROGRAM = [
    -0.05014, -0.69622, -0.62555, 0.69946, 0.71281, -0.75984, 0.23696, 0.49439, 0.82209, -0.70064, -0.91817, -0.83712,
    0.45017, -0.56449, 0.0, 0.0, 0.0, 0.0753, 0.86732, 0.64741, 0.0, 0.0, 0.0, 0.09371, 0.64324, -0.27906, 0.0, 0.0,
    0.0, -0.0278, -0.62983, -0.93075, -0.03142, -0.06132, -0.11147, -0.14463,
]  # fmt: skip
LOGITS = [[2.26667, 1.83844, -0.12161], [2.49709, 1.86192, 0.20287]]


def test_training_is_the_official_one():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(36, 7)).eval()
    with torch.no_grad():
        for k, p in enumerate(net.parameters()):
            p.copy_(torch.sin(torch.arange(p.numel()) * (0.7 + 0.3 * k) + k).view(p.shape) * 0.8)
        net[1].running_mean.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
        net[1].running_var.copy_(torch.tensor([1.0, 2.0, 0.5, 1.0]))
    x, y = (torch.sin(torch.arange(12 * 27.0) * 1.7) * 0.5 + 0.5).view(12, 3, 3, 3), torch.arange(12) % 3
    prompt = VisualPrompt(6, 3, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    model = ReprogrammedClassifier(net, prompt, "ilm", 3)
    mappings = [model.update_mapping((x, y)).tolist()]
    model.fit((x, y), 6, 0.3, batch_size=12, progress=lambda *_: mappings.append(model.mapping.tolist()))
    assert mappings[1:] == MAPPINGS
    assert mappings[0] == MAPPINGS[0]
    assert model.history_["loss"] == pytest.approx(LOSSES, abs=2e-5)
    found = (prompt.program * prompt.mask)[1].flatten()
    torch.testing.assert_close(found, torch.tensor(PROGRAM), atol=2e-3, rtol=0)
    torch.testing.assert_close(model(x[:2]), torch.tensor(LOGITS), atol=2e-3, rtol=0)


@pytest.mark.parametrize("mapping", ["ilm", "flm", "rlm", IterativeLabelMapping(2), IterativeLabelMapping(1, True)])
def test_the_backbone_stays_as_it_was_and_training_helps(mapping):
    net = network()
    before = state_of(net)
    x, y = task()
    model = ReprogrammedClassifier(net, VisualPrompt(10, 6), mapping, 3)
    first = None if model.fixed is False else F.cross_entropy(model(x), y).item()
    model.train()
    model.fit((x, y), 12, 0.1, batch_size=8)
    assert same(state_of(net), before)
    assert not net.training
    assert all(p.grad is None and not p.requires_grad for p in net.parameters())
    assert model.history_["loss"][-1] < (first or model.history_["loss"][0])
    inside = model.prompt.mask == 0
    assert bool((model.prompt.program[inside] == 0).all())
    assert len(model.history_["loss"]) == 12
    torch.testing.assert_close(model.predict_proba(x).sum(1), torch.ones(24))


def test_when_the_mapping_is_made():
    x, y = task()
    net = network()

    def mappings(kind, epochs=4):
        model, seen = ReprogrammedClassifier(net, VisualPrompt(10, 6), kind, 3), []

        def watch(*_):
            seen.append((model.mapping.clone(), model.prompt.program.detach().clone()))

        model.fit((x, y), epochs, 0.5, batch_size=24, progress=watch)
        return seen

    def best(program):
        prompt = VisualPrompt(10, 6)
        prompt.load_state_dict({"program": program, "mask": prompt.mask})
        return frequency_label_mapping(net(prompt(x)), y, 3)

    ilm, once = mappings("ilm"), mappings("flm")
    zero = torch.zeros_like(ilm[0][1])
    # before each epoch with the prompt of the one before
    for (found, _), program in zip(ilm, [zero, *(program for _, program in ilm)], strict=False):
        assert torch.equal(found, best(program))
    assert all(torch.equal(found, best(zero)) for found, _ in once)
    spaced = mappings(IterativeLabelMapping(2))
    assert torch.equal(spaced[1][0], spaced[0][0])
    assert torch.equal(spaced[2][0], best(spaced[1][1]))
    # one batch per epoch: counts of the training pass are those of the prompt before its step
    running = mappings(IterativeLabelMapping(running=True))
    assert torch.equal(running[1][0], best(zero))
    assert torch.equal(running[2][0], best(running[0][1]))


def test_mappings_given_or_random():
    net = network()
    x, y = task()
    rlm = ReprogrammedClassifier(net, VisualPrompt(10, 6), "rlm", 3, per_class=2, seed=7)
    expected = random_label_mapping(8, 3, 2, torch.Generator().manual_seed(7))
    assert torch.equal(rlm.fit((x, y), 2).mapping, expected)
    given = ReprogrammedClassifier(net, VisualPrompt(10, 6), torch.tensor([[7, 0], [1, 2]]))
    assert given.num_classes == 2
    assert torch.equal(given(x), map_logits(given.source_logits(x), given.mapping))
    pairs = ReprogrammedClassifier(net, VisualPrompt(10, 6), "flm", 4, per_class=2).fit((x, y), 1)
    assert len(pairs.mapping.unique()) == 8
    assert torch.equal(pairs.counts((x, y)), mapping_counts(pairs.source_logits(x), y, 4))


def test_a_single_epoch_has_the_whole_rate():
    x, y = task()
    model = ReprogrammedClassifier(network(), VisualPrompt(10, 6), "flm", 3).fit((x, y), 1, 0.05, batch_size=24)
    moved = model.prompt.program[model.prompt.mask == 1].abs()
    # the first step of Adam is the rate itself
    assert moved.median().item() == pytest.approx(0.05, rel=1e-2)


def test_validation_keeps_the_best_epoch():
    x, y = task()
    model = ReprogrammedClassifier(network(), VisualPrompt(10, 6), "ilm", 3)
    states = []
    model.fit((x, y), 8, 3.0, validation=task(), progress=lambda *_: states.append(state_of(model)))
    scores = model.history_["validation accuracy"]
    assert same(state_of(model), states[scores.index(max(scores))])
    assert min(scores) < max(scores)


def test_loaders_and_tensors_are_the_same():
    x, y = task()
    one, two, three = (ReprogrammedClassifier(network(), VisualPrompt(10, 6), "flm", 3) for _ in range(3))
    for model in (two, three):
        model.backbone.load_state_dict(one.backbone.state_dict())
    one.fit((x, y), 3, 0.1, batch_size=24)
    two.fit(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=24), 3, 0.1)
    three.fit([{"pixel_values": x, "labels": y}], 3, 0.1)
    torch.testing.assert_close(one.prompt.program, two.prompt.program, atol=1e-4, rtol=0)
    torch.testing.assert_close(one.prompt.program, three.prompt.program, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["autocast", "bfloat16 network"])
def test_half_precision_keeps_the_prompt_in_float32(kind):
    x, y = task()
    net = network().bfloat16() if kind != "autocast" else network()
    model = ReprogrammedClassifier(net, VisualPrompt(10, 6), "ilm", 3)
    model.fit((x, y), 5, 0.1, mixed_precision="bf16" if kind == "autocast" else "no")
    assert model.prompt.program.dtype == torch.float32
    assert model.prompt.program.abs().max() > 0
    assert model.predict_proba(x).isfinite().all()


@pytest.mark.parametrize("case", ["loss", "labels"])
def test_training_that_fails_leaves_prompt_and_mapping(case):
    x, y = task()
    model = ReprogrammedClassifier(network(), VisualPrompt(10, 6), "ilm", 3).fit((x, y), 1)
    if case == "loss":
        model.backbone[8].bias.data[:] = float("inf")
        before = state_of(model)
        with pytest.raises(FloatingPointError, match="in epoch 1 of 2; lower lr"):
            model.fit((x, y), 2)
    else:
        before = state_of(model)
        # the wrong label comes in the last batch of the second epoch's order
        with pytest.raises(ValueError, match=r"y must lie in 0\.\.2"):
            model.fit([(x, y), (x, y + 1)], 2)
    assert same(state_of(model), before)


def test_adapters_and_their_errors(tmp_path):
    x, y = task()
    net = network()
    model = ReprogrammedClassifier(net, VisualPrompt(10, 6), "ilm", 3).fit((x, y), 2)
    model.calibrate(x, y)
    model.save_adapter(tmp_path / "vp")
    again = ReprogrammedClassifier(net, VisualPrompt(10, 6), "ilm", 3)
    with pytest.raises(RuntimeError, match="no label mapping yet"):
        again(x)
    assert torch.equal(again.load_adapter(tmp_path / "vp").predict_proba(x), model.predict_proba(x))
    whole = ReprogrammedClassifier(network(), VisualPrompt(10, 6), "ilm", 3)
    whole.load_state_dict(model.state_dict())
    assert torch.equal(whole.predict_proba(x), model.predict_proba(x))
    with pytest.raises(ValueError, match="does not hold an adapter of these shapes"):
        ReprogrammedClassifier(net, VisualPrompt(10, 6), "ilm", 4).load_adapter(tmp_path / "vp")
    with pytest.raises(ValueError, match="does not hold an adapter of these shapes"):
        LinearProbe(net, 3, size=10).load_adapter(tmp_path / "vp")
    model.mapping.copy_(torch.tensor([5, 6, 7]))
    model.save_adapter(tmp_path / "vp")
    small = ReprogrammedClassifier(network(classes=4), VisualPrompt(10, 6), "ilm", 3)
    with pytest.raises(ValueError, match=r"distinct source classes in 0\.\.3"):
        small.load_adapter(tmp_path / "vp")
    assert bool((small.mapping == -1).all())


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (("ilm", 9), {}, "9 target classes with 1 source classes each need 9"),
        (("ilm", 5), {"per_class": 2}, "need 10 source classes, but the network has 8"),
        (("ilm",), {}, "num_classes is needed"),
        (("best", 3), {}, "mapping must be 'ilm', 'flm', 'rlm'"),
        ((torch.tensor([1, 1]),), {}, "distinct source classes"),
        ((torch.tensor([1, 8]),), {}, r"in 0\.\.7"),
        ((torch.tensor([1, 2]), 3), {}, "with K=3"),
        ((torch.tensor(3),), {}, r"shape \(K,\) or \(K, M\)"),
    ],
)
def test_reprogramming_refuses_and_leaves_the_network(args, kwargs, message, without_shape_checks):
    net = network().train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=message):
            ReprogrammedClassifier(net, VisualPrompt(10, 6), *args, **kwargs)
    assert net.training
    assert all(p.requires_grad for p in net.parameters())


def test_wrong_objects_are_refused(without_shape_checks):
    with pytest.raises(TypeError, match=r"backbone must be a torch\.nn\.Module, got str"):
        ReprogrammedClassifier("resnet", VisualPrompt(10, 6), "ilm", 3)
    with pytest.raises(TypeError, match="prompt must be a VisualPrompt"):
        ReprogrammedClassifier(network(), nn.Identity(), "ilm", 3)
    with pytest.raises(TypeError, match="logits of shape"):
        ReprogrammedClassifier(nn.Conv2d(3, 4, 1).eval(), VisualPrompt(10, 6), "ilm", 3)
    model = ReprogrammedClassifier(network(), VisualPrompt(10, 6), "ilm", 3)
    x, y = task()
    for data, error, message in (
        (iter([(x, y)]), TypeError, "got an iterator"),
        (5, TypeError, "a loader of such pairs, got int"),
        ((x, y[:3]), ValueError, "two tensors of equal length"),
        ((x[:0], y[:0]), ValueError, "data is empty"),
        ([], ValueError, "the loader gave no batch"),
        ([(x, y, y)], ValueError, "got tuple"),
        ([{"image": x, "label": y}], ValueError, "with keys"),
        ((x, y.float()), TypeError, "whole numbers"),
        ((x * 3, y), ValueError, "before normalisation"),
    ):
        with pytest.raises(error, match=message):
            model.fit(data, 1)
    for setting in ({"epochs": 0}, {"lr": 0.0}, {"lr": math.nan}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="must be at least 1 and lr positive"):
            model.fit((x, y), **setting)
    with pytest.raises(ValueError, match="mixed_precision must be"):
        model.fit((x, y), 1, mixed_precision="fp8")
    with pytest.raises(ValueError, match="labels are for transformers"):
        model.fit((x, y), 1)(x, y)


def test_train_mode_is_left_with_a_warning():
    net = network().train()
    with pytest.warns(UserWarning, match="was in train mode"):
        model = ReprogrammedClassifier(net, VisualPrompt(10, 6), torch.arange(3))
    assert not net.training
    model.train()
    assert not net.training
    x, _ = task()
    expected = model(x)
    net.train()
    with pytest.warns(UserWarning, match="was in train mode"):
        assert torch.equal(model(x), expected)
    probe = LinearProbe(net, 3, size=10)
    net.train()
    with pytest.warns(UserWarning, match="was in train mode"):
        probe(x)


# --- linear probes


def test_probe_is_the_official_loop_without_its_forwards():
    """Same weights as training a new last layer with the network run on every batch of every epoch."""
    net = network()
    before = state_of(net)
    x, y = task(20)
    probe = LinearProbe(net, 3, size=6, mean=None, std=None, seed=3)
    layer = nn.Linear(10, 3)
    layer.load_state_dict(probe.classifier.state_dict())
    probe.fit((x, y), 11, 0.05, batch_size=8, seed=4)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [5, 7], 0.1)
    generator = torch.Generator().manual_seed(4)
    for _ in range(11):
        for index in torch.randperm(20, generator=generator).split(8):
            optimizer.zero_grad()
            F.cross_entropy(layer(net[:-1](x[index])), y[index]).backward()
            optimizer.step()
        schedule.step()
    torch.testing.assert_close(probe.classifier.weight, layer.weight)
    torch.testing.assert_close(probe.classifier.bias, layer.bias)
    torch.testing.assert_close(probe(x), layer(net[:-1](x)))
    assert same(state_of(net), before)
    assert "classifier.weight" in probe.state_dict()
    assert sum(name.startswith("backbone.") for name in probe.state_dict()) == len(before)


def test_probe_runs_the_network_once():
    net = network()
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))
    x, y = task()
    LinearProbe(net, 3, size=6).fit((x, y), 50, batch_size=24)
    assert len(calls) == 1


def test_probe_by_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    x, y = task()
    probe = LinearProbe(network(), 4, size=6)
    with pytest.warns(UserWarning, match=r"classes \[3\] have no example"):
        probe.fit((x, y), solver="lbfgs", C=2.0)
    z = probe.features(x).detach()
    expected = LogisticRegression(C=2.0, max_iter=2000).fit(z.double().numpy(), y).predict_proba(z.double().numpy())
    torch.testing.assert_close(probe.predict_proba(x)[:, :3].double(), torch.from_numpy(expected), atol=1e-5, rtol=0)
    assert bool((probe.predict_proba(x)[:, 3] == 0).all())
    two = LinearProbe(network(), 2, size=6).fit((x, y % 2), solver="lbfgs")
    z = two.features(x).double().detach().numpy()
    expected = LogisticRegression(max_iter=2000).fit(z, y % 2).predict_proba(z)
    torch.testing.assert_close(two.predict_proba(x).double(), torch.from_numpy(expected), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="at least two classes"):
        two.fit((x, y * 0), solver="lbfgs")
    with pytest.raises(ValueError, match="choose C with it yourself"):
        two.fit((x, y % 2), solver="lbfgs", validation=(x, y % 2))


def test_probe_validation_and_temperature():
    x, y = task()
    probe = LinearProbe(network(), 3, size=6).fit((x, y), 6, validation=(x, y))
    assert max(probe.history_["validation accuracy"]) == pytest.approx((probe(x).argmax(1) == y).double().mean().item())
    before = F.nll_loss(probe.predict_proba(x).log(), y)
    assert probe.calibrate(x, y) != 1
    assert F.nll_loss(probe.predict_proba(x).log(), y) < before
    with pytest.raises(ValueError, match=r"y must lie in 0\.\.2"):
        probe.fit((x, y), 1, validation=(x, y + 1))


def test_probe_refuses(without_shape_checks):
    x, y = task()
    net = network().train()
    for kwargs, message in (
        ({"head": "0"}, "is not a linear layer of Sequential"),
        ({"head": "no"}, "is not a linear layer"),
        ({"mean": None}, "go together"),
        ({"mean": (0.5,), "std": (0.5,)}, "one number per channel"),
        ({"std": (0.0, 1.0, 1.0)}, "std must be positive"),
        ({"size": 0}, "must be positive"),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(ValueError, match=message):
                LinearProbe(net, 3, **({"size": 6} | kwargs))
        assert net.training, "left in eval mode by an error"
    net.eval()
    with pytest.raises(ValueError, match="no linear layer"):
        LinearProbe(nn.Conv2d(3, 4, 1).eval(), 3)
    with pytest.raises(ValueError, match="has 10 outputs, the backbone 8"):
        LinearProbe(net, 3, size=6, head="6")(x)
    with pytest.raises(ValueError, match="solver must be"):
        LinearProbe(net, 3, size=6).fit((x, y), solver="sgd")
    with pytest.raises(ValueError, match="num_classes must be at least 1"):
        LinearProbe(net, 0, size=6)


# --- other people's models


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_transformers_models_keep_their_calling_convention(family):
    from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification
    from transformers.modeling_outputs import ImageClassifierOutput

    if family == "vit":
        config = ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32,
            patch_size=8, num_labels=6,
        )  # fmt: skip
        net = ViTForImageClassification(config).eval()
    else:
        config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=6, layer_type="basic")
        net = ResNetForImageClassification(config).eval()
    magnitude_prune(net, 0.5)
    before = state_of(net)
    x, y = task(9)
    for model in (
        ReprogrammedClassifier(net, VisualPrompt(32, 16), "ilm", 3),
        ReprogrammedClassifier(net, VisualPrompt(32, mode="additive", pad=4), "flm", 3),
        LinearProbe(net, 3, size=32),
    ):
        model.fit((x, y), 2, 0.05)
        output = model(pixel_values=x, labels=y)
        assert isinstance(output, ImageClassifierOutput)
        assert output.logits.shape == (9, 3)
        torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, y))
        assert model(x).loss is None
        assert model.config is config
        torch.testing.assert_close(model.predict_proba(x), output.logits.softmax(1))
    assert same(state_of(net), before)


def test_residual_network_of_the_zoo():
    net = zoo.CifarResNet(8, 10).eval()
    x, y = task(12)
    probe = LinearProbe(net, 3, size=16).fit((x, y), 2)
    assert probe.head == "linear"
    assert probe.features(x).shape == (12, 64)
    model = ReprogrammedClassifier(net, VisualPrompt(16, 8), "ilm", 3).fit((x, y), 2)
    assert model.predict_proba(x).shape == (12, 3)


@pytest.mark.skipif(datasets.available()["cifar10"] is None, reason="TORCHGRAFT_DATA does not point at a folder")
def test_efficientnet_on_digits():
    """Trained weights: a probe on a pruned network's features learns to read."""
    try:
        net = zoo.load("efficientnet-lite0")
    except zoo.ModelNotFoundError as error:
        pytest.skip(str(error))
    magnitude_prune(net, 0.8)
    before = state_of(net)
    digits = datasets.load("digits")
    index = few_shot_indices(digits.train_y, 2, 0)
    x, y = digits.train_x[index].expand(-1, 3, -1, -1), digits.train_y[index]
    probe = LinearProbe(net, 10, size=64, mean=(0.498,) * 3, std=(0.502,) * 3).fit((x, y), 60)
    assert probe.classifier.in_features == 1280
    seen = digits.test_x[:40].expand(-1, 3, -1, -1)
    right = (probe.predict_proba(seen).argmax(1) == digits.test_y[:40]).double().mean()
    assert right > 0.3  # guessing gives 0.1
    model = ReprogrammedClassifier(net, VisualPrompt(64, 32), "flm", 10).fit((x[:10], y[:10]), 4, 0.001)
    assert model.num_source == 1000
    assert model.history_["loss"][-1] < model.history_["loss"][0]
    assert same(state_of(net), before)


# --- few shots and the report


def test_few_shots():
    y = torch.tensor([0, 1, 2] * 10 + [2])
    sets = [few_shot_indices(y, n, 5) for n in (1, 3, 7)]
    for n, index in zip((1, 3, 7), sets, strict=True):
        assert torch.bincount(y[index]).tolist() == [n, n, n]
        assert len(index.unique()) == len(index)
    assert set(sets[0].tolist()) < set(sets[1].tolist()) < set(sets[2].tolist())
    assert sets[1].tolist() != few_shot_indices(y, 3, 6).tolist()
    for everything in (0, -1):
        assert sorted(few_shot_indices(y, everything, 5).tolist()) == list(range(31))
    with pytest.warns(UserWarning, match=r"fewer than 11 examples of classes \{0: 10, 1: 10\}"):
        assert len(few_shot_indices(y, 11, 0)) == 31


def test_metrics_by_hand():
    probs = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.7, 0.1], [0.3, 0.3, 0.4]])
    found = transfer_metrics(probs, torch.tensor([0, 0, 2]), bins=1)
    assert found["acc"] == pytest.approx(2 / 3)
    assert found["nll"] == pytest.approx(-(math.log(0.9) + math.log(0.2) + math.log(0.4)) / 3, abs=1e-6)
    assert found["ece"] == pytest.approx(abs(2 / 3 - (0.9 + 0.7 + 0.4) / 3), abs=1e-6)


def grid():
    x, y = task(40)
    images = datasets.Images((x * 255).byte(), y, (x[:13] * 255).byte(), y[:13], ("a", "b", "c"))
    dense, pruned = network(), network()
    pruned.load_state_dict(dense.state_dict())
    magnitude_prune(pruned, 0.25)
    calls = []

    def probe(net, classes, data, seed):
        calls.append((seed, len(data[0]), data[0].double().mean().item()))
        return LinearProbe(net, classes, size=6, seed=seed).fit(data, 3, seed=seed)

    def prompt(net, classes, data, seed):
        return ReprogrammedClassifier(net, VisualPrompt(8, 6), "ilm", classes).fit(data, 2, seed=seed)

    steps = []
    report = transfer_report(
        {"dense": dense, "pruned": pruned}, {"task": images}, [1, 0], {"LP": probe, "VP": prompt}, seeds=(3, 4, 5),
        progress=lambda *at: steps.append(at),
    )  # fmt: skip
    return report, calls, steps, dense, images


def test_report():
    report, calls, steps, dense, images = grid()
    assert list(report.columns) == ["model", "sparsity", "target", "shots", "seed", "method", "acc", "nll", "ece"]
    assert len(report) == 24
    assert steps[-1] == (24, 24)
    assert set(report["sparsity"].round(2)) == {0.0, 0.75}
    # the same few-shot sets for both models
    assert calls[:6] == calls[6:]
    assert {n for _, n, _ in calls} == {3, 40}
    index = few_shot_indices(images.train_y, 1, 4)
    fitted = LinearProbe(dense, 3, size=6, seed=4).fit((images.train_x[index], images.train_y[index]), 3, seed=4)
    expected = transfer_metrics(fitted.predict_proba(images.test_x), images.test_y)
    row = report[(report.model == "dense") & (report.shots == 1) & (report.seed == 4) & (report.method == "LP")].iloc[0]
    assert {name: row[name] for name in expected} == pytest.approx(expected)

    table = summarize_transfer(report)
    cell = (table.model == "pruned") & (table.shots == 0) & (table.method == "LP") & (table.metric == "ece")
    values = report[(report.model == "pruned") & (report.shots == 0) & (report.method == "LP")]["ece"]
    half = 4.302653 * values.std() / math.sqrt(3)
    assert table[cell].iloc[0][["mean", "low", "high"]].tolist() == pytest.approx(
        [values.mean(), values.mean() - half, values.mean() + half], abs=1e-6
    )
    paired = summarize_transfer(report, against="dense")
    assert set(paired.model) == {"pruned"}
    other = report[(report.model == "dense") & (report.shots == 0) & (report.method == "LP")]["ece"].to_numpy()
    difference = values.to_numpy() - other
    cell = (paired.shots == 0) & (paired.method == "LP") & (paired.metric == "ece")
    assert paired[cell].iloc[0]["mean"] == pytest.approx(difference.mean())
    assert paired[cell].iloc[0]["high"] - difference.mean() == pytest.approx(
        4.302653 * difference.std(ddof=1) / math.sqrt(3), abs=1e-6
    )

    figure = plot_transfer(report, "ece")
    assert [ax.get_title() for ax in figure.axes] == ["task, LP", "task, VP"]
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["1", "all"]
    drawn = figure.axes[0].containers[1].lines[0].get_ydata()
    assert drawn[1] == pytest.approx(100 * values.mean())
    with pytest.raises(ValueError, match="no model 'ticket'; it has"):
        summarize_transfer(report, against="ticket")
    one = summarize_transfer(report[report.seed == 3])
    assert one["low"].isna().all()


def test_report_refuses(without_shape_checks):
    full = {"models": {"m": network()}, "targets": {"t": None}, "shots": [1], "methods": {"LP": None}}
    for name in full:
        with pytest.raises(ValueError, match=f"{name} is empty"):
            transfer_report(**(full | {name: {}}))
    with pytest.raises(ValueError, match="seeds is empty"):
        transfer_report(**full, seeds=())
    with pytest.raises(ValueError, match="metric must be one of"):
        plot_transfer(None, "loss")

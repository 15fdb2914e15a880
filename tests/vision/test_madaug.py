"""Hypergradient, straight-through mixture, curriculum, draws; the task model is left alone; Trainer; bad input."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchgraft.vision.augmentation_space import AugmentationSpace
from torchgraft.vision.madaug import (
    AugmentationPolicy,
    MADAug,
    MADAugModel,
    curriculum,
    hold_out,
    mixed_images,
    virtual_step,
)

OPS = AugmentationSpace.autoaugment17(8)
SMOOTH = AugmentationSpace(
    {
        "brighter": lambda x, level, sign: x + 0.5 * level.view(-1, 1, 1, 1),
        "flip": lambda x, level, sign: x.flip(3),
        "same": lambda x, level, sign: x,
    }
)


def net(norm=True, seed=0):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 6, 3), *([nn.BatchNorm2d(6)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))


def batch(n=8, seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, 8, 8, generator=generator, dtype=dtype), torch.arange(n) % 4


def made(model=None, ops=OPS, **changes):
    model = net() if model is None else model
    torch.manual_seed(2)
    policy = AugmentationPolicy(6, len(ops)).to(next(model.parameters()).dtype)
    settings = {"inner_lr": 0.5, **changes}
    return MADAug(model, policy, ops, [batch(8, 3, next(model.parameters()).dtype)], **settings)


def test_the_curriculum_rises_from_a_hundredth_to_all():
    values = [curriculum(t) for t in range(400)]
    assert values[0] == 0.01
    assert values[40] == pytest.approx(0.7616 + 0.01, abs=1e-4)
    assert values[-1] == 1.0
    assert all(a <= b for a, b in pairwise(values))


def test_the_policy_gives_magnitudes_first_and_probabilities_second():
    policy = AugmentationPolicy(5, 3)
    assert set(policy.state_dict()) == {"projection.0.weight", "projection.0.bias"}
    x = torch.randn(4, 5)
    raw = F.linear(x, policy.projection[0].weight, policy.projection[0].bias)
    magnitudes, probabilities = policy(x, temperature=3.0)
    assert torch.allclose(magnitudes, torch.sigmoid(raw[:, :3]))
    assert torch.allclose(probabilities, torch.softmax(raw[:, 3:] / 3, 1))
    assert torch.allclose(policy(x, 1e9)[1], torch.full((4, 3), 1 / 3))
    assert torch.allclose(policy(x, 1e-4)[1], F.one_hot(raw[:, 3:].argmax(1), 3).float(), atol=1e-5)
    assert len(AugmentationPolicy(5, 3, hidden=(128, 128)).projection) == 5


def test_magnitudes_pass_straight_through_and_one_hot_choices_are_the_image():
    images, magnitudes = torch.rand(2, 3, 3, 8, 8), torch.rand(2, 3, requires_grad=True)
    one_hot = torch.eye(3)[:2]
    mixed = mixed_images(images, magnitudes, one_hot)
    assert torch.allclose(mixed, torch.stack([images[0, 0], images[1, 1]]), atol=1e-6)
    assert torch.equal(torch.autograd.grad(mixed.sum(), magnitudes)[0], one_hot * 3 * 8 * 8)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
def test_the_virtual_step_is_the_step_sgd_would_take(momentum, nesterov):
    if nesterov and not momentum:
        pytest.skip("Nesterov needs momentum")
    model = net(norm=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum, weight_decay=0.01, nesterov=nesterov)
    for seed in range(3):
        x, y = batch(seed=seed)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        named = dict(model.named_parameters())
        before = {k: p.detach().clone() for k, p in named.items()}
        moved = virtual_step(before, {k: p.grad for k, p in named.items()}, 0.1, optimizer=optimizer, named=named)
        optimizer.step()
        assert all(torch.allclose(moved[k], p, atol=1e-7) for k, p in named.items())


def test_the_hypergradient_equals_finite_differences_of_the_validation_loss():
    """Linear model, float64: L_val(theta - lr grad L_train(policy)), differenced in every weight of the policy."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    madaug = made(model, SMOOTH)
    (x, y), (hx, hy) = batch(dtype=torch.float64), batch(8, 3, torch.float64)
    features = madaug.features(x)

    def validation_loss(weight, bias):
        raw = F.linear(features, weight, bias)
        magnitudes, probabilities = raw[:, :3].sigmoid(), raw[:, 3:].softmax(1)
        # the surrogate of the straight-through estimator: versions made at the first magnitudes, plus the change
        images = madaug.ops.apply_all(x, base) + (magnitudes - base)[:, :, None, None, None]
        mixed = torch.einsum("bk,bkchw->bchw", probabilities, images)
        parameters = dict(model.named_parameters())
        train = F.cross_entropy(torch.func.functional_call(model, parameters, (mixed,)), y)
        gradients = torch.autograd.grad(train, list(parameters.values()))
        moved = {k: (p - 0.5 * g).detach() for (k, p), g in zip(parameters.items(), gradients, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, moved, (hx,)), hy).item()

    weight, bias = (p.detach().clone() for p in madaug.policy.parameters())
    base = F.linear(features, weight, bias)[:, :3].sigmoid()
    wanted = torch.zeros_like(weight)
    for index in range(weight.numel()):
        step = torch.zeros_like(weight).flatten()
        step[index] = 1e-5
        step = step.view_as(weight)
        wanted.view(-1)[index] = (validation_loss(weight + step, bias) - validation_loss(weight - step, bias)) / 2e-5
    found = {}
    for method, tolerance in (("exact", 1e-5), ("finite_difference", 1e-2)):
        other = made(model, SMOOTH, hypergradient=method)
        other.policy_optimizer.step = lambda: None
        kept = []
        other.policy_optimizer.zero_grad = lambda kept=kept, other=other, **_: kept.append(
            other.policy.projection[0].weight.grad.clone()
        )
        other.policy_step(x, y)
        found[method] = kept[0]
        assert (found[method] - wanted).norm() <= tolerance * wanted.norm()
    assert wanted.norm() > 1e-6


def waves(*shape, phase):
    """Numbers in 0..1 that no random generator has to reproduce."""
    whole = (torch.arange(math.prod(shape), dtype=torch.float64) * 12.9898 + phase).sin() * 43758.5453
    return (whole - whole.floor()).view(shape)


class SmallNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Linear(5, 4)

    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).relu().mean((2, 3)))


# gradients of the policy's bias, and of its weights summed over features, that the policy update of train() in
# main_higher.py, JackHck/MADAug at fe5445d, gives on these inputs, with the validation loss
OFFICIAL = {
    0.0: (
        1.517509590271,
        [0.00418561719, 0.00271366901, 0.00235080721, 0.00757421841, 0.00623546231, 6.11222323e-05, -0.0016470555,
         -0.00464952905],
        [0.00626506008, 0.0041322812, 0.003451791, 0.0115144338, 0.00583008901, -0.000356179524, -0.00304666322,
         -0.00242724627],
    ),
    0.9: (
        1.521383874061,
        [-0.00822943082, -0.00557764266, -0.00502190872, -0.0158216211, -0.0129565905, 0.000152551466, 0.00353016372,
         0.00927387529],
        [-0.0119733793, -0.00803878915, -0.00724694603, -0.0229877009, -0.0254936049, 5.37702886e-05, 0.00419082027,
         0.0212490143],
    ),
}  # fmt: skip


@pytest.mark.parametrize("momentum", OFFICIAL)
def test_the_policy_update_is_the_official_one(momentum):
    def filled(module, phase):
        for k, p in enumerate(module.parameters()):
            p.data = 2 * waves(*p.shape, phase=phase + k) - 1
        return module

    def smoothed(logits, y):
        return F.cross_entropy(logits, y, label_smoothing=0.1)

    model = filled(SmallNet().double(), 0.0).eval()
    optimizer = torch.optim.SGD(model.parameters(), 0.3, momentum=momentum, weight_decay=5e-4)
    x, y = (waves(6, 3, 6, 6, phase=20.0) * 255).round() / 255, torch.arange(6) % 4
    held = waves(6, 3, 6, 6, phase=30.0), torch.tensor([1, 0, 3, 2, 1, 0])
    smoothed(model(x), y).backward()
    optimizer.step()
    policy = filled(AugmentationPolicy(5, 4).double(), 50.0)
    madaug = MADAug(
        model, policy, AugmentationSpace.autoaugment17(6).subset("invert", "flip", "solarize", "identity"), [held],
        optimizer=optimizer, loss_fn=smoothed, search_batch=6, through_features=True,
    )  # fmt: skip
    found = []
    madaug.policy_optimizer.step = lambda: found.extend(p.grad.clone() for p in policy.parameters())
    loss, bias, weight = OFFICIAL[momentum]
    assert madaug.policy_step(x, y).validation_loss == pytest.approx(loss, abs=1e-10)
    assert found[1].tolist() == pytest.approx(bias, abs=1e-9)
    assert found[0].sum(1).tolist() == pytest.approx(weight, abs=1e-9)


def test_a_policy_step_leaves_the_task_model_bitwise_alone():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    buffers = [s["momentum_buffer"].clone() for s in optimizer.state.values()]
    gradients = [p.grad.clone() for p in model.parameters()]
    madaug = made(model, inner_lr=None, optimizer=optimizer)
    policy = [p.clone() for p in madaug.policy.parameters()]
    madaug.policy_step(x, y)
    madaug.augment(x, 100)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(s["momentum_buffer"], b) for s, b in zip(optimizer.state.values(), buffers, strict=True))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(module.training for module in model.modules())
    assert not any(torch.equal(a, b) for a, b in zip(madaug.policy.parameters(), policy, strict=True))


def test_planted_operations_are_told_apart():
    """Validation images are dark copies of the training images; brightening leads away from them, darkening there."""
    ops = AugmentationSpace(
        {
            "away": lambda x, level, sign: (x + 0.6).clamp(0, 1),
            "there": lambda x, level, sign: x * 0.3,
            "same": lambda x, level, sign: x,
        }
    )
    torch.manual_seed(0)
    x = torch.rand(128, 3, 8, 8) * 0.2
    y = torch.arange(128) % 2
    x[y == 1] += 0.5
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    madaug = MADAug(model, AugmentationPolicy(16, 3), ops, [(x[64:] * 0.3, y[64:])], optimizer=optimizer,
                    policy_lr=0.05, search_batch=64, tau=None, k_ops=1, policy_weight_decay=0.0)  # fmt: skip
    for _ in range(60):
        record = madaug.policy_step(x[:64], y[:64])
        optimizer.zero_grad()
        F.cross_entropy(model(madaug.augment(x[:64])), y[:64]).backward()
        optimizer.step()
    first, last = madaug.history[0].probabilities, record.probabilities
    assert last[1] > first[1] + 0.15
    assert last[1] > last[0] + 0.2
    assert set(record.per_class) == {0, 1}
    assert record.per_class[0][0].sum().item() == pytest.approx(1, abs=1e-5)


def test_operations_of_an_image_are_different_and_drawn_by_their_probabilities():
    seen = []

    def marks(k):
        def op(x, level, sign):
            seen.append((k, len(x)))
            return x + 10.0**k

        return op

    ops = AugmentationSpace({str(k): marks(k) for k in range(4)})
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 6), nn.Linear(6, 4))
    madaug = made(model, ops, temperature=1.0, tau=None)
    with torch.no_grad():
        madaug.policy.projection[0].weight.zero_()
        madaug.policy.projection[0].bias[4:] = torch.tensor([0.0, 0.0, 2.0, -30.0])
    x = torch.zeros(4000, 3, 1, 1)
    torch.manual_seed(0)
    sums = madaug.augment(x)[:, 0, 0, 0]
    assert set(sums.tolist()) <= {11.0, 101.0, 110.0}
    # without replacement: {0, 1} is drawn when one comes first and the other second
    p = torch.tensor([1.0, 1.0, math.e**2]) / (2 + math.e**2)
    assert (sums == 11).float().mean().item() == pytest.approx(float(2 * p[0] * p[1] / (1 - p[0])), abs=0.02)


def test_only_the_first_share_of_the_batch_is_augmented():
    x, _ = batch(100)
    madaug = made(ops=SMOOTH.subset("brighter"), k_ops=1)
    same = (madaug.augment(x, 10) == x).flatten(1).all(1)
    n = math.floor(curriculum(10) * 100)
    assert same.tolist() == [False] * n + [True] * (100 - n)
    assert torch.equal(madaug.augment(x[:50], 0), x[:50])


def test_steps_train_the_policy_when_due_and_policies_move_house(tmp_path):
    x, y = batch()
    madaug = made(search_every=3)
    for _ in range(7):
        assert madaug.step(x, y, 50).shape == x.shape
    assert len(madaug.history) == 3
    madaug.save_policy(tmp_path / "policy.safetensors")
    frozen = MADAug(net(seed=5), AugmentationPolicy(6, 17), OPS, None, frozen=True)
    frozen.load_policy(tmp_path / "policy.safetensors")
    frozen.step(x, y, 50)
    for ours, theirs in zip(frozen.policy.parameters(), madaug.policy.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    other = MADAug(net(), AugmentationPolicy(6, 3), SMOOTH, None, frozen=True)
    with pytest.raises(ValueError, match="a policy for the operations shear_x"):
        other.load_policy(tmp_path / "policy.safetensors")


def test_transformers_trainer_and_collate(tmp_path):
    from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4,
        num_labels=4,
    )  # fmt: skip
    vit = ViTForImageClassification(config)
    madaug = MADAug(
        vit, AugmentationPolicy(16, 17), OPS, [batch(8, 3)], inner_lr=0.1, tau=2.0, prepare=lambda x: x * 2 - 1
    )
    model = MADAugModel(madaug)
    data = [{"pixel_values": x, "labels": int(y)} for x, y in zip(*batch(12), strict=True)]
    args = TrainingArguments(str(tmp_path), max_steps=4, per_device_train_batch_size=4, report_to=[], save_steps=4,
                             use_cpu=True, disable_tqdm=True)  # fmt: skip
    Trainer(model, args, train_dataset=data, callbacks=[model.callback()]).train()
    assert len(madaug.history) == 2
    assert madaug.epoch == 1.0
    model.eval()
    x, _ = batch(2)
    assert torch.equal(model(pixel_values=x).logits, vit(x * 2 - 1).logits)
    madaug.epoch = 0.0
    assert torch.equal(madaug.collate(data)["pixel_values"], batch(12)[0] * 2 - 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: curriculum(-1), "epoch"),
        (lambda: curriculum(1, 0), "tau"),
        (lambda: hold_out(5, 0.01), "share"),
        (lambda: AugmentationPolicy(0, 3), "positive"),
        (lambda: AugmentationPolicy(5, 3)(torch.zeros(2, 4)), r"\(B, 5\)"),
        (lambda: AugmentationPolicy(5, 3)(torch.zeros(2, 5), 0), "temperature"),
        (lambda: mixed_images(torch.zeros(2, 3, 1), torch.zeros(2, 2), torch.zeros(2, 3)), "magnitudes"),
        (lambda: made(k_ops=18), "at most the 17"),
        (lambda: made(k_ops=0), "k_ops"),
        (lambda: made(temperature=0), "temperature"),
        (lambda: made(delta=2), "delta"),
        (lambda: made(tau=-1), "tau"),
        (lambda: made(hypergradient="none"), "hypergradient"),
        (lambda: made(inner_lr=None), "SGD optimizer or inner_lr"),
        (lambda: made(inner_lr=None, optimizer=torch.optim.Adam(net().parameters())), "Adam without inner_lr"),
        (lambda: made(inner_lr=-0.1), "inner_lr must be positive"),
        (lambda: made(through_features=True, hypergradient="finite_difference"), "through_features"),
        (lambda: made(through_features=True, feature_model=net()), "through_features"),
        (lambda: MADAug(net(), AugmentationPolicy(6, 17), OPS, None, inner_lr=1), "hold_out"),
        (lambda: MADAug(net(), AugmentationPolicy(6, 5), OPS, None, frozen=True), "ops has 17"),
        (lambda: MADAug(net(), AugmentationPolicy(9, 17), OPS, None, frozen=True), "takes 9 features"),
        (lambda: MADAug(nn.Conv2d(3, 4, 1), AugmentationPolicy(6, 17), OPS, None, frozen=True), "no nn.Linear"),
        (lambda: made().policy_step(batch()[0], batch()[1][:3]), "equally many"),
        (lambda: made().augment(batch()[0] * 2, 100), "before normalising"),
        (lambda: made().augment(batch()[0] * torch.nan, 100), "NaN"),
        (lambda: made().augment(batch()[0][0], 100), "images of shape"),
        (lambda: made().policy_step(torch.rand(8, 4, 8, 8), batch()[1]), "images of shape"),
        (lambda: made().policy_step(batch()[0] / math.inf * math.inf, batch()[1]), "NaN"),
        (lambda: made(ops=SMOOTH).policy_step(batch()[0] / 0, batch()[1]), "infinity"),
        (
            lambda: MADAug(
                net(), AugmentationPolicy(6, 17), OPS, [(2 * batch()[0], batch()[1])], inner_lr=1
            ).policy_step(*batch()),
            "before normalising",
        ),
        (lambda: MADAug(net(), AugmentationPolicy(6, 17), OPS, [], inner_lr=1).policy_step(*batch()), "no batch"),
        (lambda: MADAug(net(), AugmentationPolicy(6, 17), OPS, None, frozen=True).policy_step(*batch()), "frozen"),
        (lambda: MADAugModel(made())(batch()[0]), "labels"),
    ],
)
def test_bad_input(without_shape_checks, call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_wrong_types(without_shape_checks):
    with pytest.raises(TypeError, match=r"uint8; divide bytes by 255"):
        made().augment((batch()[0] * 255).byte(), 100)
    with pytest.raises(TypeError, match="float32"):
        MADAug(net(), AugmentationPolicy(6, 17).half(), OPS, [batch()], inner_lr=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_policy_keeps_its_precision_beside_a_model_of_another(dtype):
    model = net().to(dtype)
    madaug = MADAug(model, AugmentationPolicy(6, 17), OPS, [batch(8, 3, dtype)], inner_lr=0.1, tau=None)
    x, y = batch(dtype=dtype)
    before = madaug.policy.projection[0].weight.clone()
    out = madaug.step(x, y)
    assert out.dtype == dtype
    assert not torch.equal(out, x)
    assert not torch.equal(madaug.policy.projection[0].weight, before)

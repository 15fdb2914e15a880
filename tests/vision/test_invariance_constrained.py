"""Chains, multipliers, the Lagrangian and its limits; the whole loop against the official one; Trainer; bad input."""

import copy
import math

import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F

from torchgraft.vision.augmentation_space import AugmentationSpace
from torchgraft.vision.invariance_constrained import (
    DualVariable,
    InvarianceConstrainedModel,
    InvarianceConstrainedTrainer,
    InvarianceConstraint,
    mh_sample,
    symmetry_report,
)

SPACE = AugmentationSpace.trivial(8)


def net(batch_norm=True, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    norm = [nn.BatchNorm2d(4)] if batch_norm else []
    layers = nn.Conv2d(3, 4, 3), *norm, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5)
    return nn.Sequential(*layers).to(dtype)


@pytest.fixture
def batch():
    torch.manual_seed(1)
    return torch.rand(6, 3, 8, 8), torch.arange(6) % 5


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


def test_chains_of_one_stay_and_equal_losses_always_move():
    assert mh_sample(torch.rand(1, 2, 5)).eq(0).all()
    assert mh_sample(torch.ones(7, 2, 5)).eq(6).all()


@pytest.mark.parametrize(
    ("first", "second", "rate"), [(1.0, 0.0, 0.0), (1.0, 0.5, 0.5), (0.0, 1.0, 1.0), (0.0, 0.0, 0.0)]
)
def test_one_move_is_made_with_the_ratio_of_the_losses(first, second, rate):
    n = 40_000
    generator = torch.Generator().manual_seed(0)
    moved = mh_sample(torch.tensor([first, second]).expand(n, 2).T[:, None], generator=generator)
    assert abs(moved.float().mean().item() - rate) <= 3 * math.sqrt(rate * (1 - rate) / n)


def test_long_chains_visit_in_proportion_to_the_loss():
    weights = torch.tensor([1.0, 2.0, 3.0, 10.0])
    generator = torch.Generator().manual_seed(0)
    proposals = torch.randint(0, 4, (60, 1, 20_000), generator=generator)
    last = mh_sample(weights[proposals], generator=generator)
    seen = torch.bincount(proposals.gather(0, last[None])[0, 0], minlength=4)
    wanted = weights / weights.sum() * seen.sum()
    assert stats.chisquare(seen.numpy(), wanted.numpy()).pvalue > 1e-3
    # a test that could not fail would not see that uniform visiting is wrong
    assert stats.chisquare(seen.numpy(), [5000] * 4).pvalue < 1e-9


def test_multipliers_move_by_the_formula_and_never_below_zero():
    dual = DualVariable(3, lr=0.5, init=1.0)
    assert torch.equal(dual.update(torch.tensor([2.0, -1.0, -8.0])), torch.tensor([2.0, 0.5, 0.0]))
    again = DualVariable(3)
    again.load_state_dict(dual.state_dict())
    assert torch.equal(again.value, dual.value)
    with pytest.warns(UserWarning, match="margin is below"):
        assert DualVariable(1, lr=1.0, max=2.0).update(torch.tensor([5.0])).item() == 2.0


def test_from_zero_with_the_constraint_met_the_gradient_is_the_clean_one_bitwise(batch):
    model, x, y = net(), *batch
    model.eval()
    constraint = InvarianceConstraint(SPACE, margin=100.0)
    info = constraint(model, x, y)
    assert constraint.dual.value.item() == 0
    for ours, plain in zip(gradients(model, info.loss), gradients(model, F.cross_entropy(model(x), y)), strict=True):
        assert torch.equal(ours, plain)


def test_without_a_bound_the_training_is_the_plain_one(batch):
    x, y = batch
    ours, plain = net(batch_norm=False), net(batch_norm=False)
    constraint = InvarianceConstraint(SPACE, margin=math.inf, dual_lr=1.0)
    trainer = InvarianceConstrainedTrainer(ours, torch.optim.SGD(ours.parameters(), 0.1), constraint, clip=None)
    optimizer = torch.optim.SGD(plain.parameters(), 0.1)
    for _ in range(4):
        trainer.step(x, y)
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))
    assert constraint.dual.value.item() == 0


def test_a_fixed_multiplier_with_one_proposal_is_clean_plus_uniform_augmentation(batch):
    model, x, y = net(batch_norm=False), *batch
    constraint = InvarianceConstraint(SPACE, mh_steps=1, dual_init=1.0).eval()
    info = constraint(model, x, y, generator=torch.Generator().manual_seed(3))
    images, op, level = constraint.propose(x, 0, torch.Generator().manual_seed(3))
    assert torch.allclose(info.loss, F.cross_entropy(model(x), y) + F.cross_entropy(model(images), y))
    assert torch.equal(info.op_ids[0, 0], op)
    assert torch.equal(info.levels[0, 0], level)
    assert constraint.dual.value.item() == 1.0


def test_proposals_are_uniform_and_never_the_identity():
    _, op, level = InvarianceConstraint(SPACE).propose(torch.rand(13_000, 3, 4, 4), 0, torch.Generator().manual_seed(0))
    assert (op != SPACE.names.index("identity")).all()
    assert stats.chisquare(torch.bincount(op, minlength=14)[1:].numpy()).pvalue > 1e-3
    assert stats.chisquare(torch.bincount((level * 30).round().long(), minlength=31)[1:].numpy()).pvalue > 1e-3


def test_survivors_stay_paired_with_operation_level_and_loss(batch):
    """Every operation paints its own number, so that an image tells what made it."""
    x, y = batch[0] * 0, batch[1]
    names = ["a", "b", "c"]
    space = AugmentationSpace(
        {
            n: lambda x, level, sign, k=k: torch.ones_like(x) * (k + 1 + level.view(-1, 1, 1, 1) / 2)
            for k, n in enumerate(names)
        }
    )
    seen = []

    def model(images):
        seen.append(images)
        return F.one_hot((images[:, 0, 0, 0] * 1000).long() % 5, 5).float() + images.mean((1, 2, 3))[:, None]

    constraint = InvarianceConstraint(space, mh_steps=3, chains=2, dual_init=1.0)
    info = constraint(model, x, y)
    final = seen[-1][:, 0, 0, 0].view(2, 6)
    assert torch.allclose(final, info.op_ids[0] + 1 + info.levels[0] / 2)
    assert torch.allclose(info.aug_loss, F.cross_entropy(model(seen[-1]), y.repeat(2)))


def test_hard_operations_are_sampled_more(batch):
    x, y = batch
    space = AugmentationSpace({"easy": lambda x, level, sign: x * 0, "hard": lambda x, level, sign: x * 0 + 1})

    def model(images):
        return torch.stack([torch.where(images.mean((1, 2, 3)) > 0.5, 0.0, 3.0), torch.zeros(len(images))], 1)

    constraint = InvarianceConstraint(space, mh_steps=8)
    for _ in range(30):
        constraint(model, x, torch.zeros_like(y))
    counts = symmetry_report(constraint).operations
    # losses log 2 and log(1 + e^-3)
    assert counts["hard"] / sum(counts.values()) == pytest.approx(0.6931 / (0.6931 + 0.0486), abs=0.05)


def test_each_group_has_its_own_multiplier(batch):
    model, x, y = net(batch_norm=False), *batch
    groups = {"colour": ["color", "brightness"], "turn": ["rotate"]}
    constraint = InvarianceConstraint(SPACE, groups=groups, margin={"colour": 9.0, "turn": 0.0}, dual_lr=0.5)
    info = constraint(model, x, y)
    assert constraint.dual.value[0] == 0
    assert torch.allclose(constraint.dual.value[1], 0.5 * info.aug_loss[1])
    assert (info.op_ids[1] == SPACE.names.index("rotate")).all()
    assert set(info.op_ids[0].flatten().tolist()) <= {SPACE.names.index(n) for n in groups["colour"]}
    report = symmetry_report(constraint)
    assert report.groups == ("colour", "turn")
    assert report.dual.shape == (1, 2)
    assert sum(report.operations.values()) == 12
    assert int(report.levels["rotate"].sum()) == report.operations["rotate"] == 6


def test_evaluation_mode_changes_nothing_and_batch_norms_can_be_spared(batch):
    model, (x, y) = net(), batch
    constraint = InvarianceConstraint(SPACE, dual_init=1.0, proposal_mode="eval")
    seen = []
    model[1].register_forward_pre_hook(lambda module, _: seen.append(module.training))
    constraint(model, x, y)
    assert seen == [False, True, True]
    assert model.training
    constraint.eval()
    before = constraint.dual.value.clone()
    constraint(model, x, y)
    assert torch.equal(constraint.dual.value, before)


def test_one_joint_pass_gives_the_same_loss_without_batch_statistics(batch):
    model, (x, y) = net(batch_norm=False), batch
    infos = [
        InvarianceConstraint(SPACE, dual_init=0.7, chains=2, joint_forward=joint)(
            model, x, y, generator=torch.Generator().manual_seed(0)
        )
        for joint in (False, True)
    ]
    assert torch.allclose(infos[0].loss, infos[1].loss)
    assert torch.allclose(infos[0].aug_loss, infos[1].aug_loss)


def test_mixture_trains_on_either_view_with_the_odds_of_the_multiplier(batch):
    x, y = torch.zeros(4000, 3, 2, 2), torch.zeros(4000, dtype=torch.int64)
    space = AugmentationSpace({"white": lambda x, level, sign: x + 1})
    seen = []

    def model(images):
        seen.append(images)
        return torch.zeros(len(images), 2)

    torch.manual_seed(0)
    info = InvarianceConstraint(space, mixture=True, dual_init=3.0, margin=0.1)(model, x, y)
    assert seen[-1].mean().item() == pytest.approx(0.75, abs=0.03)
    assert info.loss.item() == pytest.approx(math.log(2), abs=1e-5)
    none = InvarianceConstraint(space, mixture=True, dual_init=0.0, dual_lr=0.5, margin=0.1)
    assert none(model, x, y).loss.item() == pytest.approx(math.log(2), abs=1e-5)
    assert none.dual.value.item() == pytest.approx(0.5 * (math.log(2) - 0.1), abs=1e-5)


def waves(*shape, phase):
    """Numbers in 0..1 that no random generator has to reproduce."""
    whole = (torch.arange(math.prod(shape), dtype=torch.float64) * 12.9898 + phase).sin() * 43758.5453
    return (whole - whole.floor()).view(shape)


def small_net():
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 4, 3)).double()
    for k, p in enumerate(net.parameters()):
        p.data = 2 * waves(*p.shape, phase=float(k)) - 1
    return net


# computed by run_epoch_dual of TrivialAugment/train_pd_batch.py, ihounie/daug at 3fcb9b9, on these inputs: multipliers
# and transformed losses of three steps, levels kept in the last one, last bias
OFFICIAL = {
    (3, 1, False): (
        [0.595046998, 1.037194499, 1.451240737],
        [1.290093972, 1.584295004, 1.528092475],
        [11, 12, 13, 14, 15],
        [0.5731799, 0.630032237, -0.565834207],
    ),
    (2, 2, False): (
        [0.71084658, 1.259816073, 1.624300715],
        [1.521693136, 1.797938986, 1.428969284],
        [21, 22, 23, 24, 25, 26, 27, 28, 19, 30],
        [0.583293701, 0.611918944, -0.557834715],
    ),
    (2, 1, True): (
        [0.566191448, 1.118569195, 1.581638887],
        [1.232382872, 1.804755493, 1.626139384],
        [21, 27, 23, 29, 30],
        [0.656402814, 0.65996727, -0.678992154],
    ),
}


@pytest.mark.parametrize(("mh_steps", "chains", "mixture"), OFFICIAL)
def test_the_loop_is_the_official_one_on_the_same_proposals_and_draws(mh_steps, chains, mixture, monkeypatch):
    steps, b = 3, 5
    model = small_net()
    constraint = InvarianceConstraint(
        AugmentationSpace.trivial(4), margin=0.7, dual_lr=0.5, dual_init=0.3, mh_steps=mh_steps, chains=chains,
        mixture=mixture,
    ).double()  # fmt: skip
    trainer = InvarianceConstrainedTrainer(
        model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True), constraint
    )
    each = mh_steps * chains
    x, y = waves(steps * b, 3, 4, 4, phase=20.0), torch.arange(steps * b) % 3
    views = waves(steps, each * b, 3, 4, 4, phase=30.0)
    levels = (1 + torch.arange(steps * each * b) % 30).view(steps, -1) / 30
    shapes = [(chains, b)] * (mh_steps - 1) + [(b,)] * mixture
    draws = iter([waves(*shape, phase=40.0 + 10 * t + k) for t in range(steps) for k, shape in enumerate(shapes)])
    proposals = iter(zip(views, torch.zeros(steps, each * b).long(), levels, strict=True))
    monkeypatch.setattr(constraint, "propose", lambda *_: next(proposals))
    monkeypatch.setattr(torch, "rand", lambda *_, **__: next(draws))
    infos = [trainer.step(x[t * b : (t + 1) * b], y[t * b : (t + 1) * b]) for t in range(steps)]
    duals, losses, kept, bias = OFFICIAL[mh_steps, chains, mixture]
    assert constraint.history.flatten().tolist() == pytest.approx(duals, abs=1e-8)
    assert [info.aug_loss.item() for info in infos] == pytest.approx(losses, abs=1e-8)
    assert (30 * infos[-1].levels).round().flatten().tolist() == kept
    assert model[4].bias.tolist() == pytest.approx(bias, abs=1e-8)


def test_the_threshold_leaves_out_what_is_easy():
    """Three operations of loss 0.1, 1 and 3; beyond a threshold of 0.9 the chain visits them as 0 : 0.1 : 2.1."""
    losses = torch.tensor([0.1, 1.0, 3.0])
    ops = {str(k): (lambda x, level, sign, k=k: torch.full_like(x, float(k))) for k in range(3)}
    constraint = InvarianceConstraint(
        AugmentationSpace(ops), mh_steps=60, threshold=0.9,
        loss_fn=lambda logits, y, reduction: losses[logits[:, 0].round().long()],
    )  # fmt: skip
    torch.manual_seed(0)
    model = lambda x: torch.cat([x, 1 - x], 1)  # noqa: E731
    constraint(model, torch.zeros(4000, 1), torch.zeros(4000).long())
    share = torch.tensor(list(symmetry_report(constraint).operations.values())) / 4000
    assert share[0] == 0
    assert share[2].item() == pytest.approx(2.1 / 2.2, abs=0.02)


def test_a_convex_problem_meets_its_constraint_with_complementary_slackness():
    """Logistic regression on two blobs; the transformation disturbs the coordinate that tells them apart best."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(200) % 2
    x = torch.randn(200, 2, generator=generator) * torch.tensor([0.6, 0.1]) + (2.0 * y - 1)[:, None]
    space = AugmentationSpace({"shift": lambda x, level, sign: x + sign[:, None] * torch.tensor([0.0, 2.0])})

    def run(margin):
        """Loss on transformed data and multiplier, means over the last steps."""
        torch.manual_seed(0)
        model = nn.Linear(2, 2)
        constraint = InvarianceConstraint(space, margin=margin, dual_lr=0.1)
        trainer = InvarianceConstrainedTrainer(model, torch.optim.SGD(model.parameters(), 0.5), constraint)
        infos = [trainer.step(x, y) for _ in range(250)][-60:]
        return [torch.stack([getattr(i, name)[0] for i in infos]).mean().item() for name in ("aug_loss", "dual")]

    loss, dual = run(9.0)
    assert loss > 0.8
    assert dual == 0
    loss, dual = run(0.3)
    assert loss == pytest.approx(0.3, abs=0.02)
    assert dual > 0.01


def test_state_round_trip_goes_on_bit_for_bit(batch):
    x, y = batch

    def made():
        model = net()
        constraint = InvarianceConstraint(SPACE, dual_lr=0.1, margin=0.1)
        return InvarianceConstrainedTrainer(model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), constraint)

    first = made()
    torch.manual_seed(0)
    first.step(x, y)
    second = made()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for trainer in (first, second):
        torch.manual_seed(5)
        trainer.step(x, y)
    assert torch.equal(first.constraint.dual.value, second.constraint.dual.value)
    assert torch.equal(first.constraint.counts, second.constraint.counts)
    assert torch.equal(symmetry_report(first).dual, symmetry_report(second).dual)
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))


def test_dtypes(batch):
    x, y = batch
    for dtype in (torch.float64, torch.bfloat16):
        model = net(dtype=dtype)
        info = InvarianceConstraint(SPACE, dual_init=1.0)(model, x.to(dtype), y)
        info.loss.backward()
        assert info.logits.dtype == dtype
        assert all(p.grad.isfinite().all() for p in model.parameters())


def test_token_sequences_with_operations_of_ones_own():
    model = nn.Sequential(nn.Embedding(20, 8), nn.Flatten(), nn.Linear(8 * 6, 3))

    def masked(x, level, sign):
        return torch.where(torch.rand(x.shape) < level[:, None], 0, x)

    tokens = torch.randint(1, 20, (4, 6))
    info = InvarianceConstraint(AugmentationSpace({"mask": masked}), dual_init=1.0)(model, tokens, torch.arange(4) % 3)
    info.loss.backward()
    assert info.aug_loss.item() > 0


def test_transformers_trainer_trains_and_checkpoints_the_multiplier(tmp_path):
    from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    constraint = InvarianceConstraint(SPACE, margin=0.01, dual_lr=0.1, prepare=lambda x: x * 2 - 1)
    model = InvarianceConstrainedModel(ViTForImageClassification(config), constraint)
    data = [{"pixel_values": torch.rand(3, 8, 8), "labels": k % 3} for k in range(12)]
    args = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=4, per_device_eval_batch_size=6, report_to=[],
        save_steps=3, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert constraint.dual.value.item() > 0
    assert len(symmetry_report(model).dual) == 3
    assert trainer.predict(data).predictions.shape == (12, 3)
    assert len(symmetry_report(model).dual) == 3
    model.eval()
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(model(pixel_values=x).logits, model.model(pixel_values=x * 2 - 1).logits)


def constraint(**changes):
    return InvarianceConstraint(SPACE, **changes)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, y: mh_sample(torch.rand(3, 2)), ValueError, "proposals, chains, batch"),
        (lambda x, y: mh_sample(-torch.rand(3, 2, 1)), ValueError, "negative"),
        (lambda x, y: mh_sample(torch.full((3, 2, 1), torch.nan)), ValueError, "NaN"),
        (lambda x, y: DualVariable(0), ValueError, "n must"),
        (lambda x, y: DualVariable(1, lr=0), ValueError, "lr"),
        (lambda x, y: DualVariable(1, init=-1), ValueError, "init"),
        (lambda x, y: DualVariable(1, max=0), ValueError, "max"),
        (lambda x, y: DualVariable(2).update(torch.zeros(1)), ValueError, "slack"),
        (lambda x, y: DualVariable(1).update(torch.tensor([torch.nan])), ValueError, "diverged"),
        (lambda x, y: constraint(mh_steps=0), ValueError, "mh_steps"),
        (lambda x, y: constraint(chains=0), ValueError, "chains"),
        (lambda x, y: constraint(margin=-1), ValueError, "margin must not"),
        (lambda x, y: constraint(margin={"a": 1}), ValueError, "margin must name the groups all"),
        (lambda x, y: constraint(groups={"g": ["twist"]}), ValueError, "twist; there are"),
        (lambda x, y: constraint(groups={"g": ["identity"]}), ValueError, "no operation"),
        (lambda x, y: constraint(mixture=True, chains=2), ValueError, "mixture"),
        (lambda x, y: constraint(threshold=-1.0), ValueError, "threshold"),
        (lambda x, y: constraint(margin="0.5"), TypeError, "margin must be a number"),
        (lambda x, y: constraint(proposal_mode="off"), ValueError, "proposal_mode"),
        (lambda x, y: constraint()(net(), x, y[:3]), ValueError, "equally many"),
        (lambda x, y: constraint()(net(), x * 3, y), ValueError, "before normalising"),
        (lambda x, y: constraint(loss_fn=lambda a, *_, reduction: a.mean())(net(), x, y), ValueError, "one loss"),
        (lambda x, y: constraint(loss_fn=lambda a, b, reduction: -a[:, 0].abs())(net(), x, y), ValueError, "negative"),
        (lambda x, y: constraint()(lambda x: {"features": x}, x, y), TypeError, "logits"),
        (lambda x, y: constraint()(lambda x: x.mean((1, 2, 3)), x, y), ValueError, "batch, classes"),
        (lambda x, y: InvarianceConstrainedTrainer(net(), None, constraint(), clip=0), ValueError, "clip"),
        (lambda x, y: InvarianceConstrainedModel(net(), constraint())(x), ValueError, "labels"),
    ],
)  # fmt: skip
def test_bad_input(batch, without_shape_checks, call, error, message):
    with pytest.raises(error, match=message):
        call(*batch)

import math
import subprocess
import sys
from functools import partial

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from torchgraft.vision import sla
from torchgraft.vision.sla import LabelAugmentation, SLAClassifier, SLAHead, aggregate_logits, sla_loss, slice_logits

# Top left pixels (red, green, blue) of the rows that augmentations.py of hankook/SLA at
# bc5d9cd9f8dbe102b592a09b956d60d47c64f665 makes of arange(12).view(1, 3, 2, 2): rotation, color_perm, rot_color_perm6,
# rot_color_perm12 and rot_color_perm24.
OFFICIAL = {
    "rotation": [[0, 4, 8], [1, 5, 9], [3, 7, 11], [2, 6, 10]],
    "color_perm": [[0, 4, 8], [0, 8, 4], [4, 0, 8], [4, 8, 0], [8, 0, 4], [8, 4, 0]],
    "rotation2*color_perm3": [[0, 4, 8], [4, 8, 0], [8, 0, 4], [3, 7, 11], [7, 11, 3], [11, 3, 7]],
    "rotation*color_perm3": [
        [0, 4, 8], [4, 8, 0], [8, 0, 4], [1, 5, 9], [5, 9, 1], [9, 1, 5], [3, 7, 11], [7, 11, 3], [11, 3, 7],
        [2, 6, 10], [6, 10, 2], [10, 2, 6],
    ],
    "rotation*color_perm": [
        [0, 4, 8], [0, 8, 4], [4, 0, 8], [4, 8, 0], [8, 0, 4], [8, 4, 0], [1, 5, 9], [1, 9, 5], [5, 1, 9], [5, 9, 1],
        [9, 1, 5], [9, 5, 1], [3, 7, 11], [3, 11, 7], [7, 3, 11], [7, 11, 3], [11, 3, 7], [11, 7, 3], [2, 6, 10],
        [2, 10, 6], [6, 2, 10], [6, 10, 2], [10, 2, 6], [10, 6, 2],
    ],
}  # fmt: skip

# Losses of the process functions of trainers.create_sla_trainer (T None) and create_sla_sd_trainer, same commit, on the
# linear model and images of `tiny`, as (with_large_loss, T) -> loss; then single_preds and agg_preds.
LOSSES = {
    (False, None): 2.464205, (False, 1.0): 4.612584, (False, 4.0): 4.644363,
    (True, None): 9.856820, (True, 1.0): 12.005199, (True, 4.0): 12.036979,
}  # fmt: skip
SINGLE = [[0.421456, -0.068668, -0.771358], [-1.011173, 1.325002, -0.942983]]
AGGREGATED = [[0.388466, -0.377492, 0.263418], [0.603910, -0.172345, -0.188170]]


def tiny():
    head = SLAHead(12, 3, 4)
    with torch.no_grad():
        for name, p in (("a", head.joint), ("b", head.single)):
            for part in ("bias", "weight"):
                t = getattr(p, part)
                values = torch.arange(t.numel(), dtype=torch.float32) * 0.7 + len(f"{name}.{part}")
                t.copy_(torch.sin(values).view_as(t))
    x = torch.cos(torch.arange(24, dtype=torch.float32) * 1.3).view(2, 3, 2, 2)
    return head, LabelAugmentation("rotation"), x, torch.tensor([2, 0])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def logits(batch=3, classes=5, m=4, **kwargs):
    return torch.randn(batch * m, classes * m, **kwargs), torch.randint(0, classes, (batch,))


# --- transformations and labels


@pytest.mark.parametrize("name", list(OFFICIAL))
def test_rows_are_those_of_the_official_augmentations(name):
    rows = LabelAugmentation(name)(torch.arange(12).view(1, 3, 2, 2))
    assert rows[:, :, 0, 0].tolist() == OFFICIAL[name]


def test_subsets_are_subsets():
    x = torch.randn(2, 3, 4, 4)
    four, six = LabelAugmentation("rotation")(x), LabelAugmentation("color_perm")(x)
    rows = six.view(2, 6, 3, 4, 4)[:, [0, 3, 4]].flatten(0, 1)
    assert torch.equal(LabelAugmentation("color_perm3")(x), rows)
    assert torch.equal(LabelAugmentation("rotation2")(x), four.view(2, 4, 3, 4, 4)[:, [0, 2]].flatten(0, 1))


def test_rotation_rows_are_sample_major():
    x = torch.randn(3, 1, 5, 5)
    augment = LabelAugmentation("rotation")
    rows, labels = augment(x), augment.joint_labels(torch.tensor([2, 0, 1]))
    for b, y in enumerate([2, 0, 1]):
        for j in range(4):
            assert torch.equal(rows[b * 4 + j], torch.rot90(x[b], j, (1, 2)))
            assert labels[b * 4 + j] == y * 4 + j


NAMES = ["rotation", "rotation2", "color_perm", "color_perm3"]


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(NAMES[:2]), st.sampled_from(NAMES[2:]), st.booleans(), st.sampled_from(["*", " * "]))
def test_products_compose_outer_by_inner(turn, colour, swapped, times):
    outer, inner = (colour, turn) if swapped else (turn, colour)
    a, b = LabelAugmentation(outer), LabelAugmentation(inner)
    product = LabelAugmentation(outer + times + inner)
    x = torch.randn(2, 3, 3, 3)
    assert product.num_transforms == a.num_transforms * b.num_transforms
    rows = product(x)
    assert torch.equal(rows, b(a(x)))
    # all views of one image differ, the first is the image
    assert len({tuple(row.flatten().tolist()) for row in rows[: product.num_transforms]}) == product.num_transforms
    assert torch.equal(rows[:: product.num_transforms], x)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.lists(st.integers(0, 3), min_size=0, max_size=5))
def test_hard_and_soft_labels_agree(m, extra, y):
    classes = 3 + extra
    hard = torch.tensor(y, dtype=torch.long)
    joint = sla.joint_labels(hard, m)
    assert torch.equal(joint // m, hard.repeat_interleave(m))
    assert torch.equal(joint % m, torch.arange(m).repeat(len(y)))
    soft = sla.joint_labels(F.one_hot(hard, classes).float(), m)
    assert torch.equal(soft, F.one_hot(joint, classes * m).float())


def test_own_functions_and_modules():
    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("by", torch.ones(1))

        def forward(self, x):
            return x + self.by

    augment = LabelAugmentation([lambda x: x, Shift()]).double()
    x = torch.zeros(2, 1, 2, 3).double()
    assert augment(x).dtype == torch.float64
    assert augment(x)[:, 0, 0, 0].tolist() == [0, 1, 0, 1]
    assert "2 functions" in repr(augment)
    assert "rotation2" in repr(LabelAugmentation("rotation2"))


def test_grey_images_are_warned_about_where_colours_move():
    grey = torch.rand(2, 1, 4, 4).expand(2, 3, 4, 4)
    with pytest.warns(UserWarning, match="grey"):
        LabelAugmentation("color_perm")(grey)


@pytest.mark.filterwarnings("error")
def test_nobody_else_is_warned():
    LabelAugmentation("rotation")(torch.rand(2, 1, 4, 4).expand(2, 3, 4, 4))
    LabelAugmentation("color_perm")(torch.rand(2, 3, 4, 4))


# --- parity with the official trainers


@pytest.mark.parametrize(("large", "T"), list(LOSSES))
def test_losses_of_the_official_trainers(large, T):
    head, augment, x, y = tiny()
    joint, single = head(augment(x).flatten(1))
    if T is None:
        found = sla_loss(joint, None, y, 4, large=large)
    else:
        found = sla_loss(joint, single, y, 4, T=T, large=large)
    assert found.item() == pytest.approx(LOSSES[large, T], abs=1e-5)


def test_logits_of_the_official_trainers():
    head, augment, x, _ = tiny()
    z = augment(x).flatten(1)
    joint = head(z).joint
    for found in (slice_logits(joint, 4), head.slice(z[::4])):
        torch.testing.assert_close(found, torch.tensor(SINGLE), atol=1e-5, rtol=0)
    for found in (aggregate_logits(joint, 4), head.aggregate(z)):
        torch.testing.assert_close(found, torch.tensor(AGGREGATED), atol=1e-5, rtol=0)


# --- identities of the paper


def test_slices_recover_every_transformation():
    joint, _ = logits(2, 3, 4)
    for j in range(4):
        piece = slice_logits(joint, 4, j)
        assert piece.shape == (2, 3)
        for b in range(2):
            for i in range(3):
                assert piece[b, i] == joint[b * 4 + j, i * 4 + j]
    mean = sum(slice_logits(joint, 4, j) for j in range(4)) / 4
    torch.testing.assert_close(aggregate_logits(joint, 4), mean)


def test_one_transformation_is_plain_classification_bitwise():
    joint, y = logits(6, 5, 1)
    assert torch.equal(aggregate_logits(joint, 1), joint)
    assert torch.equal(slice_logits(joint, 1), joint)
    assert torch.equal(sla_loss(joint, None, y, 1), F.cross_entropy(joint, y))
    head = SLAHead(7, 5, 1)
    z = torch.randn(6, 7)
    torch.testing.assert_close(head.aggregate(z), head.joint(z))


def heads(n=5, m=4, d=7, batch=6):
    return (torch.randn(k, d, dtype=torch.float64) for k in (n, m, batch * m)), torch.randint(0, n, (batch,))


def test_tied_weights_give_da_plus_log_m():
    (u, _, z), y = heads()
    joint = z @ u.repeat_interleave(4, 0).T
    tied = sla_loss(joint, None, y, 4)
    torch.testing.assert_close(tied, sla.da_loss(z @ u.T, y, 4) + math.log(4), rtol=1e-13, atol=1e-13)


def test_additive_weights_give_mt():
    (u, v, z), y = heads()
    joint = z @ (u[:, None] + v).flatten(0, 1).T
    found = sla_loss(joint, None, y, 4)
    torch.testing.assert_close(found, sla.mt_loss(z @ u.T, z @ v.T, y, 4), rtol=1e-13, atol=1e-13)


def test_uniform_pretext_gives_da():
    (u, v, z), y = heads()
    uniform = sla.mt_loss(z @ u.T, z @ (0 * v).T, y, 4)
    torch.testing.assert_close(uniform, sla.da_loss(z @ u.T, y, 4) + math.log(4), rtol=1e-13, atol=1e-13)


def test_da_is_the_mean_over_the_copies():
    out, y = torch.randn(12, 5), torch.randint(0, 5, (3,))
    mean = sum(F.cross_entropy(out[j::4], y) for j in range(4)) / 4
    torch.testing.assert_close(sla.da_loss(out, y, 4), mean)


def test_naive_formula_with_distillation():
    joint, y = logits(3, 5, 4, dtype=torch.float64)
    single = torch.randn(12, 5, dtype=torch.float64)
    T, beta = 2.5, 0.3
    expected = 0.0
    for b in range(3):
        for j in range(4):
            expected -= joint[b * 4 + j].log_softmax(0)[y[b] * 4 + j].item() / 12
        s = torch.stack([sum(joint[b * 4 + j, i * 4 + j] for j in range(4)) / 4 for i in range(5)])
        p, q = (s / T).softmax(0), (single[b * 4] / T).softmax(0)
        expected += (T**2 * (p * (p / q).log()).sum().item() - beta * single[b * 4].log_softmax(0)[y[b]].item()) / 3
    found = sla_loss(joint, single, y, 4, T=T, beta=beta).item()
    assert found == pytest.approx(expected, abs=1e-12)
    # (B, N) logits of the identity alone are the same
    assert sla_loss(joint, single[::4], y, 4, T=T, beta=beta).item() == pytest.approx(expected, abs=1e-12)
    plain = sla_loss(joint, None, y, 4)
    torch.testing.assert_close(sla_loss(joint, None, y, 4, large=True), 4 * plain)


@pytest.mark.parametrize("T", [1.0, 4.0])
def test_the_teacher_gets_no_gradient(T):
    head = SLAHead(7, 5, 4)
    z, y = torch.randn(12, 7), torch.randint(0, 5, (3,))
    joint, single = head(z)
    with_kl = torch.autograd.grad(sla_loss(joint, single, y, 4, T=T), [*head.joint.parameters()], retain_graph=True)
    without = torch.autograd.grad(sla_loss(joint, None, y, 4), [*head.joint.parameters()], retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(with_kl, without, strict=True))
    student = torch.autograd.grad(sla_loss(joint, single, y, 4, T=T, beta=0.0), [*head.single.parameters()])
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in student)


def test_squared_temperature_keeps_the_gradients_scale():
    joint, y = logits(50, 5, 4)
    size = []
    for T in (4.0, 64.0):
        single = torch.zeros(50, 5, requires_grad=True)
        (grad,) = torch.autograd.grad(sla_loss(joint, single, y, 4, T=T, beta=0.0), single)
        size.append(grad.abs().mean().item())
    # soft distributions: the gradient tends to the difference of the logits, not to zero
    assert 0.8 < size[1] / size[0] < 1.25


def test_gradients():
    y = torch.tensor([2, 0])
    joint = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    single = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    # the detached teacher is not differentiated, so the two heads are checked one at a time
    frozen = joint.detach()
    assert torch.autograd.gradcheck(lambda s: sla_loss(frozen, s, y, 2, T=3.0, beta=0.5, large=True), single)
    assert torch.autograd.gradcheck(lambda j: sla_loss(j, None, y, 2), joint)
    assert torch.autograd.gradcheck(lambda j: aggregate_logits(j, 2), joint)
    head = SLAHead(3, 2, 2, cosine=5.0).double()
    assert torch.autograd.gradcheck(head.aggregate, torch.randn(4, 3, dtype=torch.float64, requires_grad=True))
    losses = [
        partial(sla.focal_loss, gamma=1.5),
        partial(sla.ldam_loss, counts=[3, 9, 27, 2, 2, 2]),
        partial(sla.class_balanced_loss, counts=[3, 9, 27, 2, 2, 2]),
    ]
    for loss in losses:
        assert torch.autograd.gradcheck(lambda j, loss=loss: sla_loss(j, None, y, 2, base_loss=loss), joint)


@pytest.mark.parametrize("cosine", [None, 10.0])
def test_aggregation_does_not_depend_on_the_order_of_transformations(cosine):
    x = torch.randn(3, 2, 3, 3)
    augment, order = LabelAugmentation("rotation"), [2, 0, 3, 1]
    head, other = SLAHead(18, 5, 4, cosine=cosine), SLAHead(18, 5, 4, cosine=cosine)
    with torch.no_grad():
        for name, p in head.joint.named_parameters():
            moved = p.unflatten(0, (5, 4))[:, order].flatten(0, 1)
            getattr(other.joint, name).copy_(moved)
    z = augment(x).flatten(1)
    moved = z.view(3, 4, -1)[:, order].flatten(0, 1)
    torch.testing.assert_close(head.aggregate(z), other.aggregate(moved), atol=1e-5, rtol=0)
    torch.testing.assert_close(head.aggregate(z), aggregate_logits(other(moved).joint, 4), atol=1e-5, rtol=0)


def test_aggregation_reads_only_matching_slices():
    head, augment, x, _ = tiny()
    turned = torch.rot90(x, 1, (2, 3))
    upright, other = (head.aggregate(augment(v).flatten(1)) for v in (x, turned))
    # a mean over all N * M outputs would make the two equal
    assert (upright - other).abs().max() > 0.1
    everything = head(augment(x).flatten(1)).joint.view(2, 4, 3, 4).mean((1, 3))
    swapped = head(augment(turned).flatten(1)).joint.view(2, 4, 3, 4).mean((1, 3))
    torch.testing.assert_close(everything, swapped)
    # what does not match is not read
    joint, _ = logits(2, 3, 4)
    noisy = joint.view(2, 4, 3, 4) + 100 * (1 - torch.eye(4))[None, :, None]
    assert torch.equal(aggregate_logits(noisy.view_as(joint), 4), aggregate_logits(joint, 4))


@pytest.mark.parametrize("cosine", [None, 10.0])
def test_head_computes_only_the_block_it_needs(cosine):
    head = SLAHead(7, 5, 6, cosine=cosine)
    z = torch.randn(12, 7)
    joint = head(z).joint
    torch.testing.assert_close(head.aggregate(z), aggregate_logits(joint, 6))
    for j in (0, 5):
        torch.testing.assert_close(head.slice(z[j::6], j), slice_logits(joint, 6, j))
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as count:
        head.aggregate(z)
    assert count.get_total_flops() == 2 * 12 * 7 * 5


def test_probabilities_are_not_what_is_averaged():
    joint = torch.tensor([[10.0, 0, 0, 0], [0, 0.0, 0, 4]])
    assert aggregate_logits(joint, 2).tolist() == [[5.0, 2.0]]


def test_soft_labels_are_mixtures_of_hard_ones():
    joint, y = logits(4, 5, 3)
    single, other, share = torch.randn(12, 5), y.roll(1), 0.3
    soft = share * F.one_hot(y, 5).float() + (1 - share) * F.one_hot(other, 5).float()

    def both(loss):
        return share * loss(y) + (1 - share) * loss(other)

    pretext = torch.randn(12, 3)
    for loss in (
        lambda t: sla_loss(joint, None, t, 3),
        lambda t: sla_loss(joint, single, t, 3),
        lambda t: sla.da_loss(single, t, 3),
        lambda t: sla.mt_loss(single, pretext, t, 3),
    ):
        torch.testing.assert_close(loss(soft), both(loss))


def test_bfloat16_is_close():
    head = SLAHead(8, 5, 4)
    z, y = torch.randn(12, 8), torch.tensor([0, 4, 2])
    exact = sla_loss(*head(z), y, 4)
    low = head.bfloat16()
    joint, single = low(z.bfloat16())
    found = sla_loss(joint, single, y, 4)
    assert found.dtype == torch.bfloat16
    assert found.item() == pytest.approx(exact.item(), rel=0.03)
    assert low.aggregate(z.bfloat16()).dtype == torch.bfloat16


def test_compiles_without_a_graph_break():
    # in a process of its own: the run-time shape checks of this suite cannot be traced, and users do not have them
    code = """
import torch
from torch import nn
from torchgraft.vision.sla import SLAClassifier
net = nn.Sequential(nn.Flatten(), nn.Linear(48, 6))
x, y = torch.randn(3, 3, 4, 4), torch.tensor([0, 1, 1])
for mode in ("sla+sd", "mt"):
    model = SLAClassifier(net, 2, "rotation*color_perm3", mode, in_features=6)
    loss = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(loss(x, y), model.loss(x, y)):
        torch.testing.assert_close(a, b)
    voted = torch.compile(lambda x: model.predict(x, aggregate=True), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(voted(x), model.predict(x, aggregate=True))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- imbalance


def test_counts_repeat_class_major():
    assert sla.joint_counts(torch.tensor([7, 2]), 3).tolist() == [7, 7, 7, 2, 2, 2]


def test_class_balanced_formula_and_limits():
    counts, beta = [500, 20, 1], 0.99
    raw = torch.tensor([(1 - beta) / (1 - beta**n) for n in counts])
    weights = sla.class_balanced_weights(counts, beta)
    torch.testing.assert_close(weights, raw / raw.mean())
    out, y = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 1, 0])
    expected = (weights[y] * F.cross_entropy(out, y, reduction="none")).sum() / weights[y].sum()
    torch.testing.assert_close(sla.class_balanced_loss(out, y, counts, beta), expected)
    torch.testing.assert_close(sla.class_balanced_loss(out, y, counts, 0.0), F.cross_entropy(out, y))


def test_focal_formula_and_limits():
    out, y = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 1, 0])
    p = out.softmax(1)[range(6), y]
    torch.testing.assert_close(sla.focal_loss(out, y, 2.0), (-((1 - p) ** 2) * p.log()).mean())
    torch.testing.assert_close(sla.focal_loss(out, y, 0.0), F.cross_entropy(out, y))
    weight = torch.tensor([1.0, 2.0, 3.0])
    assert torch.allclose(sla.focal_loss(out, y, 2.0, weight), (-((1 - p) ** 2) * p.log() * weight[y]).mean())
    sure = torch.tensor([[100.0, 0.0]], requires_grad=True)
    sla.focal_loss(sure, torch.tensor([0]), 0.5).backward()
    assert sure.grad.isfinite().all()


def test_ldam_formula_and_limits():
    out, y, counts = 30 * (torch.rand(6, 3) * 2 - 1), torch.tensor([0, 1, 2, 2, 1, 0]), [500, 20, 1]
    margins = torch.tensor([n**-0.25 for n in counts])
    margins = 0.5 * margins / margins.max()
    moved = (out / 30).clone()
    moved[range(6), y] -= margins[y]
    torch.testing.assert_close(sla.ldam_loss(out, y, counts), F.cross_entropy(30 * moved, y))
    torch.testing.assert_close(sla.ldam_loss(out, y, counts, max_margin=0.0), F.cross_entropy(out, y))
    weight = sla.class_balanced_weights(counts)
    expected = F.cross_entropy(30 * moved, y, weight=weight)
    torch.testing.assert_close(sla.ldam_loss(out, y, counts, weight=weight), expected)


@pytest.mark.parametrize("name", ["class_balanced_loss", "ldam_loss"])
def test_losses_for_imbalance_plug_in(name):
    counts = [40, 5, 1]
    joint_loss = partial(getattr(sla, name), counts=sla.joint_counts(counts, 4))
    single_loss = partial(getattr(sla, name), counts=counts)
    head = SLAHead(7, 3, 4, cosine=30.0)
    y = torch.tensor([0, 2])
    joint, single = head(torch.randn(8, 7))
    assert joint.abs().max() <= 30
    found = sla_loss(joint, single, y, 4, base_loss=joint_loss, single_loss=single_loss)
    by_hand = sla_loss(joint, single, y, 4) - F.cross_entropy(joint, sla.joint_labels(y, 4))
    by_hand += joint_loss(joint, sla.joint_labels(y, 4)) - F.cross_entropy(single[::4], y) + single_loss(single[::4], y)
    torch.testing.assert_close(found, by_hand)
    torch.testing.assert_close(sla.da_loss(single, y, 4, single_loss), single_loss(single, y.repeat_interleave(4)))


# --- few shot


def test_prototypes_by_hand():
    support, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    query = torch.randn(3, 4)
    found = sla.prototype_logits(support, labels, query, 3)
    for k in range(3):
        prototype = support[labels == k].mean(0)
        torch.testing.assert_close(found[:, k], -(query - prototype).square().sum(1))


def test_ridge_is_the_primal_solution():
    support, labels = torch.randn(8, 4).double(), torch.tensor([0, 1] * 4)
    query = torch.randn(3, 4).double()
    target = F.one_hot(labels, 2).double()
    primal = torch.linalg.solve(support.T @ support + 5 * torch.eye(4).double(), support.T @ target)
    torch.testing.assert_close(sla.ridge_logits(support, labels, query, 2, 5.0), query @ primal)


@pytest.mark.parametrize("learner", [sla.prototype_logits, sla.ridge_logits])
def test_joint_episodes(learner):
    augment = LabelAugmentation("rotation")
    patterns = torch.randn(3, 1, 5, 5)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    support, query = (patterns[y] + 0.1 * torch.randn(6, 1, 5, 5) for _ in range(2))
    features, asked = augment(support).flatten(1), augment(query).flatten(1)
    joint = learner(features, augment.joint_labels(y), asked, 12)
    assert joint.shape == (24, 12)
    assert sla_loss(joint, None, y, 4).isfinite()
    assert torch.equal(aggregate_logits(joint, 4).argmax(1), y)


def test_episodes_refuse_what_is_wrong(without_shape_checks):
    z, y = torch.randn(4, 3), torch.tensor([0, 0, 1, 1])
    with pytest.raises(ValueError, match=r"label 2 of 0\.\.2 has no support"):
        sla.prototype_logits(z, y, z, 3)
    with pytest.raises(ValueError, match="support and query"):
        sla.prototype_logits(z, y, torch.randn(2, 4), 2)
    with pytest.raises(ValueError, match=r"labels must have shape \(4,\)"):
        sla.prototype_logits(z, y[:2], z, 2)
    with pytest.raises(ValueError, match="regularization"):
        sla.ridge_logits(z, y, z, 2, 0.0)


# --- classifier


def net():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


MODES = ["sla", "sla+sd", "da", "mt"]


@pytest.mark.parametrize("mode", MODES)
def test_classifier_is_its_parts(mode):
    model = SLAClassifier(net(), 5, "rotation", mode, in_features=6, T=2.0, beta=0.5)
    x, y = torch.randn(3, 3, 6, 6), torch.tensor([0, 4, 2])
    z = model.backbone(model.augment(x))
    loss, out = model(x, y)
    if mode.startswith("sla"):
        joint, single = model.head(z)
        torch.testing.assert_close(loss, sla_loss(joint, single, y, 4, T=2.0, beta=0.5))
        first = slice_logits(joint, 4) if single is None else single[::4]
        voted = aggregate_logits(joint, 4)
    else:
        all_logits = model.head(z)
        expected = sla.da_loss(all_logits, y, 4) if mode == "da" else sla.mt_loss(all_logits, model.pretext(z), y, 4)
        torch.testing.assert_close(loss, expected)
        first, voted = all_logits[::4], all_logits.view(3, 4, 5).mean(1)
    torch.testing.assert_close(out, first)
    torch.testing.assert_close(model.predict(x), first)
    torch.testing.assert_close(model.predict(x, aggregate=True), voted)
    model.eval()
    loss, out = model(x, y)
    torch.testing.assert_close(out, first)
    torch.testing.assert_close(loss, F.cross_entropy(first, y))
    assert model(x).loss is None
    model.aggregate = True
    torch.testing.assert_close(model(x).logits, voted)
    torch.testing.assert_close(model.train()(x, y).logits, voted)


@pytest.mark.parametrize("mode", MODES)
def test_classifier_learns(mode):
    patterns = torch.randn(3, 3, 6, 6)
    y = torch.arange(3).repeat(8)
    x = patterns[y] + 0.3 * torch.randn(24, 3, 6, 6)
    model = SLAClassifier(nn.Sequential(nn.Flatten(), nn.Linear(108, 16), nn.ReLU()), 3, mode=mode, in_features=16)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        loss = model(x, y).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    for aggregate in (False, True):
        assert (model.predict(x, aggregate).argmax(1) == y).float().mean() > 0.9


def test_classifier_takes_dtype_width_and_soft_labels():
    backbone = net().double()
    backbone.num_features = 6
    model = SLAClassifier(backbone, 5, [lambda x: x, lambda x: -x])
    loss, _ = model(torch.randn(2, 3, 5, 6).double(), torch.full((2, 5), 0.2).double())
    assert loss.dtype == torch.float64


TINY = dict(num_labels=4)
FAMILIES = {
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8,
            patch_size=4, **TINY,
        )
    ),
    "resnet": lambda: transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **TINY
        )
    ),
    "convnext": lambda: transformers.ConvNextForImageClassification(
        transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2, **TINY)
    ),
    "swin": lambda: transformers.SwinForImageClassification(
        transformers.SwinConfig(
            image_size=8, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2, **TINY
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", list(FAMILIES))
def test_transformers_classifiers(family, tmp_path):
    model = SLAClassifier(FAMILIES[family](), 4, "rotation")
    assert model.head.joint.in_features == 16
    x, y = torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 3])
    out = model(pixel_values=x, labels=y)
    assert isinstance(out, transformers.modeling_outputs.ImageClassifierOutput)
    out.loss.backward()
    assert all(p.grad is not None for p in model.backbone.parameters() if p.requires_grad)
    assert model.features(x).shape == (3, 16)
    model.eval()
    assert model(x).logits.shape == (3, 4)
    model.save_pretrained(tmp_path)
    other = SLAClassifier.from_pretrained(tmp_path).eval()
    for aggregate in (False, True):
        torch.testing.assert_close(other.predict(x, aggregate), model.predict(x, aggregate))


def test_bare_encoders_and_backbones():
    sizes = dict(hidden_sizes=[8, 16], depths=[1, 1])
    bare = transformers.ResNetModel(transformers.ResNetConfig(embedding_size=8, layer_type="basic", **sizes))
    outs = transformers.ConvNextConfig(num_stages=2, patch_size=2, out_features=["stage1", "stage2"], **sizes)
    small = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    vit = transformers.ViTConfig(image_size=8, patch_size=4, **small)
    backbones = (
        bare,
        transformers.ConvNextBackbone(outs),
        transformers.ViTModel(vit),
        transformers.ViTModel(vit, add_pooling_layer=False),
    )
    for backbone in backbones:
        model = SLAClassifier(backbone, 4)
        assert model(torch.randn(2, 3, 8, 8), torch.tensor([0, 3])).loss.isfinite()


@pytest.mark.parametrize("own", [False, True])
def test_trainer_works_unchanged(own, tmp_path):
    model = SLAClassifier(net() if own else FAMILIES["vit"](), 4, "rotation", in_features=6 if own else None)
    data = [{"pixel_values": torch.randn(3, 8, 8), "labels": i % 4} for i in range(10)]
    fields = transformers.TrainingArguments.__dataclass_fields__
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
    arguments = transformers.TrainingArguments(
        tmp_path, per_device_train_batch_size=4, per_device_eval_batch_size=4, max_steps=3, report_to=[], use_cpu=True,
        save_strategy="no", logging_strategy="no", disable_tqdm=True, **{checkpointing: not own},
    )  # fmt: skip
    before = model.head.joint.weight.detach().clone()
    trainer = transformers.Trainer(
        model, arguments, train_dataset=data, eval_dataset=data,
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )  # fmt: skip
    trainer.train()
    assert not torch.equal(before, model.head.joint.weight)
    assert {"eval_loss", "eval_accuracy"} <= trainer.evaluate().keys()
    assert trainer.predict(data).predictions.shape == (10, 4)
    trainer.save_model(tmp_path / "saved")
    assert any((tmp_path / "saved").iterdir())


def test_classifiers_that_are_not_found_have_to_be_named(without_shape_checks):
    model = FAMILIES["vit"]()
    model.classifier = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 5))
    with pytest.raises(ValueError, match="no linear layer of 4 outputs"):
        SLAClassifier(model, 4)
    assert SLAClassifier(model, 4, classifier="classifier.1").head.joint.in_features == 8


@pytest.mark.parametrize("mode", MODES)
def test_saving_a_network_of_ones_own(mode, tmp_path):
    model = SLAClassifier(net(), 5, "rotation*color_perm3", mode, in_features=6, T=3.0, aggregate=True).eval()
    model.save_pretrained(tmp_path)
    other = SLAClassifier.from_pretrained(tmp_path, net()).eval()
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(other(x).logits, model(x).logits)
    assert other.settings == model.settings
    with pytest.raises(ValueError, match="backbone is missing"):
        SLAClassifier.from_pretrained(tmp_path)
    again = SLAClassifier(net(), 5, "rotation*color_perm3", mode, in_features=6).eval()
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again.predict(x), model.predict(x, aggregate=False))


def test_saved_functions_have_to_be_given_again(tmp_path):
    own = [lambda x: x, lambda x: -x]
    model = SLAClassifier(net(), 5, own, in_features=6).eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="give them again"):
        SLAClassifier.from_pretrained(tmp_path, net())
    other = SLAClassifier.from_pretrained(tmp_path, net(), transforms=own).eval()
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(other.predict(x), model.predict(x))


# --- wrong inputs

JOINT = torch.zeros(8, 12)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: LabelAugmentation("rotate"), ValueError, "'rotate'; use 'rotation'"),
        (lambda: LabelAugmentation("rotation*rotation2"), ValueError, "repeats 'rotation'"),
        (lambda: LabelAugmentation("color_perm*rotation*color_perm3"), ValueError, "at most one rotation"),
        (lambda: LabelAugmentation([]), ValueError, "transforms is empty"),
        (lambda: LabelAugmentation(["rotation"]), TypeError, "functions of a batch"),
        (lambda: LabelAugmentation([lambda x: x.flip(3)])(torch.rand(1, 1, 2, 2)), ValueError, "must be the identity"),
        (lambda: LabelAugmentation([lambda x: -x])(torch.zeros(1, 1, 2, 2)), ValueError, "must be the identity"),
        (lambda: LabelAugmentation([lambda x: x, lambda x: x[:, :1]])(torch.rand(1, 3, 2, 2)), ValueError, "keep it"),
        (lambda: LabelAugmentation("rotation")(torch.rand(1, 3, 2, 4)), ValueError, "square images, got 2 x 4"),
        (lambda: LabelAugmentation("color_perm")(torch.rand(1, 1, 2, 2)), ValueError, "3 channels, got 1"),
        (lambda: LabelAugmentation("rotation")(torch.rand(3, 2, 2)), ValueError, r"\(B, C, H, W\)"),
        (lambda: sla.joint_labels(torch.tensor([0.5]), 4), TypeError, "y must be whole numbers"),
        (lambda: sla.joint_labels(torch.tensor([0]), 0), ValueError, "num_transforms must be at least 1"),
        (lambda: aggregate_logits(torch.zeros(7, 12), 4), ValueError, "does not divide by num_transforms=4"),
        (lambda: aggregate_logits(torch.zeros(8, 10), 4), ValueError, "does not divide by num_transforms=4"),
        (lambda: aggregate_logits(torch.zeros(8), 4), ValueError, "joint must have shape"),
        (lambda: slice_logits(JOINT, 4, 4), ValueError, "transform must be in 0..3, got 4"),
        (lambda: sla_loss(JOINT, None, torch.tensor([0, 3]), 4), ValueError, r"0..2, got 0..3"),
        (lambda: sla_loss(JOINT, None, torch.tensor([-100, 0]), 4), ValueError, "no ignore_index"),
        (lambda: sla_loss(JOINT, None, torch.tensor([0]), 4), ValueError, r"y must have shape \(2,\)"),
        (lambda: sla_loss(JOINT, None, torch.zeros(2, 4), 4), ValueError, r"y must have shape \(2, 3\)"),
        (lambda: sla_loss(JOINT, torch.zeros(4, 3), torch.tensor([0, 1]), 4), ValueError, "single must have shape"),
        (lambda: sla_loss(JOINT, None, torch.tensor([0, 1]), 4, T=0.0), ValueError, "T must be positive"),
        (lambda: sla.da_loss(torch.zeros(7, 3), torch.tensor([0, 1]), 4), ValueError, r"B \* 4 rows"),
        (
            lambda: sla.mt_loss(torch.zeros(8, 3), torch.zeros(8, 3), torch.tensor([0, 1]), 4),
            ValueError,
            r"pretext must have shape \(8, 4\)",
        ),
        (lambda: sla.joint_counts([3, 0], 2), ValueError, "counts must be one positive number"),
        (lambda: sla.class_balanced_weights([3, 1], 1.0), ValueError, "beta"),
        (
            lambda: sla.ldam_loss(JOINT, torch.zeros(8, dtype=torch.long), [1, 2, 3]),
            ValueError,
            "3 numbers, the logits have 12 labels; for joint logits",
        ),
        (lambda: sla.focal_loss(JOINT, torch.zeros(8, 12)), TypeError, "soft labels"),
        (lambda: sla.focal_loss(JOINT, torch.zeros(8, dtype=torch.long), -1.0), ValueError, "gamma"),
        (lambda: SLAHead(0, 3, 4), ValueError, "in_features and num_classes"),
        (lambda: SLAHead(3, 3, 4, cosine=0.0), ValueError, "cosine"),
        (lambda: SLAHead(3, 3, 4).aggregate(torch.zeros(6, 3)), ValueError, "not a multiple of 4"),
        (lambda: SLAHead(3, 3, 4).slice(torch.zeros(6, 3), -1), ValueError, "transform must be in 0..3"),
        (lambda: SLAClassifier(net(), 3), ValueError, "pass in_features=d"),
        (lambda: SLAClassifier(net(), 3, mode="baseline", in_features=6), ValueError, "mode must be one of 'sla'"),
        (lambda: SLAClassifier(lambda x: x, 3, in_features=6), TypeError, "backbone must be"),
        (lambda: SLAClassifier(FAMILIES["vit"](), 4, classifier="top"), ValueError, "'top' is not a module"),
        (lambda: SLAClassifier(FAMILIES["vit"](), 4, classifier="vit"), ValueError, "name an nn.Linear"),
        (
            lambda: SLAClassifier(nn.Conv1d(3, 3, 1), 3, in_features=6).features(torch.zeros(2, 3, 4)),
            ValueError,
            r"features of shape \(B, d\)",
        ),
        (
            lambda: SLAClassifier(net(), 3, in_features=6)(torch.zeros(2, 3, 6, 6), torch.tensor([0, 3])),
            ValueError,
            "0..2, got 0..3",
        ),
    ],
)
def test_wrong_inputs(without_shape_checks, call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_several_classifiers_have_to_be_named():
    config = transformers.DeiTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4,
        num_labels=4,
    )  # fmt: skip
    with pytest.raises(ValueError, match="several classifiers"):
        SLAClassifier(transformers.DeiTForImageClassificationWithTeacher(config), 4)

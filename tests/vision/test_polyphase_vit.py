import itertools
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from torch import nn

from torchgraft.vision.polyphase_vit import (
    CircularPEG,
    PolyPatchEmbed,
    PolyphaseAnchor,
    PolyTwinsConfig,
    PolyTwinsSVT,
    anchor_tokens,
    load_shift_equivariant,
    make_shift_equivariant,
    polyphase_anchor,
    polyphase_norms,
    polyphase_offsets,
    polyphase_unanchor,
    shift_consistency,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def wave(*shape):
    n = torch.tensor(shape).prod()
    return torch.sin(torch.arange(n, dtype=torch.float64).square() * 0.13).float().view(*shape)


def filled(module):
    """Every number of a module by a formula, so that another implementation can have the same."""
    with torch.no_grad():
        for i, (name, value) in enumerate(sorted(module.state_dict().items())):
            value.copy_((0.3 * torch.cos(torch.arange(value.numel(), dtype=torch.float64) * 0.7 + i)).view(value.shape))
            if "norm" in name and name.endswith("weight"):
                value.add_(1)
    return module


def shifts(H, W):
    return itertools.product(range(H), range(W))


def all_rolled(x, step=(1, 1)):
    """(S, B, C, H, W): every cyclic shift, or every one by whole steps."""
    H, W = x.shape[2:]
    return torch.stack([x.roll((s, t), (2, 3)) for s in range(0, H, step[0]) for t in range(0, W, step[1])])


def awkward(H, W):
    """Images on which norms tie: few greys, dots, dots of which rows and columns tell nothing, stripes, flat."""
    images = torch.zeros(9, 1, H, W)
    images[0] = torch.randint(0, 3, (1, H, W))
    images[1, 0, 1, 2] = 1
    images[2, 0, 1, 2] = images[2, 0, 3, 2] = 1
    for row, column in enumerate(torch.randperm(min(H, W)).tolist()):
        images[3, 0, row, column] = 1
    # rows and columns look alike after two pixels, the image does not
    for row, column in zip(range(0, 8, 2), (0, 4, 2, 6), strict=True):
        images[4, 0, row, column] = 1
    images[5, 0, ::2] = 1
    images[6] = 0.25
    images[7, 0, 2:5, 1:7] = 1
    # every filter answers to both alike but for the sign
    images[8, 0, 1, 2], images[8, 0, 1, 2 + W // 2] = 1, -1
    return images


# the anchor


@pytest.mark.parametrize("patch", [2, 4, (2, 3), (4, 1)])
@pytest.mark.parametrize("norm", ["l2", 1, 3.0])
def test_anchor_is_the_roll_that_brute_force_finds(patch, norm):
    x = torch.randn(3, 2, 8, 12, dtype=torch.float64)
    p, q = patch if isinstance(patch, tuple) else (patch, patch)
    out, offsets = polyphase_anchor(x, patch, norm, return_offsets=True)
    power = 2 if norm == "l2" else norm
    norms = torch.empty(3, p, q, dtype=torch.float64)
    for a, b in shifts(p, q):
        norms[:, a, b] = x[:, :, a::p, b::q].abs().pow(power).sum((1, 2, 3)).pow(1 / power)
    torch.testing.assert_close(polyphase_norms(x, patch, norm), norms, rtol=1e-12, atol=0)
    for i in range(3):
        best = int(norms[i].argmax())
        a, b = best // q, best % q
        assert offsets[i].tolist() == [a, b]
        assert torch.equal(out[i], x[i].roll((-a, -b), (1, 2)))


def test_filtered_norm_is_the_norm_of_one_response_to_all_channels():
    x = torch.randn(2, 6, 6, 6, dtype=torch.float64)
    # the response to an impulse is the filter
    impulses = torch.zeros(6, 6, 6, 6, dtype=torch.float64)
    for c in range(6):
        impulses[c, c, 3, 3] = 1
    norms = polyphase_norms(impulses, 6)
    assert ((norms > 1e-9).sum((1, 2)) == 9).all()
    total = polyphase_norms(x, 1)[:, 0, 0]
    parts = polyphase_norms(x, 3)
    torch.testing.assert_close(parts.square().sum((1, 2)).sqrt(), total)
    # adding a constant, or what a channel mix does not see, changes nothing
    torch.testing.assert_close(polyphase_norms(x + 3, 3), parts)


@pytest.mark.parametrize("patch", [(2, 2), (4, 4), (4, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["random", "awkward"])
def test_every_shift_moves_the_anchored_image_by_whole_patches(patch, dtype, kind):
    H, W = 8, 12
    x = (torch.randn(2, 3, H, W) if kind == "random" else awkward(H, W)).to(dtype)
    grids = all_rolled(polyphase_anchor(x, patch), patch)
    after = polyphase_anchor(all_rolled(x).flatten(0, 1), patch).unflatten(0, (H * W, len(x)))
    assert (after[:, None] == grids).flatten(3).all(3).any(1).all()


@pytest.mark.parametrize("kind", ["random", "awkward"])
def test_invariant_anchor_gives_one_tensor_for_all_shifts(kind):
    x = torch.randn(3, 3, 8, 12) if kind == "random" else awkward(8, 12)
    anchor = PolyphaseAnchor((4, 2), invariant=True)
    before = anchor(x)
    every = anchor(all_rolled(x).flatten(0, 1)).unflatten(0, (96, len(x)))
    assert torch.equal(every, before.expand_as(every))
    _, offsets = polyphase_anchor(x, (4, 2), invariant=True, return_offsets=True)
    assert torch.equal(polyphase_unanchor(before, offsets), x)


def test_the_plain_norm_ties_where_the_filtered_one_does_not():
    """Card, Pitfalls: on digits, first-index argmax of the plain norm is not shift-covariant."""
    x = awkward(8, 12)
    followed = {}
    for norm in ("l2", "filtered"):
        grids = all_rolled(polyphase_anchor(x, 4, norm), (4, 4))
        after = polyphase_anchor(all_rolled(x).flatten(0, 1), 4, norm).unflatten(0, (96, len(x)))
        followed[norm] = int((~(after[:, None] == grids).flatten(3).all(3).any(1).all(0)).sum())
    assert followed["filtered"] == 0
    assert followed["l2"] >= 3


def test_after_a_layer_norm_only_the_filtered_norm_tells_windows_apart():
    tokens = nn.functional.layer_norm(torch.randn(4, 36, 16), (16,))
    spread = {}
    for norm in ("l2", "filtered"):
        found = polyphase_norms(tokens.unflatten(1, (6, 6)).permute(0, 3, 1, 2), 3, norm).flatten(1)
        spread[norm] = ((found.amax(1) - found.amin(1)) / found.mean(1)).min().item()
    assert spread["l2"] < 1e-4
    assert spread["filtered"] > 0.1


def test_limits():
    x = torch.rand(2, 3, 6, 6)
    assert torch.equal(polyphase_anchor(x, 1), x)
    flat = torch.full((2, 3, 6, 6), 0.7)
    assert torch.equal(polyphase_anchor(flat, 3), flat)
    assert polyphase_offsets(flat, 3).tolist() == [[0, 0], [0, 0]]
    once, offsets = polyphase_anchor(x, 3, return_offsets=True)
    assert offsets.any()
    assert torch.equal(polyphase_anchor(once, 3), once)
    assert polyphase_anchor(x[:0], 3).shape == (0, 3, 6, 6)
    both = polyphase_offsets(torch.cat([x, x.roll(1, 2)]), 3)
    assert not torch.equal(both[:2], both[2:]), "each image has its own offset"


@pytest.mark.parametrize("invariant", [False, True])
def test_gradient_is_the_inverse_roll(invariant):
    x = torch.randn(3, 2, 6, 8, dtype=torch.float64, requires_grad=True)
    out, offsets = polyphase_anchor(x, 2, invariant=invariant, return_offsets=True)
    g = torch.randn_like(out)
    out.backward(g)
    for i, (a, b) in enumerate(offsets.tolist()):
        assert torch.equal(x.grad[i], g[i].roll((a, b), (1, 2)))
    small = torch.randn(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: polyphase_anchor(v, 2, invariant=invariant).sin(), small)


def test_dense_outputs_follow_the_image():
    embed = nn.Conv2d(3, 5, 4, 4)

    def dense(x):
        anchored, offsets = polyphase_anchor(x, 4, return_offsets=True)
        y = embed(anchored).repeat_interleave(4, 2).repeat_interleave(4, 3)
        return polyphase_unanchor(y, offsets)

    x = torch.randn(2, 3, 8, 12)
    torch.testing.assert_close(dense(all_rolled(x).flatten(0, 1)), all_rolled(dense(x)).flatten(0, 1))
    small = torch.rand(2, 3, 2, 3)
    whole = torch.tensor([[4, 0], [0, 8]])
    assert torch.equal(polyphase_unanchor(small, whole, stride=4)[1], small[1].roll((0, 2), (1, 2)))


def test_tokens_are_anchored_like_maps():
    x = torch.randn(2, 5, 6, 4)
    rows = anchor_tokens(x.flatten(2).transpose(1, 2), (6, 4), 2)
    torch.testing.assert_close(rows.transpose(1, 2).unflatten(2, (6, 4)), polyphase_anchor(x, 2))


# beside the official code: willding123/Shift-Equivariant-Vision-Transformers, commit c8cd2ef


def test_polyorder():
    # models/poly_utils.py PolyOrder.apply(wave, (4, 4), 2, invariance, False), arrange_polyphases
    x = wave(3, 2, 8, 8)
    assert polyphase_offsets(x, 4, "l2").tolist() == [[0, 0], [2, 1], [0, 2]]
    assert polyphase_offsets(x, 4, "l2", invariant=True)[1:].tolist() == [[6, 1], [0, 2]]
    norms = [2.321344, 1.428493, 2.207703, 1.979038, 2.006636, 2.262484, 1.820927, 2.061405]
    norms += [1.838938, 2.15371, 1.961518, 1.48206, 1.949662, 1.784794, 1.45097, 1.965288]
    torch.testing.assert_close(polyphase_norms(x, 4, "l2")[0].flatten().float(), torch.tensor(norms), atol=1e-6, rtol=0)


def test_patch_embed_and_position():
    # models/poly_utils.py PosConv(6, 6)(PolyPatchEmbed(4, 2, 6, LayerNorm)(wave), (2, 2))[1]
    embed, position = filled(PolyPatchEmbed(4, 2, 6, norm="l2")), filled(CircularPEG(6))
    assert list(embed.state_dict()) == ["proj.weight", "proj.bias", "norm.weight", "norm.bias"]
    assert list(position.state_dict()) == ["proj.weight", "proj.bias"]
    expected = [1.31177, -1.18811, 0.97007, -1.66094, 1.01041, -0.71132, -0.60191, 1.44621, -0.74985, 0.15015]
    expected += [-0.45175, -0.28468, 1.2061, -0.16768, 0.72958, -0.7809, -0.24879, -0.9299, -0.55283, 0.66459]
    expected += [-0.61734, -0.53813, 0.57387, -0.04695]
    found = position(embed(wave(3, 2, 8, 8)), (2, 2))[1].flatten()
    torch.testing.assert_close(found, torch.tensor(expected), atol=2e-5, rtol=0)


OFFICIAL = dict(
    embed_dims=(8, 16), depths=(2, 2), num_heads=(2, 4), window_sizes=(4, 4), sr_ratios=(2, 1), mlp_ratio=2.0,
    patch_size=2, num_classes=5, norm="l2",
)  # fmt: skip


def test_twins():
    # models/polytwins.py PolyTwins.forward_features and forward_head on timm 0.9.16's Twins of these sizes
    model = filled(PolyTwinsSVT(PolyTwinsConfig(**OFFICIAL))).eval()
    expected = [[0.76538, 0.90996, -0.06268, -0.71326, -0.22036], [1.14659, 1.25461, -0.30395, -1.15588, -0.15878]]
    torch.testing.assert_close(model(wave(2, 3, 16, 16)), torch.tensor(expected), atol=2e-5, rtol=0)


def test_twins_has_the_names_of_timm():
    names = set(PolyTwinsSVT(PolyTwinsConfig(**OFFICIAL)).state_dict())
    parts = {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "norm1", "norm2"}
    local = {f"blocks.0.0.{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    reduced = {f"blocks.0.1.attn.{part}.weight" for part in ("q", "kv", "sr", "norm", "proj")}
    around = {"patch_embeds.1.proj.weight", "patch_embeds.0.norm.bias", "pos_block.1.proj.0.weight", "norm.bias"}
    assert local | reduced | around | {"head.weight"} <= names


# whole models

SMALL = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=4,
    num_labels=5,
)  # fmt: skip
WINDOWS = dict(image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=2, num_labels=5)
TWINS = dict(embed_dims=(16, 32), depths=(2, 2), num_heads=(2, 4), window_sizes=(2, 2), sr_ratios=(2, 1), patch_size=2)
FOURTEEN = {k: v for k, v in SMALL.items() if k != "intermediate_size"} | dict(patch_size=14, image_size=28)


def built(family):
    t = transformers
    makers = {
        "vit": lambda: t.ViTForImageClassification(t.ViTConfig(**SMALL)),
        "deit": lambda: t.DeiTForImageClassification(t.DeiTConfig(**SMALL)),
        "deit with teacher": lambda: t.DeiTForImageClassificationWithTeacher(t.DeiTConfig(**SMALL)),
        "dinov2": lambda: t.Dinov2ForImageClassification(t.Dinov2Config(**FOURTEEN)),
        "swin": lambda: t.SwinForImageClassification(t.SwinConfig(**WINDOWS)),
        "swin with places": lambda: t.SwinForImageClassification(t.SwinConfig(**WINDOWS, use_absolute_embeddings=True)),
        "swinv2": lambda: t.Swinv2ForImageClassification(t.Swinv2Config(**WINDOWS)),
        "twins": lambda: PolyTwinsSVT(PolyTwinsConfig(**TWINS, num_classes=5, anchored=False)),
    }
    model = makers[family]().eval()
    for parameter in model.parameters():
        # far from the tiny weights of a new model, with which nothing depends on anything
        nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else None
    return model


FAMILIES = ["vit", "deit", "deit with teacher", "dinov2", "swin", "swin with places", "swinv2", "twins"]


def logits(out):
    return getattr(out, "logits", out)


def some_shifts(family, H, W):
    every = list(shifts(H, W))
    # all of them, but for the larger images a spread that meets every offset within a patch
    return every if H * W <= 256 else every[:: 2 if W % 2 else 3]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_no_cyclic_shift_changes_the_logits(family):
    model = built(family)
    side = 28 if family == "dinov2" else 16
    x = torch.randn(1, 3, side, side)
    plain = logits(model(x))
    assert (logits(model(x.roll((3, 5), (2, 3)))) - plain).abs().max() > 1e-2
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    assert make_shift_equivariant(model) is model
    for name, value in model.state_dict().items():
        if "peg" not in name and not name.endswith(("cls_token", "distillation_token")):
            assert torch.equal(value, weights[name]), name
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-10}
    for dtype, most in tolerance.items():
        model, x = model.to(dtype), x.to(dtype)
        base = logits(model(x))
        chosen = some_shifts(family, side, side) if dtype == torch.float32 else [(1, 0), (3, 5), (7, 14)]
        moved = torch.cat([x.roll(shift, (2, 3)) for shift in chosen])
        found = torch.cat([logits(model(part)) for part in moved.split(128)]).unflatten(0, (len(chosen), 1))
        assert (found - base).abs().max() < most * max(1.0, base.abs().max().item())


@pytest.mark.parametrize("family", ["vit", "swin", "twins"])
@torch.no_grad()
def test_ties_do_not_break_whole_models(family):
    model = make_shift_equivariant(built(family)).double()
    x = awkward(16, 16).expand(-1, 3, -1, -1).double()
    base = logits(model(x))
    for shift in [(1, 0), (0, 1), (2, 2), (3, 7), (9, 14)]:
        torch.testing.assert_close(logits(model(x.roll(shift, (2, 3)))), base, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("family", ["vit", "swin", "twins"])
@torch.no_grad()
def test_images_need_not_be_square(family):
    model = make_shift_equivariant(built(family))
    x = torch.randn(1, 3, 16, 24)
    base = logits(model(x))
    for shift in [(1, 0), (3, 5), (6, 17)]:
        torch.testing.assert_close(logits(model(x.roll(shift, (2, 3)))), base, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["vit", "swin"])
@torch.no_grad()
def test_half_precision(family):
    model = make_shift_equivariant(built(family)).to(torch.bfloat16)
    x = torch.randn(2, 3, 16, 16)
    base = logits(model(x.bfloat16()))
    assert base.dtype == torch.bfloat16
    moved = logits(model(x.roll((3, 5), (2, 3)).bfloat16()))
    torch.testing.assert_close(moved, base, atol=0.1, rtol=0.1)


@torch.no_grad()
def test_patch_tokens_are_rolled_tokens():
    model = transformers.ViTModel(transformers.ViTConfig(**SMALL)).eval()
    make_shift_equivariant(model)
    x = torch.randn(1, 3, 16, 16)
    base = model(x).last_hidden_state[:, 1:].view(1, 4, 4, 16)
    moves = [base.roll(move, (1, 2)) for move in shifts(4, 4)]
    for shift in shifts(5, 5):
        tokens = model(x.roll(shift, (2, 3))).last_hidden_state[:, 1:].view(1, 4, 4, 16)
        assert min((tokens - move).abs().max() for move in moves) < 1e-5


@pytest.mark.parametrize("family", ["vit", "deit", "dinov2", "swin", "swinv2"])
@torch.no_grad()
def test_invariant_mode_leaves_the_model_and_is_exact(family):
    model = built(family)
    side = 28 if family == "dinov2" else 16
    x = torch.randn(2, 3, side, side)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    patch = 14 if family == "dinov2" else 2 if "swin" in family else 4
    expected = logits(model(polyphase_anchor(x, patch, invariant=True)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_shift_equivariant(model, invariant=True)
    assert model.state_dict().keys() == weights.keys()
    for shift in [(0, 0), (1, 0), (3, 5), (6, 13)]:
        assert torch.equal(logits(model(x.roll(shift, (2, 3)))), expected)


@torch.no_grad()
def test_what_does_not_depend_on_position_is_kept():
    """With all places alike, a ViT has no position: the graft then computes the same where the grid stays."""
    for family, extra in (("vit", 1), ("deit", 2)):
        model = built(family)
        places = getattr(model, family).embeddings.position_embeddings
        places[:, extra:] = places[:, extra : extra + 1].clone()
        x = polyphase_anchor(torch.randn(2, 3, 16, 16), 4)
        before = logits(model(x))
        make_shift_equivariant(model)
        torch.testing.assert_close(logits(model(x)), before, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_settings():
    x = torch.randn(2, 3, 16, 16)
    with pytest.warns(UserWarning, match="may change with every shift"):
        kept = make_shift_equivariant(built("vit"), drop_pos_embed=False)
    assert kept.vit.embeddings.position_embeddings is not None
    assert (logits(kept(x)) - logits(kept(x.roll((3, 5), (2, 3))))).abs().max() > 1e-2
    assert kept(torch.randn(2, 3, 24, 24), interpolate_pos_encoding=True).logits.shape == (2, 5)
    bare = make_shift_equivariant(built("vit"), peg=False)
    assert not [name for name in bare.state_dict() if "peg" in name or "position" in name]
    plain = make_shift_equivariant(built("swin"), norm="l2")
    assert plain.swin.encoder.layers[0].blocks[1].norm == "l2"
    assert plain.swin.encoder.layers[0].blocks[1].shift_size == 1


def test_gradients_reach_all_that_is_trained():
    for family in ("vit", "swin", "twins"):
        model = make_shift_equivariant(built(family)).train()
        logits(model(torch.randn(4, 3, 16, 16))).square().sum().backward()
        missing = [name for name, p in model.named_parameters() if p.grad is None]
        assert not missing, (family, missing)


@pytest.mark.parametrize("family", ["vit", "deit", "swinv2"])
@torch.no_grad()
def test_save_and_load(family, tmp_path):
    model = make_shift_equivariant(built(family), norm="l2")
    model.save_pretrained(tmp_path)
    again = load_shift_equivariant(type(model), tmp_path)
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(again(x).logits, model(x).logits)
    assert type(again) is type(model)
    assert again.config.polyphase["norm"] == "l2"
    other = tmp_path / "plain"
    built(family).save_pretrained(other)
    with pytest.raises(ValueError, match="holds no model"):
        load_shift_equivariant(type(model), other)


def test_compiles_in_one_piece():
    # in a process of its own: the shape checks of the test suite are not for tracing
    code = (
        "import torch, warnings; warnings.simplefilter('ignore')\n"
        "from torchgraft.vision.polyphase_vit import PolyPatchEmbed, PolyphaseAnchor\n"
        "embed, origin = PolyPatchEmbed(4, 3, 8), PolyphaseAnchor(4, invariant=True)\n"
        "x = torch.randn(4, 3, 8, 12); x[1] = 0; x[1, :, 1, 2] = x[1, :, 3, 2] = 1\n"
        "both = torch.compile(lambda x: (embed(x), origin(x)), backend='eager', fullgraph=True)\n"
        "found = both(x)\n"
        "assert torch.allclose(found[0], embed(x), atol=1e-6) and torch.equal(found[1], origin(x))\n"
        "assert torch.equal(both(x.roll((3, 2), (2, 3)))[1], found[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-800:]


def test_twins_layouts():
    assert [PolyTwinsConfig.small().multiple, PolyTwinsConfig.base().multiple] == [224, 224]
    assert PolyTwinsConfig.large(num_classes=3).embed_dims == (128, 256, 512, 1024)
    # the last block of the first stage lays no grid: the second embedding has to be anchored by itself
    odd = PolyTwinsConfig(**TWINS | dict(sr_ratios=(1, 1), window_sizes=(3, 3)), num_classes=5)
    model = PolyTwinsSVT(odd).eval().double()
    x = torch.randn(1, 3, 12, 24, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else None
        base = model(x)
        for shift in [(1, 0), (2, 2), (5, 7)]:
            torch.testing.assert_close(model(x.roll(shift, (2, 3))), base, atol=1e-10, rtol=1e-10)
    dropped = PolyTwinsSVT(PolyTwinsConfig(**TWINS, num_classes=5, drop_path=0.5)).train()
    y = torch.randn(2, 3, 16, 16)
    assert not torch.equal(dropped(y), dropped(y))
    assert torch.equal(dropped.eval()(y), dropped(y))


# measuring


@pytest.mark.parametrize("kind", ["cyclic", "realistic", "zero"])
def test_report_is_what_a_loop_finds(kind):
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 4))
    images, labels = torch.randn(20, 3, 12 if kind == "realistic" else 8, 12 if kind == "realistic" else 8), None
    labels = torch.randint(0, 4, (20,))
    report = shift_consistency(net, images, labels, max_shift=2, kind=kind, batch_size=7)
    table = torch.empty(20, 25, 4)
    for s, (dy, dx) in enumerate(report.shifts):
        if kind == "realistic":
            x = images[..., 2 + dy : 10 + dy, 2 + dx : 10 + dx]
        else:
            x = images.roll((-dy, -dx), (2, 3)).clone()
        if kind == "zero":
            for axis, d in ((2, dy), (3, dx)):
                gone = range(8 - d, 8) if d > 0 else range(-d)
                x = x.index_fill(axis, torch.tensor(list(gone), dtype=torch.long), 0.0)
        table[:, s] = net(x).detach()
    torch.testing.assert_close(report.logits, table)
    found = table.argmax(-1)
    pairs = [(found[:, a] == found[:, b]).double() for a, b in itertools.permutations(range(25), 2)]
    assert report.consistency == pytest.approx(torch.stack(pairs).mean().item())
    assert report.worst_case_consistency == pytest.approx((found == found[:, :1]).all(1).double().mean().item())
    right = found == labels[:, None]
    assert report.accuracy() == pytest.approx(right[:, 12].double().mean().item())
    assert report.mean_accuracy == pytest.approx(right.double().mean().item())
    assert report.worst_case_accuracy == pytest.approx(right.all(1).double().mean().item())
    assert report.per_shift_accuracy()[(0, 0)] == report.accuracy()
    true = table[torch.arange(20), :, labels].double()
    expected = (true - true.mean(1, keepdim=True)).square().mean(1).mean().item()
    assert report.logit_variance == pytest.approx(expected, rel=1e-5)


def test_chosen_and_random_shifts():
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 4))
    images = torch.randn(5, 3, 8, 8)
    every = shift_consistency(net, images, max_shift=2)
    some = shift_consistency(net, images, shifts=[(0, 0), (1, -2)])
    assert torch.equal(some.logits[:, 1], every.logits[:, every.shifts.index((1, -2))])
    drawn = shift_consistency(net, images, max_shift=2, n_random=6, seed=3)
    assert len(set(drawn.shifts)) == 6
    assert drawn.shifts[0] == (0, 0)
    assert torch.equal(drawn.logits[:, 4], every.logits[:, every.shifts.index(drawn.shifts[4])])
    window = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16, 4))
    real = shift_consistency(window, images, max_shift=2, kind="realistic")
    few = shift_consistency(window, images, max_shift=2, kind="realistic", n_random=6)
    assert torch.equal(few.logits[:, 3], real.logits[:, real.shifts.index(few.shifts[3])])
    zero = shift_consistency(net, images, max_shift=2, kind="zero")
    less = shift_consistency(net, images, max_shift=2, kind="zero", n_random=6, seed=3)
    assert less.shifts == drawn.shifts
    for s, shift in enumerate(less.shifts):
        assert torch.equal(less.logits[:, s], zero.logits[:, zero.shifts.index(shift)])
    assert not torch.equal(less.logits, drawn.logits)


def test_measuring_leaves_the_model_as_it_was():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(4 * 36, 5))
    net.train()[0].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x = torch.randn(6, 3, 8, 8)
    once, again = (shift_consistency(net, x, max_shift=1).logits for _ in range(2))
    assert torch.equal(once, again)
    assert [m.training for m in net] == [False, True, True, True, True]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_what_was_frozen_stays_frozen():
    for family in ("vit", "deit", "dinov2"):
        model = make_shift_equivariant(built(family).requires_grad_(False))
        # the new convolution is the only thing that is there to be trained
        assert all("peg" in name for name, p in model.named_parameters() if p.requires_grad), family


def test_anchored_models_are_consistent_and_plain_ones_are_not():
    x = torch.randn(6, 3, 16, 16)
    plain = shift_consistency(built("swin"), x, max_shift=2)
    poly = shift_consistency(make_shift_equivariant(built("swin")), x, max_shift=2)
    assert plain.worst_case_consistency < 0.5
    assert poly.consistency == poly.worst_case_consistency == 1


# wrong inputs

X = torch.zeros(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: polyphase_anchor(X[0], 4), ValueError, r"\(B, C, H, W\)"),
        (lambda: polyphase_anchor(X, 3), ValueError, "smallest size that is: 9 x 9"),
        (lambda: polyphase_anchor(X, 0), ValueError, "positive int"),
        (lambda: polyphase_anchor(X, 4, "l7"), ValueError, "'filtered', 'l2'"),
        (lambda: polyphase_anchor(X, 4, -1.0), ValueError, "p > 0"),
        (lambda: polyphase_anchor(X.byte(), 4), TypeError, "x / 255"),
        (lambda: polyphase_anchor(X + torch.nan, 4), ValueError, "NaN"),
        (lambda: polyphase_anchor(X + torch.inf, 4, "l2"), ValueError, "infinite"),
        (lambda: polyphase_unanchor(X, torch.tensor([[1, 0], [0, 0]]), 2), ValueError, "no multiples of stride 2"),
        (lambda: polyphase_unanchor(X, torch.zeros(3, 2, dtype=torch.long)), ValueError, r"offsets \(B, 2\)"),
        (lambda: polyphase_unanchor(X, torch.zeros(2, 2, dtype=torch.long), 0), ValueError, "stride must be positive"),
        (lambda: anchor_tokens(torch.zeros(2, 5, 3), (2, 2), 2), ValueError, r"\(B, 4, C\)"),
        (lambda: PolyTwinsConfig(depths=(2, 2)), ValueError, "as many"),
        (lambda: PolyTwinsConfig(num_heads=(3, 4, 8, 16)), ValueError, "heads"),
        (lambda: PolyTwinsConfig(drop_path=1.0), ValueError, "drop_path"),
        (lambda: PolyTwinsSVT(PolyTwinsConfig(**TWINS))(torch.zeros(1, 3, 12, 16)), ValueError, "16 x 16"),
        (lambda: make_shift_equivariant(nn.Linear(2, 2)), TypeError, "ViT, DeiT, Dinov2, Swin"),
        (lambda: make_shift_equivariant("vit"), TypeError, "torch.nn.Module"),
        (lambda: make_shift_equivariant(make_shift_equivariant(built("swin"))), ValueError, "already"),
        (lambda: make_shift_equivariant(make_shift_equivariant(built("twins"))), ValueError, "already"),
        (lambda: make_shift_equivariant(built("vit"), norm="linf"), ValueError, "norm"),
        (lambda: make_shift_equivariant(built("twins"), invariant=True), ValueError, "PolyphaseAnchor"),
        (lambda: make_shift_equivariant(built("twins"), peg=False), ValueError, "norm alone"),
        (lambda: make_shift_equivariant(built("twins"), False), ValueError, "norm alone"),
        (lambda: shift_consistency(nn.Identity(), X), ValueError, r"logits \(B, K\)"),
        (lambda: shift_consistency(lambda x: {"a": x}, X), ValueError, "a dict of a"),
        (lambda: shift_consistency(nn.Flatten(), X[0]), ValueError, r"\(N, C, H, W\)"),
        (lambda: shift_consistency(nn.Flatten(), X.byte()), TypeError, "floating point"),
        (lambda: shift_consistency(nn.Flatten(), X + torch.nan), ValueError, "NaN"),
        (lambda: shift_consistency(nn.Flatten(), X, torch.zeros(3).long()), ValueError, r"shape \(2,\)"),
        (lambda: shift_consistency(nn.Flatten(), X, torch.full((2,), 999)), ValueError, r"0..191"),
        (lambda: shift_consistency(nn.Flatten(), X, max_shift=0), ValueError, "at least two"),
        (lambda: shift_consistency(nn.Flatten(), X, max_shift=-1), ValueError, "negative"),
        (lambda: shift_consistency(nn.Flatten(), X, n_random=99), ValueError, "1..81"),
        (lambda: shift_consistency(nn.Flatten(), X, shifts=[(0, 0)], n_random=2), ValueError, "without n_random"),
        (lambda: shift_consistency(nn.Flatten(), X, kind="realistic"), ValueError, "no room"),
        (lambda: shift_consistency(nn.Flatten(), X, max_shift=1).right, ValueError, "labels"),
        (lambda: shift_consistency(nn.Flatten(), X, shifts=[(0, 0), (0, 0)]), ValueError, "twice"),
        (lambda: shift_consistency(nn.Flatten(), X, shifts=[(0, 0), (0.5, 1)]), ValueError, "whole numbers"),
        (lambda: shift_consistency(nn.Flatten(), X, shifts=[0, 1]), ValueError, "whole numbers"),
        (lambda: shift_consistency(nn.Flatten(), X, kind="turned", n_random=3), ValueError, "'cyclic'"),
        (lambda: shift_consistency(nn.Flatten(), X, batch_size=0), ValueError, "batch_size"),
        (lambda: shift_consistency(lambda x: x.flatten(1) * torch.nan, X), ValueError, "NaN"),
        (lambda: shift_consistency(lambda x: x[:, 0, 0, :1], X), ValueError, "one logit"),
        (lambda: shift_consistency(lambda x: None, X), ValueError, "NoneType"),
        (lambda: shift_consistency(lambda x: (x.flatten(1),), X), ValueError, "tuple"),
        (lambda: polyphase_anchor(X[:, :0], 4), ValueError, "at least one channel"),
        (lambda: polyphase_anchor(X.numpy(), 4), TypeError, "ndarray"),
        (lambda: polyphase_anchor(X, 4.0), ValueError, "positive int"),
        (lambda: polyphase_anchor(X, 4, None), ValueError, "'filtered', 'l2'"),
        (lambda: polyphase_anchor(X, 4, True), ValueError, "'filtered', 'l2'"),
        (lambda: polyphase_anchor(X + 1e30, 4, 9.0), ValueError, "too large"),
        (lambda: polyphase_unanchor(X, torch.zeros(2, 2)), TypeError, "int64"),
        (lambda: CircularPEG(8)(torch.zeros(2, 12, 8), (3, 5)), ValueError, r"\(B, 15, 8\)"),
    ],
)
def test_wrong_inputs(call, error, words, without_shape_checks):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("family", ["vit", "swin", "twins"])
def test_wrong_pixels(family, without_shape_checks):
    model = make_shift_equivariant(built(family))
    good = torch.randn(2, 3, 16, 16)
    wrong = [
        (good[0], ValueError, r"\(B, 3, H, W\)"),
        (good[:, :1], ValueError, r"\(B, 3, H, W\)"),
        (good[..., :15], ValueError, "smallest size that is: 16 x 16"),
        (torch.full_like(good, torch.nan), ValueError, "NaN"),
        (good * 1000, ValueError, "looks like bytes"),
    ]
    if family != "vit":
        # transformers' ViT turns bytes to floats before the embeddings see them
        wrong.append((torch.zeros(2, 3, 16, 16, dtype=torch.uint8), TypeError, "bytes"))
    for pixels, error, words in wrong:
        with pytest.raises(error, match=words):
            model(pixels)
    if family == "vit":
        with pytest.raises(ValueError, match="chosen anew"):
            model.vit.embeddings(good, bool_masked_pos=torch.zeros(2, 16, dtype=torch.bool))

import copy
import importlib.util
import math
import sys

import pytest
import torch
import transformers
from torch.nn import functional as F

from tests.tabular.test_life2vec import document, tokenizer_of
from torchgraft.tabular import life2vec as l2v
from torchgraft.tabular.life2vec import (
    Life2VecAttention,
    Life2VecConfig,
    Life2VecForOrdinal,
    Life2VecForPreTraining,
    Life2VecForSequenceClassification,
    Life2VecModel,
)
from torchgraft.tabular.life2vec.modules import AttentionPooling, ContextPooling, FlatHead, MaskedTokenHead, OrderHead
from torchgraft.tabular.life2vec.modules import ReZero as ReZeroScalar

# What SocialComplexityLab/life2vec at 5601191a08a3feae97b4641776692916400c8ed7 computes in eval mode with weights of
# `fill` and inputs of `tiny`, with performer-pytorch 1.1.4 and local-attention 1.11.2, hidden_size 8, hidden_ff 12, 2
# layers, 4 heads of which 3 local, window 3, 6 features: first three states of Transformer.forward; columns 10 to 14 of
# MaskedLanguageModel at positions 4, 7, 9 and 2, 5, 9; CLS_Decoder of [CLS]; then heads on those states.
HIDDEN = [
    [[0.051871, -0.161285, 0.161357], [0.0327, -0.208802, 0.114001], [0.08371, 0.08339, 0.374813],
     [0.087604, 0.139808, 0.42101], [-0.007385, 0.400855, 0.579991], [-0.258602, 0.381965, 0.503071],
     [-0.067374, -0.212677, 0.127446], [-0.413394, 0.245939, 0.313911], [-0.069129, -0.258545, 0.081524],
     [-0.086399, 0.187741, 0.440365]],
    [[0.088565, -0.104888, 0.21355], [-0.063789, -0.265569, 0.008451], [0.11652, 0.131624, 0.421744],
     [0.099987, 0.195669, 0.469327], [-0.269074, 0.660475, 0.668793], [0.093567, 0.339556, 0.412159],
     [0.159634, -0.050769, 0.130262]],
]  # fmt: skip
MLM = [
    [[-0.167801, -0.086628, 0.140014, 0.166165, 0.131879], [-0.160075, -0.128845, 0.101841, 0.164682, 0.158491],
     [-0.161818, -0.050281, 0.157858, 0.1558, 0.103651]],
    [[-0.167803, -0.085815, 0.140575, 0.166058, 0.131305], [-0.165362, -0.065703, 0.151483, 0.161124, 0.116052],
     [-0.095916, -0.16794, -0.001281, 0.110791, 0.159149]],
]  # fmt: skip
ORDER = [[0.52765, 0.512454, 0.258655], [0.51235, 0.478328, 0.221021]]
POOLED = [[0.472918, 0.338364], [0.470247, 0.33331]]  # AttentionDecoder
PLAIN = [[0.257165, 0.406788], [0.20767, 0.355016]]  # CLS_Decoder_FT2
FLAT = [-0.191803, -0.057079, 0.103265, 0.217257, 0.233729]  # Flat_Decoder, first person, first item
MANY = [0.780353, 0.911827, 0.628323, 0.062572, -0.525903]  # AttentionDecoderL with 3 contexts, the same


def fill(module):
    """The weights that official numbers above were computed with, by the official names."""
    with torch.no_grad():
        named = dict(module.named_parameters()) | {
            n: b for n, b in module.named_buffers() if n.endswith("projection_matrix")
        }
        for name, p in named.items():
            size = 0.03 if ".age." in name or ".abspos." in name else 0.4
            p.copy_(size * torch.sin(torch.arange(p.numel(), dtype=torch.float32) * 0.7 + len(name)).view_as(p))
    return module.eval()


def tiny():
    ids = torch.zeros(2, 4, 10)
    ids[0, 0] = torch.tensor([1, 10, 11, 2, 12, 13, 2, 14, 2, 3])
    ids[1, 0, :7] = torch.tensor([1, 9, 11, 2, 14, 12, 2])
    ids[0, 1] = torch.tensor([0, 0, 0, 0, 5, 5, 5, 9, 9, 12])
    ids[1, 1, 4:7] = 7
    ids[0, 2] = torch.tensor([0, 0, 0, 0, 34.5, 34.5, 34.5, 35.2, 35.2, 35.9])
    ids[1, 2, 4:7] = 61
    ids[0, 3] = torch.tensor([1, 1, 1, 1, 2, 2, 2, 3, 3, 1])
    ids[1, 3, :7] = torch.tensor([1, 1, 1, 1, 2, 2, 2])
    return ids, ids[:, 0] != 0


def config(**changes):
    small = dict(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_local_heads=2,
        local_window=4, num_features=32, background_length=2,
    )  # fmt: skip
    return Life2VecConfig(**(small | changes))


def loud(model):
    """A model whose every part has a say."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm.weights" in name or "res_" in name:
                p.fill_(0.5)
            elif "embedding" in name:
                p.normal_(std=0.3)
    return model.eval()


def batch(rows=3, length=20, pad=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, 40, (rows, 4, length), generator=generator).float()
    ids[:, 3] = torch.randint(1, 4, (rows, length), generator=generator).float()
    ids[:, 0, 0] = 1
    mask = torch.ones(rows, length, dtype=torch.bool)
    if pad:
        mask[1:, -pad:] = False
        ids = ids * mask[:, None]
    return ids, mask


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# --- the official code


def official(**changes):
    sizes = dict(
        vocab_size=15, hidden_size=8, intermediate_size=12, num_layers=2, num_heads=4, num_local_heads=3,
        local_window=3, num_features=6, attention="performer", official_masking=True,
    )  # fmt: skip
    return Life2VecConfig(**(sizes | changes))


def test_states_and_logits_are_the_official_ones():
    model = fill(Life2VecForPreTraining(official()))
    ids, mask = tiny()
    spots = torch.tensor([[4, 7, 9], [2, 5, 9]])
    out = model(ids, mask, target_pos=spots, output_hidden_states=True)
    torch.testing.assert_close(out.hidden_states[-1][0, :, :3], torch.tensor(HIDDEN[0]), atol=2e-6, rtol=0)
    torch.testing.assert_close(out.hidden_states[-1][1, :7, :3], torch.tensor(HIDDEN[1]), atol=2e-6, rtol=0)
    torch.testing.assert_close(out.logits[:, :, 10:], torch.tensor(MLM), atol=2e-6, rtol=0)
    torch.testing.assert_close(out.order_logits, torch.tensor(ORDER), atol=2e-6, rtol=0)
    fixed = fill(Life2VecForPreTraining(official(official_masking=False)))
    states = fixed(ids, mask, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(states[0, :, :3], torch.tensor(HIDDEN[0]), atol=2e-6, rtol=0)
    assert (states[1, :7, :3] - torch.tensor(HIDDEN[1])).abs().max() > 1e-4


def test_heads_are_the_official_ones():
    ids, mask = tiny()
    x = fill(Life2VecForPreTraining(official()))(ids, mask, output_hidden_states=True).hidden_states[-1]
    close = dict(atol=2e-6, rtol=0)
    torch.testing.assert_close(fill(AttentionPooling(8, 2, 0.1))(x, mask), torch.tensor(POOLED), **close)
    torch.testing.assert_close(fill(OrderHead(8, 2, 0.1, "ff1", "norm_1"))(x[:, 0]), torch.tensor(PLAIN), **close)
    torch.testing.assert_close(fill(FlatHead(8, 12, 4, 5, 0.1))(x, mask)[0, 0], torch.tensor(FLAT), **close)
    torch.testing.assert_close(fill(ContextPooling(8, 4, 5, 3, 0.1))(x, mask)[0, 0], torch.tensor(MANY), **close)


def test_official_names_load():
    model = Life2VecForPreTraining(official())
    state = model.state_dict()
    assert "transformer.embedding.token.parametrizations.weight.original" in state
    for name in (
        "embedding.age.w0", "embedding.abspos.b", "embedding.segment.weight", "embedding.res_seg.weights",
        "encoders.1.attention.attention.to_out.bias", "encoders.0.attention_sublayer.norm.weights",
        "encoders.0.attention.attention.fast_attention.projection_matrix",
        "encoders.1.position_sublayer.norm.weights", "encoders.1.position_wise.ff2hidden.weight",
    ):  # fmt: skip
        assert f"transformer.{name}" in state
    original = "transformer.embedding.token.parametrizations.weight."
    theirs = state | {
        f"{original}0.ignore_index": torch.arange(6), "mlm_decoder.out.parametrizations.weight.original": torch.ones(1),
        "mlm_decoder.out.parametrizations.weight.0.norm": torch.ones(1), "cls_w": torch.ones(1),
    }  # fmt: skip
    assert l2v.convert_official(theirs).keys() == state.keys()
    flat = Life2VecForOrdinal(official()).state_dict()
    assert l2v.convert_official(flat | {"decoder.context": torch.ones(1), "decoder.pool.bias": torch.ones(1)}) == flat
    pooled = Life2VecForSequenceClassification(official()).state_dict()
    assert l2v.convert_official(pooled).keys() == pooled.keys()
    many = Life2VecForOrdinal(official(ordinal_pooling="contexts")).state_dict()
    assert l2v.convert_official(many | {"decoder.rezero.weights": torch.ones(1)}) == many


# --- identities


def test_a_fresh_encoder_is_the_identity_on_masked_embeddings():
    model = Life2VecModel(config()).eval()
    ids, mask = batch()
    states = model(ids, mask, output_hidden_states=True).hidden_states
    expected = model.embedding.token.weight[ids[:, 0].long()]
    torch.testing.assert_close(states[0], expected)
    torch.testing.assert_close(states[-1], expected * mask[..., None])


@pytest.mark.parametrize("row", [1, 2])
def test_times_are_silent_at_first_and_on_the_background_for_ever(row):
    ids, _ = batch(pad=0)
    moved = ids.clone()
    moved[:, row] += 7
    fresh = Life2VecModel(config()).eval()
    assert torch.equal(fresh.embed(ids), fresh.embed(moved))
    model = loud(Life2VecModel(config()))
    a, b = model.embed(ids), model.embed(moved)
    assert torch.equal(a[:, :3], b[:, :3])
    assert ((a - b)[:, 3:].abs().amax(-1) > 1e-4).all()
    four = loud(Life2VecModel(config(background_length=4)))
    assert torch.equal(four.embed(ids)[:, :5], four.embed(moved)[:, :5])


def test_embeddings_are_the_formula():
    model = loud(Life2VecModel(config())).double()
    ids, _ = batch(pad=0)
    e = model.embedding
    age, day = ids[:, 2].double()[..., None], ids[:, 1].double()[..., None]
    timed = (torch.arange(20) > 2)[:, None]
    expected = (
        e.token.weight[ids[:, 0].long()]
        + 0.5 * timed * torch.cat([torch.cos(age * e.age.w + e.age.b), age * e.age.w0 + e.age.b0], -1)
        + 0.5 * timed * torch.cat([torch.sin(day * e.abspos.w + e.abspos.b), day * e.abspos.w0 + e.abspos.b0], -1)
        + 0.5 * e.segment.weight[ids[:, 3].long()]
    )
    torch.testing.assert_close(model.embed(ids), expected)


def test_ages_are_cut_to_whole_years_unless_told_not_to():
    ids, _ = batch(pad=0)
    more = ids.clone()
    more[:, 2] += 0.6
    model = loud(Life2VecModel(config()))
    assert torch.equal(model.embed(ids), model.embed(more))
    model.config.integer_age = False
    assert not torch.equal(model.embed(ids), model.embed(more))


def test_the_token_matrix_is_centred_and_logits_are_scaled_cosines():
    model = loud(Life2VecForPreTraining(config()))
    matrix = model.transformer.embedding.token.weight
    ignored = [0, 4, 5, 6, 7, 8]
    used = [i for i in range(40) if i not in ignored]
    assert (matrix[ignored] == 0).all()
    torch.testing.assert_close(matrix[used].mean(0), torch.zeros(16), atol=1e-6, rtol=0)
    ones = l2v.center_tokens(model.transformer.embedding.token.original, normalize=True).norm(dim=1)
    assert (ones[ignored] == 0).all()
    torch.testing.assert_close(ones[used], torch.ones(34))
    ids, mask = batch()
    logits = model(ids, mask).logits
    assert logits.shape == (3, 20, 40)
    assert (logits.abs() <= model.mlm_decoder.g + 1e-5).all()
    assert (logits[..., ignored] == 0).all()


def test_the_matrix_has_one_storage_and_both_uses_train_it():
    model = loud(Life2VecForPreTraining(config()))
    original = model.transformer.embedding.token.original
    assert sum(p is original or p.shape == original.shape for p in model.parameters()) == 1
    ids, mask = batch(pad=0)
    ids[:, 0, 1:] = torch.randint(10, 15, (3, 19)).float()
    logits = model(ids, mask, target_pos=torch.tensor([[3], [4], [5]])).logits
    centred = torch.autograd.grad(logits[..., 20].sum(), original)[0]
    assert centred[20].abs().max() > 1e-3  # token 20 is nowhere in the input
    with torch.no_grad():
        before = original.clone()
        l2v.center_tokens(original)
    assert torch.equal(original, before)


def test_only_gathered_positions_have_logits():
    head = MaskedTokenHead(8, 0.0)
    hidden, matrix = torch.randn(2, 6, 8), torch.randn(12, 8)
    spots = torch.tensor([[5, 0], [2, 2]])
    every = head(hidden, torch.arange(6).expand(2, -1), matrix)
    torch.testing.assert_close(head(hidden, spots, matrix)[0], every[0, [5, 0]])
    torch.testing.assert_close(head(hidden, spots, matrix)[1], every[1, [2, 2]])


# --- attention


def heads(length, batch_size=2, count=3, dim=8, dtype=torch.float32, scale=1.0):
    return (scale * torch.randn(3, batch_size, count, length, dim, dtype=dtype)).unbind()


def test_random_features_approach_softmax_like_one_over_the_root():
    q, k, v = heads(12, dtype=torch.float64, scale=0.3)
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[0, 9:] = False
    exact = F.scaled_dot_product_attention(q, k, v, valid[:, None, None, :])
    sizes, errors = (64, 512, 4096), []
    for m in sizes:
        found = []
        for seed in range(6):
            projection = l2v.orthogonal_random_features(m, 8, torch.Generator().manual_seed(seed)).double()
            found.append((l2v.favor_attention(q, k, v, projection, valid) - exact).square().mean())
        errors.append(torch.stack(found).mean().sqrt().item())
    slope = math.log(errors[-1] / errors[0]) / math.log(sizes[-1] / sizes[0])
    assert -0.65 < slope < -0.35
    assert errors[-1] < 0.02 * exact.std()


def test_directions_are_uniform():
    # the signs of a plain QR factorisation would leave a mean
    rows = torch.cat([l2v.orthogonal_random_features(4, 4) for _ in range(2000)])
    directions = F.normalize(rows, dim=1).unflatten(0, (2000, 4))
    assert directions.mean(0).abs().max() < 0.06
    assert (directions.square().mean((0, 1)) - 0.25).abs().max() < 0.02


def test_features_are_orthogonal_and_of_gaussian_length():
    rows = l2v.orthogonal_random_features(4000, 8, torch.Generator().manual_seed(0))
    directions = F.normalize(rows[:8], dim=1)
    torch.testing.assert_close(directions @ directions.T, torch.eye(8), atol=1e-5, rtol=0)
    assert rows.norm(dim=1).square().mean() == pytest.approx(8, rel=0.03)
    assert l2v.orthogonal_random_features(5, 8).shape == (5, 8)
    with pytest.raises(ValueError, match="at least 1"):
        l2v.orthogonal_random_features(0, 8)


def naive_local(q, k, v, window, valid):
    out = torch.zeros_like(v)
    for b in range(q.shape[0]):
        for i in range(q.shape[2]):
            seen = [j for j in range(q.shape[2]) if abs(i // window - j // window) <= 1 and valid[b, j]]
            if not seen:
                continue
            scores = (q[b, :, i, None] * k[b][:, seen]).sum(-1)
            weights = (scores / math.sqrt(q.shape[-1])).softmax(-1)
            out[b, :, i] = (weights[..., None] * v[b][:, seen]).sum(1)
    return out


@pytest.mark.parametrize("backend", ["mask", "blocks"])
@pytest.mark.parametrize(("length", "window"), [(17, 3), (12, 4), (5, 8), (1, 2)])
def test_local_heads_are_a_banded_softmax(backend, length, window):
    q, k, v = (x.requires_grad_() for x in heads(length, dtype=torch.float64))
    valid = torch.ones(2, length, dtype=torch.bool)
    if length > 10:
        valid[1, 7:] = False
    expected = naive_local(q, k, v, window, valid)
    found = l2v.local_attention(q, k, v, window, valid, backend=backend)
    torch.testing.assert_close(found[valid[:, None].expand(-1, 3, -1)], expected[valid[:, None].expand(-1, 3, -1)])
    assert found.isfinite().all()
    keep = valid[:, None, :, None]
    ours = torch.autograd.grad((found * keep).sin().sum(), (q, k, v))
    theirs = torch.autograd.grad((expected * keep).sin().sum(), (q, k, v))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    if length == 12:
        torch.testing.assert_close(l2v.local_attention(q, k, v, window, backend=backend)[0], found[0])


def test_wrong_windows_are_named(without_shape_checks):
    q, k, v = heads(4)
    with pytest.raises(ValueError, match="window must be at least 1"):
        l2v.local_attention(q, k, v, 0)
    with pytest.raises(ValueError, match="backend must be"):
        l2v.local_attention(q, k, v, 2, backend="magic")
    with pytest.raises(ValueError, match="heads must divide dim"):
        Life2VecAttention(10, 4, 2, 3)
    with pytest.raises(ValueError, match=r"local_heads must lie in 0\.\.heads"):
        Life2VecAttention(8, 4, 5, 3)
    with pytest.raises(ValueError, match="kind must be"):
        Life2VecAttention(8, 4, 2, 3, kind="fast")


@pytest.mark.parametrize("attention", ["sdpa", "performer"])
@pytest.mark.parametrize("window", [3, 40])
def test_padding_changes_nothing(attention, window):
    model = loud(Life2VecModel(config(attention=attention, local_window=window)))
    ids, mask = batch(rows=2, length=31, pad=0)
    alone = model(ids, mask).last_hidden_state
    for extra in (1, 40):
        longer = model(F.pad(ids, (0, extra)), F.pad(mask, (0, extra))).last_hidden_state
        torch.testing.assert_close(longer[:, :31], alone, atol=2e-5, rtol=1e-4)
        assert longer.isfinite().all()


def test_official_masking_lets_padding_in():
    model = loud(Life2VecModel(config(attention="performer", official_masking=True)))
    ids, mask = batch(rows=2, length=31, pad=0)
    longer = model(F.pad(ids, (0, 40)), F.pad(mask, (0, 40))).last_hidden_state[:, :31]
    assert (longer - model(ids, mask).last_hidden_state).abs().max() > 1e-3


@pytest.mark.parametrize("length", [8, 30, 60])
def test_exact_heads_are_softmax_and_attentions_are_those_of_local_heads(length):
    layer = Life2VecAttention(16, 4, 2, 4).eval().double()
    x = torch.randn(2, length, 16).double()
    valid = torch.ones(2, length, dtype=torch.bool)
    valid[1, 5:] = False
    x = x * valid[..., None]
    found, weights = layer(x, valid, True)
    q, k, v = (to(x).unflatten(-1, (4, 4)).transpose(1, 2) for to in (layer.to_q, layer.to_k, layer.to_v))
    first = F.scaled_dot_product_attention(q[:, :2], k[:, :2], v[:, :2], valid[:, None, None, :])
    last = naive_local(q[:, 2:], k[:, 2:], v[:, 2:], 4, valid)
    expected = layer.to_out(torch.cat([first, last], 1).transpose(1, 2).flatten(2))
    torch.testing.assert_close(found[valid], expected[valid])
    assert weights.shape == (2, 2, length, length)
    rows = valid[:, None].expand(-1, 2, -1)
    torch.testing.assert_close((weights @ v[:, 2:])[rows], last[rows])


@pytest.mark.parametrize("kind", ["sdpa", "performer"])
def test_half_precision_is_close(kind):
    model = loud(Life2VecModel(config(attention=kind)))
    ids, mask = batch()
    exact = model(ids, mask).last_hidden_state
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(ids, mask).last_hidden_state
    assert (half.float() - exact)[mask].abs().max() < 0.05 * exact.abs().max()


def test_days_are_told_apart_in_half_precision():
    model = loud(Life2VecModel(config())).bfloat16()
    ids, _ = batch(rows=1, pad=0)
    ids[:, 1:3] = torch.tensor([4097.0, 60.0])[:, None]
    later = ids.clone()
    later[:, 1] += 3
    day, age = model.embedding.abspos, model.embedding.age
    assert not torch.equal(model.embed(ids), model.embed(later))
    with torch.no_grad():
        age.w0.zero_(), age.w.zero_(), day.w.zero_(), day.w0.fill_(1.0), day.b0.fill_(-4096.0)
    moved = (model.embed(later) - model.embed(ids))[0, 3:, -1]
    torch.testing.assert_close(moved.float(), torch.full((17,), 1.5), atol=0.02, rtol=0)


def test_logits_of_float16_are_finite():
    model = loud(Life2VecForPreTraining(config()))
    ids, mask = batch()
    exact = model(ids, mask).logits
    half = model.half()(ids, mask).logits
    torch.testing.assert_close(half.float()[mask], exact[mask], atol=0.05, rtol=0.02)
    assert (half[..., [0, 4, 5, 6, 7, 8]] == 0).all()


def test_projections_are_redrawn_and_stored(tmp_path):
    model = Life2VecModel(config(attention="performer"))
    name = "encoders.0.attention.attention.fast_attention.projection_matrix"
    before = model.state_dict()[name].clone()
    assert before.norm(dim=1).min() > 0.1
    model.save_pretrained(tmp_path)
    assert torch.equal(Life2VecModel.from_pretrained(tmp_path).state_dict()[name], before)
    model.redraw_projections(torch.Generator().manual_seed(5))
    after = model.state_dict()[name].clone()
    assert not torch.equal(before, after)
    model.redraw_projections(torch.Generator().manual_seed(5))
    assert torch.equal(model.state_dict()[name], after)
    l2v.RedrawProjections().on_epoch_end(None, None, None, model=model)
    assert not torch.equal(model.state_dict()[name], after)


# --- models


def test_fresh_weights_are_the_papers():
    model = Life2VecForPreTraining(config())
    state = model.state_dict()
    assert state["transformer.embedding.token.parametrizations.weight.original"].abs().max() <= 0.01
    assert 0 < state["transformer.embedding.age.w"].abs().max() <= 0.01
    assert all((m.weights == 0).all() for m in model.modules() if isinstance(m, ReZeroScalar))
    assert state["mlm_decoder.g"].item() == state["cls_decoder.norm.g"].item() == 4.0


@pytest.mark.parametrize("attention", ["sdpa", "performer"])
def test_save_load_and_the_second_stage(tmp_path, attention):
    first = loud(Life2VecForPreTraining(config(attention=attention)))
    first.save_pretrained(tmp_path)
    ids, mask = batch()
    again = Life2VecForPreTraining.from_pretrained(tmp_path)
    torch.testing.assert_close(again.eval()(ids, mask).logits, first(ids, mask).logits)
    second = Life2VecForSequenceClassification.from_pretrained(tmp_path).eval()
    states = second.transformer(ids, mask).last_hidden_state
    torch.testing.assert_close(states, first.transformer(ids, mask).last_hidden_state)
    assert second.decoder.context.std() > 0.3
    auto = transformers.AutoModel.from_pretrained(tmp_path)
    assert type(auto) is Life2VecModel
    other = {"sdpa": "performer", "performer": "sdpa"}[attention]
    switched = Life2VecModel.from_pretrained(tmp_path, attention=other).eval()
    assert switched(ids, mask).last_hidden_state.isfinite().all()
    for buffer in switched.buffers():
        assert buffer.norm(dim=1).min() > 0.1


@pytest.mark.parametrize("kind", ["sdpa", "performer"])
def test_everything_gets_a_gradient(kind):
    model = loud(Life2VecForPreTraining(config(attention=kind))).train()
    made = l2v.EventCollator(tokenizer_of(40), 64)
    given = made([document(events=n) for n in (9, 4, 7, 6)])
    given["target_cls"] = torch.tensor([0, 1, 2, -100])
    out = model(**given)
    torch.testing.assert_close(out.loss, 0.8 * out.mlm_loss + 0.2 * out.sop_loss)
    out.loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name


@pytest.mark.parametrize("attention", ["sdpa", "performer"])
def test_gradients_are_those_of_finite_differences(attention):
    torch.manual_seed(0)
    model = Life2VecForSequenceClassification(
        Life2VecConfig(20, 8, 6, 1, 2, 1, local_window=2, num_features=5, attention=attention, background_length=1)
    )
    model = fill(model).double()
    valid = torch.tensor([[True] * 5 + [False]])
    x = torch.randn(1, 6, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda e: model(inputs_embeds=e, padding_mask=valid).logits, x, atol=1e-5)


def unchecked(name, monkeypatch):
    """A copy of a module without this suite's shape checks, which cannot be traced, and which users do not have."""
    origin = importlib.util.find_spec(f"torchgraft.tabular.life2vec.{name}").origin
    spec = importlib.util.spec_from_file_location(f"unchecked_{name}", origin)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["sdpa", "performer"])
def test_attention_and_losses_compile_without_breaks(kind, monkeypatch):
    attention, losses = unchecked("attention", monkeypatch), unchecked("losses", monkeypatch)
    x, valid = torch.randn(2, 24, 8), torch.arange(24)[None] < torch.tensor([[24], [17]])

    def loss(layer, x):
        y = layer(x, valid)[0][:, 0]
        target = torch.tensor([1, 0])
        return losses.asymmetric_pu_loss(y[:, :2], target) + losses.cdw_cross_entropy(y.softmax(1), target)

    layer = attention.Life2VecAttention(8, 4, 2, 3, num_features=6, kind=kind)
    torch.testing.assert_close(torch.compile(loss, fullgraph=True, backend="eager")(layer, x), loss(layer, x))


def test_losses_of_pretraining_are_the_papers():
    model = loud(Life2VecForPreTraining(config()))
    ids, mask = batch()
    tokens = torch.tensor([[12, 20], [30, 0], [0, 0]])
    order = torch.tensor([1, -100, 0])
    out = model(ids, mask, target_pos=torch.tensor([[3, 5], [6, 19], [1, 1]]), target_tokens=tokens, target_cls=order)
    picked = out.logits.log_softmax(-1)
    mlm = -(picked[0, 0, 12] + picked[0, 1, 20] + picked[1, 0, 30]) / 3
    torch.testing.assert_close(out.mlm_loss, mlm)
    logs, weight = out.order_logits.log_softmax(-1), torch.tensor([1 / 0.9, 10.0, 10.0])
    smooth = sum(-0.9 * weight[y] * logs[r, y] - 0.1 / 3 * (weight * logs[r]).sum() for r, y in ((0, 1), (2, 0)))
    torch.testing.assert_close(out.sop_loss, smooth / (weight[1] + weight[0]))
    none = model(ids, mask, target_tokens=torch.zeros(3, 20), target_cls=torch.full((3,), -100))
    assert none.loss == 0
    assert model(ids, mask).loss is None


def test_classification():
    ids, mask = batch()
    y = torch.tensor([1, 0, 0])
    model = loud(Life2VecForSequenceClassification(config()))
    out = model(ids, mask, labels=y)
    torch.testing.assert_close(out.loss, l2v.asymmetric_pu_loss(out.logits, y))
    torch.testing.assert_close(model(ids, labels=y).logits, out.logits)  # padding is found from token 0
    x = model.transformer.embed(ids)
    torch.testing.assert_close(model(inputs_embeds=x, padding_mask=mask).logits, out.logits)
    plain = loud(
        Life2VecForSequenceClassification(config(pooling="cls", classification_loss="cross_entropy", num_labels=3))
    )
    out = plain(ids, mask, labels=torch.tensor([2, 0, 1]), return_dict=False)
    torch.testing.assert_close(out[0], F.cross_entropy(out[1], torch.tensor([2, 0, 1])))
    moved = ids.clone()
    moved[:, 0, 4] = 17
    assert not torch.equal(plain(moved, mask).logits, plain(ids, mask).logits)
    with pytest.raises(ValueError, match="needs num_labels=2"):
        Life2VecForSequenceClassification(config(num_labels=3))
    torch.testing.assert_close(model(ids, mask, labels=y.double()).loss, model(ids, mask, labels=y).loss)
    for one in (model, plain):
        for soft in (0.9, float("nan")):
            with pytest.raises(ValueError, match="soft labels are not supported"):
                one(ids, mask, labels=torch.tensor([soft, 0.0, 1.0]))


@pytest.mark.parametrize("pooling", ["cls", "contexts"])
def test_ordinal_items(pooling):
    model = loud(Life2VecForOrdinal(config(ordinal_pooling=pooling, num_items=3, num_contexts=2)))
    ids, mask = batch()
    y = torch.tensor([[0, 4, 2], [1, 1, 1], [3, 0, 2]])
    out = model(ids, mask, labels=y)
    torch.testing.assert_close(out.probabilities.sum(-1), torch.ones(3, 3))
    items = [l2v.cdw_cross_entropy(out.probabilities[:, i], y[:, i]) for i in range(3)]
    torch.testing.assert_close(out.loss, torch.stack(items).mean())
    with pytest.raises(ValueError, match="labels must have shape"):
        model(ids, mask, labels=y[:, :2])
    with pytest.raises(ValueError, match="soft labels are not supported"):
        model(ids, mask, labels=y + 0.5)


@pytest.mark.parametrize("kind", ["sdpa", "performer"])
def test_outputs_by_transformers_customs(kind):
    model = loud(Life2VecForSequenceClassification(config(attention=kind)))
    ids, mask = batch()
    out = model(ids, mask, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 3
    assert [a.shape for a in out.attentions] == [(3, 2, 20, 20)] * 2
    assert (out.attentions[0][1, :, :, 15:] == 0).all()
    assert model.transformer(ids, mask, return_dict=False)[0].shape == (3, 20, 16)


def test_wrong_inputs_are_named(without_shape_checks):
    model = Life2VecModel(config())
    ids, mask = batch()
    with pytest.raises(ValueError, match=r"input_ids must have shape \(B, 4, S\)"):
        model(ids[:, 0], mask)
    with pytest.raises(ValueError, match="padding_mask must have shape"):
        model(ids, mask[:, :-1])
    empty = mask.clone()
    empty[2] = False
    with pytest.raises(ValueError, match="row 2 is all padding"):
        model(ids, empty)
    for half in (torch.float16, torch.bfloat16):
        with pytest.raises(TypeError, match=f"input_ids must not be {half}, which rounds tokens and days"):
            model(ids.to(half), mask)
    for row, value, message in (
        (0, 40, "token 40, but vocab_size is 40"), (0, -1, "token -1, but vocab_size is 40"),
        (1, float("nan"), "1 values that are not finite"), (2, float("inf"), "1 values that are not finite"),
        (3, 4, r"segments 0\.\.4 in its last row"), (3, -1, r"segments -1\.\.3 in its last row"),
    ):  # fmt: skip
        wrong = ids.clone()
        wrong[0, row, 3] = value
        with pytest.raises(ValueError, match=message):
            model(wrong, mask)
    with pytest.raises(ValueError, match=r"target_tokens must have the shape of target_pos, \(3, 20\), got \(3, 4\)"):
        Life2VecForPreTraining(config())(ids, mask, target_tokens=torch.zeros(3, 4))
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="padding_mask is needed"):
        model(inputs_embeds=torch.zeros(1, 3, 16))


@pytest.mark.parametrize(
    "wrong",
    [
        dict(attention="flash"), dict(pooling="mean"), dict(classification_loss="mse"), dict(ordinal_pooling="no"),
        dict(num_heads=3), dict(num_local_heads=9), dict(vocab_size=5), dict(local_window=0),
        dict(intermediate_size=0), dict(background_length=-1), dict(num_items=0), dict(num_levels=1),
        dict(num_contexts=0), dict(max_position_embeddings=0),
    ],
)  # fmt: skip
def test_wrong_configurations_are_named(without_shape_checks, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        config(**wrong)


# --- losses


def test_pu_loss_is_the_official_one():
    # AsymmetricCrossEntropyLoss(0.3), same commit
    logits = torch.tensor([[0.3, -0.2], [1.0, 2.0], [-0.5, 0.1], [0.0, 0.9]])
    for y, expected in (([1, 0, 0, 1], 1.020047), ([0] * 4, 0.711547), ([1] * 4, 0.154949)):
        assert l2v.AsymmetricPULoss(0.3)(logits, torch.tensor(y)).item() == pytest.approx(expected, abs=1e-6)
    assert l2v.asymmetric_pu_loss(logits, torch.tensor([1, 0, 0, 1]), 1.0) == pytest.approx(
        F.cross_entropy(logits[[0, 3]], torch.tensor([1, 1])).item()
    )


def test_ordinal_loss_is_the_official_one():
    # CDW_CELoss(5, delta=3.0), alpha 1 for log and 2 otherwise, same commit
    p = torch.tensor([[0.1, 0.2, 0.4, 0.2, 0.1], [0.7, 0.1, 0.1, 0.05, 0.05]])
    y = torch.tensor([1, 3])
    for transform, alpha, expected in (("log", 1, 1.355795), ("power", 2, 6.935155), ("huber", 1, 3.467578)):
        assert l2v.CDWCrossEntropy(transform, alpha)(p, y).item() == pytest.approx(expected, abs=1e-5)
    sure = torch.eye(5)
    assert l2v.cdw_cross_entropy(sure, torch.arange(5)).abs() < 1e-4
    far = [l2v.cdw_cross_entropy(sure[[i]], torch.tensor([0])).item() for i in range(5)]
    assert far == sorted(far)


def test_wrong_targets_are_named(without_shape_checks):
    logits = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"got \[0, 2\]"):
        l2v.asymmetric_pu_loss(logits, torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=r"logits must be \(B, 2\)"):
        l2v.asymmetric_pu_loss(torch.zeros(2, 3), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="positive_weight"):
        l2v.asymmetric_pu_loss(logits, torch.tensor([0, 1]), 2.0)
    with pytest.raises(ValueError, match="apply sig_softmax or softmax to logits first"):
        l2v.cdw_cross_entropy(torch.randn(2, 5), torch.tensor([0, 1]))
    uniform = torch.full((2, 5), 0.2)
    with pytest.raises(ValueError, match=r"target must lie in 0\.\.4"):
        l2v.cdw_cross_entropy(uniform, torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="transform must be"):
        l2v.cdw_cross_entropy(uniform, torch.tensor([0, 1]), "cubic")
    with pytest.raises(ValueError, match="alpha and delta"):
        l2v.cdw_cross_entropy(uniform, torch.tensor([0, 1]), alpha=0.0)
    with pytest.raises(ValueError, match=r"probabilities must be \(B, C\)"):
        l2v.cdw_cross_entropy(uniform, torch.tensor([0]))


def test_sig_softmax():
    # SigSoftmax, same commit
    x, keep = torch.tensor([[0.5, -1.0, 3.0]]), torch.tensor([[True, True, False]])
    torch.testing.assert_close(l2v.sig_softmax(x, keep), torch.tensor([[0.912071, 0.087929, 0.0]]), atol=1e-6, rtol=0)
    torch.testing.assert_close(l2v.sig_softmax(x, torch.zeros(1, 3)), l2v.sig_softmax(x))


# --- training


def test_parameter_groups():
    model = Life2VecForPreTraining(config())
    decayed, spared = l2v.pretraining_parameters(model)
    names = {id(p): n for n, p in model.named_parameters()}
    assert {id(p) for g in (decayed, spared) for p in g["params"]} == set(names)
    kept = {names[id(p)] for p in decayed["params"]}
    assert "transformer.encoders.0.position_wise.hidden2ff.weight" in kept
    assert "mlm_decoder.V.weight" in kept
    assert not any(part in n for n in kept for part in ("bias", "norm", "token", "age", "abspos", "decoder.g"))
    second = Life2VecForSequenceClassification(config())
    names = {id(p): n for n, p in second.named_parameters()}
    groups = l2v.finetuning_parameters(second, lr=1.0, decay=0.5)
    assert sum(len(g["params"]) for g in groups) == len(names)
    rate = {names[id(p)]: g["lr"] for g in groups for p in g["params"]}
    assert rate["decoder.out.weight"] == 1.0
    assert rate["transformer.encoders.1.attention.attention.to_q.weight"] == 0.5
    assert rate["transformer.encoders.0.attention.attention.to_q.weight"] == 0.25
    assert rate["transformer.embedding.age.w"] == 0.25


def test_frozen_tokens_do_not_move():
    model = loud(Life2VecForSequenceClassification(config())).train()
    handle = l2v.freeze_tokens(model)
    original = model.transformer.embedding.token.original
    before = original.detach().clone()
    optimizer = torch.optim.RAdam(l2v.finetuning_parameters(model, lr=0.1))
    ids, mask = batch()
    ids[:, 0, 2] = 9

    def step():
        optimizer.zero_grad()
        model(ids, mask, labels=torch.tensor([1, 0, 0])).loss.backward()
        optimizer.step()

    for _ in range(3):
        step()
    moved = (original - before).abs().amax(1).nonzero().flatten().tolist()
    assert moved == [1, 9]
    handle.remove()
    step()
    assert (original - before).abs().amax(1).gt(0).sum() > 10


def test_accumulated_steps_train_like_one_batch(tmp_path):
    silent = {f"{part}_dropout": 0.0 for part in ("embedding", "attention", "feedforward", "decoder")}
    model = loud(Life2VecForSequenceClassification(config(classification_loss="cross_entropy", **silent)))
    ids, mask = batch(rows=6, pad=0)
    y = torch.tensor([0, 1, 1, 0, 1, 0])
    model(ids, mask, labels=y).loss.backward()
    bias = model.decoder.out.bias
    expected = bias.detach() - bias.grad
    model.zero_grad()
    transformers.Trainer(
        model,
        transformers.TrainingArguments(
            str(tmp_path), max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=3, report_to=[],
            use_cpu=True, disable_tqdm=True, save_strategy="no", max_grad_norm=0.0,
        ),
        train_dataset=[{"input_ids": a, "padding_mask": b, "labels": c} for a, b, c in zip(ids, mask, y, strict=True)],
        optimizers=(torch.optim.SGD(model.parameters(), lr=1.0), None),
    ).train()  # fmt: skip
    torch.testing.assert_close(bias.detach(), expected)


def test_pretraining_and_fine_tuning_with_the_trainer(tmp_path):
    torch.manual_seed(0)
    people = [document(events=4 + i % 5, person=i, label=i % 2) for i in range(32)]
    # what is to be found: positives have one more kind of token
    people = [copy.copy(d) if d.label == 0 else l2v.Document(d.person, d.background, ((35,), *d.events[1:]),
              d.positions, d.ages, 1) for d in people]  # fmt: skip
    report = l2v.EncodingReport(32, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    documents = l2v.Documents(people, report)
    options = dict(
        output_dir=str(tmp_path), per_device_train_batch_size=8, report_to=[], use_cpu=True, disable_tqdm=True,
        logging_steps=4, save_strategy="no", seed=0,
    )  # fmt: skip
    first = Life2VecForPreTraining(config(attention="performer"))
    trainer = transformers.Trainer(
        first,
        transformers.TrainingArguments(
            num_train_epochs=2, learning_rate=0.05, **options
        ),
        train_dataset=documents, eval_dataset=documents,
        data_collator=l2v.EventCollator(tokenizer_of(40), 64, augment=l2v.Augmentation()),
        callbacks=[l2v.RedrawProjections()],
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.05
    first.save_pretrained(tmp_path / "first")
    second = Life2VecForSequenceClassification.from_pretrained(tmp_path / "first")
    trainer = transformers.Trainer(
        second,
        transformers.TrainingArguments(num_train_epochs=6, learning_rate=0.06, **options),
        train_dataset=documents,
        data_collator=l2v.EventCollator(tokenizer_of(40), 64, mlm=None),
    )
    trainer.train()
    logits = trainer.predict(documents).predictions
    assert (logits.argmax(1) == [d.label for d in people]).mean() > 0.8

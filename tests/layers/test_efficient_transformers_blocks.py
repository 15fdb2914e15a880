"""Blocks, learned gates and weights of a few values: against the published formulas written out."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import transformers
from torch import nn

from torchgraft import surgery
from torchgraft.experiments.timing import peak_bytes
from torchgraft.layers.efficient_transformers import (
    AdaptiveDepth,
    EvolvedBlock,
    L0HeadGates,
    SHARNNBlock,
    SwitchFFN,
    finish_low_bits,
    low_bit_weights,
)


def double(module):
    return module.double().eval()


def test_evolved_block_ignores_padding_and_has_gradients():
    torch.manual_seed(0)
    block = double(EvolvedBlock(8, heads=2))
    x = torch.randn(1, 12, 8, dtype=torch.float64)
    mask = torch.zeros(1, 12, dtype=torch.bool)
    mask[:, 7:] = True
    other = x.clone()
    other[:, 7:] = torch.randn(1, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(block(x, mask)[:, :7], block(other, mask)[:, :7], rtol=0, atol=1e-12)
    torch.testing.assert_close(block(x, mask)[:, :7], block(x[:, :7]), rtol=0, atol=1e-12)
    small = double(EvolvedBlock(4, heads=2))
    assert torch.autograd.gradcheck(small, (torch.randn(1, 5, 4, dtype=torch.float64, requires_grad=True),))


def test_evolved_block_is_its_four_parts():
    torch.manual_seed(1)
    block = double(EvolvedBlock(6, heads=3))
    x = torch.randn(2, 11, 6, dtype=torch.float64)
    h = block.glu_norm(x)
    values, gates = block.glu(h).chunk(2, -1)
    y = x + values * gates.sigmoid()
    h = block.conv_norm(y)
    padded = nn.functional.pad(h, (0, 0, 1, 1))
    kernel = block.right.weight
    right = sum(padded[:, j : j + 11] @ kernel[:, :, j].T for j in range(3)) + block.right.bias
    h = block.left(h).relu()
    h[..., :3] += right.relu()
    h = nn.functional.pad(block.join_norm(h), (0, 0, 4, 4))
    h = block.pointwise(sum(h[:, j : j + 11] * block.depthwise.weight[:, 0, j] for j in range(9)))
    y = y + torch.cat([h, torch.zeros_like(h)], -1)
    q, k, v = (block.attention_norm(y) @ block.attention.in_proj_weight.T + block.attention.in_proj_bias).chunk(3, -1)
    q, k, v = (t.unflatten(-1, (3, 2)).transpose(1, 2) for t in (q, k, v))
    h = ((q @ k.mT / math.sqrt(2)).softmax(-1) @ v).transpose(1, 2).flatten(2)
    y = y + block.attention.out_proj(h)
    y = y + block.ffn(block.ffn_norm(y))
    torch.testing.assert_close(block(x), y, rtol=0, atol=1e-12)


def naive_depth(layer, x, epsilon, most):
    """Graves' formula position by position, for a layer that works position by position."""
    from torchgraft.layers.efficient_transformers.blocks import _coordinates

    y, steps, ponder = torch.zeros_like(x), [], []
    for i in range(x.shape[1]):
        s, total, out, count = x[0, i], 0.0, torch.zeros_like(x[0, i]), 0
        while True:
            s = layer.layer((s + _coordinates(x.shape[1], count, x.shape[2], x)[i])[None, None])[0, 0]
            p = float(layer.stop(s).detach().sigmoid())
            count += 1
            if total + p >= 1 - epsilon or count == most:
                out = out + (1 - total) * s
                break
            total, out = total + p, out + p * s
        y[0, i], steps, ponder = out, [*steps, count], [*ponder, count + 1 - total]
    return y, steps, sum(ponder) / len(ponder)


def test_adaptive_depth_is_the_formula_of_graves():
    torch.manual_seed(2)
    inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    layer = double(AdaptiveDepth(inner, 4, max_steps=7, epsilon=0.05, bias=-1.0))
    layer.stop.weight.data.mul_(6)
    x = torch.randn(1, 20, 4, dtype=torch.float64)
    y = layer(x)
    wanted, steps, ponder = naive_depth(layer, x, 0.05, 7)
    # chances are summed in float32
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-6)
    assert layer.steps[0].tolist() == steps
    assert len(set(steps)) > 2
    assert float(layer.ponder.detach()) == pytest.approx(ponder, abs=1e-5)
    layer.ponder.backward()
    assert float(layer.stop.weight.grad.abs().sum()) > 0


def test_adaptive_depth_stops_at_once_or_at_the_limit():
    x = torch.randn(2, 3, 4)
    for bias, steps in ((30.0, 1), (-30.0, 5)):
        layer = AdaptiveDepth(nn.Identity(), 4, max_steps=5, bias=bias)
        layer.stop.weight.data.zero_()
        layer(x)
        assert layer.steps.unique().tolist() == [steps]
    padding = torch.tensor([[False, False, True], [False, False, False]])
    y = layer(x, padding)
    assert layer.steps[0, 2] == 0
    assert not y[0, 2].any()
    encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()
    layer = AdaptiveDepth(encoder, 4, max_steps=3)
    alone = layer(x[:1, :2])
    torch.testing.assert_close(layer(x, padding, src_key_padding_mask=padding)[:1, :2], alone, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="max_steps"):
        AdaptiveDepth(encoder, 4, max_steps=0)
    with pytest.raises(ValueError, match="epsilon"):
        AdaptiveDepth(encoder, 4, epsilon=0)


def test_sha_rnn_goes_on_from_its_state_and_sees_no_future():
    torch.manual_seed(3)
    block = double(SHARNNBlock(6, boom=3))
    block.gates.data.normal_()
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    whole, _ = block(x)
    parts, state = [], None
    for part in x.split([4, 1, 4], dim=1):
        y, state = block(part, state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)
    x.requires_grad_()
    block(x)[0][:, 3].sum().backward()
    assert not x.grad[:, 4:].any()
    assert x.grad[:, :4].abs().sum() > 0
    # the LSTM alone reaches back, so the attention is checked on the formula
    h = x + block.lstm(block.lstm_norm(x))[0]
    m, (a, b, c) = block.memory_norm(h), block.gates.sigmoid()
    scores = (a * block.query(block.query_norm(h))) @ (b * m).mT / math.sqrt(6)
    h = h + scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf).softmax(-1) @ (c * m)
    wide = nn.functional.gelu(block.wide(block.ffn_norm(h)))
    torch.testing.assert_close(whole, h + wide[..., :6] + wide[..., 6:12] + wide[..., 12:], rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="memory"):
        block(x[:1], state)


def test_sha_rnn_needs_no_n_by_n_mask_for_a_whole_sequence(without_shape_checks):
    block, n = SHARNNBlock(4, boom=1).eval(), 3000
    with torch.no_grad():
        assert peak_bytes(lambda: block(torch.zeros(1, n, 4))) < n * n


def heads_of(model):
    return {f"layer {i}": layer.attention.output.dense for i, layer in enumerate(model.bert.encoder.layer)}


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=16, vocab_size=30
    )
    return transformers.BertForSequenceClassification(config).eval()


def test_l0_gates_have_the_distribution_they_claim():
    torch.manual_seed(0)
    gates = L0HeadGates({"a": nn.Linear(8, 8)}, heads=2, open=0.7)
    gates.log_alpha.data[0, 1] = -1.0
    draws = gates.gates(40_000)[:, 0]
    expected = (gates.log_alpha[0] - 2 / 3 * math.log(0.1 / 1.1)).sigmoid()
    assert float(expected[0]) == pytest.approx(0.7, abs=1e-6)
    open_share = (draws > 0).float().mean(0)
    torch.testing.assert_close(open_share, expected.detach(), rtol=0, atol=4 * 0.5 / math.sqrt(40_000))
    assert float(gates.penalty()) == pytest.approx(float(expected.sum()))
    assert ((draws == 0) | (draws == 1)).float().mean() > 0.2


def test_l0_gates_close_heads_that_are_not_needed():
    """One head of two carries the label; a price closes the other, and the baked layer computes the same."""
    torch.manual_seed(0)
    out = nn.Linear(8, 1, bias=False)
    gates = L0HeadGates({"layer": out}, heads=2)
    optimizer = torch.optim.Adam([*out.parameters(), *gates.parameters()], lr=0.05)
    for _ in range(400):
        x = torch.randn(64, 8)
        loss = (out(x)[:, 0] - x[:, :4].sum(1)).square().mean() + 0.1 * gates.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    gates.eval()
    x = torch.randn(5, 8)
    before = out(x)
    assert gates.bake() == [("layer", 1)]
    torch.testing.assert_close(out(x), before)
    assert not out.weight[:, 4:].any()


def test_l0_gates_on_bert_and_their_removal():
    model = bert()
    ids = torch.randint(0, 30, (3, 6))
    plain = model(ids).logits
    gates = L0HeadGates(heads_of(model), heads=4)
    gates.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    gates.eval()
    gates.log_alpha.data.fill_(10.0)
    torch.testing.assert_close(model(ids).logits, plain)
    gates.log_alpha.data[1, 2] = -10.0
    closed = model(ids).logits
    assert not torch.allclose(closed, plain)
    gates.remove()
    assert torch.equal(model(ids).logits, plain)
    for bad in ({"heads": 3}, {"heads": 4, "open": 1.0}):
        with pytest.raises(ValueError, match=r"heads|open"):
            L0HeadGates(heads_of(model), **bad)
    with pytest.raises(ValueError, match="outputs"):
        L0HeadGates({}, heads=1)


@pytest.mark.parametrize("bits", ["binary", "ternary", 2, 4, 8])
def test_low_bits_take_few_values_and_finish_to_what_was_computed(bits):
    model, ids = bert(), torch.arange(6)[None]
    plain = model(ids).logits
    count = low_bit_weights(model, "bert.encoder.*.dense", bits)
    assert count == 2 * 3
    rounded = model(ids).logits
    assert not torch.equal(rounded, plain)
    rounded.sum().backward()
    first = model.bert.encoder.layer[0].output.dense
    assert first.parametrizations.weight.original.grad.abs().sum() > 0
    finish_low_bits(model)
    torch.testing.assert_close(model(ids).logits, rounded)
    values = {"binary": 2, "ternary": 3}.get(bits) or 2**bits
    assert max(len(row.unique()) for row in first.weight) <= values
    assert {key.split(".")[-1] for key in model.state_dict()} <= {"weight", "bias", "position_ids", "token_type_ids"}


def test_low_bit_formulas():
    w = torch.tensor([[0.1, -1.0, 2.0, -0.3]])
    layer = nn.Sequential(nn.Linear(4, 1, bias=False))
    layer[0].weight.data.copy_(w)
    low_bit_weights(layer, nn.Linear, "ternary")
    # 0.7 of the mean size is 0.595, so -1 and 2 stay, with the mean size of 1.5
    torch.testing.assert_close(layer[0].weight.detach(), torch.tensor([[0.0, -1.5, 1.5, 0.0]]))
    layer[0].weight.sum().backward()
    assert layer[0].parametrizations.weight.original.grad.tolist() == [[1.0] * 4]
    finish_low_bits(layer)
    layer[0].weight.data.copy_(w)
    low_bit_weights(layer, nn.Linear, "binary")
    torch.testing.assert_close(layer[0].weight.detach(), torch.tensor([[0.85, -0.85, 0.85, -0.85]]))


def test_learned_steps_have_the_gradient_of_the_paper():
    layer = nn.Sequential(nn.Linear(3, 1, bias=False)).double()
    layer[0].weight.data.copy_(torch.tensor([[0.26, -0.9, 5.0]]))
    low_bit_weights(layer, nn.Linear, 3)
    rounding = layer[0].parametrizations.weight[0]
    rounding.step.data.fill_(0.5)
    torch.testing.assert_close(layer[0].weight.detach(), torch.tensor([[0.5, -1.0, 1.5]]).double())
    layer[0].weight.sum().backward()
    # inside: round(v) - v; beyond: the last integer, 3; all over sqrt(count times 3)
    expected = ((1 - 0.52) + (-2 + 1.8) + 3) / math.sqrt(3 * 3)
    assert float(rounding.step.grad) == pytest.approx(expected)
    assert layer[0].parametrizations.weight.original.grad.tolist() == [[1.0, 1.0, 0.0]]


def test_low_bits_refuse_what_they_cannot_round():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(ValueError, match="bits must be"):
        low_bit_weights(model, nn.Linear, 1)
    with pytest.raises(surgery.NothingMatchedError):
        low_bit_weights(model, "nowhere.*", 4)
    with pytest.raises(TypeError, match="linear layers only, got ReLU"):
        low_bit_weights(model, nn.ReLU, 4)
    with pytest.raises(ValueError, match="no weights of low_bit_weights"):
        finish_low_bits(model)


@pytest.mark.parametrize("make", [lambda: EvolvedBlock(8, 2), lambda: SHARNNBlock(8)])
def test_blocks_compile_and_come_back_from_a_state(make, without_shape_checks):
    block, x = make().eval(), torch.randn(2, 6, 8)
    first = lambda out: out[0] if isinstance(out, tuple) else out  # noqa: E731
    expected = first(block(x))
    torch.testing.assert_close(first(torch.compile(block, backend="aot_eager")(x)), expected, rtol=1e-4, atol=1e-5)
    again = make().eval()
    again.load_state_dict(block.state_dict())
    assert torch.equal(first(again(x)), expected)
    low = first(make().bfloat16().eval()(x.bfloat16()))
    assert low.dtype == torch.bfloat16
    assert bool(low.isfinite().all())


def test_learned_steps_of_outputs_whose_weights_are_zero_are_finite_and_train():
    for rows in (slice(None), slice(1)):
        model = nn.Sequential(nn.Linear(4, 3))
        with torch.no_grad():
            model[0].weight[rows] = 0
        low_bit_weights(model, nn.Linear, 4)
        y = model(torch.ones(1, 4))
        assert torch.isfinite(y).all()
        y.sum().backward()
        assert model[0].parametrizations.weight.original.grad.abs().min() > 0


def test_weights_are_rounded_once():
    model = nn.Sequential(nn.Linear(4, 3))
    low_bit_weights(model, nn.Linear, 4)
    with pytest.raises(ValueError, match="already"):
        low_bit_weights(model, nn.Linear, "binary")


@pytest.mark.parametrize("make", [
    lambda: SwitchFFN(8, 8, 2),
    lambda: AdaptiveDepth(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), width=8),
])  # fmt: skip
def test_layers_can_be_copied_between_forward_and_backward(make):
    layer, x = make().eval(), torch.randn(2, 5, 8)
    y = layer(x)
    again = copy.deepcopy(layer)
    torch.testing.assert_close(again(x), y)
    (y.sum() + (layer.balance if isinstance(layer, SwitchFFN) else layer.ponder)).backward()


def test_nothing_to_ponder_costs_nothing():
    layer = AdaptiveDepth(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), width=8)
    assert (layer(torch.randn(2, 5, 8), padding=torch.ones(2, 5, dtype=torch.bool)) == 0).all()
    assert layer.ponder == 0


@pytest.mark.parametrize("make", [
    lambda: EvolvedBlock(8, 2), lambda: SHARNNBlock(8), lambda: AdaptiveDepth(nn.Identity(), width=8),
])  # fmt: skip
def test_blocks_name_inputs_that_do_not_fit(make, without_shape_checks):
    for shape in ((2, 0, 8), (2, 5, 7), (5, 8)):
        with pytest.raises(ValueError, match="x must have shape"):
            make()(torch.zeros(shape))
    with pytest.raises(TypeError, match="floating-point"):
        make()(torch.zeros(2, 5, 8, dtype=torch.long))

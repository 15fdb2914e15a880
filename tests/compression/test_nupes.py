"""NUPES: the operator, its gradients, the search, packing, layers, reconstruction, integers, transformers."""

import copy
import json
import math
import os
import subprocess
import sys
from functools import cache

import pytest
import torch
import transformers
import transformers.quantizers.auto  # before the shape checker's hook, under which it would be compiled anew
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torchgraft import zoo
from torchgraft.compression import nupes
from torchgraft.compression.nupes import (
    PowerConv,
    PowerDecode,
    PowerFakeQuantize,
    PowerLinear,
    PowerQuantConfig,
    batchnorm_ranges,
    codebook_round,
    decode_table,
    dequantize_model,
    fold_batchnorm,
    integer_table,
    lut_error,
    normal_float_levels,
    pack_codes,
    power_dequantize,
    power_quantize,
    prepare_model,
    quantization_error,
    quantize_model,
    reconstruct_block,
    search_exponent,
    soft_round,
    summary,
    unpack_codes,
)

SEVEN = range(2, 9)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def naive(x, a, bits, signed=True):
    """Loops over channels and values, python floats."""
    n = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    codes, values = [], []
    for row in x.double().tolist():
        m = max(map(abs, row)) or 1.0
        q = [round(n * math.copysign((abs(v) / m) ** a, v)) for v in row]
        codes.append(q)
        values.append([m * math.copysign((abs(c) / n) ** (1 / a), c) for c in q])
    return torch.tensor(codes), torch.tensor(values, dtype=torch.float64)


# the operator


@pytest.mark.parametrize("bits", SEVEN)
@pytest.mark.parametrize("a", [0.3, 0.5, 0.7, 1.0, 1.7])
def test_operator_equals_the_formula(bits, a):
    x = draw(5, 40, dtype=torch.float64)
    codes, scale = power_quantize(x, a, bits)
    expected, values = naive(x, a, bits)
    assert torch.equal(codes.long(), expected)
    torch.testing.assert_close(power_dequantize(codes, a, bits, scale, torch.float64), values, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_one_is_symmetric_uniform_bit_for_bit(bits, dtype):
    x = draw(6, 50, dtype=dtype)
    n = 2 ** (bits - 1) - 1
    wide = x if dtype == torch.float64 else x.float()
    m = wide.abs().amax(1, keepdim=True)
    codes, scale = power_quantize(x, 1.0, bits)
    assert torch.equal(scale, m.to(dtype))
    assert torch.equal(codes, torch.round(n * (wide / m)).to(torch.int8))
    table = torch.arange(-n, n + 1, dtype=torch.float64) / n
    assert torch.equal(decode_table(1.0, bits), table)


@given(
    st.lists(st.floats(-1e6, 1e6, allow_nan=False, width=32), min_size=1, max_size=30),
    st.floats(0.1, 2.0),
    st.integers(2, 8),
)
@settings(max_examples=60, deadline=None)
def test_codes_keep_order_sign_and_ends(values, a, bits):
    x = torch.tensor([values], dtype=torch.float64)
    codes, scale = power_quantize(x, a, bits)
    n = 2 ** (bits - 1) - 1
    assert int(codes.abs().max()) <= n
    assert bool((codes * x.sign() >= 0).all())
    decoded = power_dequantize(codes, a, bits, scale, torch.float64)
    assert bool((decoded[x == 0] == 0).all())
    top = x.abs() == scale
    assert torch.equal(decoded[top], x[top])
    order = x[0].argsort()
    assert bool((codes[0, order].long().diff() >= 0).all())
    again, doubled = power_quantize(4 * x, a, bits)
    assert torch.equal(again, codes)
    assert torch.equal(doubled, torch.where(x.abs().amax() > 0, 4 * scale, scale))


def test_products_of_codes_stand_for_products_of_values():
    for a in (0.5, 0.63, 1.0):
        q1, m1 = power_quantize(draw(1, 200, dtype=torch.float64), a, 4)
        q2, m2 = power_quantize(draw(1, 200, seed=1, dtype=torch.float64), a, 8)
        product = power_dequantize(q1, a, 4, m1, torch.float64) * power_dequantize(q2, a, 8, m2, torch.float64)
        q = q1.long() * q2.long()
        formula = m1 * m2 * q.sign() * (q.abs() / (7 * 127)) ** (1 / a)
        torch.testing.assert_close(product, formula, rtol=1e-6, atol=0)
    # and not for sums: the power belongs to each operand
    codes = torch.tensor([3.0, 4.0])
    assert ((codes / 7) ** 2).sum() != ((codes / 7).sum()) ** 2


def test_unsigned_scales_and_channels():
    x = draw(3, 4, 5).abs()
    codes, scale = power_quantize(x, 0.5, 8, channel_dim=None, signed=False)
    assert codes.dtype == torch.uint8
    assert int(codes.max()) == 255
    assert scale.shape == (1, 1, 1)
    torch.testing.assert_close(power_dequantize(codes, 0.5, 8, scale), x, rtol=0, atol=0.01 * float(scale))
    assert power_quantize(x, 0.5, 4, channel_dim=1)[1].shape == (1, 4, 1)
    assert power_quantize(x, 0.5, 4, channel_dim=-1)[1].shape == (1, 1, 5)
    clipped, _ = power_quantize(torch.tensor([[2.0, -9.0]]), 0.5, 4, scale=torch.tensor([[1.0]]))
    assert clipped.tolist() == [[7, -7]]
    a = torch.tensor([[0.5], [1.0], [0.7]])
    flat = x[:, 0]
    codes, scale = power_quantize(flat, a, 4)
    for row in range(3):
        own, m = power_quantize(flat[row : row + 1], float(a[row]), 4)
        assert torch.equal(codes[row : row + 1], own)
        torch.testing.assert_close(
            power_dequantize(codes, a, 4, scale)[row : row + 1], power_dequantize(own, float(a[row]), 4, m)
        )


def test_zero_channel_has_scale_one():
    x = torch.tensor([[0.0, 0.0], [1.0, -2.0]])
    codes, scale = power_quantize(x, 0.5, 4)
    assert scale.flatten().tolist() == [1.0, 2.0]
    assert torch.equal(power_dequantize(codes, 0.5, 4, scale)[0], x[0])


# gradients


def test_gradient_by_the_exponent_is_that_of_the_decoder():
    q = torch.arange(-7, 8, dtype=torch.float64)
    for a in (0.1, 0.4, 0.7, 1.0, 2.0):
        at = torch.tensor(a, dtype=torch.float64, requires_grad=True)
        found = []
        for code in q:
            out = PowerDecode.apply(code[None], at, torch.ones(1, dtype=torch.float64), 7)
            found.append(torch.autograd.grad(out.sum(), at)[0])
        found = torch.stack(found)
        h = 1e-6

        def decoded(v):
            return q.sign() * (q.abs() / 7) ** (1 / v)

        torch.testing.assert_close(found, (decoded(a + h) - decoded(a - h)) / (2 * h), rtol=1e-4, atol=1e-7)
        assert found[7] == 0
        assert bool((found.abs() <= 1 / (math.e * a) + 1e-12).all())
        assert bool((found[8:] >= 0).all())


def test_decoder_gradients_of_codes_and_scale():
    r = (draw(4, 9, dtype=torch.float64) * 3).clamp(-6, 6)
    r = torch.where(r.abs() < 0.6, torch.full_like(r, 1.5), r).requires_grad_()
    a = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    m = (draw(4, 1, seed=2, dtype=torch.float64).abs() + 0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda *v: PowerDecode.apply(*v, 7), (r, a, m))
    # below half a code the slope is held, so that zero codes can move and nothing is infinite
    for value in (0.5, 1.5):
        z = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        PowerDecode.apply(
            z, torch.tensor(value, dtype=torch.float64), torch.ones(1, dtype=torch.float64), 7
        ).sum().backward()
        assert bool((z.grad > 0).all() and z.grad.isfinite().all())


def test_straight_through_gradients_equal_the_formula():
    n, a = 7, 0.6
    x = draw(200, dtype=torch.float64)
    x[:3] = torch.tensor([0.0, 1e-30, float(x.abs().max())])
    m = x.abs().max()
    leaf, power, scale = (
        x.clone().requires_grad_(),
        torch.tensor(a, dtype=torch.float64, requires_grad=True),
        m.clone().requires_grad_(),
    )
    weight = draw(200, seed=3, dtype=torch.float64)
    (PowerFakeQuantize.apply(leaf, power, scale, n, True) * weight).sum().backward()
    by_a, by_x, by_m = 0.0, [], 0.0
    for v, w in zip(x.tolist(), weight.tolist(), strict=True):
        u = abs(v) / float(m)
        y = n * u**a
        q = round(y)
        s = math.copysign(1, v)
        U = (q / n) ** (1 / a)
        if q:
            by_a += w * float(m) * s * (U / a) * ((y / q) * math.log(u) - math.log(q / n) / a)
            slope = (q / y) ** (1 / a - 1)
        else:
            slope = 1.0
        by_x.append(w * slope)
        by_m += w * s * (U - u * slope)
    assert float(power.grad) == pytest.approx(by_a, rel=1e-9)
    torch.testing.assert_close(leaf.grad, torch.tensor(by_x, dtype=torch.float64))
    assert float(scale.grad) == pytest.approx(by_m, rel=1e-9)
    for extreme in (0.1, 2.0):
        p = torch.tensor(extreme, requires_grad=True)
        z = torch.tensor([0.0, 1e-30, -1e-30, 1.0, -1.0], requires_grad=True)
        PowerFakeQuantize.apply(z, p, torch.ones(1), n, True).sum().backward()
        assert p.grad.isfinite()
        assert z.grad.isfinite().all()


def test_soft_rounding():
    z = torch.linspace(-4, 4, 4001, dtype=torch.float64)
    for t in (1e-3, 1.0, 8.0, 50.0):
        r = soft_round(z, t)
        assert bool((r.diff() > -1e-12).all())
        for k in range(-3, 4):
            ends = soft_round(torch.tensor([k - 1e-9, k, k + 1e-9], dtype=torch.float64), t)
            torch.testing.assert_close(ends, torch.full_like(ends, k), atol=1e-6, rtol=0)
    torch.testing.assert_close(soft_round(z, 1e-3), z, atol=1e-6, rtol=0)
    away = z[((z - z.floor()) - 0.5).abs() > 0.02]
    torch.testing.assert_close(soft_round(away, 1e3), away.round(), atol=1e-4, rtol=0)
    T, u = 5.0, 0.3

    def sigmoid(v):
        return 1 / (1 + math.exp(-v))

    formula = (sigmoid(T * (u - 0.5)) - sigmoid(-T / 2)) / (sigmoid(T / 2) - sigmoid(-T / 2))
    assert float(soft_round(torch.tensor(2 + u, dtype=torch.float64), T)) == pytest.approx(2 + formula)
    inside = (draw(20, dtype=torch.float64) * 2 + 0.013).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: soft_round(v, 3.0), inside)


# search


def test_search_finds_the_least_of_a_brute_force_grid():
    weights = [draw(16, 150, seed=s) for s in range(2)]
    grid = [round(0.2 + 0.005 * i, 3) for i in range(201)]
    for bits in (3, 4):
        total = [sum(quantization_error(w, a, bits) for w in weights) for a in grid]
        found = search_exponent(weights, bits)
        reached = sum(quantization_error(w, found, bits) for w in weights)
        assert reached <= min(total) * (1 + 1e-9)
        assert found == pytest.approx(grid[total.index(min(total))], abs=0.005 + 1e-3)
        assert reached <= sum(quantization_error(w, 1.0, bits) for w in weights)


def test_search_of_large_weights_is_exact_enough():
    w = draw(100, 700)
    found = search_exponent([w], 4)
    grid = [found + 0.002 * k for k in range(-10, 11)]
    assert quantization_error(w, found, 4) <= min(quantization_error(w, a, 4) for a in grid) * (1 + 2e-4)


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("p", [1, 2, 3.5])
def test_search_is_never_worse_than_uniform(bits, p):
    for w in (torch.rand(8, 100) * 2 - 1, torch.sign(draw(8, 100)), draw(8, 100) ** 3):
        found = search_exponent([w], bits, p=p)
        assert quantization_error(w, found, bits, p) <= quantization_error(w, 1.0, bits, p) * (1 + 1e-9)


def test_granularities():
    weights = {"normal": draw(16, 200), "flat": torch.rand(16, 200, generator=torch.Generator().manual_seed(1)) * 2 - 1}
    layers = search_exponent(weights, 4, granularity="layer")
    assert layers["normal"] < layers["flat"]
    assert layers["normal"] == search_exponent([weights["normal"]], 4)
    channels = search_exponent(weights, 4, granularity="channel")
    assert channels["normal"].shape == (16,)
    for name, w in weights.items():
        per = sum(quantization_error(w[i : i + 1], float(channels[name][i]), 4) ** 2 for i in range(16))
        whole = sum(quantization_error(w[i : i + 1], layers[name], 4) ** 2 for i in range(16))
        assert per < whole
        assert quantization_error(w, channels[name], 4) == pytest.approx(per**0.5, rel=1e-6)
    grouped = search_exponent(weights, 4, group_size=64)
    assert grouped != search_exponent(weights, 4)
    assert search_exponent(weights, 4, candidates=(1.0, 0.5)) in (1.0, 0.5)


# packing


@given(st.integers(2, 8), st.integers(1, 40), st.integers(0, 3), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_packing_keeps_every_code(bits, columns, rows, seed):
    n = 2 ** (bits - 1) - 1
    codes = torch.randint(-n, n + 1, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (rows, bits * math.ceil(columns / 8))
    assert torch.equal(unpack_codes(packed, bits, columns).long() - n, codes.long())


def test_normal_float_is_that_of_the_paper():
    # NF4 of QLoRA, arXiv 2305.14314, appendix E
    published = [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]  # fmt: skip
    torch.testing.assert_close(normal_float_levels(4), torch.tensor(published, dtype=torch.float64), atol=1e-5, rtol=0)
    w, levels = draw(4, 30), normal_float_levels(4)
    rounded = codebook_round(w, levels, 8)
    for i in range(4):
        for j in range(30):
            m = w[i, j // 8 * 8 : j // 8 * 8 + 8].abs().max().double()
            assert abs(float(rounded[i, j]) - float(w[i, j])) <= float((levels * m - w[i, j]).abs().min()) + 1e-6


# integers


def test_integer_tables():
    for bits, k in ((4, 1), (4, 2), (3, 3), (8, 2)):
        values, divisor = integer_table(1 / k, bits)
        n = 2 ** (bits - 1) - 1
        assert divisor == n**k
        assert values.tolist() == [int(math.copysign(abs(q) ** k, q)) for q in range(-n, n + 1)]
        torch.testing.assert_close(values.double() / divisor, decode_table(1 / k, bits), rtol=1e-15, atol=0)
    assert integer_table(0.7, 4) is None
    values, divisor = integer_table(0.7, 4, lut_bits=8)
    assert divisor == 127
    assert (values.double() / 127 - decode_table(0.7, 4)).abs().max() == lut_error(0.7, 4) <= 0.5 / 127
    third = decode_table(torch.tensor([1 / 3], dtype=torch.float32), 3)[0]
    torch.testing.assert_close(third * 27, integer_table(1 / 3, 3)[0].double(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize(
    ("bits", "a", "act_bits", "act"), [(4, 0.5, 8, 1.0), (4, 0.5, 4, None), (3, 1 / 3, 8, 0.5), (8, 0.5, 8, 1.0)]
)
def test_integer_path_is_exact(bits, a, act_bits, act, group_size):
    torch.manual_seed(0)
    x = draw(5, 7, 40)
    config = PowerQuantConfig(
        weight_bits=bits, exponent=a, act_bits=act_bits, act_exponent=act, integer_only=True, group_size=group_size
    )
    model = quantize_model(nn.Sequential(nn.Linear(40, 9)), config, [x])
    layer = model[0]
    total, _ = layer.integer_accumulators(x)
    # the same sums by plain python integers
    table, _ = integer_table(a, bits)
    weight = table[layer.signed_codes().long() + 2 ** (bits - 1) - 1]
    codes, _ = layer.input_quantizer.codes(x.reshape(-1, 40))
    k = round(1 / (act or a))
    inputs = codes.sign().long() * codes.abs().long() ** k
    size = group_size or 40
    exact = torch.stack([i @ w.t() for i, w in zip(inputs.split(size, 1), weight.split(size, 1), strict=True)], 1)
    assert torch.equal(total.long().reshape(exact.shape), exact)
    assert bool((total == total.round()).all())
    plain = nn.functional.linear(
        layer.input_quantizer(x.double()), layer.dequantized_weight(torch.float64), layer.bias.double()
    )
    torch.testing.assert_close(model(x).double(), plain, rtol=1e-5, atol=1e-5)


def test_int8_kernel_equals_the_decoded_weight():
    linear = nn.Linear(96, 24).to(torch.bfloat16)
    x = draw(3, 5, 96, dtype=torch.bfloat16)
    for settings_ in (dict(exponent=0.5), dict(exponent=0.7, lut_bits=8), dict(exponent=1.0, weight_bits=8)):
        layer = PowerLinear.from_float(linear, PowerQuantConfig(**settings_))
        with torch.no_grad():
            fast = layer(x)
            assert layer._int8 is not None
        slow = nn.functional.linear(x.float(), layer.dequantized_weight(torch.float32), layer.bias.float())
        torch.testing.assert_close(fast.float(), slow, rtol=0.02, atol=0.02)
        inputs = x.clone().requires_grad_()
        layer(inputs).sum().backward()
        torch.testing.assert_close(
            inputs.grad.float(), layer.dequantized_weight(torch.float32).sum(0).expand_as(x), rtol=0.02, atol=0.02
        )
    assert PowerLinear.from_float(linear, PowerQuantConfig(exponent=0.7))._int8_weight() is None
    odd = PowerLinear.from_float(nn.Linear(36, 8).to(torch.bfloat16), PowerQuantConfig(exponent=0.5))
    assert odd._int8_weight() is None, "the kernel would read past the end"


# layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("group_size", [None, 16, 7])
@pytest.mark.parametrize("granularity", ["layer", "channel"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_linear_is_the_product_with_the_decoded_weight(bits, granularity, group_size, dtype):
    linear = nn.Linear(36, 10).to(dtype)
    layer = PowerLinear.from_float(
        linear, PowerQuantConfig(weight_bits=bits, granularity=granularity, group_size=group_size)
    )
    size = group_size or 36
    a = layer.exponent.expand(10)
    expected = torch.zeros(10, 36, dtype=torch.float64)
    for row in range(10):
        for start in range(0, 36, size):
            part = linear.weight.detach()[row : row + 1, start : start + size].double()
            expected[row, start : start + size] = naive(part, float(a[row].float()), bits)[1]
    error = 1e-6 if dtype != torch.bfloat16 else 1e-2
    torch.testing.assert_close(layer.dequantized_weight(torch.float64), expected, rtol=error, atol=error)
    x = draw(2, 3, 36, dtype=dtype)
    wanted = nn.functional.linear(x.double(), layer.dequantized_weight(torch.float64), linear.bias.double())
    torch.testing.assert_close(layer(x).double(), wanted, rtol=20 * error, atol=20 * error)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        # a few rows at a time, several times
        patch.setattr(nupes.layers, "DECODED_AT_ONCE", 120)
        torch.testing.assert_close(layer(x).double(), wanted, rtol=20 * error, atol=20 * error)
    assert layer.codes.shape == (10, bits * 5)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(6, 9, 3, stride=2, padding=1),
        nn.Conv2d(6, 9, (3, 1), padding="same", dilation=2, bias=False),
        nn.Conv2d(6, 9, 3, groups=3, padding=(1, 2), padding_mode="reflect"),
        nn.Conv1d(6, 9, 5, padding=2, padding_mode="circular"),
        nn.Conv1d(6, 6, 3, groups=6),
    ],
    ids=["stride", "same", "groups", "conv1d", "depthwise"],
)
def test_convolutions(conv):
    layer = PowerConv.from_float(conv, PowerQuantConfig(weight_bits=8, exponent=0.7))
    x = draw(2, 6, *([12] * (conv.weight.ndim - 2)))
    same = copy.deepcopy(conv)
    same.weight.data = layer.dequantized_weight()
    torch.testing.assert_close(layer(x), same(x))
    torch.testing.assert_close(layer(x), conv(x), rtol=0.1, atol=0.05)
    wrapped = nn.Sequential(layer)
    torch.testing.assert_close(dequantize_model(wrapped)(x), same(x))


def test_a_cast_keeps_the_exponent_and_the_codes():
    layer = PowerLinear.from_float(nn.Linear(30, 8), PowerQuantConfig(exponent=0.7321))
    before = layer.exponent.clone(), layer.codes.clone()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        layer.to(dtype)
        assert layer.scale.dtype == dtype
        assert torch.equal(layer.exponent, before[0])
        assert torch.equal(layer.codes, before[1])


def test_size_on_disk(tmp_path):
    from safetensors.torch import save_file

    for bits in (2, 3, 4, 8):
        layer = PowerLinear.from_float(
            nn.Linear(1024, 512, bias=False).half(), PowerQuantConfig(weight_bits=bits, exponent=0.7)
        )
        save_file(layer.state_dict(), tmp_path / "codes.safetensors")
        wanted = 1024 * 512 * 2 * bits / 16 + 512 * 2
        assert (tmp_path / "codes.safetensors").stat().st_size == pytest.approx(wanted, rel=0.05)


# whole models


def small_cnn():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    ).eval()  # fmt: skip


def test_quantize_model_and_state_dict_round_trip(tmp_path):
    config = PowerQuantConfig(weight_bits=4, granularity="layer", module_bits={"0": 8, "7": 8}, act_bits=8)
    x = draw(6, 3, 8, 8)
    model = quantize_model(small_cnn(), config, x)
    assert [(row.name, row.bits) for row in summary(model)] == [("0", 8), ("3", 4), ("7", 8)]
    torch.save(model.state_dict(), tmp_path / "state.pt")
    kept = PowerQuantConfig.from_dict(json.loads(model.power_quant_config.to_json_string()))
    again = prepare_model(small_cnn(), kept)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(model(x), again(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    torch.testing.assert_close(model(x), small_cnn()(x), atol=0.1, rtol=0.1)


def test_folding_keeps_the_function_and_ranges_come_from_batchnorm(without_shape_checks):
    net = zoo.CifarResNet(8, 10)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_()
    net.eval()
    x = draw(4, 3, 16, 16)
    expected = net(x)
    ranges = batchnorm_ranges(net, k=6)
    assert set(ranges) == {f"layer{i}.0.conv{j}" for i in (1, 2, 3) for j in (1, 2)} | {"linear"}
    bn = net.layer1[0].bn1
    largest, negative = ranges["layer1.0.conv2"]
    assert largest == pytest.approx(float((bn.bias.abs() + 6 * bn.weight.abs()).max()))
    assert not negative
    fold_batchnorm(net)
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-4)
    assert isinstance(net.bn1, nn.Identity)
    ranges["conv1"] = float(x.abs().max()), True
    quantized = quantize_model(net, PowerQuantConfig(weight_bits=8, act_bits=8), input_range=ranges)
    torch.testing.assert_close(quantized(x), expected, rtol=0.2, atol=0.5)


def test_tied_weights_and_attention_are_left_alone():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.body, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
            self.attention = nn.MultiheadAttention(8, 2)
            self.head.weight = self.embed.weight

    model = quantize_model(Tied(), PowerQuantConfig())
    assert [row.name for row in summary(model)] == ["body"]
    assert model.head.weight is model.embed.weight


def block():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 24))


@cache
def learned(method="nupes", bits=3, steps=40, lr=0.3, exponent="learn", codes=True):
    net = nn.ModuleDict({"blocks": nn.ModuleList([block(), block()])})

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = net["blocks"]

        def forward(self, x):
            for b in self.blocks:
                x = x + b(x)
            return x

    model = Net()
    # inputs that depend on each other, as real ones do: else a weight has no reason to go further than a code
    x = draw(128, 3) @ draw(3, 24, seed=1) + 0.1 * draw(128, 24, seed=2)
    config = PowerQuantConfig(
        weight_bits=bits, method=method, exponent=exponent, learn_codes=codes, steps=steps, lr_codes=lr,
        lr_exponent=lr / 10, granularity="layer",
    )  # fmt: skip
    expected = model(x)
    return quantize_model(model, config, x), x, expected


def test_reconstruction_lowers_the_loss_and_moves_by_more_than_one():
    model, x, expected = learned()
    history = model.power_quant_history
    assert list(history) == ["blocks.0", "blocks.1"]
    plain, _, _ = learned(method="data_free", exponent="search")
    assert (model(x) - expected).square().mean() < 0.8 * (plain(x) - expected).square().mean()
    for entry in history.values():
        assert entry.end <= entry.start
        assert len(entry.losses) == 40
        assert entry.moved_far > 0
    first = history["blocks.0"]
    assert first.losses[0] < 0.3 * first.start, "soft codes start near the float block"
    # what is stored is what was measured
    got = [(model.blocks[0](x[i : i + 32]) - block()(x[i : i + 32])).square().sum(-1).mean() for i in range(0, 128, 32)]
    assert first.end == pytest.approx(float(torch.stack(got).mean()), rel=1e-4)


def test_adaround_moves_by_one_and_the_exponent_alone_moves_no_code_freely():
    model, x, expected = learned("adaround", exponent=1.0)
    plain, _, _ = learned("data_free", exponent=1.0)
    assert (model(x) - expected).square().mean() < (plain(x) - expected).square().mean()
    for entry in model.power_quant_history.values():
        assert entry.moved > 0
        assert entry.moved_far == 0
        assert all(a == [1.0] for a in entry.exponents.values())
    alone, _, _ = learned(codes=False)
    for name, entry in alone.power_quant_history.items():
        assert entry.end <= entry.start
        for key, a in entry.exponents.items():
            layer = alone.get_submodule(name).get_submodule(key)
            original = block()[int(key)].weight.detach()
            nearest = PowerLinear.from_float(block()[int(key)], PowerQuantConfig(weight_bits=3, exponent=a[0]))
            assert original.shape == layer.dequantized_weight().shape
            assert torch.equal(nearest.codes, layer.codes), "codes are nearest on the learned grid"


def test_worse_results_are_not_kept():
    model, _, _ = learned(steps=3, lr=50.0)
    for entry in model.power_quant_history.values():
        assert entry.learned > entry.start
        assert entry.end == entry.start
        assert entry.moved == 0


def test_reconstruct_block_by_hand():
    floats = block()
    quantized = quantize_model(copy.deepcopy(floats), PowerQuantConfig(weight_bits=2))
    result = reconstruct_block(floats, quantized, draw(64, 24), steps=30, lr_codes=0.05)
    assert result.end < result.start
    assert all(layer.learning is None for layer in quantized if isinstance(layer, PowerLinear))
    with pytest.raises(ValueError, match="no quantized layer"):
        reconstruct_block(floats, floats, draw(64, 24))


# transformers


def tiny(family):
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=50)
    made = {
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, tie_word_embeddings=True)),
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, bos_token_id=1, eos_token_id=2)
        ),
        "bert": lambda: transformers.BertModel(transformers.BertConfig(**shape)),
        "vit": lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                                   image_size=16, patch_size=8)
        ),
    }  # fmt: skip
    return made[family]().eval()


def inputs_of(family):
    if family == "vit":
        return dict(pixel_values=draw(2, 3, 16, 16))
    return dict(input_ids=torch.arange(14).reshape(2, 7), attention_mask=torch.ones(2, 7, dtype=torch.long))


def hidden(output):
    return output.logits if "logits" in output else output.last_hidden_state


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit"])
def test_from_pretrained_and_save_pretrained(family, tmp_path):
    model = tiny(family)
    model.save_pretrained(tmp_path / "float")
    config = PowerQuantConfig(weight_bits=4, granularity="layer", group_size=24)
    quantized = type(model).from_pretrained(tmp_path / "float", quantization_config=config)
    names = [row.name for row in summary(quantized)]
    assert len(names) == {"llama": 14, "gpt2": 8, "bert": 13, "vit": 14}[family], names
    x = inputs_of(family)
    with torch.no_grad():
        by_hand = hidden(quantize_model(model, config)(**x))
        expected = hidden(quantized(**x))
        assert torch.equal(expected, by_hand)
        quantized.save_pretrained(tmp_path / "codes")
        again = type(model).from_pretrained(tmp_path / "codes")
        assert torch.equal(hidden(again(**x)), expected)
        half = type(model).from_pretrained(tmp_path / "codes", dtype=torch.bfloat16)
        assert [row.exponents for row in summary(half)] == [row.exponents for row in summary(quantized)]
        torch.testing.assert_close(hidden(half(**x)).float(), expected, rtol=0.1, atol=0.1)
        plain = again.dequantize()
        torch.testing.assert_close(hidden(plain(**x)), expected, rtol=1e-4, atol=1e-4)
    stored = json.loads((tmp_path / "codes" / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "power"
    assert set(stored["quantized"]) == set(names)


def test_a_learned_transformer_is_saved_and_loaded(tmp_path):
    model = tiny("llama")
    batches = [inputs_of("llama")]
    config = PowerQuantConfig(weight_bits=3, method="nupes", exponent="learn", steps=3, act_bits=8, lr_codes=0.1)
    quantize_model(model, config, batches).save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**batches[0]).logits, model(**batches[0]).logits)


def test_a_new_process_without_transformers_gives_the_same_outputs(tmp_path):
    from safetensors.torch import save_file

    config = PowerQuantConfig(weight_bits=3, method="nupes", exponent="learn", steps=3, act_bits=8, lr_codes=0.1)
    x = draw(4, 3, 8, 8)
    model = quantize_model(small_cnn(), config, x)
    save_file(model.state_dict(), tmp_path / "codes.safetensors")
    (tmp_path / "config.json").write_text(model.power_quant_config.to_json_string())
    with torch.no_grad():
        save_file({"x": x, "y": model(x)}, tmp_path / "answers.safetensors")
    code = (
        "import json, sys\n"
        "sys.modules['transformers'] = None\n"
        "from pathlib import Path\n"
        "import torch\n"
        "from safetensors.torch import load_file\n"
        "from torch import nn\n"
        "from torchgraft.compression.nupes import PowerQuantConfig, prepare_model\n"
        "here = Path(sys.argv[1])\n"
        "net = nn.Sequential(\n"
        "    nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1),\n"
        "    nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()\n"
        "prepare_model(net, PowerQuantConfig.from_dict(json.loads((here / 'config.json').read_text())))\n"
        "net.load_state_dict(load_file(here / 'codes.safetensors'))\n"
        "kept = load_file(here / 'answers.safetensors')\n"
        "with torch.no_grad(): assert torch.equal(net(kept['x']), kept['y'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=os.environ, check=False
    )
    assert done.returncode == 0, done.stderr[-800:]


def test_layers_compile_whole(without_shape_checks):
    x = draw(4, 8)
    config = PowerQuantConfig(weight_bits=3, granularity="channel", act_bits=8)
    net = quantize_model(nn.Sequential(nn.Linear(8, 4), nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 3)), config, x)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), net(x))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_transformers_blocks_are_learned(family):
    model, x = tiny(family), inputs_of(family)
    with torch.no_grad():
        expected = hidden(model(**x))
    config = PowerQuantConfig(weight_bits=3, method="nupes", exponent="learn", steps=6, lr_codes=0.05)
    quantize_model(model, config, [x])
    blocks = [name for name in model.power_quant_history if name.rpartition(".")[2].isdigit()]
    assert len(blocks) == 2
    plain = quantize_model(tiny(family), PowerQuantConfig(weight_bits=3))
    with torch.no_grad():
        assert (hidden(model(**x)) - expected).square().mean() < (hidden(plain(**x)) - expected).square().mean()


# wrong inputs


def nan_linear():
    net = nn.Sequential(nn.Linear(4, 4))
    net[0].weight.data[1, 2] = math.nan
    return net


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: power_quantize(draw(2, 3), 0.5, 9), ValueError, "from 2 to 8, got 9"),
        (lambda: power_quantize(draw(2, 3), 0.5, 1), ValueError, "from 2 to 8, got 1"),
        (lambda: power_quantize(draw(2, 3), 0.0, 4), ValueError, "above 0"),
        (lambda: power_quantize(draw(2, 3), math.nan, 4), ValueError, "above 0"),
        (lambda: power_quantize(torch.tensor([[math.inf]]), 0.5, 4), ValueError, "1 NaN or infinite"),
        (lambda: power_quantize(draw(2, 3), 0.5, 4, signed=False), ValueError, "negative"),
        (lambda: power_quantize(draw(2, 3), 0.5, 4, scale=torch.zeros(2, 1)), ValueError, "1 for a channel of zeros"),
        (lambda: power_dequantize(torch.tensor([9], dtype=torch.int8), 0.5, 4), ValueError, "end at 7"),
        (lambda: power_dequantize(torch.tensor([1]), 0.5, 4), TypeError, "int8"),
        (lambda: pack_codes(torch.tensor([[8]], dtype=torch.int8), 4), ValueError, "end at 7"),
        (lambda: unpack_codes(torch.zeros(1, 3, dtype=torch.uint8), 4, 8), ValueError, "take 4"),
        (lambda: search_exponent([], 4), ValueError, "empty"),
        (lambda: search_exponent([nan_linear()[0].weight], 4), ValueError, "NaN"),
        (lambda: search_exponent([draw(2, 3)], 4, granularity="row"), ValueError, "'channel'"),
        (lambda: PowerQuantConfig(weight_bits=1), ValueError, "weight_bits must be a whole number"),
        (lambda: PowerQuantConfig(weight_bits=4.0), ValueError, "weight_bits"),
        (lambda: PowerQuantConfig(exponent="learn"), ValueError, "method='nupes'"),
        (lambda: PowerQuantConfig(exponent=-1.0), ValueError, "above 0"),
        (lambda: PowerQuantConfig(method="gptq"), ValueError, "'adaround'"),
        (lambda: PowerQuantConfig(group_size=0), ValueError, "group_size"),
        (lambda: PowerQuantConfig(integer_only=True, exponent=0.7), ValueError, "1/k"),
        (lambda: PowerQuantConfig(integer_only=True, granularity="channel"), ValueError, "'layer'"),
        (lambda: PowerQuantConfig.from_dict({"weight_bit": 4}), ValueError, "unknown settings"),
        (lambda: quantize_model(nan_linear(), PowerQuantConfig()), ValueError, "weight of layer '0' has 1 NaN"),
        (lambda: quantize_model(nn.Sequential(nn.ReLU()), PowerQuantConfig()), ValueError, "it has ReLU"),
        (lambda: quantize_model(small_cnn(), PowerQuantConfig(module_bits={"x": 8})), ValueError, "module_bits names"),
        (lambda: quantize_model(small_cnn(), PowerQuantConfig(method="nupes")), ValueError, "calibration"),
        (lambda: quantize_model(small_cnn(), PowerQuantConfig(act_bits=8)), ValueError, "calibration"),
        (lambda: quantize_model(small_cnn(), PowerQuantConfig(act_bits=8), []), ValueError, "empty"),
        (
            lambda: quantize_model(small_cnn(), PowerQuantConfig(weight_bits=8, exponent=0.1, integer_only=True)),
            ValueError,
            "layer '0': integer_only",
        ),
        (lambda: PowerLinear.from_float(nn.ReLU(), PowerQuantConfig()), TypeError, "cannot be quantized"),
        (lambda: prepare_model(small_cnn(), PowerQuantConfig()), ValueError, "quantized is empty"),
        (lambda: fold_batchnorm(small_cnn().train()), ValueError, "eval"),
        (lambda: soft_round(draw(3), 0.0), ValueError, "temperature"),
        (
            lambda: PowerLinear.from_float(nn.Linear(4, 4), PowerQuantConfig(exponent=0.7)).integer_accumulators(
                draw(2, 4)
            ),
            ValueError,
            "act_bits",
        ),
    ],
)
def test_wrong_inputs(call, error, words, without_shape_checks):
    with pytest.raises(error, match=words):
        call()


def test_from_pretrained_says_that_it_has_no_data(tmp_path):
    tiny("bert").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quantize_model"):
        transformers.BertModel.from_pretrained(tmp_path, quantization_config=PowerQuantConfig(method="nupes"))


def test_a_failure_leaves_the_model_as_it_was():
    model, x = small_cnn(), draw(4, 3, 8, 8)
    before = dict(model.named_modules())
    expected = model(x)
    with pytest.raises(FloatingPointError, match="learning rates"):
        quantize_model(model, PowerQuantConfig(method="nupes", steps=4), 1e25 * x)
    assert dict(model.named_modules()) == before
    assert torch.equal(model(x), expected)


def test_zero_channels_and_zero_layers_are_kept():
    net = nn.Sequential(nn.Linear(6, 4))
    net[0].weight.data[1] = 0
    quantize_model(net, PowerQuantConfig(exponent=0.5))
    assert net[0].scale[1] == 1
    assert bool((net[0].dequantized_weight()[1] == 0).all())
    empty = nn.Sequential(nn.Linear(6, 4))
    empty[0].weight.data.zero_()
    quantize_model(empty, PowerQuantConfig())
    assert bool((empty[0].dequantized_weight() == 0).all())
    assert nupes.summary(empty)[0].weights == 24

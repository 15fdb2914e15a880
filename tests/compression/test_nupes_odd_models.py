"""NUPES on models and inputs that are out of the ordinary: nothing is lost, nothing is silently wrong."""

import copy
import json
import math
import types

import numpy as np
import pytest
import torch
import transformers
import transformers.quantizers.auto  # before the shape checker's hook, under which it would be compiled anew
from torch import nn
from torch.nn.utils import prune

from torchgraft.compression.nupes import (
    PowerActivation,
    PowerConv,
    PowerLinear,
    PowerQuantConfig,
    batchnorm_ranges,
    dequantize_model,
    fold_batchnorm,
    power_dequantize,
    power_quantize,
    prepare_model,
    quantize_model,
    reconstruct_block,
    search_exponent,
    summary,
    unpack_codes,
)
from torchgraft.compression.nupes.search import rows_and_scales


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def llama():
    torch.manual_seed(0)
    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, tie_word_embeddings=True)).eval()


TOKENS = dict(input_ids=torch.arange(14).reshape(2, 7))


def same_logits(a, b):
    with torch.no_grad():
        return torch.equal(a(**TOKENS).logits, b(**TOKENS).logits)


# layers that are not what they seem


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    "wrap",
    [
        nn.utils.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        lambda linear: prune.l1_unstructured(linear, "weight", 0.5),
    ],
    ids=["weight norm", "parametrization", "pruning mask"],
)
def test_computed_weights_are_left_alone(wrap):
    net = nn.Sequential(wrap(nn.Linear(8, 8)), nn.Linear(8, 8)).eval()
    quantize_model(net, PowerQuantConfig(weight_bits=8))
    assert [row.name for row in summary(net)] == ["1"]
    assert net(draw(2, 8)).isfinite().all()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_empty_layers_are_left_alone():
    net = quantize_model(nn.Sequential(nn.Linear(8, 0), nn.Linear(0, 8), nn.Linear(8, 4)), PowerQuantConfig())
    assert [row.name for row in summary(net)] == ["2"]
    assert net(draw(2, 8)).shape == (2, 4)


class InPlace(nn.Module):
    """A block that writes into its input."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        x += self.linear(x.clone())
        return x


def test_blocks_that_work_in_place():
    torch.manual_seed(0)
    net, x = nn.Sequential(InPlace(), InPlace()), draw(32, 16)
    before = x.clone()
    config = PowerQuantConfig(weight_bits=3, method="nupes", steps=10, batch_size=16)
    quantized = quantize_model(copy.deepcopy(net), config, x)
    assert torch.equal(x, before), "the caller's calibration data were written into"
    with torch.no_grad():
        pairs = [(net[0](part.clone()), quantized[0](part.clone())) for part in before.split(16)]
    end = torch.stack([(a - b).square().sum(-1).mean() for a, b in pairs]).mean()
    assert quantized.power_quant_history["0"].end == pytest.approx(float(end), rel=1e-4)


class Wrapped(nn.Module):
    """A language model inside a module that has no configuration of its own."""

    def __init__(self):
        super().__init__()
        self.lm = llama()

    def forward(self, ids):
        return self.lm(input_ids=ids).logits


def test_a_wrapped_language_model_is_learned_without_its_cache():
    config = PowerQuantConfig(weight_bits=3, method="nupes", steps=3)
    net, bare = Wrapped(), llama()
    quantize_model(net, config, [TOKENS["input_ids"]])
    quantize_model(bare, config, [TOKENS])
    for name, entry in bare.power_quant_history.items():
        assert net.power_quant_history[f"lm.{name}"].end == pytest.approx(entry.end, rel=1e-4)
    assert net.lm.config.use_cache, "settings come back"


def test_a_frozen_configuration_of_another_library():
    class Frozen(nn.Module):
        config = types.MappingProxyType({"sample_size": 8})

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def save_pretrained(self, folder):
            raise NotImplementedError

    assert len(summary(quantize_model(Frozen(), PowerQuantConfig()))) == 1


def test_calling_conventions_stay():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(input=x)

    x = draw(8, 4)
    assert quantize_model(Keyword(), PowerQuantConfig(act_bits=8), x)(x).shape == (8, 4)


def test_the_fast_path_of_torchs_encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    net, x = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval(), draw(2, 5, 16)
    with pytest.raises(ValueError, match="fast path"):
        quantize_model(net, PowerQuantConfig(act_bits=4), [x])
    quantize_model(net, PowerQuantConfig(weight_bits=3))
    with torch.no_grad():
        fast = net(x)
    torch.testing.assert_close(fast, net(x.clone().requires_grad_()), rtol=1e-4, atol=1e-4)


# dtypes, modes, shapes


@pytest.mark.parametrize("a", [0.7, 0.5])
def test_autocast_gives_the_dtype_of_a_float_layer(a):
    linear = nn.Linear(32, 8)
    layer = PowerLinear.from_float(linear, PowerQuantConfig(exponent=a))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for x in (draw(2, 32), draw(2, 32, dtype=torch.bfloat16)):
            assert layer(x).dtype == linear(x).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_rows_one_row_and_many(bits, dtype):
    layer = PowerLinear.from_float(nn.Linear(32, 8).to(dtype), PowerQuantConfig(weight_bits=bits, exponent=0.5))
    with torch.no_grad():
        for shape in ((0, 32), (2, 0, 32), (32,)):
            assert layer(torch.zeros(shape, dtype=dtype)).shape == (*shape[:-1], 8)
        x = draw(100, 32, dtype=dtype)
        error = 0.05 if dtype in (torch.bfloat16, torch.float16) else 1e-5
        torch.testing.assert_close(layer(x), torch.cat([layer(part) for part in x.split(10)]), rtol=error, atol=error)


def test_the_integer_path_with_no_rows_and_with_gradients():
    config = PowerQuantConfig(exponent=0.5, act_bits=4, integer_only=True)
    net, x = quantize_model(nn.Sequential(nn.Linear(32, 8)), config, draw(4, 32)), draw(4, 32)
    assert net(torch.zeros(0, 32)).shape == (0, 8)
    leaf = x.clone().requires_grad_()
    y = net(leaf)
    torch.testing.assert_close(y, net(x), rtol=1e-5, atol=1e-5)
    y.sum().backward()
    torch.testing.assert_close(leaf.grad[0].sign(), net[0].dequantized_weight().sum(0).sign())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["nupes", "adaround"])
def test_learning_in_half_precision(dtype, method):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(24, 24), nn.ReLU()).to(dtype), (draw(64, 3) @ draw(3, 24, seed=1)).to(dtype)
    exponent = "learn" if method == "nupes" else 1.0
    config = PowerQuantConfig(weight_bits=3, method=method, exponent=exponent, steps=30, lr_codes=0.1)
    learned = quantize_model(copy.deepcopy(net), config, x)
    plain = quantize_model(copy.deepcopy(net), PowerQuantConfig(weight_bits=3))
    assert learned[0].scale.dtype == dtype
    wanted = net(x).float()
    assert (learned(x).float() - wanted).square().mean() < (plain(x).float() - wanted).square().mean()


def test_casts_keep_the_grid_of_inputs():
    activation, x = PowerActivation(0.7, 8, 1.2345), draw(100)
    expected = activation(x)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(activation.to(dtype)(x), expected)
    assert float(PowerActivation(0.7, 8, 1e5).half().scale) == 1e5, "beyond the range of float16"


def test_unsigned_inputs_on_the_grid():
    activation = PowerActivation(0.5, 4, 2.0, signed=False)
    x = torch.tensor([-1.0, 0.0, 0.5, 2.0, 3.0], requires_grad=True)
    y = activation(x)
    expected = [0, 0, 2 * (round(15 * math.sqrt(0.25)) / 15) ** 2, 2, 2]
    torch.testing.assert_close(y.detach(), torch.tensor(expected))
    y.sum().backward()
    assert x.grad[0] == x.grad[4] == 0
    assert bool((x.grad[1:4] > 0).all())


def test_inference_mode_and_no_grad():
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    with torch.inference_mode():
        quantize_model(net, PowerQuantConfig(method="nupes", exponent="learn", steps=3), torch.randn(8, 8))
    x = draw(2, 8).requires_grad_()
    net(x).sum().backward()
    assert x.grad is not None


def test_reconstruction_leaves_training_mode_and_statistics():
    torch.manual_seed(0)
    floats = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5), nn.BatchNorm1d(16)).train()
    quantized, x = quantize_model(copy.deepcopy(floats), PowerQuantConfig(weight_bits=3)), draw(64, 16)
    mean = quantized[2].running_mean.clone()
    with torch.no_grad():
        result = reconstruct_block(floats, quantized, list(x.split(32)), steps=10, lr_codes=0.05)
        assert quantized.training
        assert floats.training
        assert torch.equal(quantized[2].running_mean, mean)
        floats.eval(), quantized.eval()
        got = torch.stack([(quantized(b) - floats(b)).square().sum(-1).mean() for b in x.split(32)]).mean()
    assert result.end == pytest.approx(float(got), rel=1e-4)
    assert result.end < result.start


def test_a_group_wider_than_the_layer_is_a_channel():
    linear = nn.Linear(16, 4).to(torch.bfloat16)
    wide = PowerLinear.from_float(linear, PowerQuantConfig(exponent=0.5, group_size=10**9))
    plain = PowerLinear.from_float(linear, PowerQuantConfig(exponent=0.5))
    assert torch.equal(wide.dequantized_weight(), plain.dequantized_weight())
    assert wide._int8_weight() is not None
    assert rows_and_scales(draw(4, 9), 4096)[0].shape == (4, 1, 9), "no padding to the group"


def test_damaged_codes_show():
    layer = PowerLinear.from_float(nn.Linear(16, 4), PowerQuantConfig(exponent=0.7))
    state = layer.state_dict()
    state["codes"][:] = 255
    layer.load_state_dict(state)
    with torch.no_grad():
        assert layer(draw(2, 16)).isnan().all()


# transformers


def test_a_model_taken_back_is_saved_as_a_float_model(tmp_path):
    model = dequantize_model(quantize_model(llama(), PowerQuantConfig()))
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert same_logits(transformers.LlamaForCausalLM.from_pretrained(tmp_path), model)


def test_a_prepared_model_can_be_saved(tmp_path):
    model = quantize_model(llama(), PowerQuantConfig(granularity="channel", group_size=12, weight_bits=5))
    prepared = prepare_model(llama(), model.power_quant_config)
    prepared.load_state_dict(model.state_dict())
    prepared.save_pretrained(tmp_path)
    assert same_logits(transformers.LlamaForCausalLM.from_pretrained(tmp_path), model)


def test_bfloat16_a_device_map_and_settings_as_a_dictionary(tmp_path):
    llama().save_pretrained(tmp_path / "float")
    settings = dict(quant_method="power", weight_bits=3)
    model = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "float", quantization_config=settings, dtype=torch.bfloat16, device_map="cpu"
    )
    assert summary(model)[0].bits == 3
    assert model.model.layers[0].mlp.up_proj.scale.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "codes")
    assert same_logits(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "codes", dtype="auto"), model)
    assert model.generate(**TOKENS, max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (2, 9)


# BatchNorm


def test_batchnorm_that_cannot_be_folded_stays():
    x, features = draw(2, 3, 8, 8), draw(2, 6, 5)
    batch = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    # over (N, L, F) it normalises L, not the features of the linear layer
    middle = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)).eval()
    middle[1].running_mean.normal_()
    for net, given in ((batch, x), (middle, features)):
        expected = net(given)
        torch.testing.assert_close(fold_batchnorm(net)(given), expected)


def test_a_layer_in_two_places_takes_the_wider_range():
    class Twice(nn.Module):
        def __init__(self, first):
            super().__init__()
            self.conv, self.a, self.b = nn.Conv2d(4, 4, 1), first, nn.BatchNorm2d(4)

        def forward(self, x):
            return self.conv(self.b(self.conv(self.a(x))))

    wide = nn.BatchNorm2d(4)
    wide.weight.data.fill_(9.0)
    assert batchnorm_ranges(Twice(wide).eval(), k=6)["conv"][0] == pytest.approx(54)
    assert batchnorm_ranges(Twice(nn.Sigmoid()).eval()) == {}, "unknown in one place is unknown"


# settings and errors


def test_ties_of_the_search_take_the_uniform_grid():
    assert search_exponent([torch.zeros(4, 8)], 4) == 1.0
    assert search_exponent([torch.sign(draw(4, 8))], 4) == 1.0


def test_numbers_of_numpy_are_exponents(without_shape_checks):
    layer = PowerLinear.from_float(nn.Linear(8, 8), PowerQuantConfig(exponent=np.float32(0.61)))
    assert float(layer.exponent) == pytest.approx(0.61)
    by_channel = PowerQuantConfig(granularity="channel")
    assert PowerLinear.from_float(nn.Linear(8, 8), by_channel, torch.linspace(0.5, 1, 8)).exponent.shape == (8,)


def linears():
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(2)))


def quantized_once():
    return quantize_model(linears(), PowerQuantConfig(skip_modules=("1",)))


def half_trained():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    net[1].train()
    return net


def ranges(largest):
    return quantize_model(linears(), PowerQuantConfig(act_bits=8), input_range={"0": (largest, True), "1": (1.0, True)})


def reconstruct_from(floats, inputs=None):
    quantized = quantize_model(nn.Sequential(nn.Sequential(nn.Linear(16, 8))), PowerQuantConfig())
    return reconstruct_block(floats, quantized, draw(8, 16) if inputs is None else inputs, steps=2)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: PowerQuantConfig(group_size=64.0), ValueError, "group_size"),
        (lambda: PowerQuantConfig(exponent=None), TypeError, "exponent must be a number"),
        (lambda: PowerQuantConfig(exponent=True), TypeError, "exponent must be a number"),
        (lambda: PowerQuantConfig(exponent=torch.tensor([0.5, 0.6])), TypeError, "exponent must be one number"),
        (lambda: PowerQuantConfig(p=0.0), ValueError, "p must be"),
        (lambda: PowerQuantConfig(steps=2.5), ValueError, "steps"),
        (lambda: PowerQuantConfig(batch_size=0), ValueError, "batch_size"),
        (lambda: PowerQuantConfig(lr_codes=-1.0), ValueError, "lr_codes"),
        (lambda: PowerQuantConfig(lr_exponent=math.nan), ValueError, "lr_exponent"),
        (lambda: PowerQuantConfig(quantized={"0": 9}), ValueError, "quantized"),
        (lambda: power_quantize(draw(2, 3), 0.5, 4, channel_dim=5), ValueError, "channel_dim"),
        (lambda: power_quantize(draw(2, 3), "0.5", 4), TypeError, "a must be a number"),
        (lambda: power_dequantize(torch.ones(1, dtype=torch.int8), 0.5, 4, -1.0), ValueError, "scale must be"),
        (lambda: unpack_codes(torch.zeros(1, 9, dtype=torch.uint8), 9, 8), ValueError, "from 2 to 8"),
        (lambda: search_exponent(draw(4, 3, 5), 4), TypeError, "give a list"),
        (lambda: search_exponent([torch.zeros(0, 4)], 4), ValueError, "not empty"),
        (lambda: search_exponent([draw(4, 3)], 4, candidates=()), ValueError, "candidates"),
        (lambda: search_exponent([draw(4, 3)], 4, candidates=(-1.0,)), ValueError, "candidates"),
        (lambda: batchnorm_ranges(half_trained(), k=-1), ValueError, "k must be"),
        (lambda: fold_batchnorm(half_trained()), ValueError, "'1' is in training mode"),
        (lambda: quantize_model(nn.Linear(4, 4), PowerQuantConfig()), ValueError, "PowerLinear.from_float"),
        (lambda: quantize_model(linears(), PowerQuantConfig(skip_modules=("0", "1"))), ValueError, "skip_modules="),
        (lambda: quantize_model(quantized_once(), PowerQuantConfig()), ValueError, "already"),
        (lambda: quantize_model(linears().to("meta"), PowerQuantConfig()), ValueError, "'0' is on the meta device"),
        (lambda: quantize_model(linears(), PowerQuantConfig(act_bits=8), dict(x=draw(2, 8))), TypeError, r"\[batch\]"),
        (lambda: quantize_model(linears(), PowerQuantConfig(act_bits=8), [draw(2, 8).numpy()]), TypeError, "ndarray"),
        (lambda: quantize_model(linears(), PowerQuantConfig(act_bits=8), 5), TypeError, "calibration must be"),
        (lambda: quantize_model(linears(), PowerQuantConfig(act_bits=8), draw(0, 8)), ValueError, "empty"),
        (lambda: ranges(math.nan), ValueError, r"input_range\['0'\]"),
        (lambda: ranges(-1.0), ValueError, r"input_range\['0'\]"),
        (
            lambda: quantize_model(
                nn.Sequential(nn.Conv2d(3, 3, 3)), PowerQuantConfig(exponent=0.5, integer_only=True, act_bits=8),
                draw(2, 3, 8, 8),
            ),
            ValueError, "layer '0'",
        ),
        (
            lambda: PowerConv.from_float(nn.Conv2d(3, 8, 3), PowerQuantConfig(), torch.full((8,), 0.5)),
            ValueError, "granularity='channel'",
        ),
        (lambda: reconstruct_from(nn.Sequential(nn.Linear(16, 8))), ValueError, "block_fp must hold"),
        (lambda: reconstruct_from(nn.Sequential(nn.Sequential(nn.Linear(16, 16)))), ValueError, "block_fp must hold"),
        (
            lambda: reconstruct_from(nn.Sequential(nn.Sequential(nn.Linear(16, 8))), draw(0, 16)),
            ValueError, "none may be empty",
        ),
    ],
)  # fmt: skip
def test_wrong_inputs(call, error, words, without_shape_checks):
    with pytest.raises(error, match=words):
        call()


def test_a_skipped_name_that_is_not_there_is_said():
    with pytest.warns(UserWarning, match="skip_modules names \\['haed'\\]"):
        quantize_model(linears(), PowerQuantConfig(skip_modules=("haed", "lm_head")))


def test_an_interruption_leaves_no_trace():
    net = linears()
    before = list(net)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_model(net, PowerQuantConfig(method="nupes", steps=2), draw(4, 8), progress=stop)
    assert list(net) == before
    assert not hasattr(net, "power_quant_config")

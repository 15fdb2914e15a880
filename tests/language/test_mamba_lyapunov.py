"""Lyapunov exponents, growth, divergence in low precision and adapters of Mamba."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.language.mamba_lyapunov import (
    LayerExponents,
    LyapunovReport,
    Task,
    Tuning,
    assert_stable,
    finetune_stability,
    icl_gain,
    lora_targets,
    lyapunov_spectrum,
    mamba_lora_config,
    perturbation_growth,
    precision_divergence,
    silent_adapters,
    step_sizes,
    tangent_exponents,
)
from torchgraft.language.set_based_prompting import toy_model

MAMBA = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 50, "state_size": 4, "pad_token_id": 0,
         "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "mamba": MAMBA,
    "mamba2": MAMBA | {"num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "falcon_mamba": MAMBA,
    "jamba": {
        "hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 50, "mamba_d_state": 4, "num_attention_heads": 2,
        "num_key_value_heads": 2, "intermediate_size": 16, "attn_layer_period": 2, "attn_layer_offset": 1,
        "num_experts": 1, "use_mamba_kernels": False, "pad_token_id": 0,
    },
    "bamba": {
        "hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 50, "mamba_d_state": 4, "mamba_n_heads": 4,
        "mamba_d_head": 8, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 16,
        "attn_layer_indices": [1], "mamba_chunk_size": 8,
    },
}  # fmt: skip


def model_of(kind: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **KINDS[kind])).eval()


def ids(rows: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(1, 50, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_exponents_are_negative_for_every_family(kind: str) -> None:
    model = model_of(kind)
    model.train()
    report = lyapunov_spectrum(model, ids())
    assert model.training
    assert report.max < 0
    assert_stable(report)
    assert len(report.layers) == (1 if kind in ("jamba", "bamba") else 2)
    for layer in report.layers:
        assert layer.time_series.shape == (12,)
        assert (layer.decay_times > 0).all()
        assert layer.time_series[-1].item() >= layer.max - 1e-6
    assert not any(m._forward_hooks for m in model.modules())


def explicit(delta: Tensor, a: Tensor) -> Tensor:
    """The exponent of the product of one-step Jacobians, written out in float64."""
    product = torch.eye(a.numel()).double()
    for step in delta:
        product = torch.diag((step[:, None] * a).double().exp().flatten()) @ product
    return torch.linalg.matrix_norm(product, 2).log() / len(delta)


def test_mamba_is_what_its_jacobians_say() -> None:
    model, given = model_of("mamba"), ids(1)
    with torch.no_grad():
        for block in model.backbone.layers:
            # exponents far enough apart for tangents to tell them
            block.mixer.dt_proj.bias.add_(4 + torch.linspace(0, 1, 32))
    report = lyapunov_spectrum(model, given)
    with step_sizes(model) as found, torch.no_grad():
        model(given)
    for layer in report.layers:
        mixer = model.get_submodule(layer.name)
        a = -mixer.A_log.detach().exp()
        expected = explicit(found[layer.name][0], a)
        assert layer.max == pytest.approx(expected.item(), abs=1e-6)
        # the recurrence by itself, its tangents followed by QR
        decay = (found[layer.name][0, :, :, None] * a).double().exp().flatten(1)
        # the same twelve steps again and again, until tangents have turned into the slowest directions
        inputs = decay.repeat(150, 1)[:, None]
        start = torch.zeros(1, a.numel()).double()
        top = tangent_exponents(lambda s, x: s * x, start, inputs, k=3, burn_in=1200).exponents
        spectrum = layer.per_channel.flatten().sort(descending=True).values.double()
        torch.testing.assert_close(top, spectrum[:3], rtol=0, atol=1e-4)


def test_step_sizes_are_those_the_mixer_uses() -> None:
    """A mixer whose scan is made again from these step sizes gives its own output."""
    model, given = model_of("mamba"), ids(1)
    mixer = model.backbone.layers[0].mixer
    seen: dict[str, Tensor] = {}
    handles = [
        mixer.register_forward_hook(lambda m, a, out: seen.update(out=out)),
        mixer.x_proj.register_forward_hook(lambda m, a, out: seen.update(u=a[0], projected=out)),
        mixer.in_proj.register_forward_hook(lambda m, a, out: seen.update(gate=out[..., 32:])),
    ]
    with step_sizes(model) as found, torch.no_grad():
        model(given)
    for handle in handles:
        handle.remove()
    delta = found["backbone.layers.0.mixer"]
    a = -mixer.A_log.exp()
    _, b, c = seen["projected"].split([mixer.time_step_rank, 4, 4], -1)
    state, outputs = torch.zeros(32, 4), []
    for t in range(12):
        state = (delta[0, t, :, None] * a).exp() * state + delta[0, t, :, None] * b[0, t] * seen["u"][0, t, :, None]
        outputs.append(state @ c[0, t] + mixer.D * seen["u"][0, t])
    expected = mixer.out_proj(torch.stack(outputs) * F.silu(seen["gate"][0]))
    torch.testing.assert_close(seen["out"][0], expected, rtol=1e-4, atol=1e-6)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10_000), st.floats(0.1, 3.0))
def test_deviations_of_the_state_never_grow(seed: int, scale: float) -> None:
    model = model_of("mamba", seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn_like(p))
    report = lyapunov_spectrum(model, ids(1, 8, seed))
    assert report.max <= 0
    growth = perturbation_growth(model, ids(1, 8, seed), at=2, where="state")
    assert (growth.deviation[:, 2] == 1).all()
    assert (growth.deviation[:, 2:].diff(dim=1) <= 0).all()
    assert (growth.deviation[:, :2] == 0).all()


def test_constant_steps_give_the_exponent_in_closed_form() -> None:
    model = model_of("mamba")
    mixers = [layer.mixer for layer in model.backbone.layers]
    with torch.no_grad():
        for mixer in mixers:
            mixer.dt_proj.weight.zero_()
            mixer.dt_proj.bias.fill_(math.log(math.expm1(0.25)))
    report = lyapunov_spectrum(model, ids())
    for layer, mixer in zip(report.layers, mixers, strict=True):
        torch.testing.assert_close(layer.per_channel, -0.25 * mixer.A_log.detach().exp(), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        mixers[0].A_log.fill_(12.0)
    assert math.isfinite(lyapunov_spectrum(model, ids()).layers[0].max)


def test_padding_and_burn_in_are_left_out() -> None:
    model = model_of("mamba")
    alone = lyapunov_spectrum(model, ids(1, 8))
    padded = F.pad(ids(1, 8), (0, 4))
    mask = (torch.arange(12) < 8).long()[None]
    found = lyapunov_spectrum(model, padded, attention_mask=mask)
    torch.testing.assert_close(found.per_layer, alone.per_layer)
    with step_sizes(model) as steps, torch.no_grad():
        model(ids(1, 8))
    late = steps["backbone.layers.0.mixer"][0, 5:].mean(0)
    a = -model.backbone.layers[0].mixer.A_log.detach().exp()
    expected = (late[:, None] * a).max().item()
    assert lyapunov_spectrum(model, ids(1, 8), burn_in=5).layers[0].max == pytest.approx(expected, rel=1e-5)


def test_linear_recurrence_has_its_spectral_radius() -> None:
    draw = torch.Generator().manual_seed(0)
    w = torch.randn(6, 6, generator=draw).double() / 3
    found = tangent_exponents(
        lambda s, x: s @ w.T + x, torch.zeros(2, 6).double(), torch.zeros(4000, 2, 6).double(), k=6, burn_in=100
    )
    moduli = torch.linalg.eigvals(w).abs().log().sort(descending=True).values
    torch.testing.assert_close(found.exponents, moduli, rtol=0, atol=5e-3)


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_tangents_of_torch_modules(kind: str) -> None:
    torch.manual_seed(0)
    net = getattr(nn, kind)(3, 5, num_layers=2, batch_first=True).double()
    x = torch.randn(1, 6, 3).double()
    report = lyapunov_spectrum(net, inputs_embeds=x, method="tangent", k=3)
    parts = 2 if kind == "LSTM" else 1

    def whole(flat: Tensor) -> Tensor:
        state = flat.view(1, parts, 2, 5).permute(1, 2, 0, 3).contiguous()
        _, after = net(x, tuple(state) if parts == 2 else state[0])
        return (torch.stack(after) if parts == 2 else after[None]).permute(2, 0, 1, 3).reshape(-1)

    jacobian = torch.autograd.functional.jacobian(whole, torch.zeros(1, 10 * parts).double())[:, 0]
    assert isinstance(jacobian, Tensor)
    # the product's volume growth in k dimensions bounds the sum of exponents, and equals it for all of them
    size = 10 * parts
    every = lyapunov_spectrum(net, inputs_embeds=x, method="tangent", k=size).layers[0].per_channel.sum() * 6
    torch.testing.assert_close(every, torch.linalg.slogdet(jacobian).logabsdet, rtol=1e-6, atol=1e-6)
    assert report.layers[0].per_channel.shape == (1, 3)


def test_an_rnn_of_large_weights_is_chaotic_and_a_small_one_is_not() -> None:
    torch.manual_seed(0)
    net = nn.RNN(1, 64, batch_first=True)
    with torch.no_grad():
        for gain, chaotic in ((2.0, True), (0.5, False)):
            net.weight_hh_l0.copy_(gain * torch.randn(64, 64) / 8)
            report = lyapunov_spectrum(net, inputs_embeds=0.01 * torch.randn(1, 300, 1), method="tangent", burn_in=100)
            assert (report.max > 0) == chaotic
            if chaotic:
                with pytest.raises(ValueError, match="deviations double every"):
                    assert_stable(report)


class Doubling(nn.Module):
    """A recurrence by the library's convention."""

    def initial_state(self, batch: int, device: Any = None, dtype: Any = None) -> tuple[Tensor, ...]:
        return torch.zeros(batch, 2, dtype=dtype), torch.zeros(batch, 3, dtype=dtype)

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        a, b = state
        return x, (2 * a + x[:, :2], 0.5 * b)


def test_modules_with_a_step() -> None:
    report = lyapunov_spectrum(
        Doubling(), inputs_embeds=torch.randn(2, 80, 2).double(), method="tangent", k=5, burn_in=40
    )
    expected = torch.tensor([[2, 2, 0.5, 0.5, 0.5]]).double().log()
    torch.testing.assert_close(report.layers[0].per_channel, expected)


def test_rounding_stays_within_the_geometric_sum() -> None:
    draw = np.random.default_rng(0)
    decay = torch.tensor(draw.uniform(0.2, 0.95, (400, 16)))
    b = torch.tensor(draw.normal(size=(400, 16)))
    exact = rounded = torch.zeros(16).double()
    worst = 0.0
    for d, x in zip(decay, b, strict=True):
        exact = d * exact + x
        before = d * rounded + x
        rounded = before.bfloat16().double()
        worst = max(worst, (rounded - before).abs().max().item())
        assert (rounded - exact).abs().max() <= worst / (1 - decay.max()) + 1e-12


@pytest.mark.parametrize("kind", ["mamba", "gpt2"])
def test_growth_of_an_input_change(kind: str) -> None:
    small = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    model = (
        model_of("mamba") if kind == "mamba" else transformers.GPT2LMHeadModel(transformers.GPT2Config(**small)).eval()
    )
    growth = perturbation_growth(model, ids(), 1e-3, at=4)
    assert growth.deviation.shape == (3, 12)
    assert growth.deviation[:, :4].max() == 0
    assert growth.deviation[0, 4].item() == pytest.approx(1, abs=1e-3)
    assert growth.after.shape == (8,)
    assert growth.after.min() > 0
    # a derivative: half of the change gives half of the deviation
    smaller = perturbation_growth(model, ids(), 5e-4, at=4)
    torch.testing.assert_close(smaller.deviation, growth.deviation, rtol=0.05, atol=1e-3)


def test_divergence_of_precisions() -> None:
    model = model_of("mamba")
    found = precision_divergence(model, [ids(), ids(seed=1)], ("fp32", "bf16", "fp16"))
    assert found["fp32"].kl.abs().max() == 0
    assert found["fp32"].max_abs.max() == 0
    assert (found["fp32"].top1 == 1).all()
    assert found["bf16"].kl.shape == (12,)
    assert found["bf16"].kl.mean() > found["fp16"].kl.mean() > 0
    whole = precision_divergence(model, [torch.cat([ids(), ids(seed=1)])], ("bf16",))["bf16"]
    torch.testing.assert_close(whole.kl, found["bf16"].kl, rtol=0.05, atol=1e-7)


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba", "jamba"])
def test_adapters_reach_what_they_name(kind: str) -> None:
    peft = pytest.importorskip("peft")
    model = model_of(kind)
    names = lora_targets(model, "all")
    assert any("embed" in name for name in names)
    config = mamba_lora_config(model, "buffers", r=2, dropout=0.0)
    assert not any("embed" in name or "dt_proj" in name or "conv" in name for name in config.target_modules)
    wrapped = peft.get_peft_model(model, config).train()
    assert all("lora" in name for name, p in wrapped.named_parameters() if p.requires_grad)
    given = ids()
    wrapped(input_ids=given, labels=given, use_cache=False).loss.backward()
    assert silent_adapters(wrapped) == []
    only = lora_targets(model_of(kind), "ssm")
    assert all(name.endswith("in_proj" if kind == "mamba2" else "x_proj") for name in only)


def test_an_adapter_on_dt_proj_is_silent() -> None:
    peft = pytest.importorskip("peft")
    model = model_of("mamba")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["dt_proj", "x_proj"], r=2)).train()
    given = ids()
    wrapped(input_ids=given, labels=given, use_cache=False).loss.backward()
    found = silent_adapters(wrapped)
    assert len(found) == 2
    assert all("dt_proj" in name for name in found)


def test_parts_of_a_packed_projection_share_their_rows() -> None:
    peft = pytest.importorskip("peft")
    model = model_of("mamba")
    wrapped = peft.get_peft_model(model, mamba_lora_config(model, "ssm", r=2, dropout=0.0)).train()
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], 0.1)
    given = ids()
    for _ in range(2):
        wrapped(input_ids=given, labels=given, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    layer = wrapped.base_model.model.backbone.layers[0].mixer.x_proj
    update = layer.get_delta_weight("default")
    assert torch.linalg.matrix_rank(update) <= 2
    parts = update.split([wrapped.base_model.model.backbone.layers[0].mixer.time_step_rank, 4, 4])
    assert all(part.abs().max() > 0 for part in parts)
    shared = torch.linalg.svd(layer.lora_A["default"].weight.detach(), full_matrices=False).Vh
    for part in parts:
        torch.testing.assert_close(part @ shared.T @ shared, part, rtol=1e-4, atol=1e-8)
    wrapped.eval()
    before = wrapped(input_ids=given).logits
    torch.testing.assert_close(wrapped.merge_and_unload()(input_ids=given).logits, before, rtol=1e-5, atol=1e-5)


def test_fine_tuning_compared() -> None:
    pytest.importorskip("peft")
    ways = {
        "fp32": Tuning(), "again": Tuning(), "bf16": Tuning("bf16"),
        "lora": Tuning("bf16", lambda m: mamba_lora_config(m, dropout=0.0)),
    }  # fmt: skip
    found = finetune_stability(lambda: model_of("mamba"), [ids(seed=k) for k in range(3)], ids(seed=9), ways, "fp32")
    assert found["fp32"].kl == 0
    assert found["again"].loss == found["fp32"].loss
    assert found["again"].kl == 0
    assert found["bf16"].loss_difference > 0
    assert found["lora"].kl > 0
    with pytest.raises(ValueError, match="reference must be one of"):
        finetune_stability(lambda: model_of("mamba"), [ids()], ids(), ways, "fp64")


def test_gain_of_examples() -> None:
    model, tokenizer = toy_model()
    task = Task([(f"q{k}", ["yes", "no"], k % 2) for k in range(6)], "{question}: {answer}\n")
    found = icl_gain(model, tokenizer, {"t": task}, (1, 2))
    assert set(found["t"]) == {0, 1, 2}
    assert 0 < found["t"][0] <= 1
    with pytest.raises(ValueError, match="too few for 6 shots"):
        icl_gain(model, tokenizer, {"t": task}, (6,))
    with pytest.raises(ValueError, match="at least 1"):
        icl_gain(model, tokenizer, {"t": task}, (0,))


def test_wrong_input_is_refused(without_shape_checks: None) -> None:
    model = model_of("mamba")
    gpt = toy_model()[0]
    with pytest.raises(TypeError, match="has none; use method='tangent'"):
        lyapunov_spectrum(gpt, ids())
    with pytest.raises(TypeError, match="is not a recurrence"):
        lyapunov_spectrum(gpt, inputs_embeds=torch.zeros(1, 4, 32), method="tangent")
    with pytest.raises(TypeError, match="bidirectional"):
        lyapunov_spectrum(nn.GRU(2, 2, bidirectional=True), inputs_embeds=torch.zeros(1, 4, 2), method="tangent")
    with pytest.raises(ValueError, match="either input_ids or"):
        lyapunov_spectrum(model)
    with pytest.raises(ValueError, match="at least two tokens"):
        lyapunov_spectrum(model, ids(1, 1))
    with pytest.raises(ValueError, match="at least two tokens"):
        lyapunov_spectrum(model, ids(1, 8), burn_in=7)
    with pytest.raises(ValueError, match="fewer than two tokens that count"):
        lyapunov_spectrum(model, ids(1, 8), attention_mask=(torch.arange(8) < 1).long()[None])
    with pytest.raises(ValueError, match="method must be"):
        lyapunov_spectrum(model, ids(), method="guess")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs inputs_embeds"):
        lyapunov_spectrum(model, ids(), method="tangent")
    with pytest.raises(ValueError, match="k must be 1 to 5"):
        tangent_exponents(lambda s, x: s, torch.zeros(1, 5), torch.zeros(3, 1, 5), k=6)
    with pytest.raises(ValueError, match="no steps are left"):
        tangent_exponents(lambda s, x: s, torch.zeros(1, 5), torch.zeros(3, 1, 5), burn_in=3)
    with pytest.raises(ValueError, match="one of 12 tokens, got 12"):
        perturbation_growth(model, ids(), at=12)
    with pytest.raises(ValueError, match="eps must be positive"):
        perturbation_growth(model, ids(), eps=0)
    with pytest.raises(ValueError, match="where must be"):
        perturbation_growth(model, ids(), where="weights")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dtype must be one of"):
        precision_divergence(model, [ids()], ("int8",))
    with pytest.raises(ValueError, match="batches must not be empty"):
        precision_divergence(model, [])
    with pytest.raises(ValueError, match="one length, got 12 and 10"):
        precision_divergence(model, [ids(), ids(2, 10)])
    with pytest.raises(ValueError, match="targets must be one of"):
        mamba_lora_config(model, "most")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="has none"):
        mamba_lora_config(gpt)
    with pytest.raises(ValueError, match="no LoRA adapter"):
        silent_adapters(model)
    with pytest.raises(ValueError, match=r"exponent of 0\.5"):
        assert_stable(LyapunovReport((LayerExponents("x", torch.tensor([[0.5]]), torch.zeros(2)),), "tangent"))
    with torch.no_grad():
        model.backbone.layers[0].mixer.D[0] = math.nan
    with pytest.raises(ValueError, match=r"layers\.0\.mixer\.D' has values that are not finite"):
        lyapunov_spectrum(model, ids())

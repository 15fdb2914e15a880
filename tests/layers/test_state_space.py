"""Every family behind one interface, against its definition, its official code, and transformers."""

import json
import math
import zlib
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchgraft.layers.state_space import (
    DSS,
    EMA,
    FAMILIES,
    GSS,
    H3,
    HGRN,
    LRU,
    RGLRU,
    RWKV,
    S4,
    S4D,
    S4ND,
    S5,
    TNN,
    Bidirectional,
    Block,
    Hyena,
    LiquidS4,
    LongConv,
    LowerBounds,
    Mamba,
    Mamba2,
    Mega,
    MixtureOfExperts,
    ReverseComplement,
    Scan2d,
    SGConv,
    Stack,
    build_ssm,
    ssm_optim_groups,
)
from torchgraft.ops.kernels import diagonal_kernel_naive
from torchgraft.ops.linear_recurrence import linear_recurrence_naive

F64 = torch.float64
SETTINGS = {
    "s4": {"l_kernel": 32},
    "spade": {"heads": 2, "window": 5, "l_kernel": 32},
    "window_attention": {"heads": 2, "window": 5},
    "tnn": {"rpe_width": 8},
    "mamba2": {"head_dim": 4},
    **{name: {"heads": 2} for name in ("rg_lru", "retnet", "gateloop", "attention")},
}
VARIANTS = {
    **{name: (name, SETTINGS.get(name, {})) for name in FAMILIES},
    "s4 legt": ("s4", {"l_kernel": 16, "init": "legt"}),
    "s4d bilinear": ("s4d", {"discretization": "bilinear", "init": "legs", "trainable_b": True, "bandlimit": 0.9}),
    "dss softmax": ("dss", {"normalize": "softmax", "l_max": 64}),
    "s5 blocks": ("s5", {"blocks": 2, "discretization": "bilinear"}),
    "liquid_s4 kb": ("liquid_s4", {"degree": 3, "mode": "kb"}),
    "h3 heads": ("h3", {"head_dim": 4}),
    "hyena 3": ("hyena", {"order": 3}),
    "mega chunks": ("mega", {"chunk_size": 6}),
    "mega laplace": ("mega", {"attention": "laplace"}),
    "long_conv 2": ("long_conv", {"channels": 2}),
    "mamba2 groups": ("mamba2", {"head_dim": 4, "groups": 2}),
    "hgrn bound": ("hgrn", {"lower_bound": 0.5}),
}
every_family = pytest.mark.parametrize("variant", VARIANTS)
LTI = ["s4", "s4 legt", "s4d", "s4d bilinear", "dss", "dss softmax"]


def make(variant, dtype=F64):
    torch.manual_seed(0)
    name, settings = VARIANTS[variant]
    family = FAMILIES[name]
    states = 4 if family.state_argument else None
    length = {"l_max": 64} if family.needs_length else {}
    return build_ssm(name, 8, states, **length, **settings).to(dtype).eval()


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(3, 23, 8, dtype=F64)


def rows(state, row):
    return {name: tensor[row : row + 1] for name, tensor in state.items()}


@every_family
@torch.no_grad()
def test_pieces_and_steps_equal_the_whole(variant, x):
    layer = make(variant)
    y, last = layer(x)
    assert y.shape == x.shape
    first, state = layer(x[:, :9])
    second, state = layer(x[:, 9:20], state)
    steps = []
    for t in range(20, 23):
        one, state = layer.step(x[:, t], state)
        steps.append(one)
    assert torch.allclose(torch.cat([first, second, torch.stack(steps, 1)], 1), y, atol=1e-10)
    for name in last:
        if last[name].shape == state[name].shape:
            assert torch.allclose(last[name], state[name], atol=1e-10), name
    state, steps = layer.initial_state(3, dtype=F64), []
    for t in range(23):
        one, state = layer.step(x[:, t], state)
        steps.append(one)
    assert torch.allclose(torch.stack(steps, 1), y, atol=1e-10)
    assert layer(x, return_state=False)[1] is None


@every_family
@torch.no_grad()
def test_padding_anywhere_leaves_no_trace(variant, x):
    layer = make(variant)
    mask = torch.rand(3, 23) < 0.6
    mask[0, :5], mask[1, 15:], mask[:, 8] = False, False, True
    poisoned = x.masked_fill(~mask[..., None], torch.nan)
    _, between = layer(x[:, :7])
    for before in (None, between):
        y, state = layer(poisoned, before, mask)
        assert (y[~mask] == 0).all()
        after, _ = layer.step(x[:, 0], state)
        for row in range(3):
            alone = x[row : row + 1, mask[row]]
            want, last = layer(alone, None if before is None else rows(before, row))
            assert torch.allclose(y[row, mask[row]], want[0], atol=1e-10)
            assert torch.allclose(layer.step(x[row : row + 1, 0], last)[0][0], after[row], atol=1e-10)


@every_family
def test_nothing_flows_from_the_future_and_all_parameters_learn(variant, x):
    layer = make(variant)
    x.requires_grad_()
    y, _ = layer(x)
    gradient = torch.autograd.grad(y[:, 10].square().sum(), x, retain_graph=True)[0]
    assert gradient[:, 11:].abs().max() < 1e-12
    assert gradient[:, :11].abs().sum() > 0
    (y * torch.randn_like(y)).sum().backward()
    for name, parameter in layer.named_parameters():
        # the first tap of a Mega bias table and the like are not reached at this length
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("variant", FAMILIES)
@torch.no_grad()
def test_low_precision(variant, x):
    want, _ = make(variant)(x)
    found, state = make(variant, torch.float32)(x.float())
    assert found.dtype == torch.float32
    assert (found - want).abs().max() < 1e-4 * want.abs().max()
    low, state = make(variant, torch.bfloat16)(x.bfloat16())
    assert low.dtype == torch.bfloat16
    assert (low - want).abs().max() < 0.1 * want.abs().max()
    assert all(state[k].dtype in (torch.float32, torch.complex64) for k in ("ssm", "hidden", "matrix") if k in state)


@pytest.mark.parametrize("variant", ["hyena"])
def test_compiled_without_breaks(variant, x, without_shape_checks):
    layer = make(variant)
    compiled = torch.compile(lambda t: layer(t, return_state=False)[0], fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), layer(x)[0], atol=1e-10)


@pytest.mark.parametrize("variant", ["s4d", "s5", "mamba", "hyena", "rwkv", "retnet"])
def test_gradcheck(variant):
    layer = make(variant)
    x = torch.randn(1, 5, 8, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: layer(t, return_state=False)[0], x, fast_mode=True)


def filled(name, shape):
    """A formula for weights, so that only outputs of the official code need to be stored."""
    count = math.prod(shape)
    shift = zlib.crc32(("freq" if "freq" in name else name).encode()) % 97
    return (0.4 * torch.cos(torch.arange(count) * 1.7 + shift)).reshape(shape)


OFFICIAL = {
    "S4D": lambda: S4D(4, 6),
    "S4Block diag False": lambda: S4D(4, 6, trainable_b=True),
    "S4Block diag True": lambda: S4D(4, 6, trainable_b=True, bidirectional=True),
    "S4Block dplr False": lambda: S4(4, 6, l_kernel=9),
    "S4Block dplr True": lambda: S4(4, 6, l_kernel=9, bidirectional=True),
    "S4Block dplr unset": lambda: S4(4, 6, l_kernel=9),
    "Hyena 2": lambda: Hyena(4, 9, filter_width=5),
    "Hyena 3": lambda: Hyena(4, 9, order=3, filter_width=5),
    "LongConv": lambda: LongConv(4, 7, channels=2, squash=0.1, bidirectional=True),
    "GConv": lambda: SGConv(4, 8, kernel_dim=2),
    "EMA False": lambda: EMA(4, 3),
    "EMA True": lambda: EMA(4, 3, bidirectional=True),
    "Gtu True": lambda: TNN(4, rpe_width=5, rpe_layers=2),
    "S5 zoh": lambda: S5(4, 6),
    "S5 bilinear": lambda: S5(4, 6, discretization="bilinear"),
    "LRU": lambda: LRU(4, 3),
    "Gtu False": lambda: TNN(4, rpe_width=5, rpe_layers=2, causal=False),
    **{
        f"Mega {kind} {both}": lambda kind=kind, both=both: Mega(
            4, 2, z_dim=3, v_dim=6, max_positions=9, attention=kind, causal=not both
        )
        for kind in ("softmax", "laplace")
        for both in (False, True)
    },
}


# outputs of the function, repository and commit named beside them in the file, on weights and inputs by formula
@pytest.mark.parametrize(
    "case", json.loads(Path(__file__).with_name("state_space_official.json").read_text()), ids=lambda c: c["case"]
)
@torch.no_grad()
def test_official_weights_give_the_official_outputs(case):
    layer = OFFICIAL[case["case"]]().eval()
    own, weights = layer.state_dict(), {}
    for entry in case["shapes"].split():
        name, _, sizes = entry.partition(":")
        shape = tuple(int(n) for n in sizes.split(",") if n)
        if "pos_emb" in name or "deltas" in name or name == "multiplier":
            weights[name] = own[name]
        elif "l_kernel" in name:
            weights[name] = torch.tensor(0 if "unset" in case["case"] else 9)
        elif "initialized" in name:
            weights[name] = torch.tensor(True)
        else:
            weights[name] = torch.full(shape, 0.9) if name == "toep.gamma" else filled(name, shape)
    if "kernel_norm" in case:
        weights["kernel_norm"] = torch.tensor(case["kernel_norm"]).view(1, 4, 1)
    layer.load_state_dict(weights)
    y, _ = layer(torch.sin(torch.arange(28.0).reshape(1, 7, 4) * 0.9), return_state=False)
    for place, want in ((0, case["first_place"]), (6, case["last_place"])):
        assert torch.allclose(y[0, place], torch.tensor(want), atol=2e-6)


def their_mamba():
    from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    small = {"vocab_size": 20, "num_hidden_layers": 2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    one = MambaForCausalLM(MambaConfig(hidden_size=16, state_size=4, **small)).eval()
    yield one, lambda: Mamba(16, 4)
    sizes = {"hidden_size": 16, "state_size": 8, "head_dim": 8, "num_heads": 4, "n_groups": 2, "chunk_size": 8}
    two = Mamba2ForCausalLM(Mamba2Config(**sizes, **small)).eval()
    yield two, lambda: Mamba2(16, 8, head_dim=8, groups=2)


@torch.no_grad()
def test_language_models_of_transformers_give_the_same_logits_through_our_layers():
    class Ours(nn.Module):
        def __init__(self, mixer):
            super().__init__()
            self.mixer = mixer

        def forward(self, x, cache=None, attention_mask=None, **_):
            return self.mixer(x)[0]

    ids = torch.arange(30).view(2, 15) % 19
    for model, layer in their_mamba():
        # weights as training might leave them
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        want = model(ids, use_cache=False).logits
        for block in model.backbone.layers:
            ours = layer()
            ours.load_state_dict(block.mixer.state_dict())
            block.mixer = Ours(ours.eval())
        assert torch.allclose(model(ids, use_cache=False).logits, want, atol=2e-5)


@torch.no_grad()
def test_rg_lru_and_rwkv_equal_those_of_transformers():
    from transformers import RecurrentGemmaConfig, RwkvConfig
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock
    from transformers.models.rwkv.modeling_rwkv import RwkvSelfAttention

    torch.manual_seed(0)
    x = torch.randn(2, 12, 8)
    config = RecurrentGemmaConfig(hidden_size=8, lru_width=8, num_attention_heads=2, num_hidden_layers=3)
    theirs = RecurrentGemmaRecurrentBlock(config, 0)
    for parameter in theirs.parameters():
        parameter.copy_(0.5 * torch.randn_like(parameter))
    ours = RGLRU(8, heads=2)
    ours.load_state_dict(theirs.state_dict())
    want, _ = theirs(x, torch.arange(12)[None].expand(2, -1), None, use_cache=False)
    assert torch.allclose(ours(x)[0], want, atol=1e-5)

    theirs = RwkvSelfAttention(RwkvConfig(hidden_size=8, attention_hidden_size=8))
    for parameter in theirs.parameters():
        parameter.copy_(torch.randn_like(parameter))
    ours = RWKV(8)
    ours.load_state_dict(theirs.state_dict())
    assert torch.allclose(ours(x)[0], theirs(x)[0], atol=1e-5)


@pytest.mark.parametrize("variant", LTI)
@torch.no_grad()
def test_impulse_response_is_the_kernel_and_nothing_wraps(variant):
    layer = make(variant)
    layer._after = lambda y: y
    x = torch.zeros(1, 30, 8, dtype=F64)
    x[:, 0] = 1
    taps = layer.kernel(30)[0]
    assert torch.allclose(layer(x)[0][0].T - F.pad(layer.D[:, None], (0, 29)), taps, atol=1e-10)
    assert (layer(x.flip(1))[0][0, :-1].abs() < 1e-12).all()


@torch.no_grad()
def test_kernels_of_shared_states_are_their_impulse_responses():
    for layer in (make("s5"), make("lru"), make("s5 blocks")):
        layer._after = lambda y: y
        taps = layer.kernel(20)
        for i in (0, 5):
            x = torch.zeros(1, 20, 8, dtype=F64)
            x[0, 0, i] = 1
            assert torch.allclose(layer(x)[0][0].T, taps[:, i], atol=1e-10)


@torch.no_grad()
def test_s4d_is_its_formula():
    layer = make("s4d")
    k = layer.kernel
    A = torch.complex(-k.log_A_real.exp(), k.A_imag)
    assert torch.allclose(
        A,
        torch.complex(-0.5 * torch.ones(8, 2, dtype=F64), (torch.pi * torch.arange(2)).double().repeat(8, 1)),
        atol=1e-6,
    )
    want = diagonal_kernel_naive(A, torch.view_as_complex(k.C)[0], k.log_dt.exp(), 20)
    assert torch.allclose(layer.kernel(20)[0], want, atol=1e-10)
    inverse = S4D(3, 8, init="inv").kernel.A_imag[0]
    assert torch.allclose(inverse, torch.tensor([8 / math.pi * (8 / (2 * n + 1) - 1) for n in range(4)]))


@torch.no_grad()
def test_s4_beyond_its_length_is_the_same_function():
    short, x = make("s4"), torch.randn(1, 50, 8, dtype=F64)
    assert int(short.kernel.l_kernel) == 32
    C = short.kernel._readout(short.kernel._dense()[0])
    a, b = short.kernel._dense()
    want = torch.stack([(C[0] * torch.einsum("hmn,hn->hm", torch.linalg.matrix_power(a, t), b)).sum(-1)
                        for t in range(50)], -1)  # fmt: skip
    assert torch.allclose(short.kernel(50)[0], want, atol=1e-10)
    state = short.initial_state(1, dtype=F64)
    plain = [short.step(x[:, 0], state)[0], short.kernel.prepare(keep=True) and short.step(x[:, 0], state)[0]]
    assert torch.allclose(*plain)
    short.train()
    assert short.kernel._prepared is None


@torch.no_grad()
def test_liquid_s4_of_degree_one_is_s4d_and_of_two_its_equation():
    torch.manual_seed(0)
    plain = S4D(3, 4).double()
    one = LiquidS4(3, 4, degree=1).double()
    one.load_state_dict(plain.state_dict())
    x = torch.randn(1, 9, 3, dtype=F64)
    assert torch.allclose(one(x)[0], plain(x)[0], atol=1e-12)
    for mode in ("kb", "pb"):
        two = LiquidS4(3, 4, degree=2, mode=mode).double()
        two.load_state_dict(plain.state_dict())
        log_a, b, c = two.kernel.coefficients()
        h, before, want = torch.zeros_like(b), torch.zeros(3, dtype=F64), []
        for u in x[0]:
            product = b**2 * (u * before)[:, None]
            h = log_a.exp() * h + b * u[:, None] + (product if mode == "kb" else 0)
            y = (c[0] * (h + (product if mode == "pb" else 0))).sum(-1).real + two.D * u
            want.append(y)
            before = u
        want = F.glu(two.output_linear(F.gelu(torch.stack(want))), -1)
        assert torch.allclose(two(x)[0][0], want, atol=1e-12)


@torch.no_grad()
def test_gss_and_h3_are_compositions_of_their_parts(x):
    gss = make("gss")
    u = F.gelu(gss.reduce(x))
    taps = gss.kernel(23)[0]
    y = sum(F.pad(u, (0, 0, s, 0))[:, :23] * taps[:, s] for s in range(23)) + u * gss.D
    assert torch.allclose(gss(x)[0], gss.out_proj(F.gelu(gss.gate(x)) * gss.widen(y)), atol=1e-10)
    h3 = make("h3")
    q, k, v = h3.q_proj(x), h3.k_proj(x), h3.v_proj(x)
    shifted = sum(F.pad(k, (0, 0, s, 0))[:, :23] * h3.shift[:, s] for s in range(4)) + k * h3.ssm_k_D
    taps, kv = h3.kernel(23)[0], shifted * v
    y = sum(F.pad(kv, (0, 0, s, 0))[:, :23] * taps[:, s] for s in range(23)) + kv * h3.D
    assert torch.allclose(h3(x)[0], h3.output_linear(q * y), atol=1e-10)


@torch.no_grad()
def test_hyena_and_mamba_materialise(x):
    for variant in ("hyena", "hyena 3"):
        hyena = make(variant)
        matrix = hyena.materialize(x)
        assert matrix.triu(1).abs().max() == 0
        projected = F.conv1d(F.pad(hyena.in_proj(x).mT, (2, 0)), hyena.short_filter.weight, hyena.short_filter.bias,
                             groups=8 * (hyena.order + 1))  # fmt: skip
        v = projected.chunk(hyena.order + 1, 1)[-1]
        want = hyena.out_proj((matrix @ v[..., None]).squeeze(-1).mT)
        assert torch.allclose(hyena(x)[0], want, atol=1e-10)
    mamba = make("mamba")
    inner, z = mamba.in_proj(x).chunk(2, -1)
    inner = F.silu(F.conv1d(F.pad(inner.mT, (3, 0)), mamba.conv1d.weight, mamba.conv1d.bias, groups=16))
    y = (mamba.materialize(x) @ inner[..., None]).squeeze(-1) + inner * mamba.D[:, None]
    assert torch.allclose(mamba(x)[0], mamba.out_proj(y.mT * F.silu(z)), atol=1e-10)


@torch.no_grad()
def test_mamba_without_selection_is_a_real_diagonal_state_space():
    mamba = make("mamba")
    dt, B, C = 0.1 * torch.ones(16, dtype=F64), torch.randn(4, dtype=F64), torch.randn(4, dtype=F64)
    mamba._selection = lambda x: (dt.expand_as(x), B.expand(*x.shape[:-1], 4), C.expand(*x.shape[:-1], 4))
    x = torch.randn(1, 12, 8, dtype=F64)
    inner, z = mamba.in_proj(x).chunk(2, -1)
    inner = F.silu(F.conv1d(F.pad(inner.mT, (3, 0)), mamba.conv1d.weight, mamba.conv1d.bias, groups=16)).mT
    A = -mamba.A_log.exp()
    taps = (dt[0] * (dt[0] * A[..., None] * torch.arange(12)).exp() * (B * C)[:, None]).sum(1)
    y = sum(F.pad(inner, (0, 0, s, 0))[:, :12] * taps[:, s] for s in range(12)) + inner * mamba.D
    assert torch.allclose(mamba(x)[0], mamba.out_proj(y * F.silu(z)), atol=1e-10)


@torch.no_grad()
def test_rwkv_hgrn_ema_and_retention_are_their_formulas(x):
    rwkv = make("rwkv")
    before = F.pad(x, (0, 0, 1, 0))[:, :-1]

    def mixed(layer, mix):
        return layer(x * mix + before * (1 - mix))

    k, v = mixed(rwkv.key, rwkv.time_mix_key), mixed(rwkv.value, rwkv.time_mix_value)
    r, w = mixed(rwkv.receptance, rwkv.time_mix_receptance).sigmoid(), rwkv.time_decay.exp()
    wkv = []
    for t in range(23):
        weight = torch.stack([(k[:, i] - (t - 1 - i) * w).exp() for i in range(t)]
                             + [(k[:, t] + rwkv.time_first).exp()], 1)  # fmt: skip
        wkv.append((weight * v[:, : t + 1]).sum(1) / weight.sum(1))
    assert torch.allclose(rwkv(x)[0], rwkv.output(r * torch.stack(wkv, 1)), atol=1e-10)

    hgrn = make("hgrn bound")
    f = 0.5 + 0.5 * hgrn.forget(x).sigmoid()
    real, imaginary = F.silu(hgrn.input(x)).chunk(2, -1)
    h = linear_recurrence_naive(torch.polar(f, hgrn.theta.expand_as(f)), (1 - f) * torch.complex(real, imaginary))
    gated = torch.cat([h.real, h.imag], -1) * F.silu(hgrn.gate(x))
    assert torch.allclose(hgrn(x)[0], hgrn.output(hgrn.norm(gated)), atol=1e-10)

    net = make("retnet")
    q, k, v = (p(x).unflatten(-1, (2, -1)) for p in (net.q_proj, net.k_proj, net.v_proj))
    angle = torch.arange(23)[:, None, None] * 10000 ** (-torch.arange(2, dtype=F64) / 2)

    def turned(t):
        pair = torch.view_as_real(torch.complex(*t.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle))
        return pair.movedim(-1, -2).flatten(-2)

    decay = 1 - 2.0 ** (-5 - torch.arange(2, dtype=F64))
    lag = torch.arange(23)[:, None] - torch.arange(23)
    scores = torch.einsum("bihd,bjhd->bhij", turned(q), turned(k)) / 2 * decay[:, None, None] ** lag.clamp(min=0)
    y = torch.einsum("bhij,bjhd->bihd", scores.tril(), v)
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(net(x)[0], net.o_proj(y.flatten(2) * F.silu(net.g_proj(x))), atol=1e-10)


def test_rwkv_with_extreme_keys_stays_finite():
    layer = RWKV(4)
    with torch.no_grad():
        layer.key.weight *= 1e3
    x = (30 * torch.randn(1, 200, 4)).requires_grad_()
    y, _ = layer(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()


@torch.no_grad()
def test_dss_forms_agree_and_growing_states_are_allowed():
    layer = DSS(2, 4, normalize="softmax", l_max=50)
    layer.kernel.Lambda_re += 2.0
    y, state = layer(torch.randn(1, 50, 2))
    assert y.isfinite().all()
    assert state["ssm"].isfinite().all()
    with pytest.raises(ValueError, match="at most 50"):
        layer(torch.randn(1, 51, 2))


def radius(layer):
    if isinstance(layer, S4):
        return torch.linalg.eigvals(layer.kernel._dense()[0]).abs().max()
    if isinstance(layer, (S5, LRU)):
        return layer._system()[0].exp().abs().max()
    return layer.kernel.coefficients()[0].exp().abs().max()


@pytest.mark.parametrize("variant", ["s4", "s4d", "s4d bilinear", "s5", "lru"])
def test_eigenvalues_stay_inside_the_circle_after_any_step(variant):
    layer = make(variant)
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter += torch.randn_like(parameter)
        assert radius(layer) <= 1 + 1e-9


@torch.no_grad()
def test_lru_begins_on_its_ring_with_states_of_unit_size():
    torch.manual_seed(0)
    layer = LRU(16, 256, r_min=0.4, r_max=0.8, max_phase=1.0)
    log_a = layer._system()[0]
    assert 0.4 <= log_a.real.exp().min() < log_a.real.exp().max() <= 0.8
    assert 0 <= log_a.imag.min() < log_a.imag.max() <= 1.0
    _, state = layer(torch.randn(200, 100, 16))
    # inputs are mixed by a random matrix whose rows have unit norm on average
    assert state["ssm"].abs().square().mean() == pytest.approx(1, abs=0.15)


@torch.no_grad()
def test_s4nd_is_a_convolution_with_the_product_kernel():
    layer = S4ND(2, axes=2, d_state=4).double()
    x = torch.randn(1, 5, 4, 2, dtype=F64)
    rows_, columns = layer.kernel((5, 4))
    kernel = rows_[:, :, None] * columns[:, None]
    y = F.conv2d(x.movedim(-1, 1), kernel.flip(1, 2)[:, None], padding=(4, 3), groups=2).movedim(1, -1)
    want = F.glu(layer.output_linear(F.gelu(y + x * layer.D)), -1)
    assert torch.allclose(layer(x), want, atol=1e-10)
    fast = S4ND(2, d_state=64, bandlimit=0.1)
    assert (fast.kernels[0].coefficients()[2] == 0).any()


@pytest.mark.parametrize("variant", ["s4", "s4d", "long_conv", "sgconv", "tnn", "mega", "ema", "attention"])
@torch.no_grad()
def test_layers_that_look_both_ways(variant, x):
    name, settings = VARIANTS[variant]
    side = {"causal": False} if name in ("tnn", "mega", "attention") else {"bidirectional": True}
    length = {"l_max": 64} if FAMILIES[name].needs_length else {}
    layer = build_ssm(name, 8, **length, **settings, **side).double()
    y, state = layer(x)
    assert state is None
    changed = x.clone()
    changed[:, -1] *= torch.arange(8)
    assert (layer(changed)[0][:, 0] - y[:, 0]).abs().max() > 1e-9
    mask = torch.arange(23) < torch.tensor([[23], [11], [5]])
    padded = layer(x.masked_fill(~mask[..., None], torch.nan), mask=mask)[0]
    assert torch.allclose(padded[1, :11], layer(x[1:2, :11])[0][0], atol=1e-9)
    for call in (lambda: layer.initial_state(1), lambda: layer.step(x[:, 0], {}), lambda: layer(x, {})):
        with pytest.raises(ValueError, match="looks into the future"):
            call()


@torch.no_grad()
def test_scans_over_other_orders(x):
    both = Bidirectional(lambda: make("lru"))
    want = both.forwards(x)[0] + both.backwards(x.flip(1))[0].flip(1)
    assert torch.allclose(both(x)[0], want, atol=1e-12)
    mask = torch.ones(3, 23, dtype=torch.bool)
    mask[0, 15:] = mask[1, :4] = False
    assert torch.allclose(both(x, mask=mask)[0][1, 4:], both(x[1:2, 4:])[0][0], atol=1e-10)
    image = torch.randn(2, 5, 4, 8, dtype=F64)
    scan = Scan2d(lambda: make("s4d"), directions=4)
    turned = Scan2d(lambda: make("s4d"), directions=4)
    turned.layers = scan.layers[2:] + scan.layers[:2]
    assert torch.allclose(turned(image.transpose(1, 2)).transpose(1, 2), scan(image), atol=1e-12)
    strands = ReverseComplement(make("mamba"))
    wide = torch.randn(2, 9, 16, dtype=F64)
    assert torch.allclose(strands(wide.flip(1, 2))[0], strands(wide)[0].flip(1, 2), atol=1e-12)
    with pytest.raises(ValueError, match="1, 2 or 4"):
        Scan2d(lambda: make("s4d"), directions=3)


@torch.no_grad()
def test_stack_of_different_blocks_steps_like_the_whole(x):
    torch.manual_seed(0)
    bounds = LowerBounds(2, 8)
    mixers = [make("mamba"), Mega(8), HGRN(8, lower_bounds=bounds, layer=1), make("attention")]
    blocks = [Block(mixer, MixtureOfExperts(8, 16, 4) if i % 2 else None) for i, mixer in enumerate(mixers)]
    stack = Stack(blocks, 8).double()
    bounds.double()
    y, states = stack(x)
    states, steps = stack.initial_state(3, dtype=F64), []
    for t in range(23):
        one, states = stack.step(x[:, t], states)
        steps.append(one)
    assert torch.allclose(torch.stack(steps, 1), y, atol=1e-10)
    rising = torch.stack([LowerBounds(4, 3)(i) for i in range(4)])
    assert torch.allclose(rising[:, 0], torch.tensor([0, 0.25, 0.5, 0.75]))


@torch.no_grad()
def test_experts_are_weighted_by_the_router():
    moe, x = MixtureOfExperts(4, 8, experts=3, top_k=2), torch.randn(2, 5, 4)
    probability = moe.router(x).softmax(-1)
    chosen = probability * (probability >= probability.sort(-1).values[..., 1:2])
    want = sum(chosen[..., i, None] * expert(x) for i, expert in enumerate(moe.experts))
    assert torch.allclose(moe(x), want, atol=1e-6)
    assert moe.balance > 0
    with pytest.raises(ValueError, match="top_k"):
        MixtureOfExperts(4, 8, experts=2, top_k=3)


def test_optimiser_groups_hold_every_parameter_once():
    stack = Stack([Block(build_ssm(n, 8, l_max=9)) for n in ("mamba", "s4", "hyena", "rwkv")], 8)
    groups = ssm_optim_groups(stack, lr=0.01, weight_decay=0.1)
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in stack.parameters())
    slow = {id(p) for p in groups[0]["params"]}
    assert (groups[0]["lr"], groups[0]["weight_decay"]) == (1e-3, 0.0)
    assert id(stack.blocks[0].mixer.A_log) in slow
    assert id(stack.blocks[1].mixer.kernel.log_dt) in slow
    assert all(p.ndim > 1 for group in groups for p in group["params"] if group["weight_decay"])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: S4D(8, 4)(x[:, :0]), ValueError, "length of at least 1"),
        (lambda x: S4D(8, 4)(x[..., :7]), ValueError, r"\(batch, length, 8\)"),
        (lambda x: S4D(8, 4)(x.long()), TypeError, "floating-point"),
        (lambda x: S4D(8, 4).half()(x), TypeError, "kernel.log_dt is float16"),
        (lambda x: S4D(8, 4)(x, mask=torch.ones(3, 23)), TypeError, "boolean"),
        (lambda x: S4D(8, 4)(x, mask=torch.ones(3, 22, dtype=torch.bool)), ValueError, "mask must have shape"),
        (lambda x: S4D(8, 4)(x, S4D(8, 4).initial_state(2)), ValueError, r"state\['ssm'\] must have shape \(3, 8, 2\)"),
        (lambda x: S4D(8, 4)(x, {}), ValueError, r"state must hold \['ssm'\], got \[\]"),
        (lambda x: S4D(8, 4).step(x, S4D(8, 4).initial_state(3)), ValueError, r"x_t must have shape \(batch, 8\)"),
        (lambda x: Mamba(8).step(x[:, 0], Mamba(8).initial_state(2)), ValueError, "must have shape"),
        (lambda x: Hyena(8, 20)(x), ValueError, "at most 20"),
        (lambda x: Hyena(8, 25)(x, Hyena(8, 25)(x)[1]), ValueError, "at most 25.*got 46"),
        (lambda x: LongConv(8, 20)(x), ValueError, "at most 20"),
        (lambda x: Mega(8, max_positions=20)(x), ValueError, "at most 20"),
        (lambda x: Hyena(8, 20, features=4), ValueError, "odd"),
        (lambda x: Hyena(8, 20, order=1), ValueError, "order"),
        (lambda x: S4D(8, 5), ValueError, "even"),
        (lambda x: S4(8, 5), ValueError, "even"),
        (lambda x: S4D(8, 4, init="random"), ValueError, "'lin', 'inv' or 'legs'"),
        (lambda x: S5(8, 6, blocks=2), ValueError, "even multiple of 2 blocks"),
        (lambda x: DSS(8, 4, normalize="softmax"), ValueError, "l_max must be given"),
        (lambda x: LRU(8, r_min=0.9, r_max=1.1), ValueError, "r_min"),
        (lambda x: Mamba2(8, head_dim=5), ValueError, "multiple of head_dim"),
        (lambda x: LiquidS4(8, degree=0), ValueError, "degree"),
        (lambda x: HGRN(8, lower_bound=1.0), ValueError, "lower_bound"),
        (lambda x: H3(8, head_dim=3), ValueError, "head_dim"),
        (lambda x: TNN(8, decay=1.5), ValueError, "decay"),
        (lambda x: GSS(0), ValueError, "d_model"),
        (lambda x: build_ssm("s6", 8), ValueError, "name must be one of s4, s4d"),
        (lambda x: build_ssm("hyena", 8), ValueError, "l_max"),
        (lambda x: build_ssm("rwkv", 8, 16), ValueError, "no d_state"),
        (lambda x: build_ssm("s4d", 8, window=3), TypeError, "no setting window; it has d_state, init"),
        (lambda x: S4ND(8)(x), ValueError, "2 axes"),
    ],
)
def test_wrong_input_is_named(call, error, message, x, without_shape_checks):
    with pytest.raises(error, match=message):
        call(x.float())


def test_registry_says_what_is_true():
    for name, family in FAMILIES.items():
        layer = make(name)
        assert layer.causal, name
        shapes = {n: tuple(s.shape) for n, s in layer.initial_state(2).items()}
        _, state = layer(torch.randn(2, 11, 8, dtype=F64))
        grows = any(tuple(state[n].shape) != shape for n, shape in shapes.items())
        assert grows != family.constant_step, name

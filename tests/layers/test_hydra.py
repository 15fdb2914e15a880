"""Hydra against the definition of its matrix, the official code, and the models that it goes into."""

import copy
import importlib.util
import math
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchgraft.layers.hydra import (
    HydraConfig,
    HydraForMaskedLM,
    HydraForSequenceClassification,
    HydraMixer,
    HydraModel,
    MatrixMixer,
    load_published,
    replace_attention,
    weight_decay_groups,
)
from torchgraft.layers.hydra.mixers import (
    attention_matrix,
    cauchy_matrix,
    dft_matrix,
    low_rank_matrix,
    toeplitz_matrix,
    toeplitz_product,
    vandermonde_matrix,
)
from torchgraft.ops.quasiseparable import quasiseparable, quasiseparable_matrix, semiseparable_matrix
from torchgraft.ops.ssd import ssd

KINDS = ("toeplitz", "low_rank", "attention", "vandermonde", "cauchy", "quasiseparable")
BENCH = [("dense", False), *((kind, dependent) for kind in KINDS for dependent in (False, True))]
every_mixer = pytest.mark.parametrize(("kind", "dependent"), BENCH)


def inputs(batch=2, length=13, heads=4, features=3, groups=2, states=2, dtype=torch.float64):
    torch.manual_seed(0)
    x, delta = torch.randn(batch, length, heads, features), torch.rand(batch, length, 2, heads)
    B, C = torch.randn(2, batch, length, 2, groups, states).unbind()
    tensors = [x, delta, -torch.rand(heads), B, C, torch.randn(batch, length, heads)]
    return [t.to(dtype) for t in tensors]


def by_definition(delta, A, B, C, diagonal):
    """Entry by entry, with the loop of products written out."""
    batch, length, _, heads = delta.shape
    group = heads // B.shape[3]
    M = torch.zeros(batch, heads, length, length, dtype=delta.dtype)
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                for j in range(length):
                    if i == j:
                        M[b, h, i, j] = diagonal[b, i, h]
                        continue
                    way, read = (0, i - 1) if i > j else (1, i + 1)
                    between = range(j + 1, i) if i > j else range(i + 1, j)
                    decay = math.exp(sum(float(delta[b, k, way, h] * A[h]) for k in between))
                    c, b_ = C[b, read, way, h // group], B[b, j, way, h // group]
                    M[b, h, i, j] = float(c @ b_) * decay * delta[b, j, way, h]
    return M


@pytest.mark.parametrize("length", [1, 2, 13])
@pytest.mark.parametrize("chunk_size", [1, 4, 64])
def test_equals_the_matrix_of_the_definition(length, chunk_size):
    x, *parameters = inputs(length=length)
    M = by_definition(*parameters)
    assert torch.allclose(quasiseparable_matrix(*parameters), M, atol=1e-12)
    y = quasiseparable(x, *parameters, chunk_size=chunk_size)
    assert torch.allclose(y, torch.einsum("bhij,bjhp->bihp", M, x), atol=1e-10)


def test_gradcheck():
    tensors = inputs(batch=1, length=4, heads=2, features=1, groups=1)
    state = torch.randn(1, 2, 2, 1, 2, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in [*tensors, state]]
    assert torch.autograd.gradcheck(lambda *t: quasiseparable(*t[:-1], initial_state=t[-1], chunk_size=2), leaves)
    assert torch.autograd.gradcheck(quasiseparable_matrix, leaves[1:-1])
    assert torch.autograd.gradcheck(semiseparable_matrix, [t[:, :, 0] if t.ndim > 2 else t for t in leaves[1:5]])


def test_blocks_off_the_diagonal_have_the_rank_of_the_state():
    M = quasiseparable_matrix(*inputs(length=20, states=3)[1:])
    for cut in range(4, 17):
        assert torch.linalg.matrix_rank(M[..., cut:, :cut], rtol=1e-9).max() == min(3, cut)
        assert torch.linalg.matrix_rank(M[..., :cut, cut:], rtol=1e-9).max() == 3
    assert torch.linalg.matrix_rank(M, rtol=1e-9).min() == 20


def test_each_triangle_comes_from_its_direction_alone():
    _, delta, A, B, C, diagonal = inputs()
    M = quasiseparable_matrix(delta, A, B, C, diagonal)
    C = C.clone()
    C[:, :, 1] = 0
    assert torch.equal(quasiseparable_matrix(delta, A, B, C, diagonal), M.tril())
    assert torch.equal(M.diagonal(dim1=2, dim2=3), diagonal.mT)


def test_is_not_two_scans_added_but_these_with_the_diagonal_freed():
    x, delta, A, B, C, _ = inputs()
    forward, backward = (
        semiseparable_matrix(*[t[:, :, w] for t in (delta,)], A, B[:, :, w], C[:, :, w]) for w in (0, 1)
    )
    added = forward + backward.tril(-1).mT
    assert not torch.allclose(quasiseparable_matrix(delta, A, B, C, torch.zeros(2, 13, 4).double()), added)
    y, _ = ssd(x, delta[:, :, 0], A, B[:, :, 0], C[:, :, 0])
    assert torch.allclose(torch.einsum("bhij,bjhp->bihp", forward, x), y, atol=1e-12)


def test_masked_places_are_as_if_not_there():
    tensors = inputs(length=30)
    state = torch.randn(2, 2, 4, 3, 2, dtype=torch.float64)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[0, :4] = mask[0, 12:15] = mask[1, 21:] = False
    poisoned = [t.clone() for t in tensors]
    for i in (0, 1, 3, 4, 5):
        poisoned[i][~mask] = torch.nan
    y = quasiseparable(*poisoned, initial_state=state, mask=mask)
    assert (y[~mask] == 0).all()
    for row in (0, 1):
        alone = [t if i == 2 else t[row : row + 1, mask[row]] for i, t in enumerate(tensors)]
        assert torch.allclose(
            y[row, mask[row]], quasiseparable(*alone, initial_state=state[row : row + 1])[0], atol=1e-10
        )


def test_low_precision_is_computed_in_float32():
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 0.005)):
        low = inputs(length=40, dtype=dtype)
        y, want = quasiseparable(*low), quasiseparable(*[t.double() for t in low])
        assert y.dtype == dtype
        assert (y.double() - want).abs().max() <= tolerance * want.abs().max()
    single = inputs(length=40, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = quasiseparable(*single)
    assert torch.equal(inside, quasiseparable(*single))


def test_strong_decay_stays_finite():
    tensors = inputs(length=100, dtype=torch.float32)
    tensors[2] *= 1e4
    leaves = [t.requires_grad_() for t in tensors]
    assert all(g.isfinite().all() for g in torch.autograd.grad(quasiseparable(*leaves).sum(), leaves))


def test_fused_kernels_are_called_as_the_official_code_calls_them(monkeypatch):
    # no CUDA here: what is tested is the call, on a stand-in with the signature of mamba_ssm
    seen = {}

    def stand_in(x, dt, A, B, C, chunk_size, D=None, z=None, initial_states=None):
        seen.update(shape=tuple(x.shape), chunk_size=chunk_size)
        return ssd(x, dt, A, B, C, initial_state=initial_states)[0]

    found = types.ModuleType("mamba_ssm.ops.triton.ssd_combined")
    found.mamba_chunk_scan_combined = stand_in
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, found.__name__, found)
    tensors = inputs()
    want = quasiseparable(*tensors, backend="torch")
    with pytest.raises(RuntimeError, match="not installed"):
        quasiseparable(*tensors, backend="mamba_ssm")
    monkeypatch.setattr("torchgraft.ops.quasiseparable._FUSED", True)
    with pytest.raises(RuntimeError, match="not on a CUDA device"):
        quasiseparable(*tensors, backend="mamba_ssm")
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    assert torch.allclose(quasiseparable(*tensors, chunk_size=128), want)
    assert seen == {"shape": (4, 13, 4, 3), "chunk_size": 128}


def test_wrong_input_of_the_operation_is_named(without_shape_checks):
    x, delta, A, B, C, diagonal = inputs()
    for message, args in [
        ("x must have shape .* at least 1", [t[:, :0] if t.ndim > 1 else t for t in (x, delta, A, B, C, diagonal)]),
        ("x must have shape", [x[0], delta, A, B, C, diagonal]),
        ("delta must have shape", [x, delta[:, :, 0], A, B, C, diagonal]),
        ("A must have shape", [x, delta, A[1:], B, C, diagonal]),
        ("B must have shape", [x, delta, A, B[:, :, 0], C, diagonal]),
        ("B must have shape", [x, delta, A, B[:, :, :, [0, 0, 0]], C, diagonal]),
        ("C must have shape", [x, delta, A, B, C[..., :1], diagonal]),
        ("diagonal must have shape", [x, delta, A, B, C, diagonal[:1]]),
    ]:
        with pytest.raises(ValueError, match=message):
            quasiseparable(*args)
    given = (x, delta, A, B, C, diagonal)
    with pytest.raises(ValueError, match=r"initial_state must have shape \(2, 2, 4, 3, 2\)"):
        quasiseparable(*given, initial_state=torch.zeros(2, 4, 3, 2).double())
    with pytest.raises(TypeError, match="x must be a floating-point"):
        quasiseparable(x.long(), *given[1:])
    with pytest.raises(TypeError, match="boolean"):
        quasiseparable(*given, mask=torch.ones(2, 13))
    with pytest.raises(ValueError, match="backend must be"):
        quasiseparable(*given, backend="fast")
    with pytest.raises(ValueError, match="chunk_size"):
        quasiseparable(*given, chunk_size=0)


# ---- the block


def block(**settings):
    torch.manual_seed(0)
    layer = HydraMixer(16, **{"d_state": 4, "headdim": 8, **settings}).double()
    with torch.no_grad():
        layer.A_log.normal_()
        layer.D.normal_()
        layer.norm.weight.uniform_(0.5, 2)
    return layer


def known(module):
    """Weights that the official code and we can both be given without storing them."""
    for i, (_, p) in enumerate(sorted(module.named_parameters())):
        p.data = (0.3 * torch.sin(torch.arange(p.numel(), dtype=torch.float64) * (1.7 + 0.1 * i) + i)).view(p.shape)
    return module


def known_input(length):
    return torch.sin(torch.arange(2 * length * 16, dtype=torch.float64) * 0.37).view(2, length, 16)


# computed by hydra/modules/hydra.py::Hydra of goombalab/hydra at 55bef74 in float64, with the scan of mamba_ssm written
# out from its definition: the first three features of the last token of the second sequence
OFFICIAL = {
    (1, 1, False): [-0.003828817, -0.002597584, 0.004402298],
    (1, 2, False): [-0.002402158, -0.002923465, 0.003047584],
    (1, 33, False): [-0.000292107, 0.00746825, -0.001356692],
    (1, 1, True): [-0.014736979, 0.005333073, 0.015293555],
    (1, 33, True): [0.018589675, -0.007410365, -0.019363045],
    (2, 2, False): [-0.00247408, -0.002889574, 0.003112025],
    (2, 2, True): [-0.013872538, 0.004679417, 0.014360897],
    (2, 33, False): [-0.001089431, 0.007582112, -0.000584506],
    (2, 33, True): [0.019516803, -0.006818481, -0.020228402],
}


@pytest.mark.parametrize(("groups", "length", "learned"), OFFICIAL)
def test_block_equals_the_official_one(groups, length, learned):
    layer = known(HydraMixer(16, d_state=4, headdim=8, n_groups=groups, learnable_init_states=learned, chunk_size=5))
    want = torch.tensor(OFFICIAL[groups, length, learned], dtype=torch.float64)
    assert torch.allclose(layer(known_input(length))[1, -1, :3], want, rtol=0, atol=2e-9)


def test_block_has_the_official_names_and_start():
    layer = HydraMixer(32, d_state=16, headdim=8, learnable_init_states=True)
    assert set(layer.state_dict()) == {
        "init_states", "dt_bias", "A_log", "D", "in_proj.weight", "conv1d.weight", "conv1d.bias", "norm.weight",
        "out_proj.weight", "fc_D.weight",
    }  # fmt: skip
    assert layer.in_proj.weight.shape == (2 * 64 + 4 * 16 + 2 * 8, 32)
    assert layer.conv1d.weight.shape == (64 + 4 * 16, 1, 7)
    dt = F.softplus(layer.dt_bias)
    assert ((dt >= 0.00099) & (dt <= 0.1001)).all()
    assert (layer.A_log == 0).all()
    assert (layer.D == 1).all()
    spared = weight_decay_groups(layer, 0.1)[1]["params"]
    assert {id(p) for p in spared} == {id(p) for p in (layer.init_states, layer.dt_bias, layer.A_log, layer.D)}


def test_block_is_its_matrix_between_projections():
    layer, x = block(n_groups=2), torch.randn(2, 21, 16).double()
    gate, convolved, _ = layer.project(x, None)
    v = F.silu(convolved[..., :32]).unflatten(-1, (4, 8))
    M = layer.matrix(x)
    assert torch.allclose(M.diagonal(dim1=2, dim2=3), (layer.fc_D(v.flatten(2)) + layer.D).mT)
    y = torch.einsum("bhij,bjhp->bihp", M, v).flatten(2)
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.norm.weight * F.silu(gate)
    assert torch.allclose(layer(x), layer.out_proj(y), atol=1e-10)


def test_one_token_uses_the_diagonal_alone():
    layer, x = block(learnable_init_states=True), torch.randn(2, 1, 16).double()
    nn.init.normal_(layer.init_states)
    want = layer(x)
    layer.A_log.data += 1
    layer.init_states.data += 1
    assert torch.equal(layer(x), want)
    layer.D.data += 1
    assert not torch.allclose(layer(x), want)


def test_without_the_backward_direction_it_is_causal():
    layer, x = block(d_conv=1), torch.randn(1, 12, 16).double()
    # z, x, (B, C) forward, (B, C) backward
    layer.in_proj.weight.data[32 + 32 + 8 + 4 : 32 + 32 + 16] = 0
    layer.conv1d.bias.data[-4:] = 0
    later = x.clone()
    later[:, 7:] += 1
    assert torch.equal(layer(x)[:, :7], layer(later)[:, :7])
    assert not torch.allclose(block(d_conv=1)(x)[:, :7], block(d_conv=1)(later)[:, :7])


def test_reversed_time():
    layer, x = block(n_groups=2), torch.randn(2, 20, 16).double()
    twin = copy.deepcopy(layer)
    inner, vectors, heads = 32, 2 * 2 * 4, 4
    order = torch.arange(layer.in_proj.out_features)
    first, dt = 2 * inner, 2 * inner + 2 * vectors
    order[first:dt] = torch.cat([order[first + vectors : dt], order[first : first + vectors]])
    order[dt:] = torch.cat([order[dt + heads :], order[dt : dt + heads]])
    twin.in_proj.weight.data = layer.in_proj.weight.data[order]
    channels = order[inner:dt] - inner
    twin.conv1d.weight.data = layer.conv1d.weight.data[channels].flip(-1)
    twin.conv1d.bias.data = layer.conv1d.bias.data[channels]
    assert torch.allclose(twin(x.flip(1)), layer(x).flip(1), atol=1e-10)


def test_block_gradcheck():
    layer = HydraMixer(4, d_state=2, headdim=4, d_conv=3, chunk_size=2).double()
    x = torch.randn(1, 5, 4, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("bias", [False, True])
def test_padded_rows_equal_rows_alone(bias):
    layer, x = block(bias=bias, learnable_init_states=True), torch.randn(3, 20, 16).double()
    nn.init.normal_(layer.init_states)
    mask = torch.ones(3, 20, dtype=torch.long)
    mask[0, 13:] = mask[1, :5] = 0
    poisoned = x.masked_fill(mask[..., None] == 0, torch.nan).requires_grad_()
    y = layer(poisoned, mask)
    for row, part in ((0, slice(0, 13)), (1, slice(5, 20)), (2, slice(0, 20))):
        assert torch.allclose(y[row, part], layer(x[row : row + 1, part])[0], atol=1e-10)
    assert torch.allclose(y[0, 13:], layer.out_proj.bias if bias else torch.zeros(1).double())
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_packed_sequences_do_not_see_each_other():
    layer, x = block(), torch.randn(2, 20, 16).double()
    seq_idx = torch.tensor([[0] * 9 + [1] * 11, [5] * 3 + [2] * 12 + [-1] * 5])
    y = layer(x, seq_idx=seq_idx)
    for row, part in ((0, slice(0, 9)), (0, slice(9, 20)), (1, slice(0, 3)), (1, slice(3, 15))):
        assert torch.allclose(y[row, part], layer(x[row : row + 1, part])[0], atol=1e-10)
    assert (y[1, 15:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_block_in_low_precision(dtype):
    layer, x = block().float(), torch.randn(2, 40, 16)
    want = layer(x)
    low = copy.deepcopy(layer).to(dtype)(x.to(dtype))
    assert low.dtype == dtype
    assert (low.float() - want).abs().max() < 0.06 * want.abs().max()
    with torch.autocast("cpu", dtype):
        assert (layer(x).float() - want).abs().max() < 0.06 * want.abs().max()


def test_compiled_without_breaks(without_shape_checks, monkeypatch):
    # the scan as users have it: the suite's shape checks wrap a function inside it, which cannot be traced
    spec = importlib.util.spec_from_file_location("plain_ssd", sys.modules[ssd.__module__].__file__)
    plain = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "plain_ssd", plain)
    spec.loader.exec_module(plain)
    monkeypatch.setattr("torchgraft.ops.quasiseparable.ssd", plain.ssd)
    layer, x = block(), torch.randn(2, 20, 16).double()
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, 15:] = False
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x, mask), layer(x, mask))
    mixer = MatrixMixer("toeplitz", True, 16, headdim=8).double()
    assert torch.allclose(torch.compile(mixer, fullgraph=True, backend="aot_eager")(x), mixer(x))


def test_wrong_input_of_the_block_is_named(without_shape_checks):
    for message, settings in [
        ("headdim must divide", {"headdim": 7}),
        ("d_conv must be odd", {"d_conv": 4}),
        ("n_groups must divide", {"n_groups": 3}),
        ("backend must be", {"backend": "fast"}),
        ("chunk_size must be", {"chunk_size": 0}),
        ("0 < dt_min <= dt_max", {"dt_min": 0.0}),
        ("0 < dt_min <= dt_max", {"dt_min": 0.5, "dt_max": 0.1}),
        ("dt_limit must be", {"dt_limit": (1.0, 0.0)}),
    ]:
        with pytest.raises(ValueError, match=message):
            HydraMixer(16, **{"d_state": 4, "headdim": 8, **settings})
    layer, x = block(), torch.randn(2, 6, 16).double()
    with pytest.raises(ValueError, match="length of at least 1"):
        layer(x[:, :0])
    with pytest.raises(ValueError, match=r"x must have shape \(batch, length, 16\)"):
        layer(x[..., :8])
    with pytest.raises(TypeError, match="floating-point"):
        layer(x.long())
    with pytest.raises(ValueError, match="no causal or other mask"):
        layer(x, torch.ones(2, 1, 6, 6, dtype=torch.bool))
    with pytest.raises(TypeError, match="boolean or integer"):
        layer(x, torch.zeros(2, 6))
    with pytest.raises(ValueError, match="not both"):
        layer(x, torch.ones(2, 6).long(), torch.zeros(2, 6).long())
    with pytest.raises(ValueError, match="seq_idx must hold"):
        layer(x, seq_idx=torch.zeros(2, 5).long())


# ---- the bench of matrix classes


def bench(kind, dependent, longest=12, **settings):
    torch.manual_seed(0)
    mixer = MatrixMixer(kind, dependent, 16, 3, longest, headdim=8, **settings).double()
    for name, p in mixer.named_parameters():
        if name.startswith("matrix_mixer"):
            nn.init.normal_(p)
    return mixer


# computed by hydra/modules/matrix_mixer.py::MatrixMixer of goombalab/hydra at 55bef74, as OFFICIAL, length 12; its
# Toeplitz goes through float32
OFFICIAL_BENCH = {
    ("dense", False): [-0.000643297, -0.004620625, -0.001962351],
    ("toeplitz", False): [-0.001287058, -0.005601362, -0.001871644],
    ("toeplitz", True): [0.002396199, -0.001344363, -0.001488798],
    ("low_rank", False): [-0.003461141, -0.001334386, 0.004062874],
    ("low_rank", True): [0.003018139, -0.001822175, -0.001788232],
    ("attention", True): [0.003580323, -0.002556547, -0.001854739],
    ("vandermonde", False): [0.001488589, 0.00022527, -0.001640639],
    ("vandermonde", True): [0.002775425, -0.001756335, -0.001589958],
    ("cauchy", False): [-0.002400696, -0.002551836, 0.00355143],
    ("cauchy", True): [0.002061905, -0.003407, -0.00398317],
    ("quasiseparable", False): [-0.001336892, 0.002274286, 0.001574243],
    ("quasiseparable", True): [-0.005901676, -0.012833625, 0.008735013],
}


@pytest.mark.parametrize(("kind", "dependent"), OFFICIAL_BENCH)
def test_bench_equals_the_official_one(kind, dependent):
    mixer = known(MatrixMixer(kind, dependent, 16, 3, 12, headdim=8, official_indexing=kind == "toeplitz"))
    want = torch.tensor(OFFICIAL_BENCH[kind, dependent], dtype=torch.float64)
    assert torch.allclose(mixer(known_input(12))[1, -1, :3], want, rtol=0, atol=2e-9)


@every_mixer
@pytest.mark.parametrize("length", [1, 7, 12])
def test_mixing_is_the_matrix(kind, dependent, length):
    mixer, x = bench(kind, dependent), torch.randn(2, length, 16).double()
    gate, *_, v, _ = mixer._parts(x, None)
    M = mixer.matrix(x)
    assert M.shape == (2, 4, length, length)
    y = torch.einsum("bhij,bjhp->bihp", M, v).flatten(2)
    assert torch.allclose(mixer(x), mixer.close(y, gate), atol=1e-9)
    assert dependent or torch.allclose(
        (M - torch.diag_embed(M.diagonal(dim1=2, dim2=3)))[0], (M - torch.diag_embed(M.diagonal(dim1=2, dim2=3)))[1]
    )


def test_matrices_entry_by_entry():
    torch.manual_seed(0)
    q, k = torch.randn(2, 6, 3).double().unbind()
    taps = torch.randn(11).double()
    made = {
        "low_rank": low_rank_matrix(q, k), "attention": attention_matrix(q, k), "cauchy": cauchy_matrix(q, k, 0.5),
        "vandermonde": vandermonde_matrix(q, k, 1e-3, -1.0), "learned": vandermonde_matrix(q, k),
        "dft": dft_matrix(6, 9, torch.float64, q.device), "toeplitz": toeplitz_matrix(taps),
    }  # fmt: skip
    tau = 2 * math.pi
    for i in range(6):
        scores = [math.exp(float(q[i] @ k[j]) / math.sqrt(3)) for j in range(6)]
        for j in range(6):
            pairs = [(float(a), float(b)) for a, b in zip(q[i], k[j], strict=True)]
            want = {
                "low_rank": sum(a * b for a, b in pairs), "attention": scores[j] / sum(scores),
                "cauchy": sum(1 / (math.exp(a) + math.exp(b) + 1 + 1e-8) for a, b in pairs),
                "vandermonde": sum(math.cos(tau * 1e-3 * a * j) - math.cos(tau * 1e-3 * b * i) for a, b in pairs),
                "learned": sum(math.cos(tau * a * j) + math.cos(tau * b * i) for a, b in pairs),
                "dft": math.cos(tau * i * j / 9), "toeplitz": float(taps[i - j + 5]),
            }  # fmt: skip
            for name, value in want.items():
                assert float(made[name][i, j]) == pytest.approx(value, abs=1e-11), name
    v = torch.randn(6, 4).double()
    assert torch.allclose(toeplitz_product(taps, v), made["toeplitz"] @ v)


def test_data_dependent_toeplitz_taps_and_the_official_shift():
    x, length = torch.randn(1, 12, 16).double(), 12
    ours, official = bench("toeplitz", True), bench("toeplitz", True, official_indexing=True)
    extra = ours._parts(x, None)[1]
    f, r = extra[0, :, :4].T, extra[0, :, 4:].T
    scale = 0.5 / math.sqrt(12)
    M, shifted = ((m.matrix(x)[0] - torch.eye(12)) / scale for m in (ours, official))
    for i in range(length):
        for j in range(length):
            e = i - j
            assert torch.allclose(M[:, i, j], f[:, e] if e >= 0 else r[:, -e])
            # as the card of the paper found by running the official code
            corner = r[:, length - 1] if e == length - 1 else None
            theirs = corner if corner is not None else f[:, e + 1] if e >= -1 else r[:, -e - 1]
            assert torch.allclose(shifted[:, i, j], theirs)


def test_low_rank_is_linear_attention_without_normaliser():
    mixer, x = bench("low_rank", True), torch.randn(1, 12, 16).double()
    _, extra, _, v, _ = mixer._parts(x, None)
    q, k = (part.unflatten(-1, (4, 3)) for part in extra.chunk(2, -1))
    y = torch.zeros_like(v)
    for i in range(12):
        state = sum(k[0, j, :, :, None] * v[0, j, :, None] for j in range(12))
        y[0, i] = (q[0, i, :, None] @ state)[:, 0] / 6 + v[0, i]
    assert torch.allclose(mixer.matrix_mixer.mix(extra, extra, v, None) + v, y)


@pytest.mark.parametrize("kind", ["low_rank", "vandermonde", "cauchy", "quasiseparable"])
def test_sequence_alignment(kind):
    """Row and column t are made from token t: elsewhere a change of it does not show (without the convolution)."""
    mixer, x, t = bench(kind, True, d_conv=1), torch.randn(1, 12, 16).double(), 5
    other = x.clone()
    other[:, t] += 1
    changed = ((mixer.matrix(other) - mixer.matrix(x)).abs() > 1e-12)[0].any(0)
    if kind == "quasiseparable":
        # a product of decays from j to i contains t when t lies between; reading is one step away from the row
        places = torch.arange(12)
        low, high = torch.minimum(places[:, None], places), torch.maximum(places[:, None], places)
        allowed = (low <= t) & (t <= high)
    else:
        allowed = torch.zeros(12, 12, dtype=torch.bool)
        allowed[t], allowed[:, t] = True, True
    assert not changed[~allowed].any()
    assert changed[t].any()


@every_mixer
def test_bench_gradients(kind, dependent):
    torch.manual_seed(0)
    mixer = MatrixMixer(kind, dependent, 4, 2, 5, d_conv=3, headdim=4).double()
    x = torch.randn(1, 4, 4, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*mixer.named_parameters(), strict=True)

    def run(x, *values):
        return torch.func.functional_call(mixer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)


@every_mixer
@pytest.mark.parametrize("longest", [None, 20])
def test_bench_padding(kind, dependent, longest):
    if longest is None and not dependent:
        pytest.skip("a free matrix has a size")
    mixer, x = bench(kind, dependent, longest), torch.randn(2, 20, 16).double()
    mask = torch.arange(20) < torch.tensor([[13], [20]])
    y = mixer(x.masked_fill(~mask[..., None], torch.nan), mask)
    assert (y[0, 13:] == 0).all()
    assert torch.allclose(y[0, :13], mixer(x[:1, :13])[0], atol=1e-10)
    assert torch.allclose(y[1], mixer(x[1:])[0], atol=1e-10)
    assert mixer(x, torch.zeros(2, 20, dtype=torch.bool)).isfinite().all()


@every_mixer
def test_bench_in_low_precision_and_beyond_its_length(kind, dependent, without_shape_checks):
    mixer, x = MatrixMixer(kind, dependent, 16, 3, 12, headdim=8), torch.randn(2, 12, 16)
    want = mixer(x)
    low = copy.deepcopy(mixer).bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    assert (low.float() - want).abs().max() < 0.08 * want.abs().max()
    half = copy.deepcopy(mixer).half()(x.half())
    assert (half.float() - want).abs().max() < 0.02 * want.abs().max()
    if dependent:
        assert mixer(torch.randn(1, 40, 16)).shape == (1, 40, 16)
    else:
        with pytest.raises(ValueError, match=r"x has length 13, .* max_seq_len=12"):
            mixer(torch.randn(1, 13, 16))
    with pytest.raises(ValueError, match="length of at least 1"):
        mixer(x[:, :0])


def test_learned_vandermonde_mixes_tokens():
    mixer, x = bench("vandermonde", False, dft=False, d_conv=1), torch.randn(1, 12, 16).double()
    other = x.clone()
    other[:, 3] += 1
    assert ((mixer(other) - mixer(x)).abs().amax(-1) > 1e-9).all()
    assert torch.allclose(
        mixer.matrix(x)[0, :, 2, 7],
        (
            (2 * math.pi * mixer.matrix_mixer.q_bias[:, :, 2] * 7).cos()
            + (2 * math.pi * mixer.matrix_mixer.k_bias[:, :, 7] * 2).cos()
        ).sum(-1)
        / math.sqrt(2 * 12 * 3),
    )


@pytest.mark.parametrize(
    ("message", "args", "settings"),
    [
        ("kind must be one of dense", ("hankel", True, 16), {}),
        ("dense matrix cannot", ("dense", True, 16), {}),
        ("max_seq_len must be at least 1", ("cauchy", False, 16), {}),
        ("qk_dim must be", ("cauchy", True, 16, 0), {}),
        ("headdim must divide", ("cauchy", True, 16), {"headdim": 9}),
        ("max_seq_len must be at least 1, or None", ("low_rank", True, 16, 4, 0), {}),
        ("max_seq_len must be at least 1, or None", ("low_rank", True, 16, 4, -3), {}),
        ("official_indexing is of toeplitz", ("low_rank", True, 16), {"official_indexing": True}),
        ("backend must be", ("quasiseparable", True, 16), {"backend": "fast"}),
    ],
)
def test_wrong_bench(message, args, settings, without_shape_checks):
    with pytest.raises(ValueError, match=message):
        MatrixMixer(*args, **{"headdim": 8, **settings})


def test_cauchy_gradients_are_finite_where_exponentials_are_not():
    x = (100 * torch.randn(1, 4, 3)).requires_grad_()
    found = cauchy_matrix(x, -x)
    torch.testing.assert_close(found.double(), cauchy_matrix(x.detach().double(), -x.detach().double()))
    found.sum().backward()
    assert x.grad.isfinite().all()


def test_runs_on_the_meta_device_where_costs_are_counted():
    layer = HydraMixer(16, d_state=4, headdim=8).to("meta")
    assert layer(torch.zeros(2, 6, 16, device="meta")).shape == (2, 6, 16)


def test_an_empty_batch_of_packed_sequences_is_empty():
    assert block()(torch.zeros(0, 6, 16).double(), seq_idx=torch.zeros(0, 6).long()).shape == (0, 6, 16)


# ---- models of transformers

transformers = pytest.importorskip("transformers")
SMALL = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
TEXTS = dict(SMALL, vocab_size=60, max_position_embeddings=40)


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**TEXTS))


def roberta():
    return transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**TEXTS))


def distilbert():
    config = transformers.DistilBertConfig(vocab_size=60, dim=32, n_layers=3, n_heads=2, hidden_dim=32)
    return transformers.DistilBertForTokenClassification(config)


def vit():
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, image_size=16, patch_size=4))


def small_mixer(width):
    return HydraMixer(width, d_state=4, headdim=16)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [bert, roberta, distilbert])
def test_replacement_in_text_encoders(make, implementation, tmp_path):
    torch.manual_seed(0)
    model = make().eval()
    model.set_attn_implementation(implementation)
    ids = torch.randint(3, 60, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    before = model(ids, attention_mask=mask).logits
    report = replace_attention(model, small_mixer)
    assert len(report.replaced) == 3
    after = model(ids, attention_mask=mask).logits
    assert not torch.allclose(before, after)
    alone = model(ids[:1, :8]).logits
    assert torch.allclose(after[:1, :8] if alone.ndim == 3 else after[:1], alone, atol=1e-5)
    assert not torch.allclose(alone, model(torch.cat([ids[:1, 4:8], ids[:1, 4:8]], 1)).logits, atol=1e-4)
    after.sum().backward()
    assert all(p.grad is not None for entry in report.replaced for p in entry.new.parameters())
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    twin = make().eval()
    replace_attention(twin, small_mixer)
    twin.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(twin(ids, attention_mask=mask).logits, after)
    report.undo()
    assert torch.equal(model(ids, attention_mask=mask).logits, before)


def test_replacement_in_vit_and_in_some_layers():
    model, x = vit().eval(), torch.randn(2, 3, 16, 16)
    before = model(x).logits
    report = replace_attention(model, lambda width: MatrixMixer("low_rank", True, width, headdim=16), layers=[0, -1])
    assert len(report.replaced) == 2
    assert not torch.allclose(model(x).logits, before)
    model(x).logits.sum().backward()
    kinds = [type(layer.attention).__name__ for layer in model.vit.layers]
    assert kinds == ["MixerAttention", "ViTAttention", "MixerAttention"]
    found = model.vit.layers[0].attention(torch.randn(1, 5, 32))
    assert isinstance(found, tuple)
    assert found[1] is None


def test_replacement_refuses_what_is_not_bidirectional():
    small = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=60)
    decoder = transformers.BertConfig(**TEXTS, is_decoder=True)
    for model, message in [
        (transformers.GPT2LMHeadModel(small), "is causal"),
        (transformers.BertLMHeadModel(decoder), "is causal"),
        (nn.Sequential(nn.Linear(2, 2)), "no self-attention that can be replaced"),
    ]:
        before = [type(m) for m in model.modules()]
        with pytest.raises(ValueError, match=message):
            replace_attention(model, small_mixer)
        assert [type(m) for m in model.modules()] == before
    model = bert()
    for layers in ([3], [-4], []):
        with pytest.raises(ValueError, match="layers must name some of the 3 layers"):
            replace_attention(model, small_mixer, layers=layers)
    attention = replace_attention(model, small_mixer).replaced[0].new
    x, causal = torch.randn(1, 5, 32), torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    for mask in (causal, torch.zeros(1, 1, 5, 5).masked_fill(~causal, -1e9)):
        with pytest.raises(ValueError, match="differs from query to query"):
            attention(x, mask)
    with pytest.raises(ValueError, match="encoder_hidden_states was given"):
        attention(x, encoder_hidden_states=x)


TINY = dict(vocab_size=60, hidden_size=32, num_hidden_layers=2, d_state=4, headdim=16, qk_dim=2)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"is_prenorm": True, "use_position_embeddings": True, "pool_all": True, "n_groups": 2},
        {"mixer": "cauchy", "max_position_embeddings": 16},
        {"mixer": "quasiseparable", "data_dependent": False, "max_position_embeddings": 16},
    ],
)
@pytest.mark.parametrize("kind", [HydraModel, HydraForMaskedLM, HydraForSequenceClassification])
def test_models_save_load_and_take_padding(kind, settings, tmp_path):
    torch.manual_seed(0)
    model = kind(HydraConfig(**TINY, **settings)).eval()
    ids = torch.randint(1, 60, (2, 12))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    y = model(ids, attention_mask=mask)[0]
    alone = model(ids[1:, :9])[0]
    assert torch.allclose(y[1:, :9] if y.ndim == 3 else y[1:], alone, atol=1e-5)
    model.save_pretrained(tmp_path)
    auto = {
        HydraModel: transformers.AutoModel,
        HydraForMaskedLM: transformers.AutoModelForMaskedLM,
        HydraForSequenceClassification: transformers.AutoModelForSequenceClassification,
    }[kind]
    again = auto.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids, attention_mask=mask)[0], y)
    assert again.config.mixer == settings.get("mixer", "hydra")


def test_models_start_as_their_mixers_do(tmp_path):
    config = HydraConfig(**TINY)
    HydraModel(config).save_pretrained(tmp_path)
    # the head is new: what is loaded must stay, what is missing must be a fresh start and not empty memory
    model = HydraForSequenceClassification.from_pretrained(tmp_path)
    assert all(p.isfinite().all() for p in model.parameters())
    mixers = [m for m in HydraModel(config).modules() if isinstance(m, HydraMixer)]
    assert not torch.equal(mixers[0].dt_bias, mixers[1].dt_bias)
    assert all((m.D == 1).all() and (m.A_log == 0).all() for m in mixers)


def test_masked_language_model_learns_and_is_tied():
    torch.manual_seed(0)
    model = HydraForMaskedLM(HydraConfig(**TINY, hidden_dropout_prob=0.0))
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    ids = torch.arange(1, 41).view(2, 20)
    labels = ids.masked_fill(torch.rand(2, 20) > 0.3, -100)
    optimizer = torch.optim.AdamW(weight_decay_groups(model, 1e-5), lr=1e-2)
    losses = []
    for _ in range(25):
        loss = model(ids.masked_fill(labels >= 0, 0), labels=labels).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]
    model.gradient_checkpointing_enable()
    loss = model(ids, labels=labels).loss
    loss.backward()
    assert len(model(ids, output_hidden_states=True).hidden_states) == 3


def test_classifier_losses():
    ids = torch.arange(12).view(2, 6)
    for settings, labels in (({}, torch.tensor([0, 1])), ({"num_labels": 1}, torch.tensor([0.5, 1.0]))):
        found = HydraForSequenceClassification(HydraConfig(**TINY, **settings))(ids, labels=labels)
        assert found.loss.ndim == 0
        assert found.loss.isfinite()


def test_wrong_input_of_the_models(without_shape_checks):
    model, ids = HydraModel(HydraConfig(**TINY)), torch.arange(12).view(2, 6)
    for message, call in [
        ("either input_ids or inputs_embeds", lambda: model()),
        ("length 0", lambda: model(ids[:, :0])),
        ("output_attentions", lambda: model(ids, output_attentions=True)),
        ("attention_mask must have shape", lambda: model(ids, attention_mask=torch.ones(2, 5))),
        ("is_decoder", lambda: HydraConfig(is_decoder=True)),
        ("length 6, but max_position_embeddings is 4",
         lambda: HydraModel(HydraConfig(**TINY, use_position_embeddings=True, max_position_embeddings=4))(ids)),
        ("not that of a Hydra", lambda: load_published({"a": ids})),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()


def test_published_checkpoints(tmp_path):
    model = HydraForMaskedLM(HydraConfig(**TINY, is_prenorm=True)).eval()
    names = set(model.state_dict())
    # the names that BertForMaskedLM of hydra/bert/src/bert_layers.py at 55bef74 gives its weights
    for name in (
        "bert.embeddings.LayerNorm.weight", "bert.embeddings.token_type_embeddings.weight",
        "bert.encoder.layer.1.layer.mixer.in_proj.weight", "bert.encoder.layer.1.layer.norm.bias",
        "bert.encoder.norm_f.weight", "cls.predictions.transform.dense.weight",
        "cls.predictions.transform.LayerNorm.weight", "cls.predictions.decoder.bias",
    ):  # fmt: skip
        assert name in names
    official = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state": {"model": official}}, tmp_path / "latest-rank0.pt")
    ids = torch.arange(12).view(2, 6)
    again = load_published(tmp_path / "latest-rank0.pt")
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert (again.config.d_state, again.config.headdim, again.config.is_prenorm) == (4, 16, True)
    official.pop("model.bert.encoder.layer.1.layer.mixer.dt_bias")
    with pytest.raises(ValueError, match=r"missing \['bert.encoder.layer.1.layer.mixer.dt_bias'\]"):
        load_published(official)
    official.pop("model.bert.embeddings.token_type_embeddings.weight")
    with pytest.raises(ValueError, match=r"missing \['bert.embeddings.token_type_embeddings.weight'\]"):
        load_published(official)

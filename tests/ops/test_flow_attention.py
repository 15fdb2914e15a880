import math
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torchgraft.ops.flow_attention import (
    FlowState,
    flow_attention,
    flow_attention_state,
    flow_attention_step,
    flow_attention_weights,
)

DOUBLE = torch.float64
switches = pytest.mark.parametrize(
    ("competition", "allocation"), [(True, True), (True, False), (False, True), (False, False)]
)
both_clamps = pytest.mark.parametrize("clamp", [(-1.0, 1.0), None])


def qkv(sinks=13, sources=13, heads=2, features=5, values=7, batch=2, seed=0, dtype=DOUBLE):
    g = torch.Generator().manual_seed(seed)

    def draw(length, width):
        return torch.randn(batch, heads, length, width, generator=g, dtype=dtype)

    return draw(sinks, features), draw(sources, features), draw(sources, values)


def by_loops(q, k, v, causal, clamp, competition, allocation, eps=1e-6):
    """The equations of the paper and card, one token at a time, Python sums only; one head."""
    q, k = q.sigmoid(), k.sigmoid()
    L, S = len(q), len(k)

    def dot(a, b):
        return sum((x + eps) * (y + eps) for x, y in zip(a.tolist(), b.tolist(), strict=True))

    def total(rows):
        return torch.stack(list(rows)).sum(0)

    past = (lambda i: range(i + 1)) if causal else (lambda i: range(S))
    behind = (lambda j: range(j + 1)) if causal else (lambda j: range(L))
    n = (lambda i: i + 1) if causal else (lambda i: 1)
    I = [dot(q[i], total(k[j] for j in past(i))) for i in range(L)]
    O = [dot(k[j], total(q[i] for i in behind(j))) for j in range(S)]
    Ihat = [dot(q[i], total(k[j] * n(j) / O[j] for j in past(i))) / n(i) for i in range(L)]
    Ohat = [dot(k[j], total(q[i] * n(i) / I[i] for i in behind(j))) / n(j) for j in range(S)]
    if clamp:
        Ohat = [min(max(o, clamp[0]), clamp[1]) for o in Ohat]
    if causal:
        c = [(j + 1) * math.exp(Ohat[j]) / sum(math.exp(Ohat[m]) for m in range(j + 1)) for j in range(S)]
        r = [1 / (1 + math.exp(-x)) for x in Ihat]
    else:
        c = [S * math.exp(o) / sum(map(math.exp, Ohat)) for o in Ohat]
        r = [1 / (1 + math.exp(-x * L / S)) for x in Ihat]
    c = c if competition else [1.0] * S
    r = r if allocation else [1.0] * L
    return torch.stack([r[i] / I[i] * total(float(q[i] @ k[j]) * c[j] * v[j] for j in past(i)) for i in range(L)])


@switches
@both_clamps
@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_equations(causal, clamp, competition, allocation):
    q, k, v = qkv(7, 7 if causal else 10, heads=1, batch=1)
    settings = dict(clamp=clamp, competition=competition, allocation=allocation)
    expected = by_loops(q[0, 0], k[0, 0], v[0, 0], causal, **settings)
    torch.testing.assert_close(
        flow_attention(q, k, v, is_causal=causal, chunk_size=3, **settings)[0, 0], expected, atol=1e-12, rtol=1e-12
    )


@switches
@both_clamps
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(DOUBLE, 1e-12), (torch.float32, 2e-6)])
def test_implied_matrix_times_values_is_the_fast_path(causal, clamp, competition, allocation, dtype, tolerance):
    q, k, v = qkv(37, 37 if causal else 21, dtype=dtype)
    settings = dict(is_causal=causal, clamp=clamp, competition=competition, allocation=allocation)
    slow = flow_attention_weights(q, k, **settings) @ v
    torch.testing.assert_close(flow_attention(q, k, v, chunk_size=16, **settings), slow, atol=tolerance, rtol=tolerance)


def test_flows_are_conserved():
    q, k, _ = qkv(11, 17)
    L, S = 11, 17
    plain = flow_attention_weights(q, k, eps=0, competition=False, allocation=False)
    torch.testing.assert_close(plain.sum(-1), torch.ones(2, 2, L, dtype=DOUBLE))
    compete = flow_attention_weights(q, k, eps=0, allocation=False) / plain
    torch.testing.assert_close(compete[..., 0, :].sum(-1), torch.full((2, 2), float(S), dtype=DOUBLE))
    gate = (flow_attention_weights(q, k, eps=0, competition=False) / plain)[..., 0]
    conserved_in = torch.logit(gate) * S / L
    torch.testing.assert_close(conserved_in.mean(-1), torch.full((2, 2), S / L, dtype=DOUBLE))
    # without the clamp, log c is the conserved outgoing flow up to a constant; its mean is L / S
    flow = (
        (k.sigmoid())
        * (q.sigmoid() / (q.sigmoid() * k.sigmoid().sum(2, keepdim=True)).sum(-1, keepdim=True)).sum(2, keepdim=True)
    ).sum(-1)
    torch.testing.assert_close(flow.mean(-1), torch.full((2, 2), L / S, dtype=DOUBLE))
    free = flow_attention_weights(q, k, eps=0, allocation=False, clamp=None) / plain
    torch.testing.assert_close(free[..., 0, :], S * flow.softmax(-1))


def test_the_official_clamp_cuts_about_half_of_the_sources():
    q, k, v = qkv(256, 256, heads=8, features=32)
    levelled = flow_attention_weights(q, k, allocation=False) / flow_attention_weights(
        q, k, competition=False, allocation=False
    )
    competition = levelled[..., 0, :]
    at_the_top = torch.isclose(competition, competition.amax(-1, keepdim=True), rtol=1e-9).double().mean()
    assert 0.4 < at_the_top < 0.6
    assert not torch.allclose(flow_attention(q, k, v), flow_attention(q, k, v, clamp=None), atol=1e-6)


def test_constant_values():
    q, k, _ = qkv()
    v = torch.full((2, 2, 13, 1), 3.0, dtype=DOUBLE)
    same_keys = k[:, :, :1].expand_as(k)
    gate = flow_attention(q, same_keys, v) / 3
    gate_alone = (
        flow_attention_weights(q, same_keys)[..., 0] / flow_attention_weights(q, same_keys, allocation=False)[..., 0]
    )
    torch.testing.assert_close(gate[..., 0], gate_alone, atol=1e-5, rtol=1e-5)


def test_permutations():
    q, k, v = qkv(9, 12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(flow_attention(q, k[:, :, order], v[:, :, order]), flow_attention(q, k, v))
    turn = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(flow_attention(q[:, :, turn], k, v), flow_attention(q, k, v)[:, :, turn])


def test_causal_outputs_have_no_gradient_to_the_future():
    q, k, v = (x.requires_grad_() for x in qkv())
    for i in (0, 5, 11):
        for gradient in torch.autograd.grad(
            flow_attention(q, k, v, is_causal=True, chunk_size=4)[:, :, i].sum(), (q, k, v)
        ):
            assert gradient[:, :, i + 1 :].abs().max() == 0
            assert gradient[:, :, i].abs().max() > 0 or i == 0


def test_the_first_causal_output_is_a_gated_value():
    q, k, v = qkv()
    sink, source = q.sigmoid()[:, :, 0], k.sigmoid()[:, :, 0]
    gate = ((sink * source).sum(-1) / (sink * source).sum(-1)).sigmoid()
    first = flow_attention(q, k, v, is_causal=True, eps=0)[:, :, 0]
    torch.testing.assert_close(first, gate[..., None] * v[:, :, 0])


@both_clamps
@switches
def test_step_by_step_equals_parallel(clamp, competition, allocation):
    q, k, v = qkv(40, 40, dtype=torch.float32)
    settings = dict(clamp=clamp, competition=competition, allocation=allocation)
    state, outputs = FlowState.empty(2, 2, 5, 7, q), []
    for t in range(40):
        y, state = flow_attention_step(q[:, :, t], k[:, :, t], v[:, :, t], state, **settings)
        outputs.append(y)
    parallel = flow_attention(q, k, v, is_causal=True, chunk_size=16, **settings)
    torch.testing.assert_close(torch.stack(outputs, 2), parallel, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [1, 16, 33])
def test_chunk_sizes_agree(length):
    q, k, v = qkv(length, length)
    results = [flow_attention(q, k, v, is_causal=True, chunk_size=c) for c in (1, 16, length, 1000)]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_samples_equal_each_sample_alone(causal, side):
    q, k, v = qkv(12, 12, batch=3)
    q, k, v = (x.clone() for x in (q, k, v))
    padding = torch.zeros(3, 12, dtype=torch.bool)
    kept = [
        slice(0, 12),
        slice(4, 12) if side == "left" else slice(0, 8),
        slice(11, 12) if side == "left" else slice(0, 1),
    ]
    for row, keep in enumerate(kept):
        padding[row] = True
        padding[row, keep] = False
    for x in (q, k, v):
        x[padding[:, None, :, None].expand_as(x)] = torch.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    together = flow_attention(q, k, v, is_causal=causal, key_padding_mask=padding, chunk_size=5)
    for row, keep in enumerate(kept):
        alone = flow_attention(*(x[row : row + 1, :, keep] for x in (q, k, v)), is_causal=causal)
        torch.testing.assert_close(together[row : row + 1, :, keep], alone)
    assert (together[padding[:, None, :, None].expand_as(together)] == 0).all()
    for gradient in torch.autograd.grad(together.sum(), leaves):
        assert gradient.isfinite().all()


def test_cross_attention_with_both_paddings():
    q, k, v = qkv(6, 9, batch=2)
    sources, sinks = torch.zeros(2, 9, dtype=torch.bool), torch.zeros(2, 6, dtype=torch.bool)
    sources[1, 5:], sinks[1, 4:] = True, True
    together = flow_attention(q, k, v, key_padding_mask=sources, query_padding_mask=sinks)
    torch.testing.assert_close(together[1:, :, :4], flow_attention(q[1:, :, :4], k[1:, :, :5], v[1:, :, :5]))


def test_without_flows_it_is_plain_normalised_linear_attention():
    q, k, v = qkv()
    sink, source = (torch.nn.functional.elu(x) + 1 for x in (q, k))
    scores = sink @ source.transpose(-1, -2)
    plain = flow_attention(q, k, v, feature_map="elu", competition=False, allocation=False, eps=0)
    torch.testing.assert_close(plain, (scores / scores.sum(-1, keepdim=True)) @ v)
    scores = scores.tril()
    causal = flow_attention(q, k, v, is_causal=True, feature_map="elu", competition=False, allocation=False, eps=0)
    torch.testing.assert_close(causal, (scores / scores.sum(-1, keepdim=True)) @ v)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_gradcheck(causal, padded):
    inputs = [x.requires_grad_() for x in qkv(5, 5, heads=1, features=3, values=2)]
    mask = torch.tensor([[False] * 5, [True, True, False, False, False]]) if padded else None
    assert torch.autograd.gradcheck(
        lambda q, k, v: flow_attention(q, k, v, is_causal=causal, key_padding_mask=mask, chunk_size=2, clamp=None),
        inputs,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_half_precision_is_computed_in_float32(dtype, causal):
    # sums over 3,000 tokens of 64 features exceed the range of float16
    q, k, v = (x.to(dtype) for x in qkv(3000, 3000, heads=1, features=64, batch=1, dtype=torch.float32))
    y = flow_attention(q, k, v, is_causal=causal)
    assert y.dtype == dtype
    exact = flow_attention(q.double(), k.double(), v.double(), is_causal=causal)
    torch.testing.assert_close(y.double(), exact, atol=2 * torch.finfo(dtype).eps, rtol=2 * torch.finfo(dtype).eps)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = flow_attention(q.float(), k.float(), v.float(), is_causal=causal)
    torch.testing.assert_close(inside.double(), exact, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
def test_the_implied_matrix_in_half_precision_is_computed_in_float32(causal):
    # sums over 9,000 tokens of 64 features exceed the range of float16
    q, k, _ = (x.half() for x in qkv(16, 16, heads=1, features=64, batch=1, dtype=torch.float32))
    if not causal:
        k = k.repeat(1, 1, 600, 1)
    weights = flow_attention_weights(q, k, is_causal=causal)
    assert weights.dtype == torch.float16
    exact = flow_attention_weights(q.double(), k.double(), is_causal=causal)
    torch.testing.assert_close(weights.double(), exact, atol=1e-6, rtol=2e-3)


def test_a_step_under_autocast_is_computed_in_float32():
    q, k, v = qkv(6, 6, dtype=torch.float32)
    state = flow_attention_state(q[:, :, :5], k[:, :, :5], v[:, :, :5])
    last = (q[:, :, 5], k[:, :, 5], v[:, :, 5])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, _ = flow_attention_step(*last, state)
    assert torch.equal(inside, flow_attention_step(*last, state)[0])


class Largest(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("causal", [False, True])
def test_no_tensor_is_quadratic_or_holds_a_state_per_token(causal):
    length, features = 2048, 32
    q, k, v = (x.requires_grad_() for x in qkv(length, length, 1, features, features, 1, dtype=torch.float32))
    with Largest() as seen:
        flow_attention(q, k, v, is_causal=causal, chunk_size=64).sum().backward()
    assert seen.numel <= length * 64, "one chunk-wide row a token is the most that linear memory allows"


def test_compiles_without_a_graph_break():
    # in a process of its own: the run-time shape checks of this suite cannot be traced, and users do not have them
    code = """
import torch
from torchgraft.ops.flow_attention import flow_attention
q, k, v = torch.randn(3, 2, 2, 20, 5).unbind()
compiled = torch.compile(flow_attention, fullgraph=True, backend="aot_eager")
for causal in (False, True):
    for mask in (None, torch.arange(20) >= torch.tensor([[20], [15]])):
        settings = dict(is_causal=causal, key_padding_mask=mask)
        torch.testing.assert_close(compiled(q, k, v, **settings), flow_attention(q, k, v, **settings))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(q=torch.randn(2, 13, 5)), ValueError, "q must have shape"),
        (dict(q=torch.randn(2, 2, 13, 4)), ValueError, "same features"),
        (dict(q=torch.randn(2, 2, 9, 5), is_causal=True), ValueError, "as many queries as keys"),
        (dict(k=torch.randn(2, 1, 13, 5)), ValueError, "repeat grouped"),
        (dict(q=torch.ones(2, 2, 13, 5, dtype=torch.int64)), TypeError, "floating-point"),
        (dict(q=torch.randn(2, 2, 0, 5)), ValueError, "empty"),
        (dict(key_padding_mask=torch.zeros(2, 1, 13, 13, dtype=torch.bool)), ValueError, "arbitrary attention mask"),
        (dict(key_padding_mask=torch.zeros(2, 13)), TypeError, "boolean"),
        (dict(key_padding_mask=torch.ones(2, 13, dtype=torch.bool)), ValueError, "without a single source"),
        (
            dict(query_padding_mask=torch.zeros(2, 5, dtype=torch.bool)),
            ValueError,
            "query_padding_mask must have shape",
        ),
        (dict(query_padding_mask=torch.zeros(2, 13)), TypeError, "query_padding_mask must be a boolean"),
        (
            dict(query_padding_mask=torch.zeros(2, 13, dtype=torch.bool), is_causal=True),
            ValueError,
            "causal attention takes key_padding_mask for both",
        ),
        (dict(feature_map="exp"), ValueError, "'sigmoid', 'relu' or 'elu'"),
        (dict(clamp=(1.0, -1.0)), ValueError, "low < high"),
        (dict(clamp=1.0), ValueError, "low < high"),
        (dict(eps=-1.0), ValueError, "eps"),
        (dict(eps=math.nan), ValueError, "eps"),
        (dict(is_causal=True, chunk_size=0), ValueError, "chunk_size"),
    ],
)
def test_wrong_inputs(without_shape_checks, change, error, message):
    q, k, v = qkv(dtype=torch.float32)
    with pytest.raises(error, match=message):
        flow_attention(**(dict(q=q, k=k, v=v) | change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(q=torch.randn(2, 2, 1, 5)), ValueError, r"q must have shape \(batch, heads, features\)"),
        (dict(k=torch.ones(2, 2, 5, dtype=torch.int64)), TypeError, "floating-point"),
        (dict(k=torch.randn(2, 1, 5)), ValueError, r"k must have the shape that state was made for, \(2, 2, 5\)"),
        (dict(v=torch.randn(2, 2, 6)), ValueError, r"v must have the shape that state was made for, \(2, 2, 7\)"),
        (dict(state=FlowState.empty(1, 2, 5, 7, torch.zeros(1))), ValueError, r"\(1, 2, 5\), got \(2, 2, 5\)"),
        (dict(clamp=(1.0, -1.0)), ValueError, "low < high"),
    ],
)
def test_a_step_refuses_what_would_broadcast_in_silence(without_shape_checks, change, error, message):
    q, k, v = (x[:, :, 0] for x in qkv(dtype=torch.float32))
    with pytest.raises(error, match=message):
        flow_attention_step(**(dict(q=q, k=k, v=v, state=FlowState.empty(2, 2, 5, 7, q)) | change))

"""The scans against their definitions: values, gradients, cutting and continuing, steps, masks, dtypes, compile."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchgraft.ops.linear_recurrence import linear_recurrence, linear_recurrence_naive
from torchgraft.ops.long_convolution import long_convolution, long_convolution_naive
from torchgraft.ops.selective_scan import selective_scan, selective_scan_naive, selective_scan_step
from torchgraft.ops.ssd import ssd, ssd_naive, ssd_step


def selective_inputs(batch=2, length=37, channels=3, states=4, dtype=torch.float64):
    torch.manual_seed(0)
    x, delta = torch.randn(batch, length, channels), torch.rand(batch, length, channels)
    B, C = torch.randn(batch, length, states), torch.randn(batch, length, states)
    tensors = (x, delta, -torch.rand(channels, states), B, C, torch.randn(channels))
    return [t.to(dtype) for t in tensors], torch.randn(batch, channels, states).to(dtype)


def ssd_inputs(batch=2, length=37, heads=4, features=3, groups=2, states=5, dtype=torch.float64):
    torch.manual_seed(0)
    x, delta = torch.randn(batch, length, heads, features), torch.rand(batch, length, heads)
    B, C = torch.randn(batch, length, groups, states), torch.randn(batch, length, groups, states)
    tensors = (x, delta, -torch.rand(heads), B, C, torch.randn(heads))
    return [t.to(dtype) for t in tensors], torch.randn(batch, heads, features, states).to(dtype)


SCANS = pytest.mark.parametrize(
    ("scan", "naive", "step", "inputs"),
    [
        (selective_scan, selective_scan_naive, selective_scan_step, selective_inputs),
        (ssd, ssd_naive, ssd_step, ssd_inputs),
    ],
    ids=["selective_scan", "ssd"],
)


def cut(tensors, places):
    """Only x, delta, B and C have a time."""
    return [t[:, places] if i in (0, 1, 3, 4) else t for i, t in enumerate(tensors)]


@SCANS
@pytest.mark.parametrize("length", [1, 16, 37, 200])
def test_equals_the_definition_with_gradients(scan, naive, step, inputs, length):
    tensors, state = inputs(length=length)
    leaves = [t.requires_grad_() for t in [*tensors, state]]
    found, wanted = (f(*leaves[:-1], initial_state=leaves[-1]) for f in (scan, naive))
    weights = [torch.randn_like(t) for t in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-10)
    gradients = [torch.autograd.grad(sum((a * b).sum() for a, b in zip(r, weights, strict=True)), leaves)
                 for r in (found, wanted)]  # fmt: skip
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-10)


@SCANS
def test_gradcheck(scan, naive, step, inputs, monkeypatch):
    monkeypatch.setattr("torchgraft.ops.selective_scan._PLACES", 3)
    sizes = {"batch": 1, "length": 5, "states": 2}
    tensors, state = inputs(**sizes, **({"channels": 2} if inputs is selective_inputs else {"features": 2}))
    leaves = [t.requires_grad_() for t in [*tensors, state]]
    assert torch.autograd.gradcheck(lambda *t: scan(*t[:-1], initial_state=t[-1]), leaves)


@SCANS
def test_cut_and_continued_and_stepped_equal_the_whole(scan, naive, step, inputs):
    tensors, _ = inputs(length=50)
    y, last = scan(*tensors)
    first, state = scan(*cut(tensors, slice(0, 21)))
    second, state = scan(*cut(tensors, slice(21, 49)), initial_state=state)
    third, state = step(*cut(tensors, 49), state=state)
    assert torch.allclose(torch.cat([first, second, third[:, None]], 1), y, atol=1e-10)
    assert torch.allclose(state, last, atol=1e-10)


@SCANS
def test_masked_places_leave_no_trace(scan, naive, step, inputs):
    tensors, state = inputs(length=40)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, :9] = mask[1, 30:] = False
    poisoned = [t.clone() for t in tensors]
    poisoned[0][~mask] = torch.nan
    y, last = scan(*poisoned, initial_state=state, mask=mask)
    assert (y[~mask] == 0).all()
    for row in (0, 1):
        alone = [t[row : row + 1, mask[row]] if i in (0, 1, 3, 4) else t for i, t in enumerate(tensors)]
        want, want_last = scan(*alone, initial_state=state[row : row + 1])
        assert torch.allclose(y[row, mask[row]], want[0], atol=1e-10)
        assert torch.allclose(last[row], want_last[0], atol=1e-10)


@SCANS
def test_low_precision_inputs_are_scanned_in_float32(scan, naive, step, inputs):
    tensors, _ = inputs(length=40)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        low = [t.to(dtype) for t in tensors]
        y, last = scan(*low)
        want, _ = naive(*[t.double() for t in low])
        assert y.dtype == dtype
        assert last.dtype == torch.float32
        assert (y.double() - want).abs().max() <= tolerance * want.abs().max()


@SCANS
def test_strong_decay_stays_finite(scan, naive, step, inputs):
    tensors, _ = inputs(length=100, dtype=torch.float32)
    tensors[2] *= 1e4
    tensors = [t.requires_grad_() for t in tensors]
    y, _ = scan(*tensors)
    assert torch.allclose(y, naive(*tensors)[0], atol=1e-5)
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), tensors))


@SCANS
def test_wrong_input_is_named(scan, naive, step, inputs):
    tensors, state = inputs()
    x, delta, A, B, C, _ = tensors
    for message, args in [
        ("length of at least 1", cut(tensors, slice(0, 0))),
        ("x must have shape", [x[0], delta, A, B, C]),
        ("delta must have shape", [x, delta[:, 1:], A, B, C]),
        ("A must have shape", [x, delta, A[1:], B, C]),
        ("B must have shape", [x, delta, A, B[0], C]),
        ("C must have shape", [x, delta, A, B, C[..., :1]]),
    ]:
        with pytest.raises(ValueError, match=message):
            scan(*args)
    with pytest.raises(ValueError, match="initial_state must have shape"):
        scan(*tensors, initial_state=state[:1])
    with pytest.raises(TypeError, match="x must be a floating-point"):
        scan(x.long(), *tensors[1:])
    with pytest.raises(TypeError, match="boolean"):
        scan(*tensors, mask=torch.ones(2, 37))
    with pytest.raises(ValueError, match="mask must have shape"):
        scan(*tensors, mask=torch.ones(2, 36, dtype=torch.bool))


def test_chunk_size_changes_nothing():
    tensors, state = ssd_inputs(length=50)
    want = ssd(*tensors, initial_state=state)[0]
    for size in (1, 7, 50, 99):
        assert torch.allclose(ssd(*tensors, initial_state=state, chunk_size=size)[0], want, atol=1e-10)
    with pytest.raises(ValueError, match="chunk_size"):
        ssd(*tensors, chunk_size=0)


def test_decays_of_each_place():
    (x, delta, A, B, C, D), state = ssd_inputs(length=50)
    A = A * torch.rand(2, 50, 4, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, delta, A, B, C, D, state)]
    found, wanted = (f(*leaves[:-1], initial_state=leaves[-1])[0] for f in (ssd, ssd_naive))
    assert torch.allclose(found, wanted, atol=1e-10)
    for ours, theirs in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (found, wanted)), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-9)
    with pytest.raises(ValueError, match="A must have shape"):
        ssd(x, delta, A[:, 1:], B, C)


def test_ssd_is_attention_with_a_semiseparable_matrix():
    (x, delta, A, B, C, _), _ = ssd_inputs(batch=1, length=12, heads=1, groups=1)
    decay = (delta[0, :, 0] * A).cumsum(0)
    matrix = (C[0, :, 0] @ B[0, :, 0].T) * (decay[:, None] - decay).exp().tril()
    assert torch.allclose(ssd(x, delta, A, B, C)[0][0, :, 0], matrix @ (x * delta[..., None])[0, :, 0], atol=1e-10)


def test_equal_decays_make_both_scans_the_same():
    (x, delta, A, B, C, D), _ = ssd_inputs(length=20, heads=4, features=1, groups=1)
    together, _ = ssd(x, delta, A, B, C, D)
    alone, _ = selective_scan(x[..., 0], delta, A[:, None].expand(-1, 5), B[:, :, 0], C[:, :, 0], D)
    assert torch.allclose(together[..., 0], alone, atol=1e-10)


def test_large_inputs_are_cut_into_blocks(monkeypatch):
    tensors, state = selective_inputs(length=100)
    want = selective_scan(*tensors, initial_state=state)
    monkeypatch.setattr("torchgraft.ops.selective_scan._BLOCK", 1000)
    for ours, theirs in zip(selective_scan(*tensors, initial_state=state), want, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_compiled_without_breaks(without_shape_checks):
    tensors, _ = selective_inputs(length=40)
    tensors = [t.requires_grad_() for t in tensors]
    compiled = torch.compile(lambda *t: selective_scan(*t)[0], fullgraph=True, backend="aot_eager")
    y = compiled(*tensors)
    assert torch.allclose(y, selective_scan(*tensors)[0])
    for ours, theirs in zip(torch.autograd.grad(y.sum(), tensors),
                            torch.autograd.grad(selective_scan(*tensors)[0].sum(), tensors), strict=True):  # fmt: skip
        assert torch.allclose(ours, theirs)
    leaves = [
        t.detach().requires_grad_() for t in (tensors[0], *tensors[1:5], torch.zeros(2, 3, 4, dtype=torch.float64))
    ]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.torchgraft.selective_scan.default, tuple(leaves), test_utils=tests)


def recurrence_inputs(length, is_complex, constant):
    torch.manual_seed(0)
    shape = (3,) if constant else (2, length, 3)
    dtype = torch.complex128 if is_complex else torch.float64
    a = torch.rand(shape, dtype=torch.float64)
    a = torch.polar(a, 6 * torch.rand_like(a)) if is_complex else a
    tensors = a, torch.randn(2, length, 3, dtype=dtype), torch.randn(2, 3, dtype=dtype)
    return [t.requires_grad_() for t in tensors]


@pytest.mark.parametrize("length", [1, 32, 33, 1100])
@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("constant", [False, True])
def test_recurrence_equals_the_definition_with_gradients(length, is_complex, constant):
    a, b, state = recurrence_inputs(length, is_complex, constant)
    found, wanted = (f(a, b, initial_state=state) for f in (linear_recurrence, linear_recurrence_naive))
    assert torch.allclose(found, wanted, atol=1e-11)
    weights = torch.randn_like(wanted)
    gradients = [torch.autograd.grad((h * weights).real.sum(), (a, b, state)) for h in (found, wanted)]
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-9)


def test_recurrence_is_twice_differentiable(monkeypatch):
    monkeypatch.setattr("torchgraft.ops.linear_recurrence._PLACES", 2)
    a, b, _ = recurrence_inputs(7, True, False)
    assert torch.autograd.gradcheck(linear_recurrence, (a, b))
    a, b, _ = recurrence_inputs(5, False, True)
    assert torch.autograd.gradgradcheck(linear_recurrence, (a, b))


def test_recurrence_cut_masked_and_in_low_precision():
    a, b, state = (t.detach() for t in recurrence_inputs(90, False, False))
    whole = linear_recurrence(a, b, initial_state=state)
    begin = linear_recurrence(a[:, :40], b[:, :40], initial_state=state)
    rest = linear_recurrence(a[:, 40:], b[:, 40:], initial_state=begin[:, -1])
    assert torch.allclose(torch.cat([begin, rest], 1), whole, atol=1e-12)
    mask = torch.ones(2, 90, dtype=torch.bool)
    mask[0, 10:20] = False
    kept = linear_recurrence(a, b, initial_state=state, mask=mask)
    alone = linear_recurrence(a[:1, mask[0]], b[:1, mask[0]], initial_state=state[:1])
    assert torch.allclose(kept[0, mask[0]], alone[0], atol=1e-12)
    assert torch.equal(kept[0, 19], kept[0, 9])
    assert linear_recurrence(a.bfloat16(), b.bfloat16()).dtype == torch.float32


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 90), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_long_convolution_equals_the_toeplitz_product(length, taps, dtype):
    x, kernel, bias = torch.randn(2, length, 3).to(dtype), torch.randn(3, taps).to(dtype), torch.randn(3).to(dtype)
    y = long_convolution(x, kernel, bias)
    want = long_convolution_naive(x.double(), kernel.double(), bias.double())
    assert y.dtype == dtype
    assert torch.allclose(y.double(), want, atol={8: 1e-10, 4: 1e-4, 2: 0.1 * float(want.abs().max())}[dtype.itemsize])


@pytest.mark.parametrize("taps", [1, 5, 39, 101])
def test_centred_convolution_looks_both_ways(taps):
    x, kernel = torch.randn(2, 20, 3, dtype=torch.float64), torch.randn(3, taps, dtype=torch.float64)
    want = torch.nn.functional.conv1d(x.mT, kernel.flip(1)[:, None], padding=taps // 2, groups=3).mT
    assert torch.allclose(long_convolution(x, kernel, bidirectional=True), want, atol=1e-10)
    assert torch.autograd.gradcheck(lambda *t: long_convolution(*t, bidirectional=True),
                                    (x[:1, :6].requires_grad_(), kernel.requires_grad_()))  # fmt: skip


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: linear_recurrence(x[0, 0], x[0]), ValueError, "b must have shape"),
        (lambda x: linear_recurrence(x[:, 1:], x), ValueError, "a must have shape"),
        (lambda x: linear_recurrence(x, x[:, :0]), ValueError, "length of at least 1"),
        (lambda x: linear_recurrence(x, x, initial_state=x[0]), ValueError, "initial_state"),
        (lambda x: linear_recurrence(x.long(), x), TypeError, "a must be"),
        (lambda x: long_convolution(x, x[0]), ValueError, "kernel must have shape"),
        (lambda x: long_convolution(x[0], x[0]), ValueError, "x must have shape"),
        (lambda x: long_convolution(x, torch.ones(3, 4), bidirectional=True), ValueError, "odd"),
        (lambda x: long_convolution(x, torch.ones(3, 4), torch.ones(2)), ValueError, "bias"),
        (lambda x: long_convolution(x, torch.ones(3, 4).long()), TypeError, "kernel"),
    ],
)
def test_wrong_recurrences_and_convolutions(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.rand(2, 5, 3))

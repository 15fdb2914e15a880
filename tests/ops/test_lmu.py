"""The Legendre memory against its definition: values, gradients, cutting, steps, masks, dtypes, compile, errors."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import cont2discrete

from torchgraft.ops.lmu import (
    legendre,
    lmu_kernel,
    lmu_matrices,
    lmu_memory,
    lmu_memory_naive,
    lmu_memory_step,
    lmu_readout,
)


def inputs(batch=2, length=37, order=5, theta=12.0, signals=None, dtype=torch.float64):
    torch.manual_seed(0)
    A, B = lmu_matrices(order, theta)
    shape = (batch,) if signals is None else (batch, signals)
    u = torch.randn(batch, length, *shape[1:], dtype=dtype)
    return u, A.to(dtype), B.to(dtype), torch.randn(*shape, order, dtype=dtype)


@pytest.mark.parametrize("method", ["zoh", "bilinear"])
@pytest.mark.parametrize(("order", "theta"), [(1, 3.0), (6, 4.5), (64, 784.0), (256, 128.0)])
def test_matrices_are_those_of_the_paper_discretised_by_scipy(order, theta, method):
    i, j = np.meshgrid(np.arange(order), np.arange(order), indexing="ij")
    A = (2 * i + 1) / theta * np.where(i < j, -1.0, (-1.0) ** (i - j + 1))
    B = ((2 * np.arange(order) + 1) * (-1.0) ** np.arange(order) / theta)[:, None]
    wanted = cont2discrete((A, B, np.ones((1, order)), np.zeros((1, 1))), 1.0, method)
    found = lmu_matrices(order, theta, method)
    np.testing.assert_allclose(found[0], wanted[0], atol=1e-10)
    np.testing.assert_allclose(found[1][:, None], wanted[1], atol=1e-10)
    assert torch.linalg.eigvals(found[0]).abs().max() < 1


@pytest.mark.parametrize("signals", [None, 3])
@pytest.mark.parametrize("length", [1, 16, 37, 130])
def test_equals_the_definition_with_gradients(length, signals):
    leaves = [t.requires_grad_() for t in inputs(length=length, signals=signals)]
    found, wanted = (f(*leaves[:3], initial_state=leaves[3]) for f in (lmu_memory, lmu_memory_naive))
    weights = [torch.randn_like(t) for t in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-9)
    gradients = [
        torch.autograd.grad(sum((a * b).sum() for a, b in zip(r, weights, strict=True)), leaves)
        for r in (found, wanted)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-8)


def test_gradcheck():
    u, A, B, state = (t.requires_grad_() for t in inputs(batch=1, length=4, order=2, theta=3.0))
    weight = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: lmu_memory(*t[:3], initial_state=t[3]), (u, A, B, state))
    assert torch.autograd.gradcheck(lambda *t: lmu_readout(*t[:4], initial_state=t[4]), (u, A, B, weight, state))


def test_readout_is_the_weighted_memory():
    u, A, B, state = inputs(length=50)
    weight = torch.randn(7, 5, dtype=torch.float64)
    mask = torch.rand(2, 50) < 0.7
    for options in ({}, {"initial_state": state}, {"initial_state": state, "mask": mask}, {"mask": mask}):
        y, last = lmu_readout(u, A, B, weight, **options)
        m, want = lmu_memory(u, A, B, **options)
        torch.testing.assert_close(y, m @ weight.mT, atol=1e-11, rtol=1e-9)
        torch.testing.assert_close(last, want)


def test_cut_and_continued_and_stepped_equal_the_whole():
    u, A, B, _ = inputs(length=50, signals=2)
    m, last = lmu_memory(u, A, B)
    first, state = lmu_memory(u[:, :21], A, B)
    second, state = lmu_memory(u[:, 21:49], A, B, initial_state=state)
    third = lmu_memory_step(u[:, 49], A, B, state)
    torch.testing.assert_close(torch.cat([first, second, third[:, None]], 1), m, atol=1e-11, rtol=1e-9)
    torch.testing.assert_close(third, last, atol=1e-11, rtol=1e-9)


def test_float32_stays_with_the_recurrence_in_the_paper_s_setting():
    torch.manual_seed(0)
    A, B = lmu_matrices(256, 128.0)
    u = torch.rand(2, 300)
    m, _ = lmu_memory(u, A.float(), B.float())
    want, _ = lmu_memory_naive(u.double(), A, B)
    state, steps = torch.zeros(2, 256), []
    for u_t in u.unbind(1):
        state = lmu_memory_step(u_t, A.float(), B.float(), state)
        steps.append(state)
    scale = want.abs().max()
    assert (m - want).abs().max() < 1e-5 * scale
    assert (torch.stack(steps, 1) - m).abs().max() < 1e-5 * scale


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 3), st.booleans(), st.integers(0, 10**6))
def test_masked_places_leave_no_trace(length, batch, begun, seed):
    u, A, B, state = inputs(batch=batch, length=length)
    mask = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 0.6
    state = state if begun else None
    m, last = lmu_memory(u.masked_fill(~mask, torch.nan), A, B, initial_state=state, mask=mask)
    assert (m[~mask] == 0).all()
    for row in range(batch):
        before = None if state is None else state[row : row + 1]
        if not mask[row].any():
            assert torch.equal(last[row], torch.zeros(5).double() if before is None else before[0])
            continue
        want, want_last = lmu_memory_naive(u[row : row + 1, mask[row]], A, B, initial_state=before)
        torch.testing.assert_close(m[row, mask[row]], want[0], atol=1e-10, rtol=1e-8)
        torch.testing.assert_close(last[row], want_last[0], atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float16, 0.002)])
def test_half_precision_signals_are_computed_in_float32(dtype, tolerance):
    u, A, B, _ = inputs(dtype=torch.float32)
    m, last = lmu_memory(u.to(dtype), A, B)
    want, _ = lmu_memory_naive(u.to(dtype).double(), A.double(), B.double())
    assert m.dtype == dtype
    assert last.dtype == torch.float32
    assert (m.double() - want).abs().max() < tolerance * want.abs().max()
    assert (last.double() - want[:, -1]).abs().max() < 1e-5


def test_reads_the_past_off_the_memory_better_with_more_coefficients():
    t = torch.arange(400, dtype=torch.float64)

    def signal(t):
        return torch.sin(t / 25) + 0.5 * torch.cos(t / 11)

    steps = torch.arange(5, 95)
    errors = []
    for order in (4, 8, 12):
        m, _ = lmu_memory(signal(t)[None], *lmu_matrices(order, 100.0))
        read = m[0, 200:] @ legendre(order, (steps + 0.5).double() / 100).mT
        errors.append(float((read - signal(t[200:, None] - steps)).abs().max()))
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[2] < 2e-3


def test_legendre_polynomials_are_numpy_s():
    r = torch.linspace(0, 1, 9, dtype=torch.float64)
    for order in (1, 2, 7):
        wanted = np.polynomial.legendre.legvander(2 * r.numpy() - 1, order - 1)
        np.testing.assert_allclose(legendre(order, r), wanted, atol=1e-12)


def test_compiled_without_breaks(without_shape_checks):
    u, A, B, state = inputs(length=9)
    u.requires_grad_()
    compiled = torch.compile(lambda u, s: lmu_memory(u, A, B, initial_state=s)[0], fullgraph=True, backend="aot_eager")
    want = lmu_memory(u, A, B, initial_state=state)[0]
    m = compiled(u, state)
    torch.testing.assert_close(m, want)
    torch.testing.assert_close(torch.autograd.grad(m.sum(), u), torch.autograd.grad(want.sum(), u))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda u, A, B, s: lmu_memory(u[:, :0], A, B), ValueError, "length of at least 1"),
        (lambda u, A, B, s: lmu_memory(u[0], A, B), ValueError, "u must have shape"),
        (lambda u, A, B, s: lmu_memory(u, A[1:], B), ValueError, "A must have shape"),
        (lambda u, A, B, s: lmu_memory(u, A, B[1:]), ValueError, "B must have shape"),
        (lambda u, A, B, s: lmu_memory(u, A, B, initial_state=s[:1]), ValueError, "initial_state must have shape"),
        (lambda u, A, B, s: lmu_memory(u, A, B, mask=torch.ones(2, 3).bool()), ValueError, "mask must have shape"),
        (lambda u, A, B, s: lmu_memory(u, A, B, mask=torch.ones(2, 37)), TypeError, "boolean"),
        (lambda u, A, B, s: lmu_memory(u, A, B, kernel=lmu_kernel(A, B, 36)), ValueError, "at least 37 steps"),
        (lambda u, A, B, s: lmu_memory(u.long(), A, B), TypeError, "u must be a floating-point"),
        (lambda u, A, B, s: lmu_memory(u, A.half(), B), TypeError, "A must be float32 or float64"),
        (lambda u, A, B, s: lmu_memory(u, A, B.bfloat16()), TypeError, "B must be float32 or float64"),
        (lambda u, A, B, s: lmu_readout(u, A, B, A[:, 1:]), ValueError, "weight must have shape"),
        (lambda u, A, B, s: lmu_readout(u[..., None], A, B, A), ValueError, "u must have shape"),
        (lambda u, A, B, s: lmu_memory_step(u[:, 0], A, B, s[:1]), ValueError, "state must have shape"),
        (lambda u, A, B, s: lmu_kernel(A, B, 0), ValueError, "length must be at least 1"),
        (lambda u, A, B, s: lmu_matrices(0, 3.0), ValueError, "order must be"),
        (lambda u, A, B, s: lmu_matrices(3, 0.0), ValueError, "theta"),
        (lambda u, A, B, s: legendre(3, torch.tensor([1.5])), ValueError, "delay must be"),
        (lambda u, A, B, s: legendre(0, torch.tensor([0.5])), ValueError, "order must be"),
    ],
)
def test_wrong_input_is_named(call, error, message, without_shape_checks):
    with pytest.raises(error, match=message):
        call(*inputs())


def test_wrong_method_is_named(without_shape_checks):
    with pytest.raises(ValueError, match="method must be"):
        lmu_matrices(3, 3.0, "euler")

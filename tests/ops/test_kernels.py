"""HiPPO matrices and the kernels of state spaces against their definitions."""

import pytest
import torch

from torchgraft.ops.hippo import hippo, hippo_low_rank, normal_plus_low_rank
from torchgraft.ops.kernels import (
    advance,
    diagonal_kernel,
    diagonal_kernel_naive,
    discretize_diagonal,
    discretize_dplr,
    dplr_kernel,
    dss_coefficients,
    krylov,
    vandermonde,
    vandermonde_transpose,
)

F64, C128 = torch.float64, torch.complex128
MEASURES = ("legs", "legt", "fout")


def test_hippo_entries_are_those_of_the_papers():
    A, B = hippo("legs", 6)
    for n in range(6):
        assert B[n] == (2 * n + 1) ** 0.5
        for k in range(6):
            want = -(((2 * n + 1) * (2 * k + 1)) ** 0.5) if n > k else -(n + 1) if n == k else 0
            assert A[n, k] == pytest.approx(want, abs=1e-12)
    A, B = hippo("legt", 6)
    for n in range(6):
        assert B[n] == 0.5 * (2 * n + 1) ** 0.5
        for k in range(6):
            sign = 1 if k <= n else (-1) ** (n - k)
            assert A[n, k] == pytest.approx(-0.5 * ((2 * n + 1) * (2 * k + 1)) ** 0.5 * sign, abs=1e-12)


def test_fourier_measure_keeps_a_constant_as_one_coefficient():
    A, B = hippo("fout", 8)
    assert torch.allclose(A @ torch.eye(8, dtype=F64)[0] + B, torch.zeros(8, dtype=F64), atol=1e-12)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("states", [2, 4, 16, 64])
def test_normal_plus_low_rank_is_hippo_in_a_unitary_basis(measure, states):
    A, B = hippo(measure, states)
    lam, P, b, V = normal_plus_low_rank(measure, states)
    whole = torch.cat([V, V.conj()], 1)
    assert torch.allclose(whole.mH @ whole, torch.eye(states, dtype=C128), atol=1e-10)
    low = whole @ torch.cat([P, P.conj()], 1).mT
    assert torch.allclose((whole * torch.cat([lam, lam.conj()])) @ whole.mH - low @ low.mH, A.to(C128), atol=1e-9)
    assert torch.allclose(whole @ torch.cat([b, b.conj()]), B.to(C128), atol=1e-9)
    assert torch.allclose(low, hippo_low_rank(measure, states).mT.to(C128), atol=1e-9)
    if measure == "legs":
        assert (lam.real == -0.5).all()


def system(channels=3, states=4):
    torch.manual_seed(0)
    A = torch.complex(-torch.rand(channels, states, dtype=F64) - 0.1, 5 * torch.rand(channels, states, dtype=F64))
    B, C = torch.randn(2, channels, states, dtype=C128)
    return A, B, C, 0.02 + 0.2 * torch.rand(channels, dtype=F64)


@pytest.mark.parametrize("length", [1, 2, 9, 100])
def test_diagonal_kernel_equals_the_recurrence(length):
    A, B, C, dt = system()
    assert torch.allclose(diagonal_kernel(A, C, dt, length), diagonal_kernel_naive(A, C, dt, length), atol=1e-12)
    want = diagonal_kernel_naive(A, C, dt, length, B)
    assert torch.allclose(diagonal_kernel(A, C, dt, length, B=B), want, atol=1e-12)


def test_bilinear_is_the_trapezoidal_rule():
    A, _, _, dt = system()
    log_a, b = discretize_diagonal(A, dt[:, None], "bilinear")
    half = dt[:, None] * A / 2
    assert torch.allclose(log_a.exp() * (1 - half), 1 + half)
    assert torch.allclose(b * (1 - half), dt[:, None].to(C128))


@pytest.mark.parametrize("real", [False, True])
def test_vandermonde_and_its_transpose(real):
    A, _, C, dt = system()
    log_a, C = (dt[:, None] * A.real, C.real) if real else (dt[:, None] * A, C)
    powers = (log_a[..., None] * torch.arange(50)).exp()
    assert torch.allclose(vandermonde(C, log_a, 50), (C[..., None] * powers).sum(1).real, atol=1e-12)
    u = torch.randn(2, 50, 3, dtype=F64)
    want = torch.einsum("blh,hnl->bhn", u.to(powers.dtype), powers)
    assert torch.allclose(vandermonde_transpose(u, log_a), want, atol=1e-12)


def test_long_kernels_in_float32_keep_their_phase():
    A, _, C, dt = system()
    A = torch.complex(A.real / 50, A.imag)
    want = diagonal_kernel(A, C, dt, 4096)
    found = diagonal_kernel(A.to(torch.complex64), C.to(torch.complex64), dt.float(), 4096)
    assert (found - want).abs().max() < 1e-3 * want.abs().max()


def test_dss_equals_powers_normalised_by_their_sum():
    torch.manual_seed(1)
    A = torch.complex(torch.randn(3, 4, dtype=F64), 3 * torch.randn(3, 4, dtype=F64))
    W, dt, length = torch.randn(3, 4, dtype=C128), torch.full((3,), 0.1, dtype=F64), 40
    log_a, b, c = dss_coefficients(A, dt, length, eps=0.0)
    powers = (dt[:, None, None] * A[..., None] * torch.arange(length)).exp()
    want = (W / A * (powers[..., 1] - 1))[..., None] * powers / (powers.sum(-1) * (powers[..., 1] - 1))[..., None]
    assert torch.allclose((W * c * b)[..., None] * powers, want, atol=1e-10)
    assert torch.allclose(log_a, dt[:, None] * A)


def test_dss_with_growing_states_stays_finite():
    A = torch.complex(torch.tensor([[0.5, -0.5]]), torch.tensor([[1.0, 0.0]]))
    log_a, b, c = (t.detach() for t in dss_coefficients(A, torch.tensor([0.1]), 1000))
    kernel = (c * b)[..., None] * (log_a[..., None] * torch.arange(1000)).exp()
    assert kernel.isfinite().all()
    # the largest power is the last one
    assert kernel[0, 0].abs().argmax() == 999


def dplr(measure, channels=2, states=8):
    lam, P, B, _ = normal_plus_low_rank(measure, states)
    dt = torch.tensor([0.03, 0.2], dtype=F64)[:channels]
    return lam.repeat(channels, 1), P[:, None].repeat(1, channels, 1), B.repeat(channels, 1), dt


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("length", [1, 2, 50, 51])
def test_dplr_kernel_equals_powers_of_the_dense_matrix(measure, length):
    A, P, B, dt = dplr(measure)
    dense, start = hippo(measure, 8)
    eye = torch.eye(8, dtype=F64)
    # one state of the Fourier measure does not decay, and the sum over all its taps would not exist
    A, dense = A - 1e-3, dense - 1e-3 * eye
    torch.manual_seed(0)
    V = normal_plus_low_rank(measure, 8)[3]
    C = torch.randn(2, 8, dtype=F64)
    want, held = [], []
    for row, step in zip(C, dt, strict=True):
        inverse = torch.linalg.inv(eye - step / 2 * dense)
        a, b = inverse @ (eye + step / 2 * dense), step * inverse @ start
        want.append(torch.stack([row @ torch.linalg.matrix_power(a, t) @ b for t in range(length)]))
        held.append((row @ (eye - torch.linalg.matrix_power(a, length))).to(C128) @ V)
    found = dplr_kernel(A, P, B, torch.stack(held)[None], dt, length)[0]
    assert torch.allclose(found, torch.stack(want), atol=1e-9)


@pytest.mark.parametrize("measure", MEASURES)
def test_dense_form_has_the_eigenvalues_of_the_matrix(measure):
    A, P, B, dt = dplr(measure)
    dense, _ = hippo(measure, 8)
    a, _ = discretize_dplr(A, P, B, dt)
    half = dt[0] / 2 * dense
    want = torch.linalg.eigvals(torch.linalg.solve(torch.eye(8, dtype=F64) - half, torch.eye(8, dtype=F64) + half))
    found = torch.linalg.eigvals(a[0])
    assert torch.allclose(found.abs().sort().values, want.abs().sort().values, atol=1e-8)


def test_advance_and_krylov_equal_the_loop():
    A, P, B, dt = dplr("legs")
    a, b = discretize_dplr(A, P, B, dt)
    torch.manual_seed(0)
    u, first = torch.randn(2, 150, 2, dtype=F64), torch.randn(2, 2, 8, dtype=F64)
    state, taps = first, []
    power = b
    for t in range(150):
        state = torch.einsum("hmn,bhn->bhm", a, state) + b * u[:, t, :, None]
        taps.append(power)
        power = torch.einsum("hmn,hn->hm", a, power)
    assert torch.allclose(advance(a, b, u, first), state, atol=1e-10)
    assert torch.allclose(krylov(a, b, 150), torch.stack(taps, -1), atol=1e-10)


def test_frequencies_in_blocks_change_nothing(monkeypatch):
    A, P, B, dt = dplr("legs")
    C = torch.randn(1, 2, 4, dtype=C128)
    want = dplr_kernel(A, P, B, C, dt, 60)
    monkeypatch.setattr("torchgraft.ops.kernels._FREQUENCIES", 40)
    assert torch.allclose(dplr_kernel(A, P, B, C, dt, 60), want, atol=1e-12)


def test_gradients():
    A, B, C, dt = (t[:2, :2] if t.ndim == 2 else t[:2] for t in system())
    leaves = [t.clone().requires_grad_() for t in (A, C, dt, B)]
    assert torch.autograd.gradcheck(lambda a, c, d, b: diagonal_kernel(a, c, d, 7, B=b), leaves)
    A, P, B, dt = dplr("legs", states=4)
    leaves = [t.clone().requires_grad_() for t in (A, P, B, torch.randn(1, 2, 2, dtype=C128), dt)]
    assert torch.autograd.gradcheck(lambda a, p, b, c, d: dplr_kernel(a, p, b, c, d, 6), leaves)


def test_compiled_without_breaks(without_shape_checks):
    A, _, C, dt = system()
    compiled = torch.compile(lambda *t: diagonal_kernel(*t, 40), fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(A, C, dt), diagonal_kernel(A, C, dt, 40))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda A, B, C, dt: diagonal_kernel(A, C, dt, 0), "length must be at least 1"),
        (lambda A, B, C, dt: diagonal_kernel(A, C[:, 1:], dt, 5), "C end in it"),
        (lambda A, B, C, dt: diagonal_kernel(A, C, dt[1:], 5), "dt must have shape"),
        (lambda A, B, C, dt: diagonal_kernel(A, C, dt, 5, B=B[1:]), "B must have shape"),
        (lambda A, B, C, dt: diagonal_kernel(A, C, dt, 5, discretization="euler"), "'zoh' or 'bilinear'"),
        (lambda A, B, C, dt: dplr_kernel(A, B, B, C[None], dt, 5), "A, P and C must have shapes"),
        (lambda A, B, C, dt: dplr_kernel(A, B[None], B[1:], C[None], dt, 5), "B must have shape"),
        (lambda *_: hippo("laguerre", 4), "measure must be"),
        (lambda *_: hippo("fout", 5), "even"),
        (lambda *_: hippo("legs", 0), "at least 1"),
        (lambda *_: normal_plus_low_rank("legs", 5), "even"),
    ],
)
def test_wrong_input_is_named(without_shape_checks, call, message):
    with pytest.raises(ValueError, match=message):
        call(*system())

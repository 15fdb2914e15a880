"""Convolution kernels of linear state spaces, diagonal and diagonal plus low rank, without a loop over time.

Legend: B batch, L taps, H channels, N states (one of each pair of conjugates), J output channels of a state space, R
rank, M = 2 N real numbers of a state.

``x' = A x + B u, y = 2 Re(C x)`` becomes ``h_t = a h_{t-1} + b u_t`` with ``kernel_l = 2 Re(C a^l b)``. Powers of a
diagonal are products of two short tables, ``a^{iT + j} = a^{iT} a^j``, so a kernel is a matrix product and the table
(H, N, L) is never held.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from torchgraft.ops._checks import check_shapes

__all__ = [
    "advance",
    "diagonal_kernel",
    "diagonal_kernel_naive",
    "discretize_diagonal",
    "discretize_dplr",
    "dplr_kernel",
    "dss_coefficients",
    "krylov",
    "vandermonde",
    "vandermonde_transpose",
]

Discretization = Literal["zoh", "bilinear"]

_FREQUENCIES = 1 << 22


def _check_length(length: int) -> None:
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")


def _tables(log_a: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Powers 0, T, 2 T, ... and 0 .. T - 1 of (H, N): (H, N, ceil(L / T)) and (H, N, T)."""
    block = math.isqrt(length - 1) + 1
    steps = torch.arange(block, device=log_a.device, dtype=log_a.real.dtype)
    starts = torch.arange(-(-length // block), device=log_a.device, dtype=log_a.real.dtype) * block
    return (log_a[..., None] * starts).exp(), (log_a[..., None] * steps).exp()


def vandermonde(weights: Tensor, log_a: Tensor, length: int) -> Tensor:
    """``y_l = Re sum_n weights_n exp(l log_a_n)`` for l = 0 .. length - 1.

    Args:
        weights: (..., H, N), real or complex.
        log_a: (H, N), real or complex.
        length: L.

    Returns:
        (..., H, L), real.

    Raises:
        ValueError: for a length below one, or shapes that do not go together.

    Example:
        >>> vandermonde(torch.ones(1, 1), torch.tensor([[0.5]]).log(), 4)
        tensor([[1.0000, 0.5000, 0.2500, 0.1250]])
    """
    _check_length(length)
    if log_a.ndim != 2 or weights.shape[-2:] != log_a.shape:
        raise ValueError(
            f"log_a must have shape (channels, states) and weights end in it, got {tuple(log_a.shape)} and "
            f"{tuple(weights.shape)}"
        )
    outer, inner = _tables(log_a, length)
    left = weights[..., None] * outer
    if left.is_complex():
        if not inner.is_complex():
            left = left.real
        else:
            # one real product for the real part of a complex one
            left = torch.cat([left.real, -left.imag], -2)
            inner = torch.cat([inner.real, inner.imag], -2)
    elif inner.is_complex():
        inner = inner.real
    return (left.mT @ inner).flatten(-2)[..., :length]


def vandermonde_transpose(u: Tensor, log_a: Tensor) -> Tensor:
    """``s_n = sum_l u_l exp(l log_a_n)``: (B, L, H) and (H, N) to (B, H, N), complex where ``log_a`` is."""
    length = u.shape[1]
    outer, inner = _tables(log_a, length)
    blocks, block = outer.shape[-1], inner.shape[-1]
    u = torch.nn.functional.pad(u, (0, 0, 0, blocks * block - length)).unflatten(1, (blocks, block))
    # (B, H, K, T)
    u = u.permute(0, 3, 1, 2).to(log_a.real.dtype)
    if log_a.is_complex():
        sums = torch.complex(u @ inner.real.mT, u @ inner.imag.mT)
    else:
        sums = u @ inner.mT
    return (sums * outer.mT).sum(-2)


def discretize_diagonal(A: Tensor, dt: Tensor, method: Discretization = "zoh") -> tuple[Tensor, Tensor]:
    """Logarithm of the discrete diagonal, and the factor of the inputs, for ``x' = A x + u``.

    Args:
        A: diagonal, any shape, real or complex; not zero.
        dt: step size, broadcast to it.
        method: ``"zoh"`` holds the input between steps, ``"bilinear"`` is the trapezoidal rule.

    Example:
        >>> log_a, b = discretize_diagonal(torch.tensor([-1.0]), torch.tensor([0.1]))
        >>> log_a, round(float(b), 4)
        (tensor([-0.1000]), 0.0952)
    """
    if method == "zoh":
        return dt * A, torch.expm1(dt * A) / A
    if method == "bilinear":
        half = dt * A / 2
        return ((1 + half) / (1 - half)).log(), dt / (1 - half)
    raise ValueError(f"discretization must be 'zoh' or 'bilinear', got {method!r}")


def diagonal_kernel(
    A: Tensor, C: Tensor, dt: Tensor, length: int, *, B: Tensor | None = None, discretization: Discretization = "zoh"
) -> Tensor:
    """Kernel of S4D (Gu et al., 2022, arXiv 2206.11893, section 3): ``2 Re sum_n C_n B_n b_n exp(l log a_n)``.

    Args:
        A: (H, N), complex, one of each pair of conjugates.
        C: (..., H, N), complex.
        dt: step sizes, (H,), or (H, N).
        length: L.
        B: (H, N), complex; ones without it.
        discretization: ``"zoh"`` or ``"bilinear"``.

    Returns:
        (..., H, L), real.

    Raises:
        ValueError: for shapes that do not go together, a length below one, or another discretization.

    Example:
        >>> A = torch.complex(-0.5 * torch.ones(3, 4), torch.pi * torch.arange(4.0).expand(3, 4))
        >>> diagonal_kernel(A, torch.randn(3, 4, dtype=torch.cfloat), torch.full((3,), 0.01), 100).shape
        torch.Size([3, 100])
    """
    check_shapes(B=(B, tuple(A.shape)))
    if A.ndim != 2 or C.shape[-2:] != A.shape:
        raise ValueError(
            f"A must have shape (channels, states) and C end in it, got {tuple(A.shape)}, {tuple(C.shape)}"
        )
    if dt.shape not in (A.shape, A.shape[:1]):
        raise ValueError(f"dt must have shape {tuple(A.shape[:1])} or {tuple(A.shape)}, got {tuple(dt.shape)}")
    log_a, b = discretize_diagonal(A, dt if dt.ndim == 2 else dt[:, None], discretization)
    return 2 * vandermonde(C * (b if B is None else b * B), log_a, length)


def diagonal_kernel_naive(A: Tensor, C: Tensor, dt: Tensor, length: int, B: Tensor | None = None) -> Tensor:
    """The recurrence of ``diagonal_kernel`` under the zero-order hold, tap after tap; the reference of the tests."""
    a = (dt[:, None] * A).exp()
    state = (a - 1) / A if B is None else B * (a - 1) / A
    taps = []
    for _ in range(length):
        taps.append(2 * (C * state).sum(-1).real)
        state = a * state
    return torch.stack(taps, -1)


def dss_coefficients(A: Tensor, dt: Tensor, length: int | None, eps: float = 1e-7) -> tuple[Tensor, Tensor, Tensor]:
    """Diagonal state spaces (Gupta et al., 2022, arXiv 2203.14343, proposition 1) as a recurrence.

    With ``length``, powers are normalised by their sum over ``l = 0 .. length - 1`` (DSS-softmax), written so that
    positive real parts do not overflow; without it this is DSS-exp.

    Args:
        A: (H, N), complex; all states, not one of each pair.
        dt: (H,).
        length: L of the normalisation.
        eps: keeps the reciprocal of a vanishing denominator finite.

    Returns:
        ``log_a``, and ``b``, ``c`` with ``kernel_l = Re sum_n W_n c_n exp(l log_a_n) b_n``; where the real part of
        ``log_a`` is positive ``b`` is the tiny number that the largest power of the length brings back to one.
    """
    log_a = dt[:, None] * A
    if length is None:
        return log_a, torch.ones_like(log_a), torch.expm1(log_a) / A
    growing = log_a.real > 0
    # towards smaller powers in either case
    down = torch.where(growing, -log_a, log_a)
    denominator = torch.expm1(length * down) * A
    inverse = denominator.conj() / (denominator.real.square() + denominator.imag.square() + eps)
    b = torch.where(growing, (-(length - 1) * torch.where(growing, log_a, torch.zeros_like(log_a))).exp(), 1.0)
    return log_a, b.to(log_a), torch.expm1(down) * inverse


def dplr_kernel(A: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int) -> Tensor:
    """Kernel of S4 (Gu et al., 2021, arXiv 2111.00396, theorem 3) for the state matrix ``diag(A) - sum_r P_r P_r^*``.

    The truncated generating function of the bilinear discretization at the roots of unity, by one Cauchy product and
    Woodbury's identity, then an inverse transform. ``2 / (1 + z)`` is multiplied into the Cauchy kernel, so nothing is
    singular at ``z = -1``, where the reference code divides by a number near zero.

    Args:
        A: (H, N), complex, one of each pair of conjugates.
        P: (R, H, N), complex.
        B: (H, N), complex.
        C: (J, H, N), complex, already times ``I - a^L`` (the C tilde of the paper) for this very length.
        dt: (H,).
        length: L.

    Returns:
        (J, H, L), real.

    Raises:
        ValueError: for shapes that do not go together, or a length below one.
    """
    _check_length(length)
    if A.ndim != 2 or P.ndim != 3 or C.ndim != 3:
        raise ValueError(
            f"A, P and C must have shapes (channels, states), (rank, channels, states) and (outputs, channels, "
            f"states), got {tuple(A.shape)}, {tuple(P.shape)}, {tuple(C.shape)}"
        )
    check_shapes(
        P=(P, (len(P), *A.shape)), B=(B, tuple(A.shape)), C=(C, (len(C), *A.shape)), dt=(dt, tuple(A.shape[:1]))
    )
    rank, channels = len(P), len(A)
    right, left = torch.cat([B[None], P]), torch.cat([C, P.conj()])
    # (H, J + R, 1 + R, N)
    pairs = (left[:, None] * right[None]).permute(2, 0, 1, 3)
    half = dt[:, None] * A / 2
    block = max(1, _FREQUENCIES // half.numel())
    found = []
    for first in range(0, length // 2 + 1, block):
        k = torch.arange(first, min(first + block, length // 2 + 1), device=A.device, dtype=dt.dtype)
        z = torch.polar(torch.ones_like(k), -2 * torch.pi * k / length)[:, None]
        cauchy = (dt[:, None, None] / ((1 - z) - half[:, None] * (1 + z))).mT
        mirror = (dt[:, None, None] / ((1 - z) - half[:, None].conj() * (1 + z))).mT
        # (H, J + R, 1 + R, F)
        sums = (pairs.flatten(1, 2) @ cauchy + pairs.flatten(1, 2).conj() @ mirror).unflatten(1, pairs.shape[1:3])
        sums = sums.permute(0, 3, 1, 2)
        direct, to_low, from_low, inside = (
            sums[..., :-rank, :1], sums[..., :-rank, 1:], sums[..., -rank:, :1], sums[..., -rank:, 1:]
        )  # fmt: skip
        scale = ((1 + z) / 2)[..., None]
        eye = torch.eye(rank, dtype=A.dtype, device=A.device)
        correction = torch.linalg.solve(eye + scale * inside, scale * from_low)
        found.append((direct - to_low @ correction).squeeze(-1))
    spectrum = torch.cat(found, 1).permute(2, 0, 1)
    assert spectrum.shape[1] == channels
    return torch.fft.irfft(spectrum, length)


def discretize_dplr(A: Tensor, P: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """Bilinear discretization of ``diag(A) - sum_r P_r P_r^*`` as real matrices over [real, imaginary parts].

    Args:
        A: (H, N), complex, one of each pair of conjugates.
        P: (R, H, N), complex.
        B: (H, N), complex.
        dt: (H,).

    Returns:
        Real (H, M, M) and (H, M): ``h_t = a h_{t-1} + b u_t``, where h holds real and then imaginary parts.
    """
    states = A.shape[1]
    half = dt[:, None] / 2
    inverse = 1 / (1 - half * A)

    def low(v: Tensor) -> Tensor:
        """``P^* v`` over both halves: real, (..., H, R)."""
        return 2 * torch.einsum("rhn,...hn->...hr", P.conj(), v).real

    def spread(weights: Tensor) -> Tensor:
        return torch.einsum("rhn,...hr->...hn", P, weights.to(P.dtype))

    inside = 2 * torch.einsum("rhn,hn,shn->hrs", P.conj(), inverse, P).real
    eye = torch.eye(len(P), dtype=dt.dtype, device=A.device)

    def solve(v: Tensor) -> Tensor:
        """``(I - dt/2 A)^{-1} v`` by Woodbury's identity."""
        weights = torch.linalg.solve(eye + half[..., None] * inside, low(inverse * v)[..., None]).squeeze(-1)
        return inverse * (v - spread(half * weights))

    unit = torch.eye(2 * states, dtype=dt.dtype, device=A.device)
    # (M, H, N): each basis vector of the real form, as the half of a conjugate pair
    basis = torch.complex(unit[:, :states], unit[:, states:])[:, None].expand(-1, len(A), -1)
    image = solve(basis + half * (A * basis - spread(low(basis))))
    start = solve(dt[:, None] * B)
    return torch.cat([image.real, image.imag], -1).permute(1, 2, 0), torch.cat([start.real, start.imag], -1)


def krylov(a: Tensor, b: Tensor, length: int) -> Tensor:
    """``[b, a b, a^2 b, ...]`` by doubling: (H, M, M) and (H, M) to (H, M, L)."""
    _check_length(length)
    found = b[..., None]
    while found.shape[-1] < length:
        found = torch.cat([found, a @ found], -1)
        a = a @ a
    return found[..., :length]


def advance(a: Tensor, b: Tensor, u: Tensor, state: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
    """The state of ``h_t = a h_{t-1} + b u_t`` after a whole sequence, for dense matrices, in logarithmic depth.

    Args:
        a: (H, M, M).
        b: (H, M).
        u: (B, L, H); with ``lengths``, of which the first places of a row are zero.
        state: (B, H, M) before the first step.
        lengths: steps that ``state`` goes through in each row, (B,); all L without it.

    Returns:
        (B, H, M).
    """
    batch, length, _ = u.shape
    block = min(64, length)
    taps = krylov(a, b, block).flip(-1)
    u = torch.nn.functional.pad(u, (0, 0, -length % block, 0)).unflatten(1, (-1, block))
    # (B, K, H, M): what each block adds
    found = torch.einsum("bkth,hmt->bkhm", u.to(taps.dtype), taps)
    power = torch.linalg.matrix_power(a, block)
    while found.shape[1] > 1:
        if found.shape[1] % 2:
            found = torch.nn.functional.pad(found, (0, 0, 0, 0, 1, 0))
        found = torch.einsum("hmn,bkhn->bkhm", power, found[:, ::2]) + found[:, 1::2]
        power = power @ power
    last = found[:, 0]
    if state is None:
        return last
    steps = torch.full((batch,), length, device=u.device) if lengths is None else lengths
    for bit in range(length.bit_length()):
        moved = torch.einsum("hmn,bhn->bhm", a, state)
        state = torch.where(((steps >> bit) & 1).bool()[:, None, None], moved, state)
        a = a @ a
    return last + state

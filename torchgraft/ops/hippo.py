"""HiPPO matrices, and their form "normal plus low rank" (Gu et al., 2020, arXiv 2008.07669; 2021, arXiv 2111.00396)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["hippo", "hippo_low_rank", "normal_plus_low_rank"]

Measure = Literal["legs", "legt", "fout"]


def hippo(measure: Measure, states: int) -> tuple[Tensor, Tensor]:
    """``x' = A x + B u`` that projects the past onto orthogonal functions.

    Args:
        measure: ``"legs"`` (Legendre, scaled: the whole past), ``"legt"`` (Legendre, translated: a window of length
            one; halved, as the reference code has it) or ``"fout"`` (Fourier, truncated).
        states: size N.

    Returns:
        A of shape (N, N) and B of shape (N,), float64.

    Raises:
        ValueError: for another measure, or a size below one (for Fourier an odd one too).

    Example:
        >>> A, B = hippo("legs", 3)
        >>> A.diagonal().tolist()
        [-1.0, -2.0, -3.0]
    """
    if states < 1:
        raise ValueError(f"states must be at least 1, got {states}")
    n = torch.arange(states, dtype=torch.float64)
    root = (2 * n + 1).sqrt()
    if measure == "legs":
        below = root[:, None] * root
        return -below.tril(-1) - torch.diag(n + 1), root
    if measure == "legt":
        sign = torch.where(n[:, None] >= n, 1.0, (-1.0) ** (n[:, None] - n).abs())
        return -0.5 * root[:, None] * root * sign, 0.5 * root
    if measure == "fout":
        if states % 2:
            raise ValueError(f"states must be even for the measure 'fout', got {states}")
        # the constant, a sine of frequency zero that nothing drives, then cosine and sine of 1, 2, ...
        turning = torch.zeros(states, states, dtype=torch.float64)
        for k in range(1, states // 2):
            turning[2 * k + 1, 2 * k], turning[2 * k, 2 * k + 1] = torch.pi * k, -torch.pi * k
        b = torch.zeros(states, dtype=torch.float64)
        b[::2] = 2**0.5
        b[0] = 1
        return turning - b[:, None] * b, b
    raise ValueError(f"measure must be 'legs', 'legt' or 'fout', got {measure!r}")


def hippo_low_rank(measure: Measure, states: int) -> Tensor:
    """Real P of shape (R, N) for which ``A + sum_r P_r P_r^T`` is normal: R is 1, for ``"legt"`` 2."""
    n = torch.arange(states, dtype=torch.float64)
    if measure == "legs":
        return (n + 0.5).sqrt()[None]
    if measure == "legt":
        root = (n + 0.5).sqrt()
        return torch.stack([torch.where(n % 2 == 0, 0.0, root), torch.where(n % 2 == 0, root, 0.0)])
    return hippo(measure, states)[1][None]


def normal_plus_low_rank(measure: Measure, states: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``A = V (diag(lam) - P P^*) V^*`` with a unitary V, one of each pair of conjugates kept.

    Args:
        measure: as in ``hippo``.
        states: N, even.

    Returns:
        Complex128 lam (N/2,) with positive imaginary parts, P (R, N/2), B (N/2,) and V (N, N/2): whatever is computed
        with these halves must be doubled in its real part.

    Raises:
        ValueError: for an odd size or another measure.

    Example:
        >>> lam, P, B, V = normal_plus_low_rank("legs", 8)
        >>> lam.real.unique().tolist()
        [-0.5]
    """
    if states % 2:
        raise ValueError(f"states must be even, since eigenvalues come in conjugate pairs, got {states}")
    A, B = hippo(measure, states)
    P = hippo_low_rank(measure, states)
    normal = A + P.mT @ P
    real = normal.diagonal().mean().round(decimals=12)
    # what is left is skew-symmetric, so i times it is Hermitian and its eigenvectors are orthogonal
    skew = normal - real * torch.eye(states, dtype=torch.float64)
    imaginary, V = torch.linalg.eigh(-1j * skew)
    imaginary, V = imaginary[states // 2 :], V[:, states // 2 :]
    if imaginary[0].abs() < 1e-8:
        # the eigenvalue zero of the Fourier measure is double: its two real eigenvectors make one conjugate pair
        first, second = torch.linalg.svd(skew)[2][-2:]
        V = torch.cat([torch.complex(first, second)[:, None] / 2**0.5, V[:, 1:]], 1)
        imaginary = torch.cat([torch.zeros(1, dtype=torch.float64), imaginary[1:]])
    adjoint = V.mH
    lam = torch.complex(real.expand(states // 2), imaginary)
    return lam, (adjoint @ P.mT.to(V)).mT.contiguous(), adjoint @ B.to(V), V

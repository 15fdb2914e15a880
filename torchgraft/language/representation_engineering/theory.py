"""The paper's bounds and identities, as functions of measured quantities."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor


def alignment_bound(r: float | np.ndarray, separability: float, rate: float, b0: float) -> Any:
    """Theorem 1: behaviour is at least ``tanh(Delta lambda r + artanh B(0))`` for r >= 0.

    Args:
        r: coefficients, not negative.
        separability: Delta, the least of ``separability_margin``.
        rate: lambda, length of the change of the last hidden state per unit of r.
        b0: behaviour without steering, between -1 and 1.

    Raises:
        ValueError: for negative coefficients or behaviour that is not inside (-1, 1).
    """
    if np.min(r) < 0 or not -1 < b0 < 1:
        raise ValueError(f"the bound is for r >= 0 and -1 < b0 < 1, got r from {np.min(r)} and b0 = {b0}")
    return np.tanh(separability * rate * np.asarray(r) + np.arctanh(b0))


def separability_margin(delta: Tensor, positive: Tensor, negative: Tensor) -> float:
    """Assumption 1: by how much a unit of the change lifts any positive answer over any negative one.

    Args:
        delta: (D,), change of the last hidden state, of any length but zero.
        positive, negative: (n, D) and (m, D), rows of the unembedding.

    Raises:
        ValueError: for a change of length zero.
    """
    if not delta.norm() > 0:
        raise ValueError("delta must not be zero")
    along = delta / delta.norm()
    return ((positive @ along).min() - (negative @ along).max()).item()


def helpfulness(h0: Tensor, wrong: Tensor, change: Tensor) -> Tensor:
    """The exact identity ``H = H0 / (H0 + sum_i P0(i) exp(x_i))``, to which the second theorem is a bound.

    Args:
        h0: (...), probability of the right token without steering.
        wrong: (..., n), probabilities of all others without steering.
        change: (..., n), x: change of their logits less that of the right token's.

    Returns:
        (...), probability of the right token with steering.
    """
    return h0 / (h0 + (wrong * change.exp()).sum(-1))


def helpfulness_gaussian(r: float | np.ndarray, h0: float, s: float) -> Any:
    """``H0 / (H0 + (1 - H0) exp(s^2 r^2 / 2))``: the identity averaged over changes that are normal, of deviation s r.

    A working model of this library for theorem 2, whose constants are not known (unverified); near zero it is
    ``H0 - H0 (1 - H0) s^2 r^2 / 2``.
    """
    # the exponent is bounded where floats end; H is zero there anyway
    grown = np.exp(np.minimum(np.square(s * np.asarray(r)) / 2, 700.0))
    return h0 / (h0 + (1 - h0) * grown)


def residual_norm(hidden: Tensor, mask: Tensor) -> float:
    """Mean length of hidden states (B, T, D) where ``mask`` (B, T) is set: the measure for coefficients."""
    return hidden.norm(dim=-1)[mask.bool().to(hidden.device)].mean().item()

"""Random-matrix theory of the spiked covariance model: what noise alone does to a sample spectrum.

n: rows, p: features, gamma = p / n. Marchenko and Pastur 1967; Baik, Ben Arous and Péché 2005; Johnstone 2001.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

Noise = Literal["median", "iterative"] | float
TW1_95 = 0.9793  # the 95 % point of the Tracy-Widom law of order 1 (Johnstone 2001)


class MarchenkoPastur:
    """Law of the eigenvalues of the sample covariance of pure noise, as n and p grow with p / n = gamma.

    For gamma > 1 a share ``1 - 1 / gamma`` of the eigenvalues is 0 (``atom``).

    Args:
        gamma: p / n.
        sigma2: variance of the noise.

    Raises:
        ValueError: unless both are positive and finite.

    Example:
        >>> law = MarchenkoPastur(0.25)
        >>> law.edges
        (0.25, 2.25)
        >>> round(float(law.cdf(law.median)), 6)
        0.5
    """

    def __init__(self, gamma: float, sigma2: float = 1.0) -> None:
        for name, value in (("gamma", gamma), ("sigma2", sigma2)):
            if not 0 < value < np.inf:
                raise ValueError(f"{name} must be a positive finite number, got {value!r}")
        self.gamma, self.sigma2 = float(gamma), float(sigma2)

    @property
    def edges(self) -> tuple[float, float]:
        """Where the bulk begins and ends."""
        root = self.gamma**0.5
        return self.sigma2 * (1 - root) ** 2, self.sigma2 * (1 + root) ** 2

    @property
    def atom(self) -> float:
        """Share of eigenvalues that are 0."""
        return max(0.0, 1 - 1 / self.gamma)

    @property
    def median(self) -> float:
        """Median of all eigenvalues, zeros included."""
        return float(self.ppf(0.5))

    @property
    def bulk_median(self) -> float:
        """Median of the eigenvalues that are not 0."""
        return float(self.ppf(self.atom + (1 - self.atom) / 2))

    def pdf(self, x: Any) -> np.ndarray:
        """Density of the bulk; it integrates to ``1 - atom``."""
        x = np.asarray(x, dtype=float)
        low, high = self.edges
        inside = (x > low) & (x < high) & (x > 0)
        safe = np.where(inside, x, (low + high) / 2)
        density = np.sqrt((high - safe) * (safe - low)) / (2 * np.pi * self.gamma * self.sigma2 * safe)
        return np.where(inside, density, 0.0)

    def cdf(self, x: Any) -> np.ndarray:
        """Share of eigenvalues up to x, by the closed form."""
        x = np.asarray(x, dtype=float)
        low, high = self.edges
        g = self.gamma
        inside = (x > low) & (x < high)
        safe = np.where(inside, x, (low + high) / 2) / self.sigma2
        a, b = low / self.sigma2, high / self.sigma2
        r = np.sqrt((b - safe) / (safe - a))
        total = np.pi * g + np.sqrt((b - safe) * (safe - a)) - (1 + g) * np.arctan((r**2 - 1) / (2 * r))
        if g != 1:
            total = total + (1 - g) * np.arctan((a * r**2 - b) / (2 * (1 - g) * r))
        share = total / (2 * np.pi * g)
        if g > 1:
            share = share + (g - 1) / (2 * g)
        outside = np.where(x >= high, 1.0, np.where(x >= 0, self.atom, 0.0))
        return np.where(inside, share, outside)

    def ppf(self, q: Any) -> np.ndarray:
        """The eigenvalue below which a share q lies.

        Raises:
            ValueError: for a share outside 0..1.
        """
        q = np.asarray(q, dtype=float)
        if not ((q >= 0) & (q <= 1)).all():
            raise ValueError(f"q must lie in 0..1, got {q!r}")
        low, high = (np.full(q.shape, edge) for edge in self.edges)
        for _ in range(80):
            middle = (low + high) / 2
            below = self.cdf(middle) < q
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return np.where((q <= self.atom) & (self.atom > 0), 0.0, (low + high) / 2)


def fit_noise(eigenvalues: Any, gamma: float, method: Noise = "median") -> float:
    """Variance of the noise, from the spectrum of a sample covariance with a few spikes.

    Args:
        eigenvalues: of the sample covariance; where p > n, the n that are not 0.
        gamma: p / n.
        method: ``median`` divides the median by that of the law; ``iterative`` takes the mean of the eigenvalues below
            the edge, again and again; a number is returned as it is.

    Raises:
        ValueError: for eigenvalues that are not finite and non-negative, an unknown method or a bad number.

    Example:
        >>> fit_noise(MarchenkoPastur(0.5, 3.0).ppf(np.linspace(0.005, 0.995, 100)), 0.5).round(2)
        np.float64(3.0)
    """
    values = np.sort(np.asarray(eigenvalues, dtype=float))
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all() or values[0] < 0:
        raise ValueError("eigenvalues must be one row of finite numbers of at least 0")
    if not isinstance(method, str):
        if not 0 < method < np.inf:
            raise ValueError(f"the variance of the noise must be positive and finite, got {method!r}")
        return float(method)
    if method not in ("median", "iterative"):
        raise ValueError(f"method must be 'median', 'iterative' or a number, got {method!r}")
    sigma2 = np.median(values) / MarchenkoPastur(gamma).bulk_median
    if method == "iterative":
        edge = (1 + gamma**0.5) ** 2
        for _ in range(200):
            bulk = values[values <= sigma2 * edge]
            # the law's mean over the eigenvalues that are not 0 is sigma2 max(1, gamma)
            new = bulk.mean() / max(1.0, gamma) if len(bulk) else sigma2
            if abs(new - sigma2) <= 1e-12 * sigma2:
                break
            sigma2 = new
    return sigma2


def bbp_threshold(gamma: float) -> float:
    """Weakest spike that leaves a trace, ``theta = sqrt(gamma)`` (Baik, Ben Arous and Péché 2005)."""
    return float(gamma) ** 0.5


def spike_forward(theta: Any, gamma: float, sigma2: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """What becomes of a direction with variance ``sigma2 (1 + theta)`` in the sample.

    Returns:
        The sample eigenvalue, and the squared overlap of its eigenvector with the direction; below the threshold the
        edge of the bulk, and 0.

    Example:
        >>> eigenvalue, overlap = spike_forward(4.0, 0.5)
        >>> round(float(eigenvalue), 3), round(float(overlap), 3)
        (5.625, 0.861)
    """
    theta = np.asarray(theta, dtype=float)
    seen = theta > bbp_threshold(gamma)
    safe = np.where(seen, theta, 1 + bbp_threshold(gamma))
    eigenvalue = np.where(seen, (1 + safe) * (1 + gamma / safe), (1 + gamma**0.5) ** 2)
    overlap = np.where(seen, (1 - gamma / safe**2) / (1 + gamma / safe), 0.0)
    return np.asarray(sigma2 * eigenvalue), overlap


def spike_inverse(eigenvalue: Any, gamma: float, sigma2: float = 1.0) -> np.ndarray:
    """Strength theta of the direction behind a sample eigenvalue; 0 for one that does not leave the bulk.

    Example:
        >>> round(float(spike_inverse(5.625, 0.5)), 6)
        4.0
    """
    x = np.asarray(eigenvalue, dtype=float) / sigma2
    above = x > (1 + gamma**0.5) ** 2
    b = np.where(above, x, 4 + 4 * gamma) - 1 - gamma
    return np.where(above, (b + np.sqrt(np.maximum(b**2 - 4 * gamma, 0))) / 2, 0.0)


def tracy_widom_edge(n: int, p: int, sigma2: float = 1.0) -> float:
    """Eigenvalue that the largest of pure noise exceeds in 5 % of cases (Johnstone 2001), covariance divided by n.

    Raises:
        ValueError: for fewer than two rows.
    """
    if n < 2 or p < 1:
        raise ValueError(f"n must be at least 2 and p at least 1, got n={n}, p={p}")
    a, b = (n - 1) ** 0.5, p**0.5
    centre, scale = (a + b) ** 2 / n, (a + b) * (1 / a + 1 / b) ** (1 / 3) / n
    return sigma2 * (centre + TW1_95 * scale)

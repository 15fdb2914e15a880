"""The estimator: spikes of the covariance, their robustness, and the projection on those that are kept.

n: rows (images or tokens), p: features, gamma = p / n, K: spikes, eigenvalues above what noise alone would give.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from torchgraft.language.eigenshield.theory import (
    Noise,
    fit_noise,
    spike_forward,
    spike_inverse,
    tracy_widom_edge,
)


@dataclass(frozen=True)
class FreshSpikes:
    """What a new batch has outside the spikes of the calibration.

    Attributes:
        count: eigenvalues above ``edge``; 0 where the batch looks like the calibration.
        strengths: de-biased strengths theta of these, in units of the noise, descending.
        eigenvalues: all of the batch outside the old spikes, descending.
        edge: what noise, and old spikes and a mean that are known only from a sample, would hardly exceed.
    """

    count: int
    strengths: np.ndarray
    eigenvalues: np.ndarray
    edge: float


@dataclass
class _Stream:
    """Moments of the rows seen so far."""

    n: int
    mean: np.ndarray
    scatter: np.ndarray
    moved: int
    movement: np.ndarray


class EigenShield(TransformerMixin, BaseEstimator):
    """Projects embeddings on the directions that stand out of the noise and withstand perturbation.

    ``fit`` finds the spikes of the covariance of clean embeddings. Where perturbed embeddings of the same inputs are
    given, each spike gets a robustness-based nonconformity score, and those above its conformal quantile are dropped
    (reconstructed). This is no proof of safety: perturbations along directions of meaning pass, since any projection
    on meaning keeps them. "Causal" is the paper's word for a spike with a low score, and no causal inference.

    Args:
        alpha: level of the quantile; spikes are kept up to the ``ceil((K + 1)(1 - alpha))``-th smallest score, so
            fewer than ``1 / alpha`` spikes are all kept. The paper's value is not known to us; see ``sweep``.
        noise: estimator of the noise, as in ``fit_noise``.
        margin: ``tracy-widom`` asks for more than the largest eigenvalue of noise would exceed in 5 % of cases;
            ``edge`` for more than the edge of the bulk.
        nonconformity: ``sensitivity``, mean squared movement along a spike over its variance, needs no labels;
            ``margin``, one minus the mean sigmoid of a spike's share in the margin between the right and the hardest
            wrong class, needs labels and ``text_embeddings``.
        temperature: of the sigmoid.
        center: keep the mean of the embeddings and filter what is left; else filter the embedding itself.
        rescale: give each row its length back.
        strength: 0 leaves embeddings as they are, 1 filters them.
        min_components: keep at least so many of the strongest directions even where none stands out; 0 raises.
        whiten: divide each feature by its standard deviation before, and multiply after: for noise that differs from
            feature to feature, which the theory does not allow. The projection is then orthogonal in these units.
            Strong spikes on a few features distort the units in turn.
        solver: ``exact`` finds all eigenvalues, O(p^3); ``lanczos`` the largest ``max_spikes`` alone, the noise by
            the trace, so that ``noise`` must be ``iterative`` or a number.
        max_spikes: of ``lanczos``; should the last of them still be a spike, ``fit`` raises.

    Attributes:
        eigenvalues_, edge_, sigma2_, n_spikes_, gamma_: of the clean covariance; eigenvalues descending. Directions in
            which nothing varies (constant features, what a LayerNorm takes away) do not count in gamma; ``lanczos``
            knows of constant features alone.
        spike_strengths_: de-biased strength theta of each direction in ``spikes_``.
        spikes_: directions, (K, p), orthonormal (after whitening).
        rbns_: score of each spike, NaN without perturbed embeddings.
        causal_mask_: which spikes are kept.
        components_: kept directions, (kept, p).
        mean_, scale_: of the clean embeddings; ``scale_`` is 1 without whitening.
        residuals_: sorted residual energies of clean rows, for ``is_outlier``: of ``fit``, or of ``conformalize``.
        n_samples_seen_: rows.

    Raises:
        ValueError: fewer than two rows, rows that are not finite, no spike, every spike rejected, perturbed rows that
            are not paired, embeddings that fill a fraction of their space (no bulk to measure).

    Example:
        >>> rng = np.random.default_rng(0)
        >>> Z = rng.normal(size=(200, 20)); Z[:, 0] *= 5
        >>> shield = EigenShield().fit(Z)
        >>> shield.n_spikes_, shield.transform(Z).shape
        (1, (200, 20))
    """

    def __init__(
        self,
        alpha: float = 0.1,
        noise: Noise = "median",
        margin: str = "tracy-widom",
        nonconformity: str = "sensitivity",
        temperature: float = 1.0,
        center: bool = True,
        rescale: bool = False,
        strength: float = 1.0,
        min_components: int = 0,
        whiten: bool = False,
        solver: str = "exact",
        max_spikes: int = 64,
    ) -> None:
        self.alpha = alpha
        self.noise = noise
        self.margin = margin
        self.nonconformity = nonconformity
        self.temperature = temperature
        self.center = center
        self.rescale = rescale
        self.strength = strength
        self.min_components = min_components
        self.whiten = whiten
        self.solver = solver
        self.max_spikes = max_spikes

    def _check_parameters(self) -> None:
        if not self.alpha >= 0:
            raise ValueError(f"alpha must be at least 0, got {self.alpha}")
        if self.margin not in ("tracy-widom", "edge"):
            raise ValueError(f"margin must be 'tracy-widom' or 'edge', got {self.margin!r}")
        if self.nonconformity not in ("sensitivity", "margin"):
            raise ValueError(f"nonconformity must be 'sensitivity' or 'margin', got {self.nonconformity!r}")
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength must lie in 0..1, got {self.strength}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if self.min_components < 0:
            raise ValueError(f"min_components must be at least 0, got {self.min_components}")
        if self.solver not in ("exact", "lanczos"):
            raise ValueError(f"solver must be 'exact' or 'lanczos', got {self.solver!r}")
        if self.solver == "lanczos" and self.noise == "median":
            raise ValueError("solver='lanczos' does not see the median; use noise='iterative' or a number")
        if self.max_spikes < 1:
            raise ValueError(f"max_spikes must be at least 1, got {self.max_spikes}")

    def fit(self, X: Any, y: Any = None, Z_perturbed: Any = None, text_embeddings: Any = None) -> EigenShield:
        """Find the spikes and those to keep.

        Args:
            X: clean embeddings (n, p).
            y: classes of the rows, rows of ``text_embeddings``; for ``nonconformity="margin"``.
            Z_perturbed: embeddings of the same inputs, perturbed, (n, p), row by row.
            text_embeddings: of the classes, (C, p).
        """
        self._check_parameters()
        Z = self._rows(X, reset=True, least=2)
        moved = None if Z_perturbed is None else _paired(Z_perturbed, Z)
        self.__dict__.pop("_stream", None)
        n, p = Z.shape
        self.mean_ = Z.mean(0)
        centred = Z - self.mean_
        self.scale_ = _deviations((centred**2).mean(0)) if self.whiten else np.ones(p)
        centred /= self.scale_
        if self.solver == "lanczos":
            values, vectors = _largest(lambda v: centred.T @ (centred @ v) / n, p, self._wanted(n, p))
        elif p <= n:
            values, vectors = _eigh(centred.T @ centred / n)
        else:
            _, singular, vectors = np.linalg.svd(centred, full_matrices=False)
            values = singular**2 / n
        self._find_spikes(values, vectors, n, (centred**2).mean(0))
        if moved is None:
            self.rbns_ = np.full(len(self.spikes_), np.nan)
        elif self.nonconformity == "sensitivity":
            steps = ((moved - Z) / self.scale_) @ self.spikes_.T
            self.rbns_ = (steps**2).mean(0) / self.eigenvalues_[: len(self.spikes_)]
        else:
            self.rbns_ = self._margins(moved, y, text_embeddings)
        self._choose(self.alpha)
        self.residuals_ = np.sort(self._residual(Z))
        return self

    def partial_fit(self, X: Any, y: Any = None, Z_perturbed: Any = None, solve: bool = True) -> EigenShield:
        """Add rows to a streamed covariance, for tokens that do not fit in memory; O(rows p^2), kept in float64.

        A stream starts with the first call after construction or after ``fit``. No residual energies are kept: call
        ``conformalize`` before ``is_outlier``.

        Args:
            X: clean embeddings (rows, p).
            y: ignored.
            Z_perturbed: paired with X; in every call of a stream or in none. Scored by ``sensitivity`` alone.
            solve: find spikes after these rows; with False, rows are added only, and the last call must solve.
        """
        self._check_parameters()
        if Z_perturbed is not None and self.nonconformity == "margin":
            raise ValueError(
                "partial_fit scores by nonconformity='sensitivity'; 'margin' needs all rows at once, in fit"
            )
        stream: _Stream | None = getattr(self, "_stream", None)
        Z = self._rows(X, reset=stream is None, least=1)
        steps = np.zeros((0, Z.shape[1])) if Z_perturbed is None else _paired(Z_perturbed, Z) - Z
        if stream is None:
            p = Z.shape[1]
            stream = _Stream(0, np.zeros(p), np.zeros((p, p)), 0, np.zeros((p, p)))
        elif (stream.moved > 0) != (len(steps) > 0):
            raise ValueError("Z_perturbed must be given in every partial_fit of a stream or in none")
        n, mean = len(Z), Z.mean(0)
        both = stream.n + n
        apart = mean - stream.mean
        # merging two samples' moments, so that a large common mean does not cancel
        scatter = (Z - mean).T @ (Z - mean) + np.outer(apart, apart) * (stream.n * n / both)
        self._stream = _Stream(
            both, stream.mean + apart * (n / both), stream.scatter + scatter, stream.moved + len(steps),
            stream.movement + steps.T @ steps,
        )  # fmt: skip
        if solve:
            self._solve_stream()
        return self

    def _solve_stream(self) -> None:
        stream = self._stream
        n, p = stream.n, len(stream.mean)
        if n < 2:
            raise ValueError(f"Found array with {n} sample(s) in all while a minimum of 2 is required by EigenShield.")
        covariance = stream.scatter / n
        self.mean_ = stream.mean
        self.scale_ = _deviations(np.diag(covariance)) if self.whiten else np.ones(p)
        covariance = covariance / np.outer(self.scale_, self.scale_)
        if self.solver == "lanczos":
            values, vectors = _largest(lambda v: covariance @ v, p, self._wanted(n, p))
        else:
            values, vectors = _eigh(covariance)
        self._find_spikes(values, vectors, n, np.diag(covariance))
        if stream.moved:
            along = self.spikes_ / self.scale_
            moved = np.einsum("kp,pq,kq->k", along, stream.movement, along, optimize=True) / n
            self.rbns_ = moved / self.eigenvalues_[: len(self.spikes_)]
        else:
            self.rbns_ = np.full(len(self.spikes_), np.nan)
        self._choose(self.alpha)
        self.__dict__.pop("residuals_", None)

    def _rows(self, X: Any, *, reset: bool = False, least: int = 1) -> np.ndarray:
        if isinstance(X, Tensor):
            X = X.detach().cpu().double().numpy()
        found = validate_data(self, X, dtype=[np.float64, np.float32], reset=reset, ensure_min_samples=least)
        return found.astype(np.float64)

    def _wanted(self, n: int, p: int) -> int:
        return min(self.max_spikes + 1, p - 1, n - 1)

    def _find_spikes(self, values: np.ndarray, vectors: np.ndarray, n: int, variances: np.ndarray) -> None:
        # should anything below raise, the old directions must not be left beside the new mean
        self.__dict__.pop("components_", None)
        every, total, varying = vectors.shape[1], variances.sum(), int((variances > 0).sum())
        # without its mean, a sample of n rows has n - 1 directions
        rank = min(n - 1, varying)
        used = min(rank, int((values > 1e-12 * values[0]).sum()))
        if isinstance(self.noise, str) and (used == 0 or (self.solver == "exact" and 2 * used < rank)):
            raise ValueError(
                f"X varies in {used} of {every} directions, so that there is no bulk to measure the noise by; use "
                "embeddings that fill their space (an earlier layer), or noise=<its variance>"
            )
        # constant features, and the direction that a LayerNorm takes away, hold no noise: they are no dimensions
        p = used if self.solver == "exact" and used < rank else varying
        rank = min(n - 1, p)
        self.gamma_, self.n_samples_seen_ = p / n, n
        self.eigenvalues_ = values[:rank]
        if self.solver == "lanczos" and isinstance(self.noise, str):
            self.sigma2_ = _noise_by_trace(self.eigenvalues_, total, rank, self.gamma_)
        else:
            self.sigma2_ = fit_noise(self.eigenvalues_, self.gamma_, self.noise)
        law = (1 + self.gamma_**0.5) ** 2 * self.sigma2_
        self.edge_ = tracy_widom_edge(n, p, self.sigma2_) if self.margin == "tracy-widom" else law
        self.n_spikes_ = int((self.eigenvalues_ > self.edge_).sum())
        if self.solver == "lanczos" and self.n_spikes_ > self.max_spikes:
            raise ValueError(f"more than max_spikes={self.max_spikes} spikes; raise it, or use solver='exact'")
        kept = max(self.n_spikes_, min(self.min_components, len(self.eigenvalues_)))
        if not kept:
            raise ValueError(
                f"no spike found: the largest eigenvalue, {self.eigenvalues_[0]:.4g}, is not above what noise gives, "
                f"{self.edge_:.4g}, for {n} rows of {p} features; use more data, or min_components"
            )
        self.spikes_ = np.ascontiguousarray(vectors[:kept])
        self.spike_strengths_ = spike_inverse(self.eigenvalues_[:kept], self.gamma_, self.sigma2_)

    def _margins(self, moved: np.ndarray, y: Any, texts: Any) -> np.ndarray:
        if y is None or texts is None:
            raise ValueError(
                "nonconformity='margin' needs y, the class of each row, and text_embeddings (classes, features)"
            )
        texts, y = np.asarray(texts, dtype=np.float64), np.asarray(y)
        n, p = moved.shape
        if texts.ndim != 2 or texts.shape[1] != p or len(texts) < 2:
            raise ValueError(f"text_embeddings must be (at least 2 classes, {p}), got {texts.shape}")
        if not np.isfinite(texts).all():
            raise ValueError("text_embeddings hold NaN or infinity")
        if y.shape != (n,) or not np.isin(y, np.arange(len(texts))).all():
            raise ValueError(f"y must be {n} classes in 0..{len(texts) - 1}")
        y = y.astype(int)
        logits = moved @ texts.T
        logits[np.arange(n), y] = -np.inf
        towards = ((texts[y] - texts[logits.argmax(1)]) * self.scale_) @ self.spikes_.T
        margins = ((moved / self.scale_) @ self.spikes_.T) * towards
        return 1 - (1 / (1 + np.exp(-np.clip(margins / self.temperature, -500, 500)))).mean(0)

    def _choose(self, alpha: float) -> None:
        mask = self._mask(alpha)
        if not mask.any():
            raise ValueError(f"every one of {len(mask)} spikes is rejected at alpha={alpha}; choose a smaller one")
        self.causal_mask_ = mask
        self.components_ = self.spikes_[mask]

    def _mask(self, alpha: float) -> np.ndarray:
        if np.isnan(self.rbns_).all():
            return np.ones(len(self.rbns_), dtype=bool)
        return self.rbns_ <= _quantile(self.rbns_, alpha)

    def sweep(self, alphas: Iterable[float]) -> dict[float, np.ndarray]:
        """Which spikes each level would keep, (K,) booleans; nothing is changed.

        Example:
            >>> rng = np.random.default_rng(0)
            >>> Z = rng.normal(size=(400, 20)); Z[:, :3] *= 5
            >>> shield = EigenShield().fit(Z, Z_perturbed=Z + rng.normal(size=Z.shape))
            >>> [int(mask.sum()) for mask in shield.sweep([0.1, 0.5, 0.7]).values()]
            [3, 2, 2]
        """
        check_is_fitted(self, "rbns_")
        return {alpha: self._mask(alpha) for alpha in alphas}

    def reselect(self, alpha: float) -> EigenShield:
        """Choose again among the spikes that were found, at another level; residual energies of ``fit`` are dropped.

        Raises:
            ValueError: where every spike would be rejected; nothing is changed then.
        """
        check_is_fitted(self, "rbns_")
        if not alpha >= 0:
            raise ValueError(f"alpha must be at least 0, got {alpha}")
        self._choose(alpha)
        self.alpha = alpha
        self.__dict__.pop("residuals_", None)
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Filtered embeddings, (rows, p): float32 for float32, else float64."""
        check_is_fitted(self, "components_")
        Z = self._rows(X)
        down, up = self.components_ / self.scale_, self.components_ * self.scale_
        base = Z - self.mean_ if self.center else Z
        out = blended(Z, (base @ down.T) @ up, self.mean_ if self.center else 0.0, self.rescale, self.strength)
        return out.astype(np.float32) if getattr(X, "dtype", None) == np.float32 else out

    def _residual(self, Z: np.ndarray) -> np.ndarray:
        centred = (Z - self.mean_) / self.scale_
        total = (centred**2).sum(1)
        inside = ((centred @ self.components_.T) ** 2).sum(1)
        return np.where(total > 0, 1 - inside / np.where(total > 0, total, 1), 0.0).clip(0, 1)

    def score_samples(self, X: Any) -> np.ndarray:
        """Residual energy of each row: the share of its squared distance to the mean that the filter removes, 0..1."""
        check_is_fitted(self, "components_")
        return self._residual(self._rows(X))

    def conformalize(self, X: Any) -> EigenShield:
        """Take the threshold of ``is_outlier`` from clean rows that ``fit`` has not seen (split-conformal)."""
        self.residuals_ = np.sort(self.score_samples(X))
        return self

    def is_outlier(self, X: Any, level: float = 0.05) -> np.ndarray:
        """Rows with more residual energy than a share ``level`` of clean rows have.

        After ``conformalize``, a new clean row is flagged with probability at most ``level``. Without it the rows of
        ``fit`` set the threshold; they shaped the subspace, so that the share is somewhat higher.

        Raises:
            ValueError: for a level that so few clean rows cannot give, or without clean rows to compare with.
        """
        check_is_fitted(self, "components_")
        if not hasattr(self, "residuals_"):
            raise ValueError("is_outlier needs residual energies of clean rows; call conformalize(clean rows) first")
        n = len(self.residuals_)
        k = _rank(n, level)
        if not 0 < level < 1 or k > n:
            raise ValueError(f"level must lie between 1 / {n + 1} and 1 for {n} clean rows, got {level}")
        return self.score_samples(X) > self.residuals_[k - 1]

    def fresh_spikes(self, X: Any) -> FreshSpikes:
        """Whether a new batch varies, or lies, in directions that the calibration had not: a test of the whole batch.

        The old spikes are projected out and the rest is compared with the old noise. What the projection must leave
        behind is allowed for: a spike of strength theta, known by a sample, leaves
        ``gamma (1 + theta) / (theta + gamma)``, and the mean leaves gamma (our derivation from the overlap formula).

        Example:
            >>> rng = np.random.default_rng(0)
            >>> Z = rng.normal(size=(800, 40)); Z[:, 0] *= 5
            >>> shield, batch = EigenShield().fit(Z), rng.normal(size=(100, 40))
            >>> shield.fresh_spikes(batch).count, shield.fresh_spikes(batch + 1.0).count
            (0, 1)
        """
        check_is_fitted(self, "components_")
        Z = self._rows(X, least=2)
        n, p = len(Z), round(self.gamma_ * self.n_samples_seen_) - len(self.spikes_)
        if p < 1:
            raise ValueError(f"all {len(self.spikes_)} directions are spikes; there is no room for fresh ones")
        white = (Z - self.mean_) / self.scale_
        rest = white - (white @ self.spikes_.T) @ self.spikes_
        values = np.linalg.svd(rest, compute_uv=False)[: min(n, p)] ** 2 / n
        gamma = p / n
        theta = np.maximum(self.spike_strengths_, 1e-12)
        left = np.append(self.gamma_ * (1 + theta) / (theta + self.gamma_), self.gamma_)
        expected, _ = spike_forward(left, gamma, self.sigma2_)
        # a sample spike is normal around its limit, variance 2 l^2 (1 - gamma / theta^2) / n (Paul 2007); 2.33: 1 %
        spread = self.sigma2_ * (1 + left) * np.sqrt(2 / n * np.maximum(1 - gamma / left**2, 0))
        edge = max(tracy_widom_edge(n, p, self.sigma2_), float((expected + 2.33 * spread).max()))
        fresh = values[values > edge]
        return FreshSpikes(len(fresh), spike_inverse(fresh, gamma, self.sigma2_), values, edge)


def _paired(moved: Any, Z: np.ndarray) -> np.ndarray:
    if isinstance(moved, Tensor):
        moved = moved.detach().cpu().double().numpy()
    moved = np.asarray(moved, dtype=np.float64)
    if moved.shape != Z.shape:
        raise ValueError(f"Z_perturbed must be paired with X, shape {Z.shape}, got {moved.shape}")
    if not np.isfinite(moved).all():
        raise ValueError("Z_perturbed holds NaN or infinity")
    return moved


def _deviations(variances: np.ndarray) -> np.ndarray:
    return np.sqrt(np.where(variances > 0, variances, 1.0))


def _eigh(covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values, vectors = np.linalg.eigh(covariance)
    return values[::-1].clip(min=0), vectors[:, ::-1].T


def _largest(multiply: Any, p: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest eigenvalues of a covariance that is known by its products alone, descending."""
    from scipy.sparse.linalg import LinearOperator, eigsh

    if k < 1:
        raise ValueError("solver='lanczos' needs at least 2 features and 2 rows; use solver='exact'")
    start = np.random.default_rng(0).normal(size=p)
    operator = LinearOperator((p, p), matvec=multiply, dtype=np.float64)
    values, vectors = eigsh(operator, k, which="LA", v0=start, ncv=min(p, 2 * k + 20))
    return values[::-1].clip(min=0), vectors[:, ::-1].T


def _noise_by_trace(largest: np.ndarray, total: float, rank: int, gamma: float) -> float:
    """The iterative estimate of ``fit_noise``, where the bulk is known by its sum alone."""
    spikes, edge = 0, (1 + gamma**0.5) ** 2
    while True:
        sigma2 = (total - largest[:spikes].sum()) / (rank - spikes) / max(1.0, gamma)
        found = int((largest > sigma2 * edge).sum())
        if found <= spikes:
            return float(sigma2)
        spikes = found


def _rank(n: int, alpha: float) -> int:
    # rounded first: 10 * (1 - 0.7) is a little above 3, and its ceiling would be 4
    return int(np.ceil(np.round((n + 1) * (1 - alpha), 9)))


def _quantile(scores: np.ndarray, alpha: float) -> float:
    k = _rank(len(scores), alpha)
    if k > len(scores):
        return np.inf
    return -np.inf if k < 1 else float(np.sort(scores)[k - 1])


def blended(z: Any, kept: Any, mean: Any, rescale: bool, strength: float) -> Any:
    """Numpy or torch: the kept part with its mean, its length and its share of the original."""
    out = kept + mean
    if rescale:
        length, now = ((a**2).sum(-1) ** 0.5 for a in (z, out))
        # a row whose filtered form is 0 has no direction to be stretched along
        out = out * (length / (now + (now == 0)))[..., None]
    return out if strength == 1 else z + strength * (out - z)

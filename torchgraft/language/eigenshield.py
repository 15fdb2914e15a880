"""EigenShield: keep the directions of an embedding space that carry structure and withstand perturbation.

Darabi et al., "EigenShield: Causal Subspace Filtering via Random Matrix Theory for Adversarially Robust
Vision-Language Models", arXiv 2502.14976 (2025). Only the abstract and summaries could be read and no official code was
found: the random-matrix parts are standard theory, while the robustness score, its quantile and the place of the filter
are reconstructed.

n: rows (images or tokens), p: features, gamma = p / n, K: spikes, eigenvalues above what noise alone would give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

__all__ = [
    "EigenShield",
    "MarchenkoPastur",
    "SpectralFilter",
    "attach",
    "bbp_threshold",
    "collect_embeddings",
    "fit_noise",
    "spike_forward",
    "spike_inverse",
    "tracy_widom_edge",
]

Noise = Literal["median", "iterative"] | float
_TW1_95 = 0.9793  # the 95 % point of the Tracy-Widom law of order 1 (Johnstone 2001)


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
    return sigma2 * (centre + _TW1_95 * scale)


class EigenShield(TransformerMixin, BaseEstimator):
    """Projects embeddings on the directions that stand out of the noise and withstand perturbation.

    ``fit`` finds the spikes of the covariance of clean embeddings. Where perturbed embeddings of the same inputs are
    given, each spike gets a robustness-based nonconformity score, and those above its conformal quantile are dropped
    (reconstructed). This is no proof of safety: perturbations along directions of meaning pass, since any projection
    on meaning keeps them.

    Args:
        alpha: level of the quantile; spikes are kept up to the ``ceil((K + 1)(1 - alpha))``-th smallest score. The
            paper's value is not known to us.
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

    Attributes:
        eigenvalues_, edge_, sigma2_, n_spikes_: of the clean covariance; eigenvalues descending.
        rbns_: score of each spike, NaN without perturbed embeddings.
        causal_mask_: which spikes are kept.
        components_: kept directions, (kept, p).
        mean_: of the clean embeddings.
        residuals_: sorted residual energies of the rows of ``fit``, for ``is_outlier``.

    Raises:
        ValueError: fewer than two rows, rows that are not finite, no spike, every spike rejected, perturbed rows that
            are not paired.

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

    def fit(self, X: Any, y: Any = None, Z_perturbed: Any = None, text_embeddings: Any = None) -> EigenShield:
        """Find the spikes and those to keep.

        Args:
            X: clean embeddings (n, p).
            y: classes of the rows, rows of ``text_embeddings``; for ``nonconformity="margin"``.
            Z_perturbed: embeddings of the same inputs, perturbed, (n, p), row by row.
            text_embeddings: of the classes, (C, p).
        """
        self._check_parameters()
        Z = validate_data(self, X, dtype=[np.float64, np.float32], ensure_min_samples=2).astype(np.float64)
        n, p = Z.shape
        self.mean_ = Z.mean(0)
        centred = Z - self.mean_
        if p <= n:
            values, vectors = np.linalg.eigh(centred.T @ centred / n)
            values, vectors = values[::-1].clip(min=0), vectors[:, ::-1].T
        else:
            _, singular, vectors = np.linalg.svd(centred, full_matrices=False)
            values = singular**2 / n
        # without its mean, a sample of n rows has n - 1 directions
        rank = min(n - 1, p)
        self.eigenvalues_ = values[:rank]
        self.sigma2_ = fit_noise(self.eigenvalues_, p / n, self.noise)
        law = (1 + (p / n) ** 0.5) ** 2 * self.sigma2_
        self.edge_ = tracy_widom_edge(n, p, self.sigma2_) if self.margin == "tracy-widom" else law
        self.n_spikes_ = int((self.eigenvalues_ > self.edge_).sum())
        kept = max(self.n_spikes_, min(self.min_components, rank))
        if not kept:
            raise ValueError(
                f"no spike found: the largest eigenvalue, {self.eigenvalues_[0]:.4g}, is not above what noise gives, "
                f"{self.edge_:.4g}, for {n} rows of {p} features; use more data, or min_components"
            )
        spikes = vectors[:kept]
        if Z_perturbed is None:
            self.rbns_ = np.full(kept, np.nan)
            self.causal_mask_ = np.ones(kept, dtype=bool)
        else:
            moved = np.asarray(Z_perturbed, dtype=np.float64)
            if moved.shape != Z.shape:
                raise ValueError(f"Z_perturbed must be paired with X, shape {Z.shape}, got {moved.shape}")
            if not np.isfinite(moved).all():
                raise ValueError("Z_perturbed holds NaN or infinity")
            self.rbns_ = self._scores(Z, moved, spikes, values[:kept], y, text_embeddings)
            self.causal_mask_ = self.rbns_ <= _quantile(self.rbns_, self.alpha)
            if not self.causal_mask_.any():
                raise ValueError(f"every one of {kept} spikes is rejected at alpha={self.alpha}; choose a smaller one")
        self.components_ = spikes[self.causal_mask_]
        self.residuals_ = np.sort(self._residual(Z))
        return self

    def _scores(
        self, Z: np.ndarray, moved: np.ndarray, spikes: np.ndarray, values: np.ndarray, y: Any, texts: Any
    ) -> np.ndarray:
        if self.nonconformity == "sensitivity":
            return (((moved - Z) @ spikes.T) ** 2).mean(0) / values
        if y is None or texts is None:
            raise ValueError(
                "nonconformity='margin' needs y, the class of each row, and text_embeddings (classes, features)"
            )
        texts, y = np.asarray(texts, dtype=np.float64), np.asarray(y)
        if texts.ndim != 2 or texts.shape[1] != Z.shape[1] or len(texts) < 2:
            raise ValueError(f"text_embeddings must be (at least 2 classes, {Z.shape[1]}), got {texts.shape}")
        if y.shape != (len(Z),) or not np.isin(y, np.arange(len(texts))).all():
            raise ValueError(f"y must be {len(Z)} classes in 0..{len(texts) - 1}")
        logits = moved @ texts.T
        right = texts[y]
        logits[np.arange(len(y)), y] = -np.inf
        margins = (moved @ spikes.T) * ((right - texts[logits.argmax(1)]) @ spikes.T)
        return 1 - (1 / (1 + np.exp(-np.clip(margins / self.temperature, -500, 500)))).mean(0)

    def transform(self, X: Any) -> np.ndarray:
        """Filtered embeddings, (rows, p)."""
        check_is_fitted(self)
        Z = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        out = _filtered(Z, self.mean_, self.components_, self.center, self.rescale, self.strength)
        return out.astype(Z.dtype)

    def _residual(self, Z: np.ndarray) -> np.ndarray:
        centred = Z - self.mean_
        total = (centred**2).sum(1)
        inside = ((centred @ self.components_.T) ** 2).sum(1)
        return np.where(total > 0, 1 - inside / np.where(total > 0, total, 1), 0.0).clip(0, 1)

    def score_samples(self, X: Any) -> np.ndarray:
        """Residual energy of each row: the share of its squared distance to the mean that the filter removes, 0..1."""
        check_is_fitted(self)
        return self._residual(validate_data(self, X, dtype=[np.float64, np.float32], reset=False).astype(np.float64))

    def is_outlier(self, X: Any, level: float = 0.05) -> np.ndarray:
        """Rows with more residual energy than a share ``level`` of clean rows have (split-conformal threshold).

        The rows of ``fit`` shaped the subspace, so that on new clean rows the share is somewhat higher.

        Raises:
            ValueError: for a level that so few clean rows cannot give.
        """
        n = len(self.residuals_)
        k = int(np.ceil((n + 1) * (1 - level)))
        if not 0 < level < 1 or k > n:
            raise ValueError(f"level must lie between 1 / {n + 1} and 1 for {n} clean rows, got {level}")
        return self.score_samples(X) > self.residuals_[k - 1]


def _quantile(scores: np.ndarray, alpha: float) -> float:
    k = int(np.ceil((len(scores) + 1) * (1 - alpha)))
    if k > len(scores):
        return np.inf
    return -np.inf if k < 1 else float(np.sort(scores)[k - 1])


def _filtered(z: Any, mean: Any, components: Any, center: bool, rescale: bool, strength: float) -> Any:
    """Numpy or torch: two thin products, never the p x p projector."""
    base = z - mean if center else z
    kept = (base @ components.T) @ components
    out = kept + mean if center else kept
    if rescale:
        torch_like = isinstance(z, Tensor)
        length, now = ((a**2).sum(-1) ** 0.5 for a in (z, out))
        if torch_like:
            out = out * (length / now.clamp(min=torch.finfo(out.dtype).tiny))[..., None]
        else:
            out = out * (length / np.maximum(now, np.finfo(np.float64).tiny))[..., None]
    return out if strength == 1 else z + strength * (out - z)


class SpectralFilter(nn.Module):
    """A fitted ``EigenShield`` on tensors (..., p), of any dtype and device; computed in float32 at least.

    Args:
        shield: fitted.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> Z = rng.normal(size=(200, 20)); Z[:, 0] *= 5
        >>> SpectralFilter(EigenShield().fit(Z))(torch.randn(2, 7, 20)).shape
        torch.Size([2, 7, 20])
    """

    mean: Tensor
    components: Tensor

    def __init__(self, shield: EigenShield) -> None:
        super().__init__()
        check_is_fitted(shield)
        self.register_buffer("mean", torch.from_numpy(np.ascontiguousarray(shield.mean_)).float())
        self.register_buffer("components", torch.from_numpy(np.ascontiguousarray(shield.components_)).float())
        self.center, self.rescale, self.strength = shield.center, shield.rescale, shield.strength

    def forward(self, z: Float[Tensor, "*rows p"]) -> Float[Tensor, "*rows p"]:
        """Filtered embeddings, in the dtype of ``z``."""
        if z.shape[-1] != len(self.mean):
            raise ValueError(f"z must have {len(self.mean)} features, those of the fit, got {z.shape[-1]}")
        wide = torch.promote_types(z.dtype, torch.float32)
        mean, components = self.mean.to(z.device, wide), self.components.to(z.device, wide)
        return _filtered(z.to(wide), mean, components, self.center, self.rescale, self.strength).to(z.dtype)


def _first(output: Any) -> Tensor:
    found = (
        output
        if isinstance(output, Tensor)
        else next(
            (v for v in (output.values() if isinstance(output, Mapping) else output) if isinstance(v, Tensor)), None
        )
    )
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.ndim < 2:
        raise ValueError(f"the module must return a float tensor (..., features) first, got {type(output).__name__}")
    return found


def _put(output: Any, tensor: Tensor) -> Any:
    if isinstance(output, Tensor):
        return tensor
    if isinstance(output, Mapping):
        key = next(k for k, v in output.items() if isinstance(v, Tensor))
        changed: dict[str, Any] = {**output, key: tensor}
        return type(output)(**changed)
    place = next(i for i, v in enumerate(output) if isinstance(v, Tensor))
    return type(output)((*output[:place], tensor, *output[place + 1 :]))


def _module(model: nn.Module, module: str | nn.Module) -> nn.Module:
    if isinstance(module, nn.Module):
        if not any(m is module for m in model.modules()):
            raise ValueError(f"module {type(module).__name__} is not part of the model")
        return module
    names = dict(model.named_modules())
    if module not in names:
        import difflib

        near = difflib.get_close_matches(module, names, 1)
        raise ValueError(
            f"no module {module!r} in {type(model).__name__}" + (f"; did you mean {near[0]!r}?" if near else "")
        )
    return names[module]


@contextmanager
def attach(model: nn.Module, module: str | nn.Module, shield: EigenShield) -> Iterator[SpectralFilter]:
    """Filter what a module returns, while the context lasts.

    Args:
        model: any network.
        module: part of it, or its name: a vision tower or a projector. The first tensor of its output, (B, p) or
            (B, T, p), is filtered.
        shield: fitted on such embeddings.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 20), nn.Linear(20, 3))
        >>> Z = collect_embeddings(net, "0", [torch.randn(200, 4)])
        >>> with attach(net, "0", EigenShield(noise=1e-6).fit(Z)):
        ...     net(torch.randn(2, 4)).shape
        torch.Size([2, 3])
    """
    filtering = SpectralFilter(shield)
    handle = _module(model, module).register_forward_hook(lambda _m, _i, out: _put(out, filtering(_first(out))))
    try:
        yield filtering
    finally:
        handle.remove()


@torch.no_grad()
def collect_embeddings(
    model: nn.Module,
    module: str | nn.Module,
    batches: Iterable[Any],
    pool: Literal["mean", "tokens"] = "mean",
    call: Callable[[nn.Module, Any], Any] | None = None,
) -> np.ndarray:
    """What a module returns for batches, as rows (n, p) of float64 for ``EigenShield.fit``.

    Args:
        model: any network; its mode is left alone.
        module: part of it, or its name.
        batches: tensors, or mappings of keyword arguments.
        pool: ``mean`` over tokens gives one row per input; ``tokens`` stacks them all, though tokens of one image are
            not independent, and gamma = p / n then promises more than there is.
        call: ``(model, batch) -> anything`` instead.

    Raises:
        ValueError: when there are no batches, or the module is not run.
    """
    if pool not in ("mean", "tokens"):
        raise ValueError(f"pool must be 'mean' or 'tokens', got {pool!r}")
    rows: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        z = _first(output).double()
        rows.append((z.flatten(1, -2).mean(1) if z.ndim > 2 and pool == "mean" else z.flatten(0, -2)).cpu())

    handle = _module(model, module).register_forward_hook(keep)
    try:
        for batch in batches:
            if call is not None:
                call(model, batch)
            elif isinstance(batch, Mapping):
                model(**batch)
            else:
                model(batch)
    finally:
        handle.remove()
    if not rows:
        raise ValueError("nothing was collected: batches is empty, or the model does not run that module")
    return torch.cat(rows).numpy()

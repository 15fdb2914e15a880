"""Directions as concepts: sparse dictionaries of vectors, and structure of a set of vectors beside its null models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import sparse
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.decomposition import NMF, FastICA
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor
from torch.nn import functional as F

from torchgraft.language.embedding_walk.nulls import (
    Statistic,
    gaussian_like,
    gaussian_of_lengths,
    generator,
    rotation,
    shuffled_dimensions,
)

Method = Literal["dictionary", "nmf", "ica"]
Null = Literal["gaussian", "lengths", "shuffled"]
NULLS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "gaussian": gaussian_like, "lengths": gaussian_of_lengths, "shuffled": shuffled_dimensions
}  # fmt: skip


def sparse_codes(x: Tensor, atoms: Tensor, sparsity: int) -> Tensor:
    """Orthogonal matching pursuit of all rows of ``x`` (N, D) at once on unit ``atoms`` (K, D): codes (N, K).

    scikit-learn's goes row by row, which on thousands of token vectors takes many times longer.
    """
    gram, reading = atoms @ atoms.T, x @ atoms.T
    left, chosen = reading.clone(), torch.empty(len(x), 0, dtype=torch.int64)
    taken = torch.zeros_like(reading, dtype=torch.bool)
    solved = torch.empty(len(x), 0, dtype=x.dtype)
    for _ in range(min(sparsity, *atoms.shape)):
        best = left.abs().masked_fill(taken, -1).argmax(1, keepdim=True)
        chosen = torch.cat([chosen, best], 1)
        taken.scatter_(1, best, True)
        among = gram[chosen[:, :, None], chosen[:, None, :]]
        # atoms may coincide on tiny data
        among = among + 1e-10 * torch.eye(chosen.shape[1], dtype=x.dtype)
        solved = torch.linalg.solve(among, reading.gather(1, chosen)[..., None])[..., 0]
        # codes @ gram, of the few rows that count
        left = reading - F.embedding_bag(chosen, gram, per_sample_weights=solved, mode="sum")
    return torch.zeros_like(reading).scatter_(1, chosen, solved)


def _dictionary(x: Tensor, count: int, sparsity: int, iterations: int, draw: torch.Generator) -> Tensor:
    """Method of optimal directions: sparse codes and the least-squares atoms for them, in turn."""
    noise = torch.randn(count, x.shape[1], generator=draw, dtype=x.dtype)
    order = torch.randperm(len(x), generator=draw)[:count]
    atoms = noise
    atoms[: len(order)] = x[order] + 1e-6 * noise[: len(order)]
    atoms = F.normalize(atoms, dim=1)
    for _ in range(iterations):
        codes = sparse_codes(x, atoms, sparsity)
        squared = codes.T @ codes
        ridge = 1e-8 * squared.diagonal().mean().clamp(min=1e-12) * torch.eye(count, dtype=x.dtype)
        fresh = torch.linalg.solve(squared + ridge, codes.T @ x)
        missed = (x - codes @ fresh).norm(dim=1)
        alike = (F.normalize(fresh, dim=1) @ F.normalize(fresh, dim=1).T).abs().tril(-1).amax(1) > 0.98
        useless = ((codes.abs() > 1e-9).sum(0) < 2) | (fresh.norm(dim=1) < 1e-12) | alike
        # atoms of no use start again from the rows that are explained worst
        places = useless.nonzero()[:, 0][: len(x)]
        worst = missed.topk(len(places)).indices
        fresh[places] = x[worst] + 1e-6 * torch.randn(len(places), x.shape[1], generator=draw, dtype=x.dtype)
        fresh[fresh.norm(dim=1) < 1e-12] = 1.0
        atoms = F.normalize(fresh, dim=1)
    return atoms


class ConceptSpace(TransformerMixin, BaseEstimator):
    """Vectors as weighted sets of concepts: ``x ~ mean + sum_k a_k u_k`` (concept-space theory; defaults ours).

    Args:
        n_concepts: K; 4 D for dictionaries, and D, or the samples if fewer, for the others where None.
        method: ``dictionary`` (sparse, orthogonal matching pursuit in turn with least squares), ``nmf`` (scikit-learn's
            on vectors shifted to start at 0) or ``ica`` (scikit-learn's FastICA).
        sparsity: concepts for each vector, of ``dictionary``.
        max_iter: rounds.
        n_init: starts of ``dictionary``, of which the best is kept.
        random_state: seed.

    Attributes:
        components_: (K, D), of length 1 for dictionaries.
        mean_: (D,), taken off before; the minimum for ``nmf``.
        n_iter_: rounds made.
        codes_: sparse (N, K), of the vectors that it was fitted to.

    Raises:
        ValueError: at ``fit``, for parameters that cannot be.

    Example:
        >>> x = torch.randn(60, 5).numpy()
        >>> space = ConceptSpace(n_concepts=10, sparsity=2).fit(x)
        >>> space.transform(x[:3]).shape, bool((space.transform(x) != 0).sum(1).max() <= 2)
        ((3, 10), True)
    """

    def __init__(
        self, n_concepts: int | None = None, method: Method = "dictionary", sparsity: int = 8, max_iter: int = 10,
        n_init: int = 1, random_state: int = 0,
    ) -> None:  # fmt: skip
        self.n_concepts, self.method, self.sparsity = n_concepts, method, sparsity
        self.max_iter, self.n_init, self.random_state = max_iter, n_init, random_state

    def fit(self, X: Any, y: Any = None) -> ConceptSpace:
        """Find the concepts of vectors (N, D)."""
        if self.method not in ("dictionary", "nmf", "ica"):
            raise ValueError(f"method must be 'dictionary', 'nmf' or 'ica', got {self.method!r}")
        for name in ("n_concepts", "sparsity", "max_iter", "n_init"):
            value = getattr(self, name)
            if name == "n_concepts" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{name} must be a whole number above 0, got {value!r}")
        X = validate_data(self, X, dtype=np.float64, ensure_min_samples=2)
        least = min(X.shape)
        if self.method == "dictionary":
            count = 4 * X.shape[1] if self.n_concepts is None else self.n_concepts
            self.mean_ = X.mean(0)
            draw = generator(self.random_state)
            x = torch.from_numpy(X - self.mean_)
            starts = [_dictionary(x, count, self.sparsity, self.max_iter, draw) for _ in range(self.n_init)]
            if self.n_init > 1:
                missed = [(x - sparse_codes(x, atoms, self.sparsity) @ atoms).norm().item() for atoms in starts]
                starts = [starts[missed.index(min(missed))]]
            self.components_, self.n_iter_ = starts[0].numpy(), self.max_iter
        else:
            count = least if self.n_concepts is None else self.n_concepts
            if count > least:
                raise ValueError(f"n_concepts must be at most {least} for {self.method!r}, got {count}")
            self.mean_ = X.min(0) if self.method == "nmf" else X.mean(0)
            found: Any = (NMF if self.method == "nmf" else FastICA)(
                count, max_iter=20 * self.max_iter, random_state=self.random_state
            )
            found.fit(X - self.mean_)
            self.components_ = found.components_ if self.method == "nmf" else found.mixing_.T
            self._inner, self.n_iter_ = found, max(1, found.n_iter_)
        self.codes_ = sparse.csr_matrix(self._coded(X))
        return self

    def _coded(self, X: np.ndarray) -> np.ndarray:
        shifted = X - self.mean_
        if self.method == "dictionary":
            return sparse_codes(torch.from_numpy(shifted), torch.from_numpy(self.components_), self.sparsity).numpy()
        codes: np.ndarray = self._inner.transform(shifted.clip(min=0) if self.method == "nmf" else shifted)
        return codes

    def transform(self, X: Any) -> np.ndarray:
        """Weights (N, K) of the concepts in vectors (N, D); ``nmf`` takes what lies below the fitted minimum for it."""
        check_is_fitted(self)
        return self._coded(validate_data(self, X, dtype=np.float64, reset=False))

    def inverse_transform(self, X: Any) -> np.ndarray:
        """Vectors (N, D) from weights (N, K)."""
        check_is_fitted(self)
        return np.asarray(np.asarray(X) @ self.components_ + self.mean_)

    def score(self, X: Any, y: Any = None) -> float:
        """R2 of the reconstruction."""
        X = np.asarray(X, dtype=np.float64)
        missed = X - self.inverse_transform(self.transform(X))
        spread = ((X - X.mean(0)) ** 2).sum()
        return float(1 - (missed**2).sum() / spread) if spread else 0.0

    def top_tokens(self, k: int = 10) -> Int[np.ndarray, "K k"]:
        """For each concept the fitted rows with the greatest weights, greatest first."""
        check_is_fitted(self)
        if not 1 <= k <= self.codes_.shape[0]:
            raise ValueError(f"k must be in 1..{self.codes_.shape[0]}, got {k}")
        return np.argsort(-self.codes_.toarray(), axis=0, kind="stable")[:k].T

    def null_test(
        self, X: Any, null: Null = "lengths", draws: int = 9, seed: int = 0, held_out: float = 0.25
    ) -> Statistic:
        """R2 beside that of draws of a null model, for each of which concepts are fitted anew.

        Args:
            X: (N, D).
            null: ``gaussian`` with the same mean and covariance; ``lengths``, the same with the vectors' own lengths,
                so that lengths alone are no sparsity; or ``shuffled``, each dimension in its own order.
            draws: of the null model.
            seed: of the draws, and of which vectors are held out.
            held_out: share of the vectors that R2 is of and concepts are not fitted to, for a dictionary can learn
                the vectors themselves; 0 for R2 of the fit.

        Raises:
            ValueError: for another null model, no draws, or a share that leaves too few vectors on either side.
        """
        if null not in NULLS or draws < 1:
            raise ValueError(f"null must be one of {', '.join(NULLS)} and draws at least 1, got {null!r}, {draws}")
        x, draw = torch.as_tensor(np.asarray(X, dtype=np.float64)), generator(seed)
        if x.dim() != 2 or not bool(x.isfinite().all()):
            raise ValueError(f"X must be finite vectors (N, D), got shape {tuple(x.shape)}")
        kept = round((1 - held_out) * len(x))
        if not 0 <= held_out < 1 or kept < 2 or (held_out and len(x) - kept < 2):
            raise ValueError(f"held_out must leave two vectors on either side of {len(x)}, got {held_out}")
        order = torch.randperm(len(x), generator=draw)

        def fitted(values: Tensor) -> float:
            values = values[order]
            again = type(self)(**self.get_params()).fit(values[:kept].numpy())
            return again.score((values[kept:] if held_out else values).numpy())

        return Statistic(fitted(x), tuple(fitted(NULLS[null](x, draw)) for _ in range(draws)), f"{null} vectors")


def _checked_draws(draws: int) -> None:
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")


def _checked_finite(*vectors: Tensor) -> None:
    if not all(bool(x.isfinite().all()) for x in vectors):
        raise ValueError("vectors must be finite, got infinity or NaN")


def nearest_other(vectors: Float[Tensor, "N D"]) -> Int[Tensor, " N"]:
    """Which other vector is the nearest of each, by cosine."""
    unit = F.normalize(vectors.double(), dim=1)
    return (unit @ unit.T).fill_diagonal_(-2).argmax(1)


def neighbour_purity(vectors: Float[Tensor, "N D"], labels: Sequence[Any], draws: int = 99, seed: int = 0) -> Statistic:
    """How often the nearest other vector, by cosine, is of the same category; null: shuffled labels.

    Example:
        >>> neighbour_purity(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]), "aabb", draws=5).value
        1.0
    """
    _checked_draws(draws)
    _checked_finite(vectors)
    if len(labels) != len(vectors) or len(vectors) < 2:
        raise ValueError(f"labels must be one a vector and at least two, got {len(labels)} for {len(vectors)}")
    nearest = nearest_other(vectors)
    names = list(dict.fromkeys(labels))
    own = torch.tensor([names.index(label) for label in labels])
    draw = generator(seed)

    def purity(given: Tensor) -> float:
        return (given == given[nearest.cpu()]).double().mean().item()

    null = tuple(purity(own[torch.randperm(len(own), generator=draw)]) for _ in range(draws))
    return Statistic(purity(own), null, "shuffled labels")


def analogy_accuracy(
    vectors: Float[Tensor, "N D"], quadruples: Int[Tensor, "Q 4"], draws: int = 99, seed: int = 0
) -> Statistic:
    """3CosAdd: how often d is the nearest, by cosine, to b - a + c, other than these; null: d's of other quadruples."""
    _checked_draws(draws)
    _checked_finite(vectors)
    if not bool(((quadruples >= 0) & (quadruples < len(vectors))).all()) or not len(quadruples):
        raise ValueError(f"quadruples must hold rows 0..{len(vectors) - 1}, got {quadruples.tolist()[:3]}")
    unit = F.normalize(vectors.double(), dim=1)
    a, b, c, d = quadruples.T
    close = F.normalize(unit[b] - unit[a] + unit[c], dim=1) @ unit.T
    best = close.scatter(1, quadruples[:, :3], -2.0).argmax(1)
    draw = generator(seed)
    null = tuple((best == d[torch.randperm(len(d), generator=draw)]).double().mean().item() for _ in range(draws))
    return Statistic((best == d).double().mean().item(), null, "answers of other questions")


def compositionality(
    wholes: Float[Tensor, "N D"], *parts: Float[Tensor, "N D"], draws: int = 99, seed: int = 0
) -> Statistic:
    """R2 of the least-squares combination of parts (one weight for each, and a constant vector); null: other parts."""
    _checked_draws(draws)
    if not parts or any(part.shape != wholes.shape for part in parts):
        raise ValueError(f"parts must have the shape of wholes {tuple(wholes.shape)}, got {[p.shape for p in parts]}")
    _checked_finite(wholes, *parts)
    centred = [(x - x.mean(0)).double() for x in (wholes, *parts)]
    whole, given = centred[0], centred[1:]
    draw = generator(seed)

    def explained(order: Tensor) -> float:
        columns = torch.stack([part[order].flatten() for part in given], 1)
        weights = torch.linalg.lstsq(columns, whole.flatten()[:, None]).solution[:, 0]
        return 1 - ((whole.flatten() - columns @ weights).square().sum() / whole.square().sum()).item()

    null = tuple(explained(torch.randperm(len(whole), generator=draw)) for _ in range(draws))
    return Statistic(explained(torch.arange(len(whole))), null, "parts of other wholes")


def axis_privilege(vectors: Float[Tensor, "N D"], draws: int = 19, seed: int = 0) -> Statistic:
    """Mean excess kurtosis over the dimensions, high where single dimensions mean something; null: rotated vectors."""
    _checked_draws(draws)
    _checked_finite(vectors)
    x = (vectors - vectors.mean(0)).double().cpu()
    draw = generator(seed)

    def kurtosis(given: Tensor) -> float:
        return (given.pow(4).mean(0) / given.square().mean(0).square() - 3).mean().item()

    null = tuple(kurtosis(x @ rotation(x.shape[1], draw)) for _ in range(draws))
    return Statistic(kurtosis(x), null, "randomly rotated")


def _mean_cosine(x: Tensor) -> float:
    unit = F.normalize(x, dim=1)
    return ((unit.sum(0).square().sum() - len(x)) / (len(x) * (len(x) - 1))).item()


def _effective_rank(x: Tensor) -> float:
    p = torch.linalg.svdvals(x).square()
    p = p / p.sum()
    return float(torch.exp(-(p * p.clamp(min=1e-300).log()).sum()))


def anisotropy(
    vectors: Float[Tensor, "N D"], removed: int = 0, centred: bool = False, draws: int = 19, seed: int = 0
) -> dict[str, Statistic]:
    """Mean cosine of two vectors, and effective rank (exp of the entropy of squared singular values).

    Args:
        vectors: at least two.
        removed: how many top principal components are taken off first, which also centres.
        centred: take the mean off.
        draws, seed: of the null model, vectors of the same lengths in random directions.
    """
    _checked_draws(draws)
    _checked_finite(vectors)
    if not 0 <= removed < min(vectors.shape) or len(vectors) < 2:
        raise ValueError(f"removed must be in 0..{min(vectors.shape) - 1} and vectors two or more, got {removed}")
    x = vectors.double().cpu()
    if centred or removed:
        x = x - x.mean(0)
    if removed:
        top = torch.linalg.svd(x, full_matrices=False)[2][:removed]
        x = x - x @ top.T @ top
    draw, lengths = generator(seed), x.norm(dim=1, keepdim=True)
    null = [
        F.normalize(torch.randn(x.shape, generator=draw, dtype=x.dtype), dim=1) * lengths for _ in range(draws)
    ]  # fmt: skip
    what = "the same lengths in random directions"
    measures: dict[str, tuple[Callable[[Tensor], float], bool]] = {
        "mean cosine": (_mean_cosine, True),
        "effective rank": (_effective_rank, False),
    }
    return {
        name: Statistic(f(x), tuple(f(other) for other in null), what, higher) for name, (f, higher) in measures.items()
    }

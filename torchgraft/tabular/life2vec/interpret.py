"""Looking into a life2vec: concept space, saliency, concept activation vectors, person summaries.

B: batch, S: positions, E: width, V: vocabulary, N: people. Models are those of ``torchgraft.tabular.life2vec``; a batch
is a mapping with ``input_ids`` and ``padding_mask``, as the collator makes them without ``mlm``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from torchgraft.tabular.life2vec.events import GENERAL_TOKENS
from torchgraft.tabular.life2vec.modules import AttentionPooling, TokenEmbedding

__all__ = [
    "TCAV",
    "Robustness",
    "TCAVScore",
    "concept_matrix",
    "concept_neighbors",
    "embedding_robustness",
    "person_summaries",
    "project",
    "saliency",
]

Batch = Mapping[str, Tensor]


# --- concept space ----------------------------------------------------------------------------------------------------


def concept_matrix(model: nn.Module) -> Float[np.ndarray, "V E"]:
    """The centred token matrix of a model, general tokens included.

    Raises:
        ValueError: for a model without a ``TokenEmbedding``.
    """
    for module in model.modules():
        if isinstance(module, TokenEmbedding):
            return module.weight.detach().float().cpu().numpy()
    raise ValueError(f"{type(model).__name__} has no life2vec token embedding")


def _unit(matrix: np.ndarray) -> np.ndarray:
    return matrix / np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-12)


def concept_neighbors(
    matrix: Float[np.ndarray, "V E"], tokens: Sequence[str], token: str, k: int = 5
) -> list[tuple[str, float]]:
    """The k tokens whose rows have the greatest cosine with that of ``token``; general tokens are left out.

    Args:
        matrix: from ``concept_matrix``.
        tokens: the vocabulary, ``tokenizer.tokens``.
        token: whose neighbours.
        k: how many.

    Raises:
        ValueError: for a token that is not there, k below 1, and sizes that do not fit.

    Example:
        >>> rows = np.eye(3)[[0, 0, 1]] + 0.1
        >>> concept_neighbors(rows, ["a", "b", "c"], "a", 1)[0][0]
        'b'
    """
    tokens = list(tokens)
    if len(tokens) != len(matrix):
        raise ValueError(f"matrix has {len(matrix)} rows, tokens has {len(tokens)}; they do not belong together")
    if token not in tokens:
        raise ValueError(f"no token {token!r} in the vocabulary")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    unit = _unit(matrix)
    cosines = unit @ unit[tokens.index(token)]
    others = [i for i, name in enumerate(tokens) if name != token and name not in GENERAL_TOKENS]
    ranked = sorted(others, key=lambda i: -cosines[i])[:k]
    return [(tokens[i], float(cosines[i])) for i in ranked]


@dataclass(frozen=True)
class Robustness:
    """How alike two concept spaces are.

    Attributes:
        first, second: which two: numbers of the matrices, or ``"permuted"`` and ``"random"``.
        correlation: Spearman's, between the cosine distances of all pairs of tokens.
        p_value: share of permutations of the tokens of one space that correlate at least as well.
        adjusted: the same after Benjamini and Hochberg, over all comparisons returned together.
    """

    first: int
    second: int | str
    correlation: float
    p_value: float
    adjusted: float


def _ranks(matrix: np.ndarray) -> np.ndarray:
    """Symmetric (V, V): centred ranks of the cosine distances of all pairs, ties averaged, scaled to unit length."""
    unit = _unit(matrix)
    upper = np.triu_indices(len(matrix), 1)
    distances = 1 - (unit @ unit.T)[upper]
    _, place, counts = np.unique(distances, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    ranks = ranks - ranks.mean()
    ranks = ranks / max(np.linalg.norm(ranks), 1e-12)
    square = np.zeros((len(matrix), len(matrix)))
    square[upper] = ranks
    return square + square.T


def embedding_robustness(
    matrices: Sequence[Float[np.ndarray, "V E"]], permutations: int = 5000, seed: int = 0
) -> list[Robustness]:
    """Do independently trained models place the same tokens alike? Against permuted and random spaces.

    Spearman correlation of the cosine distances of all pairs of tokens, with a permutation test that shuffles the
    tokens of one space; p-values adjusted together. Every pair of matrices is compared, and the first one with a copy
    of itself whose columns are permuted each by itself, and with Gaussian noise of its mean and spread.

    Args:
        matrices: concept spaces (V, E) with the same tokens in the same rows; leave general tokens out.
        permutations: 0 gives NaN for p-values.
        seed: of permutations and noise.

    Raises:
        ValueError: for fewer than one matrix, other numbers of rows, fewer than 4 rows, values that are not finite,
            and a negative number of permutations.

    Example:
        >>> space = np.random.default_rng(0).normal(size=(20, 8))
        >>> found = embedding_robustness([space, 2 * space], permutations=99)
        >>> [(r.second, round(r.correlation, 2), r.p_value) for r in found][0]
        (1, 1.0, 0.01)
    """
    if not matrices or {len(m) for m in matrices} != {len(matrices[0])} or len(matrices[0]) < 4:
        raise ValueError(
            f"matrices must have the same tokens, at least 4, got {[tuple(np.shape(m)) for m in matrices]} as shapes"
        )
    if permutations < 0:
        raise ValueError(f"permutations must be at least 0, got {permutations}")
    if not all(np.isfinite(m).all() for m in matrices):
        raise ValueError("matrices hold values that are not finite")
    rng = np.random.default_rng(seed)
    first = np.asarray(matrices[0], dtype=float)
    permuted = np.stack([rng.permutation(column) for column in first.T], 1)
    random = rng.normal(first.mean(), first.std(), first.shape)
    ranks = [_ranks(np.asarray(m, dtype=float)) for m in matrices]
    pairs: list[tuple[int, int | str, np.ndarray]] = [
        (i, j, ranks[j]) for i, j in combinations(range(len(matrices)), 2)
    ]
    pairs += [(0, "permuted", _ranks(permuted)), (0, "random", _ranks(random))]
    found: list[tuple[int, int | str, float, float]] = []
    for i, name, other in pairs:
        true = float((ranks[i] * other).sum() / 2)
        beaten = 0
        for _ in range(permutations):
            order = rng.permutation(len(first))
            beaten += float((ranks[i][np.ix_(order, order)] * other).sum() / 2) >= true - 1e-12
        found.append((i, name, true, (beaten + 1) / (permutations + 1) if permutations else float("nan")))
    adjusted = _benjamini_hochberg(np.array([p for *_, p in found]))
    return [Robustness(*row, float(a)) for row, a in zip(found, adjusted, strict=True)]


def _benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    order = np.argsort(p)
    scaled = p[order] * len(p) / np.arange(1, len(p) + 1)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum.accumulate(scaled[::-1])[::-1].clip(max=1)
    return adjusted


def project(
    matrix: Float[np.ndarray, "N E"], method: Literal["pca", "tsne", "pacmap", "umap"] = "pca", seed: int = 0
) -> Float[np.ndarray, "N 2"]:
    """A map of rows in two dimensions; rows are brought to length 1 first, so that cosines count.

    Args:
        matrix: concepts or person summaries.
        method: ``pacmap`` is the paper's; it and ``umap`` are packages of their own, ``tsne`` is scikit-learn's.
        seed: where the method is random.

    Raises:
        ValueError: for an unknown method and fewer than 3 rows.
        ImportError: when the package is missing; it is named.
    """
    if len(matrix) < 3:
        raise ValueError(f"a map needs at least 3 rows, got {len(matrix)}")
    unit = _unit(np.asarray(matrix, dtype=float))
    if method == "pca":
        centered = unit - unit.mean(0)
        u, s, _ = np.linalg.svd(centered, full_matrices=False)
        return u[:, :2] * s[:2]
    if method == "tsne":
        from sklearn.manifold import TSNE

        return TSNE(perplexity=min(15, (len(unit) - 1) / 3), random_state=seed, init="pca").fit_transform(unit)
    if method == "pacmap":
        try:
            import pacmap  # type: ignore[import-not-found]
        except ImportError:
            raise ImportError("method='pacmap' needs a package: pip install pacmap; or take 'tsne' or 'pca'") from None
        return pacmap.PaCMAP(n_components=2, random_state=seed).fit_transform(unit)
    if method == "umap":
        try:
            import umap  # type: ignore[import-not-found]
        except ImportError:
            raise ImportError(
                "method='umap' needs a package: pip install umap-learn; or take 'tsne' or 'pca'"
            ) from None
        return umap.UMAP(n_components=2, random_state=seed, metric="cosine").fit_transform(unit)
    raise ValueError(f"method must be 'pca', 'tsne', 'pacmap' or 'umap', got {method!r}")


# --- people -----------------------------------------------------------------------------------------------------------


def _check_classifier(model: nn.Module) -> None:
    # another model's logits would be summed over what they are not meant to be summed over
    if not hasattr(model, "classify"):
        raise TypeError(f"model must be a Life2VecForSequenceClassification, got {type(model).__name__}")


def _joined(parts: Sequence[Tensor]) -> np.ndarray:
    if not parts:
        raise ValueError("batches is empty; at least one is needed")
    whole = torch.cat(list(parts))
    # numpy has no bfloat16
    return (whole.float() if whole.dtype in (torch.float16, torch.bfloat16) else whole).numpy()


def _rows(batch: Batch, model: nn.Module) -> tuple[Tensor, Tensor]:
    device = next(model.parameters()).device
    ids, mask = batch["input_ids"].to(device), batch["padding_mask"].to(device)
    return ids, mask.bool()


class _Frozen:
    """Eval mode, and no gradients for the parameters, until the end of the block."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.training = [(module, module.training) for module in self.model.modules()]
        self.needed = [p.requires_grad for p in self.model.parameters()]
        self.model.eval().requires_grad_(False)

    def __exit__(self, *error: object) -> None:
        for module, training in self.training:
            module.training = training
        for parameter, needed in zip(self.model.parameters(), self.needed, strict=True):
            parameter.requires_grad_(needed)


def person_summaries(model: nn.Module, batches: Iterable[Batch]) -> Float[np.ndarray, "N E"]:
    """One vector a person: what the classifier pools, or [CLS] where it does not pool.

    Args:
        model: ``Life2VecForSequenceClassification``.
        batches: of the collator.

    Raises:
        TypeError: for another model.
        ValueError: when there is no batch.
    """
    _check_classifier(model)
    found = []
    with _Frozen(model), torch.no_grad():
        for batch in batches:
            ids, mask = _rows(batch, model)
            hidden = model.transformer(ids, mask).last_hidden_state  # type: ignore[operator]
            pool = model.decoder
            found.append((pool.summary(hidden, mask) if isinstance(pool, AttentionPooling) else hidden[:, 0]).cpu())
    return _joined(found)


def saliency(model: nn.Module, batch: Batch, target: int = 1, normalize: bool = True) -> Float[Tensor, "B S"]:
    """Input times gradient of a logit, on the embeddings, summed over their features.

    Args:
        model: ``Life2VecForSequenceClassification``.
        batch: of the collator.
        target: which logit.
        normalize: bring each person to length 1.

    Returns:
        (B, S), 0 at padding; positive where a token speaks for ``target``.

    Raises:
        TypeError: for another model.
        ValueError: for a logit that is not there.
    """
    _check_classifier(model)
    ids, mask = _rows(batch, model)
    with _Frozen(model), torch.enable_grad():
        x = model.transformer.embed(ids).detach().requires_grad_()  # type: ignore[operator, union-attr]
        logits = model(inputs_embeds=x, padding_mask=mask).logits
        if not 0 <= target < logits.shape[1]:
            raise ValueError(f"target must lie in 0..{logits.shape[1] - 1}, got {target}")
        (gradient,) = torch.autograd.grad(logits[:, target].sum(), x)
    each = (gradient * x.detach()).sum(-1) * mask
    return each / each.norm(dim=1, keepdim=True).clamp(min=1e-12) if normalize else each


@dataclass(frozen=True)
class TCAVScore:
    """Sensitivity of a model to a concept.

    Attributes:
        share: for each concept vector, share of people whose logit rises along it, (vectors,).
        magnitude: the same weighted by how much it rises or falls, (vectors,).
    """

    share: Float[np.ndarray, " K"]
    magnitude: Float[np.ndarray, " K"]


class TCAV:
    """Concept activation vectors: which way lies a concept inside the model, and does the answer rise that way?

    A linear classifier tells activations of people with a concept from those of random people; its normal is the
    concept vector. Bagging gives many of them (Kim et al., 2018; 1000 in the paper). Activations are the states before
    layer ``layer``, averaged over the person's tokens; the derivative along a vector is that of moving all tokens
    together. Vectors are those of the activations themselves: the scaling that the classifier needs is undone (the
    official code leaves it in).

    Args:
        model: ``Life2VecForSequenceClassification``.
        layer: 0 (embeddings) to the number of layers (last states, the default); or ``"pooled"``, the person's summary,
            behind which a logit is linear, so that all people agree.
        bootstraps: concept vectors.
        estimator: linear classifier of scikit-learn with ``coef_``; logistic regression if not given.
        seed: of the bootstraps.

    Raises:
        ValueError: for a layer that is not there.
        TypeError: for another model.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: int | Literal["pooled"] | None = None,
        bootstraps: int = 1000,
        estimator: Any = None,
        seed: int = 0,
    ) -> None:
        _check_classifier(model)
        layers = len(model.transformer.encoders)  # type: ignore[arg-type, union-attr]
        layer = layers if layer is None else layer
        if layer == "pooled":
            if not isinstance(model.decoder, AttentionPooling):
                raise ValueError("layer='pooled' needs a model with pooling='attention'")
        elif isinstance(layer, bool) or not (isinstance(layer, int) and 0 <= layer <= layers):
            raise ValueError(f"layer must be 0..{layers} or 'pooled', got {layer!r}")
        if bootstraps < 1:
            raise ValueError(f"bootstraps must be at least 1, got {bootstraps}")
        self.model, self.layer, self.bootstraps, self.estimator, self.seed = model, layer, bootstraps, estimator, seed

    def _states(self, ids: Tensor, mask: Tensor, x: Tensor | None = None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """What is at the layer, and the way from there to logits."""
        encoder: Any = self.model.transformer
        x = encoder.embed(ids) if x is None else x
        if self.layer == "pooled":
            hidden = encoder.run(x, mask)[0][-1]
            return self.model.decoder.summary(hidden, mask), self.model.decoder.out  # type: ignore[operator, union-attr, return-value]
        at = self.layer
        state = encoder.run(x, mask)[0][at]
        return state, lambda h: self.model.classify(encoder.run(h, mask, at)[0][-1], mask)  # type: ignore[operator]

    def activations(self, batches: Iterable[Batch]) -> Float[np.ndarray, "N E"]:
        """Activations of people, (N, E)."""
        found = []
        with _Frozen(self.model), torch.no_grad():
            for batch in batches:
                ids, mask = _rows(batch, self.model)
                state, _ = self._states(ids, mask)
                if state.ndim == 3:
                    state = (state * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
                found.append(state.cpu())
        return _joined(found)

    def gradients(
        self, batches: Iterable[Batch], target: int = 1, steps: int | None = None
    ) -> Float[np.ndarray, "N E"]:
        """Gradient of a logit at the layer, summed over the person's tokens, (N, E).

        Args:
            batches: people whose answers are looked at.
            target: which logit.
            steps: integrated gradients: the mean of the gradients at this many points between the states of zero
                embeddings and those of the person. ``None`` takes the gradient at the person.

        Raises:
            ValueError: for a logit that is not there, and fewer than one step.
        """
        classes = int(self.model.config.num_labels)  # type: ignore[union-attr, arg-type]
        if not 0 <= target < classes:
            raise ValueError(f"target must lie in 0..{classes - 1}, got {target}")
        if steps is not None and steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}; None takes the gradient at the person")
        found = []
        with _Frozen(self.model), torch.enable_grad():
            for batch in batches:
                ids, mask = _rows(batch, self.model)
                with torch.no_grad():
                    x = self.model.transformer.embed(ids)  # type: ignore[operator, union-attr]
                    state, onward = self._states(ids, mask, x)
                    base = self._states(ids, mask, torch.zeros_like(x))[0] if steps else state
                points = [(i + 0.5) / steps for i in range(steps)] if steps else [1.0]
                total = torch.zeros_like(state)
                for point in points:
                    here = (base + point * (state - base)).detach().requires_grad_()
                    (gradient,) = torch.autograd.grad(onward(here)[:, target].sum(), here)
                    total += gradient / len(points)
                found.append(((total * mask.unsqueeze(-1)).sum(1) if total.ndim == 3 else total).cpu())
        return _joined(found)

    def vectors(self, concept: Float[np.ndarray, "N E"], random: Float[np.ndarray, "M E"]) -> Float[np.ndarray, "K E"]:
        """Concept vectors of length 1, from activations of people with the concept and of random people.

        Raises:
            ValueError: for fewer than two people on a side.
        """
        from sklearn.ensemble import BaggingClassifier
        from sklearn.linear_model import LogisticRegression

        if min(len(concept), len(random)) < 2:
            raise ValueError(f"a concept needs at least 2 people on each side, got {len(concept)} and {len(random)}")
        x = np.concatenate([concept, random])
        y = np.repeat([1, 0], [len(concept), len(random)])
        spread = np.maximum(x.std(0), 1e-12)
        linear = LogisticRegression(C=0.1, max_iter=200) if self.estimator is None else self.estimator
        bag = BaggingClassifier(linear, n_estimators=self.bootstraps, random_state=self.seed)
        bag.fit((x - x.mean(0)) / spread, y)
        return _unit(np.concatenate([one.coef_ for one in bag.estimators_ if len(one.classes_) == 2]) / spread)

    @staticmethod
    def score(gradients: Float[np.ndarray, "N E"], vectors: Float[np.ndarray, "K E"]) -> TCAVScore:
        """Share of people whose logit rises along each vector, and that share weighted by how much."""
        along = gradients @ vectors.T
        up, size = np.maximum(along, 0).sum(0), np.abs(along).sum(0)
        return TCAVScore((along > 0).mean(0), up / np.maximum(size, 1e-12))

    def random_scores(
        self,
        gradients: Float[np.ndarray, "N E"],
        pool: Float[np.ndarray, "M E"],
        size: int,
        concepts: int = 20,
    ) -> Float[np.ndarray, " K"]:
        """Mean shares of concepts that mean nothing: ``size`` random people of the pool against the rest of it.

        A concept matters where its own score lies outside of these.
        """
        if not 2 <= size <= len(pool) - 2:
            raise ValueError(f"size must leave at least 2 people on each side of a pool of {len(pool)}, got {size}")
        rng = np.random.default_rng(self.seed)
        found = []
        for _ in range(concepts):
            order = rng.permutation(len(pool))
            vectors = self.vectors(pool[order[:size]], pool[order[size:]])
            found.append(self.score(gradients, vectors).share.mean())
        return np.array(found)

"""How fine-tuning moves concepts: shift vectors, how alike they are within a concept, and what they recover."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from sklearn.utils.validation import check_is_fitted
from torch import Tensor
from torch.nn import functional as F

from torchgraft.language.representation_shift.concepts import ConceptDictionary, _array, word_overlap
from torchgraft.language.representation_shift.states import Layer, StateSet, common_rows

Statistic = Literal["mean", "median", "trimmed"]
STATISTICS: tuple[Statistic, ...] = ("mean", "median", "trimmed")
TRIMMED = 0.1


def centre(rows: Float[Tensor, "N D"], statistic: Statistic = "mean") -> Float[Tensor, " D"]:
    """The middle of rows, feature by feature: ``mean``, ``median`` (the lower one of an even number), or ``trimmed``,
    the mean without the tenth of values at either end."""
    if statistic == "mean":
        return rows.mean(0)
    if statistic == "median":
        return rows.median(0).values
    cut = int(TRIMMED * len(rows))
    return rows.sort(0).values[cut : len(rows) - cut].mean(0)


def shift_statistics(deltas: Float[Tensor, "N D"]) -> dict[str, float]:
    """How alike the shifts of samples are, in O(N D).

    Returns:
        ``consistency``, mean cosine of two of them; ``alignment``, mean cosine with their mean; ``dot``, mean inner
        product of two; ``dot_with_mean``; ``magnitude``, length of their mean. Pairs of fewer than two samples, and
        directions of a zero mean, are NaN; a sample that does not move has cosine 0 with all. The official code leaves
        pairs out whose inner product is exactly zero.

    Example:
        >>> shift_statistics(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))["alignment"]
        0.7071067690849304
    """
    n, mean = len(deltas), deltas.mean(0)
    units = F.normalize(deltas, dim=1, eps=torch.finfo(deltas.dtype).tiny)
    length = mean.norm()
    pairs = n * (n - 1)
    norms = units.square().sum()
    return {
        "consistency": float((units.sum(0).square().sum() - norms) / pairs) if pairs else float("nan"),
        "alignment": float((units @ (mean / length)).mean()) if length > 0 else float("nan"),
        "dot": float((deltas.sum(0).square().sum() - deltas.square().sum()) / pairs) if pairs else float("nan"),
        "dot_with_mean": float((deltas @ mean).mean()),
        "magnitude": float(length),
    }


class ConceptShift:
    """By which vector fine-tuning moves each concept (section 3.2 of Khayatan et al.).

    Sample m belongs to the concept that is most active in its original state; ``Delta_k`` is the mean of
    ``b_m - a_m`` over the samples of concept k that both models have.

    Args:
        dictionary: fitted on states of the original model.
        statistic: ``mean``, or the ``median`` or ``trimmed`` mean (a tenth at either end), as the official code has
            them: the statistic of the fine-tuned states less that of the original ones.
        on_empty: what to do with a concept without a common sample: ``raise``, or take a ``zero`` shift.

    Attributes:
        shifts_: (K, D).
        consistency_: (K,), mean cosine of two samples' shifts; NaN with fewer than two.
        alignment_: (K,), mean cosine of a sample's shift with ``Delta_k``'s direction, their mean.
        magnitude_: (K,), length of the mean shift.
        counts_: (K,), common samples of each concept.
        labels_: (common samples,), concept of each.

    Example:
        >>> a = torch.tensor([[0.0, 0.0], [0.0, 1.0], [9.0, 9.0], [9.0, 8.0]])
        >>> shift = ConceptShift(ConceptDictionary(2, random_state=0).fit(a)).fit(a, a + torch.tensor([1.0, 2.0]))
        >>> shift.shifts_.tolist()
        [[1.0, 2.0], [1.0, 2.0]]
    """

    def __init__(
        self,
        dictionary: ConceptDictionary,
        statistic: Statistic = "mean",
        on_empty: Literal["raise", "zero"] = "raise",
    ) -> None:
        if statistic not in STATISTICS:
            raise ValueError(f"statistic must be one of {', '.join(STATISTICS)}, got {statistic!r}")
        if on_empty not in ("raise", "zero"):
            raise ValueError(f"on_empty must be 'raise' or 'zero', got {on_empty!r}")
        self.dictionary, self.statistic, self.on_empty = dictionary, statistic, on_empty

    def fit(self, a: StateSet | Tensor, b: StateSet | Tensor, layer: Layer | None = None) -> ConceptShift:
        """Find the shifts from the original model's states to the fine-tuned one's.

        Args:
            a, b: both sets of states, which are paired by id, or both tensors (N, D), row by row.
            layer: of the sets, where they hold several.

        Raises:
            TypeError: for a set and a tensor, or neither.
            ValueError: for no common samples, different tokenizers, tensors of different shapes, widths that are not
                the dictionary's, states that are not finite, or (with ``on_empty="raise"``) a concept without a common
                sample.
            sklearn.exceptions.NotFittedError: for a dictionary that was not fitted.
        """
        check_is_fitted(self.dictionary)
        before, after = _paired(a, b, layer)
        concepts = torch.as_tensor(self.dictionary.components_)
        if before.shape[1] != concepts.shape[1] or before.shape != after.shape:
            raise ValueError(
                f"a and b must be (N, {concepts.shape[1]}), row by row, as wide as the concepts, got "
                f"{tuple(before.shape)} and {tuple(after.shape)}"
            )
        if not (torch.isfinite(before).all() and torch.isfinite(after).all()):
            raise ValueError("a and b must be finite, got states that are not")
        self.labels_ = torch.as_tensor(self.dictionary.assign(before))
        self.counts_ = torch.bincount(self.labels_, minlength=len(concepts))
        empty = (self.counts_ == 0).nonzero().flatten().tolist()
        if empty and self.on_empty == "raise":
            raise ValueError(
                f"concepts {empty} have no common sample; take fewer concepts, more samples, or on_empty='zero'"
            )
        # sums of thousands of float32 rows lose what a small shift is
        a64, b64 = before.double(), after.double()
        self.shifts_ = torch.zeros_like(concepts)
        told = []
        for k in range(len(concepts)):
            rows = self.labels_ == k
            if rows.any():
                moved = centre(b64[rows], self.statistic) - centre(a64[rows], self.statistic)
                self.shifts_[k] = moved.to(concepts.dtype)
                told.append(shift_statistics(b64[rows] - a64[rows]))
            else:
                told.append({"consistency": float("nan"), "alignment": float("nan"), "magnitude": 0.0})
        self.consistency_, self.alignment_, self.magnitude_ = (
            torch.tensor([each[name] for each in told]) for name in ("consistency", "alignment", "magnitude")
        )
        return self

    def shifted(self, alpha: float | Tensor = 1.0) -> Tensor:
        """The concepts (K, D) moved by ``alpha`` times their shifts.

        Args:
            alpha: 1 is the paper's, and right for centres, which are in the units of states; one for each concept
                (K,), such as 1 / mean activation of its samples, for concepts of length 1.

        Raises:
            ValueError: for a tensor that is not (K,).
        """
        concepts = torch.as_tensor(self.dictionary.components_)
        if isinstance(alpha, Tensor):
            if alpha.shape != (len(concepts),):
                raise ValueError(f"alpha must be a number or one for each of {len(concepts)} concepts, got {alpha}")
            alpha = alpha.to(concepts)[:, None]
        return concepts + alpha * self.shifts_


def _paired(a: StateSet | Tensor, b: StateSet | Tensor, layer: Layer | None) -> tuple[Tensor, Tensor]:
    if isinstance(a, StateSet) and isinstance(b, StateSet):
        of_a, of_b = common_rows(a, b)
        return a.of(layer)[of_a], b.of(layer)[of_b]
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        raise TypeError(
            "a and b must both be StateSets, which are paired by id, or both be tensors, paired row by row, got "
            f"{type(a).__name__} and {type(b).__name__}"
        )
    return a, b


def match_concepts(original: Any, finetuned: Any) -> np.ndarray:
    """Which fine-tuned concept (K,) belongs to each original one: the pairing of greatest total cosine.

    Signs count, also of principal axes, which have none of their own.

    Raises:
        ValueError: for concepts of different shapes, or not finite.
    """
    from scipy.optimize import linear_sum_assignment

    a, b = (_units(x) for x in (original, finetuned))
    if a.shape != b.shape:
        raise ValueError(f"original and finetuned concepts must have the same shape, got {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("original and finetuned concepts must be finite, got values that are not")
    return np.asarray(linear_sum_assignment(-(a @ b.T))[1])


def _units(x: Any) -> np.ndarray:
    found: np.ndarray = np.asarray(_array(x), dtype=np.float64)
    if found.ndim != 2:
        raise ValueError(f"concepts must be (K, D), got {found.shape}")
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), np.finfo(np.float64).tiny)


def recovery_report(
    shifted: Any,
    original: Any,
    finetuned: Any,
    *,
    words: Callable[[Any], Sequence[Collection[Any]]] | None = None,
    samples: Callable[[Any], Sequence[Collection[Any]]] | None = None,
) -> dict[str, np.ndarray]:
    """How much nearer to the fine-tuned concepts the shifted ones are than the original ones (section 4).

    Fine-tuned concepts are matched to the original ones, not to the shifted ones, by ``match_concepts``. Centres of
    k-means that are shifted by the samples that they came from are the fine-tuned means of those samples, so fit
    ``finetuned`` on other samples than the shifts, or the report praises an identity.

    Args:
        shifted, original, finetuned: (K, D).
        words: words of vectors (K, D), for instance ``partial(ground_text, lm_head=..., tokenizer=...)``.
        samples: most activating samples of vectors (K, D).

    Returns:
        Arrays (K,), one entry for each original concept, so that ``pandas.DataFrame(report)`` is a table: ``match``,
        ``cosine_before``, ``cosine_after``, ``cosine_gain`` and ``cosine_gain_relative`` (of the cosine before),
        ``l2_before``, ``l2_after``, ``l2_gain``, ``l2_gain_relative``; with ``words`` and ``samples`` how many are
        shared with the fine-tuned concept, ``words_before``, ``words_after``, ``samples_before``, ``samples_after``.
        A relative gain over nothing is NaN.

    Raises:
        ValueError: for different shapes, or concepts that are not finite.

    Example:
        >>> u = np.eye(2)
        >>> recovery_report(u + 1, u, u + 1)["l2_after"].tolist()
        [0.0, 0.0]
    """
    u_a, u_s, u_b = (np.asarray(_array(x), dtype=np.float64) for x in (original, shifted, finetuned))
    if u_a.shape != u_s.shape:
        raise ValueError(f"shifted and original concepts must have the same shape, got {u_s.shape} and {u_a.shape}")
    if not np.isfinite(u_s).all():
        raise ValueError("shifted concepts must be finite, got values that are not")
    match = match_concepts(u_a, u_b)
    u_b = u_b[match]
    report: dict[str, np.ndarray] = {"match": match}
    before, after = (np.sum(_units(u) * _units(u_b), axis=1) for u in (u_a, u_s))
    report |= {"cosine_before": before, "cosine_after": after, "cosine_gain": after - before}
    report["cosine_gain_relative"] = _share(after - before, before)
    before, after = (np.linalg.norm(u - u_b, axis=1) for u in (u_a, u_s))
    report |= {"l2_before": before, "l2_after": after, "l2_gain": before - after}
    report["l2_gain_relative"] = _share(before - after, before)
    for name, ground in (("words", words), ("samples", samples)):
        if ground is not None:
            theirs = ground(u_b)
            report[f"{name}_before"] = word_overlap(ground(u_a), theirs)
            report[f"{name}_after"] = word_overlap(ground(u_s), theirs)
    return report


def _share(gain: np.ndarray, of: np.ndarray) -> np.ndarray:
    return np.divide(gain, of, out=np.full_like(gain, np.nan), where=of != 0)

"""Metrics for positives among unlabelled people, by numpy.

y: 1 for positives, 0 for the others (unlabelled or negative); s: scores, the higher the more likely positive.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

__all__ = [
    "area_under_curve",
    "area_under_lift",
    "bootstrap_interval",
    "corrected_metrics",
    "metrics_by_group",
    "recalibrate",
    "threshold_for_mcc",
]


def _check(y: Any, s: Any) -> tuple[np.ndarray, np.ndarray]:
    y, s = np.asarray(y), np.asarray(s, dtype=float)
    if y.ndim != 1 or y.shape != s.shape or not len(y):
        raise ValueError(f"y and s must be of one dimension and one length, got shapes {y.shape} and {s.shape}")
    if not np.isin(y, (0, 1)).all():
        raise ValueError(f"y must be 1 (positive) or 0, got {np.unique(y)[:5]}")
    if np.isnan(s).any():
        raise ValueError(f"s holds {int(np.isnan(s).sum())} NaN")
    return y.astype(bool), s


def _wins(s: np.ndarray) -> np.ndarray:
    """For each score, how many of all are below it, and half of those equal to it, itself included."""
    _, place, counts = np.unique(s, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - counts / 2)[place]


def area_under_lift(y: Any, s: Any) -> float:
    """Share of pairs (positive, anybody) in which the positive has the higher score, ties counting one half.

    Needs no negatives, so it is meant for positive-unlabelled data. With prevalence c of labels,
    ``AUL = c / 2 + (1 - c) AUC``.

    Args:
        y: (N,) 1 for positives, 0 for others.
        s: (N,) scores.

    Raises:
        ValueError: for shapes, other labels, NaN, and when there is no positive.

    Example:
        >>> area_under_lift([1, 0, 0, 0], [4.0, 3.0, 2.0, 1.0])
        0.875
    """
    y, s = _check(y, s)
    if not y.any():
        raise ValueError("y has no positive; the area under the lift curve is not defined")
    return float(_wins(s)[y].mean() / len(y))


def area_under_curve(y: Any, s: Any) -> float:
    """Area under the ROC curve: share of pairs (positive, other) in which the positive has the higher score.

    Example:
        >>> area_under_curve([1, 0, 0, 1], [4.0, 3.0, 2.0, 1.0])
        0.5
    """
    y, s = _check(y, s)
    c = y.mean()
    if not 0 < c < 1:
        raise ValueError("y must have both classes; the area under the ROC curve is not defined")
    return float((area_under_lift(y, s) - c / 2) / (1 - c))


def corrected_metrics(y: Any, s: Any, alpha: float, beta: float = 1.0, threshold: float = 0.5) -> dict[str, float]:
    """Balanced accuracy, F1 and Matthews correlation, corrected for impure classes (Ramola et al., 2019).

    Args:
        y: (N,) 1 for labelled positives, 0 for the unlabelled.
        s: (N,) scores.
        alpha: share of true positives among the unlabelled (in the paper 0.025 for mortality, 0.001 for emigration).
        beta: share of true positives among the labelled.
        threshold: scores at or above it are predicted positive.

    Returns:
        ``c_bacc``, ``c_f1``, ``c_mcc``, and what they are made of: ``tpr``, ``fpr`` (corrected), ``prevalence``
        (corrected) and ``predicted`` (share predicted positive). Where everybody or nobody is predicted positive
        ``c_mcc`` is 0. Estimates: with an alpha that does not fit they can leave their range.

    Raises:
        ValueError: for shapes, labels of one class alone, and unless ``0 <= alpha < beta <= 1``.

    Example:
        >>> found = corrected_metrics([1, 1, 0, 0], [0.9, 0.2, 0.8, 0.1], alpha=0.0)
        >>> found["c_bacc"], found["c_f1"], found["c_mcc"]
        (0.5, 0.5, 0.0)
    """
    y, s = _check(y, s)
    if not 0 <= alpha < beta <= 1:
        raise ValueError(f"alpha and beta must satisfy 0 <= alpha < beta <= 1, got {alpha} and {beta}")
    if y.all() or not y.any():
        raise ValueError("y must have positives and others")
    hit = s >= threshold
    gamma, nu, c, theta = hit[y].mean(), hit[~y].mean(), y.mean(), hit.mean()
    tpr = ((1 - alpha) * gamma - (1 - beta) * nu) / (beta - alpha)
    fpr = (beta * nu - alpha * gamma) / (beta - alpha)
    prevalence = c * beta + (1 - c) * alpha
    spread = theta * (1 - theta)
    mcc = np.sqrt(prevalence * (1 - prevalence) / spread) * (tpr - fpr) if spread > 0 else 0.0
    return {
        "c_bacc": float((1 + tpr - fpr) / 2),
        "c_f1": float(2 * prevalence * tpr / (prevalence + theta)),
        "c_mcc": float(mcc),
        "tpr": float(tpr),
        "fpr": float(fpr),
        "prevalence": float(prevalence),
        "predicted": float(theta),
    }


def threshold_for_mcc(y: Any, s: Any) -> float:
    """The threshold with the greatest corrected MCC; choose it on validation people, never on test people.

    It is the same for every alpha and beta, which only scale the corrected MCC.

    Example:
        >>> threshold_for_mcc([1, 1, 0, 0], [0.9, 0.8, 0.3, 0.1])
        0.8
    """
    y, s = _check(y, s)
    if y.all() or not y.any():
        raise ValueError("y must have positives and others")
    order = np.argsort(-s, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(s[order]) != 0, True))
    hits = np.cumsum(y[order])[ends]
    gamma, nu = hits / y.sum(), (ends + 1 - hits) / (~y).sum()
    theta = (ends + 1) / len(y)
    with np.errstate(divide="ignore", invalid="ignore"):
        mcc = (gamma - nu) / np.sqrt(theta * (1 - theta))
    return float(s[order][ends][np.nanargmax(np.where(theta < 1, mcc, -np.inf))])


def recalibrate(p: Any, true_share: float, trained_share: float) -> np.ndarray:
    """Probabilities for a population with another share of positives than the one trained on.

    ``p r1 / (p r1 + (1 - p) r0)``, with ``r1`` and ``r0`` the ratios of the shares of positives and of negatives; the
    official helper has a misplaced parenthesis. ``AsymmetricPULoss`` trains on a share of its ``positive_weight``.

    Example:
        >>> recalibrate([0.5, 0.9], 0.1, 0.5).round(3).tolist()
        [0.1, 0.5]
    """
    p = np.asarray(p, dtype=float)
    if ((p < 0) | (p > 1)).any():
        raise ValueError(f"p must lie in 0..1, got {p.min()}..{p.max()}")
    if not (0 < true_share < 1 and 0 < trained_share < 1):
        raise ValueError(f"shares must lie strictly between 0 and 1, got {true_share} and {trained_share}")
    r1, r0 = true_share / trained_share, (1 - true_share) / (1 - trained_share)
    return p * r1 / (p * r1 + (1 - p) * r0)


def bootstrap_interval(
    metric: Callable[[np.ndarray, np.ndarray], float],
    y: Any,
    s: Any,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of a metric over resampled people, positives and others resampled apart, as in the paper.

    Args:
        metric: ``metric(y, s)``.
        y, s: people.
        resamples: how many.
        level: of confidence.
        seed: of the resampling; equal seeds give equal people, so that differences can be paired.

    Example:
        >>> y, s = np.arange(40) % 4 == 0, np.linspace(0, 1, 40)
        >>> low, high = bootstrap_interval(area_under_lift, y, s, resamples=200)
        >>> low < area_under_lift(y, s) < high
        True
    """
    y, s = _check(y, s)
    if resamples < 2 or not 0 < level < 1:
        raise ValueError(f"resamples must be at least 2 and level in 0..1, got {resamples} and {level}")
    rng = np.random.default_rng(seed)
    groups = [np.flatnonzero(y), np.flatnonzero(~y)]
    found = []
    for _ in range(resamples):
        at = np.concatenate([rng.choice(group, len(group)) for group in groups if len(group)])
        found.append(metric(y[at], s[at]))
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def metrics_by_group(
    y: Any,
    s: Any,
    groups: Mapping[str, Any],
    metric: Callable[[np.ndarray, np.ndarray], float] = area_under_curve,
) -> dict[str, dict[str, float]]:
    """A metric in each group apart, such as by sex and age, with the numbers of people and of positives.

    Args:
        y, s: people.
        groups: name of each group and a mask (N,) of who is in it; groups may overlap.
        metric: ``metric(y, s)``.

    Returns:
        For each group ``people``, ``positives`` and ``value``, the last NaN where one of the classes is absent.

    Example:
        >>> metrics_by_group([1, 0, 1], [0.9, 0.1, 0.2], {"men": [True, True, False]})
        {'men': {'people': 2, 'positives': 1, 'value': 1.0}}
    """
    y, s = _check(y, s)
    found = {}
    for name, mask in groups.items():
        mask = np.asarray(mask, dtype=bool)
        if mask.shape != y.shape:
            raise ValueError(f"the mask of group {name!r} has shape {mask.shape}, y has {y.shape}")
        inside = y[mask]
        both = bool(inside.any() and not inside.all())
        found[name] = {
            "people": int(mask.sum()),
            "positives": int(inside.sum()),
            "value": metric(inside, s[mask]) if both else float("nan"),
        }
    return found

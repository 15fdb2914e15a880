"""Whether a classifier's confidence is what its accuracy says.

Dimensions: N examples, K classes, bins of confidence.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from torchgraft.compression.lottery_reprogramming.mapping import check_labels

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Reliability(NamedTuple):
    """Bins of confidence: examples in each, their mean confidence and accuracy (NaN where there are none)."""

    edges: Tensor
    counts: Tensor
    confidence: Tensor
    accuracy: Tensor


def _check_probabilities(probs: Tensor, y: Tensor, bins: int) -> None:
    if probs.ndim != 2 or not len(probs):
        raise ValueError(f"probs must have shape (N, K) with N > 0, got {tuple(probs.shape)}")
    sums = probs.double().sum(1)
    if not (bool((probs >= 0).all()) and bool(((sums - 1).abs() < 1e-2).all())):
        raise ValueError(
            "probs must be probabilities: rows not negative, each with sum 1; "
            "for logits pass logits.softmax(1), over the K target classes"
        )
    check_labels(y, len(probs), probs.shape[1])
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")


def reliability(probs: Float[Tensor, "N K"], y: Int[Tensor, " N"], bins: int = 15) -> Reliability:
    """Confidence (largest probability) and accuracy in bins of equal width, each open below and closed above.

    Args:
        probs: probabilities of the K classes, shape (N, K).
        y: right classes, shape (N,).
        bins: how many.

    Raises:
        ValueError: for logits instead of probabilities, labels outside 0..K-1, no examples.

    Example:
        >>> found = reliability(torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([0, 0]), bins=2)
        >>> found.counts.tolist(), round(found.confidence[1].item(), 3), found.accuracy[1].item()
        ([0, 2], 0.85, 0.5)
    """
    _check_probabilities(probs, y, bins)
    confidence, predicted = probs.double().max(1)
    right = (predicted == y.to(probs.device)).double()
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=probs.device)
    # rounding of a softmax may exceed one by an epsilon
    where = torch.bucketize(confidence, edges[1:-1])
    count = torch.bincount(where, minlength=bins)
    means = [torch.bincount(where, weights=v, minlength=bins) / count for v in (confidence, right)]
    return Reliability(edges, count, *means)


def expected_calibration_error(probs: Float[Tensor, "N K"], y: Int[Tensor, " N"], bins: int = 15) -> Float[Tensor, ""]:
    """ECE: the mean over all examples of ``|accuracy - confidence|`` of their bin.

    Give the whole test set at once: the mean of the ECE of batches is larger. The ECE of a finite set is positive even
    for a perfectly calibrated classifier, by about ``sqrt(bins / N)`` times a number below one half, so compare only at
    equal N and bins. (The official scripts give logits, batch by batch, and divide the sum by the number of examples:
    that number is no ECE.)

    Args:
        probs: probabilities of the K classes, shape (N, K).
        y: right classes, shape (N,).
        bins: of equal width.

    Returns:
        A float64 scalar in 0..1.

    Raises:
        ValueError: as ``reliability``.

    Example:
        >>> expected_calibration_error(torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.tensor([0, 0])).round(decimals=4)
        tensor(0.2500, dtype=torch.float64)
    """
    found = reliability(probs, y, bins)
    gaps = (found.accuracy - found.confidence).abs().nan_to_num(0)
    return (found.counts * gaps).sum() / found.counts.sum()


def reliability_diagram(probs: Float[Tensor, "N K"], y: Int[Tensor, " N"], bins: int = 15, title: str = "") -> Figure:
    """Accuracy against confidence of every bin that holds examples, and how many it holds; needs matplotlib.

    Arguments as in ``reliability``.
    """
    from matplotlib.figure import Figure

    found = reliability(probs, y, bins)
    held = found.counts > 0
    figure = Figure(figsize=(4.5, 5.2), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    top.plot([0, 1], [0, 1], "--", color="#777777", label="calibrated")
    x, a = found.confidence[held].cpu(), found.accuracy[held].cpu()
    top.vlines(x, x, a, color="#D55E00", linewidth=3, alpha=0.5)
    top.plot(x, a, "o-", color="#0072B2", label="measured")
    ece = float(expected_calibration_error(probs, y, bins))
    top.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), title=title or f"ECE {100 * ece:.1f} points, {bins} bins")
    top.legend(frameon=False)
    middle = (found.edges[1:] + found.edges[:-1]) / 2
    bottom.bar(middle.cpu(), found.counts.cpu(), width=0.9 / bins, color="#0072B2")
    bottom.set(xlabel="confidence", ylabel=f"examples of {len(probs)}")
    return figure


def fit_temperature(logits: Float[Tensor, "N K"], y: Int[Tensor, " N"]) -> float:
    """The temperature T whose ``softmax(logits / T)`` has the least negative log-likelihood (Guo et al., ICML 2017).

    Use examples that neither training nor testing sees. The likelihood is concave in 1 / T, so its slope is bisected.

    Args:
        logits: of the K classes, shape (N, K).
        y: right classes, shape (N,).

    Returns:
        T, between 0.001 and 1000.

    Warns:
        UserWarning: when the best T lies at an end of that range: examples that are all right (T to 0) or tell nothing.

    Example:
        >>> logits = torch.tensor([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [4.0, 0.0]])
        >>> round(fit_temperature(logits, torch.tensor([0, 0, 0, 1])), 3)  # three of four are right: 4 / T = log 3
        3.641
    """
    if logits.ndim != 2:
        raise ValueError(f"logits must have shape (N, K), got {tuple(logits.shape)}")
    check_labels(y, len(logits), logits.shape[1])
    if not len(logits) or not bool(logits.isfinite().all()):
        raise ValueError("logits must be finite and at least one row")
    z, y = logits.double(), y.to(logits.device)
    right = z.gather(1, y[:, None])[:, 0]

    def slope(log_t: float) -> float:
        scaled = (z / torch.tensor(log_t, dtype=z.dtype).exp()).softmax(1)
        return float(((scaled * z).sum(1) - right).mean())

    low, high = -6.907755278982137, 6.907755278982137
    # a hot softmax is flat, where the slope is that of guessing; a cold one counts errors
    if slope(low) <= 0 or slope(high) >= 0:
        warnings.warn(
            "no temperature between 0.001 and 1000 is best: every example is right, or they tell nothing", stacklevel=2
        )
        return float(torch.tensor(low if slope(low) <= 0 else high, dtype=torch.float64).exp())
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return float(torch.tensor((low + high) / 2, dtype=torch.float64).exp())

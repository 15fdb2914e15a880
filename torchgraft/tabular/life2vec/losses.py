"""Losses of life2vec: positive-unlabelled classification, and class-distance-weighted loss of ordinal items.

B: batch, C: classes.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["AsymmetricPULoss", "CDWCrossEntropy", "asymmetric_pu_loss", "cdw_cross_entropy", "sig_softmax"]

Transform = Literal["log", "power", "huber"]


def sig_softmax(
    x: Float[Tensor, ...], mask: Float[Tensor, ...] | Int[Tensor, ...] | Tensor | None = None, dim: int = -1
) -> Float[Tensor, ...]:
    """Softmax of ``x + log(sigmoid(x) + 1e-12)``, which saturates less (Kanai et al., 2018).

    Args:
        x: scores.
        mask: true where a score counts, of the shape of ``x``; the others get probability 0. Where none counts, all
            do.
        dim: the one that sums to 1.

    Example:
        >>> sig_softmax(torch.tensor([0.0, 0.0]))
        tensor([0.5000, 0.5000])
    """
    if mask is not None:
        keep = mask.bool()
        x = x.masked_fill(~(keep | ~keep.any(dim, keepdim=True)), -torch.inf)
    return (x + (x.sigmoid() + 1e-12).log()).softmax(dim)


def asymmetric_pu_loss(
    logits: Float[Tensor, "B 2"], labels: Int[Tensor, " B"], positive_weight: float = 0.5
) -> Float[Tensor, ""]:
    """``w`` times the mean cross-entropy of positives plus ``1 - w`` times that of the unlabelled, taken as negatives.

    Because each group is averaged by itself, scores are those of a balanced population: see ``recalibrate``. Where a
    batch has no positive, or none unlabelled, its term is absent.

    Args:
        logits: (B, 2).
        labels: 1 for positives, 0 for unlabelled.
        positive_weight: w.

    Raises:
        ValueError: for shapes, labels besides 0 and 1, and a weight outside 0..1.

    Example:
        >>> asymmetric_pu_loss(torch.zeros(3, 2), torch.tensor([1, 0, 0])).round(decimals=4)
        tensor(0.6931)
    """
    if logits.ndim != 2 or logits.shape[1] != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits must be (B, 2) and labels (B,), got {tuple(logits.shape)} and {tuple(labels.shape)}")
    if not 0 <= positive_weight <= 1:
        raise ValueError(f"positive_weight must lie in 0..1, got {positive_weight}")
    readable = labels.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and bool(((labels != 0) & (labels != 1)).any()):
        raise ValueError(f"labels must be 1 (positive) or 0 (unlabelled), got {labels.unique().tolist()}")
    each = F.cross_entropy(logits, labels.long(), reduction="none")
    positive = labels.to(each.dtype)

    def mean(weights: Tensor) -> Tensor:
        return (each * weights).sum() / weights.sum().clamp(min=1)

    return positive_weight * mean(positive) + (1 - positive_weight) * mean(1 - positive)


class AsymmetricPULoss(nn.Module):
    """``asymmetric_pu_loss`` as a module.

    Args:
        positive_weight: w.
    """

    def __init__(self, positive_weight: float = 0.5) -> None:
        super().__init__()
        self.positive_weight = positive_weight

    def forward(self, logits: Float[Tensor, "B 2"], labels: Int[Tensor, " B"]) -> Float[Tensor, ""]:
        """The loss."""
        return asymmetric_pu_loss(logits, labels, self.positive_weight)


def cdw_cross_entropy(
    probabilities: Float[Tensor, "B C"],
    target: Int[Tensor, " B"],
    transform: Transform = "log",
    alpha: float = 1.0,
    delta: float = 3.0,
    eps: float = 1e-5,
) -> Float[Tensor, ""]:
    """Class-distance-weighted cross-entropy: mean of ``-sum_i log(1 - p_i + eps) t(|i - y|)`` (Polat et al., 2022).

    Args:
        probabilities: (B, C), such as from ``sig_softmax``; logits are refused.
        target: y (B,), in 0..C-1.
        transform: t: ``log`` is ``log1p(x) ** alpha``, ``power`` is ``x ** alpha``, ``huber`` is ``x^2 / 2`` below
            ``delta`` and linear beyond.
        alpha, delta: of the transform.
        eps: inside the logarithm.

    Raises:
        ValueError: for shapes, unknown transforms, targets out of range, and rows that do not sum to 1.

    Example:
        >>> sure = torch.eye(5)[[2]]
        >>> cdw_cross_entropy(sure, torch.tensor([2])) < cdw_cross_entropy(sure, torch.tensor([3]))
        tensor(True)
    """
    if probabilities.ndim != 2 or target.shape != probabilities.shape[:1]:
        raise ValueError(
            f"probabilities must be (B, C) and target (B,), got {tuple(probabilities.shape)} and {tuple(target.shape)}"
        )
    if transform not in ("log", "power", "huber"):
        raise ValueError(f"transform must be 'log', 'power' or 'huber', got {transform!r}")
    if not (alpha > 0 and delta > 0):
        raise ValueError(f"alpha and delta must be positive, got {alpha} and {delta}")
    classes = probabilities.shape[1]
    if probabilities.device.type == "cpu" and probabilities.numel() and not torch.compiler.is_compiling():
        with torch.no_grad():
            off = (probabilities.sum(1) - 1).abs().max().item()
            if off > 1e-2 or probabilities.min() < -1e-6:
                raise ValueError(
                    f"probabilities must be rows of at least 0 that sum to 1, got a row {off:.3g} off; "
                    "apply sig_softmax or softmax to logits first"
                )
            if target.min() < 0 or target.max() >= classes:
                raise ValueError(f"target must lie in 0..{classes - 1}, got {target.min()}..{target.max()}")
    distance = (torch.arange(classes, device=target.device) - target[:, None]).abs().to(probabilities.dtype)
    if transform == "huber":
        weight = torch.where(distance < delta, distance.square() / 2, delta * (distance - delta / 2))
    else:
        weight = (distance.log1p() if transform == "log" else distance) ** alpha
    return -((1 - probabilities + eps).log() * weight).sum(1).mean()


class CDWCrossEntropy(nn.Module):
    """``cdw_cross_entropy`` as a module; arguments as there."""

    def __init__(self, transform: Transform = "log", alpha: float = 1.0, delta: float = 3.0, eps: float = 1e-5) -> None:
        super().__init__()
        self.transform: Transform = transform
        self.alpha, self.delta, self.eps = alpha, delta, eps

    def forward(self, probabilities: Float[Tensor, "B C"], target: Int[Tensor, " B"]) -> Float[Tensor, ""]:
        """The loss of probabilities."""
        return cdw_cross_entropy(probabilities, target, self.transform, self.alpha, self.delta, self.eps)

"""How much features and outputs change: cosine Gram matrices, their variants for images, and the divergence.

All take a reference and ``copies`` of what it became, and return one number per copy.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

__all__ = ["kl_loss", "manifold_loss", "mean_loss", "patch_loss", "squared_loss"]


def manifold_loss(
    teacher: Float[Tensor, "tokens features"], student: Float[Tensor, "copies tokens features"], aggregate: str = "sum"
) -> Float[Tensor, copies]:
    """Squared difference of the cosine Gram matrices of all tokens, the paper's L_MD.

    With unit vectors a and b of teacher and student, d = b - a and s = a + b, the difference of the Gram matrices is
    (s dᵀ + d sᵀ) / 2. Its squared norm is taken from matrices of tokens × tokens or features × features, whichever is
    smaller; unlike ||aᵀa||² - 2 ||aᵀb||² + ||bᵀb||² this loses no digits when b is close to a.

    Args:
        teacher: features of the whole model; need not be normalised.
        student: features of each damaged model, same tokens.
        aggregate: ``sum`` of all entries, or their ``mean``.

    Example:
        >>> import torch
        >>> x = torch.randn(5, 3)
        >>> manifold_loss(x, 2 * x[None]).item() < 1e-10
        True
    """
    a, b = F.normalize(teacher, dim=-1), F.normalize(student, dim=-1)
    d, s = b - a, a + b
    if a.shape[0] <= a.shape[1]:
        cross = s @ d.mT
        total = ((cross + cross.mT) / 2).square().sum((-1, -2))
    else:
        inner = s.mT @ d
        total = ((s.mT @ s) * (d.mT @ d) + inner * inner.mT).sum((-1, -2)).clamp(min=0) / 2
    return total / (a.shape[0] ** 2 if aggregate == "mean" else 1)


def mean_loss(
    teacher: Float[Tensor, "examples positions features"], student: Float[Tensor, "copies examples positions features"]
) -> Float[Tensor, copies]:
    """Squared difference of the batch means of normalised features, the paper's loss for convolutional networks.

    The released function has a variable that is never set, normalises along the width of the image and squares the sum
    of the differences; here features are normalised along channels and every difference is squared.
    """
    before, after = F.normalize(teacher, dim=-1).mean(0), F.normalize(student, dim=-1).mean(1)
    return (after - before).square().sum((-1, -2))


def patch_loss(
    teacher: Float[Tensor, "examples positions features"], student: Float[Tensor, "copies examples left features"]
) -> Float[Tensor, copies]:
    """Squared difference of Gram matrices over the examples, one per position and averaged over positions.

    The student may have lost positions.
    """
    a, b = F.normalize(teacher, dim=-1).transpose(0, 1), F.normalize(student, dim=-1).transpose(1, 2)
    return ((b @ b.mT).mean(1) - (a @ a.mT).mean(0)).square().sum((-1, -2))


def kl_loss(
    teacher: Float[Tensor, "examples classes"], student: Float[Tensor, "copies examples classes"], temperature: float
) -> Float[Tensor, copies]:
    """T² times the Kullback-Leibler divergence of the student from the teacher, summed over examples.

    As in the released code the logits themselves are not divided by T.
    """
    # where logits hardly move, what is left after the first-order terms cancel is below the digits of single precision
    before, after = teacher.double().log_softmax(-1), student.double().log_softmax(-1)
    total = (before.exp() * (before - after)).sum((-1, -2)).clamp(min=0)
    return (temperature**2 * total).to(student.dtype)


def squared_loss(
    teacher: Float[Tensor, "examples values"], student: Float[Tensor, "copies examples values"], temperature: float
) -> Float[Tensor, copies]:
    """T² times the squared error, for outputs that are no class scores: a regression, or bare features."""
    return temperature**2 * (student - teacher).square().sum((-1, -2))

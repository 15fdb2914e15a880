"""A number beside what it would be by chance."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Statistic:
    """A measured number with draws of the same number from a null model.

    Attributes:
        value: as measured.
        null: at least one draw.
        what: which null model it is.
        higher: whether structure shows as a higher value.
        each, null_each: where the value is a mean over tokens, each one's, and each one's mean over the draws.

    Example:
        >>> found = Statistic(0.9, (0.1, 0.2, 0.3), "shuffled", True)
        >>> found.p_value, round(found.excess, 3)
        (0.25, 0.7)
    """

    value: float
    null: tuple[float, ...]
    what: str
    higher: bool = True
    each: tuple[float, ...] = ()
    null_each: tuple[float, ...] = ()

    @property
    def null_mean(self) -> float:
        """Mean of the draws."""
        return sum(self.null) / len(self.null)

    @property
    def excess(self) -> float:
        """Value less the mean of the draws."""
        return self.value - self.null_mean

    @property
    def p_value(self) -> float:
        """One-sided, draws and value together: exact where value and draws can change places under the null model."""
        sign = 1 if self.higher else -1
        if any(math.isnan(v) for v in (self.value, *self.null)):
            return math.nan
        return (1 + sum(sign * draw >= sign * self.value for draw in self.null)) / (1 + len(self.null))


def generator(seed: int) -> torch.Generator:
    """Random numbers of our own, so that the global generator is left alone."""
    return torch.Generator().manual_seed(seed)


def gaussian_like(x: Tensor, draw: torch.Generator) -> Tensor:
    """Gaussian rows (N, D) with exactly the mean and covariance of ``x``, float64.

    Given its mean and covariance a Gaussian sample is a random orthogonal frame times their square root, so that a
    sample that is Gaussian itself can change places with what comes out here.
    """
    x = x.double()
    mean = x.mean(0)
    scale, directions = torch.linalg.svd(x - mean, full_matrices=False)[1:]
    noise = torch.randn(len(x), len(scale), generator=draw, dtype=torch.float64)
    # a frame orthogonal to the vector of ones, so that the mean stays
    frame = torch.linalg.qr(noise - noise.mean(0)).Q
    signs = torch.randint(0, 2, (len(scale),), generator=draw, dtype=torch.float64) * 2 - 1
    return mean + (frame * signs * scale) @ directions


def gaussian_of_lengths(x: Tensor, draw: torch.Generator) -> Tensor:
    """Gaussian rows as ``gaussian_like`` gives them, each as far from the mean as its row of ``x`` (N, D) is.

    Token vectors differ much in length, and few long vectors are easier to build of few parts than many of one length.
    """
    mean = x.double().mean(0)
    other = gaussian_like(x, draw) - mean
    lengths = (x.double() - mean).norm(dim=1, keepdim=True)
    return mean + other * lengths / other.norm(dim=1, keepdim=True).clamp(min=1e-300)


def shuffled_dimensions(x: Tensor, draw: torch.Generator) -> Tensor:
    """Each column of ``x`` (N, D) in an order of its own: marginals stay, what goes together is lost."""
    order = torch.stack([torch.randperm(len(x), generator=draw) for _ in range(x.shape[1])], 1)
    return x.gather(0, order.to(x.device))


def rotation(size: int, draw: torch.Generator) -> Tensor:
    """A random orthogonal matrix, float64, uniform."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=draw, dtype=torch.float64))
    return q * r.diagonal().sign()

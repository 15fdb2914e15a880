"""The honest rival of a power grid: a fixed codebook made for normal weights (NF4 of QLoRA), found by nearest level."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from torchgraft.compression.nupes.quantizer import check_bits, check_finite
from torchgraft.compression.nupes.search import rows_and_scales

__all__ = ["codebook_round", "normal_float_levels"]


def normal_float_levels(bits: int) -> Float64[Tensor, " levels"]:
    """NormalFloat: 2^b levels in -1..1, quantiles of the normal distribution, with an exact zero.

    QLoRA (arXiv 2305.14314), section 3 and appendix E: 2^(b-1) quantiles for positive values, 2^(b-1) - 1 for
    negative ones and zero, scaled to 1. Its tail probability averages those of a level at either end:
    1 - (1/32 + 1/30) / 2 for 4 bits.

    Example:
        >>> levels = normal_float_levels(4)
        >>> len(levels), levels[[0, 7, 15]].tolist()
        (16, [-1.0, 0.0, 1.0])
    """
    check_bits(bits)
    half = 2 ** (bits - 1)
    offset = 1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2

    def quantiles(count: int) -> Tensor:
        return torch.special.ndtri(torch.linspace(0.5, offset, count + 1, dtype=torch.float64))[1:]

    up, down = quantiles(half), quantiles(half - 1)
    return torch.cat([-down.flip(0) / down.max(), torch.zeros(1, dtype=torch.float64), up / up.max()])


def codebook_round(
    weight: Float[Tensor, "out ..."], levels: Float[Tensor, " levels"], group_size: int | None = None
) -> Float[Tensor, "out ..."]:
    """Each weight at its nearest level times the largest magnitude of its output channel (or group of columns)."""
    check_finite(weight, "weight")
    x, m = rows_and_scales(weight.float(), group_size)
    levels = levels.to(x)
    index = torch.bucketize(x / m, (levels[1:] + levels[:-1]) / 2)
    rounded = (levels[index] * m).flatten(1)[:, : weight[0].numel()]
    return rounded.reshape(weight.shape).to(weight.dtype)

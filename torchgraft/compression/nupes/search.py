"""The data-free search of the exponent: the weights alone, no gradient, no data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from torchgraft.compression.nupes.quantizer import (
    absmax_scale,
    check_bits,
    check_exponent,
    check_finite,
    encode,
    inverse_power,
    largest_code,
)

__all__ = ["Granularity", "quantization_error", "search_exponent"]

Granularity = Literal["network", "layer", "channel"]

LOWEST, HIGHEST, STEP, FINE, TOLERANCE = 0.2, 1.2, 0.05, 0.005, 1e-3
EXACT, BINS = 2**13, 2**13


def rows_and_scales(
    weight: Float[Tensor, "out ..."], group_size: int | None
) -> tuple[Float[Tensor, "out groups size"], Float[Tensor, "out groups 1"]]:
    """A weight as groups (the last one padded by zeros) and the largest magnitude of each."""
    flat = weight.flatten(1)
    size = flat.shape[1] if group_size is None else min(group_size, flat.shape[1])
    grouped = torch.nn.functional.pad(flat, (0, -flat.shape[1] % size)).unflatten(1, (-1, size))
    m = grouped.abs().amax(2, keepdim=True)
    return grouped, torch.where(m > 0, m, torch.ones_like(m))


def quantization_error(
    weight: Float[Tensor, "out ..."], a: float | Tensor, bits: int, p: float = 2, group_size: int | None = None
) -> float:
    """|| W - D_a(Q_a(W)) ||_p with a scale for each output channel (or group of it), in float64.

    Example:
        >>> w = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
        >>> quantization_error(w, 0.7, 4) < quantization_error(w, 1.0, 4)
        True
    """
    check_exponent(a)
    n = largest_code(bits)
    check_finite(weight, "weight")
    x, m = rows_and_scales(weight.double(), group_size)
    a = a.double().view(-1, 1, 1) if isinstance(a, Tensor) and a.ndim else a
    q = encode(x, a, n, m).round()
    decoded = m * q.sign() * (q.abs() / n).pow(inverse_power(a))
    return float((x - decoded).abs().pow(p).sum() ** (1 / p))


def _profile(weight: Tensor, p: float, group_size: int | None) -> tuple[Tensor, Tensor]:
    """Magnitudes of scale 1 and their masses m^p: the values themselves, or a fine histogram of many."""
    x, m = rows_and_scales(weight if weight.dtype == torch.float64 else weight.float(), group_size)
    u, mass = (x.abs() / m).flatten(), m.double().pow(p).expand_as(x).flatten()
    if u.numel() <= EXACT:
        return u.double(), mass
    # denser towards zero, where the levels of a power grid are: bin k holds (k / BINS)^2 .. ((k + 1) / BINS)^2
    place = (u.sqrt() * BINS).to(torch.int32).clamp(max=BINS - 1)
    total = torch.bincount(place, weights=mass, minlength=BINS)
    centre = torch.bincount(place, weights=mass * u, minlength=BINS) / total.clamp(min=1e-300)
    held = total > 0
    return centre[held], total[held]


def _profile_error(profile: tuple[Tensor, Tensor], a: float, n: int, p: float) -> float:
    u, mass = profile
    decoded = ((n * u.pow(a)).round() / n).pow(1 / a)
    return float((mass * (u - decoded).abs().pow(p)).sum() ** (1 / p))


def _least(error: Callable[[float], float]) -> float:
    """Two grids, then golden section about the best point; the best of all that were tried, 1 among them."""
    count = round((HIGHEST - LOWEST) / STEP)
    # 1 first: of equal errors (a weight of zeros, or of two values) the uniform grid is the plain choice
    tried = {a: error(a) for a in (1.0, *(round(LOWEST + STEP * i, 10) for i in range(count + 1)))}
    best = min(tried, key=lambda a: tried[a])
    # of few weights e is jagged: golden section alone would stop in any of its notches
    near = round(STEP / FINE)
    tried |= {a: error(a) for a in (round(best + FINE * i, 10) for i in range(-near, near + 1)) if a not in tried}
    best = min(tried, key=lambda a: tried[a])
    low, high = best - FINE, best + FINE
    ratio = (math.sqrt(5) - 1) / 2
    inner, outer = high - ratio * (high - low), low + ratio * (high - low)
    tried |= {inner: error(inner), outer: error(outer)}
    while high - low > TOLERANCE:
        if tried[inner] <= tried[outer]:
            high, outer = outer, inner
            inner = high - ratio * (high - low)
            tried[inner] = error(inner)
        else:
            low, inner = inner, outer
            outer = low + ratio * (high - low)
            tried[outer] = error(outer)
    return min(tried, key=lambda a: tried[a])


def _channels(weight: Tensor, bits: int, p: float, group_size: int | None) -> Tensor:
    """The best exponent of each output channel: the same grid, then ever finer ones about each channel's best."""
    n = largest_code(bits)
    x, m = rows_and_scales(weight.float(), group_size)
    u = x.abs() / m

    def error(a: Tensor) -> Tensor:
        power = a.view(-1, 1, 1).float()
        decoded = ((n * u.pow(power)).round() / n).pow(1 / power)
        return (m * (u - decoded).abs()).pow(p).sum((1, 2))

    count = round((HIGHEST - LOWEST) / STEP)
    best = torch.ones(len(u), dtype=torch.float64, device=u.device)
    least = error(best)
    centre, width, steps = None, STEP, [LOWEST + STEP * i for i in range(count + 1)]
    while True:
        start = best.clone() if centre is None else centre
        for step in steps:
            candidate = torch.full_like(best, step) if centre is None else start + step
            found = error(candidate)
            best, least = torch.where(found < least, candidate, best), torch.minimum(found, least)
        if width <= TOLERANCE:
            return best
        centre, width = best.clone(), width / 3
        steps = [-2 * width, -width, width, 2 * width]


def named(weights: Iterable[Tensor] | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by name; those of a plain iterable are named by their place."""
    if isinstance(weights, (Tensor, torch.nn.Module)):
        raise TypeError(f"weights must be several tensors, got one {type(weights).__name__}; give a list or a mapping")
    found = dict(weights) if isinstance(weights, Mapping) else {str(i): w for i, w in enumerate(weights)}
    if not found:
        raise ValueError("weights is empty; give at least one tensor")
    for name, weight in found.items():
        if not isinstance(weight, Tensor) or weight.ndim < 2 or not weight.numel():
            raise ValueError(f"weights[{name!r}] must be a tensor (out, …) of two or more dimensions, not empty")
        check_finite(weight, f"weight {name!r}")
    return found


def search_exponent(
    weights: Iterable[Tensor] | Mapping[str, Tensor],
    bits: int,
    p: float = 2,
    granularity: Granularity = "network",
    group_size: int | None = None,
    candidates: Iterable[float] | None = None,
) -> Any:
    """The exponent that loses least of the weights: minimise e(a) = sum over layers of || W - D_a(Q_a(W)) ||_p.

    arXiv 2301.09858, section 3 (as recalled): e is locally convex about one minimum, and the paper searches it by
    Nelder-Mead. Here: the grid 0.2, 0.25, …, 1.2, steps of 0.005 about its best, then golden section to 1e-3; 1 is
    always among the candidates, so the result is never worse than the uniform grid. A layer of more than 8,192
    weights is searched on a histogram of |W| / m of 8,192 bins (each represented by its mean), so that an evaluation
    does not depend on its size.

    Args:
        weights: each (out, …), with a scale for each output channel; a mapping gives the names.
        bits: 2 to 8.
        p: of the norm.
        granularity: ``"network"`` one exponent for all, ``"layer"`` one each, ``"channel"`` one for each output
            channel of each.
        group_size: columns that share a scale; ``None`` for all of a channel.
        candidates: choose among these alone, instead of searching (not for ``"channel"``).

    Returns:
        A number; or for ``"layer"`` a number by name; or for ``"channel"`` a tensor (out,) by name.

    Raises:
        ValueError: for bits out of range, NaN or infinity, an empty list or weight, a wrong granularity, or candidates
            that are no exponents.
        TypeError: for one tensor or a module in the place of several tensors.

    Example:
        >>> w = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
        >>> 0.6 < search_exponent([w], bits=4) < 0.9
        True
    """
    check_bits(bits)
    if granularity not in ("network", "layer", "channel"):
        raise ValueError(f"granularity must be 'network', 'layer' or 'channel', got {granularity!r}")
    if not p > 0 or math.isinf(p):
        raise ValueError(f"p must be finite and above 0, got {p}")
    kept = named(weights)
    n = largest_code(bits)
    allowed = None if candidates is None else list(candidates)
    if allowed is not None:
        if granularity == "channel" or not allowed:
            raise ValueError(
                f"candidates must be one or more exponents, for granularity 'network' or 'layer'; got {allowed} for "
                f"{granularity!r}"
            )
        for a in allowed:
            check_exponent(a, "candidates")
    if granularity == "channel":
        return {name: _channels(w.detach(), bits, p, group_size) for name, w in kept.items()}
    with torch.no_grad():
        profiles = {name: _profile(w.detach(), p, group_size) for name, w in kept.items()}

    def best(names: Iterable[str]) -> float:
        chosen = [profiles[name] for name in names]

        def error(a: float) -> float:
            return sum(_profile_error(profile, a, n, p) for profile in chosen)

        return _least(error) if allowed is None else min(allowed, key=error)

    if granularity == "network":
        return best(kept)
    return {name: best([name]) for name in kept}


def weight_scale(weight: Float[Tensor, "out ..."], group_size: int | None) -> Float[Tensor, "out groups"]:
    """Largest magnitude of each output channel, or of each group of its columns, in the weight's own dtype."""
    if group_size is None:
        return absmax_scale(weight.flatten(1))
    return rows_and_scales(weight, group_size)[1].squeeze(2)

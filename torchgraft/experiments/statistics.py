"""Paired intervals, and the verdicts that follow from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from torchgraft.experiments.records import Claim, Judged, Measurement

CONFIDENCE = 0.95
RESAMPLES = 9999


def t_interval(differences: np.ndarray) -> tuple[float, float] | None:
    """Student's t interval of a mean, 95 %; ``None`` for fewer than two values.

    Example:
        >>> low, high = t_interval(np.array([1.0, 2.0, 3.0]))
        >>> round(low, 3), round(high, 3)
        (-0.484, 4.484)
    """
    from scipy import stats

    n = len(differences)
    if n < 2:
        return None
    half = stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1) * np.std(differences, ddof=1) / np.sqrt(n)
    return float(np.mean(differences) - half), float(np.mean(differences) + half)


def bootstrap_interval(differences: np.ndarray) -> tuple[float, float] | None:
    """Percentile bootstrap interval of a mean, 95 %, 9,999 resamples, always the same ones.

    ``None`` for fewer than two values. Where all values are equal the interval is that value alone.
    """
    from scipy import stats

    if len(differences) < 2:
        return None
    if np.ptp(differences) == 0:
        return float(differences[0]), float(differences[0])
    found = stats.bootstrap(
        (differences,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def share_interval(outcomes: np.ndarray) -> tuple[float, float] | None:
    """Exact 95 % interval of a share of zeros and ones (Clopper and Pearson 1934).

    A bootstrap knows nothing of what it has not seen: of no event among 60 it makes an interval of width zero.

    Example:
        >>> low, high = share_interval(np.array([1.0] * 2 + [0.0] * 123))
        >>> round(low, 4), round(high, 4)
        (0.0019, 0.0566)
    """
    from scipy import stats

    if len(outcomes) < 2:
        return None
    found = stats.binomtest(int(outcomes.sum()), len(outcomes)).proportion_ci(CONFIDENCE)
    return float(found.low), float(found.high)


def verdict(
    interval: tuple[float, float] | None, smallest_effect: float, direction: str
) -> Literal["supported", "not supported", "inconclusive"]:
    """The rule of ``Claim``, applied to the interval of the effect.

    Example:
        >>> verdict((1.2, 3.4), 1.0, "higher"), verdict((-2.0, 0.9), 1.0, "higher"), verdict((0.5, 2.0), 1.0, "higher")
        ('supported', 'not supported', 'inconclusive')
    """
    if interval is None:
        return "inconclusive"
    low, high = interval
    if direction == "equal":
        if -smallest_effect <= low and high <= smallest_effect:
            return "supported"
        return "not supported" if low > smallest_effect or high < -smallest_effect else "inconclusive"
    if low >= smallest_effect:
        # an interval that is exactly [0, 0] shows no effect, even where the smallest effect that matters is 0
        return "supported" if high > 0 else "not supported"
    return "not supported" if high < smallest_effect else "inconclusive"


def _measured(
    measurements: Mapping[str, Mapping[int, Measurement]], arm: str, metric: str
) -> Mapping[int, Measurement]:
    if arm not in measurements:
        raise ValueError(f"a claim names the arm {arm!r}, but the recipe measured {sorted(measurements)}")
    for seed, measurement in measurements[arm].items():
        if metric not in measurement.metrics:
            raise ValueError(
                f"a claim names the metric {metric!r}, but arm {arm!r} (seed {seed}) measured "
                f"{sorted(measurement.metrics)}"
            )
    return measurements[arm]


def judge(claim: Claim, measurements: Mapping[str, Mapping[int, Measurement]]) -> Judged:
    """Interval and verdict of one claim.

    Where the metric has per-example values in every arm compared, the differences are paired over examples (averaged
    over seeds first) and the interval is a bootstrap, or exact where a share of zeros and ones is held against a bound;
    otherwise they are paired over seeds and the interval is Student's.

    Args:
        claim: what to judge.
        measurements: ``measurements[arm][seed]``.

    Raises:
        ValueError: when an arm or metric of the claim was not measured, or the arms cannot be paired.
    """
    arms = [claim.arm] + ([claim.against] if isinstance(claim.against, str) else [])
    found = [_measured(measurements, arm, claim.metric) for arm in arms]
    seeds = list(found[0])
    if any(list(other) != seeds for other in found[1:]):
        raise ValueError(f"arms {arms} of the claim {claim.text!r} were measured with different seeds")

    over_examples = all(claim.metric in m.examples for per_seed in found for m in per_seed.values())
    values: Sequence[np.ndarray]
    if over_examples:
        lengths = {len(m.examples[claim.metric]) for per_seed in found for m in per_seed.values()}
        if len(lengths) != 1:
            raise ValueError(f"arms {arms} have different numbers of examples of {claim.metric!r}: {sorted(lengths)}")
        values = [np.mean([m.examples[claim.metric] for m in per_seed.values()], axis=0) for per_seed in found]
    else:
        values = [np.array([m.metrics[claim.metric] for m in per_seed.values()]) for per_seed in found]
    against = values[1] if len(values) == 2 else np.float64(claim.against)
    sign = -1.0 if claim.direction == "lower" else 1.0
    effects = sign * claim.factor * (values[0] - against)
    method = f"paired percentile bootstrap, 95 %, {RESAMPLES} resamples" if over_examples else "paired t, 95 %"
    interval = bootstrap_interval(effects) if over_examples else t_interval(effects)
    bound = over_examples and len(values) == 1 and claim.direction != "equal"
    if bound and bool(np.isin(values[0], (0, 1)).all()) and (share := share_interval(values[0])) is not None:
        ends = sorted(float(sign * claim.factor * (end - against)) for end in share)
        interval, method = (ends[0], ends[1]), "exact binomial, 95 %"
    return Judged(
        claim=claim,
        estimate=float(np.mean(effects)),
        interval=interval,
        method=method,
        paired_over="examples" if over_examples else "seeds",
        n=len(effects),
        verdict=verdict(interval, claim.smallest_effect, claim.direction),
    )

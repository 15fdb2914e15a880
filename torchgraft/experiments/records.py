"""What an experiment is made of: claims, measurements, progress, and the result that figures are drawn from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

Direction = Literal["higher", "lower", "equal"]


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper, turned into something that can turn out false.

    The effect is ``arm - against`` for ``direction="higher"``, ``against - arm`` for ``"lower"``, and the plain
    difference for ``"equal"``. With the 95 % interval of that paired effect:

    - ``higher`` / ``lower``: *supported* when the whole interval is at or above ``smallest_effect``,
      *not supported* when the whole interval is below it, *inconclusive* otherwise.
    - ``equal``: *supported* when the whole interval lies within ``±smallest_effect``, *not supported* when it lies
      wholly outside, *inconclusive* otherwise.

    Args:
        text: the claim in words that a reader of the paper would recognise.
        metric: name of the metric, present in the measurements of both arms.
        arm: the arm the claim is about.
        against: the arm it is compared with, or a number when the claim is about a fixed value.
        smallest_effect: the smallest effect that would matter to a user, in ``unit`` (so after ``factor``: 5 for five
            points of a rate); not negative.
        direction: what the claim says of the effect.
        unit: unit of the metric, such as ``"points"``.
        paper: the paper's own number, quoted for the reader.
        factor: printed and recorded numbers of this claim are the metric times this (100 for points of a rate).
    """

    text: str
    metric: str
    arm: str
    against: str | float
    smallest_effect: float
    direction: Direction = "higher"
    unit: str = ""
    paper: str = ""
    factor: float = 1.0

    def __post_init__(self) -> None:
        if self.direction not in ("higher", "lower", "equal"):
            raise ValueError(f"direction must be 'higher', 'lower' or 'equal', got {self.direction!r}")
        if not self.smallest_effect >= 0:
            raise ValueError(
                f"smallest_effect must be a number >= 0, got {self.smallest_effect!r}; "
                "use direction='lower' for an effect that goes down"
            )


@dataclass
class Measurement:
    """What one arm gave for one seed.

    Args:
        metrics: one number per metric.
        curves: named curves, each a pair ``(x, y)`` of equally long lists, for instance accuracy against steps.
        examples: per-example values of a metric, in the same order for every arm. A metric listed here is compared
            by a paired bootstrap over examples instead of over seeds; its entry in ``metrics`` must be their mean.
        extra: anything else a figure needs, as plain JSON values.
    """

    metrics: dict[str, float]
    curves: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)
    examples: dict[str, list[float]] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.metrics = {name: float(value) for name, value in self.metrics.items()}
        self.curves = {name: ([float(v) for v in x], [float(v) for v in y]) for name, (x, y) in self.curves.items()}
        self.examples = {name: [float(v) for v in values] for name, values in self.examples.items()}
        for name, (x, y) in self.curves.items():
            if len(x) != len(y):
                raise ValueError(f"curve {name!r} has {len(x)} x values and {len(y)} y values")
        for name, values in self.examples.items():
            if name not in self.metrics:
                raise ValueError(f"examples of {name!r} are given, but metrics has no {name!r}")
            if not np.isclose(self.metrics[name], np.mean(values), rtol=1e-6, atol=1e-9):
                raise ValueError(
                    f"metric {name!r} is {self.metrics[name]}, but its examples have mean {np.mean(values)}"
                )


@runtime_checkable
class Progress(Protocol):
    """What the engine hands to an arm."""

    @property
    def folder(self) -> Path:
        """A folder of this arm and seed alone, for checkpoints; removed once the arm is finished."""

    def __call__(self, done: float, total: float, note: str = "") -> None:
        """Report that ``done`` of ``total`` units of work are finished; feeds the bar and its time left."""

    def once(self, key: str, compute: Callable[[], Any]) -> Any:
        """Return ``compute()``, a plain JSON value, computed once per run and stored at once.

        For what several arms or seeds share, such as a learning rate chosen from a grid. Everything stored this way
        is recorded under ``"tuned"``.
        """


Arm = Callable[[int, Progress], "Measurement | Mapping[str, Measurement]"]
"""``arm(seed, progress)``. Returning a mapping names several readings of one trained model, each an arm of its own."""


@dataclass(frozen=True)
class Judged:
    """A claim with its interval and verdict."""

    claim: Claim
    estimate: float
    interval: tuple[float, float] | None
    method: str
    paired_over: Literal["seeds", "examples"]
    n: int
    verdict: Literal["supported", "not supported", "inconclusive"]


@dataclass
class Result:
    """All measurements of a run: ``measurements[arm][seed]``."""

    slug: str
    scale: str
    config: Any
    seeds: Sequence[int]
    measurements: dict[str, dict[int, Measurement]]
    judged: list[Judged] = field(default_factory=list)
    tuned: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def arms(self) -> list[str]:
        """Names of the arms, in the order of the recipe."""
        return list(self.measurements)

    def values(self, arm: str, metric: str) -> np.ndarray:
        """Values of a metric, one per seed, shape ``(seeds,)``."""
        return np.array([m.metrics[metric] for m in self.measurements[arm].values()])

    def curve(self, arm: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A curve as ``x`` of shape ``(points,)`` and ``y`` of shape ``(seeds, points)``."""
        curves = [m.curves[name] for m in self.measurements[arm].values()]
        xs = {tuple(x) for x, _ in curves}
        if len(xs) != 1:
            raise ValueError(f"curve {name!r} of arm {arm!r} has different x values in different seeds")
        return np.array(curves[0][0]), np.array([y for _, y in curves])

    def examples(self, arm: str, metric: str) -> np.ndarray:
        """Per-example values of the first seed, shape ``(examples,)``."""
        return np.array(next(iter(self.measurements[arm].values())).examples[metric])

"""Numbers found in text."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from torchgraft.tabular.automunge.columns import Column, ColumnEncoder

__all__ = ["NumberExtractor", "find_number"]

Convention = Literal["numbers", "commas", "eu"]
CONVENTIONS = ("numbers", "commas", "eu")
DIGITS = 309
"""The largest float has so many digits before the point."""
LONGEST = 400
"""More characters than a finite number needs, so that one long entry cannot stall a fit."""

# what a number is made of, and what may stand around it without harm; only eu allows blanks inside
_PARTS = {
    "numbers": (re.compile(r"[.+\-_eE]*\d[\d.+\-_eE]*"), re.compile(r"\s")),
    "commas": (re.compile(r"[.,+\-_eE]*\d[\d.,+\-_eE]*"), re.compile(r"[\s,]")),
    "eu": (re.compile(r"[ .,+\-_eE]*\d[\d .,+\-_eE]*"), re.compile(r"[\s.]")),
}

# how far a number that begins at a place can reach at most: a sign, a decimal point and an exponent come once
_REACH = {
    "numbers": re.compile(r"\s*[+-]?[\d_]*\.?[\d_]*(?:[eE][+-]?[\d_]*)?\s*"),
    "commas": re.compile(r"[\s,]*[+-]?[\d_,]*\.?[\d_,]*(?:[eE],*[+-]?[\d_,]*)?[\s,]*"),
    "eu": re.compile(r"[\s.]*[+-]?[\d_ .]*,?[\d_ .]*(?:[eE][ .]*[+-]?[\d_ .]*)?[\s.]*"),
}


def _read(text: str, convention: str) -> float | None:
    # a lone character is read as it is, whatever the convention
    if convention == "commas" and len(text) > 1:
        text = text.replace(",", "")
    elif convention == "eu" and len(text) > 1:
        inner = text[1:-1].replace(" ", "").replace(".", "").replace(",", ".")
        text = text[0] + inner + text[-1]
    if len(text) > DIGITS and text.isdecimal() and len(text.lstrip("0")) > DIGITS:
        return None
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _finite_reach(text: str, start: int, most: int) -> int:
    """A row of so many digits is infinite as a whole."""
    return DIGITS if most > DIGITS and text[start : start + most].isdecimal() and int(text[start]) else most


def find_number(text: str, convention: Convention = "numbers") -> float | None:
    """The longest part of a text that reads as a finite number, the leftmost where several are; None without one.

    A part reads as a number when Python's ``float`` accepts it, so ``"1e3"``, ``"1_000"`` and blanks around a number
    count. ``commas`` drops commas first; ``eu`` drops blanks and dots between the first and the last character and
    takes the comma as the decimal sign. Parts of more than 400 characters are not looked at.

    Example:
        >>> find_number("12 and 3456"), find_number("$1,234.50", "commas"), find_number("EUR 3.000", "eu")
        (3456.0, 1234.5, 3000.0)
    """
    best, length = None, 0
    part, around, reach = *_PARTS[convention], _REACH[convention]
    for core in part.finditer(text):
        first, last = core.span()
        while first > 0 and core.start() - first < LONGEST and around.match(text[first - 1]):
            first -= 1
        while last < len(text) and last - core.end() < LONGEST and around.match(text[last]):
            last += 1
        piece = text[first:last]
        matches = (reach.match(piece, start) for start in range(len(piece)))
        reaches = [min(match.end() - match.start(), LONGEST) for match in matches if match]
        if max(reaches) > DIGITS:
            reaches = [_finite_reach(piece, start, most) for start, most in enumerate(reaches)]
        starts = [start for start, most in enumerate(reaches) if most > length]
        for size in range(max(reaches), length, -1):
            for start in starts:
                if reaches[start] < size:
                    continue
                value = _read(piece[start : start + size], convention)
                if value is not None:
                    best, length = value, size
                    break
            if length == size:
                break
    return best


@dataclass(frozen=True)
class _Numbers:
    seen: dict[str, float | None]
    fill: float
    shift: float
    scale: float


class NumberExtractor(ColumnEncoder):
    """The number in each entry (nmrc, nmcm, nmEU of the paper), as float64.

    Args:
        convention: ``numbers``, ``commas`` (1,234.5) or ``eu`` (1.234,5); see ``find_number``.
        infill: for entries without a number: ``mean`` of the training rows that have one, a number, or NaN.
        scale: ``z-score`` (of the filled training rows, with n - 1; also ``True``), ``min-max``, or ``False``.
        unseen: ``parse`` looks for numbers in entries that were not in training, ``ignore`` treats them as without.

    Where we differ from the official code: the mean is always that of training (nmrc and nmcm there take a test
    frame's own mean), and an unseen entry is searched as a whole (there not beyond the longest training entry).

    Warns:
        UserWarning: for a training column without any number; ``mean`` then is 0, as there.

    Example:
        >>> NumberExtractor("commas").fit_transform([["PC 17,599"], ["A/5 21171"], ["LINE"]]).ravel()
        array([17599., 21171., 19385.])
    """

    def __init__(
        self,
        convention: Convention = "numbers",
        infill: Literal["mean"] | float = "mean",
        scale: bool | Literal["z-score", "min-max"] = False,
        unseen: Literal["parse", "ignore"] = "parse",
    ) -> None:
        self.convention, self.infill, self.scale, self.unseen = convention, infill, scale, unseen

    def _check(self) -> None:
        if self.convention not in CONVENTIONS:
            raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}, got {self.convention!r}")
        number = isinstance(self.infill, (int, float, np.number)) and not isinstance(self.infill, bool)
        if self.infill != "mean" and (not number or math.isinf(self.infill)):
            raise ValueError(f"infill must be 'mean', a finite number or NaN, got {self.infill!r}")
        if self.scale not in (False, True, "z-score", "min-max"):
            raise ValueError(f"scale must be 'z-score', 'min-max', True or False, got {self.scale!r}")
        if self.unseen not in ("parse", "ignore"):
            raise ValueError(f"unseen must be 'parse' or 'ignore', got {self.unseen!r}")

    def _suffix(self) -> str:
        root = {"numbers": "nmr", "commas": "nmc", "eu": "nmE"}[self.convention]
        if not self.scale:
            return {"nmr": "nmrc", "nmc": "nmcm", "nmE": "nmEU"}[root]
        return f"{root}9_mnmx" if self.scale == "min-max" else f"{root}8_nmbr"

    def _kinds(self, state: _Numbers) -> list[tuple[str, int]]:
        return [("number", 0)]

    def _learn(self, column: Column) -> _Numbers:
        seen = {str(entry): find_number(str(entry), self.convention) for entry in column.entries}
        values = np.array([math.nan if v is None else v for v in seen.values()] + [math.nan])[column.codes]
        known = values[~np.isnan(values)]
        if self.infill == "mean":
            fill = float(known.mean()) if len(known) else 0.0
        else:
            fill = float(self.infill)
        return _Numbers(seen, fill, *_scaling(np.where(np.isnan(values), fill, values), self.scale))

    def _complaint(self, state: _Numbers, column: Column) -> str | None:
        if all(value is None for value in state.seen.values()):
            return f"column {column.name!r} holds no number; every row gets the same value"
        return None

    def _encode(self, state: _Numbers, entries: Sequence[Any]) -> np.ndarray:
        found = []
        for entry in map(str, entries):
            if entry in state.seen:
                found.append(state.seen[entry])
            else:
                found.append(find_number(entry, self.convention) if self.unseen == "parse" else None)
        values = np.array([state.fill if v is None else v for v in [*found, None]])
        return ((values - state.shift) / state.scale)[:, None]


def _scaling(values: np.ndarray, scale: bool | str) -> tuple[float, float]:
    """What to take off and what to divide by; a constant column is only shifted."""
    values = values[~np.isnan(values)]
    if not scale or not len(values):
        return 0.0, 1.0
    if scale == "min-max":
        return float(values.min()), float(np.ptp(values)) or 1.0
    return float(values.mean()), (float(values.std(ddof=1)) if len(values) > 1 else 0.0) or 1.0

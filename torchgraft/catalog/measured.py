"""The measured part of a card, written from the records and from nothing else."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def show(value: float) -> str:
    """A number with four significant digits, as people write it.

    Example:
        >>> show(0.123456), show(94.5), show(12345.6), show(float("nan"))
        ('0.1235', '94.5', '12346', 'nan')
    """
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        digits = 4 if value == 0 else max(0, 3 - math.floor(math.log10(abs(value))))
        text = f"{value:.{digits}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{value:.2e}"


def spread(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation, or the value alone when there is one.

    Example:
        >>> spread([1.0, 2.0, 3.0]), spread([0.5])
        ('2 ± 1', '0.5')
    """
    if len(values) == 1:
        return show(values[0])
    return f"{show(statistics.fmean(values))} ± {show(statistics.stdev(values))}"


def tables(record: Mapping[str, Any]) -> list[tuple[list[str], list[tuple[str, list[str]]]]]:
    """The arms grouped by which metrics they have: ``[(metrics, [(arm, cells)])]``."""
    groups: dict[tuple[str, ...], list[tuple[str, list[str]]]] = {}
    for arm, metrics in record["arms"].items():
        groups.setdefault(tuple(metrics), []).append((arm, [spread(values) for values in metrics.values()]))
    return [(list(metrics), rows) for metrics, rows in groups.items()]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join([_row(heading), _row(["---"] * len(heading)), *map(_row, rows)])


def interval(bounds: Sequence[float] | None) -> str:
    """An interval as people write it.

    Example:
        >>> interval([1.25, 2.5]), interval(None)
        ('1.25 … 2.5', 'none')
    """
    return "none" if bounds is None else f"{show(bounds[0])} … {show(bounds[1])}"


def measured_block(records: Sequence[Mapping[str, Any]], benches: Sequence[Mapping[str, Any]] = ()) -> str:
    """The Markdown of the recorded runs of a technique and of its benches."""
    parts = [part for record in records for part in _run_block(record)]
    for bench in benches:
        best, worst = (pick(case["ratio"] for case in bench["cases"]) for pick in (min, max))
        parts.append(
            f"`{bench['command']}`: {bench['ours']} against {bench['peer']}, time ratio from {show(best)} to "
            f"{show(worst)} over {len(bench['cases'])} cases (below 1 is faster); all of them in "
            f"`evidence/bench/{bench['name']}.json`."
        )
    return "\n\n".join(parts)


def _run_block(record: Mapping[str, Any]) -> list[str]:
    parts = [f"`{record['command']}`, {record['date']}, torchgraft {record['version']}, data: {record['data']}."]
    for metrics, rows in tables(record):
        parts.append(_table(["arm", *metrics], [[arm, *cells] for arm, cells in rows]))
    if record["claims"]:
        judged = []
        for claim in record["claims"]:
            effect = f"{show(claim['estimate'])} {claim['unit']}".strip()
            judged.append([claim["text"], effect, interval(claim["interval"]), claim["verdict"], claim["paper"]])
        parts.append(_table(["claim", "effect", "95 % interval", "verdict", "the paper"], judged))
    return [*parts, record["notes"]]

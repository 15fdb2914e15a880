"""Runs a bench module and keeps its record."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchgraft.experiments.engine import check_device, environment, write_json
from torchgraft.experiments.timing import compare


def measure(
    name: str, *, quick: bool = False, device: str = "cpu", say: Callable[[str], object] = lambda line: None
) -> dict[str, Any]:
    """Time every case of ``torchgraft.bench.<name>`` and return its record.

    Args:
        name: of the bench module.
        quick: its two or three tiny cases, few repetitions.
        device: where to run.
        say: told about each case before it runs.
    """
    check_device(device)
    module = importlib.import_module(f"torchgraft.bench.{name}")
    found = []
    cases = module.cases(quick, device)
    for number, case in enumerate(cases, start=1):
        say(f"[{number}/{len(cases)}] {case.peer_name} {dict(case.size)}")
        found.append(compare(case, device=device, repeats=2 if quick else 5, seconds=0.0 if quick else 2.0))
    where = environment(device)
    return {
        "name": name,
        "title": module.TITLE,
        "ours": module.OURS,
        "peer": module.PEER,
        "device": device,
        "environment": where,
        "command": f"torchgraft bench {name} --device {device} --record",
        "cases": found,
    }


def store(record: dict[str, Any], folder: Path) -> list[Path]:
    """Write the record and the module's figures into ``folder``; the paths written."""
    import matplotlib

    module = importlib.import_module(f"torchgraft.bench.{record['name']}")
    figures = module.figures(record) if hasattr(module, "figures") else {}
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": record["name"]}):
        for label, figure in figures.items():
            name = label if label.startswith(record["name"]) else f"{record['name']}-{label}"
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
            drawn.append(folder / f"{name}.svg")
    target = folder / f"{record['name']}.json"
    write_json(target, {**record, "figures": [path.name for path in drawn]})
    return [target, *drawn]

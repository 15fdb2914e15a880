"""Runs a recipe: every arm and seed, each kept the moment it is finished."""

from __future__ import annotations

import ctypes
import dataclasses
import datetime
import hashlib
import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import time
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torchgraft
from torchgraft.experiments.records import Claim, Judged, Measurement, Result
from torchgraft.experiments.statistics import judge

PACKAGE = Path(torchgraft.__file__).parent


@runtime_checkable
class Recipe(Protocol):
    """What a module of ``torchgraft.recipes`` offers; see CONTRIBUTING.md."""

    CLAIMS: Sequence[Claim]
    SCALES: Mapping[str, Any]
    DATA: Sequence[str]

    def arms(self, config: Any) -> Mapping[str, Any]:
        """Name to callable."""

    def figures(self, result: Result) -> Mapping[str, Any]:
        """Name to matplotlib figure."""

    def notes(self, result: Result) -> str:
        """What a reader must know to judge the result."""


@runtime_checkable
class Watcher(Protocol):
    """Where the engine says what it is doing; the command line draws a progress bar from it."""

    def plan(self, parts: Sequence[str]) -> None:
        """All parts that still have to run, in order."""

    def report(self, part: str, done: float, total: float, note: str) -> None:
        """Part ``part`` has finished ``done`` of ``total`` units."""

    def finished(self, part: str, seconds: float) -> None:
        """Part ``part`` is done and stored."""


class Silent:
    """A watcher that says nothing."""

    def plan(self, parts: Sequence[str]) -> None:
        """Say nothing."""

    def report(self, part: str, done: float, total: float, note: str) -> None:
        """Say nothing."""

    def finished(self, part: str, seconds: float) -> None:
        """Say nothing."""


def recipe(slug: str) -> Any:
    """The recipe module of a technique."""
    return importlib.import_module(f"torchgraft.recipes.{slug}")


def configure(module: Any, scale: str, settings: Sequence[str] = ()) -> Any:
    """The configuration of a scale, with ``name=value`` settings applied.

    Values are read as the type of the field: numbers, text, ``true``/``false``, and comma-separated tuples.

    Raises:
        ValueError: for an unknown scale or field, or a value that is not of the field's type.
    """
    import difflib

    if scale not in module.SCALES:
        raise ValueError(f"unknown scale {scale!r}; this recipe has {', '.join(module.SCALES)}")
    config = module.SCALES[scale]
    kinds = typing.get_type_hints(type(config))
    changes = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"a setting has the form name=value, got {setting!r}")
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"this recipe has no setting {name!r}{hint} It has: {', '.join(kinds)}")
        changes[name] = _read(text, kinds[name], name)
    return dataclasses.replace(config, **changes)


def _read(text: str, kind: Any, name: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        return tuple(_read(part, arguments[0], name) for part in text.split(",") if part)
    if origin is typing.Literal:
        if text not in arguments:
            raise ValueError(f"setting {name} must be one of {', '.join(map(repr, arguments))}, got {text!r}")
        return text
    if origin in (typing.Union, types.UnionType):
        if text.lower() == "none" and type(None) in arguments:
            return None
        return _read(text, next(a for a in arguments if a is not type(None)), name)
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"setting {name} must be true or false, got {text!r}")
        return text.lower() == "true"
    if kind in (int, float, str):
        try:
            return kind(text)
        except ValueError:
            article = "a whole number" if kind is int else "a number"
            raise ValueError(f"setting {name} must be {article}, got {text!r}") from None
    raise ValueError(f"setting {name} of type {kind} cannot be given on the command line")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file so that a crash leaves the old one or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with fresh.open("w", encoding="utf-8") as handle:
        json.dump(value, handle, indent=1, allow_nan=True)
        handle.write("\n")
        handle.flush()
        os.fsync(handle.fileno())
    fresh.replace(path)


def _sources(slug: str) -> list[Path]:
    """The code whose change makes stored measurements stale: the recipe, its technique, and what they stand on."""
    kept = [*sorted((PACKAGE / "ops").rglob("*.py")), PACKAGE / "experiments" / "training.py"]
    rooms = [path for path in PACKAGE.iterdir() if path.is_dir() and path.name != "bench"]
    # a technique is one module, or a folder of them
    return kept + sorted(p for room in rooms for p in (room / f"{slug}.py", *(room / slug).rglob("*.py")))


def fingerprint(slug: str, config: Any) -> str:
    """Names a run: the same configuration and the same code give the same eight characters."""
    parts = [json.dumps(dataclasses.asdict(config), sort_keys=True, default=str)]
    parts += [hashlib.sha256(path.read_bytes()).hexdigest() for path in dict.fromkeys(_sources(slug)) if path.exists()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def environment(device: str) -> dict[str, Any]:
    """What a number depends on besides the code: versions, device, threads."""
    import torch

    found = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
    for package in ("transformers", "accelerate", "scipy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    if torch.device(device).type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def check_device(device: str) -> None:
    """Refuse a device that this machine does not have, before anything is computed.

    Raises:
        ValueError: naming the device and what there is.
    """
    import torch

    have = ["cpu"]
    if torch.cuda.is_available():
        have += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        have.append("mps")
    try:
        wanted = torch.device(device)
    except RuntimeError:
        wanted = None
    known = wanted is not None and any(
        wanted.type == there.type and wanted.index in (None, there.index) for there in map(torch.device, have)
    )
    if not known:
        raise ValueError(f"device {device!r} is not on this machine; torch {torch.__version__} finds {', '.join(have)}")


@dataclass
class _Part:
    """What an arm is given to report and to keep things with."""

    name: str
    folder: Path
    shared: Path
    watcher: Watcher

    def __call__(self, done: float, total: float, note: str = "") -> None:
        self.watcher.report(self.name, done, total, note)

    def once(self, key: str, compute: Callable[[], Any]) -> Any:
        path = self.shared / f"{key}.json"
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        value = json.loads(json.dumps(compute()))
        write_json(path, value)
        return value


@dataclass
class Run:
    """A run on disk: ``folder/parts`` holds what is measured, ``folder/result.json`` appears when all is."""

    slug: str
    scale: str
    config: Any
    folder: Path
    command: str = ""
    module: Any = field(default=None, repr=False)

    @classmethod
    def prepare(cls, slug: str, scale: str, config: Any, out: Path, command: str = "", module: Any = None) -> Run:
        """The run of this configuration and code below ``out``, new or met again."""
        module = module if module is not None else recipe(slug)
        folder = out / slug / f"{scale}-{fingerprint(slug, config)}"
        return cls(slug, scale, config, folder, command, module)

    @property
    def finished(self) -> bool:
        """Whether every arm and seed is measured and the result is written."""
        return (self.folder / "result.json").exists()

    def execute(self, watcher: Watcher | None = None) -> Result:
        """Measure what is not measured yet, judge the claims, write the result.

        A part that is on disk is not measured again, so a run that was killed goes on where it stopped.
        """
        watcher = watcher or Silent()
        keep_freed_memory()
        check_device(getattr(self.config, "device", "cpu"))
        arms = self.module.arms(self.config)
        seeds = range(self.config.seeds)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "config.json").exists():
            write_json(self.folder / "config.json", dataclasses.asdict(self.config))
        # seed after seed, so that a run stopped early has whole seeds to show
        parts = {f"{arm}-seed{seed}": (arm, seed) for seed in seeds for arm in arms}
        watcher.plan([name for name in parts if not self._stored(name).exists()])
        for name, (arm, seed) in parts.items():
            if self._stored(name).exists():
                continue
            part = _Part(name, self.folder / "working" / _safe(name), self.folder / "shared", watcher)
            part.folder.mkdir(parents=True, exist_ok=True)
            began = time.perf_counter()
            measured = arms[arm](seed, part)
            seconds = time.perf_counter() - began
            readings = {arm: measured} if isinstance(measured, Measurement) else dict(measured)
            stored = {key: dataclasses.asdict(value) for key, value in readings.items()}
            write_json(self._stored(name), {"arm": arm, "seed": seed, "seconds": seconds, "readings": stored})
            shutil.rmtree(part.folder)
            watcher.finished(name, seconds)
        shutil.rmtree(self.folder / "working", ignore_errors=True)
        result = self.load()
        figures = self._draw(result)
        write_json(self.folder / "result.json", self.record(result, figures))
        return result

    def _stored(self, part: str) -> Path:
        return self.folder / "parts" / f"{_safe(part)}.json"

    def load(self) -> Result:
        """The result from the parts on disk, claims judged."""
        measurements: dict[str, dict[int, Measurement]] = {}
        seconds = 0.0
        for arm in self.module.arms(self.config):
            for seed in range(self.config.seeds):
                stored = json.loads(self._stored(f"{arm}-seed{seed}").read_text(encoding="utf-8"))
                seconds += stored["seconds"]
                for reading, value in stored["readings"].items():
                    per_seed = measurements.setdefault(reading, {})
                    if seed in per_seed:
                        raise ValueError(f"two arms of the recipe both return readings named {reading!r}")
                    curves = {name: (x, y) for name, (x, y) in value.pop("curves").items()}
                    per_seed[seed] = Measurement(**value, curves=curves)
        shared = sorted((self.folder / "shared").glob("*.json"))
        tuned = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in shared}
        result = Result(
            self.slug, self.scale, self.config, list(range(self.config.seeds)), measurements, [], tuned, seconds
        )
        result.judged = [judge(claim, measurements) for claim in self.module.CLAIMS if self._covers(claim, result)]
        return result

    def _covers(self, claim: Claim, result: Result) -> bool:
        """Whether a claim belongs to this configuration; a recipe may leave arms out on purpose by ``skips``."""
        skips = getattr(self.module, "skips", None)
        return not (skips is not None and skips(claim, self.config))

    def _draw(self, result: Result) -> list[str]:
        import matplotlib

        names = []
        # text stays text, and the same result gives the same file
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": self.slug}):
            for name, figure in self.module.figures(result).items():
                figure.savefig(self.folder / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
                names.append(f"{name}.svg")
        return names

    def record(self, result: Result, figures: Sequence[str]) -> dict[str, Any]:
        """The run as plain JSON, the schema of ``evidence/<slug>.json``."""
        return {
            "slug": self.slug,
            "scale": self.scale,
            "version": torchgraft.__version__,
            "date": datetime.date.today().isoformat(),
            "command": self.command,
            "environment": environment(getattr(self.config, "device", "cpu")),
            "data": getattr(self.config, "data", ", ".join(self.module.DATA)),
            "config": dataclasses.asdict(self.config),
            "seconds": round(result.seconds, 1),
            "arms": {
                arm: {metric: [m.metrics[metric] for m in per_seed.values()] for metric in _metrics(per_seed)}
                for arm, per_seed in result.measurements.items()
            },
            "tuned": result.tuned,
            "claims": [claim_record(judged) for judged in result.judged],
            "figures": list(figures),
            "notes": self.module.notes(result),
        }


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory for the next step; a third of a small network's step was page faults."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc here: another system's allocator has its own way
        return
    trim_threshold, mmap_threshold = -1, -3  # numbers of malloc.h
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_threshold, 2**30)


def _metrics(per_seed: Mapping[int, Measurement]) -> list[str]:
    return list(next(iter(per_seed.values())).metrics)


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)


def claim_record(judged: Judged) -> dict[str, Any]:
    """One judged claim as plain JSON."""
    claim = judged.claim
    return {
        "text": claim.text,
        "metric": claim.metric,
        "arm": claim.arm,
        "against": claim.against,
        "direction": claim.direction,
        "estimate": judged.estimate,
        "interval": None if judged.interval is None else list(judged.interval),
        "method": judged.method,
        "smallest_effect": claim.smallest_effect,
        "unit": claim.unit,
        "paired_over": judged.paired_over,
        "n": judged.n,
        "paper": claim.paper,
        "verdict": judged.verdict,
    }


def store_evidence(run: Run, evidence: Path) -> list[Path]:
    """Copy a finished run's record and figures into the evidence folder.

    A laptop run becomes ``<slug>.json``; a run at another scale stands beside it as ``<slug>-<scale>.json``.

    Raises:
        ValueError: for a run that is not finished, or was made at smoke scale.
    """
    if not run.finished:
        raise ValueError(f"the run in {run.folder} is not finished; nothing was recorded")
    if run.scale == "smoke":
        raise ValueError("smoke runs are for tests and are not recorded as evidence; use --scale laptop")
    record = json.loads((run.folder / "result.json").read_text(encoding="utf-8"))
    label = run.slug if run.scale == "laptop" else f"{run.slug}-{run.scale}"
    stored = [evidence / f"{label}.json"]
    for name in record["figures"]:
        own = name.startswith(run.slug)
        target = evidence / (label + name.removeprefix(run.slug) if own else f"{label}-{name}")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(run.folder / name, target)
        stored.append(target)
    record["figures"] = [path.name for path in stored[1:]]
    write_json(stored[0], record)
    return stored

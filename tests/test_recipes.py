"""Every recipe runs at smoke scale and every bench has quick cases, without any data folder."""

import importlib
import pkgutil

import pytest

import torchgraft.bench
import torchgraft.recipes
from torchgraft.experiments.benching import measure
from torchgraft.experiments.engine import Run

RECIPES = [m.name for m in pkgutil.iter_modules(torchgraft.recipes.__path__) if not m.name.startswith("_")]
BENCHES = [module.name for module in pkgutil.iter_modules(torchgraft.bench.__path__)]


@pytest.mark.parametrize("slug", RECIPES)
def test_recipe_runs_at_smoke_scale(slug, tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHGRAFT_DATA", raising=False)
    monkeypatch.setenv("TORCHGRAFT_CACHE", str(tmp_path))
    module = importlib.import_module(f"torchgraft.recipes.{slug}")
    run = Run.prepare(slug, "smoke", module.SCALES["smoke"], tmp_path / "runs", module=module)
    result = run.execute()
    assert len(result.judged) == len(module.CLAIMS), "smoke must exercise every claim"
    assert (run.folder / f"{next(iter(module.figures(result)))}.svg").stat().st_size > 1000
    assert module.notes(result).strip()


@pytest.mark.parametrize("name", BENCHES)
def test_bench_has_quick_cases(name):
    record = measure(name, quick=True)
    assert record["cases"]
    assert all(case["ours_s"] > 0 and case["peer_s"] > 0 and case["peer"] for case in record["cases"])

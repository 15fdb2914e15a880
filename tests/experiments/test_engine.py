import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.experiments import toy_recipe
from torchgraft.experiments import engine
from torchgraft.experiments.engine import Run, configure, store_evidence, write_json


def run(tmp_path, **changes):
    return Run.prepare("toy", "laptop", toy_recipe.Config(**changes), tmp_path, "torchgraft run toy", toy_recipe)


def test_result_holds_readings_claims_and_figures(tmp_path):
    toy = run(tmp_path)
    result = toy.execute()
    assert result.arms == ["a", "b/low", "b/high"]
    assert result.values("b/high", "score").tolist() == [5.0, 6.1, 7.2]
    record = json.loads((toy.folder / "result.json").read_text())
    assert record["arms"]["a"]["score"] == [0.1, 1.1, 2.1]
    assert record["claims"][0]["estimate"] == pytest.approx(5.0)
    assert record["claims"][0]["verdict"] == "supported"
    assert record["tuned"] == {"lr-a": {"chosen": 0.1}}
    assert record["notes"] == "3 seeds"
    assert (toy.folder / "toy.svg").read_text().startswith("<?xml")
    assert not (toy.folder / "working").exists()
    assert result.curve("a", "score")[1].shape == (3, 2)


def test_one_seed_is_inconclusive(tmp_path):
    assert run(tmp_path, seeds=1).execute().judged[0].verdict == "inconclusive"


def test_killed_run_goes_on_where_it_stopped(tmp_path):
    log = tmp_path / "log"
    command = [sys.executable, "-m", "tests.experiments.toy_recipe", str(tmp_path), str(log)]
    killed = subprocess.Popen(command)
    deadline = time.monotonic() + 60
    while not (log.exists() and len(log.read_text().splitlines()) >= 3):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    before = log.read_text().splitlines()
    parts = sorted(path.name for path in tmp_path.rglob("parts/*.json"))
    assert parts == ["a-seed0.json", "b-seed0.json"]
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("parts/*.json")}

    subprocess.run(command, check=True)
    after = log.read_text().splitlines()[len(before) :]
    assert after == ["a 1", "b 1", "a 2", "b 2"], "only what was not finished is measured again"
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    (result,) = tmp_path.rglob("result.json")
    assert json.loads(result.read_text())["arms"]["b/high"]["score"] == [5.0, 6.1, 7.2]
    assert not list(tmp_path.rglob("*.tmp"))


def test_another_configuration_is_another_run(tmp_path):
    assert run(tmp_path).folder != run(tmp_path, name="other").folder
    assert run(tmp_path).folder == run(tmp_path).folder


@pytest.mark.parametrize("file", ["recipes/toy.py", "vision/toy.py", "vision/toy/deep/part.py", "ops/any.py"])
def test_changed_code_is_another_run(tmp_path, monkeypatch, file):
    monkeypatch.setattr(engine, "PACKAGE", tmp_path / "package")
    changed, other = tmp_path / "package" / file, tmp_path / "package/vision/toys.py"
    for path in (changed, other):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1")
    (tmp_path / "package/experiments").mkdir()
    before = run(tmp_path).folder
    other.write_text("2")
    assert run(tmp_path).folder == before
    changed.write_text("2")
    assert run(tmp_path).folder != before


def test_an_arm_that_fails_leaves_the_others(tmp_path, monkeypatch):
    def broken(config):
        def fail(seed, progress):
            raise RuntimeError("out of luck")

        return {**arms(config), "b": fail}

    arms = toy_recipe.arms
    monkeypatch.setattr(toy_recipe, "arms", broken)
    toy = run(tmp_path)
    with pytest.raises(RuntimeError, match="out of luck"):
        toy.execute()
    assert [path.name for path in toy.folder.glob("parts/*.json")] == ["a-seed0.json"]
    assert not toy.finished


def test_interrupted_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_settings_are_read_by_type():
    config = configure(toy_recipe, "laptop", ["seeds=5", "pause=0.5", "grid=1,2.5", "name=x", "loud=true"])
    assert config == toy_recipe.Config(5, 0.5, (1.0, 2.5), "x", True)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("seed=3", "did you mean 'seeds'"),
        ("seeds=three", "whole number"),
        ("pause=x", "a number"),
        ("loud=yes", "true or false"),
        ("seeds", "name=value"),
    ],
)
def test_wrong_settings(setting, message):
    with pytest.raises(ValueError, match=message):
        configure(toy_recipe, "laptop", [setting])


def test_unknown_scale():
    with pytest.raises(ValueError, match="smoke, laptop"):
        configure(toy_recipe, "huge")


def test_evidence_is_recorded_from_finished_runs_only(tmp_path):
    toy = run(tmp_path / "runs")
    with pytest.raises(ValueError, match="not finished"):
        store_evidence(toy, tmp_path / "evidence")
    toy.execute()
    stored = store_evidence(toy, tmp_path / "evidence")
    assert [path.name for path in stored] == ["toy.json", "toy.svg"]
    assert all(Path(path).exists() for path in stored)
    assert json.loads(stored[0].read_text())["figures"] == ["toy.svg"]
    longer = Run.prepare("toy", "long", toy_recipe.Config(), tmp_path / "runs", "torchgraft run toy", toy_recipe)
    longer.execute()
    assert [path.name for path in store_evidence(longer, tmp_path / "evidence")] == ["toy-long.json", "toy-long.svg"]
    assert json.loads(stored[0].read_text())["scale"] == "laptop"
    smoke = Run.prepare("toy", "smoke", toy_recipe.Config(seeds=1), tmp_path / "runs", "", toy_recipe)
    smoke.execute()
    with pytest.raises(ValueError, match="smoke"):
        store_evidence(smoke, tmp_path / "evidence")

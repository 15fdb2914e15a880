import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from tests.catalog.test_catalog import write
from tests.experiments import toy_recipe
from torchgraft import catalog
from torchgraft.cli import app


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A catalog of one technique whose recipe is the toy."""
    folder = tmp_path / "cards"
    folder.mkdir()
    write(folder, "toy", "Toy technique", "Adds five.")
    read = catalog.cards
    monkeypatch.setattr(catalog, "cards", lambda _=None: read(folder))
    monkeypatch.setitem(sys.modules, "torchgraft.recipes.toy", toy_recipe)
    monkeypatch.chdir(tmp_path)
    return folder


def call(*words):
    return CliRunner().invoke(app, list(words))


def test_list_and_show(toy):
    assert "Adds five." in call("list").stdout
    assert json.loads(call("list", "--json").stdout)[0]["slug"] == "toy"
    assert "Toy technique" in call("show", "toy").stdout
    assert json.loads(call("show", "toy", "--json").stdout)["room"] == "vision"


def test_search_says_how_it_searched(toy):
    found = json.loads(call("search", "toys", "--words", "--json").stdout)
    assert (found["by"], found["hits"][0]["slug"]) == ("words", "toy")


def test_run_prints_arms_claims_and_where_the_files_went(toy):
    done = call("run", "toy")
    assert done.exit_code == 0, done.output
    for text in ("b/high", "b beats a", "supported", "1 -> 9", "3 seeds", "report.html"):
        assert text in done.stdout
    again = call("run", "toy")
    assert "finished already" in again.stderr
    assert "measured" not in again.stderr.replace("measures it again", "")


def test_run_as_json_is_the_record(toy):
    record = json.loads(call("run", "toy", "--json", "--set", "name=x", "--seeds", "2").stdout)
    kept = {"seeds": 2, "pause": 0.0, "grid": [0.1, 0.2], "name": "x", "loud": False, "log": "", "device": "cpu"}
    assert record["config"] == kept
    assert "--set seeds=2 --set name=x" in record["command"]


def test_fresh_puts_the_old_run_aside(toy, tmp_path):
    call("run", "toy")
    assert call("run", "toy", "--fresh").exit_code == 0
    assert len(list((tmp_path / "runs" / "toy").iterdir())) == 2


def test_report_is_self_contained_and_escaped(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(toy_recipe, "notes", lambda result: "<script>alert(1)</script> & more")
    call("run", "toy")
    (folder,) = (tmp_path / "runs" / "toy").iterdir()
    done = call("report", str(folder), "--to", str(tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text()
    assert done.exit_code == 0
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "data:image/svg+xml;base64," in page
    assert "http" not in page.split("base64,")[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("show", "toi"), "did you mean 'toy'"),
        (("run", "tyo"), "did you mean 'toy'"),
        (("run", "toy", "--scale", "huge"), "smoke, laptop"),
        (("run", "toy", "--set", "seed=1"), "did you mean 'seeds'"),
        (("list", "--room", "kitchen"), "no room 'kitchen'"),
        (("list", "--tag", "zzz"), "no tag 'zzz'"),
        (("report", "nowhere"), "no finished run"),
        (("bench", "zzz"), "no bench 'zzz'"),
        (("bench", "rics", "lmuu"), "no bench 'lmuu', did you mean 'lmu'"),
        (("bench", "rics", "--quick", "--device", "cuda:99"), "device 'cuda:99' is not on this machine"),
        (("run", "toy", "--device", "cpuu"), "device 'cpuu' is not on this machine"),
        (("search", ""), "query is empty"),
    ],
)
def test_errors_say_what_to_type_instead(toy, words, message):
    done = call(*words)
    assert done.exit_code == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_smoke_is_not_recorded_as_evidence(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(catalog, "evidence_folder", lambda: tmp_path / "evidence")
    assert "smoke" in call("run", "toy", "--scale", "smoke", "--record").stderr
    assert not (tmp_path / "evidence").exists()


def test_several_benches_in_one_command(monkeypatch):
    case = {"size": {"n": 1}, "ours_s": 1.0, "peer": "peer", "peer_s": 2.0, "ratio": 0.5, "ratio_spread": [0.4, 0.6]}
    monkeypatch.setattr("torchgraft.experiments.benching.measure", lambda name, **_: {"name": name, "cases": [case]})
    both = call("bench", "rics", "lmu", "rics")
    assert both.stdout.splitlines()[::2] == ["rics:", "lmu:"]
    assert list(json.loads(call("bench", "rics", "lmu", "--json").stdout)) == ["rics", "lmu"]
    assert json.loads(call("bench", "rics", "--json").stdout)["name"] == "rics"


def test_doctor_names_packages_and_what_to_install():
    found = json.loads(call("doctor", "--json").stdout)
    assert found["machine"]["torch"]
    assert found["packages"]["scipy"]


@pytest.mark.parametrize("words", [["list"], ["--help"], ["list", "--json"]])
def test_the_catalog_answers_without_torch_and_at_once(words):
    code = f"import sys, time; sys.argv = ['torchgraft', *{words!r}]; from torchgraft.cli import main\n"
    code += "try: main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules, 'torch was imported'\n"
    # processor time, which other work on the machine does not stretch
    code += "print(time.process_time(), file=sys.stderr)"
    seconds = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        seconds.append(float(done.stderr.split()[-1]))
    assert min(seconds) < 0.5

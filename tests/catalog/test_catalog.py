import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchgraft import catalog
from torchgraft.catalog.measured import interval, measured_block, show, spread

FRONT = """+++
slug = "{slug}"
title = "{title}"
authors = ["A. Author"]
venue = "ICML"
year = 2020
arxiv = "1910.05872"
official_code = "a/b"
room = "vision"
tags = ["{tag}"]
takes = "images and labels"
summary = "{summary}"
public = ["torchgraft.experiments.fit"]
recipe = "{slug}"
bench = []
requires = ["vision"]
+++
## What it does
Text.

## What we measured
<!-- measured -->
<!-- /measured -->
"""


def write(folder, slug, title="A title", summary="It does something.", tag="thing"):
    path = folder / f"{slug}.md"
    path.write_text(FRONT.format(slug=slug, title=title, summary=summary, tag=tag))
    return path


def record():
    return {
        "slug": "toy", "scale": "laptop", "version": "0.1.0", "date": "2026-01-02", "command": "torchgraft run toy",
        "data": "digits", "arms": {"a": {"accuracy": [50.0, 52.0]}, "b": {"accuracy": [60.0, 61.0]}},
        "claims": [{"text": "b beats a", "estimate": 9.5, "unit": "points", "interval": [3.1, 15.9],
                    "verdict": "supported", "paper": "1 -> 2"}],
        "notes": "Two seeds.",
    }  # fmt: skip


def test_a_good_card_is_read(tmp_path):
    card = catalog.read_card(write(tmp_path, "toy"))
    assert (card.slug, card.year, card.tags, card.bench) == ("toy", 2020, ("thing",), ())
    assert card.body.startswith("## What it does")
    assert card.summary_record()["requires"] == ["vision"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('slug = "toy"', 'slug = "other"', "slug must be the file's name"),
        ("year = 2020", 'year = "2020"', "year must be a whole number"),
        ("year = 2020", "year = 20", "year must be a year"),
        ("year = 2020\n", "", "'year' is missing"),
        ("year = 2020", "year = 2020\ncolour = 1", "unknown key 'colour'"),
        ('room = "vision"', 'room = "kitchen"', "room must be one of"),
        ('arxiv = "1910.05872"', 'arxiv = "19"', "arxiv must be like"),
        ('authors = ["A. Author"]', "authors = []", "authors must name"),
        ('authors = ["A. Author"]', 'authors = "A"', "authors must be a list"),
        ('title = "A title"', 'title = " "', "title must be a string"),
        ('public = ["torchgraft', 'public = ["other', "public must be"),
        ('requires = ["vision"]', 'requires = ["sight"]', "requires must be among"),
        ("<!-- measured -->\n", "", "must have one line"),
        ("+++\n", "---\n", "front matter"),
        ("year = 2020", "year = ", "not TOML"),
    ],
)
def test_a_wrong_card_is_refused_by_file_and_key(tmp_path, old, new, message):
    path = write(tmp_path, "toy")
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=f"toy.md.*{message}"):
        catalog.read_card(path)


def test_a_misspelt_technique_suggests_the_nearest(tmp_path):
    write(tmp_path, "flow_former")
    assert catalog.get("Flow-Former", tmp_path).slug == "flow_former"
    with pytest.raises(LookupError, match="did you mean 'flow_former'"):
        catalog.get("flow_formr", tmp_path)


def test_words_rank_what_the_query_is_about_first(tmp_path):
    write(tmp_path, "aa", "Rotations as labels", "Trains image classifiers with few labels.", "few labels")
    write(tmp_path, "bb", "Linear attention", "Attention in linear time for long sequences.", "attention")
    write(tmp_path, "cc", "Option order", "A language model that ignores the order of the options.", "prompting")
    for query, best in [("long sequence layers", "bb"), ("order of options", "cc"), ("classifier, few label", "aa")]:
        assert catalog.search(query, folder=tmp_path)[0].card.slug == best
    assert catalog.search("xylophone", folder=tmp_path) == []
    assert catalog.search("attention", room="layers", folder=tmp_path) == []


def test_meaning_ranks_by_the_cosine_of_the_embedding(tmp_path):
    write(tmp_path, "aa", "One")
    write(tmp_path, "bb", "Two")

    def embed(texts):
        return [[1.0, 0.0] if t.startswith("Two") or t == "deux" else [0.6, 0.8] for t in texts]

    hits = catalog.search("deux", folder=tmp_path, embed=embed)
    assert [(h.card.slug, round(h.score, 6)) for h in hits] == [("bb", 1.0), ("aa", 0.6)]


def test_wrong_searches():
    with pytest.raises(ValueError, match="empty"):
        catalog.search("  ")
    with pytest.raises(ValueError, match="room must be"):
        catalog.search("x", room="kitchen")


def test_measured_numbers_come_from_the_record(tmp_path):
    longer = record() | {"command": "torchgraft run toy --scale long"}
    bench = {"name": "t", "command": "torchgraft bench t", "ours": "ours", "peer": "SDPA"}
    block = measured_block([record(), longer], [{**bench, "cases": [{"ratio": 0.5}, {"ratio": 2.0}]}])
    assert block.count("| a | 51 ± 1.414 |") == 2
    assert block.index("`torchgraft run toy`") < block.index("`torchgraft run toy --scale long`")
    assert "| b beats a | 9.5 points | 3.1 … 15.9 | supported | 1 -> 2 |" in block
    assert "from 0.5 to 2 over 2 cases" in block


def test_fill_rewrites_only_what_is_between_the_marks(tmp_path):
    import json

    path = write(tmp_path, "toy")
    before = path.read_text()
    evidence = tmp_path / "evidence"
    assert not catalog.fill("toy", tmp_path, evidence)
    evidence.mkdir()
    (evidence / "toy.json").write_text(json.dumps(record()))
    (evidence / "toy-long.json").write_text(json.dumps(record() | {"notes": "Ten seeds."}))
    assert catalog.fill("toy", tmp_path, evidence)
    after = path.read_text()
    assert catalog.measured(catalog.get("toy", tmp_path), evidence) in after
    assert "Ten seeds." in after
    head, tail = after.split(catalog.BEGIN)
    assert head == before.split(catalog.BEGIN)[0]
    assert tail.split(catalog.END)[1] == before.split(catalog.END)[1]
    assert catalog.fill("toy", tmp_path, evidence)
    assert path.read_text() == after


@given(st.floats(-1e300, 1e300))
def test_shown_numbers_are_within_half_a_unit_of_the_fourth_digit(value):
    assert float(show(value)) == pytest.approx(value, rel=0.006, abs=1e-300)


def test_spread_and_interval():
    assert spread([1.0, 3.0]) == "2 ± 1.414"
    assert interval(None) == "none"


def test_the_catalog_needs_no_torch():
    code = "import sys, torchgraft.catalog as c; c.cards(); sys.exit(any(m in sys.modules for m in ('torch', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""Every card keeps what it promises: names, recipe, bench, tests, evidence, numbers, snippets."""

import importlib
import json
import re
from pathlib import Path

import pytest

from torchgraft import catalog

ROOT = Path(__file__).parents[2]
CARDS = list(catalog.cards().values())
every_card = pytest.mark.parametrize("card", CARDS, ids=lambda card: card.slug)


def public(name):
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def test_every_file_in_the_folder_is_a_card():
    assert [path.stem for path in sorted(catalog.CARDS.iterdir())] == [card.slug for card in CARDS]


@every_card
def test_public_names_import_and_are_documented(card):
    for name in card.public:
        assert (public(name).__doc__ or "").strip(), f"{name} has no docstring"


@every_card
def test_recipe_keeps_the_contract(card):
    recipe = importlib.import_module(f"torchgraft.recipes.{card.recipe}")
    assert recipe.CLAIMS
    assert {"smoke", "laptop"} <= recipe.SCALES.keys()
    assert all(isinstance(config, recipe.Config) for config in recipe.SCALES.values())
    assert all(callable(getattr(recipe, name)) for name in ("arms", "figures", "notes"))


@every_card
def test_benches_and_tests_exist(card):
    for name in card.bench:
        importlib.import_module(f"torchgraft.bench.{name}")
    assert list((ROOT / "tests").rglob(f"test_{card.slug}.py"))


@every_card
def test_evidence_is_recorded_and_is_what_the_card_says(card):
    record = json.loads((ROOT / "evidence" / f"{card.recipe}.json").read_text())
    recipe = importlib.import_module(f"torchgraft.recipes.{card.recipe}")
    assert record["slug"] == card.recipe
    assert record["scale"] != "smoke"
    assert f"torchgraft run {card.slug}" in record["command"]
    assert {claim["text"] for claim in record["claims"]} <= {claim.text for claim in recipe.CLAIMS}
    assert record["claims"]
    for claim in record["claims"]:
        assert claim["paired_over"] == "examples" or claim["n"] >= 3
    assert record["figures"]
    assert all((ROOT / "evidence" / name).exists() for name in record["figures"])
    inside = card.body.split(catalog.BEGIN)[1].split(catalog.END)[0].strip()
    assert inside == catalog.measured(card, ROOT / "evidence").strip()


@every_card
def test_snippets_run(card, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", card.body, re.DOTALL)
    assert blocks, f"the card of {card.slug} shows no Python"
    namespace = {"__name__": f"card_{card.slug}"}
    for block in blocks:
        exec(compile(block, f"{card.slug}.md", "exec"), namespace)

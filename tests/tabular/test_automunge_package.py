"""Equal to the automunge package, table by table.

``automunge_package.json`` holds what ``AutoMunge().automunge`` of the package automunge 9.0 gave (its first line has
the call and the versions); for the two real tables only outputs are stored, in which no entry can be read.
"""

import json
import warnings
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from torchgraft import datasets
from torchgraft.tabular.automunge import FamilyTree, find_number

PACKAGE = json.loads((Path(__file__).parent / "automunge_package.json").read_text(encoding="utf-8"))
NAMES = {
    "space_and_punctuation": "punctuation", "excluded_characters": "excluded", "aggregate": "groups",
    "hash_alg": "alg", "vocab_size": "vocab",
}  # fmt: skip
CONVENTIONS = {"nmr": "numbers", "nmc": "commas", "nmE": "eu"}
# the package keeps and scales numbers in float32; whole numbers and 0/1 must be equal all the same
FLOAT32 = {"rtol": 2e-6, "atol": 2e-6}
OWN_MEAN = ("c", "m", "U", "2", "3")
"""Last letters of the number categories that fill a test frame with its own mean; we fill with that of training."""


@lru_cache
def rows(data):
    if data in PACKAGE["data"]:
        train, test = PACKAGE["data"][data]["train"], PACKAGE["data"][data]["test"]
    else:
        name, column, *counts = data.split()
        values = datasets.load(name).frame[column].tolist()
        train, test = values[: int(counts[0])], values[int(counts[0]) : sum(map(int, counts))]
    return pd.DataFrame({"c": train}), pd.DataFrame({"c": [*train, *test]}), test


def without_own_mean(category, column, test):
    """Rows of the test frame where the package's own mean does not stand."""
    number = next((part for part in column.split("_")[1:] if part[:3] in CONVENTIONS), None)
    if number is None or not number.endswith(OWN_MEAN):
        return np.ones(len(test), bool)
    missing = [value is None or value != value for value in test]
    upper = [str(value).upper() if category.startswith("or") else str(value) for value in test]
    found = [find_number(value, CONVENTIONS[number[:3]]) is not None for value in upper]
    return np.array(found) & ~np.array(missing)


@pytest.mark.usefixtures("without_shape_checks")  # 447 tables: types are checked elsewhere
@pytest.mark.parametrize("category", list(dict.fromkeys(case["category"] for case in PACKAGE["cases"])))
def test_equals_the_package(category):
    cases = [case for case in PACKAGE["cases"] if case["category"] == category]
    gone = [] if datasets.available()["titanic"] else [case for case in cases if case["data"].startswith("titanic")]
    for case in cases:
        if case not in gone:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                compare(case)
    if gone:
        pytest.skip(f"{len(gone)} of {len(cases)} tables: TORCHGRAFT_DATA does not point at a folder with the data")


def compare(case):
    what = f"{case['category']} {case['data']} {case['params']}"
    train, both, test = rows(case["data"])
    params = {NAMES.get(k, k): v for k, v in case["params"].items() if k != "int_headers"}
    if case["params"].get("int_headers"):
        params["feature_names"] = "int"
    # in the package, missing is the word nan
    tree = FamilyTree(case["category"], params={case["category"]: params}, missing_marker=False, missing="nan")
    ours = tree.fit(train).transform(both)
    names, wanted = tree.get_feature_names_out().tolist(), case["columns"]
    if case["params"].get("case") is False:
        # src2 and src3 there put terms into names in upper case
        names, wanted = [n.casefold() for n in names], [n.casefold() for n in wanted]
    assert sorted(names) == sorted(wanted), what
    theirs = np.array([row.split() for row in case["train"] + case["test"]], float).reshape(len(ours), -1)
    ours = ours[:, [names.index(column) for column in wanted]].astype(float)
    for j, column in enumerate(wanted):
        kept = np.append(np.ones(len(train), bool), without_own_mean(case["category"], column, test))
        theirs[~kept, j] = ours[~kept, j]
    np.testing.assert_allclose(ours, theirs, **FLOAT32, err_msg=what)


def test_the_tables_cover_every_category():
    from torchgraft.tabular.automunge import CATEGORIES

    covered = {case["category"] for case in PACKAGE["cases"]}
    alone = {"UPCS", "excl", "NArw"}
    inside = {"nmr6", "nmc4", "nmc5", "nmc6", "nmE4", "nmE5", "nmE6"}
    assert set(CATEGORIES) - covered <= alone | inside
    assert len(PACKAGE["cases"]) > 400

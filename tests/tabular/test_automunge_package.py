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
        return PACKAGE["data"][data]["train"], PACKAGE["data"][data]["test"]
    name, column, train, test = data.split()
    values = datasets.load(name).frame[column].tolist()
    return values[: int(train)], values[int(train) : int(train) + int(test)]


def case_id(case):
    return f"{case['category']}-{case['data']}-{'-'.join(map(str, case['params'].values()))}"


def without_own_mean(category, column, test):
    """Rows of the test frame where the package's own mean does not stand."""
    number = next((part for part in column.split("_")[1:] if part[:3] in CONVENTIONS), None)
    if number is None or not number.endswith(OWN_MEAN):
        return np.ones(len(test), bool)
    missing = [value is None or value != value for value in test]
    upper = [str(value).upper() if category.startswith("or") else str(value) for value in test]
    found = [find_number(value, CONVENTIONS[number[:3]]) is not None for value in upper]
    return np.array(found) & ~np.array(missing)


@pytest.mark.parametrize("case", PACKAGE["cases"], ids=case_id)
def test_equals_the_package(case):
    name = case["data"].split()[0]
    if name == "titanic" and datasets.available()["titanic"] is None:
        pytest.skip("TORCHGRAFT_DATA does not point at a folder with the data")
    train, test = rows(case["data"])
    params = {NAMES.get(k, k): v for k, v in case["params"].items() if k != "int_headers"}
    if case["params"].get("int_headers"):
        params["feature_names"] = "int"
    # in the package, missing is the word nan
    tree = FamilyTree(case["category"], params={case["category"]: params}, missing_marker=False, missing="nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        ours = [tree.fit_transform(pd.DataFrame({"c": train})), tree.transform(pd.DataFrame({"c": test}))]
    names, wanted = tree.get_feature_names_out().tolist(), case["columns"]
    if case["params"].get("case") is False:
        # src2 and src3 there put terms into names in upper case
        names, wanted = [n.casefold() for n in names], [n.casefold() for n in wanted]
    assert sorted(names) == sorted(wanted)
    theirs = [
        np.array([row.split() for row in case[part]], float).reshape(len(case[part]), -1) for part in ("train", "test")
    ]
    for j, column in enumerate(wanted):
        place = names.index(column)
        np.testing.assert_allclose(ours[0][:, place].astype(float), theirs[0][:, j], **FLOAT32, err_msg=column)
        kept = without_own_mean(case["category"], column, test)
        np.testing.assert_allclose(ours[1][kept, place].astype(float), theirs[1][kept, j], **FLOAT32, err_msg=column)


def test_the_tables_cover_every_category():
    from torchgraft.tabular.automunge import CATEGORIES

    covered = {case["category"] for case in PACKAGE["cases"]}
    alone = {"UPCS", "excl", "NArw"}
    inside = {"nmr6", "nmc4", "nmc5", "nmc6", "nmE4", "nmE5", "nmE6"}
    assert set(CATEGORIES) - covered <= alone | inside
    assert len(PACKAGE["cases"]) > 400

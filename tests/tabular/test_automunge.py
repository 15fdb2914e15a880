"""The card's tables, the rules as properties, scikit-learn's contract, bad input. See test_automunge_package too."""

import datetime
import pickle
import random
import time
import warnings
from decimal import Decimal

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import clone
from sklearn.compose import ColumnTransformer
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.utils.estimator_checks import check_estimator
from torch import nn

from torchgraft.tabular.automunge import (
    CATEGORIES,
    BinaryCode,
    EntryMerger,
    FamilyTree,
    FrequencyOrdinal,
    NumberExtractor,
    OverlapKeys,
    StringOverlapEncoder,
    SubstringSearchEncoder,
    TabularTorch,
    TextExtractor,
    UpperCase,
    WordHasher,
    auto_encode,
    find_number,
    find_overlaps,
    find_whole_overlaps,
)

TRAIN = ["west", "north", "northeast", "southwest", "southeast", "north north"]
TEST = ["northwest", "east", "south"]
SYSTEMS = [
    "Android 7.0", "iOS 11.1.2", "Mac OS X 10_11_6", "Windows 10", "Android", "Linux", "iOS 11.0.3",
    "Mac OS X 10_7_5", "Windows 7", "Windows 8.1", "Mac", "Android 5.1.1", "Mac OS X 10.12", "iOS 9.3.5",
]  # fmt: skip
EXCLUDED = " ,.?!()"


def table(values):
    return pd.DataFrame({"c": values})


def digits(encoder, values):
    return ["".join(map(str, row)) for row in encoder.transform(table(values)).tolist()]


def brute_force(entries, minsplit, concurrent, excluded=""):
    """The published rule: every window of every entry, the longest first, against all keys and all entries."""
    members = {}
    for length in range(max(map(len, entries), default=0) - 1, minsplit - 1, -1):
        for entry in entries:
            for start in range(len(entry) - length + 1):
                window = entry[start : start + length]
                if set(window) & set(excluded):
                    continue
                if any(window in key and (not concurrent or entry in members[key]) for key in members):
                    continue
                if any(window in other for other in entries if other != entry):
                    members[window] = [other for other in entries if window in other]
    return list(members)


# --- the card's tables


@pytest.mark.parametrize(
    ("encoder", "keys", "train", "test"),
    [
        (
            StringOverlapEncoder(minsplit=4), "theast north south west",
            "0001 0100 1100 0011 1010 0100", "0101 0000 0010",
        ),
        (StringOverlapEncoder(), "theast north south", "000 010 110 001 101 010", "010 000 001"),
        (StringOverlapEncoder("concurrent"), "theast north south", "000 010 110 001 101 010", "010 000 001"),
        (StringOverlapEncoder("whole"), "north west", "01 10 10 01 00 10", "11 00 00"),
        (StringOverlapEncoder(output="ordinal", minsplit=4), "", "4 1 2 3 2 1", "1 0 3"),
        (FrequencyOrdinal(), "", "6 1 3 5 4 2", "0 0 0"),
        (BinaryCode(), "", "110 001 011 101 100 010", "000 000 000"),
        (StringOverlapEncoder("concurrent", "binary"), "", "000 010 100 001 011 010", "010 000 001"),
        (StringOverlapEncoder("concurrent", "binary", minsplit=4), "", "000 010 100 001 011 010", "101 101 101"),
    ],
)  # fmt: skip
def test_directions(encoder, keys, train, test):
    encoder = clone(encoder).fit(table(TRAIN))
    assert digits(encoder, TRAIN) == train.split()
    assert digits(encoder, TEST) == test.split()
    if keys:
        assert [name.rsplit("_", 1)[1] for name in encoder.get_feature_names_out()] == keys.split()


def test_operating_systems():
    splt = ["Mac OS X 10_", "Android ", "Windows ", "iOS 11."]
    assert sorted(find_overlaps(SYSTEMS)) == sorted(splt)
    assert sorted(find_overlaps(SYSTEMS, concurrent=True)) == sorted([*splt, "Mac OS X 10", "Android"])
    assert "iOS " in find_overlaps(SYSTEMS, concurrent=True, minsplit=4)
    parsed = StringOverlapEncoder(output="ordinal").fit(table(SYSTEMS))
    assert parsed.transform(table(["Android 7.1"])).item() == parsed.transform(table(["Android 7.0"])).item() > 0
    tree = FamilyTree("or19").fit(table(SYSTEMS))
    unseen = pd.DataFrame(tree.transform(table(["Android 7.1"])), columns=tree.get_feature_names_out()).iloc[0]
    assert unseen["c_or19_sp13_ord3"] == 0


@pytest.mark.parametrize(
    ("text", "convention", "number"),
    [
        ("1e3x", "numbers", 1000), ("-3.5kg", "numbers", -3.5), ("373,450", "numbers", 373),
        ("12 and 3456", "numbers", 3456), (" 7", "numbers", 7), ("none", "numbers", None), ("", "numbers", None),
        ("nan inf infinity", "numbers", None), ("1_000", "numbers", 1000), ("1e999", "numbers", 1e99),
        ("x" * 10_000 + "7", "numbers", 7), ("9" * 420, "numbers", float("9" * 308)), ("٣", "numbers", 3),
        ("373,450", "commas", 373450), ("$1,234.50", "commas", 1234.5), (",", "commas", None),
        ("1.234,5", "eu", 1234.5), ("1 234,5", "eu", 1234.5), ("EUR 3.000", "eu", 3000), ("5", "eu", 5),
        # as the package has it: blanks and dots in a row before a number belong to it
        ("12x\t..\t5", "eu", 5),
    ],
)  # fmt: skip
def test_numbers_in_text(text, convention, number):
    assert find_number(text, convention) == number


@settings(max_examples=80, deadline=None)
@given(st.text("0159.,-+e_ \tx", max_size=12), st.sampled_from(["numbers", "commas", "eu"]))
def test_numbers_are_the_longest_leftmost_part_that_float_reads(text, convention):
    from torchgraft.tabular.automunge.numbers import _read

    parts = ((n, s) for n in range(len(text), 0, -1) for s in range(len(text) - n + 1))
    found = (_read(text[s : s + n], convention) for n, s in parts)
    assert find_number(text, convention) == next((value for value in found if value is not None), None)


# --- the search for keys


@pytest.mark.usefixtures("without_shape_checks")  # 1,000 tables: types are checked elsewhere
@pytest.mark.parametrize("concurrent", [False, True])
@pytest.mark.parametrize("excluded", ["", "a"])
def test_the_search_equals_the_published_rule_on_random_alphabets(concurrent, excluded):
    draw = random.Random(int(concurrent) + 2 * len(excluded))
    for _ in range(250):
        words = ("".join(draw.choices("abc", k=draw.randint(0, 12))) for _ in range(draw.randint(0, 5)))
        entries = list(dict.fromkeys(words))
        minsplit = draw.choice((1, 2, 4))
        found = find_overlaps(entries, minsplit=minsplit, concurrent=concurrent, excluded=excluded)
        assert found == brute_force(entries, minsplit, concurrent, excluded), entries


TEXTS = st.lists(st.text("ab \n\U0001f600é", max_size=9), min_size=1, max_size=9, unique=True)


@settings(max_examples=40, deadline=None)
@given(TEXTS, st.booleans(), st.integers(1, 4))
def test_what_keys_are(entries, concurrent, minsplit):
    keys = find_overlaps(entries, minsplit=minsplit, concurrent=concurrent)
    assert all(sum(key in entry for entry in entries) >= 2 and len(key) >= minsplit for key in keys)
    if not concurrent:
        assert not any(a in b for a in keys for b in keys if a != b)
    assert set(find_overlaps(entries[::-1], minsplit=minsplit, concurrent=concurrent)) == set(keys)
    lookup = OverlapKeys(keys)
    for entry in [*entries, "ab ab", ""]:
        assert lookup.held_by(entry) == {key for key in keys if key in entry}
    whole = [a for a in sorted(entries, key=len, reverse=True) if a and any(a in b for b in entries if a != b)]
    assert find_whole_overlaps(entries) == whole


@settings(max_examples=4, deadline=None)
@given(st.lists(st.one_of(st.none(), st.text("ab1 ", max_size=6)), min_size=2, max_size=12), st.data())
def test_rows_do_not_matter_but_for_frequency(values, data):
    warnings.simplefilter("ignore", UserWarning)
    order = data.draw(st.permutations(range(len(values))))
    for encoder in (
        StringOverlapEncoder(minsplit=2, sparse_output=False), StringOverlapEncoder("concurrent", minsplit=1),
        StringOverlapEncoder("whole", "binary"), StringOverlapEncoder(output="ordinal", minsplit=1), BinaryCode(),
        FrequencyOrdinal(), NumberExtractor(scale=True), WordHasher(vocab=9), TextExtractor(), FamilyTree("or21"),
    ):  # fmt: skip
        fitted = clone(encoder).fit(table(values))
        whole = fitted.transform(table(values))
        np.testing.assert_array_equal(clone(encoder).fit_transform(table(values)), whole)
        for i in (0, len(values) - 1):
            np.testing.assert_array_equal(fitted.transform(table([values[i]]))[0], whole[i])
        loaded = pickle.loads(pickle.dumps(fitted))
        np.testing.assert_array_equal(loaded.transform(table(values)), whole)
        if getattr(encoder, "output", "") == "binary":
            continue  # its columns are digits, whose meaning follows the order of the keys
        shuffled = clone(encoder).fit(table([values[i] for i in order]))
        names, again = fitted.get_feature_names_out().tolist(), shuffled.get_feature_names_out().tolist()
        assert sorted(names) == sorted(again)
        moved = shuffled.transform(table(values))[:, [again.index(name) for name in names]]
        np.testing.assert_allclose(moved, whole, atol=1e-12)
    twice = StringOverlapEncoder("concurrent", minsplit=2).fit(table(values + values))
    assert twice.keys_ == StringOverlapEncoder("concurrent", minsplit=2).fit(table(values)).keys_


@pytest.mark.usefixtures("without_shape_checks")
def test_fast_enough_for_names_and_for_a_hundred_thousand_rows():
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=6)) for _ in range(400)]
    entries = list({" ".join(draw.choices(words, k=4))[:30] for _ in range(12_000)})[:10_000]
    assert len(entries) == 10_000
    values = table([entries[i % len(entries)] for i in range(100_000)])
    began = time.process_time()
    wide = StringOverlapEncoder().fit_transform(values)
    assert time.process_time() - began < 20
    assert wide.shape[0] == 100_000
    assert wide.shape[1] > 10_000
    assert wide.nnz < 1e7, "so many columns come as a sparse matrix, and are never dense on the way"


# --- scikit-learn's contract

TEXT_OUTPUT = dict.fromkeys(
    [
        "check_pipeline_consistency", "check_estimators_pickle", "check_transformer_data_not_an_array",
        "check_transformer_general", "check_methods_sample_order_invariance", "check_methods_subset_invariance",
        "check_fit_idempotent",
    ],
    "outputs are text, which this check subtracts",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    "estimator",
    [
        StringOverlapEncoder(), StringOverlapEncoder("concurrent", "binary", minsplit=2),
        StringOverlapEncoder("whole", minsplit=1), StringOverlapEncoder(output="ordinal"),
        StringOverlapEncoder(output="ordinal", unseen="ignore", consolidate=True, missing="nan"),
        NumberExtractor(), NumberExtractor("eu", infill=0.0, scale="min-max", unseen="ignore"),
        SubstringSearchEncoder(["1", ["2", "3"]]), TextExtractor(), FrequencyOrdinal(), BinaryCode(), WordHasher(),
        WordHasher(words=False, output="binary"), FamilyTree("or19"),
        FamilyTree("splt", missing="nan", params={"splt": {"minsplit": 2}}),
    ],
    ids=repr,
)  # fmt: skip
def test_check_estimator(estimator):
    statuses = {result["check_name"]: result["status"] for result in check_estimator(estimator)}
    assert len(statuses) > 30
    assert set(statuses.values()) <= {"passed", "skipped"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    "estimator",
    [StringOverlapEncoder(output="replace"), TextExtractor("text"), UpperCase(), EntryMerger([["a", "b"]])],
    ids=repr,
)  # fmt: skip
def test_check_estimator_where_the_output_is_text(estimator):
    results = check_estimator(estimator, expected_failed_checks=TEXT_OUTPUT)
    assert {r["check_name"] for r in results if r["status"] == "xfail"} == set(TEXT_OUTPUT)
    # what those checks would say of numbers
    values = table(["ab12", None, "b", "ab1", "A"])
    fitted = clone(estimator).fit(values)
    whole = fitted.transform(values)
    assert whole.tolist() == clone(estimator).fit(values).fit(values).transform(values).tolist()
    assert whole.tolist() == pickle.loads(pickle.dumps(fitted)).transform(values).tolist()
    assert whole[[3, 0, 4]].tolist() == fitted.transform(values.iloc[[3, 0, 4]]).tolist()
    assert whole[1, 0] is None


ENCODERS = [
    StringOverlapEncoder(minsplit=2), StringOverlapEncoder(output="replace", minsplit=2), NumberExtractor(),
    FrequencyOrdinal(), BinaryCode(), UpperCase(), WordHasher(), FamilyTree("or19"),
]  # fmt: skip


@pytest.mark.parametrize("encoder", ENCODERS, ids=repr)
def test_frames_of_every_kind_give_the_same(encoder):
    columns = {"a b": ["PC 17", "PC 18", None, "x"], "n": [1, 2, 3, 3]}
    frame, arrow = pd.DataFrame(columns), pl.DataFrame(columns)
    rows = list(zip(*columns.values(), strict=True))
    fitted = clone(encoder).fit(frame)
    want = fitted.transform(frame).tolist()
    assert clone(encoder).fit(arrow).transform(arrow).tolist() == want
    assert clone(encoder).fit(rows).transform(rows).tolist() == want
    assert clone(encoder).fit(np.array(rows, dtype=object)).transform(rows).tolist() == want
    assert clone(encoder).fit(frame.astype({"a b": "category"})).transform(frame).tolist() == want
    names = fitted.get_feature_names_out().tolist()
    assert all(name.startswith(("a b_", "n_")) for name in names)
    assert clone(encoder).set_output(transform="pandas").fit_transform(frame).columns.tolist() == names
    assert clone(encoder).set_output(transform="polars").fit_transform(arrow).columns == names
    joined = ColumnTransformer([("e", clone(encoder), ["a b"])], verbose_feature_names_out=False).fit(frame)
    assert joined.get_feature_names_out().tolist() == [n for n in names if n.startswith("a b_")]


def test_wide_output_is_sparse_unless_a_frame_is_wanted():
    values = table([f"{word} {i}" for word in map(str, range(10_000, 10_250)) for i in range(2)])
    wide = StringOverlapEncoder().fit(values)
    made = wide.transform(values)
    assert made.shape == (500, 250)
    assert made.format == "csr"
    assert made.dtype == np.int8
    dense = StringOverlapEncoder(sparse_output=False).fit_transform(values)
    np.testing.assert_array_equal(made.toarray(), dense)
    frame = StringOverlapEncoder().set_output(transform="pandas").fit_transform(values)
    np.testing.assert_array_equal(frame.to_numpy(), dense)
    gaps = table([None, "10000 7"])
    np.testing.assert_array_equal(wide.transform(gaps).toarray(), np.vstack([0 * dense[0], dense[0]]))
    assert wide.inverse_transform(made)[:2, 0].tolist() == ["10000 ", "10000 "]


def test_wide_trees_are_sparse_too():
    values = table([f"{word} {i}" for word in map(str, range(10_000, 10_250)) for i in range(2)] + [None])
    for tree, width in (("splt", 250), ("onht", 500), ({"auntsuncles": ["splt", "nmrc"]}, 251)):
        wide = FamilyTree(tree).fit(values)
        made = wide.transform(values)
        assert made.format == "csr"
        dense = FamilyTree(tree, sparse_output=False).fit(values).transform(values)
        assert dense.shape == (501, width + 1)
        np.testing.assert_array_equal(made.toarray(), dense)
        frame = FamilyTree(tree).set_output(transform="pandas").fit_transform(values)
        np.testing.assert_array_equal(frame.to_numpy(), dense)
        assert wide.inverse_transform(made).tolist() == wide.inverse_transform(dense).tolist()
    kept = FamilyTree({"cousins": ["splt"]}).fit_transform(values)
    assert isinstance(kept, np.ndarray), "text does not go into a sparse matrix"


def test_searched_for_the_best_tree():
    values, labels = table(["PC 17", "PC 18", "A/5 3", "A/5 4"] * 5), [1, 1, 0, 0] * 5
    model = make_pipeline(FamilyTree(), LogisticRegression())
    grid = {"familytree__tree": ["or15", "sp15"], "familytree__params": [None, {"sp15": {"minsplit": 2}}]}
    search = GridSearchCV(model, grid, cv=2, error_score="raise").fit(values, labels)
    assert search.best_score_ == 1
    assert pickle.loads(pickle.dumps(search)).predict(values).tolist() == labels


def test_in_a_pipeline():
    values = table(["PC 17", "PC 18", "A/5 3", "A/5 4"] * 5)
    model = make_pipeline(FamilyTree("or23"), LogisticRegression())
    assert model.fit(values, [1, 1, 0, 0] * 5).score(values, [1, 1, 0, 0] * 5) == 1


# --- missing, unseen, other than text, very long


@pytest.mark.parametrize(
    "gap",
    [
        None, float("nan"), np.float64("nan"), pd.NA, pd.NaT, np.float32("nan"), np.datetime64("NaT"), Decimal("nan"),
        float("inf"), -np.inf,
    ],
)  # fmt: skip
def test_missing_is_missing_in_every_form(gap):
    values = pd.DataFrame({"c": pd.Series(["nan 1", "nan 2", gap, "x"], dtype=object)})
    keys = StringOverlapEncoder(minsplit=3).fit(values)
    assert keys.keys_ == [["nan "]]
    assert keys.transform(values)[:, 0].tolist() == [1, 1, 0, 0]
    assert StringOverlapEncoder(minsplit=3, missing="nan").fit(values).keys_ == [["nan "]]
    assert StringOverlapEncoder("whole", missing="nan").fit(values).keys_ == [["nan"]]
    assert FrequencyOrdinal().fit_transform(values)[:, 0].tolist() == [1, 2, 0, 3]
    assert BinaryCode().fit_transform(values)[2].tolist() == [0, 0]
    assert NumberExtractor(infill=-1).fit_transform(values)[2, 0] == -1
    assert WordHasher().fit_transform(values)[2].tolist() == [0, 0]
    assert TextExtractor("text").fit_transform(values)[2, 0] is None
    tree = FamilyTree("or19").set_output(transform="pandas").fit(values)
    made = tree.transform(values)
    assert made["c_NArw"].tolist() == [0, 0, 1, 0]
    assert made["c_or19_sp13_ord3"].tolist()[2] == 0


def test_unseen_entries():
    parse, ignore = (StringOverlapEncoder(minsplit=4, unseen=u).fit(table(TRAIN)) for u in ("parse", "ignore"))
    assert digits(parse, ["northwest", "", "north"]) == ["0101", "0000", "0100"]
    assert digits(ignore, ["northwest", "", "north"]) == ["0000", "0000", "0100"]
    keep = StringOverlapEncoder(output="replace", unseen="ignore").fit(table(TRAIN))
    assert keep.transform(table(["northwest", "north north"])).ravel().tolist() == ["northwest", "north"]
    merged = StringOverlapEncoder(output="replace", consolidate=True).fit(table(TRAIN))
    assert merged.transform(table(["east", "northwest"])).ravel().tolist() == ["0", "north"]
    numbers = NumberExtractor(unseen="ignore", infill=0).fit(table(["a 1", "b 2"]))
    assert numbers.transform(table(["a 1", "c 3"])).ravel().tolist() == [1, 0]
    terms = SubstringSearchEncoder(["PC"], unseen="ignore").fit(table(["PC 1", "x"]))
    assert terms.transform(table(["PC 1", "PC 2"])).ravel().tolist() == [1, 0]


def test_what_is_not_text_is_what_str_makes_of_it():
    day = datetime.date(2020, 1, 2)
    values = pd.DataFrame({"c": pd.Series([1.3, "1.3", 1, True, day, 1.0], dtype=object)})
    assert FrequencyOrdinal().fit(values).inverse_transform([[1], [2], [3], [4], [5]]).ravel().tolist() == [
        "1.3", "1", "1.0", "2020-01-02", "True",
    ]  # fmt: skip
    for kind in ("float32", "float64"):
        narrow = pd.DataFrame({"c": np.array([0.1, 0.2], kind)})
        assert BinaryCode().fit(narrow).inverse_transform([[0, 1]])[0, 0] == "0.1"
        assert BinaryCode().fit(pl.from_pandas(narrow)).inverse_transform([[0, 1]])[0, 0] == "0.1"
        assert BinaryCode().fit(narrow.to_numpy()).inverse_transform([[0, 1]])[0, 0] == "0.1"
        assert BinaryCode().fit(narrow.astype("category")).inverse_transform([[0, 1]])[0, 0] == "0.1"
    arrow = narrow.astype("float[pyarrow]")
    assert BinaryCode().fit(arrow).inverse_transform([[0, 1]])[0, 0] == "0.1"


def test_numbers_are_brought_to_the_kind_of_training():
    whole, gaps = pd.DataFrame({"c": [1, 2, 2]}), pd.DataFrame({"c": [1.0, None, 2.5]})
    fitted = FrequencyOrdinal().fit(whole)
    assert fitted.inverse_transform([[1]]).item() == "2"
    assert fitted.transform(gaps).ravel().tolist() == [2, 0, 0], "a gap makes floats of whole numbers"
    cells = pd.DataFrame({"c": pd.Series([2.0, True, "2", "2.0"], dtype=object)})
    assert fitted.transform(cells).ravel().tolist() == [1, 0, 1, 0]
    fitted = FrequencyOrdinal().fit(gaps)
    assert fitted.inverse_transform([[1]]).item() == "1.0"
    assert fitted.transform(pl.DataFrame({"c": [1, 2]})).ravel().tolist() == [1, 0]


def test_masked_cells_are_missing():
    values = np.ma.masked_array([["a"], ["b"]], mask=[[False], [True]])
    assert FrequencyOrdinal().fit_transform(values).ravel().tolist() == [1, 0]


@pytest.mark.parametrize("dtype", ["Int64", "Float32", "boolean", "string", "Sparse[float]", "category"])
def test_pandas_dtypes_with_gaps(dtype):
    kinds = {"string": ["x", "y"], "boolean": [True, False]}
    a, b = kinds.get(dtype, [1, 2])
    values = pd.DataFrame({"c": pd.Series([a, None, b, a]).astype(dtype)}).set_axis([7, 7, 3, 1])
    fitted = FamilyTree("ord3").set_output(transform="pandas").fit(values)
    made = fitted.transform(values)
    assert made["c_ord3"].tolist() == [1, 0, 2, 1]
    assert made["c_NArw"].tolist() == [0, 1, 0, 0]
    assert made.index.tolist() == [7, 7, 3, 1]


@pytest.mark.usefixtures("without_shape_checks")
def test_very_long_entries():
    draw = random.Random(1)
    noise = ["".join(draw.choices("abcdefghij", k=20_000)) for _ in range(3)]
    values = table([f"{noise[0]}1COMMON STRETCH2{noise[1]}", f"{noise[2]}3COMMON STRETCH4", "short"])
    began = time.process_time()
    encoder = StringOverlapEncoder(minsplit=14).fit(values)
    assert encoder.keys_ == [["COMMON STRETCH"]]
    assert encoder.transform(table([noise[1] + "COMMON STRETCH" + noise[0]])).item() == 1
    assert NumberExtractor().fit_transform(table(["x" * 100_000 + "7", "1 " * 50_000]))[0, 0] == 7
    with pytest.warns(UserWarning, match="1 entries have more than the 2 words"):
        WordHasher(vocab=10).fit(table(["a b"])).transform(table(["w " * 100_000]))
    FamilyTree("or19").fit(table(TRAIN)).transform(values)
    assert time.process_time() - began < 10


@pytest.mark.usefixtures("without_shape_checks")
def test_long_rows_of_figures_do_not_stall():
    began = time.process_time()
    for piece in ("1.5,", "1-", "2020-01-02T", "9", "1e", " 1"):
        for convention in ("numbers", "commas", "eu"):
            assert find_number(piece * (3000 // len(piece)), convention) is not None
    assert time.process_time() - began < 3, "a try of every part up to 400 characters takes ten times as long"


# --- inversion


@pytest.mark.parametrize("encoder", [FrequencyOrdinal(), FrequencyOrdinal("alphabetical"), BinaryCode()], ids=repr)
def test_codes_invert_exactly(encoder):
    values = pd.DataFrame({"a": ["x", "y", None, "x", "z", ""], "b": SYSTEMS[:6]})
    fitted = clone(encoder).fit(values)
    back = fitted.inverse_transform(fitted.transform(values))
    assert back.tolist() == [list(row) for row in zip(["x", "y", None, "x", "z", ""], SYSTEMS[:6], strict=True)]
    unseen = fitted.transform(pd.DataFrame({"a": ["new"], "b": ["new"]}))
    assert fitted.inverse_transform(unseen).tolist() == [[None, None]]
    with pytest.raises(ValueError, match="must have the"):
        fitted.inverse_transform([[1]])
    with pytest.raises(ValueError, match=r"whole numbers|zeros and ones"):
        fitted.inverse_transform(fitted.transform(values) + 0.5)
    frame = pd.DataFrame(fitted.transform(values), columns=fitted.get_feature_names_out())
    assert fitted.inverse_transform(frame[frame.columns[::-1]]).tolist() == back.tolist(), "columns are known by name"


@pytest.mark.parametrize("cell", [2, -1, 0.5, float("nan")])
def test_what_are_no_flags_is_not_inverted(cell):
    for encoder in (
        BinaryCode(), StringOverlapEncoder(minsplit=4), StringOverlapEncoder(output="binary", minsplit=4),
        SubstringSearchEncoder(["west"]), FamilyTree("onht", missing_marker=False),
    ):  # fmt: skip
        fitted = encoder.fit(table(TRAIN))
        block = fitted.transform(table(TRAIN)).astype(float)
        block[0, 0] = cell
        with pytest.raises(ValueError, match="zeros and ones"):
            fitted.inverse_transform(block)


def test_overlaps_invert_to_the_longest_key():
    longest = ["west", "north", "theast", "south", "theast", "north"]
    for output in ("onehot", "binary", "ordinal", "replace"):
        encoder = StringOverlapEncoder(output=output, minsplit=4).fit(table(TRAIN))
        back = encoder.inverse_transform(encoder.transform(table(TRAIN)))[:, 0].tolist()
        # southwest holds south and west: the longer is told
        assert back == longest, output
    for output in ("ordinal", "replace"):
        encoder = StringOverlapEncoder(output=output, consolidate=True).fit(table(TRAIN))
        assert encoder.inverse_transform(encoder.transform(table(["west", "northwest"]))).ravel().tolist() == [
            None, "north",
        ], "what has no key is not the entry 0"  # fmt: skip
    unseen = StringOverlapEncoder("concurrent", "binary", minsplit=4).fit(table(TRAIN))
    assert unseen.inverse_transform(unseen.transform(table(TEST)))[:, 0].tolist() == [None] * 3
    terms = SubstringSearchEncoder(["west", ["nor", "south"]]).fit(table(TRAIN))
    assert terms.inverse_transform(terms.transform(table(TRAIN[:3]))).ravel().tolist() == ["west", "south", "south"]
    code = SubstringSearchEncoder(["A", "B", ["C", "D"]], output="ordinal")
    assert code.fit_transform(table(["A", "AB", "C", "x"])).ravel().tolist() == [1, 2, 4, 0]
    assert code.inverse_transform([[1], [2], [4], [0]]).ravel().tolist() == ["A", "B", "D", None]


def test_trees_invert_where_a_code_was_made_of_the_entry():
    values = pd.DataFrame({"a": ["Ab 1", "b", None], "b": ["c", "d", "c"]})
    for tree in ("or19", "or23", "U101"):
        fitted = FamilyTree(tree).fit(values)
        back = fitted.inverse_transform(fitted.transform(values))
        assert back.tolist() == [["AB 1", "C"], ["B", "D"], [None, "C"]], tree
    exact = FamilyTree({"auntsuncles": ["1010", "nmrc"], "cousins": ["NArw"]}, missing_marker=False).fit(values[["a"]])
    assert exact.inverse_transform(exact.transform(values[["a"]])).ravel().tolist() == ["Ab 1", "b", None]
    for tree in ("onht", "text", {"cousins": ["nmrc"]}):
        fitted = FamilyTree(tree).fit(values)
        back = fitted.inverse_transform(fitted.transform(values))
        assert back.tolist() == [["Ab 1", "c"], ["b", "d"], [None, "c"]], tree
    fitted = FamilyTree("nmc8").fit(values)
    with pytest.raises(ValueError, match="nothing but numbers, hashes and markers"):
        fitted.inverse_transform(fitted.transform(values))


def test_trees_of_overlaps_invert_to_the_longest_key():
    told = ["west", "north", "theast", "south", "theast", "north"]
    for tree in ("splt", "sp19", "spl2", "sp13", "sp14"):
        fitted = FamilyTree(tree, params={tree: {"minsplit": 4}}).fit(table(TRAIN))
        assert fitted.inverse_transform(fitted.transform(table(TRAIN))).ravel().tolist() == told, tree
    fitted = FamilyTree("spl5").fit(table(TRAIN))
    assert fitted.inverse_transform(fitted.transform(table(["west", "south 1"]))).ravel().tolist() == [None, "south"]
    fitted = FamilyTree("strn").fit(table(["PC 17", "12", None]))
    assert fitted.inverse_transform(fitted.transform(table(["PC 17", "12", None]))).ravel().tolist() == [
        "PC ",
        None,
        None,
    ]


# --- family trees


def test_a_tree_of_ones_own():
    values = table(["Ab 1", "b 22", "ab 3"])
    tree = {"siblings": ["or15"], "cousins": ["nmrc"]}
    kept = FamilyTree(tree, missing_marker=False).set_output(transform="pandas").fit_transform(values)
    assert kept.columns[0] == "c", "siblings and cousins add to the column, which stays"
    assert kept["c"].tolist() == ["Ab 1", "b 22", "ab 3"]
    assert kept["c_nmrc"].tolist() == [1, 22, 3]
    assert {"c_or15_sp13_ord3", "c_or15_sp13_sp10_ord3", "c_or15_1010_0"} < set(kept.columns)
    mine = {"or15": {"parents": ["or15"], "friends": ["strn"], "niecesnephews": ["strn"]}}
    made = FamilyTree("or15", trees=mine, missing_marker=False).fit(values).get_feature_names_out().tolist()
    assert made == ["c_or15", "c_or15_strn_ord3", "c_or15_strn"], "supplements keep what they stand on"


def test_parameters_reach_their_category_and_no_other():
    names = FamilyTree("or19", missing_marker=False).fit(table(TRAIN)).transform(table(TRAIN))
    root = FamilyTree("or19", params={"sp13": {"minsplit": 6}}, missing_marker=False).fit(table(TRAIN))
    assert not np.array_equal(names[:, 1], root.transform(table(TRAIN))[:, 1])
    numbered = FamilyTree("or19", official_names=False).fit(table(TRAIN)).get_feature_names_out()
    assert numbered.tolist() == [f"c_{i}" for i in range(len(numbered))]
    with pytest.raises(ValueError, match=r"unknown parameter of 'or19' 'minsplit'"):
        FamilyTree("or19", params={"or19": {"minsplit": 4}}).fit(table(TRAIN))


def test_missing_markers():
    values = pd.DataFrame({"a": ["x 1", None, "y", "x 1"]})
    for tree, marks in (("or19", [0, 1, 0, 0]), ("nmrc", [0, 1, 1, 0]), ("ord3", [0, 1, 0, 0])):
        made = FamilyTree(tree).set_output(transform="pandas").fit_transform(values)
        assert made["a_NArw"].tolist() == marks, tree


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"tree": "or99"}, ValueError, "unknown tree 'or99'; did you mean"),
        ({"tree": {"parent": ["or19"]}}, ValueError, "unknown primitive 'parent'; did you mean 'parents'"),
        ({"tree": {"parents": ["zzz"]}}, ValueError, "unknown category 'zzz'"),
        ({"tree": {"parents": "or19"}}, TypeError, "must be a list of categories"),
        ({"tree": {}}, ValueError, "must have transformations"),
        ({"tree": ["or19"]}, TypeError, "name of a category or a mapping"),
        ({"params": {"zzz": {}}}, ValueError, "unknown category in params"),
        ({"params": {"sp13": {"minsplit": 0}}}, ValueError, "minsplit must be a whole number from 1"),
        ({"missing": "drop"}, ValueError, "missing must be"),
        ({"sparse_output": "yes"}, ValueError, "sparse_output must be"),
        ({"tree": "UPCS", "sparse_output": True}, ValueError, "this tree leaves text"),
        ({"params": {"splt": {"sparse_output": True}}}, ValueError, "unknown parameter of 'splt' 'sparse_output'"),
        ({"params": {"sp13": 3}}, TypeError, "must map parameters to values, got 3"),
        ({"trees": ["or19"]}, TypeError, "trees must map categories"),
        ({"trees": {"orr19": {"parents": ["or19"]}}}, ValueError, "category in trees 'orr19'; did you mean 'or19'"),
        ({"tree": {"parents": None}}, TypeError, "must be a list of categories, got None"),
        (
            {"tree": "splt", "trees": {"splt": {"parents": ["splt"], "children": ["ord3"]}}}, ValueError,
            "gives several columns, so nothing can follow it",
        ),
        (
            {"tree": "spl2", "trees": {"spl2": {"parents": ["spl2"], "children": ["spl2"]}}}, ValueError,
            "tree has a loop: spl2 -> spl2",
        ),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("without_shape_checks")
def test_wrong_trees(settings, error, message):
    with pytest.raises(error, match=message):
        FamilyTree(**settings).fit(table(SYSTEMS))


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_category_fits_and_transforms():
    values, rows = table(["PC 1", "PC 2", None, "A/5", "A/5", ""]), table(["PC 3", None])
    for category in CATEGORIES:
        params = {category: {"search": ["PC"]}} if category.startswith("src") or category == "srch" else None
        tree = FamilyTree(category, params=params)
        made = tree.fit(values).transform(rows)
        assert made.shape == (2, len(tree.get_feature_names_out())) == (2, len(tree.column_kinds())), category


# --- a whole table, and tensors


def mixed_table():
    draw, rows = random.Random(3), range(60)
    return pd.DataFrame(
        {
            "fare": [draw.random() * 9 if draw.random() < 0.9 else None for _ in rows],
            "age": [draw.randint(1, 80) for _ in rows],
            "alone": [draw.random() < 0.5 for _ in rows],
            "sex": [draw.choice(["m", "f", None]) for _ in rows],
            "ticket": [draw.choice(["PC ", "A/5 ", "STON "]) + str(draw.randint(100, 999)) for _ in rows],
            "word": ["".join(draw.choices("abcdefgh", k=4)) for _ in rows],
            "y": [draw.randint(0, 1) for _ in rows],
        }
    )


@pytest.mark.parametrize("infill", ["mean", "mode", "model"])
def test_auto_encode_takes_a_mixed_table_in_one_call(infill):
    df = mixed_table()
    encoder = auto_encode(df, "y", infill=infill)
    assert {name: columns for name, _, columns in encoder.transformers} == {
        "number": ["fare", "age", "alone"], "few": ["sex"], "composite": ["ticket"], "many": ["word"],
    }  # fmt: skip
    made = encoder.fit_transform(df)
    assert made.shape == (60, len(encoder.get_feature_names_out()))
    assert np.isfinite(np.asarray(made, float)).all()
    assert set(df.columns) - {"y"} <= {c for part in encoder.transformers for c in part[2]}
    arrow = pl.from_pandas(df)
    np.testing.assert_allclose(encoder.fit(arrow).transform(arrow), made)


def test_auto_encode_scales_to_one():
    df = mixed_table()
    numbers = auto_encode(df, "y", scale="min-max", missing_marker=False).fit_transform(df)[:, :3]
    assert numbers.min() == 0
    assert numbers.max() == 1


@pytest.mark.usefixtures("without_shape_checks")
def test_auto_encode_says_what_it_cannot_take():
    df = mixed_table()
    with pytest.raises(TypeError, match="must be a pandas or polars frame, got ndarray"):
        auto_encode(df.to_numpy())
    with pytest.raises(ValueError, match="target 'z' is not a column"):
        auto_encode(df, "z")
    with pytest.raises(ValueError, match=r"columns \['gone'\] have no entries"):
        auto_encode(df.assign(gone=None))
    with pytest.raises(TypeError, match=r"columns \['day'\] are neither numbers nor text"):
        auto_encode(df.assign(day=pd.Timestamp("2020-01-01")))
    with pytest.raises(ValueError, match="infill must be one of"):
        auto_encode(df, infill="median")
    with pytest.raises(ValueError, match="unknown composite 'or99'"):
        auto_encode(df, composite="or99")
    with pytest.raises(ValueError, match=r"must be named by text, got \[0, 1\]"):
        auto_encode(pd.DataFrame([["a", 1.0]]))
    with pytest.raises(ValueError, match=r"columns of df must have different names, got \['c'\]"):
        auto_encode(pd.DataFrame([["a", "b"]], columns=["c", "c"]))
    with pytest.raises(ValueError, match="no columns to encode"):
        auto_encode(df[["y"]], "y")
    fitted = auto_encode(df, "y").fit(df)
    for cell in ("old", np.inf):
        with pytest.raises(ValueError, match=f"column 'age' must hold finite numbers.*{cell}"):
            fitted.transform(df.assign(age=cell))
    mixed = df.assign(mixed=[i if i % 2 else f"PC {i}" for i in range(60)])
    made = auto_encode(mixed, "y").set_output(transform="pandas").fit_transform(mixed)
    assert any(name.startswith("mixed_or19") for name in made.columns), "numbers among text are kept as text"


@pytest.mark.parametrize("infill", ["mean", "mode", "model"])
def test_auto_encode_takes_every_dtype_of_numbers(infill):
    columns = {
        "flag": [True, False, True], "gap": pd.Series([1, None, 2.5], dtype=object),
        "maybe": pd.array([True, None, False], "boolean"), "whole": pd.array([1, None, 3], "Int64"),
        "price": [Decimal("1.5"), None, Decimal(2)],
    }  # fmt: skip
    df = pd.DataFrame(columns)
    encoder = auto_encode(df, infill=infill)
    assert encoder.transformers[0][2] == list(columns)
    made = encoder.set_output(transform="pandas").fit_transform(df)
    assert np.isfinite(made.to_numpy(float)).all()
    markers = [f"missingindicator_{name}" for name in ("gap", "maybe", "whole", "price")]
    assert made[markers].to_numpy().tolist() == [[0] * 4, [1] * 4, [0] * 4]


@pytest.mark.parametrize("dtype", [object, "string", "category"])
def test_auto_encode_takes_few_entries_of_every_dtype(dtype):
    words = pd.DataFrame({"c": pd.Series(["x", None, "y"]).astype(dtype)})
    assert auto_encode(words).fit_transform(words).tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 0]]
    if dtype != "string":
        mixed = pd.DataFrame({"c": pd.Series([1, None, "x", pd.NA], dtype=object).astype(dtype)})
        made = auto_encode(mixed).set_output(transform="pandas").fit_transform(mixed)
        assert made.columns.tolist() == ["c_1", "c_x", "c_nan"]
    numbered = pd.DataFrame({"c": pd.Categorical([1, 2, 1])})
    assert auto_encode(numbered).fit_transform(numbered).tolist() == [[1, 0], [0, 1], [1, 0]]


def test_tensors_for_a_network():
    df = mixed_table()
    rows = TabularTorch(auto_encode(df, "y")).fit(df)
    codes, floats, cardinalities = rows.transform(df)
    assert codes.dtype == torch.int64
    assert floats.dtype == torch.float32
    assert len(cardinalities) == codes.shape[1] == 3
    unseen = df.assign(ticket="never 12", word=None)
    for some in (codes, rows.transform(unseen).codes):
        assert all(int(some[:, j].max()) < n and int(some[:, j].min()) >= 0 for j, n in enumerate(cardinalities))
    tables = nn.ModuleList(nn.Embedding(n, 4) for n in cardinalities)
    hidden = torch.cat([tables[j](codes[:, j]) for j in range(codes.shape[1])] + [floats], 1)
    assert nn.Linear(hidden.shape[1], 2)(hidden).shape == (60, 2)
    piped = TabularTorch(make_pipeline(UpperCase(), StringOverlapEncoder(output="ordinal"))).fit_transform(
        df[["ticket"]]
    )
    assert piped.codes.shape == (60, 1)
    both = FeatureUnion([("a", FrequencyOrdinal()), ("b", NumberExtractor())])
    assert len(TabularTorch(both).fit_transform(df[["ticket"]]).cardinalities) == 1
    with pytest.raises(ValueError, match="encoder leaves text"):
        TabularTorch(UpperCase()).fit(df[["ticket"]])
    with pytest.raises(NotFittedError, match="call fit with training rows first"):
        TabularTorch(FrequencyOrdinal()).transform(df[["ticket"]])


# --- bad input


@pytest.mark.parametrize("encoder", ENCODERS, ids=repr)
def test_bad_input_is_named(encoder):
    for cell in (b"raw", ["a"], {"k": 1}, ("a",), np.array([1]), object()):
        column = pd.Series(["x", "y"], dtype=object)
        column[1] = cell
        with pytest.raises(TypeError, match="column 'c' holds"):
            clone(encoder).fit(pd.DataFrame({"c": column}))
    with pytest.raises(TypeError, match="column 'x0' holds"):
        clone(encoder).fit(np.array([[b"a"], [b"b"]]))
    fitted = clone(encoder).fit(table(["PC 1", "PC 2"]))
    with pytest.raises(ValueError, match="feature names should match"):
        fitted.transform(pd.DataFrame({"d": ["PC 1"]}))
    with pytest.raises(ValueError, match="feature names"):
        fitted.transform(pd.DataFrame({"c": ["x"], "d": ["y"]}))
    with pytest.raises(ValueError, match="0 sample"):
        clone(encoder).fit(table([]))
    with pytest.raises(ValueError, match="0 feature"):
        clone(encoder).fit(pd.DataFrame(index=[0, 1]))
    with pytest.raises(ValueError, match="Expected 2D array, got 1D"):
        clone(encoder).fit(["a", "b"])
    with pytest.raises(TypeError, match="got LazyFrame; call its collect"):
        clone(encoder).fit(pl.LazyFrame({"c": ["a"]}))
    with pytest.raises(ValueError, match=r"unique column names|different names"):
        clone(encoder).fit(pd.DataFrame([["a", "b"]], columns=["c", "c"]))


def test_columns_that_are_empty_keep_their_place_or_say_so():
    gone = pd.DataFrame({"a": ["PC 17 x", "PC 17 y"], "gone": pd.Series([None, None], dtype=object)})
    with pytest.warns(UserWarning, match="'gone' gives no output columns"):
        keys = StringOverlapEncoder().fit(gone)
    assert keys.get_feature_names_out().tolist() == ["a_splt_PC 17 "]
    for encoder in (FrequencyOrdinal(), BinaryCode(), TextExtractor()):
        with pytest.warns(UserWarning, match="'gone' has no entries"):
            assert encoder.fit_transform(gone)[:, -1].tolist() == [0, 0]
    with pytest.warns(UserWarning, match="'gone' holds no number"):
        assert NumberExtractor().fit_transform(gone)[:, 1].tolist() == [0, 0]
    with pytest.warns(UserWarning, match="'gone' has no entries"):
        made = FamilyTree("or19").set_output(transform="pandas").fit_transform(gone)
    assert made["gone_NArw"].tolist() == [1, 1]
    with pytest.warns(UserWarning, match="'c' gives no output columns: its 2 distinct entries share no sub-string"):
        FamilyTree("or23").fit(table(["abc", "xyz"]))


def test_equal_output_names_are_an_error():
    values = pd.DataFrame({"c": ["splt_qqqqq1", "splt_qqqqq2"], "c_splt": ["qqqqq1", "qqqqq2"]})
    with pytest.raises(ValueError, match=r"different names, got \['c_splt_splt_qqqqq'\]"):
        StringOverlapEncoder().fit(values)


def test_max_keys_says_how_many_were_cut():
    with pytest.warns(UserWarning, match="max_keys=2 cut 2 more keys"):
        few = StringOverlapEncoder(minsplit=4, max_keys=2).fit(table(TRAIN))
    # north is in three entries; the three others in two, of which the first found is kept
    assert few.keys_ == [["theast", "north"]]
    with pytest.warns(UserWarning, match="cut"):
        FamilyTree("splt", params={"splt": {"max_keys": 1}}).fit(table(TRAIN))


def test_a_refused_fit_leaves_nothing_fitted():
    values = pd.DataFrame({"c": ["splt_qqqqq1", "splt_qqqqq2"], "c_splt": ["qqqqq1", "qqqqq2"]})
    tree = FamilyTree("splt", missing_marker=False)
    with pytest.raises(ValueError, match="different names"):
        tree.fit(values)
    with pytest.raises(NotFittedError):
        tree.transform(values)


def test_case_is_folded_as_there():
    terms = SubstringSearchEncoder(["SS", "J\u030cA"], case=False).fit(table(["straße", "ǰa"]))
    assert terms.transform(table(["straße", "ǰa"])).tolist() == [[1, 0], [0, 1]]


def test_names_need_not_tell_the_data():
    hidden = StringOverlapEncoder(feature_names="int").fit(table(TRAIN))
    assert hidden.get_feature_names_out().tolist() == ["c_splt_0", "c_splt_1", "c_splt_2"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StringOverlapEncoder(mode="some"), "mode must be one of"),
        (lambda: StringOverlapEncoder(output="text"), "output must be one of"),
        (lambda: StringOverlapEncoder(mode=np.array([1, 2])), "mode must be one of"),
        (lambda: StringOverlapEncoder(minsplit=0), "minsplit must be a whole number from 1"),
        (lambda: StringOverlapEncoder(max_keys=True), "max_keys must be a whole number from 1"),
        (lambda: StringOverlapEncoder(excluded=None), "excluded must be single characters, got None"),
        (lambda: StringOverlapEncoder(excluded=["ab"]), "excluded must be single characters"),
        (lambda: StringOverlapEncoder(consolidate=True), "consolidate belongs to"),
        (lambda: StringOverlapEncoder(missing="x"), "missing must be"),
        (lambda: NumberExtractor("us"), "convention must be one of"),
        (lambda: NumberExtractor(infill="median"), "infill must be"),
        (lambda: NumberExtractor(infill=float("inf")), "infill must be 'mean', a finite number or NaN"),
        (lambda: NumberExtractor(scale="robust"), "scale must be"),
        (lambda: NumberExtractor(unseen="x"), "unseen must be"),
        (lambda: SubstringSearchEncoder(), "search must be a list of one or more terms"),
        (lambda: SubstringSearchEncoder("PC"), "search must be a list of one or more terms"),
        (lambda: SubstringSearchEncoder(np.array(["a"])), "search must be a list of one or more terms"),
        (lambda: SubstringSearchEncoder({"a": 1}), "search must be a list of one or more terms"),
        (lambda: SubstringSearchEncoder([1]), "text, or lists of text"),
        (lambda: SubstringSearchEncoder(["a", ["a", "b"]]), "name each term once"),
        (lambda: SubstringSearchEncoder(["a", ""]), "not empty"),
        (lambda: SubstringSearchEncoder(["a", []]), "not empty"),
        (lambda: FrequencyOrdinal("size"), "order must be one of"),
        (lambda: WordHasher(vocab=1), "vocab must be a whole number from 2"),
        (lambda: WordHasher(alg="hash"), "alg must be one of"),
        (lambda: WordHasher(output="binary"), "give words=False"),
        (lambda: EntryMerger([["a", "b"], ["b"]]), "name each entry once"),
        (lambda: EntryMerger(["ab"]), "list of lists"),
        (lambda: EntryMerger(None), "list of lists"),
        (lambda: TextExtractor("words"), "output must be one of"),
    ],
)
@pytest.mark.usefixtures("without_shape_checks")
def test_wrong_parameters(make, message):
    with pytest.raises(ValueError, match=message):
        make().fit(table(TRAIN))

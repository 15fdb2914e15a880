"""Tables, vocabulary, documents and batches; models are in test_life2vec_models.py, metrics in ..._looking.py."""

import dataclasses
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchgraft.tabular import life2vec as l2v
from torchgraft.tabular.life2vec import Augmentation, Document, EventCollator, EventSchema, EventSource, EventTokenizer

# Rows that CLS.get_preprocessor(False) of SocialComplexityLab/life2vec at 5601191a08a3feae97b4641776692916400c8ed7
# gives with max_length 18 and no shuffling: ten general and four background tokens (10 to 13), then D_0 = 14 and so
# on; five events of tokens 0 1 | 2 | 3 4 unknown | 5 | 6 7 at positions 3 8 8 20 31. The first event does not fit.
OFFICIAL = [
    [1, 10, 11, 12, 13, 2, 16, 2, 17, 18, 9, 2, 19, 2, 20, 21, 2, 0],
    [0, 0, 0, 0, 0, 0, 8, 8, 8, 8, 8, 8, 20, 20, 31, 31, 31, 0],
    [0, 0, 0, 0, 0, 0, 38.6, 38.6, 38.6, 38.6, 38.6, 38.6, 39, 39, 39.9, 39.9, 39.9, 0],
    [1, 1, 1, 1, 1, 1, 3, 3, 1, 1, 1, 1, 2, 2, 3, 3, 3, 0],
]
# Numbers of events that augment.resample_document removed in 300 draws, same commit, by how many there were.
RESAMPLED = {2: {0}, 4: {1}, 6: {1, 2}, 9: {2, 3}, 12: {3, 4, 5}}


def people(**changes):
    table = dict(
        person_id=[1, 2, 3],
        birthday=pd.to_datetime(["1970-05-01", "1981-01-20", "1990-12-31"]),
        sex=["F", "M", None],
    )
    return pd.DataFrame(table | changes)


def jobs(rows=None):
    rows = rows or [
        (1, "2010-01-01", 100.0, "it"), (1, "2009-06-01", 200.0, None), (2, "2011-01-01", 300.0, "it"),
        (2, "2012-01-01", np.nan, "law"), (3, "2012-01-01", 900.0, "it"),
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=["person_id", "date", "income", "industry"])
    return table.assign(date=pd.to_datetime(table["date"]))


def visits(rows=((1, "2010-01-01", "E112"), (1, "2010-01-01", "E119"), (2, "2013-03-03", "I2100"))):
    table = pd.DataFrame(list(rows), columns=["person_id", "date", "code"])
    return table.assign(date=pd.to_datetime(table["date"]))


def tables(**changes):
    return {"jobs": jobs(), "visits": visits()} | changes


def schema(**changes):
    given = dict(
        sources={
            "jobs": EventSource(("income", "industry"), binned={"income": 2}),
            "visits": EventSource(("code",), first_characters={"code": 3}),
        },
        reference_date="2008-01-01",
        background=("sex",),
    )
    return EventSchema(**(given | changes))


def fitted(**changes):
    return EventTokenizer(schema(**changes)).fit(tables(), people())


def document(events=5, tokens=2, **changes):
    given = dict(
        person=7,
        background=(10, 11),
        events=tuple(tuple(12 + (3 * i + j) % 20 for j in range(tokens)) for i in range(events)),
        positions=tuple(10 * i + 4 for i in range(events)),
        ages=tuple(30.0 + i for i in range(events)),
    )
    return Document(**(given | changes))


def tokenizer_of(size=40, background=2):
    made = EventTokenizer(schema(background=tuple("abcdef"[:background]), birth_tokens=False))
    made._set([*l2v.GENERAL_TOKENS, *(f"T_{i}" for i in range(size - 10))], ["GENERAL"] * 10 + ["t"] * (size - 10))
    return made


def rng(seed=0):
    return np.random.default_rng(seed)


# --- vocabulary


def test_vocabulary_is_in_the_order_of_the_paper():
    found = fitted().tokens
    assert tuple(found[:10]) == l2v.GENERAL_TOKENS
    assert found[10:12] == ["SEX_F", "SEX_M"]
    assert found[12:24] == [f"MONTH_{i}" for i in range(1, 13)]
    assert found[24:45] == [f"YEAR_{i}" for i in range(1970, 1991)]
    assert found[45:] == ["INCOME_1", "INCOME_2", "INDUSTRY_it", "INDUSTRY_law", "CODE_E11", "CODE_I21"]
    assert fitted().categories[-1] == "code"


def test_tokens_are_counted_by_people_and_not_by_rows():
    table = visits([(1, "2010-01-01", "A")] * 5 + [(2, "2010-01-01", "B"), (3, "2010-01-01", "B")])
    found = EventTokenizer(schema(min_count=2)).fit(tables(visits=table), people()).tokens
    assert "CODE_B" in found
    assert "CODE_A" not in found


def test_numbers_in_names_sort_as_numbers():
    table = jobs([(i % 3 + 1, "2012-01-01", float(i), "it") for i in range(24)])
    ten = EventSource(("income", "industry"), binned={"income": 12})
    made = EventTokenizer(schema(sources={"jobs": ten, "visits": EventSource(("code",))}))
    found = [t for t in made.fit(tables(jobs=table), people()).tokens if t.startswith("INCOME")]
    assert found == [f"INCOME_{i}" for i in range(1, 13)]


def test_bins_are_quantiles_of_the_training_people_and_ends_take_what_lies_beyond():
    values = np.linspace(0, 99, 100)
    train = pd.DataFrame({"person_id": 1, "date": 5.0, "value": values})
    plain = EventSchema({"t": EventSource(("value",), binned={"value": 4})}, 0.0, birth="born", birth_tokens=False)
    who = pd.DataFrame({"person_id": [1, 2], "born": [0.0, 0.0]})
    made = EventTokenizer(plain).fit(train, who[:1])
    assert made.bins["value"] == pytest.approx([0, 24.75, 49.5, 74.25, 99])
    test = pd.DataFrame({"person_id": 2, "date": 5.0, "value": [-50.0, 24.0, 25.0, 99.0, 1e9]})
    documents = made.documents(test, who)
    assert [made.tokens[t] for (t,) in documents[1].events] == [f"VALUE_{i}" for i in (1, 1, 2, 4, 4)]
    assert documents.report.outside_bins == 2
    # people who are not given to fit have no say
    assert EventTokenizer(plain).fit(pd.concat([train, test]), who[:1]).bins == made.bins


def test_bins_that_ties_leave_empty_are_merged():
    table = pd.DataFrame({"person_id": 1, "date": 5.0, "value": [0.0] * 90 + [1.0] * 10})
    plain = EventSchema({"t": EventSource(("value",), binned={"value": 10})}, 0.0, birth="born", birth_tokens=False)
    made = EventTokenizer(plain).fit(table, pd.DataFrame({"person_id": [1], "born": [0.0]}))
    assert len([t for t in made.tokens if t.startswith("VALUE")]) == 2
    one = EventTokenizer(plain).fit(table[:90], pd.DataFrame({"person_id": [1], "born": [0.0]}))
    assert one.tokens[10:] == ["VALUE_1"]


def test_whole_numbers_and_truth_values_make_plain_tokens():
    table = pd.DataFrame({"person_id": 1, "date": 5.0, "code": [3.0, np.nan, 10.0], "flag": [True, False, True]})
    plain = EventSchema({"t": EventSource(("code", "flag"))}, 0.0, birth="born", birth_tokens=False)
    made = EventTokenizer(plain).fit(table, pd.DataFrame({"person_id": [1], "born": [0.0]}))
    assert made.tokens[10:] == ["CODE_3", "CODE_10", "FLAG_0", "FLAG_1"]


# --- documents


def test_documents_are_sentences_in_order_of_time():
    made = fitted()
    documents = made.documents(tables(), people())
    first = made.decode(made.encode(documents[0])["input_ids"])
    assert first == [
        ["[CLS]", "SEX_F", "MONTH_5", "YEAR_1970", "[SEP]"],
        ["INCOME_1", "[SEP]"],
        ["INCOME_1", "INDUSTRY_it", "[SEP]"],
        ["CODE_E11", "[SEP]"],
        ["CODE_E11", "[SEP]"],
    ]
    days = (pd.to_datetime(["2009-06-01", "2010-01-01"]) - pd.Timestamp("2008-01-01")).days
    assert documents[0].positions == (days[0] + 1, days[1] + 1, days[1] + 1, days[1] + 1)
    assert documents[0].ages[0] == pytest.approx(39 + 1 / 12, abs=0.01)
    assert made.decode(made.encode(documents[2])["input_ids"])[0][1] == "[UNK]"
    report = documents.report
    assert (report.people, report.people_without_events, report.events) == (3, 0, 8)
    assert (report.out_of_order, report.unknown_tokens, report.duplicates) == (1, 1, 0)


def test_rows_are_the_official_ones():
    events = ((14, 15), (16,), (17, 18, 9), (19,), (20, 21))
    whole = Document(7, (10, 11, 12, 13), events, (3, 8, 8, 20, 31), (38.5, 38.6, 38.6, 39.0, 39.9))
    found = tokenizer_of(23, 4).encode(whole, 18)
    torch.testing.assert_close(found["input_ids"], torch.tensor(OFFICIAL))
    assert found["padding_mask"].tolist() == [True] * 17 + [False]


def test_ties_keep_the_order_of_tables_and_rows():
    table = visits([(1, "2010-01-01", "B"), (1, "2010-01-01", "A"), (1, "2010-01-01", "C")])
    made = EventTokenizer(schema()).fit(tables(visits=table), people())
    ids = [event[-1] for event in made.documents(tables(visits=table), people())[0].events]
    assert [made.tokens[i] for i in ids] == ["INCOME_1", "INDUSTRY_it", "CODE_B", "CODE_A", "CODE_C"]


def test_what_happens_at_the_cutoff_or_later_has_no_influence():
    made = fitted()
    cutoff = "2012-01-01"
    before = made.documents(tables(), people(), cutoff=cutoff)
    assert before.report.at_or_after_cutoff == 3
    edited = jobs()
    late = edited["date"] >= cutoff
    edited.loc[late, ["income", "industry"]] = [1e6, "other"]
    edited.loc[late, "date"] = pd.Timestamp("2020-02-02")
    more = pd.concat([visits(), visits([(3, "2012-01-01", "Z99")])])
    after = made.documents(tables(jobs=edited, visits=more), people(), cutoff=cutoff)
    assert list(after) == list(before)


def test_the_day_before_the_cutoff_still_counts():
    documents = fitted().documents(tables(), people(), cutoff=pd.Timestamp("2012-01-02"))
    assert documents.report.at_or_after_cutoff == 1


def test_duplicates_are_counted_and_dropped_only_when_asked():
    made = fitted()
    doubled = tables(visits=pd.concat([visits(), visits()]))
    kept = made.documents(doubled, people())
    assert kept.report.duplicates == 3
    assert kept.report.events == 11
    dropped = made.documents(doubled, people(), duplicates="drop")
    assert (dropped.report.duplicates, dropped.report.events) == (3, 8)
    assert list(dropped) == list(made.documents(tables(), people()))


def test_unknown_ways_with_duplicates_are_named(without_shape_checks):
    with pytest.raises(ValueError, match="'keep' or 'drop'"):
        fitted().documents(tables(), people(), duplicates="forget")


def test_events_of_others_and_empty_events_are_counted():
    made = fitted()
    table = jobs([(1, "2010-01-01", np.nan, None), (99, "2010-01-01", 5.0, "it"), (1, "2010-01-01", 5.0, "x")])
    report = made.documents(tables(jobs=table), people()[:1]).report
    assert (report.other_people, report.empty, report.unknown_tokens) == (2, 1, 1)
    assert report.events == 3
    with pytest.raises(ValueError, match="none of the 8 events belongs to anybody"):
        made.documents(tables(), people(person_id=["1", "2", "3"]))


def test_people_without_events_have_documents_too():
    documents = fitted().documents(tables(jobs=jobs([(1, "2010-01-01", 5.0, "it")])), people())
    assert documents.report.people_without_events == 1
    assert len(documents[2]) == 5
    assert documents.people == [1, 2, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(people=people(person_id=[1, 1, 3])), "person 1 has more than one row"),
        (dict(people=people(person_id=[1, None, 3])), "person_id is missing in 1 rows of the people"),
        (dict(people=people(birthday=pd.to_datetime(["1970-05-01", None, "1990-01-01"]))), "birthday of people is mis"),
        (dict(people=people().drop(columns="sex")), "unknown field 'sex'"),
        (dict(people=people()[:0]), "no rows"),
        (dict(visits=visits().rename(columns={"code": "icd"})), "unknown field 'code': table 'visits' has the columns"),
        (dict(visits=visits([(1, None, "A")])), "date of table 'visits' is missing in 1 rows"),
        (dict(visits=visits([(None, "2010-01-01", "A")])), "person_id is missing in 1 rows of 'visits'"),
        (dict(visits=visits([(1, "1969-01-01", "A")])), "1 events of table 'visits' lie before birth"),
        (dict(visits=visits([(1, "2007-12-31", "A")])), "before reference_date"),
        (dict(jobs=jobs([(1, "2010-01-01", np.inf, "it")])), "'income' holds 1 infinite"),
    ],
)  # fmt: skip
def test_wrong_tables_are_named(change, message):
    made = fitted()
    who = change.pop("people", people())
    with pytest.raises(ValueError, match=message):
        made.documents(tables(**change), who)


@pytest.mark.parametrize(
    ("codes", "kind", "message"),
    [
        ([1, "1", "E11"], TypeError, "'code' mixes numbers and text"),
        ([True, 1, 0], TypeError, "'code' mixes numbers and truth values"),
        ([["E11"], ["E12"], ["E13"]], TypeError, "'code' holds a list in each row"),
        (pd.Categorical([1, "1", "E11"]), TypeError, "'code' mixes numbers and text"),
        (["E11", " ", ""], ValueError, "'code' has blank text in 2 rows"),
        ([None, None, None], ValueError, "'code' of table 'visits' has no value in any training person"),
    ],
)
def test_mixed_blank_and_empty_columns_are_named(codes, kind, message):
    column = codes if isinstance(codes, pd.Categorical) else pd.Series(codes, dtype=object)
    with pytest.raises(kind, match=message):
        EventTokenizer(schema()).fit(tables(visits=visits().assign(code=column)), people())


def test_a_fit_that_fails_leaves_what_was_learnt_before():
    made = fitted()
    documents = list(made.documents(tables(), people()))
    with pytest.raises(ValueError, match="'code' of table 'visits' has no value"):
        made.fit(tables(jobs=jobs().assign(income=7.0), visits=visits().assign(code=None)), people())
    assert list(made.documents(tables(), people())) == documents


def test_tables_that_are_no_tables_or_have_a_column_twice_are_named(without_shape_checks):
    made = EventTokenizer(schema())
    with pytest.raises(TypeError, match="people's table must be a pandas DataFrame, got list"):
        made.fit(tables(), [1, 2])
    with pytest.raises(ValueError, match="table 'visits' has the column 'code' more than once"):
        made.fit(tables(visits=pd.concat([visits(), visits()[["code"]]], axis=1)), people())
    with pytest.raises(ValueError, match="none of the 8 events belongs to anybody"):
        made.fit(tables(), people(person_id=["1", "2", "3"]))


def test_one_token_never_stands_for_two_fields():
    both = EventSource(("code", "code_x"))
    table = visits([(1, "2010-01-01", "X_1"), (2, "2010-01-01", "b")]).assign(code_x=["1", "2"])
    made = EventTokenizer(EventSchema({"visits": both}, "2008-01-01"))
    with pytest.raises(ValueError, match="'CODE_X_1' would stand for values of code and of code_x"):
        made.fit(table, people())


def test_dates_far_away_do_not_wrap_round_and_time_zones_are_refused():
    made = fitted()
    far = made.documents(tables(visits=visits([(1, "2400-01-01", "E11")])), people())
    assert far[0].positions[-1] == (pd.Timestamp("2400-01-01") - pd.Timestamp("2008-01-01")).days + 1
    assert far[0].ages[-1] == pytest.approx(429.67, abs=0.01)
    zoned = visits().assign(date=visits()["date"].dt.tz_localize("Europe/Copenhagen"))
    with pytest.raises(TypeError, match="date of table 'visits' has the time zone Europe/Copenhagen"):
        made.documents(tables(visits=zoned), people())
    with pytest.raises(ValueError, match="cutoff must have no time zone"):
        made.documents(tables(), people(), cutoff=pd.Timestamp("2012-01-01", tz="UTC"))


rows = st.lists(
    st.tuples(
        st.sampled_from([1, 2, 3, 99]),
        st.integers(0, 40),
        st.one_of(st.none(), st.text(min_size=1, max_size=4).filter(str.strip)),
        st.one_of(st.none(), st.integers(-9, 9)),
    ),
    min_size=1,
    max_size=25,
)


@given(rows, st.sampled_from(["keep", "drop"]), st.integers(0, 41))
@settings(max_examples=25, deadline=None)
def test_every_row_is_in_a_document_or_in_the_report(given_rows, duplicates, cutoff):
    table = pd.DataFrame(given_rows, columns=["person_id", "date", "word", "number"])
    # somebody who has everything, so that a vocabulary can be learnt
    table.loc[len(table)] = [1, 0, "a", 5]
    table = table.astype({"date": float, "word": object, "number": float})
    who = pd.DataFrame({"person_id": [3, 1, 2], "born": [-9.0, -5.0, 0.0]})
    fields = EventSource(("word", "number"), binned={"number": 3})
    plain = EventSchema({"t": fields}, -3.0, birth="born", birth_tokens=False)
    made = EventTokenizer(plain).fit(table, who)
    documents = made.documents(table, who, cutoff=float(cutoff), duplicates=duplicates)
    report = documents.report
    left_out = report.at_or_after_cutoff + report.other_people + report.empty
    again = table[table["person_id"].isin([1, 2, 3]) & (table["date"] < cutoff)].duplicated()
    assert report.duplicates == again.sum()
    # a duplicate of an empty row is counted as a duplicate where duplicates go
    gone = report.duplicates if duplicates == "drop" else 0
    assert report.events == sum(len(d.events) for d in documents) == len(table) - left_out - gone
    assert report.unknown_tokens == report.outside_bins == 0
    for d in documents:
        mine = table[(table["person_id"] == d.person) & (table["date"] < cutoff)].drop_duplicates()
        words = {f"WORD_{w}" for w in mine["word"].dropna()}
        decoded = {t for s in made.decode(made.encode(d)["input_ids"]) for t in s}
        assert {t for t in decoded if t.startswith("WORD")} == words
        assert list(d.positions) == sorted(d.positions)


def test_wrong_types_are_named():
    made = fitted()
    with pytest.raises(TypeError, match="date of table 'visits' must be dates"):
        made.documents(tables(visits=visits().assign(date=[1, 2, 3])), people())
    for years in (pd.Series([2009, 2010, 2011], dtype=object), pd.Categorical([2009, 2010, 2011])):
        with pytest.raises(TypeError, match=r"date of table 'visits' must be dates.*some of its values are numbers"):
            made.documents(tables(visits=visits().assign(date=years)), people())
    with pytest.raises(TypeError, match="'income' is binned and must be numbers"):
        made.documents(tables(jobs=jobs().assign(income="much")), people())
    with pytest.raises(ValueError, match="cutoff and reference_date must be of one kind"):
        made.documents(tables(), people(), cutoff=12)
    with pytest.raises(ValueError, match="cutoff must be a date or a number"):
        made.documents(tables(), people(), cutoff="soon")
    with pytest.raises(ValueError, match="has the tables"):
        made.documents({"jobs": jobs()}, people())
    with pytest.raises(ValueError, match="got one table"):
        made.documents(jobs(), people())
    with pytest.raises(ValueError, match="call fit"):
        EventTokenizer(schema()).documents(tables(), people())
    with pytest.raises(ValueError, match="'income' has no value in any training person"):
        EventTokenizer(schema()).fit(tables(jobs=jobs().assign(income=np.nan)), people())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EventSource(()), "fields is empty"),
        (lambda: EventSource(("a",), binned={"b": 3}), "unknown field 'b'"),
        (lambda: EventSource(("a",), binned={"a": 1}), "at least 2 bins"),
        (lambda: schema(sources={}), "sources is empty"),
        (lambda: schema(background=("code",)), "'code' occurs twice"),
        (lambda: schema(background=("Code",)), "'Code' occurs twice"),
        (lambda: schema(background=("month",)), "'month' occurs twice"),
        (lambda: schema(reference_date=pd.Timestamp("2008-01-01", tz="UTC")), "reference_date must have no time zone"),
        (lambda: schema(background_binned={"age": 3}), "background_binned names 'age'"),
        (lambda: schema(background_binned={"sex": 1}), "background_binned wants at least 2 bins"),
        (lambda: schema(min_count=0), "min_count must be at least 1"),
        (lambda: schema(reference_date="yesterday-ish"), "reference_date must be a date or a number"),
        (lambda: schema(reference_date=float("nan")), "reference_date must be finite"),
        (lambda: schema(reference_date=0.0), "birth_tokens needs timestamps"),
    ],
)
def test_wrong_schemas_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_text_does_not_pass_for_names(without_shape_checks):
    with pytest.raises(TypeError, match=r"fields must be a sequence of names, got the text 'code'"):
        EventSource("code")
    with pytest.raises(TypeError, match="background must be a sequence of names"):
        schema(background="sex")
    with pytest.raises(TypeError, match=r"fields must be a sequence of names, which are text, got \{'fields'"):
        schema(sources={"visits": {"fields": ["code"]}})
    with pytest.raises(TypeError, match=r"names, which are text, got \[0\]"):
        EventSource([0])
    with pytest.raises(TypeError, match="sources must map names"):
        schema(sources=["visits"])


def test_counts_are_whole_numbers_and_numpys_can_be_saved(tmp_path, without_shape_checks):
    eight = np.int64(8)
    source = EventSource(("income", "industry"), binned={"income": eight}, first_characters={"industry": eight})
    given = schema(sources={"jobs": source}, background_binned={"sex": eight}, min_count=eight)
    EventTokenizer(given).save_pretrained(tmp_path)
    assert EventSchema.from_dict(given.to_dict()) == given
    with pytest.raises(TypeError, match=r"binned of 'a' must be a whole number, got 3\.5"):
        EventSource(("a",), binned={"a": 3.5})
    with pytest.raises(TypeError, match="first_characters of 'a' must be a whole number, got '3'"):
        EventSource(("a",), first_characters={"a": "3"})
    with pytest.raises(TypeError, match="background_binned of 'sex' must be a whole number"):
        schema(background_binned={"sex": 2.5})
    with pytest.raises(TypeError, match="min_count must be a whole number"):
        schema(min_count=1.5)


def test_files_bring_back_the_same_tokenizer(tmp_path):
    made = fitted()
    made.save_pretrained(tmp_path)
    again = EventTokenizer.from_pretrained(tmp_path)
    assert again.schema == made.schema
    assert (again.tokens, again.bins, again.categories) == (made.tokens, made.bins, made.categories)
    assert list(again.documents(tables(), people())) == list(made.documents(tables(), people()))
    with pytest.raises(ValueError, match=r"no event_tokenizer\.json"):
        EventTokenizer.from_pretrained(tmp_path / "nowhere")
    text = (tmp_path / "event_tokenizer.json").read_text()
    (tmp_path / "event_tokenizer.json").write_text(text.replace("[PAD]", "[pad]"))
    with pytest.raises(ValueError, match="does not begin with the general tokens"):
        EventTokenizer.from_pretrained(tmp_path)
    (tmp_path / "event_tokenizer.json").write_text(text.replace('"bins"', '"bin"'))
    with pytest.raises(ValueError, match=r"lacks \['bins'\]"):
        EventTokenizer.from_pretrained(tmp_path)
    (tmp_path / "event_tokenizer.json").write_text(text[:50])
    with pytest.raises(ValueError):  # noqa: PT011, from json
        EventTokenizer.from_pretrained(tmp_path)


def test_names_of_tokens():
    made = fitted()
    assert made.tokens[made.id_of("CODE_E11")] == "CODE_E11"
    with pytest.raises(ValueError, match="did you mean"):
        made.id_of("CODE_E12")
    with pytest.raises(ValueError, match="outside the vocabulary"):
        made.decode([1, made.vocab_size])


def test_clipping_keeps_the_latest_events_and_says_what_is_lost():
    whole = document(events=5)
    assert whole.clip(4 + 3 * 5) is whole
    for length, kept in ((18, 4), (7, 1)):
        short = whole.clip(length)
        assert short.events == whole.events[-kept:]
        assert short.positions == whole.positions[-kept:]
        assert len(short) <= length
    with pytest.raises(ValueError, match="max_length=6 does not hold"):
        whole.clip(6)
    assert document(events=0).clip(4) == document(events=0)
    documents = l2v.Documents([whole, document(events=1)], fitted().documents(tables(), people()).report)
    assert documents.clipped(10) == {"people": 1, "events": 3}
    assert documents.lengths.tolist() == [19, 7]


def test_people_are_chosen_and_labelled_by_id():
    documents = fitted().documents(tables(), people())
    assert documents.select([3, 1]).people == [3, 1]
    assert documents[1:].people == [2, 3]
    assert [d.label for d in documents.with_labels({1: 0, 2: 1, 3: 0})] == [0, 1, 0]
    with pytest.raises(ValueError, match="1 ids have no document, the first is 9"):
        documents.select([1, 9])
    with pytest.raises(ValueError, match="2 people have no label, the first is 2"):
        documents.with_labels({1: 0})


def test_splits_take_a_column_of_a_table():
    parts = l2v.split_people(people()["person_id"], (0.5, 0.5))
    assert sorted(person for part in parts for person in part) == [1, 2, 3]


def test_splits_are_of_people():
    parts = l2v.split_people(list("abcdefghij"), (0.7, 0.15, 0.15), seed=1)
    assert sorted(i for part in parts for i in part) == list("abcdefghij")
    l2v.check_disjoint(train=parts[0], valid=parts[1], test=parts[2])
    assert parts == l2v.split_people(list("abcdefghij"), (0.7, 0.15, 0.15), seed=1)
    assert parts != l2v.split_people(list("abcdefghij"), (0.7, 0.15, 0.15), seed=2)
    with pytest.raises(ValueError, match="1 ids are in train and in test, the first is 2"):
        l2v.check_disjoint(train=[1, 2], test=[2, 3])
    with pytest.raises(ValueError, match="names some ids twice"):
        l2v.check_disjoint(train=[1, 1])
    with pytest.raises(ValueError, match="sum to 1"):
        l2v.split_people([1, 2], (0.7, 0.7))


# --- augmentation


def test_shuffling_stays_inside_events():
    mixed = l2v.shuffle_tokens(document(events=30, tokens=4), rng())
    assert [sorted(e) for e in mixed.events] == [sorted(e) for e in document(events=30, tokens=4).events]
    assert mixed.events != document(events=30, tokens=4).events


@pytest.mark.parametrize("count", list(RESAMPLED))
def test_resampling_removes_as_many_as_the_official_code(count):
    whole = document(events=count)
    gone = set()
    for seed in range(100):
        found = l2v.resample_events(whole, rng(seed))
        gone.add(count - len(found.events))
        assert found.positions[0] == 1
        places = [whole.events.index(e) for e in found.events]
        assert places == sorted(places)
        assert np.diff(found.positions).tolist() == np.diff([whole.positions[i] for i in places]).tolist()
    assert gone == RESAMPLED[count]


@pytest.mark.parametrize("count", [0, 1])
def test_resampling_leaves_the_shortest_documents(count):
    assert len(l2v.resample_events(document(events=count), rng()).events) == count


def test_noise_moves_by_at_most_five_days():
    whole = document(events=2000, positions=(100,) * 2000)
    moved = np.array(l2v.shift_positions(whole, rng()).positions) - 100
    assert set(moved.tolist()) == set(range(-5, 5))
    assert min(l2v.shift_positions(document(events=500, positions=(1,) * 500), rng()).positions) == 0
    assert max(l2v.shift_positions(whole, rng(), last=102).positions) == 102


@pytest.mark.parametrize("seed", range(20))
def test_a_time_cut_never_splits_a_day(seed):
    days = tuple(i // 3 for i in range(40))
    whole = document(events=40, positions=days)
    found = l2v.time_cut(whole, rng(seed))
    kept = len(found.events)
    assert kept >= 12
    assert found.positions == days[:kept]
    assert kept == 40 or days[kept] != days[kept - 1]
    assert len(l2v.time_cut(whole, rng(seed), min_position=10).events) >= 30
    assert l2v.time_cut(document(events=12), rng(seed)) == document(events=12)


def test_dropping_and_hiding():
    whole = document(events=4000, tokens=3)
    dropped = l2v.drop_tokens(whole, rng(), 0.25)
    lengths = np.array([len(e) for e in dropped.events])
    assert set(lengths.tolist()) == {2, 3}
    assert (lengths == 2).mean() == pytest.approx(0.25, abs=0.03)
    assert l2v.drop_tokens(document(events=1, tokens=1), rng(), 1.0).events == ((),)
    assert l2v.hide_background(whole).background == (9, 9)


def test_each_augmentation_happens_as_often_as_it_should():
    whole = document(events=20)
    generator = rng()
    augment = Augmentation(resample=0.4, position_noise=0.0, hide_background=0.2, drop_token=0.0)
    found = [augment(whole, generator) for _ in range(2000)]
    assert np.mean([len(d.events) < 20 for d in found]) == pytest.approx(0.4, abs=0.04)
    assert np.mean([d.background == (9, 9) for d in found]) == pytest.approx(0.2, abs=0.035)
    both = np.mean([len(d.events) < 20 and d.background == (9, 9) for d in found])
    assert both == pytest.approx(0.08, abs=0.025)
    assert Augmentation(0, 0, 0, 0)(whole, generator) == whole
    with pytest.raises(ValueError, match="resample is a probability"):
        Augmentation(resample=1.5)


# --- pre-training tasks


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(1, 4), st.integers(0, 10_000))
def test_masking_counts_are_exact(events, size, seed):
    tokens = np.array([1, 10, 9, 2])
    for e in range(events):
        tokens = np.concatenate([tokens, 12 + (np.arange(size) + e) % 20, [2]])
    masked, where, what = l2v.mask_tokens(tokens, rng(seed), 40)
    legal = (tokens != 2) & (tokens != 9) & (tokens != 1)
    k = min(int(0.3 * len(tokens)), legal.sum())
    assert len(where) == len(set(where.tolist())) == k
    assert legal[where].all()
    assert (tokens[where] == what).all()
    few = int(0.1 * k)
    assert (masked == 3).sum() == k - 2 * few
    assert (masked[where[:few]] == what[:few]).all()
    assert (masked[where[k - few :]] >= 10).all()
    untouched = np.setdiff1d(np.arange(len(tokens)), where)
    assert (masked[untouched] == tokens[untouched]).all()


def test_random_tokens_are_never_general_and_need_a_vocabulary():
    tokens = np.array([1] + [15] * 4000)
    masked, where, _ = l2v.mask_tokens(tokens, rng(), 20)
    drawn = masked[where[-120:]]
    assert set(drawn.tolist()) == set(range(10, 20))
    with pytest.raises(ValueError, match="no token besides"):
        l2v.mask_tokens(tokens, rng(), 10)


def test_order_task():
    whole = document(events=12, tokens=1)
    generator = rng()
    drawn = [l2v.reorder_events(whole, generator) for _ in range(4000)]
    share = np.bincount([order for _, order in drawn], minlength=3) / 4000
    assert share == pytest.approx([0.9, 0.05, 0.05], abs=0.012)
    assert all(e == whole.events for e, order in drawn if order == 0)
    assert all(e == whole.events[::-1] for e, order in drawn if order == 1)
    shuffled = [e for e, order in drawn if order == 2]
    assert all(sorted(e) == sorted(whole.events) for e in shuffled)
    assert len(set(shuffled)) > 1
    assert l2v.reorder_events(document(events=1), generator) == (document(events=1).events, -100)


# --- batches


def test_pretraining_batches():
    collate = EventCollator(tokenizer_of(), 64)
    torch.manual_seed(0)
    documents = [document(events=n) for n in (3, 1, 8)]
    batch = collate(documents)
    length = 4 + 3 * 8
    assert batch["input_ids"].shape == (3, 4, length)
    assert batch["padding_mask"].sum(1).tolist() == [13, 7, 28]
    assert (batch["input_ids"].movedim(1, 2)[~batch["padding_mask"]] == 0).all()
    slots = int(0.3 * length)
    assert batch["target_pos"].shape == batch["target_tokens"].shape == (3, slots)
    for row, n in enumerate((13, 7, 28)):
        k = int(0.3 * n)
        assert (batch["target_tokens"][row, :k] > 9).all()
        assert (batch["target_tokens"][row, k:] == 0).all()
        assert (batch["target_pos"][row, k:] == length - 1).all()
    assert batch["target_cls"][1] == -100
    torch.manual_seed(0)
    again = collate(documents)
    assert all(torch.equal(batch[key], again[key]) for key in batch)
    assert not torch.equal(collate(documents)["target_pos"], batch["target_pos"])


def test_dates_stay_when_events_move():
    collate = EventCollator(tokenizer_of(), 200, mlm=0.01, shuffle=False)
    whole = document(events=30, tokens=1)
    torch.manual_seed(0)
    moved = 0
    for _ in range(60):
        batch = collate([whole])
        moved += int(batch["target_cls"][0] > 0)
        assert batch["input_ids"][0, 1, 4::2].tolist() == list(whole.positions)
        assert batch["input_ids"][0, 3, 4:10:2].tolist() == [2, 3, 1]
    assert moved


def test_labelled_batches_and_padding():
    labelled = [document(label=1), document(events=2, label=0)]
    batch = EventCollator(tokenizer_of(), 64, mlm=None, pad_to_multiple_of=8)(labelled)
    assert set(batch) == {"input_ids", "padding_mask", "labels"}
    assert batch["input_ids"].shape[-1] == 24
    assert batch["labels"].tolist() == [1, 0]
    wide = EventCollator(tokenizer_of(), 64, mlm=None, pad_to_max=True)(labelled)
    assert wide["input_ids"].shape[-1] == 64
    assert (wide["input_ids"][..., 24:] == 0).all()
    items = [document(label=(0, 4, 2, 1)), document(label=(1, 1, 1, 1))]
    assert EventCollator(tokenizer_of(), 64, mlm=None)(items)["labels"].shape == (2, 4)
    with pytest.raises(ValueError, match="person 7 has no label"):
        EventCollator(tokenizer_of(), 64, mlm=None)([labelled[0], document()])
    with pytest.raises(ValueError, match="person 7 has no label"):
        EventCollator(tokenizer_of(), 64, mlm=None)([document(), labelled[0]])
    with pytest.raises(ValueError, match="label of person 7 is NaN"):
        EventCollator(tokenizer_of(), 64, mlm=None)([document(label=float("nan")), labelled[0]])
    assert "labels" not in EventCollator(tokenizer_of(), 64, mlm=None)([document()])


def test_unshuffled_batches_decode_to_the_document():
    made = fitted()
    documents = made.documents(tables(), people())
    batch = EventCollator(made, 40, mlm=None, shuffle=False)(list(documents))
    for row, one in enumerate(documents):
        assert made.decode(batch["input_ids"][row]) == made.decode(made.encode(one)["input_ids"])


def test_wrong_collators_are_named():
    with pytest.raises(ValueError, match="mlm is a share"):
        EventCollator(tokenizer_of(), 64, mlm=0.0)
    with pytest.raises(ValueError, match="max_length must hold the background and be at least 5"):
        EventCollator(tokenizer_of(), 4)
    with pytest.raises(ValueError, match="documents is empty"):
        EventCollator(tokenizer_of(), 64)([])


def test_buckets_waste_less_than_chance():
    lengths = rng().integers(5, 500, 1000)
    batches = l2v.length_buckets(lengths, 16, seed=3)
    assert sorted(i for b in batches for i in b) == list(range(1000))
    assert batches == l2v.length_buckets(lengths, 16, seed=3)
    assert batches != l2v.length_buckets(lengths, 16, seed=4)

    def padded(parts):
        return sum(len(b) * lengths[b].max() for b in parts)

    chance = np.array_split(rng(1).permutation(1000), len(batches))
    assert padded(batches) < 0.65 * padded(chance)
    with pytest.raises(ValueError, match="at least 1"):
        l2v.length_buckets(lengths, 0)


def test_documents_feed_a_data_loader():
    documents = fitted().documents(tables(), people())
    loader = torch.utils.data.DataLoader(
        documents, batch_sampler=l2v.length_buckets(documents.lengths, 2), collate_fn=EventCollator(fitted(), 40)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sum(len(batch["input_ids"]) for batch in loader) == 3


def test_documents_are_plain_values():
    assert dataclasses.replace(document(), label=1).label == 1
    assert document() == document()

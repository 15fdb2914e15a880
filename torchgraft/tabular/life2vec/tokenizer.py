"""The tokenizer of dated event tables: vocabulary, quantile bins, documents, model inputs, files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from torchgraft.tabular.life2vec.events import (
    GENERAL_TOKENS,
    PAD,
    SEP,
    UNK,
    Document,
    Documents,
    EncodingReport,
    EventSchema,
    EventSource,
    layout,
    moment,
)

if TYPE_CHECKING:
    from pandas import DataFrame, Series

__all__ = ["EventTokenizer"]

FILE = "event_tokenizer.json"
_NOBODY = "none of the {} events belongs to anybody in the people's table; compare the ids and their types"


def _columns(frame: DataFrame, wanted: Sequence[str], what: str) -> None:
    import pandas

    if not isinstance(frame, pandas.DataFrame):
        raise TypeError(f"{what} must be a pandas DataFrame, got {type(frame).__name__}")
    twice = [name for name in wanted if (frame.columns == name).sum() > 1]
    if twice:
        raise ValueError(f"{what} has the column {twice[0]!r} more than once; rename or drop one")
    absent = [name for name in wanted if name not in frame.columns]
    if absent:
        raise ValueError(f"unknown field {absent[0]!r}: {what} has the columns {[str(c) for c in frame.columns]}")


def _dates(values: Series, numeric: bool, what: str) -> np.ndarray:
    """Float units, or datetime64[us]; nanoseconds would wrap round in the year 2262."""
    import pandas

    if numeric:
        if not pandas.api.types.is_numeric_dtype(values):
            raise TypeError(f"{what} must be numbers, since reference_date is one; got dtype {values.dtype}")
        found = values.to_numpy(dtype=float, na_value=np.nan)
        bad = ~np.isfinite(found)
    else:
        if pandas.api.types.is_numeric_dtype(values):
            raise TypeError(f"{what} must be dates, since reference_date is one; got dtype {values.dtype}")
        # the year 2009 would be read as 2009 nanoseconds behind 1970
        if "numbers" in _kinds(values):
            raise TypeError(f"{what} must be dates, since reference_date is one; some of its values are numbers")
        try:
            read = pandas.to_datetime(values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{what} cannot be read as dates: {error}") from None
        if getattr(read.dt, "tz", None) is not None:
            raise TypeError(f"{what} has the time zone {read.dt.tz}; take it off with .dt.tz_localize(None)")
        found = read.to_numpy(dtype="datetime64[us]")
        bad = np.isnat(found)
    if bad.any():
        raise ValueError(f"{what} is missing in {int(bad.sum())} rows, the first at row {int(bad.argmax())}")
    return found


def _numbers(values: Series, name: str) -> np.ndarray:
    import pandas

    if not pandas.api.types.is_numeric_dtype(values):
        raise TypeError(f"field {name!r} is binned and must be numbers, got dtype {values.dtype}")
    found = values.to_numpy(dtype=float, na_value=np.nan)
    if np.isinf(found).any():
        raise ValueError(f"field {name!r} holds {int(np.isinf(found).sum())} infinite values")
    return found


def _kind(value: Any) -> str:
    if isinstance(value, (bool, np.bool_)):
        return "truth values"
    if isinstance(value, (int, float, np.integer, np.floating)):
        return "numbers"
    return "text" if isinstance(value, str) else type(value).__name__


def _kinds(values: Series) -> list[str]:
    """Kinds of the values of a column whose dtype does not tell: of objects, and of categories that are objects."""
    categorical = getattr(values.dtype, "categories", None) is not None
    if categorical:
        values = values.cat.remove_unused_categories().cat.categories.to_series()
    return sorted({_kind(value) for value in values.dropna()} if categorical or values.dtype == object else set())


def _words(values: Series, name: str, first: int | None) -> np.ndarray:
    """Tokens as objects, None where there is no value; whole numbers lose the '.0' that missing values give them."""
    import pandas

    # before factorize, which takes True and 1 for the same and refuses lists without naming them
    kinds = _kinds(values)
    if len(kinds) > 1:
        raise TypeError(
            f"field {name!r} mixes {' and '.join(kinds)}, so that 1 and '1' could not be told apart; make it one type, "
            "for instance with .astype('string')"
        )
    if any(kind in ("list", "dict", "set", "ndarray") for kind in kinds):
        raise TypeError(f"field {name!r} holds a {kinds[0]} in each row; give every value a row of its own")
    codes, found = pandas.factorize(values, use_na_sentinel=True)
    blank = [value for value in found if isinstance(value, str) and not value.strip()]
    if blank:
        count = int(np.isin(codes, [i for i, value in enumerate(found) if value in blank]).sum())
        raise ValueError(f"field {name!r} has blank text in {count} rows; write missing values as None or NaN")

    def word(value: Any) -> str:
        whole = isinstance(value, (float, np.floating)) and float(value).is_integer()
        text = str(int(value)) if whole or isinstance(value, (bool, np.bool_)) else str(value)
        return f"{name.upper()}_{text if first is None else text[:first]}"

    words = np.array([*(word(value) for value in found), None], dtype=object)
    return words[codes]


def _bin(values: np.ndarray, edges: Sequence[float], name: str) -> np.ndarray:
    index = np.searchsorted(np.asarray(edges[1:-1]), values, side="right") + 1
    words = np.array([f"{name.upper()}_{i}" for i in range(len(edges) + 1)], dtype=object)
    found = words[index]
    found[np.isnan(values)] = None
    return found


def _quantiles(values: np.ndarray, bins: int, name: str) -> list[float]:
    values = values[~np.isnan(values)]
    if not len(values):
        raise ValueError(f"field {name!r} has no value in any training person; it cannot be binned")
    return [float(x) for x in np.unique(np.quantile(values, np.linspace(0, 1, bins + 1)))]


def _natural(token: str) -> tuple[tuple[bool, int, str], ...]:
    """Sorts 2 before 10."""
    parts = ((p, p.isascii() and p.isdigit() and len(p) < 19) for p in token.split("_"))
    return tuple((not number, int(p) if number else 0, p) for p, number in parts)


class EventTokenizer:
    """Vocabulary of a schema, fitted on the training people, and the way from tables to model inputs.

    Vocabulary: ten general tokens, background values, months and years of birth, then for each field the tokens that
    occur in at least ``min_count`` training people, in natural order. Bins are quantiles of the training people;
    numbers beyond go to the end bins, and bins that would be empty because of ties are merged. Everything else, and a
    missing background value, becomes [UNK]. Missing fields of events are left out.

    Differences from the official code: every value carries its field's name (there, background values do not); n bins
    are n bins (there ``n - 2`` come out, and numbers below the training range are lost).

    Args:
        schema: what the tables mean.

    Example:
        >>> import pandas as pd
        >>> people = pd.DataFrame({"person_id": [1, 2], "birthday": pd.to_datetime(["1970-05-01", "1981-01-20"])})
        >>> visits = pd.DataFrame({"person_id": [1, 1, 2], "date": pd.to_datetime(["2009-03-01"] * 3)})
        >>> visits["code"] = list("abb")
        >>> tokenizer = EventTokenizer(EventSchema({"visits": EventSource(("code",))}, "2008-01-01"))
        >>> documents = tokenizer.fit({"visits": visits}, people).documents({"visits": visits}, people)
        >>> tokenizer.decode(tokenizer.encode(documents[0])["input_ids"])
        [['[CLS]', 'MONTH_5', 'YEAR_1970', '[SEP]'], ['CODE_a', '[SEP]'], ['CODE_b', '[SEP]']]
    """

    def __init__(self, schema: EventSchema) -> None:
        self.schema = schema
        self.tokens: list[str] = []
        self.categories: list[str] = []
        self.bins: dict[str, list[float]] = {}
        self._ids: dict[str, int] = {}

    # --- fitting

    def fit(self, events: Mapping[str, DataFrame] | DataFrame, people: DataFrame) -> EventTokenizer:
        """Learn bins and vocabulary; give the training people alone, rows of others are not looked at.

        Args:
            events: a table for each source, or one table where there is one source.
            people: one row a person.

        Returns:
            Itself.

        Raises:
            ValueError: for columns that are not there, are there twice, hold blank text, or no value at all; for
                missing or repeated people, and for two values that would have the same token.
            TypeError: for columns that mix text and numbers, and for binned ones that are not numbers.
        """
        # what was learnt before stays where this fails
        fresh = EventTokenizer(self.schema)
        tokens, categories = fresh._learn(events, people)
        self.bins = fresh.bins
        self._set(tokens, categories)
        return self

    def _learn(self, events: Mapping[str, DataFrame] | DataFrame, people: DataFrame) -> tuple[list[str], list[str]]:
        schema = self.schema
        tables, ids, births = self._tables(events, people)
        known = set(ids)
        for name, number in schema.background_binned.items():
            self.bins[name] = _quantiles(_numbers(people[name], name), number, name)
        tokens, categories = list(GENERAL_TOKENS), ["GENERAL"] * len(GENERAL_TOKENS)

        def add(new: Sequence[str], category: str) -> None:
            tokens.extend(new)
            categories.extend([category] * len(new))

        for name in schema.background:
            add(sorted({w for w in self._background(people, name) if w is not None}, key=_natural), name)
        if schema.birth_tokens:
            add([f"MONTH_{i}" for i in range(1, 13)], "MONTH")
            years = births.astype("datetime64[Y]").astype(int) + 1970
            add([f"YEAR_{i}" for i in range(years.min(), years.max() + 1)], "YEAR")
        rows = sum(len(table) for table in tables.values())
        tables = {name: table[table[schema.person].isin(known)] for name, table in tables.items()}
        if rows and not any(map(len, tables.values())):
            raise ValueError(_NOBODY.format(rows))
        for name, source in schema.sources.items():
            table = tables[name]
            for label in source.fields:
                if label in source.binned:
                    self.bins[label] = _quantiles(_numbers(table[label], label), source.binned[label], label)
                words = self._field(table, label, source)
                there = np.array([w is not None for w in words], dtype=bool)
                if not there.any():
                    raise ValueError(
                        f"field {label!r} of table {name!r} has no value in any training person; leave it out"
                    )
                pairs = set(zip(table[schema.person].to_numpy()[there].tolist(), words[there].tolist(), strict=True))
                counts: dict[str, int] = {}
                for _, word in pairs:
                    counts[word] = counts.get(word, 0) + 1
                kept = [word for word, count in counts.items() if count >= schema.min_count]
                add(sorted(kept, key=_natural), label)
        if len(set(tokens)) < len(tokens):
            twice = next(token for i, token in enumerate(tokens) if token in tokens[:i])
            owners = [category for token, category in zip(tokens, categories, strict=True) if token == twice]
            raise ValueError(f"token {twice!r} would stand for values of {' and of '.join(owners)}; rename one field")
        return tokens, categories

    def _set(self, tokens: list[str], categories: list[str]) -> None:
        self.tokens, self.categories = tokens, categories
        self._ids = {token: index for index, token in enumerate(tokens)}

    def _tables(
        self, events: Mapping[str, DataFrame] | DataFrame, people: DataFrame
    ) -> tuple[dict[str, DataFrame], list[Any], np.ndarray]:
        schema = self.schema
        if not isinstance(events, Mapping):
            if len(schema.sources) != 1:
                raise ValueError(f"events must map the sources {list(schema.sources)} to tables, got one table")
            events = {next(iter(schema.sources)): events}
        if set(events) != set(schema.sources):
            raise ValueError(f"events has the tables {sorted(events)}, the schema has {sorted(schema.sources)}")
        _columns(people, [schema.person, schema.birth, *schema.background], "the people's table")
        ids = people[schema.person]
        if ids.isna().any():
            raise ValueError(f"{schema.person} is missing in {int(ids.isna().sum())} rows of the people's table")
        if ids.duplicated().any():
            raise ValueError(
                f"person {ids[ids.duplicated()].tolist()[0]!r} has more than one row in the people's table"
            )
        if not len(people):
            raise ValueError("the people's table has no rows")
        births = _dates(people[schema.birth], isinstance(schema.reference_date, float), f"{schema.birth} of people")
        for name, source in schema.sources.items():
            _columns(events[name], [schema.person, schema.date, *source.fields], f"table {name!r}")
        return dict(events), ids.tolist(), births

    def _background(self, people: DataFrame, name: str) -> np.ndarray:
        if name in self.schema.background_binned:
            return _bin(_numbers(people[name], name), self.bins[name], name)
        return _words(people[name], name, None)

    def _field(self, table: DataFrame, label: str, source: EventSource) -> np.ndarray:
        if label in source.binned:
            return _bin(_numbers(table[label], label), self.bins[label], label)
        return _words(table[label], label, source.first_characters.get(label))

    # --- documents

    def documents(
        self,
        events: Mapping[str, DataFrame] | DataFrame,
        people: DataFrame,
        cutoff: Any = None,
        duplicates: Literal["keep", "drop"] = "keep",
    ) -> Documents:
        """One document for every row of ``people``, in that order, also for those without events.

        Args:
            events: as in ``fit``.
            people: as in ``fit``.
            cutoff: events at this date or later are left out, and counted; the paper's is 2016-01-01.
            duplicates: what to do with rows that equal an earlier one in everything; they are counted either way.

        Returns:
            Documents, and the report of what was left out.

        Raises:
            ValueError: before ``fit``; for events before birth or before the reference date; for columns that are
                not there, missing dates, and tables none of whose people is in ``people``.
        """
        import pandas

        if not self.tokens:
            raise ValueError("the tokenizer has no vocabulary yet; call fit with the training people first")
        if duplicates not in ("keep", "drop"):
            raise ValueError(f"duplicates must be 'keep' or 'drop', got {duplicates!r}")
        schema = self.schema
        tables, ids, births = self._tables(events, people)
        numeric = isinstance(schema.reference_date, float)
        place = pandas.Series(np.arange(len(ids)), index=ids)
        limit = None
        if cutoff is not None:
            limit = moment(cutoff, "cutoff")
            if isinstance(limit, float) != numeric:
                raise ValueError(f"cutoff and reference_date must be of one kind, got {cutoff!r}")
        counts = dict.fromkeys(("late", "others", "empty", "duplicates", "unsorted", "unknown", "outside"), 0)
        rows = sum(len(table) for table in tables.values())
        who, when, what, widest = [], [], [], max(len(s.fields) for s in schema.sources.values())
        for name, source in schema.sources.items():
            table = tables[name]
            if table[schema.person].isna().any():
                raise ValueError(
                    f"{schema.person} is missing in {int(table[schema.person].isna().sum())} rows of {name!r}"
                )
            at = place.reindex(table[schema.person]).to_numpy(dtype=float)
            counts["others"] += int(np.isnan(at).sum())
            table, at = table[~np.isnan(at)], at[~np.isnan(at)].astype(int)
            dates = _dates(table[schema.date], numeric, f"{schema.date} of table {name!r}")
            order = np.argsort(at, kind="stable")
            same = at[order][1:] == at[order][:-1]
            counts["unsorted"] += int((same & (dates[order][1:] < dates[order][:-1])).sum())
            soon = dates < births[at]
            if soon.any():
                raise ValueError(
                    f"{int(soon.sum())} events of table {name!r} lie before birth, the first is of person "
                    f"{ids[at[soon.argmax()]]!r} at {dates[soon.argmax()]}; correct or remove them"
                )
            if limit is not None:
                late = dates >= (limit if numeric else limit.to_datetime64())
                counts["late"] += int(late.sum())
                table, at, dates = table[~late], at[~late], dates[~late]
            again = table.duplicated([schema.person, schema.date, *source.fields]).to_numpy()
            counts["duplicates"] += int(again.sum())
            if duplicates == "drop":
                table, at, dates = table[~again], at[~again], dates[~again]
            coded = np.full((len(table), widest), -1)
            for column, label in enumerate(source.fields):
                words = self._field(table, label, source)
                coded[:, column] = [-1 if w is None else self._ids.get(w, UNK) for w in words]
                if label in source.binned:
                    values = _numbers(table[label], label)
                    counts["outside"] += int(((values < self.bins[label][0]) | (values > self.bins[label][-1])).sum())
            empty = (coded < 0).all(1)
            counts["empty"] += int(empty.sum())
            counts["unknown"] += int((coded == UNK).sum())
            who.append(at[~empty])
            when.append(dates[~empty])
            what.append(coded[~empty])
        if rows and counts["others"] == rows:
            raise ValueError(_NOBODY.format(rows))
        person, date, coded = np.concatenate(who), np.concatenate(when), np.concatenate(what)
        order = np.lexsort((date, person))  # stable: ties keep the order of tables and rows
        person, date, coded = person[order], date[order], coded[order]
        if numeric:
            since = np.floor(date - schema.reference_date).astype(int) + 1
            ages = (date - births[person]) / schema.units_per_year
        else:
            day = np.timedelta64(1, "D")
            since = np.floor((date - schema.reference_date.to_datetime64()) / day).astype(int) + 1
            ages = (date - births[person]) / day / 365.25
        if (since < 1).any():
            first = int((since < 1).argmax())
            raise ValueError(
                f"{int((since < 1).sum())} events lie before reference_date={schema.reference_date}, the first is of "
                f"person {ids[person[first]]!r}; take an earlier reference date, or remove them"
            )
        opening = [[self._ids.get(w, UNK) for w in self._background(people, name)] for name in schema.background]
        if schema.birth_tokens:
            months = births.astype("datetime64[M]").astype(int)
            opening.append([self._ids.get(f"MONTH_{m % 12 + 1}", UNK) for m in months])
            opening.append([self._ids.get(f"YEAR_{m // 12 + 1970}", UNK) for m in months])
        ends = np.searchsorted(person, np.arange(len(ids) + 1))
        sentences = [tuple(t for t in row if t >= 0) for row in coded.tolist()]
        since, ages = since.tolist(), ages.tolist()
        made = [
            Document(
                who_is, tuple(part[i] for part in opening), tuple(sentences[a:b]), tuple(since[a:b]), tuple(ages[a:b])
            )
            for i, (who_is, a, b) in enumerate(zip(ids, ends[:-1].tolist(), ends[1:].tolist(), strict=True))
        ]
        report = EncodingReport(
            people=len(made),
            people_without_events=sum(not d.events for d in made),
            events=len(sentences),
            at_or_after_cutoff=counts["late"],
            other_people=counts["others"],
            empty=counts["empty"],
            duplicates=counts["duplicates"],
            out_of_order=counts["unsorted"],
            unknown_tokens=counts["unknown"] + sum(part.count(UNK) for part in opening),
            outside_bins=counts["outside"],
        )
        return Documents(made, report)

    # --- model inputs

    def encode(
        self, document: Document, max_length: int | None = None
    ) -> dict[str, Float[Tensor, "4 S"] | Bool[Tensor, " S"]]:
        """Model inputs of one document.

        Args:
            document: from ``documents``.
            max_length: S; longer documents keep their most recent events, shorter ones are padded. The length of the
                document if not given.

        Returns:
            ``input_ids`` (4, S), float32: tokens, absolute positions, ages in years, segments; and ``padding_mask``
            (S,), true where there is a token.
        """
        if max_length is not None:
            document = document.clip(max_length)
        length = len(document)
        ids = torch.zeros(4, max_length or length)
        ids[:, :length] = torch.from_numpy(layout(document))
        return {"input_ids": ids, "padding_mask": torch.arange(ids.shape[1]) < length}

    def decode(self, input_ids: Shaped[Tensor, "*any"] | Sequence[int]) -> list[list[str]]:
        """Sentences of tokens; padding is left out.

        Args:
            input_ids: tokens (S,), or the whole (4, S).

        Raises:
            ValueError: for an id outside the vocabulary.
        """
        given = torch.as_tensor(input_ids)
        ids = (given[0] if given.ndim == 2 else given).long().tolist()
        wrong = [i for i in ids if not 0 <= i < len(self.tokens)]
        if wrong:
            raise ValueError(f"id {wrong[0]} is outside the vocabulary of {len(self.tokens)} tokens")
        sentences: list[list[str]] = [[]]
        for i in ids:
            if i == PAD:
                continue
            sentences[-1].append(self.tokens[i])
            if i == SEP:
                sentences.append([])
        return [sentence for sentence in sentences if sentence]

    def id_of(self, token: str) -> int:
        """Id of a token.

        Raises:
            ValueError: when there is none; the nearest are named.
        """
        if token not in self._ids:
            import difflib

            near = difflib.get_close_matches(token, self.tokens, 3)
            raise ValueError(f"no token {token!r} in the vocabulary{f'; did you mean {near}?' if near else ''}")
        return self._ids[token]

    @property
    def vocab_size(self) -> int:
        """Tokens."""
        return len(self.tokens)

    @property
    def background_length(self) -> int:
        """As the schema's."""
        return self.schema.background_length

    # --- files

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``event_tokenizer.json`` into a folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        plain = {
            "schema": self.schema.to_dict(),
            "tokens": self.tokens,
            "categories": self.categories,
            "bins": self.bins,
        }
        (Path(folder) / FILE).write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> EventTokenizer:
        """Read what ``save_pretrained`` wrote.

        Raises:
            ValueError: for a folder without the file, or a file that is damaged.
        """
        path = Path(folder) / FILE
        if not path.exists():
            raise ValueError(f"{folder} has no {FILE}; save_pretrained writes it")
        plain = json.loads(path.read_text(encoding="utf-8"))
        absent = {"schema", "tokens", "categories", "bins"} - set(plain)
        if absent:
            raise ValueError(f"{path} lacks {sorted(absent)}; it was not written by save_pretrained")
        if tuple(plain["tokens"][: len(GENERAL_TOKENS)]) != GENERAL_TOKENS:
            raise ValueError(f"{path} does not begin with the general tokens; it was not written by save_pretrained")
        made = cls(EventSchema.from_dict(plain["schema"]))
        made.bins = plain["bins"]
        made._set(plain["tokens"], plain["categories"])
        return made

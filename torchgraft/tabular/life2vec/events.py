"""What dated event tables mean, and the documents that are made of them.

A document is ``[CLS] background [SEP] event [SEP] event [SEP] ...``, the events of one person in order of time.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np

__all__ = [
    "GENERAL_TOKENS",
    "Document",
    "Documents",
    "EncodingReport",
    "EventSchema",
    "EventSource",
    "check_disjoint",
    "split_people",
]

GENERAL_TOKENS = (
    "[PAD]", "[CLS]", "[SEP]", "[MASK]", "[PLCH0]", "[PLCH1]", "[PLCH2]", "[PLCH3]", "[PLCH4]", "[UNK]",
)  # fmt: skip
PAD, CLS, SEP, MASK, UNK = 0, 1, 2, 3, 9
SEGMENTS = (2, 3, 1)


def _names(given: Sequence[str], what: str) -> tuple[str, ...]:
    # the letters of a text and the keys of a mapping would pass for names
    if isinstance(given, str):
        raise TypeError(f"{what} must be a sequence of names, got the text {given!r}; write ({given!r},)")
    if isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise TypeError(f"{what} must be a sequence of names, which are text, got {given!r}")
    return tuple(given)


def _whole(value: Any, what: str) -> int:
    """Python's own, which JSON can hold where it cannot hold numpy's."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{what} must be a whole number, got {value!r}") from None


@dataclass(frozen=True)
class EventSource:
    """One kind of event, one table.

    Args:
        fields: columns whose values become tokens, in the order of the vocabulary.
        binned: columns of numbers, and in how many quantile bins of the training people each is cut.
        first_characters: how many characters of a code are kept, such as 3 of an ICD-10 diagnosis.

    Example:
        >>> EventSource(("diagnosis", "income"), binned={"income": 100}, first_characters={"diagnosis": 3}).fields
        ('diagnosis', 'income')
    """

    fields: Sequence[str]
    binned: Mapping[str, int] = field(default_factory=dict)
    first_characters: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "fields", _names(self.fields, "fields"))
        if not self.fields:
            raise ValueError("fields is empty; an event needs at least one column that becomes a token")
        for name, given in (("binned", self.binned), ("first_characters", self.first_characters)):
            unknown = sorted(set(given) - set(self.fields))
            if unknown:
                raise ValueError(f"{name} names the unknown field {unknown[0]!r}; the fields are {list(self.fields)}")
            given = {key: _whole(n, f"{name} of {key!r}") for key, n in given.items()}
            object.__setattr__(self, name, given)
            small = {key: n for key, n in given.items() if n < (2 if name == "binned" else 1)}
            if small:
                raise ValueError(f"{name} wants {'at least 2 bins' if name == 'binned' else 'at least 1'}, got {small}")


@dataclass(frozen=True)
class EventSchema:
    """What the tables mean.

    Dates are timestamps, or plain numbers in any unit (then ``units_per_year`` says how many make a year).

    Args:
        sources: name of each event table, and its fields.
        reference_date: position 1; no event may lie before it.
        background: columns of the people's table that open every document, in this order (origin and sex in the
            paper).
        background_binned: which of them are numbers, and in how many quantile bins they are cut.
        person, date, birth: names of the columns.
        birth_tokens: put month and year of birth behind the background, as the paper does; needs timestamps.
        min_count: in how many training people a value of a field must occur to become a token; the paper takes 1000.
        units_per_year: of dates that are numbers.

    Raises:
        ValueError: for fields without a table, the same name for two fields, or a reference date that is no date or has
            a time zone.
        TypeError: for a text where a sequence of names belongs, names that are no text, and counts that are not whole.

    Example:
        >>> schema = EventSchema({"health": EventSource(("diagnosis",))}, "2008-01-01", background=("sex",))
        >>> schema.background_length
        3
    """

    sources: Mapping[str, EventSource]
    reference_date: Any
    background: Sequence[str] = ()
    background_binned: Mapping[str, int] = field(default_factory=dict)
    person: str = "person_id"
    date: str = "date"
    birth: str = "birthday"
    birth_tokens: bool = True
    min_count: int = 1
    units_per_year: float = 365.25

    def __post_init__(self) -> None:
        if not isinstance(self.sources, Mapping):
            raise TypeError(f"sources must map names of tables to their fields, got {self.sources!r}")
        sources = {
            name: given if isinstance(given, EventSource) else EventSource(given)
            for name, given in self.sources.items()
        }
        object.__setattr__(self, "sources", sources)
        object.__setattr__(self, "background", _names(self.background, "background"))
        if not sources:
            raise ValueError("sources is empty; name at least one event table and its fields")
        names = [name for source in sources.values() for name in source.fields] + list(self.background)
        # tokens carry the name in capitals
        capitals = [name.upper() for name in names] + (["MONTH", "YEAR"] if self.birth_tokens else [])
        twice = sorted({name for name in names if capitals.count(name.upper()) > 1})
        if twice:
            raise ValueError(
                f"field {twice[0]!r} occurs twice, in capitals or as the birth's; its tokens could not be told apart, "
                "rename one column"
            )
        unknown = sorted(set(self.background_binned) - set(self.background))
        if unknown:
            raise ValueError(f"background_binned names {unknown[0]!r}; background is {list(self.background)}")
        object.__setattr__(self, "min_count", _whole(self.min_count, "min_count"))
        bins = {key: _whole(n, f"background_binned of {key!r}") for key, n in self.background_binned.items()}
        object.__setattr__(self, "background_binned", bins)
        small = {key: n for key, n in bins.items() if n < 2}
        if small:
            raise ValueError(f"background_binned wants at least 2 bins, got {small}")
        if self.min_count < 1 or not self.units_per_year > 0:
            raise ValueError(
                f"min_count must be at least 1 and units_per_year positive, got {self.min_count}, {self.units_per_year}"
            )
        object.__setattr__(self, "reference_date", moment(self.reference_date, "reference_date"))
        if self.birth_tokens and isinstance(self.reference_date, float):
            raise ValueError("birth_tokens needs timestamps; with numbers as dates pass birth_tokens=False")

    @property
    def background_length(self) -> int:
        """Tokens between [CLS] and the first [SEP]; a model's ``background_length`` must be the same."""
        return len(self.background) + (2 if self.birth_tokens else 0)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain["sources"] = {
            name: {
                "fields": list(s.fields),
                "binned": dict(s.binned),
                "first_characters": dict(s.first_characters),
            }
            for name, s in self.sources.items()
        }
        plain["background"], plain["background_binned"] = list(self.background), dict(self.background_binned)
        if not isinstance(self.reference_date, float):
            plain["reference_date"] = self.reference_date.isoformat()
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> EventSchema:
        """Back from ``to_dict``."""
        sources = {name: EventSource(**given) for name, given in plain["sources"].items()}
        return cls(**{**plain, "sources": sources, "background": tuple(plain["background"])})


def moment(value: Any, name: str) -> Any:
    """A float, or a pandas Timestamp."""
    if isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
        return float(value)
    import pandas

    try:
        found = pandas.Timestamp(value)
    except (TypeError, ValueError):
        found = pandas.NaT
    if found is pandas.NaT:
        raise ValueError(f"{name} must be a date or a number, got {value!r}")
    if found.tz is not None:
        raise ValueError(f"{name} must have no time zone, got {value!r}; dates of tables have none either")
    return found


@dataclass(frozen=True)
class Document:
    """The events of one person, as token ids.

    Attributes:
        person: id.
        background: ids of the background sentence.
        events: ids of each event, in order of time.
        positions: absolute position of each event, whole units since the reference date, plus 1.
        ages: age in years at each event.
        label: what is to be predicted, if anything.
        skipped: events that ``clip`` has left out before the first; segments go on counting from them.
    """

    person: Any
    background: tuple[int, ...]
    events: tuple[tuple[int, ...], ...]
    positions: tuple[int, ...]
    ages: tuple[float, ...]
    label: Any = None
    skipped: int = 0

    def __len__(self) -> int:
        """Tokens, special ones included."""
        return 2 + len(self.background) + sum(len(event) + 1 for event in self.events)

    def pick(self, keep: Sequence[int]) -> Document:
        """The events with these indices, in this order."""
        return dataclasses.replace(
            self,
            events=tuple(self.events[i] for i in keep),
            positions=tuple(self.positions[i] for i in keep),
            ages=tuple(self.ages[i] for i in keep),
        )

    def clip(self, max_length: int) -> Document:
        """The most recent events that fit into ``max_length`` tokens behind the background.

        Raises:
            ValueError: when not even the last event fits.
        """
        room = max_length - 2 - len(self.background)
        kept = 0
        for event in reversed(self.events):
            room -= len(event) + 1
            if room < 0:
                break
            kept += 1
        if self.events and not kept:
            raise ValueError(
                f"max_length={max_length} does not hold the background and the last event of person {self.person!r}, "
                f"which need {3 + len(self.background) + len(self.events[-1])} tokens"
            )
        cut = len(self.events) - kept
        return dataclasses.replace(self.pick(range(cut, len(self.events))), skipped=self.skipped + cut) if cut else self


@dataclass(frozen=True)
class EncodingReport:
    """What became of the rows of the tables; nothing leaves them without being counted here.

    Attributes:
        people: documents made.
        people_without_events: documents of the background alone.
        events: events in documents.
        at_or_after_cutoff: rows left out because of the cut-off.
        other_people: rows left out because their person is not in the people's table.
        empty: rows left out because all their fields are missing.
        duplicates: rows equal to an earlier one in all fields, person and date; kept, unless dropping was asked for.
        out_of_order: rows dated before the row above them of the same person and table; sorted, ties in table order.
        unknown_tokens: values without a token of their own, written as [UNK].
        outside_bins: numbers beyond the training range, put into the end bins.
    """

    people: int
    people_without_events: int
    events: int
    at_or_after_cutoff: int
    other_people: int
    empty: int
    duplicates: int
    out_of_order: int
    unknown_tokens: int
    outside_bins: int


class Documents(Sequence[Document]):
    """Documents and the report on their making; a dataset for ``torch.utils.data`` and ``transformers.Trainer``.

    Attributes:
        report: an ``EncodingReport``.
    """

    def __init__(self, items: Sequence[Document], report: EncodingReport) -> None:
        self.items, self.report = tuple(items), report

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> Documents: ...
    def __getitem__(self, index: int | slice) -> Document | Documents:
        if isinstance(index, slice):
            return Documents(self.items[index], self.report)
        return self.items[index]

    def __iter__(self) -> Iterator[Document]:
        return iter(self.items)

    @property
    def people(self) -> list[Any]:
        """Ids, in order."""
        return [document.person for document in self.items]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, (N,)."""
        return np.array([len(document) for document in self.items])

    def select(self, people: Any) -> Documents:
        """The documents of these ids, in the order of the ids.

        Raises:
            ValueError: for an id that has no document.
        """
        places = {document.person: document for document in self.items}
        absent = [person for person in people if person not in places]
        if absent:
            raise ValueError(f"{len(absent)} ids have no document, the first is {absent[0]!r}")
        return Documents([places[person] for person in people], self.report)

    def with_labels(self, labels: Mapping[Any, Any]) -> Documents:
        """The same documents with ``labels[person]``.

        Raises:
            ValueError: for a person without a label.
        """
        absent = [document.person for document in self.items if document.person not in labels]
        if absent:
            raise ValueError(f"{len(absent)} people have no label, the first is {absent[0]!r}; select those with one")
        return Documents([dataclasses.replace(d, label=labels[d.person]) for d in self.items], self.report)

    def clipped(self, max_length: int) -> dict[str, int]:
        """How many people and events lose something when documents are cut to ``max_length`` tokens."""
        lost = [len(d.events) - len(d.clip(max_length).events) for d in self.items]
        return {"people": sum(n > 0 for n in lost), "events": sum(lost)}


def check_disjoint(**parts: Any) -> None:
    """Refuse a split in which somebody is on two sides.

    Args:
        parts: name of each side and its ids.

    Raises:
        ValueError: when two sides share an id, or one side names an id twice.

    Example:
        >>> check_disjoint(train=[1, 2], test=[3])
    """
    found = {name: list(ids) for name, ids in parts.items()}
    names = list(found)
    for i, name in enumerate(names):
        if len(set(found[name])) < len(found[name]):
            raise ValueError(f"{name} names some ids twice; a split is made of people, not of events")
        for other in names[i + 1 :]:
            both = sorted(set(found[name]) & set(found[other]), key=str)
            if both:
                raise ValueError(
                    f"{len(both)} ids are in {name} and in {other}, the first is {both[0]!r}; split by person"
                )


def split_people(people: Iterable[Any], shares: Sequence[float], seed: int = 0) -> list[list[Any]]:
    """Shuffle ids and cut them into parts of these shares.

    Args:
        people: ids, each once.
        shares: of the parts, summing to 1.
        seed: of the order.

    Raises:
        ValueError: for repeated ids and shares that do not sum to 1.

    Example:
        >>> [len(part) for part in split_people(range(20), (0.7, 0.15, 0.15))]
        [14, 3, 3]
    """
    ids = list(people)
    check_disjoint(people=ids)
    if not shares or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"shares must be at least 0 and sum to 1, got {tuple(shares)}")
    order = np.random.default_rng(seed).permutation(len(ids))
    ends = np.round(np.cumsum(shares) * len(ids)).astype(int)
    return [[ids[i] for i in part] for part in np.split(order, ends[:-1])]


def layout(document: Document, events: Sequence[Sequence[int]] | None = None) -> np.ndarray:
    """Rows of one document without padding, (4, length), float32.

    Args:
        document: what to lay out.
        events: other tokens for its events, one sequence each; dates, ages and segments stay in their places.
    """
    sentences = [(CLS, *document.background, SEP)] + [
        (*event, SEP) for event in (document.events if events is None else events)
    ]
    lengths = [len(sentence) for sentence in sentences]
    segments = (1, *(SEGMENTS[(i + document.skipped) % 3] for i in range(len(sentences) - 1)))
    rows = np.empty((4, sum(lengths)), dtype=np.float32)
    rows[0] = list(itertools.chain.from_iterable(sentences))
    told = np.array([(0, *document.positions), (0, *document.ages), segments], dtype=np.float32)
    rows[1:] = told.repeat(lengths, axis=1)
    return rows

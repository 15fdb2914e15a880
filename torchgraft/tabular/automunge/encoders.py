"""The encodings of the paper, one scikit-learn transformer each."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from torchgraft.tabular.automunge.columns import (
    Column,
    ColumnEncoder,
    Table,
    binary_digits,
    binary_numbers,
    dense_flags,
    flags,
    whole_numbers,
)
from torchgraft.tabular.automunge.overlaps import OverlapKeys, find_overlaps, find_whole_overlaps, longest

__all__ = [
    "BinaryCode",
    "EntryMerger",
    "FrequencyOrdinal",
    "StringOverlapEncoder",
    "SubstringSearchEncoder",
    "TextExtractor",
    "UpperCase",
    "WordHasher",
]

Missing = Literal["ignore", "nan"]
NO_KEY = "0"
"""What entries without a key are consolidated into, as in the official code."""


def _choice(name: str, value: object, allowed: Sequence[object]) -> None:
    if not isinstance(value, Hashable) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _texts(values: Sequence[str | None]) -> np.ndarray:
    """A column of text, objects of shape (entries + 1, 1), missing at the end."""
    out = np.empty((len(values) + 1, 1), dtype=object)
    out[:-1, 0] = values
    return out


def _ordinal(counts: dict[str, int], order: str) -> dict[str, int]:
    """Codes from 1; equally frequent entries in alphabetical order."""
    names = sorted(counts) if order == "alphabetical" else sorted(counts, key=lambda name: (-counts[name], name))
    return {name: code for code, name in enumerate(names, 1)}


def _count(column: Column) -> dict[str, int]:
    return dict(zip(map(str, column.entries), column.counts().tolist(), strict=True))


def _codes(numbers: dict[str, int], entries: Sequence[Any]) -> np.ndarray:
    codes = [0 if entry is None else numbers.get(str(entry), 0) for entry in entries]
    return np.array([*codes, 0], np.int64)[:, None]


def _at_least(name: str, value: object, least: int) -> None:
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if value is not None and (not whole or value < least):  # type: ignore[operator]
        raise ValueError(f"{name} must be a whole number from {least}, or None, got {value!r}")


def _from_codes(numbers: dict[str, int], block: np.ndarray) -> list[str | None]:
    names = {code: name for name, code in numbers.items()}
    return [names.get(code) for code in whole_numbers(block).ravel().tolist()]


@dataclass(frozen=True)
class _Overlaps:
    keys: OverlapKeys
    seen: frozenset[str] | None
    combinations: dict[tuple[int, ...], int]
    ordinal: dict[str, int]
    cut: int


class StringOverlapEncoder(ColumnEncoder):
    """Sub-strings that training entries share (splt, sp15, sp19, sbst, sbs3, spl2, spl5, spl7 of the paper).

    Args:
        mode: which shared sub-strings are keys. ``exclusive`` (splt): none lies inside another. ``concurrent`` (sp15):
            one may, where some entry holds it outside of every longer key. ``whole`` (sbst): whole entries that lie
            inside longer entries.
        output: ``onehot`` (one 0/1 column per key), ``binary`` (the combination of active keys as a binary number;
            the number after the last marks combinations that training did not have), ``replace`` (the longest key in
            the entry, ties by alphabet), ``ordinal`` (that, coded from 1 by frequency; 0 is unseen or missing).
        minsplit: fewest characters of a key; None is 5, and 1 for ``whole``.
        punctuation: ``False`` drops keys that hold one of ``excluded``.
        excluded: characters for that, one each.
        unseen: ``parse`` looks for known keys in entries that were not in training; ``ignore`` gives them none (and
            ``replace`` leaves them as they are).
        consolidate: for ``replace`` and ``ordinal``, entries without a key become the one entry ``"0"``.
        max_keys: keep only so many keys, those in most training entries; a warning says how many were cut.
        feature_names: ``text`` puts keys into column names; ``int`` numbers them, so that names tell no data.
        missing: ``ignore``, or ``nan`` to treat missing as the word nan, which is what the official code does.
        sparse_output: for ``onehot``: True, False, or ``auto``, sparse above 200 columns unless ``set_output`` wants a
            frame.

    The official code calls ``unseen`` test_same_as_train, ``punctuation`` space_and_punctuation, and ``feature_names``
    int_headers.

    0/1 columns are int8, codes int64, ``replace`` gives objects. Column names are those of the official code,
    ``ticket_splt_PC 17``.

    Warns:
        UserWarning: for a column without shared sub-strings, which gives no output columns, and for cut keys.

    Example:
        >>> encoder = StringOverlapEncoder(minsplit=4).fit([["west"], ["north"], ["northeast"], ["southwest"]])
        >>> encoder.get_feature_names_out()
        array(['x0_splt_north', 'x0_splt_west'], dtype=object)
        >>> encoder.transform([["northwest"], ["south"]]).tolist()
        [[1, 1], [0, 0]]
    """

    def __init__(
        self,
        mode: Literal["exclusive", "concurrent", "whole"] = "exclusive",
        output: Literal["onehot", "binary", "replace", "ordinal"] = "onehot",
        minsplit: int | None = None,
        punctuation: bool = True,
        excluded: Sequence[str] = (" ", ",", ".", "?", "!", "(", ")"),
        unseen: Literal["parse", "ignore"] = "parse",
        consolidate: bool = False,
        max_keys: int | None = None,
        feature_names: Literal["text", "int"] = "text",
        missing: Missing = "ignore",
        sparse_output: bool | Literal["auto"] = "auto",
    ) -> None:
        self.mode, self.output, self.minsplit, self.punctuation = mode, output, minsplit, punctuation
        self.excluded, self.unseen, self.consolidate, self.max_keys = excluded, unseen, consolidate, max_keys
        self.feature_names, self.missing, self.sparse_output = feature_names, missing, sparse_output

    def _check(self) -> None:
        super()._check()
        _choice("mode", self.mode, ("exclusive", "concurrent", "whole"))
        _choice("output", self.output, ("onehot", "binary", "replace", "ordinal"))
        _choice("unseen", self.unseen, ("parse", "ignore"))
        _choice("feature_names", self.feature_names, ("text", "int"))
        _choice("sparse_output", self.sparse_output, (True, False, "auto"))
        _at_least("minsplit", self.minsplit, 1)
        _at_least("max_keys", self.max_keys, 1)
        if not isinstance(self.excluded, Iterable) or any(not isinstance(c, str) or len(c) != 1 for c in self.excluded):
            raise ValueError(f"excluded must be single characters, got {self.excluded!r}")
        if self.consolidate and self.output in ("onehot", "binary"):
            raise ValueError(f"consolidate belongs to output='replace' or 'ordinal', got output={self.output!r}")

    def _suffix(self) -> str:
        if self.output == "binary":
            return "sbs3" if self.mode == "whole" else "sp19"
        if self.output == "onehot":
            return {"exclusive": "splt", "concurrent": "sp15", "whole": "sbst"}[self.mode]
        base = "spl5" if self.consolidate else "spl2"
        return f"{base}_ord3" if self.output == "ordinal" else base

    def _find(self, entries: Sequence[str]) -> list[str]:
        excluded = "" if self.punctuation else "".join(self.excluded)
        if self.mode == "whole":
            keys = find_whole_overlaps(entries, minsplit=self.minsplit or 1)
            return [key for key in keys if not set(key) & set(excluded)]
        return find_overlaps(
            entries, minsplit=self.minsplit or 5, concurrent=self.mode == "concurrent", excluded=excluded
        )

    def _learn(self, column: Column) -> _Overlaps:
        entries = [str(entry) for entry in column.entries]
        found = self._find(entries)
        keys, cut = OverlapKeys(found), 0
        if self.max_keys is not None and len(found) > self.max_keys:
            holders = np.bincount([k for entry in entries for k in keys.numbers(entry)], minlength=len(found))
            kept = sorted(np.argsort(-holders, kind="stable")[: self.max_keys].tolist())
            keys, cut = OverlapKeys([found[i] for i in kept]), len(found) - self.max_keys
        seen = frozenset(entries) if self.unseen == "ignore" else None
        state = _Overlaps(keys, seen, {}, {}, cut)
        if self.output == "binary":
            rows = self._active(state, entries)
            distinct = {rows[code] for code in np.unique(column.codes).tolist()}
            # the order of the 0/1 strings, without writing them out
            in_order = sorted(distinct, key=lambda row: [-number for number in row])
            state.combinations.update({row: code for code, row in enumerate(in_order)})
        if self.output == "ordinal":
            replaced = column.mapped(self._replaced(state, entries))
            state.ordinal.update(_ordinal(_count(replaced), "frequency"))
        return state

    def _complaint(self, state: _Overlaps, column: Column) -> str | None:
        if state.cut:
            return f"column {column.name!r}: max_keys={self.max_keys} cut {state.cut} more keys"
        if not state.keys.keys and self.output in ("onehot", "binary"):
            return (
                f"column {column.name!r} gives no output columns: its {len(column.entries)} distinct entries share no "
                "sub-string that is long enough"
            )
        return None

    @staticmethod
    def _active(state: _Overlaps, entries: Sequence[Any]) -> list[tuple[int, ...]]:
        """Numbers of the keys that each entry holds, and none for a missing one at the end."""
        known = ["" if state.seen is not None and str(e) not in state.seen else str(e) for e in entries]
        return [tuple(sorted(state.keys.numbers(entry))) for entry in [*known, ""]]

    def _replaced(self, state: _Overlaps, entries: Sequence[Any]) -> list[str]:
        out = []
        for entry in map(str, entries):
            ignored = state.seen is not None and entry not in state.seen
            key = None if ignored else state.keys.longest(entry)
            out.append(key if key is not None else NO_KEY if self.consolidate else entry)
        return out

    def _encode(self, state: _Overlaps, entries: Sequence[Any]) -> np.ndarray:
        if self.output == "replace":
            return _texts(self._replaced(state, entries))
        if self.output == "ordinal":
            return _codes(state.ordinal, self._replaced(state, entries))
        rows = self._active(state, entries)
        if self.output == "onehot":
            return dense_flags(rows, len(state.keys.keys))
        unknown = len(state.combinations)
        numbers = np.array([state.combinations.get(row, unknown) for row in rows])
        return binary_digits(numbers, self._width(state))

    @staticmethod
    def _width(state: _Overlaps) -> int:
        return len(state.combinations).bit_length() if state.keys.keys else 0

    def _names(self, state: _Overlaps, base: str) -> list[str]:
        if self.output in ("replace", "ordinal"):
            return [base]
        if self.output == "binary":
            return [f"{base}_{i}" for i in range(self._width(state))]
        numbered = self.feature_names == "int"
        return [f"{base}_{i if numbered else key}" for i, key in enumerate(state.keys.keys)]

    def _kinds(self, state: _Overlaps) -> list[tuple[str, int]]:
        if self.output == "replace":
            return [("text", 0)]
        if self.output == "ordinal":
            return [("code", len(state.ordinal) + 1)]
        return [("flag", 2)] * len(self._names(state, ""))

    @property
    def keys_(self) -> list[list[str]]:
        """Keys of each column, in order of discovery."""
        return [list(state.keys.keys) for state in self.states_]

    def _ones(self, state: _Overlaps, entries: Sequence[Any]) -> list[tuple[int, ...]] | None:
        return self._active(state, entries) if self.output == "onehot" else None

    def _transform(self, columns: list[Column]) -> Any:
        if self.output != "onehot" or not self._sparse(self.column_kinds()):
            return super()._transform(columns)
        from scipy import sparse

        blocks = [self.sparse_column(s, c) for s, c in zip(self.states_, columns, strict=True)]
        return sparse.hstack(blocks, format="csr")

    def _decode(self, state: _Overlaps, block: np.ndarray) -> list[str | None]:
        keys = state.keys.keys
        if self.output in ("replace", "ordinal"):
            told = block[:, 0].tolist() if self.output == "replace" else _from_codes(state.ordinal, block)
            without = self.consolidate and NO_KEY not in keys
            return [None if without and entry == NO_KEY else entry for entry in told]
        if self.output == "binary":
            combinations = [*state.combinations, ()]
            numbers = binary_numbers(flags(block)).tolist()
            rows = [combinations[min(number, len(combinations) - 1)] for number in numbers]
        else:
            rows = [tuple(np.flatnonzero(row).tolist()) for row in flags(block)]
        return [longest(keys[number] for number in row) for row in rows]

    def inverse_transform(self, X: Table) -> np.ndarray:
        """What can be told of the entries: the longest active key, objects of shape (rows, input columns).

        None where no key is active, the combination or code is that of unseen entries, or the entry was missing. From
        ``replace`` and ``ordinal`` without ``consolidate``, entries without a key come back as they were.
        """
        return self._invert(X)


class SubstringSearchEncoder(ColumnEncoder):
    """Whether entries hold given terms (srch, src2, src3, src4 of the paper).

    Args:
        search: terms, taken literally. A list inside it counts as one: an entry matches when any of its members does,
            and the column is named by the last.
        case: upper and lower case differ.
        output: ``onehot`` (a 0/1 column per term) or ``ordinal`` (number of the last term that matches, from 1, counted
            with the members of inner lists, which give the number of their last member; 0 is none).
        unseen: ``parse`` searches entries that were not in training too (srch, src3), ``ignore`` does not (src2).
        missing: ``ignore``, or ``nan`` to treat missing as the word nan.

    Raises:
        ValueError: when ``search`` is empty, or names a term twice.

    Example:
        >>> terms = SubstringSearchEncoder(["PC", ["A/4", "A/5"]])
        >>> terms.fit_transform([["PC 17599"], ["A/5 21171"], ["A/4 39886"]]).tolist()
        [[1, 0], [0, 1], [0, 1]]
    """

    def __init__(
        self,
        search: Sequence[str | Sequence[str]] = (),
        case: bool = True,
        output: Literal["onehot", "ordinal"] = "onehot",
        unseen: Literal["parse", "ignore"] = "parse",
        missing: Missing = "ignore",
    ) -> None:
        self.search, self.case, self.output, self.unseen, self.missing = search, case, output, unseen, missing

    def _check(self) -> None:
        super()._check()
        _choice("output", self.output, ("onehot", "ordinal"))
        _choice("unseen", self.unseen, ("parse", "ignore"))
        if isinstance(self.search, str) or not isinstance(self.search, Sequence) or not self.search:
            raise ValueError(f"search must be a list of one or more terms, got {self.search!r}")
        if any(not isinstance(group, (str, list, tuple)) for group in self.search):
            raise ValueError(f"search must hold text, or lists of text, got {self.search!r}")
        terms = [term for group in self._groups() for term in group]
        if any(not isinstance(term, str) or not term for term in terms) or not all(self._groups()):
            raise ValueError(f"search must hold text that is not empty, got {self.search!r}")
        if len(set(terms)) < len(terms):
            raise ValueError(f"search must name each term once, got {self.search!r}")

    def _groups(self) -> list[list[str]]:
        return [[group] if isinstance(group, str) else list(group) for group in self.search]

    def _fold(self, text: str) -> str:
        # upper case, as there: ß and SS are one then, in lower case they are not
        return text if self.case else text.upper()

    def _suffix(self) -> str:
        return "src4" if self.output == "ordinal" else "srch"

    def _codes(self) -> list[int]:
        return np.cumsum([len(group) for group in self._groups()]).tolist()

    def _learn(self, column: Column) -> frozenset[str] | None:
        return frozenset(map(str, column.entries)) if self.unseen == "ignore" else None

    def _encode(self, state: frozenset[str] | None, entries: Sequence[Any]) -> np.ndarray:
        groups = [[self._fold(term) for term in group] for group in self._groups()]
        rows = ["" if state is not None and str(e) not in state else self._fold(str(e)) for e in entries]
        table = np.array([[any(t in row for t in group) for group in groups] for row in [*rows, ""]], np.int8)
        if self.output == "onehot":
            return table
        return (table * np.array(self._codes())).max(1)[:, None].astype(np.int64)

    def _names(self, state: Any, base: str) -> list[str]:
        return [base] if self.output == "ordinal" else [f"{base}_{group[-1]}" for group in self._groups()]

    def _kinds(self, state: Any) -> list[tuple[str, int]]:
        if self.output == "ordinal":
            return [("code", self._codes()[-1] + 1)]
        return [("flag", 2)] * len(self._groups())

    def _decode(self, state: Any, block: np.ndarray) -> list[str | None]:
        names = [group[-1] for group in self._groups()]
        if self.output == "ordinal":
            by_code = dict(zip(self._codes(), names, strict=True))
            return [by_code.get(code) for code in whole_numbers(block).ravel().tolist()]
        return [names[np.flatnonzero(row)[-1]] if row.any() else None for row in flags(block)]

    def inverse_transform(self, X: Table) -> np.ndarray:
        """The term that a row matched, the last where several, None where none; the rest of the entry is lost."""
        return self._invert(X)


class TextExtractor(ColumnEncoder):
    """The longest part of each entry without digits, the leftmost where several are (strn of the paper).

    Args:
        output: ``ordinal`` (codes from 1 by frequency; 0 is unseen, missing, or nothing but digits) or ``text``
            (objects, None for missing and for nothing but digits).
        missing: ``ignore``, or ``nan`` to treat missing as the word nan.

    Example:
        >>> TextExtractor("text").fit_transform([["PC 17599"], ["12ab345cde"], ["373450"]]).ravel().tolist()
        ['PC ', 'cde', None]
    """

    def __init__(self, output: Literal["ordinal", "text"] = "ordinal", missing: Missing = "ignore") -> None:
        self.output, self.missing = output, missing

    def _check(self) -> None:
        super()._check()
        _choice("output", self.output, ("ordinal", "text"))

    def _suffix(self) -> str:
        return "strn_ord3" if self.output == "ordinal" else "strn"

    def _learn(self, column: Column) -> dict[str, int]:
        return _ordinal(_count(column.mapped(_longest_text(str(entry)) for entry in column.entries)), "frequency")

    def _encode(self, state: dict[str, int], entries: Sequence[Any]) -> np.ndarray:
        found = [_longest_text(str(entry)) for entry in entries]
        return _texts(found) if self.output == "text" else _codes(state, found)

    def _complaint(self, state: dict[str, int], column: Column) -> str | None:
        return _without_entries(column)

    def _kinds(self, state: dict[str, int]) -> list[tuple[str, int]]:
        return [("text", 0)] if self.output == "text" else [("code", len(state) + 1)]

    def _decode(self, state: dict[str, int], block: np.ndarray) -> list[str | None]:
        return block[:, 0].tolist() if self.output == "text" else _from_codes(state, block)

    def inverse_transform(self, X: Table) -> np.ndarray:
        """The part that was kept; the rest of the entry is lost."""
        return self._invert(X)


def _longest_text(entry: str) -> str | None:
    pieces, piece = [], ""
    for character in entry:
        if character.isdecimal():
            pieces.append(piece)
            piece = ""
        else:
            piece += character
    # max keeps the first of equally long ones; an empty entry stays what it is
    return max([*pieces, piece], key=len) or (None if entry else "")


class UpperCase(ColumnEncoder):
    """Entries in upper case (UPCS of the paper); missing stays missing.

    Example:
        >>> UpperCase().fit_transform([["Android 7.0"], [None]]).tolist()
        [['ANDROID 7.0'], [None]]
    """

    suffix = "UPCS"

    def _learn(self, column: Column) -> None:
        return None

    def _encode(self, state: None, entries: Sequence[Any]) -> np.ndarray:
        return _texts([str(entry).upper() for entry in entries])

    def _kinds(self, state: Any) -> list[tuple[str, int]]:
        return [("text", 0)]

    def _decode(self, state: None, block: np.ndarray) -> list[str | None]:
        return block[:, 0].tolist()


class EntryMerger(ColumnEncoder):
    """Each of several listed groups of entries becomes one entry, the group's last (aggt of the paper).

    Args:
        groups: lists of entries.

    Raises:
        ValueError: for an entry in two groups, or a group that is empty.

    Example:
        >>> EntryMerger([["Mlle", "Ms", "Miss"]]).fit_transform([["Ms"], ["Mr"]]).tolist()
        [['Miss'], ['Mr']]
    """

    suffix = "aggt"

    def __init__(self, groups: Sequence[Sequence[str]] = ()) -> None:
        self.groups = groups

    def _check(self) -> None:
        outer = isinstance(self.groups, Sequence) and not isinstance(self.groups, str)
        if not outer or any(not isinstance(group, (list, tuple)) or not group for group in self.groups):
            raise ValueError(f"groups must be a list of lists of entries, got {self.groups!r}")
        members = [str(entry) for group in self.groups for entry in group]
        if len(set(members)) < len(members):
            raise ValueError(f"groups must name each entry once, got {self.groups!r}")

    def _learn(self, column: Column) -> dict[str, str]:
        return {str(entry): str(group[-1]) for group in self.groups for entry in group}

    def _encode(self, state: dict[str, str], entries: Sequence[Any]) -> np.ndarray:
        return _texts([state.get(str(entry), str(entry)) for entry in entries])

    def _kinds(self, state: Any) -> list[tuple[str, int]]:
        return [("text", 0)]


class FrequencyOrdinal(ColumnEncoder):
    """Codes from 1, the most frequent entry first (ord3 of the paper), ties by alphabet; 0 is unseen or missing.

    The order is that of frequency: do not read the codes as a quantity.

    Args:
        order: ``frequency``, or ``alphabetical`` (ordl).
        missing: ``ignore`` (code 0), or ``nan`` to count missing as the entry nan.

    Warns:
        UserWarning: for a training column without entries; all its codes are 0.

    Example:
        >>> FrequencyOrdinal().fit([["b"], ["a"], ["b"]]).transform([["a"], ["b"], ["c"], [None]]).ravel()
        array([2, 1, 0, 0])
    """

    def __init__(self, order: Literal["frequency", "alphabetical"] = "frequency", missing: Missing = "ignore") -> None:
        self.order, self.missing = order, missing

    def _check(self) -> None:
        super()._check()
        _choice("order", self.order, ("frequency", "alphabetical"))

    def _suffix(self) -> str:
        return "ord3" if self.order == "frequency" else "ordl"

    def _learn(self, column: Column) -> dict[str, int]:
        return _ordinal(_count(column), self.order)

    def _encode(self, state: dict[str, int], entries: Sequence[Any]) -> np.ndarray:
        return _codes(state, entries)

    def _complaint(self, state: dict[str, int], column: Column) -> str | None:
        return _without_entries(column)

    def _kinds(self, state: dict[str, int]) -> list[tuple[str, int]]:
        return [("code", len(state) + 1)]

    def _decode(self, state: dict[str, int], block: np.ndarray) -> list[str | None]:
        return _from_codes(state, block)

    def inverse_transform(self, X: Table) -> np.ndarray:
        """Entries, exactly; None for code 0 and codes that are not known."""
        return self._invert(X)


class BinaryCode(ColumnEncoder):
    """The entry's place in the alphabet, from 1, as a binary number (1010 of the paper); zeros are unseen or missing.

    Args:
        missing: ``ignore`` (zeros), or ``nan`` to count missing as the entry nan.

    Warns:
        UserWarning: for a training column without entries; it gives one column of zeros.

    Example:
        >>> BinaryCode().fit([["b"], ["a"], ["c"]]).transform([["a"], ["c"], ["d"]]).tolist()
        [[0, 1], [1, 1], [0, 0]]
    """

    suffix = "1010"

    def __init__(self, missing: Missing = "ignore") -> None:
        self.missing = missing

    def _learn(self, column: Column) -> dict[str, int]:
        return _ordinal(_count(column), "alphabetical")

    @staticmethod
    def _width(state: dict[str, int]) -> int:
        return max(1, len(state).bit_length())

    def _encode(self, state: dict[str, int], entries: Sequence[Any]) -> np.ndarray:
        return binary_digits(_codes(state, entries)[:, 0], self._width(state))

    def _names(self, state: dict[str, int], base: str) -> list[str]:
        return [f"{base}_{i}" for i in range(self._width(state))]

    def _complaint(self, state: dict[str, int], column: Column) -> str | None:
        return _without_entries(column)

    def _kinds(self, state: dict[str, int]) -> list[tuple[str, int]]:
        return [("flag", 2)] * self._width(state)

    def _decode(self, state: dict[str, int], block: np.ndarray) -> list[str | None]:
        return _from_codes(state, binary_numbers(flags(block)))

    def inverse_transform(self, X: Table) -> np.ndarray:
        """Entries, exactly; None for zeros and numbers that are not known."""
        return self._invert(X)


def _without_entries(column: Column) -> str | None:
    return None if column.entries else f"column {column.name!r} has no entries: every row is missing"


@dataclass(frozen=True)
class _Hashing:
    vocab: int
    width: int


class WordHasher(ColumnEncoder):
    """Words hashed into a vocabulary (hash, hsh2, hs10 of the paper); unseen words need no training.

    Args:
        vocab: size of the vocabulary; None is twice the number of distinct words, at most 1,024, at least 2.
        alg: ``md5`` or ``sha256``. Python's own hash, the official default, differs from process to process and is
            not offered.
        salt: put before each word.
        words: split at blanks after dropping ``, . ? ! ( )``; ``False`` hashes the entry as it is (hsh2).
        output: ``code`` (numbers from 1, 0 is padding, as many columns as the longest training entry has words) or
            ``binary`` (hs10: a number from 0 in binary, one word only, so ``words`` must be ``False``).
        missing: ``ignore`` (padding, zeros), or ``nan`` to hash missing as the word nan.

    Warns:
        UserWarning: in ``transform``, when words beyond the last column are left out.

    Example:
        >>> WordHasher(vocab=50, salt="s").fit_transform([["a b c"], ["d  e"]]).tolist()
        [[37, 37, 30], [13, 10, 0]]
    """

    def __init__(
        self,
        vocab: int | None = None,
        alg: Literal["md5", "sha256"] = "md5",
        salt: str = "",
        words: bool = True,
        output: Literal["code", "binary"] = "code",
        missing: Missing = "ignore",
    ) -> None:
        self.vocab, self.alg, self.salt, self.words, self.output, self.missing = (
            vocab, alg, salt, words, output, missing,
        )  # fmt: skip

    def _check(self) -> None:
        super()._check()
        _choice("alg", self.alg, ("md5", "sha256"))
        _choice("output", self.output, ("code", "binary"))
        _at_least("vocab", self.vocab, 2)
        if self.output == "binary" and self.words:
            raise ValueError("output='binary' codes whole entries; give words=False")

    def _suffix(self) -> str:
        return "hs10" if self.output == "binary" else "hash" if self.words else "hsh2"

    def _split(self, entry: str) -> list[str]:
        if not self.words:
            return [entry]
        return [word for word in entry.translate(_DROPPED).split(" ") if word]

    def _hash(self, word: str, size: int) -> int:
        digest = hashlib.new(self.alg, (self.salt + word).encode("utf-8", "surrogatepass"), usedforsecurity=False)
        return int(digest.hexdigest(), 16) % size

    def _learn(self, column: Column) -> _Hashing:
        entries = [self._split(str(entry)) for entry in column.entries]
        distinct = len({word for entry in entries for word in entry})
        vocab = self.vocab if self.vocab is not None else max(2, min(2 * distinct, 1024))
        if self.output == "binary":
            return _Hashing(vocab, (vocab - 1).bit_length())
        return _Hashing(vocab, max(1, max(map(len, entries), default=1)))

    def _encode(self, state: _Hashing, entries: Sequence[Any]) -> np.ndarray:
        if self.output == "binary":
            numbers = [self._hash(str(entry), state.vocab) for entry in entries]
            return binary_digits(np.array([*numbers, 0], np.int64), state.width)
        table = np.zeros((len(entries) + 1, state.width), np.int64)
        cut = 0
        for row, entry in enumerate(entries):
            words = self._split(str(entry))
            cut += len(words) > state.width
            codes = [self._hash(word, state.vocab - 1) + 1 for word in words[: state.width]]
            table[row, : len(codes)] = codes
        if cut:
            warnings.warn(
                f"{cut} entries have more than the {state.width} words of the longest training entry; the words after "
                "those are left out",
                UserWarning,
                stacklevel=4,
            )
        return table

    def _names(self, state: _Hashing, base: str) -> list[str]:
        if state.width == 1 and self.output == "code":
            return [base]
        return [f"{base}_{i}" for i in range(state.width)]

    def _kinds(self, state: _Hashing) -> list[tuple[str, int]]:
        return [("flag", 2) if self.output == "binary" else ("code", state.vocab)] * state.width


_DROPPED = str.maketrans("", "", ",.?!()")

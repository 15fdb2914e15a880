"""Reading tables column by column, and the estimator that every encoding is built on."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from typing import Any

import numpy as np
import sklearn
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_array, check_is_fitted, validate_data

__all__ = ["Column", "ColumnEncoder", "Table", "TableEncoder", "binary_digits", "binary_numbers", "read_columns"]

Table = Any
"""A pandas or polars frame, a 2-D array, or a list of rows."""

NOT_TEXT = (bytes, bytearray, list, tuple, dict, set, frozenset, np.ndarray)
WIDE = 200
"""Above so many output columns 0/1 encodings come as a sparse matrix, unless asked otherwise."""
ROWS_AT_ONCE = 1000
"""Sparse rows are made dense so many at a time when they are inverted."""


@dataclass(frozen=True)
class Column:
    """One column: its distinct entries in order of first appearance, and which of them stands in each row.

    Attributes:
        name: of the column.
        entries: text, or numbers where a transform made them; never missing.
        codes: int64 of shape (rows,), number of the entry, -1 where it is missing.
    """

    name: str
    entries: list[Any]
    codes: np.ndarray

    def counts(self) -> np.ndarray:
        """How many rows hold each entry."""
        return np.bincount(self.codes[self.codes >= 0], minlength=len(self.entries))

    def mapped(self, values: Iterable[Any]) -> Column:
        """The column with another value for each entry; None makes rows missing."""
        numbers: dict[Any, int] = {}
        table = [-1 if value is None else numbers.setdefault(value, len(numbers)) for value in values]
        codes = np.array([*table, -1], np.int64)[self.codes]
        return Column(self.name, list(numbers), codes)

    def with_missing_as(self, word: str) -> Column:
        """The column with its missing rows holding a word of their own."""
        if not (self.codes < 0).any():
            return self
        return _column(self.name, [None if c < 0 else self.entries[c] for c in self.codes.tolist()], word)


def _is_missing(value: Any) -> bool:
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    if isinstance(value, (float, np.floating, Decimal)):
        return not math.isfinite(value)
    return isinstance(value, (np.datetime64, np.timedelta64)) and bool(value != value)


def _text(value: Any, column: str) -> str:
    # what has no text of its own would be coded by its address in memory
    kind: Any = type(value)
    addressed = kind.__str__ is object.__str__ and kind.__repr__ is object.__repr__
    if isinstance(value, NOT_TEXT) or addressed:
        raise TypeError(
            f"column {column!r} holds {value!r} of type {type(value).__name__}; entries must be text, numbers, "
            "booleans, dates or missing. Decode bytes, and spread lists over columns of their own"
        )
    if isinstance(value, (complex, np.complexfloating)):
        raise ValueError(f"Complex data not supported: column {column!r} holds {value!r}")
    return str(value)


def _column(name: str, values: Iterable[Any], missing_word: str | None = None) -> Column:
    numbers: dict[str, int] = {}
    codes = []
    for value in values:
        if type(value) is not str:
            if _is_missing(value):
                if missing_word is None:
                    codes.append(-1)
                    continue
                value = missing_word
            else:
                value = _text(value, name)
        codes.append(numbers.setdefault(value, len(numbers)))
    return Column(name, list(numbers), np.array(codes, np.int64))


def _values(series: Any) -> list[Any]:
    """Python values of a pandas or polars series; what str() gives of them must not depend on the precision."""
    if hasattr(series, "cat") and hasattr(series.cat, "codes"):
        known = [*_values(series.cat.categories.to_series()), None]
        return [known[code] for code in series.cat.codes.tolist()]
    kind = str(series.dtype).lower()
    if kind in ("float[pyarrow]", "halffloat[pyarrow]"):
        return list(series.to_numpy("float32" if kind == "float[pyarrow]" else "float16", na_value=np.nan))
    return list(series.to_numpy()) if kind in ("float32", "float16") else series.to_list()


def all_series(frame: Any) -> list[Any]:
    """The columns of a pandas or polars frame, in order, also where two have one name."""
    return [frame.iloc[:, i] if hasattr(frame, "iloc") else frame.to_series(i) for i in range(frame.shape[1])]


def read_columns(estimator: BaseEstimator, X: Table, *, reset: bool) -> list[Column]:
    """Columns of a table, entries as text. Sets or checks the estimator's feature names and their number.

    Raises:
        ValueError: for what is not a table with rows and columns, columns other than in ``fit``, equal names.
        TypeError: for bytes and containers in a cell, naming the column.
    """
    if hasattr(X, "collect"):
        raise TypeError(f"X must be a table in memory, got {type(X).__name__}; call its collect() first")
    if hasattr(X, "columns") and len(getattr(X, "shape", ())) == 2:
        validate_data(estimator, X, reset=reset, skip_check_array=True)
        rows, width = X.shape
        if not rows or not width:
            what = "sample(s)" if not rows else "feature(s)"
            raise ValueError(f"Found array with 0 {what} (shape={X.shape}) while a minimum of 1 is required.")
        names = [str(name) for name in X.columns]
        different(names, "columns of X")
        return _columns(estimator, names, map(_values, all_series(X)), reset)
    if isinstance(X, np.ma.MaskedArray):
        gaps, X = np.ma.getmaskarray(X), X.data.astype(object)
        X[gaps] = None
    if not hasattr(X, "dtype") and not hasattr(X, "__array__") and not hasattr(X, "__array_interface__"):
        # numpy would turn a missing value among strings into the word nan
        X = np.array(X, dtype=object)
    checked = validate_data(estimator, X, reset=reset, dtype=None, ensure_all_finite=False)
    names = list(getattr(estimator, "feature_names_in_", [f"x{i}" for i in range(checked.shape[1])]))
    exact = checked.dtype == object or checked.dtype.kind in "biuU" or checked.dtype == np.float64
    if checked.dtype.kind == "S":
        _text(bytes(checked.flat[0]), names[0])
    values = (checked[:, i].tolist() if exact else list(checked[:, i]) for i in range(len(names)))
    return _columns(estimator, names, values, reset)


def _columns(estimator: Any, names: list[str], columns: Iterable[list[Any]], reset: bool) -> list[Column]:
    values = list(columns)
    if reset:
        estimator._number_types = [_number_type(column) for column in values]
    else:
        values = [_as_numbers(column, kind) for column, kind in zip(values, estimator._number_types, strict=True)]
    return [_column(name, column) for name, column in zip(names, values, strict=True)]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _number_type(values: Iterable[Any]) -> type | None:
    """int where all numbers among the values are whole, float where none is; None for both kinds, or no numbers."""
    kinds = {isinstance(v, (int, np.integer)) for v in values if type(v) is not str and _is_number(v) and v == v}
    return None if len(kinds) != 1 else int if kinds.pop() else float


def _as_numbers(values: list[Any], kind: type | None) -> list[Any]:
    if kind is None:
        return values
    return [
        kind(v) if type(v) is not str and _is_number(v) and math.isfinite(v) and v == kind(v) else v for v in values
    ]


def binary_digits(numbers: np.ndarray, width: int) -> np.ndarray:
    """Binary digits of whole numbers, the highest first, int8 of shape (..., width)."""
    return ((numbers[..., None] >> np.arange(width - 1, -1, -1)) & 1).astype(np.int8)


def binary_numbers(digits: np.ndarray) -> np.ndarray:
    """Whole numbers (...) of their binary digits (..., width)."""
    return digits.astype(np.int64) @ (1 << np.arange(digits.shape[-1] - 1, -1, -1))


class TableEncoder(TransformerMixin, BaseEstimator):
    """What every encoding of this module is to scikit-learn: it takes tables of text with gaps."""

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = tags.input_tags.categorical = tags.input_tags.allow_nan = True
        tags.transformer_tags.preserves_dtype = []
        return tags

    def _sparse(self, kinds: Sequence[tuple[str, int]]) -> bool:
        """Whether ``transform`` gives a sparse matrix: as ``sparse_output`` says, else for many columns of 0/1."""
        if self.sparse_output != "auto":
            return bool(self.sparse_output)
        wanted = getattr(self, "_sklearn_output_config", {}).get("transform", sklearn.get_config()["transform_output"])
        return wanted == "default" and sum(kind == "flag" for kind, _ in kinds) > WIDE


class ColumnEncoder(TableEncoder):
    """An encoding that is learned for every column by itself, and depends on nothing but the entry.

    Work is done once per distinct entry and spread over the rows. A subclass says what it learns from a column
    (``_learn``), what it makes of entries (``_encode``; the row after the last entry is that of a missing one), and
    what its output columns are called (``_names``).

    Every encoding takes pandas and polars frames, arrays and lists of rows; anything that is not text is taken as what
    ``str()`` makes of it, ``1.3`` as ``"1.3"``. Where all numbers of a training column were whole, or none of them was,
    numbers to transform are brought to that first, so that a gap, which makes floats of pandas' whole numbers, does not
    turn ``1`` into the unseen ``1.0``. Missing are ``None``, NaN, infinite numbers, ``pandas.NA``, ``NaT``, and the
    masked cells of a numpy array.
    """

    missing: str
    suffix: str = ""

    def _check(self) -> None:
        """Complain about parameters."""
        if getattr(self, "missing", "ignore") not in ("ignore", "nan"):
            raise ValueError(f"missing must be 'ignore' or 'nan', got {self.missing!r}")

    def _learn(self, column: Column) -> Any:
        raise NotImplementedError

    def _encode(self, state: Any, entries: Sequence[Any]) -> np.ndarray:
        raise NotImplementedError

    def _names(self, state: Any, base: str) -> list[str]:
        return [base]

    def _suffix(self) -> str:
        return self.suffix

    def _complaint(self, state: Any, column: Column) -> str | None:
        """What a user should hear about a training column."""
        return None

    def _kinds(self, state: Any) -> list[tuple[str, int]]:
        """What each output column is: ("code", how many), ("flag", 2), ("number", 0) or ("text", 0)."""
        raise NotImplementedError

    def _seen(self, column: Column) -> Column:
        return column.with_missing_as("nan") if getattr(self, "missing", "ignore") == "nan" else column

    def fit_column(self, column: Column) -> Any:
        """What is learned from one column; for compositions of encodings."""
        return self._learn(self._seen(column))

    def encode_column(self, state: Any, column: Column) -> np.ndarray:
        """Output columns (rows, k) of one column."""
        column = self._seen(column)
        return self._encode(state, column.entries)[column.codes]

    def _ones(self, state: Any, entries: Sequence[Any]) -> list[tuple[int, ...]] | None:
        """For encodings in 0/1 columns: numbers of the columns that hold a 1, per entry and for a missing one."""
        return None

    def sparse_column(self, state: Any, column: Column) -> Any:
        """Output columns as a sparse matrix, never dense on the way where 0/1 columns may be many."""
        from scipy import sparse

        column = self._seen(column)
        rows = self._ones(state, column.entries)
        if rows is None:
            return sparse.csr_matrix(self._encode(state, column.entries)[column.codes])
        ends = np.cumsum([0, *map(len, rows)])
        numbers = np.array([number for row in rows for number in row], np.int64)
        shape = (len(rows), len(self._kinds(state)))
        table = sparse.csr_matrix((np.ones(len(numbers), np.int8), numbers, ends), shape=shape)
        return table[np.where(column.codes < 0, len(rows) - 1, column.codes)]

    def fit(self, X: Table, y: Any = None) -> ColumnEncoder:
        """Learn the encoding of every column of X; ``y`` is not looked at."""
        self._check()
        columns = read_columns(self, X, reset=True)
        states = [self.fit_column(column) for column in columns]
        for state, column in zip(states, columns, strict=True):
            if complaint := self._complaint(state, column):
                warnings.warn(complaint, UserWarning, stacklevel=2)
        names = [f"{column.name}_{self._suffix()}" for column in columns]
        made = [name for state, base in zip(states, names, strict=True) for name in self._names(state, base)]
        different(made)
        self.states_ = states
        return self

    def transform(self, X: Table) -> Any:
        """Encode: an array of shape (rows, output columns), or what ``set_output`` asked for.

        Raises:
            ValueError: for other columns than in ``fit``.
            TypeError: for entries that are no text and have no plain text form.
        """
        check_is_fitted(self, "states_")
        return self._transform(read_columns(self, X, reset=False))

    def _transform(self, columns: list[Column]) -> Any:
        return np.hstack([self.encode_column(s, c) for s, c in zip(self.states_, columns, strict=True)])

    def get_feature_names_out(self, input_features: Iterable[str] | None = None) -> np.ndarray:
        """Names of the output columns, the input column's name first."""
        check_is_fitted(self, "states_")
        given = feature_names_in(self, input_features)
        bases = [f"{name}_{self._suffix()}" for name in given]
        names = [n for state, base in zip(self.states_, bases, strict=True) for n in self._names(state, base)]
        return np.array(names, dtype=object)

    def column_kinds(self) -> list[tuple[str, int]]:
        """What each output column is: ``("code", n)`` for whole numbers below n, ``("flag", 2)``, ``("number", 0)``."""
        check_is_fitted(self, "states_")
        return [kind for state in self.states_ for kind in self._kinds(state)]

    def _decode(self, state: Any, block: np.ndarray) -> list[str | None]:
        """Entries from the output columns of one column."""
        raise NotImplementedError

    def _invert(self, X: Table) -> np.ndarray:
        """Entries (rows, input columns), each from its own block of output columns."""
        check_is_fitted(self, "states_")
        widths = [len(self._names(state, "")) for state in self.states_]
        decoders = [(0, width, partial(self._decode, state)) for state, width in zip(self.states_, widths, strict=True)]
        return invert_blocks(X, self.get_feature_names_out().tolist(), widths, decoders)


def invert_blocks(
    X: Table, names: list[str], widths: Sequence[int], decoders: Sequence[tuple[int, int, Callable[[np.ndarray], Any]]]
) -> np.ndarray:
    """Entries (rows, input columns): each from the part ``(place, width)`` of its block that a decoder reads."""
    columns = [str(name) for name in getattr(X, "columns", names)]
    if columns != names and sorted(columns) == sorted(names):
        X = X[names]
    X = X.to_numpy() if hasattr(X, "to_numpy") else X
    X = check_array(X, accept_sparse="csr", dtype=None, ensure_all_finite=False, ensure_min_features=0)
    if X.shape[1] != sum(widths):
        raise ValueError(f"X must have the {sum(widths)} columns that transform gives, got {X.shape[1]}")
    out = np.empty((X.shape[0], len(widths)), dtype=object)
    starts = np.cumsum([0, *widths[:-1]])
    for i, (start, (place, width, decode)) in enumerate(zip(starts, decoders, strict=True)):
        for row in range(0, len(out), ROWS_AT_ONCE):
            block = X[row : row + ROWS_AT_ONCE, start + place : start + place + width]
            out[row : row + ROWS_AT_ONCE, i] = decode(block.toarray() if hasattr(block, "toarray") else block)
    return out


def whole_numbers(block: np.ndarray) -> np.ndarray:
    """Codes as int64; ValueError for what ``transform`` cannot have given."""
    values = np.asarray(block, float)
    if not np.isfinite(values).all() or (values != np.round(values)).any():
        raise ValueError("X must hold the whole numbers that transform gives")
    return values.astype(np.int64)


def dense_flags(rows: Sequence[tuple[int, ...]], width: int) -> np.ndarray:
    """0/1 columns, int8 of shape (rows, width), from the numbers of those that hold a 1."""
    table = np.zeros((len(rows), width), np.int8)
    for row, active in zip(table, rows, strict=True):
        row[list(active)] = 1
    return table


def flags(block: np.ndarray) -> np.ndarray:
    """0/1 columns as int64; ValueError for anything else."""
    values = np.asarray(block, float)
    if not np.isin(values, (0, 1)).all():
        raise ValueError("X must hold the zeros and ones that transform gives")
    return values.astype(np.int64)


def different(names: Sequence[str], what: str = "output columns") -> None:
    """Raise ValueError where two columns have the same name."""
    twice = [name for name, n in Counter(names).items() if n > 1]
    if twice:
        raise ValueError(f"{what} must have different names, got {twice} more than once; rename the input columns")


def feature_names_in(estimator: Any, given: Iterable[str] | None) -> list[str]:
    """Names of the input columns: those of ``fit``, else those given, else x0, x1, …"""
    known = getattr(estimator, "feature_names_in_", None)
    if given is None:
        return [f"x{i}" for i in range(estimator.n_features_in_)] if known is None else [str(name) for name in known]
    given = list(given)
    if known is not None and given != list(known):
        raise ValueError(f"input_features is not equal to feature_names_in_: got {given}, want {list(known)}")
    if len(given) != estimator.n_features_in_:
        raise ValueError(f"input_features should have length equal to {estimator.n_features_in_}, got {len(given)}")
    return [str(name) for name in given]

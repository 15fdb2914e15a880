"""Reading tables column by column, and the estimator that every encoding is built on."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_array, check_is_fitted, validate_data

__all__ = ["Column", "ColumnEncoder", "Table", "binary_digits", "binary_numbers", "read_columns"]

Table = Any
"""A pandas or polars frame, a 2-D array, or a list of rows."""

NOT_TEXT = (bytes, bytearray, list, tuple, dict, set, frozenset, np.ndarray)


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
    return isinstance(value, (float, np.floating, np.datetime64, np.timedelta64)) and bool(value != value)


def _text(value: Any, column: str) -> str:
    if isinstance(value, NOT_TEXT):
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
    if hasattr(series, "to_list") and str(series.dtype).lower() not in ("float32", "float16"):
        return series.to_list()
    return list(series.to_numpy())


def read_columns(estimator: BaseEstimator, X: Table, *, reset: bool) -> list[Column]:
    """Columns of a table, entries as text. Sets or checks the estimator's feature names and their number.

    Raises:
        ValueError: for what is not a table with rows and columns, columns other than in ``fit``, equal names.
        TypeError: for bytes and containers in a cell, naming the column.
    """
    if hasattr(X, "columns") and len(getattr(X, "shape", ())) == 2:
        validate_data(estimator, X, reset=reset, skip_check_array=True)
        rows, width = X.shape
        if not rows or not width:
            what = "sample(s)" if not rows else "feature(s)"
            raise ValueError(f"Found array with 0 {what} (shape={X.shape}) while a minimum of 1 is required.")
        names = [str(name) for name in X.columns]
        if len(set(names)) < len(names):
            twice = [name for name, n in Counter(names).items() if n > 1]
            raise ValueError(f"columns of X must have different names, got {twice} more than once; rename them")
        series = (X.iloc[:, i] if hasattr(X, "iloc") else X.to_series(i) for i in range(width))
        return [_column(name, _values(one)) for name, one in zip(names, series, strict=True)]
    if not hasattr(X, "dtype") and not hasattr(X, "__array__") and not hasattr(X, "__array_interface__"):
        # numpy would turn a missing value among strings into the word nan
        X = np.array(X, dtype=object)
    checked = validate_data(estimator, X, reset=reset, dtype=None, ensure_all_finite=False)
    names = list(getattr(estimator, "feature_names_in_", [f"x{i}" for i in range(checked.shape[1])]))
    exact = checked.dtype == object or checked.dtype.kind in "biuU" or checked.dtype == np.float64
    if checked.dtype.kind == "S":
        _text(bytes(checked.flat[0]), names[0])
    return [_column(name, checked[:, i].tolist() if exact else list(checked[:, i])) for i, name in enumerate(names)]


def binary_digits(numbers: np.ndarray, width: int) -> np.ndarray:
    """Binary digits of whole numbers, the highest first, int8 of shape (..., width)."""
    return ((numbers[..., None] >> np.arange(width - 1, -1, -1)) & 1).astype(np.int8)


def binary_numbers(digits: np.ndarray) -> np.ndarray:
    """Whole numbers (...) of their binary digits (..., width)."""
    return digits.astype(np.int64) @ (1 << np.arange(digits.shape[-1] - 1, -1, -1))


class ColumnEncoder(TransformerMixin, BaseEstimator):
    """An encoding that is learned for every column by itself, and depends on nothing but the entry.

    Work is done once per distinct entry and spread over the rows. A subclass says what it learns from a column
    (``_learn``), what it makes of entries (``_encode``; the row after the last entry is that of a missing one), and
    what its output columns are called (``_names``).

    Every encoding takes pandas and polars frames, arrays and lists of rows; anything that is not text is taken as what
    ``str()`` makes of it, ``1.3`` as ``"1.3"``. Missing are ``None``, NaN, ``pandas.NA`` and ``NaT``.
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
        X = X.to_numpy() if hasattr(X, "to_numpy") else X.toarray() if hasattr(X, "toarray") else np.asarray(X)
        X = check_array(X, dtype=None, ensure_all_finite=False, ensure_min_features=0)
        widths = [len(self._names(state, "")) for state in self.states_]
        if X.shape[1] != sum(widths):
            raise ValueError(f"X must have the {sum(widths)} columns that transform gives, got {X.shape[1]}")
        ends = np.cumsum(widths)
        blocks = [X[:, end - width : end] for end, width in zip(ends, widths, strict=True)]
        out = np.empty((len(X), len(blocks)), dtype=object)
        for i, (state, block) in enumerate(zip(self.states_, blocks, strict=True)):
            out[:, i] = self._decode(state, block)
        return out

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = tags.input_tags.categorical = tags.input_tags.allow_nan = True
        tags.transformer_tags.preserves_dtype = []
        return tags


def different(names: Sequence[str]) -> None:
    """Raise ValueError where two output columns would have the same name."""
    twice = [name for name, n in Counter(names).items() if n > 1]
    if twice:
        raise ValueError(f"output columns must have different names, got {twice} twice; rename the input columns")


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

"""A whole table in one call, and tensors for a network."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

import numpy as np
import torch
from sklearn.base import BaseEstimator, clone
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import RandomForestRegressor
from sklearn.exceptions import NotFittedError
from sklearn.impute import MissingIndicator, SimpleImputer
from sklearn.pipeline import FeatureUnion, Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, MinMaxScaler, OneHotEncoder, StandardScaler
from torch import Tensor

from torchgraft.tabular.automunge.columns import (
    Column,
    ColumnEncoder,
    Table,
    _column,
    _is_missing,
    _text,
    _values,
    all_series,
    different,
)
from torchgraft.tabular.automunge.overlaps import OverlapKeys, find_overlaps
from torchgraft.tabular.automunge.trees import CATEGORIES, FamilyTree, _known

__all__ = ["TabularTensors", "TabularTorch", "auto_encode"]

NUMBERS = (bool, int, float, Decimal, np.number, np.bool_)
FEW = 10
"""Text columns with at most so many distinct entries are one-hot encoded."""


def auto_encode(
    df: Table,
    target: str | None = None,
    *,
    composite: str = "or19",
    scale: Literal["z-score", "min-max"] = "z-score",
    infill: Literal["mean", "mode", "model"] = "mean",
    missing_marker: bool = True,
) -> ColumnTransformer:
    """Choose an encoding for every column of a table ("automunge under automation"); the result is not fitted yet.

    Numbers and booleans are filled and scaled. Text with at most 10 distinct entries is one-hot encoded (missing is a
    column of its own, unseen entries are zeros); columns of a categorical dtype count as text. Other text is composite
    when at least a tenth of its distinct entries share a sub-string of five characters with another or hold a digit,
    and gets the family tree ``composite``; the rest gets codes by frequency.

    Args:
        df: a pandas or polars frame; only looked at to choose, fit the result on training rows.
        target: column to leave out.
        composite: name of the family tree for composite text.
        scale: of numbers.
        infill: of missing numbers: the column's mean, its most frequent value, or a model that predicts it from the
            other numeric columns (scikit-learn's IterativeImputer with a random forest).
        missing_marker: add columns that mark missing entries; for numbers, of those columns that have some in training.

    Raises:
        TypeError: for what is not a frame, and for columns that are neither numbers nor text, by name.
        ValueError: for a target that is not there, for columns without any entry, by name, for column names that are
            not text or stand twice, and for a table without columns. The encoder raises it for text and infinite values
            in a column of numbers.

    Example:
        >>> import pandas
        >>> df = pandas.DataFrame({"fare": [7.5, 71.0], "sex": ["m", "f"], "survived": [0, 1]})
        >>> auto_encode(df, "survived").fit_transform(df).tolist()
        [[-1.0, 0.0, 1.0], [1.0, 1.0, 0.0]]
    """
    if not hasattr(df, "columns"):
        raise TypeError(f"df must be a pandas or polars frame, got {type(df).__name__}")
    _one_of("scale", scale, ("z-score", "min-max"))
    _one_of("infill", infill, ("mean", "mode", "model"))
    _known(composite, CATEGORIES, "composite")
    names = list(df.columns)
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise ValueError(
            f"columns of df must be named by text, got {wrong}; a ColumnTransformer takes numbers for places"
        )
    different(names, "columns of df")
    if target is not None and target not in names:
        raise ValueError(f"target {target!r} is not a column of df; it has {names}")
    chosen: dict[str, list[str]] = {"number": [], "few": [], "composite": [], "many": []}
    empty: list[str] = []
    unfit: list[str] = []
    for name in names:
        if name == target:
            continue
        kind = _kind(df[name], name)
        if kind in chosen:
            chosen[kind].append(name)
        else:
            (empty if kind == "empty" else unfit).append(name)
    if empty:
        raise ValueError(f"columns {empty} have no entries; drop them, or fill them")
    if not (empty or unfit or any(chosen.values())):
        raise ValueError("df has no columns to encode")
    if unfit:
        raise TypeError(f"columns {unfit} are neither numbers nor text; turn dates into numbers or parts first")
    marked, one_hot = missing_marker, OneHotEncoder(handle_unknown="ignore", sparse_output=False)
    parts = [
        ("number", _numbers(scale, infill, marked), chosen["number"]),
        ("few", make_pipeline(_converter(_to_text), one_hot), chosen["few"]),
        ("composite", FamilyTree(composite, missing_marker=marked), chosen["composite"]),
        ("many", FamilyTree("ord3", missing_marker=marked), chosen["many"]),
    ]
    return ColumnTransformer(
        [(name, encoder, columns) for name, encoder, columns in parts if columns], verbose_feature_names_out=False
    )


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _kind(series: Any, name: str) -> str:
    values = _values(series)
    column: Column = _column(name, values)
    if not column.entries:
        return "empty"
    known = [value for value, code in zip(values, column.codes.tolist(), strict=True) if code >= 0]
    categorical = str(series.dtype).lower().startswith(("categor", "enum"))
    if not categorical and all(isinstance(value, NUMBERS) for value in known):
        return "number"
    if not all(isinstance(value, (str, *NUMBERS)) for value in known):
        return "unfit"
    distinct = len(column.entries)
    if distinct <= FEW:
        return "few"
    digits = sum(any(c.isdecimal() for c in entry) for entry in column.entries)
    keys = OverlapKeys(find_overlaps(column.entries))
    sharing = sum(bool(keys.numbers(entry)) for entry in column.entries)
    return "composite" if 10 * max(digits, sharing) >= distinct else "many"


def _to_text(X: Any) -> np.ndarray:
    """Entries as text, NaN where missing; a frame of any kind looks the same after it."""
    return _converted(X, _text, object)


def _to_numbers(X: Any) -> np.ndarray:
    """Numbers and booleans of any dtype as float64, NaN where missing."""
    return _converted(X, _finite, float)


def _finite(value: Any, column: str) -> float:
    if not isinstance(value, NUMBERS) or _infinite(value):
        raise ValueError(f"column {column!r} must hold finite numbers, as when it was chosen; got {value!r}")
    return float(value)


def _infinite(value: Any) -> bool:
    return isinstance(value, NUMBERS) and math.isinf(value)


def _converted(X: Any, convert: Callable[[Any, str], Any], dtype: type) -> np.ndarray:
    columns = [
        [np.nan if _is_missing(value) and not _infinite(value) else convert(value, name) for value in _values(series)]
        for name, series in zip(X.columns, all_series(X), strict=True)
    ]
    return np.array(columns, dtype=dtype).T


def _converter(function: Callable[[Any], np.ndarray]) -> FunctionTransformer:
    return FunctionTransformer(function, feature_names_out="one-to-one")


def _numbers(scale: str, infill: str, marked: bool) -> BaseEstimator:
    if infill == "model":
        from sklearn.experimental import enable_iterative_imputer  # noqa: F401
        from sklearn.impute import IterativeImputer

        forest = RandomForestRegressor(30, random_state=0)
        imputer = IterativeImputer(forest, max_iter=3, tol=0.1, random_state=0)
    else:
        imputer = SimpleImputer(strategy="mean" if infill == "mean" else "most_frequent")
    scaler = StandardScaler() if scale == "z-score" else MinMaxScaler()
    if not marked:
        return make_pipeline(_converter(_to_numbers), imputer, scaler)
    marker = MissingIndicator(features="missing-only", error_on_new=False)
    both = FeatureUnion(
        [("filled", make_pipeline(imputer, scaler)), ("marker", marker)], verbose_feature_names_out=False
    )
    return make_pipeline(_converter(_to_numbers), both)


@dataclass(frozen=True)
class TabularTensors:
    """Rows for a network; unpacks as ``codes, floats, cardinalities``.

    Attributes:
        codes: int64 (rows, k), for embeddings.
        floats: float32 (rows, f).
        cardinalities: how many codes each of the k columns has; all codes lie below.
    """

    codes: Tensor
    floats: Tensor
    cardinalities: tuple[int, ...]

    def __iter__(self) -> Any:
        return iter((self.codes, self.floats, self.cardinalities))


class TabularTorch:
    """Splits what an encoder makes into codes for ``nn.Embedding`` and numbers for ``nn.Linear``.

    Args:
        encoder: an encoding of this module, a ``ColumnTransformer`` (``auto_encode``) or ``FeatureUnion`` of them, or a
            pipeline that ends in one. Columns of other scikit-learn transformers count as numbers.

    Raises:
        ValueError: for an encoder that leaves text.
        NotFittedError: for ``transform`` before ``fit``.

    Example:
        >>> torch_rows = TabularTorch(FamilyTree("or19")).fit([["PC 17599"], ["A/5 21171"], [None]])
        >>> codes, floats, cardinalities = torch_rows.transform([["PC 17601"], ["A/5 21171"]])
        >>> codes.shape, floats.shape, cardinalities
        (torch.Size([2, 2]), torch.Size([2, 4]), (2, 3))
    """

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder

    def fit(self, X: Table, y: Any = None) -> TabularTorch:
        """Fit a clone of the encoder."""
        self.encoder_ = clone(self.encoder).fit(X, y)
        self.kinds_ = _kinds(self.encoder_)
        if any(kind == "text" for kind, _ in self.kinds_):
            raise ValueError("encoder leaves text; let it end in codes, for instance output='ordinal'")
        return self

    def transform(self, X: Table) -> TabularTensors:
        """Encode rows; every code is below its cardinality."""
        if not hasattr(self, "encoder_"):
            raise NotFittedError("this TabularTorch is not fitted yet; call fit with training rows first")
        table = self.encoder_.transform(X)
        table = table.toarray() if hasattr(table, "toarray") else np.asarray(table)
        is_code = np.array([kind == "code" for kind, _ in self.kinds_])
        codes = torch.from_numpy(table[:, is_code].astype(np.int64))
        floats = torch.from_numpy(table[:, ~is_code].astype(np.float32))
        return TabularTensors(codes, floats, tuple(n for kind, n in self.kinds_ if kind == "code"))

    def fit_transform(self, X: Table, y: Any = None) -> TabularTensors:
        """Both."""
        return self.fit(X, y).transform(X)


def _kinds(encoder: Any) -> list[tuple[str, int]]:
    if isinstance(encoder, (ColumnEncoder, FamilyTree)):
        return encoder.column_kinds()
    if isinstance(encoder, Pipeline):
        return _kinds(encoder.steps[-1][1])
    if isinstance(encoder, FeatureUnion):
        return [kind for _, part in encoder.transformer_list if part != "drop" for kind in _kinds(part)]
    if isinstance(encoder, ColumnTransformer):
        kinds: dict[int, tuple[str, int]] = {}
        for name, part, _ in encoder.transformers_:
            places = encoder.output_indices_[name]
            width = places.stop - places.start
            if width:
                own = _kinds(part) if hasattr(part, "transform") else [("number", 0)] * width
                kinds.update(zip(range(places.start, places.stop), own, strict=True))
        return [kinds[i] for i in range(len(kinds))]
    return [("number", 0)] * len(encoder.get_feature_names_out())

"""Family trees: transformations that follow and branch from one another, and the trees of the paper."""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
from sklearn.utils.validation import check_is_fitted

from torchgraft.tabular.automunge.columns import (
    Column,
    ColumnEncoder,
    Table,
    TableEncoder,
    dense_flags,
    different,
    feature_names_in,
    flags,
    invert_blocks,
    read_columns,
)
from torchgraft.tabular.automunge.encoders import (
    NO_KEY,
    BinaryCode,
    EntryMerger,
    FrequencyOrdinal,
    StringOverlapEncoder,
    SubstringSearchEncoder,
    TextExtractor,
    UpperCase,
    WordHasher,
    _choice,
    _count,
    _ordinal,
)
from torchgraft.tabular.automunge.numbers import NumberExtractor, _scaling, find_number

__all__ = ["CATEGORIES", "FAMILY_TREES", "PRIMITIVES", "FamilyTree"]

Tree = Mapping[str, Sequence[str]]

UPSTREAM = ("parents", "siblings", "auntsuncles", "cousins")
DOWNSTREAM = ("children", "niecesnephews", "coworkers", "friends")
PRIMITIVES = UPSTREAM + DOWNSTREAM
"""Of a family tree: the first four apply to the column, the last four to what a transformation made of it."""
REPLACING = ("parents", "auntsuncles", "children", "coworkers")
WITH_OFFSPRING = ("parents", "siblings", "children", "niecesnephews")


class _OneHot(ColumnEncoder):
    """One 0/1 column per entry, the most frequent first; onht numbers them, text names them."""

    def __init__(self, named: bool = False) -> None:
        self.named = named

    def _learn(self, column: Column) -> list[str]:
        return list(_ordinal(_count(column), "frequency"))

    def _encode(self, state: list[str], entries: Sequence[Any]) -> np.ndarray:
        return dense_flags(self._ones(state, entries), len(state))

    def _ones(self, state: list[str], entries: Sequence[Any]) -> list[tuple[int, ...]]:
        place = {entry: i for i, entry in enumerate(state)}
        known = [place.get(str(entry)) for entry in entries]
        return [*(() if number is None else (number,) for number in known), ()]

    def _decode(self, state: list[str], block: np.ndarray) -> list[str | None]:
        return [state[row.argmax()] if row.any() else None for row in flags(block)]

    def _names(self, state: list[str], base: str) -> list[str]:
        return [f"{base}_{entry if self.named else i}" for i, entry in enumerate(state)]

    def _kinds(self, state: list[str]) -> list[tuple[str, int]]:
        return [("flag", 2)] * len(state)


class _Scaler(ColumnEncoder):
    """A numeric column filled with its mean and scaled (nmbr, mnmx); text is read by ``float``."""

    def __init__(self, scale: str = "z-score") -> None:
        self.scale = scale

    @staticmethod
    def _floats(entries: Sequence[Any]) -> np.ndarray:
        found = []
        for entry in entries:
            try:
                value = float(entry)
            except ValueError:
                value = math.nan
            found.append(value if math.isfinite(value) else math.nan)
        return np.array([*found, math.nan])

    def _learn(self, column: Column) -> tuple[float, float, float]:
        values = self._floats(column.entries)[column.codes]
        known = values[~np.isnan(values)]
        fill = float(known.mean()) if len(known) else 0.0
        # as in the official code, missing rows count as observed at the mean only where a transform filled them
        return fill, *_scaling(known, self.scale)

    def _encode(self, state: tuple[float, float, float], entries: Sequence[Any]) -> np.ndarray:
        fill, shift, scale = state
        values = self._floats(entries)
        return ((np.where(np.isnan(values), fill, values) - shift) / scale)[:, None]

    def _kinds(self, state: Any) -> list[tuple[str, int]]:
        return [("number", 0)]


class _Marker(ColumnEncoder):
    """1 where the column is missing (NArw); for numbers in text, where none is found."""

    def __init__(self, convention: str = "") -> None:
        self.convention = convention

    def _learn(self, column: Column) -> None:
        return None

    def _encode(self, state: None, entries: Sequence[Any]) -> np.ndarray:
        lost = [bool(self.convention) and find_number(str(e), self.convention) is None for e in entries]  # type: ignore[arg-type]
        return np.array([*lost, True], np.int8)[:, None]

    def _kinds(self, state: Any) -> list[tuple[str, int]]:
        return [("flag", 2)]


class _Same(ColumnEncoder):
    """The column as text (excl)."""

    def __init__(self) -> None:
        pass

    def _learn(self, column: Column) -> None:
        return None

    def _encode(self, state: None, entries: Sequence[Any]) -> np.ndarray:
        out = np.empty((len(entries) + 1, 1), dtype=object)
        out[:-1, 0] = list(entries)
        return out

    def _kinds(self, state: Any) -> list[tuple[str, int]]:
        return [("text", 0)]

    def _decode(self, state: None, block: np.ndarray) -> list[str | None]:
        return block[:, 0].tolist()


def _overlaps(**settings: Any) -> Callable[[], StringOverlapEncoder]:
    return lambda: StringOverlapEncoder(**settings, sparse_output=False)


CATEGORIES: dict[str, Callable[[], ColumnEncoder]] = {
    "UPCS": UpperCase,
    "aggt": EntryMerger,
    "excl": _Same,
    "strn": lambda: TextExtractor("text"),
    "ord3": FrequencyOrdinal,
    "ordl": lambda: FrequencyOrdinal("alphabetical"),
    "1010": BinaryCode,
    "onht": _OneHot,
    "text": lambda: _OneHot(named=True),
    "nmbr": _Scaler,
    "mnmx": lambda: _Scaler("min-max"),
    "NArw": _Marker,
    "hash": WordHasher,
    "hsh2": lambda: WordHasher(words=False),
    "hs10": lambda: WordHasher(words=False, output="binary"),
    "srch": SubstringSearchEncoder,
    "src2": lambda: SubstringSearchEncoder(unseen="ignore"),
    "src3": SubstringSearchEncoder,
    "src4": lambda: SubstringSearchEncoder(output="ordinal"),
    "splt": _overlaps(),
    "spl8": _overlaps(unseen="ignore"),
    "sp15": _overlaps(mode="concurrent"),
    "sp16": _overlaps(mode="concurrent", unseen="ignore"),
    "sp19": _overlaps(mode="concurrent", output="binary"),
    "sp20": _overlaps(mode="concurrent", output="binary", unseen="ignore"),
    "sbst": _overlaps(mode="whole"),
    "sbs2": _overlaps(mode="whole", unseen="ignore"),
    "sbs3": _overlaps(mode="whole", output="binary"),
    "sbs4": _overlaps(mode="whole", output="binary", unseen="ignore"),
    "spl5": _overlaps(output="replace", consolidate=True),
    "spl7": _overlaps(output="replace", consolidate=True, minsplit=1),
    "sp10": _overlaps(output="replace", consolidate=True, unseen="ignore"),
    **{name: _overlaps(output="replace") for name in ("spl2", "spl6", "sp11", "sp12", "sp17", "sp18")},
    **{name: _overlaps(output="replace", unseen="ignore") for name in ("spl9", "sp13", "sp14")},
    **dict.fromkeys(("Unht", "Utxt", "Uord", "Uor3", "Uor6", "U101"), UpperCase),
    **{f"or{i}": UpperCase for i in range(15, 24)},
}
"""What each category of the paper does to a column; its tree, if it has one, says what follows."""

_ROOTS = {"nmr": ("numbers", "c"), "nmc": ("commas", "m"), "nmE": ("eu", "U")}
for _root, (_convention, _plain) in _ROOTS.items():
    for _digit in f"{_plain}23456789":
        _unseen = "ignore" if _digit in "456" else "parse"
        CATEGORIES[_root + _digit] = lambda c=_convention, u=_unseen: NumberExtractor(c, unseen=u)  # type: ignore[misc]

FAMILY_TREES: dict[str, dict[str, list[str]]] = {
    **{name: {"parents": [name], "coworkers": ["ord3"]} for name in ("spl2", "spl5", "spl7", "spl9", "sp10")},
    "spl6": {"parents": ["spl6"], "children": ["splt"], "friends": ["ord3"]},
    **{
        name: {"parents": [name], "niecesnephews": [child], "coworkers": ["ord3"]}
        for name, child in {
            "sp11": "spl5", "sp12": "sp11", "sp13": "sp10", "sp14": "sp13", "sp17": "spl5", "sp18": "sp17",
        }.items()
    },
    "strn": {"parents": ["strn"], "coworkers": ["ord3"]},
    "aggt": {"parents": ["aggt"], "coworkers": ["ord3"]},
    **{
        name: {"parents": [name], "coworkers": [code]}
        for name, code in {"Unht": "onht", "Utxt": "text", "Uord": "ordl", "Uor3": "ord3", "U101": "1010"}.items()
    },
    "Uor6": {"parents": ["Uor6"], "children": ["spl6"], "coworkers": ["ord3"]},
    **{f"{root}{digit}": {"parents": [f"{root}{digit}"], "children": ["nmbr"]} for root in _ROOTS for digit in "258"},
    **{f"{root}{digit}": {"parents": [f"{root}{digit}"], "children": ["mnmx"]} for root in _ROOTS for digit in "369"},
    "or15": {"parents": ["or15"], "children": ["sp13"], "coworkers": ["1010"]},
    "or17": {"parents": ["or17"], "children": ["sp14"], "coworkers": ["1010"]},
    **{
        name: {"parents": [name], "niecesnephews": [overlap], "children": [number], "coworkers": ["1010"]}
        for name, overlap, number in [
            ("or16", "sp13", "nmr2"), ("or18", "sp14", "nmr2"), ("or19", "sp13", "nmc8"), ("or20", "sp14", "nmc8"),
            ("or21", "sp17", "nmc8"), ("or22", "sp18", "nmc8"),
        ]
    },
    "or23": {"parents": ["or23"], "coworkers": ["nmcm", "sp19", "ord3"]},
}  # fmt: skip
"""The trees of the paper; a category that is not listed stands alone (``auntsuncles: [itself]``)."""


@dataclass(frozen=True)
class _Node:
    """A transformation in the fitted tree of one column, what it learned, and what follows it."""

    name: str
    encoder: ColumnEncoder
    state: Any
    offspring: tuple[_Node, ...]
    kept: bool

    def read(self, column: Column) -> Column:
        """What the next generation sees."""
        values = self.encoder.encode_column(self.state, replace(column, codes=np.arange(len(column.entries))))[:, 0]
        lost = self.encoder.encode_column(self.state, replace(column, codes=np.array([-1])))[0, 0]
        if not _missing(lost) and (column.codes < 0).any():
            # the transformation gives missing rows a value
            column = Column(
                column.name, [*column.entries, None], np.where(column.codes < 0, len(column.entries), column.codes)
            )
            values = np.append(values.astype(object), lost)
        return column.mapped(None if _missing(v) else v for v in values.tolist())

    def blocks(self, column: Column, sparse: bool) -> Iterator[Any]:
        """Output columns, in the order of the tree."""
        if self.kept:
            made = self.encoder.sparse_column if sparse else self.encoder.encode_column
            yield made(self.state, column)
        if self.offspring:
            seen = self.read(column)
            for node in self.offspring:
                yield from node.blocks(seen, sparse)

    def names(self, base: str) -> Iterator[str]:
        """Names of the output columns."""
        own = f"{base}_{self.name}"
        if self.kept:
            yield from self.encoder._names(self.state, own)
        for node in self.offspring:
            yield from node.names(own)

    def kinds(self) -> Iterator[tuple[str, int]]:
        """Kinds of the output columns."""
        if self.kept:
            yield from self.encoder._kinds(self.state)
        for node in self.offspring:
            yield from node.kinds()


@dataclass(frozen=True)
class _Fitting:
    """What the columns of one fit share: an encoder per category, and what the user should hear."""

    encoders: dict[str, ColumnEncoder]
    complaints: set[str]


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


class FamilyTree(TableEncoder):
    """Transformations that follow and branch from one another, applied to every column.

    Args:
        tree: name of a category (``or15`` … ``or23``, ``sp13``, ``nmc8``, ``ord3``, …; all of ``CATEGORIES``), or a
            tree of your own: a mapping from the eight primitives to lists of categories. ``parents``, ``siblings``,
            ``auntsuncles`` and ``cousins`` apply to the column: the first and third replace it, the other two add to
            it, the first two have offspring. Offspring are the ``children``, ``niecesnephews``, ``coworkers`` and
            ``friends`` of the parent's own tree, in the same four roles.
        trees: other trees for known categories (what a category itself does to a column stays), and a tree for
            ``tree`` where that is a name of your own.
        params: parameters per category, ``{"sp13": {"minsplit": 4}}``. They reach every place where the category
            stands, and no other category: parameters of ``or19`` are not those of its ``sp13``.
        missing_marker: add a column that marks missing entries (NArw; where the tree's first transformation extracts
            numbers, entries without one).
        official_names: names such as ``ticket_or19_nmc8_nmbr``; ``False`` numbers them.
        missing: ``ignore``: missing takes no part in overlaps and has code 0. ``nan``: it is the word nan from the
            first overlap or hash transformation on, as in the official code.
        sparse_output: True, False, or ``auto``: a sparse matrix above 200 columns of 0/1, unless ``set_output`` wants a
            frame or a transformation leaves text.

    The columns are those of the official code under the same names; their order is that of the tree (ours), not of the
    official bookkeeping.

    Raises:
        ValueError: for unknown categories, primitives or parameters, output columns of equal names, a tree without
            transformations, and ``sparse_output=True`` for a tree that leaves text.

    Example:
        >>> table = [["west"], ["north"], ["northeast"], ["southwest"], ["southeast"], ["north north"]]
        >>> tree = FamilyTree("or19", missing_marker=False).fit(table)
        >>> tree.get_feature_names_out()[:3].tolist()
        ['x0_or19_sp13_sp10_ord3', 'x0_or19_sp13_ord3', 'x0_or19_nmc8_nmbr']
        >>> tree.transform([["south"], ["northwest"]])[:, 1].tolist()
        [3.0, 0.0]
    """

    def __init__(
        self,
        tree: str | Tree = "or19",
        trees: Mapping[str, Tree] | None = None,
        params: Mapping[str, Mapping[str, Any]] | None = None,
        missing_marker: bool = True,
        official_names: bool = True,
        missing: Literal["ignore", "nan"] = "ignore",
        sparse_output: bool | Literal["auto"] = "auto",
    ) -> None:
        self.tree, self.trees, self.params = tree, trees, params
        self.missing_marker, self.official_names, self.missing = missing_marker, official_names, missing
        self.sparse_output = sparse_output

    def _tree_of(self, category: str) -> Tree:
        own = (self.trees or {}).get(category)
        return own if own is not None else FAMILY_TREES.get(category, {"auntsuncles": [category]})

    def _root(self) -> Tree:
        return self._tree_of(self.tree) if isinstance(self.tree, str) else self.tree

    def _check(self) -> None:
        _choice("missing", self.missing, ("ignore", "nan"))
        _choice("sparse_output", self.sparse_output, (True, False, "auto"))
        for name, value in (("trees", self.trees), ("params", self.params)):
            if value is not None and not isinstance(value, Mapping):
                raise TypeError(f"{name} must map categories to settings of theirs, got {value!r}")
        if isinstance(self.tree, str):
            _known(self.tree, [*CATEGORIES, *(self.trees or {})], "tree")
        for category in self.trees or {}:
            if category != self.tree:
                _known(category, CATEGORIES, "category in trees")
        for tree in [self._root(), *(self.trees or {}).values()]:
            if not isinstance(tree, Mapping):
                raise TypeError(f"tree must be the name of a category or a mapping, got {type(tree).__name__}")
            for primitive, categories in tree.items():
                _known(primitive, PRIMITIVES, "primitive")
                if isinstance(categories, str) or not isinstance(categories, Sequence):
                    raise TypeError(f"tree[{primitive!r}] must be a list of categories, got {categories!r}")
                for category in categories:
                    _known(category, CATEGORIES, "category")
        if not any(self._root().get(primitive) for primitive in UPSTREAM):
            raise ValueError(f"tree must have transformations in one of {', '.join(UPSTREAM)}, got {self._root()!r}")
        for category, settings in (self.params or {}).items():
            _known(category, CATEGORIES, "category in params")
            if not isinstance(settings, Mapping):
                raise TypeError(f"params[{category!r}] must map parameters to values, got {settings!r}")
            for name in settings:
                # whether the output is sparse is the tree's own question
                known = set(CATEGORIES[category]().get_params()) - {"sparse_output"}
                _known(name, sorted(known), f"parameter of {category!r}")

    def _encoder(self, category: str) -> ColumnEncoder:
        encoder = CATEGORIES[category]()
        settings = dict((self.params or {}).get(category, {}))
        if "missing" in encoder.get_params() and category not in ("ord3", "ordl", "1010"):
            settings.setdefault("missing", self.missing)
        encoder.set_params(**settings)
        encoder._check()
        return encoder

    def _grow(
        self, column: Column, tree: Tree, primitives: Sequence[str], ancestors: tuple[str, ...], fitting: _Fitting
    ) -> list[_Node]:
        """The transformations of one generation, each with its offspring."""
        nodes = []
        # supplements first, then what replaces: those with offspring before those without
        for primitive in (primitives[1], primitives[0], primitives[3], primitives[2]):
            for category in tree.get(primitive, ()):
                if category not in fitting.encoders:
                    fitting.encoders[category] = self._encoder(category)
                encoder = fitting.encoders[category]
                state = encoder.fit_column(column)
                # that a column of words holds no numbers is no news below the first generation
                if (complaint := encoder._complaint(state, column)) and not (
                    ancestors and isinstance(encoder, NumberExtractor)
                ):
                    fitting.complaints.add(complaint)
                node = _Node(category, encoder, state, (), True)
                own = self._tree_of(category)
                if primitive in WITH_OFFSPRING and any(own.get(p) for p in DOWNSTREAM):
                    if category in ancestors:
                        raise ValueError(f"tree has a loop: {' -> '.join([*ancestors, category])}")
                    if len(encoder._names(state, "")) != 1:
                        raise ValueError(
                            f"category {category!r} gives several columns, so nothing can follow it; "
                            f"put it under auntsuncles, cousins, coworkers or friends instead of {primitive}"
                        )
                    offspring = self._grow(node.read(column), own, DOWNSTREAM, (*ancestors, category), fitting)
                    kept = not any(own.get(p) for p in DOWNSTREAM if p in REPLACING)
                    node = replace(node, offspring=tuple(offspring), kept=kept)
                nodes.append(node)
        return nodes

    def fit(self, X: Table, y: Any = None) -> FamilyTree:
        """Learn the whole tree for every column of X; ``y`` is not looked at."""
        self._check()
        root = self._root()
        replaced = any(root.get(p) for p in UPSTREAM if p in REPLACING)
        nodes, fitting = [], _Fitting({}, set())
        for column in read_columns(self, X, reset=True):
            grown = self._grow(column, root, UPSTREAM, (), fitting)
            if not replaced:
                grown.insert(0, _Node("", _Same(), None, (), True))
            if self.missing_marker and not any("NArw" in root.get(p, ()) for p in UPSTREAM):
                first = grown[0].encoder
                marker = _Marker(first.convention if isinstance(first, NumberExtractor) else "")
                grown.insert(0, _Node("NArw", marker, None, (), True))
            nodes.append(tuple(grown))
        for complaint in sorted(fitting.complaints):
            warnings.warn(complaint, UserWarning, stacklevel=2)
        different(self._names(nodes, feature_names_in(self, None)))
        if self.sparse_output is True and any(kind == ("text", 0) for own in nodes for n in own for kind in n.kinds()):
            raise ValueError("sparse_output=True is for numbers, but this tree leaves text; let it end in codes")
        self.nodes_ = nodes
        return self

    def transform(self, X: Table) -> Any:
        """Output columns of every input column, in the order of the tree.

        Returns:
            int64 where all outputs are codes, int8 where all are flags, float64 with numbers among them, objects
            where a transformation leaves text.
        """
        check_is_fitted(self, "nodes_")
        columns = read_columns(self, X, reset=False)
        kinds = self.column_kinds()
        thin = self._sparse(kinds) and ("text", 0) not in kinds
        trees = zip(self.nodes_, columns, strict=True)
        blocks = [block for nodes, column in trees for node in nodes for block in node.blocks(column, thin)]
        if not thin:
            return np.hstack(blocks)
        from scipy import sparse

        return sparse.hstack(blocks, format="csr")

    def get_feature_names_out(self, input_features: Iterable[str] | None = None) -> np.ndarray:
        """Names of the output columns."""
        check_is_fitted(self, "nodes_")
        return np.array(self._names(self.nodes_, feature_names_in(self, input_features)), dtype=object)

    def _names(self, trees: Sequence[Sequence[_Node]], columns: Sequence[str]) -> list[str]:
        out: list[str] = []
        for column, nodes in zip(columns, trees, strict=True):
            names = [made for node in nodes for made in (node.names(column) if node.name else [column])]
            out += names if self.official_names else [f"{column}_{i}" for i in range(len(names))]
        return out

    def column_kinds(self) -> list[tuple[str, int]]:
        """What each output column is: ``("code", n)``, ``("flag", 2)``, ``("number", 0)`` or ``("text", 0)``."""
        check_is_fitted(self, "nodes_")
        return [kind for nodes in self.nodes_ for node in nodes for kind in node.kinds()]

    def inverse_transform(self, X: Table) -> np.ndarray:
        """Entries (rows, input columns), each told from the one block of output columns that tells most.

        Exact where codes (ord3, ordl, 1010, onht, text) were made of the input itself, or the input was kept; in upper
        case below ``UPCS`` and the ``or…`` trees. Otherwise the part of the entry that the overlaps, the search or strn
        know, as their own ``inverse_transform`` gives it. None for missing and unseen entries.

        Raises:
            ValueError: for a tree of nothing but numbers, hashes and markers.
        """
        check_is_fitted(self, "nodes_")
        widths = [sum(1 for node in nodes for _ in node.kinds()) for nodes in self.nodes_]
        return invert_blocks(
            X, self.get_feature_names_out().tolist(), widths, [_decoder(nodes) for nodes in self.nodes_]
        )


_EXACT = (FrequencyOrdinal, BinaryCode, _OneHot, _Same, UpperCase)
_PARTIAL = (StringOverlapEncoder, SubstringSearchEncoder, TextExtractor)


def _decoder(nodes: Sequence[_Node]) -> tuple[int, int, Callable[[np.ndarray], list[Any]]]:
    """Where the columns stand that tell most of the entries, how many they are, and what reads them."""
    found = []
    place = 0

    def look(node: _Node, above: tuple[_Node, ...]) -> None:
        nonlocal place
        if node.kept:
            width = len(node.encoder._kinds(node.state))
            chain = (*above, node)
            if all(isinstance(one.encoder, (*_EXACT, *_PARTIAL)) for one in chain):
                parts = sum(isinstance(one.encoder, _PARTIAL) for one in chain)
                found.append((parts, len(chain), place, width, chain))
            place += width
        for child in node.offspring:
            look(child, (*above, node))

    for node in nodes:
        look(node, ())
    if not found:
        raise ValueError("this tree makes nothing but numbers, hashes and markers, from which entries cannot be told")
    _, _, place, width, chain = min(found, key=lambda one: one[:3])
    return place, width, partial(_told, chain)


def _told(chain: Sequence[_Node], block: np.ndarray) -> list[Any]:
    """What the last of a chain of transformations tells, unless one above it stands for nothing."""
    told = chain[-1].encoder._decode(chain[-1].state, block)
    nothing = any(getattr(node.encoder, "consolidate", False) for node in chain)
    return [None if nothing and entry == NO_KEY else entry for entry in told]


def _known(name: str, allowed: Any, what: str) -> None:
    if not isinstance(name, str) or name not in allowed:
        near = difflib.get_close_matches(str(name), list(allowed), 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(allowed)}"
        raise ValueError(f"unknown {what} {name!r}; {hint}")

"""Sub-strings that several entries share: the search and the look-up under every overlap encoding.

The published search compares every window of every entry with every window of every other. Here all entries lie in one
suffix array, in which the occurrences of a sub-string are neighbours; for every position the array tells how long a
sub-string beginning there also occurs in another entry. A sub-string is a key of

- the **exclusive** mode when none of its occurrences, in any entry, can be made longer and still be shared,
- the **concurrent** mode when that holds for all occurrences within at least one entry.

Both are the published rules, restated: a shared sub-string that can be made longer lies inside a longer key.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["OverlapKeys", "find_overlaps", "find_whole_overlaps"]


@dataclass(frozen=True)
class _SuffixArray:
    """All suffixes of all entries in alphabetical order.

    Attributes:
        order: position of each suffix, (N,).
        entry: number of the entry that a position lies in, (N,).
        room: characters from a position to the end of its entry or to the next excluded character, (N,).
        common: length of the common beginning of suffix i and the one before it, (N,); 0 for the first.
    """

    order: np.ndarray
    entry: np.ndarray
    room: np.ndarray
    common: np.ndarray


def _joined(entries: Sequence[str]) -> str:
    """All entries in one text; what stands after each of them is never looked at."""
    return "".join(f"{entry}\n" for entry in entries)


def _suffix_array(entries: Sequence[str], excluded: str) -> _SuffixArray:
    """By prefix doubling: ranks of the first 1, 2, 4, … characters, until doubling separates nothing more."""
    text = _joined(entries)
    characters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.int64)
    lengths = np.fromiter(map(len, entries), np.int64, len(entries)) + 1
    entry = np.repeat(np.arange(len(entries)), lengths)
    stops = np.isin(characters, [ord(c) for c in excluded])
    stops[np.cumsum(lengths) - 1] = True
    places = np.where(stops, np.arange(len(stops)), len(stops))
    room = np.minimum.accumulate(places[::-1])[::-1] - np.arange(len(stops))

    kept = np.flatnonzero(room)
    ranks = [np.zeros(len(characters) + 1, np.int64)]
    ranks[0][kept] = np.unique(characters[kept], return_inverse=True)[1] + 1
    step, most = 1, int(room.max(initial=0))
    while step < most:
        follows = np.where(room[kept] > step, kept + step, len(characters))
        pairs = ranks[-1][kept] * (len(characters) + 2) + ranks[-1][follows]
        found, inverse = np.unique(pairs, return_inverse=True)
        if len(found) == ranks[-1].max(initial=0):
            break
        fresh = np.zeros_like(ranks[-1])
        fresh[kept] = inverse + 1
        ranks.append(fresh)
        step *= 2
    order = kept[np.argsort(ranks[-1][kept], kind="stable")]
    return _SuffixArray(order, entry, room, _common_beginnings(order, room, ranks))


def _common_beginnings(order: np.ndarray, room: np.ndarray, ranks: Sequence[np.ndarray]) -> np.ndarray:
    """Equal ranks of 2^k characters mean 2^k equal characters, so the length is read off bit by bit."""
    end = len(room)
    room = np.append(room, 0)
    left, right = order[:-1], order[1:]
    limit = np.minimum(room[left], room[right])
    length = np.zeros(len(left), np.int64)
    # once doubling stopped, equal ranks mean equal suffixes; this is the step that says so
    same = ranks[-1][left] == ranks[-1][right]
    for k in range(len(ranks) - 1, -1, -1):
        equal = (ranks[k][left] == ranks[k][right]) & (left != end)
        length += equal * (1 << k)
        left = np.where(equal & (room[left] > 1 << k), left + (1 << k), np.where(equal, end, left))
        right = np.where(equal & (room[right] > 1 << k), right + (1 << k), np.where(equal, end, right))
    return np.append(0, np.where(same, limit, np.minimum(length, limit)))[: len(order)]


def _running_minimum(common: np.ndarray, change: np.ndarray) -> np.ndarray:
    """The minimum since the last suffix of another entry; a far lower level per run restarts it."""
    level = np.cumsum(change) * (int(common.max(initial=0)) + 1)
    return np.minimum.accumulate(common - level) + level


def _shared_lengths(suffixes: _SuffixArray) -> np.ndarray:
    """For each suffix in order, the length of its longest beginning that another entry holds too."""
    owner = suffixes.entry[suffixes.order]
    change = np.append(True, owner[1:] != owner[:-1])

    before = _running_minimum(suffixes.common, change)
    backwards = np.append(suffixes.common[1:], 0)[::-1]
    after = _running_minimum(backwards, np.append(True, change[1:][::-1]))[::-1]
    return np.maximum(before, after)


def _intervals(common: np.ndarray, at: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each ``at``, the interval [first, last) of suffixes that share its first ``length`` characters."""
    levels = [common]
    while 2 << (len(levels) - 1) <= len(common):
        half = 1 << (len(levels) - 1)
        levels.append(np.minimum(levels[-1][:-half], levels[-1][half:]))
    first, last = at.copy(), at + 1
    for k in range(len(levels) - 1, -1, -1):
        size = 1 << k
        # the minimum over common[first - size + 1 .. first], and over common[last .. last + size - 1]
        fits = first - size >= 0
        fits &= levels[k][np.where(fits, first - size + 1, 0)] >= length
        first = np.where(fits, first - size, first)
        fits = last + size <= len(common)
        fits &= levels[k][np.where(fits, last, 0)] >= length
        last = np.where(fits, last + size, last)
    return first, last


def find_overlaps(
    entries: Sequence[str], *, minsplit: int = 5, concurrent: bool = False, excluded: str = ""
) -> list[str]:
    """Keys of the splt (exclusive) and sp15 (concurrent) encodings.

    Args:
        entries: distinct strings, in order of first appearance.
        minsplit: fewest characters of a key.
        concurrent: a key may lie inside another as long as some entry holds it outside of every longer key.
        excluded: characters that no key may hold.

    Returns:
        Keys in order of discovery: the longest first, then by the first entry that holds it, then by where.

    Example:
        >>> find_overlaps(["west", "north", "northeast", "southwest", "southeast", "north north"], minsplit=4)
        ['theast', 'north', 'south', 'west']
    """
    if len(entries) < 2 or not any(entries):
        return []
    suffixes = _suffix_array(entries, excluded)
    if not len(suffixes.order):
        return []
    shared = _shared_lengths(suffixes)
    at_position = np.zeros(len(suffixes.entry), np.int64)
    at_position[suffixes.order] = shared
    previous = np.append(0, at_position[:-1])
    longer_to_the_left = previous > at_position
    candidates = np.flatnonzero((shared >= minsplit) & ~longer_to_the_left[suffixes.order])
    if not len(candidates):
        return []
    length, position = shared[candidates], suffixes.order[candidates]
    first, last = _intervals(suffixes.common, candidates, length)

    groups = [first, length, suffixes.entry[position]] if concurrent else [first, length]
    by_group = np.lexsort([position, *groups[::-1]])
    fresh = np.append(True, np.any([g[by_group][1:] != g[by_group][:-1] for g in groups], 0))
    heads = by_group[fresh]
    found = np.diff(np.append(np.flatnonzero(fresh), len(by_group)))
    if concurrent:
        # occurrences within the entry: its suffixes in the interval
        size = len(suffixes.order) + 1
        owners = suffixes.entry[suffixes.order] * size + np.arange(len(suffixes.order))
        owners.sort()
        base = suffixes.entry[position[heads]] * size
        all_of_them = np.searchsorted(owners, base + last[heads]) - np.searchsorted(owners, base + first[heads])
    else:
        all_of_them = last[heads] - first[heads]
    kept = heads[found == all_of_them]
    text = _joined(entries)
    in_order = kept[np.lexsort([position[kept], -length[kept]])]
    keys = (text[p : p + n] for p, n in zip(position[in_order].tolist(), length[in_order].tolist(), strict=True))
    return list(dict.fromkeys(keys))


def find_whole_overlaps(entries: Sequence[str], *, minsplit: int = 1) -> list[str]:
    """Keys of the sbst encoding: entries that lie inside longer entries, the longest first.

    Args:
        entries: distinct strings, in order of first appearance.
        minsplit: fewest characters of a key.

    Example:
        >>> find_whole_overlaps(["west", "north", "southwest", "north north"])
        ['north', 'west']
    """
    keys = OverlapKeys([entry for entry in entries if len(entry) >= max(minsplit, 1)])
    inside = {key for entry in entries for key in keys.held_by(entry) if key != entry}
    return sorted((entry for entry in entries if entry in inside), key=len, reverse=True)


class OverlapKeys:
    """Looks up which keys an entry holds, in time that hardly depends on how many keys there are.

    Windows of the entry as long as the shortest key are looked up first; where one begins some key, the lengths of
    the keys that begin so are tried.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self.keys = list(keys)
        self._number = {key: i for i, key in enumerate(self.keys)}
        self._window = min(map(len, self.keys), default=0)
        lengths: dict[str, set[int]] = {}
        for key in self.keys:
            lengths.setdefault(key[: self._window], set()).add(len(key))
        self._lengths = {start: tuple(sorted(found)) for start, found in lengths.items()}

    def held_by(self, entry: str) -> set[str]:
        """The keys that occur in an entry."""
        return {self.keys[i] for i in self.numbers(entry)}

    def numbers(self, entry: str) -> set[int]:
        """Numbers of the keys that occur in an entry."""
        found: set[int] = set()
        if not self.keys:
            return found
        size, lengths, number = self._window, self._lengths, self._number
        for start in range(len(entry) - size + 1):
            for length in lengths.get(entry[start : start + size], ()):
                if start + length > len(entry):
                    break
                key = number.get(entry[start : start + length])
                if key is not None:
                    found.add(key)
        return found

    def activations(self, entries: Iterable[str]) -> np.ndarray:
        """1 where an entry holds a key, int8 of shape (entries, keys)."""
        rows = list(entries)
        table = np.zeros((len(rows), len(self.keys)), np.int8)
        for row, entry in enumerate(rows):
            table[row, list(self.numbers(entry))] = 1
        return table

    def longest(self, entry: str) -> str | None:
        """The longest key in an entry, the first in the alphabet where several are; None where there is none."""
        return longest(self.held_by(entry))


def longest(keys: Iterable[str]) -> str | None:
    """The longest of some keys, the first in the alphabet where several are."""
    return min(keys, key=lambda key: (-len(key), key), default=None)

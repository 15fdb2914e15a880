"""The search for shared sub-strings against the published rule written plainly, and against a table of all n-grams."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torchgraft import datasets
from torchgraft.experiments import Case
from torchgraft.tabular.automunge import OverlapKeys, find_overlaps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Shared sub-strings of distinct entries: keys and activations (splt, at least five characters)"
OURS = "torchgraft.tabular.automunge (find_overlaps, OverlapKeys)"
PEER = "the published search, plainly written; a table of all n-grams"

PUBLISHED, NGRAMS = "published search, plainly written", "table of all n-grams"
LEAST = 5
Work = Callable[[], object]


def published_search(entries: Sequence[str]) -> dict[str, list[str]]:
    """Keys and their members by the published rule: every window, the longest first, against keys and all entries.

    The automunge package does the same with one more loop in place of each ``in``, so it is slower than this; it does
    not run under the numpy that torchgraft needs.
    """
    members: dict[str, list[str]] = {}
    for length in range(max(map(len, entries), default=0) - 1, LEAST - 1, -1):
        for entry in entries:
            for start in range(len(entry) - length + 1):
                window = entry[start : start + length]
                if any(window in key for key in members):
                    continue
                if any(window in other for other in entries if other != entry):
                    members[window] = [other for other in entries if window in other]
    return members


def ngram_table(entries: Sequence[str]) -> dict[str, set[int]]:
    """Keys and their members from a dictionary of all windows: what one would write who has memory to spare."""
    holders: dict[str, set[int]] = {}
    for number, entry in enumerate(entries):
        for length in range(LEAST, len(entry) + 1):
            for start in range(len(entry) - length + 1):
                holders.setdefault(entry[start : start + length], set()).add(number)
    shared = {window: found for window, found in holders.items() if len(found) > 1}
    inside = {part for window in shared for part in (window[1:], window[:-1])}
    return {window: found for window, found in shared.items() if window not in inside}


def _ours(entries: Sequence[str]) -> object:
    return OverlapKeys(find_overlaps(entries, minsplit=LEAST)).activations(entries)


def _work(peer: Callable[[Sequence[str]], object], entries: Sequence[str]) -> tuple[Work, Work]:
    return partial(_ours, entries), partial(peer, entries)


def _codes(count: int) -> list[str]:
    """Distinct entries of up to 30 characters, four words each."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=6)) for _ in range(2000)]
    found: dict[str, None] = {}
    while len(found) < count:
        found[" ".join(draw.choices(words, k=4))[:30]] = None
    return list(found)


def cases(quick: bool, device: str) -> list[Case]:
    """Passenger names against the published search, generated entries against the table."""
    if quick:
        return [Case({"entries": 20}, peer_name=name, make=partial(_work, peer, _codes(20))) for name, peer in _PEERS]
    names = datasets.load("titanic").frame["Name"].tolist()
    made = []
    for count in (30, 60, 120, 240):
        make = partial(_work, published_search, names[:count])
        made.append(Case({"what": "passenger names", "entries": count}, peer_name=PUBLISHED, make=make))
    make = partial(_work, ngram_table, names)
    made.append(Case({"what": "passenger names", "entries": len(names)}, peer_name=NGRAMS, make=make))
    for count in (300, 1000, 3000, 10_000):
        make = partial(_work, ngram_table, _codes(count))
        made.append(Case({"what": "four words", "entries": count}, peer_name=NGRAMS, make=make))
    return made


_PEERS = ((PUBLISHED, published_search), (NGRAMS, ngram_table))


def figures(record: Mapping[str, Any]) -> Mapping[str, Figure]:
    """Time against the number of distinct entries."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    ax = figure.subplots()
    series = [
        (PUBLISHED, "passenger names", "#D55E00", "s"), (NGRAMS, "four words", "#009E73", "^"),
    ]  # fmt: skip
    for peer, what, colour, mark in series:
        rows = [c for c in record["cases"] if c["peer"] == peer and c["size"].get("what", what) == what]
        x = [c["size"]["entries"] for c in rows]
        ax.plot(x, [c["peer_s"] for c in rows], marker=mark, color=colour, label=f"{peer} ({what})")
        ax.plot(x, [c["ours_s"] for c in rows], marker=mark, color="#0072B2", label=f"torchgraft ({what})")
    ax.set(xscale="log", yscale="log", xlabel="distinct entries", ylabel="seconds")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{record['device']}, threads: {record['environment']['threads']}", fontsize=10)
    return {"automunge": figure}

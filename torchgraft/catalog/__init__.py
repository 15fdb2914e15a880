"""What exists: one Markdown card per technique, its validated front matter, and search. No torch here.

Example:
    >>> all(card.slug == slug for slug, card in cards().items())
    True
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from torchgraft.catalog.measured import measured_block

__all__ = ["Card", "Hit", "cards", "evidence_folder", "fill", "get", "measured", "read_card", "search"]

CARDS = Path(__file__).parent / "cards"
ROOMS = ("vision", "text", "tabular", "forecasting", "layers", "language", "training", "diffusion", "compression")
EXTRAS = ("text", "diffusion", "vision", "tabular", "peft", "run", "search")
Embed = Callable[[list[str]], Sequence[Sequence[float]]]
BEGIN, END = "<!-- measured -->", "<!-- /measured -->"


@dataclass(frozen=True)
class Card:
    """A technique as the catalog knows it; the fields are the front matter of its Markdown file, ``body`` its text."""

    slug: str
    title: str
    authors: tuple[str, ...]
    venue: str
    year: int
    arxiv: str
    official_code: str
    room: str
    tags: tuple[str, ...]
    takes: str
    summary: str
    public: tuple[str, ...]
    recipe: str
    bench: tuple[str, ...]
    requires: tuple[str, ...]
    body: str

    def summary_record(self) -> dict[str, Any]:
        """The front matter as plain JSON values."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "body"}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}


@dataclass(frozen=True)
class Hit:
    """A card found by ``search``; a higher score is a better match."""

    card: Card
    score: float


def read_card(path: Path) -> Card:
    """Read and check one card.

    Raises:
        ValueError: naming the file and the key that is wrong, and what it should be.
    """
    text = path.read_text(encoding="utf-8")
    parts = re.match(r"\+\+\+\n(.*?)\n\+\+\+\n(.*)", text, re.DOTALL)
    if parts is None:
        raise ValueError(f"{path.name}: a card starts with TOML front matter between two lines of +++")
    try:
        front = tomllib.loads(parts[1])
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path.name}: the front matter is not TOML: {error}") from None
    kinds = {f.name: f.type for f in fields(Card) if f.name != "body"}
    if unknown := sorted(front.keys() - kinds.keys()):
        raise ValueError(f"{path.name}: unknown key {unknown[0]!r}; a card has {', '.join(kinds)}")
    if missing := sorted(kinds.keys() - front.keys()):
        raise ValueError(f"{path.name}: the key {missing[0]!r} is missing")
    values: dict[str, Any] = {}
    for key, kind in kinds.items():
        value = front[key]
        if kind == "tuple[str, ...]":
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                raise ValueError(f"{path.name}: {key} must be a list of strings, got {value!r}")
            values[key] = tuple(value)
        elif kind == "int":
            if type(value) is not int:
                raise ValueError(f"{path.name}: {key} must be a whole number, got {value!r}")
            values[key] = value
        else:
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"{path.name}: {key} must be a string that says something, got {value!r}")
            values[key] = value
    card = Card(**values, body=parts[2].strip() + "\n")
    _check(card, path)
    return card


def _check(card: Card, path: Path) -> None:
    def want(holds: bool, key: str, should: str) -> None:
        if not holds:
            raise ValueError(f"{path.name}: {key} {should}, got {getattr(card, key)!r}")

    want(card.slug == path.stem, "slug", f"must be the file's name, {path.stem!r}")
    want(card.room in ROOMS, "room", f"must be one of {', '.join(ROOMS)}")
    want(1950 <= card.year <= 2100, "year", "must be a year")
    want(re.fullmatch(r"\d{4}\.\d{4,5}|none", card.arxiv) is not None, "arxiv", "must be like 1910.05872, or 'none'")
    want(bool(card.authors), "authors", "must name somebody")
    want(bool(card.public), "public", "must name what a user calls")
    want(all(name.startswith("torchgraft.") for name in card.public), "public", "must be dotted torchgraft names")
    want(set(card.requires) <= set(EXTRAS), "requires", f"must be among {', '.join(EXTRAS)}")
    if card.body.count(BEGIN) != 1 or card.body.count(END) != 1 or card.body.index(BEGIN) > card.body.index(END):
        raise ValueError(f"{path.name}: the text must have one line {BEGIN} and, after it, one line {END}")


@cache
def cards(folder: Path = CARDS) -> Mapping[str, Card]:
    """All cards by slug, in alphabetical order."""
    return {path.stem: read_card(path) for path in sorted(folder.glob("*.md"))}


def get(slug: str, folder: Path = CARDS) -> Card:
    """The card of a technique; hyphens, spaces and capitals do not matter.

    Raises:
        LookupError: naming the nearest technique.
    """
    known = cards(folder)
    name = slug.strip().lower().replace("-", "_").replace(" ", "_")
    if name in known:
        return known[name]
    import difflib

    near = difflib.get_close_matches(name, known, 1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}"
    raise LookupError(f"no technique {slug!r}; {hint}")


_STOP = frozenset(
    [
        "a",
        "an",
        "and",
        "are",
        "as",
        "at",
        "be",
        "by",
        "for",
        "from",
        "i",
        "in",
        "is",
        "it",
        "its",
        "my",
        "of",
        "on",
        "or",
        "so",
        "that",
        "the",
        "to",
        "want",
        "with",
    ]
)


def _words(text: str) -> list[str]:
    # enough of a stemmer for English technical words: layers and layer, shuffled and shuffle, pruning and prune
    ending = r"(?<=\w{3})(ations?|ings?|ers?|ed|es|s|e)$"
    return [re.sub(ending, "", word) for word in re.findall(r"[a-z0-9]+", text.lower()) if word not in _STOP]


def _by_words(query: str, known: Sequence[Card]) -> list[float]:
    """BM25 over the cards, the title, summary and tags counting more than the text."""
    texts = []
    for card in known:
        counts: Counter[str] = Counter()
        for weight, text in (
            (5, f"{card.slug.replace('_', ' ')} {card.title} {' '.join(card.tags)}"),
            (3, f"{card.summary} {card.takes}"),
            (1, card.body.split(BEGIN)[0]),
        ):
            for word in _words(text):
                counts[word] += weight
        texts.append(counts)
    lengths = [sum(counts.values()) for counts in texts]
    usual = sum(lengths) / max(len(lengths), 1)
    scores = [0.0] * len(texts)
    for word in set(_words(query)):
        have = sum(word in counts for counts in texts)
        rarity = math.log(1 + (len(texts) - have + 0.5) / (have + 0.5))
        for index, counts in enumerate(texts):
            count = counts[word]
            scores[index] += rarity * count * 2.2 / (count + 1.2 * (0.25 + 0.75 * lengths[index] / usual))
    return scores


def _by_meaning(
    query: str, known: Sequence[Card], embed: Callable[[list[str]], Sequence[Sequence[float]]]
) -> list[float]:
    texts = [f"{card.title}. {card.summary} {' '.join(card.tags)}" for card in known]
    wanted, *vectors = embed([query, *texts])

    def cosine(a: Sequence[float], b: Sequence[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))

    return [cosine(wanted, vector) for vector in vectors]


def search(
    query: str,
    *,
    room: str | None = None,
    embed: Embed | None = None,
    folder: Path = CARDS,
) -> list[Hit]:
    """Cards that fit a need, best first.

    Args:
        query: words.
        room: only this room.
        embed: texts to vectors, for search by meaning (cosine); without it, by words (BM25).
        folder: of the cards.

    Raises:
        ValueError: for an empty query or an unknown room.
    """
    if not query.strip():
        raise ValueError("query is empty; say what you need in a few words")
    if room is not None and room not in ROOMS:
        raise ValueError(f"room must be one of {', '.join(ROOMS)}, got {room!r}")
    known = [card for card in cards(folder).values() if room in (None, card.room)]
    if not known:
        return []
    scores = _by_words(query, known) if embed is None else _by_meaning(query, known, embed)
    least = 0.0 if embed is None else -1.0
    hits = [Hit(card, score) for card, score in zip(known, scores, strict=True) if score > least]
    return sorted(hits, key=lambda hit: -hit.score)


def evidence_folder() -> Path | None:
    """``evidence/`` of the checkout this package is imported from; ``None`` for an installed package."""
    root = Path(__file__).parents[2]
    return root / "evidence" if (root / "pyproject.toml").exists() else None


def measured(card: Card, evidence: Path) -> str:
    """What the evidence folder says of a card, as the Markdown that stands in it.

    Raises:
        FileNotFoundError: when a record of the card is missing.
    """
    paths = [evidence / f"{card.recipe}.json", *sorted(evidence.glob(f"{card.recipe}-*.json"))]
    records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    benches = [json.loads((evidence / "bench" / f"{name}.json").read_text(encoding="utf-8")) for name in card.bench]
    return measured_block(records, benches)


def fill(slug: str, folder: Path = CARDS, evidence: Path | None = None) -> bool:
    """Write what was measured into a card, between its two marks; whether all of its records are there already."""
    card = get(slug, folder)
    source = evidence if evidence is not None else evidence_folder()
    names = [f"{card.recipe}.json", *(f"bench/{name}.json" for name in card.bench)]
    if source is None or not all((source / name).exists() for name in names):
        return False
    path = folder / f"{card.slug}.md"
    text = path.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{measured(card, source)}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    cards.cache_clear()
    return True

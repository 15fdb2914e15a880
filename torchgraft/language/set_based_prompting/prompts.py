"""Prompts that contain sets: what the user writes, before any token."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

DELIMITERS = ("<|start_2d|>", "<|split_2d|>", "<|end_2d|>")
"""Opens a set, separates two elements, closes the set: the markup of the official data files."""


@dataclass(frozen=True)
class Set:
    """Pieces of text whose order must not matter: options, documents, candidates, few-shot examples.

    Each element is tokenised on its own, so nothing is added between elements: spaces and line breaks that should
    stand there belong into the elements. Equal elements are allowed and all of them count. One element is allowed
    and gives the plain prompt.

    Args:
        elements: at least one text, none of them empty.

    Raises:
        TypeError: an element is no string (a set inside a set has no defined meaning), or a single string is given.
        ValueError: no elements, or an empty one.

    Example:
        >>> Set(["- tea\\n", "- coffee\\n"]).elements
        ('- tea\\n', '- coffee\\n')
    """

    elements: tuple[str, ...]

    def __init__(self, elements: Sequence[str]) -> None:
        if isinstance(elements, str):
            raise TypeError(f"elements must be a list of strings, got the single string {elements!r}")
        elements = tuple(elements)
        for element in elements:
            if not isinstance(element, str):
                raise TypeError(
                    f"elements must be strings, got {type(element).__name__}; a set inside a set has no defined order "
                    "rule, so write the inner one out as text"
                )
            if not element:
                raise ValueError("elements must not be empty: an empty text has no tokens; leave it out")
        if not elements:
            raise ValueError("a set needs at least one element, got none")
        object.__setattr__(self, "elements", elements)


@dataclass(frozen=True)
class SetPrompt:
    """A prompt of text and sets in turn, such as prefix, set, suffix (paper section 3: ``A, S, D``).

    Text parts that follow each other are joined. To be continued or scored, a prompt must end with text: tokens of
    an element see nothing of the other elements.

    Args:
        parts: strings and `Set` objects, with at least one set. Two sets may follow each other.

    Raises:
        TypeError: a part is neither a string nor a `Set`.
        ValueError: there is no set.

    Example:
        >>> prompt = SetPrompt(["Tea or coffee?\\n", Set(["- tea\\n", "- coffee\\n"]), "Answer:"])
        >>> prompt.permuted([1, 0]).text
        'Tea or coffee?\\n- coffee\\n- tea\\nAnswer:'
    """

    parts: tuple[str | Set, ...]

    def __init__(self, parts: Sequence[str | Set]) -> None:
        if isinstance(parts, str):
            raise TypeError(
                "parts must be a list of strings and Set objects, got a single string; "
                "SetPrompt.parse reads a string with delimiters"
            )
        joined: list[str | Set] = []
        for part in parts:
            if not isinstance(part, str | Set):
                raise TypeError(f"parts must be strings and Set objects, got {type(part).__name__}")
            if isinstance(part, str) and joined and isinstance(joined[-1], str):
                joined[-1] += part
            elif part != "":
                joined.append(part)
        if not any(isinstance(part, Set) for part in joined):
            raise ValueError("parts has no Set; a prompt without one is an ordinary prompt, use model.generate")
        object.__setattr__(self, "parts", tuple(joined))

    @classmethod
    def parse(cls, text: str, delimiters: tuple[str, str, str] = DELIMITERS) -> SetPrompt:
        """Read a prompt from text in which sets are marked with ``(start, split, end)`` delimiters.

        Text is kept as it is, spaces included. The official code allows one set in such a text and needs two
        elements; here there may be several sets, of one element or more.

        Raises:
            ValueError: delimiters that are empty or equal, unbalanced or nested ones, an empty element, or no set.

        Example:
            >>> SetPrompt.parse("Pick [a|bc]. Answer:", delimiters=("[", "|", "]")).parts
            ('Pick ', Set(elements=('a', 'bc')), '. Answer:')
        """
        start, split, end = delimiters
        if len({start, split, end}) < 3 or not all(delimiters):
            raise ValueError(f"delimiters must be three different non-empty strings, got {delimiters!r}")
        parts: list[str | Set] = []
        rest = text
        while True:
            before, opened, rest = rest.partition(start)
            for stray in (split, end):
                if stray in before:
                    raise ValueError(f"unbalanced delimiter: {stray!r} outside a set in {before!r}")
            parts.append(before)
            if not opened:
                return cls(parts)
            inside, closed, rest = rest.partition(end)
            if not closed:
                raise ValueError(f"unbalanced delimiter: {start!r} without {end!r} in {inside!r}")
            if start in inside:
                raise ValueError(f"nested set: {start!r} again before {end!r} in {inside!r}; nesting is not defined")
            parts.append(Set(inside.split(split)))

    @property
    def sets(self) -> tuple[Set, ...]:
        """The sets, from left to right."""
        return tuple(part for part in self.parts if isinstance(part, Set))

    @property
    def text(self) -> str:
        """The prompt as one plain text, elements in their present order."""
        return "".join(part if isinstance(part, str) else "".join(part.elements) for part in self.parts)

    def permuted(self, *orders: Sequence[int]) -> SetPrompt:
        """The same prompt with the elements of each set listed in another order.

        Args:
            orders: one order per set; element ``order[k]`` comes to place ``k``.

        Raises:
            ValueError: not one order per set, or one that is no permutation.

        Example:
            >>> SetPrompt([Set(["a", "b", "c"]), "?"]).permuted([2, 0, 1]).text
            'cab?'
        """
        if len(orders) != len(self.sets):
            raise ValueError(f"orders: this prompt has {len(self.sets)} sets, got {len(orders)} orders")
        waiting = iter(orders)
        parts: list[str | Set] = []
        for part in self.parts:
            if isinstance(part, str):
                parts.append(part)
                continue
            order = list(next(waiting))
            _check_order(order, len(part.elements))
            parts.append(Set([part.elements[i] for i in order]))
        return SetPrompt(parts)


def _check_order(order: Sequence[int], size: int) -> None:
    if sorted(order) != list(range(size)):
        raise ValueError(f"orders: {list(order)} is no permutation of 0..{size - 1} (a set of {size})")


Order = tuple[tuple[int, ...], ...]
"""One permutation for each set of a prompt."""


def listing_orders(prompt: SetPrompt, orders: str | int | Sequence[Sequence[int]], seed: int = 0) -> list[Order]:
    """Orders in which to list the sets of a prompt.

    Args:
        prompt: its sets are permuted independently.
        orders: ``"all"``; a number of different random ones; ``"original and reversed"``; or, for a prompt with one
            set, a list of permutations.
        seed: of the random ones.

    Raises:
        ValueError: more random orders than there are, ``"all"`` of more than 5040, lists for several sets, an empty
            list, or one with something that is no permutation.

    Example:
        >>> listing_orders(SetPrompt([Set(["a", "b"]), "?"]), "all")
        [((0, 1),), ((1, 0),)]
    """
    sizes = [len(s.elements) for s in prompt.sets]
    total = math.prod(math.factorial(n) for n in sizes)
    identity = tuple(tuple(range(n)) for n in sizes)
    if orders == "all":
        if total > 5040:
            raise ValueError(f"orders: this prompt has {total} orders; give a number of random ones instead of 'all'")
        return list(itertools.product(*(itertools.permutations(range(n)) for n in sizes)))
    if orders == "original and reversed":
        return [identity, tuple(order[::-1] for order in identity)]
    if isinstance(orders, str):
        raise ValueError(f"orders must be 'all', 'original and reversed', a number or permutations, got {orders!r}")
    if isinstance(orders, int) and not isinstance(orders, bool):
        if not 1 <= orders <= total:
            raise ValueError(f"orders: this prompt has {total} different orders, asked for {orders} random ones")
        return list(itertools.islice(_random_orders(sizes, seed), orders))
    if isinstance(orders, bool) or len(orders) == 0:
        raise ValueError(f"orders must be 'all', 'original and reversed', a number or permutations, got {orders!r}")
    if len(sizes) != 1:
        raise ValueError(f"orders: lists of permutations need a prompt with one set, this one has {len(sizes)}")
    for order in orders:
        _check_order(order, sizes[0])
    return [(tuple(order),) for order in orders]


def _random_orders(sizes: Sequence[int], seed: int) -> Iterator[Order]:
    """Different random orders, without end until all are drawn."""
    draw = random.Random(seed)
    seen: set[Order] = set()
    while True:
        order = tuple(tuple(draw.sample(range(n), n)) for n in sizes)
        if order not in seen:
            seen.add(order)
            yield order


def multiple_choice_prompt(question: str, options: Sequence[str], suffix: str = "Answer: ") -> SetPrompt:
    """A question with its options as a set, written as in the paper's CommonsenseQA and MMLU runs.

    Each option stands in the official "quoted" form, ``"\\n- option" ``: the opening quote, a new line, a dash, the
    option, the closing quote and a space. No letters A, B, C: a label inside an element would carry the order.

    Raises:
        TypeError: ``options`` is a single string.

    Example:
        >>> multiple_choice_prompt("Hot?", ["ice", "fire"]).sets[0].elements
        ('"\\n- ice" ', '"\\n- fire" ')
    """
    if isinstance(options, str):
        raise TypeError(f"options must be a list of strings, got the single string {options!r}")
    return SetPrompt([question + "\n", Set([f'"\n- {option}" ' for option in options]), suffix])

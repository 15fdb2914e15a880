"""Prompts on which channels act, and what heads attend to on them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchgraft.language._access import attention_patterns, tokenized
from torchgraft.language.talking_heads.editing import ChannelEdit

NAMES = (
    "Anna", "Ben", "Carl", "David", "Emma", "Frank", "Grace", "Henry", "Jack", "James", "John", "Kate", "Laura", "Mark",
    "Mary", "Mike", "Paul", "Peter", "Rose", "Sam", "Sarah", "Tom",
)  # fmt: skip
OBJECTS = (
    "apple", "ball", "book", "bottle", "box", "camera", "card", "chair", "clock", "coat", "coin", "cup", "desk", "door",
    "drum", "fish", "flag", "flower", "glass", "guitar", "hammer", "hat", "key", "lamp", "letter", "map", "mirror",
    "paper", "pen", "phone", "picture", "plate", "radio", "ring", "rock", "shirt", "shoe", "sword", "table", "watch",
)  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """A prompt whose continuation is one of some words.

    Attributes:
        text: up to the last token before the answer.
        options: words that could follow, each a single token.
        answer: place of the right one among them.
        ids: token of each option.
        places: for each option the places of its tokens in ``text``, first to last.
    """

    text: str
    options: tuple[str, ...]
    answer: int
    ids: tuple[int, ...]
    places: tuple[tuple[int, ...], ...]


def single_tokens(tokenizer: Any, words: Sequence[str]) -> dict[str, int]:
    """Words that are one token with a space before them, and that token."""
    found = {}
    for word in words:
        ids = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        if len(ids) == 1:
            found[word] = ids[0]
    return found


def _prompt(tokenizer: Any, text: str, options: Sequence[str], answer: int, known: dict[str, int]) -> Prompt:
    tokens = tokenizer(text)["input_ids"]
    ids = tuple(known[word] for word in options)
    places = tuple(tuple(k for k, token in enumerate(tokens) if token == each) for each in ids)
    return Prompt(text, tuple(options), answer, ids, places)


def _enough(known: dict[str, int], count: int, what: str) -> list[str]:
    if len(known) < count:
        raise ValueError(f"the tokenizer has only {len(known)} {what} of one token, and {count} are needed")
    return sorted(known)


class LaundryList:
    """The Laundry List task: things are listed, all but one are mentioned again, and the one that is left is wanted.

    Section 5 of the paper; the wording there is unverified, and this one is ours. Which things, their order, and which
    is left are random.

    Args:
        tokenizer: of the model; words of several tokens are not used.
        n_items: things in a list, at least 2.
        seed: of the draws.
        words: to draw from.

    Raises:
        ValueError: for fewer than two items, or more than there are words of one token.

    Example:
        >>> LaundryList(tokenizer, 3).prompts(1)[0].text  # doctest: +SKIP
        'Mary packed the key, the hat and the cup. Then Mary took out the cup, the key and the'
    """

    def __init__(self, tokenizer: Any, n_items: int = 3, seed: int = 0, words: Sequence[str] = OBJECTS) -> None:
        if n_items < 2:
            raise ValueError(f"n_items must be at least 2, got {n_items}")
        self._known = single_tokens(tokenizer, words)
        self._words = _enough(self._known, n_items, "things")
        self._tokenizer, self.n_items, self._draw = tokenizer, n_items, random.Random(seed)

    def prompt(self, items: Sequence[str], mentioned: Sequence[str], name: str = "Mary") -> Prompt:
        """The prompt of a list and of what is mentioned again, in their orders.

        Raises:
            ValueError: for items that are not single tokens, or mentions that do not leave one.
        """
        missing = [item for item in items if item not in self._known]
        left = [k for k, item in enumerate(items) if item not in mentioned]
        again = [item for item in items if item in mentioned]
        if missing or len(left) != 1 or sorted(mentioned) != sorted(again) or len(set(items)) < len(items):
            raise ValueError(
                f"need different single-token items of which one is not mentioned, got {items} and {mentioned}"
            )
        listed = ", ".join(f"the {item}" for item in items[:-1]) + f" and the {items[-1]}"
        out = ", ".join(f"the {item}" for item in mentioned)
        text = f"{name} packed {listed}. Then {name} took out {out} and the"
        return _prompt(self._tokenizer, text, items, left[0], self._known)

    def prompts(self, count: int) -> list[Prompt]:
        """So many random prompts."""
        made = []
        for k in range(count):
            items = self._draw.sample(self._words, self.n_items)
            # places of the answer take turns, so that none is in favour
            left = k % self.n_items
            mentioned = [item for place, item in enumerate(items) if place != left]
            self._draw.shuffle(mentioned)
            made.append(self.prompt(items, mentioned, self._draw.choice(NAMES)))
        return made

    def permutations(self, count: int) -> list[Prompt]:
        """One list, answer and order of mentions, with the list in so many random orders."""
        items = self._draw.sample(self._words, self.n_items)
        mentioned = items[1:]
        return [self.prompt(self._draw.sample(items, len(items)), mentioned) for _ in range(count)]


class IOI:
    """Indirect object identification (Wang et al., 2022): the name that is mentioned once is wanted.

    Args:
        tokenizer: of the model.
        seed: of the draws.
    """

    def __init__(self, tokenizer: Any, seed: int = 0) -> None:
        self._known = single_tokens(tokenizer, NAMES)
        self._names = _enough(self._known, 2, "names")
        self._things = _enough(single_tokens(tokenizer, OBJECTS), 1, "things")
        self._tokenizer, self._draw = tokenizer, random.Random(seed)

    def prompts(self, count: int) -> list[Prompt]:
        """So many prompts; the indirect object comes first and second in turn. Option 0 is the indirect object."""
        made = []
        for k in range(count):
            indirect, subject = self._draw.sample(self._names, 2)
            first, second = (indirect, subject) if k % 2 == 0 else (subject, indirect)
            thing = self._draw.choice(self._things)
            text = f"When {first} and {second} went to the store, {subject} gave a {thing} to"
            made.append(_prompt(self._tokenizer, text, (indirect, subject), 0, self._known))
        return made


@torch.no_grad()
def option_logits(model: nn.Module, tokenizer: Any, prompts: Sequence[Prompt], batch_size: int = 32) -> list[Tensor]:
    """Logits of each prompt's options after it, in float32.

    Raises:
        ValueError: for no prompts.
    """
    if not prompts:
        raise ValueError("prompts must be at least one")
    device = next(model.parameters()).device
    found = []
    for start in range(0, len(prompts), batch_size):
        some = prompts[start : start + batch_size]
        inputs = tokenized(tokenizer, [prompt.text for prompt in some], device)
        last = inputs["attention_mask"].sum(1) - 1
        ends = model(**inputs).logits[torch.arange(len(some), device=device), last].float().cpu()
        found += [row[list(prompt.ids)] for row, prompt in zip(ends, some, strict=True)]
    return found


def choices(model: nn.Module, tokenizer: Any, prompts: Sequence[Prompt], batch_size: int = 32) -> Tensor:
    """Which option has the greatest logit after each prompt, (prompts,)."""
    return torch.tensor([int(logits.argmax()) for logits in option_logits(model, tokenizer, prompts, batch_size)])


def accuracy(model: nn.Module, tokenizer: Any, prompts: Sequence[Prompt], batch_size: int = 32) -> float:
    """Share of prompts whose right option has the greatest logit of its options."""
    right = torch.tensor([prompt.answer for prompt in prompts])
    return (choices(model, tokenizer, prompts, batch_size) == right).float().mean().item()


@torch.no_grad()
def attention_to(
    model: nn.Module, input_ids: Tensor, layer: int, head: int, source: int, targets: Sequence[int]
) -> Tensor:
    """Attention of a head from one place to others, (B, targets).

    Args:
        model: as in ``head_matrices``.
        input_ids: (B, T), no padding.
        layer, head: which.
        source: place of the query, negative ones from the end.
        targets: places of the keys.

    Raises:
        ValueError: for a head or place that there is not.
    """
    patterns = attention_patterns(model, input_ids=input_ids)
    length = input_ids.shape[1]
    if not -len(patterns) <= layer < len(patterns) or not 0 <= head < patterns[0].shape[1]:
        raise ValueError(f"no head ({layer}, {head}); there are {len(patterns)} x {patterns[0].shape[1]}")
    if not all(-length <= place < length for place in [source, *targets]):
        raise ValueError(f"places must be within {length} tokens, got {source} and {list(targets)}")
    return patterns[layer][:, head, source][:, list(targets)]


def inhibition_score(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Prompt], edit: ChannelEdit, mover: tuple[int, int]
) -> Tensor:
    """By how much an edit moves a mover head's attention from the wrong name to the right one, (prompts,).

    ``a(END -> IO) - a(END -> S1)`` without the edit less the same with it (section 4): positive where what was edited
    away kept the head from the wrong name.

    Raises:
        ValueError: for no prompts, prompts that are not of two options, or a head that there is not.
    """

    if not prompts or any(len(prompt.options) != 2 for prompt in prompts):
        raise ValueError("prompts must be at least one, each of two options, as IOI makes them")
    device = next(model.parameters()).device

    def preference() -> Tensor:
        found = []
        for prompt in prompts:
            ids = torch.tensor([tokenizer(prompt.text)["input_ids"]], device=device)
            wrong = 1 - prompt.answer
            places = (prompt.places[prompt.answer][0], prompt.places[wrong][0])
            right, other = attention_to(model, ids, *mover, -1, places)[0]
            found.append(right - other)
        return torch.stack(found)

    before = preference()
    with edit:
        after = preference()
    return before - after

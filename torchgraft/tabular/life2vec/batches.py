"""From documents to batches: augmentation, masking, the order task, padding, batches of alike lengths."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchgraft.tabular.life2vec.events import (
    CLS,
    GENERAL_TOKENS,
    MASK,
    SEP,
    UNK,
    Document,
    layout,
)
from torchgraft.tabular.life2vec.tokenizer import EventTokenizer

__all__ = [
    "Augmentation",
    "EventCollator",
    "drop_tokens",
    "hide_background",
    "length_buckets",
    "mask_tokens",
    "reorder_events",
    "resample_events",
    "shift_positions",
    "shuffle_tokens",
    "time_cut",
]

Rng = np.random.Generator


def shuffle_tokens(document: Document, rng: Rng) -> Document:
    """Put the tokens inside each event into random order, as is always done, in validation too."""
    shuffled = tuple(
        tuple(event[i] for i in rng.permutation(len(event))) if len(event) > 1 else event for event in document.events
    )
    return dataclasses.replace(document, events=shuffled)


def time_cut(document: Document, rng: Rng, least: int = 12, min_position: int = 0) -> Document:
    """Forget what came after a random moment; whole days are kept or forgotten, at least ``least`` events stay.

    The official code looks one event too far and can split the last day; here a day is never split.

    Args:
        document: with more than ``least`` events, else it is returned as it is.
        rng: random numbers.
        least: events that stay.
        min_position: no cut before this position (732, two years, in the official code).
    """
    count = len(document.events)
    if count <= least:
        return document
    cut = int(rng.integers(least, count))
    while cut < count and (
        document.positions[cut] == document.positions[cut - 1] or document.positions[cut] < min_position
    ):
        cut += 1
    return document.pick(range(cut))


def resample_events(document: Document, rng: Rng) -> Document:
    """Forget a random quarter to half of the events, then shift positions so that the first is 1.

    As in the official code ``floor(n / 4)`` to ``floor(n / 2) - 1`` of n events go; it fails for n of 0 and 1, where
    nothing goes here.
    """
    count = len(document.events)
    low, high = count // 4, count // 2
    gone = set(rng.choice(count, int(rng.integers(low, max(high, low + 1))), replace=False).tolist())
    kept = document.pick([i for i in range(count) if i not in gone])
    if not kept.positions:
        return kept
    first = kept.positions[0]
    return dataclasses.replace(kept, positions=tuple(max(0, p - first + 1) for p in kept.positions))


def shift_positions(document: Document, rng: Rng, last: int | None = None) -> Document:
    """Move every event by -5 to 4 days, but not below 0 nor beyond ``last`` (4329 in the official code)."""
    noise = rng.integers(-5, 5, len(document.positions)).tolist()
    moved = [max(0, p + n) for p, n in zip(document.positions, noise, strict=True)]
    return dataclasses.replace(document, positions=tuple(p if last is None else min(p, last) for p in moved))


def hide_background(document: Document) -> Document:
    """All background tokens become [UNK]."""
    return dataclasses.replace(document, background=(UNK,) * len(document.background))


def drop_tokens(document: Document, rng: Rng, p: float) -> Document:
    """Forget one random token of each event with probability ``p``; the event stays, if need be as [SEP] alone."""
    hit = rng.random(len(document.events)) < p
    if not hit.any():
        return document
    events = []
    for event, dropped in zip(document.events, hit, strict=True):
        if dropped and event:
            out = int(rng.integers(len(event)))
            event = event[:out] + event[out + 1 :]
        events.append(event)
    return dataclasses.replace(document, events=tuple(events))


@dataclass(frozen=True)
class Augmentation:
    """What happens to documents in training, each with its own independent probability; the defaults are the paper's.

    Args:
        resample: of ``resample_events``.
        position_noise: of ``shift_positions``.
        hide_background: of ``hide_background``.
        drop_token: of one token in each event.
        time_cut: of ``time_cut``.
        last_position: of ``shift_positions``; the official code has 4329, the last day of its own data.
        min_position: of ``time_cut``.

    Raises:
        ValueError: for probabilities outside 0..1.

    Example:
        >>> Augmentation(resample=0.0).position_noise
        0.1
    """

    resample: float = 0.4
    position_noise: float = 0.1
    hide_background: float = 0.01
    drop_token: float = 0.01
    time_cut: float = 0.0
    last_position: int | None = None
    min_position: int = 0

    def __post_init__(self) -> None:
        for name in ("resample", "position_noise", "hide_background", "drop_token", "time_cut"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability and must lie in 0..1, got {getattr(self, name)}")

    def __call__(self, document: Document, rng: Rng) -> Document:
        """One augmented document, in the order of the official code."""
        cut, resample, noise, hide = (rng.random(4) < self._four()).tolist()
        if cut:
            document = time_cut(document, rng, min_position=self.min_position)
        if resample:
            document = resample_events(document, rng)
        if noise:
            document = shift_positions(document, rng, self.last_position)
        if hide:
            document = hide_background(document)
        return drop_tokens(document, rng, self.drop_token) if self.drop_token else document

    def _four(self) -> tuple[float, float, float, float]:
        return self.time_cut, self.resample, self.position_noise, self.hide_background


def reorder_events(document: Document, rng: Rng) -> tuple[tuple[tuple[int, ...], ...], int]:
    """Draw the order task: events reversed (class 1, 5 %), shuffled (class 2, 5 %), or as they were (class 0).

    Returns:
        Tokens of the events in their new order, and the class. Dates, ages and segments are not moved. Below two
        events there is no order: the class is -100, which the loss leaves out (the official code labels them anyway).
    """
    events = document.events
    if len(events) < 2:
        return events, -100
    drawn = rng.random()
    if drawn < 0.05:
        return events[::-1], 1
    if drawn > 0.95:
        return tuple(events[i] for i in rng.permutation(len(events))), 2
    return events, 0


def mask_tokens(
    tokens: np.ndarray, rng: Rng, vocab_size: int, share: float = 0.3
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Choose ``floor(share * n)`` of n tokens to predict; of these, in the order drawn, 10 % stay, 10 % become random.

    Only positions behind [CLS] that are neither [SEP] nor [UNK] are drawn, without replacement; where there are fewer
    than wanted, all of them. Between the first ``floor(0.1 k)`` of the k drawn, which stay, and the last
    ``floor(0.1 k)``, which become random tokens that are not general ones, all become [MASK].

    Args:
        tokens: ids (n,) of one document without padding.
        rng: random numbers.
        vocab_size: for random tokens.
        share: to predict.

    Returns:
        Masked tokens (n,), positions (k,), and what was there (k,).

    Example:
        >>> tokens = np.array([1, 12, 13, 2, 14, 15, 16, 17, 18, 2])
        >>> masked, where, what = mask_tokens(tokens, np.random.default_rng(0), vocab_size=20)
        >>> len(where), bool((tokens[where] == what).all()), int((masked == 3).sum())
        (3, True, 3)
    """
    general = len(GENERAL_TOKENS)
    if vocab_size <= general:
        raise ValueError(f"vocab_size={vocab_size} has no token besides the {general} general ones")
    legal = np.flatnonzero((tokens != SEP) & (tokens != UNK) & (tokens != CLS))
    legal = legal[legal > 0]
    wanted = min(int(share * len(tokens)), len(legal))
    where = rng.choice(legal, wanted, replace=False) if wanted else legal[:0]
    what = tokens[where]
    few = int(0.1 * wanted)
    masked = tokens.copy()
    masked[where[few : wanted - few]] = MASK
    masked[where[wanted - few :]] = rng.integers(general, vocab_size, few)
    return masked, where, what


@dataclass
class EventCollator:
    """Makes batches of documents, for a ``DataLoader`` or for ``transformers.Trainer``.

    Random numbers come from torch's global generator, so that ``torch.manual_seed`` and the seeds of data-loader
    workers govern them.

    Args:
        tokenizer: fitted.
        max_length: longer documents keep their most recent events.
        mlm: share of tokens to predict; ``None`` for batches without the two pre-training tasks.
        sop: also set the order task; only together with ``mlm``.
        augment: what to do to documents in training; ``None`` for none.
        shuffle: put the tokens inside each event into random order; official in training and validation.
        pad_to_multiple_of: batches are as long as their longest document, rounded up to this.
        pad_to_max: pad to ``max_length`` instead, as the official code does.

    Returns batches with ``input_ids`` (B, 4, S) and ``padding_mask`` (B, S); with ``mlm`` also ``target_pos`` and
    ``target_tokens``, both (B, floor(mlm * S)), unused slots pointing at S - 1 with target 0, and with ``sop``
    ``target_cls`` (B,); without ``mlm``, ``labels`` where documents have them.

    Example:
        >>> import pandas as pd
        >>> from torchgraft.tabular.life2vec import EventSchema, EventSource, EventTokenizer
        >>> people = pd.DataFrame({"person_id": [1], "born": [0.0]})
        >>> tests = pd.DataFrame({"person_id": [1, 1], "date": [5.0, 9.0], "test": ["a", "b"]})
        >>> schema = EventSchema({"tests": EventSource(("test",))}, 0.0, birth="born", birth_tokens=False)
        >>> tokenizer = EventTokenizer(schema).fit(tests, people)
        >>> batch = EventCollator(tokenizer, 32)(list(tokenizer.documents(tests, people)))
        >>> batch["input_ids"].shape, batch["target_pos"].shape
        (torch.Size([1, 4, 6]), torch.Size([1, 1]))
    """

    tokenizer: EventTokenizer
    max_length: int
    mlm: float | None = 0.3
    sop: bool = True
    augment: Augmentation | None = None
    shuffle: bool = True
    pad_to_multiple_of: int = 1
    pad_to_max: bool = False

    def __post_init__(self) -> None:
        if self.mlm is not None and not 0 < self.mlm <= 1:
            raise ValueError(
                f"mlm is a share and must lie above 0 and at most at 1, got {self.mlm}; None switches it off"
            )
        if self.max_length < 3 + self.tokenizer.background_length or self.pad_to_multiple_of < 1:
            raise ValueError(
                f"max_length must hold the background and be at least {3 + self.tokenizer.background_length}, "
                f"pad_to_multiple_of at least 1; got {self.max_length}, {self.pad_to_multiple_of}"
            )

    def __call__(self, documents: Sequence[Document]) -> dict[str, Tensor]:
        """A batch of tensors."""
        if not documents:
            raise ValueError("documents is empty; a batch needs at least one")
        rng = np.random.default_rng(int(torch.randint(2**62, ()).item()))
        rows: list[np.ndarray] = []
        picked: list[tuple[np.ndarray, np.ndarray]] = []
        orders: list[int] = []
        for document in documents:
            if self.shuffle:
                document = shuffle_tokens(document, rng)
            if self.augment is not None:
                document = self.augment(document, rng)
            document = document.clip(self.max_length)
            events = None
            if self.mlm is not None and self.sop:
                events, order = reorder_events(document, rng)
                orders.append(order)
            row = layout(document, events)
            if self.mlm is not None:
                masked, where, what = mask_tokens(row[0].astype(int), rng, self.tokenizer.vocab_size, self.mlm)
                row[0] = masked
                picked.append((where, what))
            rows.append(row)
        longest = max(row.shape[1] for row in rows)
        length = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        length = self.max_length if self.pad_to_max else length
        ids = np.zeros((len(rows), 4, length), dtype=np.float32)
        for i, row in enumerate(rows):
            ids[i, :, : row.shape[1]] = row
        sizes = torch.tensor([row.shape[1] for row in rows])
        batch = {
            "input_ids": torch.from_numpy(ids),
            "padding_mask": torch.arange(length)[None] < sizes[:, None],
        }
        if self.mlm is not None:
            slots = int(self.mlm * length)
            at, target = np.full((len(rows), slots), length - 1), np.zeros((len(rows), slots), dtype=int)
            for i, (where, what) in enumerate(picked):
                at[i, : len(where)], target[i, : len(where)] = where, what
            batch |= {"target_pos": torch.from_numpy(at), "target_tokens": torch.from_numpy(target)}
            if self.sop:
                batch["target_cls"] = torch.tensor(orders)
        elif any(document.label is not None for document in documents):
            batch["labels"] = torch.as_tensor(np.array([_label(document) for document in documents]))
        return batch


def _label(document: Document) -> Any:
    if document.label is None:
        raise ValueError(f"person {document.person!r} has no label, but others in the batch have")
    if isinstance(document.label, float) and math.isnan(document.label):
        raise ValueError(f"the label of person {document.person!r} is NaN; select those with one")
    return document.label


def length_buckets(
    lengths: Sequence[int] | np.ndarray, batch_size: int, seed: int = 0, window: int = 50
) -> list[list[int]]:
    """Batches of documents of alike lengths: shuffled, then sorted within ``window`` batches, then shuffled as batches.

    Args:
        lengths: tokens of each document.
        batch_size: documents a batch; the last may have fewer.
        seed: of the order; change it each epoch.
        window: batches that are sorted together; more of them waste less padding and mix less.

    Returns:
        Indices of each batch, every document once; good as ``batch_sampler`` of a ``DataLoader``.

    Raises:
        ValueError: for sizes below 1.

    Example:
        >>> sorted(sum(length_buckets([5, 90, 6, 80], 2), []))
        [0, 1, 2, 3]
    """
    if batch_size < 1 or window < 1:
        raise ValueError(f"batch_size and window must be at least 1, got {batch_size} and {window}")
    rng = np.random.default_rng(seed)
    lengths = np.asarray(lengths)
    batches: list[list[int]] = []
    order = rng.permutation(len(lengths))
    for start in range(0, len(order), batch_size * window):
        part = order[start : start + batch_size * window]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += [part[i : i + batch_size].tolist() for i in range(0, len(part), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]

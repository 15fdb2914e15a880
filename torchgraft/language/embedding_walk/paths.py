"""Generation as a walk: probabilities of paths, samples of them, and all that can be reached."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.language.embedding_walk.trace import parts, widened
from torchgraft.surgery import evaluating


@dataclass(frozen=True)
class Path:
    """Probabilities along one given text.

    Attributes:
        ids: (T,).
        logprobs: (T - 1,), natural logarithm of the probability of each token but the first, given those before it.
        entropies: (T,), nats, of the next token at each place.
        top_mass: (T,), probability of the ``k`` most probable next tokens.
    """

    ids: Tensor
    logprobs: Tensor
    entropies: Tensor
    top_mass: Tensor

    @property
    def logprob(self) -> float:
        """Of the whole path, given its first token."""
        return float(self.logprobs.sum())

    @property
    def surprisals(self) -> Tensor:
        """(T - 1,), nats."""
        return -self.logprobs

    @property
    def branching(self) -> Tensor:
        """(T,), exp of the entropy: how many equally probable next tokens would be as uncertain."""
        return self.entropies.exp()


@dataclass(frozen=True)
class SampledPaths:
    """Sampled continuations with the points that they go through.

    Attributes:
        ids: (n, length).
        logprobs: (n, length), under the model itself at temperature 1.
        drawn_logprobs: (n, length), under the distribution that was drawn from.
        contexts: (n, length, D), the context vector from which each token was drawn.
        entropies: (n, length), nats, of the model itself.
        support: (n, length), how many tokens could have been drawn.
    """

    ids: Tensor
    logprobs: Tensor
    drawn_logprobs: Tensor
    contexts: Tensor
    entropies: Tensor
    support: Tensor

    def spread(self) -> Float[Tensor, " length"]:
        """Mean cosine between the context vectors of two samples, at each step; 1 before they part."""
        if len(self.contexts) < 2:
            raise ValueError("spread needs at least two samples, got 1")
        unit = F.normalize(self.contexts, dim=-1).transpose(0, 1)
        n = unit.shape[1]
        return ((unit @ unit.mT).sum((1, 2)) - n) / (n * (n - 1))


@dataclass(frozen=True)
class ReachableTree:
    """Every continuation that is more probable than a threshold.

    Attributes:
        paths: of ``depth`` tokens, the most probable first.
        probabilities: of these, (N,) float64.
        remainder: probability of all continuations of that length that are not listed.
        nodes: by depth, from 1: how many beginnings pass the threshold.
    """

    paths: tuple[tuple[int, ...], ...]
    probabilities: Tensor
    remainder: float
    nodes: tuple[int, ...]


def log_probs(model: nn.Module, **inputs: Any) -> tuple[Tensor, Any]:
    """Log-probabilities (B, T, V) and the cache, in float32 or float64."""
    out: Any = model(**inputs)
    return widened(out.logits).log_softmax(-1), getattr(out, "past_key_values", None)


def cached(model: nn.Module) -> bool:
    """Whether a model keeps keys and values that rows can be chosen from."""
    config: Any = getattr(model, "config", None)
    return "mamba" not in getattr(config, "model_type", "")


@torch.no_grad()
def path(model: nn.Module, ids: Int[Tensor, " T"], k: int = 10) -> Path:
    """Probabilities along a text in one run."""
    with evaluating(model):
        logp, _ = log_probs(model, input_ids=ids[None], use_cache=False)
    logp = logp[0]
    entropies = -(logp.exp() * logp).nan_to_num(0.0).sum(-1)
    found = logp[:-1].gather(1, ids[1:, None])[:, 0]
    return Path(ids, found, entropies, logp.topk(min(k, logp.shape[-1])).values.exp().sum(-1))


def narrowed(logp: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """Log-probabilities (..., V) after temperature, top-k and top-p, in this order, as transformers does it."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    ids: Any = None
    if temperature != 1.0:
        logp = TemperatureLogitsWarper(temperature)(ids, logp)
    if top_k is not None:
        logp = TopKLogitsWarper(top_k)(ids, logp)
    if top_p is not None and top_p < 1:
        logp = TopPLogitsWarper(top_p)(ids, logp)
    return logp.log_softmax(-1)


@torch.no_grad()
def sample(
    model: nn.Module, ids: Int[Tensor, " T"], n: int, length: int, temperature: float, top_k: int | None,
    top_p: float | None, seed: int,
) -> SampledPaths:  # fmt: skip
    """Draw paths all at once, with a cache where the model has one."""
    norm = parts(model)[1]
    if norm is None:
        raise TypeError(f"model must be a causal language model, got {type(model).__name__}")
    draw = torch.Generator(device=ids.device).manual_seed(seed)
    whole, cache = ids.expand(n, -1), None
    seen: dict[str, Tensor] = {}
    rows: list[tuple[Tensor, ...]] = []
    use_cache = cached(model)
    hook = norm.register_forward_hook(lambda module, args, output: seen.update(context=output[:, -1]))
    try:
        with evaluating(model):
            for _ in range(length):
                given = whole if cache is None else whole[:, -1:]
                extra: dict[str, Any] = {"past_key_values": cache} if cache is not None else {}
                logp, found = log_probs(model, input_ids=given, use_cache=use_cache, **extra)
                cache = found if use_cache else None
                logp = logp[:, -1]
                narrow = narrowed(logp, temperature, top_k, top_p)
                chosen = torch.multinomial(narrow.exp(), 1, generator=draw)
                entropy = -(logp.exp() * logp).nan_to_num(0.0).sum(-1)
                support = (narrow > -torch.inf).sum(-1)
                pair = logp.gather(1, chosen)[:, 0], narrow.gather(1, chosen)[:, 0]
                rows.append((chosen[:, 0], *pair, widened(seen["context"]), entropy, support))
                whole = torch.cat([whole, chosen], 1)
    finally:
        hook.remove()
    return SampledPaths(*(torch.stack(column, 1) for column in zip(*rows, strict=True)))


def _rows(cache: Any, rows: Tensor) -> Any:
    """A copy of some rows of a cache; running the model on it leaves the cache alone."""
    chosen = copy.deepcopy(cache)
    chosen.batch_select_indices(rows)
    return chosen


@torch.no_grad()
def reachable(
    model: nn.Module, ids: Int[Tensor, " T"], depth: int, eps: float, batch: int, use_cache: bool
) -> ReachableTree:
    """All paths above a threshold; probabilities fall along a path, so what is cut off can never come back."""
    found: list[tuple[float, tuple[int, ...]]] = []
    nodes, lost = [0] * depth, 0.0
    # parts of a level wait as rows of the cache that their parents left: at most depth caches are alive at a time
    waiting: list[tuple[Any, list[int], list[tuple[int, ...]], list[float]]] = [(None, [0], [()], [1.0])]
    use_cache = use_cache and cached(model)
    with evaluating(model):
        while waiting:
            parent, rows, beginnings, before = waiting.pop()
            more = torch.tensor(beginnings, dtype=torch.int64, device=ids.device).reshape(len(rows), -1)
            whole = torch.cat([ids.expand(len(rows), -1), more], 1)
            if parent is None or not use_cache:
                logp, cache = log_probs(model, input_ids=whole, use_cache=use_cache)
            else:
                own = _rows(parent, torch.tensor(rows, device=ids.device))
                logp, cache = log_probs(model, input_ids=whole[:, -1:], use_cache=True, past_key_values=own)
            joint = torch.tensor(before, dtype=torch.float64, device=ids.device)[:, None] * logp[:, -1].double().exp()
            passing = joint > eps
            lost += float(joint[~passing].sum())
            places = passing.nonzero()
            values = joint[passing].tolist()
            at = len(beginnings[0])
            nodes[at] += len(values)
            children = [(*beginnings[row], token) for row, token in places.tolist()]
            if at + 1 == depth:
                found += zip(values, children, strict=True)
                continue
            for start in range(0, len(values), batch):
                part = slice(start, start + batch)
                waiting.append((cache, places[part, 0].tolist(), children[part], values[part]))
    found.sort(reverse=True)
    probabilities = torch.tensor([p for p, _ in found], dtype=torch.float64)
    return ReachableTree(tuple(tokens for _, tokens in found), probabilities, lost, tuple(nodes))


def checked_counts(**counts: int) -> None:
    """Complain about counts that are no whole numbers above 0."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name} must be a whole number, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def checked_draws(n: int, length: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Complain about what cannot be drawn with."""
    checked_counts(n=n, length=length, **({} if top_k is None else {"top_k": top_k}))
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be above 0 and finite, got {temperature}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")


def entropies(model: nn.Module, texts: Sequence[Tensor]) -> Float[Tensor, " N"]:
    """Entropy of the next token after each of some texts, nats."""
    return torch.stack([path(model, ids).entropies[-1] for ids in texts])

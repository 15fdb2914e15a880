"""Steering by shift vectors: which to add, to which tokens, and what became of the answers."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np
import torch
from jaxtyping import Float
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from torchgraft.language._access import Access, Edit, edited_outputs, unwrapped
from torchgraft.language.representation_shift.concepts import ConceptDictionary
from torchgraft.language.representation_shift.states import (
    Layer,
    StateSet,
    cached_length,
    module_of,
    refuse_virtual_tokens,
)

Where = Literal["all", "generated", "last"] | int


@overload
def steering_vector(source: Tensor, target: Tensor) -> Tensor: ...
@overload
def steering_vector(source: StateSet, target: StateSet) -> dict[Layer, Tensor]: ...
def steering_vector(source: Any, target: Any) -> Any:
    """The coarse vector: mean of target states less mean of source states ("shift of means", section 5).

    For instance states of samples answered "no" less those of samples answered "yes".

    Args:
        source, target: (N, D) and (M, D), or sets of states of the same layers.

    Returns:
        (D,), or one for each layer, ready for ``steer``.

    Raises:
        TypeError: for a set and a tensor.
        ValueError: for empty sets, or different widths or layers.
    """
    if isinstance(source, StateSet) and isinstance(target, StateSet):
        if set(source.states) != set(target.states):
            raise ValueError(f"source has layers {list(source.states)}, target {list(target.states)}")
        return {layer: steering_vector(source.states[layer], target.states[layer]) for layer in source.states}
    if isinstance(source, StateSet) or isinstance(target, StateSet):
        raise TypeError("source and target must both be StateSets or both be tensors")
    shapes = tuple(source.shape), tuple(target.shape)
    if source.dim() != 2 or target.dim() != 2 or source.shape[1] != target.shape[1] or not len(source) * len(target):
        raise ValueError(f"source and target must be (N, D) and (M, D), neither empty, got {shapes[0]} and {shapes[1]}")
    return target.mean(0) - source.mean(0)


def concept_directions(dictionary: ConceptDictionary) -> Float[Tensor, "K K D"]:
    """Fine-grained candidates: ``[i, j]`` leads from concept i to concept j, ``u_j - u_i``.

    What the official code names ``i_to_j`` is ``u_i - u_j``.
    """
    check_is_fitted(dictionary)
    u = torch.as_tensor(dictionary.components_)
    return u[None] - u[:, None]


@dataclass(frozen=True)
class Selected:
    """A candidate whose effect is concentrated.

    Attributes:
        name: of the candidate, as given.
        targets: the answers that it brings.
        gap: by how many answers they gain more than the next one.
    """

    name: Any
    targets: tuple[str, ...]
    gap: float


def _concentrated(gains: Sequence[float]) -> int:
    """How many of descending gains, which end in a zero, are in the upper of two clusters of least squared distance."""
    values = np.asarray(gains, dtype=np.float64)

    def within(cut: int) -> float:
        return sum(float(np.square(part - part.mean()).sum()) for part in (values[:cut], values[cut:]))

    return min(range(1, len(values)), key=within)


def select_directions(
    counts: Mapping[Any, Mapping[str, int]],
    reference: Mapping[str, int],
    topk: int = 5,
    max_targets: int = 1,
    *,
    first_word: bool = False,
    unique: bool = True,
    limit: int | None = None,
) -> list[Selected]:
    """Candidates that bring one answer, and not many: those to steer with (appendix on fine-grained steering).

    The gains of answers over the unsteered model, the ``topk`` greatest of them, are put into two clusters; a
    candidate is kept when the upper one has at most ``max_targets`` answers, and ranked by its gap to the next answer.

    Differs from the official code where answers that lose are among the ``topk``, as they are when there are few
    answers: a loss counts here as no gain, where there the losses may make the one cluster and all else the other, or
    not, since its k-means starts at random. The two clusters are the best possible ones; candidates without a gain
    are left out; and with ``first_word`` the whole reference is counted by first words, where the official code forgets
    what does not occur in the steered answers.

    Args:
        counts: for each candidate how often each answer was given with it.
        reference: how often without.
        topk: gains that are looked at.
        max_targets: answers that a candidate may bring.
        first_word: count answers by their first word.
        unique: keep the best candidate for each target alone.
        limit: keep so many at most.

    Raises:
        ValueError: for ``topk`` or ``max_targets`` below 1.

    Example:
        >>> select_directions({"a": {"no": 9, "yes": 1}, "b": {"no": 5, "red": 5}}, {"yes": 10})
        [Selected(name='a', targets=('no',), gap=9)]
    """
    if topk < 1 or max_targets < 1:
        raise ValueError(f"topk and max_targets must be at least 1, got {topk} and {max_targets}")

    def tallied(given: Mapping[str, int]) -> Counter[str]:
        total: Counter[str] = Counter()
        for answer, count in given.items():
            if answer:
                total[answer.split(" ")[0] if first_word else answer] += count
        return total

    before = tallied(reference)
    found: list[Selected] = []
    for name, given in counts.items():
        gains = {answer: max(count - before[answer], 0) for answer, count in tallied(given).items()}
        best = sorted(gains.items(), key=lambda item: -item[1])[:topk]
        # an answer that nobody gave gains nothing, too
        values = [gain for _, gain in best] + [0]
        size = _concentrated(values) if len(values) > 1 else 0
        if 0 < size <= max_targets and values[size - 1] > 0:
            found.append(Selected(name, tuple(answer for answer, _ in best[:size]), values[size - 1] - values[size]))
    found.sort(key=lambda each: -each.gap)
    if unique:
        first: dict[tuple[str, ...], Selected] = {}
        for each in found:
            first.setdefault(each.targets, each)
        found = list(first.values())
    return found[:limit]


class _Clock:
    """Where a forward pass stands in its sequence, and how long the prompt is."""

    def __init__(self) -> None:
        self.start = 0
        self.prompt: int | None = None

    def reads(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Before a pass: what the cache holds already."""
        self.start = cached_length((*args, *kwargs.values()))

    def first(self, where: Where, length: int) -> int:
        """The first of a pass's tokens that is steered; ``length`` or more for none."""
        prompt = self.prompt
        if prompt is None:
            prompt = self.start or length
        wanted = where if isinstance(where, int) else {"all": 0, "generated": prompt, "last": prompt - 1}[where]
        return max(wanted - self.start, 0)


@contextmanager
def _generating(model: nn.Module, clock: _Clock) -> Iterator[None]:
    """Tell the clock how long the prompt is whenever ``generate`` is called."""
    inner: Any = unwrapped(model)
    if not hasattr(inner, "generate"):
        yield
        return
    original, own = inner.generate, inner.__dict__.get("generate")

    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        # embeddings are what is read where tokens come with them
        given = [kwargs.get("inputs_embeds"), *args[:1], kwargs.get("inputs"), kwargs.get("input_ids")]
        prompts = [each for each in given if isinstance(each, Tensor)]
        clock.prompt = prompts[0].shape[1] if prompts else 1
        try:
            return original(*args, **kwargs)
        finally:
            clock.prompt = None

    inner.generate = generate
    try:
        yield
    finally:
        if own is None:
            del inner.generate
        else:
            inner.generate = own


@contextmanager
def steer(
    model: nn.Module,
    vectors: Mapping[Layer, Tensor],
    alpha: float = 1.0,
    positions: Where = "all",
    condition: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[None]:
    """Add ``alpha * vector`` to outputs of layers, in forward passes and in ``generate``, until the block ends.

    Section 5 of Khayatan et al. Hooks go at the end, also after an exception; blocks nest, and what they add, adds up.
    Inside, compiled models run uncompiled.

    Args:
        model: see ``collect_states``; multimodal models are steered in their decoder.
        vectors: (D,) for numbers of blocks, from the end where negative, or ``"norm"``.
        alpha: 1 is the paper's; 0 leaves every bit as it is.
        positions: ``all`` tokens; ``generated`` ones alone; the ``last`` of the prompt and generated ones; or those
            from a place on, counted from the start of the row with its padding and image tokens (577 is after the
            image of LLaVA-1.5). The prompt is what ``generate`` is called with, also without a cache and however it
            is split into passes; the official code takes every pass of more than one token for a prompt, so that
            ``generated`` does nothing without a cache. In a forward pass of your own, tokens are generated when a
            cache with tokens comes with them. ``last`` wants prompts padded on the left.
        condition: of hidden states (B, T, D) before the addition, which rows (B,) or tokens (B, T) to steer; an
            addition to the paper.

    Raises:
        TypeError: for a model of another kind, or with an active prompt-tuning adapter of peft, or vectors that are not
            tensors by layer.
        ValueError: for no vectors, layers that are not there, vectors of another width or not finite, an ``alpha``
            that is not finite, unknown ``positions``, and inside the block for a condition of another shape.

    Example:
        >>> with steer(model, {-1: vector}, alpha=1.0, positions="last"):  # doctest: +SKIP
        ...     tokens = model.generate(**inputs)
    """
    access = Access(model)
    refuse_virtual_tokens(model)
    if not isinstance(vectors, Mapping) or not all(isinstance(v, Tensor) for v in vectors.values()):
        raise TypeError(f"vectors must be tensors by layer, such as {{-1: vector}}, got {type(vectors).__name__}")
    if not vectors:
        raise ValueError("vectors must be at least one, got none")
    for layer, vector in vectors.items():
        module_of(model, layer)
        if vector.shape != (access.hidden_size,) or not torch.isfinite(vector).all():
            raise ValueError(
                f"the vector of layer {layer!r} must be ({access.hidden_size},) and finite, got {tuple(vector.shape)}"
                + ("" if torch.isfinite(vector).all() else " with values that are not")
            )
    if not np.isfinite(alpha):
        raise ValueError(f"alpha must be finite, got {alpha}")
    known = positions in ("all", "generated", "last")
    counted = isinstance(positions, int) and not isinstance(positions, bool) and positions >= 0
    if not known and not counted:
        raise ValueError(f"positions must be 'all', 'generated', 'last' or a place from 0 on, got {positions!r}")
    clock = _Clock()

    def edit_of(vector: Tensor) -> Edit:
        added = alpha * vector.detach()
        nothing = not added.any()

        def edit(hidden: Tensor) -> Tensor:
            nonlocal added
            first = clock.first(positions, hidden.shape[1])
            if nothing or first >= hidden.shape[1]:
                return hidden
            added = added.to(hidden)
            if first == 0 and condition is None:
                return hidden + added
            chosen = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
            chosen[:, first:] = True
            if condition is not None:
                told = condition(hidden)
                if told.dtype != torch.bool or told.shape not in (hidden.shape[:1], hidden.shape[:2]):
                    raise ValueError(
                        f"condition must return booleans {tuple(hidden.shape[:1])} or {tuple(hidden.shape[:2])}, got "
                        f"{tuple(told.shape)}, {told.dtype}"
                    )
                chosen &= told if told.dim() == 2 else told[:, None]
            return torch.where(chosen[..., None], hidden + added, hidden)

        return edit

    # the module that runs the blocks; OPT's head calls it without the model around it
    decoder = access.base.get_submodule(access.family.layers.rpartition(".")[0])
    watch = decoder.register_forward_pre_hook(clock.reads, with_kwargs=True)
    try:
        edits = {layer: edit_of(vector) for layer, vector in vectors.items()}
        with (
            _generating(model, clock),
            edited_outputs([(module_of(model, layer), edit) for layer, edit in edits.items()]),
        ):
            yield
    finally:
        watch.remove()


_NUMBERS = "zero one two three four five six seven eight nine ten".split()  # noqa: SIM905
_DIGITS = {word: str(k) for k, word in enumerate(_NUMBERS)} | {"none": "0"}


def normalized_answer(answer: str) -> str:
    """An answer as VQAv2 compares it: lower case, no articles or punctuation, "two" as "2".

    As the evaluation of VQAv2 has it, but for contractions, which stay as they are written.

    Example:
        >>> [normalized_answer(a) for a in ("The two.", "2", "A T-shirt!", "3.5", "2,000")]
        ['2', '2', 't shirt', '3.5', '2000']
    """
    plain = re.sub(r"(?<=\d),(?=\d)|\.(?!\d)", "", answer.lower())
    words = re.sub(r"[^\w\s.']|_", " ", plain).split()
    return " ".join(_DIGITS.get(word, word) for word in words if word not in ("a", "an", "the"))


def answer_type(answer: str) -> Literal["yes/no", "number", "other"]:
    """The type of an answer as VQAv2 tells them apart.

    Example:
        >>> answer_type("Yes."), answer_type("3"), answer_type("two"), answer_type("a dog")
        ('yes/no', 'number', 'number', 'other')
    """
    word = normalized_answer(answer)
    if word in ("yes", "no"):
        return "yes/no"
    return "number" if word.replace(".", "", 1).isdigit() else "other"


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """The accuracy of VQAv2: the mean, over all sets of references but one, of ``min(agreeing / 3, 1)``.

    Answers are compared after ``normalized_answer``. The code of Khayatan et al. takes ``min(agreeing / 3, 1)`` of all.

    Raises:
        ValueError: for fewer than two references.

    Example:
        >>> round(vqa_accuracy("no", ["no"] * 3 + ["yes"] * 7), 2)
        0.9
    """
    if len(references) < 2:
        raise ValueError(f"references must be at least two, got {len(references)}")
    agrees = np.array([normalized_answer(r) == normalized_answer(answer) for r in references])
    return float(np.minimum((agrees.sum() - agrees) / 3, 1).mean())


def steering_report(
    before: Sequence[str], after: Sequence[str], target: str | Collection[str], types: Sequence[str] | None = None
) -> dict[str, float]:
    """What steering did to answers: how many became the target, and how many others stayed.

    Args:
        before, after: answers to the same questions without and with steering.
        target: the answer, or answers, that were aimed at.
        types: of the questions; ``answer_type`` of the answers before where None.

    Returns:
        ``target_before`` and ``target_after``, counts; and for each type ``target_after: TYPE``, the share of its
        questions answered with the target, and ``unchanged: TYPE``, the share answered as before.

    Raises:
        ValueError: for no answers, or different numbers of them.
    """
    if not before or len(before) != len(after) or (types is not None and len(types) != len(before)):
        raise ValueError(
            f"before, after and types must be equally many and not none, got {len(before)}, {len(after)}"
            + ("" if types is None else f", {len(types)}")
        )
    old, new = ([normalized_answer(a) for a in answers] for answers in (before, after))
    aims = {normalized_answer(a) for a in ([target] if isinstance(target, str) else target)}
    kinds = np.array(list(types) if types is not None else [answer_type(a) for a in old])
    hit, kept = np.array([a in aims for a in new]), np.array([a == b for a, b in zip(old, new, strict=True)])
    report = {"target_before": float(sum(a in aims for a in old)), "target_after": float(hit.sum())}
    for kind in sorted(set(kinds)):
        report[f"target_after: {kind}"] = float(hit[kinds == kind].mean())
        report[f"unchanged: {kind}"] = float(kept[kinds == kind].mean())
    return report

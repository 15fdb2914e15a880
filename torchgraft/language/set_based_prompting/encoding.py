"""From prompts to the three tensors a model takes: token ids, position ids, attention mask.

B prompts, s tokens, q queries, k keys.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from torchgraft.language.set_based_prompting.prompts import Set, SetPrompt

Layout = Sequence[int | Sequence[int]]
"""Numbers of tokens, left to right: an int for text, a sequence of ints (one per element) for a set."""

PADDING = -1
"""Set id of a padding token."""
BRANCH = 1_000_000
"""Set id of continuations that are compared with each other."""


@dataclass(frozen=True)
class Editing:
    """Which of the two inputs of the model are edited. The default is Set-Based Prompting, the rest are ablations.

    Args:
        mask: elements of a set do not attend to each other.
        positions: the elements of a set start at the same position, and the text after it follows the longest one.
        pad_elements: pad every element with masked tokens to the length of the longest (the paper's padded variant).
            The result is the same, for more work.
        canonical: sort the elements of each set by their token ids before the pass. The mathematics does not need it.
            Without it two orders give equal results up to the order of floating-point sums (about 1e-5 in float32,
            1e-2 in bfloat16), so that an arg-max could flip on a near tie. With it the model gets the same tensors
            whatever the order was, so that two calls whose prompts differ in the order alone are equal to the last
            bit. (Two rows of one batch need not be: kernels may sum rows of a batch differently.) It would equally
            hide any order dependence, so do not use it to show that the method works, and not with the ablations.

    Raises:
        ValueError: ``canonical`` without both edits.
    """

    mask: bool = True
    positions: bool = True
    pad_elements: bool = False
    canonical: bool = False

    def __post_init__(self) -> None:
        if self.canonical and not (self.mask and self.positions):
            raise ValueError("canonical=True hides the order dependence that an ablation is there to show; drop it")


SET_BASED = Editing()
MASK_ONLY = Editing(positions=False)
POSITIONS_ONLY = Editing(mask=False)
PADDED = Editing(pad_elements=True)
PLAIN = Editing(mask=False, positions=False)


def set_positions(layout: Layout) -> Int[Tensor, " s"]:
    """Position of every token (paper section 3.1): all elements of a set start together, what follows starts after
    the longest.

    Raises:
        ValueError: a set without elements, or a negative length.

    Example:
        >>> set_positions([2, (2, 1), 1]).tolist()
        [0, 1, 2, 3, 2, 4]
    """
    positions: list[int] = []
    start = 0
    for part in layout:
        lengths = [part] if isinstance(part, int) else list(part)
        if not lengths or min(lengths) < 0:
            raise ValueError(f"layout: a set needs elements and lengths are not negative, got {part!r}")
        for length in lengths:
            positions += range(start, start + length)
        start += max(lengths)
    return torch.tensor(positions, dtype=torch.long)


def set_labels(layout: Layout) -> tuple[Int[Tensor, " s"], Int[Tensor, " s"]]:
    """Set and element of every token, both counted from 1, with 0 for text outside sets.

    Example:
        >>> [label.tolist() for label in set_labels([1, (2, 1), 1])]
        [[0, 1, 1, 1, 0], [0, 1, 1, 2, 0]]
    """
    sets: list[int] = []
    elements: list[int] = []
    count = 0
    for part in layout:
        if isinstance(part, int):
            sets += [0] * part
            elements += [0] * part
            continue
        count += 1
        for number, length in enumerate(part, start=1):
            sets += [count] * length
            elements += [number] * length
    return torch.tensor(sets, dtype=torch.long), torch.tensor(elements, dtype=torch.long)


def set_attention_mask(set_ids: Int[Tensor, "B s"], element_ids: Int[Tensor, "B s"]) -> Bool[Tensor, "B s s"]:
    """Who may attend to whom (True): causal, and nobody in an element to another element of the same set.

    ``allow[i, j] = j <= i and not padding[j] and not (set_i == set_j > 0 and element_i != element_j)``
    (paper section 3.2). A padding token may attend to itself, so that no row is empty.

    Example:
        >>> set_ids, element_ids = set_labels([1, (1, 1), 1])
        >>> set_attention_mask(set_ids[None], element_ids[None])[0].int().tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1]]
    """
    place = torch.arange(set_ids.shape[1], device=set_ids.device)
    return _allowed(
        set_ids[:, :, None],
        element_ids[:, :, None],
        set_ids[:, None, :],
        element_ids[:, None, :],
        place[:, None],
        place[None, :],
    )


def _allowed(
    query_set: Tensor, query_element: Tensor, key_set: Tensor, key_element: Tensor, i: Tensor, j: Tensor
) -> Tensor:
    """The rule of the mask, for labels and places of queries and keys that broadcast."""
    same_set = (query_set == key_set) & (query_set > 0)
    real = (key_set != PADDING) | (i == j)
    return (j <= i) & real & ~(same_set & (query_element != key_element))


def set_block_mask(set_ids: Int[Tensor, "B s"], element_ids: Int[Tensor, "B s"], block_size: int = 128) -> Any:
    """The same mask as a FlexAttention `BlockMask`, whose empty blocks are skipped.

    For ``n`` elements of length ``L`` the attention inside the set falls from ``(n L)^2 / 2`` to ``n L^2 / 2``.
    Models with ``attn_implementation="flex_attention"`` get it automatically. Meant for GPUs: on a CPU the compiler of
    torch 2.13 fails, with an error, on some sequences of prompt lengths; use ``"sdpa"`` there.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    batch, length = set_ids.shape
    return create_block_mask(
        # a lambda, as create_block_mask counts the arguments and a checked function would hide them
        lambda b, h, i, j: _allowed(set_ids[b, i], element_ids[b, i], set_ids[b, j], element_ids[b, j], i, j),
        B=batch,
        H=None,
        Q_LEN=length,
        KV_LEN=length,
        device=str(set_ids.device),
        BLOCK_SIZE=block_size,
    )


def additive_mask(allowed: Bool[Tensor, "B q k"], dtype: torch.dtype = torch.float32) -> Float[Tensor, "B 1 q k"]:
    """0 where attention is allowed and the least finite number elsewhere, to be added to the attention scores.

    A bool mask of four dimensions would be added as 1 and 0 by transformers' eager attention, so this is what to send.
    """
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill(~allowed, torch.finfo(dtype).min)[:, None]


@dataclass
class Row:
    """One prompt as lists of equal length, one entry per token."""

    ids: list[int]
    positions: list[int]
    set_ids: list[int]
    element_ids: list[int]


Part = list[int] | list[list[int]]
"""Token ids of a text, or of each element of a set."""


def elements_of(part: Part) -> list[list[int]]:
    """The elements of a set; a text counts as one."""
    return (
        [[token for token in part if isinstance(token, int)]]
        if is_text(part)
        else [e for e in part if isinstance(e, list)]
    )


def is_text(part: Part) -> bool:
    """Whether this part is text and no set."""
    return isinstance(part[0], int)


def tokenize(tokenizer: Any, prompts: Sequence[SetPrompt], editing: Editing = SET_BASED) -> list[list[Part]]:
    """Token ids of every prompt: a list of ints per text, a list of lists per set.

    Every part is tokenised on its own, so that no token spans a boundary. The special tokens that the tokenizer puts
    at the front (BOS) stand once, at the start of the prompt.
    """
    check_list(prompts)
    if not prompts:
        raise ValueError("prompts is empty")
    texts = {
        text
        for prompt in prompts
        for part in prompt.parts
        for text in (part.elements if isinstance(part, Set) else (part,))
    }
    ids = tokenize_texts(tokenizer, sorted(texts))
    front = front_tokens(tokenizer)
    found = []
    for prompt in prompts:
        parts: list[Part] = [] if isinstance(prompt.parts[0], str) or not front else [list(front)]
        for number, part in enumerate(prompt.parts):
            if isinstance(part, str):
                parts.append([*front, *ids[part]] if number == 0 else ids[part])
            else:
                elements = [ids[element] for element in part.elements]
                parts.append(sorted(elements) if editing.canonical else elements)
        found.append(parts)
    return found


def check_list(prompts: Sequence[SetPrompt]) -> None:
    """Raise ``TypeError`` for anything but a sequence of `SetPrompt`."""
    if not isinstance(prompts, Sequence) or not all(isinstance(prompt, SetPrompt) for prompt in prompts):
        raise TypeError("prompts must be a list of SetPrompt; wrap a single one in a list")


def tokenize_texts(tokenizer: Any, texts: Sequence[str]) -> dict[str, list[int]]:
    """Token ids of each text alone, without special tokens."""
    found = dict(zip(texts, tokenizer(list(texts), add_special_tokens=False)["input_ids"], strict=True))
    for text, ids in found.items():
        if not ids:
            raise ValueError(f"the tokenizer makes no token of {text!r}; leave this text out")
    return found


def front_tokens(tokenizer: Any) -> list[int]:
    """Special tokens that the tokenizer puts before a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a", add_special_tokens=True)["input_ids"]
    count = len(whole) - len(bare)
    if whole[count:] != bare:
        raise ValueError(
            "tokenizer puts a special token after the text, which would stand in the middle of the prompt; "
            "set tokenizer.add_eos_token = False, or use the tokenizer of a decoder-only model"
        )
    return whole[:count]


def padding_token(tokenizer: Any) -> int:
    """Id to fill with. Padding is masked, so any id gives the same result."""
    for name in ("pad_token_id", "eos_token_id"):
        if getattr(tokenizer, name, None) is not None:
            return getattr(tokenizer, name)
    return 0


def lay_out(parts: Sequence[Part], editing: Editing, filler: int, branches: Sequence[Sequence[int]] = ()) -> Row:
    """Flatten one tokenised prompt.

    Args:
        parts: of `tokenize`.
        editing: which edits to make.
        filler: id of masked padding inside elements.
        branches: continuations that all follow the prompt and do not see each other, whatever ``editing`` says:
            a last set, so to say.
    """
    blocks: list[list[int]] = []
    real: list[bool] = []
    layout: list[int | list[int]] = []
    for part in parts:
        elements = elements_of(part)
        longest = max(map(len, elements))
        width = longest if editing.pad_elements else 0
        for element in elements:
            fill = max(0, width - len(element))
            blocks.append([*element, *[filler] * fill])
            real += [True] * len(element) + [False] * fill
        lengths = [max(len(element), width) for element in elements]
        layout.append(lengths[0] if is_text(part) else lengths)
    ids = list(chain.from_iterable(blocks))
    set_ids, element_ids = (labels.tolist() for labels in set_labels(layout))
    positions: list[int] = set_positions(layout).tolist() if editing.positions else list(range(len(ids)))
    set_ids = [label if is_real else PADDING for label, is_real in zip(set_ids, real, strict=True)]
    start = positions[-1] + 1
    for number, branch in enumerate(branches, start=1):
        ids.extend(branch)
        positions += range(start, start + len(branch))
        set_ids += [BRANCH] * len(branch)
        element_ids += [number] * len(branch)
    return Row(ids, positions, set_ids, element_ids)


def collate(rows: Sequence[Row], filler: int, padding_side: Literal["left", "right"] = "left") -> dict[str, Tensor]:
    """Stack rows of different lengths: ``input_ids``, ``position_ids``, ``set_ids``, ``element_ids``, all [B, s]."""
    width = max(len(row.ids) for row in rows)

    def stack(name: str, fill: int) -> Tensor:
        padded = []
        for row in rows:
            values = getattr(row, name)
            extra = [fill] * (width - len(values))
            padded.append(extra + values if padding_side == "left" else values + extra)
        return torch.tensor(padded, dtype=torch.long)

    return {
        "input_ids": stack("ids", filler),
        "position_ids": stack("positions", 0),
        "set_ids": stack("set_ids", PADDING),
        "element_ids": stack("element_ids", 0),
    }


def separated_sets(set_ids: Int[Tensor, "B s"], editing: Editing) -> Int[Tensor, "B s"]:
    """Set ids as the mask should see them: where the mask is not edited, the sets of the prompt count as text."""
    if editing.mask:
        return set_ids
    return torch.where((set_ids == PADDING) | (set_ids == BRANCH), set_ids, torch.zeros_like(set_ids))


def encode(
    tokenizer: Any,
    prompts: Sequence[SetPrompt],
    *,
    editing: Editing = SET_BASED,
    padding_side: Literal["left", "right"] = "left",
    return_tensors: Literal["pt", "np"] = "pt",
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Token ids, position ids and attention mask of a batch of prompts, under the names that models take.

    Prompts may differ in length and in their number of sets. `forward` runs a model on the result.

    Args:
        tokenizer: a transformers tokenizer. SentencePiece tokenizers that put a space before every text do so for
            every part; byte-level ones do not, so that a leading space has to stand in the part where it is wanted.
        prompts: what to encode.
        editing: Set-Based Prompting, or an ablation.
        padding_side: ``"left"`` for generation and scoring.
        return_tensors: torch tensors or numpy arrays.
        dtype: of the mask; give ``model.dtype``.

    Returns:
        transformers' ``BatchEncoding`` with ``input_ids``, ``position_ids``, ``set_ids`` (sets counted from 1, 0 for
        text outside sets, -1 for padding), ``element_ids`` (counted from 1 inside a set), all int64 [B, s], and
        ``attention_mask`` [B, 1, s, s], 0 or the least number of ``dtype``.

    Raises:
        TypeError: ``prompts`` is no list of `SetPrompt`.
        ValueError: no prompts, a text without tokens, or a tokenizer that ends texts with a special token.
    """
    from transformers import BatchEncoding

    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
    if return_tensors not in ("pt", "np"):
        raise ValueError(f"return_tensors must be 'pt' or 'np', got {return_tensors!r}")
    filler = padding_token(tokenizer)
    rows = [lay_out(parts, editing, filler) for parts in tokenize(tokenizer, prompts, editing)]
    batch = collate(rows, filler, padding_side)
    allowed = set_attention_mask(separated_sets(batch["set_ids"], editing), batch["element_ids"])
    batch["attention_mask"] = additive_mask(allowed, dtype)
    return BatchEncoding({k: v.numpy() for k, v in batch.items()} if return_tensors == "np" else batch)


def forward(model: Any, batch: Mapping[str, Tensor], **kwargs: Any) -> Any:
    """Run a transformers decoder on what `encode` returned; the model's own output object.

    Args:
        model: checked as in `check_model`.
        batch: of `encode`, with torch tensors (moved to the model's device here, and the mask to its dtype).
        **kwargs: handed to the model, such as ``past_key_values`` or ``logits_to_keep``.

    Raises:
        TypeError: ``batch`` holds numpy arrays.
        ValueError: a model that cannot do this, or prompts longer than it takes; see `check_model`.
    """
    from torchgraft.language.set_based_prompting.support import check_model

    if not all(torch.is_tensor(batch[name]) for name in ("input_ids", "position_ids", "attention_mask")):
        raise TypeError("batch must hold torch tensors; encode with return_tensors='pt'")
    check_model(model, length=batch["input_ids"].shape[1], last_position=int(batch["position_ids"].max()))
    mask = batch["attention_mask"]
    if mask.dtype != model.dtype:
        # SDPA reads a mask of another width as garbage, and the least float32 is no number in bfloat16
        mask = additive_mask((mask == 0)[:, 0], model.dtype)
    return run(model, {**batch, "attention_mask": mask}, **kwargs)


def cache_name(model: Any) -> str:
    """What this model calls its cache: ``cache`` since transformers 5.24, ``past_key_values`` before."""
    return "cache" if "cache" in forward_arguments(model) else "past_key_values"


def forward_arguments(model: Any) -> Mapping[str, inspect.Parameter]:
    """What the model's forward takes; a model wrapped by ``torch.compile`` hides it."""
    return inspect.signature(getattr(model, "_orig_mod", model).forward).parameters


def run(model: Any, batch: Mapping[str, Tensor], **kwargs: Any) -> Any:
    """`forward` without the check."""
    return model(
        input_ids=batch["input_ids"].to(model.device),
        position_ids=batch["position_ids"].to(model.device),
        attention_mask=batch["attention_mask"].to(model.device),
        **kwargs,
    )


def with_mask(batch: dict[str, Tensor], editing: Editing, model: Any) -> dict[str, Any]:
    """Move a collated batch to the model and add the form of the mask that its attention takes."""
    moved: dict[str, Any] = {name: tensor.to(model.device) for name, tensor in batch.items()}
    separated = separated_sets(moved["set_ids"], editing)
    if model.config._attn_implementation == "flex_attention":
        moved["attention_mask"] = set_block_mask(separated, moved["element_ids"])
    else:
        moved["attention_mask"] = additive_mask(set_attention_mask(separated, moved["element_ids"]), model.dtype)
    return moved

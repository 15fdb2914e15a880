"""Hidden states of chosen words, collected over many samples from any language or multimodal model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from torchgraft.language._access import Access, Edit, edited_outputs, unwrapped
from torchgraft.surgery import evaluating

Layer = int | Literal["norm"]
Position = Literal["toi", "last", "mean_generated", "before_eos"]
At = Literal["predicts", "holds"]
Id = int | str

POSITIONS: tuple[Position, ...] = ("toi", "last", "mean_generated", "before_eos")
# keys of a batch that are not arguments of the model
_OURS = ("ids", "labels")
# of generation, which this module sets
_SET = ("use_cache", "return_dict_in_generate")


def module_of(model: nn.Module, layer: Layer) -> nn.Module:
    """The block of a decoder by its number, negative ones counted from the end, or its final norm by ``"norm"``.

    Raises:
        TypeError: for a model of another kind, or a layer that is neither.
        ValueError: when there is no such layer.
    """
    access = Access(model)
    if layer != "norm":
        return access.layer(layer)
    if access.final_norm is None:
        raise ValueError(f"layer 'norm' does not exist in {type(model).__name__}; its blocks end with their own norm")
    return access.final_norm


def refuse_virtual_tokens(model: nn.Module) -> None:
    """Adapters of peft that put tokens of their own before the prompt have no place in the batch.

    Raises:
        TypeError: when such an adapter is active.
    """
    settings: Any = getattr(model, "active_peft_config", None)
    if getattr(settings, "is_prompt_learning", False):
        raise TypeError(
            f"model must not have an active {settings.peft_type.value} adapter, whose tokens stand before the prompt; "
            "adapters inside of layers, such as LoRA, are read and steered"
        )


@dataclass(frozen=True)
class StateSet:
    """Hidden states of samples, with what is needed to pair them with those of another model.

    Attributes:
        states: (N, D) for each layer, a row for each sample that had the word, in the order of ``ids``.
        ids: of all M samples, those without the word too.
        mask: (M,), which of them had it; N are set.
        texts: of all M samples, the answer that was read or generated; empty without a tokenizer.
        vocabulary: a fingerprint of the tokenizer; empty where none was given.
    """

    states: Mapping[Layer, Tensor]
    ids: tuple[Id, ...]
    mask: Tensor
    texts: tuple[str, ...] = ()
    vocabulary: str = ""

    def __post_init__(self) -> None:
        if self.mask.shape != (len(self.ids),) or self.mask.dtype != torch.bool:
            raise ValueError(
                f"mask must be boolean, one for each of {len(self.ids)} ids, got {tuple(self.mask.shape)}, "
                f"{self.mask.dtype}"
            )
        if len(set(self.ids)) < len(self.ids):
            twice = sorted({str(i) for i in self.ids if self.ids.count(i) > 1})
            raise ValueError(f"ids must be different, got {', '.join(twice[:5])} more than once")
        if self.texts and len(self.texts) != len(self.ids):
            raise ValueError(f"texts must be one for each of {len(self.ids)} ids, got {len(self.texts)}")
        rows = int(self.mask.sum())
        for layer, found in self.states.items():
            if found.dim() != 2 or len(found) != rows:
                raise ValueError(
                    f"states of layer {layer!r} must be ({rows}, D), a row for each sample of the mask, got "
                    f"{tuple(found.shape)}"
                )

    @property
    def present(self) -> tuple[Id, ...]:
        """Ids of the rows of ``states``."""
        return tuple(i for i, kept in zip(self.ids, self.mask.tolist(), strict=True) if kept)

    def of(self, layer: Layer | None = None) -> Tensor:
        """(N, D) of a layer; of the only one where None.

        Raises:
            ValueError: for a layer that was not collected, or none named among several.
        """
        if layer is None and len(self.states) == 1:
            return next(iter(self.states.values()))
        if layer is None or layer not in self.states:
            raise ValueError(f"layer must be one of {list(self.states)}, got {layer!r}")
        return self.states[layer]

    def subset(self, ids: Iterable[Id]) -> StateSet:
        """The samples of these ids alone, for instance half of them; in the order that they have here.

        Raises:
            ValueError: for an id that is not here.
        """
        wanted = set(ids)
        if unknown := wanted - set(self.ids):
            raise ValueError(f"ids must be of this set, got {sorted(map(str, unknown))[:5]}")
        kept = [k for k, i in enumerate(self.ids) if i in wanted]
        rows = torch.tensor([k for k, i in enumerate(self.present) if i in wanted], dtype=torch.int64)
        return StateSet(
            {layer: found[rows.to(found.device)] for layer, found in self.states.items()},
            tuple(self.ids[k] for k in kept),
            self.mask[kept],
            tuple(self.texts[k] for k in kept) if self.texts else (),
            self.vocabulary,
        )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        about = {"ids": json.dumps(self.ids), "texts": json.dumps(self.texts), "vocabulary": self.vocabulary}
        tensors = {f"layer.{layer}": found.contiguous() for layer, found in self.states.items()}
        save_file(tensors | {"mask": self.mask}, path, metadata=about)

    @classmethod
    def load(cls, path: str | Path) -> StateSet:
        """Read what ``save`` wrote.

        Raises:
            ValueError: for a safetensors file that holds something else.
        """
        with safe_open(path, "pt") as file:
            about, names = file.metadata() or {}, list(file.keys())
            if "ids" not in about or "mask" not in names:
                raise ValueError(f"{path} does not hold hidden states; its tensors are {names[:5]}")
            tensors = {name: file.get_tensor(name) for name in names}
        mask = tensors.pop("mask")
        states = {name.removeprefix("layer."): found for name, found in tensors.items()}
        return cls(
            {"norm" if name == "norm" else int(name): found for name, found in states.items()},
            tuple(json.loads(about["ids"])), mask, tuple(json.loads(about["texts"])), about["vocabulary"],
        )  # fmt: skip


def common_rows(a: StateSet, b: StateSet) -> tuple[Tensor, Tensor]:
    """Rows of ``a.states`` and of ``b.states`` that are of the same samples, in the order of ``a``.

    A sample counts when both models have the word in it.

    Raises:
        ValueError: when there is no such sample, or the sets were collected with different tokenizers.
    """
    if a.vocabulary and b.vocabulary and a.vocabulary != b.vocabulary:
        raise ValueError("a and b were collected with different tokenizers; their states cannot be paired")
    there = {i: row for row, i in enumerate(b.present)}
    pairs = [(row, there[i]) for row, i in enumerate(a.present) if i in there]
    if not pairs:
        raise ValueError(
            f"a and b have no sample in common: ids of a begin {a.present[:3]}, of b {b.present[:3]}; collect both "
            "from the same samples, with ids"
        )
    rows = torch.tensor(pairs)
    return rows[:, 0], rows[:, 1]


def _plain(tokenizer: Any) -> Any:
    """The tokenizer inside a processor, or the tokenizer itself."""
    return getattr(tokenizer, "tokenizer", tokenizer)


def word_tokens(tokenizer: Any, words: str | Sequence[str]) -> list[list[int]]:
    """The sequences of tokens that words are split into, with a space before them and without.

    A tokenizer that marks the beginning of a word by a token of its own (an older SentencePiece model) has that token
    taken away.

    Raises:
        TypeError: for words that are not text.
        ValueError: for no words, or a word without a token.
    """
    listed = [words] if isinstance(words, str) else list(words)
    if not all(isinstance(word, str) for word in listed):
        raise TypeError(f"token_of_interest must be a word or words, got {words!r}")
    plain = _plain(tokenizer)
    found: list[list[int]] = []
    for word in listed:
        for text in (word, " " + word):
            ids = list(plain(text, add_special_tokens=False)["input_ids"])
            while ids and not plain.decode(ids[:1]).strip():
                ids = ids[1:]
            if not ids or not word.strip():
                raise ValueError(f"token_of_interest must be words that have tokens, got {word!r}")
            if ids not in found:
                found.append(ids)
    if not found:
        raise ValueError("token_of_interest must be at least one word, got none")
    return found


def first_match(
    ids: Int[Tensor, "B T"], answer: Bool[Tensor, "B T"], sequences: Sequence[Sequence[int]]
) -> Bool[Tensor, "B T"]:
    """Where the first of these sequences of tokens begins in the answer of each row; nowhere where there is none."""
    starts = torch.zeros_like(answer)
    for sequence in sequences:
        wide = len(sequence)
        if wide > ids.shape[1]:
            continue
        wanted = torch.tensor(list(sequence), device=ids.device)
        hits = (ids.unfold(1, wide, 1) == wanted).all(-1) & answer.unfold(1, wide, 1).all(-1)
        starts[:, : hits.shape[1]] |= hits
    return starts & (starts.cumsum(1) == 1)


def _until_end(ids: Tensor, answer: Tensor, ends: Sequence[int], keep: bool) -> Tensor:
    """The answer (B, T) up to its first end token, with it or without."""
    if not ends:
        return answer
    end = torch.isin(ids, torch.tensor(list(ends), device=ids.device)) & answer
    after = end.cumsum(1)
    return answer & (after - end.long() == 0 if keep else after == 0)


def _where(
    ids: Tensor, answer: Tensor, position: Position, sequences: Sequence[Sequence[int]], ends: Sequence[int]
) -> Tensor:
    """Tokens (B, T) whose states are wanted; their mean is taken where they are several."""
    answer = _until_end(ids, answer, ends, keep=position != "before_eos")
    if position == "toi":
        return first_match(ids, answer, sequences)
    if position == "last":
        places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        last = places.masked_fill(~answer, -1).amax(1, keepdim=True)
        return (places == last) & answer
    return answer


def _pooled(hidden: Tensor, where: Tensor) -> Tensor:
    """The mean (B, D) of the states (B, T, D) at set places (B, T), in float32 at least; nothing else is touched."""
    rows, columns = where.nonzero(as_tuple=True)
    chosen = hidden[rows, columns]
    chosen = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
    total = chosen.new_zeros(len(where), chosen.shape[-1]).index_add_(0, rows, chosen)
    return total / where.sum(1, keepdim=True).clamp(min=1)


def _predicting(where: Tensor, read: Tensor) -> Tensor:
    """The places (B, T - 1) one before; those that are not read have no state."""
    return where[:, 1:] & read[:, :-1]


def cached_length(values: Iterable[Any]) -> int:
    """How many tokens the cache among these holds; none where there is none."""
    caches = [value for value in values if hasattr(value, "get_seq_length")]
    return int(caches[0].get_seq_length()) if caches else 0


def _ends(model: nn.Module, plain: Any) -> list[int]:
    settings = getattr(unwrapped(model), "generation_config", None)
    found = getattr(settings, "eos_token_id", None)
    if found is None:
        found = getattr(plain, "eos_token_id", None)
    return [] if found is None else [found] if isinstance(found, int) else list(found)


def fingerprint(tokenizer: Any) -> str:
    """Tells tokenizers with different vocabularies apart."""
    vocabulary = json.dumps(sorted(_plain(tokenizer).get_vocab().items()))
    return hashlib.sha256(vocabulary.encode()).hexdigest()[:16]


@torch.no_grad()
def collect_states(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    layers: Sequence[Layer],
    token_of_interest: str | Sequence[str] | None = None,
    position: Position = "toi",
    teacher_forcing: bool = True,
    *,
    tokenizer: Any = None,
    at: At = "predicts",
    max_new_tokens: int = 32,
    **generation: Any,
) -> StateSet:
    """Hidden states of a word, or of an answer, over many samples; one call for text and multimodal models.

    Khayatan et al., "Analyzing Fine-tuning Representation Shift for Multimodal LLMs Steering alignment" (section 3),
    after the concept dictionaries of CoX-LMM (arXiv 2406.08074). For the states of a fine-tuned model and of the one
    that it came from, run it twice, the second time inside peft's ``with model.disable_adapter():``.

    With teacher forcing the answer stands in the batch and one forward pass per batch does, without the head; rows
    are picked where the layer ends, so that no (B, T, D) is kept. Without it answers are generated, token by token,
    and their states collected on the way: what the model itself says, for many times the cost.

    Args:
        model: a transformers language model of a family of this room, or a multimodal one whose decoder is of such a
            family (LLaVA, PaliGemma, Qwen2-VL to Qwen3-VL, Idefics 2 and 3, SmolVLM, Gemma 3, InternVL, Mistral 3),
            also inside a peft model: what is active there is read, merged or not.
        batches: mappings of what the model takes: ``input_ids`` (B, T), ``attention_mask``, ``pixel_values`` and so on,
            as a processor makes them. Besides ``ids``, B names of samples (running numbers where absent), and with
            teacher forcing ``labels`` (B, T), -100 where a token is not of the answer. Where absent all tokens are, up
            to the first end token, image tokens too, so that prompts of a chat template and means over answers about
            images need labels. With teacher forcing padding may be on either side; prompts to generate from must be
            padded on the left; a cache of what all of them begin with may come along. PaliGemma wants
            ``token_type_ids`` that are 1 in the answer, or reads it in both directions.
        layers: numbers of blocks, from the end where negative, and ``"norm"`` for the final norm, which fits the head.
        token_of_interest: the word, or words that count as one, for ``position="toi"`` alone. A word split into tokens
            is found by all of them, and its first one gives the state. Letters count as they are: the official code
            looks for "Dog" with "dog", which is ``["dog", "Dog"]`` here.
        position: ``toi``, the first such word in the answer; ``last``, the answer's last token; ``mean_generated``,
            the mean over its tokens; ``before_eos``, that without the end token.
        teacher_forcing: read answers, or generate them.
        tokenizer: or processor; needed for ``toi``, gives ``texts``, and is remembered so that states of different
            tokenizers are not paired.
        at: ``predicts``, the state one token earlier, which produced the token, as the official code has it when it
            generates; ``holds``, the state of the token itself.
        max_new_tokens, **generation: for ``generate``; greedy unless they say otherwise.

    Returns:
        States (N, D) by layer, on the CPU, float32 (float64 for a float64 model). Samples without the word, or whose
        word is the first token and so is predicted by none, are in ``ids`` but not in ``mask``.

    Raises:
        TypeError: for a model of another kind or with an active prompt-tuning adapter of peft, or one batch instead
            of several.
        ValueError: for layers that are not there, unknown ``position`` or ``at``, ``toi`` without word or tokenizer, a
            word without ``toi``, no batches, batches without ``input_ids``, no sample with a state, ids that repeat,
            beams, options of generation with teacher forcing, prompts padded on the right, or hidden states of another
            length than ``input_ids`` (image tokens must be expanded in them, as processors of transformers 5 do).

    Example:
        >>> batch = tokenizer(["A red dog", "A cat and a dog"], padding=True, return_tensors="pt")  # doctest: +SKIP
        >>> states = collect_states(model, [batch], ["norm"], "dog", tokenizer=tokenizer)  # doctest: +SKIP
        >>> states.of("norm").shape, states.present  # doctest: +SKIP
        (torch.Size([2, 576]), (0, 1))
    """
    if position not in POSITIONS:
        raise ValueError(f"position must be one of {', '.join(POSITIONS)}, got {position!r}")
    if at not in ("predicts", "holds"):
        raise ValueError(f"at must be 'predicts' or 'holds', got {at!r}")
    if position == "toi" and (token_of_interest is None or tokenizer is None):
        raise ValueError("position 'toi' needs token_of_interest and tokenizer; or choose 'last' or 'mean_generated'")
    if position != "toi" and token_of_interest is not None:
        raise ValueError(f"token_of_interest goes with position 'toi', got {token_of_interest!r} and {position!r}")
    if teacher_forcing and generation:
        raise ValueError(f"{sorted(generation)} are of generation; set teacher_forcing=False, or leave them out")
    for name in ("num_beams", "num_return_sequences"):
        if generation.get(name, 1) != 1:
            raise ValueError(f"{name} must be 1, got {generation[name]}; more mix the states of samples")
    if given_too := sorted(set(_SET) & set(generation)):
        raise ValueError(f"{given_too} are set here; leave them out")
    refuse_virtual_tokens(model)
    layers = list(dict.fromkeys(layers))
    if not layers:
        raise ValueError("layers must be at least one, got none")
    for layer in layers:
        module_of(model, layer)
    plain = _plain(tokenizer) if tokenizer is not None else None
    sequences = word_tokens(plain, token_of_interest) if position == "toi" and token_of_interest is not None else []
    ends = _ends(model, plain)
    found: dict[Layer, list[Tensor]] = {layer: [] for layer in layers}
    ids: list[Id] = []
    masks: list[Tensor] = []
    texts: list[str] = []
    access = Access(model)
    inner: Any = unwrapped(model)
    body = getattr(inner, "base_model", inner)
    device = access.unembedding.device

    def checked(hidden: Tensor, length: int) -> Tensor:
        if hidden.shape[1] != length:
            raise ValueError(
                f"input_ids have {length} places and hidden states {hidden.shape[1]}; image tokens must be expanded in "
                "input_ids, as processors of transformers 5 do"
            )
        return hidden

    with evaluating(model):
        for batch in batches:
            if not isinstance(batch, Mapping):
                raise TypeError(f"batches must be mappings, got {type(batch).__name__}; put a single batch in a list")
            if "input_ids" not in batch:
                raise ValueError(f"batches must hold input_ids, got {list(batch)}")
            given = {key: v.to(device) if isinstance(v, Tensor) else v for key, v in batch.items() if key not in _OURS}
            tokens = given["input_ids"]
            read = given.setdefault("attention_mask", torch.ones_like(tokens)).bool()
            named = batch.get("ids", range(len(ids), len(ids) + len(tokens)))
            named = named.tolist() if isinstance(named, Tensor) else list(named)
            if len(named) != len(tokens):
                raise ValueError(f"a batch of {len(tokens)} samples has {len(named)} ids")
            if teacher_forcing:
                labels = batch.get("labels")
                answer = read if labels is None else read & (labels.to(device) != -100)
                where = places = _where(tokens, answer, position, sequences, ends)
                if at == "predicts":
                    places = torch.nn.functional.pad(_predicting(where, read), (0, 1))
                kept: dict[Layer, Tensor] = {}
                with edited_outputs(
                    [(module_of(model, layer), _keep(kept, layer, places, checked)) for layer in layers]
                ):
                    body(**given)
            else:
                if not read[:, -1].all():
                    raise ValueError("prompts to generate from must be padded on the left; set padding_side='left'")
                streams: dict[Layer, list[Tensor]] = {layer: [] for layer in layers}
                known = cached_length([*given.values(), *generation.values()])
                options: dict[str, Any] = {
                    "do_sample": False, "num_beams": 1, "num_return_sequences": 1, "max_new_tokens": max_new_tokens,
                    "use_cache": True, "return_dict_in_generate": False,
                }  # fmt: skip
                with edited_outputs([(module_of(model, layer), _append(streams[layer])) for layer in layers]):
                    whole = inner.generate(**given, **(options | generation))
                answer = torch.ones_like(whole, dtype=torch.bool)
                answer[:, : tokens.shape[1]] = False
                read = torch.cat([read, answer[:, tokens.shape[1] :]], 1)
                tokens = whole
                where = _where(tokens, answer, position, sequences, ends)
                # the last token generated was never read
                places = (_predicting(where, read) if at == "predicts" else where[:, :-1])[:, known:]
                kept = {
                    layer: _pooled(checked(torch.cat(parts, 1), places.shape[1]), places)
                    for layer, parts in streams.items()
                }
                answer = _until_end(tokens, answer, ends, keep=True)
            has = places.any(1)
            for layer in layers:
                found[layer].append(kept[layer][has].cpu())
            ids += named
            masks.append(has.cpu())
            if plain is not None:
                texts += [plain.decode(row[shown], skip_special_tokens=True)
                          for row, shown in zip(tokens, answer, strict=True)]  # fmt: skip
    if not masks:
        raise ValueError("batches must be at least one, got none")
    if not any(mask.any() for mask in masks):
        raise ValueError(
            f"none of {len(ids)} samples has a state at {position!r}, {at!r}: "
            + (f"{token_of_interest!r} must be in an answer" if position == "toi" else "answers must have tokens")
            + (", after its first token" if at == "predicts" else "")
            + (", before its last one, which generation does not read" if not teacher_forcing and at == "holds" else "")
            + (f"; the first answer is {texts[0][:60]!r}" if texts else "")
        )
    return StateSet(
        {layer: torch.cat(parts) for layer, parts in found.items()},
        tuple(ids),
        torch.cat(masks),
        tuple(texts),
        "" if plain is None else fingerprint(plain),
    )


def _keep(kept: dict[Layer, Tensor], layer: Layer, places: Tensor, checked: Callable[[Tensor, int], Tensor]) -> Edit:
    def edit(hidden: Tensor) -> Tensor:
        kept[layer] = _pooled(checked(hidden, places.shape[1]), places.to(hidden.device))
        return hidden

    return edit


def _append(parts: list[Tensor]) -> Edit:
    def edit(hidden: Tensor) -> Tensor:
        parts.append(hidden)
        return hidden

    return edit

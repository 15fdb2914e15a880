"""The provider's side: rows of the embedding matrix mirrored, moved and permuted."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from torchgraft.text.sentinel.keys import SentinelKey
from torchgraft.text.sentinel.tokenizer import SentinelTokenizer

__all__ = ["SentinelReport", "adapt", "glide", "permuted_rows", "reflect"]

_MARK = "sentinel_adapted"  # in the model's configuration, so that it is noticed after loading too
_LISTS_OF_IDS = ("bad_words_ids", "begin_suppress_tokens", "force_words_ids", "forced_decoder_ids", "sequence_bias",
                 "suppress_tokens")  # fmt: skip
_CHUNK = 128  # rows at a time, so that they stay in the processor's cache over all steps


def reflect(rows: Float[Tensor, "V D"], line: Float[Tensor, " D"]) -> Float[Tensor, "V D"]:
    """Every row mirrored at the hyperplane through 0 whose normal is ``line``: ``w - 2 (w . l) / (l . l) l``.

    Example:
        >>> reflect(torch.tensor([[3.0, 1.0]]), torch.tensor([2.0, 0.0]))
        tensor([[-3.,  1.]])
    """
    return rows - torch.outer(rows @ line * (2 / line.dot(line)), line)


def glide(
    rows: Float[Tensor, "V D"], lines: Float[Tensor, "K D"], translations: Float[Tensor, "K D"]
) -> Float[Tensor, "V D"]:
    """K glide reflections in a row, each a reflection and then a translation (section 3.2).

    Distances between rows stay as they are. Computed in float64 and rounded once to the type of ``rows``, which after
    a translation of several times their spread costs a bfloat16 some of its eight bits.

    Args:
        rows: embedding matrix.
        lines: normals of the mirrors; their lengths do not matter.
        translations: added after each reflection.

    Raises:
        TypeError: when ``rows`` holds whole numbers.
        ValueError: when lines and translations do not fit, or a line is zero or not finite.
    """
    if lines.shape != translations.shape or lines.shape[-1] != rows.shape[-1]:
        raise ValueError(
            f"lines and translations must both be (steps, {rows.shape[-1]}), "
            f"got {tuple(lines.shape)} and {tuple(translations.shape)}"
        )
    if not rows.is_floating_point():
        raise TypeError(f"rows must be floating-point numbers, got {rows.dtype}")
    lines, translations = lines.to(rows.device, torch.float64), translations.to(rows.device, torch.float64)
    squares = lines.square().sum(-1).tolist()
    if not all(0 < square < float("inf") for square in squares):
        raise ValueError("lines has a row that is zero or not finite, which is no direction to mirror along")
    # reflections are linear: the translations go through them by themselves and are added once, at the end
    shift = lines.new_zeros(lines.shape[-1])
    for line, step in zip(lines, translations, strict=True):
        shift = reflect(shift[None], line)[0] + step
    moved = torch.empty_like(rows)
    buffer = torch.empty(_CHUNK, rows.shape[-1], dtype=torch.float64, device=rows.device)
    for start in range(0, len(rows), _CHUNK):
        part = buffer[: len(rows) - start].copy_(rows[start : start + _CHUNK])
        for line, square in zip(lines, squares, strict=True):
            part.addr_(part @ line, line, alpha=-2 / square)
        moved[start : start + _CHUNK] = part.add_(shift)
    return moved


def permuted_rows(rows: Float[Tensor, "V ..."], new_ids: Int[Tensor, " n"]) -> Float[Tensor, "V ..."]:
    """Row ``i`` moved to place ``new_ids[i]``; rows beyond the permutation stay."""
    moved = rows.clone()
    moved[new_ids.to(rows.device)] = rows[: len(new_ids)]
    return moved


@dataclass(frozen=True)
class SentinelReport:
    """What was done to a model. Holds nothing secret.

    Attributes:
        tokens: size of the vocabulary, special tokens included.
        special: how many of them stay readable.
        moved: how many rows changed their place.
        glide_steps, directions, scale_preserving, shuffle: as given.
        shift: length of the total translation, divided by the root mean square length of the original rows.
        head: ``none``; ``tied`` (still the embedding matrix itself); ``untied`` (was, and now has rows of its own, not
            mirrored); ``own`` (had its own rows, which were permuted).
        warnings: what an attacker gets for nothing, in words.
    """

    tokens: int
    special: int
    moved: int
    glide_steps: int
    directions: str
    scale_preserving: bool
    shuffle: bool
    shift: float
    head: Literal["none", "tied", "untied", "own"]
    warnings: tuple[str, ...]


def _embedding(model: nn.Module) -> nn.Embedding:
    try:
        found = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        found = None
    if not isinstance(found, nn.Embedding):
        raise ValueError(
            "model must look tokens up in a torch.nn.Embedding that get_input_embeddings() returns; "
            f"{type(model).__name__} gave {type(found).__name__}. Adapt a model before anything is put around its "
            "embedding (peft, quantization)"
        )
    if not found.weight.is_floating_point() or found.weight.is_meta:
        raise ValueError(
            f"model's embedding matrix must be loaded, as floating-point numbers; it is {found.weight.dtype} on "
            f"{found.weight.device}. Load the model without quantization of the embedding and without offloading"
        )
    return found


def _finite(rows: Tensor) -> bool:
    return bool(rows.detach().mean().isfinite())  # ten times as fast as asking every entry


def _head(model: nn.Module, size: int) -> Any:
    found: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    weight = getattr(found, "weight", None)
    return found if isinstance(weight, Tensor) and weight.shape[0] == size else None


def _check_rest(model: nn.Module, size: int, handled: Iterable[Tensor]) -> None:
    """Refuse models that keep the vocabulary in a place we do not know of."""
    known = {id(t) for t in handled}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    strange = [name for name, t in tensors if id(t) not in known and size in t.shape]
    if strange:
        raise ValueError(
            f"model is of an unsupported architecture: besides input embeddings and output head, {strange[0]!r} "
            f"has a dimension of the vocabulary's size {size}, and its order would no longer fit"
        )


def _check_configured_ids(model: nn.Module, client: SentinelTokenizer) -> None:
    moved = client.permutation.tolist()
    for owner in ("config", "generation_config"):
        settings = getattr(model, owner, None)
        for name, value in (settings.to_dict() if settings is not None else {}).items():
            if name in _LISTS_OF_IDS and value:
                raise ValueError(
                    f"model.{owner}.{name} holds ids of the original vocabulary; set it to None, and give ids of the "
                    "adapted model (client.permutation) to generate instead"
                )
            if name.endswith("_token_id") and value is not None:
                for i in value if isinstance(value, list) else [value]:
                    if 0 <= i < len(moved) and moved[i] != i:
                        raise ValueError(
                            f"model.{owner}.{name} is {i}, which is not a special token of the tokenizer and would "
                            "change its id; add it to the tokenizer's special tokens, or set it to None"
                        )


def adapt(
    model: Any,
    tokenizer: Any,
    key: SentinelKey,
    glide_steps: int = 2,
    shuffle: bool = True,
    directions: Literal["random", "official"] = "random",
    scale_preserving: bool = False,
    *,
    translation: float = 1.0,
    inplace: bool = False,
) -> tuple[Any, Any, SentinelReport]:
    """Make a pretrained model read hashes instead of words (section 3 of the paper).

    Rows of the token embedding are mirrored and moved ``glide_steps`` times and put at permuted places; the output
    head of a language model is permuted to match, so that the logit of a new id is the one its token had. All other
    weights stay. Fine-tune the result on hashed texts as you would have fine-tuned the original.

    With ``glide_steps=0`` the model computes exactly what it did. So it does with ``directions="official"`` where
    LayerNorm follows the embedding sum directly (BERT, RoBERTa, DistilBERT, ELECTRA, XLM-R, MiniLM), since that
    subtracts whatever lies along the all-ones direction; such a transformation hides nothing. Random directions change
    the function until it is fine-tuned.

    This is obfuscation. Distances between rows are what they were, and ``recovery_attack`` finds the words again from
    nothing but the public model; the hidden order of the vocabulary is then known too.

    Where a language model's head was tied to its embedding, mirroring unties it (``config.tie_word_embeddings`` is
    False then). Its rows stay unmirrored, or the logits would be wrong; the report warns.

    Args:
        model: a transformers model with one token embedding: BERT, RoBERTa, DistilBERT, MiniLM, ELECTRA, ALBERT,
            XLM-R, DeBERTa, T5's encoder, Llama, Mistral, Qwen, Gemma, GPT-2, OPT, …, with or without a head.
        tokenizer: its fast tokenizer.
        key: the key; the client uses the same one.
        glide_steps: K of the paper, 0 to leave the geometry alone; the script's default is 2.
        shuffle: permute ids. Without it the place of a row says which word it is.
        directions: ``"random"`` mirror lines and translations, or the script's multiples of the all-ones vector.
        scale_preserving: reflections only, so that norms and angles stay too.
        translation: with random directions, standard deviation of a translation's entries as a multiple of the root
            mean square of the embedding's entries. With large ones words become a small part of what the layers see:
            fine-tune without dropout and standardise what the head reads, as the recipe does. 8 is about what the
            script's numbers from [0, 1) are to a BERT.
        inplace: change ``model`` itself instead of a copy.

    Returns:
        The adapted model, the tokenizer for it (``SentinelTokenizer.as_server_tokenizer``), and a report.

    Raises:
        TypeError: for a key that is none, or a switch that is neither True nor False.
        ValueError: for an unsupported architecture, an embedding that is not finite, a model that was adapted before,
            a tokenizer that does not fit, or settings out of range; ``model`` is then as it was.

    Example:
        >>> from torchgraft.text.sentinel import toy_model
        >>> model, tokenizer = toy_model("bert")
        >>> key = SentinelKey("a long random passkey")
        >>> adapted, server, report = adapt(model, tokenizer, key, glide_steps=0)
        >>> sent = SentinelTokenizer(tokenizer, key).encrypt("a good film")
        >>> plain = model(**tokenizer("a good film", return_tensors="pt")).last_hidden_state
        >>> torch.allclose(adapted(**server(sent, return_tensors="pt")).last_hidden_state, plain, atol=1e-6)
        True
    """
    if isinstance(glide_steps, bool) or not isinstance(glide_steps, int) or glide_steps < 0:
        raise ValueError(f"glide_steps must be a whole number from 0, got {glide_steps!r}")
    if directions not in ("random", "official"):
        raise ValueError(f"directions must be 'random' or 'official', got {directions!r}")
    for name, value in (("shuffle", shuffle), ("scale_preserving", scale_preserving), ("inplace", inplace)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
    if isinstance(translation, bool) or not (isinstance(translation, (int, float)) and 0 <= translation < float("inf")):
        raise ValueError(f"translation must be a number from 0, got {translation!r}")
    if getattr(getattr(model, "config", None), _MARK, False):
        raise ValueError("model is adapted already; adapt the original one, or a new copy of it, for another key")
    client = SentinelTokenizer(tokenizer, key, shuffle=shuffle)
    embedding = _embedding(model)
    size, width = embedding.weight.shape
    if not _finite(embedding.weight):
        raise ValueError("model's embedding matrix has entries that are not finite; did its training diverge?")
    if len(client.permutation) > size:
        raise ValueError(
            f"tokenizer has ids up to {len(client.permutation) - 1}, but the model's embedding has {size} rows; "
            "they do not belong together, or model.resize_token_embeddings was not called"
        )
    head = _head(model, size)
    tied = head is not None and head.weight is embedding.weight
    bias = getattr(head, "bias", None)
    if tied and glide_steps and getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} ties its output head to embeddings that encoder and decoder share, which cannot "
            "be mirrored apart from it; use glide_steps=0, or the encoder alone (T5EncoderModel)"
        )
    _check_rest(model, size, [t for t in (embedding.weight, getattr(head, "weight", None), bias) if t is not None])
    _check_configured_ids(model, client)

    lines, shifts = map(torch.from_numpy, key.directions(directions, glide_steps, width))
    spread = embedding.weight.detach().double().square().mean().sqrt().item()
    if directions == "random":
        shifts = shifts * (translation * spread)
    if scale_preserving:
        shifts = torch.zeros_like(shifts)

    target = model if inplace else copy.deepcopy(model)
    embedding, head = _embedding(target), _head(target, size)
    with torch.no_grad():
        # everything is computed before anything is changed
        old, order = embedding.weight.detach(), client.permutation
        rows = permuted_rows(glide(old, lines, shifts) if glide_steps else old, order)
        answers = None if head is None or (tied and not glide_steps) else permuted_rows(head.weight.detach(), order)
        offsets = None if bias is None else permuted_rows(head.bias.detach(), order)
        if offsets is not None:
            head.bias.copy_(offsets)
        if answers is not None:
            if tied:
                _untie(target, head)
            head.weight.data = answers
        embedding.weight.data = rows
    if hasattr(target, "config"):
        setattr(target.config, _MARK, True)
    total = glide(torch.zeros(1, width, dtype=torch.float64), lines, shifts).norm().item() if glide_steps else 0.0
    kind: Any = "none" if head is None else ("own" if not tied else "untied" if glide_steps else "tied")
    report = SentinelReport(
        tokens=len(client.tokenizer.get_vocab()),
        special=len(client.special),
        moved=int((client.permutation != torch.arange(len(client.permutation))).sum()),
        glide_steps=glide_steps,
        directions=directions,
        scale_preserving=scale_preserving,
        shuffle=client.shuffle,
        shift=total / (spread * width**0.5),
        head=kind,
        warnings=_warnings(kind, glide_steps, directions, client.shuffle),
    )
    return target, client.as_server_tokenizer(), report


def _untie(model: Any, head: Any) -> None:
    """Give the head parameters of its own, and let the model and its configuration know."""
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    # transformers ties BERT's head bias to a twin under the same switch; two equal ones survive saving and loading
    if isinstance(bias := getattr(head, "bias", None), nn.Parameter):
        head.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    model.config.tie_word_embeddings = False
    for module in model.modules():
        if hasattr(module, "all_tied_weights_keys"):
            module.all_tied_weights_keys = {}


def _warnings(head: str, steps: int, directions: str, shuffle: bool) -> tuple[str, ...]:
    found = []
    if not shuffle:
        found.append("ids are not permuted: the place of a row says which word it is")
    if steps == 0:
        found.append("rows are the public model's own: the nearest row says which word it is")
    elif directions == "official":
        found.append("lines and translations lie along the all-ones vector, which LayerNorm takes out again")
    if steps and head in ("untied", "own"):
        found.append("the output head holds rows that were permuted but not mirrored, like the public model's")
    return tuple(found)

"""Attention without association: patterns that do not look at the data, put in the place of those that do."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from torchgraft.language._access import Access, eager_attention, unwrapped
from torchgraft.surgery import evaluating

Mode = Literal["none", "uniform", "position", "fixed", "identity", "zero"]
Given = str | Sequence[int] | Tensor
_PREFIX = "torchgraft_association_"


@dataclass(frozen=True)
class _Replacement:
    mode: Mode
    heads: tuple[int, ...] | None
    table: Tensor | None


_ACTIVE: WeakKeyDictionary[nn.Module, list[_Replacement]] = WeakKeyDictionary()


def causal_model(model: nn.Module) -> Access:
    """Access to a model that predicts the next token.

    Raises:
        TypeError: for encoders, and models that ``Access`` does not know.
    """
    access = Access(model)
    if access.family.final_norm is None:
        raise TypeError(f"model must be a causal language model, got {type(model).__name__}, which sees both sides")
    return access


def _allowed(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """Which keys (B or 1, 1, Tq, Tk) a query may see.

    transformers leaves the mask out where a lone query sees all keys, and where the first query is the first token;
    more keys than queries are then empty places of a static cache.
    """
    if mask is None:
        everything = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device)
        return (everything if len(everything) == 1 else everything.tril())[None, None]
    return mask if mask.dtype == torch.bool else mask > -1


def _weights(replacement: _Replacement, allowed: Tensor, cropped: bool) -> Tensor:
    """Rows (B or 1, H or 1, Tq, Tk) that sum to 1 over the allowed keys; rows of padding, which sees nothing, are 0."""
    key = torch.arange(allowed.shape[-1], device=allowed.device)
    # a token is the last that it sees itself, which holds for every kind of cache
    own = torch.where(allowed, key, -1).amax(-1, keepdim=True)
    if replacement.mode == "uniform":
        raw = allowed.double()
    elif replacement.mode == "identity":
        raw = (own == key).double() * allowed
    else:
        table = replacement.table
        assert table is not None
        first = allowed.any(-2, keepdim=True).int().argmax(-1, keepdim=True)
        longest = int((own - first).max()) + 1
        if table.shape[-1] < longest:
            raise ValueError(f"pattern covers {table.shape[-1]} places, got a text of {longest}")
        if replacement.mode == "fixed" and cropped:
            raise ValueError("fixed patterns need whole texts where a window crops the cache: use_cache=False")
        table, last = table.to(allowed.device, torch.float64), table.shape[-1] - 1
        if replacement.mode == "position":
            raw = table[:, (own - key).clamp(0, last)[:, 0]].transpose(0, 1) * allowed
        else:
            # places are counted from the first token that is not padding
            query, at = ((x - first).clamp(0, last)[:, 0] for x in (own, key))
            raw = table[:, query, at].transpose(0, 1) * allowed
    total = raw.sum(-1, keepdim=True)
    # a place to which the pattern gives no weight (a fixed one under other padding) is left with the uniform mean
    even = allowed.double()
    return torch.where(total > 0, raw / total.clamp(min=1e-300), even / even.sum(-1, keepdim=True).clamp(min=1))


def _attend(before: Callable[..., Any] | None) -> Callable[..., Any]:
    """An attention function of transformers that asks first whether its module is replaced."""

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        # the eager function is each modelling file's own
        inner: Any = before or vars(sys.modules[type(module).__module__])["eager_attention_forward"]
        replacements = [r for r in _ACTIVE.get(module, []) if r.mode != "none"]
        if any(r.heads is None for r in replacements):
            last = max(i for i, r in enumerate(replacements) if r.heads is None)
            replacements, out, weights = replacements[last:], None, None
        else:
            out, weights = inner(module, query, key, value, attention_mask, **kwargs)
        values = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
        cropped = kwargs.get("sliding_window") is not None and query.shape[2] < key.shape[2]
        for replacement in replacements:
            if replacement.mode == "zero":
                rows = values.new_zeros(1, 1, query.shape[2], key.shape[2])
            else:
                rows = _weights(replacement, _allowed(query, key, attention_mask), cropped).to(values.dtype)
            rows = rows.expand(len(values), values.shape[1], -1, -1)
            new = (rows @ values).transpose(1, 2)
            if out is None or replacement.heads is None:
                out, weights = new.contiguous(), rows
            else:
                chosen = torch.zeros(new.shape[2], dtype=torch.bool, device=new.device)
                chosen[list(replacement.heads)] = True
                out = torch.where(chosen[:, None], new, out)
                weights = None if weights is None else torch.where(chosen[:, None, None], rows, weights)
        assert out is not None
        return out, weights

    return attend


def _registered(implementation: str) -> str:
    """The name under which transformers finds the replacing attention that falls back to an implementation."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if implementation not in ("eager", "sdpa"):
        raise ValueError(f"model must use 'eager' or 'sdpa' attention, got {implementation!r}: set_attn_implementation")
    name = _PREFIX + implementation
    if name not in ALL_ATTENTION_FUNCTIONS:
        before = None if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
        AttentionInterface.register(name, _attend(before))
        # the same masks as before, so that what is not replaced stays the same to the bit
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    return name


def _chosen(access: Access, layers: Any) -> dict[int, tuple[int, ...] | None]:
    if layers is None:
        return dict.fromkeys(range(len(access.layers)))
    if not isinstance(layers, Iterable) or isinstance(layers, str):
        raise TypeError(f"layers must be layers, or a mapping from layers to heads, got {layers!r}")
    found: dict[int, tuple[int, ...] | None] = {}
    for layer in layers:
        access.layer(layer)
        heads = tuple(layers[layer]) if isinstance(layers, Mapping) else None
        for head in heads or ():
            if isinstance(head, bool) or not isinstance(head, int) or not 0 <= head < access.heads:
                raise ValueError(f"heads of layer {layer} must be in 0..{access.heads - 1}, got {head!r}")
        found[layer % len(access.layers)] = heads
    return found


@contextmanager
def ablate_association(
    model: nn.Module,
    mode: Mode,
    layers: Iterable[int] | Mapping[int, Sequence[int]] | None = None,
    pattern: Tensor | None = None,
) -> Iterator[None]:
    """Replace the weights of attention by ones that do not depend on the data, until the block ends (section 6).

    Values, output projection, biases and everything else stay. Padding, sliding windows and caches are respected: a
    pattern is cut to the keys that a query may see and scaled to sum to 1. Blocks may be nested or overlap, the one
    entered last wins. ``EmbeddingWalk``, ``distance_profile`` and ``place_pattern`` see the replaced model inside.
    Gradients flow, so that a model can be fine-tuned inside; with gradient checkpointing the backward pass too belongs
    inside, for it runs the layers again.

    Args:
        model: a causal transformers model with eager or SDPA attention, see ``Access`` for the families.
        mode: ``uniform`` is the mean of all keys seen; ``position`` takes ``pattern`` by the distance t - j, see
            ``distance_profile``; ``fixed`` takes it by places (t, j), of another sentence or as an average, see
            ``place_pattern``, with places counted from the first token that is no padding; ``identity`` lets each
            token see itself alone; ``zero`` leaves nothing but the output bias; ``none`` changes nothing.
        layers: which; from layers to heads where single heads are meant; all where None.
        pattern: (L, H, distances) or (L, H, T, T), not negative, of the whole model.

    Raises:
        TypeError: for an encoder, a model of another kind, or layers or a pattern of another type.
        ValueError: for an unknown mode, layer, head or pattern; inside, for a text longer than the pattern, and for
            ``fixed`` with a cache that a sliding window crops. The model is as it was after the block, also after an
            exception.

    Example:
        >>> from torchgraft.language.set_based_prompting import toy_model
        >>> model, tokenizer = toy_model()
        >>> inputs = tokenizer("to be or not", return_tensors="pt")
        >>> with torch.no_grad(), ablate_association(model, "uniform", [1]):
        ...     model(**inputs).logits.shape
        torch.Size([1, 12, 257])
    """
    access = causal_model(model)
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
    chosen = _chosen(access, layers)
    rank = {"position": 3, "fixed": 4}.get(mode)
    if rank is None and pattern is not None:
        raise ValueError(f"pattern belongs to the modes position and fixed, got one with {mode!r}")
    if rank is not None:
        want = (len(access.layers), access.heads)
        if pattern is not None and not isinstance(pattern, Tensor):
            raise TypeError(f"pattern must be a tensor, got {type(pattern).__name__}")
        shape = () if pattern is None else tuple(pattern.shape)
        if pattern is None or len(shape) != rank or shape[:2] != want or len(set(shape[2:])) != 1 or not shape[2]:
            got = "none" if pattern is None else shape
            raise ValueError(f"pattern must be {(*want, *('T' * (rank - 2)))} for mode {mode!r}, got {got}")
        if not bool((pattern >= 0).all()) or not bool(pattern.isfinite().all()):
            raise ValueError("pattern must be finite and not negative")
    inner: Any = unwrapped(model)
    before = inner.config._attn_implementation.removeprefix(_PREFIX)
    if getattr(access.base.config, "reorder_and_upcast_attn", False):
        raise ValueError("model must not reorder and upcast attention: set config.reorder_and_upcast_attn = False")
    own = {
        access.attention(layer): _Replacement(mode, heads, None if pattern is None else pattern[layer])
        for layer, heads in chosen.items()
    }
    inner.set_attn_implementation(_registered(before))
    try:
        for module, replacement in own.items():
            _ACTIVE.setdefault(module, []).append(replacement)
        yield
    finally:
        for module, replacement in own.items():
            # blocks need not end in the order in which they began
            _ACTIVE[module] = [r for r in _ACTIVE[module] if r is not replacement]
        if not any(_ACTIVE.get(access.attention(layer)) for layer in range(len(access.layers))):
            inner.set_attn_implementation(before)


@contextmanager
def telling_attention(model: nn.Module) -> Iterator[None]:
    """The implementation of attention that tells its weights, replaced ones where they are, until the block ends."""
    inner: Any = unwrapped(model)
    if not inner.config._attn_implementation.startswith(_PREFIX):
        with eager_attention(model):
            yield
        return
    before = inner.config._attn_implementation
    inner.set_attn_implementation(_registered("eager"))
    try:
        yield
    finally:
        inner.set_attn_implementation(before)


@torch.no_grad()
def distance_profile(model: nn.Module, tokenizer: Any, texts: Sequence[Given]) -> Float[Tensor, "L H distance"]:
    """How much each head looks how far back, on average over texts, by the distance t - j.

    Args:
        model: a causal transformers model.
        tokenizer: its tokenizer.
        texts: texts or token ids, each at least as long as any text to be run with the profile.

    Returns:
        Mean weight of a key at each distance, over the queries that have one there; cut to the shortest text.

    Raises:
        TypeError, ValueError: for an encoder; for no texts.
    """
    patterns = _patterns(model, tokenizer, texts)
    return torch.stack(
        [torch.stack([p.diagonal(-d, 2, 3).mean(-1) for d in range(p.shape[-1])], -1) for p in patterns]
    ).mean(0)


@torch.no_grad()
def place_pattern(model: nn.Module, tokenizer: Any, texts: Sequence[Given]) -> Float[Tensor, "L H T T"]:
    """The attention of each head from place t to place j, on average over texts; of one text, its own pattern.

    Unlike ``distance_profile`` it keeps what is special about the first token, on which many heads rest.

    Args:
        model: a causal transformers model.
        tokenizer: its tokenizer.
        texts: one or more texts or token ids.

    Returns:
        Cut to the shortest text.

    Raises:
        TypeError, ValueError: for an encoder; for no texts.
    """
    return torch.stack(_patterns(model, tokenizer, texts)).mean(0)


def _patterns(model: nn.Module, tokenizer: Any, texts: Sequence[Given]) -> list[Tensor]:
    causal_model(model)
    rows = token_rows(model, tokenizer, texts, "texts")
    with evaluating(model), telling_attention(model):
        found = [
            torch.cat(list(model(input_ids=row[None], use_cache=False, output_attentions=True).attentions))
            for row in rows
        ]
    length = min(f.shape[-1] for f in found)
    return [f[..., :length, :length].float() for f in found]


def token_ids(model: nn.Module, tokenizer: Any, text: Given) -> Int[Tensor, " T"]:
    """Token ids of a text, or as given, on the model's device.

    Raises:
        TypeError: for what is neither text nor whole numbers.
        ValueError: for no tokens, ids outside the vocabulary, or more tokens than the model has positions.
    """
    try:
        found = torch.as_tensor(tokenizer(text)["input_ids"] if isinstance(text, str) else text)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"text must be a string or token ids, got {text!r}") from error
    if found.numel() and (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool):
        raise TypeError(f"text must be a string or token ids, got {found.dtype}")
    inner: Any = unwrapped(model)
    size = inner.get_input_embeddings().weight.shape[0]
    if found.dim() != 1 or not found.numel() or not bool(((found >= 0) & (found < size)).all()):
        shape = tuple(found.shape)
        raise ValueError(f"text must have at least one token, in a row, of 0..{size - 1}, got shape {shape}")
    most = most_tokens(model)
    if most is not None and len(found) > most:
        raise ValueError(f"text must have at most {most} tokens for this model, got {len(found)}")
    return found.long().to(next(model.parameters()).device)


def most_tokens(model: nn.Module) -> int | None:
    """How many positions a model has, or None where there is no end."""
    config: Any = unwrapped(model).config
    most: int | None = getattr(config, "max_position_embeddings", None)
    # RoBERTa's positions begin after its padding index
    return most - 2 if most is not None and config.model_type == "roberta" else most


def token_rows(model: nn.Module, tokenizer: Any, texts: Sequence[Given], name: str) -> list[Tensor]:
    """Ids of several texts.

    Raises:
        TypeError: for one text in the place of several.
        ValueError: for none.
    """
    if isinstance(texts, (str, Tensor)):
        raise TypeError(f"{name} must be several texts, as in [text], got {type(texts).__name__}")
    rows = [token_ids(model, tokenizer, text) for text in texts]
    if not rows:
        raise ValueError(f"{name} must be at least one, got none")
    return rows

"""Attention without association: patterns that do not look at the data, put in the place of those that do."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from torchgraft.language._access import Access, attention_patterns, tokenized, unwrapped
from torchgraft.surgery import evaluating

Mode = Literal["none", "uniform", "position", "fixed", "identity", "zero"]
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
    """Which keys (.., Tq, Tk) a query may see; without a mask those up to its own place."""
    if mask is None:
        shape = query.shape[-2], key.shape[-2]
        everything = torch.ones(shape, dtype=torch.bool, device=query.device)
        return everything.tril(key.shape[-2] - query.shape[-2])[None, None]
    return mask if mask.dtype == torch.bool else mask > -1


def _weights(replacement: _Replacement, allowed: Tensor) -> Tensor:
    """Rows (B or 1, H or 1, Tq, Tk) that sum to 1 over the allowed keys; rows of padding, which sees nothing, are 0."""
    queries, keys = allowed.shape[-2:]
    at = torch.arange(keys - queries, keys, device=allowed.device)
    if replacement.mode == "uniform":
        raw = allowed.double()
    elif replacement.mode == "identity":
        raw = (at[:, None] == torch.arange(keys, device=allowed.device)).double() * allowed
    else:
        table = replacement.table
        assert table is not None
        if table.shape[-1] < keys:
            raise ValueError(f"pattern covers {table.shape[-1]} places, got a text of {keys}")
        table = table.to(allowed.device, torch.float64)
        if replacement.mode == "position":
            distance = at[:, None] - torch.arange(keys, device=allowed.device)
            raw = table[:, distance.clamp(min=0)][None] * allowed
        else:
            raw = table[None, :, at, :keys] * allowed
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
        for replacement in replacements:
            values = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
            if replacement.mode == "zero":
                new = values.new_zeros(*query.shape[:-1], values.shape[-1])
            else:
                rows = _weights(replacement, _allowed(query, key, attention_mask)).to(values.dtype)
                new = rows.expand(len(values), values.shape[1], -1, -1) @ values
            new = new.transpose(1, 2)
            if out is None or replacement.heads is None:
                out, weights = new.contiguous(), None
            else:
                chosen = torch.zeros(new.shape[2], dtype=torch.bool, device=new.device)
                chosen[list(replacement.heads)] = True
                out, weights = torch.where(chosen[:, None], new, out), None
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
    pattern is cut to the keys that a query may see and scaled to sum to 1. Blocks may be nested, the inner one wins.
    Gradients flow, so that a model can be fine-tuned inside.

    Args:
        model: a causal transformers model with eager or SDPA attention, see ``Access`` for the families.
        mode: ``uniform`` is the mean of all keys seen; ``position`` takes ``pattern`` by the distance t - j, see
            ``distance_profile``; ``fixed`` takes it by places (t, j), of another sentence or as an average, see
            ``place_pattern``; ``identity`` lets each token see itself alone; ``zero`` leaves nothing but the output
            bias; ``none`` changes nothing.
        layers: which; from layers to heads where single heads are meant; all where None.
        pattern: (L, H, distances) or (L, H, T, T), not negative, of the whole model.

    Raises:
        TypeError: for an encoder, or a model of another kind.
        ValueError: for an unknown mode, layer, head or pattern; inside, for a text longer than the pattern. The model
            is as it was after the block, also after an exception.

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
        if pattern is None or pattern.dim() != rank or tuple(pattern.shape[:2]) != want:
            got = "none" if pattern is None else tuple(pattern.shape)
            raise ValueError(f"pattern must be {(*want, *('T' * (rank - 2)))} for mode {mode!r}, got {got}")
        if not bool((pattern >= 0).all()):
            raise ValueError("pattern must be finite and not negative")
    inner: Any = unwrapped(model)
    before = inner.config._attn_implementation
    if getattr(access.base.config, "reorder_and_upcast_attn", False):
        raise ValueError("model must not reorder and upcast attention: set config.reorder_and_upcast_attn = False")
    modules = [access.attention(layer) for layer in chosen]
    if not before.startswith(_PREFIX):
        inner.set_attn_implementation(_registered(before))
    try:
        for layer, module in zip(chosen, modules, strict=True):
            table = None if pattern is None else pattern[layer]
            _ACTIVE.setdefault(module, []).append(_Replacement(mode, chosen[layer], table))
        yield
    finally:
        for module in modules:
            _ACTIVE[module].pop()
        inner.set_attn_implementation(before)


@torch.no_grad()
def distance_profile(model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> Float[Tensor, "L H distance"]:
    """How much each head looks how far back, on average over texts, by the distance t - j.

    Args:
        model: a causal transformers model.
        tokenizer: its tokenizer.
        texts: each at least as long as any text to be run with the profile.

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
def place_pattern(model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> Float[Tensor, "L H T T"]:
    """The attention of each head from place t to place j, on average over texts; of one text, its own pattern.

    Unlike ``distance_profile`` it keeps what is special about the first token, on which many heads rest.

    Args:
        model: a causal transformers model.
        tokenizer: its tokenizer.
        texts: one or more.

    Returns:
        Cut to the shortest text.

    Raises:
        TypeError, ValueError: for an encoder; for no texts.
    """
    return torch.stack(_patterns(model, tokenizer, texts)).mean(0)


def _patterns(model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> list[Tensor]:
    causal_model(model)
    device = next(model.parameters()).device
    if not texts:
        raise ValueError("texts must be at least one, got none")
    with evaluating(model):
        found = [
            torch.cat(attention_patterns(model, use_cache=False, **tokenized(tokenizer, [text], device)))
            for text in texts
        ]
    length = min(f.shape[-1] for f in found)
    return [f[..., :length, :length].float() for f in found]

"""transformers' attention interface, for attentions that know causality and padding and no other mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

_REFUSED = ("sliding_window", "s_aux", "softcap", "alibi", "position_bias")


def register_attention(name: str, title: str, attend: Callable[..., Tensor]) -> None:
    """Make ``model.set_attn_implementation(name)`` run ``attend`` in models that go through the interface.

    Args:
        name: for transformers.
        title: what messages call it.
        attend: ``attend(q, k, v, module, causal=, key_padding_mask=, scale=)`` to outputs (B, H, L, E), with heads of
            grouped keys repeated and a padding mask (B, S) that is true where padded, or None.
    """
    from functools import partial

    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(name, partial(_attention, attend, title))
    AttentionMaskInterface.register(name, partial(_padding_mask, title=title))


def _padding_mask(
    *args: Any,
    title: str,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    mask_function: Callable[..., Any] | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Hand the two-dimensional padding mask through; transformers would otherwise write out an L x L one."""
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    if local_size is not None:
        raise ValueError(
            f"{title} attention cannot take a sliding window (this model has one of {local_size}); set "
            "sliding_window=None in its config or use attn_implementation='sdpa'"
        )
    if mask_function not in (None, causal_mask_function, bidirectional_mask_function):
        raise ValueError(
            f"{title} attention cannot take masks other than causal and padding, such as several sequences packed into "
            "a row (position_ids that start again) or a prefix that sees all of itself; pad instead, with an "
            "attention_mask, or use attn_implementation='sdpa'"
        )
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return attention_mask.bool()


def _attention(
    attend: Callable[..., Tensor],
    title: str,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    is_causal: bool | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    for refused in _REFUSED:
        if kwargs.get(refused) is not None:
            raise ValueError(f"{title} attention cannot take {refused}; use attn_implementation='sdpa' for this model")
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(
            f"{title} attention takes padding masks of shape (batch, length) and only padding, no arbitrary attention "
            f"mask; got one of shape {tuple(attention_mask.shape)}; use attn_implementation='sdpa' for this model"
        )
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    if causal and query.shape[2] != key.shape[2]:
        raise ValueError(
            f"{title} attention got {query.shape[2]} queries and {key.shape[2]} cached keys; a key-value cache does "
            "not hold what it needs, so pass use_cache=False"
        )
    if attention_mask is not None and attention_mask.shape[1] != key.shape[2]:
        raise ValueError(
            f"attention_mask must have one entry for each of the {key.shape[2]} keys, got {attention_mask.shape[1]}"
        )
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    padding = None if attention_mask is None else ~attention_mask
    y = attend(query, key, value, module, causal=causal, key_padding_mask=padding, scale=scaling)
    return y.transpose(1, 2).contiguous(), None

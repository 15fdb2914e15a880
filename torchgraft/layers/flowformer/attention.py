"""Flow-Attention as a layer and as an attention implementation of transformers (Wu et al., ICML 2022)."""

from __future__ import annotations

import warnings

from jaxtyping import Bool, Float
from torch import Tensor, nn

from torchgraft.layers._interface import register_attention
from torchgraft.ops.flow_attention import (
    Clamp,
    FeatureMap,
    FlowState,
    check_settings,
    flow_attention,
    flow_attention_state,
    flow_attention_step,
)

__all__ = ["FlowAttention", "register_flow_attention"]


class FlowAttention(nn.Module):
    """Multi-head Flow-Attention with the projections of the official code (arXiv 2202.06258, section 3).

    State dicts of the official ``Flow_Attention`` and ``Flow_Attention_Causal`` load into it. Dropout is applied after
    the output projection, as there, and nothing is dropped inside the attention.

    Args:
        embed_dim: width of the projections, over all heads.
        num_heads: heads; must divide ``embed_dim``.
        d_input: features of the inputs; ``embed_dim`` if not given.
        d_output: features of the output; ``embed_dim`` if not given.
        dropout: probability of dropping an output.
        causal: no sink sees a later source.
        feature_map: as in ``flow_attention``.
        clamp: as in ``flow_attention``; the default is the official core's, ``None`` lets all sources compete.

    Raises:
        ValueError: when ``num_heads`` does not divide ``embed_dim``, or for settings that ``flow_attention`` refuses.

    Example:
        >>> import torch
        >>> layer = FlowAttention(32, num_heads=4, causal=True)
        >>> layer(torch.randn(2, 100, 32)).shape
        torch.Size([2, 100, 32])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        d_input: int | None = None,
        d_output: int | None = None,
        dropout: float = 0.05,
        causal: bool = False,
        *,
        feature_map: FeatureMap = "sigmoid",
        clamp: Clamp = (-1.0, 1.0),
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim, got num_heads={num_heads}, embed_dim={embed_dim}")
        check_settings(feature_map, clamp)
        d_input = embed_dim if d_input is None else d_input
        d_output = embed_dim if d_output is None else d_output
        self.num_heads, self.causal, self.feature_map, self.clamp = num_heads, causal, feature_map, clamp
        self.query_projection = nn.Linear(d_input, embed_dim)
        self.key_projection = nn.Linear(d_input, embed_dim)
        self.value_projection = nn.Linear(d_input, embed_dim)
        self.out_projection = nn.Linear(embed_dim, d_output)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        query: Float[Tensor, "B L I"],
        key: Float[Tensor, "B S I"] | None = None,
        value: Float[Tensor, "B S I"] | None = None,
        key_padding_mask: Bool[Tensor, "B S"] | None = None,
        query_padding_mask: Bool[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B L O"]:
        """Attend from ``query`` to ``key`` and ``value``; self-attention when only ``query`` is given.

        Masks are True where padded; outputs at padded positions are those of a zero attention output. In
        self-attention ``key_padding_mask`` is the mask of the queries too; another ``key`` leaves them unpadded.
        """
        if query_padding_mask is None and key_padding_mask is not None and key is not None and key is not query:
            # the operation goes by the lengths, which may be equal by chance
            query_padding_mask = key_padding_mask.new_zeros(query.shape[:2])
        key = query if key is None else key
        value = key if value is None else value
        y = flow_attention(
            *self._heads(query, key, value),
            is_causal=self.causal,
            key_padding_mask=key_padding_mask,
            query_padding_mask=query_padding_mask,
            feature_map=self.feature_map,
            clamp=self.clamp,
        )
        return self._out(y)

    def _heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        projected = (self.query_projection(query), self.key_projection(key), self.value_projection(value))
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in projected)
        return q, k, v

    def _out(self, y: Tensor) -> Tensor:
        return self.dropout(self.out_projection(y.transpose(1, 2).flatten(2)))

    def prefill(
        self, x: Float[Tensor, "B L I"], key_padding_mask: Bool[Tensor, "B L"] | None = None
    ) -> tuple[Float[Tensor, "B L O"], FlowState]:
        """Causal self-attention over a prompt, and the state to go on from with ``step``."""
        self._must_be_causal("prefill")
        q, k, v = self._heads(x, x, x)
        mask, feature_map, clamp = key_padding_mask, self.feature_map, self.clamp
        y = flow_attention(q, k, v, is_causal=True, key_padding_mask=mask, feature_map=feature_map, clamp=clamp)
        return self._out(y), flow_attention_state(q, k, v, key_padding_mask=mask, feature_map=feature_map, clamp=clamp)

    def step(self, x: Float[Tensor, "B I"], state: FlowState) -> tuple[Float[Tensor, "B O"], FlowState]:
        """One token after those that ``state`` has seen; time and memory do not grow with their number."""
        self._must_be_causal("step")
        q, k, v = (part[:, :, 0] for part in self._heads(*[x[:, None]] * 3))
        y, state = flow_attention_step(q, k, v, state, feature_map=self.feature_map, clamp=self.clamp)
        return self._out(y[:, :, None])[:, 0], state

    def _must_be_causal(self, what: str) -> None:
        if not self.causal:
            raise ValueError(f"{what} needs a causal layer; make it with FlowAttention(..., causal=True)")

    def extra_repr(self) -> str:
        """What the projections do not show."""
        return f"num_heads={self.num_heads}, causal={self.causal}, clamp={self.clamp}"


def register_flow_attention(name: str = "flow") -> None:
    """Make ``attn_implementation="flow"`` and ``model.set_attn_implementation("flow")`` work in transformers.

    Works for models that go through transformers' attention interface: encoders (BERT, ViT, …) and decoders (GPT-2,
    Llama with grouped heads, …), with right or left padding. A pretrained model's weights were trained for softmax
    and do not carry over without training; a model from a checkpoint warns once when it is used in eval mode.

    Refused with a ``ValueError`` at the first forward pass: masks that are not padding (with or without causality),
    packed sequences, sliding windows, position biases (T5), decoding with a key-value cache (pass
    ``use_cache=False``), attention sinks and logit soft caps. Models that do not go through the attention interface
    (BLOOM, MPT and Falcon with their ALiBi, DeBERTa) keep their own attention, and transformers logs so. Dropout
    inside the attention (``attention_dropout`` and the like) has no effect, as in the official code.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> register_flow_attention()
        >>> small = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
        >>> model = BertModel(small)
        >>> model.set_attn_implementation("flow")
    """
    register_attention(name, "flow", _for_transformers)


def _attends_across(module: nn.Module) -> bool:
    """Whether a module that is not causal is cross-attention, whose padding is that of the sources alone.

    Transformers does not tell. Its classes have a flag, or the word in their name, or serve decoders alone otherwise.
    """
    flags = (getattr(module, name, False) for name in ("is_cross_attention", "is_decoder"))
    return any(flags) or "Cross" in type(module).__name__


def _warn_of_softmax_weights(module: nn.Module) -> None:
    origin = getattr(getattr(module, "config", None), "_name_or_path", "")
    if origin and not module.training:
        warnings.warn(
            f"flow attention runs on the weights of {origin!r}; if they were trained with softmax attention, the model "
            "is of no use until it is trained further with flow attention",
            stacklevel=2,
        )


def _for_transformers(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    module: nn.Module,
    *,
    causal: bool,
    key_padding_mask: Tensor | None,
    scale: float | None,
) -> Tensor:
    _warn_of_softmax_weights(module)
    sinks = None
    if key_padding_mask is not None and not causal and _attends_across(module):
        sinks = key_padding_mask.new_zeros(query.shape[0], query.shape[2])
    return flow_attention(
        query, key, value, is_causal=causal, key_padding_mask=key_padding_mask, query_padding_mask=sinks
    )

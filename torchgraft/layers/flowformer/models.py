"""Flowformer language models and classifiers by transformers' conventions (Wu et al., ICML 2022, section 4)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
)

from torchgraft.layers._classification import classified
from torchgraft.layers.flowformer.attention import FlowAttention
from torchgraft.ops.flow_attention import FlowState

__all__ = [
    "FlowCache",
    "FlowformerConfig",
    "FlowformerForCausalLM",
    "FlowformerForSequenceClassification",
    "FlowformerModel",
]


# transformers 5.24 renamed it, in arguments and outputs
_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class FlowformerConfig(PreTrainedConfig):
    """Sizes of a Flowformer.

    Args:
        vocab_size: tokens.
        hidden_size: width; ``num_attention_heads`` must divide it.
        num_hidden_layers: blocks.
        num_attention_heads: heads.
        intermediate_size: of the feed-forward; 4 times ``hidden_size`` if not given.
        max_position_embeddings: learned positions, so the longest sequence.
        embd_pdrop, resid_pdrop, attn_pdrop: dropout of embeddings, feed-forward output and attention output.
        feature_map, clamp: as in ``flow_attention``; the defaults are the official code's.
        layer_norm_epsilon, initializer_range: as in GPT-2.
        use_cache: return a ``FlowCache`` from causal models.

    Example:
        >>> FlowformerConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=2).intermediate_size
        256
    """

    model_type = "flowformer"
    attribute_map = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}  # noqa: RUF012
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012

    def __init__(
        self,
        vocab_size: int = 50257,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int | None = None,
        max_position_embeddings: int = 1024,
        embd_pdrop: float = 0.1,
        resid_pdrop: float = 0.1,
        attn_pdrop: float = 0.1,
        feature_map: str = "sigmoid",
        clamp: list[float] | tuple[float, float] | None = (-1.0, 1.0),
        layer_norm_epsilon: float = 1e-5,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        if num_attention_heads < 1 or hidden_size % num_attention_heads:
            raise ValueError(
                f"num_attention_heads must divide hidden_size, got num_attention_heads={num_attention_heads}, "
                f"hidden_size={hidden_size}"
            )
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads, self.max_position_embeddings = num_attention_heads, max_position_embeddings
        self.intermediate_size = 4 * hidden_size if intermediate_size is None else intermediate_size
        self.embd_pdrop, self.resid_pdrop, self.attn_pdrop = embd_pdrop, resid_pdrop, attn_pdrop
        self.feature_map, self.clamp = feature_map, None if clamp is None else list(clamp)
        self.layer_norm_epsilon, self.initializer_range, self.use_cache = (
            layer_norm_epsilon,
            initializer_range,
            use_cache,
        )
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


@dataclass
class FlowCache:
    """What a causal Flowformer remembers: one state a layer, of a size that does not grow with the text.

    Attributes:
        states: of each layer.
        length: tokens seen, padding included, as transformers counts.
    """

    states: list[FlowState]
    length: int = 0

    is_compileable = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, padding included."""
        return self.length

    @property
    def is_linear(self) -> list[bool]:
        """No layer, in the sense of transformers: all of them know how many tokens they have seen."""
        return [False] * len(self.states)

    @property
    def positions(self) -> Tensor:
        """Next position of each row, padding not counted, (B, 1)."""
        return self.states[0].position.long()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows follow their beams."""
        self.states = [state.select(beam_idx) for state in self.states]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times."""
        rows = torch.arange(self.states[0].position.shape[0])
        self.reorder_cache(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows."""
        self.reorder_cache(indices)

    def nbytes(self) -> int:
        """Bytes held, whatever the length."""
        return sum(t.numel() * t.element_size() for state in self.states for t in vars(state).values())


class _Back(nn.Linear):
    """The feed-forward's way back into the residual stream, whose first weights are smaller the deeper the model."""


class _Block(GradientCheckpointingLayer):
    def __init__(self, config: FlowformerConfig, causal: bool) -> None:
        super().__init__()
        width = config.hidden_size
        clamp = None if config.clamp is None else (float(config.clamp[0]), float(config.clamp[1]))
        self.ln_1 = nn.LayerNorm(width, eps=config.layer_norm_epsilon)
        self.attn = FlowAttention(
            width, config.num_attention_heads, dropout=config.attn_pdrop, causal=causal,
            feature_map=config.feature_map, clamp=clamp,  # type: ignore[arg-type]
        )  # fmt: skip
        self.ln_2 = nn.LayerNorm(width, eps=config.layer_norm_epsilon)
        self.mlp = nn.ModuleDict(
            {
                "c_fc": nn.Linear(width, config.intermediate_size),
                "c_proj": _Back(config.intermediate_size, width),
                "act": nn.GELU(approximate="tanh"),
                "dropout": nn.Dropout(config.resid_pdrop),
            }
        )

    def feed(self, x: Tensor) -> Tensor:
        m = self.mlp
        return x + m["dropout"](m["c_proj"](m["act"](m["c_fc"](self.ln_2(x)))))

    def forward(self, x: Tensor, padding: Tensor | None) -> Tensor:
        return self.feed(x + self.attn(self.ln_1(x), key_padding_mask=padding))

    def prefill(self, x: Tensor, padding: Tensor | None) -> tuple[Tensor, FlowState]:
        y, state = self.attn.prefill(self.ln_1(x), padding)
        return self.feed(x + y), state

    def steps(self, x: Tensor, state: FlowState) -> tuple[Tensor, FlowState]:
        out = []
        for token in self.ln_1(x).unbind(1):
            y, state = self.attn.step(token, state)
            out.append(y)
        return self.feed(x + torch.stack(out, 1)), state


class FlowformerPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of every Flowformer."""

    config_class = FlowformerConfig
    config: FlowformerConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["_Block"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, _Back):
            std /= math.sqrt(2 * self.config.num_hidden_layers)
        if isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, mean=0.0, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # generate would otherwise hand in a key-value cache, which does not hold what is needed
        return False


def _no_attentions(asked: bool | None) -> None:
    if asked:
        raise ValueError("output_attentions=True: Flow-Attention never forms an attention matrix; leave it out")


def _either(past_key_values: FlowCache | None, cache: FlowCache | None) -> FlowCache | None:
    if past_key_values is not None and cache is not None:
        raise ValueError("past_key_values and cache are two names of one argument; give one of them")
    return cache if past_key_values is None else past_key_values


class FlowformerModel(FlowformerPreTrainedModel):
    """Token and position embeddings, pre-norm blocks of Flow-Attention, final norm.

    Args:
        config: sizes.
        causal: no position sees a later one.

    Example:
        >>> config = FlowformerConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> FlowformerModel(config)(torch.arange(10)[None]).last_hidden_state.shape
        torch.Size([1, 10, 32])
    """

    def __init__(self, config: FlowformerConfig, causal: bool = True) -> None:
        super().__init__(config)
        self.causal = causal
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.wpe = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList([_Block(config, causal) for _ in range(config.num_hidden_layers)])
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.post_init()

    def _blocks(self) -> Iterator[_Block]:
        for block in self.h:
            assert isinstance(block, _Block)
            yield block

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.wte = value  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: FlowCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: FlowCache | None = None,
        **kwargs: Any,
    ) -> Any:
        """Hidden states (B, L, hidden_size).

        Args:
            input_ids: (B, L); or ``inputs_embeds`` (B, L, hidden_size).
            attention_mask: 1 where there is a token, (B, L), or (B, all tokens so far) with a cache.
            position_ids: (B, L); counted from the mask if not given.
            past_key_values: of an earlier call; what follows must not be padding. ``cache`` is the same, by the name
                that transformers gives it since 5.24.
            use_cache: return a ``FlowCache``.
            output_attentions: refused, since there is no attention matrix.
            output_hidden_states: also the embeddings and what each block gives, the last of them normalised.
            return_dict: False gives a tuple.
            kwargs: not used; ``generate`` passes what other models need.

        Raises:
            ValueError: for an empty sequence, one longer than ``max_position_embeddings``, a mask that is not (B, L),
                padding after a cache, or a cache that is no ``FlowCache``.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, and not both")
        _no_attentions(output_attentions)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        batch, length = x.shape[:2]
        if length == 0:
            raise ValueError("the sequence is empty (length 0); give at least one token")
        past_key_values = _either(past_key_values, cache)
        if past_key_values is not None and not isinstance(past_key_values, FlowCache):
            raise ValueError(
                f"past_key_values must be a FlowCache, got {type(past_key_values).__name__}; a key-value cache does "
                "not hold what Flow-Attention needs"
            )
        if (past_key_values is not None or use_cache) and not self.causal:
            raise ValueError("a bidirectional Flowformer has no cache; pass use_cache=False")
        padding = None
        if attention_mask is not None:
            whole = length if past_key_values is None else length + past_key_values.length
            if attention_mask.shape not in ((batch, length), (batch, whole)):
                raise ValueError(
                    f"attention_mask must have shape (batch, length) = {(batch, whole)}, 1 where there is a token, "
                    f"got {tuple(attention_mask.shape)}; flow attention cannot take an arbitrary mask"
                )
            padding = attention_mask[:, -length:] == 0
        if padding is not None and not bool(padding.any()):
            padding = None
        if position_ids is None:
            if past_key_values is not None:
                position_ids = past_key_values.positions + torch.arange(length, device=x.device)
            elif padding is not None:
                position_ids = ((~padding).cumsum(-1) - 1).clamp(min=0)
            else:
                position_ids = torch.arange(length, device=x.device)[None]
        limit = self.config.max_position_embeddings
        if position_ids.numel() and int(position_ids.max()) >= limit:
            raise ValueError(
                f"the sequence reaches position {int(position_ids.max())}, but max_position_embeddings is {limit}; "
                "shorten it, or make the model with more positions"
            )
        x = self.drop(x + self.wpe(position_ids))
        seen = [x]
        cache = None
        if past_key_values is not None:
            if padding is not None:
                raise ValueError("attention_mask marks padding after a cache; continue with real tokens only")
            states = []
            for block, state in zip(self._blocks(), past_key_values.states, strict=True):
                x, state = block.steps(x, state)
                states.append(state)
                seen.append(x)
            cache = FlowCache(states, past_key_values.length + length)
        elif use_cache:
            states = []
            for block in self._blocks():
                x, state = block.prefill(x, padding)
                states.append(state)
                seen.append(x)
            cache = FlowCache(states, length)
        else:
            for block in self._blocks():
                x = block(x, padding)
                seen.append(x)
        x = self.ln_f(x)
        hidden_states = (*seen[:-1], x) if output_hidden_states else None
        if return_dict is False:
            return tuple(part for part in (x, cache, hidden_states) if part is not None)
        return BaseModelOutputWithPast(last_hidden_state=x, hidden_states=hidden_states, **{_CACHE: cache})


class FlowformerForCausalLM(FlowformerPreTrainedModel, GenerationMixin):
    """A causal language model; state dicts of the official ``FlowFormer_GPT`` load into it.

    Example:
        >>> config = FlowformerConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> model = FlowformerForCausalLM(config).eval()
        >>> model.generate(torch.arange(5)[None], max_new_tokens=4, do_sample=False, pad_token_id=0).shape
        torch.Size([1, 9])
    """

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012

    def __init__(self, config: FlowformerConfig) -> None:
        super().__init__(config)
        self.transformer = FlowformerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: FlowCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: FlowCache | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits (B, L, vocab_size), and the loss where ``labels`` are given.

        ``labels`` are the inputs themselves, shifted inside, with -100 where there is nothing to predict; the official
        code takes targets that are shifted already and marks with -1. Other arguments as in ``FlowformerModel``.
        """
        # a cache costs a second pass over the prompt's sums; in training there is nobody to use it
        use_cache = (self.config.use_cache and not self.training and labels is None) if use_cache is None else use_cache
        found = self.transformer(
            input_ids, attention_mask, position_ids, _either(past_key_values, cache), inputs_embeds,
            use_cache=use_cache, output_attentions=output_attentions, output_hidden_states=output_hidden_states,
        )  # fmt: skip
        hidden, cache = found.last_hidden_state, found.get(_CACHE)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss = None
        if labels is not None:
            if labels.shape != hidden.shape[:2]:
                raise ValueError(
                    f"labels must have the shape of the inputs, {tuple(hidden.shape[:2])}, got {tuple(labels.shape)}"
                )
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        if return_dict is False:
            return tuple(part for part in (loss, logits, cache, found.hidden_states) if part is not None)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=found.hidden_states, **{_CACHE: cache}
        )  # fmt: skip


class FlowformerForSequenceClassification(FlowformerPreTrainedModel):
    """Bidirectional Flow-Attention, the mean over tokens that are not padding, a linear layer.

    Example:
        >>> config = FlowformerConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> FlowformerForSequenceClassification(config)(torch.arange(10)[None]).logits.shape
        torch.Size([1, 2])
    """

    def __init__(self, config: FlowformerConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = FlowformerModel(config, causal=False)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits (B, num_labels), and the loss where ``labels`` are given: classes, or floats for regression."""
        found = self.transformer(
            input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, use_cache=False,
            output_attentions=output_attentions, output_hidden_states=output_hidden_states,
        )  # fmt: skip
        hidden = found.last_hidden_state
        mask = hidden.new_ones(hidden.shape[:2]) if attention_mask is None else (attention_mask != 0).to(hidden.dtype)
        logits = self.score((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
        return classified(self, logits, labels, found.hidden_states, return_dict)


AutoConfig.register("flowformer", FlowformerConfig, exist_ok=True)
AutoModel.register(FlowformerConfig, FlowformerModel, exist_ok=True)
AutoModelForCausalLM.register(FlowformerConfig, FlowformerForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(FlowformerConfig, FlowformerForSequenceClassification, exist_ok=True)

"""Models for transformers around the family, and the family in place of a model's attention.

Legend: B batch, L length, D hidden size, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    ImageClassifierOutput,
    SequenceClassifierOutput,
)

from torchgraft import surgery
from torchgraft.layers.state_space.mixer import SequenceMixer, State
from torchgraft.layers.state_space.recurrent import HGRN, LowerBounds
from torchgraft.layers.state_space.registry import FAMILIES, build_ssm
from torchgraft.layers.state_space.scans import Bidirectional, Scan2d
from torchgraft.layers.state_space.stack import Block, MixtureOfExperts, Stack

__all__ = [
    "SSMCache", "SSMConfig", "SSMForCausalLM", "SSMForForecasting", "SSMForImageClassification",
    "SSMForSequenceClassification", "SSMModel", "replace_attention",
]  # fmt: skip


class SSMConfig(PreTrainedConfig):
    """Configuration of the state space models.

    Args:
        vocab_size: V.
        hidden_size: D.
        num_hidden_layers: blocks.
        pattern: names of families, repeated over the blocks; ``["mamba"] * 7 + ["attention"]`` is Jamba's mixture.
        layer_settings: settings of each family by its name, as for ``build_ssm``.
        l_max: longest sequence, for families that must know it.
        expand: inner width of the feed-forward per feature; 0 for none, as Mamba blocks have it.
        num_experts: experts of the feed-forward in every second block; 0 for a plain one everywhere.
        experts_per_token: experts that a place uses.
        bidirectional: a layer forwards and another backwards in each block; not for language models.
        pooling: of classifiers: ``"mean"`` or ``"last"``.

    Example:
        >>> SSMConfig(vocab_size=10, hidden_size=8, num_hidden_layers=2, pattern=["s4d", "mamba"]).pattern
        ['s4d', 'mamba']
    """

    model_type = "torchgraft_ssm"

    def __init__(
        self,
        vocab_size: int = 1000,
        hidden_size: int = 64,
        num_hidden_layers: int = 2,
        pattern: Sequence[str] = ("mamba",),
        layer_settings: dict[str, dict[str, Any]] | None = None,
        l_max: int = 2048,
        expand: int = 0,
        num_experts: int = 0,
        experts_per_token: int = 2,
        bidirectional: bool = False,
        pooling: Literal["mean", "last"] = "mean",
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        unknown = sorted(set(pattern) - FAMILIES.keys())
        if unknown or not pattern:
            raise ValueError(f"pattern must name families ({', '.join(FAMILIES)}), got {list(pattern)}")
        if pooling not in ("mean", "last"):
            raise ValueError(f"pooling must be 'mean' or 'last', got {pooling!r}")
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.pattern, self.layer_settings = list(pattern), layer_settings or {}
        self.l_max, self.expand, self.num_experts, self.experts_per_token = (
            l_max,
            expand,
            num_experts,
            experts_per_token,
        )
        self.bidirectional, self.pooling, self.use_cache = bidirectional, pooling, use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


@dataclass
class SSMCache:
    """The states of all blocks, and how many tokens they have seen, padding included."""

    states: list[State]
    length: int = 0

    is_compileable = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, padding included."""
        return self.length

    @property
    def is_linear(self) -> list[bool]:
        """No layer, in the sense of transformers: all of them know how many tokens they have seen."""
        return [False] * len(self.states)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows follow their beams."""
        self.states = [{name: tensor[beam_idx] for name, tensor in state.items()} for state in self.states]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times."""
        rows = torch.arange(len(next(iter(self.states[0].values()))))
        self.reorder_cache(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows."""
        self.reorder_cache(indices)


class _Head(nn.Linear):
    """A map that a fresh model begins with at random, also where the rest of it was loaded."""


def _stack(config: SSMConfig) -> Stack:
    # transformers makes models without data first; eigenvalues must be computed
    with torch.device("cpu"):
        return _made(config)


def _made(config: SSMConfig) -> Stack:
    blocks = []
    width = config.hidden_size
    names = [config.pattern[i % len(config.pattern)] for i in range(config.num_hidden_layers)]
    gated = [i for i, name in enumerate(names) if name == "hgrn"]
    bounds = LowerBounds(len(gated), width) if gated else None

    def layer(name: str, number: int) -> SequenceMixer:
        settings = dict(config.layer_settings.get(name, {}))
        if name == "hgrn" and bounds is not None:
            return HGRN(width, **{"lower_bounds": bounds, "layer": gated.index(number), **settings})
        return build_ssm(name, width, **{"l_max": config.l_max, **settings})

    for i, name in enumerate(names):
        if config.bidirectional:
            mixer: SequenceMixer = Bidirectional(lambda name=name, i=i: layer(name, i))  # type: ignore[misc]
        else:
            mixer = layer(name, i)
        feed: nn.Module | None = None
        if config.num_experts and i % 2:
            feed = MixtureOfExperts(width, max(1, config.expand) * width, config.num_experts, config.experts_per_token)
        elif config.expand:
            inner = config.expand * width
            feed = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))
        blocks.append(Block(mixer, feed))
    stack = Stack(blocks, width)
    if bounds is not None:
        stack.lower_bounds = bounds
    return stack


class _Base(PreTrainedModel):
    config_class = SSMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = False
    _is_stateful = True

    def _init_weights(self, module: nn.Module) -> None:
        # layers begin as their papers say, in their constructors
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, _Head):
            module.reset_parameters()

    def _initialize_weights(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        self._init_weights(module)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False


class SSMModel(_Base):
    """Embedding and blocks, for tokens or for embeddings of anything else.

    Example:
        >>> model = SSMModel(SSMConfig(vocab_size=10, hidden_size=8))
        >>> model(torch.arange(6)[None]).last_hidden_state.shape
        torch.Size([1, 6, 8])
    """

    def __init__(self, config: SSMConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.stack = _stack(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Another token embedding."""
        self.embeddings = value  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: SSMCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, L, D).

        ``attention_mask`` (B, L or longer) is true or one where there is data; its last L columns count.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        x = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        length = x.shape[1]
        mask = None if attention_mask is None else attention_mask[:, -length:].bool()
        if mask is not None and bool(mask.all()):
            mask = None
        use_cache = bool(use_cache)
        if use_cache and not self.stack.causal:
            raise ValueError("use_cache needs causal layers; this model looks into the future")
        states = None if past_key_values is None else past_key_values.states
        if states is not None and length == 1 and mask is None and not self.training:
            y, found = self.stack.step(x[:, 0], states)
            y = y[:, None]
        else:
            y, found = self.stack(x, states, mask, return_state=use_cache)
        cache = None
        if use_cache:
            seen = 0 if past_key_values is None else past_key_values.length
            cache = past_key_values if past_key_values is not None else SSMCache([])
            cache.states, cache.length = found, seen + length
        return BaseModelOutputWithPast(last_hidden_state=y, past_key_values=cache)


class SSMForCausalLM(_Base, GenerationMixin):
    """A causal language model; ``generate`` carries states of a constant size where the family has them.

    Raises:
        ValueError: for layers that look into the future.

    Example:
        >>> model = SSMForCausalLM(SSMConfig(vocab_size=20, hidden_size=8)).eval()
        >>> model.generate(torch.arange(5)[None], max_new_tokens=4, do_sample=False, pad_token_id=0).shape
        torch.Size([1, 9])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: SSMConfig) -> None:
        super().__init__(config)
        self.model = SSMModel(config)
        if not self.model.stack.causal:
            raise ValueError("a causal language model needs causal layers; set bidirectional=False")
        self.lm_head = _Head(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: SSMCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, L, V), and the loss where ``labels`` (the inputs, shifted inside, -100 for none) are given."""
        use_cache = (self.config.use_cache and not self.training and labels is None) if use_cache is None else use_cache
        found = self.model(input_ids, attention_mask, past_key_values, inputs_embeds, use_cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(found.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=found.past_key_values)


def _pooled(hidden: Tensor, mask: Tensor | None, pooling: str) -> Tensor:
    if mask is None:
        return hidden.mean(1) if pooling == "mean" else hidden[:, -1]
    if pooling == "mean":
        return hidden.masked_fill(~mask[..., None], 0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
    last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


class SSMForSequenceClassification(_Base):
    """A classifier of token sequences, or of ``inputs_embeds``: table columns, frames of sound, bases of DNA.

    Example:
        >>> model = SSMForSequenceClassification(SSMConfig(vocab_size=10, hidden_size=8, num_labels=3))
        >>> model(torch.arange(6)[None]).logits.shape
        torch.Size([1, 3])
    """

    def __init__(self, config: SSMConfig) -> None:
        super().__init__(config)
        self.model = SSMModel(config)
        self.score = _Head(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Logits (B, labels)."""
        hidden = self.model(input_ids, attention_mask, None, inputs_embeds).last_hidden_state
        mask = None if attention_mask is None else attention_mask.bool()
        logits = self.score(_pooled(hidden, mask, self.config.pooling))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class SSMForForecasting(_Base):
    """Forecasts of many variables: each on its own with patches of time as tokens, or with variables as tokens.

    Series are normalised by their own mean and deviation, and forecasts brought back.

    Args:
        config: ``context_length``, ``prediction_length`` and either ``patch_length`` or ``inverted=True`` are read
            from it (96, 24, 8, False without them). Inverted, order means nothing, so use ``bidirectional=True``.

    Example:
        >>> model = SSMForForecasting(SSMConfig(hidden_size=8, context_length=16, prediction_length=4))
        >>> model(torch.randn(2, 16, 3)).shape
        torch.Size([2, 4, 3])
    """

    main_input_name = "past_values"

    def __init__(self, config: SSMConfig) -> None:
        super().__init__(config)
        self.context: int = getattr(config, "context_length", 96)
        self.horizon: int = getattr(config, "prediction_length", 24)
        self.inverted: bool = getattr(config, "inverted", False)
        self.patch: int = self.context if self.inverted else getattr(config, "patch_length", 8)
        if self.patch < 1 or self.context % self.patch:
            raise ValueError(f"context_length must be a multiple of patch_length, got {self.context} and {self.patch}")
        self.embed = nn.Linear(self.patch, config.hidden_size)
        self.stack = _stack(config)
        tokens = 1 if self.inverted else self.context // self.patch
        self.head = _Head(tokens * config.hidden_size, self.horizon)
        self.post_init()

    def forward(self, past_values: Tensor) -> Tensor:
        """(B, context, variables) to (B, horizon, variables)."""
        if past_values.ndim != 3 or past_values.shape[1] != self.context:
            raise ValueError(
                f"past_values must have shape (batch, {self.context}, variables), got {tuple(past_values.shape)}"
            )
        mean = past_values.mean(1, keepdim=True)
        deviation = past_values.var(1, keepdim=True, unbiased=False).add(1e-5).sqrt()
        series = ((past_values - mean) / deviation).mT
        if self.inverted:
            hidden, _ = self.stack(self.embed(series), return_state=False)
        else:
            patches = series.unflatten(-1, (-1, self.patch)).flatten(0, 1)
            hidden, _ = self.stack(self.embed(patches), return_state=False)
            hidden = hidden.flatten(1).unflatten(0, series.shape[:2])
        return self.head(hidden).mT * deviation + mean


class SSMForImageClassification(_Base):
    """A classifier of images: patches, scanned in 1, 2 or 4 orders in each block.

    Args:
        config: ``image_channels``, ``patch_size`` and ``directions`` are read from it (3, 4 and 4 without them).

    Example:
        >>> model = SSMForImageClassification(SSMConfig(hidden_size=8, num_labels=5, pattern=["s4d"]))
        >>> model(torch.randn(2, 3, 16, 16)).logits.shape
        torch.Size([2, 5])
    """

    main_input_name = "pixel_values"

    def __init__(self, config: SSMConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        size = getattr(config, "patch_size", 4)
        self.embed = nn.Conv2d(getattr(config, "image_channels", 3), width, size, stride=size)
        names = [config.pattern[i % len(config.pattern)] for i in range(config.num_hidden_layers)]

        def scan(name: str) -> Scan2d:
            settings = {"l_max": config.l_max, **config.layer_settings.get(name, {})}
            return Scan2d(lambda: build_ssm(name, width, **settings), getattr(config, "directions", 4))

        with torch.device("cpu"):
            self.scans = nn.ModuleList(scan(name) for name in names)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in names)
        self.norm, self.classifier = nn.LayerNorm(width), _Head(width, config.num_labels)
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> ImageClassifierOutput:
        """(B, channels, rows, columns) to logits (B, labels)."""
        x = self.embed(pixel_values).movedim(1, -1)
        for norm, scan in zip(self.norms, self.scans, strict=True):
            x = x + scan(norm(x))
        logits = self.classifier(self.norm(x).mean((1, 2)))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


class _InPlaceOfAttention(nn.Module):
    """A mixer with the calling convention of transformers' attention modules."""

    def __init__(self, mixer: SequenceMixer) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("past_key_values") is not None or kwargs.get("cache") is not None:
            raise ValueError(
                "a replaced attention keeps no cache of transformers; call the model with use_cache=False"
            )  # fmt: skip
        if isinstance(kwargs.get("attention_mask"), Tensor):
            attention_mask = kwargs["attention_mask"]
        mask = None
        if attention_mask is not None:
            # the last query may see exactly the true places of its row
            row = attention_mask if attention_mask.ndim == 2 else attention_mask[:, 0, -1]
            mask = row if row.dtype == torch.bool else (row > 0 if attention_mask.ndim == 2 else row >= 0)
            mask = mask.expand(len(hidden_states), -1)
        y, _ = self.mixer(hidden_states, mask=mask, return_state=False)
        return y, None


def replace_attention(
    model: nn.Module, family: str, layers: Sequence[int] | None = None, **settings: Any
) -> surgery.Report:
    """Put layers of the family in place of self-attention in a transformers encoder or decoder, to train.

    Args:
        model: changed in place; its modules named ``...SelfAttention`` or ``...Attention`` count, in their order,
            innermost ones first where they are nested.
        family: a name of ``FAMILIES``, made for the model's width; in an encoder a layer runs each way, in a decoder
            forwards alone.
        layers: which of them, all without it; negative numbers count from the end.
        settings: of the layer.

    Returns:
        The report, which can undo it.

    Raises:
        ValueError: for a layer that the model does not have, a family that brings its own residual, a layer that looks
            into the future in a decoder.
        NothingMatchedError: for a model without attention.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> small = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2, vocab_size=20)
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **small))
        >>> print(replace_attention(model, "s4d", layers=[1], d_state=8))
        model.layers.1.self_attn: LlamaAttention -> _InPlaceOfAttention, 1,024 -> 832 parameters
        >>> model(torch.arange(6)[None], use_cache=False).logits.shape
        torch.Size([1, 6, 20])
    """
    config = getattr(model, "config", None)
    width = getattr(config, "hidden_size", None)
    if width is None:
        raise ValueError("model must have a config with hidden_size, as models of transformers have")
    if family in FAMILIES and FAMILIES[family].layer.has_residual:
        raise ValueError(f"{family} brings its own norm and residual and cannot stand where attention alone stood")
    pattern = re.compile(r"(Self)?Attention$")
    found = [
        name for name, module in model.named_modules()
        if pattern.search(type(module).__name__)
        and not any(pattern.search(type(m).__name__) for m in module.modules() if m is not module)
        and "cross" not in name.lower()
    ]  # fmt: skip
    chosen = list(range(len(found))) if layers is None else [i + len(found) if i < 0 else i for i in layers]
    wrong = [i for i in chosen if not 0 <= i < len(found)]
    if found and wrong:
        raise ValueError(f"layers must lie within the {len(found)} attention layers of the model, got {list(layers)}")  # type: ignore[arg-type]
    names = {found[i] for i in chosen} if found else set()
    decoder = bool(getattr(config, "is_decoder", False)) or type(model).__name__.endswith("CausalLM")
    decoder = decoder or isinstance(model, GenerationMixin)
    length = getattr(config, "max_position_embeddings", None) or 2048

    def make(old: nn.Module) -> nn.Module:
        def layer() -> SequenceMixer:
            return build_ssm(family, width, **{"l_max": length, **settings})

        mixer = layer()
        if decoder and not mixer.causal:
            raise ValueError(f"{family} looks into the future here, and {type(model).__name__} is a decoder")
        if not decoder and mixer.causal:
            mixer = Bidirectional(layer)
        return _InPlaceOfAttention(mixer)

    return surgery.replace(model, lambda name, module: name in names, make)

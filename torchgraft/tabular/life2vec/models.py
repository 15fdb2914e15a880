"""life2vec by transformers' conventions: configuration, encoder, pre-training, classification, ordinal items."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput
from transformers.trainer_callback import TrainerCallback
from transformers.utils import ModelOutput

from torchgraft.tabular.life2vec.attention import Life2VecAttention, _Projection, orthogonal_random_features
from torchgraft.tabular.life2vec.losses import asymmetric_pu_loss, cdw_cross_entropy, sig_softmax
from torchgraft.tabular.life2vec.modules import (
    AttentionPooling,
    ContextPooling,
    EventEmbedding,
    FeedForward,
    FlatHead,
    MaskedTokenHead,
    OrderHead,
    ReZero,
    ScaleNorm,
    Time2Vec,
    _Original,
)

__all__ = [
    "Life2VecConfig",
    "Life2VecForOrdinal",
    "Life2VecForPreTraining",
    "Life2VecForSequenceClassification",
    "Life2VecModel",
    "Life2VecOrdinalOutput",
    "Life2VecPreTrainingOutput",
    "RedrawProjections",
    "convert_official",
    "finetuning_parameters",
    "freeze_tokens",
    "pretraining_parameters",
]


class Life2VecConfig(PreTrainedConfig):
    """Sizes of a life2vec; the defaults are the paper's, except for attention.

    ``transformers.AutoModel`` and its kin know life2vec once this module is imported, as naming any model does.

    Args:
        vocab_size: tokens, ``tokenizer.vocab_size``.
        hidden_size: width; ``num_heads`` must divide it.
        intermediate_size: of the feed-forward.
        num_layers: encoders.
        num_heads: attention heads, of which the last ``num_local_heads`` look ``local_window`` positions around.
        num_features: random features of the global heads, for ``attention="performer"``.
        max_position_embeddings: longest sequence that the collator should make; the model itself has no limit, and
            transformers keeps the name ``max_length`` for generation.
        attention: ``sdpa``, exact softmax; ``performer``, FAVOR+ as published, whose memory does not grow with the
            square of the length. ``torchgraft bench life2vec`` compares them.
        official_masking: padded keys stay in FAVOR+'s denominator, as in the official code.
        background_length: tokens behind [CLS] that have no time, ``tokenizer.background_length``.
        integer_age: cut ages to whole years, as the official models do.
        embedding_dropout, attention_dropout, feedforward_dropout, decoder_dropout: 0.1 in the paper; 0.3 to 0.4 for
            personality.
        classification_loss: ``pu``, see ``asymmetric_pu_loss``, or ``cross_entropy``.
        positive_weight: of ``pu``.
        pooling: what a classifier reads: ``attention`` over all positions, or ``cls``.
        num_items, num_levels: of ordinal items.
        ordinal_pooling: ``cls``, or ``contexts`` with ``num_contexts`` of them.

    Raises:
        ValueError: for sizes that do not fit together and unknown names.

    Example:
        >>> Life2VecConfig(vocab_size=50, hidden_size=32, num_heads=4, num_local_heads=2).num_layers
        5
    """

    model_type = "life2vec"
    attribute_map = {"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"}  # noqa: RUF012

    def __init__(
        self,
        vocab_size: int = 2043,
        hidden_size: int = 280,
        intermediate_size: int = 2210,
        num_layers: int = 5,
        num_heads: int = 10,
        num_local_heads: int = 7,
        local_window: int = 38,
        num_features: int = 436,
        max_position_embeddings: int = 2560,
        attention: Literal["sdpa", "performer"] = "sdpa",
        official_masking: bool = False,
        background_length: int = 4,
        integer_age: bool = True,
        embedding_dropout: float = 0.1,
        attention_dropout: float = 0.1,
        feedforward_dropout: float = 0.1,
        decoder_dropout: float = 0.1,
        classification_loss: Literal["pu", "cross_entropy"] = "pu",
        positive_weight: float = 0.5,
        pooling: Literal["attention", "cls"] = "attention",
        num_items: int = 4,
        num_levels: int = 5,
        ordinal_pooling: Literal["cls", "contexts"] = "cls",
        num_contexts: int = 10,
        **kwargs: Any,
    ) -> None:
        for name, value, allowed in (
            ("attention", attention, ("sdpa", "performer")),
            ("classification_loss", classification_loss, ("pu", "cross_entropy")),
            ("pooling", pooling, ("attention", "cls")),
            ("ordinal_pooling", ordinal_pooling, ("cls", "contexts")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
        if num_heads < 1 or hidden_size % num_heads or not 0 <= num_local_heads <= num_heads:
            raise ValueError(
                "num_heads must divide hidden_size and num_local_heads lie in 0..num_heads, got "
                f"hidden_size={hidden_size}, num_heads={num_heads}, num_local_heads={num_local_heads}"
            )
        if vocab_size < 10 or min(local_window, num_layers, num_features) < 1:
            raise ValueError(
                "vocab_size must be at least 10 (the general tokens), local_window, num_layers and num_features at "
                f"least 1, got {vocab_size}, {local_window}, {num_layers}, {num_features}"
            )
        for size, given, least in (
            ("intermediate_size", intermediate_size, 1), ("max_position_embeddings", max_position_embeddings, 1),
            ("background_length", background_length, 0), ("num_items", num_items, 1), ("num_levels", num_levels, 2),
            ("num_contexts", num_contexts, 1),
        ):  # fmt: skip
            if given < least:
                raise ValueError(f"{size} must be at least {least}, got {given}")
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_layers, self.num_heads, self.num_local_heads = num_layers, num_heads, num_local_heads
        self.local_window, self.num_features = local_window, num_features
        self.max_position_embeddings = max_position_embeddings
        self.attention, self.official_masking = attention, official_masking
        self.background_length, self.integer_age = background_length, integer_age
        self.embedding_dropout, self.attention_dropout = embedding_dropout, attention_dropout
        self.feedforward_dropout, self.decoder_dropout = feedforward_dropout, decoder_dropout
        self.classification_loss, self.positive_weight, self.pooling = classification_loss, positive_weight, pooling
        self.num_items, self.num_levels = num_items, num_levels
        self.ordinal_pooling, self.num_contexts = ordinal_pooling, num_contexts
        kwargs.setdefault("pad_token_id", 0)
        super().__init__(**kwargs)


class _Heads(nn.Module):
    """One more level of names, as in the official weights."""

    def __init__(self, config: Life2VecConfig) -> None:
        super().__init__()
        self.attention = Life2VecAttention(
            config.hidden_size, config.num_heads, config.num_local_heads, config.local_window, config.num_features,
            config.attention_dropout, config.attention, config.official_masking,
        )  # fmt: skip


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = ReZero()


class _Encoder(nn.Module):
    def __init__(self, config: Life2VecConfig) -> None:
        super().__init__()
        self.attention, self.attention_sublayer = _Heads(config), _Residual()
        self.position_wise = FeedForward(config.hidden_size, config.intermediate_size, config.feedforward_dropout)
        self.position_sublayer = _Residual()

    def forward(self, x: Tensor, valid: Tensor, output_weights: bool) -> tuple[Tensor, Tensor | None]:
        x = x * valid.unsqueeze(-1)
        y, weights = self.attention.attention(x, valid, output_weights)
        x = self.attention_sublayer.norm(x, y)
        return self.position_sublayer.norm(x, self.position_wise(x)), weights


class Life2VecPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of every life2vec."""

    config_class = Life2VecConfig
    config: Life2VecConfig
    base_model_prefix = "transformer"
    main_input_name = "input_ids"
    _no_split_modules = ["_Encoder"]  # noqa: RUF012
    # losses are means of a batch: the Trainer must divide them by the steps that it accumulates
    accepts_loss_kwargs = False
    # an encoder that was saved with other attention has, or lacks, random features
    _keys_to_ignore_on_load_unexpected = [r"projection_matrix$"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = 1 / math.sqrt(module.in_features)
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, ReZero):
            init.zeros_(module.weights)
        elif isinstance(module, (ScaleNorm, MaskedTokenHead)):
            init.constant_(module.g, math.sqrt(module.dim))
        elif isinstance(module, (Time2Vec, _Original, nn.Embedding)):
            for parameter in module.parameters(recurse=False):
                init.uniform_(parameter, -0.01, 0.01)
        elif isinstance(module, (AttentionPooling, ContextPooling)):
            init.normal_(module.context)
        elif isinstance(module, _Projection):
            init.copy_(module.projection_matrix, orthogonal_random_features(*module.projection_matrix.shape))

    def redraw_projections(self, generator: torch.Generator | None = None) -> None:
        """Draw the random features of all layers anew, as is done after every epoch of training.

        Args:
            generator: of the random numbers, on the CPU.
        """
        for module in self.modules():
            if isinstance(module, _Projection):
                module.redraw(generator)


class RedrawProjections(TrainerCallback):
    """For ``transformers.Trainer``: ``redraw_projections`` at the end of every epoch."""

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Redraw."""
        getattr(model, "module", model).redraw_projections()


def _check_inputs(input_ids: Tensor, padding_mask: Tensor | None, vocab_size: int) -> None:
    if input_ids.dtype in (torch.float16, torch.bfloat16):
        raise TypeError(
            f"input_ids must not be {input_ids.dtype}, which rounds tokens and days; leave them float32, whatever the "
            "model's dtype"
        )
    if input_ids.ndim != 3 or input_ids.shape[1] != 4:
        raise ValueError(
            f"input_ids must have shape (B, 4, S): tokens, positions, ages, segments; got {tuple(input_ids.shape)}"
        )
    if padding_mask is not None and padding_mask.shape != (input_ids.shape[0], input_ids.shape[2]):
        raise ValueError(
            f"padding_mask must have shape (B, S) = {(input_ids.shape[0], input_ids.shape[2])}, got "
            f"{tuple(padding_mask.shape)}"
        )
    # on an accelerator this would wait for the device
    if input_ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    valid = input_ids[:, 0] != 0 if padding_mask is None else padding_mask.bool()
    empty = ~valid.any(1)
    if empty.any():
        raise ValueError(f"row {int(empty.nonzero()[0])} is all padding; every document has at least [CLS] and [SEP]")
    if not input_ids.isfinite().all():
        raise ValueError(f"input_ids holds {int((~input_ids.isfinite()).sum())} values that are not finite")
    least, largest = (int(token) for token in input_ids[:, 0].aminmax())
    if least < 0 or largest >= vocab_size:
        wrong = least if least < 0 else largest
        raise ValueError(f"input_ids holds token {wrong}, but vocab_size is {vocab_size}; do they belong together?")
    least, largest = (int(segment) for segment in input_ids[:, 3].aminmax())
    if least < 0 or largest > 3:
        raise ValueError(f"input_ids holds segments {least}..{largest} in its last row; they must lie in 0..3")


def _classes(labels: Tensor) -> Tensor:
    """Whole numbers; a soft label of 0.9 must not pass for class 0."""
    readable = labels.device.type == "cpu" and labels.is_floating_point() and not torch.compiler.is_compiling()
    if readable and not torch.equal(labels, labels.round()):
        raise ValueError("labels must be classes, whole numbers without NaN; soft labels are not supported")
    return labels.long()


class Life2VecModel(Life2VecPreTrainedModel):
    """The encoder: embeddings of tokens, ages, absolute positions and segments, then ReZero layers without norms.

    Example:
        >>> config = Life2VecConfig(vocab_size=50, hidden_size=32, num_layers=1, num_heads=4, num_local_heads=2)
        >>> ids = torch.randint(1, 4, (2, 4, 12))
        >>> Life2VecModel(config)(ids).last_hidden_state.shape
        torch.Size([2, 12, 32])
    """

    def __init__(self, config: Life2VecConfig) -> None:
        super().__init__(config)
        self.embedding = EventEmbedding(
            config.vocab_size, config.hidden_size, config.background_length, config.embedding_dropout
        )
        self.encoders = nn.ModuleList([_Encoder(config) for _ in range(config.num_layers)])
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding; its ``weight`` is the centred matrix."""
        return self.embedding.token

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.embedding.token = value  # type: ignore[assignment]

    def embed(self, input_ids: Shaped[Tensor, "B 4 S"], matrix: Tensor | None = None) -> Float[Tensor, "B S E"]:
        """Embeddings of a batch, which ``forward`` takes as ``inputs_embeds``.

        Args:
            input_ids: (B, 4, S).
            matrix: the centred token matrix where it is known already.
        """
        age = input_ids[:, 2]
        return self.embedding(
            input_ids[:, 0].long(),
            input_ids[:, 1].float(),
            age.long().float() if self.config.integer_age else age.float(),
            input_ids[:, 3].long(),
            matrix,
        )

    def run(
        self, x: Float[Tensor, "B S E"], valid: Bool[Tensor, "B S"], start: int = 0, output_weights: bool = False
    ) -> tuple[list[Float[Tensor, "B S E"]], list[Tensor]]:
        """States before layer ``start``, before each layer behind it, and at the end; and weights of local heads."""
        states, weights = [x], []
        for layer in list(self.encoders)[start:]:
            x, found = layer(x, valid, output_weights)
            states.append(x)
            if found is not None:
                weights.append(found)
        return states, weights

    def forward(
        self,
        input_ids: Shaped[Tensor, "B 4 S"] | None = None,
        padding_mask: Shaped[Tensor, "B S"] | None = None,
        inputs_embeds: Float[Tensor, "B S E"] | None = None,
        token_matrix: Float[Tensor, "V E"] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Hidden states (B, S, hidden_size).

        Args:
            input_ids: (B, 4, S): tokens, absolute positions, ages, segments, as the collator makes them.
            padding_mask: (B, S), true where there is a token; found from token 0 if not given.
            inputs_embeds: from ``embed``, instead of ``input_ids``; then ``padding_mask`` is needed.
            token_matrix: the centred token matrix where it is known already.
            output_hidden_states: also the states before each layer and at the end.
            output_attentions: also the weights of the local heads (B, local heads, S, S) of each layer, without
                dropout.
            return_dict: False gives a tuple.
            kwargs: not used.

        Raises:
            ValueError: for shapes; on the CPU also for tokens beyond the vocabulary, segments beyond 3, values that
                are not finite, and rows that are all padding.
            TypeError: for ``input_ids`` of half precision.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, and not both")
        if input_ids is not None:
            _check_inputs(input_ids, padding_mask, self.config.vocab_size)
            valid = input_ids[:, 0] != 0 if padding_mask is None else padding_mask.bool()
            x = self.embed(input_ids, token_matrix)
        elif padding_mask is None:
            raise ValueError("padding_mask is needed with inputs_embeds; pass all ones where nothing is padded")
        else:
            assert inputs_embeds is not None
            x, valid = inputs_embeds, padding_mask.bool()
        want = self.config.output_attentions if output_attentions is None else output_attentions
        states, weights = self.run(x, valid, output_weights=bool(want))
        keep = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        found = BaseModelOutput(
            last_hidden_state=states[-1],
            hidden_states=tuple(states) if keep else None,
            attentions=tuple(weights) if want else None,
        )
        return found.to_tuple() if return_dict is False else found


@dataclass
class Life2VecPreTrainingOutput(ModelOutput):
    """What pre-training gives.

    Attributes:
        loss: ``0.8 mlm_loss + 0.2 sop_loss``, where there are targets.
        logits: of the tokens to predict, (B, P, vocab_size).
        order_logits: (B, 3): as it was, reversed, shuffled.
        mlm_loss, sop_loss: the parts; the perplexity of masked tokens is ``exp(mlm_loss)``.
        hidden_states, attentions: as in ``Life2VecModel``.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    order_logits: Tensor | None = None
    mlm_loss: Tensor | None = None
    sop_loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class Life2VecForPreTraining(Life2VecPreTrainedModel):
    """Masked tokens and order of events; takes the batches of ``EventCollator``.

    Example:
        >>> config = Life2VecConfig(vocab_size=50, hidden_size=32, num_layers=1, num_heads=4, num_local_heads=2)
        >>> ids, spots = torch.randint(1, 4, (2, 4, 12)), torch.tensor([[3, 5], [6, 11]])
        >>> model = Life2VecForPreTraining(config)
        >>> out = model(ids, target_pos=spots, target_tokens=torch.tensor([[12, 20], [30, 0]]))
        >>> out.logits.shape, bool(out.logits.abs().max() <= 1.3 * model.mlm_decoder.g)
        (torch.Size([2, 2, 50]), True)
    """

    def __init__(self, config: Life2VecConfig) -> None:
        super().__init__(config)
        self.transformer = Life2VecModel(config)
        self.mlm_decoder = MaskedTokenHead(config.hidden_size, config.embedding_dropout)
        self.cls_decoder = OrderHead(config.hidden_size, 3, config.decoder_dropout)
        self.post_init()

    def forward(
        self,
        input_ids: Shaped[Tensor, "B 4 S"],
        padding_mask: Shaped[Tensor, "B S"] | None = None,
        target_pos: Shaped[Tensor, "B P"] | None = None,
        target_tokens: Shaped[Tensor, "B P"] | None = None,
        target_cls: Shaped[Tensor, " B"] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        return_loss: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Logits, and losses where there are targets.

        Args:
            input_ids, padding_mask: as in ``Life2VecModel``.
            target_pos: positions to predict (B, P); every position if not given.
            target_tokens: what belongs there; 0 is left out of the loss.
            target_cls: 0 as it was, 1 reversed, 2 shuffled, -100 left out.
            output_hidden_states, output_attentions, return_dict: as in ``Life2VecModel``.
            return_loss: False computes none; that it is here lets ``Trainer.evaluate`` report a loss.
            kwargs: not used.

        Raises:
            ValueError: where ``target_tokens`` has another shape than ``target_pos``.
        """
        matrix = self.transformer.embedding.token.weight
        found = self.transformer(
            input_ids, padding_mask, token_matrix=matrix, output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )  # fmt: skip
        hidden = found.last_hidden_state
        if target_pos is None:
            target_pos = torch.arange(hidden.shape[1], device=hidden.device).expand(len(hidden), -1)
        if target_tokens is not None and target_tokens.shape != target_pos.shape:
            raise ValueError(
                f"target_tokens must have the shape of target_pos, {tuple(target_pos.shape)}, got "
                f"{tuple(target_tokens.shape)}"
            )
        logits = self.mlm_decoder(hidden, target_pos.long(), matrix)
        order = self.cls_decoder(hidden[:, 0])
        losses: list[Tensor] = []
        mlm = sop = None
        if return_loss and target_tokens is not None:
            mlm = _mean_loss(logits.flatten(0, 1), target_tokens.flatten().long(), 0)
            losses.append(0.8 * mlm)
        if return_loss and target_cls is not None:
            weight = logits.new_tensor([1 / 0.9, 1 / 0.1, 1 / 0.1])
            sop = _mean_loss(order, target_cls.long(), -100, weight=weight, label_smoothing=0.1)
            losses.append(0.2 * sop)
        out = Life2VecPreTrainingOutput(
            loss=torch.stack(losses).sum() if losses else None, logits=logits, order_logits=order, mlm_loss=mlm,
            sop_loss=sop, hidden_states=found.hidden_states, attentions=found.attentions,
        )  # fmt: skip
        return out.to_tuple() if return_dict is False else out


def _mean_loss(logits: Tensor, target: Tensor, ignore: int, **options: Any) -> Tensor:
    """Cross-entropy that is 0, and not NaN, where every target is to be ignored."""
    loss = F.cross_entropy(logits, target, ignore_index=ignore, **options)
    return torch.where((target != ignore).any(), loss, logits.sum() * 0)


class Life2VecForSequenceClassification(Life2VecPreTrainedModel):
    """One label a person, such as early death; the loss is that for positives among unlabelled people.

    Load what pre-training saved with ``from_pretrained``; the head is new.

    Example:
        >>> config = Life2VecConfig(vocab_size=50, hidden_size=32, num_layers=1, num_heads=4, num_local_heads=2)
        >>> model = Life2VecForSequenceClassification(config)
        >>> model(torch.randint(1, 4, (2, 4, 12)), labels=torch.tensor([1, 0])).logits.shape
        torch.Size([2, 2])
    """

    def __init__(self, config: Life2VecConfig) -> None:
        super().__init__(config)
        if config.classification_loss == "pu" and config.num_labels != 2:
            raise ValueError(f"classification_loss='pu' needs num_labels=2, got {config.num_labels}")
        self.num_labels = config.num_labels
        self.transformer = Life2VecModel(config)
        self.decoder = (
            AttentionPooling(config.hidden_size, config.num_labels, config.decoder_dropout)
            if config.pooling == "attention"
            else OrderHead(config.hidden_size, config.num_labels, config.decoder_dropout, "ff1", "norm_1")
        )
        self.post_init()

    def classify(self, hidden: Float[Tensor, "B S E"], padding_mask: Shaped[Tensor, "B S"]) -> Float[Tensor, "B C"]:
        """Logits of last hidden states."""
        if isinstance(self.decoder, AttentionPooling):
            return self.decoder(hidden, padding_mask)
        return self.decoder(hidden[:, 0])

    def forward(
        self,
        input_ids: Shaped[Tensor, "B 4 S"] | None = None,
        padding_mask: Shaped[Tensor, "B S"] | None = None,
        inputs_embeds: Float[Tensor, "B S E"] | None = None,
        labels: Shaped[Tensor, " B"] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits (B, num_labels), and the loss where ``labels`` (B,) are given; the rest is as in ``Life2VecModel``."""
        found = self.transformer(
            input_ids, padding_mask, inputs_embeds, output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )  # fmt: skip
        if padding_mask is None:
            assert input_ids is not None
            padding_mask = input_ids[:, 0] != 0
        logits = self.classify(found.last_hidden_state, padding_mask)
        loss = None
        if labels is not None:
            if self.config.classification_loss == "pu":
                loss = asymmetric_pu_loss(logits, _classes(labels), self.config.positive_weight)
            else:
                loss = F.cross_entropy(logits, _classes(labels))
        out = SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=found.hidden_states, attentions=found.attentions
        )
        return out.to_tuple() if return_dict is False else out


@dataclass
class Life2VecOrdinalOutput(ModelOutput):
    """What ordinal items give.

    Attributes:
        loss: mean over the items of the class-distance-weighted cross-entropy, where there are labels.
        logits: (B, items, levels).
        probabilities: their ``sig_softmax``.
        hidden_states, attentions: as in ``Life2VecModel``.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    probabilities: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class Life2VecForOrdinal(Life2VecPreTrainedModel):
    """Several ordinal answers a person, such as items of a personality questionnaire.

    Example:
        >>> config = Life2VecConfig(vocab_size=50, hidden_size=32, num_layers=1, num_heads=4, num_local_heads=2)
        >>> out = Life2VecForOrdinal(config)(torch.randint(1, 4, (2, 4, 12)), labels=torch.tensor([[0, 4, 2, 1]] * 2))
        >>> out.probabilities.shape
        torch.Size([2, 4, 5])
    """

    def __init__(self, config: Life2VecConfig) -> None:
        super().__init__(config)
        self.transformer = Life2VecModel(config)
        width, items, levels = config.hidden_size, config.num_items, config.num_levels
        self.decoder = (
            FlatHead(width, config.intermediate_size, items, levels, config.decoder_dropout)
            if config.ordinal_pooling == "cls"
            else ContextPooling(width, items, levels, config.num_contexts, config.decoder_dropout)
        )
        self.post_init()

    def forward(
        self,
        input_ids: Shaped[Tensor, "B 4 S"] | None = None,
        padding_mask: Shaped[Tensor, "B S"] | None = None,
        inputs_embeds: Float[Tensor, "B S E"] | None = None,
        labels: Shaped[Tensor, "B I"] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits and probabilities (B, items, levels), and the loss where ``labels`` (B, items) are given.

        Labels count from 0; other arguments as in ``Life2VecModel``.
        """
        found = self.transformer(
            input_ids, padding_mask, inputs_embeds, output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )  # fmt: skip
        if padding_mask is None:
            assert input_ids is not None
            padding_mask = input_ids[:, 0] != 0
        logits = self.decoder(found.last_hidden_state, padding_mask)
        probabilities = sig_softmax(logits)
        loss = None
        if labels is not None:
            if labels.shape != logits.shape[:2]:
                raise ValueError(f"labels must have shape {tuple(logits.shape[:2])}, got {tuple(labels.shape)}")
            loss = cdw_cross_entropy(probabilities.flatten(0, 1), _classes(labels.flatten()))
        out = Life2VecOrdinalOutput(
            loss=loss, logits=logits, probabilities=probabilities, hidden_states=found.hidden_states,
            attentions=found.attentions,
        )  # fmt: skip
        return out.to_tuple() if return_dict is False else out


# --- training --------------------------------------------------------------------------------------------------------


def pretraining_parameters(model: nn.Module, weight_decay: float = 0.01) -> list[dict[str, Any]]:
    """Parameter groups of pre-training: no decay on biases, norms (ReZero scalars too), times, tokens, and ``g``.

    The paper's optimiser is AdamW with rate 5e-3, eps 1e-6, and one cycle over all steps.

    Example:
        >>> model = Life2VecModel(Life2VecConfig(50, 32, 64, 1, 4, 2))
        >>> [group["weight_decay"] for group in pretraining_parameters(model)]
        [0.01, 0.0]
    """
    spared = ("bias", "norm", "age", "abspos", "token", "decoder.g")
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[not any(part in name for part in spared)].append(parameter)
    return [
        {"params": groups[True], "weight_decay": weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]


def finetuning_parameters(
    model: Life2VecForSequenceClassification | Life2VecForOrdinal,
    lr: float = 0.01,
    decay: float = 0.95,
    weight_decay: float = 1e-3,
    head_weight_decay: float = 0.01,
) -> list[dict[str, Any]]:
    """Parameter groups of fine-tuning, with rates that fall from the head to the embeddings.

    The head learns at ``lr``, layer i of L at ``lr * decay ** (L - i)``, embeddings at ``lr * decay ** L``. The
    official code means to decay the weights of layers and by a slip decays none; here they are decayed.

    Example:
        >>> model = Life2VecForSequenceClassification(Life2VecConfig(50, 32, 64, 2, 4, 2))
        >>> sorted({round(group["lr"], 6) for group in finetuning_parameters(model)})
        [0.009025, 0.0095, 0.01]
    """
    layers = len(model.transformer.encoders)
    rates = {f"encoders.{i}.": lr * decay ** (layers - i) for i in range(layers)}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if name.startswith("decoder."):
            key = (lr, head_weight_decay)
        elif ".embedding." in name:
            key = (lr * decay**layers, 0.0)
        else:
            rate = next(r for part, r in rates.items() if part in name)
            key = (rate, 0.0 if "bias" in name or "norm" in name else weight_decay)
        groups.setdefault(key, []).append(parameter)
    return [{"params": found, "lr": rate, "weight_decay": w} for (rate, w), found in groups.items()]


def freeze_tokens(model: nn.Module, keep: tuple[int, ...] = (1, 9)) -> Any:
    """From now on let no gradient reach the token matrix, except the rows ``keep``: [CLS] and [UNK] when fine-tuning.

    Returns:
        A handle; ``remove()`` undoes it.
    """
    weight = next(p for name, p in model.named_parameters() if name.endswith("token.parametrizations.weight.original"))

    def zero(gradient: Tensor) -> Tensor:
        kept = torch.zeros_like(gradient)
        kept[list(keep)] = gradient[list(keep)]
        return kept

    return weight.register_hook(zero)


def convert_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the official Lightning modules, under our names.

    Names are the same, except that the tied copy of the token matrix, buffers of its parametrisation, loss weights,
    and parameters that the official heads never use have no place here.

    Args:
        state: ``state_dict`` of ``TransformerEncoder``, ``Transformer_CLS``, ``Transformer_PSY``, or of ``Transformer``
            alone.

    Returns:
        Good for ``load_state_dict`` of the model of the same kind; with ``attention="sdpa"`` leave out the names that
        end in ``projection_matrix``.
    """
    flat = "decoder.ff2.weight" in state
    kept = {}
    for name, tensor in state.items():
        if ".parametrizations.weight.0." in name or name.startswith(("mlm_decoder.out.", "loss", "target_weight.")):
            continue
        if name in ("cls_w", "mlm_w", "cls_a") or ".rel_pos." in name or "metric" in name:
            continue
        if name.startswith("decoder.rezero.") or (flat and name.startswith(("decoder.context", "decoder.pool."))):
            continue
        kept[name] = tensor
    return kept


AutoConfig.register("life2vec", Life2VecConfig, exist_ok=True)
AutoModel.register(Life2VecConfig, Life2VecModel, exist_ok=True)
AutoModelForSequenceClassification.register(Life2VecConfig, Life2VecForSequenceClassification, exist_ok=True)

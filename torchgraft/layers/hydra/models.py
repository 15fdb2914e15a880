"""Encoders of Hydra layers by transformers' conventions, as pre-trained on C4 (arXiv 2407.09941, section 4.2)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, MaskedLMOutput

from torchgraft.layers._classification import classified
from torchgraft.layers.hydra.layer import HydraMixer, initial_dt_bias
from torchgraft.layers.hydra.mixers import Cauchy, MatrixMixer, Quasiseparable, Toeplitz

__all__ = ["HydraConfig", "HydraForMaskedLM", "HydraForSequenceClassification", "HydraModel", "load_published"]


class HydraConfig(PreTrainedConfig):
    """Sizes of a Hydra encoder; the defaults are those of the model published with the paper.

    Args:
        vocab_size: tokens.
        hidden_size: width.
        num_hidden_layers: Hydra layers; two of them take the place of one transformer layer, since they have no MLP.
        mixer: ``hydra``, or a kind of ``MatrixMixer``.
        d_state, d_conv, expand, headdim, n_groups, chunk_size: of the mixer, as in ``HydraMixer``.
        data_dependent, qk_dim: of a ``MatrixMixer``.
        is_prenorm: norm before the mixer and at the end, rather than after each residual.
        use_position_embeddings: learned positions, which Hydra does not need.
        max_position_embeddings: longest sequence where there are learned positions or a ``MatrixMixer``; Hydra without
            them takes any.
        pool_all: pool the mean over all tokens rather than the first token.
        type_vocab_size, hidden_act, hidden_dropout_prob, classifier_dropout, layer_norm_eps, initializer_range: as in
            BERT.

    Raises:
        ValueError: for sizes that do not go together, or ``is_decoder=True``.

    Example:
        >>> HydraConfig(hidden_size=64, num_hidden_layers=2, headdim=32).mixer
        'hydra'
    """

    model_type = "hydra"

    def __init__(
        self,
        vocab_size: int = 30528,
        hidden_size: int = 768,
        num_hidden_layers: int = 23,
        mixer: str = "hydra",
        d_state: int = 64,
        d_conv: int = 7,
        expand: int = 2,
        headdim: int = 64,
        n_groups: int = 1,
        chunk_size: int = 64,
        data_dependent: bool = True,
        qk_dim: int = 16,
        is_prenorm: bool = False,
        use_position_embeddings: bool = False,
        max_position_embeddings: int = 512,
        pool_all: bool = False,
        type_vocab_size: int = 2,
        hidden_act: str = "gelu",
        hidden_dropout_prob: float = 0.1,
        classifier_dropout: float | None = None,
        layer_norm_eps: float = 1e-12,
        initializer_range: float = 0.02,
        pad_token_id: int | None = 0,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("is_decoder"):
            raise ValueError("is_decoder=True: Hydra sees both directions and cannot be a decoder")
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.mixer, self.d_state, self.d_conv, self.expand = mixer, d_state, d_conv, expand
        self.headdim, self.n_groups, self.chunk_size = headdim, n_groups, chunk_size
        self.data_dependent, self.qk_dim, self.is_prenorm = data_dependent, qk_dim, is_prenorm
        self.use_position_embeddings, self.max_position_embeddings = use_position_embeddings, max_position_embeddings
        self.pool_all, self.type_vocab_size, self.hidden_act = pool_all, type_vocab_size, hidden_act
        self.hidden_dropout_prob, self.classifier_dropout = hidden_dropout_prob, classifier_dropout
        self.layer_norm_eps, self.initializer_range = layer_norm_eps, initializer_range
        super().__init__(pad_token_id=pad_token_id, tie_word_embeddings=tie_word_embeddings, **kwargs)


def _mixer(config: HydraConfig) -> nn.Module:
    c = config
    if c.mixer == "hydra":
        return HydraMixer(c.hidden_size, c.d_state, c.d_conv, c.expand, c.headdim, c.n_groups, chunk_size=c.chunk_size)
    return MatrixMixer(
        c.mixer,  # type: ignore[arg-type]
        c.data_dependent, c.hidden_size, c.qk_dim, c.max_position_embeddings, c.d_conv, c.expand, c.headdim,
        chunk_size=c.chunk_size,
    )  # fmt: skip


class _Embeddings(nn.Module):
    def __init__(self, config: HydraConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.position_embeddings = (
            nn.Embedding(config.max_position_embeddings, config.hidden_size) if config.use_position_embeddings else None
        )
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, words: Tensor, token_type_ids: Tensor | None, position_ids: Tensor | None) -> Tensor:
        length = words.shape[1]
        types = torch.zeros(words.shape[:2], dtype=torch.long, device=words.device)
        x = words + self.token_type_embeddings(types if token_type_ids is None else token_type_ids)
        if self.position_embeddings is not None:
            longest = self.position_embeddings.num_embeddings
            if position_ids is None and length > longest:
                raise ValueError(f"the sequence has length {length}, but max_position_embeddings is {longest}")
            places = torch.arange(length, device=x.device)[None] if position_ids is None else position_ids
            x = x + self.position_embeddings(places)
        return self.dropout(self.LayerNorm(x))


class _Residual(nn.Module):
    """Mixer, residual and norm, in the official order and under the official names."""

    def __init__(self, config: HydraConfig) -> None:
        super().__init__()
        self.mixer = _mixer(config)
        self.norm = nn.LayerNorm(config.hidden_size, eps=1e-5)
        self.is_prenorm = config.is_prenorm

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if self.is_prenorm:
            return x + self.mixer(self.norm(x), attention_mask=mask)
        return self.norm(x + self.mixer(x, attention_mask=mask))


class _Layer(GradientCheckpointingLayer):
    def __init__(self, config: HydraConfig) -> None:
        super().__init__()
        self.layer = _Residual(config)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.layer(x, mask)


class _Encoder(nn.Module):
    def __init__(self, config: HydraConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList([_Layer(config) for _ in range(config.num_hidden_layers)])
        if config.is_prenorm:
            self.norm_f = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.is_prenorm = config.is_prenorm

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
        """The embeddings and what each layer gives, the last of them normalised."""
        seen = [x]
        for layer in self.layer:
            seen.append(layer(seen[-1], mask))
        if self.is_prenorm:
            seen[-1] = self.norm_f(seen[-1])
        return tuple(seen)


class _Pooler(nn.Module):
    def __init__(self, config: HydraConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.pool_all = config.pool_all

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if not self.pool_all:
            found = x[:, 0]
        elif mask is None:
            found = x.mean(1)
        else:
            weights = (mask != 0).to(x.dtype)[..., None]
            found = (x * weights).sum(1) / weights.sum(1).clamp(min=1)
        return self.dense(found).tanh()


class HydraPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of every Hydra encoder."""

    config_class = HydraConfig
    config: HydraConfig
    # the official name, so that the published weights load as they are
    base_model_prefix = "bert"
    supports_gradient_checkpointing = True
    _no_split_modules = ["_Layer"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, mean=0.0, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                init.zeros_(module.bias)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                init.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            init.ones_(module.weight)
            if isinstance(module, nn.LayerNorm):
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv1d):
            # torch's own, as in the official code: uniform in one over the root of the taps
            bound = 1 / math.sqrt(module.kernel_size[0])
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, (HydraMixer, Quasiseparable)):
            init.copy_(module.dt_bias, initial_dt_bias(module.nheads, 0.001, 0.1, 1e-4))
            init.zeros_(module.A_log)
            init.ones_(module.D)
        elif isinstance(module, Cauchy) and module.bias is not None:
            init.constant_(module.bias, 0.5)
        if isinstance(module, Toeplitz) and hasattr(module, "conv_params"):
            init.xavier_uniform_(module.conv_params)
        for name, table in module.named_parameters(recurse=False):
            if name in ("q_matrix", "k_matrix", "BC", "M"):
                init.xavier_normal_(table)


class HydraModel(HydraPreTrainedModel):
    """Token embeddings, Hydra layers, and a pooler.

    Example:
        >>> config = HydraConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, d_state=8, headdim=16)
        >>> HydraModel(config)(torch.arange(10)[None]).last_hidden_state.shape
        torch.Size([1, 10, 32])
    """

    def __init__(self, config: HydraConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = _Embeddings(config)
        self.encoder = _Encoder(config)
        self.pooler = _Pooler(config) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.embeddings.word_embeddings = value  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Hidden states (B, L, hidden_size) and the pooled ones (B, hidden_size).

        Args:
            input_ids: (B, L); or ``inputs_embeds`` (B, L, hidden_size).
            attention_mask: 1 where there is a token, (B, L).
            token_type_ids: (B, L); all 0 if not given.
            position_ids: (B, L), where the model has learned positions.
            output_hidden_states: also the embeddings and what each layer gives.
            output_attentions: refused, since there are none.
            return_dict: False gives a tuple.
            kwargs: not used.

        Raises:
            ValueError: for an empty sequence, a mask that is not (B, L), or one sequence longer than a model with
                learned positions or free matrices takes.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, and not both")
        if output_attentions:
            raise ValueError("output_attentions=True: there are no attention weights; see HydraMixer.matrix")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        words = self.embeddings.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if words.shape[1] == 0:
            raise ValueError("the sequence is empty (length 0); give at least one token")
        mask = None if attention_mask is None else attention_mask != 0
        seen = self.encoder(self.embeddings(words, token_type_ids, position_ids), mask)
        pooled = None if self.pooler is None else self.pooler(seen[-1], mask)
        hidden_states = seen if output_hidden_states else None
        if return_dict is False:
            return tuple(part for part in (seen[-1], pooled, hidden_states) if part is not None)
        return BaseModelOutputWithPooling(
            last_hidden_state=seen[-1], pooler_output=pooled, hidden_states=hidden_states
        )  # fmt: skip


class _Transform(nn.Module):
    def __init__(self, config: HydraConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(self.activation(self.dense(x)))


class _Predictions(nn.Module):
    def __init__(self, config: HydraConfig) -> None:
        super().__init__()
        self.transform = _Transform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.transform(x))


class _Head(nn.Module):
    def __init__(self, config: HydraConfig) -> None:
        super().__init__()
        self.predictions = _Predictions(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.predictions(x)


class HydraForMaskedLM(HydraPreTrainedModel):
    """A masked language model; ``load_published`` reads the official checkpoint into it.

    Example:
        >>> config = HydraConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, d_state=8, headdim=16)
        >>> HydraForMaskedLM(config)(torch.arange(10)[None]).logits.shape
        torch.Size([1, 10, 50])
    """

    _tied_weights_keys = {"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: HydraConfig) -> None:
        super().__init__(config)
        self.bert = HydraModel(config, add_pooling_layer=False)
        self.cls = _Head(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The decoder, tied to the token embedding."""
        return self.cls.predictions.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the decoder."""
        self.cls.predictions.decoder = new_embeddings  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits (B, L, vocab_size), and the loss over ``labels`` that are not -100.

        The official code leaves out labels of 0 too. Other arguments as in ``HydraModel``.
        """
        found = self.bert(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_hidden_states,
            output_attentions,
        )  # fmt: skip
        logits = self.cls(found.last_hidden_state)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        if return_dict is False:
            return tuple(part for part in (loss, logits, found.hidden_states) if part is not None)
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=found.hidden_states)


class HydraForSequenceClassification(HydraPreTrainedModel):
    """Pooled hidden states, dropout, a linear layer.

    Example:
        >>> config = HydraConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, d_state=8, headdim=16)
        >>> HydraForSequenceClassification(config)(torch.arange(10)[None]).logits.shape
        torch.Size([1, 2])
    """

    def __init__(self, config: HydraConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = HydraModel(config)
        dropout = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits (B, num_labels), and the loss where ``labels`` are given: classes, or floats for regression."""
        found = self.bert(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_hidden_states,
            output_attentions,
        )  # fmt: skip
        logits = self.classifier(self.dropout(found.pooler_output))
        return classified(self, logits, labels, found.hidden_states, return_dict)


def load_published(checkpoint: str | Path | Mapping[str, Any], **settings: Any) -> HydraForMaskedLM:
    """A masked language model from a checkpoint of the official training code, such as ``goombalab/hydra`` on the hub.

    Sizes are read off the shapes. The prefixes that the official trainer puts before the names are taken away.

    Args:
        checkpoint: a state dict, or a file: safetensors, or what ``torch.save`` wrote, read with ``weights_only=True``.
        settings: of ``HydraConfig``, where shapes do not tell (``hidden_act``, ``hidden_dropout_prob``, …).

    Raises:
        ValueError: when it is no checkpoint of a Hydra, or names are missing or left over.

    Example:
        >>> config = HydraConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, d_state=8, headdim=16)
        >>> official = {f"model.{name}": value for name, value in HydraForMaskedLM(config).state_dict().items()}
        >>> load_published({"state": {"model": official}}).config.num_hidden_layers
        2
    """
    if isinstance(checkpoint, Mapping):
        state: Mapping[str, Any] = checkpoint
    elif str(checkpoint).endswith(".safetensors"):
        from safetensors.torch import load_file

        state = load_file(str(checkpoint))
    else:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    for key in ("state", "model"):
        if isinstance(state.get(key), Mapping):
            state = state[key]
    state = {name.removeprefix("module.").removeprefix("model."): value for name, value in state.items()}
    first = "bert.encoder.layer.0.layer.mixer."
    if f"{first}fc_D.weight" not in state:
        raise ValueError(
            f"checkpoint is not that of a Hydra: it has no {first}fc_D.weight; it has {', '.join(list(state)[:3])}, …"
        )
    embeddings = ("bert.embeddings.word_embeddings.weight", "bert.embeddings.token_type_embeddings.weight")
    needed = [name for name in (*embeddings, f"{first}conv1d.weight") if name not in state]
    if needed:
        raise ValueError(f"checkpoint does not fit: missing {needed}")
    words = state["bert.embeddings.word_embeddings.weight"]
    heads, inner = state[f"{first}fc_D.weight"].shape
    convolved, _, taps = state[f"{first}conv1d.weight"].shape
    groups = settings.pop("n_groups", 1)
    positions = state.get("bert.embeddings.position_embeddings.weight")
    if positions is not None:
        settings |= {"use_position_embeddings": True, "max_position_embeddings": len(positions)}
    config = HydraConfig(
        vocab_size=words.shape[0], hidden_size=words.shape[1], n_groups=groups, headdim=inner // heads, d_conv=taps,
        expand=inner // words.shape[1], d_state=(convolved - inner) // (4 * groups),
        num_hidden_layers=1 + max(int(name.split(".")[3]) for name in state if name.startswith("bert.encoder.layer.")),
        is_prenorm="bert.encoder.norm_f.weight" in state,
        type_vocab_size=len(state["bert.embeddings.token_type_embeddings.weight"]), **settings,
    )  # fmt: skip
    model = HydraForMaskedLM(config)
    missing, left = model.load_state_dict(state, strict=False)
    missing = [name for name in missing if name != "cls.predictions.decoder.weight"]
    left = [name for name in left if name != "bert.embeddings.position_ids"]
    if missing or left:
        raise ValueError(f"checkpoint does not fit: missing {missing[:5]}, left over {left[:5]}")
    return model.eval()


AutoConfig.register("hydra", HydraConfig, exist_ok=True)
AutoModel.register(HydraConfig, HydraModel, exist_ok=True)
AutoModelForMaskedLM.register(HydraConfig, HydraForMaskedLM, exist_ok=True)
AutoModelForSequenceClassification.register(HydraConfig, HydraForSequenceClassification, exist_ok=True)

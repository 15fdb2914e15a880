"""Masked position prediction, MP3 (Zhai et al., ICML 2022, arXiv 2207.07611): pre-train without labels.

A Transformer gets the patches of an image (or frames, or words) without position embeddings and says of each where it
came from. In every layer all tokens ask, but only a random part of them, the context, may answer: keys and values come
from there. Then the head goes, position embeddings come, and the same weights are fine-tuned.

Letters: B examples, N tokens, P positions (N = P for images, N <= P for sequences), M tokens of context, D width.

There is no official code. What the paper's summary leaves open is our choice (reconstructed): no special tokens during
pre-training, a head without bias, a context of round((1 - masking_ratio) N) tokens, the loss over all tokens.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    ASTModel,
    AttentionInterface,
    BertModel,
    DeiTModel,
    HubertModel,
    PreTrainedModel,
    RobertaModel,
    ViTModel,
    Wav2Vec2Model,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.utils import ModelOutput

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "MP3Config",
    "MP3ForPreTraining",
    "MP3Output",
    "PositionConfusion",
    "PositionFreeEncoder",
    "adapt",
    "plot_position_map",
    "position_confusion",
    "position_leak",
    "restore",
    "sample_context",
]

PositionEmbedding = Literal["zeros", "random", "sincos", "none"]
Grid = tuple[int, ...]

_ATTENTION = "torchgraft_context"


def _context_size(tokens: int, ratio: float) -> int:
    return round((1 - ratio) * tokens)


def _check_ratio(ratio: float) -> None:
    if not 0 <= ratio < 1:
        raise ValueError(f"masking_ratio must lie in [0, 1), got {ratio}; the paper has 0.5 to 0.75")


def sample_context(
    n_tokens: int,
    batch: int,
    ratio: float = 0.5,
    generator: torch.Generator | None = None,
    *,
    attention_mask: Bool[Tensor, "B N"] | None = None,
    device: torch.device | str | None = None,
) -> Bool[Tensor, "B N"]:
    """Draw the tokens that may be attended to, for each example anew.

    Args:
        n_tokens: N.
        batch: B.
        ratio: masking ratio eta, the share of tokens that are not context.
        generator: makes the draw reproducible.
        attention_mask: true for tokens, false for padding, which is never chosen; a row of n tokens then has
            round((1 - eta) n) tokens of context.
        device: of the result; that of ``attention_mask`` where it is given.

    Returns:
        True for context, exactly round((1 - eta) N) in each row (halves to the even number, as Python rounds).

    Raises:
        ValueError: for a ratio outside [0, 1), or one that leaves a row without context.

    Example:
        >>> sample_context(16, 3, 0.75).sum(1).tolist()
        [4, 4, 4]
    """
    _check_ratio(ratio)
    if attention_mask is None:
        sizes = torch.full((batch,), _context_size(n_tokens, ratio), device=device)
    else:
        device = attention_mask.device
        lengths = attention_mask.sum(1)
        sizes = ((1 - ratio) * lengths.double()).round().long()
    if batch and int(sizes.min()) < 1:
        raise ValueError(
            f"masking_ratio {ratio} leaves an example without context: the shortest has "
            f"{n_tokens if attention_mask is None else int(lengths.min())} tokens; lower the ratio"
        )
    where = device if generator is None else generator.device
    order = torch.rand(batch, n_tokens, generator=generator, device=where).to(device)
    if attention_mask is not None:
        order = order.masked_fill(~attention_mask, 2.0)
    return order.argsort(1).argsort(1) < sizes[:, None]


@dataclass(frozen=True)
class MP3Config:
    """Settings of the pre-training.

    Attributes:
        masking_ratio: eta, the share of tokens that nobody attends to, in [0, 1). 0 is easy where there are few
            tokens; the paper is said to use 0.5 on CIFAR-100 and 0.75 on ImageNet (unverified).
        loss_on: all tokens, or only those outside the context.
        smoothing_sigma: not part of MP3 (it comes from DropPos): spreads the target over the neighbours of a position,
            in proportion to exp(-distance² / sigma²), distance on the grid of positions. None turns it off.

    Raises:
        ValueError: for settings out of range.
    """

    masking_ratio: float = 0.5
    loss_on: Literal["all", "masked"] = "all"
    smoothing_sigma: float | None = None

    def __post_init__(self) -> None:
        _check_ratio(self.masking_ratio)
        if self.loss_on not in ("all", "masked"):
            raise ValueError(f"loss_on must be 'all' or 'masked', got {self.loss_on!r}")
        if self.loss_on == "masked" and self.masking_ratio == 0:
            raise ValueError("loss_on='masked' needs masked tokens, but masking_ratio is 0; raise it, or use 'all'")
        if self.smoothing_sigma is not None and not self.smoothing_sigma > 0:
            raise ValueError(f"smoothing_sigma must be positive or None, got {self.smoothing_sigma}")


@dataclass
class MP3Output(ModelOutput):
    """What ``MP3ForPreTraining`` returns.

    Attributes:
        loss: cross-entropy, a scalar; chance is log P.
        logits: (B, N, P), of every token over all positions.
        context_mask: (B, N), true for the tokens that were attended to.
        accuracy: share of right positions among the tokens of the loss, a scalar.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    context_mask: Tensor | None = None
    accuracy: Tensor | None = None


def _context_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    context_index: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention to the rows ``context_index`` (B, M); to all where it is not given."""
    if context_index is not None:
        index = context_index[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])
        key, value = key.gather(2, index), value.gather(2, index)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


AttentionInterface.register(_ATTENTION, _context_attention)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)


def _sincos(grid: Grid, width: int) -> Tensor:
    """Fixed sine and cosine table (P, D), of each axis a share of the width."""
    parts = 2 * len(grid)
    if width % parts:
        raise ValueError(f"position_embedding='sincos' needs a width divisible by {parts}, got {width}; use 'zeros'")
    share = width // parts
    frequencies = 10_000 ** (-torch.arange(share, dtype=torch.float64) / share)
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    waves = [axis.flatten()[:, None] * frequencies for axis in axes]
    return torch.cat([part for wave in waves for part in (wave.sin(), wave.cos())], 1).float()


def _fill_table(table: nn.Parameter, first: int, grid: Grid, how: PositionEmbedding) -> None:
    """Set the rows from ``first`` on to the chosen embedding, those before (special tokens) to zero."""
    rows = table.data.view(-1, table.shape[-1])
    new = torch.zeros_like(rows)
    if how == "random":
        nn.init.trunc_normal_(new[first:], std=0.02)
    elif how == "sincos":
        new[first:] = _sincos(grid, rows.shape[1]).to(new)
    rows.copy_(new)
    table.requires_grad_(how in ("zeros", "random"))


class _Patches:
    """ViT, DeiT, AST: patches behind one or two special tokens, and a learned table of positions."""

    fixed = True

    def grid(self, model: Any, num_positions: int | None) -> Grid:
        embeddings = model.embeddings
        if isinstance(model, ASTModel):
            grid = tuple(embeddings.get_shape(model.config))
        else:
            patches = embeddings.patch_embeddings
            grid = tuple(i // p for i, p in zip(patches.image_size, patches.patch_size, strict=True))
        if num_positions not in (None, math.prod(grid)):
            raise ValueError(f"num_positions is {num_positions}, but the model has {math.prod(grid)}; leave it out")
        return grid

    def leak(self, model: Any) -> str:
        projection = model.embeddings.patch_embeddings.projection
        if any(s < k for s, k in zip(projection.stride, projection.kernel_size, strict=True)):
            return f"its patches of {projection.kernel_size} pixels overlap at a stride of {projection.stride}"
        if any(projection.padding):
            return f"its patches are padded by {projection.padding} zeros, which marks the border"
        return ""

    def unused(self, model: Any) -> tuple[str, ...]:
        return (
            "embeddings.position_embeddings",
            "embeddings.cls_token",
            "embeddings.distillation_token",
            "embeddings.mask_token",
            "pooler.",
        )

    def content(self, model: Any, x: Tensor) -> Tensor:
        patches = model.embeddings.patch_embeddings
        return patches(x.to(patches.projection.weight.dtype))

    def encode(self, model: Any, h: Tensor, keys: dict[str, Any]) -> Tensor:
        h = model.embeddings.dropout(h)
        for layer in model.layers:
            h = layer(h, **keys)
        return model.layernorm(h)

    def mask(self, model: Any, mask: Tensor, tokens: int) -> Tensor:
        return mask

    def place(self, model: Any, grid: Grid, how: PositionEmbedding) -> None:
        table = model.embeddings.position_embeddings
        _fill_table(table, table.shape[1] - math.prod(grid), grid, how)


class _Words:
    """BERT and RoBERTa: a learned table of positions, RoBERTa's behind that of the padding."""

    fixed = False

    def first(self, model: Any) -> int:
        return model.embeddings.padding_idx + 1 if isinstance(model, RobertaModel) else 0

    def grid(self, model: Any, num_positions: int | None) -> Grid:
        if model.config.is_decoder:
            raise ValueError("model is a decoder: its causal mask tells the position; build it with is_decoder=False")
        kind = getattr(model.config, "position_embedding_type", None) or "absolute"
        if kind != "absolute":
            raise ValueError(f"model has {kind} positions inside its attention, which leak; use 'absolute' ones")
        have = model.config.max_position_embeddings - self.first(model)
        if num_positions is not None and not 1 <= num_positions <= have:
            raise ValueError(f"num_positions must lie in 1..{have} for this model, got {num_positions}")
        return (num_positions or have,)

    def leak(self, model: Any) -> str:
        return ""

    def unused(self, model: Any) -> tuple[str, ...]:
        return ("embeddings.position_embeddings.", "pooler.")

    def content(self, model: Any, x: Tensor) -> Tensor:
        return model.embeddings.word_embeddings(x)

    def encode(self, model: Any, h: Tensor, keys: dict[str, Any]) -> Tensor:
        embeddings = model.embeddings
        h = embeddings.dropout(embeddings.LayerNorm(h + embeddings.token_type_embeddings.weight[0]))
        for layer in model.encoder.layer:
            h = layer(h, **keys)
        return h

    def mask(self, model: Any, mask: Tensor, tokens: int) -> Tensor:
        return mask

    def place(self, model: Any, grid: Grid, how: PositionEmbedding) -> None:
        first, table = self.first(model), model.embeddings.position_embeddings.weight
        _fill_table(table, first, (len(table) - first,), how)


class _Waves:
    """wav2vec 2.0 and HuBERT: frames of a convolutional encoder, and a convolution as position embedding."""

    fixed = False

    def grid(self, model: Any, num_positions: int | None) -> Grid:
        return _needed(num_positions)

    def leak(self, model: Any) -> str:
        pairs = zip(model.config.conv_kernel, model.config.conv_stride, strict=True)
        if any(stride < kernel for kernel, stride in pairs):
            return "the convolutions before its Transformer overlap, so that neighbouring frames share samples"
        return ""

    def unused(self, model: Any) -> tuple[str, ...]:
        return ("encoder.pos_conv_embed.", "masked_spec_embed", "adapter.")

    def content(self, model: Any, x: Tensor) -> Tensor:
        frames = model.feature_extractor(x.to(next(model.feature_extractor.parameters()).dtype))
        h = model.feature_projection(frames.transpose(1, 2))
        return h[0] if isinstance(h, tuple) else h

    def encode(self, model: Any, h: Tensor, keys: dict[str, Any]) -> Tensor:
        encoder, stable = model.encoder, model.config.do_stable_layer_norm
        h = encoder.dropout(h if stable else encoder.layer_norm(h))
        for layer in encoder.layers:
            if not (model.training and model.config.layerdrop > 0 and torch.rand(()) < model.config.layerdrop):
                h = layer(h, **keys)
        return encoder.layer_norm(h) if stable else h

    def mask(self, model: Any, mask: Tensor, tokens: int) -> Tensor:
        return model._get_feature_vector_attention_mask(tokens, mask)

    def place(self, model: Any, grid: Grid, how: PositionEmbedding) -> None:
        if how == "sincos":
            raise ValueError(
                "position_embedding='sincos' needs a table, but this model's is a convolution; use 'zeros'"
            )
        embed = model.encoder.pos_conv_embed
        if how in ("zeros", "none"):
            # the gain of the weight norm, not the direction: a zero direction would have no gradient
            weights = embed.conv.parametrizations.weight
            weights.original0.data.zero_()
            embed.conv.bias.data.zero_()
        embed.requires_grad_(how != "none")


class _Plain:
    """``nn.TransformerEncoder``: no embeddings of its own, the input is ``inputs_embeds``."""

    fixed = False

    def grid(self, model: Any, num_positions: int | None) -> Grid:
        return _needed(num_positions)

    def leak(self, model: Any) -> str:
        return ""

    def unused(self, model: Any) -> tuple[str, ...]:
        return ()

    def content(self, model: Any, x: Tensor) -> Tensor:
        raise ValueError("nn.TransformerEncoder has no embeddings; pass inputs_embeds of shape (B, N, D)")

    def encode(self, model: Any, h: Tensor, keys: dict[str, Any]) -> Tensor:
        batch_first = model.layers[0].self_attn.batch_first
        h = h if batch_first else h.transpose(0, 1)
        # layer by layer: the whole encoder would drop tokens outside the context in its fast path
        for layer in model.layers:
            h = layer(h, src_key_padding_mask=~keys["context_mask"])
        h = h if model.norm is None else model.norm(h)
        return h if batch_first else h.transpose(0, 1)

    def mask(self, model: Any, mask: Tensor, tokens: int) -> Tensor:
        return mask

    def place(self, model: Any, grid: Grid, how: PositionEmbedding) -> None:
        if how != "none":
            raise ValueError(
                f"nn.TransformerEncoder holds no position embedding that {how!r} could set; pass "
                "position_embedding='none' and add yours to its input"
            )


_Family = _Patches | _Words | _Waves | _Plain


def _needed(num_positions: int | None) -> Grid:
    if num_positions is None or num_positions < 1:
        raise ValueError(f"num_positions, the longest sequence, is needed for this model, got {num_positions}")
    return (num_positions,)


def _family(model: nn.Module) -> _Family:
    if isinstance(model, (ViTModel, DeiTModel, ASTModel)):
        return _Patches()
    if isinstance(model, (BertModel, RobertaModel)):
        return _Words()
    if isinstance(model, (Wav2Vec2Model, HubertModel)):
        return _Waves()
    if isinstance(model, nn.TransformerEncoder):
        return _Plain()
    base = getattr(model, getattr(model, "base_model_prefix", "") or " ", None)
    if isinstance(base, PreTrainedModel) and base is not model:
        raise TypeError(f"model is a {type(model).__name__}; pass its backbone, model.{model.base_model_prefix}")
    raise TypeError(
        f"model must be a ViTModel, DeiTModel, ASTModel, BertModel, RobertaModel, Wav2Vec2Model, HubertModel or "
        f"nn.TransformerEncoder, got {type(model).__name__}; models with rotary or relative positions or "
        "convolutions inside (Swin, ConvNeXt, Llama) tell the position and have nothing to predict"
    )


class PositionFreeEncoder(nn.Module):
    """A Transformer without its position embeddings, whose keys and values come from a context. Made by ``adapt``.

    Attributes:
        model: the backbone, the very object that was passed.
        grid: positions as (rows, columns) of an image, (mel bands, time) of AST, (P,) of a sequence.
        num_positions: P.
        hidden_size: D.
    """

    def __init__(self, model: nn.Module, num_positions: int | None = None) -> None:
        super().__init__()
        self.model, self._kind = model, _family(model)
        self.grid: Grid = self._kind.grid(model, num_positions)
        self.num_positions = math.prod(self.grid)
        self._previous: str | None = None
        self._active = True
        if isinstance(model, nn.TransformerEncoder):
            self.hidden_size = int(model.layers[0].self_attn.embed_dim)
        else:
            config: Any = model.config
            if config._attn_implementation == _ATTENTION:
                raise ValueError("model is adapted already; restore it first, or use that encoder")
            self.hidden_size = config.hidden_size
            self._previous = config._attn_implementation
            model.set_attn_implementation(_ATTENTION)  # type: ignore[operator]
        unused = self._kind.unused(model)
        # without gradient during pre-training, which DistributedDataParallel would complain about
        self._frozen = {n: p for n, p in model.named_parameters() if p.requires_grad and n.startswith(unused)}
        for parameter in self._frozen.values():
            parameter.requires_grad_(False)

    def embed(self, inputs: Tensor) -> Float[Tensor, "B N D"]:
        """Content of the tokens: patches, frames or word embeddings; without positions and special tokens."""
        return self._kind.content(self.model, inputs)

    def forward(
        self, inputs_embeds: Float[Tensor, "B N D"], context_mask: Bool[Tensor, "B N"]
    ) -> Float[Tensor, "B N D"]:
        """Final hidden states of all tokens, each having attended to the context in every layer.

        Args:
            inputs_embeds: as of ``embed``.
            context_mask: true for the tokens whose keys and values are used; rows may have different numbers.

        Raises:
            ValueError: for a row without context.
            RuntimeError: after ``restore``.
        """
        if not self._active:
            raise RuntimeError("the model was restored, so this encoder has ended; adapt it again to go on")
        if context_mask.shape != inputs_embeds.shape[:2]:
            raise ValueError(
                f"context_mask must have shape {tuple(inputs_embeds.shape[:2])}, got {tuple(context_mask.shape)}"
            )
        sizes = context_mask.sum(1)
        least, most = (int(size) for size in torch.stack([sizes.min(), sizes.max()]).tolist())
        if least < 1:
            raise ValueError("context_mask has a row without context; every example needs at least one token")
        if isinstance(self.model, nn.TransformerEncoder):
            return self._kind.encode(self.model, inputs_embeds, {"context_mask": context_mask})
        index = context_mask.to(torch.uint8).argsort(stable=True, dim=1, descending=True)[:, :most]
        keys: dict[str, Any] = {"context_index": index, "attention_mask": None}
        if least < most:
            inside = torch.arange(most, device=sizes.device) < sizes[:, None]
            keys["attention_mask"] = inside[:, None, None].expand(-1, 1, inputs_embeds.shape[1], -1)
        return self._kind.encode(self.model, inputs_embeds, keys)

    def _leave(self, how: PositionEmbedding) -> nn.Module:
        if not self._active:
            raise RuntimeError("the model was restored already")
        before = {name: p.requires_grad for name, p in self.model.named_parameters()}
        for parameter in self._frozen.values():
            parameter.requires_grad_(True)
        try:
            self._kind.place(self.model, self.grid, how)
        except ValueError:
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(before[name])
            raise
        if self._previous is not None:
            self.model.set_attn_implementation(self._previous)  # type: ignore[operator]
        self._active = False
        return self.model


def adapt(model: nn.Module, num_positions: int | None = None) -> PositionFreeEncoder:
    """Make an encoder of a backbone that sees content and no positions.

    The backbone stays the object it is, under ``.model``, so a classifier around it is pre-trained too. Until
    ``restore`` its parameters that have no part in pre-training (positions, special tokens, pooler) are frozen.

    Args:
        model: ``ViTModel``, ``DeiTModel``, ``ASTModel``, ``BertModel``, ``RobertaModel``, ``Wav2Vec2Model``,
            ``HubertModel`` of transformers, or any ``nn.TransformerEncoder`` of standard layers.
        num_positions: P, the longest sequence; only where the model does not say it (wav2vec 2.0, HuBERT,
            ``nn.TransformerEncoder``), or to have fewer than BERT's.

    Raises:
        TypeError: for a model of another kind, or one whose positions cannot be taken away.
        ValueError: for a decoder, a missing or impossible ``num_positions``, a model adapted already.

    Warns:
        UserWarning: where tokens overlap (AST's default stride, the convolutions of wav2vec 2.0), so that neighbours
            can be told by the samples they share.

    Example:
        >>> from transformers import ViTConfig, ViTModel
        >>> vit = ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        ...     image_size=32, patch_size=8))
        >>> encoder = adapt(vit)
        >>> encoder.grid, encoder(encoder.embed(torch.rand(2, 3, 32, 32)), sample_context(16, 2)).shape
        ((4, 4), torch.Size([2, 16, 32]))
        >>> restore(encoder) is vit
        True
    """
    encoder = PositionFreeEncoder(model, num_positions)
    if said := encoder._kind.leak(model):
        warnings.warn(f"{type(model).__name__} leaks position: {said}", UserWarning, stacklevel=2)
    return encoder


def restore(
    pretrained: PositionFreeEncoder | MP3ForPreTraining, position_embedding: PositionEmbedding = "zeros"
) -> nn.Module:
    """Give the ordinary class back, with the pre-trained weights and new position embeddings, for fine-tuning.

    Args:
        pretrained: from ``adapt``, or the whole pre-training model, whose head is left behind.
        position_embedding: ``zeros`` or ``random`` (normal, 0.02), both to be learnt; ``sincos``, fixed, of amplitude
            one; ``none``, zeros that stay. Special tokens get zeros. Large position embeddings drown what was
            learnt without them, so the default is zero. wav2vec 2.0 and HuBERT have a convolution instead of a table:
            ``zeros`` silences it by the gain of its weight norm, and ``random`` leaves it as it was.

    Returns:
        The model that was adapted, the same object with the same parameter names.

    Raises:
        ValueError: for an unknown or impossible kind of embedding.
        RuntimeError: when it was restored before.
    """
    if position_embedding not in get_args(PositionEmbedding):
        known = ", ".join(get_args(PositionEmbedding))
        raise ValueError(f"position_embedding must be one of {known}, got {position_embedding!r}")
    encoder = pretrained.encoder if isinstance(pretrained, MP3ForPreTraining) else pretrained
    return encoder._leave(position_embedding)


def _distances(grid: Grid) -> Float[Tensor, "P P"]:
    """Euclidean distances of positions on the grid."""
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in grid), indexing="ij")
    places = torch.stack([axis.flatten() for axis in axes], 1)
    return (places[:, None] - places).square().sum(-1).sqrt()


class MP3ForPreTraining(nn.Module):
    """Pre-training by masked position prediction (section 3 of the paper).

    Works in transformers' ``Trainer``: the arguments of ``forward`` are the names of its columns, and there are no
    labels. Position embeddings and special tokens take no part. Light augmentation (crops, flips) is fine; nothing that
    changes single patches.

    Args:
        backbone: a model that ``adapt`` takes, or what it returns.
        config: settings.
        num_positions: as of ``adapt``.

    Attributes:
        settings: the config; ``Trainer`` would take an attribute named config for one of transformers.
        encoder: the position-free encoder.
        head: (D, P), without bias, normal with standard deviation 0.02, so that training begins at log P.

    Raises:
        TypeError, ValueError: as ``adapt``; also when ``masking_ratio`` leaves P positions without context.

    Example:
        >>> from transformers import ViTConfig, ViTModel
        >>> vit = ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        ...     image_size=32, patch_size=8))
        >>> model = MP3ForPreTraining(vit, MP3Config(masking_ratio=0.75))
        >>> out = model(torch.rand(2, 3, 32, 32))
        >>> out.logits.shape, out.context_mask.sum(1).tolist()
        (torch.Size([2, 16, 16]), [4, 4])
        >>> out.loss.backward()
        >>> vit = restore(model, "zeros")
    """

    def __init__(
        self,
        backbone: nn.Module,
        config: MP3Config | None = None,
        num_positions: int | None = None,
    ) -> None:
        super().__init__()
        self.settings = config or MP3Config()
        self.encoder = backbone if isinstance(backbone, PositionFreeEncoder) else adapt(backbone, num_positions)
        positions = self.encoder.num_positions
        self.head = nn.Linear(self.encoder.hidden_size, positions, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)
        weight = next(self.encoder.parameters())
        self.head.to(weight.device, weight.dtype)
        smoothed = None
        if self.settings.smoothing_sigma is not None:
            near = torch.exp(-_distances(self.encoder.grid).square() / self.settings.smoothing_sigma**2)
            smoothed = near / near.sum(1, keepdim=True)
        self._smoothed: Tensor | None
        self.register_buffer("_smoothed", smoothed, persistent=False)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        inputs_embeds: Float[Tensor, "B N D"] | None = None,
        attention_mask: Tensor | None = None,
        context_mask: Bool[Tensor, "B N"] | None = None,
        generator: torch.Generator | None = None,
    ) -> MP3Output:
        """Predict the position of every token.

        Args:
            pixel_values: (B, C, H, W), of the image size of the model.
            input_values: (B, time, mel) of AST, or (B, samples) of wav2vec 2.0 and HuBERT.
            input_ids: (B, N) of BERT and RoBERTa.
            inputs_embeds: (B, N, D) instead of any of them, content without positions, as of ``encoder.embed``.
            attention_mask: one for tokens, zero for padding (for ``input_values``: for samples). Padding is in neither
                context nor loss.
            context_mask: true for the context; drawn when it is not given.
            generator: for that draw.

        Raises:
            ValueError: unless exactly one input is given; for no examples, another rank, values that are not finite;
                for more tokens than positions, for an image of another size; for a context that holds padding or is
                empty.
            TypeError: for pixels or samples that are no floats, ids that are no integers, a context that is not bool.
        """
        given = {"pixel_values": pixel_values, "input_values": input_values, "input_ids": input_ids}
        chosen = {name: value for name, value in given.items() if value is not None}
        if len(chosen) + (inputs_embeds is not None) != 1:
            names = [*chosen, *(["inputs_embeds"] if inputs_embeds is not None else [])]
            raise ValueError(f"pass exactly one of {', '.join(given)}, inputs_embeds; got {', '.join(names) or 'none'}")
        if inputs_embeds is None:
            ((name, raw),) = chosen.items()
            _check_content(name, raw)
            h = self.encoder.embed(raw)
        else:
            h = inputs_embeds
            _check_content("inputs_embeds", h)
            if h.shape[2] != self.encoder.hidden_size:
                raise ValueError(f"inputs_embeds must be {self.encoder.hidden_size} wide, got {tuple(h.shape)}")
        B, N = h.shape[:2]
        self._check_length(N)
        real = None
        if attention_mask is not None:
            mask = attention_mask.bool()
            real = self.encoder._kind.mask(self.encoder.model, mask, N).bool() if inputs_embeds is None else mask
            if real.shape != (B, N):
                raise ValueError(f"attention_mask must have shape {(B, N)}, got {tuple(real.shape)}")
        if context_mask is None:
            context = sample_context(N, B, self.settings.masking_ratio, generator, attention_mask=real, device=h.device)
        else:
            context = context_mask
            if context.dtype != torch.bool:
                raise TypeError(f"context_mask must be bool, true for context, got {context.dtype}")
            if real is not None and bool((context & ~real).any()):
                raise ValueError("context_mask holds padding; choose among the tokens of attention_mask")
        logits = self.head(self.encoder(h, context))
        used = torch.ones_like(context) if self.settings.loss_on == "all" else ~context
        used = used if real is None else used & real
        if not bool(used.any()):
            raise ValueError("the loss is over masked tokens, but context_mask holds all of them; leave some out")
        loss, right = self._judge(logits, used)
        return MP3Output(loss=loss, logits=logits, context_mask=context, accuracy=right)

    def _check_length(self, tokens: int) -> None:
        positions, fixed = self.encoder.num_positions, self.encoder._kind.fixed
        if tokens > positions or (fixed and tokens != positions):
            raise ValueError(
                f"the input has {tokens} tokens, but the head knows {positions} positions of a grid "
                f"{self.encoder.grid}; resize the input, or build the model for its size"
            )

    def _judge(self, logits: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
        wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        places = torch.arange(logits.shape[1], device=logits.device).expand(used.shape)
        if self._smoothed is None:
            loss = F.cross_entropy(wide[used], places[used])
        else:
            loss = F.cross_entropy(wide[used], self._smoothed.to(wide)[places[used]])
        return loss, (logits.detach()[used].argmax(-1) == places[used]).float().mean()


_CONTENT = {
    "pixel_values": ("(B, C, H, W)", (4,)),
    "input_values": ("(B, time, mel) or (B, samples)", (2, 3)),
    "input_ids": ("(B, N)", (2,)),
    "inputs_embeds": ("(B, N, D)", (3,)),
}


def _check_content(name: str, x: Tensor) -> None:
    shape, ranks = _CONTENT[name]
    if x.ndim not in ranks:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")
    if x.numel() == 0:
        raise ValueError(f"{name} holds nothing, its shape is {tuple(x.shape)}")
    if name == "input_ids":
        if x.is_floating_point():
            raise TypeError(f"input_ids must be integers, got {x.dtype}")
        return
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floats, normalised as the model wants it, got {x.dtype}")
    if not bool(x.isfinite().all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity")


@torch.no_grad()
def position_leak(model: MP3ForPreTraining, **inputs: Tensor) -> float:
    """How far logits of different tokens differ when all tokens show the same content: zero unless position leaks.

    Every input is replaced by a constant (its mean, for token ids its first id). What still tells tokens apart is
    position: an embedding left on, a convolution with zero padding, a border. Overlap of neighbours does not show on
    constant content; ``adapt`` warns about it.

    Args:
        model: in training or evaluation mode; it runs in evaluation mode and is left as it was.
        **inputs: one input of ``forward``.

    Returns:
        Largest absolute difference of a logit from that of the first token. Rounding leaves about 1e-6.

    Example:
        >>> encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
        >>> model = MP3ForPreTraining(encoder, num_positions=6)
        >>> position_leak(model, inputs_embeds=torch.randn(2, 6, 8)) < 1e-5
        True
    """
    constant = {}
    for name, value in inputs.items():
        if name == "inputs_embeds":
            constant[name] = value[:, :1].expand_as(value).contiguous()
        else:
            constant[name] = torch.full_like(
                value, (value.mean() if value.is_floating_point() else value.flatten()[0]).item()
            )
    training = model.training
    try:
        logits = model.eval()(**constant).logits
    finally:
        model.train(training)
    return (logits - logits[:, :1]).abs().max().item()


@dataclass(frozen=True)
class PositionConfusion:
    """How well positions are found.

    Attributes:
        top1, top5: share of tokens whose position is the most likely one, or among the five most likely.
        grid_error: expected distance of the predicted from the true position, in steps of the grid.
        matrix: (P, P), mean probability of each position (column) given the true one (row); NaN where no token was.
        grid: as given.
    """

    top1: float
    top5: float
    grid_error: float
    matrix: Tensor
    grid: Grid

    def expected_positions(self) -> Float[Tensor, "P K"]:
        """Where tokens of each position are expected on the average, in coordinates of the grid's K axes."""
        axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in self.grid), indexing="ij")
        return self.matrix @ torch.stack([axis.flatten() for axis in axes], 1)


@torch.no_grad()
def position_confusion(
    logits: Float[Tensor, "B N P"], grid: Grid, mask: Bool[Tensor, "B N"] | None = None
) -> PositionConfusion:
    """Compare predicted positions with the true ones.

    Args:
        logits: of ``MP3Output``.
        grid: shape of the P positions, ``encoder.grid``.
        mask: true for the tokens to judge (all).

    Raises:
        ValueError: when the grid does not have P positions, or no token is judged.

    Example:
        >>> found = position_confusion(10 * torch.eye(4)[None], (2, 2))
        >>> found.top1, round(found.grid_error, 3)
        (1.0, 0.0)
    """
    P = logits.shape[2]
    if math.prod(grid) != P:
        raise ValueError(f"grid {grid} has {math.prod(grid)} positions, but logits have {P}")
    used = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device) if mask is None else mask
    if not bool(used.any()):
        raise ValueError("mask leaves no token to judge")
    true: Int64[Tensor, " T"] = torch.arange(logits.shape[1], device=logits.device).expand(used.shape)[used]
    probabilities = logits[used].float().softmax(-1)
    best = logits[used].topk(min(5, P), -1).indices
    hit = best == true[:, None]
    away = (probabilities * _distances(grid).to(logits.device)[true]).sum(-1)
    total = probabilities.new_zeros(P, P).index_add_(0, true, probabilities)
    matrix = (total / true.bincount(minlength=P)[:, None]).cpu()
    return PositionConfusion(
        hit[:, 0].float().mean().item(), hit.any(1).float().mean().item(), away.mean().item(), matrix, tuple(grid)
    )


def plot_position_map(confusion: PositionConfusion, axes: Axes | None = None) -> Axes:
    """Draw an arrow from each position to where its tokens are predicted on the average (matplotlib).

    Args:
        confusion: from ``position_confusion``; a grid of one or two axes.
        axes: where to draw; new ones by default.
    """
    import matplotlib.pyplot as plt

    if len(confusion.grid) > 2:
        raise ValueError(f"confusion must have a grid of one or two axes to be drawn, got {confusion.grid}")
    axes = plt.subplots(figsize=(3, 3))[1] if axes is None else axes
    to = confusion.expected_positions()
    rows, columns = confusion.grid if len(confusion.grid) == 2 else (1, *confusion.grid)
    y, x = (part.flatten().float() for part in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
    dy = to[:, 0] - y if len(confusion.grid) == 2 else torch.zeros_like(x)
    axes.quiver(x, y, to[:, -1] - x, dy, angles="xy", scale_units="xy", scale=1, width=0.008)
    axes.plot(x, y, ".", markersize=4)
    axes.set(xlim=(-0.7, columns - 0.3), ylim=(rows - 0.3, -0.7), aspect="equal", xlabel="column", ylabel="row")
    return axes

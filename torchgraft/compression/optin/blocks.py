"""Where the prunable units of a model sit: attention heads, hidden units of feed-forward layers, channels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft import surgery

__all__ = ["Block", "OpenAttention", "PrunableSpec", "find_blocks", "opened", "resolve"]


@dataclass(frozen=True)
class PrunableSpec:
    """The prunable units of one block; all names are dotted names within the model.

    Attributes:
        attention_out: the output projection, whose input is the heads side by side; empty for no heads.
        ffn_in: what makes the hidden units: linear layers, convolutions, batch norms; a fused gate and up projection
            counts as one.
        ffn_out: what takes the hidden units: a linear layer or a convolution. Its output is the block's feature.
        n_heads: prunable heads; with grouped keys, the number of key-value groups.
        qkv: what makes queries, keys and values; one fused layer, or three. Only slicing needs it.
        attention: the module that holds the attention, whose head counts follow a slice.
        block: the whole block; lets scoring restart behind it. May be left empty: slower, same result.
        per_head: parameters with one entry per head on their last axis, such as a table of position biases.
    """

    attention_out: str = ""
    ffn_in: tuple[str, ...] = ()
    ffn_out: str = ""
    n_heads: int = 0
    qkv: tuple[str, ...] = ()
    attention: str = ""
    block: str = ""
    per_head: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.attention_out and not self.ffn_out:
            raise ValueError("a PrunableSpec needs attention_out, ffn_out, or both")
        if bool(self.attention_out) != bool(self.n_heads):
            raise ValueError(f"attention_out and n_heads go together, got {self.attention_out!r} and {self.n_heads}")


@dataclass(frozen=True)
class _Family:
    """How one architecture calls its parts, relative to a block."""

    name: str
    attention: str = ""
    qkv: tuple[str, ...] = ()
    attention_out: str = ""
    head_size: str = ""
    ffn_in: tuple[str, ...] = ()
    ffn_out: str = ""
    per_head: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    aside: tuple[str, ...] = ()


_VIT: dict[str, Any] = {
    "attention": "attention",
    "qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "attention_out": "attention.o_proj",
    "head_size": "attention.head_dim",
    "ffn_out": "mlp.fc2",
}
_FAMILIES = (
    _Family(
        "BERT, RoBERTa, MiniLM", "attention.self",
        ("attention.self.query", "attention.self.key", "attention.self.value"), "attention.output.dense",
        "attention.self.attention_head_size", ("intermediate.dense",), "output.dense", without=("crossattention",),
    ),
    _Family(
        "DistilBERT", "attention", ("attention.q_lin", "attention.k_lin", "attention.v_lin"), "attention.out_lin",
        "attention.attention_head_size", ("ffn.lin1",), "ffn.lin2",
    ),
    _Family(
        "SegFormer", ffn_in=("mlp.fc1", "mlp.dwconv.dwconv"),
        aside=("attention.sequence_reduction", "attention.layer_norm"), **_VIT,
    ),
    _Family(
        "ViT, DeiT, Swin", ffn_in=("mlp.fc1",),
        per_head=("attention.relative_position_bias.relative_position_bias_table",), without=("mlp.dwconv",),
        **_VIT,
    ),
    _Family(
        "GPT-2", "attn", ("attn.c_attn",), "attn.c_proj", "attn.head_dim", ("mlp.c_fc",), "mlp.c_proj",
        without=("crossattention",),
    ),
    _Family(
        "Llama, Mistral, Qwen2", "self_attn", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.o_proj", "self_attn.head_dim", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj",
        without=("self_attn.q_norm",),
    ),
    _Family(
        "OPT", "self_attn", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.out_proj",
        "self_attn.head_dim", ("fc1",), "fc2", without=("cross_attn", "encoder_attn"),
    ),
    _Family(
        "torch.nn.TransformerEncoderLayer", "self_attn",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.out_proj", "self_attn.head_dim",
        ("linear1",), "linear2", without=("multihead_attn",),
    ),
    _Family("Mask2Former's pixel decoder (feed-forward)", ffn_in=("fc1",), ffn_out="fc2", without=("encoder_attn",)),
    _Family("ResNet of basic blocks", ffn_in=("conv1", "bn1"), ffn_out="conv2", without=("conv3",)),
)  # fmt: skip


def _get(module: nn.Module, name: str) -> Any:
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
        if found is None:
            return None
    return found


def width_in(module: nn.Module, name: str) -> int:
    """Size of the input of a layer: features, or channels of a convolution without groups."""
    if isinstance(module, nn.Linear):
        return module.in_features
    if isinstance(module, NoChannels):
        return 0
    if isinstance(module, nn.Conv2d) and module.groups == 1:
        return module.in_channels
    if type(module).__name__ == "Conv1D":
        return int(module.weight.shape[0])  # type: ignore[index]
    raise TypeError(f"{name!r} is a {type(module).__name__}; want nn.Linear, transformers' Conv1D or a plain nn.Conv2d")


def width_out(module: nn.Module, name: str) -> int:
    """Size of the output of a layer: features, or channels."""
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, nn.Conv2d):
        return module.out_channels
    if isinstance(module, nn.BatchNorm2d):
        return module.num_features
    if isinstance(module, NoChannels):
        return module.channels
    if type(module).__name__ == "Conv1D":
        return int(module.weight.shape[1])  # type: ignore[index]
    raise TypeError(
        f"{name!r} is a {type(module).__name__}; want nn.Linear, transformers' Conv1D, nn.Conv2d or nn.BatchNorm2d"
    )


# their parts have BERT's names, but what they do with heads does not follow from the parts
_UNLIKE_BERT = ("BigBird", "LayoutLMv3")


def _foreign(block: nn.Module, family: _Family) -> bool:
    """Whether the attention has parameters that the family does not name, so that it is another architecture's."""
    known = (*family.qkv, family.attention_out, *family.per_head, *family.aside)
    names = (f"{family.attention}.{name}" for name, _ in _get(block, family.attention).named_parameters())
    return any(not f"{name}.".startswith(tuple(f"{k}." for k in known)) for name in names)


def _has(block: nn.Module, names: Sequence[str]) -> bool:
    return all(isinstance(_get(block, name), nn.Module) for name in names)


def _spec(block: nn.Module, prefix: str, family: _Family) -> PrunableSpec | None:
    """The spec of a block if it is of this family; a part that was sliced away altogether is left out."""
    if not _has(block, (*family.ffn_in, family.ffn_out)) or any(_get(block, n) is not None for n in family.without):
        return None
    heads = bool(family.attention) and _has(block, (*family.qkv, family.attention_out))
    if family.attention and not heads and not isinstance(_get(block, family.attention), Emptied):
        return None
    if family.ffn_out == "fc2" and not family.attention and not type(block).__name__.startswith("Mask2FormerPixelDeco"):
        return None
    parts: dict[str, Any] = {}
    if heads:
        size, out = _get(block, family.head_size), _get(block, family.attention_out)
        if not size or _foreign(block, family) or type(block).__name__.startswith(_UNLIKE_BERT):
            return None
        fused = width_out(_get(block, family.qkv[0]), family.qkv[0])
        if len(family.qkv) == 1 and fused != 3 * width_in(out, family.attention_out):
            # one key for all heads
            return None
        producer = _get(block, family.qkv[min(1, len(family.qkv) - 1)])
        columns = width_in(out, family.attention_out) if len(family.qkv) == 1 else width_out(producer, "keys")
        if columns:
            parts = {
                "attention_out": f"{prefix}{family.attention_out}",
                "n_heads": columns // int(size),
                "qkv": tuple(f"{prefix}{name}" for name in family.qkv),
                "attention": f"{prefix}{family.attention}",
                "per_head": tuple(f"{prefix}{name}" for name in family.per_head if _get(block, name) is not None),
            }
    return PrunableSpec(
        **parts,
        ffn_in=tuple(f"{prefix}{name}" for name in family.ffn_in),
        ffn_out=f"{prefix}{family.ffn_out}",
        block=prefix.removesuffix("."),
    )


def _search(module: nn.Module, prefix: str, found: list[PrunableSpec]) -> None:
    """Outermost blocks, in the order of definition."""
    for name, child in module.named_children():
        at = f"{prefix}{name}."
        # most modules have no part of the name of a family's last layer, and need no closer look
        near = [family for family in _FAMILIES if family.ffn_out.partition(".")[0] in child._modules]
        spec = next((s for family in near if (s := _spec(child, at, family))), None)
        if spec is None:
            _search(child, at, found)
        else:
            found.append(spec)


def find_blocks(model: nn.Module) -> tuple[PrunableSpec, ...]:
    """Prunable blocks of a model of a known family, outermost first, in the order of definition.

    Known are BERT, RoBERTa and MiniLM, DistilBERT, ViT and DeiT, Swin, SegFormer, Mask2Former's Swin backbone
    and the feed-forward layers of its pixel decoder, GPT-2, OPT, Llama, Mistral and Qwen2 of ``transformers``,
    PyTorch's ``TransformerEncoderLayer``, and ResNets of basic blocks (``conv1``, ``bn1``, ``conv2``). Relatives whose
    parts have the same names but whose attention does more with its heads (Longformer, BigBird, ConvBERT,
    Nyströmformer, LayoutLMv3, GPT-BigCode) do not match.

    Raises:
        ValueError: when nothing matches.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.TransformerEncoderLayer) and not module.self_attn.batch_first:
            raise ValueError(f"{name!r} has batch_first=False; examples must come first: batch_first=True")
    found: list[PrunableSpec] = []
    with opened(model):
        _search(model, "", found)
    if not found:
        known = "; ".join(family.name for family in _FAMILIES)
        raise ValueError(
            f"{type(model).__name__} has no block of a known family ({known}); describe its blocks with "
            f"blocks=[PrunableSpec(attention_out=…, ffn_in=…, ffn_out=…, n_heads=…), …]"
        )
    return tuple(found)


@dataclass(frozen=True)
class Block:
    """A spec with the modules it names."""

    spec: PrunableSpec
    attention_out: nn.Module | None
    ffn_out: nn.Module | None
    module: nn.Module | None
    width: int

    @property
    def heads(self) -> int:
        """Number of prunable heads."""
        return self.spec.n_heads

    @property
    def feature(self) -> nn.Module:
        """The module whose output is the block's feature."""
        found = self.ffn_out if self.ffn_out is not None else self.attention_out
        assert found is not None
        return found

    def consumer(self, kind: str) -> nn.Module:
        """What takes the units of a kind."""
        found = self.attention_out if kind == "heads" else self.ffn_out
        assert found is not None
        return found

    def count(self, kind: str) -> int:
        """How many units of a kind there are."""
        return self.heads if kind == "heads" else self.width


def module_at(model: nn.Module, name: str) -> nn.Module:
    """The module of a dotted name.

    Raises:
        ValueError: when there is none.
    """
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"the model has no module {name!r}, which a PrunableSpec names") from None


def resolve(model: nn.Module, specs: Sequence[PrunableSpec]) -> list[Block]:
    """Look up the modules of specs, and check that their sizes fit together.

    Raises:
        ValueError: for a name that is not there, or sizes that do not fit.
        TypeError: for a layer of a kind that cannot be cut.
    """
    blocks = []
    for spec in specs:
        inside = [s for s in specs if (s.ffn_out or s.attention_out).startswith(f"{spec.block}.")]
        if spec.block and inside != [spec]:
            raise ValueError(
                f"block {spec.block!r} must hold its own ffn_out and attention_out and those of no other spec; "
                f"block='' leaves it out"
            )
        out = module_at(model, spec.attention_out) if spec.attention_out else None
        ffn = module_at(model, spec.ffn_out) if spec.ffn_out else None
        if out is not None and width_in(out, spec.attention_out) % spec.n_heads:
            raise ValueError(
                f"{spec.attention_out!r} takes {width_in(out, spec.attention_out)} features, which {spec.n_heads} "
                f"heads do not divide"
            )
        width = width_in(ffn, spec.ffn_out) if ffn is not None else 0
        for name in spec.ffn_in:
            made = width_out(module_at(model, name), name)
            if made % max(width, 1):
                raise ValueError(f"{name!r} makes {made} units, but {spec.ffn_out!r} takes {width}")
        blocks.append(Block(spec, out, ffn, module_at(model, spec.block) if spec.block else None, width))
    return blocks


def channel_axis(module: nn.Module) -> int:
    """Which axis of a layer's input and output holds the units."""
    return 1 if isinstance(module, (nn.Conv2d, NoChannels)) else -1


class Emptied(nn.Module):
    """What is left of an attention without heads: zeros of no width, or the bias of its output projection.

    Args:
        bias: of the output projection, shape (features,), or None.
        projects: whether the attention module it stands for contains the output projection.
        pair: whether that module returns a pair.
        features: of its output.
    """

    def __init__(self, bias: Tensor | None, projects: bool, pair: bool, features: int) -> None:
        super().__init__()
        self.projects, self.pair, self.features = projects, pair, features
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)

    def forward(self, hidden: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """The same for every token."""
        x = hidden if hidden is not None else kwargs["hidden_states"]
        out = x.new_zeros(*x.shape[:-1], self.features if self.projects else 0)
        if self.projects and self.bias is not None:
            out = out + self.bias
        return (out, None) if self.pair else out


class NoChannels(nn.Module):
    """What is left of a convolution of no channels: the bias at every place, or nothing; of a batch norm: nothing.

    Args:
        layer: the convolution or batch norm it stands for.
        channels: of its output.
    """

    def __init__(self, layer: nn.Module, channels: int) -> None:
        super().__init__()
        self.channels = channels
        bias = layer.bias if channels else None
        self.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad) if isinstance(bias, Tensor) else None
        self.geometry: tuple[tuple[int, ...], ...] | None = None
        if isinstance(layer, nn.Conv2d):
            if isinstance(layer.padding, str):
                raise TypeError("convolutions with padding by name cannot lose all channels; give numbers")
            self.geometry = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)

    def forward(self, x: Tensor) -> Tensor:
        """The same at every place; the size of the image follows the convolution's."""
        if self.geometry is None:
            return x
        sizes = [
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, k, s, p, d in zip(x.shape[-2:], *self.geometry, strict=True)
        ]
        out = x.new_zeros(x.shape[0], self.channels, *sizes)
        return out if self.bias is None else out + self.bias[:, None, None]


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as something to add to scores."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


class OpenAttention(nn.Module):
    """``nn.MultiheadAttention`` as three projections and an output projection, so that heads can be removed.

    Same outputs; attention weights are not returned. Only for self-attention with equal sizes of query, key and value.
    """

    def __init__(self, closed: nn.MultiheadAttention) -> None:
        super().__init__()
        if not closed._qkv_same_embed_dim or closed.bias_k is not None or closed.add_zero_attn:
            raise TypeError("only nn.MultiheadAttention with kdim = vdim = embed_dim and without extra keys is known")
        embed, biased = closed.embed_dim, closed.in_proj_bias is not None
        weights = closed.in_proj_weight.detach().chunk(3)
        biases = closed.in_proj_bias.detach().chunk(3) if biased else (None,) * 3
        made = []
        for weight, bias in zip(weights, biases, strict=True):
            layer = nn.Linear(embed, embed, biased, device="meta")
            layer.weight = nn.Parameter(weight.clone(), closed.in_proj_weight.requires_grad)
            layer.bias = None if bias is None else nn.Parameter(bias.clone(), closed.in_proj_bias.requires_grad)  # type: ignore[assignment]
            made.append(layer)
        self.q_proj, self.k_proj, self.v_proj = made
        self.out_proj = closed.out_proj
        self.num_heads, self.head_dim = closed.num_heads, closed.head_dim
        self.batch_first, self.dropout = closed.batch_first, closed.dropout
        # what TransformerEncoderLayer looks at before its fused path, which must not be taken
        self.in_proj_bias, self._qkv_same_embed_dim = None, False
        self.train(closed.training)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None, need_weights: bool = False, is_causal: bool = False,
        average_attn_weights: bool = True,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """Attend; masks as in ``nn.MultiheadAttention``."""
        if is_causal and attn_mask is None:
            raise ValueError(
                "is_causal=True is a hint about attn_mask, as in nn.MultiheadAttention; give attn_mask too"
            )
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))

        if not self.num_heads:
            out = self.out_proj(query.new_zeros(*query.shape[:-1], 0))
            return (out if self.batch_first else out.transpose(0, 1)), None

        mask = None
        if attn_mask is not None:
            mask = _additive(attn_mask, query.dtype)
            mask = mask.unflatten(0, (query.shape[0], -1)) if mask.ndim == 3 else mask
            if mask.ndim == 4 and mask.shape[1] != self.num_heads:
                raise ValueError(f"attn_mask is for {mask.shape[1]} heads, {self.num_heads} are left; give one for all")
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, query.dtype)[:, None, None]
            mask = padding if mask is None else mask + padding
        q, k, v = (
            made.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for made in (self.q_proj(query), self.k_proj(key), self.v_proj(value))
        )
        out = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        return (out if self.batch_first else out.transpose(0, 1)), None


def open_attention(model: nn.Module) -> list[tuple[nn.Module, Any]]:
    """Replace the self-attention of PyTorch's encoder layers in place; returns what ``close_attention`` needs."""
    done: list[tuple[nn.Module, Any]] = []
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and isinstance(module.self_attn, nn.MultiheadAttention):
            done.append((module, module.self_attn))
            module.self_attn = OpenAttention(module.self_attn)  # type: ignore[assignment]
        elif isinstance(module, nn.TransformerEncoder):
            done.append((module, module.use_nested_tensor))
            module.use_nested_tensor = False
    return done


@contextmanager
def opened(model: nn.Module) -> Iterator[None]:
    """Within this context PyTorch's encoder layers have open attention; afterwards they are as they were."""
    done = open_attention(model)
    try:
        yield
    finally:
        for module, before in done:
            setattr(module, "self_attn" if isinstance(before, nn.Module) else "use_nested_tensor", before)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, open attention and no key-value cache; everything is put back at the end."""
    config = getattr(model, "config", None)
    cached = getattr(config, "use_cache", None)
    try:
        if cached:
            config.use_cache = False  # type: ignore[union-attr]
        with surgery.evaluating(model), opened(model):
            yield
    finally:
        if cached:
            config.use_cache = cached  # type: ignore[union-attr]


def call(model: nn.Module, batch: Any) -> Any:
    """Run a model on a batch: a mapping by keyword, anything else as the one argument. Labels are not passed on."""
    if isinstance(batch, Mapping):
        return model(
            **{key: value for key, value in batch.items() if key not in ("labels", "mask_labels", "class_labels")}
        )
    return model(batch)


def first_tensor(batch: Any) -> Tensor:
    """The tensor that tells how many examples a batch has: the model's input where it has a usual name.

    Raises:
        TypeError: for a batch without tensors.
        ValueError: for a batch without examples.
    """
    tensors = [batch]
    if isinstance(batch, Mapping):
        # positions, for instance, may be one row for all examples
        usual = [batch[name] for name in ("input_ids", "inputs_embeds", "pixel_values") if name in batch]
        tensors = [v for v in (*usual, *batch.values()) if isinstance(v, Tensor)]
    if not tensors or not isinstance(tensors[0], Tensor) or not tensors[0].ndim:
        raise TypeError(f"batch must be a tensor or a mapping with tensors, got {type(batch).__name__}")
    if not tensors[0].numel():
        raise ValueError(f"batch has no examples: its tensor has shape {tuple(tensors[0].shape)}")
    return tensors[0]


def trackable(batch: Any) -> Any:
    """The batch, with copies of what was made in inference mode, through which no gradient can pass."""
    if isinstance(batch, Tensor):
        return batch.clone() if batch.is_inference() else batch
    return {key: trackable(value) for key, value in batch.items()} if isinstance(batch, Mapping) else batch


def real_tokens(batch: Any) -> Tensor | None:
    """Which tokens are no padding, bool (examples, tokens), where the batch says so."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None

"""Replacement of self-attention in bidirectional encoders of transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from torchgraft.surgery import NothingMatchedError, Report, find, replace

__all__ = ["MixerAttention", "replace_attention"]

# the module, and its projection whose inputs are the hidden states
_FAMILIES = {
    "BertSelfAttention": "query",
    "RobertaSelfAttention": "query",
    "DistilBertSelfAttention": "q_lin",
    "ViTAttention": "q_proj",
}


class MixerAttention(nn.Module):
    """A mixer that is called like a self-attention of transformers.

    Args:
        mixer: takes (B, L, D) and an ``attention_mask`` (B, L) or ``None``, and returns (B, L, D).
    """

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """The mixed hidden states, and no attention weights, since there are none.

        Raises:
            ValueError: for cross-attention, a cache, or a mask that is not padding.
        """
        for refused in ("encoder_hidden_states", "cache", "past_key_values"):
            if kwargs.get(refused) is not None:
                raise ValueError(f"{refused} was given, but a bidirectional mixer has no cross-attention and no cache")
        return self.mixer(hidden_states, attention_mask=_padding(attention_mask)), None


def _padding(mask: Tensor | None) -> Tensor | None:
    """(B, L) from what the attention got: None, (B, L), or (B, 1, L, L) boolean or additive."""
    if mask is None or mask.ndim == 2:
        return mask
    if mask.ndim != 4:
        raise ValueError(f"attention_mask must have shape (B, L) or (B, 1, L, L), got {tuple(mask.shape)}")
    seen = mask if not mask.is_floating_point() else mask == 0
    seen = seen != 0
    first = seen[:, :1, :1]
    if bool((seen != first).any()):
        raise ValueError(
            "attention_mask differs from query to query (causal, windowed or packed); a bidirectional mixer takes "
            "padding alone, the same for all queries"
        )
    return first[:, 0, 0]


def _is_attention(name: str, module: nn.Module) -> bool:
    projection = _FAMILIES.get(type(module).__name__)
    return projection is not None and hasattr(module, projection)


def replace_attention(
    model: nn.Module, factory: Callable[[int], nn.Module], layers: Sequence[int] | None = None
) -> Report:
    """Put a mixer in the place of self-attention, in BERT, RoBERTa, DistilBERT and ViT of transformers, with any head.

    The new mixers are untrained, so the model must be trained after. In BERT and RoBERTa the output projection of the
    attention stays behind the mixer, in DistilBERT and ViT it goes. Attention dropout and ``output_attentions`` have
    nothing to act on. To load a checkpoint of a changed model, build the model, replace, then ``load_state_dict``;
    ``from_pretrained`` alone would build the attention again.

    Args:
        model: changed in place; left as it was when something is raised.
        factory: makes a mixer from the width of the hidden states: ``HydraMixer`` itself, or a function such as
            ``lambda width: MatrixMixer("low_rank", True, width, headdim=64)``. The mixer is called with
            ``(x, attention_mask=mask)``.
        layers: which layers, counted from 0, negative from the end; all of them if not given.

    Returns:
        The report; ``report.undo()`` puts the attention back.

    Raises:
        ValueError: for a model with causal or cross-attention, one that has no attention of a known kind
            (``NothingMatchedError``), or layers that it does not have.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> small = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
        >>> model = BertModel(small)
        >>> from torchgraft.layers.hydra import HydraMixer
        >>> report = replace_attention(model, HydraMixer, layers=[0])
        >>> len(report.replaced)
        1
    """
    config = getattr(model, "config", None)
    causal = [name for name, module in model.named_modules() if getattr(module, "is_causal", False)]
    if getattr(config, "is_decoder", False) or causal:
        where = causal[0] if causal else "config.is_decoder"
        raise ValueError(
            f"{type(model).__name__} is causal ({where}); a bidirectional mixer would let each token see later ones"
        )
    crossing = [name for name, module in model.named_modules() if "CrossAttention" in type(module).__name__]
    if crossing:
        raise ValueError(f"{type(model).__name__} has cross-attention ({crossing[0]}), which a mixer cannot replace")
    found = find(model, _is_attention)
    if not found:
        raise NothingMatchedError(
            f"{type(model).__name__} has no self-attention that can be replaced; known are those of BERT, RoBERTa, "
            f"DistilBERT and ViT ({', '.join(_FAMILIES)})"
        )
    if layers is None:
        chosen = list(range(len(found)))
    else:
        wrong = [n for n in layers if not -len(found) <= n < len(found)]
        if wrong or not layers:
            raise ValueError(f"layers must name some of the {len(found)} layers, 0 to {len(found) - 1}, got {layers}")
        chosen = [n % len(found) for n in layers]
    names = {name for n in chosen for name in found[n].names}

    def make(old: nn.Module) -> nn.Module:
        width = getattr(old, _FAMILIES[type(old).__name__]).in_features
        return MixerAttention(factory(width))

    return replace(model, lambda name, module: name in names, make)

"""Hydra and the matrix mixers: bidirectional sequence mixing in linear time (Hwang et al., NeurIPS 2024)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchgraft.layers.hydra.convert import MixerAttention, replace_attention
from torchgraft.layers.hydra.layer import HydraMixer, weight_decay_groups
from torchgraft.layers.hydra.mixers import MatrixMixer

if TYPE_CHECKING:
    from torchgraft.layers.hydra.models import (
        HydraConfig,
        HydraForMaskedLM,
        HydraForSequenceClassification,
        HydraModel,
        load_published,
    )

__all__ = [
    "HydraConfig",
    "HydraForMaskedLM",
    "HydraForSequenceClassification",
    "HydraMixer",
    "HydraModel",
    "MatrixMixer",
    "MixerAttention",
    "load_published",
    "replace_attention",
    "weight_decay_groups",
]


def __getattr__(name: str) -> Any:
    # the models need transformers, the layers do not
    if name in __all__:
        from torchgraft.layers.hydra import models

        return getattr(models, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

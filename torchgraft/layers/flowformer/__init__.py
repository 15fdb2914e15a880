"""Flow-Attention as a layer, as an attention of transformers, and as whole models (Wu et al., ICML 2022)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchgraft.layers.flowformer.attention import FlowAttention, register_flow_attention
from torchgraft.ops.flow_attention import flow_attention

if TYPE_CHECKING:
    from torchgraft.layers.flowformer.models import (
        FlowCache,
        FlowformerConfig,
        FlowformerForCausalLM,
        FlowformerForSequenceClassification,
        FlowformerModel,
    )

__all__ = [
    "FlowAttention",
    "FlowCache",
    "FlowformerConfig",
    "FlowformerForCausalLM",
    "FlowformerForSequenceClassification",
    "FlowformerModel",
    "flow_attention",
    "register_flow_attention",
]


def __getattr__(name: str) -> Any:
    # the models need transformers, the layer does not
    if name in __all__:
        from torchgraft.layers.flowformer import models

        return getattr(models, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

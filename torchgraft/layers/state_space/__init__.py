"""State space layers behind one interface, after the survey Mamba-360 (Patro and Agneeswaran, 2024, arXiv 2404.16112).

Every layer is a ``SequenceMixer``: ``forward(x, state=None, mask=None) -> (y, state)``, ``step(x_t, state)`` and
``initial_state(batch_size)``. ``build_ssm(name, d_model)`` makes one, ``FAMILIES`` says what there is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchgraft.layers.state_space.convolution import TNN, Hyena, LongConv, SGConv
from torchgraft.layers.state_space.gated import GSS, H3, SPADE, LiquidS4, WindowAttention
from torchgraft.layers.state_space.linear import DSS, S4, S4D
from torchgraft.layers.state_space.mamba import Mamba, Mamba2
from torchgraft.layers.state_space.mega import EMA, Mega
from torchgraft.layers.state_space.mixer import SequenceMixer, State
from torchgraft.layers.state_space.recurrent import HGRN, RGLRU, RWKV, GateLoop, LowerBounds, RetNet
from torchgraft.layers.state_space.registry import FAMILIES, Family, build_ssm
from torchgraft.layers.state_space.s5 import LRU, S5
from torchgraft.layers.state_space.scans import S4ND, Bidirectional, ReverseComplement, Scan2d
from torchgraft.layers.state_space.stack import Attention, Block, MixtureOfExperts, Stack, ssm_optim_groups

if TYPE_CHECKING:
    from torchgraft.layers.state_space.models import (
        SSMCache,
        SSMConfig,
        SSMForCausalLM,
        SSMForForecasting,
        SSMForImageClassification,
        SSMForSequenceClassification,
        SSMModel,
        replace_attention,
    )

_MODELS = [
    "SSMCache", "SSMConfig", "SSMForCausalLM", "SSMForForecasting", "SSMForImageClassification",
    "SSMForSequenceClassification", "SSMModel", "replace_attention",
]  # fmt: skip

__all__ = [
    "DSS", "EMA", "FAMILIES", "GSS", "H3", "HGRN", "LRU", "RGLRU", "RWKV", "S4", "S4D", "S4ND", "S5", "SPADE", "TNN",
    "Attention", "Bidirectional", "Block", "Family", "GateLoop", "Hyena", "LiquidS4", "LongConv", "LowerBounds",
    "Mamba", "Mamba2", "Mega", "MixtureOfExperts", "RetNet", "ReverseComplement", "SGConv", "SSMCache", "SSMConfig",
    "SSMForCausalLM", "SSMForForecasting", "SSMForImageClassification", "SSMForSequenceClassification", "SSMModel",
    "Scan2d", "SequenceMixer", "Stack", "State", "WindowAttention", "build_ssm", "replace_attention",
    "ssm_optim_groups",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # the models need transformers, the layers do not
    if name in _MODELS:
        from torchgraft.layers.state_space import models

        return getattr(models, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

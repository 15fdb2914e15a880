"""LMUFormer: classifiers of sequences with a Legendre memory, plain and spiking (Liu et al., ICLR 2024)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchgraft.layers.lmuformer.memory import LegendreMemory, LMUCell, LMUMixer, SpikingSelfAttention
from torchgraft.layers.lmuformer.model import EnergyReport, LMUFormer, energy_report
from torchgraft.layers.lmuformer.neuron import LIFNeuron, lif

if TYPE_CHECKING:
    from torchgraft.layers.lmuformer.audio import LMUFormerConfig, LMUFormerForAudioClassification

__all__ = [
    "EnergyReport",
    "LIFNeuron",
    "LMUCell",
    "LMUFormer",
    "LMUFormerConfig",
    "LMUFormerForAudioClassification",
    "LMUMixer",
    "LegendreMemory",
    "SpikingSelfAttention",
    "energy_report",
    "lif",
]


def __getattr__(name: str) -> Any:
    # the classifier of transformers needs transformers, the layers do not
    if name in __all__:
        from torchgraft.layers.lmuformer import audio

        return getattr(audio, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

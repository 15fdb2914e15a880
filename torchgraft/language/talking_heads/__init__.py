"""Talking heads: which heads read what which others write, component by component, and editing that channel.

Merullo, Eickhoff, Pavlick, "Talking Heads: Understanding Inter-layer Communication in Transformer Language Models",
NeurIPS 2024 (arXiv 2406.09519).
"""

from torchgraft.language.talking_heads.composition import Channel, ChannelTable, composition_scores, random_score
from torchgraft.language.talking_heads.editing import ChannelEdit, SubspaceSteer, channel_activations, search_coords
from torchgraft.language.talking_heads.tasks import (
    IOI,
    LaundryList,
    Prompt,
    accuracy,
    attention_to,
    choices,
    inhibition_score,
    option_logits,
)
from torchgraft.language.talking_heads.weights import Components, HeadMatrices, head_matrices, head_svd

__all__ = [
    "IOI",
    "Channel",
    "ChannelEdit",
    "ChannelTable",
    "Components",
    "HeadMatrices",
    "LaundryList",
    "Prompt",
    "SubspaceSteer",
    "accuracy",
    "attention_to",
    "channel_activations",
    "choices",
    "composition_scores",
    "head_matrices",
    "head_svd",
    "inhibition_score",
    "option_logits",
    "random_score",
    "search_coords",
]

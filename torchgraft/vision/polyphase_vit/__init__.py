"""Adaptive polyphase anchoring: vision transformers whose answers no cyclic shift changes.

Ding, Soselia, Armstrong, Su and Huang, "Reviving Shift Equivariance in Vision Transformers", 2023, arXiv 2306.07470.

Example:
    >>> import torch
    >>> from transformers import SwinConfig, SwinForImageClassification
    >>> config = SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=2)
    >>> model = make_shift_equivariant(SwinForImageClassification(config).eval())
    >>> shift_consistency(model, torch.rand(8, 3, 16, 16), max_shift=2).consistency
    1.0
"""

from torchgraft.vision.polyphase_vit.anchor import (
    CircularPEG,
    PolyPatchEmbed,
    PolyphaseAnchor,
    anchor_tokens,
    polyphase_anchor,
    polyphase_norms,
    polyphase_offsets,
    polyphase_unanchor,
)
from torchgraft.vision.polyphase_vit.consistency import ShiftReport, shift_consistency
from torchgraft.vision.polyphase_vit.graft import load_shift_equivariant, make_shift_equivariant
from torchgraft.vision.polyphase_vit.twins import PolyTwinsConfig, PolyTwinsSVT

__all__ = [
    "CircularPEG",
    "PolyPatchEmbed",
    "PolyTwinsConfig",
    "PolyTwinsSVT",
    "PolyphaseAnchor",
    "ShiftReport",
    "anchor_tokens",
    "load_shift_equivariant",
    "make_shift_equivariant",
    "polyphase_anchor",
    "polyphase_norms",
    "polyphase_offsets",
    "polyphase_unanchor",
    "shift_consistency",
]

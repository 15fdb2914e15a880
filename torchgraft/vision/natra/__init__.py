"""Robust training using natural transformations, NaTra (Wang et al., 2021, arXiv 2105.04070).

A trained generator supplies the variations that pixel noise cannot: light, hair, pose. Each training image is inverted
to latent codes (BIES; several codes an image with LCE), directions that leave the class alone are found without labels
(UADM), the codes move along them, and the classifier trains on the decoded images, chosen at random or for doing the
most harm.

**The paper's full text was not available to us and there is no official code.** The four parts and what they are for
are in its abstract. How each works here follows the methods that it is known from, and everything marked
"(reconstructed)" is our concrete choice, which the authors may have made otherwise.

Legend: B images, n codes an image, L layers that take a code, d features of a code, C H W image, c channels at the
split, K directions.

Example:
    >>> import torch
    >>> from torch import nn
    >>> decoder = nn.Sequential(nn.Linear(4, 64), nn.Unflatten(1, (1, 8, 8)), nn.Tanh()).eval()
    >>> adapter = GeneratorAdapter(decoder, (4,))
    >>> images = adapter.decode(adapter.sample_codes(6)).detach()
    >>> store = invert(adapter, images, steps=20, min_psnr=0.0)
    >>> natra = NaTraAugment(adapter, discover_directions(adapter, "pca", k=3), store, mode="search", candidates=2)
    >>> classifier = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    >>> y = torch.tensor([0, 1, 2, 0, 1, 2])
    >>> harder = natra(torch.arange(6), y, classifier)
    >>> harder.shape, natra_loss(classifier, images, y, harder).ndim
    (torch.Size([6, 1, 8, 8]), 0)
"""

from torchgraft.vision.natra.baselines import latent_mix, pixel_pgd
from torchgraft.vision.natra.directions import Directions, discover_directions, edit
from torchgraft.vision.natra.generator import GeneratorAdapter
from torchgraft.vision.natra.inversion import (
    FeatureDistance,
    InversionResult,
    encoder_loss,
    invert,
    psnr,
    shift_codes,
)
from torchgraft.vision.natra.training import NaTraAugment, NaturalEdit, natra_loss

__all__ = [
    "Directions",
    "FeatureDistance",
    "GeneratorAdapter",
    "InversionResult",
    "NaTraAugment",
    "NaturalEdit",
    "discover_directions",
    "edit",
    "encoder_loss",
    "invert",
    "latent_mix",
    "natra_loss",
    "pixel_pgd",
    "psnr",
    "shift_codes",
]

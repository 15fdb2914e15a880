"""EigenShield: keep the directions of an embedding space that carry structure and withstand perturbation.

Darabi et al., "EigenShield: Causal Subspace Filtering via Random Matrix Theory for Adversarially Robust
Vision-Language Models", arXiv 2502.14976 (2025). Only the abstract and summaries could be read and no official code was
found: the random-matrix parts are standard theory, while the robustness score, its quantile and the place of the filter
are reconstructed.
"""

from torchgraft.language.eigenshield.hooks import (
    Attached,
    SpectralFilter,
    attach,
    calibrate,
    collect_embeddings,
    perturb,
)
from torchgraft.language.eigenshield.shield import EigenShield, FreshSpikes
from torchgraft.language.eigenshield.theory import (
    MarchenkoPastur,
    bbp_threshold,
    fit_noise,
    spike_forward,
    spike_inverse,
    tracy_widom_edge,
)

__all__ = [
    "Attached",
    "EigenShield",
    "FreshSpikes",
    "MarchenkoPastur",
    "SpectralFilter",
    "attach",
    "bbp_threshold",
    "calibrate",
    "collect_embeddings",
    "fit_noise",
    "perturb",
    "spike_forward",
    "spike_inverse",
    "tracy_widom_edge",
]

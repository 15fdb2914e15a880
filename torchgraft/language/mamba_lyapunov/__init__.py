"""How stable a recurrent language model is: Lyapunov exponents, growth of small changes, divergence in low precision.

Halloran, Gulati, Roysdon, "Mamba State-Space Models Are Lyapunov-Stable Learners", TMLR 2025 (arXiv 2406.00209).
"""

from torchgraft.language.mamba_lyapunov.exponents import (
    LayerExponents,
    LyapunovReport,
    TangentExponents,
    assert_stable,
    lyapunov_spectrum,
    step_sizes,
    tangent_exponents,
)
from torchgraft.language.mamba_lyapunov.growth import Divergence, Growth, perturbation_growth, precision_divergence
from torchgraft.language.mamba_lyapunov.tuning import (
    Task,
    TunedModel,
    Tuning,
    finetune_stability,
    icl_gain,
    lora_targets,
    mamba_lora_config,
    silent_adapters,
)

__all__ = [
    "Divergence",
    "Growth",
    "LayerExponents",
    "LyapunovReport",
    "TangentExponents",
    "Task",
    "TunedModel",
    "Tuning",
    "assert_stable",
    "finetune_stability",
    "icl_gain",
    "lora_targets",
    "lyapunov_spectrum",
    "mamba_lora_config",
    "perturbation_growth",
    "precision_divergence",
    "silent_adapters",
    "step_sizes",
    "tangent_exponents",
]

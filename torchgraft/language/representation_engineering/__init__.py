"""Representation engineering and its price: steer a model by a vector, and know what that costs before shipping.

Wolf, Wies, Shteyman, Rothberg, Levine, Shashua, "Tradeoffs Between Alignment and Helpfulness in Language Models with
Steering Methods", arXiv 2401.16332.
"""

from torchgraft.language.representation_engineering.steering import steer
from torchgraft.language.representation_engineering.theory import (
    alignment_bound,
    helpfulness,
    helpfulness_gaussian,
    residual_norm,
    separability_margin,
)
from torchgraft.language.representation_engineering.tradeoff import (
    MultipleChoice,
    OptionContrast,
    OptionLikelihood,
    Probe,
    TextLikelihood,
    TradeoffCurve,
    TradeoffFit,
    TradeoffSweep,
    fit_tradeoff,
)
from torchgraft.language.representation_engineering.vectors import ReadingVectors, direction, separability

__all__ = [
    "MultipleChoice",
    "OptionContrast",
    "OptionLikelihood",
    "Probe",
    "ReadingVectors",
    "TextLikelihood",
    "TradeoffCurve",
    "TradeoffFit",
    "TradeoffSweep",
    "alignment_bound",
    "direction",
    "fit_tradeoff",
    "helpfulness",
    "helpfulness_gaussian",
    "residual_norm",
    "separability",
    "separability_margin",
    "steer",
]

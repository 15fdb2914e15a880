"""The engine of evidence: arms, seeds, training loop, statistics, figures, report."""

from torchgraft.experiments.records import Arm, Claim, Judged, Measurement, Progress, Result
from torchgraft.experiments.timing import Case
from torchgraft.experiments.training import FitResult, fit, pick_learning_rate

__all__ = [
    "Arm",
    "Case",
    "Claim",
    "FitResult",
    "Judged",
    "Measurement",
    "Progress",
    "Result",
    "fit",
    "pick_learning_rate",
]

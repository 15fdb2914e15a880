"""A language model as a walker in its embedding space: paths, the walk inside a pass, and the operations that make it.

Singh, "Analyzing Transformer Dynamics as Movement through Embedding Space", arXiv 2308.10874. The paper is theory; each
of its statements is here a measurement, beside a null model where it is a statistic. No official code is known.
"""

from torchgraft.language.embedding_walk.association import ablate_association, distance_profile, place_pattern
from torchgraft.language.embedding_walk.concepts import (
    ConceptSpace,
    analogy_accuracy,
    anisotropy,
    axis_privilege,
    compositionality,
    neighbour_purity,
)
from torchgraft.language.embedding_walk.nulls import Statistic
from torchgraft.language.embedding_walk.operations import Operation, classify_ops, shares
from torchgraft.language.embedding_walk.paths import Path, ReachableTree, SampledPaths
from torchgraft.language.embedding_walk.trace import Contributions, WalkTrace
from torchgraft.language.embedding_walk.walker import EmbeddingWalk, NextTokenMap

__all__ = [
    "ConceptSpace",
    "Contributions",
    "EmbeddingWalk",
    "NextTokenMap",
    "Operation",
    "Path",
    "ReachableTree",
    "SampledPaths",
    "Statistic",
    "WalkTrace",
    "ablate_association",
    "analogy_accuracy",
    "anisotropy",
    "axis_privilege",
    "classify_ops",
    "compositionality",
    "distance_profile",
    "neighbour_purity",
    "place_pattern",
    "shares",
]

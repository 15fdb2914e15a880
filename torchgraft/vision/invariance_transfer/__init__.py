"""Invariance and transfer: does an encoder ignore what the next task varies in? (Speicher, Nanda, Gummadi, TMLR 2024).

Transforms-2D makes images whose classes, backgrounds and transformations are drawn independently of each other, fast
and as a function of the index. Twins that differ in the transformation alone measure what an encoder ignores, and
probes on targets with the same or with other transformations measure what that is worth. arXiv 2407.04325.

Example:
    >>> data = Transforms2D(shape_objects(6), "noise", ["rotate", "hue", "blur"], n_samples=200)
    >>> encoder = lambda images: images.mean((2, 3))
    >>> score = invariance_score(encoder, data.twins())
    >>> accuracy = transfer_eval(encoder, data)
"""

from torchgraft.vision.invariance_transfer.cutouts import Cutouts, composite
from torchgraft.vision.invariance_transfer.dataset import Transforms2D, Twins
from torchgraft.vision.invariance_transfer.measure import (
    METRICS,
    features,
    invariance_matrix,
    invariance_score,
    invariance_scores,
    similarity,
    text_twins,
    unbiased_hsic,
)
from torchgraft.vision.invariance_transfer.objects import (
    BaseSet,
    load_base_set,
    masked_objects,
    noise_objects,
    opaque_objects,
    shape_objects,
)
from torchgraft.vision.invariance_transfer.transfer import (
    AVAILABILITIES,
    CORRELATIONS,
    class_relations,
    data_types,
    probe,
    relative_importance,
    relevance_data,
    transfer_eval,
    transfer_matrix,
)
from torchgraft.vision.invariance_transfer.transforms import (
    FAMILIES,
    TRANSFORMS,
    Transform,
    Wrapped,
    family,
    nested_transform_sets,
    sample_transform_sets,
    transform,
)

__all__ = [
    "AVAILABILITIES",
    "CORRELATIONS",
    "FAMILIES",
    "METRICS",
    "TRANSFORMS",
    "BaseSet",
    "Cutouts",
    "Transform",
    "Transforms2D",
    "Twins",
    "Wrapped",
    "class_relations",
    "composite",
    "data_types",
    "family",
    "features",
    "invariance_matrix",
    "invariance_score",
    "invariance_scores",
    "load_base_set",
    "masked_objects",
    "nested_transform_sets",
    "noise_objects",
    "opaque_objects",
    "probe",
    "relative_importance",
    "relevance_data",
    "sample_transform_sets",
    "shape_objects",
    "similarity",
    "text_twins",
    "transfer_eval",
    "transfer_matrix",
    "transform",
    "unbiased_hsic",
]

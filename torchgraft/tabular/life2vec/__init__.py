"""life2vec: sequences of dated events as a language, and what it knows of a person (Savcisens et al., 2024)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchgraft.tabular.life2vec.attention import (
    Life2VecAttention,
    favor_attention,
    favor_features,
    local_attention,
    local_mask,
    orthogonal_random_features,
)
from torchgraft.tabular.life2vec.batches import (
    Augmentation,
    EventCollator,
    drop_tokens,
    hide_background,
    length_buckets,
    mask_tokens,
    reorder_events,
    resample_events,
    shift_positions,
    shuffle_tokens,
    time_cut,
)
from torchgraft.tabular.life2vec.events import (
    GENERAL_TOKENS,
    Document,
    Documents,
    EncodingReport,
    EventSchema,
    EventSource,
    check_disjoint,
    split_people,
)
from torchgraft.tabular.life2vec.interpret import (
    TCAV,
    Robustness,
    TCAVScore,
    concept_matrix,
    concept_neighbors,
    embedding_robustness,
    person_summaries,
    project,
    saliency,
)
from torchgraft.tabular.life2vec.losses import (
    AsymmetricPULoss,
    CDWCrossEntropy,
    asymmetric_pu_loss,
    cdw_cross_entropy,
    sig_softmax,
)
from torchgraft.tabular.life2vec.metrics import (
    area_under_curve,
    area_under_lift,
    bootstrap_interval,
    corrected_metrics,
    metrics_by_group,
    recalibrate,
    threshold_for_mcc,
)
from torchgraft.tabular.life2vec.modules import center_tokens, time2vec
from torchgraft.tabular.life2vec.tokenizer import EventTokenizer

if TYPE_CHECKING:
    from torchgraft.tabular.life2vec.models import (
        Life2VecConfig,
        Life2VecForOrdinal,
        Life2VecForPreTraining,
        Life2VecForSequenceClassification,
        Life2VecModel,
        Life2VecOrdinalOutput,
        Life2VecPreTrainingOutput,
        RedrawProjections,
        convert_official,
        finetuning_parameters,
        freeze_tokens,
        pretraining_parameters,
    )

__all__ = [
    "GENERAL_TOKENS",
    "TCAV",
    "AsymmetricPULoss",
    "Augmentation",
    "CDWCrossEntropy",
    "Document",
    "Documents",
    "EncodingReport",
    "EventCollator",
    "EventSchema",
    "EventSource",
    "EventTokenizer",
    "Life2VecAttention",
    "Life2VecConfig",
    "Life2VecForOrdinal",
    "Life2VecForPreTraining",
    "Life2VecForSequenceClassification",
    "Life2VecModel",
    "Life2VecOrdinalOutput",
    "Life2VecPreTrainingOutput",
    "RedrawProjections",
    "Robustness",
    "TCAVScore",
    "area_under_curve",
    "area_under_lift",
    "asymmetric_pu_loss",
    "bootstrap_interval",
    "cdw_cross_entropy",
    "center_tokens",
    "check_disjoint",
    "concept_matrix",
    "concept_neighbors",
    "convert_official",
    "corrected_metrics",
    "drop_tokens",
    "embedding_robustness",
    "favor_attention",
    "favor_features",
    "finetuning_parameters",
    "freeze_tokens",
    "hide_background",
    "length_buckets",
    "local_attention",
    "local_mask",
    "mask_tokens",
    "metrics_by_group",
    "orthogonal_random_features",
    "person_summaries",
    "pretraining_parameters",
    "project",
    "recalibrate",
    "reorder_events",
    "resample_events",
    "saliency",
    "shift_positions",
    "shuffle_tokens",
    "sig_softmax",
    "split_people",
    "threshold_for_mcc",
    "time2vec",
    "time_cut",
]


def __getattr__(name: str) -> Any:
    # the models need transformers, the rest does not
    if name in __all__:
        from torchgraft.tabular.life2vec import models

        return getattr(models, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

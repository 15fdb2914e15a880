"""The end of a sequence classifier in the manner of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


def classified(
    model: PreTrainedModel, logits: Tensor, labels: Tensor | None, hidden_states: Any, return_dict: bool | None
) -> Any:
    """Logits with the loss that the kind of labels asks for.

    ``config.problem_type`` is set where it is not: regression for one label, one class of many for whole numbers,
    several classes at once for others.
    """
    loss = None
    if labels is not None:
        if model.config.problem_type is None:
            whole = labels.dtype in (torch.long, torch.int)
            many = "single_label_classification" if whole else "multi_label_classification"
            model.config.problem_type = "regression" if model.config.num_labels == 1 else many
        loss = model.loss_function(labels=labels, pooled_logits=logits, config=model.config)
    if return_dict is False:
        return tuple(part for part in (loss, logits, hidden_states) if part is not None)
    return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=hidden_states)

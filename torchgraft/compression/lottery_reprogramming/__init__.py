"""What compression costs downstream: lottery tickets under visual prompts and linear probes (Misra et al., 2023).

Make sparse networks (``lottery_ticket``, ``magnitude_prune``) or quantised ones (``quantize_weights``), carry them to
another task without touching their weights (``ReprogrammedClassifier``, ``LinearProbe``), and see what they lost in
accuracy and calibration against the dense one (``transfer_report``, ``expected_calibration_error``).
"""

from torchgraft.compression.lottery_reprogramming.calibration import (
    Reliability,
    expected_calibration_error,
    fit_temperature,
    reliability,
    reliability_diagram,
)
from torchgraft.compression.lottery_reprogramming.classifiers import LinearProbe, ReprogrammedClassifier
from torchgraft.compression.lottery_reprogramming.mapping import (
    IterativeLabelMapping,
    frequency_label_mapping,
    map_logits,
    mapping_counts,
    random_label_mapping,
)
from torchgraft.compression.lottery_reprogramming.prompting import VisualPrompt, prepare_images
from torchgraft.compression.lottery_reprogramming.pruning import (
    QuantizedWeight,
    SparsityReport,
    Ticket,
    apply_masks,
    lottery_ticket,
    magnitude_prune,
    make_permanent,
    prunable_weights,
    quantize_weights,
    random_masks,
    sparsity_report,
)
from torchgraft.compression.lottery_reprogramming.report import (
    few_shot_indices,
    plot_transfer,
    summarize_transfer,
    transfer_metrics,
    transfer_report,
)

__all__ = [
    "IterativeLabelMapping",
    "LinearProbe",
    "QuantizedWeight",
    "Reliability",
    "ReprogrammedClassifier",
    "SparsityReport",
    "Ticket",
    "VisualPrompt",
    "apply_masks",
    "expected_calibration_error",
    "few_shot_indices",
    "fit_temperature",
    "frequency_label_mapping",
    "lottery_ticket",
    "magnitude_prune",
    "make_permanent",
    "map_logits",
    "mapping_counts",
    "plot_transfer",
    "prepare_images",
    "prunable_weights",
    "quantize_weights",
    "random_label_mapping",
    "random_masks",
    "reliability",
    "reliability_diagram",
    "sparsity_report",
    "summarize_transfer",
    "transfer_metrics",
    "transfer_report",
]

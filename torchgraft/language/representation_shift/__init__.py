"""What fine-tuning does to the concepts of a model, and steering by the same vectors.

Khayatan, Shukor, Parekh, Dapogny, Cord, "Analyzing Fine-tuning Representation Shift for Multimodal LLMs Steering
alignment", ICCV 2025, arXiv 2501.03012; concept dictionaries after Parekh et al., "A Concept-Based Explainability
Framework for Large Multimodal Models", arXiv 2406.08074.
"""

from torchgraft.language.representation_shift.concepts import ConceptDictionary, ground_text, most_activating
from torchgraft.language.representation_shift.shift import (
    ConceptShift,
    match_concepts,
    recovery_report,
    shift_statistics,
)
from torchgraft.language.representation_shift.states import StateSet, collect_states, common_rows
from torchgraft.language.representation_shift.steering import (
    Selected,
    answer_type,
    concept_directions,
    select_directions,
    steer,
    steering_report,
    steering_vector,
    vqa_accuracy,
)

__all__ = [
    "ConceptDictionary",
    "ConceptShift",
    "Selected",
    "StateSet",
    "answer_type",
    "collect_states",
    "common_rows",
    "concept_directions",
    "ground_text",
    "match_concepts",
    "most_activating",
    "recovery_report",
    "select_directions",
    "shift_statistics",
    "steer",
    "steering_report",
    "steering_vector",
    "vqa_accuracy",
]

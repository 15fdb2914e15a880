"""Instruction following without instruction tuning: response tuning, three rules at decoding time, and their tests.

Hewitt, Liu, Manning, Liang: "Instruction Following without Instruction Tuning", 2024, arXiv 2409.14254.
"""

from torchgraft.language.implicit_instruction.formats import (
    TASKS,
    ChatFormat,
    Prompts,
    response_only,
    single_task,
)
from torchgraft.language.implicit_instruction.ranking import adherence, response_ranking, response_scores
from torchgraft.language.implicit_instruction.rules import (
    RULES,
    UNIFORM,
    ImplicitInstructProcessor,
    TokenBias,
    default_token_bias,
    eos_score,
)
from torchgraft.language.implicit_instruction.tuning import (
    ResponseCollator,
    published_settings,
    response_loss,
    training_examples,
    tune,
)

__all__ = [
    "RULES",
    "TASKS",
    "UNIFORM",
    "ChatFormat",
    "ImplicitInstructProcessor",
    "Prompts",
    "ResponseCollator",
    "TokenBias",
    "adherence",
    "default_token_bias",
    "eos_score",
    "published_settings",
    "response_loss",
    "response_only",
    "response_ranking",
    "response_scores",
    "single_task",
    "training_examples",
    "tune",
]

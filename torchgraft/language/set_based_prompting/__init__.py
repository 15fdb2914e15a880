"""Set-Based Prompting: mark a part of a prompt as a set, and the answer no longer depends on the order in it.

McIlroy-Young, Brown, Olson, Zhang, Dwork, "Order-Independence Without Fine Tuning", NeurIPS 2024 (arXiv 2406.06581).
Only two inputs of an unmodified decoder change: position ids (all elements of a set start together) and the attention
mask (elements do not see each other).
"""

from torchgraft.language.set_based_prompting.encoding import (
    MASK_ONLY,
    PADDED,
    PLAIN,
    POSITIONS_ONLY,
    SET_BASED,
    Editing,
    additive_mask,
    encode,
    forward,
    set_attention_mask,
    set_block_mask,
    set_labels,
    set_positions,
)
from torchgraft.language.set_based_prompting.generation import ElementStore, generate
from torchgraft.language.set_based_prompting.prompts import (
    DELIMITERS,
    Set,
    SetPrompt,
    listing_orders,
    multiple_choice_prompt,
)
from torchgraft.language.set_based_prompting.scoring import (
    OrderReport,
    option_perplexity,
    ordinary_orders,
    score_options,
)
from torchgraft.language.set_based_prompting.support import check_model
from torchgraft.language.set_based_prompting.toy import toy_model

__all__ = [
    "DELIMITERS",
    "MASK_ONLY",
    "PADDED",
    "PLAIN",
    "POSITIONS_ONLY",
    "SET_BASED",
    "Editing",
    "ElementStore",
    "OrderReport",
    "Set",
    "SetPrompt",
    "additive_mask",
    "check_model",
    "encode",
    "forward",
    "generate",
    "listing_orders",
    "multiple_choice_prompt",
    "option_perplexity",
    "ordinary_orders",
    "score_options",
    "set_attention_mask",
    "set_block_mask",
    "set_labels",
    "set_positions",
    "toy_model",
]

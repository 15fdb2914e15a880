"""OPTIN: one-shot pruning of a trained network by what a unit's removal does to all later features.

Khaki and Plataniotis, "The Need for Speed: Pruning Transformers with One Recipe", ICLR 2024, arXiv 2403.17921.

Example:
    >>> import torch
    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=50)
    >>> model = BertForSequenceClassification(BertConfig(**sizes)).eval()
    >>> batch = {"input_ids": torch.randint(1, 50, (8, 12)), "attention_mask": torch.ones(8, 12, dtype=torch.long)}
    >>> smaller, report = prune(model, batch, flop_ratio=0.6)
    >>> report.masks.ratio <= 0.6, smaller(**batch).logits.shape
    (True, torch.Size([8, 2]))
"""

from torchgraft.compression.optin.baselines import baseline_scores
from torchgraft.compression.optin.blocks import PrunableSpec, find_blocks
from torchgraft.compression.optin.cost import MacModel
from torchgraft.compression.optin.losses import kl_loss, manifold_loss, mean_loss, patch_loss, squared_loss
from torchgraft.compression.optin.pruning import PruneReport, prune, seconds_per_batch, tune_masks
from torchgraft.compression.optin.scoring import (
    OptinConfig,
    OptinScores,
    balance,
    optin_scores,
    rebalanced,
    removal_damage,
)
from torchgraft.compression.optin.search import BudgetError, LatencyResult, PruneMasks, search_latency, search_masks
from torchgraft.compression.optin.slicing import apply_masks, load_pruned, save_pruned
from torchgraft.compression.optin.tokens import (
    MergedTokens,
    merge_tokens,
    optin_patch_scores,
    search_tokens,
    token_macs,
)

__all__ = [
    "BudgetError",
    "LatencyResult",
    "MacModel",
    "MergedTokens",
    "OptinConfig",
    "OptinScores",
    "PrunableSpec",
    "PruneMasks",
    "PruneReport",
    "apply_masks",
    "balance",
    "baseline_scores",
    "find_blocks",
    "kl_loss",
    "load_pruned",
    "manifold_loss",
    "mean_loss",
    "merge_tokens",
    "optin_patch_scores",
    "optin_scores",
    "patch_loss",
    "prune",
    "rebalanced",
    "removal_damage",
    "save_pruned",
    "search_latency",
    "search_masks",
    "search_tokens",
    "seconds_per_batch",
    "squared_loss",
    "token_macs",
    "tune_masks",
]

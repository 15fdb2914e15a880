"""SentinelLMs: a model that reads keyed hashes of sub-words, with its embedding matrix mirrored, moved and permuted.

Mishra, Li, Deo, "SentinelLMs: Encrypted Input Adaptation and Fine-tuning of Language Models for Private and Secure
Inference", AAAI 2024, arXiv 2312.17342. Obfuscation that keeps readable text out of transport and logs; not
cryptography, as ``attacks`` shows.
"""

from torchgraft.text.sentinel.adaptation import SentinelReport, adapt, glide, permuted_rows, reflect
from torchgraft.text.sentinel.attacks import (
    TextAttack,
    frequency_attack,
    gram_fingerprint,
    known_plaintext_attack,
    recovery_attack,
)
from torchgraft.text.sentinel.keys import SentinelKey, pairwise_swaps, token_hash
from torchgraft.text.sentinel.tokenizer import SentinelTokenizer, encrypt_dataset
from torchgraft.text.sentinel.toy import toy_model, toy_reviews

__all__ = [
    "SentinelKey",
    "SentinelReport",
    "SentinelTokenizer",
    "TextAttack",
    "adapt",
    "encrypt_dataset",
    "frequency_attack",
    "glide",
    "gram_fingerprint",
    "known_plaintext_attack",
    "pairwise_swaps",
    "permuted_rows",
    "recovery_attack",
    "reflect",
    "token_hash",
    "toy_model",
    "toy_reviews",
]

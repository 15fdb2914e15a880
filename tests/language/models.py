"""Tiny random models of every family that the language room knows."""

from __future__ import annotations

from typing import Any

import torch
import transformers

SMALL: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24, "vocab_size": 40,
    "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2, "head_dim": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {}, "gpt_neox": {"rotary_pct": 0.5}, "llama": GROUPED, "mistral": GROUPED, "qwen2": GROUPED,
    "qwen3": GROUPED, "gemma": GROUPED, "gemma2": GROUPED, "gemma3_text": GROUPED, "phi": {}, "phi3": GROUPED,
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16}, "bert": {}, "roberta": {},
}  # fmt: skip
BIDIRECTIONAL = ("bert", "roberta")


def tiny(kind: str, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """A random model with weights large enough for every part to matter."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SMALL | CONFIGS[kind] | settings)
    kind_of = transformers.AutoModelForMaskedLM if kind in BIDIRECTIONAL else transformers.AutoModelForCausalLM
    model = kind_of.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.to(dtype)


def inputs() -> dict[str, torch.Tensor]:
    """Two rows of seven tokens."""
    ids = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Letters:
    """A tokenizer of one token for each character, as far as 40 characters go."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(c) % 37 for c in text]}

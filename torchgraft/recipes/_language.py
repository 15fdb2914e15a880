"""What recipes on language models share."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from torchgraft import zoo
from torchgraft.language.set_based_prompting import toy_model


@lru_cache(maxsize=1)
def language_model(name: str, dtype: str = "float32", device: str = "cpu") -> tuple[Any, Any]:
    """Model and tokenizer: a name of the zoo, ``toy`` (small, random weights), a folder, or a name on the hub."""
    if name == "toy":
        model, tokenizer = toy_model()
        return model.to(device, getattr(torch, dtype)), tokenizer
    if name in zoo.MODELS:
        return zoo.load(name, dtype=getattr(torch, dtype), device=device)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype)).to(device).eval()
    return model, AutoTokenizer.from_pretrained(name)

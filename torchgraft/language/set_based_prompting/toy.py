"""A decoder that needs no download, to try calls with."""

from __future__ import annotations

from typing import Any

import torch


def toy_model(layers: int = 2, width: int = 32, seed: int = 0) -> tuple[Any, Any]:
    """A small Llama with random weights and a tokenizer of single bytes: what it says means nothing.

    Its weights are large enough that the order of a plain prompt changes its answers.

    Args:
        layers: of the decoder.
        width: hidden size, a multiple of 4.
        seed: of the weights; the global generator is left alone.

    Returns:
        ``(model, tokenizer)``, the model in eval mode.

    Raises:
        ValueError: a width that is no multiple of 4.

    Example:
        >>> model, tokenizer = toy_model()
        >>> tokenizer("hé")["input_ids"] == [ord("h"), *"é".encode()]
        True
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    if width < 4 or width % 4:
        raise ValueError(f"width must be a positive multiple of 4, got {width}")
    vocabulary = {letter: byte for byte, letter in bytes_to_unicode().items()} | {"<end>": 256}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<end>")
    config = LlamaConfig(
        vocab_size=257, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=2048, initializer_range=0.3,
        bos_token_id=None, eos_token_id=256, pad_token_id=256,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    return model.eval(), tokenizer

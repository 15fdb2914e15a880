"""A small language of twenty sentences' worth of words, with tokenizers of three kinds and random models for them."""

from __future__ import annotations

import random
from typing import Any, Literal

import torch

__all__ = ["toy_model", "toy_reviews"]

_GOOD = ["good", "great", "funny", "moving", "clever", "warm", "bright", "lovely", "superb", "charming"]
_BAD = ["bad", "dull", "weak", "boring", "clumsy", "cold", "bleak", "awful", "tedious", "lifeless"]
_THING = ["film", "story", "plot", "cast", "script", "movie", "drama", "comedy", "scene", "ending"]
_OPENING = ["this is a", "what a", "we saw a", "here comes a", "it remains a", "they made a"]
_SPECIAL = {
    "bert": {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"},
    "roberta": {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"},
    "llama": {"pad": "<pad>", "bos": "<s>", "eos": "</s>", "unk": "<unk>"},
}


def toy_reviews(count: int, seed: int) -> tuple[list[str], torch.Tensor]:
    """Made-up sentences of praise and blame, and labels (1 for praise)."""
    draw = random.Random(seed)
    texts, labels = [], []
    for _ in range(count):
        label = draw.randrange(2)
        words = _GOOD if label else _BAD
        texts.append(f"{draw.choice(_OPENING)} {draw.choice(words)} {draw.choice(_THING)} , {draw.choice(words)} .")
        labels.append(label)
    return texts, torch.tensor(labels)


def _tokenizer(kind: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    names = {f"{name}_token": token for name, token in _SPECIAL[kind].items()}
    special = list(names.values())
    corpus, unk = toy_reviews(400, 0)[0], names["unk_token"]
    kinds: Any = {"vocab_size": 150, "special_tokens": special, "show_progress": False}
    if kind == "bert":
        made = Tokenizer(models.WordPiece(unk_token=unk))
        made.normalizer, made.pre_tokenizer = (
            normalizers.BertNormalizer(lowercase=True),
            pre_tokenizers.BertPreTokenizer(),
        )
        made.train_from_iterator(corpus, trainers.WordPieceTrainer(**kinds))
        made.decoder = decoders.WordPiece()
        around = ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1")
    elif kind == "roberta":
        made = Tokenizer(models.BPE(unk_token=unk))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        made.train_from_iterator(corpus, trainers.BpeTrainer(**kinds | {"vocab_size": 350}, initial_alphabet=alphabet))
        made.decoder = decoders.ByteLevel()
        around = ("<s> $A </s>", "<s> $A </s> </s> $B </s>")
    else:
        made = Tokenizer(models.BPE(unk_token=unk, byte_fallback=True))
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        made.train_from_iterator(corpus, trainers.BpeTrainer(**kinds))
        made.decoder = decoders.Metaspace()
        around = ("<s> $A", "<s> $A <s> $B")
    places = [(token, made.token_to_id(token)) for token in special]
    made.post_processor = processors.TemplateProcessing(single=around[0], pair=around[1], special_tokens=places)
    return PreTrainedTokenizerFast(tokenizer_object=made, **names, model_max_length=64)


def toy_model(kind: Literal["bert", "roberta", "llama"], head: str = "", **settings: Any) -> tuple[Any, Any]:
    """A small random model in eval mode, and its tokenizer, made here and now.

    Args:
        kind: ``bert`` (WordPiece), ``roberta`` (byte-level BPE) or ``llama`` (SentencePiece-like BPE).
        head: of transformers' automatic classes, for instance ``"ForSequenceClassification"``; none by default.
        settings: of the configuration, in place of ours.
    """
    import transformers

    tokenizer = _tokenizer(kind)
    ids = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id", None) for n in ("pad", "bos", "eos")}
    sizes = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "max_position_embeddings": 80, "initializer_range": 0.2,
    }  # fmt: skip
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **sizes | ids | settings)
    return getattr(transformers, f"AutoModel{head}").from_config(config).eval(), tokenizer

"""The client's side: sub-words turned into hashes, and the tokenizer that a server needs for them."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchgraft.text.sentinel.keys import SentinelKey

__all__ = ["SentinelTokenizer", "encrypt_dataset"]

_HASH = re.compile(r"[0-9a-f]{32}")
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
Readable = str | tuple[str, str] | list[str]


def special_ids(tokenizer: Any) -> dict[int, str]:
    """Ids and strings that stay as they are: the named special tokens, and added ones flagged special."""
    flagged = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    return dict(sorted((flagged | named).items()))


def _check_tokenizer(tokenizer: Any) -> None:
    if not getattr(tokenizer, "is_fast", False) or getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ValueError(
            f"tokenizer must be a fast tokenizer of transformers, got {type(tokenizer).__name__}; "
            "take AutoTokenizer's, or convert the slow one with transformers.convert_slow_tokenizer"
        )
    if tokenizer.unk_token is None:
        raise ValueError(
            "tokenizer has no unk_token, which the server needs for hashes it does not know; choose a special token "
            "that it has, for instance tokenizer.unk_token = tokenizer.eos_token"
        )
    words = [t for t in tokenizer.get_vocab() if len(t) >= 32]
    if sum(_HASH.fullmatch(t) is not None for t in words) > len(tokenizer.get_vocab()) // 2:
        raise ValueError("tokenizer has a vocabulary of hashes already; give the original one")
    for token in special_ids(tokenizer).values():
        if re.fullmatch(r"[0-9a-f\s]*", token):
            raise ValueError(f"tokenizer has the special token {token!r}, which could stand inside a hash; rename it")


class SentinelTokenizer:
    """Turns text into keyed hashes, and ids that a server sends back into text. Stays with the client.

    The original tokenizer cuts the text; every sub-word that is not a special token becomes the keyed hash of its
    vocabulary string, marker (``##``, ``Ġ``, ``▁``) included; hashes are joined by spaces (section 3.1). The server's
    ids are a permutation of the original ones that leaves special tokens in place (section 3.3).

    This is a substitution of words, not encryption in a cryptographer's sense: equal words have equal hashes, so
    lengths, repetitions and frequencies stay visible, and whoever sees some texts beside their hashes can read those
    words from then on. See ``torchgraft.text.sentinel.attacks``.

    Special tokens written out in a text, such as ``[SEP]``, are special tokens here as they are in the original
    tokenizer, and stay readable. It holds the way from hashes to words, so like the key it cannot be pickled.

    Args:
        tokenizer: fast tokenizer of the pretrained model (WordPiece, byte-level BPE, SentencePiece, …).
        key: the key.
        shuffle: whether ids are permuted; as in ``adapt``.

    Raises:
        ValueError: for a slow tokenizer, one without ``unk_token``, one of hashes already, a special token that could
            stand inside a hash, or two tokens with the same hash.

    Example:
        >>> from torchgraft.text.sentinel import toy_model
        >>> _, tokenizer = toy_model("bert")
        >>> client = SentinelTokenizer(tokenizer, SentinelKey("a long random passkey"))
        >>> sent = client.encrypt("a good film")
        >>> len(sent.split()), "good" in sent
        (3, False)
        >>> server = client.as_server_tokenizer()
        >>> client.decrypt_ids(server(sent)["input_ids"])
        'a good film'
    """

    def __init__(self, tokenizer: Any, key: SentinelKey, *, shuffle: bool = True) -> None:
        if not isinstance(key, SentinelKey):
            raise TypeError(f"key must be a SentinelKey, got {type(key).__name__}")
        _check_tokenizer(tokenizer)
        vocabulary = {i: token for token, i in tokenizer.get_vocab().items()}
        special = special_ids(tokenizer)
        self.tokenizer = tokenizer
        self.shuffle = shuffle
        self.special = special
        self._readable = frozenset(special.values())
        self._key = key
        places = sorted(vocabulary)
        hashed = key.token_hashes([vocabulary[i] for i in places])
        self._hashes = {i: special.get(i, one) for i, one in zip(places, hashed, strict=True)}
        self._ids = {text: i for i, text in self._hashes.items()}
        if len(self._ids) != len(self._hashes):
            raise ValueError("tokenizer has two tokens with the same hash; use another passkey or context")
        moved = key.reindexed([i for i in vocabulary if i not in special]) if shuffle else {}
        size = max(vocabulary) + 1
        self.permutation = torch.tensor([moved.get(i, i) for i in range(size)])
        self._inverse = torch.argsort(self.permutation)

    @classmethod
    def from_pretrained(cls, tokenizer: Any, key: SentinelKey, *, shuffle: bool = True) -> SentinelTokenizer:
        """From a tokenizer, or from a name or folder that ``AutoTokenizer`` knows."""
        if isinstance(tokenizer, str):
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        return cls(tokenizer, key, shuffle=shuffle)

    def __repr__(self) -> str:
        return f"SentinelTokenizer({type(self.tokenizer).__name__}, {len(self._hashes)} tokens, key hidden)"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a SentinelTokenizer is not pickled: it holds what turns hashes back into words")

    def __copy__(self) -> SentinelTokenizer:
        return SentinelTokenizer(self.tokenizer, self._key, shuffle=self.shuffle)

    def __deepcopy__(self, memo: dict[int, Any]) -> SentinelTokenizer:
        return SentinelTokenizer(copy.deepcopy(self.tokenizer, memo), self._key, shuffle=self.shuffle)

    def encrypt(self, text: Readable) -> Any:
        """Hash one text.

        Args:
            text: a string; a pair ``(a, b)`` of strings; or a list of words, as for labelling tokens.

        Returns:
            For a string, its hashes joined by spaces; for a pair, two such strings; for words, a list with one string
            a word (a word of several sub-words holds several hashes; of none, an empty string), to be given to the
            server's tokenizer with ``is_split_into_words=True``, whose ``word_ids()`` are then the original ones.

        Raises:
            TypeError: for anything else.
            ValueError: when the text consists of hashes already.
        """
        return self.encrypt_batch([text])[0]

    def encrypt_batch(self, texts: Sequence[Readable]) -> list[Any]:
        """Hash many texts at once, which is faster; each as in ``encrypt``."""
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            raise TypeError(f"texts must be a sequence of texts, got {type(texts).__name__}; for one, use encrypt")
        flat: list[str] = []
        words: list[list[str]] = []
        for text in texts:
            strings, kind = _strings(text)
            self._check_readable(strings)
            if kind == "words":
                words.append(strings)
            else:
                flat.extend(strings)
        plain = iter(self._hash_strings(flat))
        split = iter(self._hash_words(words))
        return [
            (next(plain), next(plain)) if isinstance(text, tuple) else next(split if isinstance(text, list) else plain)
            for text in texts
        ]

    def _check_readable(self, strings: Sequence[str]) -> None:
        hashed = False
        for text in strings:
            for part in text.split():
                if _HASH.fullmatch(part):
                    hashed = True
                elif part not in self._readable:
                    return
        if hashed:
            raise ValueError("text is encrypted already: it consists of 32-character hashes; give the readable text")

    def _encode(self, texts: Any, **how: Any) -> Any:
        return self.tokenizer(
            texts, add_special_tokens=False, padding=False, truncation=False, return_attention_mask=False,
            return_token_type_ids=False, verbose=False, **how,
        )  # fmt: skip

    def _hash_strings(self, texts: list[str]) -> list[str]:
        if not texts:
            return []
        hashes = self._hashes
        return [" ".join([hashes[i] for i in ids]) for ids in self._encode(texts)["input_ids"]]

    def _hash_words(self, texts: list[list[str]]) -> list[list[str]]:
        filled = [words for words in texts if words]
        encoded: Any = self._encode(filled, is_split_into_words=True) if filled else None
        found, row = [], 0
        for words in texts:
            pieces: list[list[str]] = [[] for _ in words]
            if words:
                for i, place in zip(encoded["input_ids"][row], encoded.word_ids(row), strict=True):
                    pieces[place].append(self._hashes[i])
                row += 1
            found.append([" ".join(p) for p in pieces])
        return found

    def as_server_tokenizer(self) -> Any:
        """The tokenizer of the hosted model, a ``PreTrainedTokenizerFast`` over hashes.

        It splits at spaces and looks hashes up; unknown ones become ``unk_token``. Special tokens, their ids, the
        template around a text, padding side, truncation side and largest length are the original's. There is no
        normalizer, no merge table and no chat template in it. Save it with ``save_pretrained``; load it with
        ``AutoTokenizer.from_pretrained``, or with ``PreTrainedTokenizerFast.from_pretrained`` where transformers
        forces a tokenizer class on the model's type (Qwen2, Phi-3 and some others).
        """
        from tokenizers import AddedToken, Tokenizer
        from tokenizers.models import WordLevel
        from tokenizers.pre_tokenizers import WhitespaceSplit
        from transformers import PreTrainedTokenizerFast

        base = self.tokenizer
        new_ids = self.permutation.tolist()
        # written to file in the order of the new ids, which does not tell the original ones
        vocabulary = {text: new_ids[i] for i, text in self._hashes.items()}
        server = Tokenizer(WordLevel(vocabulary, unk_token=base.unk_token))
        server.pre_tokenizer = WhitespaceSplit()
        if (post := base.backend_tokenizer.post_processor) is not None:
            server.post_processor = post
        server.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in self.special.values()])
        named = {name: str(token) for name in _NAMED if (token := getattr(base, name, None)) is not None}
        others = [t for t in self.special.values() if t not in named.values()]
        return PreTrainedTokenizerFast(
            tokenizer_object=server,
            **named,
            extra_special_tokens=others,
            model_max_length=base.model_max_length,
            padding_side=base.padding_side,
            truncation_side=base.truncation_side,
            model_input_names=list(base.model_input_names),
            clean_up_tokenization_spaces=False,
        )

    def check(self, server_tokenizer: Any) -> None:
        """Raise when a server's tokenizer was not made with this key from this tokenizer.

        Raises:
            ValueError: saying whether the hashes or only their ids differ.
        """
        if not hasattr(server_tokenizer, "get_vocab"):
            raise TypeError(f"server_tokenizer must be a tokenizer, got {type(server_tokenizer).__name__}")
        theirs = server_tokenizer.get_vocab()
        new_ids = self.permutation.tolist()
        mine = {text: new_ids[i] for i, text in self._hashes.items()}
        hashes = [text for i, text in self._hashes.items() if i not in self.special]
        known = sum(text in theirs for text in hashes)
        if known < len(hashes):
            raise ValueError(
                f"wrong key or wrong tokenizer: the server knows {known} of the {len(hashes)} hashes of this client"
            )
        if mine != theirs:
            raise ValueError("the server's ids differ from this client's; was shuffle= the same on both sides?")

    def restore_ids(self, ids: Any) -> Tensor:
        """Original ids from the server's: a tensor, array or list of any shape.

        Raises:
            TypeError: for numbers that are not whole.
            ValueError: for ids that no token has.
        """
        given = torch.as_tensor(ids)
        if given.numel() and (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool):
            raise TypeError(f"ids must be whole numbers, got {given.dtype}")
        if given.numel() and not (int(given.min()) >= 0 and int(given.max()) < len(self._inverse)):
            raise ValueError(f"ids must lie in 0..{len(self._inverse) - 1}, got {int(given.min())}..{int(given.max())}")
        return self._inverse[given.long().cpu()]

    def decrypt_ids(self, ids: Any, skip_special_tokens: bool = True) -> Any:
        """Text of ids that the server gave, for instance of ``generate``.

        Another key's ids give other words, and no error: compare keys with ``check`` first.

        Args:
            ids: one row of ids, or a batch: a tensor or array (batch, length) or a list of rows.
            skip_special_tokens: leave special tokens out.

        Returns:
            A string, or a list of them for a batch.

        Raises:
            TypeError: for numbers that are not whole.
            ValueError: for ids that no token has.
        """
        if isinstance(ids, (list, tuple)) and ids and not isinstance(ids[0], int):
            return [self.decrypt_ids(row, skip_special_tokens) for row in ids]  # rows may differ in length
        restored = self.restore_ids(ids)
        if restored.ndim == 0:
            raise TypeError("ids must be a row of ids or a batch of rows, got a single number")
        if restored.ndim > 1:
            return [self.decrypt_ids(row, skip_special_tokens) for row in ids]
        return self.tokenizer.decode(restored.tolist(), skip_special_tokens=skip_special_tokens)

    def decrypt(self, text: str, skip_special_tokens: bool = True) -> str:
        """Text of a string of hashes, for instance of one that was stored.

        Raises:
            ValueError: for a hash that this key did not make.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, got {type(text).__name__}")
        parts = text.split()
        strange = [part for part in parts if part not in self._ids]
        if strange:
            raise ValueError(
                f"wrong key: {len(strange)} of {len(parts)} words are no hashes of this key, first {strange[0]!r}"
            )
        return self.tokenizer.decode([self._ids[part] for part in parts], skip_special_tokens=skip_special_tokens)

    def truth(self) -> dict[str, int]:
        """Original id of every hash, special tokens left out: what an attack tries to find, for measuring it."""
        return {text: i for text, i in self._ids.items() if i not in self.special}


def _strings(text: Any) -> tuple[list[str], str]:
    if isinstance(text, str):
        return [text], "text"
    if isinstance(text, tuple) and len(text) == 2 and all(isinstance(t, str) for t in text):
        return list(text), "pair"
    if isinstance(text, list) and all(isinstance(t, str) for t in text):
        return text, "words"
    raise TypeError(f"text must be a str, a pair (str, str) or a list of words, got {type(text).__name__}")


def encrypt_dataset(dataset: Any, fields: Sequence[str], client: SentinelTokenizer, **how: Any) -> Any:
    """Hash the named text columns of a dataset of the ``datasets`` library; other columns, labels too, stay.

    A column holds strings or lists of words. The result is not looked up in the library's cache and its name there
    does not depend on the key.

    Args:
        dataset: ``Dataset``, ``IterableDataset``, or a ``DatasetDict`` of them.
        fields: names of the columns, for instance ``("sentence1", "sentence2")``.
        client: the client's tokenizer.
        how: further arguments of the dataset's ``map``; not ``batched``, which is on, and not ``num_proc``, for which
            the key would have to be pickled.

    Raises:
        TypeError: when the client or the dataset is of another kind, or a column holds no texts.
        ValueError: when a column does not exist, naming those that do; for ``num_proc`` above 1.
    """
    import uuid

    import datasets

    if not isinstance(client, SentinelTokenizer):
        raise TypeError(f"client must be a SentinelTokenizer, got {type(client).__name__}")
    if isinstance(fields, str) or not fields:
        raise ValueError(f"fields must be a sequence of column names, got {fields!r}")
    if how.get("num_proc") not in (None, 1):
        raise ValueError("num_proc must be 1: the key is not handed to other processes")
    if "batched" in how:
        raise ValueError("batched is on already and cannot be set; batch_size can")
    if isinstance(dataset, Mapping):
        splits: Any = type(dataset)
        return splits({name: encrypt_dataset(part, fields, client, **how) for name, part in dataset.items()})
    if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        raise TypeError(
            f"dataset must be a Dataset, IterableDataset or dictionary of them, got {type(dataset).__name__}"
        )
    columns = dataset.column_names  # a stream may not know its own
    if columns is not None and (missing := [name for name in fields if name not in columns]):
        raise ValueError(f"fields: there is no column {missing[0]!r}; the dataset has {columns}")

    def hashed(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        return {name: client.encrypt_batch(batch[name]) for name in fields}

    if isinstance(dataset, datasets.Dataset):
        how = {"load_from_cache_file": False, "new_fingerprint": uuid.uuid4().hex} | how
    return dataset.map(hashed, batched=True, **how)

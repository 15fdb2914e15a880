"""Continue prompts that contain sets.

The model itself is not touched: its prompt pass over all tokens but the last fills a cache, and transformers' own
`generate` goes on from there. The last token of a prompt and all new ones attend to everything, which an ordinary mask
of padding says, and their positions are given.

That is one decoding step more than `generate` on a plain prompt takes, whose prompt pass gives the first new token too.
To save it, the model's forward would have to be hooked while it generates, which other threads would feel.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from torchgraft.language.set_based_prompting.encoding import (
    PADDING,
    SET_BASED,
    Editing,
    Part,
    additive_mask,
    cache_name,
    collate,
    elements_of,
    is_text,
    lay_out,
    padding_token,
    run,
    tokenize,
    with_mask,
)
from torchgraft.language.set_based_prompting.prompts import Set, SetPrompt
from torchgraft.language.set_based_prompting.support import check_model

KeysValues = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer, [B, heads, tokens, width] each."""

_RESERVED = {
    "input_ids": "give prompts",
    "inputs": "give prompts",
    "inputs_embeds": "give prompts",
    "attention_mask": "it is made from the prompts",
    "position_ids": "they are made from the prompts",
    "past_key_values": "use store= to re-use elements",
    "cache": "use store= to re-use elements",
    "cache_implementation": "a dynamic cache is filled by the prompt pass",
    "assistant_model": "assisted decoding reads the prompt in its flat order",
    "prompt_lookup_num_tokens": "it copies n-grams from the flat prompt, which depends on the order",
    "custom_generate": "only transformers' own decoding is supported",
}


class ElementStore:
    """Keys and values of elements, kept for prompts that share them: documents of a retrieval corpus, for instance.

    What an element of the first set computes depends on the text before the set and on itself alone, so that it is
    the same in every prompt that starts with that text. Pass the store to `generate`; nothing is thrown away until
    `clear`.

    Args:
        model: the store belongs to this model.

    Attributes:
        hits: elements that were found.
        misses: elements that had to be computed.
    """

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)
        self._kept: dict[Hashable, KeysValues] = {}
        self.hits = 0
        self.misses = 0

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()

    def belongs_to(self, model: Any) -> bool:
        """Whether this store was made for that very model."""
        return self._model() is model


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[SetPrompt],
    *,
    editing: Editing = SET_BASED,
    store: ElementStore | None = None,
    return_tensors: Literal["pt"] | None = None,
    **generation_kwargs: Any,
) -> Any:
    """Continue each prompt; with the default ``editing`` the result does not depend on the order of any set.

    Greedy search, sampling, beam search, stopping criteria and logits processors are transformers' own: every keyword
    of ``model.generate`` that does not read the prompt's flat order is passed on. The prompt is computed once, not once
    per beam. New tokens continue the positions of the suffix (the official GPT-2 path falls back to the flat
    length after the first new token; its Llama path and this one follow the paper).

    Args:
        model: a transformers decoder in eval mode, see `check_model`. It is not changed.
        tokenizer: its tokenizer.
        prompts: each must end with text.
        editing: Set-Based Prompting, or an ablation. For bit-equal output see ``canonical`` of `Editing`.
        store: compute the elements of every set as a batch of their own that shares the cache of what stands before
            it, and keep them for the next call. Exact, and for long sets without the empty blocks of the mask.
        return_tensors: ``"pt"`` gives the ids of the new tokens [B · num_return_sequences, T].
        **generation_kwargs: of ``model.generate``, such as ``max_new_tokens``, ``do_sample``, ``num_beams``.

    Returns:
        The continuations as strings, or as ids, or, with ``return_dict_in_generate=True``, transformers' own output
        (whose sequences begin with the left-padded prompt in flat order).

    Raises:
        TypeError: ``prompts`` is no list of `SetPrompt`.
        ValueError: a model that cannot do this, a prompt that ends with a set, a keyword that this function fills
            itself or that depends on the flat order, or a store with an ablation or of another model.

    Example:
        >>> answers = generate(model, tokenizer, [prompt], max_new_tokens=5)  # doctest: +SKIP
    """
    for name, why in _RESERVED.items():
        if generation_kwargs.get(name) is not None:
            raise ValueError(f"{name} cannot be given: {why}")
    if return_tensors not in (None, "pt"):
        raise ValueError(f"return_tensors must be 'pt' or None, got {return_tensors!r}")
    check_model(model)
    setting = _settings(model, generation_kwargs)
    if setting("use_cache") is False:
        raise ValueError("use_cache=False would drop the edited prompt pass after the first token; leave it out")
    for name in ("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"):
        if (setting(name) or 0) > 1:
            raise ValueError(
                f"{name} bans n-grams found in the flat prompt, across elements too, so that the result would depend "
                "on the order; repetition_penalty does not"
            )
    given = generation_kwargs.get("generation_config")
    for name in ("prompt_lookup_num_tokens", "cache_implementation"):
        if getattr(given, name, None) is not None:
            raise ValueError(f"{name} of generation_config cannot be given: {_RESERVED[name]}")
    if store is not None and not store.belongs_to(model):
        raise ValueError("store was made for another model; make one with ElementStore(model)")
    if store is not None and (not (editing.mask and editing.positions) or editing.pad_elements):
        raise ValueError("store works with Set-Based Prompting only, not with its ablations or the padded variant")
    tokens = tokenize(tokenizer, prompts, editing)
    check_suffix(prompts)
    filler = padding_token(tokenizer)
    batch = collate([lay_out(parts, editing, filler) for parts in tokens], filler)
    new = _new_tokens(setting, batch["input_ids"].shape[1])
    check_model(
        model,
        length=batch["input_ids"].shape[1] + new,
        last_position=int(batch["position_ids"].max()) + new - 1,
    )
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    if store is None:
        before = {name: tensor[:, :-1] for name, tensor in batch.items()}
        cache = prompt_pass(model, before, editing)
    else:
        cache = _stacked([_by_element(model, parts, store) for parts in tokens])
    copies = max(setting("num_beams") or 1, setting("num_return_sequences") or 1)
    if copies > 1:
        cache.batch_repeat_interleave(copies)
    if setting("stop_strings") is not None:
        generation_kwargs.setdefault("tokenizer", tokenizer)
    if setting("pad_token_id") is None:
        generation_kwargs["pad_token_id"] = filler
    found = model.generate(
        batch["input_ids"],
        attention_mask=(batch["set_ids"] != PADDING).long(),
        position_ids=batch["position_ids"],
        **{cache_name(model): cache},
        **generation_kwargs,
    )
    if not torch.is_tensor(found):
        return found
    fresh = found[:, batch["input_ids"].shape[1] :]
    return fresh if return_tensors == "pt" else tokenizer.batch_decode(fresh, skip_special_tokens=True)


def check_suffix(prompts: Sequence[SetPrompt]) -> None:
    """A prompt that is continued must end with text."""
    for number, prompt in enumerate(prompts):
        if isinstance(prompt.parts[-1], Set):
            raise ValueError(
                f"prompts[{number}] ends with a set, whose tokens do not see the other elements; "
                "end it with text, such as 'Answer:'"
            )


def prompt_pass(model: Any, batch: dict[str, Tensor], editing: Editing) -> Any:
    """Cache of a collated batch, of transformers' ``DynamicCache``."""
    from transformers import DynamicCache

    # no config for the cache: layers with a sliding window would drop tokens by their flat index
    cache = DynamicCache()
    kwargs = {cache_name(model): cache, **_one_logit(model)}
    run(model, with_mask(batch, editing, model), use_cache=True, **kwargs)
    return cache


def _one_logit(model: Any) -> dict[str, int]:
    """The prompt pass is after keys and values; no need for logits of every token."""
    return {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}


def _settings(model: Any, kwargs: dict[str, Any]) -> Any:
    """Look a generation setting up where transformers does: keyword, given config, the model's config."""
    sources = (
        kwargs.get("generation_config"),
        model.generation_config if hasattr(model, "generation_config") else None,
    )

    def setting(name: str) -> Any:
        if kwargs.get(name) is not None:
            return kwargs[name]
        return next((v for s in sources if s is not None and (v := getattr(s, name, None)) is not None), None)

    return setting


def _new_tokens(setting: Any, prompt_length: int) -> int:
    """How many tokens may come, by the rule of transformers: ``max_new_tokens`` first, then ``max_length``, then 20."""
    if setting("max_new_tokens") is not None:
        return setting("max_new_tokens")
    return 20 if setting("max_length") is None else max(1, setting("max_length") - prompt_length)


def _by_element(model: Any, parts: Sequence[Part], store: ElementStore) -> KeysValues:
    """Keys and values of a prompt but its last token, text by text and element by element."""
    last = elements_of(parts[-1])[0][:-1]
    cache: KeysValues = []
    position = 0
    path: tuple[Hashable, ...] = ()
    for part in [*parts[:-1], *([last] if last else [])]:
        elements = [tuple(element) for element in elements_of(part)]
        if is_text(part):
            cache = _extend(model, cache, elements, position)[0]
            path = (*path, elements[0])
            position += len(part)
            continue
        missing = [element for element in dict.fromkeys(elements) if (path, element) not in store._kept]
        store.hits += len(elements) - len(missing)
        store.misses += len(missing)
        if missing:
            for element, extended in zip(missing, _extend(model, cache, missing, position), strict=True):
                seen = cache[0][0].shape[2] if cache else 0
                store._kept[path, element] = [(k[:, :, seen:].clone(), v[:, :, seen:].clone()) for k, v in extended]
        pieces = [store._kept[path, element] for element in elements]
        pieces = [cache, *pieces] if cache else pieces
        cache = [
            (torch.cat([k for k, _ in layer], dim=2), torch.cat([v for _, v in layer], dim=2))
            for layer in zip(*pieces, strict=True)
        ]
        # what follows sees these elements as a multiset, so the order is no part of the key
        path = (*path, tuple(sorted(elements)))
        position += max(map(len, elements))
    return cache


def _extend(model: Any, cache: KeysValues, texts: Sequence[Sequence[int]], start: int) -> list[KeysValues]:
    """Run every text after the same cache, as a batch; the cache of each, ``[1, heads, seen + len, width]``."""
    from transformers import DynamicCache

    count, width = len(texts), max(map(len, texts))
    shared = DynamicCache([(k.expand(count, -1, -1, -1), v.expand(count, -1, -1, -1)) for k, v in cache] or None)
    seen = cache[0][0].shape[2] if cache else 0
    ids = torch.tensor([[*text, *[text[-1]] * (width - len(text))] for text in texts], device=model.device)
    positions = torch.arange(start, start + width, device=model.device).expand(count, -1)
    # filled up on the right: under a causal mask the filling is seen by nobody, and it is cut off below
    allowed = torch.ones(count, width, seen + width, dtype=torch.bool, device=model.device).tril(seen)
    model(
        input_ids=ids,
        position_ids=positions,
        attention_mask=additive_mask(allowed, model.dtype),
        use_cache=True,
        **{cache_name(model): shared},
        **_one_logit(model),
    )
    return [
        [
            (layer.keys[i : i + 1, :, : seen + len(text)], layer.values[i : i + 1, :, : seen + len(text)])
            for layer in shared.layers
        ]
        for i, text in enumerate(texts)
    ]


def _stacked(caches: Sequence[KeysValues]) -> Any:
    """One cache of many prompts, padded on the left."""
    from transformers import DynamicCache

    longest = max(cache[0][0].shape[2] for cache in caches)

    def pad(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, longest - x.shape[2], 0))

    return DynamicCache(
        [
            (torch.cat([pad(k) for k, _ in layer]), torch.cat([pad(v) for _, v in layer]))
            for layer in zip(*caches, strict=True)
        ]
    )

"""Which models can be prompted with sets, and a clear word where one cannot."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from torchgraft.language.set_based_prompting.encoding import (
    MASK_ONLY,
    PLAIN,
    POSITIONS_ONLY,
    SET_BASED,
    Editing,
    collate,
    forward_arguments,
    lay_out,
    run,
    with_mask,
)

_PROBED: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()


def check_model(model: Any, *, length: int | None = None, last_position: int | None = None) -> None:
    """Refuse a model whose positions or attention mask cannot be set per token.

    First by what its config says, then, once per model, by trying: eight tokens, two orders of a small set, and the
    answer must not change while the plain prompt's does.

    Args:
        model: a transformers decoder with a language-modelling head, in eval mode.
        length: tokens in the longest row, generated ones included. A sliding or chunked attention window is accepted
            as long as this fits into it, for then it hides nothing.
        last_position: greatest position id that will be used.

    Raises:
        TypeError: no transformers model with a config.
        ValueError: encoder-decoder, encoder-only, ALiBi or other positions that cannot be given, layers without
            attention, a window shorter than the prompt, a flash-attention backend, a position beyond the model's
            last, training mode, or a model that failed the trial. The message says what would work.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise TypeError(f"model must be a transformers causal language model, got {type(model).__name__}")
    name = type(model).__name__
    decoders = "use a decoder with learned or rotary positions: GPT-2, Llama, Mistral, Qwen, Gemma, SmolLM, Phi, …"
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"model: {name} is an encoder-decoder, whose encoder has no causal mask to edit; {decoders}")
    text = config.get_text_config(decoder=True)
    family = str(getattr(config, "model_type", ""))
    attention = getattr(text, "attn_config", None)
    if getattr(text, "alibi", False) or getattr(attention, "alibi", False) or family in ("bloom", "mpt"):
        raise ValueError(
            f"model: {name} uses ALiBi, which reads distances off the flat order of the tokens, so that positions "
            f"cannot be given; {decoders}"
        )
    if not model.can_generate():
        raise ValueError(f"model: {name} cannot generate (encoder-only, or without a head); {decoders}")
    if "position_ids" not in forward_arguments(model):
        raise ValueError(f"model: {name}.forward takes no position_ids; {decoders}")
    backend = str(getattr(config, "_attn_implementation", "eager"))
    if any(word in backend for word in ("flash", "paged")):
        raise ValueError(
            f"model: attention backend {backend!r} cannot take an arbitrary mask; "
            "call model.set_attn_implementation('sdpa') (or 'eager', 'flex_attention')"
        )
    if model.training:
        raise ValueError("model is in training mode, where dropout makes every pass different; call model.eval()")
    _check_layers(text, name, length)
    limit = getattr(text, "max_position_embeddings", None)
    if limit is not None and last_position is not None and last_position >= limit:
        raise ValueError(
            f"prompts: position {last_position} is needed, {name} has {limit} (0..{limit - 1}); "
            "shorten the prompt or ask for fewer new tokens"
        )
    if backend not in _PROBED.setdefault(model, set()):
        _probe(model, name)
        _PROBED[model].add(backend)


def _check_layers(config: Any, name: str, length: int | None) -> None:
    """Refuse layers that do not attend by mask, and windows that would hide a part of the prompt."""
    windows = {
        "sliding_attention": "sliding_window",
        "chunked_attention": "attention_chunk_size",
        "local_attention": "window_size",
    }
    kinds = set(getattr(config, "layer_types", None) or ())
    if "local" in (getattr(config, "attention_layers", None) or ()):  # how GPT-Neo says it
        kinds = {"local_attention"}
    if not kinds:
        active = getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None)
        kinds = {"sliding_attention"} if active else {"full_attention"}
    strange = kinds - {"full_attention", *windows}
    if strange:
        raise ValueError(
            f"model: {name} has layers of kind {sorted(strange)}, which carry a state through the flat order of the "
            "tokens; use a model whose layers all attend"
        )
    for kind in kinds & set(windows):
        window = getattr(config, windows[kind], None)
        if window is not None and length is not None and length > window:
            raise ValueError(
                f"model: {name} has a {kind.replace('_', ' ')} window of {window} tokens, counted along the "
                f"flat order, and this call needs {length}; shorten the prompt, or use a model with full attention"
            )


def _probe(model: Any, name: str) -> None:
    """Try it: two orders of a small set must give the same logits, and either edit must be heard."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    a, b, c, d, e, f, g = (1 + k * max(1, (vocabulary - 2) // 7) for k in range(7))

    def logits(editing: Editing) -> torch.Tensor:
        rows = [lay_out([[a], elements, [f, g]], editing, 0) for elements in ([[b, c], [d, e]], [[d, e], [b, c]])]
        return run(model, with_mask(collate(rows, 0), editing, model)).logits.double()

    try:
        with torch.no_grad():
            edited, plain = logits(SET_BASED), logits(PLAIN)
            # what is ignored changes not a single bit, however small a young model's logits are
            deaf = [
                kind
                for kind, editing in (("position ids", MASK_ONLY), ("attention mask", POSITIONS_ONLY))
                if torch.equal(edited, logits(editing))
            ]
            rows = [lay_out([[a], [[b, c], [d, e]], [f]], SET_BASED, 0)]
            out = run(model, with_mask(collate(rows, 0), SET_BASED, model), use_cache=True)
            seen = (out.get("cache") if "cache" in out else out.get("past_key_values")).get_seq_length()
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, NotImplementedError) as error:
        raise ValueError(f"model: {name} does not run with a 4-d mask, position ids and a cache: {error}") from error
    if deaf:
        raise ValueError(
            f"model: {name} ignores the {' and the '.join(deaf)} it is given; use a model with learned or rotary "
            "positions and full attention"
        )
    # what follows the set, the last two tokens, is where both orders have the same text
    change, usual = (float((x[0] - x[1])[-2:].abs().max()) for x in (edited, plain))
    rounding = 64 * torch.finfo(model.dtype).eps * float(edited.abs().max())
    if change > max(rounding, 0.1 * usual):
        raise ValueError(
            f"model: {name} ignores the attention mask or the position ids it is given: its logits change by "
            f"{change:.2g} with the order of a set (plain prompt: {usual:.2g}); use a model with learned or rotary "
            "positions and full attention"
        )
    if seen != 6:
        raise ValueError(f"model: {name} kept {seen} of 6 tokens in its cache; a model with a full cache is needed")

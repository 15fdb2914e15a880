"""Tests of the paper's explanation: does a model already rank the right response first, and what does tuning change."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from torchgraft.language._access import unwrapped
from torchgraft.language.implicit_instruction.formats import ChatFormat
from torchgraft.surgery import evaluating

Normalise = Literal["mean", "sum"]
Pair = tuple[str, str]


def response_scores(
    model: Any,
    tokenizer: Any,
    instruction: str,
    responses: Sequence[str],
    normalise: Normalise = "mean",
    chat: ChatFormat | None = None,
    share_prompt: bool = True,
) -> Float[Tensor, " k"]:
    """Log-probability of each response, with its EOS, to one instruction.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        instruction: text; "" for the empty one of response tuning.
        responses: texts, scored in one batch.
        normalise: ``mean`` divides by the number of tokens, as the official code does; ``sum`` is the log-probability
            that the paper writes.
        chat: the format; ``ChatFormat()`` where None.
        share_prompt: compute the prompt once and go on from its cache; False for models without such a cache.

    Returns:
        Nats (a token), float64.

    Raises:
        ValueError: for no responses, an unknown normalisation, a model that is not finite, or more tokens than the
            model has positions.

    Example:
        >>> from torchgraft.language.set_based_prompting import toy_model
        >>> response_scores(*toy_model(), "Name a colour.", ["Red", "Blue"]).shape
        torch.Size([2])
    """
    if isinstance(responses, str) or not responses:
        raise ValueError(f"responses must be a list of at least one text, got {responses!r}")
    if normalise not in ("mean", "sum"):
        raise ValueError(f"normalise must be 'mean' or 'sum', got {normalise!r}")
    chat = chat or ChatFormat()
    asked = {"role": "user", "content": instruction}
    prompt, _ = chat.prompt(tokenizer, [asked])
    rows = [
        chat.labels(tokenizer, [asked, {"role": "assistant", "content": text}])["input_ids"][len(prompt) :]
        for text in responses
    ]
    longest = max(map(len, rows))
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and len(prompt) + longest > positions:
        raise ValueError(f"instruction and response have {len(prompt) + longest} tokens, the model {positions} places")

    device = model.get_input_embeddings().weight.device
    head, last = torch.tensor([prompt[:-1]], device=device), prompt[-1]
    ids = torch.tensor([[last, *row, *[last] * (longest - len(row))] for row in rows], device=device)
    real = torch.arange(longest, device=device) < torch.tensor([[len(row)] for row in rows], device=device)
    with evaluating(model), torch.no_grad():
        logits = _logits(model, head, ids, real, share_prompt)
    # row by row: float64 logits of all at once would need twice the memory of the pass itself
    total = torch.stack(
        [
            row[some].double().log_softmax(-1).gather(-1, wanted[some, None]).sum()
            for row, wanted, some in zip(logits, ids[:, 1:], real, strict=True)
        ]
    )
    if not torch.isfinite(total).all():
        raise ValueError("model gave log-probabilities that are not finite")
    return total / real.sum(1) if normalise == "mean" else total


def _logits(model: Any, head: Tensor, ids: Tensor, real: Tensor, share_prompt: bool) -> Tensor:
    """Logits (K, L, V) of the responses' tokens; ``ids`` begin with the prompt's last token."""
    mask = torch.cat([real.new_ones(len(ids), head.shape[1] + 1), real], 1).long()[:, :-1]
    if not share_prompt or not head.shape[1]:
        whole = torch.cat([head.expand(len(ids), -1), ids[:, :-1]], 1)
        logits: Tensor = model(input_ids=whole, attention_mask=mask, use_cache=False).logits
        return logits[:, head.shape[1] :]
    known = inspect.signature(unwrapped(model).forward).parameters
    one = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    name = "cache" if "cache" in known else "past_key_values"  # transformers 5 changed the name on its way
    cache = getattr(model(input_ids=head, use_cache=True, **one), name, None)
    if cache is None or not hasattr(cache, "batch_repeat_interleave"):
        raise ValueError(f"{type(model).__name__} keeps no cache of keys and values; pass share_prompt=False")
    cache.batch_repeat_interleave(len(ids))
    found: Tensor = model(input_ids=ids[:, :-1], attention_mask=mask, use_cache=True, **{name: cache}).logits
    return found


def response_ranking(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[Pair],
    k: int = 5,
    normalise: Normalise = "mean",
    *,
    chat: ChatFormat | None = None,
    seed: int = 0,
    distractors: Sequence[Sequence[int]] | None = None,
    share_prompt: bool = True,
    progress: Callable[[float, float, str], None] | None = None,
) -> dict[str, Any]:
    """How often a model finds an instruction's response likelier than another instruction's (section 5.2).

    Ties count as wrong. The official code draws a distractor among all responses, now and then the right one itself;
    here never.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        pairs: instructions and responses.
        k: distractors of each, drawn without replacement.
        normalise, chat, share_prompt: as in ``response_scores``.
        seed: of the draw.
        distractors: for each pair the indices of others; drawn where None.
        progress: called with ``(done, total, note)``.

    Returns:
        ``accuracy``, the share of comparisons won; ``per_item`` (N,), that share of each pair; ``scores``
        (N, 1 + k), the right response first; ``distractors`` (N, k). NumPy arrays.

    Raises:
        ValueError: for fewer than two pairs, more distractors than there are, or distractors that name the pair
            itself or none at all.

    Example:
        >>> from torchgraft.language.set_based_prompting import toy_model
        >>> pairs = [("Name a colour.", "Red"), ("Name a city.", "Rome"), ("Count.", "One two")]
        >>> response_ranking(*toy_model(), pairs, k=2)["per_item"].shape
        (3,)
    """
    if len(pairs) < 2:
        raise ValueError(f"pairs must be at least two, got {len(pairs)}")
    if distractors is None:
        if not 1 <= k < len(pairs):
            raise ValueError(f"k must be 1 to {len(pairs) - 1}, the number of other pairs, got {k}")
        draw = np.random.default_rng(seed)
        others = [np.delete(np.arange(len(pairs)), i) for i in range(len(pairs))]
        chosen = np.array([draw.choice(other, k, replace=False) for other in others])
    else:
        chosen = np.array(distractors)
        own = np.arange(len(pairs))[:, None]
        if chosen.ndim != 2 or len(chosen) != len(pairs) or not chosen.shape[1] or chosen.dtype.kind not in "iu":
            raise ValueError(f"distractors must be one list of indices for each of {len(pairs)} pairs, equally long")
        if chosen.min() < 0 or chosen.max() >= len(pairs) or (chosen == own).any():
            raise ValueError(f"distractors must be indices 0..{len(pairs) - 1} of other pairs")
    scores = []
    for i, (instruction, response) in enumerate(pairs):
        candidates = [response, *(pairs[j][1] for j in chosen[i])]
        found = response_scores(model, tokenizer, instruction, candidates, normalise, chat, share_prompt)
        scores.append(found.cpu().numpy())
        if progress is not None:
            progress(i + 1, len(pairs), "pairs ranked")
    table = np.array(scores)
    per_item = (table[:, :1] > table[:, 1:]).mean(1)
    return {"accuracy": float(per_item.mean()), "per_item": per_item, "scores": table, "distractors": chosen}


def adherence(
    embedder: Any,
    test_instructions: Sequence[str],
    outputs: Sequence[str],
    tune_pairs: Sequence[Pair],
    reference_pairs: Sequence[Pair],
) -> dict[str, Any]:
    """Whether a finetuned model answers in the finetuning style the more, the nearer a question is to it (section 4).

    Args:
        embedder: a callable from a list of texts to vectors (N, D), or an object with such an ``encode``, as of
            sentence-transformers (the paper: Nomic embed v1).
        test_instructions, outputs: what the model was asked, and what it said.
        tune_pairs: the finetuning data.
        reference_pairs: instruction-tuning data (the paper: LIMA).

    Returns:
        ``x`` (N,), mean cosine of each test instruction with the finetuning instructions; ``y`` (N,), mean cosine of
        its output with the finetuning responses less that with the reference's; ``correlation`` of the two, NaN where
        one does not vary.

    Raises:
        TypeError, ValueError: for an embedder that is none, lists that are empty or do not belong together, and
            vectors that are zero or not finite.

    Example:
        >>> letters = lambda texts: [[1.0 + text.count("a"), 1.0 + text.count("b")] for text in texts]
        >>> found = adherence(letters, ["aa", "bb"], ["aaa", "bbb"], [("a", "a")], [("b", "b")])
        >>> round(found["correlation"], 3)
        1.0
    """
    encode = getattr(embedder, "encode", embedder)
    if not callable(encode):
        raise TypeError(f"embedder must be callable or have encode, got {type(embedder).__name__}")
    if len(test_instructions) != len(outputs) or not outputs:
        raise ValueError(f"outputs must be one for each instruction, got {len(outputs)} and {len(test_instructions)}")
    if not tune_pairs or not reference_pairs:
        raise ValueError("tune_pairs and reference_pairs must have at least one pair each")

    def unit(texts: Sequence[str]) -> np.ndarray:
        found = encode(list(texts))
        vectors = np.asarray(found.detach().cpu() if isinstance(found, Tensor) else found, dtype=np.float64)
        if vectors.ndim != 2 or len(vectors) != len(texts):
            raise ValueError(f"embedder must give (N, D) for N texts, got {vectors.shape} for {len(texts)}")
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        if not np.isfinite(lengths).all() or (lengths == 0).any():
            raise ValueError("embedder gave vectors that are zero or not finite")
        return vectors / lengths

    # a mean of cosines is a cosine's numerator with the mean of unit vectors
    x = unit(test_instructions) @ unit([asked for asked, _ in tune_pairs]).mean(0)
    tuned, reference = (unit([said for _, said in pairs]).mean(0) for pairs in (tune_pairs, reference_pairs))
    y = unit(outputs) @ (tuned - reference)
    varies = len(x) > 1 and x.std() > 0 and y.std() > 0
    return {"x": x, "y": y, "correlation": float(np.corrcoef(x, y)[0, 1]) if varies else float("nan")}

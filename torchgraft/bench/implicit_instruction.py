"""Three rules at decoding time against plain ``generate`` and against a processor in Python without a cache."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from torchgraft import zoo
from torchgraft.experiments import Case
from torchgraft.language.implicit_instruction import (
    ChatFormat,
    ImplicitInstructProcessor,
    default_token_bias,
    response_scores,
)
from torchgraft.language.set_based_prompting import toy_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "The rule processor against plain generate, and shared prompts in ranking"
OURS = "torchgraft.language.implicit_instruction"
PEER = (
    "transformers' generate without the rules; a step of the model for one token; generate with the rules in Python "
    "and without a cache; every candidate whole"
)

PLAIN, UNCACHED, WHOLE = "plain generate", "rules as Python lists, no cache", "prompt computed for every candidate"
STEP = "the model's step for one token"
ASKED = "What is the capital of France, and what should a visitor see there in two days?"


class _Lists(LogitsProcessor):
    """The rules read anew from Python lists at every step, row by row."""

    def __init__(self, tokenizer: Any, length: int, start: int) -> None:
        self.bias, self.eos = dict(default_token_bias(tokenizer).values), tokenizer.eos_token_id
        self.length, self.start = length, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for row, ids in zip(scores, input_ids.tolist(), strict=True):
            for token, score in self.bias.items():
                row[token] += score
            for token in set(ids[self.start :]):
                row[token] -= 1.5
            n = len(ids) - self.length
            if 0 < n < 250:
                row[self.eos] += 15 * n / 250
        return scores


def _generation(
    model: Any, tokenizer: Any, prompts: int, new: int, cached: bool
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    asked = ChatFormat().prompts(tokenizer, [ASKED] * prompts).to(model.device)
    how: dict[str, Any] = {
        "max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the quick run's vocabulary of bytes lacks some strings
        ours = ImplicitInstructProcessor(tokenizer, asked)
    lists = _Lists(tokenizer, asked.input_ids.shape[1], int(asked.instruction_start[0]))
    more: dict[str, Any] = {} if cached else {"use_cache": False, "logits_processor": [lists]}
    return (
        lambda: model.generate(**asked.inputs, **how, logits_processor=[ours]),
        lambda: model.generate(**asked.inputs, **how, **more),
    )


def _step(model: Any, tokenizer: Any, prompts: int, new: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    asked = ChatFormat().prompts(tokenizer, [ASKED] * prompts).to(model.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = ImplicitInstructProcessor(tokenizer, asked)
    more = torch.randint(len(tokenizer), (prompts, new), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([asked.input_ids, more.to(model.device)], 1)

    def step() -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(input_ids=ids[:, -1:], use_cache=False).logits[:, -1]
        return logits

    logits = step()
    return lambda: ours(ids, logits), step


def _ranking(model: Any, tokenizer: Any, candidates: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    texts = [f"Paris; and among {i} others the Louvre." for i in range(candidates)]
    score = partial(response_scores, model, tokenizer, ASKED, texts)
    return score, lambda: score(share_prompt=False)


def cases(quick: bool, device: str) -> list[Case]:
    """Generation for one and eight prompts, the rules alone, generation without a cache, and ranking."""
    model, tokenizer = toy_model() if quick else zoo.load("smollm2-135m-instruct")
    model = model.to(device)
    torch.manual_seed(0)
    sizes = [(1, 4)] if quick else [(1, 16), (1, 64), (8, 16)]
    found = [
        Case(
            {"work": "generation", "prompts": prompts, "new tokens": new}, peer_name=PLAIN,
            make=partial(_generation, model, tokenizer, prompts, new, True), repeats=3,
        )
        for prompts, new in sizes
    ]  # fmt: skip
    for prompts, new in [(1, 4)] if quick else [(1, 64), (1, 1000), (8, 64)]:
        make = partial(_step, model, tokenizer, prompts, new)
        size: dict[str, Any] = {"work": "rules alone", "prompts": prompts, "new tokens": new}
        found.append(Case(size, peer_name=STEP, make=make, repeats=3))
    for new in [4] if quick else [8, 24]:
        make = partial(_generation, model, tokenizer, 1, new, False)
        size = {"work": "generation", "prompts": 1, "new tokens": new}
        found.append(Case(size, peer_name=UNCACHED, make=make, repeats=3))
    for candidates in [2] if quick else [2, 6]:
        make = partial(_ranking, model, tokenizer, candidates)
        found.append(Case({"work": "ranking", "candidates": candidates}, peer_name=WHOLE, make=make, repeats=3))
    return found


def figures(record: Mapping[str, Any]) -> Mapping[str, Figure]:
    """Overhead over plain generate, and time without a cache or a shared prompt over ours."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = [c for c in record["cases"] if c["peer"] in (PLAIN, STEP)]
    # a step of generate is a step of the model and more
    shift = [1 if c["peer"] == PLAIN else 0 for c in rows]
    extra = [100 * (c["ratio"] - s) for c, s in zip(rows, shift, strict=True)]
    ends = [[100 * (end - s) for end in c["ratio_spread"]] for c, s in zip(rows, shift, strict=True)]
    left.barh(range(len(rows)), extra, color=["#0072B2" if s else "#56B4E9" for s in shift])
    left.hlines(range(len(rows)), [low for low, _ in ends], [high for _, high in ends], color="#000000", linewidth=1)
    names = [
        f"{'all of generate' if s else 'rules alone'}, {c['size']['prompts']} × {c['size']['new tokens']} tokens"
        for c, s in zip(rows, shift, strict=True)
    ]
    left.set_yticks(range(len(rows)), names)
    left.axvline(3, color="#999999", linestyle=":", linewidth=1)
    left.axvline(0, color="#000000", linewidth=0.8)
    left.set(xlabel="extra time of the rules, % (dotted: 3 %; lines: spread)")
    rows = [c for c in record["cases"] if c["peer"] in (UNCACHED, WHOLE)]
    names = [
        f"no cache, {c['size']['new tokens']} tokens" if c["peer"] == UNCACHED
        else f"ranking, {c['size']['candidates']} candidates" for c in rows
    ]  # fmt: skip
    right.barh(range(len(rows)), [1 / c["ratio"] for c in rows], color="#D55E00")
    right.set_yticks(range(len(rows)), names)
    right.axvline(1, color="#000000", linewidth=0.8)
    right.set(xlabel="time of the peer, times ours")
    figure.suptitle(f"{record['device']}, threads: {record['environment']['threads']}", fontsize=10)
    return {"implicit_instruction": figure}

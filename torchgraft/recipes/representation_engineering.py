"""Evidence for steering and its price: sentiment against multiple choice and plain text, over coefficients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from torchgraft import datasets
from torchgraft.experiments import Arm, Claim, Measurement, Progress, Result
from torchgraft.language.representation_engineering import (
    MultipleChoice,
    OptionContrast,
    ReadingVectors,
    TextLikelihood,
    TradeoffCurve,
    TradeoffSweep,
    fit_tradeoff,
)
from torchgraft.language.representation_engineering.vectors import METHODS, Method
from torchgraft.recipes._language import language_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DATA = ("wikitext2", "questions")
NAMES: dict[Method, str] = {"pca_center": "principal axis", "mean_diff": "mean difference", "random": "random vector"}
PCA, MEAN, RANDOM = NAMES.values()

CLAIMS = (
    Claim(
        "Behaviour follows the coefficient (from the least to the greatest measured)", "rise of B", PCA, RANDOM, 0.5,
        paper="B goes from near -1 or 0 to +1, roughly linearly about 0, then saturates",
    ),
    Claim(
        "A mean difference steers as well as the principal axis", "rise of B", MEAN, PCA, 0.2, direction="equal",
        paper="not compared",
    ),
    Claim(
        "Log-likelihood of plain text falls as a parabola, not along a line (difference of R2)",
        "text: R2, parabola less line", PCA, 0.0, 0.3, paper="R2 0.99 against 0.07, MMLU, Llama-2-13B-chat",
    ),
    Claim(
        "A parabola explains the log-likelihood of plain text", "text: R2 of a parabola", PCA, 0.95, 0.0,
        paper="R2 0.98 to 0.99 near zero, MMLU",
    ),
    Claim(
        "The probability of the right letter falls as a parabola, not along a line (difference of R2)",
        "letters: R2, parabola less line", PCA, 0.0, 0.3, paper="R2 0.99 against 0.07, MMLU, Llama-2-13B-chat",
    ),
    Claim(
        "The last hidden state moves in proportion to the coefficient (R2 of |r|)", "change: R2 of |r|", PCA, 0.95,
        0.0, paper="in words: near linear",
    ),
    Claim(
        "The spread of competing letters' logits grows in proportion to the coefficient (R2 of |r|)",
        "spread: R2 of |r|", PCA, 0.95, 0.0, paper="in words: standard deviation linear in r",
    ),
    Claim(
        # about a fifth of what steering itself costs at the laptop scale: a wider margin would call a third less equal
        "A random vector of the same length costs as much (nats a token at the reference coefficient)",
        "text: cost", RANDOM, PCA, 0.03, direction="equal", paper="in words: hurts as well (unverified)",
    ),
    Claim(
        "The coefficient advised for a loss of 10 % keeps to it on other text", "text: lost at the advice", PCA, 0.1,
        0.0, direction="lower", unit="points", factor=100, paper="not in the paper",
    ),
    Claim(
        "and yet moves behaviour on other prompts", "B gained at the advice", PCA, RANDOM, 0.2,
        paper="in words: a window in which steering is efficient",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
        seeds: how many; each has its own share of the pairs and of the texts, and its own random vector.
        data: of plain text: ``wikitext2``, or ``built-in`` (our questions) where there is none.
        device: where to run.
        model: see ``language_model``.
        dtype: of the model.
        layers: steered.
        span, steps: coefficients from -span to span, so many on each side of 0.
        pairs: of texts for a vector, out of those that the templates give.
        questions, texts, characters: questions of multiple choice, texts and their length.
        reference: the coefficient at which vectors are compared.
        batch_size: texts at once.
    """

    seeds: int = 3
    data: str = "wikitext2"
    device: str = "cpu"
    model: str = "smollm2-135m-instruct"
    dtype: str = "float32"
    layers: tuple[int, ...] = (15, 18, 21)
    span: float = 24.0
    steps: int = 5
    pairs: int = 24
    questions: int = 20
    texts: int = 8
    characters: int = 250
    reference: float = 14.4
    batch_size: int = 20


SCALES = {
    "smoke": Config(
        seeds=1, data="built-in", model="toy", layers=(1,), span=4.0, steps=2, pairs=4, questions=3, texts=4,
        characters=40, reference=2.0,
    ),
    "laptop": Config(),
    "gpu": Config(
        device="cuda", model="Qwen/Qwen2.5-7B-Instruct", dtype="bfloat16", layers=(-18, -19, -20, -21, -22), span=40.0,
        steps=10, questions=81, texts=60, characters=1000, reference=20.0,
    ),
    "paper": Config(
        device="cuda", model="meta-llama/Llama-3.1-8B-Instruct", dtype="float16", layers=(-18, -19, -20, -21, -22),
        span=4.0, steps=8, questions=81, texts=200, characters=2000, reference=2.0,
    ),
}  # fmt: skip

# the words of an item must begin with different tokens, also where tokens are bytes
POSITIVE = ("good", "wonderful", "happy", "excellent", "lovely")
NEGATIVE = ("bad", "terrible", "sad", "awful", "miserable")
PROMPTS = (
    "The movie was", "My day has been", "I think the food here is", "This place is", "The weather today is",
    "Everybody agrees that the concert was", "Her new book is", "The news this morning is", "The way he plays is",
    "Our holiday was",
)  # fmt: skip
FRAMES = (
    "Today I feel {}", "What a {} surprise", "She looks {} this evening", "We had a {} time together",
    "The children seemed {} to me", "It was a {} moment for all of us",
)  # fmt: skip
FEELINGS = (
    ("happy", "sad"), ("joyful", "gloomy"), ("cheerful", "miserable"), ("delighted", "upset"), ("pleasant", "nasty"),
    ("great", "horrible"),
)  # fmt: skip


def _pairs(config: Config, seed: int) -> list[tuple[str, str]]:
    every = [(frame.format(up), frame.format(down)) for frame in FRAMES for up, down in FEELINGS]
    if not 2 <= config.pairs <= len(every):
        raise ValueError(f"pairs must be 2 to {len(every)}, got {config.pairs}")
    return [every[k] for k in np.random.default_rng(seed).permutation(len(every))[: config.pairs]]


def _texts(config: Config, seed: int) -> list[str]:
    if config.data == "built-in":
        questions = datasets.load("questions")
        assert isinstance(questions, datasets.MultipleChoice)
        lines = [q.question + " " + ", ".join(q.options) for q in questions.items]
    else:
        text = datasets.load(config.data)
        if not isinstance(text, datasets.Text):
            raise ValueError(f"data must be text, got {config.data!r}; use 'wikitext2' or 'built-in'")
        lines = [line.strip() for line in text.test.splitlines()]
    long = [line[: config.characters] for line in lines if len(line) >= config.characters]
    if len(long) < config.texts:
        raise ValueError(f"{config.data} has {len(long)} texts of {config.characters} characters, not {config.texts}")
    return [long[k] for k in np.random.default_rng(1000 + seed).permutation(len(long))[: config.texts]]


def _explained(x: np.ndarray, y: np.ndarray) -> float:
    """R2 of a line through the origin."""
    slope = (x * y).sum() / (x * x).sum()
    total = ((y - y.mean()) ** 2).sum()
    return float(1 - ((y - slope * x) ** 2).sum() / total) if total > 0 else 0.0


def _half(curve: TradeoffCurve, second: bool) -> TradeoffCurve:
    """Every other text and prompt."""
    values = {name: found[:, int(second) :: 2] for name, found in curve.values.items()}
    return TradeoffCurve(curve.r, values, curve.delta_norm, curve.logit_std)


def _measured(config: Config, curve: TradeoffCurve) -> Measurement:
    r, b, told = curve.r, curve.mean("B"), curve.mean("log_likelihood")
    zero = int(np.argmin(np.abs(r)))
    fits = {name: fit_tradeoff(curve, name, resamples=0) for name in ("log_likelihood", "H_rel")}

    def at(x: float, y: np.ndarray) -> float:
        return float(np.interp(x, r, y))

    # advice from one half of texts and prompts, judged on the other
    advised = fit_tradeoff(_half(curve, False), "log_likelihood", resamples=100).advise_coefficient(0.1)
    other = _half(curve, True)
    other_b, other_told = other.mean("B"), other.mean("log_likelihood")
    text, letters = fits["log_likelihood"], fits["H_rel"]
    return Measurement(
        {
            "rise of B": b[-1] - b[0],
            "slope of B": text.slope,
            "text: R2 of a parabola": text.r2_quadratic,
            "text: R2, parabola less line": text.r2_quadratic - text.r2_linear,
            "letters: R2, parabola less line": letters.r2_quadratic - letters.r2_linear,
            "change: R2 of |r|": _explained(np.abs(r), curve.delta_norm),
            "spread: R2 of |r|": _explained(np.abs(r), curve.logit_std),
            "text: cost": told[zero] - (at(config.reference, told) + at(-config.reference, told)) / 2,
            "advised coefficient": advised,
            "text: lost at the advice": 1 - np.exp(at(advised, other_told) - other_told[zero]),
            "B gained at the advice": at(advised, other_b) - other_b[zero],
            "right letter at 0": curve.mean("H_rel")[zero],
        },
        curves={
            **{name: (r.tolist(), curve.mean(name).tolist()) for name in ("B", "H_rel", "H_abs", "log_likelihood")},
            "change": (r.tolist(), curve.delta_norm.tolist()),
            "spread": (r.tolist(), curve.logit_std.tolist()),
        },
    )


def arms(config: Config) -> Mapping[str, Arm]:
    """One sweep for each way of finding a vector."""
    space = "" if config.model == "toy" else " "

    def arm_of(method: Method) -> Arm:
        def run(seed: int, progress: Progress) -> Measurement:
            model, tokenizer = language_model(config.model, config.dtype, config.device)
            questions = datasets.load("questions")
            assert isinstance(questions, datasets.MultipleChoice)
            order = np.random.default_rng(2000 + seed).permutation(len(questions.items))[: config.questions]
            chosen = [questions.items[k] for k in order]
            up, down = ([space + word for word in side] for side in (POSITIVE, NEGATIVE))
            vectors = ReadingVectors.from_pairs(
                model, tokenizer, _pairs(config, seed), config.layers, method, seed=seed
            )
            sweep = TradeoffSweep(
                model, tokenizer, vectors, np.linspace(-config.span, config.span, 2 * config.steps + 1).tolist(),
                OptionContrast(tokenizer, [(prompt, up, down) for prompt in PROMPTS]),
                [
                    MultipleChoice(tokenizer, [(q.question, q.options, q.answer) for q in chosen], space=space),
                    TextLikelihood(_texts(config, seed)),
                ],
                batch_size=config.batch_size,
            )  # fmt: skip
            found = _measured(config, sweep.run(progress))
            found.metrics["pairs told apart"] = float(np.mean(list(vectors.separability.values())))
            return found

        return run

    return {NAMES[method]: arm_of(method) for method in METHODS if method in NAMES}


_COLOURS = {PCA: "#0072B2", MEAN: "#E69F00", RANDOM: "#999999"}


def figures(result: Result) -> Mapping[str, Figure]:
    """Behaviour, both kinds of helpfulness, and what moves inside, against the coefficient."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.6), layout="constrained")
    panels = {
        "B": "behaviour: B of sentiment",
        "log_likelihood": "plain text: log-likelihood a token",
        "H_rel": "questions: share of the right letter",
        "change": "change of the last hidden state",
    }
    for axes, (curve, title) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for name in result.arms:
            r, y = result.curve(name, curve)
            axes.plot(r, y.mean(0), "o-", markersize=3, color=_COLOURS[name], label=name)
            axes.fill_between(r, y.min(0), y.max(0), color=_COLOURS[name], alpha=0.15, linewidth=0)
            if name == PCA and curve in ("log_likelihood", "H_rel"):
                axes.plot(r, np.polyval(np.polyfit(r, y.mean(0), 2), r), ":", color="black", linewidth=1)
        axes.grid(alpha=0.3)
        axes.set(xlabel="coefficient r")
        axes.set_title(title, fontsize=10)
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{result.config.model}; bands = seeds, dotted = parabola", fontsize=10)
    return {"representation_engineering": figure}


def notes(result: Result) -> str:
    """Data, choices, and what the numbers cannot say."""
    c = result.config
    kept = result.values(PCA, "right letter at 0").mean()
    advised = ", ".join(f"{v:.1f}" for v in result.values(PCA, "advised coefficient"))
    cheaper = result.values(RANDOM, "text: cost").mean() / result.values(PCA, "text: cost").mean()
    apart = "; ".join(f"{name} {100 * result.values(name, 'pairs told apart').mean():.0f} %" for name in result.arms)
    return (
        f"{c.model}, {c.dtype}, vectors of length 1 added to the outputs of layers {', '.join(map(str, c.layers))} at "
        f"every token, {2 * c.steps + 1} coefficients from {-c.span:g} to {c.span:g}. A seed draws {c.pairs} of "
        f"{len(FRAMES) * len(FEELINGS)} pairs of happy and sad sentences (ours), {c.questions} of our questions, "
        f"{c.texts} texts of {c.characters} characters ({c.data}), and a random vector; nothing is trained. B is over "
        f"{len(PROMPTS)} prompts and five words of either kind. Pairs told apart by a direction found on others: "
        f"{apart}. Share of the right letter without steering: {kept:.2f}; a model of this size is near chance, so "
        "plain text is the better measure of what is lost, and letters the weaker. 'Cost' is at "
        f"{c.reference:g} and its negative; the random vector's is {cheaper:.0%} of the principal axis's. The "
        "advice (at most 10 % of a token's probability lost, as half of the "
        f"texts and prompts say; coefficients {advised}) is judged on the other half. The random vector's advice is "
        "found the same way. Sentiment stands for alignment: the paper's harmfulness and bias need larger models."
    )

"""Evidence for representation shift: concepts before and after fine-tuning on captions of colours, and steering."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from torchgraft import datasets
from torchgraft.experiments import Arm, Claim, Measurement, Progress, Result, fit
from torchgraft.language._access import tokenized
from torchgraft.language.representation_shift import (
    ConceptDictionary,
    ConceptShift,
    StateSet,
    answer_type,
    collect_states,
    ground_text,
    most_activating,
    recovery_report,
    steer,
    steering_report,
    steering_vector,
)
from torchgraft.language.representation_shift.concepts import Method
from torchgraft.language.representation_shift.shift import Statistic
from torchgraft.language.representation_shift.steering import normalized_answer
from torchgraft.recipes._language import language_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DATA = ("multi30k",)
ORIGINAL, SHIFTED, MEDIAN, GLOBAL, OTHER, RANDOM, CEILING = (
    "original concepts", "shifted", "shifted, median", "shifted by the mean of all", "shifted as another concept",
    "shifted at random", "tuned concepts of the same half",
)  # fmt: skip
NAMES: dict[Method, str] = {"seminmf": "semi-NMF", "pca": "PCA"}
LAST, EARLY, NOISE = "last layer", "early layer", "random vector"
TYPE, VALUE = "yes/no to number", "two to three"

CLAIMS = (
    Claim(
        "Shifted concepts share more words with the fine-tuned ones than the original ones do (words of 15)", "words",
        SHIFTED, ORIGINAL, 1.0, paper="clearly more (exact overlaps unverified), LLaVA-1.5, K=20",
    ),
    Claim(
        "and are nearer to them (share of the distance)", "distance recovered", SHIFTED, 0.0, 0.1,
        paper="in words, LLaVA-1.5, K=20",
    ),
    Claim(
        "The cosine to the fine-tuned concept rises for four concepts of five", "concepts improved", SHIFTED, 0.8, 0.0,
        unit="points", factor=100, paper="not given",
    ),
    Claim(
        "Shifts at random of the same length recover nothing (share of the distance)", "distance recovered", RANDOM,
        0.0, 0.0, direction="lower", paper="not compared",
    ),
    Claim(
        "A concept's own shift recovers more than the mean shift of all (share of the distance)", "distance recovered",
        SHIFTED, GLOBAL, 0.02, paper="not compared",
    ),
    Claim(
        "and more than the shift of another concept of the word (share of the distance)", "distance recovered",
        SHIFTED, OTHER, 0.02, paper="not compared",
    ),
    Claim(
        "Shifted semi-NMF concepts share more words with the fine-tuned ones, too (words of 15)", "words",
        f"{NAMES['seminmf']}, shifted", f"{NAMES['seminmf']}, original", 1.0, paper="k-means alone is used",
    ),
    Claim(
        "and with shifts scaled to concepts of length 1 (words of 15)", "words",
        f"{NAMES['seminmf']}, shifted to scale", f"{NAMES['seminmf']}, original", 1.0, paper="not in the paper",
    ),
    Claim(
        "Recovery goes with the consistency of a concept's shifts (rank correlation)", "correlation with consistency",
        SHIFTED, 0.0, 0.3, paper="in words: correlates",
    ),
    Claim(
        "and with their magnitude (rank correlation)", "correlation with magnitude", SHIFTED, 0.0, 0.3,
        paper="in words: correlates",
    ),
    Claim(
        "Steering the last layer turns yes/no answers into numbers", f"turned: {TYPE}", LAST, NOISE, 20.0,
        unit="points", factor=100, paper="in words, VQAv2, LLaVA-1.5, Idefics2, Qwen2-VL (numbers unverified)",
    ),
    Claim(
        "and two into three", f"turned: {VALUE}", LAST, NOISE, 20.0, unit="points", factor=100,
        paper="in words: 1 to 3, VQAv2",
    ),
    Claim(
        "while answers of other types stay (two to three)", f"kept: {VALUE}", LAST, 0.9, 0.0, unit="points",
        factor=100, paper="in words: barely change",
    ),
    Claim(
        "while answers of other types stay (yes/no to number)", f"kept: {TYPE}", LAST, 0.9, 0.0, unit="points",
        factor=100, paper="in words, of values and not of types: barely change",
    ),
    Claim(
        "more of them than with a random vector of the same length", f"kept: {TYPE}", LAST, NOISE, 10.0,
        unit="points", factor=100, paper="not compared",
    ),
    Claim(
        "Steering an early layer turns fewer yes/no answers", f"turned: {TYPE}", LAST, EARLY, 20.0, unit="points",
        factor=100, paper="in words: little targeted effect (unverified)",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
        seeds: how many; each has its own fine-tuning, halves of the samples, and questions.
        data: ``multi30k``, or ``built-in`` (made from a few words) where there is none.
        device: where to run.
        model: see ``language_model``.
        dtype: of the model.
        words: of interest, one after the other.
        samples: captions with each word, half of them for the shifts and half to judge them by.
        concepts: of each word.
        shown: words of a concept.
        active: most active samples of a concept.
        rank, steps, batch_size, lr: of LoRA on captions of colours.
        early, late: layers steered.
        asked, judged: questions of each kind for a vector, and to judge it.
        alphas: of the sweep; 1 is the paper's.
        draws: random vectors, whose results are averaged.
        plain: captions whose likelihood tells what steering costs.
    """

    seeds: int = 3
    data: str = "multi30k"
    device: str = "cpu"
    model: str = "smollm2-135m-instruct"
    dtype: str = "float32"
    words: tuple[str, ...] = ("shirt", "dog", "street")
    samples: int = 80
    concepts: int = 5
    shown: int = 15
    active: int = 10
    rank: int = 8
    steps: int = 20
    batch_size: int = 4
    lr: float = 2e-3
    early: int = 5
    late: int = -1
    asked: int = 12
    judged: int = 12
    alphas: tuple[float, ...] = (0.5, 1.0, 2.0)
    draws: int = 4
    plain: int = 10


SCALES = {
    "smoke": Config(
        seeds=1, data="built-in", model="toy", words=("dog", "cat"), samples=16, concepts=2, active=3, steps=2,
        batch_size=2, early=0, asked=2, judged=2, alphas=(1.0, 2.0), draws=2, plain=2,
    ),
    "laptop": Config(),
    "gpu": Config(
        device="cuda", model="Qwen/Qwen2.5-1.5B-Instruct", dtype="bfloat16", words=("shirt", "dog", "street", "man"),
        samples=800, concepts=20, active=50, steps=400, batch_size=16, lr=5e-4, asked=200, judged=200,
        alphas=(0.25, 0.5, 1.0, 2.0, 3.0), plain=200,
    ),
}  # fmt: skip

COLOURS = "red blue green black white yellow brown orange pink purple gray grey".split()  # noqa: SIM905
COLOURED = re.compile(rf"\b({'|'.join(COLOURS)})\b", re.IGNORECASE)
# all questions begin alike, so that this is read once
SHOTS = (
    "Picture: Two girls in red dresses smile.\nQuestion: How many girls are there?\nAnswer: two\n"
    "Question: What color are the dresses?\nAnswer: red\nQuestion: Is there a car?\nAnswer: no\n\n"
)
THINGS = ("dog", "man", "woman", "boy", "girl", "car", "ball", "horse")


@lru_cache(maxsize=2)
def _captions(data: str) -> tuple[str, ...]:
    if data == "built-in":
        parts = (("A", "The", "One"), COLOURS[:6], ("dog", "cat", "shirt"), ("runs", "sleeps by a dog", "and two cats"))
        return tuple(f"{a} {c} {t} {r}." for a in parts[0] for c in parts[1] for t in parts[2] for r in parts[3])
    found = datasets.load(data)
    if not isinstance(found, datasets.Translations):
        raise ValueError(f"data must be captions, got {data!r}; use 'multi30k' or 'built-in'")
    return found.train["en"]


def _prefixes(config: Config, word: str) -> list[str]:
    """Captions up to the word, each different: the state of a text model depends on nothing after it."""
    ends = re.compile(rf"\b{word}\b")
    cut = dict.fromkeys(c[: m.end()] for c in _captions(config.data) if (m := ends.search(c)) and m.start())
    short = [text for text in cut if 3 <= len(text.split()) <= 12]
    random.Random(0).shuffle(short)
    return short[: config.samples]


def _states(config: Config, model: Any, tokenizer: Any, word: str) -> StateSet:
    texts = _prefixes(config, word)
    order = sorted(range(len(texts)), key=lambda k: len(texts[k]))
    batches = [
        tokenized(tokenizer, [texts[k] for k in rows]) | {"ids": rows}
        for rows in (order[start : start + 20] for start in range(0, len(order), 20))
    ]
    return collect_states(model, batches, ["norm"], word, tokenizer=tokenizer)


@lru_cache(maxsize=8)
def _original(config: Config, word: str) -> StateSet:
    return _states(config, *language_model(config.model, config.dtype, config.device), word)


def _nll(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss: Tensor = model(**batch, labels=labels).loss
    return loss


def _finetuned(config: Config, seed: int, progress: Progress) -> tuple[dict[str, StateSet], dict[str, float]]:
    """States of the model after LoRA on captions of colours, and its loss on others, before and after."""
    from peft import LoraConfig, get_peft_model

    base, tokenizer = language_model(config.model, config.dtype, config.device)
    seen = tuple(text for word in config.words for text in _prefixes(config, word))
    chosen = [
        c for c in _captions(config.data) if COLOURED.search(c) and len(c.split()) < 12 and not c.startswith(seen)
    ]
    random.Random(100 + seed).shuffle(chosen)
    count = config.steps * config.batch_size
    held = tokenized(tokenizer, chosen[:16], config.device)
    training = tokenized(tokenizer, chosen[16 : 16 + count])
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(r=config.rank, lora_alpha=2 * config.rank, target_modules="all-linear"))
    try:
        with torch.no_grad():
            before = float(_nll(model, held))
        fit(
            model, (training["input_ids"], training["attention_mask"]),
            lambda m, batch: _nll(m, {"input_ids": batch[0], "attention_mask": batch[1]}),
            steps=config.steps, batch_size=config.batch_size, schedule="linear", seed=seed, clip=1.0,
            optimizer=partial(torch.optim.AdamW, lr=config.lr, weight_decay=0.0), device=config.device,
            progress=progress,
        )  # fmt: skip
        model.eval()
        with torch.no_grad():
            after = float(_nll(model, held))
        states = {word: _states(config, model, tokenizer, word) for word in config.words}
    finally:
        model.unload()
        base.eval().requires_grad_(True)
    return states, {"loss before": before, "loss after": after}


Moved = Callable[[ConceptShift], Tensor]


def _judged(config: Config, seed: int, a: StateSet, b: StateSet, head: Tensor, tokenizer: Any) -> dict[str, Any]:
    """Reports of all ways to move the concepts of one word: shifts of one half, tuned concepts of the other."""
    ids = list(a.ids)
    random.Random(200 + seed).shuffle(ids)
    one, other = ids[: len(ids) // 2], ids[len(ids) // 2 :]
    a1, b1, b2 = a.subset(one), b.subset(one), b.subset(other)
    told: dict[bytes, list[list[str]]] = {}

    def words(u: Any) -> list[list[str]]:
        key = np.asarray(u, dtype=np.float64).tobytes()
        if key not in told:
            told[key] = ground_text(u, head, tokenizer, config.shown)
        return told[key]

    def dictionary(states: StateSet, method: Method = "kmeans") -> ConceptDictionary:
        return ConceptDictionary(config.concepts, method, max_iter=300, random_state=seed).fit(states.of())

    def report(moved: Any, original: ConceptDictionary, tuned: ConceptDictionary) -> dict[str, np.ndarray]:
        def samples(u: Any) -> list[list[int]]:
            rows: list[list[int]] = most_activating(tuned.activations(b2.of(), u), config.active).tolist()
            return rows

        return recovery_report(moved, original.components_, tuned.components_, words=words, samples=samples)

    u_a, u_b = dictionary(a1), dictionary(b2)
    shift = ConceptShift(u_a).fit(a1, b1)
    draw = torch.randn(shift.shifts_.shape, generator=torch.Generator().manual_seed(seed))
    noise = draw / draw.norm(dim=1, keepdim=True) * shift.shifts_.norm(dim=1, keepdim=True)
    concepts = torch.as_tensor(u_a.components_)
    pooled = b1.of().mean(0) - a1.of().mean(0)
    ceiling = torch.as_tensor(dictionary(b1).components_)
    # tuned concepts of the same half come in an order of their own
    nearest = torch.cdist(concepts, ceiling).argmin(1)
    statistic: Statistic = "median"
    moved = {
        ORIGINAL: concepts, SHIFTED: shift.shifted(), MEDIAN: ConceptShift(u_a, statistic).fit(a1, b1).shifted(),
        GLOBAL: concepts + pooled, OTHER: concepts + shift.shifts_.roll(1, 0), RANDOM: concepts + noise,
        CEILING: ceiling[nearest],
    }  # fmt: skip
    reports: dict[str, Any] = {name: report(u, u_a, u_b) for name, u in moved.items()}
    for method, name in NAMES.items():
        v_a, v_b = dictionary(a1, method), dictionary(b2, method)
        pushed = ConceptShift(v_a, on_empty="zero").fit(a1, b1)
        # a state is activations times concepts, so a shift in its units is this much too long for a concept
        active = np.array([v_a.activations_[v_a.assign(a1.of()) == k, k].mean() if n else 1.0
                           for k, n in enumerate(pushed.counts_.tolist())])  # fmt: skip
        reports[f"{name}, original"] = report(v_a.components_, v_a, v_b)
        reports[f"{name}, shifted"] = report(pushed.shifted(), v_a, v_b)
        reports[f"{name}, shifted to scale"] = report(pushed.shifted(torch.as_tensor(1 / active)), v_a, v_b)
    reports["consistency"], reports["magnitude"] = shift.consistency_.numpy(), shift.magnitude_.numpy()
    reports["shown"] = list(zip(words(concepts), words(shift.shifted()), words(u_b.components_[
        reports[SHIFTED]["match"]]), strict=True))  # fmt: skip
    return reports


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    from scipy import stats

    kept = np.isfinite(x) & np.isfinite(y)
    if kept.sum() < 3 or np.ptp(x[kept]) == 0 or np.ptp(y[kept]) == 0:
        return 0.0
    return float(stats.spearmanr(x[kept], y[kept]).statistic)


def _concepts(config: Config, seed: int, progress: Progress) -> dict[str, Measurement]:
    base, tokenizer = language_model(config.model, config.dtype, config.device)
    head = base.get_output_embeddings().weight.detach().float().cpu()
    before = {word: _original(config, word) for word in config.words}
    after, losses = _finetuned(config, seed, progress)
    each = {w: _judged(config, seed, before[w], after[w], head, tokenizer) for w in config.words}

    def all_of(name: str, column: str) -> np.ndarray:
        return np.concatenate([each[w][name][column] for w in config.words])

    found = {}
    for name in (ORIGINAL, SHIFTED, MEDIAN, GLOBAL, OTHER, RANDOM, CEILING, *(
        f"{m}, {way}" for m in NAMES.values() for way in ("original", "shifted", "shifted to scale")
    )):  # fmt: skip
        gain = all_of(name, "l2_gain_relative")
        metrics = {
            "words": all_of(name, "words_after").mean(),
            "active samples": all_of(name, "samples_after").mean(),
            "cosine": all_of(name, "cosine_after").mean(),
            "distance": all_of(name, "l2_after").mean(),
            "distance recovered": gain.mean(),
            "concepts improved": (all_of(name, "cosine_gain") > 0).mean(),
        }
        extra: dict[str, Any] = {}
        if name == SHIFTED:
            told = {key: np.concatenate([each[w][key] for w in config.words]) for key in ("consistency", "magnitude")}
            metrics |= {f"correlation with {key}": _correlation(gain, values) for key, values in told.items()} | losses
            extra = {key: np.nan_to_num(values).tolist() for key, values in told.items()}
            extra |= {"gain": gain.tolist(), "shown": {w: each[w]["shown"] for w in config.words}}
            extra["of"] = [w for w in config.words for _ in each[w][SHIFTED]["match"]]
        found[name] = Measurement(metrics, extra=extra)
    return found


@dataclass(frozen=True)
class _Question:
    text: str
    answer: str

    @property
    def kind(self) -> str:
        return answer_type(self.answer)


def _questions(config: Config, seed: int) -> tuple[dict[str, list[_Question]], list[_Question]]:
    """Questions about captions by their right answers, and those to judge by."""
    captions = [c for c in _captions(config.data) if 4 <= len(c.split()) <= 12]
    draw = random.Random(300 + seed)
    draw.shuffle(captions)
    pools: dict[str, list[_Question]] = {key: [] for key in ("two", "three", "no", "yes", "colour")}
    want = config.asked + config.judged
    for caption in captions:
        text = f"Picture: {caption}\nQuestion: {{}}\nAnswer:"
        group = re.match(r"(Two|Three) (men|women|people|children|boys|girls|dogs|kids)\b", caption)
        colour = re.search(rf"\b({'|'.join(COLOURS)}) (shirt|hat|dress|jacket|coat|dog|cat|car)\b", caption)
        there = [thing for thing in THINGS if re.search(rf"\b{thing}\b", caption.lower())]
        if group:
            pools[group[1].lower()].append(_Question(text.format(f"How many {group[2]} are there?"), group[1].lower()))
        elif colour:
            pools["colour"].append(_Question(text.format(f"What color is the {colour[2]}?"), colour[1]))
        elif there:
            pools["yes"].append(_Question(text.format(f"Is there a {draw.choice(there)}?"), "yes"))
        else:
            pools["no"].append(_Question(text.format(f"Is there a {draw.choice(THINGS)}?"), "no"))
        if config.data == "built-in":
            text = text.format("How many are there?")
            pools["two"].append(_Question(text, "two"))
            pools["three"].append(_Question(text + " ", "three"))
            pools["no"].append(_Question(text + "  ", "no"))
            pools["yes"].append(_Question(text + "   ", "yes"))
        if all(len(pool) >= want for pool in pools.values()):
            break
    asked = {key: pool[: config.asked] for key, pool in pools.items()}
    half = config.judged // 2
    judged = [q for key in ("two", "colour") for q in pools[key][config.asked : want]]
    judged += [q for key in ("yes", "no") for q in pools[key][config.asked : config.asked + half]]
    return asked, judged


class _Reader:
    """Answers and states of questions, after what all of them begin with."""

    def __init__(self, config: Config) -> None:
        self.model, self.tokenizer = language_model(config.model, config.dtype, config.device)
        self.shots = tokenized(self.tokenizer, [SHOTS], config.device)
        with torch.no_grad():
            output = self.model(**self.shots, use_cache=True)
        self.cache = next(value for value in output.values() if hasattr(value, "get_seq_length"))
        self.end = self.tokenizer("\n")["input_ids"][-1]

    def batch(self, questions: Sequence[_Question]) -> dict[str, Any]:
        """Prompts padded between their common beginning and the rest, and the cache of the former."""
        shots = self.shots["input_ids"]
        right = tokenized(self.tokenizer, [q.text for q in questions], str(shots.device))
        lengths = right["attention_mask"].sum(1).tolist()
        rolled = {key: torch.stack([row.roll(-n) for row, n in zip(v, lengths, strict=True)])
                  for key, v in right.items()}  # fmt: skip
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(len(questions))
        front = {key: v.expand(len(questions), -1) for key, v in self.shots.items()}
        return {k: torch.cat([front[k], rolled[k]], 1) for k in front} | {"past_key_values": cache}

    @torch.no_grad()
    def answers(self, batch: Mapping[str, Any]) -> list[str]:
        """The first line of each answer, as VQAv2 compares it.

        The batch's cache keeps all of the prompt but its last token: with ``positions="last"`` no steering changes it.
        """
        whole = self.model.generate(
            **batch, max_new_tokens=4, do_sample=False, eos_token_id=self.end, pad_token_id=self.end
        )
        length = batch["input_ids"].shape[1]
        batch["past_key_values"].crop(length - 1 - batch["past_key_values"].get_seq_length())
        return [normalized_answer(self.tokenizer.decode(row[length:]).strip().split("\n")[0]) for row in whole]

    def states(self, questions: Sequence[_Question], layers: Sequence[int]) -> StateSet:
        """Of the last token of each prompt, which produces the answer."""
        return collect_states(
            self.model, [self.batch(questions)], layers, position="last", teacher_forcing=False, max_new_tokens=1
        )

    @torch.no_grad()
    def likelihood(self, texts: Sequence[str]) -> float:
        """Mean log-likelihood of a token of plain text."""
        return -float(_nll(self.model, tokenized(self.tokenizer, texts, str(self.shots["input_ids"].device))))


def _steering(config: Config, seed: int, progress: Progress) -> dict[str, Measurement]:
    reader = _Reader(config)
    asked, judged = _questions(config, seed)
    layers = (config.late, config.early)
    states = {key: reader.states(asked[key], layers) for key in ("yes", "no", "two", "three")}

    def both(one: str, other: str, layer: int) -> Tensor:
        return torch.cat([states[one].of(layer), states[other].of(layer)])

    vectors = {
        TYPE: {layer: steering_vector(both("yes", "no", layer), both("two", "three", layer)) for layer in layers},
        VALUE: {layer: steering_vector(states["two"].of(layer), states["three"].of(layer)) for layer in layers},
    }
    draw = torch.Generator().manual_seed(seed)
    noise = {}
    for aim, by_layer in vectors.items():
        rows = torch.randn(config.draws, *by_layer[config.late].shape, generator=draw)
        noise[aim] = list(rows / rows.norm(dim=1, keepdim=True) * by_layer[config.late].norm())
    targets: dict[str, list[str]] = {TYPE: [str(n) for n in range(100)], VALUE: ["three"]}
    prompts = reader.batch(judged)
    plain = reader.answers(prompts)
    kinds = [q.kind for q in judged]
    aimed = {TYPE: "yes/no", VALUE: "number"}
    texts = [c for c in _captions(config.data) if len(c.split()) < 12][-config.plain :]
    rest = reader.likelihood(texts)

    def measured(aim: str, layer: int, drawn: Sequence[Tensor], alpha: float) -> dict[str, float]:
        each = []
        for vector in drawn:
            with steer(reader.model, {layer: vector}, alpha, "last"):
                after = reader.answers(prompts)
            with steer(reader.model, {layer: vector}, alpha):
                lost = rest - reader.likelihood(texts)
            report = steering_report(plain, after, targets[aim], kinds)
            stayed = [a == b for a, b, kind in zip(plain, after, kinds, strict=True) if kind != aimed[aim]]
            each.append({
                f"turned: {aim}": report[f"target_after: {aimed[aim]}"],
                f"kept: {aim}": float(np.mean(stayed)),
                f"colours kept: {aim}": report["unchanged: other"],
                f"text lost: {aim}": lost,
            })  # fmt: skip
        return {name: float(np.mean([one[name] for one in each])) for name in each[0]}

    ways = {LAST: (config.late, {aim: [v[config.late]] for aim, v in vectors.items()}),
            EARLY: (config.early, {aim: [v[config.early]] for aim, v in vectors.items()}),
            NOISE: (config.late, noise)}  # fmt: skip
    found = {}
    for done, (way, (layer, by_aim)) in enumerate(ways.items()):
        metrics: dict[str, float] = {}
        curves = {}
        for aim, drawn in by_aim.items():
            told = {a: measured(aim, layer, drawn, a) for a in (config.alphas if way == LAST else (1.0,))}
            metrics |= told[1.0]
            if way == LAST:
                before = steering_report(plain, plain, targets[aim], kinds)[f"target_after: {aimed[aim]}"]
                for name, start in (("turned", before), ("kept", 1.0), ("text lost", 0.0)):
                    values = [start, *(each[f"{name}: {aim}"] for each in told.values())]
                    curves[f"{name}: {aim}"] = ([0.0, *told], values)
        right = [a == normalized_answer(q.answer) for a, q in zip(plain, judged, strict=True)]
        metrics |= {
            f"right without: {kind}": float(np.mean([r for r, k in zip(right, kinds, strict=True) if k == kind]))
            for kind in ("yes/no", "number", "other")
        }
        found[way] = Measurement(metrics, curves=curves)
        progress(done + 1, len(ways))
    return found


def arms(config: Config) -> Mapping[str, Arm]:
    """One fine-tuned model gives all readings of concepts; one set of questions all of steering."""
    return {"concepts": partial(_concepts, config), "steering": partial(_steering, config)}


_COLOURS = {SHIFTED: "#0072B2", ORIGINAL: "#999999"}


def figures(result: Result) -> Mapping[str, Figure]:
    """Words and distances recovered, recovery against consistency, and the sweep of alpha."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), layout="constrained")
    top, bottom = figure.subplots(2, 3)
    names = [ORIGINAL, SHIFTED, MEDIAN, GLOBAL, OTHER, RANDOM, CEILING]
    for axes, metric, title in zip(
        top[:2], ("words", "distance recovered"), ("words shared with the tuned concept", "share of the distance gone"),
        strict=True,
    ):  # fmt: skip
        seeds = [result.values(name, metric) for name in names]
        axes.barh(range(len(names)), [v.mean() for v in seeds], color=[_COLOURS.get(n, "#56B4E9") for n in names])
        for y, v in enumerate(seeds):
            axes.plot(v, [y] * len(v), "o", color="black", markersize=3)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_title(title, fontsize=10)
    top[1].set_yticklabels([])
    shown = [m.extra for m in result.measurements[SHIFTED].values()]
    # zero stands for a concept of one sample, which has no consistency
    for word, marker in zip(result.config.words, "osD^", strict=False):
        points = [(x, y) for e in shown for x, y, of in zip(e["consistency"], e["gain"], e["of"], strict=True)
                  if of == word and x]  # fmt: skip
        top[2].plot(*zip(*points, strict=True), marker, markersize=4, alpha=0.7, label=word)
    top[2].set(xlabel="consistency of the concept's shifts")
    top[2].set_title("share of the distance gone, each concept", fontsize=10)
    top[2].legend(frameon=False, fontsize=8)
    panels = ("turned", "kept", "text lost")
    titles = ("answers turned into the target", "answers of other types kept", "plain text: log-likelihood lost")
    for axes, panel, title in zip(bottom, panels, titles, strict=True):
        for aim, colour in ((TYPE, "#0072B2"), (VALUE, "#D55E00")):
            alphas, values = result.curve(LAST, f"{panel}: {aim}")
            axes.plot(alphas, values.mean(0), "o-", color=colour, markersize=4, label=f"{aim}, {LAST}")
            axes.fill_between(alphas, values.min(0), values.max(0), color=colour, alpha=0.12, linewidth=0)
            for way, marker in ((EARLY, "v"), (NOISE, "x")):
                mean = result.values(way, f"{panel}: {aim}").mean()
                axes.plot([1.0], [mean], marker, color=colour, markersize=7, label=f"{aim}, {way}", fillstyle="none")
        axes.set(xlabel="alpha")
        axes.set_title(title, fontsize=10)
    bottom[2].legend(frameon=False, fontsize=8)
    for axes in (*top, *bottom):
        axes.grid(alpha=0.3)
    figure.suptitle(f"{result.config.model}; dots and bands = seeds", fontsize=10)
    return {"representation_shift": figure}


def notes(result: Result) -> str:
    """Data, choices, and what the numbers cannot say."""
    c = result.config
    before, after = (result.values(SHIFTED, f"loss {when}").mean() for when in ("before", "after"))
    example = next(iter(result.measurements[SHIFTED].values())).extra["shown"][c.words[0]][0]
    words = "; ".join(
        f"{name}: {', '.join(found[:6])}" for name, found in zip(("original", "shifted", "tuned"), example, strict=True)
    )
    colours = " and ".join(
        f"{100 * result.values(way, f'colours kept: {TYPE}').mean():.0f} % ({way})" for way in (LAST, NOISE)
    )
    right = ", ".join(
        f"{kind} {100 * result.values(LAST, f'right without: {kind}').mean():.0f} %"
        for kind in ("yes/no", "number", "other")
    )
    return " ".join((
        f"{c.model}, {c.dtype}, text alone: captions of {c.data}, no images. LoRA (rank {c.rank}, all linear",
        f"layers, {c.steps} steps of {c.batch_size}, learning rate {c.lr:g}, not tuned) on captions of colours",
        f"takes the loss of others from {before:.2f} to {after:.2f}; none of the captions whose states are judged is",
        f"among them. States of the final norm that predict {', '.join(c.words)} in {c.samples} captions each, cut",
        f"after the word, all beginnings different; K = {c.concepts}. Original concepts and shifts are of one half of",
        "the samples, tuned concepts of the other,",
        "matched to the original ones: centres shifted by their own samples are those samples' tuned means.",
        "'Distance recovered' is the share of the distance between original and tuned concept that is gone: of",
        "shifts by chance there are a random one, the one of another concept, and the mean of all; 'tuned",
        "concepts of the same half' are the nearest of those that k-means finds there by itself.",
        f"First concept of {c.words[0]!r}, seed 0: {words}.",
        "Semi-NMF and PCA concepts have length 1 and shifts the length of states: added as they are, as the",
        "official code adds them, they drown the concept; 'to scale' divides each by the mean activation of its",
        "samples. PCA's axes of the two halves hardly match to begin with, whichever signs they get. Correlations are",
        f"over all concepts of a seed, of about {c.samples // 2 // c.concepts} samples each: a concept's match in the",
        "other half may say more than its shifts, and whether more samples would show the correlation was not tested.",
        "Steering: questions about captions after three worked ones; answers are the first line, compared as VQAv2",
        f"does, so that '2' is 'two'; right without: {right}",
        "(no is said to nearly every yes/no question, so states are grouped by right answers, where the official",
        f"code groups by given ones). {c.asked} questions of each answer make a vector, others judge it",
        f"({c.judged} of each type); alpha 1, added at the last token of the prompt and after; layers {c.late} and",
        f"{c.early} of the decoder, each with a vector of its own; random vectors are {c.draws} for each aim and seed,",
        f"averaged. 'Kept' is over the types not aimed at; of the colours alone {TYPE} keeps {colours}. At the last",
        "layer a vector is one push to the logits of every question, whatever is asked. 'Text lost' is with the vector",
        "at every token of plain captions, nats a token.",
        "Nothing here says how images behave: with images the calls are tested on tiny random models alone.",
    ))  # fmt: skip

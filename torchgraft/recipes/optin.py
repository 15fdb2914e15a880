"""Evidence for OPTIN: a fine-tuned MiniLM on SST-2 and ResNet-20 on CIFAR-10, pruned once and never trained again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from torchgraft import datasets, zoo
from torchgraft.compression.optin import (
    MacModel,
    OptinConfig,
    OptinScores,
    PruneMasks,
    apply_masks,
    baseline_scores,
    optin_scores,
    rebalanced,
    removal_damage,
    search_masks,
    seconds_per_batch,
    tune_masks,
)
from torchgraft.experiments import Arm, Claim, Measurement, Progress, Result, fit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DATA = ("sst2", "cifar10")
TEXT, IMAGE = "SST-2", "CIFAR-10"
OPTIN, FEATURES, LAST, OUTPUT = "OPTIN", "features only", "last feature only", "output only"
PRIORS, EVEN, TUNED = "released decays and priors", "OPTIN, same share of every layer", "OPTIN and least squares"
PER = "OPTIN, per operation"
BASELINES = ("fisher", "activation", "magnitude", "random")
BUDGETS = (80, 60, 40)
# speed is a matter of how much is cut where, not of how it was scored: three arms show it
TIMED = (OPTIN, "fisher", "magnitude")
RELATIVE = "speed at 60 %"


def _at(budget: int) -> str:
    return f"accuracy at {budget} %"


def _more(text: str, task: str, against: str, budget: int, effect: float, paper: str, arm: str = OPTIN) -> Claim:
    return Claim(
        text,
        _at(budget),
        f"{task}: {arm}",
        f"{task}: {against}",
        effect,
        unit="points",
        factor=100,
        paper=paper,
    )


CLAIMS = (
    Claim(
        "At 60 % of the operations a text classifier loses less than 2 points", _at(60), f"{TEXT}: {OPTIN}",
        f"{TEXT}: whole", 2, direction="equal", unit="points", factor=100,
        paper="BERT-base, GLUE, 60 %: all within about 2 points",
    ),
    _more("Better than magnitude at 60 % (text)", TEXT, "magnitude", 60, 1, "compared by others"),
    _more("Better than first-order Fisher scores at 60 % (text)", TEXT, "fisher", 60, 0, "above Kwon et al. on most"),
    _more("Better than chance at 60 % (text)", TEXT, "random", 60, 1, "not compared"),
    _more("Better than first-order Fisher scores at 40 % (text)", TEXT, "fisher", 40, 0, "not compared"),
    _more("The trajectory beats the output alone at 60 % (text)", TEXT, OUTPUT, 60, 0, "ablation, in words"),
    _more("All later features beat the last alone at 60 % (text)", TEXT, LAST, 60, 0, "ablation, in words"),
    _more("Better than magnitude at 60 % (images)", IMAGE, "magnitude", 60, 1, "comparable on VGG and ResNet"),
    _more("Better than first-order Fisher scores at 60 % (images)", IMAGE, "fisher", 60, 0, "comparable"),
    _more("The trajectory beats the output alone at 60 % (images)", IMAGE, OUTPUT, 60, 0, "ablation, in words"),
    _more("Ranking channels per operation is better at 60 % (images)", IMAGE, OPTIN, 60, 1, "not compared", PER),
    _more("Per operation, better than magnitude at 60 % (images)", IMAGE, "magnitude", 60, 1, "comparable", PER),
    _more("Per operation, better than Fisher scores at 60 % (images)", IMAGE, "fisher", 60, 0, "comparable", PER),
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
        seeds: calibration batches; the two networks are the same for all.
        data: ``sst2, cifar10``; ``built-in`` makes word lists and patterns, for where there is no data.
        device: where to run.
        text_model: ``minilm``, or ``toy``, a random encoder of two layers.
        image_model: ``resnet20-cifar10``, or ``toy``.
        train_texts, steps, batch_size, learning_rate: of the fine-tuning on SST-2 before anything is pruned.
        length: texts are cut after so many tokens.
        texts, images: for testing; 0 takes all.
        held: labelled training examples on which every baseline's layout is chosen.
        calibration_texts, calibration_images: the one unlabelled batch.
        probes: of the scores.
        checked: neurons that are also removed one by one, to compare.
    """

    seeds: int = 2
    data: str = "sst2, cifar10"
    device: str = "cpu"
    text_model: Literal["minilm", "toy"] = "minilm"
    image_model: Literal["resnet20-cifar10", "toy"] = "resnet20-cifar10"
    train_texts: int = 0
    steps: int = 150
    batch_size: int = 16
    learning_rate: float = 1e-4
    length: int = 24
    texts: int = 600
    images: int = 600
    held: int = 64
    calibration_texts: int = 16
    calibration_images: int = 64
    probes: int = 16
    checked: int = 16


_LARGE = Config(
    device="cuda", steps=1500, batch_size=32, learning_rate=5e-5, length=64, texts=0, images=0, held=500,
    calibration_texts=128, calibration_images=128, probes=64, checked=128,
)  # fmt: skip
SCALES = {
    "smoke": Config(
        seeds=1, data="built-in", text_model="toy", image_model="toy", steps=2, batch_size=8, length=8, texts=12,
        images=12, held=8, calibration_texts=6, calibration_images=6, probes=4, checked=6,
    ),
    "laptop": Config(),
    "gpu": _LARGE,
    "paper": replace(_LARGE, probes=256),
}  # fmt: skip


@dataclass(frozen=True)
class _Task:
    """One network with everything that is measured on it; batches are ready for the network."""

    model: nn.Module
    calibration: list[tuple[Any, Tensor]]
    held: list[tuple[Any, Tensor]]
    test: list[tuple[Any, Tensor]]
    timed: Any
    cost: MacModel


def _batches(encode: Any, x: Any, y: Tensor, order: Sequence[int], size: int) -> list[tuple[Any, Tensor]]:
    return [
        (encode([x[i] for i in order[at : at + size]]), y[list(order[at : at + size])])
        for at in range(0, len(order), size)
    ]


@lru_cache(maxsize=1)
def _text_task(config: Config) -> _Task:
    """Fine-tune once; the same network for all arms and seeds."""
    from transformers import BertConfig, BertForSequenceClassification

    if config.text_model == "toy":
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
        torch.manual_seed(0)
        model = BertForSequenceClassification(BertConfig(**sizes, vocab_size=30))
        words = torch.randint(3, 30, (200, config.length), generator=torch.Generator().manual_seed(0))
        texts, labels = list(words), (words[:, :3].sum(1) % 2)
        train, test = (texts[:100], labels[:100]), (texts[100:], labels[100:])

        def encode(rows: Sequence[Any]) -> dict[str, Tensor]:
            ids = torch.stack(list(rows))
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    else:
        encoder, tokenizer = zoo.load(config.text_model)
        torch.manual_seed(0)
        model = BertForSequenceClassification(encoder.config)
        model.bert.load_state_dict(encoder.state_dict())
        data = datasets.load("sst2")
        count = config.train_texts or len(data.train)
        train, test = (list(data.train[:count]), data.train_y[:count]), (list(data.test), data.test_y)

        def encode(rows: Sequence[Any]) -> dict[str, Tensor]:
            made = tokenizer(list(rows), padding=True, truncation=True, max_length=config.length, return_tensors="pt")
            return {key: value.to(config.device) for key, value in made.items() if key != "token_type_ids"}

    order = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(0)).tolist()
    held, rest = order[: config.held], order[config.held :]

    # most of the weights and half the time of a step, for words that are seen once or never
    model.bert.embeddings.requires_grad_(False)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(**encode([train[0][i] for i in batch[0].tolist()]), labels=batch[1]).loss

    fit(
        model.to(config.device), (torch.tensor(rest), train[1][rest]), loss, steps=config.steps,
        batch_size=config.batch_size, schedule="linear", seed=0, clip=1.0, device=config.device,
        optimizer=lambda p: torch.optim.AdamW(p, lr=config.learning_rate),
    )  # fmt: skip
    model.eval()
    size = config.calibration_texts
    calibration = _batches(encode, *train, rest[: size * config.seeds], size)
    count = config.texts or len(test[0])
    # short texts with short ones: less padding
    by_length = sorted(range(count), key=lambda i: len(test[0][i]))
    ready = _batches(encode, *test, by_length, 64)
    tokens = [int(b["attention_mask"].sum()) for b, _ in ready]
    cost = MacModel.from_model(model, sum(tokens) / count)
    # of middling length
    timed = encode([test[0][i] for i in by_length[count // 2 :][:16]])
    return _Task(model, calibration, _batches(encode, *train, held, 64), ready, timed, cost)


@lru_cache(maxsize=1)
def _image_task(config: Config) -> _Task:
    if config.image_model == "toy":
        torch.manual_seed(0)
        model: nn.Module = zoo.CifarResNet(8, 10).eval()
        x = torch.rand(200, 3, 12, 12, generator=torch.Generator().manual_seed(0))
        y = (x.mean((2, 3)) * 30).long()[:, 0] % 10
        train, test = (x[:100], y[:100]), (x[100:], y[100:])
    else:
        model = zoo.load(config.image_model)
        data = datasets.load("cifar10")
        train, test = (data.train_x, data.train_y), (data.test_x, data.test_y)
    model.to(config.device)

    def encode(rows: list[Tensor]) -> Tensor:
        return zoo.CifarResNet.normalize(
            torch.stack(rows).to(config.device).float() / (255 if rows[0].dtype == torch.uint8 else 1)
        )

    order = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(0)).tolist()
    size = config.calibration_images
    held, rest = order[: config.held], order[config.held :]
    calibration = _batches(encode, *train, rest[: size * config.seeds], size)
    ready = _batches(encode, *test, range(config.images or len(test[0])), 100)
    cost = MacModel.from_model(model, batch=ready[0][0][:2])
    return _Task(model, calibration, _batches(encode, *train, held, 100), ready, ready[0][0][:16], cost)


def _task(config: Config, name: str) -> _Task:
    return (_text_task if name == TEXT else _image_task)(config)


def _right(model: nn.Module, batches: Sequence[tuple[Any, Tensor]]) -> list[float]:
    found = []
    with torch.inference_mode():
        for batch, labels in batches:
            out = model(**batch) if isinstance(batch, Mapping) else model(batch)
            logits = out if isinstance(out, Tensor) else out.logits
            found.append(logits.argmax(-1).cpu() == labels)
    return torch.cat(found).double().tolist()


@lru_cache(maxsize=2)
def _scores(config: Config, task: str, seed: int, features: Literal["later", "last"]) -> OptinScores:
    """What several arms of a seed share."""
    made = _task(config, task)
    settings = OptinConfig(probes=config.probes, seed=seed, features=features)
    return optin_scores(made.model, made.calibration[seed][0], settings)


def _measured(config: Config, task: str, name: str, masks: Mapping[int, PruneMasks], tune: Any = None) -> Measurement:
    made = _task(config, task)
    examples, extra = {}, {}
    speed = {}
    for budget, mask in masks.items():
        model = made.model if tune is None else tune_masks(made.model, mask, tune)
        sliced = apply_masks(model, mask)
        examples[_at(budget)] = _right(sliced, made.test)
        extra[f"kept at {budget} %"] = mask.ratio
        if name in TIMED and budget == 60:
            # in turn, so that whatever else the machine does meets both
            pairs = [tuple(seconds_per_batch(m, made.timed, 2) for m in (made.model, sliced)) for _ in range(3)]
            speed[RELATIVE] = float(np.median([whole / smaller for whole, smaller in pairs]))
    return Measurement({k: float(np.mean(v)) for k, v in examples.items()} | speed, examples=examples, extra=extra)


_LAYOUTS: dict[str, dict[str, Any]] = {
    "global": {}, "uniform": {"layout": "uniform"}, "per operation": {"per_operation": True},
}  # fmt: skip


def _searched(config: Config, task: str, scores: OptinScores, layout: str) -> dict[int, PruneMasks]:
    cost = _task(config, task).cost
    return {budget: search_masks(scores, cost, budget / 100, **_LAYOUTS[layout]) for budget in BUDGETS}


def _optin_arm(config: Config, task: str) -> Arm:
    """All readings that share one set of scores."""

    def run(seed: int, progress: Progress) -> Mapping[str, Measurement]:
        made = _task(config, task)
        progress(1, 8, "model ready")
        scores = _scores(config, task, seed, "later")
        last = _scores(config, task, seed, "last")
        progress(4, 8, "scores")
        variants: dict[str, tuple[OptinScores, str]] = {
            OPTIN: (scores, "global"),
            EVEN: (scores, "uniform"),
            FEATURES: (rebalanced(scores, OptinConfig(output=False)), "global"),
            OUTPUT: (rebalanced(scores, OptinConfig(features="none")), "global"),
            LAST: (last, "global"),
            PRIORS: (rebalanced(scores, OptinConfig(official=True)), "global"),
        }
        if task == IMAGE:
            # blocks of an encoder cost the same, so that it would change nothing there
            variants[PER] = scores, "per operation"
        found = {}
        for i, (name, (values, layout)) in enumerate(variants.items()):
            masks = _searched(config, task, values, layout)
            found[f"{task}: {name}"] = _measured(config, task, name, masks)
            if name == OPTIN and task == TEXT:
                found[f"{task}: {TUNED}"] = _measured(config, task, TUNED, masks, made.calibration[seed][0])
            progress(4 + 4 * (i + 1) / len(variants), 8, name)
        ours = found[f"{task}: {OPTIN}"].extra
        ours |= {
            "forward": scores.forward_passes, "backward": scores.backward_passes, "official": scores.official_passes,
            "rank correlation": _agreement(config, task, seed, scores),
        }  # fmt: skip
        whole = _right(made.model, made.test)
        found[f"{task}: whole"] = Measurement(
            {_at(b): float(np.mean(whole)) for b in BUDGETS}, examples={_at(b): whole for b in BUDGETS}
        )
        return found

    return run


def _agreement(config: Config, task: str, seed: int, scores: OptinScores) -> float:
    """Rank correlation of probed scores with those of real removals, over units of the middle block."""
    from scipy.stats import spearmanr

    made = _task(config, task)
    block = len(scores.blocks) // 2
    count = min(config.checked, len(scores.neurons[block]))
    units = torch.linspace(0, len(scores.neurons[block]) - 1, count).long().tolist()
    m, _ = removal_damage(made.model, made.calibration[seed][0], block, "neurons", units, OptinConfig(seed=seed))
    return float(spearmanr(m.numpy(), scores.details["neurons/features"][block][units].numpy()).statistic)


def _baseline_arm(config: Config, task: str, kind: str) -> Arm:
    """The layout that is most accurate on labelled training data: more than OPTIN is given."""

    def run(seed: int, progress: Progress) -> Mapping[str, Measurement]:
        made = _task(config, task)
        batch, labels = made.calibration[seed]
        scores = baseline_scores(made.model, batch, kind, labels=labels, seed=seed)  # type: ignore[arg-type]
        names = [name for name in _LAYOUTS if task == IMAGE or name != "per operation"]
        tried = {name: _searched(config, task, scores, name) for name in names}
        layouts = {}
        for budget in BUDGETS:
            held = {n: float(np.mean(_right(apply_masks(made.model, tried[n][budget]), made.held))) for n in names}
            layouts[budget] = max(held, key=lambda name: held[name])
        masks = {budget: tried[layouts[budget]][budget] for budget in BUDGETS}
        progress(0.5, 1, kind)
        measurement = _measured(config, task, kind, masks)
        measurement.extra["layout"] = {str(k): v for k, v in layouts.items()}
        return {f"{task}: {kind}": measurement}

    return run


def arms(config: Config) -> Mapping[str, Arm]:
    """OPTIN with its ablations, and four simpler scores, on two networks."""
    made: dict[str, Arm] = {}
    for task in (TEXT, IMAGE):
        made[f"{task}: {OPTIN} and ablations"] = _optin_arm(config, task)
        for kind in BASELINES:
            made[f"{task}: {kind} scores"] = _baseline_arm(config, task, kind)
    return made


_STYLES = {
    OPTIN: ("#D55E00", "o-"), PER: ("#CC79A7", "o-"), OUTPUT: ("#E69F00", "o:"), LAST: ("#E69F00", "o--"),
    "fisher": ("#0072B2", "s-"), "activation": ("#56B4E9", "s--"), "magnitude": ("#009E73", "^-"),
    "random": ("#999999", "x-"),
}  # fmt: skip


def figures(result: Result) -> Mapping[str, Figure]:
    """Accuracy against operations for both networks, and measured speed of the sliced models at 60 %."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.2, 1.2, 0.9))
    for ax, task in ((left, TEXT), (middle, IMAGE)):
        whole = 100 * result.values(f"{task}: whole", _at(60)).mean()
        ax.axhline(whole, color="#000000", linewidth=0.8, linestyle=":")
        for name, (colour, style) in _STYLES.items():
            if f"{task}: {name}" not in result.measurements:
                continue
            values = np.array([[100 * v for v in result.values(f"{task}: {name}", _at(b))] for b in BUDGETS])
            x = [100, *BUDGETS]
            ax.plot(x, [whole, *values.mean(1)], style, color=colour, label=name, markersize=4, linewidth=1.3)
            if values.shape[1] > 1:
                ax.fill_between(
                    x, [whole, *values.min(1)], [whole, *values.max(1)], color=colour, alpha=0.1, linewidth=0
                )
        ax.invert_xaxis()
        ax.set(xlabel="operations kept, %", ylabel="accuracy, %", title=task)
        ax.spines[["top", "right"]].set_visible(False)
    figure.legend(*middle.get_legend_handles_labels(), loc="outside lower left", ncols=8, frameon=False, fontsize=8)
    rows = [(f"{t}: {n}", f"{t}\n{n}") for t in (TEXT, IMAGE) for n in TIMED]
    for y, (arm, label) in enumerate(rows):
        values = result.values(arm, RELATIVE)
        right.barh(y, values.mean(), color=_STYLES[label.split("\n")[1]][0])
        right.plot(values, [y] * len(values), "k.", markersize=4)
    right.axvline(1, color="#000000", linewidth=0.8, linestyle=":")
    right.set_yticks(range(len(rows)), [label for _, label in rows], fontsize=8)
    right.invert_yaxis()
    right.set(xlabel="measured speed of the sliced model at 60 %,\ntimes the whole model")
    right.spines[["top", "right"]].set_visible(False)
    return {"optin": figure}


def notes(result: Result) -> str:
    """What was measured, and what the numbers cannot say."""
    c = result.config

    def mean(task: str, key: str) -> float:
        return float(np.mean([m.extra[key] for m in result.measurements[f"{task}: {OPTIN}"].values()]))

    passes = "; ".join(
        f"{task}: {mean(task, 'forward'):.0f} forward and {mean(task, 'backward'):.0f} backward passes of the batch, "
        f"where the released procedure takes {mean(task, 'official'):.0f} forward passes; rank correlation of probed "
        f"with really removed units {mean(task, 'rank correlation'):.2f} ({c.checked} units of the middle block)"
        for task in (TEXT, IMAGE)
    )
    counts = {task: len(result.examples(f"{task}: whole", _at(60))) for task in (TEXT, IMAGE)}
    return (
        f"Text: {c.text_model} with a linear head, fine-tuned once for {c.steps} steps of {c.batch_size} sentences at "
        f"{c.learning_rate:g} with frozen embeddings, texts cut after {c.length} tokens; images: "
        f"{c.image_model} as published. Nothing is trained after pruning. One unlabelled batch of "
        f"{c.calibration_texts} texts or {c.calibration_images} images, another for each of {c.seeds} "
        f"seeds; {c.probes} probes. {passes}. Tested on the first {counts[TEXT]} sentences and {counts[IMAGE]} "
        "images; intervals are a paired bootstrap over them, averaged over seeds, so "
        "they say nothing about other networks. OPTIN takes the global search; every baseline takes the best of the "
        f"global search, the same share of every layer and (images) the ranking per operation by accuracy on {c.held} "
        "labelled training examples, and "
        f"Fisher scores use labels: both is more than OPTIN gets. '{PRIORS}': the released code's factors by layer and "
        f"by index on the same damage. '{TUNED}': our extension. Speed at 60 %: dense and sliced model in turn on 16 "
        "test examples, on a machine that may do other things; `torchgraft bench optin` is the careful measurement. "
        "Operations of ResNet-20 include what cannot be pruned; channels between the two convolutions of a block are "
        "pruned, the residual stream is not. A channel of the first stage costs four times one of the last, which "
        f"the paper's ranking by score alone does not see: '{PER}' ranks channels by score over cost."
    )

"""Evidence for reprogramming lottery tickets: from clothes to digits, over shots, in accuracy and calibration."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft import datasets
from torchgraft.compression.lottery_reprogramming import (
    LinearProbe,
    ReprogrammedClassifier,
    VisualPrompt,
    apply_masks,
    expected_calibration_error,
    few_shot_indices,
    lottery_ticket,
    magnitude_prune,
    make_permanent,
    prepare_images,
    quantize_weights,
    random_masks,
    reliability,
    transfer_metrics,
)
from torchgraft.experiments import Arm, Claim, Measurement, Progress, Result, fit, pick_learning_rate
from torchgraft.experiments.statistics import t_interval
from torchgraft.zoo import CifarResNet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DATA = ("fashion-mnist",)
DENSE, TICKET, EARLIER = "dense", "ticket", "ticket, half the rounds"
INT8 = "int8 weights"
ONE_SHOT, RANDOM, NOT_REWOUND = "one-shot mask", "random mask", "ticket's mask, not rewound"
MODELS = (DENSE, TICKET, EARLIER, INT8)
# on the source task alone: they show what the rounds and the rewinding are good for
CONTROLS = (ONE_SHOT, RANDOM, NOT_REWOUND)
METHODS = ("LP", "VP")
# ablations of the mapping, of the dense network alone
MAPPINGS = {"VP": "ilm", "VP mapped once": "flm", "VP mapped at random": "rlm"}
FEW = "few shots"
SOURCE, LOST, GAINED = "source accuracy", "accuracy lost", "ECE gained"


def _loses(text: str, arm: str, paper: str, metric: str = LOST, against: str | float = 0.0) -> Claim:
    return Claim(text, metric, arm, against, 1.0, unit="points", factor=100, paper=paper)


def _lost(method: str, amount: str, model: str = TICKET) -> str:
    """Name of the reading that compares a model with the dense one."""
    return f"{model} against dense: {method}, {amount}"


_WORSE = "on some targets clearly worse (numbers unverified)"
_CALIBRATED = "dense always better calibrated than its tickets"
_QUANTISED = "no such loss (later version)"
CLAIMS = (
    Claim(
        "The ticket is as accurate as the dense network on its own task", SOURCE, TICKET, DENSE, 1.0,
        direction="equal", unit="points", factor=100, paper="similar ImageNet accuracy",
    ),
    _loses("Reprogrammed with few images (mean of up to 10 per class), the ticket is less accurate than the dense "
           "network", _lost("VP", FEW), _WORSE),
    _loses("Reprogrammed with all images, the ticket is less accurate than the dense network", _lost("VP", "all"),
           _WORSE),
    _loses("Reprogramming a ticket costs more accuracy with few images than with all", _lost("VP", FEW),
           "VP gap largest in low-data regimes", against=_lost("VP", "all")),
    _loses("With few images a ticket costs more accuracy under VP than under a linear probe", _lost("VP", FEW),
           "LP: gap smaller", against=_lost("LP", FEW)),
    _loses("With all images a ticket costs more accuracy under VP than under a linear probe", _lost("VP", "all"),
           "LP: gap smaller", against=_lost("LP", "all")),
    _loses("Under a linear probe the ticket costs more accuracy with few images than with all", _lost("LP", FEW),
           "LP: gap shrinking with data", against=_lost("LP", "all")),
    _loses("Under VP with few images the ticket is worse calibrated", _lost("VP", FEW), _CALIBRATED, GAINED),
    _loses("Under VP with all images the ticket is worse calibrated", _lost("VP", "all"), _CALIBRATED, GAINED),
    _loses("Under LP with few images the ticket is worse calibrated", _lost("LP", FEW), _CALIBRATED, GAINED),
    _loses("Under LP with all images the ticket is worse calibrated", _lost("LP", "all"), _CALIBRATED, GAINED),
    *(
        Claim(
            f"Quantising the weights to 8 bits leaves calibration under {method} with {words} as it was", GAINED,
            _lost(method, amount, INT8), 0.0, 1.0, direction="equal", unit="points", factor=100, paper=_QUANTISED,
        )
        for method in METHODS
        for amount, words in ((FEW, "few images"), ("all", "all images"))
    ),
    _loses("A linear probe of all images is more accurate than VP (dense network)", "LP, dense",
           "in words: LP above VP", "accuracy, all", "VP, dense"),
    _loses("With all images, mapping anew in every epoch beats a random mapping (dense network)", "VP, dense",
           "not compared (the paper of ILM: yes)", "accuracy, all", "VP mapped at random, dense"),
    _loses("With all images, mapping anew in every epoch beats mapping once (dense network)", "VP, dense",
           "not compared (the paper of ILM: yes)", "accuracy, all", "VP mapped once, dense"),
    _loses("The ticket is more accurate on its own task than a random mask of equal sparsity", TICKET,
           "not compared (the lottery ticket papers: yes)", SOURCE, RANDOM),
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
        seeds: how many; each has its own source network, its own tickets and its own few-shot sets.
        data: source task: ``fashion-mnist``, ``cifar10``, or ``digits`` where there is no data.
        target: target task: ``digits``, ``fashion-mnist`` or ``cifar10`` (colour needs a colour source).
        device: where to train.
        network: a CNN of four layers of ``channels``, or ResNet-20 for small images.
        channels: of the CNN.
        size: side of the network's input, of the images of the source and the canvas of the prompt.
        in_size: side of the target images in the middle of the canvas.
        source_images, source_tests: how many of the source task; 0 takes all.
        source_steps, batch_size, source_rate: of the training of the source network and of each round (Adam, cosine).
        rewind: share of the training after which the weights are taken that rounds go back to.
        rounds, rate: of pruning; every round takes ``rate`` of the weights left.
        shots: target images per class; 0 takes all, and must be the last.
        held_images: of the target, kept from training, for learning rates and temperatures.
        tests: target images for testing; 0 takes all.
        steps, target_batch: of each training on the target, in whole epochs.
        probe_rates, prompt_rates: the grids of learning rates of LP and of VP that every network gets, of equal size.
        bins: of the calibration error.
    """

    seeds: int = 4
    data: str = "fashion-mnist"
    target: str = "digits"
    device: str = "cpu"
    network: Literal["cnn", "resnet20"] = "cnn"
    channels: tuple[int, ...] = (16, 32, 48, 48)
    size: int = 20
    in_size: int = 10
    source_images: int = 10_000
    source_tests: int = 5000
    source_steps: int = 160
    batch_size: int = 128
    source_rate: float = 0.003
    rewind: float = 0.05
    rounds: int = 8
    rate: float = 0.2
    shots: tuple[int, ...] = (1, 5, 10, 50, 0)
    held_images: int = 300
    tests: int = 0
    steps: int = 80
    target_batch: int = 64
    probe_rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1)
    prompt_rates: tuple[float, ...] = (0.03, 0.1, 0.2, 0.4, 1.0)
    bins: int = 15


_LARGE = Config(
    device="cuda", data="cifar10", target="fashion-mnist", network="resnet20", size=32, in_size=16, source_images=0,
    source_tests=0, source_steps=2000, source_rate=0.005, held_images=2000, steps=500, target_batch=128,
)  # fmt: skip

SCALES = {
    "smoke": Config(
        seeds=1, data="digits", channels=(4, 4, 8, 8), size=12, in_size=8, source_images=200, source_tests=50,
        source_steps=4, batch_size=16, rewind=0.25, rounds=2, shots=(1, 0), held_images=100, tests=40, steps=2,
        target_batch=512, probe_rates=(0.1,), prompt_rates=(0.1,),
    ),
    "laptop": Config(),
    "gpu": _LARGE,
    # the published network, ResNet-50 on ImageNet, and its tickets are to be had from the authors alone; this has the
    # published schedule on the largest source at hand
    "paper": Config(**(vars(_LARGE) | {
        "source_steps": 15_000, "rounds": 9, "steps": 39_000, "probe_rates": (0.01,), "prompt_rates": (0.01,),
    })),
}  # fmt: skip


class Source(NamedTuple):
    """A network of the source task: weights, test accuracy there, share of prunable weights kept."""

    state: dict[str, Tensor]
    accuracy: float
    kept: float


class Part(NamedTuple):
    """Images as numbers in 0..1, and their classes."""

    x: Tensor
    y: Tensor


class _Whole(torch.utils.data.Dataset[Part]):
    """Takes the images of a batch at once; one by one costs as much as a layer."""

    def __init__(self, part: Part) -> None:
        self.part = part

    def __len__(self) -> int:
        return len(self.part.y)

    def __getitems__(self, index: list[int]) -> Part:
        return Part(self.part.x[index].contiguous(memory_format=torch.channels_last), self.part.y[index])


def cnn(channels: tuple[int, ...], inputs: int, size: int, classes: int) -> nn.Module:
    """Convolutions of 3 x 3 with batch norm, the first three of stride 2, then one linear layer on every place."""
    layers: list[nn.Module] = []
    for i, outputs in enumerate(channels):
        stride = 2 if i < 3 else 1
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        inputs, size = outputs, -(-size // stride)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs * size**2, classes))


def few_of(shots: tuple[int, ...]) -> list[int]:
    """Which numbers of shots count as few."""
    return [n for n in shots if 0 < n <= 10] or [shots[0]]


def floor_of_ece(probs: Tensor, bins: int, draws: int = 20) -> float:
    """ECE that a calibrated classifier of the same confidences would show on as many examples, which is not zero."""
    drawn = torch.multinomial(probs, draws, replacement=True, generator=torch.Generator().manual_seed(0))
    return float(np.mean([expected_calibration_error(probs, y, bins).item() for y in drawn.T]))


def arms(config: Config) -> Mapping[str, Arm]:
    """One arm per network, each read under both methods and all shots, and one of their differences."""
    if len(config.shots) < 2 or config.shots[-1] != 0 or 0 in config.shots[:-1]:
        raise ValueError(f"shots must list at least one number of images and end with 0 (all), got {config.shots}")
    source, target = datasets.load(config.data), datasets.load(config.target)
    if not isinstance(source, datasets.Images) or not isinstance(target, datasets.Images):
        raise ValueError(f"data and target must be images, got {config.data!r} and {config.target!r}")
    colours, classes = source.train_x.shape[1], len(target.classes)
    few = few_of(config.shots)

    def some(x: Tensor, y: Tensor, count: int, size: int) -> Part:
        count = count or len(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # grey digits on a colour network are meant
            return Part(prepare_images(x[:count], size, colours), y[:count])

    train = some(source.train_x, source.train_y, config.source_images, config.size)
    test = some(source.test_x, source.test_y, config.source_tests, config.size)
    mean, std = (tuple(v.tolist()) for v in (train.x.mean((0, 2, 3)), train.x.std((0, 2, 3))))
    order = torch.randperm(len(target.train_y), generator=torch.Generator().manual_seed(0))
    pool, held = (
        some(target.train_x[index], target.train_y[index], 0, config.in_size)
        for index in (order[config.held_images :], order[: config.held_images])
    )
    tests = some(target.test_x, target.test_y, config.tests, config.in_size)

    def make() -> nn.Module:
        small = config.network == "cnn"
        model = cnn(config.channels, colours, config.size, len(source.classes)) if small else CifarResNet(20, 10)
        return model.to(config.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def normalised(x: Tensor) -> Tensor:
        middle, spread = (x.new_tensor(v).view(-1, 1, 1) for v in (mean, std))
        return ((x - middle) / spread).contiguous(memory_format=torch.channels_last)

    train, test = (Part(normalised(part.x), part.y) for part in (train, test))

    @torch.no_grad()
    def accuracy(model: nn.Module) -> float:
        model.eval()
        right = 0
        for x, y in zip(test.x.split(500), test.y.split(500), strict=True):
            right += int((model(x.to(config.device)).argmax(1).cpu() == y).sum())
        return right / len(test.y)

    @lru_cache(maxsize=2)
    def networks(seed: int) -> Mapping[str, Source]:
        """Every source network of a seed; all but int8 take the same number of steps in their last training."""

        def trained(model: nn.Module, steps: int) -> float:
            fit(
                model, _Whole(train), lambda m, batch: F.cross_entropy(m(batch[0]), batch[1]), steps=steps,
                batch_size=config.batch_size, seed=seed, schedule="cosine", device=config.device,
                optimizer=lambda p: torch.optim.Adam(p, lr=config.source_rate), collate=lambda batch: batch,
            )  # fmt: skip
            return accuracy(model)

        def full(m: nn.Module) -> float:
            return trained(m, config.source_steps)

        torch.manual_seed(seed)
        model = make()
        trained(model, max(1, round(config.rewind * config.source_steps)))
        early = {name: value.clone() for name, value in model.state_dict().items()}
        half = max(1, config.rounds // 2)
        wanted = {0: DENSE, half: EARLIER, config.rounds: TICKET}
        tickets = {
            wanted[t.round]: t
            for t in lottery_ticket(model, full, config.rounds, config.rate, early, keep=wanted.__contains__)
        }
        dense, last = tickets[DENSE], tickets[TICKET]
        found = {name: Source(t.state, t.result, t.kept) for name, t in tickets.items()}

        def read(right: float, kept: float) -> Source:
            return Source({name: v.clone() for name, v in model.state_dict().items()}, right, kept)

        def retrained(masks: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Source:
            model.load_state_dict(start)
            apply_masks(model, masks, permanent=False)
            right = full(model)
            make_permanent(model)
            return read(right, last.kept)

        model.load_state_dict(dense.state)
        found[ONE_SHOT] = retrained(magnitude_prune(model, last.kept), early)
        found[RANDOM] = retrained(random_masks(last.masks, seed), early)
        found[NOT_REWOUND] = retrained(last.masks, dense.state)
        model.load_state_dict(dense.state)
        quantize_weights(model)
        found[INT8] = read(accuracy(model), 1.0)
        return found

    def fitted(
        seed: int, draw: int, name: str, method: str, shots: int, lr: float
    ) -> LinearProbe | ReprogrammedClassifier:
        model = make()
        model.load_state_dict(networks(seed)[name].state)
        model.eval()
        index = few_shot_indices(pool.y, shots, draw)
        data, batch = (pool.x[index], pool.y[index]), config.target_batch
        epochs = -(-config.steps // -(-len(index) // batch))
        if method == "LP":
            probe = LinearProbe(model, classes, size=config.size, mean=mean, std=std, channels=colours, seed=draw)
            return probe.fit(data, epochs, lr, batch_size=batch, seed=draw)
        prompt = VisualPrompt(config.size, config.in_size, mean=mean, std=std, channels=colours)
        reprogrammed = ReprogrammedClassifier(model, prompt, MAPPINGS[method], classes, seed=draw)  # type: ignore[arg-type]
        return reprogrammed.fit(data, epochs, lr, batch_size=batch, seed=draw)

    def rate(name: str, method: str, shots: int, progress: Progress) -> float:
        """One rate for few-shot sets and one for larger ones, by the likelihood of held-out images.

        Not by their accuracy, which is too coarse to tell apart what calibration depends on.
        """
        tried = max(few) if shots in few else 0

        def score(lr: float) -> float:
            model = fitted(0, 1000, name, method, tried, lr)
            return -transfer_metrics(model.predict_proba(held.x), held.y, config.bins)["nll"]

        key = f"lr {method}, {name}, {FEW if tried else 'more'}"
        grid = config.probe_rates if method == "LP" else config.prompt_rates
        return progress.once(key, lambda: pick_learning_rate(grid, score))["chosen"]

    measured: dict[tuple[int, str, str, int], tuple[dict[str, float], list[list[float]]]] = {}

    def transferred(
        seed: int, name: str, method: str, shots: int, progress: Progress
    ) -> tuple[dict[str, float], list[list[float]]]:
        """Readings of one training on the target, and its bins of confidence."""
        key = seed, name, method, shots
        if key not in measured:
            model = fitted(seed, seed, name, method, shots, rate(name, method, shots, progress))
            probs = model.predict_proba(tests.x)
            found = transfer_metrics(probs, tests.y, config.bins)
            found["confidence"] = float(probs.max(1).values.mean())
            found["floor"] = floor_of_ece(probs, config.bins)
            held_bins = reliability(probs, tests.y, config.bins)
            full = held_bins.counts > 0
            bins = [v[full].tolist() for v in (held_bins.confidence, held_bins.accuracy, held_bins.counts)]
            model.calibrate(held.x, held.y)
            found["scaled"] = transfer_metrics(model.predict_proba(tests.x), tests.y, config.bins)["ece"]
            measured[key] = found, bins
        return measured[key]

    def averaged(values: list[float], amount: str) -> float:
        chosen = [v for v, n in zip(values, config.shots, strict=True) if (n in few if amount == FEW else n == 0)]
        return float(np.mean(chosen))

    places = [float(at) for at in range(len(config.shots))]

    def arm_of(name: str) -> Arm:
        def run(seed: int, progress: Progress) -> Mapping[str, Measurement]:
            total = 1 + len(METHODS) * len(config.shots)
            progress(0, total, "source networks")
            own, done = networks(seed)[name], 1
            progress(done, total, f"source accuracy {own.accuracy:.3f}")
            readings = {name: Measurement({SOURCE: own.accuracy, "weights kept": own.kept})}
            for method in METHODS:
                found = []
                for shots in config.shots:
                    found.append(transferred(seed, name, method, shots, progress))
                    done += 1
                    progress(done, total, method)
                series = {key: [f[key] for f, _ in found] for key in found[0][0]}
                metrics = {
                    f"{label}, {amount}": averaged(series[key], amount)
                    for label, key in (
                        ("accuracy", "acc"), ("ECE", "ece"), ("ECE with temperature", "scaled"),
                        ("ECE floor", "floor"), ("confidence", "confidence"),
                    )
                    for amount in (FEW, "all")
                }  # fmt: skip
                curves = {key: (places, series[key]) for key in ("acc", "ece", "nll")}
                readings[f"{method}, {name}"] = Measurement(metrics, curves, extra={"bins": found[-1][1]})
            return readings

        return run

    def control(name: str) -> Arm:
        def run(seed: int, progress: Progress) -> Measurement:
            own = networks(seed)[name]
            return Measurement({SOURCE: own.accuracy, "weights kept": own.kept})

        return run

    def ablation(method: str) -> Arm:
        def run(seed: int, progress: Progress) -> Mapping[str, Measurement]:
            found, _ = transferred(seed, DENSE, method, 0, progress)
            return {f"{method}, {DENSE}": Measurement({"accuracy, all": found["acc"], "ECE, all": found["ece"]})}

        return run

    def differences(seed: int, progress: Progress) -> Mapping[str, Measurement]:
        """What each compressed network loses against the dense one of its seed, on the very same images."""
        readings = {}
        for name in MODELS[1:]:
            for method in METHODS:
                pairs = [
                    (transferred(seed, DENSE, method, n, progress)[0], transferred(seed, name, method, n, progress)[0])
                    for n in config.shots
                ]
                series = {
                    LOST: [a["acc"] - b["acc"] for a, b in pairs],
                    GAINED: [b["ece"] - a["ece"] for a, b in pairs],
                }
                for amount in (FEW, "all"):
                    readings[_lost(method, amount, name)] = Measurement(
                        {key: averaged(values, amount) for key, values in series.items()},
                        {key: (places, values) for key, values in series.items()},
                    )
        return readings

    return {
        **{name: arm_of(name) for name in MODELS},
        **{name: control(name) for name in CONTROLS},
        **{method: ablation(method) for method in MAPPINGS if method not in METHODS},
        "differences": differences,
    }


_LOOKS = {
    DENSE: ("#000000", "o", "-"), TICKET: ("#D55E00", "s", "-"), EARLIER: ("#E69F00", "D", "--"),
    INT8: ("#009E73", "v", "-."),
}  # fmt: skip
_TITLES = {"LP": "linear probe (LP)", "VP": "visual prompt (VP)"}


def _bars(values: np.ndarray) -> np.ndarray:
    """Half widths of the 95 % intervals of the means over seeds, in points; zeros for one seed."""
    halves = [0.0 if (found := t_interval(column)) is None else (found[1] - found[0]) / 2 for column in values.T]
    return 100 * np.array(halves)


def _kept(result: Result, name: str) -> str:
    if name in (DENSE, INT8):
        return name
    return f"{name} ({result.values(name, 'weights kept').mean():.0%} kept)"


def _reliability(result: Result) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.6), layout="constrained")
    for ax, method in zip(figure.subplots(1, 2, sharey=True), METHODS, strict=True):
        ax.plot([0, 100], [0, 100], "--", color="#777777", linewidth=1, label="calibrated")
        for name in (DENSE, TICKET):
            colour, marker, line = _LOOKS[name]
            confidence, right, counts = result.measurements[f"{method}, {name}"][result.seeds[0]].extra["bins"]
            x, y = 100 * np.array(confidence), 100 * np.array(right)
            ax.plot(x, y, line, color=colour, linewidth=1)
            ax.scatter(x, y, s=[6 + n for n in counts], color=colour, marker=marker, alpha=0.6, label=name)
        ax.set(title=_TITLES[method], xlabel="confidence, %", xlim=(0, 102), ylim=(-3, 103))
        ax.grid(alpha=0.3)
    figure.axes[0].set_ylabel("accuracy, %")
    figure.axes[0].legend(frameon=False)
    figure.suptitle(
        f"Reliability with all images of {result.config.target}, first seed; area: images in the bin", fontsize=11
    )
    return figure


def figures(result: Result) -> Mapping[str, Figure]:
    """Accuracy and calibration against shots, what each compressed network loses to dense, and reliability."""
    from matplotlib.figure import Figure

    config = result.config
    ticks = [str(n) if n else "all" for n in config.shots]

    def grid(rows: list[tuple[str, str]], reading: str, names: tuple[str, ...], title: str) -> Figure:
        figure = Figure(figsize=(10.5, 7.5), layout="constrained")
        axes = figure.subplots(2, 2, sharex=True)
        for (row, (curve, label)), (column, method) in itertools.product(enumerate(rows), enumerate(METHODS)):
            ax = axes[row][column]
            for place, name in enumerate(names):
                colour, marker, line = _LOOKS[name]
                x, y = result.curve(reading.format(method=method, name=name), curve)
                ax.errorbar(
                    x + 0.09 * (place - (len(names) - 1) / 2), 100 * y.mean(0), yerr=_bars(y), color=colour,
                    marker=marker, linestyle=line, capsize=2, linewidth=1.4, markersize=5, label=_kept(result, name),
                )  # fmt: skip
            ax.set_xticks(range(len(ticks)), ticks)
            ax.grid(alpha=0.3)
            if curve in (LOST, GAINED):
                ax.axhline(0, color="#555555", linewidth=0.8)
            ax.set_ylabel(label)
            if row == 0:
                ax.set_title(_TITLES[method])
            else:
                ax.set_xlabel(f"{config.target} images per class for training")
        axes[0][0].legend(frameon=False, fontsize=8)
        figure.suptitle(f"{title}; mean and 95 % interval of {len(result.seeds)} source networks ({config.data})")
        return figure

    return {
        "lottery_reprogramming": grid(
            [("acc", "test accuracy, %"), ("ece", "calibration error (ECE), points")], "{method}, {name}", MODELS,
            "Accuracy and calibration",
        ),
        "lottery_reprogramming-against-dense": grid(
            [(LOST, "accuracy lost against dense, points"), (GAINED, "ECE gained against dense, points")],
            f"{{name}} against dense: {{method}}, {FEW}", MODELS[1:], "Paired differences to the dense network",
        ),
        "lottery_reprogramming-reliability": _reliability(result),
    }  # fmt: skip


def _rates(result: Result) -> str:
    """Learning rates chosen, and how many lie at an end of their grid."""
    words = []
    for method, grid in (("LP", result.config.probe_rates), ("VP", result.config.prompt_rates)):
        chosen = [v["chosen"] for key, v in result.tuned.items() if key.removeprefix("lr ").startswith(method)]
        ends = sum(lr in (min(grid), max(grid)) for lr in chosen)
        words.append(
            f"{method} {min(chosen):g} to {max(chosen):g} ({ends} of {len(chosen)} at an end of "
            f"{', '.join(f'{lr:g}' for lr in grid)})"
        )
    own = {
        amount: ", ".join(f"{name} {result.tuned[f'lr VP, {name}, {amount}']['chosen']:g}" for name in MODELS)
        for amount in (FEW, "more")
    }
    return f"{'; '.join(words)}. Under VP with few shots: {own[FEW]}; with more: {own['more']}"


def _moved(result: Result, name: str) -> str:
    """How far single networks move from their dense one under VP, whatever the sign."""
    sizes = [100 * np.abs(result.values(_lost("VP", amount, name), LOST)).mean() for amount in (FEW, "all")]
    return f"{sizes[0]:.1f} points of accuracy with few shots and {sizes[1]:.1f} with all images"


def notes(result: Result) -> str:
    """Which networks count as tickets, learning rates, what the calibration error is made of."""
    c = result.config
    dense = result.values(DENSE, SOURCE).mean()
    sources = []
    for name in (*MODELS, *CONTROLS):
        mean = result.values(name, SOURCE).mean()
        counts = f", {'a' if mean >= dense - 0.01 else 'no'} ticket"
        sources.append(f"{_kept(result, name)} {mean:.1%}{'' if name in (DENSE, INT8) else counts}")

    def both(metric: str, method: str, amount: str) -> str:
        return " and ".join(f"{100 * result.values(f'{method}, {n}', f'{metric}, {amount}').mean():.1f}"
                            for n in (DENSE, TICKET))  # fmt: skip

    calibration = "; ".join(
        f"{method} with {amount}: accuracy {both('accuracy', method, amount)} %, mean confidence "
        f"{both('confidence', method, amount)} %, ECE {both('ECE', method, amount)}, of calibrated classifiers of the "
        f"same confidences {both('ECE floor', method, amount)}, after temperature scaling on held-out images "
        f"{both('ECE with temperature', method, amount)}"
        for method in METHODS
        for amount in (FEW, "all")
    )
    return (
        f"Source {c.data}, {c.source_images or 'all'} images of {c.size} px, {c.network}, {c.source_steps} steps for "
        f"the dense network and for each of {c.rounds} rounds of {c.rate:.0%}, rewound to {c.rewind:.0%} of training. "
        f"Accuracy there: {'; '.join(sources)} (a ticket is at most one point below dense; one-shot and random masks "
        f"are retrained from the same early weights as the ticket, '{NOT_REWOUND}' from the trained dense weights). "
        f"Target {c.target}, {c.in_size} px in the middle of {c.size}, mapping anew before every epoch (ILM), at least "
        f"{c.steps} steps for every training, tests on {c.tests or 'all'} images, ECE in {c.bins} bins of the softmax "
        f"over the target classes. '{FEW}' is the mean over {', '.join(map(str, few_of(c.shots)))} per class. Learning "
        f"rates of every network, one for few shots and one for more, by the likelihood of {c.held_images} held-out "
        f"images (more than a few-shot user has): {_rates(result)}. Dense and ticket: {calibration}. Where confidence "
        "is below accuracy, the calibration error is one of too little confidence, and the less accurate network may "
        "have the smaller one. "
        f"Under VP one network of {INT8}, almost the dense one, lies {_moved(result, INT8)} from dense on average, one "
        f"ticket {_moved(result, TICKET)}: where two networks have different learning rates (above), their difference "
        "under VP is one of network and rate together, and the choice rests on a single trial of each. Where tickets "
        "are ahead of dense, a likely reason (not tested) is that a short training on ten classes leaves this network "
        "with more weights than it needs, so that pruning costs nothing on either task, unlike at the paper's scale. "
        "Every seed has its own source network, so intervals hold for such networks and not for "
        "this target against others. One small network and one pair of tasks of ten classes each: no more than a spot "
        "check of the paper's ResNet-50 on ImageNet."
    )

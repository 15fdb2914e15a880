"""Evidence for self-supervised label augmentation: a small network on few CIFAR-10 images, ResNet-32 on many."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft import datasets
from torchgraft.experiments import Arm, Claim, FitResult, Measurement, Progress, Result, fit, pick_learning_rate
from torchgraft.recipes._images import coloured, cropped, flipped
from torchgraft.vision import sla
from torchgraft.zoo import CifarResNet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DATA = ("cifar10",)
EQUAL = "baseline, equal compute"

CLAIMS = (
    Claim(
        "The aggregated classifier is more accurate than the baseline", "accuracy", "SLA+AG", "baseline", 0.5,
        unit="points", factor=100, paper="CIFAR-10, ResNet-32: 94.50 against 92.39 (unverified)",
    ),
    Claim(
        "The distilled classifier is more accurate than the baseline", "accuracy", "SLA+SD", "baseline", 0.5,
        unit="points", factor=100, paper="CIFAR-10, ResNet-32: 93.26 against 92.39 (unverified)",
    ),
    Claim(
        "Aggregation is more accurate than distillation", "accuracy", "SLA+AG", "SLA+SD", 0.5,
        unit="points", factor=100, paper="CIFAR-10, ResNet-32: 94.50 against 93.26 (unverified)",
    ),
    Claim(
        "Aggregation is more accurate than a single upright pass", "accuracy", "SLA+AG", "SLA+SI", 0.5,
        unit="points", factor=100, paper="in words: the single pass is the weakest reading",
    ),
    Claim(
        "Rotations as plain augmentation do harm", "accuracy", "DA", "baseline", 0.5,
        direction="lower", unit="points", factor=100, paper="in words: below the baseline",
    ),
    Claim(
        "Rotations as a second task do harm", "accuracy", "MT", "baseline", 0.5,
        direction="lower", unit="points", factor=100, paper="in words: below the baseline",
    ),
    Claim(
        "The aggregated classifier also beats a baseline of as much training compute", "accuracy", "SLA+AG", EQUAL,
        0.5, unit="points", factor=100, paper="not compared",
    ),
    Claim(
        "The distilled classifier also beats a baseline of as much training compute", "accuracy", "SLA+SD", EQUAL,
        0.5, unit="points", factor=100, paper="not compared",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
        seeds: how many.
        data: ``cifar10``, or ``digits`` (small grey digits, enlarged) where there is no data.
        device: where to train.
        variant: ``full`` takes ``train_images`` at random; ``long_tailed`` makes class k have
            ``(1 / imbalance) ** (k / (N - 1))`` times the images of class 0; ``few_shot`` takes ``shots`` per class.
        transforms: as in ``LabelAugmentation``.
        loss: base loss of every arm; ``class_balanced`` and ``ldam`` use the class counts.
        train_images, test_images, held_images: how many; 0 takes all. Held-out images choose the learning rates.
        imbalance, shots: of the variants.
        network: a CNN of four layers of ``channels``, or ResNet-32 with zero-padded shortcuts.
        channels, stride: of the CNN; the stride of its first convolution.
        steps, batch_size: optimiser steps, and labelled images a step.
        tune_steps: steps of each trial of the learning-rate grid; far shorter trials prefer rates that are too low.
        learning_rates: the grid that every arm gets.
        schedule: one cycle, or the rate divided by ten at one half and at three quarters.
        crop: random crops besides flips.
        points: how often accuracy is measured in training.
        precision: as in ``fit``.
    """

    seeds: int = 3
    data: str = "cifar10"
    device: str = "cpu"
    variant: Literal["full", "long_tailed", "few_shot"] = "full"
    transforms: str = "rotation"
    loss: Literal["cross_entropy", "class_balanced", "ldam"] = "cross_entropy"
    train_images: int = 2000
    test_images: int = 2000
    held_images: int = 2000
    imbalance: float = 100.0
    shots: int = 20
    network: Literal["cnn", "resnet32"] = "cnn"
    channels: tuple[int, ...] = (24, 48, 96, 96)
    stride: int = 2
    steps: int = 420
    batch_size: int = 64
    tune_steps: int = 80
    learning_rates: tuple[float, ...] = (0.025, 0.05, 0.1)
    schedule: Literal["one_cycle", "steps"] = "one_cycle"
    crop: bool = False
    points: int = 3
    precision: Literal["no", "fp16", "bf16"] = "no"


_LARGE = Config(
    device="cuda", train_images=0, test_images=0, held_images=1000, network="resnet32", steps=15_000, batch_size=128,
    tune_steps=500, learning_rates=(0.05, 0.1, 0.2), schedule="steps", crop=True, points=10, precision="bf16",
)  # fmt: skip

_SHORT: dict[str, Any] = {"steps": 300, "tune_steps": 80, "learning_rates": (0.05, 0.1)}

SCALES = {
    "smoke": Config(
        seeds=1, data="digits", train_images=100, test_images=50, held_images=50, channels=(4, 8), steps=4,
        batch_size=8, tune_steps=1, learning_rates=(0.1,), points=2,
    ),
    "laptop": Config(),
    "long": Config(steps=900, tune_steps=200, learning_rates=(0.05, 0.1, 0.2, 0.4)),
    "long_tailed": Config(variant="long_tailed", train_images=10_000, **_SHORT),
    "few_shot": Config(variant="few_shot", **_SHORT),
    "gpu": _LARGE,
    "paper": Config(**(vars(_LARGE) | {"steps": 80_000, "held_images": 5000, "precision": "no", "tune_steps": 2000})),
}  # fmt: skip


class Cnn(nn.Sequential):
    """Convolutions of 3 x 3 with batch norm, halving the image after each but the last, then the mean over it.

    A first stride of two makes the whole about four times cheaper.
    """

    def __init__(self, channels: tuple[int, ...], stride: int = 1) -> None:
        layers: list[nn.Module] = []
        for i, (inputs, outputs) in enumerate(zip((3, *channels), channels, strict=False)):
            step = 1 if i else stride
            layers += [nn.Conv2d(inputs, outputs, 3, step, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if i < len(channels) - 1 else []
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.num_features = channels[-1]


def counts(config: Config, available: Tensor) -> Tensor:
    """How many training images of each class a variant takes, given how many there are."""
    classes = len(available)
    if config.variant == "few_shot":
        wanted = torch.full((classes,), config.shots)
    elif config.variant == "long_tailed":
        most = config.train_images // classes if config.train_images else int(available.min())
        share = config.imbalance ** -(torch.arange(classes) / (classes - 1))
        wanted = (most * share).round().long().clamp(min=1)
    else:
        return available
    return torch.minimum(wanted, available)


Part = tuple[Tensor, Tensor]


def _data(config: Config) -> tuple[dict[str, Part], int]:
    """Training, held-out and test images as bytes, and the number of classes; the same for all seeds."""
    images = datasets.load(config.data)
    if not isinstance(images, datasets.Images):
        raise ValueError(f"data must be images, got {config.data!r}; use 'cifar10' or 'digits'")

    order = torch.randperm(len(images.train_y), generator=torch.Generator().manual_seed(0))
    held, rest = order[: config.held_images], order[config.held_images :]
    if config.variant == "full":
        chosen = rest[: config.train_images or len(rest)]
    else:
        y = images.train_y[rest]
        wanted = counts(config, torch.bincount(y, minlength=len(images.classes)))
        chosen = torch.cat([rest[y == k][: int(n)] for k, n in enumerate(wanted)])
    end = config.test_images or len(images.test_y)
    parts = {
        "train": (coloured(images.train_x[chosen]).contiguous(), images.train_y[chosen]),
        "held": (coloured(images.train_x[held]).contiguous(), images.train_y[held]),
        "test": (coloured(images.test_x[:end]).contiguous(), images.test_y[:end]),
    }
    return parts, len(images.classes)


def _floats(x: Tensor) -> Tensor:
    """Bytes to [-1, 1], channels last."""
    return (x.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def _steps(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, [steps // 2, steps * 3 // 4], 0.1)


def _same(x: Tensor) -> Tensor:
    return x


ARMS: dict[str, dict[str, Any]] = {
    # one transformation, the identity: plain cross-entropy, bit for bit
    "baseline": {"mode": "sla", "transforms": [_same]},
    EQUAL: {"mode": "sla", "transforms": [_same]},
    "DA": {"mode": "da"},
    "MT": {"mode": "mt"},
    "SLA": {"mode": "sla+sd"},
}
READINGS = ("baseline", EQUAL, "DA", "MT", "SLA+SI", "SLA+SD", "SLA+AG")


def arms(config: Config) -> Mapping[str, Arm]:
    """Baselines, and one trained SLA+SD model that gives three readings."""
    parts, classes = _data(config)
    labels = torch.bincount(parts["train"][1], minlength=classes)
    copies = sla.LabelAugmentation(config.transforms).num_transforms

    def base_loss(transforms: int) -> sla.BaseLoss:
        repeated = sla.joint_counts(labels.clamp(min=1), transforms)
        if config.loss == "class_balanced":
            return partial(sla.class_balanced_loss, counts=repeated)
        return partial(sla.ldam_loss, counts=repeated) if config.loss == "ldam" else F.cross_entropy

    def make(name: str) -> sla.SLAClassifier:
        network = Cnn(config.channels, config.stride) if config.network == "cnn" else CifarResNet(32, 0)
        kept = {"transforms": config.transforms} | ARMS[name]
        joint = copies if kept["mode"] == "sla+sd" else 1
        model = sla.SLAClassifier(
            network, classes, **kept, in_features=getattr(network, "num_features", 64), base_loss=base_loss(joint),
            single_loss=base_loss(1), cosine=30.0 if config.loss == "ldam" else None,
        )  # fmt: skip
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def readings(model: sla.SLAClassifier, name: str, part: str) -> dict[str, float]:
        """Balanced accuracy of every way to read a model."""
        found: dict[str, list[Tensor]] = {}
        x, y = parts[part]
        model.eval()
        with torch.no_grad():
            for images in x.split(250):
                batch = _floats(images.to(config.device))
                if name != "SLA":
                    logits = {name: model.predict(batch)}
                else:
                    assert isinstance(model.head, sla.SLAHead)
                    z = model.features(model.augment(batch))
                    upright = z[::copies]
                    assert model.head.single is not None
                    logits = {"SLA+SI": model.head.slice(upright), "SLA+SD": model.head.single(upright)}
                    logits["SLA+AG"] = model.head.aggregate(z)
                for key, value in logits.items():
                    found.setdefault(key, []).append(value.argmax(1).cpu())

        def balanced(predicted: Tensor) -> float:
            right = torch.bincount(y[predicted == y], minlength=classes)
            every = torch.bincount(y, minlength=classes)
            return (right / every)[every > 0].mean().item()

        return {key: balanced(torch.cat(value)) for key, value in found.items()}

    def arm_of(name: str) -> Arm:
        factor = copies if name == EQUAL else 1

        def trained(
            seed: int, lr: float, steps: int, progress: Progress | None, part: str, points: int
        ) -> tuple[sla.SLAClassifier, FitResult]:
            torch.manual_seed(seed)
            model = make(name)
            found = fit(
                model, parts["train"],
                lambda m, b: m(_floats((cropped if config.crop else flipped)(b[0])), b[1])[0],
                steps=steps, batch_size=config.batch_size, seed=seed, device=config.device, progress=progress,
                optimizer=lambda p: torch.optim.SGD(p, lr=lr, momentum=0.9, weight_decay=1e-4),
                schedule="one_cycle" if config.schedule == "one_cycle" else _steps, mixed_precision=config.precision,
                evaluate=lambda _: readings(model, name, part),
                evaluate_at=sorted({steps * i // points for i in range(1, points + 1)}),
            )  # fmt: skip
            return model, found

        def run(seed: int, progress: Progress) -> Mapping[str, Measurement]:
            def score(lr: float) -> float:
                history = trained(1000, lr, config.tune_steps * factor, None, "held", 1)[1].history
                used = [history[key][1][-1] for key in history if key != "SLA+SI"]
                return sum(used) / len(used)

            picked = progress.once(f"lr {name}", lambda: pick_learning_rate(config.learning_rates, score))
            _, found = trained(seed, picked["chosen"], config.steps * factor, progress, "test", config.points)
            return {
                key: Measurement({"accuracy": y[-1], "seconds of training": found.seconds}, curves={"accuracy": (x, y)})
                for key, (x, y) in found.history.items()
            }

        return run

    return {name: arm_of(name) for name in ARMS}


_COLOURS = ("#000000", "#999999", "#D55E00", "#E69F00", "#56B4E9", "#009E73", "#0072B2")


def figures(result: Result) -> Mapping[str, Figure]:
    """Accuracy of every reading with its seeds, and accuracy against steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    styles = ("-", ":", "--", "-.", ":", "-", "-")
    for place, (name, colour) in enumerate(zip(READINGS, _COLOURS, strict=True)):
        values = 100 * result.values(name, "accuracy")
        # marks and no bars: a bar would have to begin at zero, where nothing happens
        left.plot([values.mean()] * 2, [place - 0.3, place + 0.3], color=colour, linewidth=3)
        left.plot(values, [place] * len(values), "o", color=colour, markersize=5)
    left.set_yticks(range(len(READINGS)), READINGS)
    left.invert_yaxis()
    left.grid(axis="x", alpha=0.3)
    left.set(xlabel="test accuracy, % (balanced over classes)")
    left.set_title(f"{result.config.data}, {result.config.variant}; line = mean, dot = seed", fontsize=10)
    for name, colour, style in zip(READINGS, _COLOURS, styles, strict=True):
        x, y = result.curve(name, "accuracy")
        if name == EQUAL:
            continue
        right.plot(x, 100 * y.mean(0), style, color=colour, label=name, linewidth=1.6)
    right.set(xlabel="optimiser steps", ylabel="test accuracy, %")
    right.set_title(f"mean of {len(result.seeds)} seeds, one learning-rate cycle", fontsize=10)
    right.legend(frameon=False, fontsize=8)
    return {"sla": figure}


def notes(result: Result) -> str:
    """Budget, choices, and what the numbers cannot say."""
    c = result.config
    rates = ", ".join(f"{key.removeprefix('lr ')} {value['chosen']}" for key, value in result.tuned.items())
    images = {
        "full": f"{c.train_images or 'all'} training images",
        "long_tailed": f"long-tailed training images, 1 to {c.imbalance:g}",
        "few_shot": f"{c.shots} training images a class",
    }[c.variant]
    seconds = {name: result.values(name, "seconds of training").mean() for name in ("baseline", EQUAL, "SLA+SD")}
    steps, aggregated = result.curve("SLA+AG", "accuracy")
    gap = 100 * (aggregated - result.curve("SLA+SD", "accuracy")[1]).mean(0)
    return (
        f"{c.data}, {images}, {c.test_images or 'all'} test images, {c.network} of first stride {c.stride}, "
        f"{c.transforms}. Every arm takes "
        f"{c.steps} steps of {c.batch_size} labelled images with SGD; '{EQUAL}' takes as many times more as there are "
        f"transformations (in its trials too). Each arm has its own learning rate, by {c.tune_steps}-step trials on "
        f"{c.held_images} held-out training images over a grid of {len(c.learning_rates)}: {rates}. All SLA rows read "
        "one model trained with "
        "distillation, whose rate is chosen by the mean of SLA+AG and SLA+SD. Seconds of training: "
        + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
        + f". SLA+AG minus SLA+SD is {gap[0]:+.1f} points after {steps[0]:.0f} steps and {gap[-1]:+.1f} at the end. "
        "The paper trains ResNet-32 on 50,000 images for 80,000 steps; a verdict here is about this budget and this "
        "network, with pairs over few seeds."
    )

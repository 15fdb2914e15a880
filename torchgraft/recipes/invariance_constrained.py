"""Evidence for invariance-constrained learning: the symmetries of digits; blind against bounded augmentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft import datasets
from torchgraft.experiments import Arm, Claim, FitResult, Measurement, Progress, Result, fit, pick_learning_rate
from torchgraft.recipes._images import Cnn, coloured, cropped, shifted
from torchgraft.vision.augmentation_space import AugmentationSpace
from torchgraft.vision.invariance_constrained import InvarianceConstraint, symmetry_report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DATA = ("cifar10", "digits")
EQUAL = "no augmentation, equal compute"

CLAIMS = (
    Claim(
        "Digits refuse half turns: its multiplier is larger than that of brightness", "multiplier",
        "digits: half turn", "digits: brightness", 0.05, paper="in words: multipliers rank the symmetries of the data",
    ),
    Claim(
        "Digits refuse transposition more than brightness", "multiplier", "digits: transpose", "digits: brightness",
        0.05, paper="in words: multipliers rank the symmetries of the data",
    ),
    Claim(
        "Digits accept shifts by a pixel rather than half turns", "multiplier", "digits: shift", "digits: half turn",
        0.05, direction="lower", paper="in words: multipliers rank the symmetries of the data",
    ),
    Claim(
        "On the wide space bounded augmentation beats blind augmentation", "accuracy", "bounded, wide", "blind, wide",
        0.5, unit="points", factor=100, paper="in words: too strong spaces are tamed",
    ),
    Claim(
        "On the standard space bounded augmentation is as good as blind augmentation or better", "accuracy",
        "bounded, standard", "blind, standard", 0.0, unit="points", factor=100, paper="in words: matches or beats",
    ),
    Claim(
        "Bounded augmentation beats none", "accuracy", "bounded, standard", "no augmentation", 0.5, unit="points",
        factor=100, paper="in words: beats",
    ),
    Claim(
        "Bounded augmentation beats none of equal compute", "accuracy", "bounded, standard", EQUAL, 0.5,
        unit="points", factor=100, paper="not compared",
    ),
    Claim(
        "Metropolis-Hastings proposals beat uniform ones under the same bound", "accuracy", "bounded, wide",
        "bounded, wide, uniform", 0.5, unit="points", factor=100, paper="in words: harder transformations help",
    ),
    Claim(
        "An adapted multiplier beats a fixed one", "accuracy", "bounded, wide", "multiplier fixed at 1, wide", 0.5,
        unit="points", factor=100, paper="in words: when and how much is decided during training",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
        seeds: how many.
        data: ``cifar10``, or ``digits`` enlarged where there is no data; the symmetries are always those of digits.
        device: where to train.
        train_images, test_images, held_images: how many; 0 takes all. Held-out images choose the learning rates.
        channels: of the CNN.
        steps, batch_size: optimiser steps, and clean images a step.
        tune_steps, learning_rates: trials of every arm.
        margin: bound on the transformed loss, in nats.
        dual_lr, dual_init: of the multiplier. The paper's 1e-4 is for 78,000 steps.
        mh_steps: proposals of a chain.
        digit_steps, digit_margin, digit_dual_lr: of the symmetries.
        margins: of the sweep on digits.
        points: how often accuracy is measured in training.
    """

    seeds: int = 3
    data: str = "cifar10"
    device: str = "cpu"
    train_images: int = 4000
    test_images: int = 2000
    held_images: int = 1000
    channels: tuple[int, ...] = (24, 48, 96, 96)
    steps: int = 250
    batch_size: int = 64
    tune_steps: int = 60
    learning_rates: tuple[float, ...] = (0.05, 0.1, 0.2)
    margin: float = 1.4
    dual_lr: float = 0.01
    dual_init: float = 0.5
    mh_steps: int = 2
    digit_steps: int = 300
    digit_margin: float = 0.1
    digit_dual_lr: float = 0.02
    margins: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0)
    points: int = 3


SCALES = {
    "smoke": Config(
        seeds=1, data="digits", train_images=60, test_images=40, held_images=40, channels=(4, 8), steps=3, batch_size=8,
        tune_steps=1, learning_rates=(0.1,), digit_steps=4, margins=(0.4,), points=1,
    ),
    "laptop": Config(),
    "gpu": Config(
        device="cuda", train_images=0, test_images=0, held_images=5000, channels=(64, 128, 256, 256), steps=12_000,
        batch_size=128, tune_steps=800, margin=0.8, dual_lr=5e-4, points=10,
    ),
}  # fmt: skip

GROUPS = ("shift", "half turn", "brightness", "transpose")


DIGIT_SPACE = AugmentationSpace(
    {
        "shift": shifted,
        "half turn": lambda x, level, sign: x.flip(2, 3),
        "brightness": lambda x, level, sign: x * (1 - 0.7 * level[:, None, None, None]),
        "transpose": lambda x, level, sign: x.mT,
    }
)


def _digit_net() -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 1)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def prepared(x: Tensor) -> Tensor:
    """Crops and flips, and from [0, 1] to [-1, 1]."""
    return cropped(x) * 2 - 1


Part = tuple[Tensor, Tensor]


def _data(config: Config) -> dict[str, Part]:
    images = datasets.load(config.data)
    if not isinstance(images, datasets.Images):
        raise ValueError(f"data must be images, got {config.data!r}; use 'cifar10' or 'digits'")

    order = torch.randperm(len(images.train_y), generator=torch.Generator().manual_seed(0))
    held = order[: config.held_images]
    train = order[config.held_images :][: config.train_images or len(order)]
    end = config.test_images or len(images.test_y)
    return {
        "train": (coloured(images.train_x[train]), images.train_y[train]),
        "held": (coloured(images.train_x[held]), images.train_y[held]),
        "test": (coloured(images.test_x[:end]), images.test_y[:end]),
    }


# wide or not, and what the constraint is made of; cost is in passes of the clean batch, see ``arms``
BOUNDED: dict[str, dict[str, Any]] = {
    "bounded, standard": {"wide": False},
    "bounded, wide": {"wide": True},
    "bounded, wide, uniform": {"wide": True, "mh_steps": 1},
    "multiplier fixed at 1, wide": {"wide": True, "fixed": True},
}


def arms(config: Config) -> Mapping[str, Arm]:
    """Symmetries and margins on digits; no, blind and bounded augmentation of photographs."""
    photographs: dict[str, Part] = {}

    def parts() -> dict[str, Part]:
        if not photographs:
            photographs.update(_data(config))
        return photographs

    def correct(model: nn.Module, part: str, space: AugmentationSpace | None = None) -> float:
        x, y = parts()[part]
        model.eval()
        right = 0
        with torch.no_grad():
            for k, (images, labels) in enumerate(zip(x.split(500), y.split(500), strict=True)):
                batch = images.to(config.device).float() / 255
                if space is not None:
                    generator = torch.Generator().manual_seed(k)
                    op = torch.randint(0, len(space), (len(batch),), generator=generator)
                    level = torch.rand(len(batch), generator=generator)
                    sign = 2.0 * torch.randint(0, 2, (len(batch),), generator=generator) - 1
                    batch = space.apply(batch, op.to(batch.device), level.to(batch.device), sign.to(batch.device))
                right += int((model(batch * 2 - 1).argmax(1).cpu() == labels).sum())
        return right / len(y)

    def spaces() -> dict[bool, AugmentationSpace]:
        side = parts()["train"][0].shape[-1]
        return {wide: AugmentationSpace.trivial(side, wide) for wide in (False, True)}

    def photograph_arm(name: str) -> Arm:
        def trained(
            seed: int, lr: float, steps: int, progress: Progress | None, part: str
        ) -> tuple[nn.Module, FitResult, InvarianceConstraint | None, list[float]]:
            torch.manual_seed(seed)
            x, y = parts()["train"]
            model = Cnn(3, config.channels, int(y.max()) + 1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            constraint, transformed = None, list[float]()
            if name in BOUNDED:
                setting = BOUNDED[name]
                fixed = setting.get("fixed", False)
                constraint = InvarianceConstraint(
                    spaces()[setting["wide"]], margin=config.margin, dual_lr=config.dual_lr,
                    dual_init=1.0 if fixed else config.dual_init, mh_steps=setting.get("mh_steps", config.mh_steps),
                    prepare=prepared,
                ).train(not fixed).to(config.device)  # fmt: skip

            def loss(m: nn.Module, batch: Sequence[Tensor]) -> Tensor:
                images, labels = batch[0].float() / 255, batch[1]
                if constraint is not None:
                    info = constraint(m, images, labels)
                    transformed.append(info.aug_loss.item())
                    return info.loss
                if name.startswith("blind"):
                    space = spaces()[name.endswith("wide")]
                    n = len(images)
                    images = space.apply(
                        images, torch.randint(0, len(space), (n,), device=images.device),
                        torch.randint(0, 31, (n,), device=images.device) / 30,
                        2.0 * torch.randint(0, 2, (n,), device=images.device) - 1,
                    )  # fmt: skip
                return F.cross_entropy(m(prepared(images)), labels)

            found = fit(
                model, (x, y), loss, steps=steps, batch_size=config.batch_size, seed=seed, device=config.device,
                progress=progress, schedule="one_cycle", clip=5.0,
                optimizer=lambda p: torch.optim.SGD(p, lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4),
                evaluate=lambda m: {"accuracy": correct(m, part)},
                evaluate_at=sorted({steps * i // config.points for i in range(1, config.points + 1)}),
            )  # fmt: skip
            return model, found, constraint, transformed

        # forward passes count one, backward passes two: clean and transformed with gradients, and the proposals
        factor = round((6 + config.mh_steps) / 3) if name == EQUAL else 1

        def run(seed: int, progress: Progress) -> Measurement:
            def score(lr: float) -> float:
                return trained(1000, lr, config.tune_steps * factor, None, "held")[1].history["accuracy"][1][-1]

            picked = progress.once(f"lr {name}", lambda: pick_learning_rate(config.learning_rates, score))
            model, found, constraint, transformed = trained(
                seed, picked["chosen"], config.steps * factor, progress, "test"
            )
            metrics = {
                "accuracy": found.history["accuracy"][1][-1],
                "accuracy, transformed": correct(model, "test", spaces()[True]),
                "seconds of training": found.seconds,
            }
            curves = {"accuracy": found.history["accuracy"]}
            if constraint is not None:
                late = transformed[-len(transformed) // 5 :]
                metrics |= {"multiplier": float(constraint.dual.value), "transformed loss": float(np.mean(late))}
                if constraint.training:
                    dual = symmetry_report(constraint).dual[:, 0].tolist()
                    curves["multiplier"] = (list(range(1, len(dual) + 1)), dual)
            return Measurement(metrics, curves=curves)

        return run

    def digits_trained(
        seed: int, progress: Progress, constraint: InvarianceConstraint
    ) -> tuple[InvarianceConstraint, list[float]]:
        """The constraint after training, and its transformed loss at every step."""
        torch.manual_seed(seed)
        data = datasets.load("digits")
        assert isinstance(data, datasets.Images)
        losses: list[float] = []

        def loss(m: nn.Module, b: Sequence[Tensor]) -> Tensor:
            info = constraint(m, b[0].float() / 255, b[1])
            losses.append(info.aug_loss.mean().item())
            return info.loss

        fit(
            _digit_net(), (data.train_x, data.train_y), loss, steps=config.digit_steps, batch_size=64, seed=seed,
            progress=progress, clip=5.0, optimizer=lambda p: torch.optim.Adam(p, lr=3e-3),
        )  # fmt: skip
        return constraint, losses

    bound = partial(InvarianceConstraint, dual_lr=config.digit_dual_lr, mh_steps=config.mh_steps)

    def symmetries(seed: int, progress: Progress) -> Mapping[str, Measurement]:
        groups = {group: [group] for group in GROUPS}
        constraint, _ = digits_trained(seed, progress, bound(DIGIT_SPACE, margin=config.digit_margin, groups=groups))
        dual = symmetry_report(constraint).dual
        steps = [float(t) for t in range(1, len(dual) + 1)]
        return {
            f"digits: {group}": Measurement(
                {"multiplier": float(dual[:, k].mean()), "last multiplier": float(dual[-1, k])},
                curves={"multiplier": (steps, dual[:, k].tolist())},
            )
            for k, group in enumerate(GROUPS)
        }

    def sweep(seed: int, progress: Progress) -> Mapping[str, Measurement]:
        found = {}
        for margin in config.margins:
            space = DIGIT_SPACE.subset("shift", "brightness")
            constraint, losses = digits_trained(seed, progress, bound(space, margin=margin))
            dual = constraint.history[:, 0]
            found[f"digits: margin {margin:g}"] = Measurement(
                {
                    "transformed loss": float(np.mean(losses[-len(losses) // 5 :])),
                    "multiplier": float(dual.mean()),
                    "last multiplier": float(dual[-1]),
                }
            )
        return found

    photograph_names = ("no augmentation", EQUAL, "blind, standard", "blind, wide", *BOUNDED)
    return {
        "symmetries": symmetries,
        "margins": sweep,
        **{name: partial(_called, photograph_arm(name)) for name in photograph_names},
    }


def _called(arm: Arm, seed: int, progress: Progress) -> Any:
    return arm(seed, progress)


_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


def figures(result: Result) -> Mapping[str, Figure]:
    """Multipliers of digits over training, the margin sweep, accuracies, and the multipliers of photographs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    (top, sweep), (low, late) = figure.subplots(2, 2)
    for group, colour in zip(GROUPS, _COLOURS, strict=True):
        x, y = result.curve(f"digits: {group}", "multiplier")
        top.plot(x, y.mean(0), color=colour, label=group)
        top.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.2, linewidth=0)
    top.set(xlabel="optimiser steps", ylabel="multiplier")
    top.set_title(f"digits, one bound of {result.config.digit_margin:g} for each group; band = seeds", fontsize=10)
    top.legend(frameon=False)

    margins = result.config.margins
    names = [f"digits: margin {m:g}" for m in margins]
    loss = np.array([result.values(n, "transformed loss") for n in names])
    dual = np.array([result.values(n, "multiplier") for n in names])
    sweep.plot(margins, loss, "o", color="#0072B2", markersize=4)
    sweep.plot(margins, loss.mean(1), color="#0072B2", label="transformed loss at the end")
    sweep.plot(margins, margins, ":", color="#000000", label="the margin")
    sweep.plot(margins, dual.mean(1), "--", color="#D55E00", label="multiplier, mean over training")
    sweep.set(xlabel="margin, nats", xscale="log")
    sweep.set_title("digits, shifts and brightness, mean of seeds", fontsize=10)
    sweep.legend(frameon=False, fontsize=8)

    arms = [name for name in result.measurements if not name.startswith("digits:")]
    for place, name in enumerate(arms):
        for metric, colour, shift in (("accuracy", "#0072B2", -0.12), ("accuracy, transformed", "#D55E00", 0.12)):
            values = 100 * result.values(name, metric)
            low.plot([values.mean()] * 2, [place + shift - 0.15, place + shift + 0.15], color=colour, linewidth=3)
            low.plot(values, [place + shift] * len(values), "o", color=colour, markersize=4,
                     label=metric if place == 0 else None)  # fmt: skip
    low.set_yticks(range(len(arms)), arms)
    low.invert_yaxis()
    low.grid(axis="x", alpha=0.3)
    low.legend(frameon=False, fontsize=8)
    low.set(xlabel="test accuracy, %")
    low.set_title(f"{result.config.data}, {result.config.steps} steps; line = mean, dot = seed", fontsize=10)

    adapted = [name for name in BOUNDED if "fixed" not in name]
    for name, colour in zip(adapted, _COLOURS, strict=False):
        x, y = result.curve(name, "multiplier")
        late.plot(x, y.mean(0), color=colour, label=name)
    late.set(xlabel="optimiser steps", ylabel="multiplier")
    late.set_title(f"{result.config.data}: how much augmentation, over training", fontsize=10)
    late.legend(frameon=False, fontsize=8)
    return {"invariance_constrained": figure}


def notes(result: Result) -> str:
    """Budget, choices, and what the numbers cannot say."""
    c = result.config
    rates = ", ".join(f"{key.removeprefix('lr ')} {value['chosen']}" for key, value in result.tuned.items())
    reached = "; ".join(
        f"{name} {result.values(name, 'transformed loss').mean():.2f} with a multiplier of "
        f"{result.values(name, 'multiplier').mean():.2f}"
        for name in BOUNDED
    )
    seconds = ", ".join(
        f"{name} {result.values(name, 'seconds of training').mean():.0f}"
        for name in ("no augmentation", EQUAL, "blind, wide", "bounded, wide")
    )
    return (
        f"{c.data}, {c.train_images or 'all'} training and {c.test_images or 'all'} test images, a CNN of "
        f"{len(c.channels)} layers, {c.steps} steps of {c.batch_size} clean images for every arm, random crops and "
        f"flips in all of them; '{EQUAL}' takes as many times more steps as the bounded arms cost in passes. Each arm "
        f"has its own learning rate, by {c.tune_steps}-step trials on {c.held_images} held-out images over a grid of "
        f"{len(c.learning_rates)}: {rates}. The margin is {c.margin:g} nats, the step of the multiplier {c.dual_lr:g}; "
        f"the paper's 0.6 to 0.8 and 1e-4 are for 78,000 steps of a wide ResNet, which this budget is far from. Mean "
        f"transformed loss over the last fifth of training: {reached}. Seconds of training: {seconds}. 'accuracy, "
        "transformed' is on test images under one random operation of the wide space. On digits (8 x 8, "
        f"{c.digit_steps} steps) one model is trained under four bounds of {c.digit_margin:g} at once; 'multiplier' is "
        "its mean over training there, since a network of this size fits even turned training digits in the end and "
        "then lets go: a multiplier says how hard a group is to fit, not whether the labels are true under it. Pairs "
        "are over seeds, which are few."
    )

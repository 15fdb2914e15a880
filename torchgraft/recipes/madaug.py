"""Evidence for MADAug: planted operations on digits, and learnt against random augmentation of photographs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft import datasets
from torchgraft.experiments import Arm, Claim, FitResult, Measurement, Progress, Result, fit, pick_learning_rate
from torchgraft.recipes._images import Cnn, coloured, cropped, shifted
from torchgraft.vision.augmentation_space import AugmentationSpace
from torchgraft.vision.madaug import AugmentationPolicy, MADAug, PolicyRecord, curriculum

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DATA = ("cifar10", "digits")
PLANTED = ("shift", "brightness", "invert", "half turn", "transpose")

CLAIMS = (
    *(
        Claim(
            f"The policy learns to avoid a harmful operation: {name}", "probability", f"digits: {name}",
            1 / len(PLANTED), 0.02, direction="lower", paper="in words: adapts to the model",
        )
        for name in ("invert", "half turn", "transpose")
    ),
    Claim(
        "The policy learns to prefer a useful operation: shift", "probability", "digits: shift", 1 / len(PLANTED), 0.02,
        paper="in words: adapts to the model",
    ),
    Claim(
        "MADAug is more accurate than random operations", "accuracy", "MADAug", "random", 0.5, unit="points",
        factor=100, paper="in words: better or on par with AutoAugment-family baselines",
    ),
    Claim(
        "MADAug is more accurate than random operations under the same curriculum", "accuracy", "MADAug",
        "random, curriculum", 0.5, unit="points", factor=100, paper="in words: the policy matters",
    ),
    Claim(
        "MADAug is more accurate than crops and flips alone", "accuracy", "MADAug", "crops and flips", 0.5,
        unit="points", factor=100, paper="in words: better",
    ),
    Claim(
        "The curriculum makes random operations better", "accuracy", "random, curriculum", "random", 0.5,
        unit="points", factor=100, paper="in words: the curriculum matters",
    ),
    Claim(
        "Training along beats the frozen final policy", "accuracy", "MADAug", "frozen policy", 0.5, unit="points",
        factor=100, paper="in words: model-adaptive beats fixed",
    ),
    Claim(
        "Magnitudes grow by themselves during training", "growth of magnitude", "MADAug", 0.0, 0.01,
        paper="in words: easy to hard",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
        seeds: how many.
        data: ``cifar10``, or ``digits`` enlarged where there is no data; the planted operations are always on digits.
        device: where to train.
        train_images, validation_images, held_images, test_images: how many. Validation images train the policy; the
            other arms get them as training images, so that all see the same labels. Held-out images choose the
            learning rates.
        channels: of the CNN.
        epochs, batch_size: passes over the training images.
        tune_epochs, learning_rates: trials of every arm.
        search_every, policy_lr, temperature: of MADAug.
        digit_runs, digit_warm, digit_steps, digit_policy_lr: of the planted operations: runs that are averaged, steps
            without augmentation before the policy begins, steps with it.
        points: how often accuracy is measured in training.
    """

    seeds: int = 3
    data: str = "cifar10"
    device: str = "cpu"
    train_images: int = 2000
    validation_images: int = 500
    held_images: int = 1000
    test_images: int = 2000
    channels: tuple[int, ...] = (24, 48, 96, 96)
    epochs: int = 12
    batch_size: int = 64
    tune_epochs: int = 3
    learning_rates: tuple[float, ...] = (0.025, 0.05, 0.1, 0.2, 0.4)
    search_every: int = 4
    policy_lr: float = 5e-3
    temperature: float = 3.0
    digit_runs: int = 4
    digit_warm: int = 200
    digit_steps: int = 150
    digit_policy_lr: float = 0.02
    points: int = 3


SCALES = {
    "smoke": Config(
        seeds=1, data="digits", train_images=32, validation_images=16, held_images=16, test_images=32, channels=(4, 8),
        epochs=1, batch_size=16, tune_epochs=1, learning_rates=(0.1,), digit_runs=1, digit_warm=1,
        digit_steps=3, points=1,
    ),
    "laptop": Config(),
    "gpu": Config(
        device="cuda", train_images=3600, validation_images=400, held_images=2000, test_images=10_000,
        channels=(64, 128, 256, 256), epochs=60, batch_size=128, tune_epochs=10, search_every=3, policy_lr=1e-3,
        points=6,
    ),
}  # fmt: skip


DIGIT_SPACE = AugmentationSpace(
    {
        "shift": shifted,
        "brightness": lambda x, level, sign: x * (1 - 0.5 * level[:, None, None, None]),
        "invert": lambda x, level, sign: 1 - x,
        "half turn": lambda x, level, sign: x.flip(2, 3),
        "transpose": lambda x, level, sign: x.mT,
    }
)
assert DIGIT_SPACE.names == PLANTED


def normalised(x: Tensor) -> Tensor:
    """From [0, 1] to [-1, 1]."""
    return x * 2 - 1


Part = tuple[Tensor, Tensor]


def _data(config: Config) -> dict[str, Part]:
    images = datasets.load(config.data)
    if not isinstance(images, datasets.Images):
        raise ValueError(f"data must be images, got {config.data!r}; use 'cifar10' or 'digits'")

    order = torch.randperm(len(images.train_y), generator=torch.Generator().manual_seed(0))
    sizes = {"held": config.held_images, "validation": config.validation_images, "train": config.train_images}
    parts, at = {}, 0
    for name, size in sizes.items():
        rows, at = order[at : at + size], at + size
        parts[name] = (coloured(images.train_x[rows]), images.train_y[rows])
    parts["test"] = (coloured(images.test_x[: config.test_images]), images.test_y[: config.test_images])
    # what the policy's validation images are for MADAug, more training images are for the others
    (x, y), (more_x, more_y) = parts["train"], parts["validation"]
    parts["all"] = torch.cat([x, more_x]), torch.cat([y, more_y])
    return parts


def _uniform(space: AugmentationSpace, x: Tensor, share: float) -> Tensor:
    """Two different operations of uniform strength for the first share of a batch."""
    n, out = int(share * len(x)), x.clone()
    if n:
        chosen = torch.rand(n, len(space), device=x.device).argsort(1)[:, :2]
        for k in range(2):
            level = torch.rand(n, device=x.device)
            out[:n] = space.apply(out[:n], chosen[:, k], level, 2.0 * torch.randint_like(level, 0, 2) - 1)
    return out


ARMS = ("crops and flips", "random", "random, curriculum", "frozen policy", "MADAug")


def arms(config: Config) -> Mapping[str, Arm]:
    """Planted operations, and five ways to augment."""
    parts: dict[str, Part] = {}

    def part(name: str) -> Part:
        if not parts:
            parts.update(_data(config))
        return parts[name]

    def per_class(model: nn.Module, name: str) -> list[float]:
        x, y = part(name)
        model.eval()
        with torch.no_grad():
            batches = (normalised(b.to(config.device).float() / 255) for b in x.split(500))
            right = torch.cat([model(b).argmax(1).cpu() for b in batches]) == y
        return [right[y == c].float().mean().item() for c in y.unique()]

    def space() -> AugmentationSpace:
        return AugmentationSpace.autoaugment17(part("train")[0].shape[-1])

    def network(seed: int) -> Cnn:
        torch.manual_seed(seed)
        return Cnn(3, config.channels, int(part("all")[1].max()) + 1)

    def trained(
        name: str, seed: int, lr: float, epochs: int, progress: Progress | None, evaluated: str,
        learnt: tuple[nn.Module, AugmentationPolicy] | None = None,
    ) -> tuple[Cnn, FitResult, MADAug | None, list[tuple[float, float]]]:  # fmt: skip
        """The model, its history, what augmented it, and how far images were moved at each step."""
        model, ops = network(seed).to(config.device), space()
        x, y = part("train" if name == "MADAug" else "all")
        # as many steps for all, whose epochs differ in length by the validation images
        steps = epochs * (len(part("all")[1]) // config.batch_size)
        tau = epochs / 6
        held_x, held_y = part("validation")
        validation = [
            (a.to(config.device).float() / 255, b.to(config.device))
            for a, b in zip(held_x.split(config.batch_size), held_y.split(config.batch_size), strict=True)
        ]
        made: dict[str, Any] = {"at": 0, "sizes": []}

        def optimizer(parameters: Any) -> torch.optim.Optimizer:
            found = torch.optim.SGD(parameters, lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
            shared: dict[str, Any] = {"prepare": normalised, "temperature": config.temperature, "tau": tau}
            if name == "MADAug":
                policy = AugmentationPolicy(config.channels[-1], len(ops)).to(config.device)
                made["madaug"] = MADAug(
                    model, policy, ops, validation, optimizer=found, search_every=config.search_every,
                    policy_lr=config.policy_lr, **shared,
                )  # fmt: skip
            elif learnt is not None:
                made["madaug"] = MADAug(model, learnt[1], ops, None, feature_model=learnt[0], frozen=True, **shared)
            return found

        def loss(m: nn.Module, batch: Sequence[Tensor]) -> Tensor:
            images, labels = cropped(batch[0].float() / 255), batch[1]
            epoch, made["at"] = epochs * made["at"] / steps, made["at"] + 1
            before = images
            if "madaug" in made:
                images = made["madaug"].step(images, labels, epoch)
            elif name.startswith("random"):
                images = _uniform(ops, images, curriculum(epoch, tau) if "curriculum" in name else 1.0)
            moved = (images - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1).clamp(min=1e-6)
            made["sizes"].append((epoch, moved.mean().item()))
            return F.cross_entropy(m(normalised(images)), labels)

        def accuracy(m: nn.Module) -> dict[str, float]:
            return {"accuracy": float(np.mean(per_class(m, evaluated)))}

        found = fit(
            model, (x, y), loss, steps=steps, batch_size=config.batch_size, seed=seed, device=config.device,
            progress=progress, schedule="one_cycle", clip=5.0, optimizer=optimizer, evaluate=accuracy,
            evaluate_at=sorted({max(1, steps * i // config.points) for i in range(1, config.points + 1)}),
        )  # fmt: skip
        return model, found, made.get("madaug"), made["sizes"]

    def arm_of(name: str) -> Arm:
        def run(seed: int, progress: Progress) -> Measurement:
            def learnt_by(seed: int, epochs: int, lr: float) -> tuple[nn.Module, AugmentationPolicy] | None:
                if name != "frozen policy":
                    return None
                model, _, madaug, _ = trained("MADAug", seed, lr, epochs, None, "held")
                assert madaug is not None
                return model, madaug.policy

            def score(lr: float) -> float:
                learnt = learnt_by(2000, config.tune_epochs, lr)
                _, found, _, _ = trained(name, 1000, lr, config.tune_epochs, None, "held", learnt)
                return found.history["accuracy"][1][-1]

            rate = progress.once(f"lr {name}", lambda: pick_learning_rate(config.learning_rates, score))["chosen"]
            learnt = learnt_by(3000 + seed, config.epochs, rate)
            model, found, madaug, sizes = trained(name, seed, rate, config.epochs, progress, "test", learnt)
            metrics = {"accuracy": found.history["accuracy"][1][-1], "seconds of training": found.seconds}
            curves = {
                "accuracy": found.history["accuracy"],
                "change of images": ([s[0] for s in sizes], [s[1] for s in sizes]),
            }
            extra: dict[str, Any] = {"per class": per_class(model, "test")}
            if name == "MADAug":
                assert madaug is not None
                history = madaug.history
                magnitude = torch.stack([(r.probabilities * r.magnitudes).sum() for r in history]).tolist()
                tenth = max(1, len(history) // 10)
                metrics["growth of magnitude"] = float(np.mean(magnitude[-tenth:]) - np.mean(magnitude[:tenth]))
                at = [float(config.search_every * k) for k in range(len(history))]
                curves["magnitude"] = (at, magnitude)
                for k, op in enumerate(madaug.ops.names):
                    curves[f"p {op}"] = (at, [float(r.probabilities[k]) for r in history])
            return Measurement(metrics, curves=curves, extra=extra)

        return run

    def planted_once(seed: int) -> list[PolicyRecord]:
        torch.manual_seed(seed)
        data = datasets.load("digits")
        assert isinstance(data, datasets.Images)
        x, y = data.train_x.float() / 255, data.train_y
        held = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)) < len(x) // 4
        n = int(held.sum())
        # validation digits stand a pixel off, which is what shifts prepare for
        signs = 2.0 * torch.randint(0, 2, (n,)) - 1
        held_x = DIGIT_SPACE.apply(x[held], torch.zeros(n, dtype=torch.int64), torch.rand(n), signs)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        madaug = MADAug(
            model, AugmentationPolicy(64, len(DIGIT_SPACE)), DIGIT_SPACE, [(held_x, y[held])], optimizer=optimizer,
            search_every=1, search_batch=64, k_ops=1, tau=config.digit_steps / 6, policy_lr=config.digit_policy_lr,
        )  # fmt: skip
        rest_x, rest_y = x[~held], y[~held]
        for step in range(-config.digit_warm, config.digit_steps):
            rows = torch.randint(0, len(rest_x), (64,))
            images = rest_x[rows] if step < 0 else madaug.step(rest_x[rows], rest_y[rows], step)
            optimizer.zero_grad()
            F.cross_entropy(model(images), rest_y[rows]).backward()
            optimizer.step()
        return madaug.history

    def planted(seed: int, progress: Progress) -> Mapping[str, Measurement]:
        """Probabilities averaged over a few runs: a single policy may settle on what it met first."""
        runs = []
        for run in range(config.digit_runs):
            runs.append(torch.stack([r.probabilities for r in planted_once(seed + 1000 * run)]))
            progress(run, config.digit_runs)
        p = torch.stack(runs).mean(0)
        late = p[-max(1, len(p) // 10) :].mean(0)
        steps = [float(t) for t in range(len(p))]
        return {
            f"digits: {name}": Measurement(
                {"probability": late[k].item()},
                curves={"p": (steps, p[:, k].tolist())},
                extra={"late, run by run": [run[-1, k].item() for run in runs]},
            )
            for k, name in enumerate(PLANTED)
        }

    return {"planted": planted, **{name: arm_of(name) for name in ARMS}}


_COLOURS = ("#0072B2", "#E69F00", "#D55E00", "#CC79A7", "#000000")


def figures(result: Result) -> Mapping[str, Figure]:
    """Planted probabilities, accuracies, the policy over training, and gain against difficulty of a class."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    (top, accuracy), (policy, classes) = figure.subplots(2, 2)
    for name, colour in zip(PLANTED, _COLOURS, strict=True):
        x, y = result.curve(f"digits: {name}", "p")
        top.plot(x, y.mean(0), color=colour, label=name)
        top.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.15, linewidth=0)
    top.axhline(1 / len(PLANTED), color="grey", linestyle=":", linewidth=1)
    top.set(xlabel="policy steps", ylabel="mean probability")
    top.set_title("digits whose validation copies are shifted; band = seeds", fontsize=10)
    top.legend(frameon=False, fontsize=8)

    for place, name in enumerate(ARMS):
        values = 100 * result.values(name, "accuracy")
        accuracy.plot([values.mean()] * 2, [place - 0.3, place + 0.3], color="#0072B2", linewidth=3)
        accuracy.plot(values, [place] * len(values), "o", color="#0072B2", markersize=5)
    accuracy.set_yticks(range(len(ARMS)), ARMS)
    accuracy.invert_yaxis()
    accuracy.grid(axis="x", alpha=0.3)
    accuracy.set(xlabel="test accuracy, %")
    accuracy.set_title(f"{result.config.data}, {result.config.epochs} epochs; line = mean, dot = seed", fontsize=10)

    names = [key.removeprefix("p ") for key in result.measurements["MADAug"][result.seeds[0]].curves if key[:2] == "p "]
    last = {name: result.curve("MADAug", f"p {name}")[1].mean(0)[-1] for name in names}
    marked = sorted(names, key=lambda name: last[name])
    for name in names:
        x, y = result.curve("MADAug", f"p {name}")
        extreme = name in (*marked[:2], *marked[-3:])
        colour = _COLOURS[[*marked[:2], *marked[-3:]].index(name)] if extreme else "#CCCCCC"
        policy.plot(x, y.mean(0), color=colour, label=name if extreme else None, linewidth=1.6 if extreme else 0.8)
    x, y = result.curve("MADAug", "magnitude")
    right = policy.twinx()
    right.plot(x, y.mean(0), "--", color="#009E73", label="magnitude (right)")
    right.set(ylabel="mean magnitude")
    right.legend(frameon=False, fontsize=8, loc="lower right")
    policy.set(xlabel="optimiser steps", ylabel="mean probability")
    policy.set_title(f"{result.config.data}: the policy over training", fontsize=10)
    policy.legend(frameon=False, fontsize=8)

    plain, ours = (np.array([m.extra["per class"] for m in result.measurements[name].values()]).mean(0)
                   for name in ("crops and flips", "MADAug"))  # fmt: skip
    classes.plot(100 * plain, 100 * (ours - plain), "o", color="#0072B2")
    classes.axhline(0, color="grey", linewidth=0.8)
    classes.set(xlabel="accuracy with crops and flips, %", ylabel="gain of MADAug, points")
    classes.set_title("one dot a class", fontsize=10)
    return {"madaug": figure}


def notes(result: Result) -> str:
    """Budget, choices, and what the numbers cannot say."""
    c = result.config
    rates = ", ".join(f"{key.removeprefix('lr ')} {value['chosen']}" for key, value in result.tuned.items())
    seconds = ", ".join(f"{name} {result.values(name, 'seconds of training').mean():.0f}" for name in ARMS)
    changed = {name: result.curve(name, "change of images")[1].mean(0) for name in ARMS}
    tenth = max(1, len(changed["MADAug"]) // 10)
    sizes = "; ".join(f"{name} {v[:tenth].mean():.2f} and {v[-tenth:].mean():.2f}" for name, v in changed.items())
    plain, ours = (np.array([m.extra["per class"] for m in result.measurements[name].values()]).mean(0)
                   for name in ("crops and flips", "MADAug"))  # fmt: skip
    slope = float(np.polyfit(plain, ours - plain, 1)[0]) if np.ptp(plain) > 0 else float("nan")
    return (
        f"{c.data}: {c.train_images} training and {c.validation_images} validation images for MADAug, whose policy "
        f"learns from the latter, all {c.train_images + c.validation_images} to train on for the others; "
        f"{c.test_images} test images, a CNN of {len(c.channels)} layers, the same number of steps ({c.epochs} epochs "
        f"of {c.batch_size}) and the same crops and flips for all. Random arms draw two of the 17 operations. The "
        f"frozen policy was learnt in a run of its own and sees features of that run's model. Each arm has its own "
        f"learning rate, by {c.tune_epochs}-epoch trials on {c.held_images} held-out images over a grid of "
        f"{len(c.learning_rates)}: {rates}. tau is a sixth of the training, as 40 of 240 epochs; the policy's step is "
        f"{c.policy_lr:g} instead of 1e-3, since there are fewer of them. The planted operations: a seed is the mean "
        f"of {c.digit_runs} policies of {c.digit_steps} steps each, begun on a network that knows the digits already, "
        "and with small steps (learning rate 0.01, momentum 0.9; the setting was chosen on other seeds). With a "
        "learning rate of 0.1 the policy often settles on the half turn or the transpose: an operation that the "
        "network fits badly has large gradients, and one step ahead these may lower the validation loss most. Seconds "
        f"of training: {seconds} (the frozen "
        f"arm without learning its policy). Relative change of images in the first and last tenth: {sizes}. Slope of a "
        f"class's gain over crops and flips against its accuracy there: {slope:+.2f} (the paper: hard classes gain "
        "most, so below zero). Pairs are over seeds, which are few."
    )

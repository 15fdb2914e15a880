"""Evidence for the state space family: images read pixel by pixel, and selective copying."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft import datasets
from torchgraft.experiments import Arm, Claim, Measurement, Progress, Result, fit, pick_learning_rate
from torchgraft.layers.state_space import FAMILIES, Block, Stack, build_ssm, ssm_optim_groups

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DATA = ("fashion-mnist",)

LSTM = "LSTM"
SOME = ("s4d", "s5", "lru", "attention", LSTM)
COPYING = ("mamba", "s4d", "lru", "attention")

_LRA = "Long Range Arena average: S4D 84 to 85, S5 87.4, LRU about 86 %, Transformer 53.7 % (partly unverified)"
_COPY = "selective copying at length 4096: Mamba 97 to 99.8 %, S4 in the same network 56 %, alone 18 %"
CLAIMS = (
    *(
        Claim(
            f"{arm} reads permuted pixels better than an LSTM", "accuracy", arm, LSTM, 2.0,
            unit="points", factor=100, paper="expected from the layers' papers; the survey has no such number",
        )
        for arm in ("s4d", "s5", "lru")
    ),
    *(
        Claim(
            f"{arm} reads long sequences better than attention", "accuracy", arm, "attention", 2.0,
            unit="points", factor=100, paper=_LRA,
        )
        for arm in ("s4d", "s5", "lru")
    ),
    Claim(
        "Mamba solves selective copying (90 % of tokens)", "accuracy", "copying: mamba", 0.9, 0.0,
        unit="points", factor=100, paper=_COPY,
    ),
    *(
        Claim(
            f"Mamba copies selectively where the time-invariant {arm} fails", "accuracy", "copying: mamba",
            f"copying: {arm}", 20.0, unit="points", factor=100, paper=_COPY,
        )
        for arm in ("s4d", "lru")
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
        seeds: how many.
        data: ``fashion-mnist``, pooled to 14 x 14 = 196 steps, or ``digits``, 8 x 8 = 64 steps.
        device: where to train.
        task: ``both``, ``pixels``, ``copying``, or ``families``: pixels with every family of the registry.
        permuted: read pixels in one fixed random order.
        width, layers, states: of the networks; ``states`` for families that have them.
        steps, tune_steps, batch_size: of pixels: optimiser steps, those of each trial of the grid, images a step.
        images, held_images, test_images: to train, to choose the learning rate, to test.
        copy_steps, copy_tune_steps, copy_batch: the same of copying.
        context, tokens, vocabulary: of copying: length, tokens to copy, kinds of them.
        learning_rates: the grid of every arm; eigenvalues and step sizes never learn faster than 1e-3.
    """

    seeds: int = 3
    data: str = "fashion-mnist"
    device: str = "cpu"
    task: Literal["both", "pixels", "copying", "families"] = "both"
    permuted: bool = True
    width: int = 32
    layers: int = 2
    states: int = 16
    steps: int = 150
    tune_steps: int = 75
    batch_size: int = 16
    images: int = 10_000
    held_images: int = 500
    test_images: int = 1000
    copy_steps: int = 400
    copy_tune_steps: int = 200
    copy_batch: int = 32
    context: int = 24
    tokens: int = 4
    vocabulary: int = 8
    learning_rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2, 1e-1)


SCALES = {
    "smoke": Config(
        seeds=1, data="digits", width=8, layers=1, states=4, steps=2, tune_steps=1, batch_size=4, images=40,
        held_images=10, test_images=20, copy_steps=2, copy_tune_steps=1, copy_batch=4, context=8, tokens=2,
        learning_rates=(1e-2,),
    ),
    "laptop": Config(),
    "families": Config(
        task="families", steps=300, tune_steps=60, batch_size=16, learning_rates=(3e-3, 1e-2, 3e-2)
    ),
    "gpu": Config(
        device="cuda", width=64, layers=4, states=64, steps=3000, tune_steps=300, batch_size=128, images=55_000,
        held_images=2000, test_images=10_000, copy_steps=10_000, copy_tune_steps=1000, copy_batch=64, context=256,
        tokens=16, vocabulary=16, learning_rates=(1e-3, 3e-3, 1e-2),
    ),
    "paper": Config(
        device="cuda", width=256, layers=6, states=64, steps=50_000, tune_steps=2000, batch_size=64, images=55_000,
        held_images=5000, test_images=10_000, copy_steps=400_000, copy_tune_steps=10_000, copy_batch=64, context=4096,
        tokens=16, vocabulary=16, learning_rates=(1e-4, 3e-4, 1e-3),
    ),
}  # fmt: skip


class _LSTMStack(nn.Module):
    """The stack's calling convention around torch's LSTM."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width, layers, batch_first=True)

    def forward(self, x: Tensor, return_state: bool = True) -> tuple[Tensor, object]:
        return self.lstm(x)

    def initial_state(self, batch_size: int) -> object:
        return None

    def step(self, x_t: Tensor, state: object) -> tuple[Tensor, object]:
        y, state = self.lstm(x_t[:, None], state)
        return y[:, 0], state


def _network(name: str, config: Config, length: int) -> nn.Module:
    if name == LSTM:
        return _LSTMStack(config.width, config.layers)
    states = config.states if FAMILIES[name].state_argument else None
    settings: dict[str, dict[str, object]] = {
        "mamba2": {"head_dim": max(1, config.width // 2)},
        "s4": {"l_kernel": length},
        "spade": {"l_kernel": length},
    }
    return Stack(
        [
            Block(build_ssm(name, config.width, states, l_max=length, **settings.get(name, {})))
            for _ in range(config.layers)
        ],
        config.width,
    )


class _Reader(nn.Module):
    """Pixels or tokens in, classes of the whole or of every place out."""

    def __init__(self, name: str, config: Config, length: int, tokens: int | None, classes: int) -> None:
        super().__init__()
        self.embed: nn.Module = nn.Linear(1, config.width) if tokens is None else nn.Embedding(tokens, config.width)
        self.body = _network(name, config, length)
        self.head, self.whole = nn.Linear(config.width, classes), tokens is None

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, 1) to (B, classes), or (B, L) to (B, L, classes)."""
        h, _ = self.body(self.embed(x), return_state=False)
        return self.head(h.mean(1) if self.whole else h)


def _trained(model: _Reader, parts: tuple[Tensor, ...], loss, lr: float, seed: int, **settings) -> float:  # type: ignore[no-untyped-def]
    found = fit(
        model, parts, loss, optimizer=lambda _: torch.optim.AdamW(ssm_optim_groups(model, lr)), schedule="one_cycle",
        seed=seed, clip=1.0, **settings,
    )  # fmt: skip
    return found.seconds


def _milliseconds_of_a_step(model: _Reader, width: int) -> float:
    """Median time of one place behind ten others, one sequence, on the CPU."""
    body = model.body.cpu().eval()
    times = []
    with torch.no_grad():
        state = body.initial_state(1)  # type: ignore[operator]
        for i in range(40):
            began = time.perf_counter()
            _, state = body.step(torch.zeros(1, width), state)  # type: ignore[operator]
            if i >= 10:
                times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times)


def _pixels(config: Config) -> Mapping[str, Arm]:
    images = datasets.load(config.data)
    assert isinstance(images, datasets.Images)
    shuffle = torch.Generator().manual_seed(0)
    drawn = torch.randperm(len(images.train_x), generator=shuffle)[: config.images + config.held_images]
    size = 14 if config.data == "fashion-mnist" else images.train_x.shape[-1]
    order = torch.randperm(size * size, generator=shuffle) if config.permuted else torch.arange(size * size)

    def sequence(x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(x.float() / 255, size).flatten(1)
        return ((x - 0.29) / 0.33)[:, order, None]

    held, train = drawn[: config.held_images], drawn[config.held_images :]
    parts = {
        "train": (sequence(images.train_x[train]), images.train_y[train]),
        "held": (sequence(images.train_x[held]), images.train_y[held]),
        "test": (sequence(images.test_x[: config.test_images]), images.test_y[: config.test_images]),
    }
    classes = int(images.train_y.max()) + 1

    def arm_of(name: str) -> Arm:
        def accuracy(model: nn.Module, part: str) -> float:
            x, y = parts[part]
            model.eval()
            right = 0.0
            with torch.no_grad():
                for i in range(0, len(x), 200):
                    guess = model(x[i : i + 200].to(config.device)).argmax(-1).cpu()
                    right += (guess == y[i : i + 200]).float().sum().item()
            return right / len(x)

        def trained(seed: int, lr: float, steps: int, progress: Progress | None) -> tuple[_Reader, float]:
            torch.manual_seed(seed)
            model = _Reader(name, config, size * size, None, classes)
            seconds = _trained(
                model, parts["train"], lambda m, b: F.cross_entropy(m(b[0]), b[1]), lr, seed, steps=steps,
                batch_size=config.batch_size, device=config.device, progress=progress,
            )  # fmt: skip
            return model, seconds

        def run(seed: int, progress: Progress) -> Measurement:
            def score(lr: float) -> float:
                return accuracy(trained(1000, lr, config.tune_steps, None)[0], "held")

            picked = progress.once(f"lr {name}", lambda: pick_learning_rate(config.learning_rates, score))
            model, seconds = trained(seed, picked["chosen"], config.steps, progress)
            found = {
                "accuracy": accuracy(model, "test"),
                "parameters": float(sum(p.numel() for p in model.parameters())),
                "seconds of training": seconds,
                "milliseconds of a step": _milliseconds_of_a_step(model, config.width),
            }
            return Measurement(found)

        return run

    names: Sequence[str] = (*FAMILIES, LSTM) if config.task == "families" else SOME
    return {name: arm_of(name) for name in names}


def copying_batch(count: int, config: Config, seed: int) -> tuple[Tensor, Tensor]:
    """Selective copying: tokens among noise, then as many marks; at the marks the tokens are asked for in order.

    Args:
        count: sequences.
        config: settings of the task.
        seed: of the drawing.

    Returns:
        Inputs (count, context + tokens): 0 is noise, the last number of the vocabulary a mark; and targets
        (count, tokens).
    """
    drawn = torch.Generator().manual_seed(seed)
    targets = torch.randint(1, config.vocabulary + 1, (count, config.tokens), generator=drawn)
    places = torch.rand(count, config.context, generator=drawn).argsort(1)[:, : config.tokens].sort(1).values
    x = torch.zeros(count, config.context, dtype=torch.long).scatter(1, places, targets)
    marks = torch.full((count, config.tokens), config.vocabulary + 1)
    return torch.cat([x, marks], 1), targets


def _copying(config: Config) -> Mapping[str, Arm]:
    test, held = copying_batch(500, config, 1), copying_batch(200, config, 2)
    train = copying_batch(config.copy_batch * config.copy_steps, config, 3)
    length = config.context + config.tokens

    def arm_of(name: str) -> Arm:
        def accuracy(model: nn.Module, part: tuple[Tensor, Tensor]) -> float:
            model.eval()
            with torch.no_grad():
                guess = model(part[0].to(config.device))[:, config.context :].argmax(-1).cpu()
            return (guess == part[1]).float().mean().item()

        def loss(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
            return F.cross_entropy(model(batch[0])[:, config.context :].flatten(0, 1), batch[1].flatten())

        def trained(seed: int, lr: float, steps: int, progress: Progress | None) -> tuple[_Reader, float]:
            torch.manual_seed(seed)
            model = _Reader(name, config, length, config.vocabulary + 2, config.vocabulary + 1)
            seconds = _trained(
                model, train, loss, lr, seed, steps=steps, batch_size=config.copy_batch, device=config.device,
                progress=progress,
            )  # fmt: skip
            return model, seconds

        def run(seed: int, progress: Progress) -> Measurement:
            def score(lr: float) -> float:
                return accuracy(trained(1000, lr, config.copy_tune_steps, None)[0], held)

            picked = progress.once(f"lr copying {name}", lambda: pick_learning_rate(config.learning_rates, score))
            model, seconds = trained(seed, picked["chosen"], config.copy_steps, progress)
            return Measurement({"accuracy": accuracy(model, test), "seconds of training": seconds})

        return run

    return {f"copying: {name}": arm_of(name) for name in COPYING}


def arms(config: Config) -> Mapping[str, Arm]:
    """Some or all families on pixels, four layers on copying."""
    found: dict[str, Arm] = {}
    if config.task != "copying":
        found.update(_pixels(config))
    if config.task in ("both", "copying"):
        found.update(_copying(config))
    return found


def skips(claim: Claim, config: Config) -> bool:
    """Claims of the task that was not run."""
    copying = claim.arm.startswith("copying")
    return config.task in ("pixels", "families") if copying else config.task == "copying"


_COLOURS = {"structural": "#0072B2", "gated": "#D55E00", "recurrent": "#009E73", "attention": "#000000"}


def _colour(name: str) -> str:
    return "#999999" if name == LSTM else _COLOURS[FAMILIES[name].kind]


def figures(result: Result) -> Mapping[str, Figure]:
    """Accuracy of every arm, each seed a point; on pixels against the time of training too."""
    from matplotlib.figure import Figure

    pixels = [name for name in result.arms if not name.startswith("copying")]
    copying = [name for name in result.arms if name.startswith("copying")]
    panels = [part for part in (pixels, copying) if part]
    columns, rows = len(panels) + bool(pixels), max(map(len, panels))
    figure = Figure(figsize=(5.5 * columns, 1.6 + 0.27 * rows), layout="constrained")
    axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for part in panels:
        ax = axes.pop(0)
        ordered = sorted(part, key=lambda name: result.values(name, "accuracy").mean())
        for y, name in enumerate(ordered):
            values = 100 * result.values(name, "accuracy")
            short = name.removeprefix("copying: ")
            ax.plot(values, [y] * len(values), "o", color=_colour(short), alpha=0.6, markersize=5)
            ax.plot(values.mean(), y, "|", color=_colour(short), markersize=14, markeredgewidth=2)
        ax.set_yticks(range(len(ordered)), [name.removeprefix("copying: ") for name in ordered])
        what = "selective copying, tokens right" if part is copying else "test images right, pixel by pixel"
        ax.set_xlabel(f"{what}, %")
        ax.grid(True, axis="x", alpha=0.3)
    if pixels:
        ax = axes.pop(0)
        for name in pixels:
            x, y = result.values(name, "seconds of training").mean(), 100 * result.values(name, "accuracy").mean()
            ax.plot(x, y, "o", color=_colour(name))
            ax.annotate(name, (x, y), xytext=(4, 3), textcoords="offset points", fontsize=7)
        ax.set_xscale("log")
        ax.xaxis.set_minor_formatter("")
        # room for the names
        low, high = ax.get_xlim()
        ax.set_xlim(low, high * 1.6)
        ax.set_xlabel("seconds of training, log scale")
        ax.set_ylabel("test images right, %")
        for kind, colour in {**_COLOURS, "LSTM": "#999999"}.items():
            ax.plot([], [], "o", color=colour, label=kind)
        ax.grid(True, alpha=0.3)
        ax.legend(frameon=False, fontsize=7, loc="lower right")
    return {"state_space": figure}


def notes(result: Result) -> str:
    """Budget, choices, and what the numbers cannot say."""
    c = result.config
    rates = ", ".join(f"{key.removeprefix('lr ')} {value['chosen']:g}" for key, value in result.tuned.items())
    order = "in one fixed random order" if c.permuted else "row by row"
    return (
        f"{c.layers} layers of width {c.width}, no feed-forward layers. Pixels {order}: {c.steps} steps of "
        f"{c.batch_size} images, each pixel a step, mean over places. Copying: {c.copy_steps} steps of {c.copy_batch} "
        f"sequences, {c.tokens} of {c.vocabulary} kinds of tokens among {c.context} places. Every arm has the same "
        f"steps and its learning rate from the same {len(c.learning_rates)} by trials of {c.tune_steps} and "
        f"{c.copy_tune_steps} steps on held-out data; eigenvalues and step sizes at 1e-3 at most. Chosen: {rates}. "
        "Parameters differ between families of one width and are listed; the LSTM has more than S4D, S5 and LRU. This "
        "is a few hundred steps on short sequences: it says how fast families learn at this size, not how good they "
        "are when trained to the end, and nothing about the Long Range Arena. Layers outside the Mamba family are not "
        "purely time-invariant networks: each ends in a gate, which lets them do better than chance at copying."
    )

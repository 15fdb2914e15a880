"""Evidence for polyphase anchoring: small transformers of three kinds on photos that move, and digits full of ties."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft import datasets
from torchgraft.experiments import Arm, Claim, FitResult, Measurement, Progress, Result, fit, pick_learning_rate
from torchgraft.vision.polyphase_vit import (
    PolyTwinsConfig,
    PolyTwinsSVT,
    ShiftReport,
    make_shift_equivariant,
    shift_consistency,
)
from torchgraft.vision.rics import take_crops

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DATA = ("cifar10", "digits")
CLEAN, MEAN, WORST = "accuracy", "mean over shifts", "worst shift"
SAME, LOST = "answers never change", "points lost to the worst shift"
REAL_MEAN, REAL_WORST = "mean over real shifts", "worst real shift"
GRAFTED, TUNED, ORIGIN = "ViT, grafted", "ViT, grafted and trained on", "ViT, rolled to one origin"
SHIFTED = "ViT, shifted in training"
LONGER = "digits, longer: "


def _always(text: str, arm: str, paper: str) -> Claim:
    return Claim(text, SAME, arm, 1.0, 0.05, direction="equal", unit="points", factor=100, paper=paper)


def _points(text: str, metric: str, arm: str, against: str, effect: float, paper: str, equal: bool = False) -> Claim:
    direction: Literal["equal", "higher"] = "equal" if equal else "higher"
    return Claim(text, metric, arm, against, effect, direction=direction, unit="points", factor=100, paper=paper)


CLAIMS = (
    _always("No cyclic shift changes an answer of the poly ViT", "poly ViT", "100 % consistency"),
    _always("No cyclic shift changes an answer of the poly Twins", "poly Twins", "100 % consistency"),
    _always("No cyclic shift changes an answer of the poly Swin", "poly Swin", "reported for ViT and Twins only"),
    _always("Nor on digits, where the plain norm ties", "digits: poly ViT", "100 % consistency"),
    _points(
        "A ViT loses more accuracy to the worst shift than its poly twin", LOST, "ViT", "poly ViT", 10,
        "about 20 points against 0",
    ),
    _points(
        "A Twins loses more accuracy to the worst shift than its poly twin", LOST, "Twins", "poly Twins", 10,
        "80.57 -> 62.40 % against 0",
    ),
    _points(
        "The poly ViT is as accurate as the ViT without a shift", CLEAN, "poly ViT", "ViT", 2,
        "comparable (exact values unverified)", equal=True,
    ),
    _points("The poly Twins is as accurate as the Twins", CLEAN, "poly Twins", "Twins", 2, "comparable", equal=True),
    _points("The poly Swin is as accurate as the Swin", CLEAN, "poly Swin", "Swin", 2, "not reported", equal=True),
    _points(
        "The poly ViT is more accurate under the worst real (not cyclic) shift", REAL_WORST, "poly ViT", "ViT", 2,
        "in words: more robust to crops and affine maps",
    ),
    _points(
        "The poly ViT beats a ViT that saw shifted images in training, under the worst cyclic shift", WORST,
        "poly ViT", SHIFTED, 2, "not compared",
    ),
    _points("The circular convolution helps", CLEAN, "poly ViT", "poly ViT, no position", 0.5, "not compared"),
    _points(
        "The tie-free norm is more consistent than the plain one on digits", SAME, "digits: poly ViT",
        "digits: poly ViT, l2 norm", 1, "not compared (the paper has the plain norm)",
    ),
    _points(
        "A trained ViT that is grafted and trained on is as accurate as it was", CLEAN, TUNED, "ViT", 2,
        "not compared", equal=True,
    ),
    _points(
        "With longer training on digits the poly ViT comes up to the ViT", CLEAN, LONGER + "poly ViT",
        LONGER + "ViT", 2, "comparable", equal=True,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
        seeds: how many.
        data: photos: ``cifar10``, or ``built-in`` (textures, for where there is no data).
        device: where to train.
        train_images, held_images, test_images: photos; 0 takes all for training and testing.
        canvas: side to which photos are made smaller; 0 leaves them as they are.
        size: the middle of each photo that a model sees; the rest is room for real shifts.
        max_shift: all cyclic shifts of up to so many pixels along each axis are measured.
        real_shifts: how many shifts of the window over the photo are measured, drawn at random among as many.
        patch: of all networks.
        width, depth, heads: of the ViT.
        dims, depths, window: of Swin and Twins, the first two stage by stage.
        steps, batch_size: optimiser steps of every arm, and images a step.
        more_steps: with which a grafted ViT is trained on.
        tune_steps: of each trial of the learning-rate grid; the longer arms on digits take the rate of the shorter.
        digit_steps, longer: steps on digits, and by how much longer the longer arms train.
        learning_rates: the grid that every arm gets.
        precision: as in ``fit``.
    """

    seeds: int = 3
    data: str = "cifar10"
    device: str = "cpu"
    train_images: int = 4000
    held_images: int = 400
    test_images: int = 200
    canvas: int = 24
    size: int = 16
    max_shift: int = 4
    real_shifts: int = 17
    width: int = 48
    depth: int = 3
    heads: int = 4
    patch: int = 4
    dims: tuple[int, ...] = (24, 48)
    depths: tuple[int, ...] = (2, 2)
    window: int = 2
    steps: int = 250
    batch_size: int = 32
    more_steps: int = 100
    tune_steps: int = 80
    digit_steps: int = 300
    longer: int = 2
    learning_rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2)
    precision: Literal["no", "fp16", "bf16"] = "no"


_LARGE = Config(
    device="cuda", train_images=0, held_images=1000, test_images=1000, canvas=0, size=24, patch=2, real_shifts=81,
    width=192, depth=8, heads=3, dims=(48, 96), depths=(2, 6), window=3, steps=6000, batch_size=128, more_steps=2000,
    tune_steps=400, digit_steps=1000, precision="bf16", learning_rates=(3e-4, 1e-3, 3e-3, 1e-2),
)  # fmt: skip

SCALES = {
    "smoke": Config(
        seeds=1, data="built-in", train_images=24, held_images=8, test_images=6, max_shift=1, real_shifts=5,
        width=16, depth=1, heads=2, dims=(8, 16), steps=2, batch_size=8, more_steps=1, tune_steps=1, digit_steps=2,
        longer=2, learning_rates=(1e-3,),
    ),
    "laptop": Config(),
    "gpu": _LARGE,
    "paper": Config(**(vars(_LARGE) | {"steps": 100_000, "more_steps": 10_000, "test_images": 0})),
}  # fmt: skip

Part = tuple[Tensor, Tensor]


def _photos(config: Config) -> dict[str, Part]:
    """Training, held-out and test photos with room for real shifts, as floats; the same for all seeds."""
    if config.data == "built-in":
        noise = torch.rand(200, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        both = ((F.avg_pool2d(noise, 3, 1, 1) * 255).byte(), torch.arange(200) % 10)
        images = datasets.Images(*both, *both, tuple("0123456789"))
    else:
        found = datasets.load(config.data)
        if not isinstance(found, datasets.Images) or found.train_x.shape[1] != 3:
            raise ValueError(f"data must be colour images, got {config.data!r}; use 'cifar10' or 'built-in'")
        images = found
    needed = config.size + 2 * config.max_shift
    if (config.canvas or images.train_x.shape[2]) < needed:
        raise ValueError(f"a window of {config.size} that moves by {config.max_shift} needs {needed} pixels")

    def prepared(x: Tensor) -> Tensor:
        pixels = x.float() / 255
        if config.canvas:
            pixels = F.interpolate(pixels, (config.canvas,) * 2, mode="bilinear", antialias=True)
        room = (pixels.shape[2] - needed) // 2
        return (pixels[:, :, room : room + needed, room : room + needed] - 0.5) / 0.25

    order = torch.randperm(len(images.train_y), generator=torch.Generator().manual_seed(0))
    held, rest = order[: config.held_images], order[config.held_images :]
    chosen = rest[: config.train_images or len(rest)]
    end = config.test_images or len(images.test_y)
    return {
        "train": (prepared(images.train_x[chosen]), images.train_y[chosen]),
        "held": (prepared(images.train_x[held]), images.train_y[held]),
        "test": (prepared(images.test_x[:end]), images.test_y[:end]),
    }


def _digits(config: Config) -> dict[str, Part]:
    """Digits of 8 x 8 in the middle of 16 x 16."""
    digits = datasets.load("digits")
    assert isinstance(digits, datasets.Images)

    def prepared(x: Tensor) -> Tensor:
        return F.pad(x.float() / 255, (4, 4, 4, 4))

    held = torch.arange(len(digits.train_y)) % 5 == 0
    few = slice(None) if config.data != "built-in" else slice(40)
    return {
        "train": (prepared(digits.train_x[~held]), digits.train_y[~held]),
        "held": (prepared(digits.train_x[held])[few], digits.train_y[held][few]),
        "test": (prepared(digits.test_x)[few], digits.test_y[few]),
    }


def _vit(width: int, depth: int, heads: int, patch: int, size: int, channels: int) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, intermediate_size=2 * width,
            image_size=size, patch_size=patch, num_channels=channels, num_labels=10,
        )
    )  # fmt: skip


def _heads(config: Config) -> list[int]:
    return [max(1, width // 12) if width % 12 == 0 else 2 for width in config.dims]


def _swin(config: Config) -> nn.Module:
    from transformers import SwinConfig, SwinForImageClassification

    return SwinForImageClassification(
        SwinConfig(
            image_size=config.size, patch_size=config.patch, embed_dim=config.dims[0], depths=list(config.depths),
            num_heads=_heads(config), window_size=config.window, mlp_ratio=2.0,
            drop_path_rate=0.0, num_labels=10,
        )
    )  # fmt: skip


def _twins(config: Config) -> nn.Module:
    return PolyTwinsSVT(
        PolyTwinsConfig(
            embed_dims=config.dims, depths=config.depths, num_heads=tuple(_heads(config)),
            window_sizes=(config.window,) * 2, sr_ratios=(2, 1), mlp_ratio=2.0, patch_size=config.patch, num_classes=10,
            anchored=False,
        )
    )  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """What an arm trains.

    Attributes:
        network: ``vit``, ``swin`` or ``twins``.
        poly: made shift-equivariant before training.
        graft: settings of that.
        augment: shift every training image at random, cyclically.
        digits: the task.
        longer: train longer.
    """

    network: Literal["vit", "swin", "twins"] = "vit"
    poly: bool = False
    graft: dict[str, Any] = field(default_factory=dict)
    augment: bool = False
    digits: bool = False
    longer: bool = False


ARMS = {
    "ViT": Kind(),
    SHIFTED: Kind(augment=True),
    "poly ViT": Kind(poly=True),
    "poly ViT, no position": Kind(poly=True, graft={"peg": False}),
    "Swin": Kind("swin"),
    "poly Swin": Kind("swin", poly=True),
    "Twins": Kind("twins"),
    "poly Twins": Kind("twins", poly=True),
    "digits: ViT": Kind(digits=True),
    "digits: poly ViT": Kind(poly=True, digits=True),
    "digits: poly ViT, l2 norm": Kind(poly=True, graft={"norm": "l2"}, digits=True),
    LONGER + "ViT": Kind(digits=True, longer=True),
    LONGER + "poly ViT": Kind(poly=True, digits=True, longer=True),
}


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    found = model(x)
    return getattr(found, "logits", found)


def _measurement(cyclic: ShiftReport, real: ShiftReport | None, trained: FitResult | None = None) -> Measurement:
    clean = cyclic.accuracy()
    metrics = {
        CLEAN: clean, MEAN: cyclic.mean_accuracy, WORST: cyclic.worst_case_accuracy,
        LOST: clean - cyclic.worst_case_accuracy, "consistency": cyclic.consistency,
        SAME: cyclic.worst_case_consistency, "variance of the true logit": cyclic.logit_variance,
    }  # fmt: skip
    if real is not None:
        metrics |= {REAL_MEAN: real.mean_accuracy, REAL_WORST: real.worst_case_accuracy}
        metrics["same for all real shifts"] = real.worst_case_consistency
    if trained is not None:
        metrics["seconds of training"] = trained.seconds
    across = {str(dx): cyclic.accuracy((0, dx)) for (dy, dx) in cyclic.shifts if dy == 0}
    return Measurement(metrics, curves=trained.history if trained is not None else {}, extra={"across": across})


def arms(config: Config) -> Mapping[str, Arm]:
    """Plain and anchored twins; the trained ViT is also grafted, with and without further training."""
    photos, digits = _photos(config), _digits(config)

    def middle(x: Tensor) -> Tensor:
        room = (x.shape[2] - config.size) // 2
        return x[:, :, room : x.shape[2] - room, room : x.shape[3] - room]

    def make(kind: Kind) -> nn.Module:
        if kind.digits:
            model = _vit(config.width, config.depth, config.heads, 4, 16, 1)
        elif kind.network == "vit":
            model = _vit(config.width, config.depth, config.heads, config.patch, config.size, 3)
        else:
            model = _swin(config) if kind.network == "swin" else _twins(config)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                # with the usual 0.02, made for wide networks, all of so short a run passes on the first plateau
                nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
        return make_shift_equivariant(model, **kind.graft) if kind.poly else model

    def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
        model.eval()
        with torch.no_grad():
            found = torch.cat([_logits(model, part.to(config.device)).argmax(1).cpu() for part in x.split(250)])
        return (found == y).float().mean().item()

    def trained(
        model: nn.Module, kind: Kind, seed: int, lr: float, steps: int, progress: Progress | None, tested: bool
    ) -> FitResult:
        parts = digits if kind.digits else {name: (middle(x), y) for name, (x, y) in photos.items()}

        def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
            x, y = batch
            if kind.augment:
                size = (x.shape[2], x.shape[3])
                start = torch.stack([torch.randint(0, side, (len(x),), device=x.device) for side in size], 1)
                x = take_crops(x, start, size, circular=True)
            return F.cross_entropy(_logits(model, x), y)

        return fit(
            model, parts["train"], loss, steps=steps, batch_size=config.batch_size, seed=seed, clip=1.0,
            optimizer=lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=0.05, fused=True), schedule="one_cycle",
            device=config.device, progress=progress, mixed_precision=config.precision,
            evaluate=lambda m: {CLEAN: accuracy(m, *parts["test"])},
            evaluate_at=sorted({steps * i // 4 for i in range(1, 5)}) if tested else (),
        )  # fmt: skip

    def shifted(model: nn.Module, kind: Kind) -> tuple[ShiftReport, ShiftReport | None]:
        model.eval()
        x, y = (digits if kind.digits else photos)["test"]
        x = x.to(config.device)
        if kind.digits:
            return shift_consistency(model, x, y, max_shift=config.max_shift, batch_size=250), None
        return (
            shift_consistency(model, middle(x), y, max_shift=config.max_shift, batch_size=250),
            shift_consistency(
                model, x, y, max_shift=config.max_shift, n_random=config.real_shifts, kind="realistic", batch_size=250
            ),
        )

    def arm_of(name: str) -> Arm:
        kind = ARMS[name]
        steps = (config.digit_steps if kind.digits else config.steps) * (config.longer if kind.longer else 1)

        def picked(key: str, progress: Progress, start: nn.Module | None, tune: int, kind: Kind) -> float:
            x, y = (digits if kind.digits else photos)["held"]

            def score(lr: float) -> float:
                torch.manual_seed(1000)
                model = make(kind) if start is None else copy.deepcopy(start)
                trained(model, kind, 1000, lr, tune, None, tested=False)
                return accuracy(model, x if kind.digits else middle(x), y)

            return progress.once(key, lambda: pick_learning_rate(config.learning_rates, score))["chosen"]

        def run(seed: int, progress: Progress) -> Mapping[str, Measurement]:
            # the longer arms take the rate of the shorter ones
            lr = picked(f"lr {name.replace(LONGER, 'digits: ')}", progress, None, config.tune_steps, kind)
            torch.manual_seed(seed)
            model = make(kind)
            found = trained(model, kind, seed, lr, steps, progress, tested=True)
            readings = {name: _measurement(*shifted(model, kind), found)}
            if name != "ViT":
                return readings
            poly = Kind(poly=True)
            grafted = make_shift_equivariant(copy.deepcopy(model))
            readings[GRAFTED] = _measurement(*shifted(grafted, poly))
            origin = make_shift_equivariant(copy.deepcopy(model), invariant=True)
            readings[ORIGIN] = _measurement(*shifted(origin, poly))
            lr = picked(f"lr {TUNED}", progress, grafted, config.tune_steps, poly)
            more = trained(grafted, poly, seed + 500, lr, config.more_steps, progress, tested=False)
            readings[TUNED] = _measurement(*shifted(grafted, poly), more)
            return readings

        return run

    return {name: arm_of(name) for name in ARMS}


_PAIRS = (("ViT", "poly ViT"), ("Swin", "poly Swin"), ("Twins", "poly Twins"))
_COLOURS = ("#0072B2", "#D55E00", "#009E73")


def figures(result: Result) -> Mapping[str, Figure]:
    """Accuracy without a shift, on average and under the worst one; accuracy across a row of shifts; against steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 5.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.6, 1, 1))
    names = [n for n in result.arms if not n.startswith("digits")] + [n for n in result.arms if n.startswith("digits")]
    marks = ((CLEAN, "o", "no shift"), (MEAN, "|", "mean over shifts"), (WORST, "<", "worst shift"))
    for y, name in enumerate(names):
        plain = "poly" not in name and "graft" not in name and "origin" not in name
        colour = "#777777" if plain else "#D55E00"
        means = [100 * result.values(name, metric).mean() for metric, _, _ in marks]
        left.plot([min(means), max(means)], [y, y], "-", color=colour, linewidth=1.2)
        for (_, mark, label), value in zip(marks, means, strict=True):
            left.plot(
                [value], [y], mark, color=colour, markersize=8 if mark == "|" else 6, label=label if not y else None
            )
    left.set_yticks(range(len(names)), names, fontsize=8)
    left.invert_yaxis()
    left.grid(axis="x", alpha=0.3)
    left.set(xlabel="test accuracy, %", xlim=(-3, 103))
    left.set_title(
        f"cyclic shifts of up to {result.config.max_shift} pixels, mean of {len(result.seeds)} seeds", fontsize=10
    )
    left.legend(frameon=False, fontsize=8)
    for pair, colour in zip(_PAIRS, _COLOURS, strict=True):
        for name, style in zip(pair, ("--", "-"), strict=True):
            across = [m.extra["across"] for m in result.measurements[name].values()]
            places = sorted(across[0], key=int)
            values = [100 * sum(a[dx] for a in across) / len(across) for dx in places]
            middle.plot([int(dx) for dx in places], values, style, color=colour, label=name)
            steps, clean = result.curve(name, CLEAN)
            right.plot(steps, 100 * clean.mean(0), style, color=colour, label=name)
    middle.set(xlabel="pixels to the side, cyclic", ylabel="test accuracy, %")
    middle.set_title("solid: anchored", fontsize=10)
    right.set(xlabel="optimiser steps", ylabel="accuracy without a shift, %")
    right.set_title("what short training costs", fontsize=10)
    for ax in (middle, right):
        ax.grid(alpha=0.3)
        ax.legend(frameon=False, fontsize=8)
    return {"polyphase_vit": figure}


def notes(result: Result) -> str:
    """Budget, choices, and what the numbers cannot say."""
    c = result.config
    rates = ", ".join(f"{key.removeprefix('lr ')} {value['chosen']}" for key, value in result.tuned.items())

    def points(arm: str, metric: str) -> str:
        return f"{100 * result.values(arm, metric).mean():.1f} %"

    ends = {min(c.learning_rates), max(c.learning_rates)}
    at_end = [key.removeprefix("lr ") for key, value in result.tuned.items() if value["chosen"] in ends]
    doubt = f" At an end of the grid, so perhaps not at their best: {', '.join(at_end)}." if at_end else ""
    smaller = f" made smaller to {c.canvas} x {c.canvas}" if c.canvas else ""
    shifts = (2 * c.max_shift + 1) ** 2
    real = "same for all real shifts"
    return (
        f"Photos: the middle {c.size} x {c.size} pixels of {c.data}{smaller}, {len(result.seeds)} seeds, "
        f"{c.train_images} training and {c.test_images} test images, no augmentation but in '{SHIFTED}' (random cyclic "
        f"shifts). ViT of transformers (width {c.width}, {c.depth} blocks, patches of {c.patch} pixels), Swin of "
        f"transformers and Twins (widths {c.dims}, blocks {c.depths}, windows of {c.window}); anchored "
        f"twins are these models after make_shift_equivariant. Every arm: {c.steps} AdamW steps of {c.batch_size}, "
        f"one-cycle, linear layers drawn with the inverse root of their inputs, its own learning rate out of "
        f"{len(c.learning_rates)} by trials of {c.tune_steps} steps on "
        f"{c.held_images} held-out images. Chosen: {rates}. All {shifts} cyclic shifts of up to {c.max_shift} pixels "
        f"are measured; '{SAME}' is the share of images answered alike under all of them. Real shifts ({c.real_shifts} "
        f"of them) move the window over the photo, so that new content enters: there the poly ViT answers "
        f"{points('poly ViT', real)} of the images alike, the ViT {points('ViT', real)}; the guarantee is for cyclic "
        f"shifts alone. '{GRAFTED}': the trained ViT after make_shift_equivariant, nothing trained; '{TUNED}': "
        f"{c.more_steps} more steps (so it has had more than the others); '{ORIGIN}': invariant=True, nothing trained. "
        f"Digits: 8 x 8 pixels of 17 greys in the middle of 16 x 16, the same ViT, {c.digit_steps} steps, and "
        f"{c.longer} times as many in the longer arms. With so few steps a network that must find out by itself where "
        f"things are is behind one that is told; both get the same steps.{doubt}"
    )

"""Evidence for masked position prediction: pre-train a small ViT without labels, fine-tune it on few."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft import datasets
from torchgraft.experiments import Arm, Claim, Measurement, Progress, Result, fit, pick_learning_rate
from torchgraft.vision.position_prediction import MP3Config, MP3ForPreTraining, adapt, position_confusion, restore

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DATA = ("fashion-mnist", "spoken-digits")
BARE, SCRATCH, SCRATCH_BARE = "MP3, no positions", "from scratch", "from scratch, no positions"
EQUAL, MAE, RANDOM = "from scratch, equal compute", "masked autoencoder, equal compute", "random positions"

CLAIMS = (
    Claim(
        "Pre-training by position prediction beats training from scratch", "accuracy", "MP3", SCRATCH, 1.0,
        unit="points", factor=100, paper="in words: a clear gain on CIFAR-100 and Tiny ImageNet",
    ),
    Claim(
        "It also beats training from scratch for as much compute", "accuracy", "MP3", EQUAL, 1.0,
        unit="points", factor=100, paper="in words: better than a strong supervised baseline",
    ),
    Claim(
        "Fine-tuned without positions it beats training from scratch with them", "accuracy", BARE, SCRATCH, 1.0,
        unit="points", factor=100, paper="in words: holds",
    ),
    Claim(
        "It is as good as a masked autoencoder of equal compute", "accuracy", "MP3", MAE, 1.0,
        direction="equal", unit="points", factor=100, paper="ImageNet: 83.0 (unverified) against 83.6 of a longer MAE",
    ),
    Claim(
        "The positions are what teaches: random ones as target do not", "accuracy", "MP3", RANDOM, 1.0,
        unit="points", factor=100, paper="not compared",
    ),
    Claim(
        "Positions are found far above chance", "position accuracy", "MP3", RANDOM, 10.0,
        unit="points", factor=100, paper="in words: solvable without positions",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
        seeds: how many.
        data: ``fashion-mnist``, ``cifar10``, ``spoken-digits``, or ``digits`` (images) where there is no data.
        device: where to train.
        patch: rows and columns of a patch; for speech all mel bands, so that positions are along time alone.
        width, depth, heads: of the ViT; its feed-forward layers are twice as wide.
        masking_ratio: of MP3; the autoencoder hides three quarters, as its authors do.
        other_ratios: of the arms that show what the ratio does, with the learning rate of MP3.
        images, labels, held_images, test_images: for pre-training, labelled ones for fine-tuning, those that choose
            learning rates, and for the test.
        steps, tune_steps: optimiser steps of fine-tuning (and of training from scratch).
        pretrain_steps: of MP3; other arms get as many as cost the same.
        batch_size: of either.
        trial: share of the steps that trials of learning rates take.
        learning_rates: the grid of every arm, one rate for pre-training and fine-tuning.
    """

    seeds: int = 4
    data: str = "fashion-mnist"
    device: str = "cpu"
    patch: tuple[int, int] = (7, 7)
    width: int = 48
    depth: int = 3
    heads: int = 4
    masking_ratio: float = 0.5
    other_ratios: tuple[float, ...] = (0.0, 0.75)
    images: int = 20_000
    labels: int = 500
    held_images: int = 1000
    test_images: int = 2000
    steps: int = 120
    pretrain_steps: int = 300
    batch_size: int = 64
    trial: float = 0.5
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)


SCALES = {
    "smoke": Config(
        seeds=1, data="digits", patch=(2, 2), width=16, depth=1, heads=2, images=200, labels=50, held_images=50,
        test_images=50, steps=4, pretrain_steps=4, batch_size=16, learning_rates=(3e-3,), other_ratios=(0.75,),
    ),
    "laptop": Config(),
    "speech": Config(data="spoken-digits", patch=(40, 4), images=2400, labels=300, held_images=300, test_images=300),
    "gpu": Config(
        device="cuda", patch=(4, 4), width=192, depth=6, images=55_000, held_images=2000, test_images=10_000,
        steps=3000, pretrain_steps=20_000, batch_size=256, trial=0.2, learning_rates=(3e-4, 1e-3, 3e-3),
    ),
    "paper": Config(
        data="cifar10", device="cuda", patch=(4, 4), width=384, depth=12, heads=6, images=18_000, labels=18_000,
        held_images=2000, test_images=10_000, steps=40_000, pretrain_steps=100_000, batch_size=256, trial=0.1,
        learning_rates=(3e-4, 1e-3, 3e-3),
    ),
}  # fmt: skip

MAE_RATIO = 0.75


def with_ratio(ratio: float) -> str:
    """The name of the arm with this masking ratio."""
    return f"MP3, ratio {ratio:g}"


def skips(claim: Claim, config: Config) -> bool:
    """Whether a claim is about an arm that this data cannot have: the autoencoder takes square images alone."""
    return config.data == "spoken-digits" and claim.against == MAE


@dataclass(frozen=True)
class _Data:
    """Normalised images: pool without labels, labelled, held out, test; pairs of images and labels."""

    pool: Tensor
    labelled: Callable[[int], tuple[Tensor, Tensor]]
    held: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: int


def _spectrograms(sounds: datasets.Sounds) -> datasets.Images:
    """Log-mel spectrograms (1, 40 bands, 64 frames), the whole recording stretched to that: padding would leak."""
    from transformers.audio_utils import mel_filter_bank

    bank = torch.from_numpy(mel_filter_bank(129, 40, 50.0, 4000.0, sounds.rate)).float()
    window = torch.hann_window(256)

    def picture(wave: Tensor) -> Tensor:
        power = torch.stft(wave, 256, 64, window=window, return_complex=True).abs().square()
        return F.interpolate((bank.T @ power + 1e-6).log()[None], 64, mode="linear")

    train, test = (torch.stack([picture(wave) for wave in part]) for part in (sounds.train, sounds.test))
    return datasets.Images(train, sounds.train_y, test, sounds.test_y, sounds.classes)


def _data(config: Config) -> _Data:
    raw = datasets.load(config.data)
    if isinstance(raw, datasets.Sounds):
        raw = _spectrograms(raw)
    if not isinstance(raw, datasets.Images):
        raise ValueError(f"data must be images or spoken-digits, got {config.data!r}")
    order = torch.randperm(len(raw.train_x), generator=torch.Generator().manual_seed(0))
    held, pool = order[: config.held_images], order[config.held_images :][: config.images]
    mean, deviation = raw.train_x[pool].float().mean(), raw.train_x[pool].float().std()

    def images(x: Tensor) -> Tensor:
        return ((x.float() - mean) / deviation).to(config.device)

    def labelled(seed: int) -> tuple[Tensor, Tensor]:
        chosen = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[: config.labels]]
        return images(raw.train_x[chosen]), raw.train_y[chosen].to(config.device)

    test = slice(0, config.test_images)
    return _Data(
        images(raw.train_x[pool]),
        labelled,
        (images(raw.train_x[held]), raw.train_y[held].to(config.device)),
        (images(raw.test_x[test]), raw.test_y[test].to(config.device)),
        len(raw.classes),
    )


class Classifier(nn.Module):
    """A ViT and a linear layer on the mean of its patches."""

    def __init__(self, vit: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.vit, self.head = vit, nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, classes)."""
        return self.head(self.vit(x).last_hidden_state[:, 1:].mean(1))


def _sizes(config: Config, data: _Data) -> dict[str, Any]:
    return {
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": 2 * config.width,
        "image_size": tuple(data.pool.shape[2:]),
        "patch_size": config.patch,
        "num_channels": data.pool.shape[1],
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def _vit(config: Config, data: _Data) -> nn.Module:
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(**_sizes(config, data)), add_pooling_layer=False)


def _mae(config: Config, data: _Data) -> nn.Module:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    decoder = {
        "decoder_hidden_size": config.width,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": config.heads,
        "decoder_intermediate_size": 2 * config.width,
    }
    # its decoder multiplies the sizes, so they must be numbers, of squares
    square = {"image_size": data.pool.shape[2], "patch_size": config.patch[0]}
    settings = ViTMAEConfig(**_sizes(config, data) | square, **decoder, mask_ratio=MAE_RATIO, norm_pix_loss=True)
    return ViTMAEForPreTraining(settings)


def _positions(config: Config, images: Tensor) -> int:
    return (images.shape[2] // config.patch[0]) * (images.shape[3] // config.patch[1])


def mae_steps(config: Config, patches: int) -> int:
    """Steps of the autoencoder that put as many tokens through as many layers as MP3's."""
    seen = round((1 - MAE_RATIO) * patches) + 1
    return round(config.pretrain_steps * patches * config.depth / (seen * config.depth + patches + 1))


def _train(
    config: Config, model: nn.Module, data: tuple[Tensor, ...], loss: Any, steps: int, lr: float, seed: int, report: Any
) -> float:
    found = fit(
        model, tuple(t.cpu() for t in data), loss, steps=steps, batch_size=config.batch_size, seed=seed,
        optimizer=lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=0.05), schedule="one_cycle", clip=1.0,
        device=config.device, progress=report,
    )  # fmt: skip
    return found.seconds


def _pretrained(
    config: Config, data: _Data, name: str, steps: int, lr: float, seed: int, report: Any
) -> tuple[Any, float]:
    """The pre-training model after its steps, and the seconds they took."""
    if name == MAE:
        model = _mae(config, data)
        steps = round(steps * mae_steps(config, _positions(config, data.pool)) / config.pretrain_steps)
        return model, _train(config, model, (data.pool,), lambda m, b: m(b[0]).loss, steps, lr, seed, report)
    ratio = {with_ratio(r): r for r in config.other_ratios}.get(name, config.masking_ratio)
    model = MP3ForPreTraining(_vit(config, data), MP3Config(ratio))

    def loss(m: nn.Module, batch: list[Tensor]) -> Tensor:
        out = m(batch[0])
        if name != RANDOM:
            return out.loss
        target = torch.randint(out.logits.shape[2], out.logits.shape[:2], device=out.logits.device)
        return F.cross_entropy(out.logits.flatten(0, 1), target.flatten())

    return model, _train(config, model, (data.pool,), loss, steps, lr, seed, report)


def _backbone(config: Config, data: _Data, name: str, pretrained: Any) -> nn.Module:
    """A fresh ViT with the weights of the pre-training, ready for fine-tuning."""
    if pretrained is None:
        vit = _vit(config, data)
        return restore(adapt(vit), "none") if name == SCRATCH_BARE else vit
    fresh = _vit(config, data)
    source = pretrained.vit if name == MAE else pretrained.encoder.model
    fresh.load_state_dict(source.state_dict())
    return fresh if name == MAE else restore(adapt(fresh), "none" if name == BARE else "zeros")


def _accuracy(model: nn.Module, part: tuple[Tensor, Tensor]) -> float:
    model.eval()
    with torch.no_grad():
        right = [(model(x).argmax(1) == y).float() for x, y in zip(part[0].split(500), part[1].split(500), strict=True)]
    return torch.cat(right).mean().item()


def arms(config: Config) -> Mapping[str, Arm]:
    """Each pre-training with its readings, and training from scratch."""
    data = _data(config)
    others = [with_ratio(ratio) for ratio in config.other_ratios]
    nothing_tuned = {BARE: "MP3", RANDOM: "MP3", SCRATCH_BARE: SCRATCH} | dict.fromkeys(others, "MP3")

    def finetuned(name: str, pretrained: Any, share: float, lr: float, seed: int, report: Any) -> tuple[Any, float]:
        torch.manual_seed(seed)
        model = Classifier(_backbone(config, data, name, pretrained), config.width, data.classes)
        steps = config.steps + (config.pretrain_steps if name == EQUAL else 0)
        seconds = _train(
            config, model, data.labelled(seed), lambda m, b: F.cross_entropy(m(b[0]), b[1]),
            max(1, round(share * steps)), lr, seed, report,
        )  # fmt: skip
        return model, seconds

    def before(name: str, share: float, lr: float, seed: int, report: Any) -> tuple[Any, float]:
        torch.manual_seed(seed)
        if name in (SCRATCH, SCRATCH_BARE, EQUAL):
            return None, 0.0
        return _pretrained(config, data, name, max(1, round(share * config.pretrain_steps)), lr, seed, report)

    def rate(name: str, progress: Progress) -> float:
        tuned = nothing_tuned.get(name, name)

        def score(lr: float) -> float:
            pretrained, _ = before(tuned, config.trial, lr, 1000, None)
            return _accuracy(finetuned(tuned, pretrained, config.trial, lr, 1000, None)[0], data.held)

        return progress.once(f"lr {tuned}", lambda: pick_learning_rate(config.learning_rates, score))["chosen"]

    def arm_of(name: str) -> Arm:
        def run(seed: int, progress: Progress) -> Mapping[str, Measurement]:
            lr = rate(name, progress)
            pretrained, first = before(name, 1.0, lr, seed, progress)
            readings = {}
            for label in ("MP3", BARE) if name == "MP3" else (name,):
                model, second = finetuned(label, pretrained, 1.0, lr, seed, progress)
                metrics = {"accuracy": _accuracy(model, data.test), "seconds of training": first + second}
                readings[label] = Measurement(metrics)
            if name in ("MP3", RANDOM, *others):
                pretrained.eval()
                with torch.no_grad():
                    logits = pretrained(data.test[0], generator=torch.Generator().manual_seed(seed)).logits
                found = position_confusion(logits, pretrained.encoder.grid)
                for reading in readings.values():
                    reading.metrics["position accuracy"] = found.top1
                    reading.metrics["position error"] = found.grid_error
                    reading.extra["expected"] = found.expected_positions().tolist()
                    reading.extra["grid"] = list(found.grid)
            return readings

        return run

    names = ("MP3", SCRATCH, SCRATCH_BARE, EQUAL, MAE, RANDOM, *others)
    return {name: arm_of(name) for name in names if name != MAE or config.data != "spoken-digits"}


def figures(result: Result) -> Mapping[str, Figure]:
    """Accuracy of every arm with its seeds, what the masking ratio does, and where patches are thought to come from."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    names = [n for n in ("MP3", BARE, MAE, EQUAL, SCRATCH, SCRATCH_BARE, RANDOM) if n in result.arms]
    for place, name in enumerate(names):
        values = 100 * result.values(name, "accuracy")
        colour = "tab:blue" if name in ("MP3", BARE) else "tab:grey"
        # marks and no bars: a bar would have to begin at zero, where nothing happens
        left.plot([values.mean()] * 2, [place - 0.3, place + 0.3], color=colour, linewidth=3)
        left.plot(values, [place] * len(values), "o", color=colour, markersize=5)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.grid(axis="x", alpha=0.3)
    left.set(xlabel="test accuracy, %")
    left.set_title(f"{result.config.data}, {result.config.labels} labels; line = mean, dot = seed", fontsize=10)
    by_ratio = {result.config.masking_ratio: "MP3"} | {r: with_ratio(r) for r in result.config.other_ratios}
    for metric, label, mark in (
        ("position accuracy", "positions found", "s--"),
        ("accuracy", "classes, after fine-tuning", "o-"),
    ):
        means = [100 * result.values(by_ratio[ratio], metric).mean() for ratio in sorted(by_ratio)]
        middle.plot(sorted(by_ratio), means, mark, label=label)
    middle.grid(alpha=0.3)
    middle.legend(fontsize=8)
    middle.set(xlabel="masking ratio", ylabel="test accuracy, %", ylim=(0, 100))
    extra = result.measurements["MP3"][0].extra
    to, (rows, columns) = torch.tensor(extra["expected"]), extra["grid"]
    if rows == 1:
        right.plot(range(columns), range(columns), ":", color="grey", linewidth=1)
        right.plot(range(columns), to[:, 1], "o-", color="tab:blue", markersize=4)
        right.set(xlabel="position in time", ylabel="expected position")
        right.set_title("where frames are thought to come from", fontsize=10)
        return {"position_prediction": figure}
    y, x = (axis.flatten() for axis in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
    right.quiver(x, y, to[:, 1] - x, to[:, 0] - y, angles="xy", scale_units="xy", scale=1, width=0.008)
    right.plot(x, y, ".", color="tab:blue", markersize=5)
    right.set(xticks=range(columns), yticks=range(rows))
    right.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5), xlabel="column", ylabel="row")
    right.set_title("from a patch's place to its expected place", fontsize=10)
    return {"position_prediction": figure}


def notes(result: Result) -> str:
    """Budget, choices, and what the numbers cannot say."""
    c = result.config
    rates = ", ".join(f"{key.removeprefix('lr ')} {value['chosen']:g}" for key, value in result.tuned.items())
    timed = [name for name in ("MP3", MAE, EQUAL, SCRATCH) if name in result.arms]
    seconds = ", ".join(f"{name} {result.values(name, 'seconds of training').mean():.0f}" for name in timed)
    places = len(result.measurements["MP3"][0].extra["expected"])
    shape = f"{c.patch[0]} x {c.patch[1]}"
    if MAE in result.arms:
        about_mae = (
            "the autoencoder (a quarter of the patches seen, decoder of one layer) takes "
            f"{mae_steps(c, places)} steps before fine-tuning, which put as many tokens through as many layers"
        )
    else:
        about_mae = "transformers' masked autoencoder takes square images alone and is missing here"
    return (
        f"{c.data}, patches of {shape}, so {places} positions (chance {100 / places:.1f} %), ViT of width {c.width} "
        f"and depth {c.depth}, masking ratio {c.masking_ratio:g}; {c.images} examples without labels, {c.labels} with, "
        f"{c.test_images} for the test, no augmentation. MP3 takes {c.pretrain_steps} steps of {c.batch_size} before "
        f"{c.steps} steps of fine-tuning; '{EQUAL}' takes all of them on the labels; {about_mae}. Seconds of training "
        f"on a shared machine: {seconds}. One learning rate for both stages of an arm, from a grid of "
        f"{len(c.learning_rates)}, by trials of {c.trial:g} of the steps on {c.held_images} held-out examples: "
        f"{rates}. "
        f"'{BARE}', '{RANDOM}' and other masking ratios have the rate of MP3, '{SCRATCH_BARE}' that of '{SCRATCH}'. "
        "Positions begin at zero after MP3, at normal 0.02 from scratch, and at the autoencoder's own sines. The paper "
        "trains ViT-S and ViT-B for hundreds of epochs; a verdict here is about this budget and this network, with "
        "pairs over few seeds."
    )

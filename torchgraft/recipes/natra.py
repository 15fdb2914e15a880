"""Evidence for NaTra: faces under side light, known to the classifier only in even light."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft import datasets
from torchgraft.experiments import Arm, Claim, Measurement, Progress, Result, fit, pick_learning_rate
from torchgraft.recipes._images import Cnn
from torchgraft.vision.natra import (
    Directions,
    FeatureDistance,
    GeneratorAdapter,
    InversionResult,
    NaTraAugment,
    discover_directions,
    edit,
    invert,
    latent_mix,
    natra_loss,
    pixel_pgd,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DATA = ("yale-faces", "digits")
LIGHT, SEEN, CLEAN, WORN = "side light, new to the generator", "side light, known to it", "even light", "corruptions"
PLAIN, JITTER, PIXELS, MIXING = "plain", "colour jitter", "pixel PGD", "latent mixing"
CONTROL = "reconstruction only"
RANDOM, SEARCH, PGD, BOTH = "NaTra random", "NaTra search", "NaTra PGD", "colour jitter + NaTra search"
UNFILTERED, STRICT, BLIND = "PCA unfiltered", "PCA filtered by a plain reference", "random directions"
ENCODER, OPTIMISED, PERCEPTUAL, SHIFTED = "encoder only", "+ optimisation", "+ perceptual distance", "+ shift"
ABSTRACT = "abstract, in words: better than augmentation and adversarial training"


def _points(text: str, metric: str, arm: str, against: str, least: float, paper: str, **more: Any) -> Claim:
    return Claim(text, metric, arm, against, least, unit="points", factor=100, paper=paper, **more)


CLAIMS = (
    _points("Searched natural edits beat plain training in unseen light", LIGHT, SEARCH, PLAIN, 5, ABSTRACT),
    _points("Searched natural edits beat colour jitter in unseen light", LIGHT, SEARCH, JITTER, 2, ABSTRACT),
    _points("Searched natural edits add to colour jitter", LIGHT, BOTH, JITTER, 2, "not compared"),
    _points("Searched natural edits beat pixel adversarial training", LIGHT, SEARCH, PIXELS, 2, ABSTRACT),
    _points("Searched natural edits beat mixed latent codes", LIGHT, SEARCH, MIXING, 2, "not known to us"),
    _points("The edits help, not the reconstruction alone", LIGHT, SEARCH, CONTROL, 5, "not known to us"),
    _points("Searched amounts beat random ones", LIGHT, SEARCH, RANDOM, 2, "the adversarial part of the method"),
    _points("Amounts climbed by gradients beat random ones", LIGHT, PGD, RANDOM, 2, "the adversarial part"),
    _points("Discovered directions beat random ones", LIGHT, RANDOM, BLIND, 2, "the directing part of the method"),
    _points("The filter does not cost robustness", LIGHT, RANDOM, UNFILTERED, 5, "not known to us", direction="equal"),
    _points("A reference trained on edits filters better than a plain one", LIGHT, RANDOM, STRICT, 2, "not compared"),
    _points("Searched edits beat plain training in light known to the generator", SEEN, SEARCH, PLAIN, 5, ABSTRACT),
    _points("Searched edits cost no accuracy in even light", CLEAN, SEARCH, PLAIN, 3, ABSTRACT, direction="equal"),
    _points("Searched edits beat plain training under common corruptions", WORN, SEARCH, PLAIN, 2, ABSTRACT),
    Claim("Optimised codes reconstruct better than the encoder's", "psnr", OPTIMISED, ENCODER, 1, unit="dB"),
    Claim("Four codes an image reconstruct better than one", "psnr", "LCE, 4 codes", "LCE, 1 code", 1, unit="dB"),
)


@dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
        seeds: how many; a seed trains every classifier once for each of the three folds of people.
        data: ``yale-faces``, or ``digits`` under made light where there is no data.
        device: where to train.
        size: side of the images.
        vae_steps, vae_lr, vae_batch, kl: of the generator; ``kl`` is the factor of the divergence in nats against the
            squared error summed over pixels.
        features, channels: of a code of the generator (there are three), and of its decoder.
        steps, batch_size, network: of a classifier.
        learning_rates: the grid that every arm gets, at full length.
        refresh: optimiser steps for which a pool of edited images serves.
        invert_steps, min_psnr, directions, samples, tau: of inversion, discovery and filter.
        candidates, climb: decoded edits an image in search; gradient steps of PGD.
        pixel_steps: of pixel PGD.
        codes: numbers of codes an image that LCE is measured with.
    """

    seeds: int = 3
    data: str = "yale-faces"
    device: str = "cpu"
    size: int = 32
    vae_steps: int = 400
    vae_lr: float = 3e-3
    vae_batch: int = 24
    kl: float = 0.3
    features: int = 16
    channels: tuple[int, ...] = (48, 32, 16)
    steps: int = 100
    batch_size: int = 32
    network: tuple[int, ...] = (16, 32, 64)
    learning_rates: tuple[float, ...] = (0.02, 0.08, 0.3, 1.2)
    refresh: int = 10
    invert_steps: int = 50
    min_psnr: float = 12.0
    directions: int = 8
    samples: int = 2000
    tau: float = 0.95
    candidates: int = 4
    climb: int = 3
    pixel_steps: int = 3
    codes: tuple[int, ...] = (1, 2, 4, 8)


SCALES = {
    "smoke": Config(
        seeds=1, data="digits", size=8, vae_steps=4, vae_batch=8, features=4, channels=(8, 8, 8), steps=2, batch_size=8,
        network=(4, 8), learning_rates=(0.1,), refresh=1, invert_steps=2, directions=2, samples=50, tau=0.05,
        candidates=2, climb=1, min_psnr=0.0, pixel_steps=1, codes=(1, 2, 4),
    ),
    "laptop": Config(),
    "gpu": Config(
        seeds=5, device="cuda", vae_steps=4000, vae_batch=64, features=32, channels=(128, 96, 64), steps=600,
        network=(32, 64, 128), invert_steps=300, directions=12, samples=10_000, candidates=10, climb=7, pixel_steps=10,
    ),
}  # fmt: skip

FOLDS = 3
LIT = ("leftlight", "rightlight", "centerlight")
HELD, TEST = "sad", "wink"


class Pictures(NamedTuple):
    """Images in -1..1, people, and the name of each image's condition."""

    x: Tensor
    y: Tensor
    condition: tuple[str, ...]

    def of(self, *names: str) -> Tensor:
        """Which images are of these conditions."""
        return torch.tensor([c in names for c in self.condition], device=self.x.device)

    @property
    def lit(self) -> Tensor:
        """Which images are under side or centre light."""
        return self.of(*LIT)

    @property
    def train(self) -> Tensor:
        """Which images a classifier is trained on."""
        return ~self.of(*LIT, HELD, TEST)


@lru_cache(maxsize=1)
def pictures(data: str, size: int, device: str) -> Pictures:
    """Faces cut to the middle square, or digits, a third of them under a ramp of light."""
    if data == "yale-faces":
        faces = datasets.load(data)
        cut = (faces.x.shape[3] - faces.x.shape[2]) // 2
        square = faces.x[..., cut : cut + faces.x.shape[2]].float()
        x, y, names = (
            F.interpolate(square, (size, size), mode="bilinear", antialias=True),
            faces.person,
            faces.condition,
        )
    elif data == "digits":
        digits = datasets.load(data)
        names = (*LIT, HELD, TEST, "normal", "happy", "sleepy")
        rows = [i for k in range(10) for i in (digits.train_y == k).nonzero()[: len(names), 0].tolist()]
        x, y, names = digits.train_x[rows].float(), digits.train_y[rows], names * 10
        ramp = torch.linspace(0.2, 1, x.shape[3])
        shade = {"leftlight": ramp.flip(0), "rightlight": ramp, "centerlight": torch.tensor(0.5)}
        x = torch.stack([image * shade.get(name, torch.tensor(1.0)) for image, name in zip(x, names, strict=True)])
    else:
        raise ValueError(f"data must be 'yale-faces' or 'digits', got {data!r}")
    return Pictures((x / 127.5 - 1).clamp(-1, 1).to(device), y.to(device), names)


class Block(nn.Module):
    """A convolution whose channels a code scales and shifts."""

    def __init__(self, inputs: int, outputs: int, features: int) -> None:
        super().__init__()
        self.conv, self.style = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Linear(features, 2 * outputs)

    def forward(self, h: Tensor, code: Tensor) -> Tensor:
        """Features (B, outputs, h, w)."""
        scale, shift = self.style(code)[..., None, None].chunk(2, 1)
        return F.silu(F.group_norm(self.conv(h), 4) * (1 + scale) + shift)


class Decoder(nn.Module):
    """A generator in the manner of StyleGAN: a code for each of three sizes, of which the last is shuffled to twice."""

    def __init__(self, size: int, features: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.base, pairs = size // 8, zip((channels[0], *channels), channels, strict=False)
        self.first = nn.Linear(features, channels[0] * self.base**2)
        self.blocks = nn.ModuleList(Block(i, o, features) for i, o in pairs)
        self.last = nn.Conv2d(channels[-1], 4, 3, padding=1)

    def forward(self, codes: Tensor) -> Tensor:
        """Images (B, 1, H, W) of codes (B, 3, d)."""
        h = self.first(codes[:, 0]).view(len(codes), -1, self.base, self.base)
        for i, block in enumerate(self.blocks):
            h = block(F.interpolate(h, scale_factor=2.0) if i else h, codes[:, i])
        return torch.tanh(F.pixel_shuffle(self.last(h), 2))


class Vae(nn.Module):
    """A small variational autoencoder of codes (B, 3, d)."""

    def __init__(self, size: int, features: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        widths, inputs = (16, 32, 64), (1, 16, 32)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 4, 2, 1), nn.SiLU()) for i, o in zip(inputs, widths, strict=True)
        )
        self.head = nn.Linear(64 * (size // 8) ** 2, 6 * features)
        self.decoder = Decoder(size, features, channels)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the codes."""
        for stage in self.stages:
            x = stage(x)
        mean, spread = self.head(x.flatten(1)).view(len(x), 2, 3, -1).unbind(1)
        return mean, spread.clamp(-12, 6)

    def forward(self, x: Tensor, kl: float) -> Tensor:
        """Squared error summed over pixels, and the divergence from the prior."""
        mean, spread = self.encode(x)
        codes = mean + torch.randn_like(mean) * (spread / 2).exp()
        error = (self.decoder(codes) - x).square().flatten(1).sum(1)
        away = 0.5 * (mean.square() + spread.exp() - 1 - spread).flatten(1).sum(1)
        return (error + kl * away).mean()


class World(NamedTuple):
    """What one fold of people shares: a generator that never saw their lit images, codes, directions."""

    vae: Vae
    adapter: GeneratorAdapter
    store: InversionResult
    held: Tensor
    directions: dict[str, Directions]
    report: dict[str, float]


def _encoder(vae: Vae) -> Callable[[Tensor], Tensor]:
    return lambda x: vae.encode(x)[0]


@lru_cache(maxsize=FOLDS)
def world(config: Config, fold: int) -> World:
    """Train the generator of a fold and find its directions; the same for all seeds."""
    p = pictures(config.data, config.size, config.device)
    held = p.y % FOLDS == fold
    known = p.x[~(p.lit & held)]
    torch.manual_seed(fold)
    vae = Vae(config.size, config.features, config.channels)
    fit(
        vae, (known.cpu(),), lambda m, batch: m(batch[0], config.kl), steps=config.vae_steps,
        batch_size=config.vae_batch, optimizer=lambda w: torch.optim.Adam(w, config.vae_lr), schedule="one_cycle",
        seed=fold, device=config.device,
    )  # fmt: skip
    vae.eval().requires_grad_(False)
    mean, spread = (t.cpu() for t in vae.encode(known))

    def sample(n: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(mean), (n,), generator=generator)
        return mean[rows] + torch.randn(n, *mean.shape[1:], generator=generator) * (spread[rows] / 2).exp()

    adapter = GeneratorAdapter(
        vae.decoder, (3, config.features), sample, split_layer="blocks.0", mean_samples=config.samples
    )

    def inverted(rows: Tensor) -> InversionResult:
        return invert(adapter, p.x[rows], _encoder(vae), steps=config.invert_steps, min_psnr=config.min_psnr)

    store, judged, fresh = inverted(p.train), inverted(p.of(HELD)), inverted(p.of(TEST))
    every = discover_directions(adapter, "pca", config.directions, samples=config.samples)
    found = {
        UNFILTERED: every,
        BLIND: discover_directions(adapter, "random", config.directions, samples=config.samples),
    }
    middle = sorted(config.learning_rates)[(len(config.learning_rates) - 1) // 2]
    wild = NaTraAugment(adapter, every, store, "random")
    plain = _classifier(config, 500 + fold, middle, None)
    trained = _classifier(config, 500 + fold, middle, lambda m, x, y, i: wild(i))
    report: dict[str, float] = {}
    for name, reference in ((RANDOM, trained), (STRICT, plain)):
        reference.eval()
        chosen = every.filter(adapter, reference, judged, p.y[p.of(HELD)], config.tau)
        found[name] = chosen
        with torch.no_grad():
            own = reference(fresh.recon).argmax(1)
            one, together = [], []
            for _ in range(8):
                amounts = (2 * torch.rand(len(fresh), len(chosen), device=config.device) - 1) * chosen.radii
                together.append(reference(edit(adapter, fresh, chosen, amounts)).argmax(1) == own)
                for k in range(len(chosen)):
                    only = torch.zeros_like(amounts)
                    only[:, k] = amounts[:, k]
                    one.append(reference(edit(adapter, fresh, chosen, only)).argmax(1) == own)
        report |= {
            f"{name} directions": float(len(chosen)), f"{name} radius": chosen.radii.mean().item(),
            f"{name} kept alone": torch.stack(one).float().mean().item(),
            f"{name} kept together": torch.stack(together).float().mean().item(),
        }  # fmt: skip
    return World(vae, adapter, store, held, found, report)


Edited = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
"""From the classifier, images, labels and their indices to edited images."""


def _classifier(
    config: Config, seed: int, lr: float, edited: Edited | None, progress: Progress | None = None
) -> nn.Module:
    p = pictures(config.data, config.size, config.device)
    x, y = p.x[p.train].cpu(), p.y[p.train].cpu()
    torch.manual_seed(seed)
    network = Cnn(1, config.network, int(p.y.max()) + 1)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        images, labels, rows = batch
        if edited is None:
            return natra_loss(model, images, labels, None, 0.0)
        return natra_loss(model, images, labels, edited(model, images, labels, rows))

    fit(
        network, (x, y, torch.arange(len(x))), loss, steps=config.steps, batch_size=config.batch_size, seed=seed,
        optimizer=lambda w: torch.optim.SGD(w, lr, momentum=0.9, weight_decay=1e-4), schedule="one_cycle",
        device=config.device, progress=progress,
    )  # fmt: skip
    return network.eval()


def _pooled(config: Config, make: Callable[[nn.Module], Tensor]) -> Edited:
    """Edited images of the whole training set, made anew every few steps."""
    state: dict[str, Any] = {"step": 0}

    def edited(model: nn.Module, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        if state["step"] % config.refresh == 0:
            state["pool"] = make(model)
        state["step"] += 1
        return state["pool"][rows]

    return edited


@lru_cache(maxsize=1)
def _jitter() -> nn.Module:
    import kornia.augmentation as K

    return nn.Sequential(K.RandomBrightness((0.5, 1.5), p=1.0), K.RandomContrast((0.5, 1.5), p=1.0))


def _jittered(x: Tensor) -> Tensor:
    return _jitter()((x + 1) / 2) * 2 - 1


def _edits(config: Config, name: str, fold: int) -> Edited | None:
    if name == PLAIN:
        return None
    if name == JITTER:
        return lambda model, x, y, rows: _jittered(x)
    if name == BOTH:
        natural = _edits(config, SEARCH, fold)
        assert natural is not None
        return lambda model, x, y, rows: _jittered(natural(model, x, y, rows))
    if name == PIXELS:
        return lambda model, x, y, rows: pixel_pgd(model, x, y, steps=config.pixel_steps)
    here = world(config, fold)
    p = pictures(config.data, config.size, config.device)
    labels, every = p.y[p.train], torch.arange(len(here.store), device=config.device)
    if name == MIXING:
        return _pooled(
            config,
            lambda m: latent_mix(here.adapter, here.store, every, (1, 2), labels, m, candidates=config.candidates),
        )
    modes: dict[str, Any] = {CONTROL: "reconstruction", SEARCH: "search", PGD: "pgd"}
    directions = here.directions.get(name, here.directions[RANDOM])
    natra = NaTraAugment(
        here.adapter, directions, here.store, modes.get(name, "random"), config.candidates, steps=config.climb
    )
    return _pooled(config, lambda m: natra.pool(labels, m))


def _corrupted(x: Tensor) -> list[Tensor]:
    """Brightness, contrast, blur and noise at three severities."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    found = []
    for s in (1, 2, 3):
        found += [x - 0.3 * s, x + 0.3 * s, x * (1 - 0.25 * s), x + 0.15 * s * noise]
        blurred = x
        for _ in range(s):
            blurred = F.avg_pool2d(F.pad(blurred, (1, 1, 1, 1), mode="replicate"), 3, 1)
        found.append(blurred)
    return [image.clamp(-1, 1) for image in found]


TRAINED = (PLAIN, JITTER, PIXELS, MIXING, CONTROL, RANDOM, SEARCH, PGD, BOTH, UNFILTERED, STRICT, BLIND)


def arms(config: Config) -> Mapping[str, Arm]:
    """Every way to train, and the reconstruction by component."""

    def arm(name: str) -> Arm:
        def run(seed: int, progress: Progress) -> Measurement:
            p = pictures(config.data, config.size, config.device)

            def score(lr: float) -> float:
                model, rows = _classifier(config, 1000, lr, _edits(config, name, 0)), p.of(HELD)
                views = [p.x[rows], *_corrupted(p.x[rows])]
                with torch.no_grad():
                    return torch.cat([model(x).argmax(1) == p.y[rows] for x in views]).float().mean().item()

            lr = progress.once(f"lr {name}", lambda: pick_learning_rate(config.learning_rates, score))["chosen"]
            right: dict[str, list[Tensor]] = {}
            for fold in range(FOLDS):
                model = _classifier(config, 10 * seed + fold, lr, _edits(config, name, fold), progress)
                held = p.y % FOLDS == fold
                groups = {LIGHT: p.lit & held, SEEN: p.lit & ~held, CLEAN: p.of(TEST)}
                groups |= {f"{light}, new": p.of(light) & held for light in LIT}
                with torch.no_grad():
                    for key, rows in groups.items():
                        right.setdefault(key, []).append(model(p.x[rows]).argmax(1) == p.y[rows])
                    for x in _corrupted(p.x[p.of(TEST)]):
                        right.setdefault(WORN, []).append(model(x).argmax(1) == p.y[p.of(TEST)])
            metrics = {key: torch.cat(values).float().mean().item() for key, values in right.items()}
            return Measurement(metrics, extra=_pictures(config) if name == RANDOM and seed == 0 else {})

        return run

    return {name: arm(name) for name in TRAINED} | {"inversion": lambda seed, progress: _inversions(config)}


@lru_cache(maxsize=1)
def _inversions(config: Config) -> Mapping[str, Measurement]:
    """Reconstruction of the first fold's images by component; nothing is drawn at random, seeds are alike."""
    from kornia.metrics import ssim

    here, p = world(config, 0), pictures(config.data, config.size, config.device)
    distance = FeatureDistance(*here.vae.stages[:2]).eval()
    steps = config.invert_steps
    settings: dict[str, dict[str, Any]] = {
        ENCODER: {"steps": 0, "shift": None}, OPTIMISED: {"steps": steps, "shift": None},
        PERCEPTUAL: {"steps": steps, "shift": None, "perceptual": distance}, SHIFTED: {"steps": steps},
    }  # fmt: skip
    for n in config.codes:
        label = f"LCE, {n} code" + ("s" if n > 1 else "")
        settings[label] = {"steps": steps, "shift": None, "n_codes": n}
    found = {}
    for name, how in settings.items():
        values: dict[str, list[float]] = {}
        extra = {}
        for suffix, rows in (("", p.train), (" in unseen light", p.lit & here.held)):
            result = invert(here.adapter, p.x[rows], _encoder(here.vae), min_psnr=0.0, **how)
            values[f"psnr{suffix}"] = result.psnr.tolist()
            alike = ssim((result.recon + 1) / 2, (result.images + 1) / 2, 5).flatten(1).mean(1)
            values[f"ssim{suffix}"] = alike.tolist()
            extra[f"psi{suffix}"] = result.psi.min().item()
        metrics = {key: sum(v) / len(v) for key, v in values.items()}
        found[name] = Measurement(metrics, examples=values, extra=extra)
    return found


def _pictures(config: Config) -> dict[str, Any]:
    """For the figure: a reconstruction along the filtered directions, and what the filter did."""
    here = world(config, 0)
    chosen = here.directions[RANDOM]
    k = min(4, len(chosen))
    steps = torch.linspace(-1, 1, 5, device=config.device)
    one = here.store[torch.zeros(5, dtype=torch.long)]
    rows = []
    with torch.no_grad():
        for i in range(k):
            amounts = torch.zeros(5, len(chosen), device=config.device)
            amounts[:, i] = steps * chosen.radii[i]
            rows.append(edit(here.adapter, one, chosen, amounts)[:, 0].clamp(-1, 1).cpu())
    reports = [world(config, fold).report for fold in range(FOLDS)]
    mean_report = {key: sum(r[key] for r in reports) / FOLDS for key in reports[0]}
    return {"faces": torch.stack(rows).mul(100).round().div(100).tolist(), "report": mean_report}


def figures(result: Result) -> Mapping[str, Figure]:
    """A reconstruction along its directions, accuracy of every arm, and reconstruction by component."""
    import numpy as np
    from matplotlib.figure import Figure

    faces = np.array(result.measurements[RANDOM][0].extra["faces"])
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1.5, 1))
    grid = np.concatenate([np.concatenate(list(row), 1) for row in faces], 0)
    left.imshow(grid, cmap="gray", vmin=-1, vmax=1)
    side = faces.shape[-1]
    left.set_xticks([side * (i + 0.5) for i in range(5)], ["−r", "−r/2", "0", "r/2", "r"])
    left.set_yticks([side * (i + 0.5) for i in range(len(faces))], [str(i + 1) for i in range(len(faces))])
    left.set_title("a reconstruction along filtered directions", fontsize=10)
    for place, name in enumerate(TRAINED):
        for metric, colour, mark in ((LIGHT, "#D55E00", "o"), (SEEN, "#0072B2", "^"), (CLEAN, "#777777", "s")):
            values = 100 * result.values(name, metric)
            middle.plot(values, [place] * len(values), mark, color=colour, markersize=4, alpha=0.6)
            middle.plot([values.mean()] * 2, [place - 0.35, place + 0.35], color=colour, linewidth=2.5)
    for metric, colour, mark in ((LIGHT, "#D55E00", "o"), (SEEN, "#0072B2", "^"), (CLEAN, "#777777", "s")):
        middle.plot([], [], mark, color=colour, label=metric)
    middle.set_yticks(range(len(TRAINED)), TRAINED)
    middle.invert_yaxis()
    middle.grid(axis="x", alpha=0.3)
    middle.set(xlabel="accuracy, %")
    middle.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=3)
    sizes = list(result.config.codes)
    names = [f"LCE, {n} code" + ("s" if n > 1 else "") for n in sizes]
    for metric, colour, mark in (("psnr", "#000000", "o"), ("psnr in unseen light", "#D55E00", "^")):
        right.plot(sizes, [result.values(n, metric).mean() for n in names], mark + "-", color=colour, label=metric)
        for name, style in ((ENCODER, ":"), (PERCEPTUAL, "--"), (SHIFTED, "-.")):
            level = result.values(name, metric).mean()
            right.axhline(level, color=colour, linestyle=style, linewidth=1)
            if metric == "psnr":
                right.plot([], [], color="#555555", linestyle=style, linewidth=1, label=f"one code, {name}")
    right.set(xlabel="codes an image (LCE)", ylabel="reconstruction, dB", xscale="log")
    right.set_xticks(sizes, [str(n) for n in sizes])
    right.minorticks_off()
    right.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return {"natra": figure}


def notes(result: Result) -> str:
    """What was measured, and what the numbers cannot say."""
    c = result.config
    report = result.measurements[RANDOM][0].extra["report"]

    def told(name: str) -> str:
        return (
            f"{report[f'{name} directions']:.1f} of {c.directions} directions at a mean radius of "
            f"{report[f'{name} radius']:.2f} standard deviations (on fresh images it keeps the label of "
            f"{100 * report[f'{name} kept alone']:.0f} % of edits along one direction, "
            f"{100 * report[f'{name} kept together']:.0f} % of edits along all at once)"
        )

    rates = ", ".join(f"{key.removeprefix('lr ')} {value['chosen']}" for key, value in result.tuned.items())
    psi = result.measurements[SHIFTED][0].extra
    return (
        f"The paper's text was not available; these arms test our reconstruction of its parts. {c.data}, {c.size} x "
        f"{c.size}. Classifiers see people in even light only (accuracy on {HELD}, as it is and "
        f"corrupted, chooses learning rates, {TEST} is the clean test) and are tested in left, right and centre light. "
        f"The generator, a VAE with three codes of {c.features} "
        f"features, {c.vae_steps} steps, is trained without labels on all images but the lit ones of a third of the "
        f"people, three folds in all, so that every lit image is tested once where the generator never saw it ('new to "
        f"the generator') and twice where it did; all seeds share the three generators, so the intervals do not hold "
        f"what another generator would change. Even-light test images are among its unlabelled training images. With "
        f"a generator trained on other people's side light, the gain measures that knowledge; plain training and "
        f"jitter do not have it, mixing and the reconstruction control do. Every arm but plain adds a second, edited "
        f"view of each image with weight 1, so all of them cost two passes a step and more; {c.steps} steps of "
        f"{c.batch_size}, pools of edits made anew every {c.refresh} steps. Learning rates by trials on fold 1: "
        f"{rates}. NaTra arms use PCA directions filtered by a reference trained on random unfiltered edits: it keeps "
        f"{told(RANDOM)}. A plainly trained reference fails under side light itself and so shrinks the very "
        f"directions that are needed: {told(STRICT)}. The other directions go to 3 standard deviations. Jitter "
        f"changes overall brightness and contrast between a half and one and a half, by construction much of what side "
        f"light and two of the four kinds of corruption do to these pictures; it can lose no face, as edits of a small "
        f"generator of few pictures can. Reconstruction "
        f"is of fold 1, paired over its images; the shift's least psi is {psi['psi']:.2f} on training images and "
        f"{psi['psi in unseen light']:.2f} in unseen light."
    )

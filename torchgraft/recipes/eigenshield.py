"""Evidence for EigenShield: a planted model where its premise holds, and an image encoder where nobody planted it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft import datasets, zoo
from torchgraft.experiments import Arm, Claim, Measurement, Progress, Result, fit
from torchgraft.language.eigenshield import EigenShield, attach, bbp_threshold, collect_embeddings, perturb

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DATA = ("fashion-mnist",)
NONE, RANDOM, EDGE, SHIELD = "none", "random subspace", "all spikes (MP edge)", "EigenShield"
PCA, TUNED_PCA, HALF = "PCA, same rank", "PCA, own rank", "EigenShield, alpha 0.5"
METHODS = (NONE, RANDOM, PCA, TUNED_PCA, EDGE, HALF, SHIELD)
CLEAN, ATTACKED, LOST, RANK = "clean accuracy", "accuracy under attack", "lost under attack", "rank"
ADAPTED = "accuracy under attack, adaptive"
SHIFT, UNIVERSAL, UNIVERSAL_ADAPTIVE = "ASR shift", "ASR universal", "ASR universal, adaptive"
UNIVERSAL_RIGHT, UNIVERSAL_ADAPTIVE_RIGHT = "accuracy universal", "accuracy universal, adaptive"
RIGHT = (UNIVERSAL_RIGHT, UNIVERSAL_ADAPTIVE_RIGHT)
FGSM, PGD, ADAPTIVE = "ASR FGSM", "ASR PGD", "ASR PGD, adaptive"
REDUCED, SIZE = "paper: lower in all tested cases (numbers unverified)", "card of the technique, not the paper"


def _planted(method: str) -> str:
    return f"planted: {method}"


def _image(method: str) -> str:
    return f"images: {method}"


def _restored(text: str, against: str, paper: str) -> Claim:
    return Claim(text, ATTACKED, _planted(SHIELD), _planted(against), 5, unit="points", factor=100, paper=paper)


def _resists(text: str, metric: str, against: str = NONE, paper: str = REDUCED, arm: str = SHIELD) -> Claim:
    return Claim(
        text, metric, _image(arm), _image(against), 5, direction="lower", unit="points", factor=100, paper=paper
    )


def _half(text: str, metric: str) -> Claim:
    return Claim(text, metric, _image(HALF), _image(NONE), 5, unit="points", factor=100, paper=SIZE)


CLAIMS = (
    _restored("Planted: the filter restores accuracy under a shift along sensitive spikes", NONE, REDUCED),
    _restored("Planted: more than PCA of the same rank", PCA, SIZE),
    _restored("Planted: more than PCA of its own best rank", TUNED_PCA, SIZE),
    _restored("Planted: more than keeping all spikes", EDGE, SIZE),
    Claim(
        "Planted: and under an attack of that length made through the filter, free to go anywhere", ADAPTED,
        _planted(SHIELD), _planted(NONE), 5, unit="points", factor=100, paper="in words: adaptive too (summary)",
    ),
    Claim(
        "Planted: under attack at most 3 points below the clean accuracy", LOST, _planted(SHIELD), 0.03, 0.0,
        direction="lower", unit="points", factor=100, paper=SIZE,
    ),
    Claim(
        "Images: the filter costs hardly any clean accuracy", CLEAN, _image(SHIELD), _image(NONE), 2,
        direction="equal", unit="points", factor=100, paper="in words: no loss",
    ),
    _resists("Images: a low-rank shift of the embeddings succeeds less often", SHIFT),
    _resists("Images: a universal perturbation succeeds less often", UNIVERSAL),
    _resists("Images: a universal perturbation made through the filter succeeds less often", UNIVERSAL_ADAPTIVE),
    _resists("Images: FGSM succeeds less often", FGSM),
    _resists("Images: PGD succeeds less often", PGD),
    _resists("Images: PGD through the filter succeeds less often", ADAPTIVE, paper="in words: adaptive too (summary)"),
    _resists("Images: the low-rank shift succeeds less often than after PCA of the same rank", SHIFT, PCA, SIZE),
    _resists("Images: PGD succeeds less often than after PCA of its own best rank", PGD, TUNED_PCA, SIZE),
    _resists("Images, alpha 0.5: a universal perturbation succeeds less often", UNIVERSAL, arm=HALF),
    _half("Images, alpha 0.5: more images are right under the universal perturbation", UNIVERSAL_RIGHT),
    _half("Images, alpha 0.5: and under one made through the filter", UNIVERSAL_ADAPTIVE_RIGHT),
    Claim(
        "Images, alpha 0.5: it costs hardly any clean accuracy", CLEAN, _image(HALF), _image(NONE), 2,
        direction="equal", unit="points", factor=100, paper="in words: no loss",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
        seeds: each draws a planted model and trains an encoder.
        data: ``fashion-mnist``, or ``digits`` (small grey digits) where there is no data.
        captions: targets of the encoder: ``minilm`` embeds a caption of each class; ``random`` draws directions.
        device: of the encoder.
        alphas: grid of levels; the one with the best mean of clean and perturbed accuracy on calibration data is taken.
        features, rows: p and n of the planted model; as many again choose the level, fit the readout, and test.
        spurious: share of the variance of sensitive directions that the class explains where the readout is trained; 0
            everywhere else.
        shift: length of the planted attack, in standard deviations of all sensitive directions together.
        noise: standard deviation of the bulk noise that the planted attack adds, that of the bulk being 1.
        channels, width: of the encoder; ``width`` is used with random captions, those of MiniLM have 384 features.
        train_images, steps, batch_size, learning_rate: of the encoder.
        calibration_images: half of them fit the filter, half choose its level.
        test_images: how many; 0 takes all.
        estimator: of the noise.
        whiten: as in ``EigenShield``.
        epsilons: of FGSM and PGD, pixels in 0..1; the middle one is the one in the table.
        universal_epsilon, universal_images: of the universal perturbation, and of how many held-out images it is made.
        attack_steps: of PGD and of the universal perturbation (Madry et al. 2018: steps of 2.5 epsilon / steps).
        calibration_epsilon: of the perturbations in the calibration, one step against the embedding, without labels.
        embedding_shift: length of the shift of an embedding, in mean distances of embeddings from their mean.
    """

    seeds: int = 5
    data: Literal["fashion-mnist", "digits"] = "fashion-mnist"
    captions: Literal["minilm", "random"] = "minilm"
    device: str = "cpu"
    alphas: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    features: int = 400
    rows: int = 800
    spurious: float = 0.15
    shift: float = 1.0
    noise: float = 0.5
    channels: tuple[int, int] = (32, 64)
    width: int = 384
    train_images: int = 8000
    steps: int = 400
    batch_size: int = 64
    learning_rate: float = 3e-3
    calibration_images: int = 2000
    test_images: int = 300
    estimator: Literal["median", "iterative"] = "median"
    whiten: bool = False
    epsilons: tuple[float, ...] = (0.01, 0.03, 0.06)
    universal_epsilon: float = 0.12
    universal_images: int = 100
    attack_steps: int = 10
    calibration_epsilon: float = 0.03
    embedding_shift: float = 3.0


SCALES = {
    "smoke": Config(
        seeds=1, data="digits", captions="random", alphas=(0.0, 0.5), features=40, rows=200, channels=(4, 8), width=24,
        train_images=400, steps=20, calibration_images=200, test_images=40, epsilons=(0.05, 0.1), attack_steps=2,
    ),
    "laptop": Config(),
    "gpu": Config(
        device="cuda", channels=(128, 256), train_images=0, steps=6000, calibration_images=8000, test_images=0,
        attack_steps=50, epsilons=(0.005, 0.01, 0.02, 0.03, 0.06, 0.12),
    ),
    "paper": Config(
        device="cuda", channels=(128, 256), train_images=0, steps=20_000, calibration_images=10_000, test_images=0,
        attack_steps=200, epsilons=(16 / 255, 32 / 255, 64 / 255),
    ),
}  # fmt: skip

Decide = Callable[[np.ndarray], np.ndarray]


def _middle(config: Config) -> float:
    return config.epsilons[len(config.epsilons) // 2]


def _keeping(shield: EigenShield, components: np.ndarray) -> EigenShield:
    """The same filter with other directions."""
    made = copy.copy(shield)
    made.components_ = components
    return made


def _filters(
    clean: np.ndarray, moved: np.ndarray, y: np.ndarray, decide: Decide, config: Config, seed: int
) -> tuple[dict[str, EigenShield], dict[str, list[float]]]:
    """Every arm's filter: fitted on one half of the calibration data, level and rank chosen on the other."""
    n, p = len(clean) // 2, clean.shape[1]
    settings = EigenShield(alpha=0.0, noise=config.estimator, whiten=config.whiten)
    spikes = settings.fit(clean[:n], Z_perturbed=moved[:n])
    every = EigenShield(noise=config.estimator, whiten=config.whiten, min_components=p).fit(clean[:n])

    def score(shield: EigenShield) -> float:
        halves = (decide(shield.transform(rows[n:])) == y[n:] for rows in (clean, moved))
        return float(np.mean([half.mean() for half in halves]))

    masks = {alpha: mask for alpha, mask in spikes.sweep(config.alphas).items() if mask.any()}
    scores = {alpha: score(_keeping(spikes, spikes.spikes_[mask])) for alpha, mask in masks.items()}
    alpha = max(scores, key=lambda a: (scores[a], -a))
    shield = copy.copy(spikes).reselect(alpha)
    rank = len(shield.components_)
    ranks = sorted(
        {int(m.sum()) for m in masks.values()} | set(np.geomspace(1, min(p, n - 1), 12).astype(int).tolist())
    )
    own = max(ranks, key=lambda r: score(_keeping(every, every.spikes_[:r])))
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(p, rank)))[0].T
    return {
        RANDOM: _keeping(spikes, basis),
        PCA: _keeping(every, every.spikes_[:rank]),
        TUNED_PCA: _keeping(every, every.spikes_[:own]),
        EDGE: spikes,
        HALF: copy.copy(spikes).reselect(0.5),
        SHIELD: shield,
    }, {"alpha": [alpha], "spikes": [len(spikes.spikes_)], "rank": [rank], "own rank": [own]}


# --- the planted model


@dataclass(frozen=True)
class _World:
    """Directions (12, p), of which the first six carry meaning and the others move easily, and their class means."""

    basis: np.ndarray
    thetas: np.ndarray
    codes: np.ndarray
    shares: np.ndarray

    def draw(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        y = rng.integers(0, len(self.codes), n)
        within = rng.normal(size=(n, len(self.thetas))) * np.sqrt(1 - self.shares)
        factors = (self.codes[y] * np.sqrt(self.shares) + within) * np.sqrt(self.thetas)
        return factors @ self.basis + rng.normal(size=(n, self.basis.shape[1])), y


def _world(config: Config, rng: np.random.Generator) -> _World:
    strengths = np.geomspace(0.7, 8, 6) * bbp_threshold(config.features / config.rows)
    # three orthogonal codes of four classes, twice: what carries meaning does not mix with what does not
    codes = np.tile([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], 4)
    return _World(
        np.linalg.qr(rng.normal(size=(config.features, 12)))[0].T,
        np.concatenate([strengths, 2 * strengths]),
        codes,
        np.repeat([0.6, 0.0], 6),
    )


def _planted_arm(config: Config) -> Arm:
    from sklearn.linear_model import LogisticRegression

    def run(seed: int, progress: Progress) -> Mapping[str, Measurement]:
        rng = np.random.default_rng([17, seed])
        world = _world(config, rng)
        sensitive, thetas = world.basis[6:], world.thetas[6:]
        # the readout learns where the other six go along with the class, and leans on them
        misled = dataclasses.replace(world, shares=np.repeat([0.6, config.spurious], 6))
        train, train_y = misled.draw(config.rows, rng)
        readout = LogisticRegression(max_iter=2000).fit(train, train_y)
        clean, y = world.draw(2 * config.rows, rng)
        wander = rng.normal(size=(len(clean), 6)) * np.sqrt(thetas) @ sensitive
        moved = clean + wander + config.noise * rng.normal(size=clean.shape)
        test, test_y = world.draw(2 * config.rows, rng)
        added = config.noise * rng.normal(size=test.shape)

        def towards(rows: np.ndarray) -> np.ndarray:
            """From each row's class to the one that is next in line."""
            logits = readout.decision_function(rows)
            logits[np.arange(len(rows)), test_y] = -np.inf
            return readout.coef_[logits.argmax(1)] - readout.coef_[test_y]

        def attack(direction: np.ndarray) -> np.ndarray:
            direction = direction / np.linalg.norm(direction, axis=1, keepdims=True)
            return test + config.shift * np.sqrt(thetas.sum()) * direction + added

        # as far as the sensitive directions allow
        attacked = attack(towards(test) @ sensitive.T @ sensitive)
        filters, chosen = _filters(clean, moved, y, readout.predict, config, seed)

        def right(shield: EigenShield | None, rows: np.ndarray) -> float:
            return float((readout.predict(rows if shield is None else shield.transform(rows)) == test_y).mean())

        plain, made = right(None, test), {}
        for method in METHODS:
            shield = filters.get(method)
            under = right(shield, attacked)
            if shield is None:
                aimed = towards(test)
            else:
                aimed = (towards(shield.transform(test)) * shield.scale_) @ shield.components_.T @ shield.components_
                aimed /= shield.scale_
            rank = config.features if shield is None else len(shield.components_)
            made[_planted(method)] = Measurement(
                {
                    CLEAN: right(shield, test),
                    ATTACKED: under,
                    ADAPTED: right(shield, attack(aimed)),
                    LOST: plain - under,
                    RANK: rank,
                },
                extra=chosen,
            )
        progress(1, 1, "planted")
        swept = filters[EDGE].sweep(config.alphas)
        kept = {alpha: _keeping(filters[EDGE], filters[EDGE].spikes_[mask]) for alpha, mask in swept.items()}
        made[_planted(SHIELD)].curves = {
            name: (list(config.alphas), [right(kept[a], rows) for a in config.alphas])
            for name, rows in ((CLEAN, test), (ATTACKED, attacked))
        }
        return made

    return run


# --- the image encoder


class Captioned(nn.Module):
    """A small encoder trained to place an image beside the caption of its class; logits are scaled cosines."""

    captions: Tensor

    def __init__(self, size: int, channels: tuple[int, int], captions: Tensor) -> None:
        super().__init__()
        first, second = channels
        side = -(-size // 4)
        self.encoder = nn.Sequential(
            nn.Conv2d(1, first, 3, 2, 1), nn.ReLU(), nn.Conv2d(first, second, 3, 2, 1), nn.ReLU(), nn.Flatten(),
            nn.Linear(second * side * side, captions.shape[1]),
        )  # fmt: skip
        self.register_buffer("captions", captions)

    def judge(self, z: Tensor) -> Tensor:
        """Logits of embeddings."""
        return 20 * F.normalize(z, dim=-1) @ self.captions.to(z).T

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, C) of images in 0..1."""
        return self.judge(self.encoder(x))


@lru_cache(maxsize=2)
def _captions(kind: str, classes: tuple[str, ...], width: int) -> Tensor:
    if kind == "minilm":
        model, tokenizer = zoo.load("minilm")
        return zoo.embed(model, tokenizer, [f"a photo of a {name.lower()}" for name in classes])
    drawn = torch.randn(len(classes), width, generator=torch.Generator().manual_seed(0))
    return F.normalize(drawn, dim=-1)


def _pgd(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, steps: int, shared: bool = False) -> Tensor:
    """Signed gradient ascent on the cross-entropy; ``shared``: one perturbation (1, 1, H, W) for all images."""
    generator = torch.Generator().manual_seed(0)
    start = torch.rand(x[:1].shape if shared else x.shape, generator=generator).to(x) * 2 - 1
    delta = torch.zeros_like(start) if steps == 1 else epsilon * start
    size = epsilon if steps == 1 else 2.5 * epsilon / steps
    for _ in range(steps):
        delta.requires_grad_()
        loss = F.cross_entropy(model((x + delta).clamp(0, 1)), y)
        (slope,) = torch.autograd.grad(loss, delta)
        delta = (delta.detach() + size * slope.sign()).clamp(-epsilon, epsilon)
    return delta


def _image_arm(config: Config) -> Arm:
    images = datasets.load(config.data)
    if not isinstance(images, datasets.Images):
        raise ValueError(f"data must be images, got {config.data!r}")
    captions = _captions(config.captions, tuple(images.classes), config.width)

    def floats(x: Tensor) -> Tensor:
        return x.float() / 255

    def run(seed: int, progress: Progress) -> Mapping[str, Measurement]:
        torch.manual_seed(seed)
        order = torch.randperm(len(images.train_y), generator=torch.Generator().manual_seed(seed))
        held, rest = order[: config.calibration_images], order[config.calibration_images :]
        rest = rest[: config.train_images or len(rest)]
        model = Captioned(images.train_x.shape[-1], config.channels, captions)
        fit(
            model, (images.train_x[rest], images.train_y[rest]),
            lambda m, b: F.cross_entropy(m(floats(b[0])), b[1]), steps=config.steps, batch_size=config.batch_size,
            seed=seed, optimizer=lambda p: torch.optim.Adam(p, lr=config.learning_rate), schedule="one_cycle",
            device=config.device, progress=lambda done, total, note: progress(done / total, 3, note),
        )  # fmt: skip
        model.eval().requires_grad_(False)

        def here(x: Tensor) -> Tensor:
            return floats(x).to(config.device)

        def decide(z: np.ndarray) -> np.ndarray:
            return model.judge(torch.from_numpy(z).to(config.device)).argmax(1).cpu().numpy()

        batches = [here(x) for x in images.train_x[held].split(500)]
        generator = torch.Generator().manual_seed(seed)
        e = config.calibration_epsilon
        moved = [
            perturb(model, "encoder", x, "fgsm", e, bounds=(0, 1), generator=generator) for x in batches
        ]  # fmt: skip
        clean_z, moved_z = (collect_embeddings(model, "encoder", part) for part in (batches, moved))
        filters, chosen = _filters(clean_z, moved_z, images.train_y[held].numpy(), decide, config, seed)
        # what a detector may flag is set by clean images that did not shape the subspace
        filters[SHIELD].conformalize(clean_z[len(clean_z) // 2 :])
        progress(1.3, 3, "filters")

        end = config.test_images or len(images.test_y)
        x, y = here(images.test_x[:end]), images.test_y[:end].to(config.device)
        few = batches[0][: config.universal_images]
        few_y = images.train_y[held][: len(few)].to(config.device)
        middle, steps, wide = _middle(config), config.attack_steps, config.universal_epsilon
        z = model.encoder(x)
        basis = torch.linalg.qr(torch.randn(z.shape[1], 4, generator=generator))[0].to(z)
        length = config.embedding_shift * float(np.linalg.norm(clean_z - clean_z.mean(0), axis=1).mean())
        free = z.detach().requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(model.judge(free), y), free)
        shifted = z + length * F.normalize(slope @ basis @ basis.T, dim=-1)

        def within(delta: Tensor) -> Tensor:
            return (x + delta).clamp(0, 1)

        # made without knowing of any filter
        oblivious: dict[str, Tensor] = {UNIVERSAL: within(_pgd(model, few, few_y, wide, 2 * steps, shared=True))}
        for eps in config.epsilons:
            oblivious[f"{FGSM} {eps:g}"] = within(_pgd(model, x, y, eps, 1))
            oblivious[f"{PGD} {eps:g}"] = within(_pgd(model, x, y, eps, steps))
        progress(2, 3, "attacks")

        made = {}
        for place, method in enumerate(METHODS):
            shield = filters.get(method)
            handle = None if shield is None else attach(model, "encoder", shield)
            try:
                right = model(x).argmax(1) == y

                def success(logits: Tensor, right: Tensor = right) -> float:
                    return float((logits.argmax(1) != y)[right].double().mean())

                found = {name: success(model(images_)) for name, images_ in oblivious.items()}
                through = _pgd(model, few, few_y, wide, 2 * steps, shared=True)
                found[UNIVERSAL_ADAPTIVE] = success(model(within(through)))
                for name, images_ in (
                    (UNIVERSAL_RIGHT, oblivious[UNIVERSAL]),
                    (UNIVERSAL_ADAPTIVE_RIGHT, within(through)),
                ):
                    found[name] = float((model(images_).argmax(1) == y).double().mean())
                after = shifted if handle is None else handle.filter(shifted)
                found[SHIFT] = success(model.judge(after))
                # the curve against epsilon for what is drawn, one point for the other baselines
                for eps in config.epsilons if method in (NONE, HALF, SHIELD) else (middle,):
                    found[f"{ADAPTIVE} {eps:g}"] = success(model(within(_pgd(model, x, y, eps, steps))))
            finally:
                if handle is not None:
                    handle.remove()
            # right both without the attack and with it, epsilon 0 included
            clean = float(right.double().mean())
            curves = {
                kind: (
                    [0.0, *config.epsilons],
                    [clean, *(clean * (1 - found[f"{kind} {e:g}"]) for e in config.epsilons)],
                )
                for kind in (FGSM, PGD, ADAPTIVE)
                if f"{kind} {config.epsilons[0]:g}" in found
            }
            table = {k: found[k] for k in (SHIFT, UNIVERSAL, UNIVERSAL_ADAPTIVE, *RIGHT)}
            table |= {kind: found[f"{kind} {middle:g}"] for kind in (FGSM, PGD, ADAPTIVE)}
            rank = z.shape[1] if shield is None else len(shield.components_)
            made[_image(method)] = Measurement({CLEAN: clean, RANK: rank} | table, curves=curves, extra=dict(chosen))
            progress(2 + (place + 1) / len(METHODS), 3, method)
        flagged = {
            "clean": z, "shift": shifted, "universal": model.encoder(oblivious[UNIVERSAL]),
            "PGD": model.encoder(oblivious[f"{PGD} {middle:g}"]),
        }  # fmt: skip
        detector = filters[SHIELD]
        made[_image(SHIELD)].extra["flagged"] = {
            name: float(detector.is_outlier(rows.detach(), 0.05).mean()) for name, rows in flagged.items()
        }
        return made

    return run


def arms(config: Config) -> Mapping[str, Arm]:
    """All filters on the planted model, and all filters on one trained encoder."""
    return {"planted": _planted_arm(config), "images": _image_arm(config)}


_COLOURS = dict(
    zip(METHODS, ("#000000", "#999999", "#E69F00", "#CC79A7", "#0072B2", "#56B4E9", "#D55E00"), strict=True)
)
_MARKS = dict(zip(METHODS, "sxv^dPo", strict=True))


def figures(result: Result) -> Mapping[str, Figure]:
    """Planted accuracy of every filter and against the level; attacks on images; success against epsilon."""
    from matplotlib.figure import Figure

    config = result.config
    figure = Figure(figsize=(12, 8.4), layout="constrained")
    (first, second), (third, fourth) = figure.subplots(2, 2)
    for place, method in enumerate(METHODS):
        for metric, filled in ((CLEAN, False), (ATTACKED, True)):
            values = 100 * result.values(_planted(method), metric)
            face = _COLOURS[method] if filled else "none"
            label = {True: "under attack", False: "clean"}[filled] if place == 0 else None
            first.plot(values, [place] * len(values), "o", color=_COLOURS[method], markerfacecolor=face, label=label)
        values = 100 * result.values(_planted(method), ADAPTED)
        label = "under attack through the filter" if place == 0 else None
        first.plot(values, [place] * len(values), "x", color=_COLOURS[method], label=label)
    first.axvline(25, color="#999999", linestyle=":", linewidth=1)
    first.set_yticks(range(len(METHODS)), METHODS)
    first.invert_yaxis()
    first.grid(axis="x", alpha=0.3)
    first.set(xlabel="accuracy, % (dotted: chance)", title="planted model; each mark is a seed")
    first.legend(frameon=False, fontsize=8)
    for metric, style, label in ((CLEAN, "--", "clean"), (ATTACKED, "-", "under attack")):
        alphas, values = result.curve(_planted(SHIELD), metric)
        second.plot(alphas, 100 * values.mean(0), style, color=_COLOURS[SHIELD], label=f"{SHIELD}, {label}")
        level = 100 * result.values(_planted(NONE), metric).mean()
        second.axhline(level, linestyle=style, color=_COLOURS[NONE], linewidth=1, label=f"{NONE}, {label}")
    second.set(xlabel="alpha (0 keeps every spike)", ylabel="accuracy, %", title="planted model, against the level")
    second.legend(frameon=False, fontsize=8, loc=(0.02, 0.58))
    names = {SHIFT: "low-rank shift", UNIVERSAL: "universal", UNIVERSAL_ADAPTIVE: "universal,\nthrough the filter"}
    names |= {FGSM: "FGSM", PGD: "PGD", ADAPTIVE: "PGD,\nthrough the filter"}
    for offset, method in enumerate(METHODS):
        for place, metric in enumerate(names):
            values = 100 * result.values(_image(method), metric)
            at = place + 0.11 * (offset - 3)
            third.plot([at] * 2, [values.min(), values.max()], color=_COLOURS[method], linewidth=1)
            label = method if place == 0 else None
            third.plot([at], [values.mean()], _MARKS[method], color=_COLOURS[method], markersize=6, label=label)
    third.set_xticks(range(len(names)), names.values(), fontsize=8)
    third.set(ylabel="attack success, %", title=f"{config.data}: mean and range of {len(result.seeds)} seeds")
    third.set_ylim(0, None)
    third.grid(axis="y", alpha=0.3)
    third.legend(frameon=False, fontsize=8)
    lines = ((NONE, PGD, "-"), (SHIELD, ADAPTIVE, ":"), (HALF, PGD, "-"), (HALF, ADAPTIVE, ":"), (NONE, FGSM, "--"))
    for method, kind, style in lines:
        epsilons, values = result.curve(_image(method), kind)
        label = f"{method}, {kind.removeprefix('ASR ')}".replace("adaptive", "through the filter")
        fourth.plot(epsilons, 100 * values.mean(0), style, marker=_MARKS[method], color=_COLOURS[method], label=label)
    fourth.set(
        xlabel="epsilon, pixels in 0..1",
        ylabel="right without and with the attack, %",
        title=f"{config.data}: gradient attacks",
    )
    fourth.set_ylim(0, 100)
    fourth.legend(frameon=False, fontsize=8)
    return {"eigenshield": figure}


def notes(result: Result) -> str:
    """What was measured, and what the numbers cannot say."""
    c = result.config

    def mean(arm: str, key: str) -> float:
        return float(np.mean([np.mean(m.extra[key]) for m in result.measurements[arm].values()]))

    flagged = [m.extra["flagged"] for m in result.measurements[_image(SHIELD)].values()]
    rates = ", ".join(f"{name} {100 * np.mean([f[name] for f in flagged]):.0f} %" for name in flagged[0])
    picked = {
        kind: f"{mean(arm, 'spikes'):.1f} spikes, {mean(arm, 'rank'):.1f} kept (alpha {mean(arm, 'alpha'):.2f}), PCA's "
        f"own rank {mean(arm, 'own rank'):.0f}"
        for kind, arm in (("planted", _planted(SHIELD)), ("images", _image(SHIELD)))
    }
    planted = (
        f"Planted: p = {c.features}, n = {c.rows}, Gaussian bulk, six spikes that carry four classes (0.7 to 8 times "
        f"the detection threshold) and six twice as strong that do not; a logistic readout, fitted where the class "
        f"explains {100 * c.spurious:g} % of the latter. The attack moves each test row by {c.shift:g} standard "
        "deviations inside these six, towards the next class, and adds noise; the calibration wanders at random in the "
        "same six, which is the technique's premise and not a finding. The adaptive attack is as long, and goes along "
        "the gradient through the filter wherever that leads. "
        f"On average {picked['planted']}. "
    )
    images = (
        f"Images: {c.data}, two convolutions trained without attacks for {c.steps} steps to place images beside the "
        f"{c.captions} embedding of 'a photo of a <class>'; the filter stands behind them ({picked['images']}). The "
        "spectrum is no Marchenko-Pastur bulk, so that the number of spikes counts no meaningful directions. Attack "
        "success: share of images that are right without the attack, under the same filter, and wrong with it "
        "(where a filter costs clean accuracy a low rate is no merit: see the accuracy columns); "
        f"{len(result.seeds)} seeds, {c.test_images or 'all'} test images, epsilon {_middle(c):g} in the table, "
        f"{c.attack_steps} steps; universal: {c.universal_epsilon:g}, {2 * c.attack_steps} steps, made from "
        f"{c.universal_images} held-out training images; shift: in a random subspace of 4 dimensions, "
        f"{c.embedding_shift:g} mean distances long. Flagged as outside the subspace at a level of 5 %: {rates}. "
    )
    limits = (
        "Level and PCA's own rank are chosen on calibration data, clean and perturbed (images: one step against the "
        f"embedding without labels, epsilon {c.calibration_epsilon:g}, so that FGSM is akin to it); at a tie the "
        "smallest. Level 0 keeps every spike, where dropping gained nothing. Gradient attacks move "
        "embeddings along the directions that tell classes apart, and a filter that keeps these keeps the attack. No "
        "vision-language model, jailbreak or toxicity score is measured, nor the paper's rivals: adversarial "
        "training, UNIGUARD and CIDER."
    )
    return planted + images + limits

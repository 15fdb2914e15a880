"""Evidence for invariance and transfer: small networks on objects under transformations, and two real ones measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft import datasets, zoo
from torchgraft.experiments import Arm, Claim, Measurement, Progress, Result, fit, pick_learning_rate
from torchgraft.vision import invariance_transfer as it

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DATA = ("fashion-mnist", "cifar10")
SETS = ("same", "disjoint", "none", "all")
CLASSES = {
    "disjoint": "other classes", "same": "same classes", "subset": "some of the classes", "superset": "more classes",
}  # fmt: skip
IMAGES, OBJECTS, PLAIN, BLACK, RANDOM = (
    "images labelled, object pasted", "object labelled, on images", "images labelled, no object",
    "objects on black", "random network",
)  # fmt: skip
CIFAR_NET, IMAGENET_NET = "CIFAR network", "ImageNet network"


def cell(transforms: str, samples: str, classes: str) -> str:
    """Name of an arm of experiment A."""
    return f"{transforms}, {samples} images, {CLASSES[classes]}"


def correlated(value: float) -> str:
    """Name of an arm of experiment C, in which the object goes along with the image's label."""
    return IMAGES if value == 0 else f"{IMAGES}, correlation {value:g}"


def _points(text: str, metric: str, arm: str, against: str | float, effect: float, paper: str, **options: Any) -> Claim:
    return Claim(text, metric, arm, against, effect, unit="points", factor=100, paper=paper, **options)


_MARGIN = "by a large margin (in words)"
CLAIMS = (
    _points(
        "Pre-training with the target's transformations beats pre-training with others", "accuracy",
        cell("same", "many", "disjoint"), cell("disjoint", "many", "disjoint"), 5, _MARGIN,
    ),
    _points(
        "The transformations matter more than five times the images", "transforms less samples", "A: effects", 0.0, 1,
        "comparable or larger than large changes of sample size (in words)",
    ),
    _points(
        "The transformations matter more than the classes", "transforms less classes", "A: effects", 0.0, 1,
        "exceeds that of class relation (in words)",
    ),
    _points(
        "A few images with the right transformations beat many with wrong ones", "accuracy",
        cell("same", "few", "disjoint"), cell("disjoint", "many", "disjoint"), 1, "at least as good (in words)",
    ),
    _points(
        "Transformations beyond the target's cost little", "accuracy", cell("all", "many", "disjoint"),
        cell("same", "many", "disjoint"), 5, "little (in words)", direction="equal",
    ),
    Claim(
        "Networks trained with the target's transformations are more invariant to them", "score",
        cell("same", "many", "disjoint"), cell("disjoint", "many", "disjoint"), 0.1, direction="lower",
        paper="in words",
    ),
    Claim(
        "The more invariant, the more accurate: correlation over networks below -0.7", "correlation", "A: effects",
        -0.7, 0.0, direction="lower", paper="no number; card's expectation",
    ),
    _points(
        "Networks trained to label images lose the object that is pasted on them", "object", IMAGES, RANDOM, 5,
        "objects are lost (in words)", direction="lower",
    ),
    _points(
        "Networks trained to label the object lose the image behind it", "image", OBJECTS, PLAIN, 5,
        "images are lost (in words)", direction="lower",
    ),
    _points(
        "An object that goes along with the label is kept", "object", correlated(1), IMAGES, 5,
        "the more it predicts the label, the more it is kept (in words)",
    ),
    _points(
        "Missing transformations cost more than superfluous ones", "cost", "B: missing", "B: superfluous", 1,
        "missing ones cost most (in words)",
    ),
    _points(
        "Superfluous transformations cost less than 5 points", "cost", "B: superfluous", 0.05, 0.0, "little (in words)",
        direction="lower",
    ),
    Claim(
        "Invariance carries over to objects that were not seen", "gain", "D: os-img", 0.0, 0.05, paper="in words",
    ),
    Claim(
        "Invariance carries over to objects of random pixels", "gain", "D: rp-rand", 0.0, 0.05,
        paper="partly (in words)",
    ),
    Claim(
        "It carries over less to random pixels than to unseen objects", "gain", "D: os-img", "D: rp-rand", 0.02,
        paper="weaker across data types (in words)",
    ),
    Claim(
        "A real network trained with horizontal flips is more invariant to them than to vertical ones", "score",
        f"{CIFAR_NET}, h_flip", f"{CIFAR_NET}, v_flip", 0.05, direction="lower", paper="not in the paper",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
        seeds: how many; each draws its own objects, classes, images and weights.
        data: of the objects, grey images that become coloured cut-outs: ``fashion-mnist`` or ``digits``; ``built-in``
            makes shapes. ``transforms-2d`` takes the published set.
        photos: backgrounds with classes, ``cifar10``; ``built-in`` makes noise in ten colours.
        device: where to train.
        experiments: of ``A`` (transformations beside samples and classes), ``B`` (nested sets), ``C`` (object or
            image), ``D`` (carry-over of invariance), ``zoo`` (real networks).
        target, other: transformations of the target task, and as many others; empty draws mixed sets for each seed.
        set_size: how many are drawn then.
        classes: of every task in A, B and D.
        img_size: of the canvas.
        samples: numbers of pre-training images in A, rising; the last one holds elsewhere too.
        relations: of the pre-training classes to the target's in A, the first the one of the claims.
        finetune: training images of a fine-tuned encoder in A, beside the probe; 0 leaves it out.
        probe_images, test_images: of every target task.
        pairs: twins for every score.
        network: a CNN with strides, or a ResNet-18 for small images.
        channels: of the CNN.
        steps, batch_size: of every pre-training.
        tune_steps: of each trial of the learning-rate grid; shorter trials than the training prefer other rates.
        learning_rates: the grid that every arm gets, for Adam with one cycle.
        correlations: of object and image in C.
        nested: sizes of the sets in B.
        single: transformations of D, one network for each.
        real: networks for the zoo: CIFAR's, and ImageNet's with its canvas; ``toy`` has random weights.
        real_pairs, imagenet_pairs: twins for each of the 18 scores.
        imagenet_size: canvas of the ImageNet network.
    """

    seeds: int = 3
    data: str = "fashion-mnist"
    photos: str = "cifar10"
    device: str = "cpu"
    experiments: tuple[str, ...] = ("A", "C", "zoo")
    target: tuple[str, ...] = ("rotate", "hue", "blur")
    other: tuple[str, ...] = ("translate", "invert", "pixelate")
    set_size: int = 3
    classes: int = 8
    img_size: int = 24
    samples: tuple[int, ...] = (1000, 5000)
    relations: tuple[str, ...] = ("disjoint", "same")
    finetune: int = 0
    probe_images: int = 1000
    test_images: int = 1000
    pairs: int = 256
    network: Literal["cnn", "resnet18"] = "cnn"
    channels: tuple[int, ...] = (24, 48, 96)
    steps: int = 150
    batch_size: int = 64
    tune_steps: int = 150
    learning_rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2, 1e-1)
    correlations: tuple[float, ...] = (0.0, 1.0)
    nested: tuple[int, ...] = (1, 2, 4, 8)
    single: tuple[str, ...] = ("rotate", "translate", "hue", "blur")
    real: tuple[str, ...] = ("resnet20-cifar10", "efficientnet-lite0")
    real_pairs: int = 128
    imagenet_pairs: int = 32
    imagenet_size: int = 96


_LARGE = Config(
    data="transforms-2d", device="cuda", experiments=("A", "B", "C", "D"), target=(), other=(), classes=30, img_size=32,
    samples=(1000, 10_000, 50_000), relations=tuple(CLASSES), finetune=2000, probe_images=10_000,
    test_images=10_000, pairs=4096, network="resnet18", steps=1000, batch_size=512, tune_steps=250,
    learning_rates=(3e-4, 1e-3, 3e-3), correlations=it.CORRELATIONS, nested=tuple(range(1, 9)), single=it.TRANSFORMS,
)  # fmt: skip
SCALES = {
    "smoke": Config(
        seeds=1, data="built-in", photos="built-in", experiments=("A", "B", "C", "D", "zoo"), classes=3,
        samples=(30, 60), probe_images=40, test_images=40, pairs=16, channels=(4, 8), steps=2, batch_size=8,
        tune_steps=1,
        learning_rates=(1e-2,), correlations=(0.0, 1.0), nested=(1, 2), single=("rotate", "hue"), real=("toy", "toy"),
        real_pairs=8, imagenet_pairs=8, imagenet_size=32,
    ),
    "laptop": Config(),
    "mismatch": Config(experiments=("B",)),
    "carry-over": Config(experiments=("D",)),
    "gpu": Config(**(vars(_LARGE) | {"data": "fashion-mnist"})),
    "paper": Config(**(vars(_LARGE) | {"seeds": 10, "steps": 4900})),
}  # fmt: skip


def skips(claim: Claim, config: Config) -> bool:
    """Whether a claim belongs to an experiment that this configuration leaves out."""
    if claim.arm.startswith(("B:", "D:")):
        return claim.arm[0] not in config.experiments
    if claim.arm.startswith(CIFAR_NET):
        return "zoo" not in config.experiments
    return ("C" if claim.metric in ("object", "image") else "A") not in config.experiments


class Encoder(nn.Module):
    """Images in 0..1 to features (B, num_features)."""

    def __init__(self, body: nn.Module, num_features: int) -> None:
        super().__init__()
        self.body, self.num_features = body, num_features

    def forward(self, x: Tensor) -> Tensor:
        """Normalise as the paper does, then the body."""
        return self.body((2 * x - 1).contiguous(memory_format=torch.channels_last)).flatten(1)


def _cnn(channels: tuple[int, ...]) -> Encoder:
    layers: list[nn.Module] = []
    for inputs, outputs in zip((3, *channels), channels, strict=False):
        layers += [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return Encoder(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1)), channels[-1])


def _resnet18() -> Encoder:
    """ResNet-18 whose first layer keeps the size of the image, as for CIFAR."""
    from transformers import ResNetConfig, ResNetModel

    sizes = {"embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]}
    model = ResNetModel(ResNetConfig(layer_type="basic", **sizes))
    model.embedder.embedder.convolution = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.embedder.pooler = nn.Identity()

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x).pooler_output

    return Encoder(Pooled(), 512)


@lru_cache(maxsize=2)
def _objects(data: str, size: int, classes: int) -> list[Any]:
    """Objects to draw two tasks' classes from: some of each class of an image set, each with a colour of its own."""
    if data == "built-in":
        return list(it.shape_objects(max(20, 2 * classes), size))
    if data == "transforms-2d":
        # as published, one prototype for each class: what varies within it is the transformation alone
        return [members[0] for members in it.load_base_set(size).foregrounds]
    images = datasets.load(data)
    if not isinstance(images, datasets.Images) or images.train_x.shape[1] != 1:
        raise ValueError(f"data must be grey images, got {data!r}; use 'fashion-mnist', 'digits' or 'built-in'")
    each = max(4, -(-2 * classes // len(images.classes)))
    found = [(images.train_y == k).nonzero()[:each, 0] for k in range(len(images.classes))]
    return list(it.masked_objects(images.train_x[torch.cat(found)]))


@lru_cache(maxsize=2)
def _photos(name: str) -> tuple[Tensor, Tensor]:
    """Photos with labels, as bytes."""
    if name == "built-in":
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(100) % 10
        tint = torch.randint(0, 200, (10, 3, 1, 1), generator=generator)[labels]
        return (tint + torch.randint(0, 56, (100, 3, 32, 32), generator=generator)).to(torch.uint8), labels
    images = datasets.load(name)
    if not isinstance(images, datasets.Images) or images.train_x.shape[1] != 3:
        raise ValueError(f"photos must be colour images, got {name!r}; use 'cifar10' or 'built-in'")
    return images.train_x[:10_000], images.train_y[:10_000]


Part = tuple[Tensor, Tensor]


class Lab:
    """Trains encoders for a configuration and a seed, and reads them."""

    def __init__(self, config: Config, seed: int, progress: Progress, models: int) -> None:
        self.config, self.seed, self.progress = config, seed, progress
        self.done, self.models = 0, models

    def fresh(self, seed: int) -> Encoder:
        """An untrained encoder."""
        torch.manual_seed(seed)
        made = _cnn(self.config.channels) if self.config.network == "cnn" else _resnet18()
        return made.to(self.config.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _trained(self, data: it.Transforms2D, lr: float, steps: int, seed: int) -> tuple[Encoder, float, float]:
        """An encoder trained on a task; its accuracy and mean log-likelihood on other images of that task."""
        encoder = self.fresh(seed)
        model = nn.Sequential(encoder, nn.Linear(encoder.num_features, data.n_classes).to(self.config.device))
        fit(
            model, data.tensors(), lambda m, b: F.cross_entropy(m(b[0]), b[1]), steps=steps,
            batch_size=self.config.batch_size, seed=seed, device=self.config.device,
            optimizer=lambda p: torch.optim.Adam(p, lr=lr), schedule="one_cycle",
        )  # fmt: skip
        x, y = data.split("val", self.config.test_images).tensors()
        logits = torch.cat([it.features(model, part).cpu() for part in x.split(500)])
        accuracy = (logits.argmax(1) == y.cpu()).double().mean().item()
        return encoder.eval(), accuracy, -F.cross_entropy(logits, y.cpu()).item()

    def trained(self, data: it.Transforms2D, kind: str) -> tuple[Encoder, float]:
        """The same with the learning rate that is best for this kind of data, by held-out likelihood."""
        c = self.config
        # the trials have their own draws; the first seed's classes and transformations
        trial = data.replace(sampling_seed=10_000)
        picked = self.progress.once(
            f"lr {kind}",
            lambda: pick_learning_rate(c.learning_rates, lambda lr: self._trained(trial, lr, c.tune_steps, 1000)[2]),
        )
        encoder, accuracy, _ = self._trained(data, picked["chosen"], c.steps, self.seed)
        self.done += 1
        self.progress(self.done, self.models, kind)
        return encoder, accuracy

    def target(self, data: it.Transforms2D) -> tuple[Part, Part]:
        """Images of a target task, of which no pre-training image is one."""
        shifted = data.replace(sampling_seed=data.sampling_seed + 5000)
        return shifted.split("train", self.config.probe_images).tensors(), shifted.split(
            "test", self.config.test_images
        ).tensors()

    def scores(self, encoder: nn.Module, data: it.Transforms2D) -> dict[str, float]:
        """All four measures of invariance to the data's transformations."""
        twins = data.replace(sampling_seed=data.sampling_seed + 7000, n_samples=self.config.pairs).twins()
        return it.invariance_scores(encoder, twins)


def _task(config: Config, objects: list[Any], transforms: tuple[str, ...], n: int, seed: int) -> it.Transforms2D:
    return it.Transforms2D(
        objects, _behind(config), transforms, n, config.img_size, sampling_seed=20_000 * (seed + 1),
        device=config.device,
    )  # fmt: skip


def _counts(config: Config) -> dict[str, int]:
    """Numbers of pre-training images by the name they have in an arm."""
    names = ["few", *map(str, config.samples[1:-1]), "many"]
    return dict(zip(names, config.samples, strict=True))


def _behind(config: Config) -> Tensor:
    """Backgrounds of the objects: the published photos for the published objects."""
    if config.data == "transforms-2d":
        return it.load_base_set(config.img_size).backgrounds
    return _photos(config.photos)[0]


def _sets(config: Config, seed: int) -> dict[str, tuple[str, ...]]:
    target = config.target or it.sample_transform_sets(config.set_size, seed=seed)
    other = config.other or it.sample_transform_sets(config.set_size, target, seed=seed)
    return dict(zip(SETS, (target, other, (), target + other), strict=True))


def _factors(config: Config, seed: int, progress: Progress) -> Mapping[str, Measurement]:
    """Experiment A: which transformations, how many images, which classes."""
    import pandas

    objects = _objects(config.data, config.img_size, config.classes)
    relations = it.class_relations(len(objects), config.classes, seed)
    sets, counts = _sets(config, seed), _counts(config)
    lab = Lab(config, seed, progress, len(sets) * len(counts) * len(config.relations))
    goal = _task(config, [objects[i] for i in relations["same"][1]], sets["same"], config.samples[-1], seed)
    parts, rows, readings = lab.target(goal), [], {}
    for classes in config.relations:
        chosen = [objects[i] for i in relations[classes][0]]
        for kind, names in sets.items():
            # the larger set first: its task is the one that the learning rate is chosen on
            for samples, count in reversed(counts.items()):
                encoder, own = lab.trained(_task(config, chosen, names, count, seed), kind)
                accuracy, scores = it.transfer_eval(encoder, parts), lab.scores(encoder, goal)
                metrics = {"accuracy": accuracy, "score": scores["l2"], "own task": own}
                if config.finetune:
                    tuned = it.transfer_eval(encoder, parts, "finetune", config.finetune, seed=seed)
                    metrics["fine-tuned"] = tuned
                readings[cell(kind, samples, classes)] = Measurement(metrics, extra={"scores": scores})
                rows.append((kind, samples, classes, accuracy, scores["l2"]))
    table = pandas.DataFrame(rows, columns=["transforms", "samples", "classes", "accuracy", "score"])
    effects = {factor: it.relative_importance(table, factor) for factor in ("samples", "classes")}
    gain = effects["samples"]["transforms"]
    readings["A: effects"] = Measurement(
        {
            "transforms": gain,
            "samples": effects["samples"]["factor"],
            "classes": effects["classes"]["factor"],
            "transforms less samples": gain - effects["samples"]["factor"],
            "transforms less classes": gain - effects["classes"]["factor"],
            "correlation": float(np.corrcoef(table["score"], table["accuracy"])[0, 1]),
        }
    )
    return readings


def _mismatch(config: Config, seed: int, progress: Progress) -> Mapping[str, Measurement]:
    """Experiment B: nested sets, trained on one and probed on another."""
    objects = _objects(config.data, config.img_size, config.classes)
    chosen = [objects[i] for i in it.class_relations(len(objects), config.classes, seed)["same"][0]]
    nested = it.nested_transform_sets(max(config.nested), seed)
    lab = Lab(config, seed, progress, len(config.nested))
    tasks = {n: _task(config, chosen, nested[n - 1], config.samples[-1], seed) for n in config.nested}
    encoders = {n: lab.trained(task, f"nested {n}")[0] for n, task in tasks.items()}
    targets = {n: lab.target(task) for n, task in tasks.items()}
    table = it.transfer_matrix({str(n): e for n, e in encoders.items()}, {str(n): t for n, t in targets.items()})
    matrix = table.to_numpy()
    lost = np.diag(matrix)[None] - matrix
    readings = {
        "B: missing": Measurement({"cost": lost[np.triu_indices(len(lost), 1)].mean()}),
        "B: superfluous": Measurement({"cost": lost[np.tril_indices(len(lost), -1)].mean()}),
    }
    for row, n in zip(matrix, config.nested, strict=True):
        found = {f"on {m}": float(v) for m, v in zip(config.nested, row, strict=True)}
        readings[f"B: trained on {n}"] = Measurement(found, extra={"names": list(nested[n - 1])})
    return readings


def _relevance(config: Config, seed: int, progress: Progress) -> Mapping[str, Measurement]:
    """Experiment C: a label that the object tells, or the image behind it."""
    objects, (photos, labels) = _objects(config.data, config.img_size, config.classes), _photos(config.photos)
    order = torch.randperm(len(objects), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = [objects[i] for i in order[: int(labels.max()) + 1]]
    made = it.relevance_data(
        chosen, photos, labels, config.samples[-1], config.img_size, 20_000 * (seed + 1), config.correlations, (0.0,)
    )
    named = {
        OBJECTS: made["objects"], BLACK: made["objects on black"], PLAIN: made["images, availability 0"],
        **{correlated(c): made[f"images, correlation {c:g}"] for c in config.correlations},
    }  # fmt: skip
    lab = Lab(config, seed, progress, len(named))
    targets = {"object": lab.target(named[OBJECTS]), "image": lab.target(named[IMAGES])}
    readings = {}
    for name, data in {**named, RANDOM: None}.items():
        encoder = lab.fresh(seed).eval() if data is None else lab.trained(data, name)[0]
        readings[name] = Measurement({k: it.transfer_eval(encoder, target) for k, target in targets.items()})
    return readings


def _carried(config: Config, seed: int, progress: Progress) -> Mapping[str, Measurement]:
    """Experiment D: one network for each transformation, its invariance to each on eight kinds of data."""
    objects = _objects(config.data, config.img_size, config.classes)
    relations = it.class_relations(len(objects), config.classes, seed)
    seen, unseen = ([objects[i] for i in relations[k][0]] for k in ("same", "disjoint"))
    lab = Lab(config, seed, progress, len(config.single) + 1)
    encoders: dict[str, nn.Module] = {}
    for name in (*config.single, "none"):
        names = () if name == "none" else (name,)
        encoders[name] = lab.trained(_task(config, seen, names, config.samples[-1], seed), f"single {name}")[0]
    encoders["untrained"] = lab.fresh(seed).eval()
    readings = {}
    kinds = it.data_types(seen, unseen, _behind(config), config.pairs, config.img_size, 20_000 * (seed + 1) + 7000)
    for kind, data in kinds.items():
        table = it.invariance_matrix(encoders, config.single, data, device=config.device)
        own = float(np.mean([table.loc[t, t] for t in config.single]))
        others = float(np.mean([table.loc[s, t] for s in config.single for t in config.single if s != t]))
        none, untrained = (float(table.loc[name].mean()) for name in ("none", "untrained"))
        metrics = {"own": own, "others": others, "none": none, "untrained": untrained, "gain": others - own}
        readings[f"D: {kind}"] = Measurement(metrics, extra={"table": table.to_dict("index")})
    return readings


def _real_encoder(name: str, device: str) -> Callable[[Tensor], Tensor]:
    net = zoo.CifarResNet(8, 10).to(device).eval() if name == "toy" else zoo.load(name, device=device)
    if isinstance(net, zoo.CifarResNet):
        return lambda x: net.features(net.normalize(x))
    return lambda x: it.features(net, (x - 0.498) / 0.502, "penultimate")


def _measured(config: Config, place: int, label: str, seed: int, progress: Progress) -> Mapping[str, Measurement]:
    """Networks that others trained, under each of the 18 transformations."""
    size, pairs = ((32, config.real_pairs), (config.imagenet_size, config.imagenet_pairs))[place]
    encode, objects = _real_encoder(config.real[place], config.device), _objects(config.data, size, config.classes)
    data = it.Transforms2D(
        objects, _photos(config.photos)[0][:500], (), pairs, size, sampling_seed=seed, device=config.device
    )
    found = {}
    for i, name in enumerate(it.TRANSFORMS):
        found[name] = it.invariance_score(encode, data.replace(transforms=[name]).twins())
        progress(i + 1, len(it.TRANSFORMS), name)
    return {
        f"{label}, mean of 18": Measurement({"score": float(np.mean(list(found.values())))}, extra={"scores": found}),
        **{f"{label}, {name}": Measurement({"score": found[name]}) for name in ("h_flip", "v_flip")},
    }


def arms(config: Config) -> Mapping[str, Arm]:
    """One arm for each experiment; each gives the readings of all of its networks."""
    known = ("A", "B", "C", "D", "zoo")
    if unknown := [name for name in config.experiments if name not in known] or not config.experiments:
        raise ValueError(f"experiments must be among {', '.join(known)}, got {unknown}")
    runs = dict(zip(known, (_factors, _mismatch, _relevance, _carried), strict=False))
    made: dict[str, Arm] = {f"experiment {k}": partial(runs[k], config) for k in config.experiments if k != "zoo"}
    if "zoo" in config.experiments:
        for place, label in enumerate((CIFAR_NET, IMAGENET_NET)[: len(config.real)]):
            made[label] = partial(_measured, config, place, label)
    return made


_COLOURS = dict(zip(SETS, ("#0072B2", "#D55E00", "#777777", "#009E73"), strict=True))


def _draw_factors(result: Result, left: Any, right: Any) -> None:
    config = result.config
    cells = [(kind, samples, classes) for kind in SETS for classes in config.relations for samples in _counts(config)]
    for y, (kind, samples, classes) in enumerate(cells):
        values = 100 * result.values(cell(kind, samples, classes), "accuracy")
        left.plot([values.mean()] * 2, [y - 0.35, y + 0.35], color=_COLOURS[kind], linewidth=3)
        left.plot(values, [y] * len(values), "o", color=_COLOURS[kind], markersize=4)
    labels = [f"{k}: {_counts(config)[s]} images, {CLASSES[c]}" for k, s, c in cells]
    left.set_yticks(range(len(cells)), labels, fontsize=8)
    left.invert_yaxis()
    left.grid(axis="x", alpha=0.3)
    left.axvline(100 / result.config.classes, color="#999999", linestyle=":")
    left.set(xlabel="accuracy of a probe on the target, %", title="A: pre-trained with which transformations")
    for kind in SETS:
        names = [cell(*c) for c in cells if c[0] == kind]
        scores, right_share = (np.concatenate([result.values(n, m) for n in names]) for m in ("score", "accuracy"))
        right.plot(scores, 100 * right_share, "o", color=_COLOURS[kind], label=kind, markersize=5, alpha=0.8)
    r = result.values("A: effects", "correlation").mean()
    right.set(xlabel="invariance score to the target's transformations (0: invariant)", ylabel="accuracy, %")
    right.set_title(f"each dot a network; correlation {r:.2f}")
    right.legend(frameon=False, fontsize=8)


def _draw_relevance(result: Result, ax: Any) -> None:
    names = [OBJECTS, BLACK, *(correlated(c) for c in reversed(result.config.correlations)), PLAIN, RANDOM]
    for metric, colour, mark in (("object", "#D55E00", "o"), ("image", "#0072B2", "s")):
        for y, name in enumerate(names):
            values = 100 * result.values(name, metric)
            label = f"probe for the {metric}" if y == 0 else None
            ax.plot(values, [y] * len(values), mark, color=colour, markersize=5, label=label, alpha=0.8)
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.invert_yaxis()
    ax.grid(axis="x", alpha=0.3)
    ax.axvline(10, color="#999999", linestyle=":")
    ax.legend(frameon=False, fontsize=8)
    ax.set(xlabel="accuracy of a probe, %; dotted: chance", title="C: pre-trained for which label")


def _draw_real(result: Result, ax: Any) -> None:
    marks = (("o", "#000000"), ("s", "#CC79A7"))
    for label, model, (mark, colour) in zip((CIFAR_NET, IMAGENET_NET), result.config.real, marks, strict=False):
        runs = result.measurements[f"{label}, mean of 18"].values()
        for run in runs:
            scores = [run.extra["scores"][name] for name in it.TRANSFORMS]
            ax.plot(scores, range(18), mark, color=colour, markersize=4, alpha=0.7)
        ax.plot([], [], mark, color=colour, label=model)
    ax.set_yticks(range(18), it.TRANSFORMS, fontsize=8)
    ax.invert_yaxis()
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, fontsize=8)
    ax.set(
        xlabel="invariance score (0: invariant, 1: another image)", title="networks that others trained", xlim=(0, None)
    )


def _draw_matrix(ax: Any, matrix: np.ndarray, rows: list[str], columns: list[str], title: str, digits: int) -> None:
    ax.imshow(matrix, cmap="viridis", aspect="auto")
    middle = (matrix.min() + matrix.max()) / 2
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            colour = "white" if value < middle else "black"
            ax.text(j, i, f"{value:.{digits}f}", ha="center", va="center", color=colour, fontsize=8)
    ax.set_xticks(range(len(columns)), columns, fontsize=8)
    ax.set_yticks(range(len(rows)), rows, fontsize=8)
    ax.set_title(title, fontsize=10)


def figures(result: Result) -> Mapping[str, Figure]:
    """A figure of what was run: accuracies, scores, and the matrices of B and D."""
    from matplotlib.figure import Figure

    config, made = result.config, {}
    main = [name for name in ("A", "C", "zoo") if name in config.experiments]
    if main:
        figure = Figure(figsize=(13, 4.8 * -(-(len(main) + ("A" in main)) // 2)), layout="constrained")
        rows = -(-(len(main) + ("A" in main)) // 2)
        axes = iter(figure.subplots(rows, 2, squeeze=False).flat)
        if "A" in main:
            _draw_factors(result, next(axes), next(axes))
        if "C" in main:
            _draw_relevance(result, next(axes))
        if "zoo" in main:
            _draw_real(result, next(axes))
        for ax in axes:
            ax.axis("off")
        seeds = f"{len(result.seeds)} seeds"
        figure.suptitle(f"objects: {config.data}, backgrounds: {config.photos}, {seeds}, each a dot", fontsize=10)
        made["invariance_transfer"] = figure
    if "B" in config.experiments:
        figure = Figure(figsize=(5.5, 4), layout="constrained")
        ax = figure.subplots()
        sizes = config.nested
        matrix = np.array([[100 * result.values(f"B: trained on {n}", f"on {m}").mean() for m in sizes] for n in sizes])
        title = "B: accuracy, %, of nested sets of transformations"
        _draw_matrix(ax, matrix, [f"trained on {n}" for n in sizes], [f"probe on {m}" for m in sizes], title, 0)
        made["invariance_transfer-nested" if main else "invariance_transfer"] = figure
    if "D" in config.experiments:
        figure = Figure(figsize=(6.5, 4.4), layout="constrained")
        kinds = [name for name in result.arms if name.startswith("D: ")]
        columns = ["own", "others", "none", "untrained"]
        matrix = np.array([[result.values(kind, c).mean() for c in columns] for kind in kinds])
        title = "D: score, by what the network was trained for"
        _draw_matrix(figure.subplots(), matrix, [k.removeprefix("D: ") for k in kinds], columns, title, 2)
        made["invariance_transfer-kinds" if made else "invariance_transfer"] = figure
    return made


def notes(result: Result) -> str:
    """What was measured, and what the numbers cannot say."""
    c = result.config
    rates = ", ".join(f"{key.removeprefix('lr ')} {value['chosen']:g}" for key, value in result.tuned.items())
    said = [
        f"Objects: {c.data}, each a single image with a colour of its own; backgrounds: {c.photos}; {c.img_size} "
        f"pixels; {c.network}, every network {c.steps} steps of {c.batch_size} with Adam, whatever the number of its "
        f"images. Probes: logistic regression on {c.probe_images} images, {c.test_images} for testing."
    ]
    if rates:
        said.append(
            f"Each kind has its own learning rate, by {c.tune_steps}-step trials of the first seed, by the "
            f"likelihood of held-out images of its own task, over {c.learning_rates}: {rates}."
        )
        ends = {min(c.learning_rates), max(c.learning_rates)}
        if at_end := [key.removeprefix("lr ") for key, value in result.tuned.items() if value["chosen"] in ends]:
            said.append(f"At an end of that grid, so perhaps not at their best: {', '.join(at_end)}.")
    if "A" in c.experiments:
        effects = {k: 100 * result.values("A: effects", k).mean() for k in ("transforms", "samples", "classes")}
        target, other = ", ".join(c.target) or "drawn", ", ".join(c.other) or "drawn"
        scores, own = (
            {k: result.values(cell(k, "many", "disjoint"), metric).mean() for k in SETS}
            for metric in ("score", "own task")
        )
        said.append(
            f"A: target {{{target}}}, disjoint {{{other}}}; {' or '.join(map(str, c.samples))} images; {c.classes} "
            f"classes, the target's or others. Mean effects in points: transformations {effects['transforms']:.1f}, "
            f"images {effects['samples']:.1f}, "
            f"classes {effects['classes']:.1f}. Scores with many images of other classes: "
            + ", ".join(f"{k} {v:.2f}" for k, v in scores.items())
            + "; accuracy on held-out images of their own task: "
            + ", ".join(f"{k} {v:.2f}" for k, v in own.items())
            + ": where that is low, so few steps did not suffice for the set, and the target pays for it too. "
            f"A training draws {c.steps * c.batch_size:,} images, so it sees each of {c.samples[-1]:,} "
            f"{c.steps * c.batch_size / c.samples[-1]:.1f} times: longer training could make more of their number. "
            "The correlation is over the networks of a seed, which are of four kinds and not independent."
        )
    if "B" in c.experiments:
        said.append(
            f"B: nested sets of {', '.join(map(str, c.nested))} transformations, drawn anew for every seed, which "
            "makes the intervals wide: some draws of eight leave little to recognise."
        )
    if "C" in c.experiments:
        said.append(
            "C: the object, smaller, stands in the upper right corner; probes are for the object or for the image, "
            "both on images with an object that tells nothing about the image. A small network learns little of images."
        )
    if "D" in c.experiments:
        said.append(
            "D: o objects, r random pixels, p seen and s not seen in training, on images or random pixels. 'own' "
            "is the score of the network trained with that transformation, 'others' of those trained with another "
            f"one, averaged over {', '.join(c.single)}; gain is others less own, so "
            "'carries over' means: less sensitive than networks that were trained for something else."
        )
        kinds = [name for name in result.arms if name.startswith("D: ")]
        spoilt = [k for k in kinds if result.values(k, "untrained").mean() < result.values(k, "own").mean()]
        if spoilt:
            said.append(
                f"On {', '.join(k.removeprefix('D: ') for k in spoilt)} a network that was not trained at all is less "
                "sensitive still: there training made the network more sensitive, whatever the transformation."
            )
    if "zoo" in c.experiments:
        said.append(
            f"Real networks ({', '.join(c.real)}): {c.real_pairs} pairs at 32 pixels and {c.imagenet_pairs} at "
            f"{c.imagenet_size} for each transformation; seeds draw other pairs, nothing is trained."
        )
    return " ".join(said)

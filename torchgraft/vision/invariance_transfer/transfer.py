"""Whether a representation serves another task: probes, fine-tuning, and what the transformations contribute to it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.vision.invariance_transfer.dataset import Transforms2D
from torchgraft.vision.invariance_transfer.measure import Model, Pool, features, to_matrix
from torchgraft.vision.invariance_transfer.objects import noise_objects
from torchgraft.vision.invariance_transfer.transforms import Corner

if TYPE_CHECKING:
    from pandas import DataFrame, Series

Mode = Literal["probe", "finetune"]
Labelled = tuple[Tensor, Tensor]
Target = Transforms2D | tuple[Labelled, Labelled]


def _parts(target: Target, n: int | None) -> tuple[Labelled, Labelled]:
    if isinstance(target, Transforms2D):
        # the published test part has a fifth of the training images
        return target.split("train", n).tensors(), target.split("test", max(len(target) // 5, 1)).tensors()
    train, given_test = target
    for name, (x, y) in (("training", train), ("test", given_test)):
        if len(x) != len(y) or not len(x):
            raise ValueError(f"the {name} part has {len(x)} inputs and {len(y)} labels")
        if x.is_floating_point() and not bool(x.isfinite().all()):
            raise ValueError(f"the {name} part has NaN pixels, or infinite ones")
    if n is not None and n > len(train[0]):
        raise ValueError(f"n={n} is more than the {len(train[0])} training inputs")
    for name, (_, y) in (("training", train), ("test", given_test)):
        if y.ndim != 1 or y.is_floating_point():
            got = f"{y.dtype} {tuple(y.shape)}"
            raise TypeError(f"labels of the {name} part must be whole numbers, one for each input, got {got}")
    return (train[0][:n], train[1][:n]), given_test


def _all_features(model: Model, x: Tensor, layer: str | None, pool: Pool, batch_size: int) -> Tensor:
    return torch.cat([features(model, part, layer, pool).float().cpu() for part in x.split(batch_size)])


def probe(train: Labelled, test: Labelled, penalty: float = 1.0, max_iter: int = 1000) -> float:
    """Accuracy of a linear classifier on features: standardised, then scikit-learn's logistic regression.

    Args:
        train, test: features (N, d) and labels (N,).
        penalty: scikit-learn's ``C``, the inverse of the penalty on the weights.
        max_iter: of L-BFGS.

    Raises:
        ValueError: for a training part of a single class.

    Example:
        >>> x = torch.randn(60, 2); y = (x[:, 0] > 0).long()
        >>> probe((x[:40], y[:40]), (x[40:], y[40:])) > 0.7
        True
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    (x, y), (x_test, y_test) = ((a.double().numpy(), b.cpu().numpy()) for a, b in (train, test))
    if len(set(y.tolist())) < 2:
        raise ValueError("the training part has a single class; a probe needs at least two")
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=max_iter))
    return float(classifier.fit(x, y).score(x_test, y_test))


class _Headed(nn.Module):
    """An encoder and a linear layer."""

    def __init__(self, encoder: nn.Module, width: int, classes: int, pool: Pool) -> None:
        super().__init__()
        self.encoder, self.head, self.pool = encoder, nn.Linear(width, classes), pool

    def forward(self, x: Tensor) -> Tensor:
        return self.head(to_matrix(self.encoder(x), self.pool))


def _finetuned(
    encoder: nn.Module, train: Labelled, test: Labelled, pool: Pool, epochs: int, batch_size: int, lr: float, seed: int
) -> float:
    (x, y), (x_test, y_test) = train, test
    if min(int(y.min()), int(y_test.min())) < 0:
        raise ValueError(f"labels to fine-tune on must be 0 or more, got {min(int(y.min()), int(y_test.min()))}")
    if batch_size < 1 or epochs < 0:
        raise ValueError(f"want a batch_size of at least 1 and epochs of at least 0, got {batch_size} and {epochs}")
    classes = int(max(y.max(), y_test.max())) + 1
    width = features(encoder, x[:2], None, pool).shape[1]
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        torch.manual_seed(seed)
        model = _Headed(copy.deepcopy(encoder), width, classes, pool).to(x.device).train()
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        for _ in range(epochs):
            # parts of nearly equal size: a last batch of one image would break batch norm
            for index in torch.randperm(len(x)).tensor_split(-(-len(x) // batch_size)):
                loss = F.cross_entropy(model(x[index]), y[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        model.eval()
        with torch.no_grad():
            right = [
                (model(a).argmax(1) == b).float() for a, b in zip(x_test.split(256), y_test.split(256), strict=True)
            ]
    return float(torch.cat(right).mean())


def transfer_eval(
    encoder: Model,
    target: Target,
    mode: Mode = "probe",
    n: int | None = None,
    *,
    layer: str | None = None,
    pool: Pool = "auto",
    penalty: float = 1.0,
    epochs: int = 50,
    batch_size: int = 64,
    lr: float = 1e-3,
    seed: int = 0,
) -> float:
    """Test accuracy of an encoder on another task, frozen under a linear probe or fine-tuned with a new linear layer.

    Args:
        encoder: as in ``features``; it is left as it was (fine-tuning trains a copy).
        target: a ``Transforms2D``, whose test part has a fifth of its images, or two pairs of tensors
            ``((inputs, labels), (test inputs, test labels))``.
        mode: ``probe`` (all training images in the paper) or ``finetune`` (200 or 2,000 in the paper).
        n: how many training images; None takes all.
        layer, pool: as in ``features``; fine-tuning takes the encoder's output.
        penalty: of the probe; see ``probe``.
        epochs, batch_size, lr, seed: of fine-tuning, with Adam as in the paper.

    Returns:
        A share of 0..1.

    Raises:
        TypeError, ValueError: for an unknown mode, a ``layer`` with ``finetune``, an encoder that cannot be trained,
            parts that are empty or do not fit, pixels that are NaN or infinite, labels that are no whole numbers, and
            more images than a pair of tensors has (a ``Transforms2D`` makes as many as are wanted).

    Example:
        >>> from torchgraft.vision.invariance_transfer import shape_objects
        >>> data = Transforms2D(shape_objects(3), "black", n_samples=60)
        >>> transfer_eval(lambda x: x.flatten(1), data)
        1.0
    """
    if mode not in ("probe", "finetune"):
        raise ValueError(f"mode must be 'probe' or 'finetune', got {mode!r}")
    if n is not None and n < 2:
        raise ValueError(f"n must be at least 2 training images, got {n}")
    train, test = _parts(target, n)
    if mode == "finetune":
        if not isinstance(encoder, nn.Module):
            raise TypeError(f"only a module can be fine-tuned, got {type(encoder).__name__}")
        if layer is not None:
            raise ValueError(
                "fine-tuning takes the encoder's output; cut the encoder at the layer, or use mode='probe'"
            )
        return _finetuned(encoder, train, test, pool, epochs, batch_size, lr, seed)
    found = [(_all_features(encoder, x, layer, pool, 256), y) for x, y in (train, test)]
    return probe(found[0], found[1], penalty)


def transfer_matrix(encoders: Mapping[str, Model], targets: Mapping[str, Target], **options: Any) -> DataFrame:
    """``transfer_eval`` of every encoder on every target (experiments A and B).

    Args:
        encoders, targets: by name.
        options: of ``transfer_eval``.

    Returns:
        A row for each encoder, a column for each target.

    Raises:
        ValueError: for no encoders or no targets.
    """
    from pandas import DataFrame

    if not encoders or not targets:
        raise ValueError(f"want encoders and targets, got {len(encoders)} and {len(targets)}")
    columns = {
        name: [transfer_eval(e, target, **options) for e in encoders.values()] for name, target in targets.items()
    }
    return DataFrame(columns, index=list(encoders))


def relative_importance(df: DataFrame, factor: str, value: str = "accuracy", transforms: str = "transforms") -> Series:
    """What the choice of transformations does to transfer, beside what another factor does (experiment A).

    Args:
        df: one row for each pre-trained model, with the columns ``transforms`` (``same`` or ``disjoint``), ``factor``
            and ``value``. Other columns, such as seeds, are averaged over.
        factor: name of the column of the other factor: number of samples, relation of the classes, architecture.
        value, transforms: names of the other two columns.

    Returns:
        ``transforms``: mean over levels of the factor of same minus disjoint; ``factor``: greatest minus least mean
        over its levels, averaged over same and disjoint; ``ratio``: the first over the second.

    Raises:
        ValueError: for missing columns, levels without both relations, or a single level.

    Example:
        >>> import pandas
        >>> rows = [("same", 1000, 0.8), ("same", 5000, 0.9), ("disjoint", 1000, 0.5), ("disjoint", 5000, 0.6)]
        >>> df = pandas.DataFrame(rows, columns=["transforms", "samples", "accuracy"])
        >>> relative_importance(df, "samples").round(3).to_dict()
        {'transforms': 0.3, 'factor': 0.1, 'ratio': 3.0}
    """
    from pandas import Series

    missing = [name for name in (transforms, factor, value) if name not in df.columns]
    if missing:
        raise ValueError(f"the table has no column {missing[0]!r}; it has {', '.join(map(str, df.columns))}")
    means = df.groupby([factor, transforms])[value].mean().unstack(transforms)
    if not {"same", "disjoint"} <= set(means.columns) or means[["same", "disjoint"]].isna().any(axis=None):
        raise ValueError(f"every level of {factor!r} needs a 'same' and a 'disjoint' row in {transforms!r}")
    if len(means) < 2:
        raise ValueError(f"{factor!r} has a single level, {means.index[0]!r}; there is nothing to compare with")
    means = means[["same", "disjoint"]]
    gain = float((means["same"] - means["disjoint"]).mean())
    other = float((means.max() - means.min()).mean())
    return Series({"transforms": gain, "factor": other, "ratio": gain / other if other else float("inf")})


def class_relations(objects: int, target: int, seed: int = 0) -> dict[str, tuple[list[int], list[int]]]:
    """Classes to pre-train on and the target's, for each relation of the two (experiment A).

    ``subset`` is a third of the target's classes (at least two), ``superset`` twice as many, ``disjoint`` as many.

    Args:
        objects: how many classes there are to draw from.
        target: how many the target has.
        seed: of the draw.

    Raises:
        ValueError: when there are not twice as many as the target has.

    Example:
        >>> relations = class_relations(20, 9)
        >>> {name: len(classes) for name, (classes, _) in relations.items()}
        {'subset': 3, 'same': 9, 'disjoint': 9, 'superset': 18}
    """
    if target < 2 or objects < 2 * target:
        raise ValueError(f"want a target of 2 classes or more, and twice as many objects, got {target} of {objects}")
    order = torch.randperm(objects, generator=torch.Generator().manual_seed(seed)).tolist()
    goal, others = order[:target], order[target : 2 * target]
    smaller = goal[: max(2, round(target / 3))]
    return {
        "subset": (smaller, goal),
        "same": (goal, goal),
        "disjoint": (others, goal),
        "superset": (goal + others, goal),
    }


DATA_TYPES = tuple(f"{kind}-{under}" for kind in ("op", "os", "rp", "rs") for under in ("img", "rand"))
"""Objects seen in training (p) or not (s), real (o) or of random pixels (r), on images or random pixels."""


def data_types(
    seen: Sequence[Any],
    unseen: Sequence[Any],
    backgrounds: Any,
    n_samples: int = 10_000,
    img_size: int = 32,
    seed: int = 0,
) -> dict[str, Transforms2D]:
    """The eight kinds of data on which invariance is measured in experiment D.

    Args:
        seen, unseen: objects of the pre-training task, and others.
        backgrounds: images.
        n_samples, img_size: as in ``Transforms2D``.
        seed: of samples and random pixels.

    Raises:
        ValueError: as ``Transforms2D``.
    """
    objects = {
        "op": seen, "os": unseen, "rp": noise_objects(len(seen), img_size, seed + 593),
        "rs": noise_objects(len(unseen), img_size, seed + 245),
    }  # fmt: skip
    under = {"img": backgrounds, "rand": "noise"}
    made = {}
    for name in DATA_TYPES:
        kind, behind = name.split("-")
        made[name] = Transforms2D(objects[kind], under[behind], (), n_samples, img_size, sampling_seed=seed)
    return made


CORRELATIONS = (0.0, 0.2, 0.4, 0.6, 0.8, 0.85, 0.9, 0.95, 1.0)
AVAILABILITIES = (0.0, 0.2, 0.4, 0.6, 0.8)


def relevance_data(
    objects: Sequence[Any],
    images: Tensor,
    labels: Tensor,
    n_samples: int = 50_000,
    img_size: int = 32,
    seed: int = 0,
    correlations: Sequence[float] = CORRELATIONS,
    availabilities: Sequence[float] = AVAILABILITIES,
    transforms: Sequence[Any] | None = None,
) -> dict[str, Transforms2D]:
    """Data in which an object, the image behind it, or both tell the label (experiment C).

    Args:
        objects: as many as the images have classes.
        images, labels: such as CIFAR-10.
        n_samples, img_size, seed: as in ``Transforms2D``.
        correlations: of object and image, where the image is the label.
        availabilities: of the object, where the image is the label.
        transforms: of the object; None puts it, smaller, into the upper right corner.

    Returns:
        ``objects on black``, ``objects`` (the object is the label), ``images, correlation c`` and
        ``images, availability a`` (the image is the label; at availability 0 there is no object).

    Raises:
        ValueError: for another number of objects than of classes, and as ``Transforms2D``.
    """
    if len(objects) != int(labels.max()) + 1:
        raise ValueError(f"want as many objects as classes of images, got {len(objects)} and {int(labels.max()) + 1}")
    changes = [Corner()] if transforms is None else list(transforms)
    shared: dict[str, Any] = {
        "transforms": changes,
        "n_samples": n_samples,
        "img_size": img_size,
        "sampling_seed": seed,
    }
    mixed: dict[str, Any] = shared | {"background_labels": labels}
    made = {
        "objects on black": Transforms2D(objects, "black", **shared),
        "objects": Transforms2D(objects, images, **mixed),
    }
    for c in correlations:
        made[f"images, correlation {c:g}"] = Transforms2D(
            objects, images, label="background", fg_bg_correlation=c, **mixed
        )
    for a in availabilities:
        made[f"images, availability {a:g}"] = Transforms2D(
            objects, images, label="background", fg_availability=a, **mixed
        )
    return made

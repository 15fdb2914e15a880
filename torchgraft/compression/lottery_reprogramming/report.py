"""A grid of models, targets, few-shot sizes and methods, with intervals.

Dimensions: N examples, K classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.compression.lottery_reprogramming.calibration import expected_calibration_error
from torchgraft.compression.lottery_reprogramming.pruning import sparsity_report
from torchgraft.datasets import Images

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

Method = Callable[[nn.Module, int, tuple[Tensor, Tensor], int], Any]
Metric = Literal["acc", "nll", "ece"]
METRICS = ("acc", "nll", "ece")


def few_shot_indices(y: Int[Tensor, " N"], shots: int, seed: int) -> Int[Tensor, " n"]:
    """Which examples a few-shot set has: ``shots`` of every class, without replacement, in random order.

    With one seed, a set of more shots contains every set of fewer.

    Args:
        y: classes of all examples.
        shots: per class; 0 or less takes everything.
        seed: of the draw.

    Warns:
        UserWarning: for classes with fewer examples, of which all are taken.

    Example:
        >>> y = torch.tensor([0, 0, 0, 1, 1])
        >>> sorted(y[few_shot_indices(y, 2, seed=0)].tolist())
        [0, 0, 1, 1]
    """
    generator = torch.Generator().manual_seed(seed)
    if shots <= 0:
        return torch.randperm(len(y), generator=generator)
    y = y.cpu()
    chosen, short = [], {}
    for label in y.unique().tolist():
        members = (y == label).nonzero()[:, 0]
        if len(members) < shots:
            short[label] = len(members)
        chosen.append(members[torch.randperm(len(members), generator=generator)[:shots]])
    if short:
        warnings.warn(
            f"fewer than {shots} examples of classes {short} (class: examples); all of those are taken", stacklevel=2
        )
    together = torch.cat(chosen)
    return together[torch.randperm(len(together), generator=generator)]


def transfer_metrics(probs: Float[Tensor, "N K"], y: Int[Tensor, " N"], bins: int = 15) -> dict[str, float]:
    """Accuracy, negative log-likelihood and expected calibration error of probabilities.

    Example:
        >>> transfer_metrics(torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([0, 0]))["acc"]
        1.0
    """
    ece = float(expected_calibration_error(probs, y, bins))
    tiny = torch.finfo(torch.float32).tiny
    return {
        "acc": float((probs.argmax(1) == y).double().mean()),
        "nll": float(F.nll_loss(probs.double().clamp(min=tiny).log(), y)),
        "ece": ece,
    }


def transfer_report(
    models: Mapping[str, nn.Module],
    targets: Mapping[str, Images],
    shots: Sequence[int],
    methods: Mapping[str, Method],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    bins: int = 15,
    progress: Callable[[int, int], object] | None = None,
) -> DataFrame:
    """Fit every method on every model, target, few-shot size and seed, and test on the whole test set.

    Within one seed all models and methods see the same few-shot set, so differences between them are paired.

    Args:
        models: name to classifier; one of them dense.
        targets: name to images with train and test parts, as ``torchgraft.datasets.load`` gives them.
        shots: examples per class; 0 or less takes all.
        methods: name to ``(model, num_classes, (images, labels), seed) -> fitted``, which has ``predict_proba`` of
            images; for instance ``lambda net, k, data, seed: LinearProbe(net, k).fit(data, seed=seed)``.
        seeds: of the draw, and given to the methods; one seed says little about few shots.
        bins: of the calibration error.
        progress: called with (fits done, fits).

    Returns:
        A ``pandas.DataFrame`` with the columns model, sparsity, target, shots (0 for all), seed, method, acc, nll, ece.

    Raises:
        ValueError: when one of the lists is empty.
    """
    import pandas

    for name, given in (("models", models), ("targets", targets), ("shots", shots), ("methods", methods)):
        if not given:
            raise ValueError(f"{name} is empty")
    if not seeds:
        raise ValueError("seeds is empty; give at least two for intervals")
    rows, total = [], len(models) * len(targets) * len(shots) * len(methods) * len(seeds)
    for model_name, model in models.items():
        sparsity = sparsity_report(model).sparsity
        for target_name, images in targets.items():
            for count in shots:
                for seed in seeds:
                    index = few_shot_indices(images.train_y, count, seed)
                    data = images.train_x[index], images.train_y[index]
                    for method_name, method in methods.items():
                        fitted = method(model, len(images.classes), data, seed)
                        found = transfer_metrics(fitted.predict_proba(images.test_x), images.test_y, bins)
                        rows.append(
                            {"model": model_name, "sparsity": sparsity, "target": target_name, "shots": max(count, 0)}
                            | {"seed": seed, "method": method_name}
                            | found
                        )
                        if progress is not None:
                            progress(len(rows), total)
    return pandas.DataFrame(rows)


def _interval(values: Any) -> tuple[float, float, float]:
    """Mean and Student's 95 % interval."""
    from scipy import stats

    mean, n = float(values.mean()), len(values)
    if n < 2:
        return mean, float("nan"), float("nan")
    half = float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / n**0.5)
    return mean, mean - half, mean + half


def summarize_transfer(report: DataFrame, against: str | None = None) -> DataFrame:
    """Mean and 95 % interval over seeds of every cell of a report, or of its paired difference to one model.

    Args:
        report: of ``transfer_report``.
        against: name of a model (the dense one); every other model's differences ``model - against`` are then given,
            paired over seeds.

    Returns:
        One row per model, target, shots, method and metric, with mean, low, high and n. With one seed low and high are
        NaN.

    Raises:
        ValueError: for a model that the report does not have.
    """
    import pandas

    keys = ["target", "shots", "method"]
    long = report.melt(["model", "sparsity", *keys, "seed"], list(METRICS), var_name="metric")
    if against is not None:
        if against not in set(report["model"]):
            raise ValueError(f"the report has no model {against!r}; it has {sorted(set(report['model']))}")
        base = long[long["model"] == against].set_index([*keys, "seed", "metric"])["value"]
        long = long[long["model"] != against].copy()
        long["value"] = long["value"] - base.reindex(long.set_index([*keys, "seed", "metric"]).index).to_numpy()
    rows = []
    for key, group in long.groupby(["model", "sparsity", *keys, "metric"], sort=False):
        mean, low, high = _interval(group["value"].to_numpy())
        names = ["model", "sparsity", *keys, "metric"]
        rows.append(dict(zip(names, key, strict=True)) | {"mean": mean, "low": low, "high": high, "n": len(group)})
    return pandas.DataFrame(rows)


_LOOKS = (
    ("#000000", "o", "-"), ("#0072B2", "s", "--"), ("#D55E00", "^", "-."), ("#009E73", "D", ":"),
    ("#CC79A7", "v", "--"), ("#E69F00", "P", "-."), ("#56B4E9", "X", ":"),
)  # fmt: skip
_LABELS = {"acc": "test accuracy, %", "nll": "negative log-likelihood, nats", "ece": "calibration error (ECE), points"}


def plot_transfer(report: DataFrame, metric: Metric = "acc") -> Figure:
    """A metric against the number of shots, one line per model, one panel per target and method; needs matplotlib.

    Bars are 95 % intervals over seeds.
    """
    from matplotlib.figure import Figure

    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    table = summarize_transfer(report)
    table = table[table["metric"] == metric]
    panels = list(_unique(zip(table["target"], table["method"], strict=True)))
    counts = sorted(set(table["shots"]), key=lambda n: n or float("inf"))
    scale = 1 if metric == "nll" else 100
    figure = Figure(figsize=(1 + 4 * len(panels), 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    models = list(_unique(table["model"]))
    for ax, (target, method) in zip(axes, panels, strict=True):
        for place, model in enumerate(models):
            colour, marker, line = _LOOKS[place % len(_LOOKS)]
            chosen = table[(table["target"] == target) & (table["method"] == method) & (table["model"] == model)]
            chosen = chosen.set_index("shots").loc[counts]
            x = [at + 0.06 * (place - (len(models) - 1) / 2) for at in range(len(counts))]
            mean = scale * chosen["mean"]
            ax.errorbar(
                x, mean, yerr=[mean - scale * chosen["low"], scale * chosen["high"] - mean], color=colour,
                marker=marker, linestyle=line, label=f"{model} ({1 - chosen['sparsity'].iloc[0]:.0%} kept)", capsize=2,
            )  # fmt: skip
        ax.set_xticks(range(len(counts)), [str(n) if n else "all" for n in counts])
        ax.set(xlabel="training examples per class", title=f"{target}, {method}")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel(_LABELS[metric])
    axes[-1].legend(frameon=False, fontsize=8)
    return figure


def _unique(values: Iterable[Any]) -> Iterable[Any]:
    return dict.fromkeys(values)

"""How much a representation changes when its input is transformed (paper, section on measuring invariance).

Letters: B pairs in a batch, d features.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from torchgraft.surgery import evaluating
from torchgraft.vision.invariance_transfer.dataset import Transforms2D, Twins
from torchgraft.vision.invariance_transfer.transforms import Transform

if TYPE_CHECKING:
    from pandas import DataFrame

Model = nn.Module | Callable[..., Any]
Metric = Literal["l2", "cos", "dot", "cka"]
Pool = Literal["auto", "pooler", "cls", "mean"]
METRICS: tuple[Metric, ...] = ("l2", "cos", "dot", "cka")
PENULTIMATE = "penultimate"


@contextmanager
def _caught(model: nn.Module, layer: str) -> Iterator[list[Any]]:
    """What a layer gives, or what the last linear layer is given, while the model runs."""
    found: list[Any] = []
    if layer == PENULTIMATE:
        linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
        if not linear:
            raise ValueError(f"{type(model).__name__} has no linear layer; name the layer whose output you want")

        def before(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            found[:] = [inputs[0]]

        handles = [m.register_forward_pre_hook(before) for m in linear]
    else:
        modules = dict(model.named_modules())
        if layer not in modules or not layer:
            import difflib

            near = difflib.get_close_matches(layer, [n for n in modules if n], 3, 0.3) or list(modules)[1:6]
            raise ValueError(f"{type(model).__name__} has no layer {layer!r}; it has {', '.join(near)}, …")

        def after(_: nn.Module, __: Any, output: Any) -> None:
            found[:] = [output]

        handles = [modules[layer].register_forward_hook(after)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def to_matrix(output: Any, pool: Pool, mask: Tensor | None = None) -> Float[Tensor, "B d"]:
    """(B, d) from whatever a model gives; see ``features``."""
    pooled = getattr(output, "pooler_output", None)
    hidden = getattr(output, "last_hidden_state", None)
    if pooled is not None and pool in ("auto", "pooler"):
        output = pooled.flatten(1)
    elif pool == "pooler":
        raise ValueError(f"pool='pooler' needs a model with a pooler_output, got {type(output).__name__}")
    elif hidden is not None:
        output = hidden
    elif isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        output = output[0]
    if not isinstance(output, Tensor):
        has = ", ".join(output) if isinstance(output, Mapping) else type(output).__name__
        raise TypeError(
            f"want features as a tensor, or a transformers output with pooler_output or last_hidden_state, got {has}; "
            f"for a classifier use layer={PENULTIMATE!r}"
        )
    if output.ndim == 4:
        return output.mean((2, 3))
    if output.ndim == 3:
        if pool == "cls":
            return output[:, 0]
        if mask is None:
            return output.mean(1)
        kept = mask[..., None].to(output.dtype)
        return (output * kept).sum(1) / kept.sum(1)
    if output.ndim != 2:
        raise ValueError(f"features must have 2, 3 or 4 dimensions, batch first, got {tuple(output.shape)}")
    return output


def features(model: Model, inputs: Any, layer: str | None = None, pool: Pool = "auto") -> Float[Tensor, "B d"]:
    """Representations of a batch, in eval mode and without gradients; the model's mode is put back.

    Args:
        model: a module or function. A transformers encoder gives its ``pooler_output`` or, without one, the mean of its
            tokens; feature maps are averaged over the image.
        inputs: what the model takes: a tensor, or a mapping that is passed by keyword (tokens of a text encoder, whose
            ``attention_mask`` is then heeded).
        layer: None takes the model's output; ``"penultimate"`` what goes into the linear layer that runs last, the
            paper's choice for a classifier; otherwise the output of the layer of this dotted name.
        pool: of a sequence: ``pooler``, ``cls`` or ``mean``; ``auto`` as above.

    Raises:
        TypeError, ValueError: for a layer that is not there, an output that is not understood, and features that are
            not numbers.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> features(net, torch.rand(5, 3, 4, 4), layer="penultimate").shape
        torch.Size([5, 8])
    """
    if pool not in ("auto", "pooler", "cls", "mean"):
        raise ValueError(f"pool must be 'auto', 'pooler', 'cls' or 'mean', got {pool!r}")
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    with evaluating(model), torch.no_grad():
        if layer is None:
            output = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
        else:
            if not isinstance(model, nn.Module):
                raise TypeError(f"layer={layer!r} needs a module to look into, got {type(model).__name__}")
            with _caught(model, layer) as found:
                _ = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
            if not found:
                raise ValueError(f"the layer {layer!r} did not run")
            output = found[0]
        x = to_matrix(output, pool, mask)
    if not x.is_floating_point() or not bool(x.isfinite().all()):
        raise ValueError(
            f"features must be finite floats, got {x.dtype} with NaN or infinity, or no floats; look at the inputs"
        )
    return x


def similarity(x: Float[Tensor, "B d"], y: Float[Tensor, "B d"], metric: Metric = "l2") -> Float[Tensor, ""]:
    """Mean over rows of the distance (``l2``), cosine (``cos``) or product (``dot``) of two rows.

    Example:
        >>> x, y = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.0]])
        >>> similarity(x, y).item()
        2.5
    """
    if metric == "l2":
        return (x - y).norm(dim=1).mean()
    if metric == "cos":
        return torch.cosine_similarity(x, y, dim=1).mean()
    if metric == "dot":
        return (x * y).sum(1).mean()
    raise ValueError(f"metric must be 'l2', 'cos' or 'dot' here, got {metric!r}")


def unbiased_hsic(x: Float[Tensor, "B d"], y: Float[Tensor, "B e"]) -> Float[Tensor, ""]:
    """Unbiased estimate of the Hilbert-Schmidt independence criterion of linear kernels (Song et al. 2012).

    The published code centres the kernels first, which this estimate does not see.

    Raises:
        ValueError: for fewer than four rows.
    """
    n = len(x)
    if n < 4:
        raise ValueError(f"CKA needs batches of at least 4 pairs, got {n}")
    # the estimate ignores a common shift, and float32 does not: products of large means would hide the rest
    k, l = (((v - v.mean(0)) @ (v - v.mean(0)).T).fill_diagonal_(0) for v in (x, y))  # noqa: E741
    means = k.sum() * l.sum() / ((n - 1) * (n - 2))
    crossed = (k.sum(0) @ l.sum(1)) * 2 / (n - 2)
    return ((k * l).sum() + means - crossed) / (n * (n - 3))


class _Sums:
    """Running sums of one metric over batches."""

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.sums = [0.0, 0.0, 0.0]

    def add(self, x: Tensor, y: Tensor, shuffled: Tensor) -> None:
        if self.metric == "cka":
            found = (unbiased_hsic(x, y), unbiased_hsic(x, x), unbiased_hsic(y, y))
        else:
            found = (similarity(x, y, self.metric), similarity(x, shuffled, self.metric), torch.zeros(()))
        self.sums = [total + float(value) for total, value in zip(self.sums, found, strict=True)]

    def value(self) -> float:
        twins, other, third = self.sums
        normaliser = max(other, 0.0) ** 0.5 * max(third, 0.0) ** 0.5 if self.metric == "cka" else other
        if normaliser == 0:
            warnings.warn(
                "the representations of different images are all the same (a collapsed encoder): no score",
                UserWarning,
                stacklevel=4,
            )
            return float("nan")
        return twins / normaliser


def _pairs(twins: Any, batch_size: int) -> Iterable[Any]:
    if isinstance(twins, Transforms2D):
        raise TypeError("twins must be pairs; call .twins() on the dataset")
    if not isinstance(twins, Iterable) and not isinstance(twins, Twins):
        raise TypeError(f"twins must be from .twins(), or batches of pairs, got {type(twins).__name__}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not isinstance(twins, Twins):
        return twins
    if not twins.data.transforms:
        raise ValueError("the twins have an empty set of transformations: every score would say 'invariant'")
    return twins.batches(batch_size)


def _length(inputs: Any) -> int:
    return len(next(iter(inputs.values()))) if isinstance(inputs, Mapping) else len(inputs)


def _checked(batch: Any, device: str | torch.device | None) -> tuple[Any, Any, int]:
    """Both halves of a batch of twins and their length."""
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise TypeError(f"a batch of twins is (inputs, inputs, …), got {type(batch).__name__}")
    one, other = (_moved(part, device) for part in batch[:2])
    n = _length(one)
    if n != _length(other) or n < 2:
        raise ValueError(f"a batch of twins needs at least 2 pairs, got {n} and {_length(other)} inputs")
    for part in (one, other):
        for values in part.values() if isinstance(part, Mapping) else (part,):
            if isinstance(values, Tensor) and values.is_floating_point() and not bool(values.isfinite().all()):
                raise ValueError("the twins have NaN pixels, or infinite ones")
    return one, other, n


def _streamed(
    models: Sequence[Model],
    twins: Any,
    metrics: Sequence[Metric],
    layer: str | None,
    pool: Pool,
    batch_size: int,
    seed: int,
    device: str | torch.device | None,
) -> list[dict[str, float]]:
    """Scores of several models from one pass over the twins, of which one batch at a time is kept."""
    unknown = [m for m in metrics if m not in METRICS]
    if unknown or not metrics:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {unknown[0] if unknown else 'none'!r}")
    sums = [[_Sums(metric) for metric in metrics] for _ in models]
    generator = torch.Generator().manual_seed(seed)
    batches, differ = 0, False
    for batch in _pairs(twins, batch_size):
        one, other, n = _checked(batch, device)
        differ = differ or not isinstance(twins, Twins) or not torch.equal(one, other)
        # around a circle in random order: no image is compared with itself
        order = torch.randperm(n, generator=generator)
        partner = torch.empty_like(order)
        partner[order] = order.roll(1)
        for model, own in zip(models, sums, strict=True):
            x, y = (features(model, part, layer, pool).double() for part in (one, other))
            if len(x) != n or len(y) != n:
                raise ValueError(f"a model must give a row for each of {n} inputs, got {len(x)} and {len(y)}")
            shuffled = x[partner.to(x.device)]
            for each in own:
                each.add(x, y, shuffled)
        batches += 1
    if not batches:
        raise ValueError("twins is empty; give at least one batch of pairs")
    if not differ:
        raise ValueError(
            "no twin differs from the other: the transformations draw nothing, and every score would say 'invariant'"
        )
    return [{each.metric: each.value() for each in own} for own in sums]


def invariance_scores(
    model: Model,
    twins: Any,
    metrics: Sequence[Metric] = METRICS,
    layer: str | None = None,
    *,
    pool: Pool = "auto",
    batch_size: int = 256,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> dict[str, float]:
    """Several scores from one pass over the twins; see ``invariance_score``.

    Returns:
        One number for each metric.
    """
    return _streamed([model], twins, metrics, layer, pool, batch_size, seed, device)[0]


def _moved(inputs: Any, device: str | torch.device | None) -> Any:
    if device is None:
        return inputs
    return {k: v.to(device) for k, v in inputs.items()} if isinstance(inputs, Mapping) else inputs.to(device)


def invariance_score(
    model: Model,
    twins: Any,
    metric: Metric = "l2",
    layer: str | None = None,
    *,
    pool: Pool = "auto",
    batch_size: int = 256,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> float:
    """How far apart twins lie in a representation, in units of how far apart different images lie.

    With ``l2``, 0 is fully invariant and 1 as different as random images: the mean distance of twins over batches,
    divided by that of images and other images of the same batch. ``cos`` and ``dot`` divide similarities likewise and
    run the other way: 1 is no more alike than random images, higher is more invariant. ``cka`` is minibatch CKA
    (Nguyen et al. 2021) with unbiased estimates: 1 is the same up to rotation and scale. Computed in float64.

    The published code compares images with a random permutation, in which one image in B meets itself; here none does.

    Args:
        model: as in ``features``.
        twins: from ``Transforms2D.twins()``, or any iterable of batches ``(inputs, inputs, …)``: a ``DataLoader`` of
            your own pairs, or token mappings from ``text_twins``.
        metric: ``l2``, ``cos``, ``dot`` or ``cka``.
        layer: as in ``features``; ``"penultimate"`` for a classifier.
        pool: as in ``features``.
        batch_size: of ``Twins``; all batches are of nearly equal size.
        seed: of the order in which images are compared with others.
        device: where inputs are sent; None leaves them.

    Returns:
        The score, NaN with a warning for an encoder that gives all images the same representation.

    Raises:
        TypeError, ValueError: for batches that are no pairs, are empty or too small (2, for CKA 4), pixels or features
            that are NaN or infinite, models without a row for each input, an unknown metric, and twins without a
            transformation.

    Example:
        >>> from torchgraft.vision.invariance_transfer import shape_objects
        >>> pairs = Transforms2D(shape_objects(5), "noise", ["brightness"], n_samples=64).twins()
        >>> invariance_score(lambda x: x.flatten(1), pairs) < 1
        True
    """
    return _streamed([model], twins, (metric,), layer, pool, batch_size, seed, device)[0][metric]


def text_twins(
    tokenizer: Callable[..., Any], texts: Sequence[str], changed: Sequence[str], batch_size: int = 64
) -> list[tuple[Any, Any]]:
    """Pairs of texts, tokenised in batches of nearly equal size, as twins for a text encoder.

    Args:
        tokenizer: of transformers.
        texts, changed: equally many; the second are the first with something changed that should not matter.
        batch_size: largest batch.

    Raises:
        ValueError: for lists of different length, or fewer than two texts.
    """
    if len(texts) != len(changed) or len(texts) < 2:
        raise ValueError(f"texts and changed must be equally long, at least 2, got {len(texts)} and {len(changed)}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")

    def tokens(part: list[str]) -> dict[str, Any]:
        return dict(tokenizer(part, padding=True, truncation=True, return_tensors="pt"))

    parts = [p.tolist() for p in torch.arange(len(texts)).tensor_split(-(-len(texts) // batch_size))]
    return [(tokens([texts[i] for i in part]), tokens([changed[i] for i in part])) for part in parts]


def invariance_matrix(
    models: Mapping[str, Model],
    transforms: Sequence[str | Transform],
    data: Transforms2D,
    metric: Metric = "l2",
    layer: str | None = None,
    *,
    pool: Pool = "auto",
    batch_size: int = 256,
    seed: int = 1,
    device: str | torch.device | None = None,
) -> DataFrame:
    """Scores of every model under every transformation alone, on the objects and backgrounds of a dataset.

    Args:
        models: by name.
        transforms: names or modules; each is applied alone.
        data: whose own transformations are left out.
        metric, layer, pool, batch_size, device: as in ``invariance_score``.
        seed: as in ``Transforms2D.twins``.

    Returns:
        A row for each model, a column for each transformation, named as given or by the module with its settings.

    Raises:
        TypeError, ValueError: for no models, an empty set of transformations or one that has the same twice, and as
            ``invariance_score``.

    Example:
        >>> from torchgraft.vision.invariance_transfer import shape_objects
        >>> data = Transforms2D(shape_objects(5), "noise", n_samples=64)
        >>> invariance_matrix({"pixels": lambda x: x.flatten(1)}, ["blur", "h_flip"], data).shape
        (1, 2)
    """
    from pandas import DataFrame

    if isinstance(transforms, str):
        raise TypeError(f"transforms must be a sequence of names or modules, use [{transforms!r}]")
    if not models or not transforms:
        raise ValueError(
            f"want models and a set of transformations that is not empty, got {len(models)} and {len(transforms)}"
        )
    names = [str(entry) for entry in transforms]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"the transformation {name} is there twice; every column needs a name of its own")
    columns = {}
    for entry in transforms:
        twins = data.replace(transforms=[entry]).twins(seed)
        found = _streamed(list(models.values()), twins, (metric,), layer, pool, batch_size, 0, device)
        columns[str(entry)] = [scores[metric] for scores in found]
    return DataFrame(columns, index=list(models))

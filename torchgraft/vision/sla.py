"""Self-supervised label augmentation of image classifiers (Lee, Hwang and Shin, ICML 2020).

Layout, everywhere in this module: a batch of B images under M transformations has its rows sample-major (row
``b * M + j`` is transformation ``j`` of image ``b``), and the N * M joint labels are class-major (class ``y`` under
transformation ``j`` is ``y * M + j``), as in the official code. Transformation 0 is the identity.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "LabelAugmentation",
    "Labels",
    "Mode",
    "SLAClassifier",
    "SLAHead",
    "SLALogits",
    "SLAResult",
    "aggregate_logits",
    "class_balanced_loss",
    "class_balanced_weights",
    "da_loss",
    "focal_loss",
    "joint_counts",
    "joint_labels",
    "ldam_loss",
    "mt_loss",
    "prototype_logits",
    "ridge_logits",
    "sla_loss",
    "slice_logits",
]

Transform = Callable[[Tensor], Tensor]
BaseLoss = Callable[[Tensor, Tensor], Tensor]
Labels = Int[Tensor, " B"] | Float[Tensor, "B N"]
Mode = Literal["sla", "sla+sd", "da", "mt"]


# --- transformations -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Named:
    """A quarter-turn rotation followed by an order of the channels."""

    turns: int = 0
    channels: tuple[int, ...] = (0, 1, 2)

    def __call__(self, x: Tensor) -> Tensor:
        if self.turns:
            x = torch.rot90(x, self.turns, (2, 3))
        return x if self.channels == (0, 1, 2) else torch.stack([x[:, c] for c in self.channels], 1)


_COLOURS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
_FAMILIES = {
    "rotation": tuple(_Named(turns=k) for k in range(4)),
    "rotation2": (_Named(), _Named(turns=2)),
    "color_perm": tuple(_Named(channels=c) for c in _COLOURS),
    "color_perm3": tuple(_Named(channels=_COLOURS[i]) for i in (0, 3, 4)),
}


def _by_name(names: str) -> tuple[_Named, ...]:
    parts = [part.strip() for part in names.split("*")]
    unknown = [part for part in parts if part not in _FAMILIES]
    if unknown:
        raise ValueError(
            f"transforms names {', '.join(map(repr, unknown))}; use {', '.join(map(repr, _FAMILIES))}, "
            "or a product such as 'rotation*color_perm3'"
        )
    kinds = [part.rstrip("23") for part in parts]
    if len(set(kinds)) < len(kinds):
        raise ValueError(
            f"transforms {names!r} repeats {kinds[0]!r}: the same image would carry two joint labels; "
            "use at most one rotation and one colour permutation"
        )
    found: tuple[_Named, ...] = (_Named(),)
    for part in parts:
        pairs = ((a, b) for a in found for b in _FAMILIES[part])
        found = tuple(
            _Named((a.turns + b.turns) % 4, b.channels if a.channels == (0, 1, 2) else a.channels) for a, b in pairs
        )
    return found


def _check_count(num_transforms: int, name: str = "num_transforms") -> None:
    if num_transforms < 1:
        raise ValueError(f"{name} must be at least 1 (the identity), got {num_transforms}")


def joint_labels(y: Labels, num_transforms: int) -> Int[Tensor, " R"] | Float[Tensor, "R K"]:
    """Joint labels of a batch: class ``y`` under transformation ``j`` is ``y * num_transforms + j``.

    Args:
        y: classes, shape (B,), or soft labels such as those of mixup, shape (B, N).
        num_transforms: M.

    Returns:
        Shape (B * M,), or (B * M, N * M) for soft labels, rows sample-major.

    Example:
        >>> joint_labels(torch.tensor([0, 2]), 3)
        tensor([0, 1, 2, 6, 7, 8])
    """
    _check_count(num_transforms)
    if y.ndim == 1 and not y.is_floating_point():
        return (y[:, None] * num_transforms + torch.arange(num_transforms, device=y.device)).flatten()
    if y.ndim == 2 and y.is_floating_point():
        own = torch.eye(num_transforms, device=y.device, dtype=y.dtype)
        return (y[:, None, :, None] * own[:, None, :]).flatten(0, 1).flatten(1)
    raise TypeError(
        f"y must be whole numbers of shape (B,) or soft labels of shape (B, N), got {y.dtype} of shape {tuple(y.shape)}"
    )


class LabelAugmentation(nn.Module):
    """Every image of a batch under M transformations, the first of which is the identity (section 3.1).

    Apply random cropping, flipping and colour jitter before, once per image; random vertical flips or random quarter
    turns there would destroy the label that rotation stands for.

    Args:
        transforms: ``"rotation"`` (0, 90, 180, 270 degrees), ``"rotation2"`` (0, 180), ``"color_perm"`` (the six orders
            of RGB), ``"color_perm3"`` (the three cyclic ones), a product such as ``"rotation*color_perm3"`` (left
            factor outer, right inner), or a sequence of functions of a batch that keep its shape, the identity first.

    Attributes:
        num_transforms: M.

    Raises:
        ValueError: for unknown or repeated names; when called with images that are not square (quarter turns) or not
            of three channels (colour), and when the first function changes images or one changes their shape.
        TypeError: for transforms that are neither names nor functions.

    Warns:
        UserWarning: at the first batch, when every image is grey and colours are permuted.

    Example:
        >>> augment = LabelAugmentation("rotation")
        >>> augment(torch.randn(2, 3, 8, 8)).shape, augment.joint_labels(torch.tensor([0, 1]))
        (torch.Size([8, 3, 8, 8]), tensor([0, 1, 2, 3, 4, 5, 6, 7]))
    """

    def __init__(self, transforms: str | Sequence[Transform]) -> None:
        super().__init__()
        self.name = transforms if isinstance(transforms, str) else None
        found: tuple[Transform, ...] = _by_name(transforms) if isinstance(transforms, str) else tuple(transforms)
        if not found:
            raise ValueError("transforms is empty; give the identity and at least one other function")
        odd = [t for t in found if not callable(t)]
        if odd:
            raise TypeError(
                f"transforms must be functions of a batch or one string of names, got {odd[0]!r} among them"
            )
        modules = [t for t in found if isinstance(t, nn.Module)]
        self.held = nn.ModuleList(modules)  # so that .to() reaches them
        self.transforms = found
        named = [t for t in found if isinstance(t, _Named)]
        self._turns = any(t.turns % 2 for t in named)
        self._colours = any(t.channels != (0, 1, 2) for t in named)
        self._looked = False

    @property
    def num_transforms(self) -> int:
        """M, the identity included."""
        return len(self.transforms)

    def joint_labels(self, y: Labels) -> Int[Tensor, " R"] | Float[Tensor, "R K"]:
        """As the function ``joint_labels``."""
        return joint_labels(y, self.num_transforms)

    def _look(self, x: Tensor) -> None:
        """What only the first batch is asked, because it waits for the device."""
        self._looked = True
        if self._colours and x.numel() and bool((x == x[:, :1]).all()):
            warnings.warn(
                "all images of this batch are grey: permuting their colours changes nothing, so the joint label cannot "
                "be learnt; use transforms='rotation'",
                stacklevel=3,
            )
        # all values differ, so any rearrangement shows
        probe = torch.linspace(0, 1, x[:1].numel(), dtype=torch.float64).view(1, *x.shape[1:]).to(x.device)
        probe = probe.to(x.dtype) if x.is_floating_point() else (probe * 255).to(x.dtype)
        if not torch.equal(self.transforms[0](probe), probe):
            raise ValueError("transforms[0] must be the identity, but it changes images; put lambda x: x first")

    def forward(self, x: Shaped[Tensor, "B C H W"]) -> Shaped[Tensor, "R C H W"]:
        """(B, C, H, W) to (B * M, C, H, W), rows sample-major."""
        if x.ndim != 4:
            raise ValueError(f"x must have shape (B, C, H, W), got {tuple(x.shape)}")
        if self._turns and x.shape[2] != x.shape[3]:
            raise ValueError(
                f"quarter turns need square images, got {x.shape[2]} x {x.shape[3]}; crop them or use 'rotation2'"
            )
        if self._colours and x.shape[1] != 3:
            raise ValueError(f"permuting colours needs 3 channels, got {x.shape[1]}; use 'rotation'")
        if not self._looked and not torch.compiler.is_compiling():
            self._look(x)
        views = [t(x) for t in self.transforms]
        for j, view in enumerate(views):
            if view.shape != x.shape:
                raise ValueError(f"transforms[{j}] turned shape {tuple(x.shape)} into {tuple(view.shape)}; keep it")
        return torch.stack(views, 1).flatten(0, 1)

    def extra_repr(self) -> str:
        """Names or number."""
        return repr(self.name) if self.name else f"{self.num_transforms} functions"


# --- reading joint logits --------------------------------------------------------------------------------------------


def _check_joint(joint: Tensor, num_transforms: int) -> tuple[int, int]:
    _check_count(num_transforms)
    if joint.ndim != 2:
        raise ValueError(f"joint must have shape (B * M, N * M), got {tuple(joint.shape)}")
    rows, columns = joint.shape
    if rows % num_transforms or columns % num_transforms or columns == 0:
        raise ValueError(
            f"joint of shape ({rows}, {columns}) does not divide by num_transforms={num_transforms}; "
            "it must have shape (B * M, N * M)"
        )
    return rows // num_transforms, columns // num_transforms


def slice_logits(joint: Float[Tensor, "R K"], num_transforms: int, transform: int = 0) -> Float[Tensor, "B N"]:
    """Logits over classes of the rows of one transformation, read in its own slice (SLA+SI for the identity).

    Args:
        joint: shape (B * M, N * M).
        num_transforms: M.
        transform: which of the M.

    Example:
        >>> slice_logits(torch.arange(16.0).view(4, 4), 2, 1)
        tensor([[ 5.,  7.],
                [13., 15.]])
    """
    _check_joint(joint, num_transforms)
    if not 0 <= transform < num_transforms:
        raise ValueError(f"transform must be in 0..{num_transforms - 1}, got {transform}")
    return joint[transform::num_transforms, transform::num_transforms]


def aggregate_logits(joint: Float[Tensor, "R K"], num_transforms: int) -> Float[Tensor, "B N"]:
    """Mean over the transformations of the logits in the matching slices, before any softmax (SLA+AG, section 3.2).

    Only ``joint[b * M + j, i * M + j]`` is read: what row ``j`` says about other transformations is left out.

    Args:
        joint: shape (B * M, N * M).
        num_transforms: M.
    """
    batch, classes = _check_joint(joint, num_transforms)
    blocks = joint.view(batch, num_transforms, classes, num_transforms)
    return blocks.diagonal(dim1=1, dim2=3).mean(-1)


# --- losses ----------------------------------------------------------------------------------------------------------


def _check_labels(y: Tensor, batch: int, classes: int) -> None:
    soft = y.is_floating_point()
    if y.shape != ((batch, classes) if soft else (batch,)):
        wanted = f"({batch}, {classes})" if soft else f"({batch},)"
        raise ValueError(f"y must have shape {wanted} for these logits, got {tuple(y.shape)}")
    # on an accelerator this would wait for the device, and the loss itself refuses such labels there
    if not soft and not torch.compiler.is_compiling() and y.device.type == "cpu" and y.numel():
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= classes:
            raise ValueError(f"y must lie in 0..{classes - 1}, got {low}..{high}; there is no ignore_index")


def sla_loss(
    joint: Float[Tensor, "R K"],
    single: Float[Tensor, "S N"] | None,
    y: Labels,
    num_transforms: int,
    T: float = 1.0,
    beta: float = 1.0,
    large: bool = False,
    base_loss: BaseLoss = F.cross_entropy,
    single_loss: BaseLoss = F.cross_entropy,
) -> Float[Tensor, ""]:
    """Loss of SLA, and with ``single`` that of SLA+SD (equations 3 and 5 of the paper).

    ``base_loss(joint, (y, j)) + T² KL(softmax(aggregate / T) || softmax(single / T)) + beta single_loss(single, y)``.
    The aggregate, being the teacher, gets no gradient.

    Args:
        joint: joint logits, shape (B * M, N * M).
        single: logits of the distilled head, shape (B * M, N), of which only the rows of the identity are used, or
            (B, N); ``None`` for SLA without distillation.
        y: classes (B,), or soft labels (B, N).
        num_transforms: M.
        T: temperature of the distillation.
        beta: weight of the classification loss of the distilled head (the official code has no such factor: 1).
        large: sum the joint loss over the transformations instead of averaging it.
        base_loss: ``(logits, joint labels) -> scalar``, see ``class_balanced_loss``, ``focal_loss``, ``ldam_loss``.
        single_loss: the same for the distilled head, on the N classes.

    Raises:
        ValueError: for shapes that do not fit together, labels outside 0..N-1, and T that is not positive.

    Example:
        >>> sla_loss(torch.zeros(8, 12), torch.zeros(8, 3), torch.tensor([0, 2]), 4).round(decimals=3)
        tensor(3.5840)
    """
    batch, classes = _check_joint(joint, num_transforms)
    _check_labels(y, batch, classes)
    if not T > 0:
        raise ValueError(f"T must be positive, got {T}")
    loss = base_loss(joint, joint_labels(y, num_transforms))
    if large:
        loss = loss * num_transforms
    if single is None:
        return loss
    if single.shape not in ((joint.shape[0], classes), (batch, classes)):
        raise ValueError(
            f"single must have shape ({joint.shape[0]}, {classes}) or ({batch}, {classes}), got {tuple(single.shape)}"
        )
    if single.shape[0] != batch:
        single = single[::num_transforms]
    teacher = (aggregate_logits(joint.detach(), num_transforms) / T).log_softmax(1)
    distilled = F.kl_div((single / T).log_softmax(1), teacher, reduction="batchmean", log_target=True)
    return loss + T**2 * distilled + beta * single_loss(single, y)


def da_loss(
    logits: Float[Tensor, "R N"], y: Labels, num_transforms: int, base_loss: BaseLoss = F.cross_entropy
) -> Float[Tensor, ""]:
    """Baseline: the transformations as plain data augmentation, every copy with the label of its image (equation 1).

    Args:
        logits: shape (B * M, N).
        y: classes (B,), or soft labels (B, N).
        num_transforms: M.
        base_loss: ``(logits, classes) -> scalar``.
    """
    _check_count(num_transforms)
    if logits.ndim != 2 or logits.shape[0] % num_transforms:
        raise ValueError(f"logits must have B * {num_transforms} rows, got shape {tuple(logits.shape)}")
    _check_labels(y, logits.shape[0] // num_transforms, logits.shape[1])
    return base_loss(logits, y.repeat_interleave(num_transforms, 0))


def mt_loss(
    logits: Float[Tensor, "R N"],
    pretext: Float[Tensor, "R M"],
    y: Labels,
    num_transforms: int,
    base_loss: BaseLoss = F.cross_entropy,
) -> Float[Tensor, ""]:
    """Baseline: two tasks, the class and the transformation, each with its own head (equation 2).

    Args:
        logits: of the classes, shape (B * M, N).
        pretext: of the transformations, shape (B * M, M).
        y: classes (B,), or soft labels (B, N).
        num_transforms: M.
        base_loss: ``(logits, classes) -> scalar``; the second task has cross-entropy.
    """
    loss = da_loss(logits, y, num_transforms, base_loss)
    if pretext.shape != (logits.shape[0], num_transforms):
        raise ValueError(f"pretext must have shape ({logits.shape[0]}, {num_transforms}), got {tuple(pretext.shape)}")
    which = torch.arange(num_transforms, device=logits.device).repeat(logits.shape[0] // num_transforms)
    return loss + F.cross_entropy(pretext, which)


# --- imbalanced classes ----------------------------------------------------------------------------------------------


def joint_counts(counts: Sequence[int] | Shaped[Tensor, " N"], num_transforms: int) -> Shaped[Tensor, " K"]:
    """Counts of the N * M joint labels: every class as often under each transformation as it is at all.

    Example:
        >>> joint_counts([50, 2], 3)
        tensor([50, 50, 50,  2,  2,  2])
    """
    _check_count(num_transforms)
    return _counts(counts, None).repeat_interleave(num_transforms)


def _counts(counts: Sequence[int] | Tensor, logits: Tensor | None) -> Tensor:
    found = torch.as_tensor(counts)
    if found.ndim != 1 or not bool((found > 0).all()):
        raise ValueError(f"counts must be one positive number per label, got {counts}")
    if logits is None:
        return found
    if len(found) != logits.shape[-1]:
        raise ValueError(
            f"counts has {len(found)} numbers, the logits have {logits.shape[-1]} labels; "
            "for joint logits pass joint_counts(counts, num_transforms)"
        )
    return found.to(logits.device)


def class_balanced_weights(counts: Sequence[int] | Shaped[Tensor, " N"], beta: float = 0.9999) -> Float[Tensor, " N"]:
    """Weights ``(1 - beta) / (1 - beta ** n)`` with mean 1 (Cui et al., CVPR 2019).

    Example:
        >>> class_balanced_weights([100, 1], beta=0.0)
        tensor([1., 1.])
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta must be in [0, 1), got {beta}")
    weights = (1 - beta) / (1 - beta ** _counts(counts, None).double())
    return (weights / weights.mean()).float()


def class_balanced_loss(
    logits: Float[Tensor, "R K"],
    target: Int[Tensor, " R"] | Float[Tensor, "R K"],
    counts: Sequence[int] | Shaped[Tensor, " K"],
    beta: float = 0.9999,
) -> Float[Tensor, ""]:
    """Cross-entropy with class-balanced weights; for SLA pass ``joint_counts``.

    Example:
        >>> from functools import partial
        >>> loss = partial(class_balanced_loss, counts=joint_counts([50, 2], 2))
        >>> sla_loss(torch.zeros(2, 4), None, torch.tensor([1]), 2, base_loss=loss).round(decimals=3)
        tensor(1.3860)
    """
    weights = class_balanced_weights(_counts(counts, logits), beta)
    return F.cross_entropy(logits, target, weight=weights.to(logits))


def _hard(target: Tensor) -> None:
    if target.is_floating_point():
        raise TypeError("target must be whole numbers here, got soft labels; use cross-entropy for those")


def focal_loss(
    logits: Float[Tensor, "R K"],
    target: Int[Tensor, " R"],
    gamma: float = 2.0,
    weight: Float[Tensor, " K"] | None = None,
) -> Float[Tensor, ""]:
    """Mean of ``-(1 - p) ** gamma log p`` of the right label (Lin et al., ICCV 2017), with optional label weights."""
    _hard(target)
    if not gamma >= 0:
        raise ValueError(f"gamma must not be negative, got {gamma}")
    log_p = logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]
    losses = -((-torch.expm1(log_p)).clamp(min=1e-12) ** gamma) * log_p
    return (losses if weight is None else losses * weight[target]).mean()


def ldam_loss(
    logits: Float[Tensor, "R K"],
    target: Int[Tensor, " R"],
    counts: Sequence[int] | Shaped[Tensor, " K"],
    max_margin: float = 0.5,
    scale: float = 30.0,
    weight: Float[Tensor, " K"] | None = None,
) -> Float[Tensor, ""]:
    """Label-distribution-aware margins ``proportional to n ** -0.25`` (Cao et al., NeurIPS 2019).

    Args:
        logits: ``scale`` times cosines, which ``SLAHead(…, cosine=scale)`` gives. (LDAM's own code multiplies inside
            the loss; here the head does, so that aggregation and distillation see the same logits.)
        target: labels.
        counts: training examples of each label; for SLA pass ``joint_counts``.
        max_margin: margin, as a cosine, of the rarest label.
        scale: as that of the head.
        weight: label weights, for instance ``class_balanced_weights`` late in training (deferred re-weighting).
    """
    _hard(target)
    margins = _counts(counts, logits).to(logits) ** -0.25
    margins = margins * (scale * max_margin / margins.max())
    shift = torch.zeros_like(logits).scatter(-1, target[:, None], margins[target][:, None])
    return F.cross_entropy(logits - shift, target, weight=weight)


# --- few-shot episodes -----------------------------------------------------------------------------------------------


def _episode(support: Tensor, labels: Tensor, query: Tensor, num_classes: int) -> Tensor:
    if support.ndim != 2 or query.ndim != 2 or support.shape[1] != query.shape[1]:
        raise ValueError(
            f"support and query must be features (S, d) and (Q, d), got {tuple(support.shape)}, {tuple(query.shape)}"
        )
    if labels.shape != (len(support),):
        raise ValueError(f"labels must have shape ({len(support)},), got {tuple(labels.shape)}")
    member = F.one_hot(labels, num_classes).to(support.dtype)
    if bool((member.sum(0) == 0).any()):
        missing = (member.sum(0) == 0).nonzero()[0].item()
        raise ValueError(f"label {missing} of 0..{num_classes - 1} has no support example; an episode needs all")
    return member


def prototype_logits(
    support: Float[Tensor, "S d"], labels: Int[Tensor, " S"], query: Float[Tensor, "Q d"], num_classes: int
) -> Float[Tensor, "Q K"]:
    """Minus the squared distance of every query to the mean of each class (prototypical networks).

    An episode under SLA: transform support and query images, use the N * M joint labels and ``num_classes=N * M``;
    the result has shape (Q * M, N * M) and goes to ``sla_loss`` in training and ``aggregate_logits`` at test.

    Example:
        >>> support, query = torch.eye(2), torch.tensor([[1.0, 0.0]])
        >>> prototype_logits(support, torch.tensor([0, 1]), query, 2)
        tensor([[-0., -2.]])
    """
    member = _episode(support, labels, query, num_classes)
    prototypes = member.T @ support / member.sum(0)[:, None]
    return -(query[:, None] - prototypes).square().sum(-1)


def ridge_logits(
    support: Float[Tensor, "S d"],
    labels: Int[Tensor, " S"],
    query: Float[Tensor, "Q d"],
    num_classes: int,
    regularization: float = 50.0,
) -> Float[Tensor, "Q K"]:
    """Ridge regression on the support examples, differentiable, solved in its dual (MetaOptNet-RR, R2-D2).

    Arguments as in ``prototype_logits``. MetaOptNet's support-vector head is not here.
    """
    member = _episode(support, labels, query, num_classes)
    if not regularization > 0:
        raise ValueError(f"regularization must be positive, got {regularization}")
    gram = support @ support.T + regularization * torch.eye(len(support), dtype=support.dtype, device=support.device)
    return query @ (support.T @ torch.linalg.solve(gram, member))


# --- modules ---------------------------------------------------------------------------------------------------------


class SLALogits(NamedTuple):
    """What ``SLAHead`` returns: ``joint`` (B * M, N * M), and ``single`` (B * M, N) or None."""

    joint: Tensor
    single: Tensor | None


class SLAResult(NamedTuple):
    """What ``SLAClassifier`` returns over a backbone that is not from transformers: loss or None, and logits (B, N)."""

    loss: Tensor | None
    logits: Tensor


class _Cosine(nn.Linear):
    """``scale`` times the cosine of features and weights."""

    def __init__(self, in_features: int, out_features: int, scale: float) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.scale * F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))


def _linear(in_features: int, out_features: int, cosine: float | None) -> nn.Linear:
    if cosine is None:
        return nn.Linear(in_features, out_features)
    return _Cosine(in_features, out_features, cosine)


class SLAHead(nn.Module):
    """The joint classifier of SLA and the distilled one of SLA+SD.

    Weights of the official models map over by name: ``classifiers.0`` is ``joint``, ``classifiers.1`` is ``single``.

    Args:
        in_features: d.
        num_classes: N.
        num_transforms: M.
        distill: have the head ``single``.
        cosine: logits are this many times a cosine, without bias, as LDAM wants them; ``None`` for plain linear layers.

    Example:
        >>> head = SLAHead(16, num_classes=10, num_transforms=4)
        >>> joint, single = head(torch.randn(8, 16))
        >>> joint.shape, single.shape, head.aggregate(torch.randn(8, 16)).shape
        (torch.Size([8, 40]), torch.Size([8, 10]), torch.Size([2, 10]))
    """

    def __init__(
        self, in_features: int, num_classes: int, num_transforms: int, distill: bool = True, cosine: float | None = None
    ) -> None:
        super().__init__()
        _check_count(num_transforms)
        if in_features < 1 or num_classes < 1:
            raise ValueError(f"in_features and num_classes must be positive, got {in_features} and {num_classes}")
        if cosine is not None and not cosine > 0:
            raise ValueError(f"cosine must be a positive factor or None, got {cosine}")
        self.num_classes, self.num_transforms, self.cosine = num_classes, num_transforms, cosine
        self.joint = _linear(in_features, num_classes * num_transforms, cosine)
        self.single = _linear(in_features, num_classes, cosine) if distill else None

    def forward(self, z: Float[Tensor, "R d"]) -> SLALogits:
        """Features of transformed images, rows sample-major, to both logits."""
        return SLALogits(self.joint(z), None if self.single is None else self.single(z))

    def _weights(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Features, weights (N, M, d) and bias (N, M) whose products are the joint logits."""
        weight, bias = self.joint.weight, self.joint.bias
        if self.cosine is not None:
            z, weight = self.cosine * F.normalize(z, dim=-1), F.normalize(weight, dim=-1)
        shape = (self.num_classes, self.num_transforms)
        return z, weight.view(*shape, -1), None if bias is None else bias.view(shape)

    def aggregate(self, z: Float[Tensor, "R d"]) -> Float[Tensor, "B N"]:
        """``aggregate_logits`` of the joint logits, of which only the matching 1 in M are computed."""
        if z.shape[0] % self.num_transforms:
            raise ValueError(f"z has {z.shape[0]} rows, which is not a multiple of {self.num_transforms}")
        z, weight, bias = self._weights(z)
        s = torch.einsum("bmd,nmd->bn", z.unflatten(0, (-1, self.num_transforms)), weight) / self.num_transforms
        return s if bias is None else s + bias.mean(1)

    def slice(self, z: Float[Tensor, "B d"], transform: int = 0) -> Float[Tensor, "B N"]:
        """Logits over classes of images under one transformation (``z`` holds only those)."""
        if not 0 <= transform < self.num_transforms:
            raise ValueError(f"transform must be in 0..{self.num_transforms - 1}, got {transform}")
        z, weight, bias = self._weights(z)
        return F.linear(z, weight[:, transform], None if bias is None else bias[:, transform])


def _is_transformers(module: nn.Module) -> bool:
    package = sys.modules.get("transformers")
    return package is not None and isinstance(module, package.PreTrainedModel)


def _take_classifier(model: nn.Module, name: str | None) -> int | None:
    """Put the identity in place of the last linear layer of a transformers classifier; its width, or None."""
    labels = model.config.num_labels  # type: ignore[union-attr]
    if name is None:
        # the classifier of a bare encoder lies nowhere: look only into what its architecture calls a head
        tops = [n for n, _ in model.named_children() if any(w in n for w in ("classifier", "head", "fc", "score"))]
        found = [
            (n, m)
            for n, m in model.named_modules()
            if n.split(".")[0] in tops and isinstance(m, nn.Linear) and m.out_features == labels
        ]
        if not found and "Classification" in type(model).__name__:
            raise ValueError(
                f"no linear layer of {labels} outputs was found at the top of {type(model).__name__}; name its "
                "classifier, classifier='…'"
            )
        if not found:
            return None
        if len(found) > 1:
            raise ValueError(
                f"{type(model).__name__} has several classifiers ({', '.join(n for n, _ in found)}); "
                "name the one to replace, classifier='…'"
            )
        name, layer = found[0]
    else:
        try:
            named = model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"classifier {name!r} is not a module of {type(model).__name__}") from None
        if not isinstance(named, nn.Linear):
            raise ValueError(f"classifier {name!r} is a {type(named).__name__}; name an nn.Linear")
        layer = named
    path, _, last = name.rpartition(".")
    model.get_submodule(path)._modules[last] = nn.Identity()
    return layer.in_features


def _width(model: nn.Module) -> int | None:
    """Features of a network without classifier, where it says so."""
    if isinstance(width := getattr(model, "num_features", None), int):
        return width
    if _is_transformers(model):
        if channels := getattr(model, "channels", None):
            return int(channels[-1])
        sizes = getattr(model.config, "hidden_sizes", None)
        return int(sizes[-1]) if sizes else getattr(model.config, "hidden_size", None)
    return None


def _pooled(output: Any) -> Tensor:
    """Features (B, d) from whatever a backbone returned."""
    if not isinstance(output, Tensor):
        kinds = ("logits", "pooler_output", "feature_maps", "last_hidden_state")
        found = next((k for k in kinds if getattr(output, k, None) is not None), None)
        if found is None:
            raise TypeError(f"backbone must return features of shape (B, d), got {type(output).__name__}")
        output = getattr(output, found)
        if found == "feature_maps":
            output = output[-1]
        elif found == "last_hidden_state" and output.ndim == 3:
            output = output[:, 0]
    if output.ndim == 4:
        output = output.mean((2, 3))
    if output.ndim != 2:
        raise ValueError(f"backbone must return features of shape (B, d), got {tuple(output.shape)}")
    return output


class SLAClassifier(nn.Module):
    """A classifier trained with self-supervised label augmentation, around a network of yours.

    In training, ``forward(images, labels)`` transforms the batch inside (so copies of an image stay together under
    DataParallel) and returns the loss of ``mode`` beside (B, N) logits. In evaluation the loss is the plain
    cross-entropy of those logits, at the cost of inference. Logits come from the distilled head when there is one,
    else from the slice of the identity, or from all transformations with ``aggregate=True``.

    Args:
        backbone: a module from images to features (B, d); or a model of transformers: one for image classification,
            whose classifier is replaced in place by the identity, a bare encoder, or a backbone.
        num_classes: N.
        transforms: as in ``LabelAugmentation``.
        mode: ``"sla"``, ``"sla+sd"``, or the baselines ``"da"`` (plain augmentation) and ``"mt"`` (two tasks).
        in_features: d; read from ``backbone.num_features`` or the config where possible.
        classifier: name of the classifier inside a transformers model; found by itself if there is one.
        T, beta, large, base_loss, single_loss: as in ``sla_loss``; of these the baselines take ``base_loss`` alone,
            over N classes.
        aggregate: what ``forward`` returns logits of by default, as in ``predict``.
        cosine: as in ``SLAHead``.

    Returns:
        Of ``forward``: transformers' ``ImageClassifierOutput`` when the backbone is from there, so that ``Trainer``
        works unchanged, else ``SLAResult``.

    Raises:
        ValueError: for an unknown mode, a width or classifier that cannot be found, several classifiers.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> model = SLAClassifier(net, 10, "rotation", in_features=8)
        >>> loss, logits = model(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]))
        >>> model.eval().predict(torch.randn(4, 3, 8, 8), aggregate=True).shape
        torch.Size([4, 10])
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        transforms: str | Sequence[Transform] = "rotation",
        mode: Mode = "sla+sd",
        *,
        in_features: int | None = None,
        classifier: str | None = None,
        T: float = 1.0,
        beta: float = 1.0,
        large: bool = False,
        base_loss: BaseLoss = F.cross_entropy,
        single_loss: BaseLoss = F.cross_entropy,
        aggregate: bool = False,
        cosine: float | None = None,
    ) -> None:
        super().__init__()
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {', '.join(map(repr, get_args(Mode)))}, got {mode!r}")
        if not isinstance(backbone, nn.Module):
            raise TypeError(f"backbone must be a torch.nn.Module, got {type(backbone).__name__}")
        self.augment = LabelAugmentation(transforms)
        self.from_transformers = _is_transformers(backbone)
        found = _take_classifier(backbone, classifier) if self.from_transformers else None
        width = in_features or found or _width(backbone)
        if width is None:
            raise ValueError(
                f"how many features {type(backbone).__name__} returns is not known; pass in_features=d, or give it an "
                "attribute num_features"
            )
        self.backbone, self.mode, self.num_classes, self.aggregate = backbone, mode, num_classes, aggregate
        self.settings: dict[str, Any] = {"T": T, "beta": beta, "large": large}
        self.base_loss, self.single_loss, self.cosine = base_loss, single_loss, cosine
        m = self.augment.num_transforms
        self.head: nn.Module
        if mode in ("sla", "sla+sd"):
            self.head = SLAHead(width, num_classes, m, distill=mode == "sla+sd", cosine=cosine)
        else:
            self.head = _linear(width, num_classes, cosine)
        self.pretext = nn.Linear(width, m) if mode == "mt" else None
        like = next((p for p in backbone.parameters() if p.is_floating_point()), None)
        if like is not None:
            self.to(device=like.device, dtype=like.dtype)

    @property
    def config(self) -> Any:
        """The config of a transformers backbone, for ``Trainer``; None for others."""
        return getattr(self.backbone, "config", None)

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """As that of a transformers backbone, for ``Trainer``."""
        self.backbone.activation_checkpointing_enable(*args, **kwargs)  # type: ignore[operator]

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """The same under its name in older versions of transformers."""
        self.backbone.gradient_checkpointing_enable(*args, **kwargs)  # type: ignore[operator]

    def features(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B d"]:
        """Features of images as they are, without transformations."""
        return _pooled(self.backbone(x))

    def loss(self, x: Float[Tensor, "B C H W"], y: Labels) -> tuple[Float[Tensor, ""], Float[Tensor, "B N"]]:
        """The training loss of ``mode``, and the logits of the untransformed images from the same pass."""
        _check_labels(y, len(x), self.num_classes)
        m = self.augment.num_transforms
        z = self.features(self.augment(x))
        if isinstance(self.head, SLAHead):
            joint, single = self.head(z)
            loss = sla_loss(
                joint, single, y, m, **self.settings, base_loss=self.base_loss, single_loss=self.single_loss
            )
            if self.aggregate:
                return loss, aggregate_logits(joint, m)
            return loss, slice_logits(joint, m) if single is None else single[::m]
        logits = self.head(z)
        if self.pretext is None:
            loss = da_loss(logits, y, m, self.base_loss)
        else:
            loss = mt_loss(logits, self.pretext(z), y, m, self.base_loss)
        return loss, logits.unflatten(0, (-1, m)).mean(1) if self.aggregate else logits[::m]

    def predict(self, x: Float[Tensor, "B C H W"], aggregate: bool | None = None) -> Float[Tensor, "B N"]:
        """Logits over classes.

        Args:
            x: images.
            aggregate: average over the transformations, at the cost of M passes (SLA+AG; for the baselines the plain
                mean of their logits). Otherwise one pass: the distilled head (SLA+SD) or the identity's slice (SLA+SI).
                ``None`` takes what the classifier was made with.
        """
        if self.aggregate if aggregate is None else aggregate:
            z = self.features(self.augment(x))
            if isinstance(self.head, SLAHead):
                return self.head.aggregate(z)
            return self.head(z).unflatten(0, (-1, self.augment.num_transforms)).mean(1)
        z = self.features(x)
        if not isinstance(self.head, SLAHead):
            return self.head(z)
        return self.head.slice(z) if self.head.single is None else self.head.single(z)

    def forward(self, pixel_values: Float[Tensor, "B C H W"], labels: Labels | None = None) -> Any:
        """Loss (when labels are given) and logits; see the class."""
        loss = None
        if labels is not None and self.training:
            loss, logits = self.loss(pixel_values, labels)
        else:
            logits = self.predict(pixel_values)
            if labels is not None:
                _check_labels(labels, *logits.shape)
                loss = F.cross_entropy(logits, labels)
        if not self.from_transformers:
            return SLAResult(loss, logits)
        from transformers.modeling_outputs import ImageClassifierOutput

        return ImageClassifierOutput(loss=loss, logits=logits)

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Write ``model.safetensors`` and ``sla.json``, and the backbone's ``config.json`` if it is from transformers.

        Functions (own transforms, losses) are not written; give them again to ``from_pretrained``.
        """
        from safetensors.torch import save_model

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self, str(folder / "model.safetensors"))
        kept: dict[str, Any] = {
            "num_classes": self.num_classes,
            "transforms": self.augment.name,
            "mode": self.mode,
            **self.settings,
        }
        first = self.head.joint if isinstance(self.head, SLAHead) else self.head
        kept |= {"in_features": first.in_features, "aggregate": self.aggregate, "cosine": self.cosine}
        (folder / "sla.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        if self.from_transformers:
            self.config.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path, backbone: nn.Module | None = None, **changes: Any) -> SLAClassifier:
        """Read what ``save_pretrained`` wrote.

        Args:
            folder: where.
            backbone: an untrained backbone; not needed when it is a transformers model for image classification.
            changes: arguments of the constructor that were not written, such as own transforms.
        """
        from safetensors.torch import load_model

        folder = Path(folder)
        kept = json.loads((folder / "sla.json").read_text(encoding="utf-8")) | changes
        if kept["transforms"] is None:
            raise ValueError("this model was trained with functions as transforms; give them again, transforms=[…]")
        if backbone is None:
            if not (folder / "config.json").exists():
                raise ValueError("backbone is missing: only those from transformers can be rebuilt from the folder")
            from transformers import AutoConfig, AutoModelForImageClassification

            backbone = AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(folder))
        model = cls(backbone, **kept)
        load_model(model, str(folder / "model.safetensors"))
        return model

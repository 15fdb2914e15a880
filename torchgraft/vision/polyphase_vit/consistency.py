"""How far a classifier's answers depend on where the image stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from torchgraft.surgery import evaluating
from torchgraft.vision.rics import answers_of, shifted_window

__all__ = ["ShiftReport", "shift_consistency"]

Shift = tuple[int, int]


@dataclass(frozen=True)
class ShiftReport:
    """Answers to N images under S shifts.

    Attributes:
        shifts: (rows, columns) of each.
        logits: float (N, S, K).
        labels: int64 (N,), or ``None``.
    """

    shifts: tuple[Shift, ...]
    logits: Tensor
    labels: Tensor | None

    @property
    def predictions(self) -> Tensor:
        """Class of each image under each shift, int64 (N, S)."""
        return self.logits.argmax(-1)

    @property
    def consistency(self) -> float:
        """Share of pairs of different shifts under which an image is answered alike (the paper draws such pairs)."""
        counts = torch.nn.functional.one_hot(self.predictions, self.logits.shape[-1]).sum(1).double()
        S = len(self.shifts)
        return ((counts * (counts - 1)).sum(1) / (S * (S - 1))).mean().item()

    @property
    def unchanged(self) -> Tensor:
        """Whether an image is answered the same under all shifts, bool (N,)."""
        found = self.predictions
        return (found == found[:, :1]).all(1)

    @property
    def worst_case_consistency(self) -> float:
        """Share of images that are answered the same under all shifts."""
        return self.unchanged.double().mean().item()

    @property
    def right(self) -> Tensor:
        """Whether the answer is right, bool (N, S)."""
        if self.labels is None:
            raise ValueError("accuracy needs labels; give them to shift_consistency")
        return self.predictions == self.labels[:, None]

    @property
    def mean_accuracy(self) -> float:
        """Share of right answers over images and shifts."""
        return self.right.double().mean().item()

    @property
    def worst_case_accuracy(self) -> float:
        """Share of images that are answered right under every shift."""
        return self.right.all(1).double().mean().item()

    def accuracy(self, shift: Shift = (0, 0)) -> float:
        """Share of right answers under one shift."""
        if shift not in self.shifts:
            raise ValueError(f"shift {shift} was not measured; measured are {len(self.shifts)}, from {self.shifts[0]}")
        return self.right[:, self.shifts.index(shift)].double().mean().item()

    def per_shift_accuracy(self) -> dict[Shift, float]:
        """Share of right answers under each shift."""
        return dict(zip(self.shifts, self.right.double().mean(0).tolist(), strict=True))

    @property
    def logit_variance(self) -> float:
        """Variance of the true class's logit over shifts, averaged over images (the paper's stability of features)."""
        if self.labels is None:
            raise ValueError("logit_variance needs labels; give them to shift_consistency")
        true = self.logits.gather(2, self.labels[:, None, None].expand(-1, self.logits.shape[1], 1))
        return true.double().var(1, correction=0).mean().item()


def _logits(found: Any, images: int) -> Tensor:
    logits = found.get("logits") if isinstance(found, Mapping) else getattr(found, "logits", found)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        got = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(found).__name__
        got = f"a {got} of {', '.join(map(str, found))}" if isinstance(found, Mapping) else got
        raise ValueError(f"model must return logits (B, K), or an output that has them as .logits; got {got}")
    return answers_of(logits, images, None)


def _shift(shift: Any) -> Shift:
    if not isinstance(shift, Sequence) or len(shift) != 2 or not all(isinstance(v, int) for v in shift):
        raise ValueError(f"a shift must be a pair of whole numbers of pixels, got {shift!r}")
    return shift[0], shift[1]


def _check(images: Tensor, labels: Tensor | None) -> None:
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a tensor (N, C, H, W), got {type(images).__name__}")
    if images.ndim != 4 or not len(images):
        raise ValueError(f"images must have shape (N, C, H, W) with N >= 1, got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise TypeError(f"images must be floating point, as the model takes them, got {images.dtype}")
    if not bool(images.isfinite().all()):
        raise ValueError("images have NaN or infinite values")
    if labels is not None and (labels.shape != (len(images),) or labels.is_floating_point()):
        raise ValueError(f"labels must be whole numbers of shape ({len(images)},), got {tuple(labels.shape)}")


@torch.no_grad()
def shift_consistency(
    model: Callable[[Tensor], Any],
    images: Tensor,
    labels: Tensor | None = None,
    *,
    max_shift: int = 4,
    shifts: Sequence[Shift] | None = None,
    n_random: int | None = None,
    kind: Literal["cyclic", "realistic", "zero"] = "cyclic",
    batch_size: int = 64,
    seed: int = 0,
) -> ShiftReport:
    """Ask a classifier about shifted copies of images, in eval mode. They are moved as by ``translation_report``.

    Args:
        model: from images (B, C, H, W) to logits (B, K), or to an output that has ``.logits``; its mode is put back.
        images: (N, C, H, W), as the model takes them. ``realistic`` moves a window over them, so they must be larger
            than what the model takes by ``2 max_shift``.
        labels: (N,), for accuracies.
        max_shift: all shifts of at most so many pixels along each axis.
        shifts: these instead, as (rows, columns); cyclic only.
        n_random: so many of them, drawn without replacement; (0, 0) is always among them.
        kind: ``cyclic`` (what leaves at one side enters at the other), ``realistic`` (new content enters), ``zero``.
        batch_size: images a pass.
        seed: of ``n_random``.

    Raises:
        ValueError: for images or labels of a wrong shape, NaN, a model without logits, with a single one or with NaN,
            too few shifts or the same twice, labels that are no classes of the model, images that are too small.
        TypeError: for images that are not floating point.

    Example:
        >>> pooled = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 5))
        >>> report = shift_consistency(pooled, torch.rand(4, 3, 8, 8), max_shift=2)
        >>> len(report.shifts), report.logits.shape
        (25, torch.Size([4, 25, 5]))
    """
    _check(images, labels)
    if max_shift < 0:
        raise ValueError(f"max_shift must not be negative, got {max_shift}")
    if shifts is not None and (kind != "cyclic" or n_random is not None):
        raise ValueError("shifts go with kind='cyclic' and without n_random")
    every = [(dy, dx) for dy in range(-max_shift, max_shift + 1) for dx in range(-max_shift, max_shift + 1)]
    if kind not in ("cyclic", "realistic", "zero"):
        raise ValueError(f"kind must be 'cyclic', 'realistic' or 'zero', got {kind!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    chosen = every if shifts is None else [_shift(s) for s in shifts]
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"shifts has the same shift twice, which would agree with itself: {chosen}")
    if n_random is not None:
        others = [shift for shift in every if shift != (0, 0)]
        if not 1 <= n_random <= len(others) + 1:
            raise ValueError(f"n_random must lie in 1..{len(others) + 1} for max_shift {max_shift}, got {n_random}")
        order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed)).tolist()
        chosen = [(0, 0), *(others[i] for i in order[: n_random - 1])]
    if len(chosen) < 2:
        raise ValueError(f"consistency compares at least two shifts, got {chosen}")
    room = 2 * max_shift if kind == "realistic" else 0
    size = (images.shape[2] - room, images.shape[3] - room)
    if min(size) < 1:
        raise ValueError(f"images of {tuple(images.shape[2:])} leave no room for shifts of {max_shift} pixels")
    found = []
    with evaluating(model):
        for dy, dx in chosen:
            parts = shifted_window(images, dy, dx, size, kind).split(batch_size)
            found.append(torch.cat([_logits(model(x), len(x)) for x in parts]))
    logits = torch.stack(found, 1).float().cpu()
    if labels is not None:
        labels = labels.cpu()
        if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[-1]:
            raise ValueError(f"labels must lie in 0..{logits.shape[-1] - 1}, got {labels.min()}..{labels.max()}")
    return ShiftReport(tuple(chosen), logits, labels)

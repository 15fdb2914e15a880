"""How far a classifier's answers depend on where the image stands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from torchgraft.vision.rics import translation_report

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


def _logits(found: Any) -> Tensor:
    logits = getattr(found, "logits", found)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        got = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(found).__name__
        raise ValueError(f"model must return logits (B, K), or an output that has them as .logits; got {got}")
    return logits


def _check(images: Tensor, labels: Tensor | None) -> None:
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
    """Ask a classifier about shifted copies of images. Moving and batching are those of ``translation_report``.

    Args:
        model: from images (B, C, H, W) to logits (B, K), or to an output that has ``.logits``; put it in eval mode.
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
        ValueError: for images or labels of a wrong shape, NaN, a model without logits, too few shifts, labels that are
            no classes of the model, images that are too small.
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
    chosen = every if shifts is None else [(int(dy), int(dx)) for dy, dx in shifts]
    if n_random is not None:
        others = [shift for shift in every if shift != (0, 0)]
        if not 1 <= n_random <= len(others) + 1:
            raise ValueError(f"n_random must lie in 1..{len(others) + 1} for max_shift {max_shift}, got {n_random}")
        order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed)).tolist()
        chosen = [(0, 0), *(others[i] for i in order[: n_random - 1])]
    if len(chosen) < 2:
        raise ValueError(f"consistency compares at least two shifts, got {chosen}")
    kept: list[Tensor] = []

    def recorded(x: Tensor) -> Tensor:
        kept.append(_logits(model(x)))
        return kept[-1]

    if chosen is every:
        translation_report(recorded, images, max_shift=max_shift, kind=kind, batch_size=batch_size)
    else:
        room = max_shift if kind == "realistic" else 0
        height, width = images.shape[2] - 2 * room, images.shape[3] - 2 * room
        if min(height, width) < 1:
            raise ValueError(f"images of {tuple(images.shape[2:])} leave no room for shifts of {max_shift} pixels")
        for dy, dx in chosen:
            if kind == "realistic":
                part = images[..., room + dy : room + dy + height, room + dx : room + dx + width]
            else:
                part = images.roll((-dy, -dx), (2, 3))
            translation_report(recorded, part, max_shift=0, kind="cyclic", batch_size=batch_size)
    logits = torch.cat(kept).float().cpu().unflatten(0, (len(chosen), len(images))).transpose(0, 1)
    if labels is not None:
        labels = labels.cpu()
        if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[-1]:
            raise ValueError(f"labels must lie in 0..{logits.shape[-1] - 1}, got {labels.min()}..{labels.max()}")
    return ShiftReport(tuple(chosen), logits.contiguous(), labels)

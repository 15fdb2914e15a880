"""From the classes that a network knows to those of another task.

Dimensions: N examples, S source classes (the network's), K target classes, M source classes per target class.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


def _check_room(num_source: int, num_classes: int, per_class: int) -> None:
    if per_class < 1 or num_classes < 1:
        raise ValueError(f"num_classes and per_class must be at least 1, got {num_classes} and {per_class}")
    if num_classes * per_class > num_source:
        raise ValueError(
            f"{num_classes} target classes with {per_class} source classes each need {num_classes * per_class} source "
            f"classes, but the network has {num_source}; use a network of more classes, a smaller per_class, or a "
            "linear probe"
        )


def check_labels(y: Tensor, rows: int, num_classes: int) -> None:
    """Refuse labels that are not one whole number in 0..K-1 per row."""
    if y.shape != (rows,):
        raise ValueError(f"y must have shape ({rows},), one label per example, got {tuple(y.shape)}")
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise TypeError(f"y must be whole numbers, got {y.dtype}")
    if y.numel():
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= num_classes:
            raise ValueError(f"y must lie in 0..{num_classes - 1}, got {low}..{high}; renumber the labels")


def mapping_counts(logits: Float[Tensor, "N S"], y: Int[Tensor, " N"], num_classes: int) -> Int[Tensor, "S K"]:
    """How often an example of target class ``t`` has the top source class ``s``.

    Target classes without an example have a column of zeros. (The official ``get_dist_matrix`` has one column per
    distinct label instead, which is another matrix as soon as a class is absent.)

    Args:
        logits: of the source classes, shape (N, S).
        y: target classes, shape (N,).
        num_classes: K.

    Returns:
        Shape (S, K), int64.

    Example:
        >>> mapping_counts(torch.tensor([[0.0, 1.0], [0.0, 2.0], [3.0, 0.0]]), torch.tensor([0, 0, 1]), 2)
        tensor([[0, 1],
                [2, 0]])
    """
    check_labels(y, len(logits), num_classes)
    cells = logits.argmax(-1) * num_classes + y.to(logits.device)
    return torch.bincount(cells, minlength=logits.shape[-1] * num_classes).view(-1, num_classes)


def frequency_label_mapping(
    logits: Float[Tensor, "N S"] | Int[Tensor, "S K"],
    y: Int[Tensor, " N"] | None = None,
    num_classes: int | None = None,
    per_class: int = 1,
) -> Int[Tensor, " K"] | Int[Tensor, "K M"]:
    """Frequency label mapping (FLM): greedily the most frequent pair of a source and a target class.

    The largest count is taken, at ties the first in row-major order; its source class is then used up, and its target
    class too once it has ``per_class`` of them. This is not the assignment of the greatest total (Hungarian). Target
    classes that are absent or never agreed on get the lowest source classes left over.

    Equal to ``predictive_distribution_based_multi_label_mapping``, but sorts the counts that are not zero once instead
    of searching the whole matrix K * M times, and leaves the counts as they are.

    Args:
        logits: of the source classes, shape (N, S), with ``y`` and ``num_classes``; or counts (S, K) of whole numbers
            alone, as ``mapping_counts`` gives them.
        y: target classes, shape (N,).
        num_classes: K.
        per_class: M.

    Returns:
        Source class of each target class, int64: shape (K,), or (K, M), ascending in each row, when ``per_class > 1``.

    Raises:
        ValueError: when K * M exceeds S, for negative counts, and labels outside 0..K-1.

    Example:
        >>> frequency_label_mapping(torch.tensor([[5, 6], [0, 4], [1, 0]]))
        tensor([2, 0])
    """
    if logits.ndim != 2:
        raise ValueError(f"logits must have shape (N, S), or counts (S, K), got {tuple(logits.shape)}")
    if logits.is_floating_point():
        if y is None or num_classes is None:
            raise ValueError("logits need y and num_classes; counts are whole numbers and need neither")
        counts = mapping_counts(logits, y, num_classes)
    else:
        if y is not None or (num_classes is not None and num_classes != logits.shape[1]):
            raise ValueError("counts already hold y and num_classes; give them with logits only")
        counts = logits
        if bool((counts < 0).any()):
            raise ValueError(f"counts must not be negative, got {int(counts.min())}")
    num_source, classes = counts.shape
    _check_room(num_source, classes, per_class)
    counts = counts.cpu()
    # nonzero is row-major, so a stable sort keeps the first of equal counts first
    cells = counts.nonzero()
    order = counts[cells[:, 0], cells[:, 1]].argsort(descending=True, stable=True)
    chosen: list[list[int]] = [[] for _ in range(classes)]
    free = [True] * num_source
    left = classes * per_class
    for source, target in cells[order].tolist():
        if free[source] and len(chosen[target]) < per_class:
            chosen[target].append(source)
            free[source] = False
            left -= 1
            if not left:
                break
    # what remains are zeros: row-major order means the lowest free source for the lowest target that is not full
    rest = iter([source for source in range(num_source) if free[source]])
    for sources in chosen:
        sources.extend(next(rest) for _ in range(per_class - len(sources)))
    mapping = torch.tensor([sorted(sources) for sources in chosen], device=logits.device)
    return mapping[:, 0] if per_class == 1 else mapping


def random_label_mapping(
    num_source: int, num_classes: int, per_class: int = 1, generator: torch.Generator | None = None
) -> Int[Tensor, " K"] | Int[Tensor, "K M"]:
    """Random label mapping (RLM): distinct source classes, drawn once and fixed.

    Args:
        num_source: S.
        num_classes: K.
        per_class: M.
        generator: of random numbers; the global one by default.

    Example:
        >>> mapping = random_label_mapping(1000, 10, generator=torch.Generator().manual_seed(0))
        >>> len(set(mapping.tolist()))
        10
    """
    _check_room(num_source, num_classes, per_class)
    drawn = torch.randperm(num_source, generator=generator)[: num_classes * per_class]
    return drawn if per_class == 1 else drawn.view(num_classes, per_class).sort(1).values


def map_logits(logits: Float[Tensor, "N S"], mapping: Int[Tensor, " K"] | Int[Tensor, "K M"]) -> Float[Tensor, "N K"]:
    """Logits of the target classes: those of the mapped source classes, their mean where there are several.

    (The official code keeps all K * M columns beside each other; it only ever maps one.)

    Example:
        >>> map_logits(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0, 2], [1, 2]]))
        tensor([[2.5000, 3.0000]])
    """
    picked = logits[:, mapping]
    return picked if mapping.ndim == 1 else picked.mean(-1)


@dataclass(frozen=True)
class IterativeLabelMapping:
    """Iterative label mapping (ILM): frequency label mapping again at the start of epochs, with the current prompt.

    Args:
        interval: epochs between two mappings.
        running: count during the training pass of the epochs before instead of in a pass of its own, which saves that
            pass; the counts are then of a prompt that was still moving. The first mapping always has a pass of its own.

    Example:
        >>> ilm = IterativeLabelMapping(interval=2)
        >>> [ilm.due(epoch) for epoch in range(4)]
        [True, False, True, False]
    """

    interval: int = 1
    running: bool = False

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ValueError(f"interval must be at least 1 epoch, got {self.interval}")

    def due(self, epoch: int) -> bool:
        """Whether the mapping is made anew before this epoch (counted from 0)."""
        return epoch % self.interval == 0

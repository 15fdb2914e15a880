"""Editing a channel: scale components of what a head writes, or steer their activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from torchgraft.language._access import Access, edited
from torchgraft.language.talking_heads.weights import head_matrices, head_svd


class ChannelEdit:
    """Scale some singular components of what one head writes.

    As a context manager for the time of a block, or for good with ``apply_``, which changes the output projection of
    the head and so is saved with the model. Of ``W_OV = W_V W_O`` the component r is ``s_r u_r v_r^T``; in the
    projection alone it is ``W_O v_r v_r^T``, the part of what the head writes that lies along v_r: taking a share of
    that away changes this component and no other, since write directions are orthogonal.

    Section 4 of Merullo et al. (scale 0 removes a component, more than 1 strengthens it).

    Args:
        model: as in ``head_matrices``.
        writer: (layer, head).
        components: by their place, 0 is the strongest.
        scale: what they are multiplied by.

    Raises:
        TypeError: for a model of another kind.
        ValueError: for a head or component that there is not, or a scale that is not finite.

    Example:
        >>> from torchgraft.language.set_based_prompting import toy_model
        >>> model, tokenizer = toy_model()
        >>> with ChannelEdit(model, (0, 1), [0, 1], scale=0.0):
        ...     logits = model(**tokenizer("a b a", return_tensors="pt")).logits
    """

    def __init__(
        self, model: nn.Module, writer: tuple[int, int], components: Sequence[int], scale: float = 0.0
    ) -> None:
        self._access = Access(model)
        # unfolded: the edit is one of stored weights, and the mean that a later norm takes away is left as it is
        write = head_svd(head_matrices(model, fold=False), *writer).write
        if not components or not all(0 <= c < len(write) for c in components):
            raise ValueError(f"components must be some of 0..{len(write) - 1}, got {list(components)}")
        if len(set(components)) < len(components):
            raise ValueError(f"components must be different, got {list(components)}")
        if not torch.isfinite(torch.tensor(float(scale))):
            raise ValueError(f"scale must be finite, got {scale}")
        self.writer, self.components, self.scale = writer, tuple(components), float(scale)
        self._basis = write[list(components)]
        self._before: Tensor | None = None

    def _slice(self) -> tuple[Tensor, bool]:
        """The head's part of the stored projection as a view, and whether it is stored as (in, out)."""
        layer, head = self.writer
        module: Any = self._access.output_projection(layer)
        module = getattr(module, "base_layer", module)
        width = self._access.head_dim
        rows = slice(head * width, (head + 1) * width)
        transposed = type(module).__name__ == "Conv1D"
        weight: Tensor = module.weight.data
        return (weight[rows] if transposed else weight[:, rows]), transposed

    @torch.no_grad()
    def apply_(self) -> ChannelEdit:
        """Change the weights.

        Raises:
            RuntimeError: when it is applied already.
        """
        if self._before is not None:
            raise RuntimeError("this edit is applied already; undo it first")
        stored, transposed = self._slice()
        self._before = stored.clone()
        layer, head = self.writer
        o = self._access.head_weights(layer).o[head].to(self._basis)  # not what is stored, where an adapter adds to it
        change = (self.scale - 1) * (o @ self._basis.T) @ self._basis
        stored.copy_((stored.to(change) + (change if transposed else change.T)).to(stored))
        return self

    @torch.no_grad()
    def undo(self) -> None:
        """Put the very numbers back.

        Raises:
            RuntimeError: when it is not applied.
        """
        if self._before is None:
            raise RuntimeError("this edit is not applied")
        self._slice()[0].copy_(self._before)
        self._before = None

    def __enter__(self) -> ChannelEdit:
        return self.apply_()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.undo()


class SubspaceSteer:
    """Put the activation of a subspace of what a layer's attention writes where you want it, while the block lasts.

    At one position, the projection of the attention's output on the basis is taken away and ``coords`` are written in
    its place (intervention A of the paper). Where a subspace belongs to several heads of different layers, use one for
    each layer.

    Args:
        model: as in ``head_matrices``.
        layer: whose attention writes.
        basis: (k, D), rows; made orthonormal in their order.
        coords: (k,) or (B, k), along the orthonormal rows.
        position: of the tokens in each forward pass, mostly the last.

    Raises:
        TypeError: for a model of another kind.
        ValueError: for a missing layer, a basis of another width or of dependent rows, or coordinates of another shape.
    """

    def __init__(self, model: nn.Module, layer: int, basis: Tensor, coords: Tensor, position: int = -1) -> None:
        access = Access(model)
        access.layer(layer)
        if basis.dim() != 2 or basis.shape[1] != access.hidden_size:
            raise ValueError(f"basis must be (k, {access.hidden_size}), got {tuple(basis.shape)}")
        if int(torch.linalg.matrix_rank(basis.float())) < len(basis):
            raise ValueError(f"the {len(basis)} rows of basis must be independent")
        if coords.dim() not in (1, 2) or coords.shape[-1] != len(basis):
            raise ValueError(f"coords must be ({len(basis)},) or (B, {len(basis)}), got {tuple(coords.shape)}")
        q, r = torch.linalg.qr(basis.T.double())
        self.basis = (q * r.diagonal().sign()).T
        self.model, self.layer, self.coords, self.position = model, layer, coords, position
        self._context: Any = None

    def coordinates(self, written: Tensor) -> Tensor:
        """Coordinates (..., k) of what was written (..., D)."""
        return written @ self.basis.T.to(written)

    def _edit(self, hidden: Tensor) -> Tensor:
        basis = self.basis.to(hidden)
        there = hidden[:, self.position]
        moved = there + (self.coords.to(hidden) - there @ basis.T) @ basis
        new = hidden.clone()
        new[:, self.position] = moved
        return new

    def __enter__(self) -> SubspaceSteer:
        self._context = edited(self.model, {self.layer: self._edit}, "attention")
        self._context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)


def search_coords(score: Callable[[Tensor], float], grid: Tensor) -> tuple[Tensor, float]:
    """The row of ``grid`` (n, k) with the greatest score, and that score; choose on training prompts, judge on others.

    Raises:
        ValueError: for an empty grid, or scores that are not numbers.
    """
    if grid.dim() != 2 or not len(grid):
        raise ValueError(f"grid must be (n, k) with at least one row, got {tuple(grid.shape)}")
    found = torch.tensor([float(score(row)) for row in grid])
    if found.isnan().any():
        raise ValueError("score gave nan")
    best = int(found.argmax())
    return grid[best], found[best].item()

"""Editing a channel: scale components of what a head writes, or steer their activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from numbers import Integral
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from torchgraft.language._access import Access, edited
from torchgraft.language.talking_heads.weights import added_gain, check_head, head_svd, layer_matrices


class ChannelEdit:
    """Scale some singular components of what one head writes.

    As a context manager for the time of a block, or for good with ``apply_``, which changes the output projection of
    the head and so is saved with the model. Components are those of ``head_svd`` and ``composition_scores``, norms
    folded in: of ``W_OV = W_V W_O`` the component r is ``s_r u_r v_r^T``; in the projection alone it is
    ``W_O v_r v_r^T``, the part of what the head writes that lies along v_r: taking a share of that away changes this
    component and no other, since write directions are orthogonal.

    Section 4 of Merullo et al. (scale 0 removes a component, more than 1 strengthens it).

    Args:
        model: as in ``head_matrices``.
        writer: (layer, head).
        components: by their place, 0 is the strongest.
        scale: what they are multiplied by.

    Raises:
        TypeError: for a model of another kind, or one whose output projection is quantized, or components that are not
            whole numbers.
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
        write = head_svd(model, *writer).write
        components = list(components)
        if not all(isinstance(c, Integral) and not isinstance(c, bool) for c in components):
            raise TypeError(f"components must be whole numbers, got {components}")
        if not components or not all(0 <= c < len(write) for c in components):
            raise ValueError(f"components must be some of 0..{len(write) - 1}, got {components}")
        if len(set(components)) < len(components):
            raise ValueError(f"components must be different, got {components}")
        if not torch.isfinite(torch.tensor(float(scale))):
            raise ValueError(f"scale must be finite, got {scale}")
        self.writer, self.components, self.scale = writer, tuple(components), float(scale)
        self._basis = write[components]
        self._stored: tuple[Tensor, Tensor] | None = None

    def _slice(self) -> tuple[Tensor, bool]:
        """The head's part of the stored projection as a view, and whether it is stored as (in, out)."""
        layer, head = self.writer
        module: Any = self._access.output_projection(layer)
        module = getattr(module, "base_layer", module)
        width = self._access.head_dim
        rows = slice(head * width, (head + 1) * width)
        transposed = type(module).__name__ == "Conv1D"
        weight: Tensor = module.weight.data
        if not weight.is_floating_point():
            raise TypeError(f"the output projection must hold floating-point weights, got {weight.dtype}")
        return (weight[rows] if transposed else weight[:, rows]), transposed

    @torch.no_grad()
    def apply_(self) -> ChannelEdit:
        """Change the weights.

        Raises:
            RuntimeError: when it is applied already.
        """
        if self._stored is not None:
            raise RuntimeError("this edit is applied already; undo it first")
        stored, transposed = self._slice()
        before = stored.clone()
        layer, head = self.writer
        o = layer_matrices(self._access, layer)[3][head].to(self._basis)
        change = (self.scale - 1) * (o @ self._basis.T) @ self._basis
        gain = added_gain(self._access, layer)
        if gain is not None:
            # where a gain of 0 lets nothing pass, nothing is to be changed
            change = torch.where(gain == 0, 0.0, change / gain.to(change))
        stored.copy_((stored.to(change) + (change if transposed else change.T)).to(stored))
        self._stored = before, stored.clone()
        return self

    @torch.no_grad()
    def undo(self) -> None:
        """Put the very numbers back.

        Raises:
            RuntimeError: when it is not applied, or when the head's weights were changed since, by another edit that
                is still applied or by training.
        """
        if self._stored is None:
            raise RuntimeError("this edit is not applied")
        before, after = self._stored
        stored = self._slice()[0]
        if not torch.equal(stored, after.to(stored)):
            raise RuntimeError("the weights of this head were changed since; undo later edits of it first")
        stored.copy_(before)
        self._stored = None

    def __enter__(self) -> ChannelEdit:
        return self.apply_()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.undo()


class SubspaceSteer:
    """Put the activation of a subspace of what attention writes where you want it, while the block lasts.

    At one position, the projection of what is written on the basis is taken away and ``coords`` are written in its
    place (intervention A of the paper). For a subspace that belongs to several heads use one for each of them. In
    Gemma 2 and 3 what one head writes is met before the norm that what the attention adds passes.

    Args:
        model: as in ``head_matrices``.
        layer: whose attention writes.
        basis: (k, D), rows; made orthonormal in their order.
        coords: (k,) or (B, k), along the orthonormal rows.
        position: of the tokens in each forward pass, mostly the last. With a cache of keys and values each new token
            is a pass of its own.
        head: steer what this head writes; by default what all heads of the layer write together.

    Raises:
        TypeError: for a model of another kind.
        ValueError: for a missing layer or head, a basis of another width or of dependent rows, or coordinates of
            another shape; inside, for a position that there is not, or coordinates for another number of rows.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: int,
        basis: Tensor,
        coords: Tensor,
        position: int = -1,
        *,
        head: int | None = None,
    ) -> None:
        access = Access(model)
        access.layer(layer)
        if head is not None:
            check_head(len(access.layers), access.heads, layer % len(access.layers), head)
        if basis.dim() != 2 or basis.shape[1] != access.hidden_size:
            raise ValueError(f"basis must be (k, {access.hidden_size}), got {tuple(basis.shape)}")
        if not (basis.isfinite().all() and coords.isfinite().all()):
            raise ValueError("basis and coords must be finite")
        if int(torch.linalg.matrix_rank(basis.float())) < len(basis):
            raise ValueError(f"the {len(basis)} rows of basis must be independent")
        if coords.dim() not in (1, 2) or coords.shape[-1] != len(basis):
            raise ValueError(f"coords must be ({len(basis)},) or (B, {len(basis)}), got {tuple(coords.shape)}")
        q, r = torch.linalg.qr(basis.T.double())
        self.basis = (q * r.diagonal().sign()).T
        self.model, self.layer, self.coords, self.position, self.head = model, layer, coords, position, head
        self._context: Any = None

    def coordinates(self, written: Tensor) -> Tensor:
        """Coordinates (..., k) of what was written (..., D)."""
        return written @ self.basis.T.to(written)

    def _edit(self, hidden: Tensor, written: Tensor) -> Tensor:
        """``hidden`` (B, T, D) with the coordinates of ``written``, which is a part of it, replaced."""
        if not -hidden.shape[1] <= self.position < hidden.shape[1]:
            raise ValueError(f"position must be within {hidden.shape[1]} tokens, got {self.position}")
        if self.coords.dim() == 2 and len(self.coords) != len(hidden):
            raise ValueError(f"coords are for {len(self.coords)} rows, got {len(hidden)}")
        change = self.coords.to(hidden) - self.coordinates(written[:, self.position])
        new = hidden.clone()
        new[:, self.position] = hidden[:, self.position] + change @ self.basis.to(hidden)
        return new

    def __enter__(self) -> SubspaceSteer:
        if self._context is not None:
            raise RuntimeError("this steering is at work already")
        if self.head is None:
            context: Any = edited(self.model, {self.layer: lambda hidden: self._edit(hidden, hidden)}, "attention")
        else:
            context = self._steered_head(self.head)
        context.__enter__()
        self._context = context
        return self

    def __exit__(self, *error: Any) -> None:
        context, self._context = self._context, None
        context.__exit__(*error)

    @contextmanager
    def _steered_head(self, head: int) -> Iterator[None]:
        access = Access(self.model)

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return self._edit(output, _written_by(access, self.layer, head, args[0]))

        handle = access.output_projection(self.layer).register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()


def _written_by(access: Access, layer: int, head: int, mixed: Tensor) -> Tensor:
    """What one head writes (B, T, D), from what enters the output projection."""
    width = access.head_dim
    return mixed[..., head * width : (head + 1) * width] @ access.head_weights(layer).o[head].to(mixed)


@torch.no_grad()
def channel_activations(
    model: nn.Module, channels: Sequence[tuple[int, int, int]], position: int = -1, **inputs: Any
) -> Tensor:
    """How strongly components of what heads write are active at one position, (B, channels).

    ``o_h . v_r``: what head h writes there, along the write direction of its component r. The paper's inhibition
    subspace is where these of its four heads lie; two components of one writer, put in with ``SubspaceSteer``, are an
    activation patch.

    Args:
        model: as in ``head_matrices``.
        channels: (layer, head, component) of each.
        position: of the tokens, without padding there.
        inputs: of the model.

    Raises:
        TypeError: for a model of another kind.
        ValueError: for no channels, or a head, component or position that there is not.

    Example:
        >>> from torchgraft.language.set_based_prompting import toy_model
        >>> model, tokenizer = toy_model()
        >>> inputs = tokenizer(["a b a", "b a b"], return_tensors="pt")
        >>> channel_activations(model, [(0, 1, 0), (1, 0, 3)], **inputs).shape
        torch.Size([2, 2])
    """
    access = Access(model)
    if not channels:
        raise ValueError("channels must be at least one (layer, head, component)")
    directions = []
    for layer, head, component in channels:
        write = head_svd(model, layer, head).write
        if not 0 <= component < len(write):
            raise ValueError(f"component must be 0..{len(write) - 1}, got {component}")
        directions.append(write[component])
    mixed: dict[int, Tensor] = {}
    with ExitStack() as hooks:
        for layer in {layer for layer, _, _ in channels}:

            def keep(module: nn.Module, args: tuple[Tensor, ...], layer: int = layer) -> None:
                mixed[layer] = args[0]

            hooks.callback(access.output_projection(layer).register_forward_pre_hook(keep).remove)
        model(**inputs)
    found = []
    for (layer, head, _), direction in zip(channels, directions, strict=True):
        length = mixed[layer].shape[1]
        if not -length <= position < length:
            raise ValueError(f"position must be within {length} tokens, got {position}")
        wrote = _written_by(access, layer, head, mixed[layer][:, [position]])[:, 0]
        gain = added_gain(access, layer)
        found.append((wrote if gain is None else wrote * gain.to(wrote)).to(direction) @ direction)
    return torch.stack(found, 1)


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

"""Steering: a vector added to the residual stream while the model runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from torchgraft.language._access import Access, Edit, edited
from torchgraft.language.representation_engineering.vectors import ReadingVectors


@contextmanager
def steer(
    model: nn.Module,
    vectors: ReadingVectors,
    coefficient: float | Tensor,
    layers: Sequence[int] | None = None,
    *,
    positions: Literal["all", "last"] = "all",
    normalize: bool = False,
) -> Iterator[None]:
    """Add ``coefficient * vector`` to outputs of layers, in forward passes and in ``generate``, until the block ends.

    Wolf et al., "Tradeoffs Between Alignment and Helpfulness in Language Models with Steering Methods", section 3,
    after Zou et al., "Representation Engineering". Hooks go at the end, also after an exception. Padded places get the
    vector too; attention does not look at them. Blocks nest: what they add, adds up.

    Args:
        model: see ``ReadingVectors.from_pairs``.
        vectors: of this model.
        coefficient: r, of either sign; 0 leaves every bit as it is. Comparable within a model only: relate it to the
            norm of its residual stream (``residual_norm``). A tensor (B,) steers each row of a batch by its own.
        layers: those to steer, negative ones counted from the end; all that have a vector where None. Steering more
            layers at once steers harder.
        positions: ``all`` tokens, as in the paper, or the ``last`` of each forward pass, so the last of the prompt and
            every generated one; for that, batches must be padded on the left.
        normalize: bring each state back to the norm that it had.

    Raises:
        TypeError: for a model of another kind.
        ValueError: for vectors of another model or width, layers without a vector, a coefficient that is not finite
            or not one for each row, or unknown ``positions``.

    Example:
        >>> with steer(model, vectors, 8.0):  # doctest: +SKIP
        ...     tokens = model.generate(**tokenizer("I think that", return_tensors="pt"))
    """
    vectors.check(model)
    access = Access(model)
    for layer in layers or ():
        access.layer(layer)
    chosen = vectors.layers if layers is None else [layer % len(access.layers) for layer in layers]
    absent = sorted(set(chosen) - set(vectors.layers))
    if absent or not chosen:
        raise ValueError(f"layers must be among those with a vector, {list(vectors.layers)}, got {list(layers or [])}")
    r = torch.as_tensor(coefficient, dtype=torch.float32, device="cpu")
    if r.dim() > 1 or not torch.isfinite(r).all():
        raise ValueError(f"coefficient must be a finite number or one for each row of the batch, got {coefficient!r}")
    if positions not in ("all", "last"):
        raise ValueError(f"positions must be 'all' or 'last', got {positions!r}")

    def edit_of(layer: int) -> Edit:
        # (1, 1, D), or (B, 1, D) with a coefficient for each row; moved to the model's device and dtype once
        added = r.reshape(-1, 1, 1) * vectors.directions[layer].cpu()

        def edit(hidden: Tensor) -> Tensor:
            nonlocal added
            if r.dim() and len(r) != len(hidden):
                raise ValueError(f"coefficient must be one for each of {len(hidden)} rows, got {len(r)}")
            added = added.to(hidden)
            if positions == "last":
                new = torch.cat([hidden[:, :-1], hidden[:, -1:] + added], 1)
            else:
                new = hidden + added
            if normalize:
                after = new.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(new.dtype).tiny)
                new = new * (hidden.norm(dim=-1, keepdim=True) / after)
            return new

        return edit

    with edited(model, {layer: edit_of(layer) for layer in chosen}):
        yield

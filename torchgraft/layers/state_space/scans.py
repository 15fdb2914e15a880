"""Ways to use a causal layer where there is no single direction: both ways, over images, over both strands of DNA.

Legend: B batch, L length, D features, R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from torchgraft.layers.state_space.linear import DiagonalKernel, Init, full
from torchgraft.layers.state_space.mixer import SequenceMixer, State
from torchgraft.ops._precision import autocast_off
from torchgraft.ops.long_convolution import long_convolution

__all__ = ["S4ND", "Bidirectional", "ReverseComplement", "Scan2d"]

Make = Callable[[], SequenceMixer]


class Bidirectional(SequenceMixer):
    """One layer forwards and another backwards, added, as in Vim (Zhu et al., 2024, arXiv 2401.09417).

    Args:
        make: makes a causal layer.

    Example:
        >>> from torchgraft.layers.state_space.mamba import Mamba
        >>> y, _ = Bidirectional(lambda: Mamba(8))(torch.randn(2, 100, 8))
    """

    def __init__(self, make: Make) -> None:
        forwards, backwards = make(), make()
        super().__init__(forwards.d_model, causal=False, max_length=forwards.max_length)
        self.forwards, self.backwards = forwards, backwards

    def _mix(
        self, x: Tensor, state: State | None, lengths: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        mask = None if lengths is None else torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        there, _ = self.forwards(x, mask=mask, return_state=False)
        back, _ = self.backwards(x.flip(1), mask=None if mask is None else mask.flip(1), return_state=False)
        return there + back.flip(1), None


class Scan2d(nn.Module):
    """Causal layers over the places of an image in 1, 2 or 4 orders, added (VMamba's cross-scan, arXiv 2401.10166).

    Orders: rows; rows backwards; columns; columns backwards. Each has a layer of its own.

    Args:
        make: makes a causal layer.
        directions: 1, 2 or 4.

    Raises:
        ValueError: for another number of directions, or inputs of another shape than (B, R, C, D).

    Example:
        >>> from torchgraft.layers.state_space.linear import S4D
        >>> Scan2d(lambda: S4D(8, 16), directions=4)(torch.randn(2, 7, 5, 8)).shape
        torch.Size([2, 7, 5, 8])
    """

    def __init__(self, make: Make, directions: int = 4) -> None:
        super().__init__()
        if directions not in (1, 2, 4):
            raise ValueError(f"directions must be 1, 2 or 4, got {directions}")
        self.layers = nn.ModuleList(make() for _ in range(directions))

    def forward(self, x: Float[Tensor, "B R C D"]) -> Float[Tensor, "B R C D"]:
        """Images of features to the same."""
        if x.ndim != 4:
            raise ValueError(f"x must have shape (batch, rows, columns, features), got {tuple(x.shape)}")
        batch, rows, columns, _ = x.shape
        total = torch.zeros_like(x)
        for i, layer in enumerate(self.layers):
            sequence = (x if i < 2 else x.transpose(1, 2)).flatten(1, 2)
            sequence = sequence.flip(1) if i % 2 else sequence
            y, _ = layer(sequence, return_state=False)
            y = y.flip(1) if i % 2 else y
            total = total + (
                y.view(batch, rows, columns, -1) if i < 2 else y.view(batch, columns, rows, -1).transpose(1, 2)
            )
        return total


class ReverseComplement(SequenceMixer):
    """A layer that commutes with reading the other strand of DNA (Caduceus, Schiff et al., 2024, arXiv 2403.03234).

    Half of the features go through the layer as they are, the other half reversed in place and order, through the same
    weights. Reversing the input along length and features reverses the output likewise.

    Args:
        layer: of half the width; causal or not.

    Example:
        >>> from torchgraft.layers.state_space.linear import S4D
        >>> layer = ReverseComplement(S4D(4, 8)).eval()
        >>> x = torch.randn(1, 20, 8)
        >>> torch.allclose(layer(x.flip(1, 2))[0], layer(x)[0].flip(1, 2), atol=1e-5)
        True
    """

    def __init__(self, layer: SequenceMixer) -> None:
        super().__init__(2 * layer.d_model, causal=False, max_length=layer.max_length)
        self.layer = layer

    def _mix(
        self, x: Tensor, state: State | None, lengths: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        mask = None if lengths is None else torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        first, second = x.chunk(2, -1)
        y, _ = self.layer(first, mask=mask, return_state=False)
        other, _ = self.layer(
            second.flip(1, 2), mask=None if mask is None else mask.flip(1), return_state=False
        )  # fmt: skip
        return torch.cat([y, other.flip(1, 2)], -1), None


class S4ND(nn.Module):
    """S4ND (Nguyen et al., 2022, arXiv 2210.06583): a state space along every axis, its kernel the product of theirs.

    A product of kernels is one convolution after another, so no transform over several axes is needed. Both ways along
    each axis, as in the official code, whose backward kernel begins at the next place.

    Args:
        d_model: features.
        axes: axes between batch and features.
        d_state: states of each axis, even.
        bandlimit: silences states that turn faster than this share of the sampling frequency, so that a model can be
            shown another resolution (with step sizes scaled by the user).
        init: eigenvalues to begin with.

    Raises:
        ValueError: for inputs with another number of axes.

    Example:
        >>> S4ND(8, axes=2, d_state=8)(torch.randn(2, 7, 5, 8)).shape
        torch.Size([2, 7, 5, 8])
    """

    def __init__(
        self, d_model: int, axes: int = 2, d_state: int = 64, *, bandlimit: float | None = None, init: Init = "lin"
    ) -> None:
        super().__init__()
        if axes < 1:
            raise ValueError(f"axes must be at least 1, got {axes}")
        self.kernels = nn.ModuleList(
            DiagonalKernel(d_model, d_state, init=init, bidirectional=True, bandlimit=bandlimit) for _ in range(axes)
        )
        self.D = nn.Parameter(torch.randn(d_model))
        self.output_linear = nn.Linear(d_model, 2 * d_model)

    def kernel(self, sizes: tuple[int, ...]) -> list[Tensor]:
        """Centred taps of each axis, (H, 2 size - 1)."""
        found = []
        for module, size in zip(self.kernels, sizes, strict=True):
            taps = module(size)
            found.append(torch.cat([taps[1].flip(-1)[:, 1:], taps[0]], -1))
        return found

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., D) to the same."""
        if x.ndim != len(self.kernels) + 2:
            raise ValueError(f"x must have {len(self.kernels)} axes between batch and features, got {tuple(x.shape)}")
        y = full(x)
        with autocast_off(x):
            for axis, taps in enumerate(self.kernel(tuple(x.shape[1:-1])), start=1):
                moved = y.movedim(axis, -2)
                rows = long_convolution(moved.flatten(0, -3), taps, bidirectional=True)
                y = rows.view(moved.shape).movedim(-2, axis)
        y = nn.functional.gelu(y.to(x.dtype) + x * self.D)
        return nn.functional.glu(self.output_linear(y), -1)

"""What every layer of the family shares: the interface, padding, states, short convolutions.

Legend: B batch, L length, D features of the model.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["SequenceMixer", "State"]

State = dict[str, Tensor]


class SequenceMixer(nn.Module):
    """A layer from sequences to sequences of the same shape, (B, L, D) to (B, L, D).

    ``forward`` takes a whole sequence, or the next piece of one with the state of the pieces before; ``step`` takes one
    place. Cut anywhere, the outputs are those of the whole.

    Attributes:
        d_model: D.
        causal: whether outputs depend on the past alone; only then there is a state.
        max_length: the longest sequence, pieces together, or ``None`` for any.
        has_residual: the layer brings its own norm and residual connection; a block must not add them.
        dynamics: names of parameters that set eigenvalues and step sizes, for ``ssm_optim_groups``.
    """

    has_residual: ClassVar[bool] = False
    dynamics: ClassVar[tuple[str, ...]] = ()
    # states whose second axis is as long as the past
    growing: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, d_model: int, *, causal: bool = True, max_length: int | None = None) -> None:
        super().__init__()
        if d_model < 1:
            raise ValueError(f"d_model must be at least 1, got {d_model}")
        self.d_model, self.causal, self.max_length = d_model, causal, max_length

    def _empty(self, batch: int, device: torch.device | None, dtype: torch.dtype) -> State:
        """The state before the first place; ``dtype`` is that of the inputs."""
        raise NotImplementedError

    def _mix(
        self, x: Tensor, state: State | None, lengths: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        """Outputs and state. ``lengths``: true length of each row; zeros stand behind it, outputs there are ignored."""
        raise NotImplementedError

    def _step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        y, new = self._mix(x[:, None], state, None, True)
        assert new is not None
        return y[:, 0], new

    def initial_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> State:
        """State before the first place.

        Args:
            batch_size: B.
            device: where it lives; that of the parameters without it.
            dtype: of the inputs to come. Recurrent states are kept in float32 at least.

        Raises:
            ValueError: for a layer that looks into the future, which has no state.
        """
        self._check_causal("initial_state")
        where = next(self.parameters()).device if device is None else torch.device(device)
        return self._empty(batch_size, where, dtype)

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        state: State | None = None,
        mask: Bool[Tensor, "B L"] | None = None,
        *,
        return_state: bool = True,
    ) -> tuple[Float[Tensor, "B L D"], State | None]:
        """A whole sequence, or the next piece of one.

        Args:
            x: inputs.
            state: what an earlier call returned, to go on from there.
            mask: True where there is data. Other places leave no trace, wherever they stand: each row gives what its
                true places alone would give, and zero elsewhere.
            return_state: without it the second result is ``None`` and costs nothing.

        Returns:
            Outputs, and the state behind the last true place (``None`` for a layer that looks into the future).

        Raises:
            ValueError: for shapes that do not fit, length zero, a length over ``max_length``, a state for a layer that
                looks into the future.
            TypeError: for tensors of the wrong dtype, or eigenvalues and step sizes kept in float16.
        """
        if x.ndim != 3 or x.shape[2] != self.d_model or x.shape[1] == 0:
            raise ValueError(
                f"x must have shape (batch, length, {self.d_model}) with a length of at least 1, got {tuple(x.shape)}"
            )
        self._check_dtypes(x)
        if state is not None:
            self._check_causal("a state")
            self._check_state(state, len(x), x)
        self._check_length(x.shape[1], state)
        lengths = order = None
        if mask is not None:
            if mask.dtype != torch.bool:
                raise TypeError(f"mask must be a boolean tensor, True where there is data, got {mask.dtype}")
            if mask.shape != x.shape[:2]:
                raise ValueError(f"mask must have shape {tuple(x.shape[:2])}, got {tuple(mask.shape)}")
            # true places first, in their order
            order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[..., None].expand_as(x)
            x, lengths = x.masked_fill(~mask[..., None], 0).gather(1, order), mask.sum(1)
        y, new = self._mix(x, state, lengths, return_state and self.causal)
        if mask is not None and order is not None:
            y = torch.zeros_like(y).scatter(1, order, y).masked_fill(~mask[..., None], 0)
        return y, new

    def step(self, x_t: Float[Tensor, "B D"], state: State) -> tuple[Float[Tensor, "B D"], State]:
        """One place: (B, D) and the state before it to (B, D) and the state behind it. Errors as in ``forward``."""
        self._check_causal("step")
        if x_t.ndim != 2 or x_t.shape[1] != self.d_model:
            raise ValueError(f"x_t must have shape (batch, {self.d_model}), got {tuple(x_t.shape)}")
        self._check_dtypes(x_t)
        self._check_state(state, len(x_t), x_t)
        self._check_length(1, state)
        return self._step(x_t, state)

    def _check_causal(self, what: str) -> None:
        if not self.causal:
            raise ValueError(
                f"{what} needs a causal layer; this {type(self).__name__} looks into the future, make it causal"
            )

    def _check_dtypes(self, x: Tensor) -> None:
        if not x.is_floating_point():
            raise TypeError(f"x must be a floating-point tensor, got {x.dtype}")
        for name in self.dynamics:
            if self.get_parameter(name).dtype == torch.float16:
                raise TypeError(
                    f"{name} is float16, in which step sizes and eigenvalues lose the far past; "
                    "keep the layer in float32 or bfloat16 (float16 inputs under autocast are fine)"
                )

    def _check_state(self, state: State, batch: int, x: Tensor) -> None:
        wanted = self._empty(batch, torch.device("meta"), x.dtype)
        if not isinstance(state, dict) or state.keys() != wanted.keys():
            got = sorted(state) if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"state must hold {sorted(wanted)}, got {got}; begin with initial_state({batch})")
        for name, tensor in wanted.items():
            shape, found = list(tensor.shape), list(state[name].shape)
            if name in self.growing and len(found) == len(shape):
                shape[1] = found[1]
            if found != shape:
                raise ValueError(f"state[{name!r}] must have shape {tuple(shape)}, got {tuple(found)}")

    def _check_length(self, length: int, state: State | None) -> None:
        if self.max_length is None:
            return
        past = max((state[name].shape[1] for name in self.growing), default=0) if state is not None else 0
        if past + length > self.max_length:
            raise ValueError(
                f"length must be at most {self.max_length}, the length this {type(self).__name__} was made for, "
                f"got {past + length}"
            )


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of recurrent states: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def complex_of(dtype: torch.dtype) -> torch.dtype:
    """The complex dtype of recurrent states."""
    return torch.complex128 if dtype == torch.float64 else torch.complex64


def zero_padding(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Zeros behind the true length of each row of (B, L, ...)."""
    if lengths is None:
        return x
    inside = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
    return x.masked_fill(~inside.view(*inside.shape, *[1] * (x.ndim - 2)), 0)


def right_aligned(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Rows of (B, L, ...) moved to the end, zeros before them."""
    if lengths is None:
        return x
    places = torch.arange(x.shape[1], device=x.device) - (x.shape[1] - lengths)[:, None]
    index = places.clamp(min=0).view(*places.shape, *[1] * (x.ndim - 2)).expand_as(x)
    return x.gather(1, index).masked_fill((places < 0).view(*places.shape, *[1] * (x.ndim - 2)), 0)


def last_places(x: Tensor, count: int, lengths: Tensor | None) -> Tensor:
    """The last ``count`` true places of (B, L, ...), L at least that."""
    moved = right_aligned(x, lengths)
    return moved[:, moved.shape[1] - count :]


def inside(x: Tensor, lengths: Tensor | None) -> Tensor | None:
    """(B, L), True within the true length; ``None`` when every place is."""
    return None if lengths is None else torch.arange(x.shape[1], device=x.device) < lengths[:, None]


def causal_conv(x: Tensor, conv: nn.Conv1d, window: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution of (B, L, D) behind the last inputs (B, taps - 1, D), and the new last inputs."""
    taps = conv.kernel_size[0]
    if window is None:
        window = x.new_zeros(len(x), taps - 1, x.shape[2])
    whole = torch.cat([window.to(x.dtype), x], 1)
    y = F.conv1d(whole.mT, conv.weight, conv.bias, groups=x.shape[2]).mT
    return y, last_places(whole, taps - 1, None if lengths is None else lengths + taps - 1)


def causal_conv_step(x: Tensor, conv: nn.Conv1d, window: Tensor) -> tuple[Tensor, Tensor]:
    """One place of ``causal_conv``: (B, D)."""
    whole = torch.cat([window.to(x.dtype), x[:, None]], 1)
    y = torch.einsum("btd,dt->bd", whole, conv.weight[:, 0])
    return y if conv.bias is None else y + conv.bias, whole[:, 1:]


def with_past(
    u: Tensor, past: Tensor | None, lengths: Tensor | None, return_state: bool
) -> tuple[Tensor, Tensor | None]:
    """Inputs behind their past, and what is the past of the next piece."""
    whole = u if past is None else torch.cat([past.to(u.dtype), u], 1)
    if not return_state:
        return whole, None
    return whole, last_places(whole, whole.shape[1], None if lengths is None else lengths + whole.shape[1] - u.shape[1])


def log_uniform(shape: tuple[int, ...], low: float, high: float) -> Tensor:
    """Logarithms of numbers drawn log-uniformly from (low, high)."""
    return torch.empty(shape).uniform_(float(torch.tensor(low).log()), float(torch.tensor(high).log()))


def inverse_softplus(x: Tensor) -> Tensor:
    """What softplus takes to ``x``."""
    return x + torch.log(-torch.expm1(-x))


def even(d_state: int) -> int:
    """Half of an even number of states."""
    if d_state < 2 or d_state % 2:
        raise ValueError(f"d_state must be even, since eigenvalues come in conjugate pairs, got {d_state}")
    return d_state // 2

"""Leaky integrate-and-fire neurons whose time is the sequence itself (LMUFormer, section 3.3; arXiv 2402.04882).

Legend: B batch, L length, F features of any shape.

``v_t = h_{t-1} + (x_t - h_{t-1} + v_reset) / tau``, a spike where ``v_t`` reaches the threshold, and there
``h_t = v_reset``, elsewhere ``h_t = v_t``.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.ops._checks import check_floats, check_mask, check_shapes
from torchgraft.ops.lmu import _packed, _unpacked

__all__ = ["LIFNeuron", "State", "Surrogate", "lif", "lif_naive"]

State = dict[str, Tensor]
Surrogate = Literal["sigmoid", "atan"]

_SLOPES = {"sigmoid": 4.0, "atan": 2.0}


class _Fire(torch.autograd.Function):
    """A step at zero whose derivative is that of a smooth one."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, surrogate: str) -> Tensor:
        ctx.save_for_backward(v)
        ctx.surrogate = surrogate
        return (v >= 0).to(v.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (v,) = ctx.saved_tensors
        return gradients[0] * surrogate_slope(v, ctx.surrogate), None


def surrogate_slope(v: Tensor, surrogate: Surrogate) -> Tensor:
    """Derivative that stands for that of the step: of ``sigmoid(4 v)``, or of ``atan(pi v) / pi``."""
    slope = _SLOPES[surrogate]
    if surrogate == "sigmoid":
        s = torch.sigmoid(slope * v)
        return slope * s * (1 - s)
    return slope / 2 / (1 + (math.pi / 2 * slope * v).square())


@torch.library.custom_op(
    "torchgraft::lif", mutates_args=(), schema="(Tensor x, Tensor state, float keep, float low, float high) -> Tensor"
)
def _integrate(x: Tensor, state: Tensor, keep: float, low: float, high: float) -> Tensor:
    """Potentials before the reset, (B, L, F): ``keep`` times the last one, or ``low`` where that was ``high``.

    What a spike resets is not known before all earlier spikes are: this is a loop over time, of two operations a step.
    """
    # time first, so that each step is one piece of memory; negated, since F.threshold replaces what is not above
    v = -x.movedim(1, 0)
    v = v.contiguous()
    h = -state
    for step in v.unbind():
        step.add_(h, alpha=keep)
        h = F.threshold(step, -high, -low)
    return v.neg_().movedim(0, 1).contiguous()


@_integrate.register_fake
def _(x: Tensor, state: Tensor, keep: float, low: float, high: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op(
    "torchgraft::lif_backward", mutates_args=(), schema="(Tensor dv, Tensor v, float keep, float high) -> Tensor"
)
def _integrate_backward(dv: Tensor, v: Tensor, keep: float, high: float) -> Tensor:
    """Gradient of x: what comes from the next step passes where there was no reset."""
    dx = dv.movedim(1, 0).clone(memory_format=torch.contiguous_format)
    through = (keep * (v < high)).to(dv.dtype).movedim(1, 0).contiguous()
    later = dx[-1]
    for step, passed in zip(reversed(dx[:-1].unbind()), reversed(through[:-1].unbind()), strict=True):
        later = step.addcmul_(passed, later)
    return dx.movedim(0, 1).contiguous()


@_integrate_backward.register_fake
def _(dv: Tensor, v: Tensor, keep: float, high: float) -> Tensor:
    return dv.new_empty(dv.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.keep, ctx.high = inputs[2], inputs[4]
    ctx.save_for_backward(output)


def _gradients(ctx: Any, dv: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
    (v,) = ctx.saved_tensors
    dx = _integrate_backward(dv, v, ctx.keep, ctx.high)
    return dx, ctx.keep * dx[:, 0], None, None, None


_integrate.register_autograd(_gradients, setup_context=_save)


def lif(
    x: Tensor,
    *,
    tau: float = 2.0,
    threshold: float = 1.0,
    reset: float = 0.0,
    surrogate: Surrogate = "sigmoid",
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Spikes of leaky integrate-and-fire neurons over a sequence.

    The reset is not differentiated (``detach_reset`` elsewhere): the gradient flows through potentials that were not
    reset, and through each spike by the surrogate. This is a loop over time, of two operations a step forward and one
    backward, since a hard reset cannot be known before the spikes that came earlier.

    Args:
        x: currents, (B, L, *F).
        tau: time constant in steps, at least 1.
        threshold: potential that fires, above ``reset``.
        reset: potential after a spike, and before the first step.
        surrogate: ``"sigmoid"`` (slope 4, as in the paper) or ``"atan"`` (slope 2).
        initial_state: potentials before the first step, (B, *F).
        mask: (B, L), True where there is data. Other places leave the potential as it is and have no spike.

    Returns:
        Spikes, 0 or 1, in the shape and dtype of ``x``, and the last potential in float32 (or float64), in which all
        are computed.

    Raises:
        ValueError: for shapes that do not go together, length zero, or constants out of range.
        TypeError: for tensors that are not floating-point, or a mask that is not boolean.

    Example:
        >>> spikes, v = lif(torch.full((1, 6, 1), 1.5))
        >>> spikes.flatten().tolist(), v.tolist()  # 0.75, then 1.125 fires, and again
        ([0.0, 1.0, 0.0, 1.0, 0.0, 1.0], [[0.0]])
    """
    _check(x, initial_state, mask, tau, threshold, reset, surrogate)
    wide = torch.promote_types(torch.float32, x.dtype)
    if initial_state is not None:
        wide = torch.promote_types(wide, initial_state.dtype)
    batch, length, features = x.shape[0], x.shape[1], x.shape[2:]
    state = (
        torch.full((batch, *features), reset, dtype=wide, device=x.device)
        if initial_state is None
        else initial_state.to(wide)
    )
    packed, order, counts = _packed(x.flatten(2), mask)
    current = (packed.to(wide) + reset) / tau
    start = state.flatten(1)
    v = _integrate(current, start, 1 - 1 / tau, reset, threshold)
    spikes = _Fire.apply(v - threshold, surrogate)
    if counts is None:
        last, fired = v[:, -1], spikes[:, -1]
    else:
        place = (counts - 1).clamp(min=0)[:, None, None].expand(-1, 1, v.shape[2])
        last, fired = v.gather(1, place)[:, 0], spikes.gather(1, place)[:, 0]
    last = torch.where(fired.detach() > 0, reset, last)
    if counts is not None:
        last = torch.where((counts > 0)[:, None], last, start)
    spikes = _unpacked(spikes, order, mask).to(x.dtype)
    return spikes.view(batch, length, *features), last.view(batch, *features)


def lif_naive(
    x: Tensor,
    *,
    tau: float = 2.0,
    threshold: float = 1.0,
    reset: float = 0.0,
    surrogate: Surrogate = "sigmoid",
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, one step after another, differentiated step by step; the reference of the tests."""
    h = torch.full_like(x[:, 0], reset) if initial_state is None else initial_state
    spikes = []
    for t in range(x.shape[1]):
        v = h + (x[:, t] - (h - reset)) / tau
        spikes.append(_Fire.apply(v - threshold, surrogate))
        fired = spikes[-1].detach()
        h = v * (1 - fired) + reset * fired
    return torch.stack(spikes, 1), h


def _check(
    x: Tensor, state: Tensor | None, mask: Tensor | None, tau: float, threshold: float, reset: float, surrogate: str
) -> None:
    check_floats(x=x, initial_state=state)
    if x.ndim < 3 or x.shape[1] == 0:
        raise ValueError(
            f"x must have shape (batch, length, features, ...) with a length of at least 1, got {tuple(x.shape)}"
        )
    check_shapes(initial_state=(state, (len(x), *x.shape[2:])))
    if mask is not None:
        check_mask(mask, x)
    _check_constants(tau, threshold, reset, surrogate)


def _check_constants(tau: float, threshold: float, reset: float, surrogate: str) -> None:
    if not tau >= 1:
        raise ValueError(f"tau, the time constant in steps, must be at least 1, got {tau}")
    if not threshold > reset:
        raise ValueError(f"threshold must be above reset, got threshold={threshold} and reset={reset}")
    if surrogate not in _SLOPES:
        raise ValueError(f"surrogate must be 'sigmoid' or 'atan', got {surrogate!r}")


class LIFNeuron(nn.Module):
    """A layer of leaky integrate-and-fire neurons; ``lif`` as a module, without parameters.

    It keeps nothing between calls, so nothing has to be reset between batches: the potential is returned, and given
    back to go on.

    Args:
        tau, threshold, reset, surrogate: as in ``lif``.

    Raises:
        ValueError: for constants out of range.

    Example:
        >>> neuron = LIFNeuron()
        >>> spikes, state = neuron(torch.rand(2, 50, 8) * 3)
        >>> more, state = neuron(torch.rand(2, 50, 8) * 3, state)
        >>> bool(((more == 0) | (more == 1)).all())
        True
    """

    def __init__(
        self, tau: float = 2.0, threshold: float = 1.0, reset: float = 0.0, surrogate: Surrogate = "sigmoid"
    ) -> None:
        super().__init__()
        _check_constants(tau, threshold, reset, surrogate)
        self.tau, self.threshold, self.reset, self.surrogate = tau, threshold, reset, surrogate

    def initial_state(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        *,
        features: int | tuple[int, ...],
    ) -> State:
        """Potentials before the first step, float32 at least; ``features`` is F."""
        shape = (features,) if isinstance(features, int) else features
        wide = torch.promote_types(dtype, torch.float32)
        return {"potential": torch.full((batch_size, *shape), self.reset, device=device, dtype=wide)}

    def forward(
        self, x: Float[Tensor, "B L *F"], state: State | None = None, mask: Bool[Tensor, "B L"] | None = None
    ) -> tuple[Float[Tensor, "B L *F"], State]:
        """Spikes of the shape of ``x``, and the state behind them. Arguments and errors as in ``lif``."""
        spikes, last = lif(
            x, tau=self.tau, threshold=self.threshold, reset=self.reset, surrogate=self.surrogate,
            initial_state=None if state is None else state["potential"], mask=mask,
        )  # fmt: skip
        return spikes, {"potential": last}

    def step(self, x_t: Float[Tensor, " B *F"], state: State) -> tuple[Float[Tensor, " B *F"], State]:
        """One step: (B, *F) and the state before it to spikes and the state behind it."""
        spikes, state = self(x_t[:, None], state)
        return spikes[:, 0], state

    def extra_repr(self) -> str:
        """The constants."""
        return f"tau={self.tau}, threshold={self.threshold}, reset={self.reset}, surrogate={self.surrogate!r}"

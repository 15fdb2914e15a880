"""Mega (Ma et al., 2022, arXiv 2209.10655): gated attention over a damped moving average.

Legend: B batch, L length, D width, N moving averages of a feature, Z features of queries and keys, V of values.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.layers.state_space.linear import _Diagonal, apply_kernel, full
from torchgraft.layers.state_space.mixer import SequenceMixer, State, inside, last_places, wide, zero_padding
from torchgraft.ops._precision import autocast_off
from torchgraft.ops.kernels import vandermonde
from torchgraft.ops.long_convolution import long_convolution

__all__ = ["EMA", "Mega"]


class _Average(_Diagonal):
    """``h_t = (1 - alpha delta) h_{t-1} + alpha beta x_t``, ``y_t = eta^T h_t``, in the names of the official code."""

    def __init__(self, width: int, averages: int) -> None:
        super().__init__()
        sign = torch.ones(averages, 1)
        sign[1::2] = -1
        self.delta, self.alpha = (nn.Parameter(0.2 * torch.randn(width, averages, 1)) for _ in "da")
        self.beta = nn.Parameter(0.02 * torch.randn(width, averages, 1) + sign)
        self.gamma = nn.Parameter(torch.randn(width, averages))

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor]:
        """``log_a``, ``b`` and ``c``, all real."""
        # the official code swaps the two letters of the paper
        p, alpha = full(self.delta).sigmoid()[..., 0], full(self.alpha).sigmoid()[..., 0]
        return torch.log1p(-p * alpha), p * full(self.beta)[..., 0], full(self.gamma)[None] / self.gamma.shape[1] ** 0.5

    def empty(self, batch: int, device: torch.device | None, dtype: torch.dtype) -> Tensor:
        """Zeros."""
        return torch.zeros(batch, *self.gamma.shape, device=device, dtype=wide(dtype))


def _inside_average(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *rest: object) -> None:
    for name in ("delta", "alpha", "beta", "gamma"):
        if f"{prefix}{name}" in state_dict:
            state_dict[f"{prefix}average.{name}"] = state_dict.pop(f"{prefix}{name}")


class EMA(SequenceMixer):
    """Mega's multi-dimensional damped moving average alone: ``SiLU(average + omega x)``.

    State dicts of the official ``MultiHeadEMA`` load; what it calls bidirectional has twice the parameters,
    and both kernels hold the present.

    Args:
        d_model: width.
        averages: N for each feature.
        bidirectional: average the future too.

    Example:
        >>> y, state = EMA(8)(torch.randn(2, 100, 8))
    """

    dynamics: ClassVar[tuple[str, ...]] = ("average.delta", "average.alpha", "average.beta")

    def __init__(self, d_model: int, averages: int = 16, *, bidirectional: bool = False) -> None:
        super().__init__(d_model, causal=not bidirectional)
        self.average = _Average(d_model * (1 + bidirectional), averages)
        self.omega = nn.Parameter(torch.randn(d_model))
        self.register_load_state_dict_pre_hook(_inside_average)

    def _empty(self, batch: int, device: torch.device | None, dtype: torch.dtype) -> State:
        return {"ema": self.average.empty(batch, device, dtype)}

    def _mix(
        self, x: Tensor, state: State | None, lengths: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        if self.causal:
            y, new = apply_kernel(
                self.average, x, None if state is None else state["ema"], lengths, return_state, self.omega
            )
            return F.silu(y), None if new is None else {"ema": new}
        with autocast_off(x):
            log_a, b, c = self.average.coefficients()
            forwards, backwards = vandermonde(c[0] * b, log_a, x.shape[1]).chunk(2)
            length = x.shape[1]
            centred = F.pad(forwards, (length - 1, 0)) + F.pad(backwards.flip(-1), (0, length - 1))
            return F.silu(long_convolution(x, centred, self.omega, bidirectional=True)), None

    def _step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        y, new = self.average.step(x, state["ema"])
        return F.silu(y + x * self.omega), {"ema": new}


class _Bias(nn.Module):
    def __init__(self, longest: int) -> None:
        super().__init__()
        self.rel_pos_bias = nn.Parameter(0.02 * torch.randn(2 * longest - 1))


class Mega(SequenceMixer):
    """A Mega layer with its norm and its gated residual: ``x + u * (h - x)``.

    State dicts of the official ``MovingAverageGatedAttention`` (layer norm, ``rel_pos_bias="simple"``) load; names
    are brought to ours on loading.

    Args:
        d_model: width.
        d_state: N, moving averages of a feature.
        z_dim, v_dim: features of queries and keys, and of values; ``d_model // 2`` at least 1 and ``2 d_model``.
        max_positions: longest sequence, for the relative positions; with ``chunk_size`` any sequence is possible.
        chunk_size: attend within chunks of this many places, in linear time; to everything without it.
        attention: ``"softmax"`` or ``"laplace"``.
        causal: look into the past alone.

    Example:
        >>> y, state = Mega(8, chunk_size=16)(torch.randn(2, 100, 8))
    """

    has_residual: ClassVar[bool] = True
    dynamics: ClassVar[tuple[str, ...]] = tuple(f"move.{name}" for name in EMA.dynamics)
    growing: ClassVar[frozenset[str]] = frozenset({"keys", "values", "seen"})

    def __init__(
        self, d_model: int, d_state: int = 16, *, z_dim: int | None = None, v_dim: int | None = None,
        max_positions: int = 1024, chunk_size: int | None = None, attention: Literal["softmax", "laplace"] = "softmax",
        causal: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(d_model, causal=causal, max_length=max_positions if chunk_size is None else None)
        if attention not in ("softmax", "laplace"):
            raise ValueError(f"attention must be 'softmax' or 'laplace', got {attention!r}")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        self.z_dim = max(1, d_model // 2) if z_dim is None else z_dim
        self.v_dim = 2 * d_model if v_dim is None else v_dim
        self.chunk_size, self.attention = chunk_size, attention
        self.longest = max_positions if chunk_size is None else chunk_size
        self.norm = nn.LayerNorm(d_model)
        self.move = EMA(d_model, d_state, bidirectional=not causal)
        self.v_proj = nn.Linear(d_model, self.v_dim)
        self.mx_proj = nn.Linear(d_model, self.z_dim + self.v_dim + 2 * d_model)
        self.h_proj = nn.Linear(self.v_dim, d_model)
        self.gamma = nn.Parameter(0.02 * torch.randn(2, self.z_dim) + 1)
        self.beta = nn.Parameter(torch.zeros(2, self.z_dim))
        self.rel_pos_bias = _Bias(self.longest)
        self.register_load_state_dict_pre_hook(_plain_norm)

    def _empty(self, batch: int, device: torch.device | None, dtype: torch.dtype) -> State:
        return {
            **self.move._empty(batch, device, dtype),
            "keys": torch.zeros(batch, 0, self.z_dim, device=device, dtype=dtype),
            "values": torch.zeros(batch, 0, self.v_dim, device=device, dtype=dtype),
            "seen": torch.zeros(batch, 0, device=device, dtype=torch.bool),
            "position": torch.zeros(batch, device=device, dtype=torch.long),
        }

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, allowed: Tensor) -> Tensor:
        """(..., Q, Z), (..., K, Z), (..., K, V), and for each pair its bias and whether it counts, (..., Q, K)."""
        scores = full(q) @ full(k).mT
        if self.attention == "softmax":
            weights = (scores * self.z_dim**-0.5 + bias).masked_fill(~allowed, -torch.inf).softmax(-1)
            # a place that may look nowhere is padding
            weights = weights.nan_to_num(0.0)
        else:
            scores = scores / allowed.sum(-1, keepdim=True).clamp(min=1) + bias
            # mean and deviation with which it is nearest to a squared ReLU, equation 16
            weights = 0.5 * (1 + torch.erf((scores - 0.5**0.5) * (2 * math.pi) ** 0.5))
            weights = weights.masked_fill(~allowed, 0)
        return weights.to(v.dtype) @ v

    def _bias(self, length: int) -> Tensor:
        """Of all pairs of a sequence from its beginning, (L, L): the same along each diagonal."""
        reach = self.longest - 1
        held = full(self.rel_pos_bias.rel_pos_bias)[reach - length + 1 : reach + length]
        return held.unfold(0, length, 1).flip(0)

    def _mix(
        self, x: Tensor, state: State | None, lengths: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        batch, length, _ = x.shape
        inner = self.norm(x)
        v = F.silu(self.v_proj(inner))
        averaged, ema = self.move._mix(zero_padding(inner, lengths), state, lengths, return_state)
        u, zr, hx = self.mx_proj(averaged).split([self.d_model, self.z_dim + self.v_dim, self.d_model], -1)
        z, r = F.silu(zr).split([self.z_dim, self.v_dim], -1)
        q, k = (z * self.gamma[i] + self.beta[i] for i in (0, 1))
        here = inside(x, lengths)
        seen = torch.ones(batch, length, dtype=torch.bool, device=x.device) if here is None else here
        if state is None and self.chunk_size is not None and self.chunk_size < length:
            h = self._in_chunks(q, k, v, seen)
            keys, values, visible, position = k, v, seen, torch.zeros(batch, dtype=torch.long, device=x.device)
        else:
            before = self._empty(batch, x.device, x.dtype) if state is None else state
            keys, values = (
                torch.cat([before["keys"].to(k.dtype), k], 1),
                torch.cat([before["values"].to(v.dtype), v], 1),
            )
            visible, position = torch.cat([before["seen"], seen], 1), before["position"]
            places = torch.arange(keys.shape[1], device=x.device) - (keys.shape[1] - length)
            query, key = position[:, None] + torch.arange(length, device=x.device), position[:, None] + places
            gap = key[:, None] - query[..., None]
            allowed = visible[:, None] & (gap <= 0) if self.causal else visible[:, None].expand_as(gap)
            if self.chunk_size is not None:
                allowed = allowed & (
                    torch.div(key, self.chunk_size, rounding_mode="floor")[:, None]
                    == torch.div(query, self.chunk_size, rounding_mode="floor")[..., None]
                )
            reach = self.longest - 1
            if state is None:
                bias = self._bias(length)
            else:
                bias = full(self.rel_pos_bias.rel_pos_bias)[gap.clamp(-reach, reach) + reach]
            h = self._attend(q, keys, values, bias, allowed)
        h = F.silu(hx + self.h_proj((h * r).to(hx.dtype)))
        y = x + u.sigmoid() * (h - x)
        if ema is None:
            return y, None
        ends = None if lengths is None else lengths + keys.shape[1] - length
        count = keys.shape[1] if self.chunk_size is None else min(keys.shape[1], self.chunk_size)
        moved = position + (length if lengths is None else lengths)
        kept = {
            name: last_places(t, count, ends) for name, t in (("keys", keys), ("values", values), ("seen", visible))
        }  # fmt: skip
        return y, {**ema, **kept, "position": moved}

    def _in_chunks(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        size = self.chunk_size
        assert size is not None
        length = q.shape[1]
        short = -length % size
        q, k, v = (F.pad(t, (0, 0, 0, short)).unflatten(1, (-1, size)) for t in (q, k, v))
        shown = F.pad(seen, (0, short)).unflatten(1, (-1, size))[:, :, None]
        places = torch.arange(size, device=q.device)
        gap = places - places[:, None]
        allowed = shown & (gap <= 0) if self.causal else shown.expand(-1, -1, size, -1)
        return self._attend(q, k, v, self._bias(size), allowed).flatten(1, 2)[:, :length]


def _plain_norm(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *rest: object) -> None:
    for name in ("weight", "bias"):
        if f"{prefix}norm.norm.{name}" in state_dict:
            state_dict[f"{prefix}norm.{name}"] = state_dict.pop(f"{prefix}norm.norm.{name}")

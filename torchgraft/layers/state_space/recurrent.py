"""Gated linear recurrences: RG-LRU, HGRN, RWKV, retention and GateLoop.

Legend: B batch, L length, D features, H heads.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.layers.state_space.linear import full
from torchgraft.layers.state_space.mixer import (
    SequenceMixer,
    State,
    causal_conv,
    complex_of,
    inside,
    last_places,
    wide,
)
from torchgraft.ops.linear_recurrence import linear_recurrence
from torchgraft.ops.ssd import ssd

__all__ = ["HGRN", "RGLRU", "RWKV", "GateLoop", "LowerBounds", "RetNet"]

_LARGEST_ROOT_GRADIENT = 1000.0


class _BlockGates(nn.Module):
    """The gated recurrence of Griffin; parameters as transformers holds them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        block = width // heads
        # the square of a, uniform on the ring that the paper begins with
        a = torch.empty(width).uniform_(0.9**2, 0.999**2).log() / (-2 * 8)
        self.recurrent_param = nn.Parameter(torch.expm1(a).log())
        self.input_gate_weight = nn.Parameter(torch.randn(heads, block, block) / math.sqrt(block))
        self.input_gate_bias = nn.Parameter(torch.zeros(heads, block))
        self.recurrent_gate_weight = nn.Parameter(torch.randn(heads, block, block) / math.sqrt(block))
        self.recurrent_gate_bias = nn.Parameter(torch.zeros(heads, block))
        self.heads = heads

    def forward(self, x: Tensor, started: Tensor) -> tuple[Tensor, Tensor]:
        """Factors and inputs of the recurrence; ``started``: (B, L) where the state is not empty."""
        blocks = x.unflatten(-1, (self.heads, -1))

        def gate(weight: Tensor, bias: Tensor) -> Tensor:
            return (torch.einsum("blhi,hij->blhj", blocks, weight) + bias).flatten(-2).sigmoid()

        i = gate(self.input_gate_weight, self.input_gate_bias)
        r = full(gate(self.recurrent_gate_weight, self.recurrent_gate_bias))
        log_a = -8 * r * F.softplus(full(self.recurrent_param))
        # the root's gradient is bounded, as otherwise a near one makes it infinite
        scale = (-torch.expm1(2 * log_a)).clamp(min=(0.5 / _LARGEST_ROOT_GRADIENT) ** 2).sqrt()
        scale = torch.where(started[..., None], scale, 1.0)
        return log_a.exp(), full(x * i) * scale


class RGLRU(SequenceMixer):
    """The recurrent block of Griffin (De et al., 2024, arXiv 2402.19427) around its real gated linear recurrent unit.

    ``h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t x_t)`` with ``a_t = sigmoid(Lambda)^{8 r_t}``, written as
    ``exp(-8 r_t softplus(Lambda'))``. State dicts of transformers' ``RecurrentGemmaRecurrentBlock`` load as they are;
    as there, the input of the very first place is not scaled by the root.

    Args:
        d_model: width.
        d_inner: width of the recurrence; ``d_model`` without it.
        heads: blocks of the gates.
        d_conv: taps of the short convolution.

    Example:
        >>> y, state = RGLRU(8, heads=2)(torch.randn(2, 100, 8))
    """

    dynamics: ClassVar[tuple[str, ...]] = ("rg_lru.recurrent_param",)

    def __init__(self, d_model: int, *, d_inner: int | None = None, heads: int = 1, d_conv: int = 4) -> None:
        super().__init__(d_model)
        width = d_model if d_inner is None else d_inner
        if heads < 1 or width % heads:
            raise ValueError(f"the width of the recurrence must be a multiple of heads, got {width} and {heads}")
        self.width = width
        self.linear_y, self.linear_x = nn.Linear(d_model, width), nn.Linear(d_model, width)
        self.linear_out = nn.Linear(width, d_model)
        self.conv_1d = nn.Conv1d(width, width, d_conv, groups=width, padding=d_conv - 1)
        self.rg_lru = _BlockGates(width, heads)

    def _empty(self, batch: int, device: torch.device | None, dtype: torch.dtype) -> State:
        taps = self.conv_1d.kernel_size[0] - 1
        return {
            "conv": torch.zeros(batch, taps, self.width, device=device, dtype=dtype),
            "hidden": torch.zeros(batch, self.width, device=device, dtype=wide(dtype)),
            "started": torch.zeros(batch, device=device, dtype=torch.bool),
        }

    def _mix(
        self, x: Tensor, state: State | None, lengths: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        gate = F.gelu(self.linear_y(x), approximate="tanh")
        u, window = causal_conv(self.linear_x(x), self.conv_1d, None if state is None else state["conv"], lengths)
        later = torch.arange(x.shape[1], device=x.device) > 0
        started = later.expand(len(x), -1) if state is None else later | state["started"][:, None]
        a, b = self.rg_lru(u, started)
        h = linear_recurrence(
            a, b, initial_state=None if state is None else state["hidden"], mask=inside(x, lengths)
        )  # fmt: skip
        y = self.linear_out(h.to(gate.dtype) * gate)
        if not return_state:
            return y, None
        any_place = torch.ones(len(x), dtype=torch.bool, device=x.device) if lengths is None else lengths > 0
        if state is not None:
            any_place = any_place | state["started"]
        return y, {"conv": window, "hidden": h[:, -1], "started": any_place}


class LowerBounds(nn.Module):
    """HGRN's lower bounds of the forget gates, rising with the layer: a cumulative softmax over layers.

    Args:
        layers: how many layers share it.
        width: D.

    Example:
        >>> [round(LowerBounds(4, 8)(layer)[0].item(), 2) for layer in range(4)]
        [0.0, 0.25, 0.5, 0.75]
    """

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.ones(layers, width))

    def forward(self, layer: int) -> Tensor:
        """(D,), zero for the first layer."""
        share = self.logits.softmax(0)
        return (share.cumsum(0) - share[0])[layer]


class HGRN(SequenceMixer):
    """HGRN (Qin et al., 2023, arXiv 2311.04823): a complex state with a forget gate that has a lower bound.

    ``f = gamma + (1 - gamma) sigmoid(W_f x)``, ``h_t = f e^{i theta} h_{t-1} + (1 - f) c_t``; real and imaginary part,
    times an output gate, are normalised and projected.

    Args:
        d_model: width, and number of complex states.
        lower_bounds: shared by the layers of a network, which must register it itself, once; without it gamma is
            ``lower_bound``.
        layer: index into ``lower_bounds``.
        lower_bound: a fixed gamma in [0, 1).

    Example:
        >>> bounds = LowerBounds(2, 8)
        >>> y, state = HGRN(8, lower_bounds=bounds, layer=1)(torch.randn(2, 100, 8))
    """

    dynamics: ClassVar[tuple[str, ...]] = ("theta",)

    def __init__(
        self, d_model: int, *, lower_bounds: LowerBounds | None = None, layer: int = 0, lower_bound: float = 0.0
    ) -> None:
        super().__init__(d_model)
        if not 0 <= lower_bound < 1:
            raise ValueError(f"lower_bound must lie in [0, 1), got {lower_bound}")
        # in a tuple, so that it is not registered here and saved once for each layer
        self.lower_bounds = None if lower_bounds is None else (lower_bounds,)
        self.layer, self.lower_bound = layer, lower_bound
        self.input = nn.Linear(d_model, 2 * d_model)
        self.forget, self.gate = nn.Linear(d_model, d_model), nn.Linear(d_model, 2 * d_model)
        # as rotary embeddings
        self.theta = nn.Parameter(10000 ** (-torch.arange(d_model) / d_model))
        self.norm, self.output = nn.LayerNorm(2 * d_model), nn.Linear(2 * d_model, d_model)

    def _empty(self, batch: int, device: torch.device | None, dtype: torch.dtype) -> State:
        return {"hidden": torch.zeros(batch, self.d_model, device=device, dtype=complex_of(dtype))}

    def _mix(
        self, x: Tensor, state: State | None, lengths: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        gamma = self.lower_bound if self.lower_bounds is None else full(self.lower_bounds[0](self.layer))
        f = gamma + (1 - gamma) * full(self.forget(x)).sigmoid()
        real, imaginary = full(F.silu(self.input(x))).chunk(2, -1)
        theta = full(self.theta)
        h = linear_recurrence(
            torch.complex(f * theta.cos(), f * theta.sin()), torch.complex((1 - f) * real, (1 - f) * imaginary),
            initial_state=None if state is None else state["hidden"], mask=inside(x, lengths),
        )  # fmt: skip
        y = torch.cat([h.real, h.imag], -1).to(x.dtype) * F.silu(self.gate(x))
        return self.output(self.norm(y)), {"hidden": h[:, -1]} if return_state else None


class RWKV(SequenceMixer):
    """Time mixing of RWKV-4 (Peng et al., 2023, arXiv 2305.13048).

    A weighted mean over the past whose weights fade by ``exp(-w)`` a step, the present counting ``exp(u)`` times.
    Numerator and denominator are scaled by a running maximum, which a cumulative maximum gives for all places at once.
    State dicts of transformers' ``RwkvSelfAttention`` load as they are.

    Args:
        d_model: width.
        d_inner: width of the mean; ``d_model`` without it.

    Example:
        >>> y, state = RWKV(8)(torch.randn(2, 100, 8))
    """

    dynamics: ClassVar[tuple[str, ...]] = ("time_decay", "time_first")

    def __init__(self, d_model: int, *, d_inner: int | None = None) -> None:
        super().__init__(d_model)
        width = d_model if d_inner is None else d_inner
        place = torch.arange(width) / max(width - 1, 1)
        self.time_decay = nn.Parameter(-5 + 8 * place**0.7)
        self.time_first = nn.Parameter(math.log(0.3) + 0.5 * ((torch.arange(width) + 1) % 3 - 1))
        mix = torch.arange(d_model)[None, None] / d_model
        self.time_mix_key, self.time_mix_value = nn.Parameter(mix.clone()), nn.Parameter(mix.clone())
        self.time_mix_receptance = nn.Parameter(mix**0.5)
        self.key, self.value, self.receptance = (nn.Linear(d_model, width, bias=False) for _ in "kvr")
        self.output = nn.Linear(width, d_model, bias=False)

    def _empty(self, batch: int, device: torch.device | None, dtype: torch.dtype) -> State:
        size = (batch, self.time_decay.shape[0])
        return {
            "previous": torch.zeros(batch, self.d_model, device=device, dtype=dtype),
            "numerator": torch.zeros(size, device=device, dtype=wide(dtype)),
            "denominator": torch.zeros(size, device=device, dtype=wide(dtype)),
            # far below any key, and finite: differences of it must be numbers
            "largest": torch.full(size, -1e30, device=device, dtype=wide(dtype)),
        }

    def _mix(
        self, x: Tensor, state: State | None, lengths: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        if state is None:
            state = self._empty(len(x), x.device, x.dtype)
        whole = torch.cat([state["previous"][:, None].to(x.dtype), x], 1)
        before = whole[:, :-1]
        k, v, r = (
            layer(x * mix + before * (1 - mix))
            for layer, mix in (
                (self.key, self.time_mix_key), (self.value, self.time_mix_value),
                (self.receptance, self.time_mix_receptance),
            )
        )  # fmt: skip
        k, v, w, mask = full(k), full(v), full(self.time_decay).exp(), inside(x, lengths)
        step = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=k.dtype)[:, None] * w
        # any scale would do, so it carries no gradient; this one keeps all exponents at most zero
        raised = torch.cat([state["largest"][:, None].to(k.dtype), k + step], 1).detach()
        if mask is not None:
            raised[:, 1:].masked_fill_(~mask[..., None], -1e30)
        largest = raised.cummax(1).values - F.pad(step, (0, 0, 1, 0)).detach()
        previous, scale = largest[:, :-1], largest[:, 1:]
        factor, weight = (previous - w - scale).exp(), (k - scale).exp()
        num, den = (
            linear_recurrence(factor, b, initial_state=state[name], mask=mask)
            for b, name in ((weight * v, "numerator"), (weight, "denominator"))
        )
        # the mean at a place: its past, and itself with the bonus
        bonus = k + full(self.time_first)
        top = torch.maximum(previous, bonus.detach())
        old, now = (previous - top).exp(), (bonus - top).exp()
        num_before = torch.cat([state["numerator"][:, None].to(num.dtype), num[:, :-1]], 1)
        den_before = torch.cat([state["denominator"][:, None].to(den.dtype), den[:, :-1]], 1)
        wkv = (old * num_before + now * v) / (old * den_before + now)
        y = self.output((r.sigmoid() * wkv).to(x.dtype))
        if not return_state:
            return y, None
        return y, {
            "previous": last_places(whole, 1, None if lengths is None else lengths + 1)[:, 0],
            "numerator": num[:, -1],
            "denominator": den[:, -1],
            "largest": last_places(largest, 1, None if lengths is None else lengths + 1)[:, 0],
        }


class _MatrixState(SequenceMixer):
    """``S_t = a_t S_{t-1} + k_t v_t^T``, ``y_t = q_t^T S_t`` for each head, by the chunked products of ``ssd``."""

    def __init__(self, d_model: int, heads: int, expand: int) -> None:
        super().__init__(d_model)
        if heads < 1 or d_model % heads:
            raise ValueError(f"d_model must be a multiple of heads, got {d_model} and {heads}")
        self.heads, self.features = heads, d_model // heads
        self.q_proj, self.k_proj = nn.Linear(d_model, d_model, bias=False), nn.Linear(d_model, d_model, bias=False)
        self.v_proj, self.g_proj = (nn.Linear(d_model, expand * d_model, bias=False) for _ in "vg")
        self.o_proj = nn.Linear(expand * d_model, d_model, bias=False)
        self.values = expand * self.features

    def _empty(self, batch: int, device: torch.device | None, dtype: torch.dtype) -> State:
        size = (batch, self.heads, self.values, self.features)
        return {
            "matrix": torch.zeros(size, device=device, dtype=wide(dtype)),
            "position": torch.zeros(batch, device=device, dtype=torch.long),
        }

    def _log_decay(self, x: Tensor) -> Tensor:
        """(H,) or (B, L, H)."""
        raise NotImplementedError

    def _turned(self, q: Tensor, k: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        return q, k

    def _mix(
        self, x: Tensor, state: State | None, lengths: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        if state is None:
            state = self._empty(len(x), x.device, x.dtype)
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self._turned(q, k, state["position"][:, None] + torch.arange(x.shape[1], device=x.device))
        y, matrix = ssd(
            v, torch.ones(v.shape[:3], device=x.device, dtype=wide(x.dtype)), self._log_decay(x), k,
            q * self.features**-0.5, initial_state=state["matrix"], mask=inside(x, lengths),
        )  # fmt: skip
        y = F.rms_norm(full(y), (self.values,), eps=1e-5).to(x.dtype).flatten(2)
        y = self.o_proj(y * F.silu(self.g_proj(x)))
        moved = state["position"] + (x.shape[1] if lengths is None else lengths)
        return y, {"matrix": matrix, "position": moved} if return_state else None


class RetNet(_MatrixState):
    """Multi-scale retention (Sun et al., 2023, arXiv 2307.08621): fixed decays ``1 - 2^{-5-h}``, rotary positions.

    Args:
        d_model: width.
        heads: H, each with its own decay.
        expand: features of values per feature.

    Example:
        >>> y, state = RetNet(8, heads=2)(torch.randn(2, 100, 8))
    """

    def __init__(self, d_model: int, *, heads: int = 4, expand: int = 2) -> None:
        super().__init__(d_model, heads, expand)
        if self.features % 2:
            raise ValueError(f"features of a head must be even to be rotated, got {self.features}")

    def _log_decay(self, x: Tensor) -> Tensor:
        return torch.log1p(-(2.0 ** (-5 - torch.arange(self.heads, device=x.device, dtype=wide(x.dtype)))))

    def _turned(self, q: Tensor, k: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        half = self.features // 2
        rates = 10000 ** (-torch.arange(half, device=q.device, dtype=wide(q.dtype)) / half)
        angle = position[..., None, None] * rates
        cos, sin = angle.cos(), angle.sin()

        def turn(t: Tensor) -> Tensor:
            first, second = full(t).chunk(2, -1)
            return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(t.dtype)

        return turn(q), turn(k)


class GateLoop(_MatrixState):
    """A matrix state with a decay that depends on the input (Katsch, 2023, arXiv 2311.01927), one real one per head.

    The paper's decays are complex and one for each feature of a key; with one real decay per head all of a sequence is
    matrix products. ``a_t = sigmoid(W x_t + b)``.

    Args:
        d_model: width.
        heads: H.
        expand: features of values per feature.

    Example:
        >>> y, state = GateLoop(8, heads=2)(torch.randn(2, 100, 8))
    """

    def __init__(self, d_model: int, *, heads: int = 4, expand: int = 2) -> None:
        super().__init__(d_model, heads, expand)
        self.a_proj = nn.Linear(d_model, heads)
        with torch.no_grad():
            # decays from 1/2 to over a hundred steps
            self.a_proj.bias.copy_(torch.linspace(0, 5, heads))

    def _log_decay(self, x: Tensor) -> Tensor:
        return F.logsigmoid(full(self.a_proj(x)))

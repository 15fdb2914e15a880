"""Layers whose kernels are not those of a state space: Hyena, SGConv, long convolutions, TNN.

A causal one goes on by remembering the inputs of its convolutions, which grow with the sequence; a step costs as
much as there is past.

Legend: B batch, L length, H width.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.layers.state_space.linear import full
from torchgraft.layers.state_space.mixer import SequenceMixer, State, causal_conv, with_past, zero_padding
from torchgraft.ops._precision import autocast_off
from torchgraft.ops.long_convolution import long_convolution

__all__ = ["TNN", "Hyena", "LongConv", "SGConv"]


def _convolved(whole: Tensor, kernel: Tensor, length: int, skip: Tensor | None = None) -> Tensor:
    """The last ``length`` outputs of a causal convolution of (B, T, H) with (H, taps)."""
    with autocast_off(whole):
        if length == 1:
            taps = min(kernel.shape[1], whole.shape[1])
            recent = full(whole[:, whole.shape[1] - taps :].flip(1))
            y = torch.einsum("bth,ht->bh", recent, full(kernel[:, :taps]))[:, None]
            y = y.to(whole.dtype)
        else:
            y = long_convolution(whole, kernel)[:, whole.shape[1] - length :]
        return y if skip is None else y + whole[:, whole.shape[1] - length :] * skip


class _Sine(nn.Module):
    def __init__(self, width: int, frequency: float) -> None:
        super().__init__()
        self.freq = nn.Parameter(frequency * torch.ones(1, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.freq * x)


class _Positions(nn.Module):
    t: Tensor

    def __init__(self, features: int, length: int) -> None:
        super().__init__()
        t = torch.linspace(0, 1, length)[None, :, None]
        turns = 2 * math.pi * torch.arange(length)[None, :, None] / length
        bands = torch.linspace(1e-4, (features - 1) // 2 - 1, (features - 1) // 2)
        self.z = nn.Parameter(torch.cat([t, (bands * turns).cos(), -(bands * turns).sin()], -1))
        self.register_buffer("t", t)


class _Decay(nn.Module):
    deltas: Tensor

    def __init__(self, width: int, fast: float, slow: float, target: float, shift: float) -> None:
        super().__init__()
        self.shift = shift
        rates = torch.linspace(math.log(target) / slow, math.log(target) / fast, width)
        self.register_buffer("deltas", rates[None, None])


class _Filter(nn.Module):
    """An implicit filter: a small network of sines over positions, times exponential decays."""

    def __init__(
        self, width: int, features: int, order: int, length: int, frequency: float, inner: int, decay: _Decay
    ) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(width))
        self.pos_emb = _Positions(features, length)
        # numbered as in the official code, where one and the same sine stands behind each linear map
        widths = [features, *[order] * (inner + 1)]
        linear = [nn.Linear(a, order) for a in widths[:-1]]
        self.implicit_filter = nn.ModuleDict({str(2 * i): layer for i, layer in enumerate(linear)})
        self.implicit_filter["1"] = _Sine(order, frequency)
        self.implicit_filter[str(2 * len(linear))] = nn.Linear(order, width, bias=False)
        self.maps = len(linear)
        self.modulation = decay
        self.register_load_state_dict_pre_hook(_one_sine)

    def forward(self, length: int) -> Tensor:
        """(width, L)."""
        t = full(self.pos_emb.t[0, :length])
        h = self.pos_emb.z[0, :length]
        for i in range(self.maps):
            h = self.implicit_filter["1"](self.implicit_filter[str(2 * i)](h))
        h = self.implicit_filter[str(2 * self.maps)](h)
        return (full(h) * ((-t * full(self.modulation.deltas[0]).abs()).exp() + self.modulation.shift)).mT


def _one_sine(module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    assert isinstance(module, _Filter)
    for i in range(1, module.maps):
        state_dict.pop(f"{prefix}implicit_filter.{2 * i + 1}.freq", None)


class Hyena(SequenceMixer):
    """Hyena (Poli et al., 2023, arXiv 2302.10866): long implicit convolutions between elementwise gates.

    State dicts of the standalone ``HyenaOperator`` of safari load as they are.

    Args:
        d_model: width.
        l_max: longest sequence; positions of the filter are made for it.
        order: N, at least 2: N + 1 projections, N - 1 long convolutions.
        filter_width: of the network that makes the filters.
        features: of its positions: the time, and sines and cosines; odd, at least 3.
        frequency: of its sines.
        inner_layers: between its first and last.
        decay_fast, decay_slow, decay_target, decay_shift: exponential decays of the channels.

    Raises:
        ValueError: for a sequence over ``l_max``, an order below 2, an even number of features.

    Example:
        >>> y, state = Hyena(8, l_max=128)(torch.randn(2, 100, 8))
        >>> sorted((name, tuple(s.shape)) for name, s in state.items())
        [('long', (2, 100, 8)), ('short', (2, 2, 24))]
    """

    growing: ClassVar[frozenset[str]] = frozenset({"long"})

    def __init__(
        self, d_model: int, l_max: int, *, order: int = 2, filter_width: int = 64, features: int = 3,
        frequency: float = 1.0, inner_layers: int = 2, decay_fast: float = 0.3, decay_slow: float = 1.5,
        decay_target: float = 1e-2, decay_shift: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(d_model, max_length=l_max)
        if order < 2:
            raise ValueError(f"order must be at least 2, got {order}")
        if features < 3 or features % 2 == 0:
            raise ValueError(f"features must be odd and at least 3 (time, sines, cosines), got {features}")
        self.order = order
        inner = (order + 1) * d_model
        self.in_proj, self.out_proj = nn.Linear(d_model, inner), nn.Linear(d_model, d_model)
        self.short_filter = nn.Conv1d(inner, inner, 3, padding=2, groups=inner)
        width = d_model * (order - 1)
        decay = _Decay(width, decay_fast, decay_slow, decay_target, decay_shift)
        self.filter_fn = _Filter(width, features, filter_width, l_max, frequency, inner_layers, decay)

    def _empty(self, batch: int, device: torch.device | None, dtype: torch.dtype) -> State:
        return {
            "short": torch.zeros(batch, 2, (self.order + 1) * self.d_model, device=device, dtype=dtype),
            "long": torch.zeros(batch, 0, (self.order - 1) * self.d_model, device=device, dtype=dtype),
        }

    def _mix(
        self, x: Tensor, state: State | None, lengths: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        length = x.shape[1]
        u, window = causal_conv(self.in_proj(x), self.short_filter, None if state is None else state["short"], lengths)
        *gates, v = u.chunk(self.order + 1, -1)
        past = [None] * (self.order - 1) if state is None else list(state["long"].chunk(self.order - 1, -1))
        total = length if state is None else length + state["long"].shape[1]
        filters = self.filter_fn(total).chunk(self.order - 1)
        skips = self.filter_fn.bias.chunk(self.order - 1)
        kept: list[Tensor] = []
        for before, gate, kernel, skip in zip(past, reversed(gates[1:]), filters, skips, strict=True):
            whole, held = with_past(zero_padding(v * gate, lengths), before, lengths, return_state)
            v = _convolved(whole, kernel, length, skip)
            kept += [] if held is None else [held]
        y = self.out_proj((v * gates[0]).to(x.dtype))
        return y, {"short": window, "long": torch.cat(kept, -1)} if return_state else None

    def materialize(self, x: Tensor) -> Tensor:
        """The matrix that the projected values of each channel are multiplied with, (B, H, L, L), before ``out_proj``.

        Lower triangular: a product of diagonal gates and Toeplitz matrices.
        """
        u, _ = causal_conv(self.in_proj(x), self.short_filter, None, None)
        *gates, _ = u.chunk(self.order + 1, -1)
        length = x.shape[1]
        lag = torch.arange(length, device=x.device)[:, None] - torch.arange(length, device=x.device)
        found = torch.eye(length, device=x.device, dtype=u.dtype)
        filters = self.filter_fn(length).chunk(self.order - 1)
        skips = self.filter_fn.bias.chunk(self.order - 1)
        for gate, kernel, skip in zip(reversed(gates[1:]), filters, skips, strict=True):
            toeplitz = torch.where(lag >= 0, kernel[:, lag.clamp(min=0)], 0) + skip[:, None, None] * torch.eye(length)
            found = toeplitz.to(u.dtype) @ (gate.mT[..., None] * found)
        return gates[0].mT[..., None] * found


class _Taps(SequenceMixer):
    """``W GELU(K * x + D x)`` with J kernels of a finite length for each channel."""

    growing: ClassVar[frozenset[str]] = frozenset({"past"})

    def taps(self, length: int) -> Tensor:
        """(J, H, taps), two sets of J when the layer looks both ways."""
        raise NotImplementedError

    def _empty(self, batch: int, device: torch.device | None, dtype: torch.dtype) -> State:
        return {"past": torch.zeros(batch, 0, self.d_model, device=device, dtype=dtype)}

    def _convolve(
        self, x: Tensor, D: Tensor, state: State | None, lengths: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        length = x.shape[1]
        whole, held = with_past(x, None if state is None else state["past"], lengths, return_state)
        taps = self.taps(whole.shape[1])
        if self.causal:
            found = [_convolved(whole, kernel, length, skip) for kernel, skip in zip(taps, D, strict=True)]
        else:
            forwards, backwards = taps.chunk(2)
            centred = torch.cat([backwards.flip(-1)[..., 1:], forwards], -1)
            with autocast_off(x):
                found = [long_convolution(x, k, d, bidirectional=True) for k, d in zip(centred, D, strict=True)]
        return torch.cat(found, -1), {"past": held} if held is not None else None


class LongConv(_Taps):
    """Long convolution with free taps (Fu et al., 2023, arXiv 2302.06646): squashed towards zero, nothing else.

    Named as the official ``LongConv`` (``kernel``, ``D``, ``output_linear``). The official layer calls itself causal
    and holds 2 L taps for sequences of L, the later half of which wraps around and looks into the future; that is
    ``bidirectional=True`` here, which loads its state dicts, and the causal layer has L taps.

    Args:
        d_model: width.
        l_max: longest sequence.
        channels: kernels of a channel.
        squash: taps are drawn this much towards zero, and those below it become zero.
        dropout, kernel_dropout: on the activations, and on the taps.
        bidirectional: look both ways.

    Example:
        >>> y, state = LongConv(8, l_max=128)(torch.randn(2, 100, 8))
    """

    def __init__(
        self, d_model: int, l_max: int, *, channels: int = 1, squash: float = 1e-3, dropout: float = 0.0,
        kernel_dropout: float = 0.0, bidirectional: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(d_model, causal=not bidirectional, max_length=l_max)
        self.squash = squash
        self.kernel = nn.Parameter(torch.randn(channels, d_model, l_max * (1 + bidirectional)) * 0.02)
        self.D = nn.Parameter(torch.randn(channels, d_model))
        self.dropout, self.kernel_drop = nn.Dropout(dropout), nn.Dropout(kernel_dropout)
        self.output_linear = nn.Sequential(nn.Linear(channels * d_model, 2 * d_model), nn.GLU(-1))

    def taps(self, length: int) -> Tensor:
        """(J, H, L), or (2 J, H, L) with the taps of the future behind."""
        kernel = self.kernel_drop(F.softshrink(self.kernel, self.squash))
        assert self.max_length is not None
        if self.causal:
            return kernel[..., :length]
        # position 2 L - s of a transform of length 2 L is the place s ahead
        return torch.cat([kernel[..., :length], kernel.flip(-1)[..., :length]])

    def _mix(
        self, x: Tensor, state: State | None, lengths: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        y, new = self._convolve(x, self.D, state, lengths, return_state)
        return self.output_linear(self.dropout(F.gelu(y))), new


class SGConv(_Taps):
    """SGConv (Li et al., 2022, arXiv 2210.09298): a kernel of few numbers, coarser and smaller the further back.

    Scale i is its ``kernel_dim`` numbers stretched by ``2^{max(0, i - 1)}`` and times ``decay^{scales - 1 - i}``, all
    of them one behind the other, divided by the norm that the kernel began with. Named as the official ``GConv``
    (``kernel_list``, ``multiplier``, ``kernel_norm``, ``D``, ``output_linear``).

    Args:
        d_model: width.
        l_max: length that scales are made for; the kernel is zero beyond them, and no longer sequence is refused.
        kernel_dim: numbers of a scale.
        decay: of each scale against the one before.
        dropout: on the activations.
        bidirectional: a second kernel for the future, whose first tap is the next place.

    Example:
        >>> y, state = SGConv(8, l_max=128, kernel_dim=16)(torch.randn(2, 100, 8))
    """

    multiplier: Tensor
    kernel_norm: Tensor

    def __init__(
        self, d_model: int, l_max: int, *, kernel_dim: int = 64, decay: float = 2.0, dropout: float = 0.0,
        bidirectional: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(d_model, causal=not bidirectional)
        scales = 1 + max(0, math.ceil(math.log2(l_max / kernel_dim)))
        sides = 1 + bidirectional
        self.kernel_list = nn.ParameterList(torch.randn(sides, d_model, kernel_dim) for _ in range(scales))
        self.register_buffer("multiplier", torch.full((1, d_model, 1), decay))
        self.register_buffer("kernel_norm", torch.ones(sides, d_model, 1))
        self.register_buffer("kernel_norm_initialized", torch.tensor(True))
        with torch.no_grad():
            self.kernel_norm.copy_(self._raw().norm(dim=-1, keepdim=True))
        self.D = nn.Parameter(torch.randn(1, d_model))
        self.dropout = nn.Dropout(dropout)
        self.output_linear = nn.Linear(d_model, d_model)
        self.register_load_state_dict_pre_hook(_without_length)

    def _raw(self) -> Tensor:
        pieces = []
        for i, piece in enumerate(self.kernel_list):
            stretched = F.interpolate(full(piece), scale_factor=2.0 ** max(0, i - 1), mode="linear")
            pieces.append(stretched * self.multiplier ** (len(self.kernel_list) - 1 - i))
        return torch.cat(pieces, -1)

    def taps(self, length: int) -> Tensor:
        """(1, H, taps), or (2, H, taps)."""
        kernel = self._raw() / self.kernel_norm
        if self.causal:
            return kernel[..., :length]
        return F.pad(kernel, (0, max(0, length - kernel.shape[-1])))[..., :length]

    def _mix(
        self, x: Tensor, state: State | None, lengths: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        y, new = self._convolve(x, self.D, state, lengths, return_state)
        return self.output_linear(self.dropout(F.gelu(y))), new


def _without_length(module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """The official layer's linear map acts on channels first; its weight is (out, in) all the same."""
    name = f"{prefix}output_linear.weight"
    if name in state_dict and state_dict[name].ndim == 3:
        state_dict[name] = state_dict[name].squeeze(-1)


class _RMS(nn.Module):
    """``x / rms(x)`` without weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1, eps=1e-8) * x.shape[-1] ** 0.5


def _one_decay(module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """The official layer holds its decay once for each feature, all the same and not learned."""
    assert isinstance(module, TNN)
    held = state_dict.pop(f"{prefix}toep.gamma", None)
    if held is not None:
        if not bool((held == held.flatten()[0]).all()):
            raise ValueError("toep.gamma differs between features (use_multi_decay), which TNN does not have")
        module.decay = float(held.flatten()[0])


class TNN(SequenceMixer):
    """TNN, Toeplitz neural network (Qin et al., 2023, arXiv 2305.04749): gated Toeplitz unit.

    Taps come from a small network over relative positions times ``decay`` to the distance, so any length is possible.
    Named as the official ``Gtu`` (``u_proj``, ``v_proj``, ``o``, ``toep.rpe``) with ``use_decay``, positions 0, 1, 2,
    ... (``par_type=1``) and SimpleRMSNorm.

    Args:
        d_model: width.
        expand: inner channels per feature.
        rpe_width, rpe_layers: of the network over positions.
        decay: lambda of the paper, 0.99; 1 for none.
        causal: look into the past alone.

    Example:
        >>> y, state = TNN(8, rpe_width=16)(torch.randn(2, 100, 8))
    """

    growing: ClassVar[frozenset[str]] = frozenset({"past"})

    def __init__(
        self, d_model: int, *, expand: int = 3, rpe_width: int = 64, rpe_layers: int = 3, decay: float = 0.99,
        causal: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(d_model, causal=causal)
        if not 0 < decay <= 1:
            raise ValueError(f"decay must lie in (0, 1], got {decay}")
        inner = expand * d_model
        self.decay = decay
        self.v_proj, self.u_proj = nn.Linear(d_model, inner), nn.Linear(d_model, inner)
        self.o = nn.Linear(inner, d_model)
        self.register_load_state_dict_pre_hook(_one_decay)
        self.toep = nn.Module()
        self.toep.rpe = nn.Module()
        self.toep.rpe.pos_proj = nn.Linear(1, rpe_width)
        self.toep.rpe.layers = nn.ModuleList(
            nn.Sequential(_RMS(), nn.ReLU(), nn.Linear(rpe_width, rpe_width)) for _ in range(rpe_layers)
        )
        self.toep.rpe.out = nn.Sequential(_RMS(), nn.ReLU(), nn.Linear(rpe_width, inner))

    def _taps(self, places: Tensor) -> Tensor:
        """(inner, places)."""
        rpe: Any = self.toep.rpe
        h = rpe.pos_proj(places[:, None].to(rpe.pos_proj.weight.dtype))
        for layer in rpe.layers:
            h = layer(h)
        return (full(rpe.out(h)) * self.decay ** places.abs()[:, None]).mT

    def _empty(self, batch: int, device: torch.device | None, dtype: torch.dtype) -> State:
        return {"past": torch.zeros(batch, 0, self.o.in_features, device=device, dtype=dtype)}

    def _mix(
        self, x: Tensor, state: State | None, lengths: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        length = x.shape[1]
        u, v = F.silu(self.u_proj(x)), zero_padding(F.silu(self.v_proj(x)), lengths)
        whole, held = with_past(v, None if state is None else state["past"], lengths, return_state)
        total = whole.shape[1]
        if self.causal:
            y = _convolved(whole, self._taps(torch.arange(total, device=x.device)), length)
        else:
            taps = self._taps(torch.arange(1 - total, total, device=x.device))
            with autocast_off(x):
                y = long_convolution(whole, taps, bidirectional=True)
        return self.o((u * y).to(x.dtype)), None if held is None else {"past": held}

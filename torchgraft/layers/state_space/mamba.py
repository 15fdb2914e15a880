"""Mamba (Gu and Dao, 2023, arXiv 2312.00752) and Mamba-2 (Dao and Gu, 2024, arXiv 2405.21060).

Parameters are named and shaped as in mamba-ssm and in transformers, so state dicts of their mixers load as they are.

Legend: B batch, L length, D inner channels, N states, H heads, P features of a head, G groups.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.layers.state_space.linear import full
from torchgraft.layers.state_space.mixer import (
    SequenceMixer,
    State,
    causal_conv,
    causal_conv_step,
    inside,
    inverse_softplus,
    log_uniform,
    wide,
)
from torchgraft.ops.selective_scan import selective_scan, selective_scan_step
from torchgraft.ops.ssd import ssd, ssd_step

__all__ = ["Mamba", "Mamba2"]


def _kernels_here(x: Tensor) -> bool:
    return x.is_cuda and find_spec("mamba_ssm") is not None and not torch.compiler.is_compiling()


class Mamba(SequenceMixer):
    """Mamba: a state space whose steps, inputs and outputs depend on what comes in.

    On a GPU with mamba-ssm installed, whole sequences without padding and without an earlier state go through its
    kernel; everything else through ``selective_scan``.

    Args:
        d_model: width.
        d_state: states of a channel.
        d_conv: taps of the short convolution.
        expand: inner channels per feature.
        dt_rank: rank of the step sizes, ``ceil(d_model / 16)`` without it.
        dt_min, dt_max: range of step sizes to begin with.
        bias: biases of the outer projections.
        conv_bias: bias of the short convolution.

    Example:
        >>> layer = Mamba(8)
        >>> y, state = layer(torch.randn(2, 100, 8))
        >>> {name: tuple(s.shape) for name, s in state.items()}
        {'conv': (2, 3, 16), 'ssm': (2, 16, 16)}
    """

    dynamics: ClassVar[tuple[str, ...]] = ("A_log", "D", "dt_proj.bias")

    def __init__(
        self, d_model: int, d_state: int = 16, *, d_conv: int = 4, expand: int = 2, dt_rank: int | None = None,
        dt_min: float = 1e-3, dt_max: float = 1e-1, bias: bool = False, conv_bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(d_model)
        self.d_state, self.d_inner = d_state, expand * d_model
        self.dt_rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias)
        self.conv1d = nn.Conv1d(
            self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1, bias=conv_bias
        )
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner)
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(self.d_inner, 1))
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)
        with torch.no_grad():
            nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
            self.dt_proj.bias.copy_(inverse_softplus(log_uniform((self.d_inner,), dt_min, dt_max).exp()))

    def _empty(self, batch: int, device: torch.device | None, dtype: torch.dtype) -> State:
        taps = self.conv1d.kernel_size[0] - 1
        return {
            "conv": torch.zeros(batch, taps, self.d_inner, device=device, dtype=dtype),
            "ssm": torch.zeros(batch, self.d_inner, self.d_state, device=device, dtype=wide(dtype)),
        }

    def _selection(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step sizes, inputs and outputs of (..., D)."""
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], -1)
        return F.softplus(self.dt_proj(dt)), B, C

    def _mix(
        self, x: Tensor, state: State | None, lengths: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        x, z = self.in_proj(x).chunk(2, -1)
        x, window = causal_conv(x, self.conv1d, None if state is None else state["conv"], lengths)
        x = F.silu(x)
        dt, B, C = self._selection(x)
        A = -full(self.A_log).exp()
        if state is None and lengths is None and _kernels_here(x):
            y, last = _fused_scan(x, dt, A, B, C, self.D)
        else:
            y, last = selective_scan(
                x, dt, A, B, C, self.D, initial_state=None if state is None else state["ssm"], mask=inside(x, lengths)
            )
        y = self.out_proj(y.to(z.dtype) * F.silu(z))
        return y, {"conv": window, "ssm": last} if return_state else None

    def _step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        x, z = self.in_proj(x).chunk(2, -1)
        x, window = causal_conv_step(x, self.conv1d, state["conv"])
        x = F.silu(x)
        dt, B, C = self._selection(x)
        y, last = selective_scan_step(x, dt, -full(self.A_log).exp(), B, C, self.D, state=state["ssm"])
        return self.out_proj(y * F.silu(z)), {"conv": window, "ssm": last}

    @torch.no_grad()
    def materialize(self, x: Tensor) -> Tensor:
        """The matrix of each inner channel that its convolved inputs are multiplied with, (B, D, L, L), without D."""
        inner = self.in_proj(x).chunk(2, -1)[0]
        inner = F.silu(causal_conv(inner, self.conv1d, None, None)[0])
        dt, B, C = self._selection(inner)
        A = -full(self.A_log).exp()
        total = dt.cumsum(1)
        length = x.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        found = torch.zeros(len(x), self.d_inner, length, length, dtype=A.dtype, device=x.device)
        # (B, D, L, L), one state after another: all at once would be N times as much
        gap = (total.mT[..., :, None] - total.mT[..., None, :]).masked_fill(~later, 0)
        for n in range(self.d_state):
            outer = C[:, None, :, n, None] * B[:, None, None, :, n]
            found += outer * (gap * A[:, n, None, None]).exp()
        return (found * dt.mT[..., None, :]).masked_fill(~later, 0)


def _fused_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
    """mamba-ssm's kernel, whose time is last."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    y, last = selective_scan_fn(
        x.mT.contiguous(), dt.mT.contiguous().to(x.dtype), A, B.mT.contiguous(), C.mT.contiguous(), full(D),
        return_last_state=True,
    )  # fmt: skip
    return y.mT, last


class GatedRMSNorm(nn.Module):
    """``weight * x / rms(x)`` of ``x * silu(gate)``, in groups of features, in float32."""

    def __init__(self, width: int, groups: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.groups, self.eps = groups, eps

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Both of shape (..., width)."""
        y = (full(x) * F.silu(full(gate))).unflatten(-1, (self.groups, -1))
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.flatten(-2).to(x.dtype)


class Mamba2(SequenceMixer):
    """Mamba-2: one decay for each head, so that a sequence is computed by matrix products.

    Args:
        d_model: width.
        d_state: states of a head.
        head_dim: features of a head; ``expand * d_model`` must be a multiple of it.
        groups: groups of heads that share inputs and outputs.
        d_conv: taps of the short convolution.
        expand: inner channels per feature.
        chunk_size: of the scan; changes speed alone.
        dt_min, dt_max: range of step sizes to begin with.
        dt_limit: step sizes are clamped to it.
        bias, conv_bias: biases of the outer projections and of the short convolution.
        eps: of the norm.

    Example:
        >>> y, state = Mamba2(16, d_state=8, head_dim=8)(torch.randn(2, 100, 16))
    """

    dynamics: ClassVar[tuple[str, ...]] = ("A_log", "D", "dt_bias")

    def __init__(
        self, d_model: int, d_state: int = 64, *, head_dim: int = 64, groups: int = 1, d_conv: int = 4, expand: int = 2,
        chunk_size: int = 64, dt_min: float = 1e-3, dt_max: float = 1e-1,
        dt_limit: tuple[float, float] = (0.0, math.inf), bias: bool = False, conv_bias: bool = True, eps: float = 1e-5,
    ) -> None:  # fmt: skip
        super().__init__(d_model)
        inner = expand * d_model
        if inner % head_dim or (inner // head_dim) % groups:
            raise ValueError(
                f"expand * d_model = {inner} must be a multiple of head_dim {head_dim}, and the number of heads one of "
                f"{groups} groups"
            )
        self.d_state, self.d_inner, self.head_dim, self.groups = d_state, inner, head_dim, groups
        self.heads, self.chunk_size, self.dt_limit = inner // head_dim, chunk_size, dt_limit
        width = inner + 2 * groups * d_state
        self.in_proj = nn.Linear(d_model, inner + width + self.heads, bias=bias)
        self.conv1d = nn.Conv1d(width, width, d_conv, groups=width, padding=d_conv - 1, bias=conv_bias)
        self.dt_bias = nn.Parameter(inverse_softplus(log_uniform((self.heads,), dt_min, dt_max).exp()))
        self.A_log = nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = GatedRMSNorm(inner, groups, eps)
        self.out_proj = nn.Linear(inner, d_model, bias=bias)

    def _empty(self, batch: int, device: torch.device | None, dtype: torch.dtype) -> State:
        taps, width = self.conv1d.kernel_size[0] - 1, self.conv1d.out_channels
        size = (batch, self.heads, self.head_dim, self.d_state)
        return {
            "conv": torch.zeros(batch, taps, width, device=device, dtype=dtype),
            "ssm": torch.zeros(size, device=device, dtype=wide(dtype)),
        }

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gate, what is convolved, and raw step sizes."""
        z, inner, dt = self.in_proj(x).split([self.d_inner, self.conv1d.out_channels, self.heads], -1)
        return z, inner, dt

    def _scanned(self, inner: Tensor, dt: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        x, B, C = F.silu(inner).split([self.d_inner, self.groups * self.d_state, self.groups * self.d_state], -1)
        dt = F.softplus(dt + self.dt_bias).clamp(*self.dt_limit)
        B, C = (t.unflatten(-1, (self.groups, self.d_state)) for t in (B, C))
        return x.unflatten(-1, (self.heads, self.head_dim)), dt, -full(self.A_log).exp(), B, C

    def _mix(
        self, x: Tensor, state: State | None, lengths: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        z, inner, dt = self._parts(x)
        inner, window = causal_conv(inner, self.conv1d, None if state is None else state["conv"], lengths)
        parts = self._scanned(inner, dt)
        if state is None and lengths is None and _kernels_here(x):
            y, last = _fused_ssd(parts, self.D, self.chunk_size)
        else:
            y, last = ssd(
                *parts, self.D, initial_state=None if state is None else state["ssm"], mask=inside(x, lengths),
                chunk_size=self.chunk_size,
            )  # fmt: skip
        y = self.out_proj(self.norm(y.flatten(2), z).to(x.dtype))
        return y, {"conv": window, "ssm": last} if return_state else None

    def _step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        z, inner, dt = self._parts(x)
        inner, window = causal_conv_step(inner, self.conv1d, state["conv"])
        y, last = ssd_step(*self._scanned(inner, dt), self.D, state=state["ssm"])
        return self.out_proj(self.norm(y.flatten(1), z).to(x.dtype)), {"conv": window, "ssm": last}


def _fused_ssd(parts: tuple[Tensor, ...], D: Tensor, chunk_size: int) -> Any:
    """mamba-ssm's kernel."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    x, dt, A, B, C = parts
    return mamba_chunk_scan_combined(
        x.contiguous(), dt, A, B.contiguous(), C.contiguous(), chunk_size, D=full(D), return_final_states=True
    )

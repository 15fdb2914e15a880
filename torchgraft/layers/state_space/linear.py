"""Linear time-invariant state spaces as kernels, and S4D, DSS and S4 around them.

Legend: B batch, L length, H channels, N states (one of each pair of conjugates), J kernels of a channel (two when the
layer looks both ways).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.layers.state_space.mixer import (
    SequenceMixer,
    State,
    complex_of,
    even,
    log_uniform,
    right_aligned,
    wide,
)
from torchgraft.ops._precision import autocast_off
from torchgraft.ops.hippo import Measure, normal_plus_low_rank
from torchgraft.ops.kernels import (
    Discretization,
    advance,
    discretize_diagonal,
    discretize_dplr,
    dplr_kernel,
    dss_coefficients,
    krylov,
    vandermonde,
    vandermonde_transpose,
)
from torchgraft.ops.long_convolution import long_convolution

__all__ = ["DSS", "S4", "S4D", "DPLRKernel", "DSSKernel", "DiagonalKernel"]

Init = Literal["lin", "inv", "legs"]


def initial_eigenvalues(init: Init, states: int) -> Tensor:
    """S4D's eigenvalues (Gu et al., 2022, section 4), one of each pair, complex64 (states / 2,)."""
    n = torch.arange(even(states), dtype=torch.float64)
    if init == "lin":
        imaginary = torch.pi * n
    elif init == "inv":
        imaginary = states / torch.pi * (states / (2 * n + 1) - 1)
    elif init == "legs":
        return normal_plus_low_rank("legs", states)[0].to(torch.complex64)
    else:
        raise ValueError(f"init must be 'lin', 'inv' or 'legs', got {init!r}")
    return torch.complex(torch.full_like(imaginary, -0.5), imaginary).to(torch.complex64)


def full(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(wide(x.dtype))


def as_complex(x: Tensor) -> Tensor:
    """(..., 2) to complex."""
    return torch.view_as_complex(full(x).contiguous())


class Kernel(nn.Module):
    """A linear map of the past of each channel; called with a length it gives its taps, (J, H, L)."""

    def empty(self, batch: int, device: torch.device | None, dtype: torch.dtype) -> Tensor:
        """State before the first place."""
        raise NotImplementedError

    def response(self, state: Tensor, length: int) -> Tensor:
        """What a state alone goes on to put out, (B, L, H)."""
        raise NotImplementedError

    def final(self, u: Tensor, state: Tensor | None, lengths: Tensor | None) -> Tensor:
        """The state behind a sequence (B, L, H), of which zeros stand behind the true lengths."""
        raise NotImplementedError

    def step(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One place (B, H)."""
        raise NotImplementedError


class _Diagonal(Kernel):
    """``h_t = a h_{t-1} + b u_t, y_t = Re(c h_t)``, elementwise."""

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor]:
        """``log_a`` (H, N), ``b`` (H, N) and ``c`` (J, H, N)."""
        raise NotImplementedError

    def forward(self, length: int) -> Tensor:
        log_a, b, c = self.coefficients()
        return vandermonde(c * b, log_a, length)

    def response(self, state: Tensor, length: int) -> Tensor:
        log_a, _, c = self.coefficients()
        return vandermonde(c[0] * log_a.exp() * state, log_a, length).mT

    def final(self, u: Tensor, state: Tensor | None, lengths: Tensor | None) -> Tensor:
        log_a, b, _ = self.coefficients()
        found = b * vandermonde_transpose(right_aligned(u, lengths).flip(1), log_a)
        if state is None:
            return found
        steps = u.shape[1] if lengths is None else lengths[:, None, None]
        return found + (log_a * steps).exp() * state

    def step(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        log_a, b, c = self.coefficients()
        state = log_a.exp() * state + b * full(u)[..., None]
        return (c[0] * state).sum(-1).real.to(u.dtype), state


class DiagonalKernel(_Diagonal):
    """State spaces of S4D: ``x' = A x + B u, y = 2 Re(C x)``, the real parts of A kept negative by an exponential.

    Args:
        d_model: H.
        d_state: number of states, even.
        init: eigenvalues to begin with.
        discretization: ``"zoh"`` or ``"bilinear"``.
        trainable_b: learn B too; it is one otherwise.
        bidirectional: two kernels, one for the past and one for the future.
        dt_min, dt_max: range of step sizes to begin with.
        bandlimit: states that turn faster than this share of the sampling frequency are silent (S4ND, section 3.3).
    """

    def __init__(
        self, d_model: int, d_state: int = 64, *, init: Init = "lin", discretization: Discretization = "zoh",
        trainable_b: bool = False, bidirectional: bool = False, dt_min: float = 1e-3, dt_max: float = 1e-1,
        bandlimit: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        half = even(d_state)
        discretize_diagonal(-torch.ones(1), torch.ones(1), discretization)
        self.discretization: Discretization = discretization
        self.bandlimit = bandlimit
        eigenvalues = initial_eigenvalues(init, d_state)
        self.log_dt = nn.Parameter(log_uniform((d_model,), dt_min, dt_max))
        self.log_A_real = nn.Parameter((-eigenvalues.real).log().repeat(d_model, 1))
        self.A_imag = nn.Parameter(eigenvalues.imag.repeat(d_model, 1))
        self.C = nn.Parameter(torch.randn(1 + bidirectional, d_model, half, 2) * 0.5**0.5)
        self.B = nn.Parameter(torch.tensor([1.0, 0.0]).repeat(d_model, half, 1)) if trainable_b else None

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor]:
        """``log_a``, ``b`` and ``c``."""
        A = torch.complex(-full(self.log_A_real).exp(), full(self.A_imag))
        dt = full(self.log_dt).exp()[:, None]
        log_a, b = discretize_diagonal(A, dt, self.discretization)
        c = 2 * as_complex(self.C)
        if self.B is not None:
            b = b * as_complex(self.B)
        if self.bandlimit is not None:
            c = c * (dt * A.imag.abs() / (2 * math.pi) < self.bandlimit / 2)
        return log_a, b, c

    def empty(self, batch: int, device: torch.device | None, dtype: torch.dtype) -> Tensor:
        """Zeros, complex."""
        return torch.zeros(batch, *self.A_imag.shape, device=device, dtype=complex_of(dtype))


class DSSKernel(_Diagonal):
    """Diagonal state spaces of DSS (Gupta et al., 2022): all states complex, real part taken once.

    Args:
        d_model: H.
        d_state: number of complex states.
        normalize: ``"softmax"`` divides powers by their sum over ``l_max`` places and lets real parts be positive;
            ``"exp"`` keeps them negative.
        l_max: length of the normalisation, and the longest sequence.
        dt_min, dt_max: range of step sizes to begin with.
    """

    def __init__(
        self, d_model: int, d_state: int = 64, *, normalize: Literal["softmax", "exp"] = "exp",
        l_max: int | None = None, dt_min: float = 1e-3, dt_max: float = 1e-1,
    ) -> None:  # fmt: skip
        super().__init__()
        if normalize not in ("softmax", "exp"):
            raise ValueError(f"normalize must be 'softmax' or 'exp', got {normalize!r}")
        if normalize == "softmax" and l_max is None:
            raise ValueError("l_max must be given for normalize='softmax': its kernel depends on the length")
        self.length = l_max if normalize == "softmax" else None
        # the skew of HiPPO's normal part, as its authors begin
        eigenvalues = initial_eigenvalues("legs", 2 * d_state)
        real = eigenvalues.real if normalize == "softmax" else (-eigenvalues.real).log()
        self.log_dt = nn.Parameter(log_uniform((d_model,), dt_min, dt_max))
        self.Lambda_re = nn.Parameter(real.repeat(d_model, 1))
        self.Lambda_im = nn.Parameter(eigenvalues.imag.repeat(d_model, 1))
        self.W = nn.Parameter(torch.randn(1, d_model, d_state, 2))

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor]:
        """``log_a``, ``b`` and ``c``."""
        real = full(self.Lambda_re) if self.length is not None else -full(self.Lambda_re).exp()
        A = torch.complex(real, full(self.Lambda_im))
        log_a, b, c = dss_coefficients(A, full(self.log_dt).exp(), self.length)
        return log_a, b, c * as_complex(self.W)

    def empty(self, batch: int, device: torch.device | None, dtype: torch.dtype) -> Tensor:
        """Zeros, complex."""
        return torch.zeros(batch, *self.Lambda_im.shape, device=device, dtype=complex_of(dtype))


class DPLRKernel(Kernel):
    """State spaces of S4: diagonal plus low rank, bilinear, kernel by its generating function.

    C is held times ``I - a^l_kernel``, as the reference code holds it once ``l_kernel`` is set. Sequences beyond
    ``l_kernel`` use it doubled as often as they need, which is the same function and changes no parameter.

    Args:
        d_model: H.
        d_state: number of states, even.
        init: ``"legs"``, ``"legt"`` (rank 2) or ``"fout"``.
        l_kernel: length that C is held for.
        bidirectional: two kernels, one for the past and one for the future.
        dt_min, dt_max: range of step sizes to begin with.
    """

    l_kernel: Tensor

    def __init__(
        self, d_model: int, d_state: int = 64, *, init: Measure = "legs", l_kernel: int = 1024,
        bidirectional: bool = False, dt_min: float = 1e-3, dt_max: float = 1e-1,
    ) -> None:  # fmt: skip
        super().__init__()
        even(d_state)
        if l_kernel < 1:
            raise ValueError(f"l_kernel must be at least 1, got {l_kernel}")
        lam, P, B, _ = (t.to(torch.complex64) for t in normal_plus_low_rank(init, d_state))
        self.log_dt = nn.Parameter(log_uniform((d_model,), dt_min, dt_max))
        # the normal parts of legt and fout do not decay at all; the reference code begins at 1e-4 too
        self.log_A_real = nn.Parameter((-lam.real).clamp(min=1e-4).log().repeat(d_model, 1))
        self.A_imag = nn.Parameter(lam.imag.repeat(d_model, 1))
        self.P = nn.Parameter(torch.view_as_real(P[:, None].repeat(1, d_model, 1)))
        self.B = nn.Parameter(torch.view_as_real(B.repeat(d_model, 1)))
        C = torch.randn(1 + bidirectional, d_model, d_state // 2, 2) * 0.5**0.5
        self.register_buffer("l_kernel", torch.tensor(l_kernel))
        # a Python number, since the length must be known while torch.compile traces
        self._length = l_kernel
        self.C = nn.Parameter(C)
        self._hold()

    @torch.no_grad()
    def _hold(self) -> None:
        """C itself to C times ``I - a^l_kernel``."""
        C, half = full(self.C), self.C.shape[2]
        row = torch.cat([C[..., 0], -C[..., 1]], -1)
        row = row - torch.einsum("jhm,hmn->jhn", row, torch.linalg.matrix_power(self._dense()[0], self._length))
        self.C.copy_(torch.stack([row[..., :half], -row[..., half:]], -1))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._prepared = None
        if int(self.l_kernel) == 0:
            # an official layer that has not run yet holds C itself
            self.l_kernel.fill_(self._length)
            self._hold()
        self._length = int(self.l_kernel)

    def _parameters_complex(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        A = torch.complex(-full(self.log_A_real).exp(), full(self.A_imag))
        return A, as_complex(self.P), as_complex(self.B), full(self.log_dt).exp()

    def _dense(self) -> tuple[Tensor, Tensor]:
        A, P, B, dt = self._parameters_complex()
        return discretize_dplr(A, P, B, dt)

    def _readout(self, a: Tensor) -> Tensor:
        """C itself as a real row, (J, H, M): ``y = row . h``."""
        C = full(self.C)
        held = 2 * torch.cat([C[..., 0], -C[..., 1]], -1)
        eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        power = torch.linalg.matrix_power(a, self._length)
        return torch.linalg.solve((eye - power).mT, held.permute(1, 2, 0)).permute(2, 0, 1)

    def forward(self, length: int) -> Tensor:
        """Taps (J, H, L)."""
        A, P, B, dt = self._parameters_complex()
        C, held = as_complex(self.C), self._length
        if length > held:
            a = torch.linalg.matrix_power(self._dense()[0], held)
            row = torch.cat([C.real, -C.imag], -1)
            while held < length:
                row, a, held = row + torch.einsum("jhm,hmn->jhn", row, a), a @ a, 2 * held
            half = C.shape[-1]
            C = torch.complex(row[..., :half], -row[..., half:])
        return dplr_kernel(A, P, B, C, dt, held)[..., :length]

    def empty(self, batch: int, device: torch.device | None, dtype: torch.dtype) -> Tensor:
        """Zeros: real parts, then imaginary parts."""
        channels, half = self.A_imag.shape
        return torch.zeros(batch, channels, 2 * half, device=device, dtype=wide(dtype))

    def response(self, state: Tensor, length: int) -> Tensor:
        """What a state alone goes on to put out, (B, L, H)."""
        a, _ = self._dense()
        rows = krylov(a.mT, torch.einsum("hm,hmn->hn", self._readout(a)[0], a), length)
        return torch.einsum("hml,bhm->blh", rows, state)

    def final(self, u: Tensor, state: Tensor | None, lengths: Tensor | None) -> Tensor:
        """The state behind a sequence."""
        a, b = self._dense()
        return advance(a, b, right_aligned(u, lengths), state, lengths)

    def step(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One place. The dense matrices are made anew each time; ``prepare`` them for long decoding."""
        a, b, row = self._prepared if self._prepared is not None else self.prepare()
        state = torch.einsum("hmn,bhn->bhm", a, state) + b * full(u)[..., None]
        return (row * state).sum(-1).to(u.dtype), state

    _prepared: tuple[Tensor, Tensor, Tensor] | None = None

    def prepare(self, keep: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Matrices of a step; with ``keep`` they are used until the layer is put into training mode."""
        a, b = self._dense()
        found = a, b, self._readout(a)[0]
        self._prepared = found if keep else None
        return found

    def train(self, mode: bool = True) -> DPLRKernel:
        """Training mode; prepared matrices are dropped."""
        self._prepared = None
        return super().train(mode)


def apply_kernel(
    kernel: Kernel, u: Tensor, state: Tensor | None, lengths: Tensor | None, return_state: bool,
    skip: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Outputs (B, L, H) of a kernel over (B, L, H), and its state behind them."""
    with autocast_off(u):
        taps = kernel(u.shape[1])
        if len(taps) == 2:
            # the first tap of the future is the next place
            centred = torch.cat([taps[1].flip(-1)[:, 1:], taps[0]], -1)
            y = long_convolution(u, centred, skip, bidirectional=True)
        else:
            y = long_convolution(u, taps[0], skip)
        if state is not None:
            y = y + kernel.response(state, u.shape[1]).to(y.dtype)
        new = kernel.final(full(u), state, lengths) if return_state else None
    return y, new


class LinearMixer(SequenceMixer):
    """``GLU(W GELU(K * u + D u))`` around a kernel; what S4, S4D and DSS have in common.

    State dicts of the official S4 code load: ``S4D`` of ``models/s4/s4d.py``, and ``S4Block`` (with one channel) of
    ``models/s4/s4.py`` with the kernel of this layer.
    """

    def __init__(self, d_model: int, kernel: Kernel, *, dropout: float = 0.0, bidirectional: bool = False) -> None:
        super().__init__(d_model, causal=not bidirectional)
        self.kernel = kernel
        self.D = nn.Parameter(torch.randn(d_model))
        self.dropout = nn.Dropout(dropout)
        self.output_linear = nn.Linear(d_model, 2 * d_model)
        self.register_load_state_dict_pre_hook(_official)

    def _after(self, y: Tensor) -> Tensor:
        return F.glu(self.output_linear(self.dropout(F.gelu(y))), -1)

    def _empty(self, batch: int, device: torch.device | None, dtype: torch.dtype) -> State:
        return {"ssm": self.kernel.empty(batch, device, dtype)}

    def _mix(
        self, x: Tensor, state: State | None, lengths: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        y, new = apply_kernel(
            self.kernel, x, None if state is None else state["ssm"], lengths, return_state, self.D
        )  # fmt: skip
        return self._after(y), None if new is None else {"ssm": new}

    def _step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        y, new = self.kernel.step(x, state["ssm"])
        return self._after(y + x * self.D), {"ssm": new}


def _official(module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Bring the names and shapes of the official code to ours, in place; what has ours already stays."""
    assert isinstance(module, LinearMixer)
    if f"{prefix}layer.D" in state_dict:
        for name in [n for n in state_dict if n.startswith(f"{prefix}layer.")]:
            state_dict[prefix + name.removeprefix(f"{prefix}layer.")] = state_dict.pop(name)
        k = f"{prefix}kernel."
        state_dict[f"{prefix}D"] = state_dict[f"{prefix}D"].squeeze(0)
        channels = len(state_dict[f"{prefix}D"])
        state_dict[f"{k}log_dt"] = state_dict.pop(f"{k}inv_dt").squeeze(-1)
        state_dict[f"{k}log_A_real"] = state_dict.pop(f"{k}A_real")
        # the other one of each pair of conjugates: both kernels and states are conjugated as a whole
        for name in ("B", "C", "P"):
            if f"{k}{name}" in state_dict:
                state_dict[f"{k}{name}"] = state_dict[f"{k}{name}"] * torch.tensor([1.0, -1.0])
        state_dict[f"{k}B"] = state_dict[f"{k}B"].squeeze(0)
        # eigenvalues shared by several channels
        for name, axis in (("B", 0), ("log_A_real", 0), ("A_imag", 0), ("P", 1)):
            if f"{k}{name}" in state_dict:
                held = state_dict[f"{k}{name}"]
                state_dict[f"{k}{name}"] = torch.cat([held] * (channels // held.shape[axis]), axis)
    name = f"{prefix}kernel.C"
    if name in state_dict and state_dict[name].ndim == 3:
        state_dict[name] = state_dict[name][None]
    for name in ("weight", "bias"):
        if f"{prefix}output_linear.0.{name}" in state_dict:
            held = state_dict.pop(f"{prefix}output_linear.0.{name}")
            state_dict[f"{prefix}output_linear.{name}"] = held.squeeze(-1) if held.ndim == 3 else held


class S4D(LinearMixer):
    """S4D, diagonal state spaces (Gu et al., 2022, arXiv 2206.11893).

    Args:
        d_model: width.
        d_state: states of a channel, even.
        init: eigenvalues to begin with: ``"lin"``, ``"inv"`` or ``"legs"``.
        discretization: ``"zoh"`` or ``"bilinear"``.
        trainable_b: learn B, as the kernel ``diag`` of the official block does; ``S4D`` of its ``s4d.py`` does not.
        bidirectional: a second kernel for the future, whose first tap is the next place.
        bandlimit: silences states that turn faster than this share of the sampling frequency.
        dropout: on the activations.
        dt_min, dt_max: range of step sizes to begin with.

    Raises:
        ValueError: for an odd ``d_state``, or settings it does not know.

    Example:
        >>> layer = S4D(8, d_state=16)
        >>> y, state = layer(torch.randn(2, 100, 8))
        >>> y_next, state = layer.step(torch.randn(2, 8), state)
        >>> layer.kernel(100).shape
        torch.Size([1, 8, 100])
    """

    dynamics: ClassVar[tuple[str, ...]] = ("kernel.log_dt", "kernel.log_A_real", "kernel.A_imag")

    def __init__(
        self, d_model: int, d_state: int = 64, *, init: Init = "lin", discretization: Discretization = "zoh",
        trainable_b: bool = False, bidirectional: bool = False, bandlimit: float | None = None, dropout: float = 0.0,
        dt_min: float = 1e-3, dt_max: float = 1e-1,
    ) -> None:  # fmt: skip
        kernel = DiagonalKernel(
            d_model, d_state, init=init, discretization=discretization, trainable_b=trainable_b,
            bidirectional=bidirectional, bandlimit=bandlimit, dt_min=dt_min, dt_max=dt_max,
        )  # fmt: skip
        super().__init__(d_model, kernel, dropout=dropout, bidirectional=bidirectional)


class DSS(LinearMixer):
    """DSS, diagonal state spaces (Gupta et al., 2022, arXiv 2203.14343), in the softmax and the exponential form.

    Differs from ``disc="dss"`` of the official S4 code, which halves: it drops one of each pair of conjugates, casts to
    real and does not double. Here, as in the paper, all states are there and the real part is taken once.

    Args:
        d_model: width.
        d_state: complex states of a channel.
        normalize: ``"exp"`` or ``"softmax"``.
        l_max: for softmax, the length of the normalisation and longest sequence.
        dropout: on the activations.

    Example:
        >>> y, state = DSS(8, d_state=16)(torch.randn(2, 100, 8))
    """

    dynamics: ClassVar[tuple[str, ...]] = ("kernel.log_dt", "kernel.Lambda_re", "kernel.Lambda_im")

    def __init__(
        self, d_model: int, d_state: int = 64, *, normalize: Literal["softmax", "exp"] = "exp",
        l_max: int | None = None, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(d_model, DSSKernel(d_model, d_state, normalize=normalize, l_max=l_max), dropout=dropout)
        if normalize == "softmax":
            self.max_length = l_max


class S4(LinearMixer):
    """S4, structured state spaces (Gu et al., 2021, arXiv 2111.00396).

    Args:
        d_model: width.
        d_state: states of a channel, even.
        init: ``"legs"``, ``"legt"`` or ``"fout"``.
        l_kernel: length that C is held for; longer sequences work and cost a few matrix products more.
        bidirectional: a second kernel for the future.
        dropout: on the activations.
        dt_min, dt_max: range of step sizes to begin with.

    Example:
        >>> layer = S4(4, d_state=8, l_kernel=64)
        >>> y, state = layer(torch.randn(2, 100, 4))
    """

    dynamics: ClassVar[tuple[str, ...]] = (
        "kernel.log_dt", "kernel.log_A_real", "kernel.A_imag", "kernel.P", "kernel.B"
    )  # fmt: skip

    def __init__(
        self, d_model: int, d_state: int = 64, *, init: Measure = "legs", l_kernel: int = 1024,
        bidirectional: bool = False, dropout: float = 0.0, dt_min: float = 1e-3, dt_max: float = 1e-1,
    ) -> None:  # fmt: skip
        kernel = DPLRKernel(
            d_model, d_state, init=init, l_kernel=l_kernel, bidirectional=bidirectional, dt_min=dt_min, dt_max=dt_max
        )  # fmt: skip
        super().__init__(d_model, kernel, dropout=dropout, bidirectional=bidirectional)

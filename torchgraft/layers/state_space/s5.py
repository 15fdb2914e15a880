"""S5 (Smith et al., 2022, arXiv 2208.04933) and LRU (Orvieto et al., 2023, arXiv 2303.06349): one state for all inputs.

Legend: B batch, L length, H features, P complex states.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.layers.state_space.linear import as_complex, full
from torchgraft.layers.state_space.mixer import SequenceMixer, State, complex_of, even, inside, log_uniform
from torchgraft.ops._precision import autocast_off
from torchgraft.ops.hippo import normal_plus_low_rank
from torchgraft.ops.kernels import Discretization, discretize_diagonal, vandermonde
from torchgraft.ops.linear_recurrence import linear_recurrence

__all__ = ["LRU", "S5"]


class _SharedState(SequenceMixer):
    """``h_t = a h_{t-1} + B u_t, y_t = Re(C h_t) + D u_t`` with matrices B (P, H) and C (H, P)."""

    def _system(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``log a`` (P,), B, C, D."""
        raise NotImplementedError

    def _after(self, y: Tensor) -> Tensor:
        raise NotImplementedError

    def _states(self) -> int:
        raise NotImplementedError

    def _empty(self, batch: int, device: torch.device | None, dtype: torch.dtype) -> State:
        return {"ssm": torch.zeros(batch, self._states(), device=device, dtype=complex_of(dtype))}

    def kernel(self, length: int) -> Tensor:
        """Taps from every input to every output, (H, H, L); the first axis is the output."""
        log_a, B, C, D = self._system()
        # (H_out, H_in, P)
        weights = C[:, None] * B.mT
        taps = vandermonde(weights, log_a.expand(B.shape[1], -1), length)
        return taps + torch.diag(D)[..., None] * (torch.arange(length, device=D.device) == 0)

    def _mix(
        self, x: Tensor, state: State | None, lengths: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        with autocast_off(x):
            log_a, B, C, D = self._system()
            u = full(x)
            inputs = torch.complex(u @ B.real.mT, u @ B.imag.mT)
            h = linear_recurrence(
                log_a.exp(), inputs, initial_state=None if state is None else state["ssm"], mask=inside(x, lengths)
            )
            y = (h.real @ C.real.mT - h.imag @ C.imag.mT + D * u).to(x.dtype)
        return self._after(y), {"ssm": h[:, -1]} if return_state else None

    def _step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        log_a, B, C, D = self._system()
        u = full(x)
        h = log_a.exp() * state["ssm"] + u.to(B) @ B.mT
        return self._after(((h @ C.mT).real + D * u).to(x.dtype)), {"ssm": h}


class S5(_SharedState):
    """S5: one state space with many inputs and outputs, computed by a scan.

    Parameters are named and shaped as in the official (JAX) ``S5SSM``: ``Lambda_re``, ``Lambda_im``, ``B`` (P, H, 2),
    ``C`` (H, P, 2), ``D``, ``log_step`` (P, 1), so its leaves load as they are. The gate is the official
    ``half_glu1``: ``GELU(y)`` times the sigmoid of its projection.

    Args:
        d_model: width.
        d_state: states, even; half as many complex numbers are held.
        blocks: diagonal blocks of HiPPO to begin with; ``d_state`` must be an even multiple.
        discretization: ``"zoh"`` or ``"bilinear"``.
        clip: keep the real parts of eigenvalues at most -1e-4, as is advised for text of any length.
        dropout: on the activations.
        dt_min, dt_max: range of step sizes to begin with.

    Example:
        >>> y, state = S5(8, d_state=16, blocks=2)(torch.randn(2, 100, 8))
        >>> state["ssm"].shape
        torch.Size([2, 8])
    """

    dynamics: ClassVar[tuple[str, ...]] = ("Lambda_re", "Lambda_im", "log_step", "B")

    def __init__(
        self, d_model: int, d_state: int = 64, *, blocks: int = 1, discretization: Discretization = "zoh",
        clip: bool = True, dropout: float = 0.0, dt_min: float = 1e-3, dt_max: float = 1e-1,
    ) -> None:  # fmt: skip
        super().__init__(d_model)
        if blocks < 1 or d_state % (2 * blocks):
            raise ValueError(f"d_state must be an even multiple of {blocks} blocks, got {d_state}")
        discretize_diagonal(-torch.ones(1), torch.ones(1), discretization)
        self.discretization: Discretization = discretization
        self.clip = clip
        half = even(d_state)
        lam, _, _, V = normal_plus_low_rank("legs", d_state // blocks)
        self.Lambda_re = nn.Parameter(lam.real.float().repeat(blocks))
        self.Lambda_im = nn.Parameter(lam.imag.float().repeat(blocks))
        self.log_step = nn.Parameter(log_uniform((half, 1), dt_min, dt_max))
        rows = torch.block_diag(*[V.mH.to(torch.complex64)] * blocks)
        B = rows @ (torch.randn(d_state, d_model) / math.sqrt(d_model)).to(torch.complex64)
        C = torch.randn(d_model, d_state, 2) / math.sqrt(d_state)
        columns = torch.block_diag(*[V.to(torch.complex64)] * blocks)
        self.B = nn.Parameter(torch.view_as_real(B))
        self.C = nn.Parameter(torch.view_as_real(torch.view_as_complex(C) @ columns))
        self.D = nn.Parameter(torch.randn(d_model))
        self.dropout = nn.Dropout(dropout)
        self.gate = nn.Linear(d_model, d_model)

    def _states(self) -> int:
        return self.Lambda_re.shape[0]

    def _system(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        real = full(self.Lambda_re)
        A = torch.complex(real.clamp(max=-1e-4) if self.clip else real, full(self.Lambda_im))
        log_a, b = discretize_diagonal(A, full(self.log_step)[:, 0].exp(), self.discretization)
        return log_a, b[:, None] * as_complex(self.B), 2 * as_complex(self.C), full(self.D)

    def _after(self, y: Tensor) -> Tensor:
        # the default GELU of JAX, in which the official layer is written
        y = self.dropout(F.gelu(y, approximate="tanh"))
        return y * self.gate(y).sigmoid()


class LRU(_SharedState):
    """LRU, the linear recurrent unit: eigenvalues inside the unit circle by their form, inputs normalised.

    Parameters are named as in minimal-LRU: ``theta_log``, ``nu_log``, ``gamma_log``, ``B_re``, ``B_im``, ``C_re``,
    ``C_im``, ``D``, and ``out1``, ``out2`` of its layer.

    Args:
        d_model: width.
        d_state: complex states.
        r_min, r_max: moduli of the eigenvalues to begin with, uniform on the ring between.
        max_phase: their phases, uniform in (0, max_phase).
        dropout: on the activations.

    Raises:
        ValueError: for a ring outside the unit circle.

    Example:
        >>> y, state = LRU(8, d_state=16)(torch.randn(2, 100, 8))
    """

    dynamics: ClassVar[tuple[str, ...]] = ("nu_log", "theta_log", "gamma_log")

    def __init__(
        self, d_model: int, d_state: int = 64, *, r_min: float = 0.9, r_max: float = 0.999,
        max_phase: float = 2 * math.pi, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(d_model)
        if not 0 <= r_min < r_max <= 1:
            raise ValueError(f"r_min and r_max must satisfy 0 <= r_min < r_max <= 1, got {r_min} and {r_max}")
        if d_state < 1:
            raise ValueError(f"d_state must be at least 1, got {d_state}")
        square = torch.rand(d_state) * (r_max**2 - r_min**2) + r_min**2
        self.nu_log = nn.Parameter((-0.5 * square.clamp(1e-12, 1 - 1e-6).log()).log())
        self.theta_log = nn.Parameter((max_phase * torch.rand(d_state).clamp(min=1e-6)).log())
        self.gamma_log = nn.Parameter(0.5 * (1 - square.clamp(max=1 - 1e-6)).log())
        self.B_re, self.B_im = (nn.Parameter(torch.randn(d_state, d_model) / math.sqrt(2 * d_model)) for _ in "ri")
        self.C_re, self.C_im = (nn.Parameter(torch.randn(d_model, d_state) / math.sqrt(d_state)) for _ in "ri")
        self.D = nn.Parameter(torch.randn(d_model))
        self.dropout = nn.Dropout(dropout)
        self.out1, self.out2 = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)

    def _states(self) -> int:
        return self.nu_log.shape[0]

    def _system(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        log_a = torch.complex(-full(self.nu_log).exp(), full(self.theta_log).exp())
        B = torch.complex(full(self.B_re), full(self.B_im)) * full(self.gamma_log).exp()[:, None]
        return log_a, B, torch.complex(full(self.C_re), full(self.C_im)), full(self.D)

    def _after(self, y: Tensor) -> Tensor:
        y = self.dropout(F.gelu(y, approximate="tanh"))
        return self.out1(y) * self.out2(y).sigmoid()

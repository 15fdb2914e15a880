"""Layers that gate a linear state space: GSS, H3, Liquid-S4, SPADE.

Legend: B batch, L length, H width, N states.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.layers.state_space.linear import S4, DiagonalKernel, DSSKernel, Init, apply_kernel, full
from torchgraft.layers.state_space.mixer import (
    SequenceMixer,
    State,
    inside,
    last_places,
    right_aligned,
    zero_padding,
)
from torchgraft.ops._precision import autocast_off
from torchgraft.ops.kernels import vandermonde, vandermonde_transpose
from torchgraft.ops.long_convolution import long_convolution

__all__ = ["GSS", "H3", "SPADE", "LiquidS4", "WindowAttention"]


class GSS(SequenceMixer):
    """Gated state space (Mehta et al., 2022, arXiv 2206.13947): the state space runs on a reduced width.

    ``v = GELU(W1 x)``, ``u = GELU(W2 x)``, ``y = W3 (v * W DSS(u))``; the authors' kernel is DSS in its exponential
    form.

    Args:
        d_model: width.
        d_state: complex states of a channel.
        d_inner: E, width of the gate; four times ``d_model`` without it.
        d_ssm: F, width of the state space; ``d_model // 4`` without it.

    Example:
        >>> y, state = GSS(8, d_state=16)(torch.randn(2, 100, 8))
    """

    dynamics: ClassVar[tuple[str, ...]] = ("kernel.log_dt", "kernel.Lambda_re", "kernel.Lambda_im")

    def __init__(self, d_model: int, d_state: int = 64, *, d_inner: int | None = None, d_ssm: int | None = None):
        super().__init__(d_model)
        d_inner = 4 * d_model if d_inner is None else d_inner
        d_ssm = max(1, d_model // 4) if d_ssm is None else d_ssm
        self.gate, self.reduce = nn.Linear(d_model, d_inner), nn.Linear(d_model, d_ssm)
        self.kernel, self.D = DSSKernel(d_ssm, d_state), nn.Parameter(torch.randn(d_ssm))
        self.widen, self.out_proj = nn.Linear(d_ssm, d_inner), nn.Linear(d_inner, d_model)

    def _empty(self, batch: int, device: torch.device | None, dtype: torch.dtype) -> State:
        return {"ssm": self.kernel.empty(batch, device, dtype)}

    def _after(self, v: Tensor, y: Tensor) -> Tensor:
        return self.out_proj(v * self.widen(y))

    def _mix(
        self, x: Tensor, state: State | None, lengths: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        # the bias of the projection would fill padding again
        u = zero_padding(F.gelu(self.reduce(x)), lengths)
        y, new = apply_kernel(
            self.kernel, u, None if state is None else state["ssm"], lengths, return_state, self.D
        )  # fmt: skip
        return self._after(F.gelu(self.gate(x)), y), None if new is None else {"ssm": new}

    def _step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        u = F.gelu(self.reduce(x))
        y, new = self.kernel.step(u, state["ssm"])
        return self._after(F.gelu(self.gate(x)), y + u * self.D), {"ssm": new}


class H3(SequenceMixer):
    """H3, hungry hungry hippos (Fu et al., 2022, arXiv 2212.14052): ``q * diagonal_ssm(shift_ssm(k) * v)``.

    Projections are named as in the official layer (``q_proj``, ``k_proj``, ``v_proj``, ``ssm_k_D``, ``D``,
    ``output_linear``). The shift state space keeps the last ``d_state`` keys, so it is a short convolution with
    weights ``shift``; the official code holds the same taps as a product of two learned vectors.

    Args:
        d_model: width.
        d_state: states of the diagonal state space (even), and keys that the shift one keeps.
        head_dim: features that a head multiplies with each other.

    Example:
        >>> y, state = H3(8, d_state=16)(torch.randn(2, 100, 8))
    """

    dynamics: ClassVar[tuple[str, ...]] = ("kernel.log_dt", "kernel.log_A_real", "kernel.A_imag")

    def __init__(self, d_model: int, d_state: int = 64, *, head_dim: int = 1, init: Init = "lin") -> None:
        super().__init__(d_model)
        if head_dim < 1 or d_model % head_dim:
            raise ValueError(f"d_model must be a multiple of head_dim, got {d_model} and {head_dim}")
        self.head_dim, self.heads, self.taps = head_dim, d_model // head_dim, d_state
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d_model, d_model) for _ in "qkv")
        self.shift = nn.Parameter(torch.randn(d_model, d_state) / math.sqrt(d_state))
        self.ssm_k_D = nn.Parameter(torch.randn(d_model))
        self.kernel, self.D = DiagonalKernel(self.heads, d_state, init=init), nn.Parameter(torch.randn(self.heads))
        self.output_linear = nn.Linear(d_model, d_model)

    def _empty(self, batch: int, device: torch.device | None, dtype: torch.dtype) -> State:
        rows = batch * self.head_dim**2
        return {
            "keys": torch.zeros(batch, self.taps - 1, self.d_model, device=device, dtype=dtype),
            "ssm": self.kernel.empty(rows, device, dtype).unflatten(0, (batch, -1)),
        }

    def _mix(
        self, x: Tensor, state: State | None, lengths: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        batch, length, _ = x.shape
        q, k, v = self.q_proj(x), zero_padding(self.k_proj(x), lengths), self.v_proj(x)
        past = k.new_zeros(batch, self.taps - 1, self.d_model) if state is None else state["keys"].to(k.dtype)
        whole = torch.cat([past, k], 1)
        with autocast_off(x):
            k = long_convolution(whole, self.shift)[:, self.taps - 1 :] + k * self.ssm_k_D
        # (B, L, heads, dk, dv) to (B dk dv, L, heads)
        kv = k.unflatten(-1, (self.heads, -1))[..., None] * v.unflatten(-1, (self.heads, -1))[..., None, :]
        rows = zero_padding(kv, lengths).permute(0, 3, 4, 1, 2).flatten(0, 2)
        repeats = self.head_dim**2
        y, new = apply_kernel(
            self.kernel, rows, None if state is None else state["ssm"].flatten(0, 1),
            None if lengths is None else lengths.repeat_interleave(repeats), return_state, self.D,
        )  # fmt: skip
        y = y.view(batch, self.head_dim, self.head_dim, length, self.heads)
        q = q.unflatten(-1, (self.heads, -1))
        y = torch.einsum("blhk,bkvlh->blhv", q, y.to(q.dtype)).flatten(2)
        if new is None:
            return self.output_linear(y), None
        keys = last_places(whole, self.taps - 1, None if lengths is None else lengths + self.taps - 1)
        return self.output_linear(y), {"keys": keys, "ssm": new.unflatten(0, (batch, -1))}


class LiquidS4(SequenceMixer):
    """Liquid-S4 (Hasani et al., 2022, arXiv 2209.12951) over diagonal state spaces.

    Products of p consecutive inputs, p = 2 .. ``degree``, enter beside the inputs. ``mode="kb"``: through the state,
    with B to the power p, so ``y = sum_p K_p * (u_t u_{t-1} ... u_{t-p+1})`` with ``K_p,l = 2 Re(C a^l b^p)``.
    ``mode="pb"``, which the authors prefer: the powers of the state matrix are replaced by one, so a product is
    weighted by ``2 Re(C b^p)`` and does not enter the state.

    The official code flips the products in time, so its outputs see the future; here they do not. It also takes C as
    it is held for S4, without the doubling of conjugate pairs; both are implementation details that the paper does not
    have.

    Args:
        d_model: width.
        d_state: states of a channel, even.
        degree: largest p; 1 is S4D.
        mode: ``"pb"`` or ``"kb"``.
        init: eigenvalues to begin with.
        dropout: on the activations.

    Example:
        >>> y, state = LiquidS4(8, d_state=16, degree=3)(torch.randn(2, 100, 8))
    """

    dynamics: ClassVar[tuple[str, ...]] = ("kernel.log_dt", "kernel.log_A_real", "kernel.A_imag")

    def __init__(
        self, d_model: int, d_state: int = 64, *, degree: int = 2, mode: Literal["pb", "kb"] = "pb", init: Init = "lin",
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(d_model)
        if degree < 1:
            raise ValueError(f"degree must be at least 1, got {degree}")
        if mode not in ("pb", "kb"):
            raise ValueError(f"mode must be 'pb' or 'kb', got {mode!r}")
        self.degree, self.mode = degree, mode
        self.kernel, self.D = DiagonalKernel(d_model, d_state, init=init), nn.Parameter(torch.randn(d_model))
        self.dropout = nn.Dropout(dropout)
        self.output_linear = nn.Linear(d_model, 2 * d_model)

    def _empty(self, batch: int, device: torch.device | None, dtype: torch.dtype) -> State:
        past = torch.zeros(batch, self.degree - 1, self.d_model, device=device, dtype=dtype)
        return {"past": past, "ssm": self.kernel.empty(batch, device, dtype)}

    def _mix(
        self, x: Tensor, state: State | None, lengths: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        length, back = x.shape[1], self.degree - 1
        past = x.new_zeros(len(x), back, self.d_model) if state is None else state["past"].to(x.dtype)
        whole = torch.cat([past, x], 1)
        products, product = [], torch.ones_like(x)
        for p in range(self.degree):
            product = product * whole[:, back - p : back - p + length]
            products.append(zero_padding(product, lengths))
        before = None if state is None else state["ssm"]
        with autocast_off(x):
            y, new = apply_kernel(self.kernel, x, before, lengths, return_state, self.D)
            log_a, b, c = self.kernel.coefficients()
            for p, u in enumerate(products[1:], start=2):
                if self.mode == "pb":
                    y = y + ((c[0] * b**p).sum(-1).real * full(u)).to(y.dtype)
                    continue
                y = y + long_convolution(u, vandermonde(c[0] * b**p, log_a, length))
                if new is not None:
                    new = new + b**p * vandermonde_transpose(right_aligned(full(u), lengths).flip(1), log_a)
        y = F.glu(self.output_linear(self.dropout(F.gelu(y))), -1)
        if new is None:
            return y, None
        return y, {"past": last_places(whole, back, None if lengths is None else lengths + back), "ssm": new}


class WindowAttention(SequenceMixer):
    """Softmax attention to the last ``window`` places, itself included, in blocks: time linear in the length.

    Args:
        d_model: width.
        heads: attention heads.
        window: places seen.
    """

    def __init__(self, d_model: int, heads: int = 4, window: int = 64) -> None:
        super().__init__(d_model)
        if d_model % heads or window < 1:
            raise ValueError(
                f"d_model must be a multiple of heads and window at least 1, got {d_model}, {heads}, {window}"
            )
        self.heads, self.window = heads, window
        self.qkv, self.out = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)

    def _empty(self, batch: int, device: torch.device | None, dtype: torch.dtype) -> State:
        back = self.window - 1
        return {
            "keys_values": torch.zeros(batch, back, 2 * self.d_model, device=device, dtype=dtype),
            "seen": torch.zeros(batch, back, device=device, dtype=torch.bool),
        }

    def _mix(
        self, x: Tensor, state: State | None, lengths: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        batch, length, _ = x.shape
        back = self.window - 1
        q, kv = self.qkv(x).split([self.d_model, 2 * self.d_model], -1)
        if state is None:
            state = self._empty(batch, x.device, kv.dtype)
        here = inside(x, lengths)
        seen = torch.ones(batch, length, dtype=torch.bool, device=x.device) if here is None else here
        whole, visible = torch.cat([state["keys_values"].to(kv.dtype), kv], 1), torch.cat([state["seen"], seen], 1)
        # blocks of queries, each with the window before it and itself
        size = min(self.window, length)
        short = -length % size
        heads = F.pad(q, (0, 0, 0, short)).unflatten(-1, (self.heads, -1)).unflatten(1, (-1, size)).movedim(-2, 2)
        padded, shown = F.pad(whole, (0, 0, 0, short)), F.pad(visible, (0, short))
        keys = padded.unfold(1, back + size, size).unflatten(2, (2, self.heads, -1))
        # (B, K, 2, heads, features, places)
        k, v = keys.mT.unbind(2)
        gap = torch.arange(size, device=x.device)[:, None] + back - torch.arange(back + size, device=x.device)
        allowed = (gap >= 0) & (gap <= back) & shown.unfold(1, back + size, size)[:, :, None, None]
        # a padded query would have nothing to look at; what it gives is ignored
        allowed = allowed | (gap == 0)
        y = F.scaled_dot_product_attention(heads, k, v, attn_mask=allowed)
        y = self.out(y.movedim(2, 3).flatten(-2).flatten(1, 2)[:, :length])
        if not return_state:
            return y, None
        ends = None if lengths is None else lengths + back
        return y, {"keys_values": last_places(whole, back, ends), "seen": last_places(visible, back, ends)}


class SPADE(SequenceMixer):
    """SPADE (Zuo et al., 2022, arXiv 2212.08136): a global S4 beside local attention, normalised and mixed.

    The authors put it into the bottom layer and local attention alone above; ``window`` attention of the others is
    ``WindowAttention``.

    Args:
        d_model: width.
        d_state: states of the S4 branch.
        heads, window: of the local attention.
        l_kernel: of the S4 branch.

    Example:
        >>> y, state = SPADE(8, d_state=8, heads=2, window=16, l_kernel=128)(torch.randn(2, 100, 8))
    """

    dynamics: ClassVar[tuple[str, ...]] = tuple(f"globally.{name}" for name in S4.dynamics)

    def __init__(
        self, d_model: int, d_state: int = 64, *, heads: int = 4, window: int = 64, l_kernel: int = 1024
    ) -> None:
        super().__init__(d_model)
        self.globally, self.locally = S4(d_model, d_state, l_kernel=l_kernel), WindowAttention(d_model, heads, window)
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.mix = nn.Linear(2 * d_model, d_model)

    def _empty(self, batch: int, device: torch.device | None, dtype: torch.dtype) -> State:
        return {**self.globally._empty(batch, device, dtype), **self.locally._empty(batch, device, dtype)}

    def _mix(
        self, x: Tensor, state: State | None, lengths: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        far, new = self.globally._mix(x, state, lengths, return_state)
        near, held = self.locally._mix(x, state, lengths, return_state)
        y = self.mix(torch.cat([self.norm1(far), self.norm2(near)], -1))
        return y, {**new, **held} if new is not None and held is not None else None

"""The Hydra block: a bidirectional Mamba-2 whose matrix is quasiseparable (arXiv 2407.09941, section 3)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.ops.quasiseparable import Backend, quasiseparable, quasiseparable_matrix

__all__ = ["HydraMixer", "weight_decay_groups"]


class Shell(nn.Module):
    """What Hydra and the matrix mixers have around the mixing: projections, convolution, norm and gate.

    Subclasses say how many channels go through the convolution (the first ``d_inner`` are the inputs x) and how many
    bypass it.
    """

    NO_WEIGHT_DECAY = ("dt_bias", "A_log", "D", "init_states")

    def __init__(
        self, d_model: int, convolved: int, plain: int, *, d_conv: int, expand: int, headdim: int,
        conv_init: float | None, bias: bool, conv_bias: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.d_model, self.d_inner, self.headdim = d_model, expand * d_model, headdim
        self.nheads = self.d_inner // headdim
        self.splits = [self.d_inner, self.d_inner + convolved, plain]
        self.in_proj = nn.Linear(d_model, sum(self.splits), bias=bias)
        channels = self.splits[1]
        self.conv1d = nn.Conv1d(channels, channels, d_conv, groups=channels, padding=d_conv // 2, bias=conv_bias)
        if conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        self.norm = nn.RMSNorm(self.d_inner, eps=1e-5)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)

    def project(self, u: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Gate, what the convolution gives (before the activation), and what bypasses it."""
        if mask is not None:
            # what padding holds may be infinite, and zero times infinity is not zero
            u = u.masked_fill(~mask[..., None], 0)
        gate, convolved, plain = self.in_proj(u).split(self.splits, -1)
        if mask is not None:
            convolved = convolved.masked_fill(~mask[..., None], 0)
        return gate, self.conv1d(convolved.mT).mT, plain

    def close(self, y: Tensor, gate: Tensor) -> Tensor:
        """Norm before gate, then the output projection."""
        y = F.rms_norm(y, (self.d_inner,), self.norm.weight.to(y.dtype), self.norm.eps) * F.silu(gate.to(y.dtype))
        return self.out_proj(y.to(gate.dtype))

    def heads(self, x: Tensor) -> Tensor:
        """(B, L, H * P) to (B, L, H, P)."""
        return x.unflatten(-1, (self.nheads, self.headdim))


def check_sizes(d_model: int, expand: int, headdim: int, d_conv: int) -> None:
    """Raise ``ValueError`` for sizes that the shell cannot have."""
    if min(d_model, expand, headdim) < 1 or expand * d_model % headdim:
        raise ValueError(
            f"headdim must divide expand * d_model, got headdim={headdim}, expand={expand}, d_model={d_model}"
        )
    if d_conv < 1 or d_conv % 2 == 0:
        raise ValueError(f"d_conv must be odd, so that the convolution is centred and keeps the length, got {d_conv}")


def check_backend(backend: str, chunk_size: int) -> None:
    """Raise ``ValueError`` for what the scan does not know."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be 'auto', 'torch' or 'mamba_ssm', got {backend!r}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")


def check_input(x: Tensor, d_model: int) -> None:
    """Raise for what is no sequence of ``d_model`` features."""
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {x.dtype}")
    if x.ndim != 3 or x.shape[1] == 0 or x.shape[2] != d_model:
        raise ValueError(
            f"x must have shape (batch, length, {d_model}) with a length of at least 1, got {tuple(x.shape)}"
        )


def as_mask(attention_mask: Tensor | None, x: Tensor) -> Tensor | None:
    """A boolean mask, True where there is data, from what transformers passes around."""
    if attention_mask is None:
        return None
    if attention_mask.is_floating_point():
        raise TypeError(
            "attention_mask must be boolean or integer, 1 where there is data; got a floating-point one, "
            "which is how scores are masked"
        )
    if attention_mask.shape != x.shape[:2]:
        raise ValueError(
            f"attention_mask must have shape (batch, length) = {tuple(x.shape[:2])}, 1 where there is data, got "
            f"{tuple(attention_mask.shape)}; a bidirectional mixer takes padding, and no causal or other mask"
        )
    return attention_mask != 0


def initial_dt_bias(heads: int, low: float, high: float, floor: float) -> Tensor:
    """Values whose softplus is log-uniform between ``low`` and ``high``."""
    dt = (torch.rand(heads) * (math.log(high) - math.log(low)) + math.log(low)).exp().clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))


class HydraMixer(Shell):
    """Hydra: mixes a sequence in both directions in linear time (arXiv 2407.09941, section 3; official ``Hydra``).

    Projection, centred depthwise convolution, SiLU, the quasiseparable matrix (two scans of Mamba-2 that share their
    decays, and a diagonal that depends on the data), RMS norm, gate, projection. It has no separate MLP: two Hydra
    layers take the place of one transformer layer. No positions are needed.

    State dicts of the official module load into it. Differences from the official code: padding can be masked; packed
    sequences (``seq_idx``) do not leak into each other, where the official convolution and shift cross their borders;
    an even ``d_conv``, over which it stumbles, is refused here; its fused path with a backward of its own is not built.

    Args:
        d_model: features of input and output.
        d_state: states of each head.
        d_conv: taps of the convolution, odd.
        expand: the inner width is ``expand * d_model``.
        headdim: features of a head; must divide the inner width.
        n_groups: groups of heads that share B and C.
        dt_min, dt_max, dt_init_floor: range of the initial step sizes.
        dt_limit: step sizes are clamped to it.
        learnable_init_states: learn the state before the first step, one for both directions.
        conv_init: if given, convolution weights are uniform in ± this.
        bias, conv_bias: biases of the projections and of the convolution.
        chunk_size: places in a chunk of the scan; the result does not depend on it.
        backend: as in ``torchgraft.ops.quasiseparable``.

    Raises:
        ValueError: for sizes that do not go together.

    Example:
        >>> layer = HydraMixer(32, d_state=16, headdim=16)
        >>> layer(torch.randn(2, 100, 32)).shape
        torch.Size([2, 100, 32])
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        d_conv: int = 7,
        expand: int = 2,
        headdim: int = 64,
        n_groups: int = 1,
        *,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        learnable_init_states: bool = False,
        conv_init: float | None = None,
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 64,
        backend: Backend = "auto",
    ) -> None:
        check_sizes(d_model, expand, headdim, d_conv)
        heads = expand * d_model // headdim
        if n_groups < 1 or heads % n_groups or d_state < 1:
            raise ValueError(
                f"n_groups must divide the {heads} heads and d_state be at least 1, got {n_groups} and {d_state}"
            )
        check_backend(backend, chunk_size)
        if not 0 < dt_min <= dt_max or not dt_init_floor > 0:
            raise ValueError(
                f"initial step sizes need 0 < dt_min <= dt_max and dt_init_floor > 0, got dt_min={dt_min}, "
                f"dt_max={dt_max}, dt_init_floor={dt_init_floor}"
            )
        if not 0 <= dt_limit[0] <= dt_limit[1]:
            raise ValueError(f"dt_limit must be (least, greatest), not negative, got {dt_limit}")
        super().__init__(
            d_model, 4 * n_groups * d_state, 2 * heads, d_conv=d_conv, expand=expand, headdim=headdim,
            conv_init=conv_init, bias=bias, conv_bias=conv_bias,
        )  # fmt: skip
        self.d_state, self.n_groups, self.dt_limit = d_state, n_groups, dt_limit
        self.dt_range = (dt_min, dt_max, dt_init_floor)
        self.chunk_size, self.backend = chunk_size, backend
        self.init_states = nn.Parameter(torch.zeros(heads, headdim, d_state)) if learnable_init_states else None
        self.dt_bias = nn.Parameter(initial_dt_bias(heads, *self.dt_range))
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.D = nn.Parameter(torch.ones(heads))
        self.fc_D = nn.Linear(self.d_inner, heads, bias=False)

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        attention_mask: Tensor | None = None,
        seq_idx: Int[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B L D"]:
        """Mix a batch of sequences.

        Args:
            x: (B, L, d_model).
            attention_mask: (B, L), 1 or True where there is data. A padded row gives what it gives alone; outputs
                at other places are zero (the bias of the projection, if there is one).
            seq_idx: (B, L), the number of the sequence each token belongs to, where several are packed into a row;
                a new one begins wherever the number changes. Negative numbers are padding.

        Raises:
            ValueError: for a wrong shape, length zero, or both masks at once.
            TypeError: for inputs that are not floating-point, or a mask that is.
        """
        check_input(x, self.d_model)
        if seq_idx is not None:
            if attention_mask is not None:
                raise ValueError("give attention_mask or seq_idx, not both; a negative seq_idx marks padding")
            return self._packed(x, seq_idx)
        mask = as_mask(attention_mask, x)
        gate, x, dt, A, B, C, diagonal = self.scan_parameters(x, mask)
        y = self.mix(x, dt, A, B, C, diagonal, mask).flatten(2)
        return self.close(y, gate)

    def scan_parameters(self, u: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
        """Gate, inputs of the heads, step sizes, decays, input and output vectors, diagonal."""
        gate, convolved, dt = self.project(u, mask)
        x, vectors = F.silu(convolved).split([self.d_inner, self.splits[1] - self.d_inner], -1)
        wide = torch.promote_types(torch.float32, x.dtype)
        dt = F.softplus(dt.unflatten(-1, (2, self.nheads)).to(wide) + self.dt_bias.to(wide)).clamp(*self.dt_limit)
        B, C = vectors.unflatten(-1, (2, 2, self.n_groups, self.d_state)).unbind(3)
        diagonal = self.fc_D(x) + self.D.to(x.dtype)
        # in float32 from here to the norm: sums over thousands of steps
        return gate, self.heads(x).to(wide), dt, -self.A_log.to(wide).exp(), B.to(wide), C.to(wide), diagonal.to(wide)

    def mix(
        self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, diagonal: Tensor, mask: Tensor | None
    ) -> Tensor:
        """The product with the matrix; what another way of joining two scans would override."""
        state = None if self.init_states is None else self.init_states.expand(len(x), 2, -1, -1, -1)
        return quasiseparable(
            x, dt, A, B, C, diagonal, initial_state=state, mask=mask, chunk_size=self.chunk_size, backend=self.backend
        )

    def _packed(self, x: Tensor, seq_idx: Tensor) -> Tensor:
        """Every run of equal numbers in a row of its own."""
        if seq_idx.shape != x.shape[:2] or seq_idx.is_floating_point():
            raise ValueError(
                f"seq_idx must hold integers of shape (batch, length) = {tuple(x.shape[:2])}, got {seq_idx.dtype} of "
                f"shape {tuple(seq_idx.shape)}"
            )
        if not len(x):
            return self(x)
        begins = torch.ones_like(seq_idx, dtype=torch.bool)
        begins[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
        begins, flat = begins.flatten(), x.flatten(0, 1)
        row = begins.cumsum(0) - 1
        places = torch.arange(len(row), device=x.device)
        place = places - places[begins][row]
        rows = x.new_zeros(int(row[-1]) + 1, int(place.max()) + 1, self.d_model).index_put((row, place), flat)
        mask = torch.zeros(rows.shape[:2], dtype=torch.bool, device=x.device)
        mask[row, place] = seq_idx.flatten() >= 0
        return self(rows, mask)[row, place].view_as(x)

    def matrix(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B H L L"]:
        """The matrix of each head that multiplies what the convolution gives; without ``init_states``, which are none.

        Example:
            >>> HydraMixer(32, d_state=4, headdim=16).matrix(torch.randn(1, 10, 32)).shape
            torch.Size([1, 4, 10, 10])
        """
        check_input(x, self.d_model)
        return quasiseparable_matrix(*self.scan_parameters(x, None)[2:])

    def extra_repr(self) -> str:
        """What the parts do not show."""
        return f"d_state={self.d_state}, headdim={self.headdim}, n_groups={self.n_groups}, backend={self.backend!r}"


def weight_decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser: no decay on step sizes, decays, diagonals and initial states of the mixers.

    Example:
        >>> optimizer = torch.optim.AdamW(weight_decay_groups(HydraMixer(32, headdim=16), 0.1), lr=1e-3)
        >>> [group["weight_decay"] for group in optimizer.param_groups]
        [0.1, 0.0]
    """

    def spared() -> Iterator[nn.Parameter]:
        for module in model.modules():
            for name in getattr(module, "NO_WEIGHT_DECAY", ()):
                if isinstance(parameter := getattr(module, name, None), nn.Parameter):
                    yield parameter

    without = {id(p): p for p in spared()}
    with_decay = [p for p in model.parameters() if id(p) not in without]
    return [
        {"params": with_decay, "weight_decay": weight_decay},
        {"params": list(without.values()), "weight_decay": 0.0},
    ]

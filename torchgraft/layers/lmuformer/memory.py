"""Legendre Memory Units as layers: the memory, the cell around it, and the mixers of LMUFormer (arXiv 2402.04882).

Legend: B batch, L length, C channels, Q order of the memory, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.layers.lmuformer.neuron import LIFNeuron, State
from torchgraft.ops._checks import check_floats, check_mask
from torchgraft.ops.lmu import Method, legendre, lmu_kernel, lmu_matrices, lmu_memory, lmu_memory_step, lmu_readout

__all__ = ["LMUCell", "LMUMixer", "LegendreMemory", "SpikingSelfAttention", "Variant"]

Variant = Literal["plain", "eb", "ms"]


class Conv(nn.Conv1d):
    """A convolution over (B, L, C) that adds no padding of its own: one matrix product, which the CPU does best."""

    def forward(self, input: Float[Tensor, "B L C"]) -> Float[Tensor, "B M D"]:
        """(B, L, C) to (B, L - taps + 1, D)."""
        (taps,) = self.kernel_size
        length = input.shape[1] - taps + 1
        windows = input if taps == 1 else torch.cat([input[:, i : i + length] for i in range(taps)], -1)
        return F.linear(windows, self.weight.transpose(1, 2).flatten(1), self.bias)


def normalised(norm: nn.BatchNorm1d, x: Tensor, inside: Tensor | None) -> Tensor:
    """Batch norm of (B, L, C) over the places inside of the sequences alone; zero at the others."""
    if x.shape[1] == 0:
        return x
    if inside is None:
        return norm(x.flatten(0, 1)).view_as(x)
    flat, places = x.flatten(0, 1), inside.flatten().nonzero().squeeze(1)
    found = norm(flat.index_select(0, places))
    return torch.zeros_like(flat, dtype=found.dtype).index_copy(0, places, found).view_as(x)


def part(state: State | None, name: str) -> State | None:
    """What belongs to a submodule, its keys without the prefix."""
    if state is None:
        return None
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


def named(name: str, state: State) -> State:
    """The keys with the prefix again."""
    return {f"{name}.{key}": value for key, value in state.items()}


def fire(
    neuron: LIFNeuron, x: Tensor, state: State | None, name: str, new: State, mask: Tensor | None = None
) -> Tensor:
    """Spikes of a neuron whose potential stands under ``name`` in the states."""
    if x.shape[1] == 0:
        if state is not None:
            new[name] = state[name]
        return x
    spikes, after = neuron(x, None if state is None else {"potential": state[name]}, mask)
    new[name] = after["potential"]
    return spikes


class Mixer(nn.Module):
    """The interface that the causal layers here share.

    ``forward(x, state=None, mask=None) -> (y, state)`` takes a whole sequence or the next piece of one, ``step`` one
    place. Cut anywhere, the outputs are those of the whole (in eval mode, where there is batch norm).
    """

    dim: int

    def _begin(self, batch: int, device: torch.device | str | None, dtype: torch.dtype) -> State:
        raise NotImplementedError

    def _run(self, x: Tensor, state: State | None, inside: Tensor | None, mask: Tensor | None) -> tuple[Tensor, State]:
        """``inside`` is what norms look at; ``mask`` what states look at, not needed for padding at the right end."""
        raise NotImplementedError

    def initial_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> State:
        """State before the first place, on the device of the parameters unless told; float32 at least."""
        where = next(self.parameters()).device if device is None else device
        return self._begin(batch_size, where, torch.promote_types(dtype, torch.float32))

    def forward(
        self, x: Float[Tensor, "B L C"], state: State | None = None, mask: Bool[Tensor, "B L"] | None = None
    ) -> tuple[Float[Tensor, "B L D"], State]:
        """A whole sequence, or the next piece of one.

        Args:
            x: inputs.
            state: what an earlier call returned, to go on from there.
            mask: True where there is data. Other places leave no trace, wherever they stand, and their output is zero.

        Returns:
            Outputs, and the state behind the last true place.

        Raises:
            ValueError: for shapes that do not fit, length zero, or the state of another layer.
            TypeError: for tensors of the wrong dtype.
        """
        check_input(x, self.dim)
        check_state(state, self._begin(len(x), "meta", torch.float32))
        if mask is not None:
            check_mask(mask, x)
        y, new = self._run(x, state, mask, mask)
        return y if mask is None else y.masked_fill(~mask[..., None], 0), new

    def step(self, x_t: Float[Tensor, "B C"], state: State) -> tuple[Float[Tensor, "B D"], State]:
        """One place: (B, C) and the state before it to (B, D) and the state behind it."""
        if x_t.ndim != 2:
            raise ValueError(f"x_t must have shape (batch, {self.dim}), got {tuple(x_t.shape)}")
        check_eval(self, "step")
        y, state = self(x_t[:, None], state)
        return y[:, 0], state


def check_input(x: Tensor, channels: int) -> None:
    """Raise for what is no sequence of this many channels."""
    check_floats(x=x)
    if x.ndim != 3 or 0 in x.shape[:2] or x.shape[2] != channels:
        raise ValueError(
            f"x must have shape (batch, length, {channels}), batch and length at least 1, got {tuple(x.shape)}"
        )


def check_state(state: State | None, wanted: State) -> None:
    """Raise for a state of other names or shapes."""
    if state is None:
        return
    if not isinstance(state, dict) or state.keys() != wanted.keys():
        got = sorted(state) if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"state must hold {sorted(wanted)}, got {got}; begin with initial_state(batch_size)")
    for name, tensor in wanted.items():
        if state[name].shape != tensor.shape:
            raise ValueError(f"state[{name!r}] must have shape {tuple(tensor.shape)}, got {tuple(state[name].shape)}")


def check_eval(module: nn.Module, what: str) -> None:
    """Raise for a module in train mode, whose batch norms would take their statistics from a single step."""
    if module.training and any(isinstance(m, nn.BatchNorm1d) for m in module.modules()):
        raise ValueError(f"{what} needs eval mode, since batch norm has no statistics of one step; call .eval() first")


class LegendreMemory(nn.Module):
    """The last ``theta`` steps of a signal as coefficients of Legendre polynomials, without parameters.

    The matrices are fixed and computed in float64; in float16 and bfloat16 modules they stay float32. Sequences may be
    longer than the window: what is older fades out of the memory. There is no longest length.

    Args:
        order: Q, the number of coefficients.
        theta: length of the window in steps.
        method: as in ``torchgraft.ops.lmu.lmu_matrices``.

    Raises:
        ValueError: as in ``lmu_matrices``.

    Example:
        >>> memory = LegendreMemory(order=12, theta=100)
        >>> u = torch.sin(torch.arange(300) / 25)[None]
        >>> m, state = memory(u)
        >>> m.shape, bool((memory.decode(m[:, -1], 0.505) - u[:, -51]).abs() < 0.01)
        (torch.Size([1, 300, 12]), True)
    """

    A: Tensor
    B: Tensor
    H: Tensor

    def __init__(self, order: int, theta: float, method: Method = "zoh") -> None:
        super().__init__()
        self.order, self.theta, self.method = order, theta, method
        A, B = lmu_matrices(order, theta, method)
        H = lmu_kernel(A, B, max(1, round(theta)))
        # what casts of the module must not touch
        self._exact = {"A": A, "B": B, "H": H}
        for name, exact in self._exact.items():
            self.register_buffer(name, exact.float(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LegendreMemory:
        super()._apply(fn, recurse)
        if self.A.device.type != "meta":
            self._restore(self.A.device)
        return self

    def _restore(self, device: torch.device) -> None:
        """The matrices from their exact values, in the dtype of the module, but float32 at least."""
        wide = torch.promote_types(self.A.dtype, torch.float32)
        for name, exact in self._exact.items():
            setattr(self, name, exact.to(device, wide))

    def _kernel(self, length: int) -> Tensor:
        if self.H.shape[1] < length:
            self._exact["H"] = lmu_kernel(self._exact["A"], self._exact["B"], length)
            self.H = self._exact["H"].to(self.H)
        return self.H

    def initial_state(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        *,
        signals: int | None = None,
    ) -> State:
        """An empty memory, for one signal, or for ``signals`` side by side; float32 at least."""
        shape = (batch_size, self.order) if signals is None else (batch_size, signals, self.order)
        wide = torch.promote_types(dtype, torch.float32)
        return {"memory": torch.zeros(shape, device=self.A.device if device is None else device, dtype=wide)}

    def forward(
        self, u: Float[Tensor, "B L *K"], state: State | None = None, mask: Bool[Tensor, "B L"] | None = None
    ) -> tuple[Float[Tensor, "B L *K Q"], State]:
        """Memories (B, L, Q) of (B, L), or (B, L, K, Q) of (B, L, K). Arguments and errors as in ``lmu_memory``."""
        kernel = self._kernel(u.shape[1]) if u.ndim > 1 and u.shape[1] else None
        m, last = lmu_memory(
            u, self.A, self.B, initial_state=None if state is None else state["memory"], mask=mask, kernel=kernel
        )
        return m, {"memory": last}

    def readout(
        self, u: Tensor, weight: Tensor, state: State | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """``weight @ m`` at every step without the memories; see ``torchgraft.ops.lmu.lmu_readout``."""
        y, last = lmu_readout(
            u, self.A, self.B, weight, initial_state=None if state is None else state["memory"], mask=mask,
            kernel=self._kernel(u.shape[1]),
        )  # fmt: skip
        return y, {"memory": last}

    def step(self, u_t: Float[Tensor, " B *K"], state: State) -> tuple[Float[Tensor, "B *K Q"], State]:
        """One step: (B,) or (B, K), and the state before it."""
        last = lmu_memory_step(u_t, self.A, self.B, state["memory"])
        return last.to(u_t.dtype), {"memory": last}

    def decode(self, m: Float[Tensor, "... Q"], delay: float | Float[Tensor, " R"]) -> Tensor:
        """The signal ``delay`` times ``theta`` ago: (..., Q) to (...), or to (..., R) for R delays in 0..1.

        The middle of a step is half a step old: ``delay = (k + 1/2) / theta`` reads what came k steps ago.
        """
        rows = legendre(self.order, torch.as_tensor(delay, dtype=torch.float64).reshape(-1).cpu()).to(m)
        found = m @ rows.mT
        return found if isinstance(delay, Tensor) and delay.ndim else found[..., 0]

    def extra_repr(self) -> str:
        """The constants."""
        return f"order={self.order}, theta={self.theta}, method={self.method!r}"


class LMUCell(Mixer):
    """Writes one number a step into a Legendre memory, and reads it together with the input.

    ``u = ReLU(W_u x)``, m its memory, ``h = ReLU(W_h [m; x])``; the spiking cell has batch norm and a neuron in the
    place of each ReLU, and for the memory too (official ``LMUFFTCell``, ``SpikingLMUFFTCell``).

    Where the plain memory is at least as large as the hidden size, its read-out goes into the kernel of the
    convolution (``lmu_readout``): equal numbers, and the memories are never held.

    Args:
        input_size: C.
        hidden_size: D, C if not given.
        memory_size: Q; if not given D, in the spiking cell twice as much.
        theta: length of the window in steps.
        spiking: neurons instead of ReLU.

    Raises:
        ValueError: for sizes below one.

    Example:
        >>> cell = LMUCell(16, 32, theta=50).eval()
        >>> h, state = cell(torch.randn(2, 80, 16))
        >>> h.shape, cell.step(torch.randn(2, 16), state)[0].shape
        (torch.Size([2, 80, 32]), torch.Size([2, 32]))
    """

    def __init__(
        self, input_size: int, hidden_size: int | None = None, memory_size: int | None = None, theta: float = 128,
        spiking: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        hidden_size = input_size if hidden_size is None else hidden_size
        if min(input_size, hidden_size) < 1:
            raise ValueError(f"input_size and hidden_size must be at least 1, got {input_size} and {hidden_size}")
        memory_size = hidden_size * (2 if spiking else 1) if memory_size is None else memory_size
        self.dim, self.hidden_size, self.memory_size, self.spiking = input_size, hidden_size, memory_size, spiking
        self.memory = LegendreMemory(memory_size, theta)
        self.W_u = nn.Linear(input_size, 1)
        self.W_h = nn.Linear(memory_size + input_size, hidden_size)
        if spiking:
            self.bn_u, self.bn_m, self.bn_h = (nn.BatchNorm1d(n) for n in (1, memory_size, hidden_size))
            self.f_u, self.f_m, self.f_h = LIFNeuron(), LIFNeuron(), LIFNeuron()

    def _begin(self, batch: int, device: torch.device | str | None, dtype: torch.dtype) -> State:
        sizes = {"memory": self.memory_size}
        if self.spiking:
            sizes |= {"u": 1, "m": self.memory_size, "h": self.hidden_size}
        return {name: torch.zeros(batch, size, device=device, dtype=dtype) for name, size in sizes.items()}

    def _run(self, x: Tensor, state: State | None, inside: Tensor | None, mask: Tensor | None) -> tuple[Tensor, State]:
        old = None if state is None else {"memory": state["memory"]}
        new: State = {}
        if not self.spiking:
            u = F.relu(self.W_u(x))[..., 0]
            from_memory, from_input = self.W_h.weight.split([self.memory_size, self.dim], 1)
            if self.memory_size >= self.hidden_size:
                read, after = self.memory.readout(u, from_memory, old, mask)
            else:
                m, after = self.memory(u, old, mask)
                read = F.linear(m, from_memory)
            return F.relu(read + F.linear(x, from_input, self.W_h.bias)), after
        u = fire(self.f_u, normalised(self.bn_u, self.W_u(x), inside), state, "u", new, mask)[..., 0]
        m, after = self.memory(u, old, mask)
        m = fire(self.f_m, normalised(self.bn_m, m, inside), state, "m", new, mask)
        h = normalised(self.bn_h, self.W_h(torch.cat([m, x], -1)), inside)
        return fire(self.f_h, h, state, "h", new, mask), new | after

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Official checkpoints hold the fixed matrices; they are compared with ours, not taken."""
        A = state_dict.pop(f"{prefix}A", None)
        for name in ("B", "H", "fft_H"):
            state_dict.pop(prefix + name, None)
        super()._load_from_state_dict(state_dict, prefix, *args)
        ours = self.memory.A
        if A is not None and (A.shape != ours.shape or not torch.allclose(A.to(ours), ours, atol=1e-4)):
            errors = args[-1]
            errors.append(
                f"{prefix}A of the checkpoint is not that of memory_size={self.memory_size} and "
                f"theta={self.memory.theta}; make the cell with those of the checkpoint"
            )


class LMUMixer(Mixer):
    """The token mixer of LMUFormer: a cell, a 1 x 1 convolution, batch norm (official ``LMU``, ``SLMU``, ``SLMUMs``).

    Args:
        dim: C.
        memory_size: Q; if not given C, in the spiking variants twice as much.
        theta: length of the window in steps.
        variant: ``"plain"``; ``"eb"``, spiking, with a neuron at the end; or ``"ms"``, spiking with the membrane
            shortcut: batch norm and a neuron (threshold one half) before the cell, none at the end.

    Raises:
        ValueError: for sizes below one, or another variant.

    Example:
        >>> mixer = LMUMixer(16, theta=50).eval()
        >>> x = torch.randn(2, 80, 16)
        >>> y, _ = mixer(x)
        >>> begin, state = mixer(x[:, :30])
        >>> rest, _ = mixer(x[:, 30:], state)
        >>> torch.allclose(torch.cat([begin, rest], 1), y, atol=1e-5)
        True
    """

    causal = True

    def __init__(
        self, dim: int, memory_size: int | None = None, theta: float = 128, variant: Variant = "plain"
    ) -> None:
        super().__init__()
        if variant not in ("plain", "eb", "ms"):
            raise ValueError(f"variant must be 'plain', 'eb' or 'ms', got {variant!r}")
        self.dim, self.variant = dim, variant
        self.lmu = LMUCell(dim, dim, memory_size, theta, variant != "plain")
        self.proj_conv, self.proj_bn = Conv(dim, dim, 1), nn.BatchNorm1d(dim)
        if variant == "ms":
            self.prev_bn, self.prev_lif = nn.BatchNorm1d(dim), LIFNeuron(threshold=0.5)
        elif variant == "eb":
            self.proj_lif = LIFNeuron()

    def _begin(self, batch: int, device: torch.device | str | None, dtype: torch.dtype) -> State:
        found = named("lmu", self.lmu._begin(batch, device, dtype))
        if self.variant != "plain":
            found["prev" if self.variant == "ms" else "proj"] = torch.zeros(batch, self.dim, device=device, dtype=dtype)
        return found

    def _run(self, x: Tensor, state: State | None, inside: Tensor | None, mask: Tensor | None) -> tuple[Tensor, State]:
        new: State = {}
        if self.variant == "ms":
            x = fire(self.prev_lif, normalised(self.prev_bn, x, inside), state, "prev", new, mask)
        h, after = self.lmu._run(x, part(state, "lmu"), inside, mask)
        y = normalised(self.proj_bn, self.proj_conv(h), inside)
        if self.variant == "eb":
            y = fire(self.proj_lif, y, state, "proj", new, mask)
        return y, new | named("lmu", after)


class SpikingSelfAttention(nn.Module):
    """The baseline mixer of the paper: attention of spikes, without a softmax (official ``SSA``).

    ``LIF(0.25 (q k^T) v)`` with spiking q, k, v of each head. It looks at the whole sequence, so it has no state and
    cannot be streamed. Without a softmax the product is taken from the right, in linear time.

    Args:
        dim: C.
        num_heads: must divide C.

    Raises:
        ValueError: for heads that do not divide the width.

    Example:
        >>> SpikingSelfAttention(16, num_heads=4)(torch.randn(2, 10, 16)).shape
        torch.Size([2, 10, 16])
    """

    causal = False

    def __init__(self, dim: int, num_heads: int = 8) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim, got num_heads={num_heads}, dim={dim}")
        self.dim, self.num_heads = dim, num_heads
        self.pre_bn, self.pre_lif = nn.BatchNorm1d(dim), LIFNeuron()
        self.q_conv, self.k_conv, self.v_conv = (Conv(dim, dim, 1, bias=False) for _ in range(3))
        self.q_bn, self.k_bn, self.v_bn = (nn.BatchNorm1d(dim) for _ in range(3))
        self.q_lif, self.k_lif, self.v_lif = (LIFNeuron() for _ in range(3))
        self.attn_lif = LIFNeuron(threshold=0.5)
        self.proj_conv, self.proj_bn = Conv(dim, dim, 1), nn.BatchNorm1d(dim)

    def forward(self, x: Float[Tensor, "B L C"], mask: Bool[Tensor, "B L"] | None = None) -> Float[Tensor, "B L C"]:
        """(B, L, C) to the same; ``mask`` is True where there is data, other places give zero."""
        check_input(x, self.dim)
        if mask is not None:
            check_mask(mask, x)
        x = self.pre_lif(normalised(self.pre_bn, x, mask), None, mask)[0]
        q, k, v = (
            neuron(normalised(norm, conv(x), mask), None, mask)[0].unflatten(-1, (self.num_heads, -1))
            for conv, norm, neuron in (
                (self.q_conv, self.q_bn, self.q_lif),
                (self.k_conv, self.k_bn, self.k_lif),
                (self.v_conv, self.v_bn, self.v_lif),
            )
        )
        y = torch.einsum("blhd,bhde->blhe", q, torch.einsum("bmhd,bmhe->bhde", k, v)).flatten(2)
        return normalised(self.proj_bn, self.proj_conv(self.attn_lif(0.25 * y, None, mask)[0]), mask)

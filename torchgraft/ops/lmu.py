"""The memory of a Legendre Memory Unit: the last ``theta`` steps of a signal as coefficients of Legendre polynomials.

Legend: B batch, L length, K signals side by side, Q order of the memory, D read-outs, N rows.

``m_t = A m_{t-1} + B u_t`` with fixed A and B (Voelker et al., NeurIPS 2019, equations 1 to 3). It is linear and the
same at every step, so a whole sequence is one causal convolution of u with the columns ``A^t B``, done by the fast
Fourier transform (Chilkuri and Eliasmith, ICML 2021, arXiv 2102.11417, equations 23 to 26), and there is no loop over
time. A state that the sequence begins with adds ``A^t`` times itself, by doubling.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from torchgraft.ops._checks import check_floats, check_mask, check_shapes

__all__ = [
    "Method",
    "legendre",
    "lmu_kernel",
    "lmu_matrices",
    "lmu_memory",
    "lmu_memory_naive",
    "lmu_memory_step",
    "lmu_readout",
]

Method = Literal["zoh", "bilinear"]


def lmu_matrices(order: int, theta: float, method: Method = "zoh") -> tuple[Tensor, Tensor]:
    """Discrete A and B of the memory, for steps of length one.

    Args:
        order: Q, the number of polynomials.
        theta: length of the window in steps.
        method: ``"zoh"`` holds the input between steps, ``"bilinear"`` is the trapezoidal rule.

    Returns:
        A (Q, Q) and B (Q,) in float64: an exponential of matrices this large is not for float32.

    Raises:
        ValueError: for an order below one, a window that is not positive, or another method.

    Example:
        >>> A, B = lmu_matrices(1, 2.0)
        >>> round(float(A), 4), round(float(B), 4)  # exp(-1/2) and what it leaves
        (0.6065, 0.3935)
    """
    if order < 1:
        raise ValueError(f"order must be at least 1, got {order}")
    if not theta > 0:
        raise ValueError(f"theta, the length of the window in steps, must be positive, got {theta}")
    # on the CPU even where a model is being made on the meta device
    i = torch.arange(order, dtype=torch.float64, device="cpu")
    scale = (2 * i + 1) / theta
    sign = 1 - 2 * (i % 2)
    below = i[:, None] >= i
    A = scale[:, None] * torch.where(below, -sign[:, None] * sign, -1.0)
    B = scale * sign
    if method == "zoh":
        # the exponential of both at once gives the integral too, without inverting A
        whole = i.new_zeros(order + 1, order + 1)
        whole[:order, :order], whole[:order, order] = A, B
        whole = torch.linalg.matrix_exp(whole)
        return whole[:order, :order].contiguous(), whole[:order, order].contiguous()
    if method == "bilinear":
        eye = torch.eye(order, dtype=torch.float64, device="cpu")
        solved = torch.linalg.solve(eye - A / 2, torch.cat([eye + A / 2, B[:, None]], 1))
        return solved[:, :order].contiguous(), solved[:, order].contiguous()
    raise ValueError(f"method must be 'zoh' or 'bilinear', got {method!r}")


def lmu_kernel(A: Tensor, B: Tensor, length: int) -> Tensor:
    """Impulse response ``[B, A B, A^2 B, ...]``, (Q, length), by doubling.

    Raises:
        ValueError: for a length below one, or shapes that do not go together.
        TypeError: for matrices in half precision, whose powers are nowhere near.

    Example:
        >>> lmu_kernel(torch.tensor([[0.5]]), torch.ones(1), 4)
        tensor([[1.0000, 0.5000, 0.2500, 0.1250]])
    """
    _check_matrices(A, B)
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    found, power = B[:, None], A
    while found.shape[1] < length:
        found = torch.cat([found, power @ found], 1)
        power = power @ power
    return found[:, :length]


def lmu_memory(
    u: Tensor,
    A: Tensor,
    B: Tensor,
    *,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
    kernel: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The memory at every step.

    Args:
        u: signals, (B, L), or (B, L, K) for K of them, each with a memory of its own.
        A, B: (Q, Q) and (Q,), for instance of ``lmu_matrices``. They may be trained.
        initial_state: (B, Q) or (B, K, Q), before the first step; zero without it. The last state of an earlier call
            continues it.
        mask: (B, L), True where there is data. Other places leave the state as it is, and their output is zero.
        kernel: ``lmu_kernel(A, B, length)`` of at least L columns, so that it need not be made anew in each call.

    Returns:
        Memories (B, L, Q) or (B, L, K, Q) in the dtype of ``u``, and the last one in float32 (float64 where an input
        has it), in which everything is computed.

    Raises:
        ValueError: for shapes that do not go together, or length zero.
        TypeError: for tensors that are not floating-point, matrices in half precision, or a mask that is not boolean.

    Example:
        >>> A, B = lmu_matrices(6, theta=20)
        >>> u = torch.sin(torch.arange(60.0) / 8)[None]
        >>> m, last = lmu_memory(u, A, B)
        >>> past = legendre(6, torch.tensor([0.125, 0.525, 0.925])) @ last[0]  # 2, 10 and 18 steps ago
        >>> bool((past - u[0, [57, 49, 41]]).abs().max() < 0.02)
        True
    """
    _check_signal(u, A, B, initial_state, mask, kernel)
    wide = _wide(u, A, initial_state)
    packed, order, lengths = _packed(u, mask)
    flat = _rows(packed).to(wide)
    state = None if initial_state is None else initial_state.to(wide).reshape(len(flat), -1)
    counts = lengths if lengths is None or u.ndim == 2 else lengths.repeat_interleave(u.shape[2])
    kernel = _kernel(A, B, kernel, u.shape[1]).to(wide)
    m = _filtered(flat, kernel)
    if state is not None:
        m = m + _decayed(A, state, u.shape[1])
    last = _last(flat, A, kernel, state, counts)
    if u.ndim == 3:
        m, last = m.unflatten(0, (len(u), -1)).transpose(1, 2), last.unflatten(0, (len(u), -1))
    return _unpacked(m.to(u.dtype), order, mask), last


def lmu_readout(
    u: Tensor,
    A: Tensor,
    B: Tensor,
    weight: Tensor,
    *,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
    kernel: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``weight @ m_t`` at every step, without the memories: they are linear in u, so the weights go into the kernel.

    Exact, and cheaper than ``lmu_memory`` where there are no more read-outs than the memory has coefficients.

    Args:
        u: one signal, (B, L).
        A, B, initial_state, mask, kernel: as in ``lmu_memory``.
        weight: (D, Q).

    Returns:
        Read-outs (B, L, D) in the dtype of ``u``, and the last state (B, Q) as in ``lmu_memory``.

    Raises:
        ValueError, TypeError: as ``lmu_memory``.

    Example:
        >>> A, B = lmu_matrices(6, theta=20)
        >>> u, weight = torch.randn(2, 50), torch.randn(3, 6)
        >>> y, last = lmu_readout(u, A, B, weight)
        >>> torch.allclose(y, lmu_memory(u, A, B)[0] @ weight.T, atol=1e-5)
        True
    """
    if u.ndim != 2:
        raise ValueError(f"u must have shape (batch, length), got {tuple(u.shape)}")
    _check_signal(u, A, B, initial_state, mask, kernel)
    check_floats(weight=weight)
    if weight.ndim != 2 or weight.shape[1] != len(A):
        raise ValueError(f"weight must have shape (outputs, {len(A)}), got {tuple(weight.shape)}")
    wide = _wide(u, A, initial_state)
    packed, order, lengths = _packed(u, mask)
    packed, weight = packed.to(wide), weight.to(wide)
    state = None if initial_state is None else initial_state.to(wide)
    kernel = _kernel(A, B, kernel, u.shape[1]).to(wide)
    y = _filtered(packed, weight @ kernel)
    if state is not None:
        y = y + _decayed(A, state, u.shape[1]) @ weight.mT
    return _unpacked(y.to(u.dtype), order, mask), _last(packed, A, kernel, state, lengths)


def lmu_memory_step(u: Tensor, A: Tensor, B: Tensor, state: Tensor) -> Tensor:
    """One step: u (B,) or (B, K), and the memory before it, (B, Q) or (B, K, Q), to the memory behind it."""
    check_shapes(state=(state, (*u.shape, len(A))))
    wide = _wide(u, A, state)
    return torch.addcmul(state.to(wide) @ A.to(wide).mT, u[..., None].to(wide), B.to(wide))


def lmu_memory_naive(u: Tensor, A: Tensor, B: Tensor, *, initial_state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The definition, one step after another; the reference of the tests."""
    _check_signal(u, A, B, initial_state, None, None)
    m = u.new_zeros(len(u), *u.shape[2:], len(A)) if initial_state is None else initial_state
    steps = []
    for t in range(u.shape[1]):
        m = torch.einsum("ij,...j->...i", A.to(u.dtype), m) + B.to(u.dtype) * u[:, t, ..., None]
        steps.append(m)
    return torch.stack(steps, 1), m


def legendre(order: int, delay: Tensor) -> Tensor:
    """Shifted Legendre polynomials: row r reads ``u(t - r theta)`` off the memory, ``legendre(Q, r) @ m_t``.

    A step is held until the next one, so its middle is half a step old: step ``t - k`` is best read with
    ``r = (k + 1/2) / theta``.

    Args:
        order: Q.
        delay: shares of the window, (R,), 0 for now to 1 for its far end.

    Returns:
        (R, Q) in the dtype of ``delay``.

    Raises:
        ValueError: for delays outside of 0..1, or an order below one.

    Example:
        >>> legendre(3, torch.tensor([0.0, 0.5, 1.0]))
        tensor([[ 1.0000, -1.0000,  1.0000],
                [ 1.0000,  0.0000, -0.5000],
                [ 1.0000,  1.0000,  1.0000]])
    """
    if order < 1:
        raise ValueError(f"order must be at least 1, got {order}")
    if delay.ndim != 1 or not bool(((delay >= 0) & (delay <= 1)).all()):
        raise ValueError(f"delay must be a vector of shares of the window in 0..1, got {delay.tolist()}")
    x = 2 * delay - 1
    found = [torch.ones_like(x), x]
    for n in range(1, order - 1):
        found.append(((2 * n + 1) * x * found[n] - n * found[n - 1]) / (n + 1))
    return torch.stack(found[:order], 1)


def _check_matrices(A: Tensor, B: Tensor) -> None:
    check_floats(A=A, B=B)
    if A.ndim != 2 or A.shape[0] != A.shape[1]:
        raise ValueError(f"A must have shape (order, order), got {tuple(A.shape)}")
    check_shapes(B=(B, (len(A),)))
    for name, matrix in (("A", A), ("B", B)):
        if matrix.dtype in (torch.float16, torch.bfloat16):
            raise TypeError(
                f"{name} must be float32 or float64, got {matrix.dtype}, in which its powers lose the window; signals "
                "and states may be of half precision"
            )


def _check_signal(
    u: Tensor, A: Tensor, B: Tensor, state: Tensor | None, mask: Tensor | None, kernel: Tensor | None
) -> None:
    check_floats(u=u, initial_state=state, kernel=kernel)
    _check_matrices(A, B)
    if u.ndim not in (2, 3) or u.shape[1] == 0:
        raise ValueError(
            "u must have shape (batch, length) or (batch, length, signals) with a length of at least 1, got "
            f"{tuple(u.shape)}"
        )
    check_shapes(initial_state=(state, (len(u), *u.shape[2:], len(A))))
    if mask is not None:
        check_mask(mask, u)
    if kernel is not None and (kernel.ndim != 2 or len(kernel) != len(A) or kernel.shape[1] < u.shape[1]):
        raise ValueError(
            f"kernel must have shape ({len(A)}, length) for at least {u.shape[1]} steps, got {tuple(kernel.shape)}"
        )


def _wide(u: Tensor, A: Tensor, state: Tensor | None) -> torch.dtype:
    wide = torch.promote_types(torch.float32, u.dtype)
    return wide if state is None else torch.promote_types(wide, state.dtype)


def _kernel(A: Tensor, B: Tensor, kernel: Tensor | None, length: int) -> Tensor:
    # powers of a rounded A drift; in float64 they do not, and it is made once
    return lmu_kernel(A.double(), B.double(), length) if kernel is None else kernel[:, :length]


def _rows(u: Tensor) -> Tensor:
    """(B, L, ...) to (N, L)."""
    return u if u.ndim == 2 else u.transpose(1, 2).flatten(0, 1)


def _packed(u: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """True places first in their order, zeros behind them; where each came from, and how many there are."""
    if mask is None:
        return u, None, None
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)
    index = order if u.ndim == 2 else order[..., None].expand_as(u)
    outside = ~mask if u.ndim == 2 else ~mask[..., None]
    return u.masked_fill(outside, 0).gather(1, index), order, mask.sum(1)


def _unpacked(y: Tensor, order: Tensor | None, mask: Tensor | None) -> Tensor:
    if order is None or mask is None:
        return y
    shape = (*order.shape, *[1] * (y.ndim - 2))
    return torch.zeros_like(y).scatter(1, order.view(shape).expand_as(y), y).masked_fill(~mask.view(shape), 0)


def _filtered(u: Tensor, kernel: Tensor) -> Tensor:
    """Causal convolution of each row (N, L) with each of (D, L): (N, L, D)."""
    length = u.shape[1]
    # padded to twice the length, so that nothing wraps around; a multiple of 64 is transformed fastest
    size = -(-2 * length // 64) * 64
    spectrum = torch.fft.rfft(u, size)[:, None] * torch.fft.rfft(kernel, size)
    return torch.fft.irfft(spectrum, size)[..., :length].mT


def _decayed(A: Tensor, state: Tensor, length: int) -> Tensor:
    """``A^t`` times the state (N, Q) for t = 1 .. length: (N, L, Q)."""
    power = A.double()
    found = (state @ power.to(state.dtype).mT)[:, None]
    while found.shape[1] < length:
        found = torch.cat([found, found @ power.to(state.dtype).mT], 1)
        power = power @ power
    return found[:, :length]


def _last(u: Tensor, A: Tensor, kernel: Tensor, state: Tensor | None, lengths: Tensor | None) -> Tensor:
    """The memory (N, Q) behind each row, or behind its first ``lengths`` places."""
    length = u.shape[1]
    if lengths is not None:
        places = torch.arange(length, device=u.device) - (length - lengths)[:, None]
        u = u.gather(1, places.clamp(min=0)).masked_fill(places < 0, 0)
    last = u @ kernel.flip(1).mT
    if state is None:
        return last
    if lengths is None:
        lengths = torch.full((len(u),), length, device=u.device)
    power = A.double()
    for bit in range(length.bit_length()):
        moved = state @ power.to(state.dtype).mT
        state = torch.where(((lengths >> bit) & 1).bool()[:, None], moved, state)
        power = power @ power
    return last + state

"""The power quantizer: codes of |x|^a instead of |x|, its inverse, its gradients, and its integer form.

Letters: a the exponent, b bits, n = 2^(b-1) - 1 the largest signed code (2^b - 1 unsigned), m the scale, q a code,
u = |x| / m, y = n u^a the code before rounding, U = (|q| / n)^(1/a) the decoded magnitude.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from jaxtyping import Float, Float64, Int, Shaped
from torch import Tensor

__all__ = [
    "PowerDecode",
    "PowerFakeQuantize",
    "absmax_scale",
    "decode_table",
    "integer_table",
    "largest_code",
    "lut_error",
    "power_dequantize",
    "power_quantize",
]

Exponent = float | Tensor


def check_bits(bits: int, where: str = "bits") -> None:
    """Raise unless ``bits`` is a whole number in 2..8."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"{where} must be a whole number from 2 to 8, got {bits!r}")


def check_exponent(a: Exponent, where: str = "a") -> None:
    """Raise unless every exponent is finite and positive."""
    if isinstance(a, bool) or not isinstance(a, (numbers.Real, Tensor)):
        raise TypeError(f"{where} must be a number or a tensor of numbers, got {a!r}")
    values = a if isinstance(a, Tensor) else None
    good = math.isfinite(a) and a > 0 if values is None else bool((torch.isfinite(values) & (values > 0)).all())
    if not good:
        raise ValueError(f"{where} must be finite and above 0 (1 is the uniform grid), got {a}")


def check_scale(scale: Tensor | float) -> None:
    """Raise unless every scale is finite and positive."""
    values = torch.as_tensor(scale)
    if not bool((torch.isfinite(values) & (values > 0)).all()):
        raise ValueError("scale must be finite and above 0 everywhere; use 1 for a channel of zeros")


def check_finite(x: Tensor, where: str) -> None:
    """Raise for NaN or infinity, or where there are no values to look at."""
    if not x.is_floating_point():
        raise TypeError(f"{where} must be a floating-point tensor, got {x.dtype}")
    if x.is_meta:
        raise ValueError(f"{where} is on the meta device and has no values; load it first")
    if not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).sum())
        raise ValueError(f"{where} has {bad} NaN or infinite values of {x.numel()}; quantize finite weights")


def largest_code(bits: int, signed: bool = True) -> int:
    """n: 2^(b-1) - 1 for signed codes in -n..n, 2^b - 1 for unsigned ones in 0..n.

    Example:
        >>> largest_code(4), largest_code(4, signed=False)
        (7, 15)
    """
    check_bits(bits)
    return 2 ** (bits - 1) - 1 if signed else 2**bits - 1


def inverse_power(a: Exponent) -> Exponent:
    """1 / a, exactly k where a is 1/k up to rounding, so that a = 1/3 in float32 decodes by a true cube."""
    if isinstance(a, Tensor):
        inverses = 1 / a
        whole = inverses.round()
        return torch.where((inverses - whole).abs() <= 1e-6 * inverses, whole, inverses)
    inverse = 1 / a
    nearest = round(inverse)
    return float(nearest) if abs(inverse - nearest) <= 1e-6 * inverse else inverse


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def absmax_scale(x: Float[Tensor, ...], channel_dim: int | None = 0) -> Float[Tensor, ...]:
    """max |x| over everything but ``channel_dim`` (over everything for ``None``), kept dimensions; 1 where all is zero.

    The scale is a value of ``x`` itself, so it is exact in the dtype of ``x``.
    """
    if channel_dim is not None and not -x.ndim <= channel_dim < x.ndim:
        raise ValueError(f"channel_dim must be one of the {x.ndim} dimensions of x or None, got {channel_dim}")
    if channel_dim is None:
        m = x.abs().amax().reshape([1] * x.ndim)
    else:
        m = x.abs().amax([d for d in range(x.ndim) if d != channel_dim % x.ndim], keepdim=True)
    return torch.where(m > 0, m, torch.ones_like(m))


def encode(x: Tensor, a: Exponent, n: int, scale: Tensor) -> Tensor:
    """n sign(x) (|x| / m)^a before rounding, at most n in magnitude; nothing is checked."""
    x, scale = x.detach().to(_wide(x.dtype)), scale.detach().to(_wide(x.dtype))
    a = a.detach().to(x.dtype) if isinstance(a, Tensor) else a
    # in place, since memory is what this waits for; powers of 1 are what they are without one
    u = (x.abs() / scale).clamp_(max=1.0)
    plain = bool((a == 1).all()) if isinstance(a, Tensor) else a == 1
    u = u if plain else u.pow(a)
    return u.mul_(n).copysign_(x)


def power_quantize(
    x: Float[Tensor, ...],
    a: Exponent,
    bits: int,
    scale: Tensor | None = None,
    channel_dim: int | None = 0,
    signed: bool = True,
) -> tuple[Shaped[Tensor, ...], Float[Tensor, ...]]:
    """Q_a(x) = round(n sign(x) (|x| / m)^a): codes on a grid that is dense near zero for a < 1.

    arXiv 2308.05600, the operator of PowerQuant (arXiv 2301.09858). Power functions are the only continuous
    automorphisms of the positive numbers under multiplication, so products of codes stand for products of values
    (``power_dequantize(q1, …) * power_dequantize(q2, …)`` depends on ``q1 * q2`` alone). Sums are not kept: decode
    operands before accumulating.

    Args:
        x: any shape; bfloat16 and float16 are computed in float32.
        a: exponent above 0, a number or a tensor that broadcasts against ``x``; 1 is symmetric uniform rounding.
        bits: 2 to 8.
        scale: m, broadcast against ``x``; ``None`` takes the largest magnitude. Values beyond it take the last code.
        channel_dim: dimension that has a scale for each slice; ``None`` for one scale of the whole tensor.
        signed: ``False`` gives codes 0..2^b - 1, for activations that cannot be negative.

    Returns:
        Codes (int8; uint8 when unsigned) and the scale, which is 1 for a channel of zeros.

    Raises:
        ValueError: for bits or exponents out of range, NaN or infinity, scales that are not positive, a dimension
            that ``x`` does not have, or negative values with ``signed=False``.

    Example:
        >>> x = torch.tensor([[0.02, -0.1, 0.5, -1.0]])
        >>> power_quantize(x, 0.5, 4)[0].tolist(), power_quantize(x, 1.0, 4)[0].tolist()
        ([[1, -2, 5, -7]], [[0, -1, 4, -7]])
    """
    check_exponent(a)
    n = largest_code(bits, signed)
    check_finite(x, "x")
    if not signed and bool((x < 0).any()):
        raise ValueError("x has negative values; unsigned codes need x >= 0, use signed=True")
    if scale is None:
        scale = absmax_scale(x, channel_dim)
    else:
        check_scale(scale)
    return encode(x, a, n, scale).round().to(torch.int8 if signed else torch.uint8), scale


def decode_table(a: Exponent, bits: int, signed: bool = True) -> Float64[Tensor, "*channels codes"]:
    """Decoded values of all codes in order, of scale 1: sign(q) (|q| / n)^(1/a), float64.

    Signed codes -n..n give 2 n + 1 values, unsigned ones n + 1; a tensor of exponents gives one row each.

    Example:
        >>> decode_table(0.5, 3).tolist() == [-1, -4 / 9, -1 / 9, 0, 1 / 9, 4 / 9, 1]
        True
    """
    check_exponent(a)
    return levels(a, bits, signed)


def levels(a: Exponent, bits: int, signed: bool = True) -> Tensor:
    """``decode_table`` without its check, whose answer a compiler could not know."""
    n = largest_code(bits, signed)
    device = a.device if isinstance(a, Tensor) else None
    q = torch.arange(-n if signed else 0, n + 1, dtype=torch.float64, device=device)
    inverse = inverse_power(a.double()[..., None] if isinstance(a, Tensor) else a)
    return q.sign() * (q.abs() / n).pow(inverse)


def power_dequantize(
    codes: Shaped[Tensor, ...],
    a: Exponent,
    bits: int,
    scale: Tensor | float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, ...]:
    """D_a(q) = m sign(q) (|q| / n)^(1/a).

    Args:
        codes: int8 (signed) or uint8 (unsigned), as ``power_quantize`` gives them.
        a: exponent, a number or a tensor that broadcasts against ``codes``.
        bits: 2 to 8.
        scale: m, broadcast against ``codes``.
        dtype: of the result.

    Raises:
        ValueError: for bits or exponents out of range, codes beyond them, or scales that are not positive.
        TypeError: for codes of another dtype.
    """
    if codes.dtype not in (torch.int8, torch.uint8):
        raise TypeError(f"codes must be int8 (signed) or uint8 (unsigned), got {codes.dtype}")
    check_exponent(a)
    check_scale(scale)
    signed = codes.dtype == torch.int8
    n = largest_code(bits, signed)
    wide = codes.long()
    if codes.numel() and int(wide.abs().max()) > n:
        raise ValueError(f"codes reach {int(wide.abs().max())}, but {bits} bits end at {n}")
    inner = _wide(dtype)
    if isinstance(a, Tensor) and a.numel() > 1:
        values = wide.sign() * (wide.abs().double() / n).pow(inverse_power(a.double()))
    else:
        values = decode_table(float(a), bits, signed).to(codes.device)[wide + n if signed else wide]
    m = scale.to(inner) if isinstance(scale, Tensor) else scale
    return (values.to(inner) * m).to(dtype)


def integer_table(a: float, bits: int, lut_bits: int | None = None) -> tuple[Int[Tensor, codes], int] | None:
    """Whole numbers v and a divisor d with sign(q) (|q| / n)^(1/a) = v / d for all codes -n..n.

    For a = 1/k the numbers sign(q) |q|^k are exact and d = n^k: 4 bits and a = 1/2 give -49..49, an int8 matrix
    product without any float power. Any other a is rounded to ``lut_bits`` where that is given (``lut_error`` says
    what this costs), else there is no such table.

    Returns:
        Values (int64) and divisor, or ``None``.

    Example:
        >>> values, divisor = integer_table(0.5, 3)
        >>> values.tolist(), divisor
        ([-9, -4, -1, 0, 1, 4, 9], 9)
    """
    check_exponent(a)
    n = largest_code(bits)
    k = inverse_power(float(a))
    q = torch.arange(-n, n + 1)
    if float(k).is_integer() and n ** int(k) < 2**31:
        return q.sign() * q.abs() ** int(k), n ** int(k)
    if n == 1:
        # two bits know -1, 0 and 1 alone, whatever the exponent
        return q, 1
    if lut_bits is None:
        return None
    check_bits(lut_bits, "lut_bits")
    d = largest_code(lut_bits)
    return (decode_table(a, bits) * d).round().long(), d


def lut_error(a: float, bits: int, lut_bits: int = 8) -> float:
    """Largest error, relative to the scale, that rounding the table of levels to ``lut_bits`` adds.

    Example:
        >>> lut_error(0.5, 4) < 1e-15, 0 < lut_error(0.7, 4) <= 0.5 / 127
        (True, True)
    """
    table = integer_table(a, bits, lut_bits)
    assert table is not None
    return float((table[0].double() / table[1] - decode_table(a, bits)).abs().max())


class PowerDecode(torch.autograd.Function):
    """m sign(r) (|r| / n)^(1/a) of codes ``r`` that may lie between whole numbers, with gradients that stay finite.

    By the code: m / (a n) (|r| / n)^(1/a - 1), whose base is held at half a code from below. Without this a weight
    of code zero could never leave it (a < 1), or would get an infinite gradient (a > 1). By the exponent, codes held:
    -U / a^2 ln(|r| / n), at least 0 and at most 1 / (e a) in magnitude of scale 1, and 0 at code zero. By the scale:
    sign(r) U.
    """

    @staticmethod
    def forward(ctx: Any, r: Tensor, a: Tensor, scale: Tensor, n: int) -> Tensor:
        """Decoded values; ``a`` and ``scale`` broadcast against ``r``."""
        base = r.abs() / n
        unit = base.pow(1 / a)
        sign = r.sign()
        ctx.save_for_backward(sign, base, unit, a, scale)
        ctx.n = n
        return scale * sign * unit

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients by r, a and the scale."""
        (grad,), (sign, base, unit, a, scale), n = grads, ctx.saved_tensors, ctx.n
        grad_r = grad_a = grad_m = None
        if ctx.needs_input_grad[0]:
            # U / base is base^(1/a - 1): no second power for each weight
            half = 0.5 / n
            slope = torch.where(base > half, unit / base, (half * torch.ones_like(a)).pow(1 / a - 1))
            grad_r = grad * scale / (a * n) * slope
        if ctx.needs_input_grad[1]:
            logarithm = torch.where(base > 0, base, torch.ones_like(base)).log()
            grad_a = (-grad * scale * sign * unit * logarithm / a**2).sum_to_size(a.shape)
        if ctx.needs_input_grad[2]:
            grad_m = (grad * sign * unit).sum_to_size(scale.shape)
        return grad_r, grad_a, grad_m, None


def power_round(x: Tensor, a: Tensor, scale: Tensor, n: int | Tensor, signed: bool = True) -> Tensor:
    """D_a(Q_a(x)) without its gradients."""
    u = (x.abs() / scale).clamp(max=1.0)
    u = u if signed else u * (x > 0)
    return scale * x.sign() * ((n * u.pow(a)).round() / n).pow(1 / a)


class PowerFakeQuantize(torch.autograd.Function):
    """D_a(Q_a(x)), rounding passed straight through: for activations, and for an exponent learned with its codes.

    By x: (q / y)^(1/a - 1) inside the range (where q is not 0; 1 where it is), 0 beyond the scale. By the exponent:
    (U / a) [(y / q) ln u - (1 / a) ln(|q| / n)], 0 where q = 0: what automatic differentiation would make 0 times
    infinity. By the scale: U - u dU/du, and U beyond the range.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, scale: Tensor, n: int | Tensor, signed: bool) -> Tensor:
        """Values on the grid; ``a`` and ``scale`` broadcast against ``x``. Unsigned grids hold negative x at 0."""
        ctx.save_for_backward(x, a, scale)
        ctx.n, ctx.signed = n, signed
        return power_round(x, a, scale, n, signed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients by x, a and the scale."""
        (grad,), (x, a, scale), n = grads, ctx.saved_tensors, ctx.n
        inside = (x.abs() <= scale) if ctx.signed else (x >= 0) & (x <= scale)
        u = (x.abs() / scale).clamp(max=1.0)
        u = u if ctx.signed else u * (x > 0)
        y = n * u.pow(a)
        q = y.round()
        coded = q > 0
        one = torch.ones_like(u)
        safe_q, safe_y, safe_u = (torch.where(coded, v, one) for v in (q, y, u))
        unit = torch.where(coded, (safe_q / n).pow(1 / a), torch.zeros_like(u))
        slope = torch.where(coded, (safe_q / safe_y).pow(1 / a - 1), one) * inside
        grad_a = grad_m = None
        if ctx.needs_input_grad[1]:
            inner = (safe_y / safe_q) * safe_u.log() - (safe_q / n).log() / a
            grad_a = (grad * scale * x.sign() * unit / a * inner * coded).sum_to_size(a.shape)
        if ctx.needs_input_grad[2]:
            grad_m = (grad * x.sign() * (unit - u * slope)).sum_to_size(scale.shape)
        return (grad * slope if ctx.needs_input_grad[0] else None), grad_a, grad_m, None, None


def soft_round(z: Float[Tensor, ...], temperature: float) -> Float[Tensor, ...]:
    """Rounding that anneals: the identity as ``temperature`` goes to 0, ``round`` as it goes to infinity.

    r_T(z) = floor(z) + S_T(z - floor(z)) with a logistic step S_T of slope T about 1/2, moved and stretched so that
    S_T(0) = 0 and S_T(1) = 1: continuous at whole numbers (design of this project; the paper's own schedule could
    not be checked).

    Example:
        >>> z = torch.tensor([0.25, 1.0, 1.9])
        >>> soft_round(z, 1e-4), soft_round(z, 100.0)
        (tensor([0.2500, 1.0000, 1.9000]), tensor([0., 1., 2.]))
    """
    if not temperature > 0 or math.isinf(temperature):
        raise ValueError(f"temperature must be finite and above 0, got {temperature}")
    floor = z.detach().floor()
    # tanh form: S(u) = 1/2 + tanh(T (u - 1/2) / 2) / (2 tanh(T / 4)), which neither overflows nor cancels
    step = torch.tanh(temperature / 2 * (z - floor - 0.5)) / math.tanh(temperature / 4)
    return floor + 0.5 + 0.5 * step

"""Causal convolution with a kernel as long as the sequence, by the fast Fourier transform."""

from __future__ import annotations

import torch
from torch import Tensor

from torchgraft.ops._checks import check_floats, check_shapes

__all__ = ["long_convolution", "long_convolution_naive"]


def long_convolution(
    x: Tensor,
    kernel: Tensor,
    bias: Tensor | None = None,
    *,
    bidirectional: bool = False,
) -> Tensor:
    """Convolve each channel with its own kernel: ``y_t = sum_{s <= t} kernel_s x_{t-s} + bias x_t``.

    The sequence is padded to twice its length, so nothing wraps around. Float16 and bfloat16 are transformed in
    float32, for which there is a transform.

    Args:
        x: inputs, (B, L, D).
        kernel: (D, taps), from the present into the past. Any number of taps: those beyond L do nothing, missing ones
            are zero.
        bias: (D,), weight of the present input, besides the kernel's own first tap.
        bidirectional: take the kernel of ``2 L - 1`` or fewer taps as centred, its middle tap being the present; the
            number of taps must be odd.

    Returns:
        (B, L, D) in the dtype of ``x``.

    Raises:
        ValueError: for shapes that do not go together, length zero, or an even centred kernel.
        TypeError: for tensors that are not floating-point.

    Example:
        >>> x = torch.randn(2, 100, 3)
        >>> y = long_convolution(x, torch.eye(3, 100)[:, :])
        >>> torch.allclose(y[:, 1:, 1], x[:, :-1, 1], atol=1e-5)
        True
    """
    _check(x, kernel, bias)
    wide = torch.promote_types(torch.float32, x.dtype)
    length = x.shape[1]
    taps = kernel.shape[1]
    if bidirectional and taps % 2 == 0:
        raise ValueError(f"kernel must have an odd number of taps to be centred, got {taps}")
    past = taps // 2 if bidirectional else 0
    # taps that no place of the sequence reaches
    first, last = max(0, past - length + 1), min(taps, past + length)
    kernel, past = kernel[:, first:last].to(wide), past - first
    # a multiple of a small power of two is transformed fastest
    size = -(-(length + kernel.shape[1]) // 64) * 64
    y = torch.fft.irfft(torch.fft.rfft(x.to(wide), size, 1) * torch.fft.rfft(kernel, size, 1).T, size, 1)
    y = y[:, past : past + length]
    if bias is not None:
        y = y + x * bias.to(wide)
    return y.to(x.dtype)


def long_convolution_naive(x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    """The definition as a product with the Toeplitz matrix of each channel; the reference of the tests."""
    _check(x, kernel, bias)
    length, taps = x.shape[1], kernel.shape[1]
    lag = torch.arange(length)[:, None] - torch.arange(length)
    matrix = torch.where((lag >= 0) & (lag < taps), kernel[:, lag.clamp(0, taps - 1)], torch.zeros(()).to(kernel))
    y = torch.einsum("dts,bsd->btd", matrix, x)
    return y if bias is None else y + x * bias


def _check(x: Tensor, kernel: Tensor, bias: Tensor | None) -> None:
    check_floats(x=x, kernel=kernel, bias=bias)
    if x.ndim != 3 or x.shape[1] == 0:
        raise ValueError(
            f"x must have shape (batch, length, channels) with a length of at least 1, got {tuple(x.shape)}"
        )
    if kernel.ndim != 2 or kernel.shape[0] != x.shape[2] or kernel.shape[1] == 0:
        raise ValueError(f"kernel must have shape ({x.shape[2]}, taps), got {tuple(kernel.shape)}")
    check_shapes(bias=(bias, (x.shape[2],)))

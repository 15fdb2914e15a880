"""Batched augmentation operations of the AutoAugment family, one operation and one strength for each image.

``madaug`` and ``invariance_constrained`` choose from these. The published searches were made on Pillow; the pixel
arithmetic is kornia's where the two agree, and geometry takes the nearest pixel and fills with black, as Pillow does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

__all__ = ["AugmentationSpace", "Operation"]

Operation = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(x (n, ...), level (n,) in [0, 1], sign (n,) of -1 or 1) -> x`` of the same shape."""

_CUTOUT_FILL = (125 / 255, 123 / 255, 114 / 255)


class AugmentationSpace:
    """Named operations on batches, each example with its own operation and level.

    Args:
        operations: name to ``fn(x, level, sign)``. ``x`` holds the n examples that drew this operation, ``level`` is
            (n,) in [0, 1], ``sign`` is (n,) of -1 or 1 for operations with a direction. Any data will do: the ready
            spaces are for images, an operation of yours may jitter time series or mask tokens.
        check: raises for examples that the operations cannot take; ``apply`` and ``apply_all`` call it once for all.

    Raises:
        ValueError: for no operations.

    Example:
        >>> space = AugmentationSpace.trivial(32)
        >>> x = torch.rand(4, 3, 32, 32)
        >>> y = space.apply(x, torch.tensor([0, 3, 3, 9]), torch.tensor([0.0, 0.5, 1.0, 0.2]))
        >>> y.shape, bool((y[0] == x[0]).all())
        (torch.Size([4, 3, 32, 32]), True)
    """

    def __init__(self, operations: Mapping[str, Operation], check: Callable[[Tensor], None] | None = None) -> None:
        if not operations:
            raise ValueError("operations is empty; give at least one name: fn(x, level, sign)")
        self.operations, self._check = dict(operations), check

    @property
    def names(self) -> tuple[str, ...]:
        """Names in the order of their indices."""
        return tuple(self.operations)

    def __len__(self) -> int:
        return len(self.operations)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self.names)})"

    def subset(self, *names: str) -> AugmentationSpace:
        """A space of some of the operations, in the order given."""
        unknown = [name for name in names if name not in self.operations]
        if unknown:
            raise ValueError(f"names has {', '.join(unknown)}; there are {', '.join(self.names)}")
        return AugmentationSpace({name: self.operations[name] for name in names}, self._check)

    def check(self, x: Tensor) -> None:
        """Raise for examples that the operations cannot take; the ready spaces take images in [0, 1]."""
        if self._check is not None:
            self._check(x)

    def apply(
        self, x: Tensor, op_idx: Int64[Tensor, " b"], level: Float[Tensor, " b"], sign: Tensor | None = None
    ) -> Tensor:
        """Apply to each example its operation.

        Args:
            x: (B, ...). The ready image spaces take (B, 3, H, W), floats in [0, 1] or bytes.
            op_idx: (B,) indices into ``names``.
            level: (B,) strengths in [0, 1].
            sign: (B,) of -1 and 1, the direction of signed operations; all 1 without it.

        Returns:
            A new tensor of the shape and dtype of ``x``.

        Raises:
            ValueError: for shapes that do not go together, indices or levels out of range, pixels out of range or NaN.
        """
        if not (len(x) == len(op_idx) == len(level)):
            raise ValueError(f"x, op_idx and level must be equally many, got {len(x)}, {len(op_idx)}, {len(level)}")
        if len(op_idx) and not 0 <= int(op_idx.min()) <= int(op_idx.max()) < len(self):
            raise ValueError(f"op_idx must lie in 0..{len(self) - 1}, got {int(op_idx.min())}..{int(op_idx.max())}")
        sign = self._checked(level, sign)
        if x.dtype == torch.uint8:
            return (self.apply(x / 255, op_idx, level, sign) * 255).round().to(torch.uint8)
        self.check(x)
        out = x.clone()
        for index, operation in enumerate(self.operations.values()):
            rows = (op_idx == index).nonzero().flatten()
            if len(rows):
                out[rows] = operation(x[rows], level[rows], sign[rows]).to(x.dtype)
        return out

    def apply_all(self, x: Tensor, levels: Float[Tensor, "b k"], sign: Tensor | None = None) -> Tensor:
        """Apply every operation to every example.

        Args:
            x: (B, ...), as in ``apply``.
            levels: (B, K), a strength for each example and operation, in [0, 1].
            sign: (B, K) of -1 and 1; all 1 without it.

        Returns:
            (B, K, ...), of the dtype of ``x``.

        Raises:
            ValueError: for other shapes, or values out of range.
        """
        if levels.shape != (len(x), len(self)):
            raise ValueError(f"levels must be {(len(x), len(self))}, got {tuple(levels.shape)}")
        sign = self._checked(levels, sign)
        if x.dtype == torch.uint8:
            return (self.apply_all(x / 255, levels, sign) * 255).round().to(torch.uint8)
        self.check(x)
        each = enumerate(self.operations.values())
        return torch.stack([fn(x, levels[:, k], sign[:, k]).to(x.dtype) for k, fn in each], 1)

    @staticmethod
    def _checked(level: Tensor, sign: Tensor | None) -> Tensor:
        if level.numel() and not (float(level.min()) >= 0 and float(level.max()) <= 1):
            raise ValueError(f"level must lie in [0, 1], got {float(level.min()):g}..{float(level.max()):g}")
        if sign is None:
            return torch.ones_like(level)
        if sign.shape != level.shape or not bool((sign.abs() == 1).all()):
            raise ValueError(f"sign must be -1 or 1 of shape {tuple(level.shape)}, got {tuple(sign.shape)}")
        return sign.to(level.dtype)

    @classmethod
    def autoaugment17(cls, size: int) -> AugmentationSpace:
        """The 17 operations of MADAug (and AdaAug), a level running from the low to the high end of each range.

        Args:
            size: side of the images in pixels.

        Raises:
            ValueError: for a size below 1.
        """
        enhance = (0.1, 1.9)
        _check_size(size)
        return cls(
            {
                "shear_x": _ranged(_shear_x, -0.3, 0.3),
                "shear_y": _ranged(_shear_y, -0.3, 0.3),
                "translate_x": _ranged(_translate_x, -0.45 * size, 0.45 * size),
                "translate_y": _ranged(_translate_y, -0.45 * size, 0.45 * size),
                "rotate": _ranged(_rotate, -30, 30),
                "autocontrast": _fixed(_autocontrast),
                "invert": _fixed(lambda x: 1 - x),
                "equalize": _fixed(_equalize),
                "solarize": _ranged(_solarize, 0, 256, signed=False),
                "posterize": _ranged(_posterize, 4, 8, signed=False),
                "contrast": _ranged(_contrast, *enhance, signed=False),
                "color": _ranged(_color, *enhance, signed=False),
                "brightness": _ranged(_brightness, *enhance, signed=False),
                "sharpness": _ranged(_sharpness, *enhance, signed=False),
                "cutout": _ranged(_cutout, 0, 0.2 * size, signed=False),
                "flip": _fixed(lambda x: x.flip(3)),
                "identity": _fixed(lambda x: x),
            },
            _images,
        )

    @classmethod
    def trivial(cls, size: int = 32, wide: bool = False) -> AugmentationSpace:
        """The 14 operations of TrivialAugment, a level running from no change (or the low end) to the strongest.

        Args:
            size: side of the images in pixels; the published spaces are for 32, whose translations of up to 10 (wide:
                32) pixels grow with it.
            wide: the wide space: rotations to 135 degrees, shears to 0.99, translations by the whole image,
                enhancements from 0.01 to 2, posterizing to 2 bits.

        Raises:
            ValueError: for a size below 1.
        """
        _check_size(size)
        enhance = (0.01, 2.0) if wide else (0.1, 1.9)
        shear = 0.99 if wide else 0.3
        shift = size * (1 if wide else 10 / 32)
        return cls(
            {
                "identity": _fixed(lambda x: x),
                "autocontrast": _fixed(_autocontrast),
                "equalize": _fixed(_equalize),
                "rotate": _ranged(_rotate, 0, 135 if wide else 30, whole=True),
                "solarize": _ranged(_solarize, 256, 0, signed=False),
                "color": _ranged(_color, *enhance, signed=False),
                "posterize": _ranged(_posterize, 8, 2 if wide else 4, signed=False),
                "contrast": _ranged(_contrast, *enhance, signed=False),
                "brightness": _ranged(_brightness, *enhance, signed=False),
                "sharpness": _ranged(_sharpness, *enhance, signed=False),
                "shear_x": _ranged(_shear_x, 0, shear),
                "shear_y": _ranged(_shear_y, 0, shear),
                "translate_x": _ranged(_translate_x, 0, shift, whole=True),
                "translate_y": _ranged(_translate_y, 0, shift, whole=True),
            },
            _images,
        )


def _check_size(size: int) -> None:
    if size < 1:
        raise ValueError(f"size must be the side of the images in pixels, got {size}")


def _images(x: Tensor) -> None:
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"x must be images of shape (B, 3, H, W) or (B, 1, H, W), got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floats in [0, 1] or bytes, got {x.dtype}")
    if x.numel() and not (float(x.amin()) >= 0 and float(x.amax()) <= 1):
        raise ValueError(
            f"x must lie in [0, 1], got {float(x.amin()):.3g}..{float(x.amax()):.3g}; augment before normalising"
        )


def _ranged(
    function: Callable[[Tensor, Tensor], Tensor], low: float, high: float, *, signed: bool = True, whole: bool = False
) -> Operation:
    def operation(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
        value = low + level.to(torch.float32) * (high - low)
        if whole:
            value = value.trunc()
        return function(x, value * sign.to(value) if signed else value)

    return operation


def _fixed(function: Callable[[Tensor], Tensor]) -> Operation:
    def operation(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
        return function(x)

    return operation


def _warp(x: Tensor, rows: list[list[Tensor]]) -> Tensor:
    """``rows``: the 2 x 3 matrix from output to input pixels, origin at the top left corner, as Pillow counts."""
    h, w = x.shape[2:]
    (a, b, c), (d, e, f) = rows
    # from pixels to [-1, 1]: u = 2 x / w - 1
    top = torch.stack([a, b * h / w, a + b * h / w + 2 * c / w - 1], 1)
    low = torch.stack([d * w / h, e, d * w / h + e + 2 * f / h - 1], 1)
    grid = F.affine_grid(torch.stack([top, low], 1), list(x.shape), align_corners=False)
    return F.grid_sample(x.float(), grid, mode="nearest", padding_mode="zeros", align_corners=False)


def _shear_x(x: Tensor, value: Tensor) -> Tensor:
    one, zero = torch.ones_like(value), torch.zeros_like(value)
    return _warp(x, [[one, value, zero], [zero, one, zero]])


def _shear_y(x: Tensor, value: Tensor) -> Tensor:
    one, zero = torch.ones_like(value), torch.zeros_like(value)
    return _warp(x, [[one, zero, zero], [value, one, zero]])


def _translate_x(x: Tensor, value: Tensor) -> Tensor:
    one, zero = torch.ones_like(value), torch.zeros_like(value)
    return _warp(x, [[one, zero, value], [zero, one, zero]])


def _translate_y(x: Tensor, value: Tensor) -> Tensor:
    one, zero = torch.ones_like(value), torch.zeros_like(value)
    return _warp(x, [[one, zero, zero], [zero, one, value]])


def _rotate(x: Tensor, degrees: Tensor) -> Tensor:
    """Counter-clockwise about the centre."""
    h, w = x.shape[2:]
    cos, sin = torch.cos(torch.deg2rad(degrees)), torch.sin(torch.deg2rad(degrees))
    # the output pixel is turned back to find where it comes from
    return _warp(
        x,
        [[cos, -sin, w / 2 - cos * w / 2 + sin * h / 2], [sin, cos, h / 2 - sin * w / 2 - cos * h / 2]],
    )


def _autocontrast(x: Tensor) -> Tensor:
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    # a channel of one value has nothing to stretch
    return torch.where(high > low, (x - low) / (high - low).clamp(min=1e-6), x)


def _equalize(x: Tensor) -> Tensor:
    from kornia.enhance import equalize

    return equalize(x.float())


def _solarize(x: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(x * 255 < _column(threshold), x, 1 - x)


def _posterize(x: Tensor, bits: Tensor) -> Tensor:
    # the bits that remain, of the byte nearest to the pixel; kornia's takes whole arguments only
    step = 2.0 ** (8 - _column(bits.trunc()))
    return ((x * 255).round() / step).floor() * step / 255


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * _column(factor)).clamp(0, 1)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    from kornia.enhance import adjust_contrast_with_mean_subtraction

    return adjust_contrast_with_mean_subtraction(x.float(), factor)


def _color(x: Tensor, factor: Tensor) -> Tensor:
    from kornia.enhance import adjust_saturation_with_gray_subtraction

    if x.shape[1] == 1:  # grey has no colour to change
        return x
    return adjust_saturation_with_gray_subtraction(x.float(), factor)


def _sharpness(x: Tensor, factor: Tensor) -> Tensor:
    from kornia.enhance import sharpness

    return sharpness(x.float(), factor)


def _cutout(x: Tensor, side: Tensor) -> Tensor:
    """A grey square about a random place."""
    h, w = x.shape[2:]
    place = torch.rand(2, len(x), 1, device=x.device)
    half = side[:, None] / 2
    rows, columns = torch.arange(h, device=x.device) + 0.5, torch.arange(w, device=x.device) + 0.5
    inside = ((rows - place[0] * h).abs() < half)[:, None, :, None] & ((columns - place[1] * w).abs() < half)[
        :, None, None, :
    ]
    fill = x.new_tensor(_CUTOUT_FILL if x.shape[1] == 3 else _CUTOUT_FILL[1:2])[:, None, None]
    return torch.where(inside, fill, x)


def _column(value: Tensor) -> Tensor:
    return value[:, None, None, None]

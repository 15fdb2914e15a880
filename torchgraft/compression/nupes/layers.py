"""Layers that hold packed codes: linear (transformers' Conv1D too) and convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.compression.nupes.config import PowerQuantConfig
from torchgraft.compression.nupes.packing import pack_codes, packed_bytes, signed_codes, unpack_codes
from torchgraft.compression.nupes.quantizer import (
    PowerFakeQuantize,
    check_exponent,
    check_finite,
    encode,
    integer_table,
    inverse_power,
    largest_code,
    levels,
)
from torchgraft.compression.nupes.search import rows_and_scales, weight_scale

__all__ = ["PowerActivation", "PowerConv", "PowerLayer", "PowerLinear", "float_weight", "is_quantizable"]


DECODED_AT_ONCE = 2**18
"""Weights that are decoded at a time for a product: 1 MiB in float32, which a core's cache holds."""

FEW_INPUTS = 64
"""Up to so many input vectors a weight is decoded in pieces; for more, one large product is faster."""


def _bits_of_float(a: Tensor) -> Tensor:
    # kept as the bits of a float32 in an int32, so that model.half() and dtype= cannot change an exponent
    return a.to(torch.float32).view(torch.int32)


def _is_hf_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D (GPT-2): a linear layer whose weight lies the other way round."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def is_quantizable(module: nn.Module) -> bool:
    """Whether there is a quantized layer for this very type and its weight; a subclass may compute something else.

    A weight without numbers has nothing to quantize, and one that is computed from other parameters (weight norm, a
    pruning mask) is made anew at each call.
    """
    known = type(module) in (nn.Linear, nn.Conv1d, nn.Conv2d) or _is_hf_conv1d(module)
    weight = module._parameters.get("weight")
    return known and weight is not None and weight.numel() > 0


def float_weight(module: nn.Module) -> Float[Tensor, "out ..."]:
    """The weight with output channels first."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.t() if _is_hf_conv1d(module) else weight


class PowerActivation(nn.Module):
    """Inputs on a power grid, one scale for the tensor; the gradient passes straight through.

    Scale and exponent are float32 numbers kept as their bits, so that no cast of the model moves the grid.

    Args:
        a: exponent.
        bits: 2 to 8.
        scale: largest magnitude, from calibration or from BatchNorm statistics; larger values take the last code.
        signed: ``False`` for inputs that are never negative.
    """

    scale_bits: Tensor
    exponent_bits: Tensor
    levels: Tensor

    def __init__(self, a: float, bits: int, scale: float, signed: bool = True) -> None:
        super().__init__()
        check_exponent(a)
        n = largest_code(bits, signed)
        if not (0 < scale < float("inf")):
            raise ValueError(f"scale must be finite and above 0, got {scale}")
        self.register_buffer("scale_bits", _bits_of_float(torch.tensor([float(scale)])))
        self.register_buffer("exponent_bits", _bits_of_float(torch.tensor([float(a)])))
        self.register_buffer("levels", torch.tensor([n, int(signed)], dtype=torch.int32))

    @property
    def scale(self) -> Float[Tensor, " one"]:
        """Largest magnitude, float32."""
        return self.scale_bits.view(torch.float32)

    def exponent(self) -> float:
        """The exponent."""
        return float(self.exponent_bits.view(torch.float32))

    def codes(self, x: Tensor) -> tuple[Tensor, int]:
        """Codes as floating-point whole numbers, and n."""
        n, signed = self.levels.tolist()
        if not signed:
            x = x.clamp(min=0)
        return encode(x, self.exponent(), n, self.scale).round(), n

    def forward(self, x: Float[Tensor, ...]) -> Float[Tensor, ...]:
        """x on the grid."""
        # all of it as tensors: a number read from one would break a compiled graph
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        n, signed = self.levels.to(wide.dtype)
        scale, a = self.scale.to(wide.dtype), self.exponent_bits.view(torch.float32).to(wide.dtype)
        return PowerFakeQuantize.apply(wide.clamp(-signed * scale, scale), a, scale, n, True).to(x.dtype)


class PowerLayer(nn.Module):
    """Packed codes (out, bytes), scales (out, groups) and exponents of a weight (out, …), and the way back.

    Attributes:
        codes: uint8, ``bits`` bits a weight.
        scale: largest magnitude of each channel or group, in the dtype of the weight, where it is exact.
        exponent_bits: int32, the float32 exponents, one or one for each output channel.
        bias: as in the float layer.
        input_quantizer: a ``PowerActivation`` or ``None``.
    """

    codes: Tensor
    scale: Tensor
    exponent_bits: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        shape: tuple[int, ...],
        bits: int,
        group_size: int | None,
        exponents: int,
        dtype: torch.dtype,
        bias: nn.Parameter | None,
        lut_bits: int | None,
        integer_only: bool,
    ) -> None:
        super().__init__()
        self.shape, self.bits = tuple(shape), bits
        self.lut_bits, self.integer_only = lut_bits, integer_only
        self.columns = int(torch.Size(shape[1:]).numel())
        # a group of all columns is a channel
        self.group_size = group_size if group_size is not None and group_size < self.columns else None
        groups = 1 if self.group_size is None else -(-self.columns // self.group_size)
        self.register_buffer("codes", torch.zeros(shape[0], packed_bytes(self.columns, bits), dtype=torch.uint8))
        self.register_buffer("scale", torch.ones(shape[0], groups, dtype=dtype))
        self.register_buffer("exponent_bits", _bits_of_float(torch.ones(exponents)))
        self.register_parameter("bias", bias)
        self.input_quantizer: PowerActivation | None = None
        self._int8: tuple[Tensor, Tensor] | None = None
        # a weight to use instead of the codes, while these are being learned
        self.learning: Tensor | None = None

    @property
    def exponent(self) -> Float[Tensor, " exponents"]:
        """Exponents, float64, of shape (1,) or (out,)."""
        return self.exponent_bits.view(torch.float32).double()

    @property
    def weight(self) -> Tensor:
        """The decoded weight, for code that looks at ``linear.weight`` (its dtype and device, mostly)."""
        return self.dequantized_weight()

    def assign(self, codes: Int8[Tensor, "out columns"], scale: Tensor, exponent: Tensor) -> None:
        """Store codes -n..n, scales and exponents."""
        self.codes.copy_(pack_codes(codes, self.bits))
        self.scale.copy_(scale)
        self.exponent_bits.copy_(_bits_of_float(exponent))
        self._int8 = None

    def signed_codes(self) -> Int8[Tensor, "out columns"]:
        """The codes, -n..n."""
        return signed_codes(self.codes, self.bits, self.columns)

    def _table(self) -> Tensor:
        """Levels of scale 1, (1 or out, codes)."""
        table = levels(self.exponent, self.bits)
        if self.lut_bits is None:
            return table
        n = largest_code(self.lut_bits)
        # exponents 1/k have exact whole numbers of their own, see integer_table
        exact = torch.remainder(torch.as_tensor(inverse_power(self.exponent)), 1.0)[:, None] == 0
        return torch.where(exact, table, (table * n).round() / n)

    def _unit_weight(self, dtype: torch.dtype) -> Float[Tensor, "out columns"]:
        """Decoded weight of scale 1, by a look-up and never by a power for each weight."""
        table = self._table().to(dtype)
        index = unpack_codes(self.codes, self.bits, self.columns)
        if len(table) == 1:
            # a table of 32-bit places is half the traffic of one of 64
            return table[0].index_select(0, index.flatten().int()).view(index.shape)
        return table.gather(1, index.long())

    def dequantized_weight(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out ..."]:
        """The weight that the codes stand for, in the shape of the float layer (output channels first)."""
        dtype = dtype or self.scale.dtype
        if self.learning is not None:
            return self.learning.to(dtype)
        inner = torch.float64 if dtype == torch.float64 else torch.float32
        weight = self._unit_weight(inner)
        if self.group_size is None:
            scaled = weight * self.scale.to(inner)
        else:
            scaled = weight * self.scale.to(inner).repeat_interleave(self.group_size, 1)[:, : self.columns]
        return scaled.to(dtype).reshape(self.shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._int8 = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._int8 = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_int8": None, "learning": None}

    def bytes(self) -> int:
        """Bytes of codes, scales and exponents as stored."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scale, self.exponent_bits))

    def extra_repr(self) -> str:
        """Shape, bits and exponents."""
        a = self.exponent
        shown = f"{float(a):.4g}" if len(a) == 1 else f"{float(a.min()):.3g}..{float(a.max()):.3g}"
        return f"{self.shape}, bits={self.bits}, exponent={shown}, group_size={self.group_size}"

    @classmethod
    def check(cls, module: nn.Module, name: str, bits: int, a: Tensor, config: PowerQuantConfig) -> None:
        """Raise for a weight or an exponent that cannot be quantized, naming the layer."""
        check_finite(float_weight(module), f"weight of layer {name!r}")
        check_exponent(a, f"exponent of layer {name!r}")
        if config.integer_only:
            for value in a.tolist():
                if integer_table(value, bits, config.lut_bits) is None:
                    raise ValueError(
                        f"layer {name!r}: integer_only needs an exponent 1/k with n^k below 2^31 or lut_bits=, "
                        f"got {value}"
                    )

    def quantize_(self, module: nn.Module, a: Tensor) -> None:
        """Round the weight of a float module to nearest on the grid of exponents ``a``."""
        weight = float_weight(module).detach().reshape(self.shape[0], -1)
        scale = weight_scale(weight, self.group_size)
        grouped, _ = rows_and_scales(weight, self.group_size)
        # the exponent as it will be stored, so that the codes are nearest on the very grid they decode to
        stored = a.float().view(-1, 1, 1).to(weight.device)
        q = encode(grouped, stored, largest_code(self.bits), scale[..., None]).round().to(torch.int8)
        self.assign(q.flatten(1)[:, : self.columns], scale, a)


class PowerLinear(PowerLayer):
    """A linear layer of packed power codes.

    Its forward pass decodes the weight by look-up and multiplies. Shorter ways are taken where they hold:

    - bfloat16 inputs on CPU without gradients, one scale a channel, and a table of int8 numbers (exponent 1/k with
      n^k <= 127, or ``lut_bits=8``): torch's own int8 kernel on the expanded numbers, one byte a weight in memory.
    - CPU without gradients, 2, 4 or 8 bits, one exponent, at most 64 input vectors: a byte is decoded at a time, a few
      rows of the weight at a time, so that no dense weight is held.
    - ``integer_only`` with an input quantizer: integers times integers, exact, then one scale.

    Shapes: (…, in) to (…, out).

    Example:
        >>> layer = PowerLinear.from_float(nn.Linear(16, 4), PowerQuantConfig(weight_bits=4, exponent=0.5))
        >>> layer(torch.randn(2, 3, 16)).shape, layer.codes.shape
        (torch.Size([2, 3, 4]), torch.Size([4, 8]))
    """

    @classmethod
    def like(cls, module: nn.Module, bits: int, config: PowerQuantConfig) -> PowerLinear:
        """An empty layer in the place of a linear module."""
        weight = float_weight(module)
        exponents = weight.shape[0] if config.granularity == "channel" else 1
        return cls(
            tuple(weight.shape), bits, config.group_size, exponents, weight.dtype, module.bias,  # type: ignore[arg-type]
            config.lut_bits, config.integer_only,
        ).to(weight.device)  # fmt: skip

    @classmethod
    def from_float(cls, linear: nn.Module, config: PowerQuantConfig, exponent: Tensor | float | None = None) -> Any:
        """Quantize a linear module to nearest; ``exponent`` None follows the configuration.

        The weight alone: what needs calibration data (``act_bits``, learning) is for ``quantize_model``.
        """
        return _from_float(cls, linear, config, exponent)

    @property
    def in_features(self) -> int:
        """Columns."""
        return self.shape[1]

    @property
    def out_features(self) -> int:
        """Output channels."""
        return self.shape[0]

    def _integer_weight(self) -> tuple[Tensor, int] | None:
        tables = [integer_table(a, self.bits, self.lut_bits) for a in self.exponent.tolist()]
        if len(tables) != 1 or tables[0] is None:
            return None
        values, divisor = tables[0]
        return values.to(self.codes.device)[unpack_codes(self.codes, self.bits, self.columns).long()], divisor

    def _int8_weight(self) -> tuple[Tensor, Tensor] | None:
        """int8 numbers (out, in) and their scale (out,), kept; ``None`` where the table does not fit."""
        # torch's kernel reads 16 columns at a time, past the end (a crash) where these do not divide the row
        if self._int8 is None and self.group_size is None and self.columns % 16 == 0:
            found = self._integer_weight()
            if found is not None and found[1] <= 127:
                self._int8 = found[0].to(torch.int8), (self.scale[:, 0].double() / found[1]).to(torch.bfloat16)
        return self._int8

    def forward(self, input: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """x W^T + b with the decoded W."""
        x = input
        # whole numbers have no gradient: where one is wanted, the float product of the same numbers gives it
        wanted = torch.is_grad_enabled() and x.requires_grad
        if self.integer_only and self.input_quantizer is not None and self.learning is None and not wanted:
            return self._integer_forward(x)
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        fits = (
            self.learning is None
            and x.dtype == torch.bfloat16
            and x.device.type == "cpu"
            and not torch.is_grad_enabled()
        )
        if fits and not torch.compiler.is_compiling() and (expanded := self._int8_weight()) is not None:
            flat = x.reshape(-1, self.columns).contiguous()
            y = torch._weight_int8pack_mm(flat, *expanded).view(*x.shape[:-1], self.shape[0])
            return y if self.bias is None else y + self.bias.to(y.dtype)
        few = x.numel() <= FEW_INPUTS * self.columns
        by_rows = few and x.device.type == "cpu" and self.learning is None and not torch.is_grad_enabled()
        if by_rows and not torch.compiler.is_compiling() and (table := self._byte_table(x.dtype)) is not None:
            return self._product_by_rows(x, table)
        return F.linear(x, self.dequantized_weight(x.dtype), self.bias)

    def _byte_table(self, dtype: torch.dtype) -> Tensor | None:
        """Levels of all codes in each of the 256 bytes, as one number of their width; ``None`` where none fits."""
        per_byte = 8 // self.bits
        words = {2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
        word = words.get(per_byte * torch.finfo(dtype).bits // 8)
        if 8 % self.bits or len(self.exponent) > 1 or word is None:
            return None
        # the code 2^b - 1 is never stored; in a damaged file it shows as NaN
        table = F.pad(self._table()[0].to(dtype), (0, 1), value=float("nan"))
        byte = torch.arange(256)[:, None] >> (self.bits * torch.arange(per_byte))
        return table[byte & (2**self.bits - 1)].view(word)[:, 0]

    def _product_by_rows(self, x: Tensor, table: Tensor) -> Tensor:
        """The product, decoding a few rows at a time: they stay in the cache, and no dense weight is ever held.

        One look-up decodes a whole byte. Its codes belong to columns that lie a run apart (``pack_codes``), so the
        input is brought into the order of the bytes instead of the weight into that of the columns.
        """
        run = -(-self.columns // 8)
        order = torch.arange(8 * run).view(self.bits, 8 // self.bits, run).transpose(1, 2).flatten()
        inputs = F.pad(x.reshape(-1, self.columns), (0, 8 * run - self.columns))[:, order]
        scale, parts = self.scale.to(x.dtype), []
        group = None if self.group_size is None else (order.clamp(max=self.columns - 1) // self.group_size)
        rows = max(1, DECODED_AT_ONCE // (8 * run))
        for packed, m in zip(self.codes.split(rows), scale.split(rows), strict=True):
            weight = table.index_select(0, packed.flatten().int()).view(x.dtype).view(len(packed), -1)
            if group is not None:
                weight *= m.index_select(1, group)
            parts.append(F.linear(inputs, weight))
        y = torch.cat(parts, 1)
        # under autocast the product is of another dtype than the input
        y = (y if group is not None else y * scale[:, 0].to(y.dtype)).view(*x.shape[:-1], self.shape[0])
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def integer_accumulators(self, x: Float[Tensor, "*batch in"]) -> tuple[Tensor, Tensor]:
        """Exact whole numbers of the product: (…, groups, out), and the factor (…, groups, out) that scales them.

        On CPU int8 by int8 goes through ``torch._int_mm`` (int32 accumulators); all else through float64, which is
        exact below 2^53.

        Raises:
            ValueError: when the layer has no integer form (exponents not 1/k) or no input quantizer.
            OverflowError: when the sums could leave what is exact.
        """
        if self.input_quantizer is None:
            raise ValueError("integer arithmetic needs quantized inputs; set act_bits= and give calibration data")
        held = self._integer_weight()
        power = inverse_power(self.input_quantizer.exponent())
        if held is None or not float(power).is_integer():
            raise ValueError(
                f"integer arithmetic needs exponents 1/k for weights ({self.exponent.tolist()}) and inputs "
                f"({self.input_quantizer.exponent()})"
            )
        weight, divisor = held
        q, n = self.input_quantizer.codes(x.reshape(-1, self.columns))
        q = q.double()
        inputs, largest = q.sign() * q.abs() ** int(power), n ** int(power)
        size = self.group_size or self.columns
        bound = divisor * largest * size
        if bound >= 2**53:
            raise OverflowError(f"sums may reach {bound}, beyond 2^53; use fewer bits or larger exponents")
        # on CUDA that product wants more rows and columns than a decoder has
        small = divisor <= 127 and largest <= 127 and bound < 2**31 and x.device.type == "cpu"
        parts = []
        for w, v in zip(weight.split(size, 1), inputs.split(size, 1), strict=True):
            if small:
                parts.append(torch._int_mm(v.to(torch.int8), w.to(torch.int8).t().contiguous()).double())
            else:
                parts.append(v @ w.double().t())
        total = torch.stack(parts, 1)
        factor = self.scale.double().t() / divisor * (self.input_quantizer.scale.double() / largest)
        return total.view(*x.shape[:-1], *total.shape[1:]), factor

    def _integer_forward(self, x: Tensor) -> Tensor:
        total, factor = self.integer_accumulators(x)
        y = (total * factor).sum(-2).to(x.dtype)
        return y if self.bias is None else y + self.bias


class PowerConv(PowerLayer):
    """A one- or two-dimensional convolution of packed power codes; everything else as in ``nn.Conv1d``/``nn.Conv2d``.

    Example:
        >>> layer = PowerConv.from_float(nn.Conv2d(3, 8, 3, padding=1), PowerQuantConfig(exponent=0.7))
        >>> layer(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 8, 8, 8])
    """

    @classmethod
    def like(cls, module: nn.Module, bits: int, config: PowerQuantConfig) -> PowerConv:
        """An empty layer in the place of a convolution."""
        assert isinstance(module, (nn.Conv1d, nn.Conv2d))
        weight = module.weight
        exponents = weight.shape[0] if config.granularity == "channel" else 1
        made = cls(
            tuple(weight.shape),
            bits,
            config.group_size,
            exponents,
            weight.dtype,
            module.bias,  # type: ignore[arg-type]
            config.lut_bits,
            config.integer_only,
        )
        made.stride, made.padding, made.dilation = module.stride, module.padding, module.dilation
        made.groups, made.padding_mode = module.groups, module.padding_mode
        made.reversed_padding = tuple(module._reversed_padding_repeated_twice)
        return made.to(weight.device)

    @classmethod
    def check(cls, module: nn.Module, name: str, bits: int, a: Tensor, config: PowerQuantConfig) -> None:
        """Raise for what cannot be quantized, naming the layer."""
        super().check(module, name, bits, a, config)
        if config.integer_only and config.act_bits is not None:
            raise ValueError(
                f"layer {name!r}: integer_only with act_bits is for linear layers; leave convolutions out by "
                "skip_modules="
            )

    @classmethod
    def from_float(cls, conv: nn.Module, config: PowerQuantConfig, exponent: Tensor | float | None = None) -> Any:
        """Quantize a convolution to nearest, its weight alone; ``exponent`` None follows the configuration."""
        return _from_float(cls, conv, config, exponent)

    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    reversed_padding: tuple[int, ...]

    def forward(self, input: Float[Tensor, ...]) -> Float[Tensor, ...]:
        """The convolution with the decoded weight."""
        x = input
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        convolve: Any = F.conv1d if len(self.shape) == 3 else F.conv2d
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self.reversed_padding, mode=self.padding_mode)
            padding = 0
        weight = self.dequantized_weight(x.dtype)
        return convolve(x, weight, self.bias, self.stride, padding, self.dilation, self.groups)


def _from_float(cls: Any, module: nn.Module, config: PowerQuantConfig, exponent: Tensor | float | None) -> PowerLayer:
    from torchgraft.compression.nupes.model import choose_exponents

    if not is_quantizable(module):
        raise TypeError(f"{type(module).__name__} cannot be quantized; use nn.Linear, nn.Conv1d, nn.Conv2d or Conv1D")
    name = type(module).__name__
    if exponent is None:
        check_finite(float_weight(module), f"weight of layer {name!r}")
        a = choose_exponents({name: module}, config)[name]
    else:
        a = torch.as_tensor(exponent, dtype=torch.float64).reshape(-1)
        allowed = {1, len(float_weight(module))} if config.granularity == "channel" else {1}
        if len(a) not in allowed:
            raise ValueError(
                f"exponent must be {sorted(allowed)} numbers, got {len(a)}; for one a channel use granularity='channel'"
            )
    cls.check(module, name, config.weight_bits, a, config)
    made = cls.like(module, config.weight_bits, config)
    made.quantize_(module, a)
    return made


def layer_class(module: nn.Module) -> Any:
    """PowerLinear or PowerConv."""
    return PowerConv if isinstance(module, (nn.Conv1d, nn.Conv2d)) else PowerLinear

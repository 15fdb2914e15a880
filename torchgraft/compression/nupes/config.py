"""What to quantize and how: one object for ``quantize_model`` and for transformers' ``quantization_config=``."""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torchgraft.compression.nupes.quantizer import check_bits, check_exponent, inverse_power
from torchgraft.compression.nupes.search import Granularity

__all__ = ["PowerQuantConfig"]

try:
    from transformers.utils.quantization_config import QuantizationConfigMixin as _Mixin
except ImportError:  # transformers is an extra; the configuration itself does not need it
    _Mixin = object


@dataclass
class PowerQuantConfig(_Mixin):
    """Settings of power quantization.

    Args:
        weight_bits: 2 to 8.
        act_bits: of the inputs of quantized layers, 2 to 8; ``None`` leaves them in floating point.
        granularity: one exponent for the network (the paper's data-free default), each layer, or each output channel.
        group_size: columns that share a scale; ``None`` gives one scale for each output channel.
        exponent: ``"search"`` (data-free), a number, or ``"learn"`` (``method="nupes"`` alone; starts from the search).
            1 is the uniform grid.
        act_exponent: of the inputs; ``None`` shares the layer's (the first channel's, where each has its own).
        integer_only: exact integer arithmetic; exponents must be 1/k, and ``"search"`` looks among those.
        lut_bits: round the table of levels to whole numbers of so many bits (8 fits an int8 kernel); approximate
            unless the exponent is 1/k.
        method: ``"data_free"`` rounds to nearest; ``"nupes"`` learns the codes, ``"adaround"`` learns to round up or
            down, both block by block on calibration data.
        learn_codes: with ``method="nupes"`` and ``exponent="learn"``, ``False`` learns the exponent alone.
        skip_modules: names of modules to leave, whole dotted names or their last parts.
        module_bits: bits of single modules by name, for instance the first and last layer at 8.
        steps, batch_size, lr_codes, lr_exponent, seed: of the reconstruction of each block.
        p: of the norm that the search minimises.
        quantized: bits by name of what was quantized; filled in by ``quantize_model``.

    Raises:
        ValueError: for settings out of range, or that contradict each other.

    Example:
        >>> PowerQuantConfig(weight_bits=3, granularity="layer", group_size=128).weight_bits
        3
    """

    quant_method: str = field(default="power", init=False)
    weight_bits: int = 4
    act_bits: int | None = None
    granularity: Granularity = "network"
    group_size: int | None = None
    exponent: float | Literal["search", "learn"] = "search"
    act_exponent: float | None = None
    integer_only: bool = False
    lut_bits: int | None = None
    method: Literal["data_free", "nupes", "adaround"] = "data_free"
    learn_codes: bool = True
    skip_modules: Sequence[str] = ("lm_head",)
    module_bits: dict[str, int] = field(default_factory=dict)
    steps: int = 2000
    batch_size: int = 32
    lr_codes: float = 1e-2
    lr_exponent: float = 1e-3
    seed: int = 0
    p: float = 2.0
    quantized: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.skip_modules, str):
            raise TypeError(f"skip_modules must be a list of names, got the text {self.skip_modules!r}")
        self.skip_modules = tuple(self.skip_modules)
        check_bits(self.weight_bits, "weight_bits")
        for name, bits in (("act_bits", self.act_bits), ("lut_bits", self.lut_bits)):
            if bits is not None:
                check_bits(bits, name)
        for name, bits in self.module_bits.items():
            check_bits(bits, f"module_bits[{name!r}]")
        _one_of("granularity", self.granularity, ("network", "layer", "channel"))
        _one_of("method", self.method, ("data_free", "nupes", "adaround"))
        for name, bits in self.quantized.items():
            check_bits(bits, f"quantized[{name!r}]")
        if self.group_size is not None:
            _positive_whole("group_size", self.group_size, " or None")
        if isinstance(self.exponent, str):
            _one_of("exponent", self.exponent, ("search", "learn"))
            if self.exponent == "learn" and self.method != "nupes":
                raise ValueError(f"exponent='learn' needs method='nupes', got method={self.method!r}")
        else:
            self.exponent = _exponent("exponent", self.exponent)
        if not self.learn_codes and (self.method != "nupes" or self.exponent != "learn"):
            raise ValueError("learn_codes=False needs method='nupes' and exponent='learn', else nothing is learned")
        if self.act_exponent is not None:
            self.act_exponent = _exponent("act_exponent", self.act_exponent)
        if self.integer_only:
            self._check_integer_only()
        _positive_whole("steps", self.steps)
        _positive_whole("batch_size", self.batch_size)
        for name, rate in (("lr_codes", self.lr_codes), ("lr_exponent", self.lr_exponent)):
            if not (0 <= rate < math.inf):
                raise ValueError(f"{name} must be finite and at least 0, got {rate}")
        if not (0 < self.p < math.inf):
            raise ValueError(f"p must be finite and above 0, got {self.p}")

    def _check_integer_only(self) -> None:
        if self.exponent == "learn" or self.granularity == "channel":
            raise ValueError(
                "integer_only needs one exponent 1/k a layer: use exponent='search' or 1, 0.5, 1/3, …, and "
                "granularity 'network' or 'layer'"
            )
        for name, a in (("exponent", self.exponent), ("act_exponent", self.act_exponent)):
            if isinstance(a, float) and self.lut_bits is None and not float(inverse_power(a)).is_integer():
                raise ValueError(f"integer_only needs {name} 1/k (1, 0.5, 1/3, …) or lut_bits=, got {a}")

    def bits_of(self, name: str) -> int:
        """Weight bits of a module."""
        return self.module_bits.get(name, self.weight_bits)

    def skips(self, name: str) -> bool:
        """Whether a module of this dotted name is left alone."""
        return any(name == skip or name.endswith(f".{skip}") for skip in self.skip_modules)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        found = dataclasses.asdict(self)
        return {**found, "skip_modules": list(self.skip_modules)}

    def to_diff_dict(self) -> dict[str, Any]:
        """The same as ``to_dict``."""
        return self.to_dict()

    def to_json_string(self, use_diff: bool = True) -> str:
        """The settings as JSON text."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The inverse of ``to_dict``.

        Raises:
            ValueError: for another method or unknown settings.
        """
        values = dict(config_dict)
        method = values.pop("quant_method", "power")
        if method != "power":
            raise ValueError(f"quant_method must be 'power', got {method!r}")
        known = {f.name for f in dataclasses.fields(cls) if f.init}
        values |= {key: value for key, value in kwargs.items() if key in known}
        unknown = sorted(values.keys() - known)
        if unknown:
            raise ValueError(f"unknown settings {unknown}; there are {sorted(known)}")
        made = cls(**values)
        unused = {key: value for key, value in kwargs.items() if key not in known}
        return (made, unused) if return_unused_kwargs else made


def _positive_whole(name: str, value: object, otherwise: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number above 0{otherwise}, got {value!r}")


def _exponent(name: str, value: Any) -> float:
    # float32 numbers of numpy are no Python floats
    check_exponent(value, name)
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be one number, got {type(value).__name__}; exponents by channel are searched")
    return float(value)


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be {', '.join(map(repr, allowed))}, got {value!r}")

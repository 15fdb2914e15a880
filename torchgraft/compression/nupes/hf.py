"""transformers' quantizer hooks: ``from_pretrained(…, quantization_config=…)`` and ``save_pretrained``."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from torchgraft.compression.nupes.config import PowerQuantConfig

__all__ = ["PowerHfQuantizer"]


class PowerHfQuantizer(HfQuantizer):
    """Loads a float checkpoint and quantizes it, or loads packed codes as they were saved.

    Registered under the method ``"power"`` when ``torchgraft.compression.nupes`` is imported. Data-free settings
    alone: what learns or calibrates needs ``quantize_model(model, config, calibration)`` on the loaded float model.
    """

    requires_calibration = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse settings that need data which ``from_pretrained`` does not have."""
        config = self.quantization_config
        if not self.pre_quantized and (config.method != "data_free" or config.act_bits is not None):
            raise ValueError(
                f"from_pretrained has no calibration data for method={config.method!r}, act_bits={config.act_bits}: "
                "load the float model and call quantize_model(model, config, calibration)"
            )

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.pre_quantized:
            from torchgraft.compression.nupes.model import prepare_model

            prepare_model(model, self.quantization_config)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not self.pre_quantized:
            from torchgraft.compression.nupes.model import quantize_model

            quantize_model(model, self.quantization_config)
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        from torchgraft.compression.nupes.model import dequantize_model

        return dequantize_model(model, dtype)

    def is_serializable(self) -> bool:
        """Codes, scales and exponents are buffers of the model."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients reach inputs and biases (adapters), not codes."""
        return False

    @property
    def is_compileable(self) -> bool:
        """The forward pass compiles."""
        return True


def attach(model: nn.Module, config: PowerQuantConfig) -> None:
    """Make a quantized transformers model one that transformers knows to be quantized."""
    quantizer = PowerHfQuantizer(config, pre_quantized=True)
    model.hf_quantizer = quantizer
    model.is_quantized = True  # type: ignore[assignment]
    model.quantization_method = config.quant_method  # type: ignore[assignment]
    model.config.quantization_config = config  # type: ignore[union-attr]


def detach(model: nn.Module) -> None:
    """Make it a float model again for transformers, so that it is saved as one."""
    PowerHfQuantizer.remove_quantization_config(model, model)


def register() -> None:
    """Make the method known to transformers; doing it twice changes nothing."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING["power"] = PowerQuantConfig
    auto.AUTO_QUANTIZER_MAPPING["power"] = PowerHfQuantizer

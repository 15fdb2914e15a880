"""NUPES and PowerQuant: weights and activations on a power grid, searched without data or learned on a little.

Vocabulary: Yvinec, Dapogny, Bailly, "NUPES: Non-Uniform Post-Training Quantization via Power Exponent Search"
(arXiv 2308.05600), and its data-free predecessor PowerQuant (arXiv 2301.09858). No official code is known for either.
"""

from importlib.util import find_spec

from torchgraft.compression.nupes.batchnorm import batchnorm_ranges, fold_batchnorm
from torchgraft.compression.nupes.codebook import codebook_round, normal_float_levels
from torchgraft.compression.nupes.config import PowerQuantConfig
from torchgraft.compression.nupes.layers import PowerActivation, PowerConv, PowerLayer, PowerLinear
from torchgraft.compression.nupes.model import (
    LayerSummary,
    dequantize_model,
    prepare_model,
    quantize_model,
    summary,
)
from torchgraft.compression.nupes.packing import pack_codes, unpack_codes
from torchgraft.compression.nupes.quantizer import (
    PowerDecode,
    PowerFakeQuantize,
    decode_table,
    integer_table,
    lut_error,
    power_dequantize,
    power_quantize,
    soft_round,
)
from torchgraft.compression.nupes.reconstruct import Reconstruction, reconstruct_block
from torchgraft.compression.nupes.search import quantization_error, search_exponent

__all__ = [
    "LayerSummary",
    "PowerActivation",
    "PowerConv",
    "PowerDecode",
    "PowerFakeQuantize",
    "PowerLayer",
    "PowerLinear",
    "PowerQuantConfig",
    "Reconstruction",
    "batchnorm_ranges",
    "codebook_round",
    "decode_table",
    "dequantize_model",
    "fold_batchnorm",
    "integer_table",
    "lut_error",
    "normal_float_levels",
    "pack_codes",
    "power_dequantize",
    "power_quantize",
    "prepare_model",
    "quantization_error",
    "quantize_model",
    "reconstruct_block",
    "search_exponent",
    "soft_round",
    "summary",
    "unpack_codes",
]

if find_spec("transformers"):
    # so that from_pretrained knows saved codes wherever this package was imported
    from torchgraft.compression.nupes.hf import PowerHfQuantizer, register

    register()
    __all__ += ["PowerHfQuantizer"]

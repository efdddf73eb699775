# SPDX-License-Identifier: Apache-2.0
"""Floor 2: the mathematics of the quantizer, on torch alone."""

from .activations import quantize_activations
from .config import GROUP_MULTIPLE, WEIGHT_DTYPES, QuantizerConfig, check_weight, effective_group
from .fused import fused_group_size
from .packing import pack, packed_size, unpack
from .quantizer import dequantize, quantize, quantize_dequantize, scales_are_finite
from .spaces import SPACES, Space

__all__ = [
    "GROUP_MULTIPLE",
    "SPACES",
    "WEIGHT_DTYPES",
    "QuantizerConfig",
    "Space",
    "check_weight",
    "dequantize",
    "effective_group",
    "fused_group_size",
    "pack",
    "packed_size",
    "quantize",
    "quantize_activations",
    "quantize_dequantize",
    "scales_are_finite",
    "unpack",
]

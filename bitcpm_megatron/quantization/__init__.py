# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F401  # these names are for the other floors
"""Floor 2: the mathematics of the quantizer, on torch alone; its configuration, recipe and record need no torch."""

import importlib.util

from .config import GROUP_MULTIPLE, QuantizerConfig, effective_group
from .spaces import SPACES, STATISTICS, Space

# A login node, where jobs are only checked and printed, may not have torch.
if importlib.util.find_spec("torch") is not None:
    from .activations import LEVELS, LONGEST_SUM, codes_of, integer_activations, quantize_activations, scale_sums
    from .fused import fused_group_size, fused_space
    from .packing import pack, packed_size, unpack
    from .quantizer import codes_under, dequantize, quantize, quantize_dequantize, scales_are_finite, scales_of
    from .weights import WEIGHT_DTYPES, check_weight

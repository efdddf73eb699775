# SPDX-License-Identifier: Apache-2.0
"""The integer product with both scales on an NPU: torch_npu.npu_quant_matmul, called by its documented signature.

This code has not run on an NPU: the tests check every call against the documentation (Atlas A2: x1 and x2 int8, x2
contiguous or the transpose of a contiguous one, scale float32 or bfloat16 ``[n]`` or ``[1]``, pertoken_scale float32
``[m]``, output bfloat16, or float16 with a float32 scale; nothing empty, the last dimensions up to 65,535; m is the
number of tokens, n the number of output columns). The order in which the device multiplies with the two scales is not
documented, so that its results may differ from the reference's in the last bit; the integer sums in them are the same.
"""

import functools
import importlib

import torch

from ...quantization import LEVELS, codes_of
from . import reference
from .kernels import Int8Kernels, QuantizedTokens

_LONGEST = 65535


@functools.cache
def kernels() -> Int8Kernels:
    """Returns the kernels around the op of torch_npu."""
    same = reference.kernels
    return Int8Kernels("npu_quant_matmul", _refuses, same.values, same.quantize, _product, codes_of)


def _refuses(device_type: str, rows: int, columns: int) -> str | None:
    if not hasattr(importlib.import_module("torch_npu"), "npu_quant_matmul"):
        return "this torch_npu has no npu_quant_matmul: use --ternary-gemm bf16"
    if max(rows, columns) > _LONGEST:
        return f"npu_quant_matmul takes widths up to {_LONGEST}, not {rows} x {columns}: use --ternary-gemm bf16"
    return None


def _product(tokens: QuantizedTokens, weight: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    shape = (*tokens.shape[:-1], weight.shape[1])
    if not tokens.codes.shape[0]:
        return torch.empty(shape, dtype=tokens.dtype, device=tokens.codes.device)
    columns = torch.ones(1, device=tokens.codes.device) if scales is None else scales.float()
    multiply = importlib.import_module("torch_npu").npu_quant_matmul
    return multiply(
        tokens.codes, weight, columns, pertoken_scale=tokens.scales / LEVELS, output_dtype=tokens.dtype
    ).reshape(shape)

# SPDX-License-Identifier: Apache-2.0
"""The reference kernels around torch._int_mm, for every device that has it."""

import functools

import torch
from torch.nn.functional import pad

from ...quantization import codes_of, integer_activations, quantize_activations, scale_sums
from .kernels import Int8Kernels, QuantizedTokens

# cuBLASLt takes more than 16 rows, and widths in multiples of 8.
_CUDA_ROWS, _CUDA_WIDTH = 32, 8


@functools.cache
def _unavailable(device_type: str) -> str | None:
    try:
        one = torch.ones(_CUDA_ROWS, _CUDA_WIDTH, dtype=torch.int8, device=device_type)
        torch._int_mm(one, one[:_CUDA_WIDTH].t())
    # A torch that was built without CUDA raises an AssertionError.
    except (AssertionError, AttributeError, RuntimeError) as error:
        return f"this torch has no int8 GEMM on {device_type} ({str(error).splitlines()[0]}): use --ternary-gemm bf16"
    return None


def refuses(device_type: str, rows: int, columns: int) -> str | None:
    """Returns the reason why torch._int_mm cannot take weights of these sizes, or None."""
    if reason := _unavailable(device_type):
        return reason
    if device_type == "cuda" and (rows % _CUDA_WIDTH or columns % _CUDA_WIDTH):
        return f"CUDA's int8 GEMM takes multiples of {_CUDA_WIDTH}, not {rows} x {columns}: use --ternary-gemm bf16"
    return None


def integer_product(codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Returns the exact product, int32 ``[tokens, n]``, of int8 ``[tokens, k]`` and int8 ``[k, n]``."""
    tokens = codes.shape[0]
    if not tokens:
        return codes.new_zeros((0, weight.shape[1]), dtype=torch.int32)
    if codes.shape[1] == 1:
        # oneDNN mistakes a transposed matrix of one row for one of one column, and reads beyond its end.
        return codes.int() * weight.int()
    if not codes.is_cuda:
        return torch._int_mm(codes, weight)
    # A number of rows that is not a multiple of _CUDA_ROWS has given wrong sums (pytorch/pytorch#107671), and not every
    # GPU multiplies by a second factor that is not a transpose (#169961).
    rows = pad(codes, (0, 0, 0, -tokens % _CUDA_ROWS))
    transposed = weight if weight.t().is_contiguous() else weight.t().contiguous().t()
    return torch._int_mm(rows, transposed)[:tokens]


def _quantize(x: torch.Tensor, eps: float, factors: torch.Tensor | None, values: bool) -> QuantizedTokens:
    codes, scales = integer_activations(x.reshape(-1, x.shape[-1]), eps, factors)
    if not values:
        return QuantizedTokens(x.shape, x.dtype, codes, scales)
    multiplied = x if factors is None else x.float() * factors.float()
    return QuantizedTokens(x.shape, x.dtype, codes, scales, quantize_activations(multiplied, 1, eps).to(x.dtype))


def _product(tokens: QuantizedTokens, weight: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    y = scale_sums(integer_product(tokens.codes, weight), tokens.scales, scales, tokens.dtype)
    return y.reshape(*tokens.shape[:-1], weight.shape[1])


kernels = Int8Kernels("torch", refuses, quantize_activations, _quantize, _product, codes_of)

# SPDX-License-Identifier: Apache-2.0
"""C kernels around torch._int_mm (oneDNN) for bf16; other dtypes take the reference."""

import ctypes
import functools

import torch

from ...quantization import codes_of
from ..cpu.library import load, threads_for
from . import reference
from .kernels import Int8Kernels, QuantizedTokens

_SUMS_AT_ONCE, _FEWEST_ROWS = 1 << 21, 256


@functools.cache
def kernels() -> Int8Kernels:
    """Returns the C kernels; the reference's if they cannot be compiled."""
    library, _ = load()
    if library is None:
        return reference.kernels
    own = (
        functools.partial(_values, library),
        functools.partial(_quantize, library),
        functools.partial(_product, library),
        functools.partial(_codes, library),
    )
    return Int8Kernels("cpu", reference.refuses, *own)


def _values(library: ctypes.CDLL, x: torch.Tensor, groups: int, eps: float) -> torch.Tensor:
    if x.dtype != torch.bfloat16:
        return reference.kernels.values(x, groups, eps)
    x = x.detach().contiguous()
    width = x.shape[-1] // groups
    tokens = x.numel() // width if width else 0
    fake = torch.empty_like(x)
    library.bitcpm_quantize_rows(
        x.data_ptr(), None, fake.data_ptr(), None, None, tokens, width, eps, threads_for(tokens, x.numel())
    )
    return fake


def _quantize(
    library: ctypes.CDLL, x: torch.Tensor, eps: float, factors: torch.Tensor | None, values: bool
) -> QuantizedTokens:
    if x.dtype != torch.bfloat16:
        return reference.kernels.quantize(x, eps, factors, values)
    x = x.detach().contiguous()
    made = QuantizedTokens.empty(x, values)
    columns = None if factors is None else factors.float().contiguous()
    library.bitcpm_quantize_rows(
        x.data_ptr(),
        _address(columns),
        _address(made.values),
        made.codes.data_ptr(),
        made.scales.data_ptr(),
        *made.codes.shape,
        eps,
        threads_for(made.codes.shape[0], x.numel()),
    )
    return made


def _product(
    library: ctypes.CDLL, tokens: QuantizedTokens, weight: torch.Tensor, scales: torch.Tensor | None
) -> torch.Tensor:
    if tokens.dtype != torch.bfloat16:
        return reference.kernels.product(tokens, weight, scales)
    rows, width = tokens.codes.shape[0], weight.shape[1]
    y = torch.empty(rows, width, dtype=torch.bfloat16, device=weight.device)
    columns = None if scales is None else scales.to(torch.bfloat16).contiguous()
    # The sums of one block stay in the cache until they are scaled; fewer rows than the minimum would cost the GEMM
    # more than that gains.
    at_once = max(_FEWEST_ROWS, _SUMS_AT_ONCE // max(1, width))
    for first in range(0, rows, at_once):
        sums = reference.integer_product(tokens.codes[first : first + at_once], weight)
        library.bitcpm_scale_sums(
            sums.data_ptr(),
            _address(columns),
            tokens.scales[first:].data_ptr(),
            y[first:].data_ptr(),
            sums.shape[0],
            width,
            threads_for(sums.shape[0], sums.numel()),
        )
    return y.reshape(*tokens.shape[:-1], width)


def _codes(library: ctypes.CDLL, quantized: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if quantized.dtype != torch.bfloat16:
        return codes_of(quantized)
    weight = quantized.contiguous()
    rows, width = weight.shape
    codes = torch.empty(rows, width, dtype=torch.int8, device=weight.device)
    scales = torch.empty(rows, dtype=torch.bfloat16, device=weight.device)
    addresses = (weight.data_ptr(), codes.data_ptr(), scales.data_ptr())
    library.bitcpm_codes(*addresses, rows, width, threads_for(rows, weight.numel()))
    return codes, scales


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()

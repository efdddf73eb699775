# SPDX-License-Identifier: Apache-2.0
"""Triton kernels around torch._int_mm, which is cuBLASLt on a GPU."""

import functools
import importlib.util

import torch

from ...quantization import codes_of
from . import reference
from .kernels import Int8Kernels, QuantizedTokens

_BLOCK = 1024
# No fused multiply-add: a product must be rounded before the sum that rounds it to an integer.
_EXACT = {"enable_fp_fusion": False}


@functools.cache
def kernels() -> Int8Kernels:
    """Returns the Triton kernels; the reference's if Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return reference.kernels
    return Int8Kernels("triton", reference.refuses, _values, quantize, product, codes_of)


def _values(x: torch.Tensor, groups: int, eps: float) -> torch.Tensor:
    if x.dtype == torch.float32:
        return reference.kernels.values(x, groups, eps)
    made = quantize(x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups), eps, None, True).values
    assert made is not None  # it was asked for
    return made.reshape(x.shape)


def quantize(x: torch.Tensor, eps: float, factors: torch.Tensor | None, values: bool) -> QuantizedTokens:
    """Quantizes tokens: the ``quantize`` of :class:`~.kernels.Int8Kernels`."""
    from ..triton.int8 import quantize_tokens

    x = x.detach().contiguous()
    made = QuantizedTokens.empty(x, values)
    tokens, width = made.codes.shape
    if tokens:
        quantize_tokens[(tokens,)](
            _bits(x),
            made.codes if factors is None else factors.float().contiguous(),
            made.codes if made.values is None else _bits(made.values),
            made.codes,
            made.scales,
            width,
            eps,
            FACTORS=factors is not None,
            FAKE=values,
            BF16=x.dtype == torch.bfloat16,
            BLOCK=_BLOCK,
            **_EXACT,
        )
    return made


def product(tokens: QuantizedTokens, weight: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """Multiplies tokens with codes: the ``product`` of :class:`~.kernels.Int8Kernels`."""
    from ..triton.int8 import scale_sums

    sums = reference.integer_product(tokens.codes, weight).contiguous()
    y = torch.empty(sums.shape, dtype=tokens.dtype, device=sums.device)
    if y.numel():
        scale_sums[(sums.shape[0],)](
            sums,
            tokens.scales if scales is None else scales.float().contiguous(),
            tokens.scales,
            _bits(y),
            sums.shape[1],
            COLUMNS=scales is not None,
            BF16=y.dtype == torch.bfloat16,
            BLOCK=_BLOCK,
            **_EXACT,
        )
    return y.reshape(*tokens.shape[:-1], weight.shape[1])


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Returns bf16 as int16 bit patterns, as :mod:`..triton.arithmetic` takes it; other dtypes unchanged."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor

# SPDX-License-Identifier: Apache-2.0
"""Activations and weights for int8 GEMMs, the expected results, and the checks that kernels must pass."""

import torch

from bitcpm_megatron import QuantizerConfig, dequantize, quantize
from bitcpm_megatron.ops.int8 import Int8Kernels
from bitcpm_megatron.quantization import integer_activations, quantize_activations

DEFAULT = QuantizerConfig()


def activations(tokens: int, features: int, dtype: torch.dtype, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    """Returns activations [tokens, features] of very different magnitude: one token of zeros, one saturated, and some
    signed zeros."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, features, generator=g) * 10 ** torch.empty(tokens, 1).uniform_(-spread, spread, generator=g)
    x[:, 3::17] *= 0.0
    x[-1] = 0.0
    if tokens > 2:
        x[1] = x[1].sign() * 3.0
        # At this magnitude some quotients are closest to the edge between two codes.
        x[0] = x[0] / x[0].abs().max().clamp(min=1e-30) * 1.984375
    return x.to(dtype)


def ternary_weight(rows: int, columns: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    """Returns a quantized weight [rows, columns] with one scale per row, and with one row of zeros."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02
    weight[rows // 2] = 0.0
    return dequantize(*quantize(weight.to(dtype), DEFAULT), DEFAULT, dtype)


def by_definition(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Returns the product of quantized activations and a ternary weight: a GEMM of integers in fp32, scaled and rounded
    once."""
    s = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-5)
    q = (x.float() / s * 127).round()
    return (q @ weight.float().sign().t() * weight.float().abs().amax(-1) * (s / 127)).to(x.dtype)


def check_quantize(kernels: Int8Kernels, x: torch.Tensor) -> None:
    """Checks a kernel's codes, scales and values of activations, and of gradients times row scales, bit for bit."""
    factors = torch.linspace(0.01, 2.0, x.shape[-1]).to(x)
    for eps, by in ((1e-5, None), (1.2e-38, factors)):
        codes, scales = integer_activations(x, eps, by)
        expected = (codes.float() * scales.unsqueeze(-1) / 127).to(x.dtype)
        for values in (True, False):
            found = kernels.quantize(x, eps, by, values)
            assert torch.equal(found.codes, codes) and torch.equal(found.scales, scales)
            assert (found.shape, found.dtype, found.values is not None) == (x.shape, x.dtype, values)
            if values:
                assert torch.equal(found.values, expected) and not found.values[expected == 0].signbit().any()
        assert by is not None or torch.equal(expected, quantize_activations(x, 1, eps))


def check_products(kernels: Int8Kernels, dtype: torch.dtype, device: str = "cpu") -> None:
    """Checks a kernel's codes of a weight and its products with them, forward and backward, bit for bit."""
    weight = ternary_weight(40, 96, dtype).to(device)
    codes, scales = kernels.codes(weight)
    assert torch.equal(codes, weight.float().sign().char()) and torch.equal(scales, weight.abs().amax(-1))
    for tokens in (1, 2, 7):
        x = activations(tokens, 96, dtype, spread=1.0).to(device)
        y = kernels.product(kernels.quantize(x, 1e-5, None, False), codes.t(), scales)
        assert torch.equal(y, by_definition(x, weight)) and not y[y == 0].signbit().any()
        back = kernels.product(kernels.quantize(y, 1e-30, scales, False), codes, None)
        g = y.float() * scales.float()
        s = g.abs().amax(-1, keepdim=True).clamp(min=1e-30)
        assert torch.equal(back, ((g / s * 127).round() @ codes.float() * (s / 127)).to(dtype))

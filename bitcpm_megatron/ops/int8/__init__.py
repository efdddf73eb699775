# SPDX-License-Identifier: Apache-2.0
"""Int8 GEMMs of a ternary layer: activations in int8, one scale per token, times codes, one scale per row.

The product of the integers is a library's: torch._int_mm (oneDNN on a CPU, cuBLASLt on CUDA), or npu_quant_matmul on an
NPU. What stands around it, the quantization of the activations in one pass and the scaling of the sums in one, is a
kernel where there is one, and the reference elsewhere. All of them give the bits of
:mod:`bitcpm_megatron.quantization.activations`.

=========  ===============================================================
``torch``  the reference around torch._int_mm, on every device that has it
``cpu``    C kernels around it
``cuda``   Triton kernels around it
``npu``    npu_quant_matmul
=========  ===============================================================
"""

import torch

from ...quantization import LONGEST_SUM
from ...quantization.activations import EPS
from ..registry import active_backend
from . import cpu, cuda, npu, reference
from .kernels import Int8Kernels, QuantizedTokens

_KERNELS = {"cpu": cpu.kernels, "cuda": cuda.kernels, "npu": npu.kernels}
# Of an input gradient, which may be of any size.
_TINY = torch.finfo(torch.float32).smallest_normal


def int8_kernels(device_type: str) -> Int8Kernels:
    """The kernels of a device: the reference's where ``--ternary-backend torch`` asks for it."""
    if active_backend(device_type).backend.name == "torch" and device_type != "npu":
        return reference.kernels
    return _KERNELS.get(device_type, lambda: reference.kernels)()


def check_int8(weight: torch.Tensor) -> None:
    """Checks that a weight ``[out, in]`` can be a factor of an int8 GEMM on its device.

    Raises:
        ValueError: it cannot, with the reason.
    """
    (rows, columns), device = weight.shape, weight.device.type
    if weight.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"an int8 GEMM stands against one of 16-bit numbers, not of {weight.dtype}: use --bf16")
    if max(rows, columns) > LONGEST_SUM:
        raise ValueError(
            f"fp32 holds sums of {LONGEST_SUM} products exactly, not of {max(rows, columns)}: use --ternary-gemm bf16"
        )
    if reason := int8_kernels(device).refuses(device, rows, columns):
        raise ValueError(reason)


def quantize_tokens(x: torch.Tensor) -> QuantizedTokens:
    """The int8 codes of every token, its scale, and the values that they stand for, in one pass.

    Args:
        x: ``[..., features]`` in bf16 or fp16.
    """
    return int8_kernels(x.device.type).quantize(x, EPS, None, True)


def int8_linear(x: torch.Tensor | QuantizedTokens, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """y = x W^T of quantized activations and a ternary weight, as an int8 GEMM.

    Args:
        x: ``[..., in]`` in bf16 or fp16: quantized activations, whose codes are found exactly; or the codes themselves.
        codes: int8 ``[out, in]`` of the weight.
        scales: ``[out]`` of its rows.

    Returns:
        ``[..., out]`` in the dtype of the activations.
    """
    kernels = int8_kernels(codes.device.type)
    tokens = x if isinstance(x, QuantizedTokens) else kernels.quantize(x, EPS, None, False)
    return kernels.product(tokens, codes.t(), scales)


def int8_input_gradient(gradient: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """dy W of a ternary weight as an int8 GEMM: dy times the scales of the weight's rows, quantized per token.

    Args:
        gradient: ``[..., out]`` in bf16 or fp16.
        codes: int8 ``[out, in]`` of the weight.
        scales: ``[out]`` of its rows.

    Returns:
        ``[..., in]`` in the dtype of the gradient.
    """
    kernels = int8_kernels(codes.device.type)
    return kernels.product(kernels.quantize(gradient, _TINY, scales, False), codes, None)


def codes_of(quantized: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes and scales of a quantized weight; see :func:`bitcpm_megatron.quantization.codes_of`."""
    return int8_kernels(quantized.device.type).codes(quantized.detach())

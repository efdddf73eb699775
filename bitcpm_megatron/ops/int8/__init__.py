# SPDX-License-Identifier: Apache-2.0
"""Int8 GEMMs of a ternary layer: int8 activations with one scale per token, times codes with one scale per row.

The product of the integers is a library's: torch._int_mm (oneDNN on a CPU, cuBLASLt on CUDA), or npu_quant_matmul on an
NPU. Two passes surround it: the quantization of the activations, and the scaling of the sums. Each of them is a kernel
if the device has one, and the reference elsewhere. All of them give the bits of
:mod:`bitcpm_megatron.quantization.activations`.

=========  ===============================================================
``torch``  the reference around torch._int_mm, on every device that has it
``cpu``    C kernels around it
``cuda``   Triton kernels around it
``npu``    npu_quant_matmul
=========  ===============================================================

In shapes, ``in`` and ``out`` are the features of the layer, and ``...`` the dimensions of the tokens.
"""

import torch

from ...quantization import LONGEST_SUM
from ...quantization.activations import EPS
from ..registry import active_backend
from . import cpu, cuda, npu, reference
from .kernels import Int8Kernels, QuantizedTokens

_KERNELS = {"cpu": cpu.kernels, "cuda": cuda.kernels, "npu": npu.kernels}
# The lower bound of a scale of an input gradient, which may be of any magnitude.
_TINY = torch.finfo(torch.float32).smallest_normal


def int8_kernels(device_type: str) -> Int8Kernels:
    """Returns the int8 kernels of a device type; the reference's if the backend is ``torch``, except on an NPU."""
    if active_backend(device_type).backend.name == "torch" and device_type != "npu":
        return reference.kernels
    return _KERNELS.get(device_type, lambda: reference.kernels)()


def check_int8(weight: torch.Tensor) -> None:
    """Checks that a weight ``[out, in]`` can be a factor of an int8 GEMM on its device.

    Raises:
        ValueError: if it cannot; the message has the reason.
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
    """Returns the int8 codes of every token, its scale, and the values that they represent, computed in one pass.

    Args:
        x: the activations, ``[..., in]`` in bf16 or fp16.
    """
    return int8_kernels(x.device.type).quantize(x, EPS, None, True)


def int8_linear(x: torch.Tensor | QuantizedTokens, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Computes y = x W^T of quantized activations and a ternary weight as an int8 GEMM.

    Args:
        x: the activations, ``[..., in]`` in bf16 or fp16, already quantized, so that their codes are found exactly; or
            the codes themselves.
        codes: the codes of the weight, int8 ``[out, in]``.
        scales: the scales of its rows, ``[out]``.

    Returns:
        The output y, ``[..., out]`` in the dtype of the activations.
    """
    kernels = int8_kernels(codes.device.type)
    tokens = x if isinstance(x, QuantizedTokens) else kernels.quantize(x, EPS, None, False)
    return kernels.product(tokens, codes.t(), scales)


def int8_input_gradient(gradient: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Computes the input gradient dy W of a ternary weight as an int8 GEMM.

    The gradient dy times the scales of the weight's rows is quantized per token.

    Args:
        gradient: the output gradient dy, ``[..., out]`` in bf16 or fp16.
        codes: the codes of the weight, int8 ``[out, in]``.
        scales: the scales of its rows, ``[out]``.

    Returns:
        The input gradient, ``[..., in]`` in the dtype of the output gradient.
    """
    kernels = int8_kernels(codes.device.type)
    return kernels.product(kernels.quantize(gradient, _TINY, scales, False), codes, None)


def codes_of(quantized: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the codes and scales of a quantized weight, by the kernel of its device.

    The result is that of :func:`bitcpm_megatron.quantization.codes_of`.
    """
    return int8_kernels(quantized.device.type).codes(quantized.detach())

# SPDX-License-Identifier: Apache-2.0
"""The interface between int8 GEMMs and the kernels of a device."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class QuantizedTokens:
    """Activations, or gradients, in int8.

    Attributes:
        shape: the shape ``[..., features]`` of the tensor that was quantized.
        dtype: its dtype, which is also the dtype of results computed with it.
        codes: the codes, int8 ``[tokens, features]``.
        scales: the scales, fp32 ``[tokens]``; the code 127 represents one scale.
        values: the values that codes and scales represent, ``[..., features]``; None if they were not requested. If
            the tensor was multiplied by factors first, the values include them.
    """

    shape: torch.Size
    dtype: torch.dtype
    codes: torch.Tensor
    scales: torch.Tensor
    values: torch.Tensor | None = None

    @classmethod
    def empty(cls, x: torch.Tensor, values: bool) -> "QuantizedTokens":
        """Allocates tensors for a kernel to write the tokens of ``x`` to, and their values if ``values`` is true."""
        width = x.shape[-1]
        tokens = x.numel() // width if width else 0
        codes = torch.empty(tokens, width, dtype=torch.int8, device=x.device)
        scales = torch.empty(tokens, dtype=torch.float32, device=x.device)
        return cls(x.shape, x.dtype, codes, scales, torch.empty_like(x) if values else None)


@dataclass(frozen=True)
class Int8Kernels:
    """The kernels of a device.

    Attributes:
        name: the name of the kernels, for reports.
        refuses: ``(device type, out, in)`` -> why weights of this shape cannot be used here, or None.
        values: ``(x, groups, eps)`` -> the result of :func:`bitcpm_megatron.quantization.quantize_activations`.
        quantize: ``(x, eps, factors or None, whether values are wanted)`` -> the tokens of ``x``, first multiplied by
            the ``[features]`` factors.
        product: ``(tokens, codes [features, n], scales [n] or None)`` -> the values that the integer product
            represents, as from :func:`bitcpm_megatron.quantization.scale_sums`; n is the number of columns of the
            result.
        codes: ``(quantized weight)`` -> the result of :func:`bitcpm_megatron.quantization.codes_of`.
    """

    name: str
    refuses: Callable[[str, int, int], str | None]
    values: Callable[[torch.Tensor, int, float], torch.Tensor]
    quantize: Callable[[torch.Tensor, float, torch.Tensor | None, bool], QuantizedTokens]
    product: Callable[[QuantizedTokens, torch.Tensor, torch.Tensor | None], torch.Tensor]
    codes: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

# SPDX-License-Identifier: Apache-2.0
"""What the kernels of a device offer to int8 GEMMs."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class QuantizedTokens:
    """Activations, or gradients, in int8.

    Attributes:
        shape: ``[..., features]`` of what was quantized.
        dtype: its dtype, and that of what is computed with it.
        codes: int8 ``[tokens, features]``.
        scales: fp32 ``[tokens]``; 127 codes make one.
        values: what codes and scales stand for, ``[..., features]``; None where it was not asked for.
    """

    shape: torch.Size
    dtype: torch.dtype
    codes: torch.Tensor
    scales: torch.Tensor
    values: torch.Tensor | None = None

    @classmethod
    def empty(cls, x: torch.Tensor, values: bool) -> "QuantizedTokens":
        """Room for a kernel to write the tokens of ``x`` to, and their values where these are asked for."""
        width = x.shape[-1]
        tokens = x.numel() // width if width else 0
        codes = torch.empty(tokens, width, dtype=torch.int8, device=x.device)
        scales = torch.empty(tokens, dtype=torch.float32, device=x.device)
        return cls(x.shape, x.dtype, codes, scales, torch.empty_like(x) if values else None)


@dataclass(frozen=True)
class Int8Kernels:
    """The kernels of a device.

    Attributes:
        name: for reports.
        refuses: ``(device type, out, in)`` -> why weights of this shape cannot be used here, or None.
        values: ``(x, groups, eps)`` -> see :func:`bitcpm_megatron.quantization.quantize_activations`.
        quantize: ``(x, eps, factors or None, with the values)`` -> the tokens of ``x``, multiplied by ``[features]``
            factors first.
        product: ``(tokens, codes [features, n], scales [n] or None)`` -> what the integer product stands for, as
            :func:`bitcpm_megatron.quantization.scale_sums`.
        codes: see :func:`bitcpm_megatron.quantization.codes_of`.
    """

    name: str
    refuses: Callable[[str, int, int], str | None]
    values: Callable[[torch.Tensor, int, float], torch.Tensor]
    quantize: Callable[[torch.Tensor, float, torch.Tensor | None, bool], QuantizedTokens]
    product: Callable[[QuantizedTokens, torch.Tensor, torch.Tensor | None], torch.Tensor]
    codes: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

# SPDX-License-Identifier: Apache-2.0
"""What the kernels of a device do, and the same in torch."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...quantization import QuantizerConfig, dequantize, unpack

logger = logging.getLogger(__name__)
MOST_TOKENS = 32
"""Of a product with weights that stay packed; with more, unpacking rows is no longer what costs."""


@dataclass(frozen=True)
class PackedKernels:
    """How a device computes with packed weights.

    Attributes:
        name: of the implementation.
        decode: ``(packed, scales, columns, group_size, dtype)``: uint8 ``[rows, ceil(columns / 128) * 32]`` and bf16
            ``[rows, groups]`` to the weight ``[rows, columns]``, as
            :func:`bitcpm_megatron.quantization.dequantize` makes it.
        multiply: ``(x, packed, scales)``: x ``[tokens, columns]`` in bf16 or fp32, contiguous, of at most
            :data:`MOST_TOKENS` tokens, to ``x W^T [tokens, rows]`` in the dtype of x, summed in fp32. None where a
            device unpacks for every number of tokens.
    """

    name: str
    decode: Callable[[torch.Tensor, torch.Tensor, int, int, torch.dtype], torch.Tensor]
    multiply: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None


def fallback(device_type: str, why: str, cure: str) -> PackedKernels:
    """Torch's own operations, with a line for the log that says why."""
    logger.warning(
        "packed weights on %s are unpacked by torch, many times slower than by a kernel: %s; %s", device_type, why, cure
    )
    return PackedKernels("torch", decode)


def decode(
    packed: torch.Tensor, scales: torch.Tensor, columns: int, group_size: int, dtype: torch.dtype
) -> torch.Tensor:
    """See :class:`PackedKernels`."""
    return dequantize(unpack(packed, columns), scales, QuantizerConfig(group_size=group_size), dtype)

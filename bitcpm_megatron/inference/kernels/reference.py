# SPDX-License-Identifier: Apache-2.0
"""The interface of a device's kernels for packed weights, and an implementation in torch."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...quantization import QuantizerConfig, dequantize, unpack

logger = logging.getLogger(__name__)
MOST_TOKENS = 32
"""The largest number of tokens multiplied with weights that stay packed; with more, unpacking rows costs little."""


@dataclass(frozen=True)
class PackedKernels:
    """The kernels with which a device computes with packed weights.

    A weight W is ``[rows, columns]``, with ``groups`` scales per row.

    Attributes:
        name: the name of the implementation.
        decode: a function ``(packed, scales, columns, group_size, dtype)`` from codes, uint8 ``[rows, ceil(columns /
            128) * 32]``, and scales, bf16 ``[rows, groups]``, to the weight, as
            :func:`bitcpm_megatron.quantization.dequantize` makes it.
        multiply: a function ``(x, packed, scales)`` from contiguous activations ``[tokens, columns]`` in bf16 or fp32,
            of at most :data:`MOST_TOKENS` tokens, to ``x W^T``, ``[tokens, rows]`` in the dtype of x, summed in fp32.
            None if the device unpacks rows for every number of tokens.
    """

    name: str
    decode: Callable[[torch.Tensor, torch.Tensor, int, int, torch.dtype], torch.Tensor]
    multiply: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None


def fallback(device_type: str, why: str, cure: str) -> PackedKernels:
    """Returns torch's operations as kernels, after a line in the log that says why."""
    logger.warning(
        "packed weights on %s are unpacked by torch, many times slower than by a kernel: %s; %s", device_type, why, cure
    )
    return PackedKernels("torch", decode)


def decode(
    packed: torch.Tensor, scales: torch.Tensor, columns: int, group_size: int, dtype: torch.dtype
) -> torch.Tensor:
    """Unpacks a weight ``[rows, columns]`` in torch, as ``decode`` of :class:`PackedKernels` does."""
    return dequantize(unpack(packed, columns), scales, QuantizerConfig(group_size=group_size), dtype)

# SPDX-License-Identifier: Apache-2.0
"""A linear layer whose ternary weight stays packed in memory: 2-bit codes and bf16 scales."""

from collections.abc import Callable

import torch
from torch.nn.functional import linear

from ..quantization import GROUP_MULTIPLE, packed_size
from .kernels import MOST_TOKENS, kernels_for

_DECODED_ELEMENTS = 1 << 20
"""Of rows that are unpacked at a time, when there are many tokens: 2 MiB in bf16."""
_DTYPES = (torch.bfloat16, torch.float32)


class PackedTernaryLinear(torch.nn.Module):
    """y = x W^T of a ternary weight that is kept in 2 bits per code; for inference alone.

    Few tokens are multiplied with the packed weight, summed in fp32. Of more than 32, or where a device has no such
    kernel, rows are unpacked to the dtype of the activations, some MiB at a time, and multiplied by the device's own
    matrix product. Codes and scales are buffers: whatever dtype the module is cast to, the scales stay bf16.

    Args:
        packed: uint8 ``[out, ceil(in / 128) * 32]``, see :func:`bitcpm_megatron.quantization.pack`.
        scales: bf16 ``[out, groups]``: one for a row, or for each of its groups, which are of equal size; a
            row-parallel weight of N shards has N.
        in_features: elements of a row.

    Raises:
        ValueError: shapes or dtypes that do not fit, or groups that are no multiple of 32.
    """

    packed: torch.Tensor
    scales: torch.Tensor

    def __init__(self, packed: torch.Tensor, scales: torch.Tensor, in_features: int) -> None:
        super().__init__()
        expected = (scales.shape[0] if scales.dim() == 2 else -1, packed_size(in_features))
        if tuple(packed.shape) != expected or packed.dtype != torch.uint8 or scales.dtype != torch.bfloat16:
            raise ValueError(
                f"codes of shape {tuple(packed.shape)}, {packed.dtype} with scales of shape {tuple(scales.shape)}, "
                f"{scales.dtype} for rows of {in_features}: pass uint8 [out, {expected[1]}] and bfloat16 [out, groups]"
            )
        groups = scales.shape[1]
        if groups == 0 or in_features % groups or (groups > 1 and in_features // groups % GROUP_MULTIPLE):
            raise ValueError(
                f"{groups} scales for a row of {in_features}: pass one, or one for groups of a multiple of "
                f"{GROUP_MULTIPLE} elements"
            )
        self.in_features, self.out_features = in_features, packed.shape[0]
        self.group_size = -1 if groups == 1 else in_features // groups
        self.register_buffer("packed", packed.contiguous())
        self.register_buffer("scales", scales.contiguous())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` in bf16 or fp32 -> ``[..., out]`` in the same dtype.

        Raises:
            TypeError: activations of another dtype.
            ValueError: of another width.
            RuntimeError: they want a gradient, are on another device, or the device has no kernel.
        """
        self._check(x.dtype)
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(f"activations of shape {tuple(x.shape)} for rows of {self.in_features}")
        if x.device != self.packed.device:
            raise RuntimeError(f"activations on {x.device} and a packed weight on {self.packed.device}: move one")
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("a packed weight has no backward: call the model under torch.inference_mode()")
        tokens = x.reshape(-1, self.in_features).contiguous()
        kernels = kernels_for(x.device.type)
        if kernels.multiply is not None and 0 < len(tokens) <= MOST_TOKENS:
            y = kernels.multiply(tokens, self.packed, self.scales)
        else:
            y = tokens.new_empty(len(tokens), self.out_features)
            rows = max(1, _DECODED_ELEMENTS // self.in_features)
            for first in range(0, self.out_features, rows):
                y[:, first : first + rows] = linear(tokens, self._rows(first, first + rows, x.dtype))
        return y.view(*x.shape[:-1], self.out_features)

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight ``[out, in]`` of the training forward, unpacked to bf16 or fp32.

        Raises:
            TypeError: another dtype.
        """
        self._check(dtype)
        return self._rows(0, self.out_features, dtype)

    def extra_repr(self) -> str:
        """What a printed model says of it."""
        return f"in_features={self.in_features}, out_features={self.out_features}, group_size={self.group_size}"

    @staticmethod
    def _check(dtype: torch.dtype) -> None:
        if dtype not in _DTYPES:
            raise TypeError(f"{dtype}: packed weights are unpacked to and multiplied with bfloat16 and float32")

    def _rows(self, first: int, behind: int, dtype: torch.dtype) -> torch.Tensor:
        decode = kernels_for(self.packed.device.type).decode
        return decode(self.packed[first:behind], self.scales[first:behind], self.in_features, self.group_size, dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "PackedTernaryLinear":
        self.packed = fn(self.packed)
        # As integers: a cast of the module changes numbers of floating point, and with them what is computed.
        self.scales = fn(self.scales.view(torch.int16)).view(torch.bfloat16)
        return self

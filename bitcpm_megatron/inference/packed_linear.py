# SPDX-License-Identifier: Apache-2.0
"""A linear layer whose ternary weight stays packed in memory: 2-bit codes and bf16 scales."""

from collections.abc import Callable

import torch
from torch.nn.functional import linear

from ..quantization import GROUP_MULTIPLE, packed_size
from .kernels import MOST_TOKENS, kernels_for

_DECODED_ELEMENTS = 1 << 20
"""The number of elements that are unpacked at a time if there are many tokens: 2 MiB in bf16."""
_DTYPES = (torch.bfloat16, torch.float32)


class PackedTernaryLinear(torch.nn.Module):
    """The layer y = x W^T with a ternary weight that is stored in 2 bits per code; only for inference.

    Up to 32 tokens are multiplied with the packed weight, summed in fp32. With more tokens, or if the device has no
    such kernel, rows are unpacked to the dtype of the activations, some MiB at a time, and multiplied by the device's
    own matrix product. Codes and scales are buffers; the scales stay bf16 whatever dtype the module is cast to.

    Args:
        packed: the codes of :func:`bitcpm_megatron.quantization.pack`, uint8 ``[out, ceil(in / 128) * 32]``.
        scales: the scales, bf16 ``[out, groups]``: one for a row, or one for each of its groups of equal size; a
            row-parallel weight of N shards has N groups.
        in_features: the number of elements of a row.

    Raises:
        ValueError: if shapes or dtypes do not fit, or the size of several groups is no multiple of 32.
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
        """Multiplies activations ``[..., in]`` in bf16 or fp32 with the weight: ``[..., out]`` in the same dtype.

        Raises:
            TypeError: if the activations have another dtype.
            ValueError: if the activations have another width.
            RuntimeError: if the activations require a gradient or are on another device than the weight, or the device
                has no kernel.
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
        """Returns the weight ``[out, in]`` of the training forward pass, unpacked to bf16 or fp32.

        Raises:
            TypeError: if another dtype is requested.
        """
        self._check(dtype)
        return self._rows(0, self.out_features, dtype)

    def extra_repr(self) -> str:
        """Returns the description of the layer in a printed model."""
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
        # The scales are passed on as integers, because a cast of the module would round them if they were floats.
        self.scales = fn(self.scales.view(torch.int16)).view(torch.bfloat16)
        return self

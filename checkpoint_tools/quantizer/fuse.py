# SPDX-License-Identifier: Apache-2.0
"""Fusing of the quantizer into weights, block by block: latent rows become levels times scales."""

from collections.abc import Callable, Iterator

import torch

from ...quantization import SPACES, QuantizerConfig, effective_group, fused_group_size, fused_space, quantize_dequantize
from ..storage.reader import ConversionError, TensorInfo, TensorReader, check_finite

# 1 MB in fp32: larger blocks are returned to the system when they are freed, and would be mapped again each time.
_BLOCK_ELEMENTS = 1 << 18


def fuse_blocks(
    name: str,
    read_rows: Callable[[slice], torch.Tensor],
    info: TensorInfo,
    config: QuantizerConfig,
    scales: torch.Tensor | None = None,
    latent_dtype: torch.dtype | None = None,
) -> Iterator[torch.Tensor]:
    """Yields the quantized weight of a latent weight in blocks of rows; the block size does not change a bit of it.

    ``out`` and ``in`` are the output and input features, ``rows`` the rows of a block, ``groups`` the scales per row.

    Args:
        name: the name of the tensor, for messages.
        read_rows: a function that returns rows ``[rows, in]`` of the latent weight.
        info: the shape ``[out, in]`` and the dtype of the weight.
        config: the quantizer, whose group size refers to the whole row.
        scales: the bf16 scales ``[out, groups]`` that training used; None to compute them from the weight.
        latent_dtype: the dtype of the copy that the training forward pass quantized, if the weight is a wider master.

    Yields:
        Contiguous blocks ``[rows, in]`` in the dtype of ``info``, whose zeros are +0.0.

    Raises:
        ConversionError: if the weight cannot be quantized with ``config``, or is not finite.
    """
    if len(info.shape) != 2 or 0 in info.shape or not info.dtype.is_floating_point:
        raise ConversionError(f"{name}: {info.shape}, {info.dtype} is no matrix [out, in] that could be quantized")
    latent_dtype = latent_dtype or info.dtype
    largest = min(torch.finfo(info.dtype).max, torch.finfo(latent_dtype).max) / max(
        map(abs, SPACES[config.space].levels)
    )
    rows = max(1, _BLOCK_ELEMENTS // info.shape[1])
    for start in range(0, info.shape[0], rows):
        part = slice(start, min(start + rows, info.shape[0]))
        latent = read_rows(part)
        check_finite(name, latent)
        try:
            given = None if scales is None else scales[part]
            quantized, used = quantize_dequantize(latent.to(latent_dtype), config, given)
        except ValueError as error:
            raise ConversionError(f"{name}: {error}") from None
        # bf16 scales can exceed the range of fp16, and the sum of a group can overflow although its values are finite.
        if not used.float().amax() <= largest:
            raise ConversionError(
                f"{name}: rows {part.start} to {part.stop - 1} have a scale beyond {largest:.3g}: such a weight is "
                "damaged, take another checkpoint"
            )
        if quantized.dtype != info.dtype:
            quantized = quantized.to(info.dtype).add_(0.0)  # fp16 may underflow to -0.0
        yield quantized


def bf16_steps(one: torch.Tensor, other: torch.Tensor) -> int:
    """Returns the largest distance between two tensors of bf16 scales, in units of adjacent bf16 values."""
    # The bit patterns of adjacent values of the same sign are adjacent integers.
    return int((one.view(torch.int16).int() - other.view(torch.int16).int()).abs().amax())


def detected_group(reader: TensorReader, name: str, space: str = "ternary") -> int | None:
    """Returns the elements per scale of a weight that is already fused, 0 if it is all zero, None if it is latent.

    Args:
        reader: the reader of the model.
        name: the name of the tensor.
        space: the quantization space that the weight is in, or will be quantized to.

    Raises:
        ConversionError: if the tensor is not a matrix, has a dtype that the quantizer does not support, or is fused in
            another space.
    """
    weight = reader.read(name)
    try:
        group = fused_group(name, weight, space)
    except ValueError as error:
        raise ConversionError(str(error)) from None
    if group is None:
        return None
    return effective_group(weight.shape[1], group) if any(block.any() for block in weight.split(1024)) else 0


def fused_group(name: str, weight: torch.Tensor, space: str) -> int | None:
    """Returns the group size of a weight fused in ``space``, or None if it is latent.

    As :func:`~bitcpm_megatron.quantization.fused_group_size`, but a weight that is fused in another space is an error.

    Raises:
        ValueError: if the tensor is not a matrix, has an unsupported dtype, or is fused in another space; the message
            names the tensor.
    """
    try:
        group = fused_group_size(weight, space)
        other = fused_space(weight) if group is None else None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if other is not None:
        raise ValueError(
            f"{name} holds quantized values of the space {other} already (fused), not of {space}: bring along the "
            "quantizer record that belongs to them"
        )
    return group

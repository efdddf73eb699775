# SPDX-License-Identifier: Apache-2.0
"""Fuses the quantizer into weights, block by block: latent rows in, levels times scale out."""

from collections.abc import Callable, Iterator

import torch

from ...quantization import SPACES, QuantizerConfig, effective_group, fused_group_size, fused_space, quantize_dequantize
from ..storage.reader import ConversionError, TensorInfo, TensorReader, check_finite

# Freed blocks of more than 1 MB go back to the system, and would be asked of it anew each time.
_BLOCK_ELEMENTS = 1 << 18


def fuse_blocks(
    name: str,
    read_rows: Callable[[slice], torch.Tensor],
    info: TensorInfo,
    config: QuantizerConfig,
    scales: torch.Tensor | None = None,
    latent_dtype: torch.dtype | None = None,
) -> Iterator[torch.Tensor]:
    """The quantized weight of a latent one, in blocks of rows; the blocks do not change a bit of it.

    Args:
        name: of the tensor, for messages.
        read_rows: gives rows ``[rows, in]`` of the latent weight.
        info: its shape ``[out, in]`` and dtype.
        config: the quantizer, with the group size along the whole row.
        scales: the bf16 scales ``[out, groups]`` that training used; None for the weight's own.
        latent_dtype: dtype of the copy that the training forward quantized, where the weight is a wider master.

    Yields:
        ``[rows, in]`` in the dtype of ``info``, contiguous, zeros +0.0.

    Raises:
        ConversionError: the weight cannot be quantized so, or it is not finite.
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
        # bf16 scales reach further than fp16, and the sum of a group further than its values.
        if not used.float().amax() <= largest:
            raise ConversionError(
                f"{name}: rows {part.start} to {part.stop - 1} have a scale beyond {largest:.3g}: such a weight is "
                "damaged, take another checkpoint"
            )
        if quantized.dtype != info.dtype:
            quantized = quantized.to(info.dtype).add_(0.0)  # fp16 may underflow to -0.0
        yield quantized


def bf16_steps(one: torch.Tensor, other: torch.Tensor) -> int:
    """How many bf16 values two tensors of scales are apart, at most."""
    # Neighbouring values of one sign are neighbouring integers.
    return int((one.view(torch.int16).int() - other.view(torch.int16).int()).abs().amax())


def detected_group(reader: TensorReader, name: str, space: str = "ternary") -> int | None:
    """Elements per scale along a row of a weight that is fused already; 0 where all is zero, None for a latent one.

    Args:
        reader: of the model.
        name: of the tensor.
        space: that it is, or will be, quantized to.

    Raises:
        ConversionError: it is no matrix, or of a dtype that no quantizer takes; or it is fused in another space.
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
    """As :func:`~bitcpm_megatron.quantization.fused_group_size`, for a weight that may be fused in one space only.

    Raises:
        ValueError: naming the tensor: it is no matrix, of no weight's dtype, or fused in another space.
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

# SPDX-License-Identifier: Apache-2.0
"""Requirements of a weight that is to be quantized: shape, dtype and group size."""

import torch

from .config import effective_group

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_weight(weight: torch.Tensor, group_size: int, scales: torch.Tensor | None = None) -> int:
    """Checks shape, dtype and group size of a weight without reading its values, and so without a device sync.

    Args:
        weight: the weight, ``[out_features, in_features]`` in fp32, bf16 or fp16.
        group_size: the group size as in :class:`QuantizerConfig`.
        scales: given scales, ``[out_features, groups]`` in bfloat16, or None.

    Returns:
        The number of elements per scale.

    Raises:
        ValueError: if shape, dtype or group do not fit; the message has the offending shape or dtype, and the cure.
        TypeError: if the weight is not a tensor.
    """
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"a weight is a tensor [out_features, in_features], not a {type(weight).__name__}")
    shape = tuple(weight.shape)
    if weight.dim() != 2:
        raise ValueError(f"a weight of shape {shape} cannot be quantized: pass a matrix [out_features, in_features]")
    if weight.numel() == 0:
        raise ValueError(f"a weight of shape {shape} is empty: there is nothing to quantize")
    if weight.dtype not in WEIGHT_DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in WEIGHT_DTYPES)
        raise ValueError(f"a weight of dtype {weight.dtype} (shape {shape}) cannot be quantized: cast it to {names}")
    group = effective_group(shape[1], group_size)
    if scales is not None:
        expected = (shape[0], shape[1] // group)
        if tuple(scales.shape) != expected or scales.dtype != torch.bfloat16:
            raise ValueError(
                f"scales of shape {tuple(scales.shape)} and dtype {scales.dtype} do not fit a weight of shape {shape} "
                f"with groups of {group}: pass bfloat16 of shape {expected}"
            )
    return group

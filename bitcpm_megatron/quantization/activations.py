# SPDX-License-Identifier: Apache-2.0
"""Fake quantization of activations: int8 with one scale per token, the reference.

    s = max(max|x|, eps)        over the features of one token (of one row-parallel shard of them)
    q = round_half_even(x / s * 127) * s / 127

The activations of BitNet b1.58 (arXiv:2402.17764), computed in fp32 and rounded once to the input's dtype.
"""

import torch

_LEVELS = 127.0


def quantize_activations(x: torch.Tensor, groups: int, eps: float) -> torch.Tensor:
    """Int8 fake quantization, per token.

    Args:
        x: ``[..., features]`` in fp32, bf16 or fp16.
        groups: parts of the features with a scale each: 1, or in row-parallel layers the row-parallel shards that this
            rank holds, so that nothing depends on the tensor-parallel size.
        eps: lower bound of a scale.

    Returns:
        Same shape and dtype; zeros are +0.0.

    Raises:
        ValueError: the groups do not divide the features, or the dtype is no floating-point one.
    """
    if not x.is_floating_point() or x.dim() == 0 or groups < 1 or x.shape[-1] % groups:
        raise ValueError(
            f"activations of shape {tuple(x.shape)} and dtype {x.dtype} cannot be quantized in {groups} groups: pass "
            "floating point [..., features] with a number of features that the groups divide"
        )
    grouped = x.detach().float().reshape(*x.shape[:-1], groups, -1)
    s = grouped.abs().amax(-1, keepdim=True).clamp_(min=eps)
    quantized = grouped.div(s).mul_(_LEVELS).round_().mul_(s).div_(_LEVELS).add_(0.0)
    return quantized.reshape(x.shape).to(x.dtype)

# SPDX-License-Identifier: Apache-2.0
"""Reference of int8 activations with one scale per token, and of the output of a ternary layer computed from integers.

Quantization of a token x, with the scale s and the codes q:

    s = max(max|x|, eps)        over the features of one token (of one row-parallel shard of them)
    q = round_half_even(x / s * 127)
    x' = q s / 127              fake quantization: computed in fp32, rounded once to the input's dtype

Output o of token t, summed over the features k, for a weight with the codes c and one scale s_w per row:

    y[t, o] = (sum_k q[t, k] c[o, k]) * s_w[o] * (s[t] / 127)

The terms of the sum are integers, so that its order does not matter; fp32 holds it exactly for up to ``LONGEST_SUM``
terms. The products with the scales are computed in fp32, from left to right, and rounded once. This is the layer of
BitNet b1.58 (arXiv:2402.17764).
"""

import torch

LEVELS = 127
"""The number of int8 activation codes on each side of zero."""
EPS = 1e-5
"""The lower bound of a token's scale in training."""
LONGEST_SUM = 2**24 // LEVELS
"""The largest number of terms, each at most 127 times 1 in magnitude, whose sum fp32 holds exactly."""


def quantize_activations(x: torch.Tensor, groups: int, eps: float) -> torch.Tensor:
    """Applies int8 fake quantization to activations, with one scale per token and group.

    Args:
        x: the activations, ``[..., features]`` in fp32, bf16 or fp16.
        groups: the number of parts of the features that have a scale each: 1, or in row-parallel layers the number of
            row-parallel shards that this rank holds, so that nothing depends on the tensor-parallel size.
        eps: the lower bound of a scale.

    Returns:
        The values that the codes represent, in the shape and dtype of ``x``; zeros are +0.0.

    Raises:
        ValueError: if the groups do not divide the features, or the dtype is not a floating-point one.
    """
    check_activations(x, groups)
    grouped = x.detach().float().reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    s = grouped.abs().amax(-1, keepdim=True).clamp_(min=eps)
    quantized = grouped.div(s).mul_(LEVELS).round_().mul_(s).div_(LEVELS).add_(0.0)
    return quantized.reshape(x.shape).to(x.dtype)


def check_activations(x: torch.Tensor, groups: int) -> None:
    """Checks that activations ``[..., features]`` can be quantized in a number of groups.

    Raises:
        ValueError: if the groups do not divide the features, or the dtype is not a floating-point one.
    """
    if not x.is_floating_point() or x.dim() == 0 or groups < 1 or x.shape[-1] % groups:
        raise ValueError(
            f"activations of shape {tuple(x.shape)} and dtype {x.dtype} cannot be quantized in {groups} groups: pass "
            "floating point [..., features] with a number of features that the groups divide"
        )


def integer_activations(
    x: torch.Tensor, eps: float, factors: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the int8 codes of each token and its scale.

    The codes and scales of a tensor that :func:`quantize_activations` returned in bf16 or fp16, with one group, are
    those of its input: quantized activations may be sent as such and taken apart where they arrive.

    Args:
        x: the activations, ``[tokens, features]`` in fp32, bf16 or fp16.
        eps: the lower bound of a scale.
        factors: ``[features]`` factors that every token is first multiplied with, in fp32; None for none.

    Returns:
        The int8 codes ``[tokens, features]`` and the fp32 scales ``[tokens]``. A token that is not finite has the codes
        0 and a scale that is not finite.
    """
    values = x.detach().float()
    if factors is not None:
        values = values * factors.float()
    # amax raises on an empty dimension.
    s = values.abs().amax(-1, keepdim=True) if x.shape[-1] else values.new_zeros(x.shape[0], 1)
    s = s.clamp(min=eps)
    codes = torch.where(s.isfinite(), values.div(s).mul_(LEVELS).round_(), 0.0)
    return codes.to(torch.int8), s.squeeze(-1)


def scale_sums(
    sums: torch.Tensor, scales: torch.Tensor, columns: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Returns the values that sums of products of codes represent: sum * column scale * (token scale / 127).

    Args:
        sums: the integer sums, ``[tokens, n]``, in int32 or any other dtype that holds them.
        scales: the fp32 scales of the activations, ``[tokens]``.
        columns: the scales of the weight's rows, ``[n]``; None for 1.
        dtype: the dtype of the result.
    """
    values = sums.float()
    if columns is not None:
        values = values * columns.float()
    return values.mul_((scales / LEVELS).unsqueeze(-1)).to(dtype)


def codes_of(quantized: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the codes and scales of a quantized weight with one scale per row.

    Args:
        quantized: the quantized weight, ``[out, in]``; each row holds only 0 and one magnitude with either sign.

    Returns:
        The int8 codes ``[out, in]`` and the scales ``[out]`` in the weight's dtype; a row of zeros has the scale 0.
    """
    weight = quantized.detach()
    return weight.sign().nan_to_num_(0.0).to(torch.int8), weight.abs().amax(-1)

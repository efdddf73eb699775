# SPDX-License-Identifier: Apache-2.0
"""Activations in int8 with one scale per token, and what a ternary layer makes of the integers: the reference.

    s = max(max|x|, eps)        over the features of one token (of one row-parallel shard of them)
    q = round_half_even(x / s * 127)
    x' = q s / 127              fake quantization: computed in fp32, rounded once to the input's dtype

    y[t, o] = (sum_k q[t, k] c[o, k]) * s_w[o] * (s[t] / 127)

with the codes c and scales s_w of a weight with one scale per row. The sum is one of integers, so that its order does
not matter; fp32 holds it exactly for up to ``LONGEST_SUM`` terms. What stands around it is computed in fp32, from left
to right, and rounded once. The layer of BitNet b1.58 (arXiv:2402.17764).
"""

import torch

LEVELS = 127
"""Codes of int8 activations on each side of zero."""
EPS = 1e-5
"""Lower bound of a token's scale in training."""
LONGEST_SUM = 2**24 // LEVELS
"""Terms of at most 127 times 1 whose sum fp32 holds exactly."""


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
    check_activations(x, groups)
    grouped = x.detach().float().reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    s = grouped.abs().amax(-1, keepdim=True).clamp_(min=eps)
    quantized = grouped.div(s).mul_(LEVELS).round_().mul_(s).div_(LEVELS).add_(0.0)
    return quantized.reshape(x.shape).to(x.dtype)


def check_activations(x: torch.Tensor, groups: int) -> None:
    """Checks that activations can be quantized in so many groups.

    Raises:
        ValueError: see :func:`quantize_activations`.
    """
    if not x.is_floating_point() or x.dim() == 0 or groups < 1 or x.shape[-1] % groups:
        raise ValueError(
            f"activations of shape {tuple(x.shape)} and dtype {x.dtype} cannot be quantized in {groups} groups: pass "
            "floating point [..., features] with a number of features that the groups divide"
        )


def integer_activations(
    x: torch.Tensor, eps: float, factors: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The int8 codes of each token and its scale.

    Of what :func:`quantize_activations` returns in bf16 or fp16, with one group, these are the same
    codes and scales as of its input: quantized activations may travel as such and be taken apart where they arrive.

    Args:
        x: ``[tokens, features]`` in fp32, bf16 or fp16.
        eps: lower bound of a scale.
        factors: ``[features]``, multiplied in fp32 with every token first.

    Returns:
        int8 codes ``[tokens, features]`` and fp32 scales ``[tokens]``. A token that is not finite has the codes 0 and a
        scale that is not.
    """
    values = x.detach().float()
    if factors is not None:
        values = values * factors.float()
    # Of no features there is no largest one.
    s = values.abs().amax(-1, keepdim=True) if x.shape[-1] else values.new_zeros(x.shape[0], 1)
    s = s.clamp(min=eps)
    codes = torch.where(s.isfinite(), values.div(s).mul_(LEVELS).round_(), 0.0)
    return codes.to(torch.int8), s.squeeze(-1)


def scale_sums(
    sums: torch.Tensor, scales: torch.Tensor, columns: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """What sums of products of codes stand for.

    Args:
        sums: ``[tokens, n]``, integers in int32 or any other type that holds them.
        scales: fp32 ``[tokens]`` of the activations.
        columns: ``[n]``, the scales of the weight's rows; None for 1.
        dtype: of the result.
    """
    values = sums.float()
    if columns is not None:
        values = values * columns.float()
    return values.mul_((scales / LEVELS).unsqueeze(-1)).to(dtype)


def codes_of(quantized: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes and scales of a quantized weight with one scale per row.

    Args:
        quantized: ``[out, in]``, of every row only 0 and one magnitude with either sign.

    Returns:
        int8 codes ``[out, in]`` and the scales ``[out]`` in the weight's dtype; a row of zeros has the scale 0.
    """
    weight = quantized.detach()
    return weight.sign().nan_to_num_(0.0).to(torch.int8), weight.abs().amax(-1)

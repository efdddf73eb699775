# SPDX-License-Identifier: Apache-2.0
"""The expected results of the AscendC kernels, computed in torch with the kernels' order of summation.

Weights have the shape ``[rows, columns]``, scales ``[rows, groups]``; each row has ``groups`` groups of ``group``
consecutive elements, one scale each.
"""

import torch


def tree_sum(x: torch.Tensor) -> torch.Tensor:
    """Sums the last dimension in fp32 as one binary tree that adds neighbors, with rows padded by zeros."""
    while x.shape[-1] > 1:
        if x.shape[-1] % 2:
            x = torch.nn.functional.pad(x, (0, 1))
        x = x[..., 0::2] + x[..., 1::2]
    return x[..., 0]


def means(weight: torch.Tensor, group: int) -> torch.Tensor:
    """Returns the means of magnitudes, fp32 ``[rows, groups]``."""
    rows, columns = weight.shape
    return tree_sum(weight.float().abs().reshape(rows, columns // group, group)) / group


def own_scales(
    weight: torch.Tensor, group: int, eps: float, statistic: str = "absmean", multiplier: float = 1.0
) -> torch.Tensor:
    """Returns the scales that the quantizer makes, bf16 ``[rows, groups]``; NaN stays NaN."""
    largest = weight.float().abs().reshape(weight.shape[0], -1, group).amax(-1)
    found = (largest if statistic == "absmax" else means(weight, group)) * torch.tensor(multiplier)
    return torch.where(found < eps, torch.tensor(eps, dtype=torch.float32), found).to(torch.bfloat16)


def codes(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Returns ternary codes, int8 ``sign(w) * (|w| > s / 2)``; NaN becomes 0."""
    rows, columns = weight.shape
    w = weight.float().reshape(rows, scales.shape[1], -1)
    s = scales.float().unsqueeze(-1)
    return (torch.sign(w) * (w.abs() > s / 2)).nan_to_num(0).to(torch.int8).reshape(rows, columns)


def values(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns codes times scales, rounded once to a dtype; zeros are +0.0."""
    rows, columns = codes.shape
    c = codes.float().reshape(rows, scales.shape[1], -1)
    return ((c * scales.float().unsqueeze(-1)).to(dtype) + 0.0).reshape(rows, columns)


def quantized(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Returns the quantized weight, which is NaN where the weight is NaN."""
    result = values(codes(weight, scales), scales, weight.dtype)
    return torch.where(weight.isnan(), weight, result)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Returns whether two tensors are equal bit for bit; all NaNs count as equal."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    integer = torch.int32 if a.dtype == torch.float32 else torch.int16
    return bool((((a != a) & (b != b)) | (a.view(integer) == b.view(integer))).all())

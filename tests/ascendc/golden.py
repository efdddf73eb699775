# SPDX-License-Identifier: Apache-2.0
"""What the AscendC kernels have to compute, in torch, with their order of summation."""

import torch


def tree_sum(x: torch.Tensor) -> torch.Tensor:
    """Sums the last dimension in fp32 as one binary tree of neighbors over a row padded with zeros."""
    while x.shape[-1] > 1:
        if x.shape[-1] % 2:
            x = torch.nn.functional.pad(x, (0, 1))
        x = x[..., 0::2] + x[..., 1::2]
    return x[..., 0]


def means(weight: torch.Tensor, group: int) -> torch.Tensor:
    """fp32 means of magnitudes, ``[rows, groups]``."""
    rows, columns = weight.shape
    return tree_sum(weight.float().abs().reshape(rows, columns // group, group)) / group


def own_scales(
    weight: torch.Tensor, group: int, eps: float, statistic: str = "absmean", multiplier: float = 1.0
) -> torch.Tensor:
    """bf16 scales ``[rows, groups]``; NaN stays NaN."""
    largest = weight.float().abs().reshape(weight.shape[0], -1, group).amax(-1)
    found = (largest if statistic == "absmax" else means(weight, group)) * torch.tensor(multiplier)
    return torch.where(found < eps, torch.tensor(eps, dtype=torch.float32), found).to(torch.bfloat16)


def codes(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """int8 ``sign(w) * (|w| > s / 2)``; 0 where the scale is not finite."""
    rows, columns = weight.shape
    w = weight.float().reshape(rows, scales.shape[1], -1)
    s = scales.float().unsqueeze(-1)
    return (torch.sign(w) * (w.abs() > s / 2)).nan_to_num(0).to(torch.int8).reshape(rows, columns)


def values(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Codes times scales, rounded once, zeros +0.0."""
    rows, columns = codes.shape
    c = codes.float().reshape(rows, scales.shape[1], -1)
    return ((c * scales.float().unsqueeze(-1)).to(dtype) + 0.0).reshape(rows, columns)


def quantized(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The quantized weight; NaN where the weight is."""
    result = values(codes(weight, scales), scales, weight.dtype)
    return torch.where(weight.isnan(), weight, result)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit, but for which NaN it is."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    integer = torch.int32 if a.dtype == torch.float32 else torch.int16
    return bool((((a != a) & (b != b)) | (a.view(integer) == b.view(integer))).all())

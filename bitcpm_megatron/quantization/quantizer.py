# SPDX-License-Identifier: Apache-2.0
"""The quantizer's mathematics, on torch alone. Everything else in this package agrees with this file bit for bit.

For a group of a latent weight W (BitCPM-CANN technical report, "quantizer"; the one bf16 scale is ours):

    s    = bf16(max(m * statistic(|W|), eps))       mean or max, and the product with the multiplier m, in fp32
    code = how many thresholds t_k * s W is beyond  compared in fp32; a tie goes to the side that the space names
    Wq   = level[code] * s                          rounded once, to the dtype of W

which for the ternary space, with the mean and m = 1, is clamp(round_half_even(W / s), -1, 1) * s, or
sign(W) * (|W| > s / 2) * s. There is one scale, for the thresholds and for the values.

Zeros of Wq are +0.0. What happens outside the usual range:

- a group whose scale would be below eps has s = bf16(eps), and only its values beyond the thresholds of this one
  survive; an all-zero group stays all +0.0, and in a space without a level for zero takes the positive level nearest to
  it: eps / 2 or eps;
- a non-finite weight, or an fp32 sum of |W| beyond 3.4e38, gives a non-finite scale, code 0 for the whole group, and
  NaN in Wq: it cannot go unnoticed, and :func:`scales_are_finite` finds it without looking at the weights;
- where level * s is beyond the dtype of W, Wq is infinite: an fp16 group with a scale of 65408 or more, which bf16 has
  as 65536, or half of that under the level 2.
"""

from collections.abc import Iterable, Iterator

import torch

from .config import QuantizerConfig, check_config, effective_group
from .spaces import SPACES, TERNARY, Space
from .weights import check_weight

# On a CPU the fp32 scratch should stay in the L2 cache; on a device one launch per operation is cheaper.
_CPU_BLOCK_ELEMENTS = 1 << 17


def quantize(
    weight: torch.Tensor, config: QuantizerConfig, scales: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of a weight.

    Args:
        weight: latent weight ``[out, in]`` in fp32, bf16 or fp16.
        config: the quantizer.
        scales: quantize with these bf16 scales ``[out, groups]``, all finite and above 0, instead of the weight's own.

    Returns:
        ``codes`` int8 ``[out, in]`` (for ternary -1, 0, 1) and ``scales`` bfloat16 ``[out, groups]``.

    Raises:
        ValueError: see :func:`~bitcpm_megatron.quantization.config.check_weight`; or given scales that are none.
        TypeError: the weight is no tensor, or the quantizer no configuration.
    """
    check_config(config)
    group = check_weight(weight, config.group_size, scales)
    if scales is not None and not bool(((scales > 0) & scales.isfinite()).all()):
        raise ValueError(f"scales of shape {tuple(scales.shape)} hold values that are not finite or not above 0")
    space = SPACES[config.space]
    w = weight.detach().reshape(-1, group).float()
    if scales is None:
        scales = _scales_into(w.clone(), config).reshape(weight.shape[0], -1)
    codes = codes_under(w, scales.reshape(-1, 1).float(), space)
    return codes.reshape(weight.shape), scales.clone()


def dequantize(codes: torch.Tensor, scales: torch.Tensor, config: QuantizerConfig, dtype: torch.dtype) -> torch.Tensor:
    """The weight that codes and scales stand for: ``level[code] * scale``, rounded once to ``dtype``.

    Args:
        codes: int8 ``[out, in]``, all of the quantizer's space (for ternary -1, 0, 1).
        scales: bfloat16 ``[out, groups]``.
        config: the quantizer that made them; its group size must agree with the shape of the scales.
        dtype: of the result, a floating-point one.

    Returns:
        ``[out, in]`` of ``dtype``; zeros are +0.0.

    Raises:
        ValueError: codes or scales of the wrong shape or dtype, or a code that the space does not have.
        TypeError: no tensors, no configuration, or no dtype for a weight.
    """
    check_config(config)
    if not isinstance(codes, torch.Tensor) or not isinstance(scales, torch.Tensor):
        raise TypeError(f"codes and scales are tensors, not a {type(codes).__name__} and a {type(scales).__name__}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype {dtype!r:.80}: pass a floating-point dtype, such as torch.bfloat16")
    if codes.dim() != 2 or codes.dtype != torch.int8 or codes.numel() == 0:
        raise ValueError(f"codes of shape {tuple(codes.shape)}, {codes.dtype}: pass int8 codes [out, in]")
    group = effective_group(codes.shape[1], config.group_size)
    expected = (codes.shape[0], codes.shape[1] // group)
    if tuple(scales.shape) != expected or scales.dtype != torch.bfloat16:
        raise ValueError(
            f"scales of shape {tuple(scales.shape)}, {scales.dtype} do not fit codes of shape {tuple(codes.shape)} "
            f"with group_size={config.group_size}: pass bfloat16 of shape {expected}"
        )
    space = SPACES[config.space]
    lowest, highest = (int(code) for code in torch.aminmax(codes))
    if lowest < space.lowest_code or highest >= space.lowest_code + len(space.levels):
        raise ValueError(
            f"codes from {lowest} to {highest}: those of the space {space.name} are {space.lowest_code} to "
            f"{space.lowest_code + len(space.levels) - 1}"
        )
    levels = torch.tensor(space.levels, dtype=torch.float32, device=codes.device)
    w = levels[codes.reshape(-1, group).int() - space.lowest_code]
    # "+ 0.0" turns -0.0 into +0.0 and leaves everything else as it is. After the cast: fp16 may underflow to -0.0.
    return (w * _finite_or_nan(scales)).to(dtype).add_(0.0).reshape(codes.shape)


def quantize_dequantize(
    weight: torch.Tensor,
    config: QuantizerConfig,
    scales: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``dequantize(*quantize(weight))`` in one go: what every fused kernel computes, and the torch backend.

    For ternary values the division form works in place on one fp32 scratch and is the fastest exact form in pure torch.

    Args:
        weight: latent weight ``[out, in]``; it is not differentiated here.
        config: the quantizer.
        scales: given bf16 scales ``[out, groups]``, or None for the weight's own.
        out: takes the quantized weight: a contiguous tensor like it, or, contiguous, the weight itself.

    Returns:
        The quantized weight ``[out, in]`` in the weight's dtype, and the bf16 scales ``[out, groups]``.

    Raises:
        ValueError: see :func:`~bitcpm_megatron.quantization.config.check_weight`.
    """
    group = check_weight(weight, config.group_size, scales)
    space = SPACES[config.space]
    w = weight.detach().reshape(-1, group)
    quantized = (
        torch.empty_like(w, memory_format=torch.contiguous_format) if out is None else out.detach().view(w.shape)
    )
    own = torch.empty(w.shape[0], 1, dtype=torch.bfloat16, device=w.device)
    if scales is not None:
        own.copy_(scales.reshape(-1, 1))
    rows = max(1, _CPU_BLOCK_ELEMENTS // group) if w.device.type == "cpu" else w.shape[0]
    rows = min(rows, w.shape[0])
    scratch = torch.empty(rows, group, dtype=torch.float32, device=w.device)
    for start in range(0, w.shape[0], rows):
        block = w[start : start + rows]
        s = own[start : start + rows]
        x = scratch[: block.shape[0]]
        if scales is None:
            s.copy_(_scales_into(x.copy_(block), config))
        x.copy_(block)
        if space is TERNARY:
            sf = s.float()
            x.div_(sf).round_().clamp_(-1.0, 1.0).mul_(sf).add_(0.0)
        else:
            x = level_values(x, _finite_or_nan(s), space)
        quantized[start : start + rows].copy_(x)
    if quantized.dtype == torch.float16:
        quantized.add_(0.0)  # a scale below 2**-25 underflows in fp16, to -0.0 where the code is -1
    return quantized.reshape(weight.shape), own.reshape(weight.shape[0], -1)


def scales_are_finite(scales: Iterable[torch.Tensor]) -> torch.Tensor:
    """One boolean tensor, on the scales' device: whether every scale is finite (no host sync)."""
    return torch.stack([s.abs().amax() for s in scales]).isfinite().all()


def scales_of(quantized: torch.Tensor, config: QuantizerConfig) -> torch.Tensor:
    """The scales of a quantized weight, from its values alone.

    They are exact in bf16: the largest magnitude of a ternary group is its scale; of other spaces the smallest one that
    is not zero is that of the smallest level. Where the values of a group leave open which levels they are (all of one
    magnitude, which two levels could have), they count as the smallest one. A group of zeros had a scale below eps, for
    a value of at least the absmean lies beyond half of it; with a multiplier above 2 it had an unknown scale, and eps
    stands for it, too.

    Args:
        quantized: bf16 ``[out, in]``, levels times scale.
        config: the quantizer that made it from scales of its own.

    Returns:
        bf16 ``[out, groups]``; NaN where the weight holds one.
    """
    group = check_weight(quantized, config.group_size)
    magnitudes = quantized.reshape(quantized.shape[0], -1, group).abs()
    eps = torch.tensor(config.eps, dtype=quantized.dtype)
    if config.space == TERNARY.name:
        largest = magnitudes.amax(-1)
        return torch.where(largest == 0, eps, largest)
    lowest = smallest_magnitudes(magnitudes)
    return torch.where(lowest == 0, eps, lowest / SPACES[config.space].smallest_magnitude)


def smallest_magnitudes(magnitudes: torch.Tensor) -> torch.Tensor:
    """The smallest value along the last dimension that is not zero; 0 where there is none, NaN where one is NaN."""
    lowest = magnitudes.masked_fill(magnitudes == 0, torch.inf).amin(-1)
    return lowest.masked_fill(lowest == torch.inf, 0.0)


def codes_under(w: torch.Tensor, s: torch.Tensor, space: Space) -> torch.Tensor:
    """The codes of groups under given scales, without a look at either (so without a device sync).

    Of quantized values under the scales that they were made with, these are the codes that they were made of: every
    level lies between its thresholds, rounded or not.

    Args:
        w: fp32 ``[rows, group]``.
        s: fp32 ``[rows, 1]``.
        space: whose codes.

    Returns:
        int8 ``[rows, group]``; 0 under a scale that is not finite.
    """
    codes = torch.full(w.shape, space.lowest_code, dtype=torch.int8, device=w.device)
    for beyond in _beyond(w, s, space):
        codes += beyond
    return codes.masked_fill_(~s.isfinite(), 0)


def _beyond(w: torch.Tensor, s: torch.Tensor, space: Space) -> Iterator[torch.Tensor]:
    """Which of the fp32 groups ``[rows, group]`` lie beyond each threshold of a space, under scales ``[rows, 1]``."""
    for threshold, tie in zip(space.thresholds, space.ties, strict=True):
        bound = s * threshold
        yield w >= bound if tie == "upper" else w > bound


def level_values(w: torch.Tensor, s: torch.Tensor, space: Space) -> torch.Tensor:
    """The fp32 levels times scale of fp32 groups; what is NaN stays so, of weights and of scales ``[rows, 1]``."""
    values = (s * space.levels[0]).expand_as(w)
    for level, beyond in zip(space.levels[1:], _beyond(w, s, space), strict=True):
        values = torch.where(beyond, s * level, values)
    return torch.where(w.isnan(), w, values).add_(0.0)


def _finite_or_nan(scales: torch.Tensor) -> torch.Tensor:
    """Scales in fp32 ``[all, 1]``; an infinite one is NaN, of which any multiple is NaN."""
    s = scales.reshape(-1, 1).float()
    return torch.where(s.isfinite(), s, torch.nan)


def _scales_into(scratch: torch.Tensor, config: QuantizerConfig) -> torch.Tensor:
    """bf16 scales ``[rows, 1]`` of fp32 groups ``[rows, group]``, which are overwritten."""
    scratch.abs_()
    found = scratch.amax(-1, keepdim=True) if config.statistic == "absmax" else _mean(scratch)
    if config.scale_multiplier != 1.0:
        # As a tensor, so that the number is rounded to fp32 before the product is.
        found.mul_(torch.full_like(found, config.scale_multiplier))
    return found.clamp_(min=config.eps).to(torch.bfloat16)


def _mean(magnitudes: torch.Tensor) -> torch.Tensor:
    """Means ``[rows, 1]``. The sum is fp32: in bf16 it would stall at a fraction of the true value.

    It is one binary tree over neighbours, so that its order, and with it now and then the scale, does not depend on
    the layout, the number of threads or the width of a machine's registers. All backends add in this order.
    """
    total = magnitudes
    while total.shape[-1] > 1:
        paired = total[:, : total.shape[-1] // 2 * 2]
        pairs = paired[:, 0::2] + paired[:, 1::2]
        total = pairs if total.shape[-1] % 2 == 0 else torch.cat([pairs, total[:, -1:]], dim=-1)
    # Not by the number itself: CUDA would multiply by its rounded reciprocal.
    return total / torch.full_like(total, magnitudes.shape[-1])

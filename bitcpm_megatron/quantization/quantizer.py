# SPDX-License-Identifier: Apache-2.0
"""The reference quantizer, on torch alone; everything else in this package agrees with this file bit for bit.

For a group of a latent weight W (BitCPM-CANN technical report, "quantizer"; the single bf16 scale is ours):

    s    = bf16(max(m * statistic(|W|), eps))       mean or max, and the product with the multiplier m, in fp32
    code = how many thresholds t_k * s W is beyond  compared in fp32; a tie goes to the side that the space names
    Wq   = level[code] * s                          rounded once, to the dtype of W

For the ternary space, with the mean and m = 1, this is clamp(round_half_even(W / s), -1, 1) * s,or
sign(W) * (|W| > s / 2) * s. The same scale serves the thresholds and the values. The codes that functions return are
shifted, so that code 0 is the level nearest to zero (``Space.lowest_code``).

In shapes, ``out`` and ``in`` are the features of the weight, ``groups`` is the number of scales per row, and ``group``
the number of elements per scale; ``[rows, group]`` holds one group per row. Zeros of Wq are +0.0. Outside the usual
range:

- a group whose scale would be below eps has s = bf16(eps), and only values beyond the thresholds of this scale survive;
  an all-zero group stays all +0.0, and in a space without a level for zero takes the positive level nearest to it:
  eps / 2 or eps;
- a non-finite weight, or an fp32 sum of |W| beyond 3.4e38, gives a non-finite scale, code 0 for the whole group, and
  NaN in Wq: it cannot go unnoticed, and :func:`scales_are_finite` finds it without looking at the weights;
- if level * s is beyond the dtype of W, Wq is infinite: this happens in an fp16 group with a scale of 65408 or more,
  which bf16 represents as 65536, or half of that under the level 2.
"""

from collections.abc import Iterable, Iterator

import torch

from .config import QuantizerConfig, check_config, effective_group
from .spaces import SPACES, TERNARY, Space
from .weights import check_weight

# On a CPU the fp32 scratch should stay in the L2 cache; on a device, one launch per operation is cheaper.
_CPU_BLOCK_ELEMENTS = 1 << 17


def quantize(
    weight: torch.Tensor, config: QuantizerConfig, scales: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the codes and scales of a weight.

    Args:
        weight: the latent weight, ``[out, in]`` in fp32, bf16 or fp16.
        config: the quantizer.
        scales: bf16 scales ``[out, groups]`` to use instead of the weight's own, all finite and above 0; or None.

    Returns:
        The codes, int8 ``[out, in]`` (for ternary -1, 0, 1), and the scales, bfloat16 ``[out, groups]``.

    Raises:
        ValueError: if :func:`~bitcpm_megatron.quantization.weights.check_weight` refuses the weight, or a given scale
            is not finite or not above 0.
        TypeError: if the weight is not a tensor, or the quantizer is not a configuration.
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
    """Returns the weight that codes and scales represent: ``level[code] * scale``, rounded once to ``dtype``.

    Args:
        codes: the codes, int8 ``[out, in]``, all of the quantizer's space (for ternary -1, 0, 1).
        scales: the scales, bfloat16 ``[out, groups]``.
        config: the quantizer that made them; its group size must agree with the shape of the scales.
        dtype: the floating-point dtype of the result.

    Returns:
        The quantized weight, ``[out, in]`` of ``dtype``; zeros are +0.0.

    Raises:
        ValueError: if codes or scales have the wrong shape or dtype, or a code is not one of the space.
        TypeError: if codes or scales are not tensors, the quantizer is not a configuration, or the dtype is not a
            floating-point one.
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
    # Adding 0.0 turns -0.0 into +0.0 and leaves everything else as it is. It follows the cast, which may underflow to
    # -0.0 in fp16.
    return (w * _finite_or_nan(scales)).to(dtype).add_(0.0).reshape(codes.shape)


def quantize_dequantize(
    weight: torch.Tensor,
    config: QuantizerConfig,
    scales: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the quantized weight and its scales in one pass: ``dequantize(*quantize(weight))``.

    Every fused kernel computes this function; it is also the torch backend. For ternary values, the form with a
    division works in place on one fp32 scratch and is the fastest exact form in pure torch.

    Args:
        weight: the latent weight, ``[out, in]``; it is not differentiated here.
        config: the quantizer.
        scales: given bf16 scales ``[out, groups]``, or None for the weight's own.
        out: the tensor to write the quantized weight to: a contiguous one of the weight's shape and dtype, or the
            weight itself if it is contiguous; None for a new one.

    Returns:
        The quantized weight ``[out, in]`` in the weight's dtype, and the bf16 scales ``[out, groups]``.

    Raises:
        ValueError: if :func:`~bitcpm_megatron.quantization.weights.check_weight` refuses the weight.
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
        quantized.add_(0.0)  # a scale below 2**-25 underflows in fp16, to -0.0 if the code is -1
    return quantized.reshape(weight.shape), own.reshape(weight.shape[0], -1)


def scales_are_finite(scales: Iterable[torch.Tensor]) -> torch.Tensor:
    """Returns one boolean tensor on the scales' device: whether every scale is finite (no host sync)."""
    return torch.stack([s.abs().amax() for s in scales]).isfinite().all()


def scales_of(quantized: torch.Tensor, config: QuantizerConfig) -> torch.Tensor:
    """Returns the scales of a quantized weight, found from its values alone.

    They are exact in bf16. The scale of a ternary group is its largest magnitude; in the other spaces the smallest
    non-zero magnitude belongs to the smallest level. If the values of a group leave open which levels they are (all of
    one magnitude, which two levels could have), they count as the smallest level. A group of zeros had a scale below
    eps, because a value of at least the absmean is beyond half of it, and eps is returned. With a multiplier above 2
    the scale of such a group is unknown, and eps is returned as well.

    Args:
        quantized: the quantized weight, bf16 ``[out, in]``: levels times scale.
        config: the quantizer that made it, from the weight's own scales.

    Returns:
        The scales, bf16 ``[out, groups]``; NaN for a group that holds a NaN.
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
    """Returns the smallest non-zero value along the last dimension; 0 if there is none, NaN if one is NaN."""
    lowest = magnitudes.masked_fill(magnitudes == 0, torch.inf).amin(-1)
    return lowest.masked_fill(lowest == torch.inf, 0.0)


def codes_under(w: torch.Tensor, s: torch.Tensor, space: Space) -> torch.Tensor:
    """Returns the codes of groups under given scales, without inspecting either on the host (no device sync).

    For quantized values and the scales that they were made with, these are the codes that they were made of: every
    level is between its thresholds, rounded or not.

    Args:
        w: the groups, fp32 ``[rows, group]``.
        s: their scales, fp32 ``[rows, 1]``.
        space: the space of the codes.

    Returns:
        The codes, int8 ``[rows, group]``; 0 under a scale that is not finite.
    """
    codes = torch.full(w.shape, space.lowest_code, dtype=torch.int8, device=w.device)
    for beyond in _beyond(w, s, space):
        codes += beyond
    return codes.masked_fill_(~s.isfinite(), 0)


def _beyond(w: torch.Tensor, s: torch.Tensor, space: Space) -> Iterator[torch.Tensor]:
    """Yields for each threshold which fp32 values ``[rows, group]`` are beyond it, under scales ``[rows, 1]``."""
    for threshold, tie in zip(space.thresholds, space.ties, strict=True):
        bound = s * threshold
        yield w >= bound if tie == "upper" else w > bound


def level_values(w: torch.Tensor, s: torch.Tensor, space: Space) -> torch.Tensor:
    """Returns levels times scale of fp32 groups ``[rows, group]``, scales ``[rows, 1]``; NaN in either stays NaN."""
    values = (s * space.levels[0]).expand_as(w)
    for level, beyond in zip(space.levels[1:], _beyond(w, s, space), strict=True):
        values = torch.where(beyond, s * level, values)
    return torch.where(w.isnan(), w, values).add_(0.0)


def _finite_or_nan(scales: torch.Tensor) -> torch.Tensor:
    """Returns scales in fp32 ``[all, 1]``, with NaN for an infinite one, because every multiple of NaN is NaN."""
    s = scales.reshape(-1, 1).float()
    return torch.where(s.isfinite(), s, torch.nan)


def _scales_into(scratch: torch.Tensor, config: QuantizerConfig) -> torch.Tensor:
    """Returns the bf16 scales ``[rows, 1]`` of fp32 groups ``[rows, group]``, which are overwritten."""
    scratch.abs_()
    found = scratch.amax(-1, keepdim=True) if config.statistic == "absmax" else _mean(scratch)
    if config.scale_multiplier != 1.0:
        # The multiplier is a tensor, so that it is rounded to fp32 before the product is.
        found.mul_(torch.full_like(found, config.scale_multiplier))
    return found.clamp_(min=config.eps).to(torch.bfloat16)


def _mean(magnitudes: torch.Tensor) -> torch.Tensor:
    """Returns the means ``[rows, 1]`` of fp32 magnitudes ``[rows, group]``.

    The sum is fp32: in bf16 it would stall at a fraction of the true value. It is one binary tree over neighbors, so
    that its order, and occasionally the scale with it, does not depend on the layout, the number of threads or the
    width of a machine's registers. All backends add in this order.
    """
    total = magnitudes
    while total.shape[-1] > 1:
        paired = total[:, : total.shape[-1] // 2 * 2]
        pairs = paired[:, 0::2] + paired[:, 1::2]
        total = pairs if total.shape[-1] % 2 == 0 else torch.cat([pairs, total[:, -1:]], dim=-1)
    # The divisor is a tensor: for a number, CUDA would multiply by its rounded reciprocal.
    return total / torch.full_like(total, magnitudes.shape[-1])

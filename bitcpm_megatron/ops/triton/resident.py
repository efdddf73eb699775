# SPDX-License-Identifier: Apache-2.0
"""Kernel for groups or rows that fit into one tile: each weight is read once and written once."""

import triton
import triton.language as tl

from .arithmetic import of_space, scale_bits, statistic, widen


@triton.jit
def quantize_tile(
    step,
    weight,
    quantized,
    scales,
    units,
    unit,
    eps,
    factor,
    ABSMAX: tl.constexpr,
    SPACE: tl.constexpr,
    GIVEN: tl.constexpr,
    BF16: tl.constexpr,
    SIZE: tl.constexpr,
    LEVELS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Quantizes the ``step``-th tile of ``[units, unit]``; the other arguments are those of :func:`quantize_resident`.

    The tile is read before it is written, so that ``quantized`` may be the weight itself.
    """
    UNITS: tl.constexpr = TILE // SIZE
    row = tl.arange(0, UNITS)[:, None]
    column = tl.arange(0, SIZE)[None, :]
    index = step * UNITS + row
    known = index < units
    inside = known & (column < unit)
    offset = index.to(tl.int64) * unit + column
    w = widen(tl.load(weight + offset, mask=inside, other=0), BF16)
    if GIVEN:
        bits = tl.load(scales + index, mask=known, other=0).to(tl.int32) & 0xFFFF
    else:
        bits = scale_bits(statistic(tl.abs(w), unit, ABSMAX, UNITS, SIZE, LEVELS), factor, eps)
        tl.store(scales + index, bits.to(tl.int16), mask=known)
    tl.store(quantized + offset, of_space(w, bits, SPACE, GIVEN, BF16, quantized.dtype.element_ty), mask=inside)


@triton.jit
def quantize_resident(
    weight,
    quantized,
    scales,
    units,
    unit,
    eps,
    factor,
    ABSMAX: tl.constexpr,
    SPACE: tl.constexpr,
    GIVEN: tl.constexpr,
    BF16: tl.constexpr,
    SIZE: tl.constexpr,
    LEVELS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Quantizes ``[units, unit]`` with one scale per unit.

    Args:
        weight: the latent weight, contiguous ``[units, unit]``; bf16 as int16 patterns.
        quantized: the quantized weight in the same form, written; it may be the weight itself.
        scales: int16 patterns of bf16, ``[units]``; read if GIVEN, else written.
        units: the number of scales.
        unit: the number of elements per scale.
        eps: the lower bound of a scale.
        factor: the multiplier of the statistic.
        ABSMAX: whether the statistic is the largest magnitude instead of the mean.
        SPACE: the table of the quantization space, see :func:`~bitcpm_megatron.ops.triton.arithmetic.of_space`.
        GIVEN: whether the scales are used as they are.
        BF16: whether the weight is bf16.
        SIZE: ``unit`` rounded up to a power of two.
        LEVELS: the binary logarithm of SIZE.
        TILE: the number of elements per program and step, a multiple of SIZE.
    """
    for step in range(tl.program_id(0), tl.cdiv(units, TILE // SIZE), tl.num_programs(0)):
        quantize_tile(
            step, weight, quantized, scales, units, unit, eps, factor, ABSMAX, SPACE, GIVEN, BF16, SIZE, LEVELS, TILE
        )

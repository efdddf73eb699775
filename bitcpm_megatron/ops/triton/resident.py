# SPDX-License-Identifier: Apache-2.0
"""Groups, or rows, that fit into one tile: each weight is read once and written once."""

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
    """One tile, the ``step``-th of ``[units, unit]``; all else as of :func:`quantize_resident`.

    It is read before it is written, so that ``quantized`` may be the weight itself.
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
    """Quantizes ``[units, unit]``, one scale per unit.

    Args:
        weight: contiguous; bf16 as int16 patterns.
        quantized: like it, written.
        scales: int16 patterns of bf16, ``[units]``; written, or read where GIVEN.
        units: number of scales.
        unit: elements per scale.
        eps: lower bound of a scale.
        factor: of the statistic.
        ABSMAX: whether the statistic is the largest magnitude, and not the mean.
        SPACE: see :func:`~bitcpm_megatron.ops.triton.arithmetic.of_space`.
        GIVEN: use the scales as they are.
        BF16: whether the weight is bf16.
        SIZE: 2**LEVELS, the power of two from ``unit`` up.
        LEVELS: see there.
        TILE: elements per program and step, a multiple of SIZE.
    """
    for step in range(tl.program_id(0), tl.cdiv(units, TILE // SIZE), tl.num_programs(0)):
        quantize_tile(
            step, weight, quantized, scales, units, unit, eps, factor, ABSMAX, SPACE, GIVEN, BF16, SIZE, LEVELS, TILE
        )

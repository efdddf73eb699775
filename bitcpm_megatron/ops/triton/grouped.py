# SPDX-License-Identifier: Apache-2.0
"""Kernel for many weights in one launch, for units that fit into one tile."""

import triton
import triton.language as tl

from .resident import quantize_tile

TABLE_ROWS = 6
"""The rows of the table: first step, addresses of weight, quantized weight and scales, ``units``, and ``unit``.

They describe the weights of a launch of :func:`quantize_grouped`.
"""


@triton.jit
def quantize_grouped(
    table,
    steps,
    eps,
    factor,
    ABSMAX: tl.constexpr,
    SPACE: tl.constexpr,
    STORED: tl.constexpr,
    BF16: tl.constexpr,
    ALIGNED: tl.constexpr,
    SIZE: tl.constexpr,
    LEVELS: tl.constexpr,
    TILE: tl.constexpr,
    WEIGHTS: tl.constexpr,
):
    """Quantizes many weights with their own scales, each as ``resident.quantize_resident`` does.

    Args:
        table: int64 ``[TABLE_ROWS, WEIGHTS]``, one column per weight; in unused columns the first step is ``steps``.
        steps: the number of tiles of all weights.
        eps: the lower bound of a scale.
        factor: the multiplier of the statistic.
        ABSMAX: whether the statistic is the largest magnitude instead of the mean.
        SPACE: the table of the quantization space, see :func:`~bitcpm_megatron.ops.triton.arithmetic.of_space`.
        STORED: the stored dtype: int16 for bf16, else fp16 or fp32.
        BF16: whether the weights are bf16.
        ALIGNED: whether the addresses of all weights and quantized weights, and every ``unit``, are multiples of 16.
        SIZE: a power of two that is at least every ``unit``.
        LEVELS: the binary logarithm of SIZE.
        TILE: the number of elements per program and step, a multiple of SIZE.
        WEIGHTS: the number of columns of the table, a power of two.
    """
    firsts = tl.load(table + tl.arange(0, WEIGHTS))
    for step in range(tl.program_id(0), steps, tl.num_programs(0)):
        entry = table + (tl.sum((firsts <= step).to(tl.int32), axis=0) - 1)
        first = tl.load(entry).to(tl.int32)
        weight = tl.load(entry + WEIGHTS).to(tl.pointer_type(STORED))
        quantized = tl.load(entry + 2 * WEIGHTS).to(tl.pointer_type(STORED))
        scales = tl.load(entry + 3 * WEIGHTS).to(tl.pointer_type(tl.int16))
        units = tl.load(entry + 4 * WEIGHTS).to(tl.int32)
        unit = tl.load(entry + 5 * WEIGHTS).to(tl.int32)
        if ALIGNED:
            weight = tl.multiple_of(weight, 16)
            quantized = tl.multiple_of(quantized, 16)
            unit = tl.multiple_of(unit, 16)
        here = step - first
        quantize_tile(
            here, weight, quantized, scales, units, unit, eps, factor, ABSMAX, SPACE, False, BF16, SIZE, LEVELS, TILE
        )

# SPDX-License-Identifier: Apache-2.0
"""Kernel for rows that do not fit into one tile, which are read twice: once for the scale and once for the values."""

import triton
import triton.language as tl

from .arithmetic import largest, of_space, ordered_sum, scale_bits, statistic, widen


@triton.jit
def quantize_streamed(
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
    PIECES: tl.constexpr,
    PIECE_LEVELS: tl.constexpr,
):
    """Quantizes ``[units, unit]`` with one scale per unit, in pieces of SIZE = 2**LEVELS elements.

    The other arguments are those of :func:`~bitcpm_megatron.ops.triton.resident.quantize_resident`. The sum has the
    same order: first within each piece, then over the sums of the pieces, of which there are at most PIECES =
    2**PIECE_LEVELS. For ABSMAX, the largest magnitude of each piece takes the place of its sum. With given scales each
    weight is read once.
    """
    lane = tl.arange(0, SIZE)[None, :]
    one = tl.zeros([1, 1], tl.int32)
    for index in range(tl.program_id(0), units, tl.num_programs(0)):
        offset = (index + one).to(tl.int64) * unit + lane
        if GIVEN:
            bits = tl.load(scales + index + one).to(tl.int32) & 0xFFFF
        else:
            piece = tl.arange(0, PIECES)[None, :]
            sums = tl.zeros([1, PIECES], tl.float32)
            for start in range(0, unit, SIZE):
                inside = lane < unit - start
                magnitude = tl.abs(widen(tl.load(weight + offset + start, mask=inside, other=0), BF16))
                found = largest(magnitude, 1) if ABSMAX else ordered_sum(magnitude, 1, SIZE, LEVELS)
                sums = tl.where(piece == start // SIZE, found, sums)
            bits = scale_bits(statistic(sums, unit, ABSMAX, 1, PIECES, PIECE_LEVELS), factor, eps)
            tl.store(scales + index + one, bits.to(tl.int16))
        for start in range(0, unit, SIZE):
            inside = lane < unit - start
            w = widen(tl.load(weight + offset + start, mask=inside, other=0), BF16)
            values = of_space(w, bits, SPACE, GIVEN, BF16, quantized.dtype.element_ty)
            tl.store(quantized + offset + start, values, mask=inside)

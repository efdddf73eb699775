# SPDX-License-Identifier: Apache-2.0
"""Arithmetic that the kernels share: bf16 as bits, a sum in a fixed order, the scale, and the values of a group.

bf16 is read and written as its 16-bit pattern. This costs nothing on a GPU, where bf16 is widened by a shift. The
outputs of a group are a few patterns to select from, so that nothing is rounded on the way out. And it makes the
interpreter exact, whose own casts truncate to bf16 and lose its subnormal values.

A unit is what shares one scale, a group or a row. In shapes, UNITS is the number of units in a tile, and SIZE the
number of elements of a unit, padded to a power of two.
"""

import triton
import triton.language as tl


@triton.jit
def widen(stored, BF16: tl.constexpr):
    """Returns stored weights or scales in fp32; bf16 comes as int16 patterns."""
    if BF16:
        return (stored.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return stored.to(tl.float32)


@triton.jit
def ordered_sum(x, UNITS: tl.constexpr, SIZE: tl.constexpr, LEVELS: tl.constexpr):
    """Sums ``[UNITS, SIZE]`` to ``[UNITS, 1]``: neighbors are added, then neighboring pairs, and so on.

    A plain ``tl.sum`` adds in an order that depends on the tile, the number of warps and even the address of the
    weight; a scale at the midpoint of two bf16 values would depend on it, too. A sum of two numbers has only one order,
    so that this tree gives the same bits on every rank, after every tuning, in the interpreter, and in the AscendC
    kernels, which add in the same order. SIZE is 2**LEVELS.
    """
    for level in tl.static_range(LEVELS):
        x = tl.sum(tl.reshape(x, [UNITS, SIZE >> (level + 1), 2]), axis=2)
    return tl.reshape(x, [UNITS, 1])


@triton.jit
def largest(x, UNITS: tl.constexpr):
    """Returns the maxima ``[UNITS, 1]`` of magnitudes ``[UNITS, SIZE]``, by their bits: NaN is the largest."""
    return tl.reshape(tl.max(x.to(tl.int32, bitcast=True), axis=1), [UNITS, 1]).to(tl.float32, bitcast=True)


@triton.jit
def statistic(x, count, ABSMAX: tl.constexpr, UNITS: tl.constexpr, SIZE: tl.constexpr, LEVELS: tl.constexpr):
    """Returns the mean or the maximum of magnitudes ``[UNITS, SIZE]``, of which ``count`` per unit are not padding."""
    if ABSMAX:
        return largest(x, UNITS)
    else:
        return tl.div_rn(ordered_sum(x, UNITS, SIZE, LEVELS), count.to(tl.float32))


@triton.jit
def scale_bits(found, factor, eps):
    """Returns bf16(max(statistic * factor, eps)) as an int32 that holds its 16 bits."""
    scale = found * factor
    # tl.maximum may drop a NaN; this selection keeps it.
    scale = tl.where(scale < eps, eps, scale)
    # The scale is positive, but rounded_bits would carry the bits of a NaN into the sign.
    return tl.where(scale == scale, rounded_bits(scale), 0x7FC0)


@triton.jit
def rounded_bits(x):
    """Returns the 16 bits of bf16 in an int32, for a positive fp32 number, rounded half to even."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


@triton.jit
def widen_bits(bits):
    """Returns the fp32 value of a bf16 number whose pattern is in an int32."""
    return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def stored_values(positive, negative, bits, BF16: tl.constexpr, DTYPE: tl.constexpr):
    """Returns s, -s or +0.0 in stored form; NaN for a scale that is not finite.

    Args:
        positive: the mask of the elements that become s; false for a scale that is not finite.
        negative: the mask of the elements that become -s; false for a scale that is not finite.
        bits: the bits of the scales, int32, in the shape of the masks or one that broadcasts to it.
        BF16: whether bf16 patterns are stored.
        DTYPE: the stored dtype: int16 for bf16, else fp16 or fp32.
    """
    wrong = (bits & 0x7F80) == 0x7F80
    if BF16:
        plus = bits.to(DTYPE)
        minus = (bits | 0x8000).to(DTYPE)
        zero = tl.where(wrong, 0x7FC0, 0).to(DTYPE)
    else:
        plus = widen_bits(bits).to(DTYPE)
        minus = 0.0 - plus  # +0.0 if a scale underflows in fp16
        zero = tl.where(wrong, float("nan"), 0.0).to(DTYPE)
    return tl.where(positive, plus, tl.where(negative, minus, zero))


@triton.jit
def beyond(w, bound, UPPER: tl.constexpr):
    """Returns whether w takes the upper of two levels; false for NaN."""
    if UPPER:
        return w >= bound
    else:
        return w > bound


@triton.jit
def of_space(w, bits, SPACE: tl.constexpr, GIVEN: tl.constexpr, BF16: tl.constexpr, DTYPE: tl.constexpr):
    """Returns level times scale in a quantization space, in stored form.

    Args:
        w: the weights, fp32 ``[UNITS, SIZE]``.
        bits: the bits of the scales, int32 ``[UNITS, 1]``.
        SPACE: the table of the space, encoded by :func:`~bitcpm_megatron.ops.triton.launch.space_number`; 0 for
            ternary.
        GIVEN: whether the scales are given, and not the weight's own.
        BF16: whether bf16 patterns are stored.
        DTYPE: the stored dtype: int16 for bf16, else fp16 or fp32.
    """
    if SPACE == 0:
        return ternary(w, bits, GIVEN, BF16, DTYPE)
    else:
        s = widen_bits(bits)
        # The selection runs on levels in the layout of the tile. Values per group would have the layout of the scales,
        # with one row per thread.
        level = tl.zeros_like(w) + (((SPACE >> 3) & 15) * 0.5 - 4)
        for k in tl.static_range(SPACE & 7):
            field = SPACE >> (7 + 9 * k)
            bound = s * ((field & 15) * 0.5 - 4)
            level = tl.where(beyond(w, bound, (field >> 4) & 1), ((field >> 5) & 15) * 0.5 - 4, level)
        magnitude = tl.abs(level) * s
        finite = (w == w) & ((bits & 0x7F80) != 0x7F80)
        if BF16:
            pattern = rounded_bits(magnitude)
            pattern = tl.where((level < 0) & (pattern != 0), pattern | 0x8000, pattern)
            return tl.where(finite, pattern, 0x7FC0).to(DTYPE)
        else:
            value = magnitude.to(DTYPE)
            value = tl.where(level < 0, 0.0 - value, value)  # +0.0 if it underflows in fp16
            return tl.where(finite, value, float("nan")).to(DTYPE)


@triton.jit
def ternary(w, bits, GIVEN: tl.constexpr, BF16: tl.constexpr, DTYPE: tl.constexpr):
    """Returns sign(w) * (|w| > s/2) * s in stored form.

    Args:
        w: the weights, fp32 ``[UNITS, SIZE]``.
        bits: the bits of the scales, int32 ``[UNITS, 1]``.
        GIVEN: whether the scales are given, and not the weight's own.
        BF16: whether bf16 patterns are stored.
        DTYPE: the stored dtype: int16 for bf16, else fp16 or fp32.
    """
    # Under a scale that is NaN or infinite, both comparisons are false.
    half = widen_bits(bits) * 0.5
    values = stored_values(w > half, w < -half, bits, BF16, DTYPE)
    if GIVEN:  # an own scale is NaN if a weight is
        nan = tl.where(bits == bits, 0x7FC0 if BF16 else float("nan"), 0).to(DTYPE)
        values = tl.where(w == w, values, nan)
    return values

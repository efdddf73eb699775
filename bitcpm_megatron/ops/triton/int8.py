# SPDX-License-Identifier: Apache-2.0
"""Kernels around an int8 GEMM: one program per token over its input, and one per token over its sums."""

import triton
import triton.language as tl

from .arithmetic import widen


@triton.jit
def _rounded(value):
    """Returns the nearest integer of a number below 2**22, half to even: 1.5 * 2**23 leaves no bits for a fraction."""
    return (value + 12582912.0) - 12582912.0


@triton.jit
def _stored(value, BF16: tl.constexpr, DTYPE: tl.constexpr):
    """Returns fp32 in the stored dtype, rounded half to even; bf16 as its int16 pattern."""
    if BF16:
        bits = value.to(tl.int32, bitcast=True)
        return tl.where(value == value, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0).to(DTYPE)
    else:
        return value.to(DTYPE)


@triton.jit
def _values(x, factors, offset, column, width, FACTORS: tl.constexpr, BF16: tl.constexpr):
    inside = column < width
    values = widen(tl.load(x + offset + column, mask=inside, other=0), BF16)
    if FACTORS:
        values = values * tl.load(factors + column, mask=inside, other=0)
    return values


@triton.jit
def quantize_tokens(
    x,
    factors,
    fake,
    codes,
    scales,
    width,
    eps,
    FACTORS: tl.constexpr,
    FAKE: tl.constexpr,
    BF16: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Quantizes one token of ``[tokens, width]`` to int8 under one scale, as ``integer_activations`` does.

    Args:
        x: the activations, contiguous ``[tokens, width]``; bf16 as int16 patterns.
        factors: fp32 ``[width]``, multiplied with every token first; read if FACTORS.
        fake: the values that codes and scale represent, in the form of ``x``; written if FAKE.
        codes: the codes, int8 ``[tokens, width]``, written.
        scales: the scales, fp32 ``[tokens]``, written.
        width: the number of features of a token.
        eps: the lower bound of a scale.
        FACTORS: whether there are factors.
        FAKE: whether the values are wanted.
        BF16: whether ``x`` is bf16.
        BLOCK: the number of features per step.
    """
    token = tl.program_id(0)
    offset = token.to(tl.int64) * width
    most = tl.zeros([BLOCK], dtype=tl.int32)
    for first in range(0, width, BLOCK):
        values = _values(x, factors, offset, first + tl.arange(0, BLOCK), width, FACTORS, BF16)
        # Magnitudes are ordered like their bits as integers; NaN is larger than all numbers.
        most = tl.maximum(most, values.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    largest = tl.max(most, axis=0).to(tl.float32, bitcast=True)
    s = tl.where(largest < eps, eps, largest)
    tl.store(scales + token, s)
    finite = s - s == 0.0
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < width
        values = _values(x, factors, offset, column, width, FACTORS, BF16)
        levels = tl.where(finite, _rounded(tl.div_rn(values, tl.where(finite, s, 1.0)) * 127.0), 0.0)
        tl.store(codes + offset + column, levels.to(tl.int8), mask=inside)
        if FAKE:
            # 0 times a scale that is not finite is NaN, as in the reference.
            made = tl.div_rn(levels * s, 127.0) + 0.0
            tl.store(fake + offset + column, _stored(made, BF16, fake.dtype.element_ty), mask=inside)


@triton.jit
def scale_sums(
    sums,
    columns,
    scales,
    out,
    width,
    COLUMNS: tl.constexpr,
    BF16: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Scales one row of int32 sums ``[tokens, width]``, as the reference of the same name does.

    Args:
        sums: the sums of products of codes, int32 ``[tokens, width]``, contiguous.
        columns: the scales of the columns, fp32 ``[width]``; read if COLUMNS.
        scales: the scales of the tokens, fp32 ``[tokens]``.
        out: the result, ``[tokens, width]``, written; bf16 as int16 patterns.
        width: the number of columns.
        COLUMNS: whether the columns have scales.
        BF16: whether the result is bf16.
        BLOCK: the number of columns per step.
    """
    token = tl.program_id(0)
    offset = token.to(tl.int64) * width
    s = tl.div_rn(tl.load(scales + token), 127.0)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < width
        values = tl.load(sums + offset + column, mask=inside, other=0).to(tl.float32)
        if COLUMNS:
            values = values * tl.load(columns + column, mask=inside, other=0)
        tl.store(out + offset + column, _stored(values * s, BF16, out.dtype.element_ty), mask=inside)

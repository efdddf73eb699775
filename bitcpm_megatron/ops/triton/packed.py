# SPDX-License-Identifier: Apache-2.0
"""Kernels for codes in 2 bits, in the layout of :mod:`bitcpm_megatron.quantization.packing`, and for their changes."""

import triton
import triton.language as tl

from .arithmetic import stored_values, widen, widen_bits


@triton.jit
def pack_codes(
    weight,
    scales,
    packed,
    previous,
    counts,
    rows,
    columns,
    blocks,
    groups,
    group,
    BF16: tl.constexpr,
    COMPARE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Packs the codes of ``[rows, columns]`` under given scales, and counts them.

    Args:
        weight: the weight, contiguous ``[rows, columns]``; bf16 as int16 patterns.
        scales: int16 patterns of bf16, ``[rows, groups]``.
        packed: the packed codes, uint8 ``[rows, blocks * 32]``, written.
        previous: earlier packed codes in the same form; read if COMPARE.
        counts: int32 ``[programs, 2]``, written: codes that are not zero, codes that differ from ``previous``.
        rows: the number of rows of the weight.
        columns: the number of columns of the weight.
        blocks: the number of blocks of 128 codes in a row.
        groups: the number of scales per row.
        group: the elements per scale: any number if there is one group, else a multiple of 32.
        BF16: whether the weight is bf16.
        COMPARE: whether there are previous codes.
        BLOCKS: the number of blocks per program and step.
    """
    block = tl.arange(0, BLOCKS)[:, None, None]
    field = tl.arange(0, 4)[None, :, None]
    byte = tl.arange(0, 32)[None, None, :]
    nonzero = tl.zeros([BLOCKS, 4, 32], tl.int32)
    changed = tl.zeros([BLOCKS, 4, 32], tl.int32)
    for step in range(tl.program_id(0), tl.cdiv(rows * blocks, BLOCKS), tl.num_programs(0)):
        # Blocks are numbered through all rows.
        index = step * BLOCKS + block
        known = index < rows * blocks
        row = index // blocks
        first = (index - row * blocks) * 128 + field * 32
        inside = known & (first + byte < columns)
        w = widen(tl.load(weight + (row.to(tl.int64) * columns + first + byte), mask=inside, other=0), BF16)
        # 32 neighbors share one scale.
        own = known & (first < columns)
        bits = tl.load(scales + row * groups + first // group, mask=own, other=0).to(tl.int32) & 0xFFFF
        half = widen_bits(bits) * 0.5
        pattern = (w > half).to(tl.int32) - (w < -half).to(tl.int32) + 1
        offset = index.to(tl.int64) * 32 + byte
        fields = tl.sum(pattern << (field * 2), axis=1, keep_dims=True)
        tl.store(packed + offset, fields.to(tl.uint8), mask=known)
        nonzero += (inside & (pattern != 1)).to(tl.int32)
        if COMPARE:
            before = (tl.load(previous + offset, mask=known, other=0).to(tl.int32) >> (field * 2)) & 3
            changed += (inside & (pattern != before)).to(tl.int32)
    here = counts + tl.program_id(0) * 2
    tl.store(here, tl.sum(tl.reshape(nonzero, [BLOCKS * 128]), axis=0))
    tl.store(here + 1, tl.sum(tl.reshape(changed, [BLOCKS * 128]), axis=0))


@triton.jit
def unpack_weight(
    packed,
    scales,
    quantized,
    rows,
    columns,
    blocks,
    groups,
    group,
    BF16: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Writes the weight ``[rows, columns]`` of packed codes and scales; arguments as for :func:`pack_codes`."""
    block = tl.arange(0, BLOCKS)[:, None, None]
    field = tl.arange(0, 4)[None, :, None]
    byte = tl.arange(0, 32)[None, None, :]
    for step in range(tl.program_id(0), tl.cdiv(rows * blocks, BLOCKS), tl.num_programs(0)):
        index = step * BLOCKS + block
        known = index < rows * blocks
        row = index // blocks
        first = (index - row * blocks) * 128 + field * 32
        fields = tl.load(packed + (index.to(tl.int64) * 32 + byte), mask=known, other=0).to(tl.int32)
        pattern = (fields >> (field * 2)) & 3
        own = known & (first < columns)
        bits = tl.load(scales + row * groups + first // group, mask=own, other=0).to(tl.int32) & 0xFFFF
        finite = (bits & 0x7F80) != 0x7F80
        values = stored_values(finite & (pattern > 1), finite & (pattern < 1), bits, BF16, quantized.dtype.element_ty)
        target = quantized + (row.to(tl.int64) * columns + first + byte)
        tl.store(target, values, mask=known & (first + byte < columns))

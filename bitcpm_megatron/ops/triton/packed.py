# SPDX-License-Identifier: Apache-2.0
"""The kernel that unpacks codes in 2 bits, in the layout of :mod:`bitcpm_megatron.quantization.packing`."""

import triton
import triton.language as tl

from .arithmetic import stored_values


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
    """Writes the weight ``[rows, columns]`` of packed codes and scales.

    Args:
        packed: the packed codes, uint8 ``[rows, blocks * 32]``.
        scales: int16 patterns of bf16, ``[rows, groups]``.
        quantized: the weight, ``[rows, columns]``, written; bf16 as int16 patterns.
        rows: the number of rows of the weight.
        columns: the number of columns of the weight.
        blocks: the number of blocks of 128 codes in a row.
        groups: the number of scales per row.
        group: the elements per scale: any number if there is one group, else a multiple of 32.
        BF16: whether the weight is bf16.
        BLOCKS: the number of blocks per program and step.
    """
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

# SPDX-License-Identifier: Apache-2.0
"""x W^T of few tokens and a packed ternary weight, in Triton; each program computes some rows for one token."""

import contextlib

import torch
import triton
import triton.language as tl

from ...ops.triton.arithmetic import widen, widen_bits

_ROWS, _INTERPRETED_ROWS = 8, 128


@triton.jit
def packed_product(
    x,
    packed,
    scales,
    y,
    rows,
    columns,
    blocks,
    groups,
    group,
    BF16: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Multiplies ROWS rows of a weight ``[rows, columns]`` with one token, summed in fp32.

    Args:
        x: the activations ``[tokens, columns]``, contiguous; bf16 numbers as int16 bit patterns, else fp32.
        packed: the codes, uint8 ``[rows, blocks * 32]``.
        scales: the scales ``[rows, groups]``, bf16 numbers as int16 bit patterns.
        y: the output, fp32 ``[tokens, rows]``.
        rows: the number of rows of the weight.
        columns: the number of columns of the weight.
        blocks: the number of blocks of 128 codes in a row.
        groups: the number of scales per row.
        group: the number of elements per scale: any number with one group, else a multiple of 32.
        BF16: whether x is bf16.
        ROWS: the number of rows that a program computes.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None, None]
    token = tl.program_id(1).to(tl.int64)
    field = tl.arange(0, 4)[None, :, None]
    byte = tl.arange(0, 32)[None, None, :]
    known = row < rows
    sums = tl.zeros([ROWS, 4, 32], tl.float32)
    for block in range(0, blocks):
        first = block * 128 + field * 32
        own = first < columns
        values = widen(tl.load(x + token * columns + first + byte, mask=first + byte < columns, other=0), BF16)
        fields = tl.load(packed + (row.to(tl.int64) * blocks + block) * 32 + byte, mask=known, other=0).to(tl.int32)
        codes = ((fields >> (field * 2)) & 3) - 1
        bits = tl.load(scales + row * groups + first // group, mask=known & own, other=0).to(tl.int32) & 0xFFFF
        sums += values * (codes.to(tl.float32) * widen_bits(bits))
    total = tl.sum(tl.reshape(sums, [ROWS, 128]), axis=1)
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(y + token * rows + place, total, mask=place < rows)


def launch(x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Launches the kernel, and returns x W^T ``[tokens, rows]`` in the dtype of x.

    The arguments are those of ``multiply`` in :class:`~.reference.PackedKernels`.
    """
    (tokens, columns), rows = x.shape, packed.shape[0]
    y = torch.empty(tokens, rows, dtype=torch.float32, device=x.device)
    interpreted = not isinstance(packed_product, triton.JITFunction)
    size = _INTERPRETED_ROWS if interpreted else _ROWS
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        packed_product[(triton.cdiv(rows, size), tokens)](
            x.view(torch.int16) if x.dtype == torch.bfloat16 else x,
            packed,
            scales.view(torch.int16),
            y,
            rows,
            columns,
            packed.shape[1] // 32,
            scales.shape[1],
            columns // scales.shape[1],
            BF16=x.dtype == torch.bfloat16,
            ROWS=size,
        )
    return y.to(x.dtype)

# SPDX-License-Identifier: Apache-2.0
"""Codes in 2 bits: the layout that the kernels, the cache of codes and the packed files share.

A row of codes is cut into blocks of 128; the last one is filled up with code 0. A block becomes 32 bytes, of ternary
codes, whose lowest is -1:

    byte[i] = (code[i] + 1) | (code[32 + i] + 1) << 2 | (code[64 + i] + 1) << 4 | (code[96 + i] + 1) << 6

so that a vector unit works on 32 neighbours at a time and moves nothing between lanes. Bit pattern 3 does not occur.
The other spaces count their codes from the lowest one, too: those of four levels use all patterns, and five levels take
4 bits, so that a block has 64 codes and ``byte[i] = (code[i] + 2) | (code[32 + i] + 2) << 4``.
"""

import torch

from .spaces import TERNARY, Space

BLOCK_CODES = 128
"""Of 2 bits."""
BLOCK_BYTES = 32


def packed_size(in_features: int, space: Space = TERNARY) -> int:
    """Bytes of a packed row."""
    return -(-in_features // (_fields(space) * BLOCK_BYTES)) * BLOCK_BYTES


def _fields(space: Space) -> int:
    """Codes per byte."""
    return 8 // space.code_bits


def pack(codes: torch.Tensor, space: Space = TERNARY) -> torch.Tensor:
    """Packs codes.

    Args:
        codes: int8 ``[out, in]``, of a space: for ternary -1, 0 and 1.
        space: whose codes they are.

    Returns:
        uint8 ``[out, ceil(in / 128) * 32]``, contiguous; of five levels ``[out, ceil(in / 64) * 32]``.

    Raises:
        ValueError: another shape or dtype, or a code that the space does not have.
    """
    if codes.dim() != 2 or codes.dtype != torch.int8 or codes.numel() == 0:
        raise ValueError(f"codes of shape {tuple(codes.shape)}, {codes.dtype}: pass int8 codes [out, in], not empty")
    lowest, highest = (int(v) for v in torch.aminmax(codes))
    known = range(space.lowest_code, space.lowest_code + len(space.levels))
    if lowest < known[0] or highest > known[-1]:
        raise ValueError(f"codes from {lowest} to {highest}: only {', '.join(map(str, known))} can be packed")
    rows, columns = codes.shape
    blocks, per_byte = packed_size(columns, space) // BLOCK_BYTES, _fields(space)
    fields = codes.new_full((rows, blocks * per_byte * BLOCK_BYTES), -space.lowest_code, dtype=torch.uint8)
    fields[:, :columns] = codes - space.lowest_code
    fields = fields.view(rows, blocks, per_byte, BLOCK_BYTES)
    packed = fields[:, :, 0].clone()
    for j in range(1, per_byte):
        packed |= fields[:, :, j] << space.code_bits * j
    return packed.view(rows, -1)


def unpack(packed: torch.Tensor, in_features: int, space: Space = TERNARY) -> torch.Tensor:
    """The codes that :func:`pack` packed.

    Args:
        packed: uint8 ``[out, bytes]``.
        in_features: codes per row.
        space: whose codes they are.

    Returns:
        int8 ``[out, in_features]``, contiguous.

    Raises:
        ValueError: another shape or dtype; a bit pattern that is no code, or a code other than 0 behind the end of a
            row: these bytes are not packed codes, or the row has another length.
    """
    shape = tuple(packed.shape)
    if packed.dim() != 2 or packed.dtype != torch.uint8 or packed.numel() == 0:
        raise ValueError(f"packed codes of shape {shape}, {packed.dtype}: pass uint8 [out, bytes], not empty")
    if in_features < 1 or shape[1] != packed_size(in_features, space):
        raise ValueError(
            f"packed codes of shape {shape} do not hold rows of {in_features}: "
            f"that takes [out, {packed_size(max(in_features, 0), space)}]"
        )
    blocks = packed.reshape(shape[0], -1, 1, BLOCK_BYTES)
    mask = (1 << space.code_bits) - 1
    patterns = torch.cat([blocks >> space.code_bits * j & mask for j in range(_fields(space))], dim=2)
    if (highest := int(patterns.max())) >= len(space.levels):
        raise ValueError(
            f"packed codes of shape {shape} have the bit pattern {highest}, which is no code: they are damaged"
        )
    codes = patterns.view(torch.int8).add_(space.lowest_code).view(shape[0], -1)
    if codes[:, in_features:].any():
        raise ValueError(f"packed codes of shape {shape} go on behind {in_features} codes: their rows are longer")
    return codes[:, :in_features].contiguous()

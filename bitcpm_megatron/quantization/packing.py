# SPDX-License-Identifier: Apache-2.0
"""Packed codes of 2 or 4 bits: the layout that the kernels, the cache of codes and the packed files share.

A row of codes is cut into blocks of 128; the last one is filled up with code 0. A block of ternary codes, the lowest of
which is -1, becomes 32 bytes:

    byte[i] = (code[i] + 1) | (code[32 + i] + 1) << 2 | (code[64 + i] + 1) << 4 | (code[96 + i] + 1) << 6

In this layout a vector unit works on 32 neighbors at a time and moves nothing between lanes. Bit pattern 3 does not
occur. In the other spaces, codes are also counted from the lowest one. A space of four levels uses all patterns. Codes
of five levels take 4 bits, so that a block has 64 codes and ``byte[i] = (code[i] + 2) | (code[32 + i] + 2) << 4``.
"""

import torch

from .spaces import TERNARY, Space

BLOCK_BYTES = 32


def packed_size(in_features: int, space: Space = TERNARY) -> int:
    """Returns the number of bytes of a packed row of ``in_features`` codes."""
    return -(-in_features // (_fields(space) * BLOCK_BYTES)) * BLOCK_BYTES


def _fields(space: Space) -> int:
    """Returns the number of codes per byte."""
    return 8 // space.code_bits


def pack(codes: torch.Tensor, space: Space = TERNARY) -> torch.Tensor:
    """Packs codes.

    Args:
        codes: the codes, int8 ``[out, in]``; for ternary -1, 0 and 1.
        space: the space that the codes belong to.

    Returns:
        The packed codes, uint8 ``[out, ceil(in / 128) * 32]``, contiguous; for five levels
        ``[out, ceil(in / 64) * 32]``.

    Raises:
        ValueError: if the codes have another shape or dtype, or one of them is not a code of the space.
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
    """Returns the codes that :func:`pack` packed.

    Args:
        packed: the packed codes, uint8 ``[out, bytes]``.
        in_features: the number of codes per row.
        space: the space that the codes belong to.

    Returns:
        The codes, int8 ``[out, in_features]``, contiguous.

    Raises:
        ValueError: if the packed codes have another shape or dtype, contain a bit pattern that is not a code, or have a
            code other than 0 after the end of a row: these bytes are not packed codes, or the row has another length.
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

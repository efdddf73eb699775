# SPDX-License-Identifier: Apache-2.0
"""Ternary codes in 2 bits: the layout that the kernels, the cache of codes and the packed files share.

A row of codes is cut into blocks of 128; the last one is filled up with code 0. A block becomes 32 bytes:

    byte[i] = (code[i] + 1) | (code[32 + i] + 1) << 2 | (code[64 + i] + 1) << 4 | (code[96 + i] + 1) << 6

so that a vector unit works on 32 neighbours at a time and moves nothing between lanes. Bit pattern 3 does not occur.
"""

import torch

BLOCK_CODES = 128
BLOCK_BYTES = 32
_FIELDS = BLOCK_CODES // BLOCK_BYTES


def packed_size(in_features: int) -> int:
    """Bytes of a packed row."""
    return -(-in_features // BLOCK_CODES) * BLOCK_BYTES


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Packs codes.

    Args:
        codes: int8 ``[out, in]`` of -1, 0 and 1.

    Returns:
        uint8 ``[out, ceil(in / 128) * 32]``, contiguous.

    Raises:
        ValueError: another shape or dtype, or a code that 2 bits do not hold.
    """
    if codes.dim() != 2 or codes.dtype != torch.int8 or codes.numel() == 0:
        raise ValueError(f"codes of shape {tuple(codes.shape)}, {codes.dtype}: pass int8 codes [out, in], not empty")
    lowest, highest = (int(v) for v in torch.aminmax(codes))
    if lowest < -1 or highest > 1:
        raise ValueError(f"codes from {lowest} to {highest}: only -1, 0 and 1 can be packed")
    rows, columns = codes.shape
    blocks = packed_size(columns) // BLOCK_BYTES
    fields = codes.new_ones(rows, blocks * BLOCK_CODES, dtype=torch.uint8)
    fields[:, :columns] = codes + 1
    fields = fields.view(rows, blocks, _FIELDS, BLOCK_BYTES)
    packed = fields[:, :, 0].clone()
    for j in range(1, _FIELDS):
        packed |= fields[:, :, j] << 2 * j
    return packed.view(rows, -1)


def unpack(packed: torch.Tensor, in_features: int) -> torch.Tensor:
    """The codes that :func:`pack` packed.

    Args:
        packed: uint8 ``[out, ceil(in_features / 128) * 32]``.
        in_features: codes per row.

    Returns:
        int8 ``[out, in_features]``, contiguous.

    Raises:
        ValueError: another shape or dtype; a bit pattern that is no code, or a code other than 0 behind the end of a
            row: these bytes are not packed codes, or the row has another length.
    """
    shape = tuple(packed.shape)
    if packed.dim() != 2 or packed.dtype != torch.uint8 or packed.numel() == 0:
        raise ValueError(f"packed codes of shape {shape}, {packed.dtype}: pass uint8 [out, bytes], not empty")
    if in_features < 1 or shape[1] != packed_size(in_features):
        raise ValueError(
            f"packed codes of shape {shape} do not hold rows of {in_features}: "
            f"that takes [out, {packed_size(max(in_features, 0))}]"
        )
    if (packed & (packed >> 1) & 0b01010101).any():
        raise ValueError(f"packed codes of shape {shape} have the bit pattern 3, which is no code: they are damaged")
    blocks = packed.reshape(shape[0], -1, 1, BLOCK_BYTES)
    codes = torch.cat([blocks >> 2 * j & 3 for j in range(_FIELDS)], dim=2).view(torch.int8).sub_(1)
    codes = codes.view(shape[0], -1)
    if codes[:, in_features:].any():
        raise ValueError(f"packed codes of shape {shape} go on behind {in_features} codes: their rows are longer")
    return codes[:, :in_features].contiguous()

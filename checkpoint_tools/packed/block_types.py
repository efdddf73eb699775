# SPDX-License-Identifier: Apache-2.0
"""Byte layouts of ternary codes and scales: GGUF's block types, and the words of compressed-tensors.

A block is a fixed number of consecutive elements of a row, with one fp16 scale ``d``; ``t`` is a code: -1, 0 or 1. In
the table, block sizes are in elements, and ``h``, ``m``, ``l`` and ``j`` count from 0. The layouts are those of
llama.cpp's ``ggml/src/ggml-common.h`` and ``ggml-quants.c`` (``dequantize_row_*``):

========  =====  =====  ==============================================================================================
type      block  bytes  layout
========  =====  =====  ==============================================================================================
TQ2_0     256    66     64 bytes, then d; byte ``32 h + m`` holds elements ``128 h + m + 32 l`` at bits ``2 l``: t + 1
TQ1_0     256    54     five (in the last 4 bytes four) codes t + 1 per byte as a number to base 3, then d
Q2_0      64     18     d, then 16 bytes; element j in byte ``j // 4`` at bits ``2 (j % 4)``: t + 1
Q4_0      32     18     d, then 16 bytes; elements 0 to 15 in the low halves, 16 to 31 in the high ones: t + 8
========  =====  =====  ==============================================================================================

No function here searches for a scale: the weights of the training forward pass are packed exactly, or an error is
raised.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..storage.reader import ConversionError

_Pack = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class GgufType:
    """Tensor type of a GGUF file.

    Attributes:
        name: llama.cpp's name of the type.
        number: the number of the type in the file.
        block: the number of elements of a row that are stored together.
        nbytes: the size of a block in bytes.
        pack: a function from codes int8 ``[rows, blocks per row, block]`` and scales fp16 ``[rows, blocks per row]`` to
            uint8 ``[rows, bytes per row]``; None for a type that is not written from ternary codes.
    """

    name: str
    number: int
    block: int
    nbytes: int
    pack: _Pack | None = None

    def row_bytes(self, columns: int) -> int:
        """Returns the bytes of a row, whose length must be a multiple of the block."""
        return columns // self.block * self.nbytes


def split_ternary(name: str, weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Splits rows of a quantized ternary weight into codes and scales.

    Args:
        name: the name of the tensor, for messages.
        weight: rows of the weight of the training forward pass, ``[rows, in]`` with ``in`` input features.
        group: the number of elements per scale.

    Returns:
        The codes, int8 ``[rows, in]``, and the scales, ``[rows, in / group]`` in the weight's dtype; the scale of a
        group of zeros is 0.

    Raises:
        ConversionError: if a group contains two different non-zero magnitudes.
    """
    groups = weight.reshape(weight.shape[0], -1, group)
    scales = groups.abs().amax(-1)
    codes = groups.sign().to(torch.int8)
    if not torch.equal(codes * scales.unsqueeze(-1), groups):
        raise ConversionError(
            f"{name} is not ternary in groups of {group}: its quantizer record and its weights are not of one model"
        )
    return codes.reshape(weight.shape), scales


def pack_blocks(name: str, kind: GgufType, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Packs rows of codes and scales as blocks of a GGUF type.

    Args:
        name: the name of the tensor, for messages.
        kind: a type with a ``pack`` function, whose block divides the group.
        codes: the codes, int8 ``[rows, in]`` with ``in`` input features.
        scales: the scales, ``[rows, groups per row]``.

    Returns:
        The packed rows, uint8 ``[rows, bytes per row]``.

    Raises:
        ConversionError: if fp16 cannot represent a scale exactly.
    """
    assert kind.pack is not None
    rows, columns = codes.shape
    half = scales.to(torch.float16)
    wrong = (half.to(scales.dtype) != scales).nonzero()
    if len(wrong):
        row, group = wrong[0].tolist()
        raise ConversionError(
            f"{name.removesuffix('.weight')}: row {row}, group {group} has the scale {scales[row, group]:.6g}, and the "
            f"fp16 scale of {kind.name} cannot hold it exactly (bf16 values from 7.63e-06 to 65,280 it can): the "
            "nearest exact type is BF16, give --linear-type BF16"
        )
    per_group = columns // kind.block // scales.shape[1]
    return kind.pack(codes.view(rows, -1, kind.block), half.repeat_interleave(per_group, 1))


def _with_scale(quants: torch.Tensor, scales: torch.Tensor, scale_first: bool) -> torch.Tensor:
    parts = [quants, scales.unsqueeze(-1).contiguous().view(torch.uint8)]
    return torch.cat(parts[::-1] if scale_first else parts, -1).flatten(1)


def _fields(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs numbers of a few bits, uint8 ``[..., fields, bytes]``, into ``[..., bytes]``, the first field lowest."""
    packed = values[..., 0, :].clone()
    for number in range(1, values.shape[-2]):
        packed |= values[..., number, :] << bits * number
    return packed


def _tq2_0(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    values = (codes + 1).view(torch.uint8).unflatten(-1, (2, 4, 32))
    return _with_scale(_fields(values, 2).flatten(-2), scales, scale_first=False)


def _q2_0(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    values = (codes + 1).view(torch.uint8).unflatten(-1, (16, 4)).transpose(-1, -2)
    return _with_scale(_fields(values, 2), scales, scale_first=True)


def _q4_0(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    values = (codes + 8).view(torch.uint8).unflatten(-1, (2, 16))
    return _with_scale(_fields(values, 4), scales, scale_first=True)


def _tq1_0(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    digits = (codes + 1).int()
    quants = []
    for part, width in zip(digits.split([160, 80, 16], -1), (32, 16, 4), strict=True):
        number = torch.zeros(*part.shape[:-1], width, dtype=torch.int32)
        for digit in part.unflatten(-1, (-1, width)).unbind(-2):
            number = number * 3 + digit
        # A reader extracts the digits from the most significant one, by multiplying the byte, a fraction of 256, by 3.
        # So the number, of five digits in base 3, is scaled from 243 to 256 and rounded up.
        number = number * (3 if width == 4 else 1)
        quants.append(((number * 256 + 242) // 243).to(torch.uint8))
    return _with_scale(torch.cat(quants, -1), scales, scale_first=False)


def pack_int32(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs rows of codes in the format ``pack-quantized`` of compressed-tensors.

    A code ``t`` is stored as ``t + 2^(bits - 1)``, the first element in the lowest bits of a little-endian word.

    Args:
        codes: the codes, int8 ``[rows, in]``; the number ``in`` of input features is a multiple of ``32 / bits``.
        bits: the number of bits per code, 2 or 4.

    Returns:
        The packed rows, int32 ``[rows, in * bits / 32]``.
    """
    values = (codes + 2 ** (bits - 1)).view(torch.uint8).unflatten(-1, (-1, 8 // bits)).transpose(-1, -2)
    return _fields(values, bits).view(torch.int32)


F32, F16, BF16 = GgufType("F32", 0, 1, 4), GgufType("F16", 1, 1, 2), GgufType("BF16", 30, 1, 2)
TQ2_0, TQ1_0 = GgufType("TQ2_0", 35, 256, 66, _tq2_0), GgufType("TQ1_0", 34, 256, 54, _tq1_0)
Q2_0, Q4_0 = GgufType("Q2_0", 42, 64, 18, _q2_0), GgufType("Q4_0", 2, 32, 18, _q4_0)
Q5_0, Q8_0 = GgufType("Q5_0", 6, 32, 22), GgufType("Q8_0", 8, 32, 34)

GGUF_TYPES = {kind.name: kind for kind in (F32, F16, BF16, TQ2_0, TQ1_0, Q2_0, Q4_0, Q5_0, Q8_0)}
FLOATS = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16}

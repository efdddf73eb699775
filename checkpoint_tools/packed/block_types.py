# SPDX-License-Identifier: Apache-2.0
"""How ternary codes and their scales lie in the bytes of GGUF's block types and of compressed-tensors.

A block is so many neighbours along a row, with one fp16 scale ``d`` of its own; ``t`` is a code, -1, 0 or 1. The
layouts are those of llama.cpp's ``ggml/src/ggml-common.h`` and ``ggml-quants.c`` (``dequantize_row_*``):

========  =====  =====  ==============================================================================================
type      block  bytes  layout
========  =====  =====  ==============================================================================================
TQ2_0     256    66     64 bytes, then d; byte ``32 h + m`` holds elements ``128 h + m + 32 l`` at bits ``2 l``: t + 1
TQ1_0     256    54     five (in the last 4 bytes four) codes t + 1 per byte as a number to base 3, then d
Q2_0      64     18     d, then 16 bytes; element j in byte ``j // 4`` at bits ``2 (j % 4)``: t + 1
Q4_0      32     18     d, then 16 bytes; elements 0 to 15 in the low halves, 16 to 31 in the high ones: t + 8
========  =====  =====  ==============================================================================================

Nothing here searches for a scale: what is packed is the weight of the training forward, or an error.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..storage.reader import ConversionError

_Pack = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class GgufType:
    """A type of tensor in a GGUF file.

    Attributes:
        name: as llama.cpp has it.
        number: in the file.
        block: elements along a row that are stored together.
        nbytes: of a block.
        pack: codes int8 ``[rows, blocks, block]`` and scales fp16 ``[rows, blocks]`` to uint8 ``[rows, bytes]``; None
            for a type that holds no ternary codes, or numbers one by one.
    """

    name: str
    number: int
    block: int
    nbytes: int
    pack: _Pack | None = None

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row, whose length is a multiple of the block."""
        return columns // self.block * self.nbytes


def split_ternary(name: str, weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes and scales of rows that are ternary times scale.

    Args:
        name: of the tensor, for messages.
        weight: ``[rows, in]``, the weight of the training forward.
        group: elements per scale.

    Returns:
        ``codes`` int8 ``[rows, in]`` and ``scales`` ``[rows, in / group]`` in the weight's dtype; the scale of a group
        of zeros is 0.

    Raises:
        ConversionError: a group has two different magnitudes.
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
    """Rows of codes as the bytes of a block type.

    Args:
        name: of the tensor, for messages.
        kind: one with a packer, whose block divides the group.
        codes: int8 ``[rows, in]``.
        scales: ``[rows, groups]``.

    Returns:
        uint8 ``[rows, bytes]``.

    Raises:
        ConversionError: a scale that fp16 does not hold exactly.
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
    """uint8 ``[..., fields, bytes]`` of small numbers to ``[..., bytes]``, the first field at the lowest bits."""
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
        # A reader takes the digits off the top, by multiplying by 3: of a fraction of 256, rounded up.
        number = number * (3 if width == 4 else 1)
        quants.append(((number * 256 + 242) // 243).to(torch.uint8))
    return _with_scale(torch.cat(quants, -1), scales, scale_first=False)


def pack_int32(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows of codes as compressed-tensors' ``pack-quantized`` has them: ``t + 2^(bits - 1)``, the first element at the
    lowest bits of a little-endian word.

    Args:
        codes: int8 ``[rows, in]``; ``in`` is a multiple of ``32 / bits``.
        bits: 2 or 4.

    Returns:
        int32 ``[rows, in * bits / 32]``.
    """
    values = (codes + 2 ** (bits - 1)).view(torch.uint8).unflatten(-1, (-1, 8 // bits)).transpose(-1, -2)
    return _fields(values, bits).view(torch.int32)


F32, F16, BF16 = GgufType("F32", 0, 1, 4), GgufType("F16", 1, 1, 2), GgufType("BF16", 30, 1, 2)
TQ2_0, TQ1_0 = GgufType("TQ2_0", 35, 256, 66, _tq2_0), GgufType("TQ1_0", 34, 256, 54, _tq1_0)
Q2_0, Q4_0 = GgufType("Q2_0", 42, 64, 18, _q2_0), GgufType("Q4_0", 2, 32, 18, _q4_0)
Q5_0, Q8_0 = GgufType("Q5_0", 6, 32, 22), GgufType("Q8_0", 8, 32, 34)

GGUF_TYPES = {kind.name: kind for kind in (F32, F16, BF16, TQ2_0, TQ1_0, Q2_0, Q4_0, Q5_0, Q8_0)}
FLOATS = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16}

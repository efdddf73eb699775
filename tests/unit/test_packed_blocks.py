# SPDX-License-Identifier: Apache-2.0
"""Tests of the packers of block types against the formats' own packages, for the rows of every preset."""

import pytest
import torch

pytest.importorskip("gguf", reason="pip install 'bitcpm_megatron[export]'")

import gguf
from gguf.quants import dequantize
from test_packed_plan import weights

from bitcpm_megatron.checkpoint_tools.packed.block_types import (
    GGUF_TYPES,
    Q2_0,
    pack_blocks,
    pack_int32,
    split_ternary,
)
from bitcpm_megatron.checkpoint_tools.packed.gguf_file import interleave
from bitcpm_megatron.checkpoint_tools.storage.reader import ConversionError
from bitcpm_megatron.launch.launcher.presets import names


def random_codes(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(-1, 2, (rows, columns), generator=torch.Generator().manual_seed(columns)).to(torch.int8)


def row_lengths() -> list[int]:
    """Returns the row lengths of all linears of all presets."""
    return sorted({w.info.shape[1] for preset in names() for w in weights(preset) if w.group is not None})


@pytest.mark.parametrize("columns", row_lengths())
@pytest.mark.parametrize("kind", ["TQ2_0", "TQ1_0", "Q4_0"])
def test_what_is_packed_comes_back(kind: str, columns: int) -> None:
    """This holds for whole rows, 2, 4 and 8 row-parallel shards, and every group size that a block divides."""
    known, codes, tried = GGUF_TYPES[kind], random_codes(3, columns), 0
    for group in (columns, columns // 2, columns // 4, columns // 8, 256, 128, 64, 32):
        if columns % group or group % known.block:
            continue
        tried += 1
        scales = torch.rand(3, columns // group, generator=torch.Generator().manual_seed(group)).bfloat16() + 1e-5
        scales[1, 0] = 0
        packed = pack_blocks("w", known, codes, scales)
        assert packed.shape == (3, known.row_bytes(columns))
        found = torch.from_numpy(dequantize(packed.numpy(), gguf.GGMLQuantizationType(known.number)))
        assert torch.equal(found, codes * scales.float().repeat_interleave(group, 1))
    assert tried or columns % known.block


def test_a_block_of_q2_0_by_hand() -> None:
    """llama.cpp's ``block_q2_0`` has an fp16 scale, then element j, as code + 1, in byte j // 4 at bits 2 (j % 4)."""
    codes = torch.zeros(1, 64, dtype=torch.int8)
    codes[0, 0], codes[0, 3], codes[0, 5] = 1, -1, 1
    packed = pack_blocks("w", Q2_0, codes, torch.tensor([[1.0]]))
    assert packed[0].tolist() == [0x00, 0x3C, 0b00_01_01_10, 0b01_01_10_01, *[0b01_01_01_01] * 14]


@pytest.mark.parametrize("columns", row_lengths())
@pytest.mark.parametrize("bits", [2, 4])
def test_words_are_those_of_compressed_tensors(bits: int, columns: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = random_codes(3, columns)
    packed = pack_int32(codes, bits)
    assert torch.equal(packed, helpers.pack_to_int32(codes, bits))
    assert torch.equal(helpers.unpack_from_int32(packed, bits, codes.shape), codes)


@pytest.mark.parametrize("bits", range(7, 16))
def test_every_bf16_scale_that_fp16_holds_is_taken_and_no_other(bits: int) -> None:
    """All bf16 values with an exponent at either end of fp16's range are exact or refused."""
    for exponent in (-(bits + 10), bits):
        scales = (torch.arange(128, 256).float() * 2.0 ** (exponent - 7)).bfloat16().unsqueeze(1)
        codes, exact = torch.ones(128, 32, dtype=torch.int8), scales.half().float() == scales.float()
        for row in (0, 1, 64, 127):
            if exact[row]:
                packed = pack_blocks("w", GGUF_TYPES["Q4_0"], codes[row : row + 1], scales[row : row + 1])
                assert packed[0, :2].view(torch.float16).float() == scales[row].float()
            else:
                with pytest.raises(ConversionError, match="row 0, group 0 has the scale"):
                    pack_blocks("w", GGUF_TYPES["Q4_0"], codes[row : row + 1], scales[row : row + 1])
        assert bool(exact.all()) == (exponent >= -17), "down to 2**-17 all of them, below only those with fewer bits"


def test_weights_with_two_magnitudes_in_a_group_are_refused() -> None:
    weight = random_codes(2, 64).float() * torch.tensor([0.5, 0.25]).repeat_interleave(32)
    codes, scales = split_ternary("w", weight, 32)
    assert torch.equal(codes.float().unflatten(1, (2, 32)) * scales.unsqueeze(-1), weight.unflatten(1, (2, 32)))
    with pytest.raises(ConversionError, match="w is not ternary in groups of 64"):
        split_ternary("w", weight, 64)


def test_rotary_pairs_become_neighbors() -> None:
    rows = torch.arange(12).unsqueeze(1)
    assert interleave(rows, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]

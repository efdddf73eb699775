# SPDX-License-Identifier: Apache-2.0
"""Tests of packed codes: the layout, byte by byte, and exact unpacking."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitcpm_megatron.quantization import pack, packed_size, unpack


def by_hand(codes: np.ndarray) -> np.ndarray:
    """Packs codes byte by byte, in the layout that the docstring of the packing module describes."""
    rows, columns = codes.shape
    blocks = -(-columns // 128)
    out = np.zeros((rows, blocks * 32), dtype=np.uint8)
    for row in range(rows):
        for byte in range(blocks * 32):
            for j in range(4):
                column = byte // 32 * 128 + 32 * j + byte % 32
                code = int(codes[row, column]) if column < columns else 0
                out[row, byte] += (code + 1) * 4**j
    return out


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 3), columns=st.integers(1, 400), seed=st.integers(0, 2**32 - 1))
def test_layout_and_inverse(rows: int, columns: int, seed: int) -> None:
    codes = torch.randint(-1, 2, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    before = codes.clone()
    packed = pack(codes)
    assert packed.dtype == torch.uint8 and packed.is_contiguous()
    assert np.array_equal(packed.numpy(), by_hand(codes.numpy()))
    found = unpack(packed, columns)
    assert found.dtype == torch.int8 and found.is_contiguous()
    assert torch.equal(found, codes) and torch.equal(codes, before)
    assert torch.equal(pack(found), packed)


@settings(max_examples=100, deadline=None)
@given(data=st.binary(min_size=32, max_size=32), in_features=st.integers(1, 128))
def test_bytes_are_codes_or_refused(data: bytes, in_features: int) -> None:
    packed = torch.tensor(list(data), dtype=torch.uint8).reshape(1, 32)
    try:
        codes = unpack(packed, in_features)
    except ValueError:
        fields = np.frombuffer(data, np.uint8)[None, :] >> np.array([[0], [2], [4], [6]]) & 3
        assert (fields == 3).any() or (fields.reshape(-1)[in_features:] != 1).any()
    else:
        assert torch.equal(pack(codes), packed)


@pytest.mark.parametrize("columns", [1, 31, 32, 127, 128, 129, 4096])
def test_any_layout_in_memory(columns: int) -> None:
    codes = torch.randint(-1, 2, (columns, 5)).to(torch.int8).t()
    assert torch.equal(pack(codes), pack(codes.contiguous()))
    packed = pack(codes).repeat_interleave(2, 1)[:, ::2]
    assert torch.equal(unpack(packed, columns), codes)
    assert packed_size(columns) == packed.shape[1]


@pytest.mark.parametrize("code", [-128, -2, 2, 3, 127])
def test_other_codes_are_refused(code: int) -> None:
    codes = torch.zeros(3, 130, dtype=torch.int8)
    codes[2, 129] = code
    with pytest.raises(ValueError, match=rf"codes from {min(code, 0)} to {max(code, 0)}: only -1, 0, 1 can"):
        pack(codes)


@pytest.mark.parametrize(
    "codes",
    [
        torch.zeros(128, dtype=torch.int8),
        torch.zeros(0, 128, dtype=torch.int8),
        torch.zeros(2, 128),
        torch.zeros(2, 128, dtype=torch.uint8),
    ],
)
def test_bad_codes(codes: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"pass int8 codes \[out, in\]"):
        pack(codes)


@pytest.mark.parametrize(
    ("packed", "in_features", "cure"),
    [
        (torch.zeros(32, dtype=torch.uint8), 128, r"\(32,\).*pass uint8 \[out, bytes\]"),
        (torch.zeros(0, 32, dtype=torch.uint8), 128, r"\(0, 32\).*not empty"),
        (torch.zeros(2, 32, dtype=torch.int8), 128, r"int8.*pass uint8"),
        (torch.zeros(2, 32, dtype=torch.uint8), 129, r"rows of 129: that takes \[out, 64\]"),
        (torch.zeros(2, 64, dtype=torch.uint8), 128, r"rows of 128: that takes \[out, 32\]"),
        (torch.zeros(2, 32, dtype=torch.uint8), 0, r"rows of 0"),
        (torch.zeros(2, 32, dtype=torch.uint8), -5, r"rows of -5"),
    ],
)
def test_bad_packed_codes(packed: torch.Tensor, in_features: int, cure: str) -> None:
    with pytest.raises(ValueError, match=cure):
        unpack(packed, in_features)


@pytest.mark.parametrize("field", range(4))
def test_the_fourth_bit_pattern_is_refused(field: int) -> None:
    packed = pack(torch.zeros(2, 128, dtype=torch.int8))
    packed[1, 17] |= 3 << 2 * field
    with pytest.raises(ValueError, match="bit pattern 3.*damaged"):
        unpack(packed, 128)


def test_codes_behind_the_end_are_refused() -> None:
    packed = pack(torch.ones(1, 128, dtype=torch.int8))
    with pytest.raises(ValueError, match="go on behind 127 codes"):
        unpack(packed, 127)

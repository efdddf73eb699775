# SPDX-License-Identifier: Apache-2.0
"""Tests of recognizing fused weights, against an oracle in numpy that counts distinct magnitudes in every group."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitcpm_megatron.quantization import QuantizerConfig, fused_group_size, fused_space, quantize_dequantize

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTEGER_OF = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def oracle(weight: torch.Tensor) -> int | None:
    w = np.abs(weight.double().numpy())
    columns = w.shape[1]
    for group in [columns, *(g for g in range(columns - 1, 31, -1) if columns % g == 0 and g % 32 == 0)]:
        if all(len(set(row[row != 0])) <= 1 for row in w.reshape(-1, group)):
            return -1 if group == columns else group
    return None


def latent(rows: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


@settings(max_examples=150, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 40),
    columns=st.sampled_from([32, 64, 96, 192, 384, 1024]),
    pick=st.integers(0, 100),
    seed=st.integers(0, 2**31),
)
def test_every_group_size_is_found(dtype, rows, columns, pick, seed) -> None:
    groups = [-1, *(g for g in range(32, columns, 32) if columns % g == 0)]
    group = groups[pick % len(groups)]
    w = latent(rows, columns, dtype, seed)
    fused = quantize_dequantize(w, QuantizerConfig(group_size=group))[0]
    found = fused_group_size(fused)
    assert found == oracle(fused)
    # If neighboring groups have the same scale, a larger group size fits, too.
    assert found == -1 or (group != -1 and found % group == 0)
    assert fused_group_size(w) is None
    assert fused_group_size(-fused.t().contiguous().t()) == found, "layout and sign do not matter"


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    codes=st.lists(st.integers(-1, 1), min_size=192, max_size=192),
    scales=st.lists(st.sampled_from([1.0, 1.0, 2.0, 0.0]), min_size=6, max_size=6),
    odd=st.one_of(st.none(), st.tuples(st.integers(0, 191), st.floats(0.125, 4.0, width=16))),
)
def test_agrees_with_counting(dtype, codes, scales, odd) -> None:
    w = torch.tensor(codes).reshape(6, 32) * torch.tensor(scales).reshape(6, 1)
    if odd is not None:
        w.view(-1)[odd[0]] = odd[1]
    for shape in ((1, 192), (2, 96), (3, 64), (6, 32), (192 // 48, 48), (4, 48)):
        cast = w.reshape(shape).to(dtype)
        assert fused_group_size(cast) == oracle(cast)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", [(0, 0), (5, 77), (999, 1023)])
def test_one_step_of_one_value_is_noticed(dtype, where) -> None:
    """The value may be anywhere, such as in the last of several blocks of rows, and the difference may be subnormal."""
    for magnitude in (1.0, float(torch.finfo(dtype).smallest_normal)):
        w = torch.full((1000, 1024), magnitude, dtype=dtype)
        assert fused_group_size(w) == -1
        w[where] = (w[where].view(INTEGER_OF[dtype]) + 1).view(dtype)
        assert fused_group_size(w) is None


def test_a_smaller_group_in_the_last_rows_decides() -> None:
    w = torch.ones(1000, 1024, dtype=torch.bfloat16)
    w[998, :512] = 2.0
    assert fused_group_size(w) == 512
    w[999, :384] = 2.0
    assert fused_group_size(w) == 128


@pytest.mark.parametrize("dtype", DTYPES)
def test_edges(dtype) -> None:
    assert fused_group_size(torch.zeros(3, 64, dtype=dtype)) == -1
    assert fused_group_size(-torch.zeros(3, 64, dtype=dtype)) == -1
    single = torch.zeros(3, 64, dtype=dtype)
    single[1, 40] = -0.5
    assert fused_group_size(single) == -1
    assert fused_group_size(torch.tensor([[0.5, -0.5, 0.0]], dtype=dtype)) == -1
    assert fused_group_size(torch.tensor([[0.5, -0.25, 0.0]], dtype=dtype)) is None
    uneven = torch.ones(2, 100, dtype=dtype)
    uneven[0, :50] = 2
    assert fused_group_size(uneven) is None, "32 does not divide the row, so no group but the row is possible"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_not_fused(dtype, bad) -> None:
    for where in (0, 600):
        w = torch.ones(1000, 1024, dtype=dtype)
        w[where, 3] = bad
        assert fused_space(w) is None
    # This holds also in spaces in which a group of such values, or one next to zeros, looks like levels of one scale.
    beside = torch.zeros(2, 64, dtype=dtype)
    beside[1, 5] = bad
    assert fused_space(torch.full((2, 64), bad, dtype=dtype)) is None and fused_space(beside) is None


@pytest.mark.parametrize("bad", [torch.zeros(4), torch.zeros(0, 32), torch.zeros(2, 32, dtype=torch.float64)])
def test_what_no_quantizer_takes_is_refused(bad) -> None:
    with pytest.raises(ValueError):
        fused_group_size(bad)


def test_memory_of_the_weight_is_left_alone() -> None:
    w = latent(64, 64, torch.bfloat16, 1).requires_grad_()
    before = w.detach().clone()
    assert fused_group_size(w) is None
    assert torch.equal(w, before) and w.grad is None

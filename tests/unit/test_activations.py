# SPDX-License-Identifier: Apache-2.0
"""Tests of int8 fake quantization of activations: against a float64 formula, at limits, and in a ternary layer."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitcpm_megatron.ops import fake_quantize_activations

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(DTYPES),
    st.integers(1, 5),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 33),
    st.floats(-3, 3),
    st.integers(0, 2**31),
)
def test_every_value_is_a_level_of_its_token(dtype, tokens, groups, width, exponent, seed) -> None:
    x = (torch.randn(tokens, groups * width, generator=torch.Generator().manual_seed(seed)) * 10**exponent).to(dtype)
    y = fake_quantize_activations(x, groups)
    grouped = x.double().numpy().reshape(tokens, groups, width)
    scale = np.maximum(np.abs(grouped).max(-1, keepdims=True), 1e-5)
    found = y.double().numpy().reshape(grouped.shape)
    levels = found / scale * 127
    # A result differs from its level by one rounding to the input's dtype.
    slack = 127 * torch.finfo(dtype).eps + 127 * torch.finfo(dtype).smallest_normal / scale
    assert np.all(np.abs(levels - np.rint(levels)) <= slack)
    assert np.all(np.abs(np.rint(levels)) <= 127)
    assert np.all(np.abs(levels - grouped / scale * 127) <= 0.5 + slack + 1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes_are_exact_and_zeros_are_plus_zero(dtype) -> None:
    x = torch.tensor([[1.0, -1.0, 0.0, -1e-4], [0.0, -0.0, 0.0, 0.0]], dtype=dtype)
    y = fake_quantize_activations(x)
    assert torch.equal(y, torch.tensor([[1.0, -1.0, 0.0, 0.0], [0.0] * 4], dtype=dtype))
    assert not y[y == 0].signbit().any()


def test_the_gradient_passes_unchanged() -> None:
    x = torch.randn(3, 2, 8, requires_grad=True)
    upstream = torch.randn(3, 2, 8)
    fake_quantize_activations(x).backward(upstream)
    assert torch.equal(x.grad, upstream)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype) -> None:
    x = torch.randn(4, 2, 16, dtype=dtype, requires_grad=True)
    torch.library.opcheck(torch.ops.bitcpm.fake_quantize_activations, (x, 2, 1e-5))


@pytest.mark.parametrize("x", [torch.ones(2, 4, dtype=torch.int8), torch.tensor(1.0), torch.ones(2, 5)])
def test_bad_input_is_refused(x) -> None:
    with pytest.raises(ValueError, match=r"activations of shape .* in 2 groups"):
        fake_quantize_activations(x, 2)


def test_groups_do_not_see_each_other() -> None:
    x = torch.randn(5, 16)
    halves = torch.cat([fake_quantize_activations(h.contiguous()) for h in x.chunk(2, -1)], -1)
    assert torch.equal(fake_quantize_activations(x, 2), halves)
    assert not torch.equal(fake_quantize_activations(x, 1), halves)

# SPDX-License-Identifier: Apache-2.0
"""Tests of the quantizer against a float64 oracle in numpy that shares neither code, form nor precision with it.

Rows "on a boundary" have an absmean within an fp32 rounding error of the midpoint of two bf16 values, so that a sum
in another order gives another scale in about half of them. They are used to test independence of threads, blocks and
shards.
"""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitcpm_megatron import fake_quantize
from bitcpm_megatron.quantization import (
    SPACES,
    QuantizerConfig,
    Space,
    dequantize,
    quantize,
    quantize_dequantize,
    scales_are_finite,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTEGER_OF = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
EPS = 1e-5
BF16_EPS = 1.0013580322265625e-05  # bf16(1e-5), written out
ROUNDING_ULPS = 8  # bound of the error of an fp32 mean that decides a scale, in fp32 ulp


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------------------- oracle


def bf16_nearest(x: np.ndarray) -> np.ndarray:
    """Rounds positive float64 values half to even to 8 significant bits, as float64: bf16 in its normal range."""
    mantissa, exponent = np.frexp(x)
    rounded = np.ldexp(np.rint(mantissa * 256.0), exponent - 8)
    return np.where(rounded >= 2.0**128, np.inf, rounded)


def to_dtype(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Rounds codes times scale to the weight's dtype, as float64; -1, 0 or 1 times bf16 is inexact only in fp16."""
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(np.float64) if dtype == torch.float16 else x


def assert_scales(weight: np.ndarray, scales: np.ndarray, eps: float) -> int:
    """Asserts that scales are bf16(max(mean, eps)) or, at a midpoint, its neighbor; returns the number of neighbors."""
    mean = np.maximum(np.abs(weight).mean(-1), eps)
    expected = bf16_nearest(mean)
    off = np.flatnonzero(scales != expected)
    midpoint = (scales[off] + expected[off]) / 2
    neighbor_step = np.ldexp(1.0, np.frexp(np.minimum(scales[off], expected[off]))[1] - 8)
    assert (np.abs(scales[off] - expected[off]) <= neighbor_step).all(), "a scale is not even a neighbor"
    fp32_ulp = np.ldexp(1.0, np.frexp(midpoint)[1] - 24)
    assert (np.abs(mean[off] - midpoint) <= ROUNDING_ULPS * fp32_ulp).all(), "a scale is off away from a midpoint"
    return len(off)


def check(weight: torch.Tensor, config: QuantizerConfig, given_scales: torch.Tensor | None = None) -> int:
    """Checks everything that is promised about a finite weight, and returns the number of values."""
    before = weight.detach().clone()
    group = weight.shape[1] if config.group_size == -1 else config.group_size
    codes, scales = quantize(weight, config, given_scales)
    fused, fused_scales = quantize_dequantize(weight, config, given_scales)
    decoded = dequantize(codes, scales, config, weight.dtype)

    assert codes.shape == fused.shape == weight.shape
    assert (codes.dtype, scales.dtype, fused.dtype) == (torch.int8, torch.bfloat16, weight.dtype)
    assert scales.shape == (weight.shape[0], weight.shape[1] // group)
    assert codes.is_contiguous() and fused.is_contiguous()
    assert torch.equal(before, weight) and torch.equal(torch.signbit(before), torch.signbit(weight)), "input changed"

    w = before.double().numpy().reshape(-1, group)
    s = scales.double().numpy().reshape(-1, 1)
    if given_scales is None:
        assert_scales(w, s[:, 0], config.eps)
    else:
        assert torch.equal(scales, given_scales)
    assert torch.equal(scales, fused_scales)

    with np.errstate(over="ignore"):
        expected = np.clip(np.rint(w / s), -1, 1)
    assert np.array_equal(codes.numpy().reshape(-1, group), expected)
    assert torch.equal(fused, decoded)
    assert torch.equal(torch.signbit(fused), torch.signbit(decoded))
    assert not torch.signbit(fused[fused == 0]).any(), "-0.0"
    q = fused.double().numpy().reshape(-1, group)
    assert np.array_equal(q, to_dtype(expected * s, weight.dtype))
    assert ((q == 0) | (np.abs(q) == np.abs(q).max(-1, keepdims=True))).all(), "more than 3 values in a group"
    return weight.numel()


# ------------------------------------------------------------------------------------------------------ generators


def gaussian(shape: tuple[int, int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Returns rows of very different magnitude that contain signed zeros."""
    g = torch.Generator().manual_seed(seed)
    magnitude = torch.empty(shape[0], 1).uniform_(-3.0, 3.0, generator=g)
    w = torch.randn(shape, generator=g) * 10**magnitude
    w[:, 3::17] *= 0.0
    return w.to(dtype)


def random_scales(shape: tuple[int, int], seed: int) -> torch.Tensor:
    """Returns bf16 scales from 2**-8 to 2**8, whose halves and doubles are exact in all three dtypes."""
    g = torch.Generator().manual_seed(seed)
    return (2 ** torch.empty(shape).uniform_(-8.0, 8.0, generator=g)).to(torch.bfloat16)


def near(magnitude: torch.Tensor, dtype: torch.dtype, ulps: torch.Tensor) -> torch.Tensor:
    """Returns positive magnitudes plus ``ulps`` units in the last place of ``dtype``."""
    exact = magnitude.to(dtype)
    assert torch.equal(exact.double(), magnitude.double())
    return (exact.view(INTEGER_OF[dtype]) + ulps.to(INTEGER_OF[dtype])).view(dtype)


def ties_of(
    scales: torch.Tensor, group: int, dtype: torch.dtype, thresholds: tuple[float, ...] = (0.5,)
) -> torch.Tensor:
    """Returns ``[scales, group]`` values evenly distributed within 3 ulp of plus or minus a threshold of their scale.

    There is one row of ``group`` values for each scale.
    """
    column = torch.arange(group)
    ulps = ((column // 2) % 7 - 3).expand(scales.numel(), group)
    which = torch.tensor(thresholds)[(column // 14) % len(thresholds)]
    magnitude = scales.reshape(-1, 1).double() * which.double()
    return near(magnitude, dtype, ulps) * (1 - 2 * (column % 2)).to(dtype)


def ties_of_own_scale(scales: torch.Tensor, group: int, dtype: torch.dtype) -> torch.Tensor:
    """Returns rows whose absmean is a given scale s and half of whose values are within 3 ulp of plus or minus s/2.

    The other half is s and 2s in equal parts. The mean is then s, because the ulps cancel in each run of 14 values.
    """
    half = group // 2
    ties = ties_of(scales, half, dtype)
    s = scales.reshape(-1, 1).to(dtype).expand(-1, half // 2)
    return torch.cat([ties, s, -2 * s], dim=1)


def on_boundary(shape: tuple[int, int], seed: int) -> torch.Tensor:
    """Returns fp32 rows whose absmean is within about half an fp32 ulp of the midpoint of two bf16 values."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=g)
    magnitude = w.abs().double()
    s = bf16_nearest(magnitude.mean(-1).numpy())
    midpoint = torch.from_numpy(s + np.ldexp(1.0, np.frexp(s)[1] - 9)).reshape(-1, 1)
    missing = midpoint * shape[1] - magnitude.sum(-1, keepdim=True)
    w[:, :1] = (w[:, :1].abs().double() + missing).float()
    return w


# --------------------------------------------------------------------------------------------------- ten million


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.verifies(
    "quantizer",
    "codes, scales and quantized weights are exact for more than 10 million weights, including ties and their "
    "neighbors",
)
def test_ten_million_random_and_tie_adjacent_values(dtype: torch.dtype) -> None:
    checked = 0
    for seed, (rows, columns, group) in enumerate(
        [(1024, 1024, -1), (512, 1024, 32), (256, 1536, 96), (256, 1024, 128), (301, 1001, -1), (2, 65536, 64)]
    ):
        checked += check(gaussian((rows, columns), dtype, seed), QuantizerConfig(group_size=group))
    tie_adjacent = 0
    for seed, group in enumerate((56, 112, 448, 3584)):
        target = random_scales((802816 // 2 // group, 1), seed)
        weight = ties_of_own_scale(target, group, dtype)
        own = quantize(weight, QuantizerConfig())[1]
        # Otherwise the values would not be adjacent to a tie.
        assert (own == target).double().mean() > 0.95
        tie_adjacent += check(weight, QuantizerConfig())
    for seed, (rows, columns, group) in enumerate([(448, 1024, -1), (448, 896, 64), (1024, 96, 32)]):
        size = columns if group == -1 else group
        target = random_scales((rows, columns // size), seed)
        weight = ties_of(target, size, dtype).reshape(rows, columns)
        tie_adjacent += check(weight, QuantizerConfig(group_size=group), target)
    assert tie_adjacent >= 1_000_000
    assert checked + tie_adjacent >= 10_000_000 / len(DTYPES)


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    group=st.sampled_from([-1, 32, 64, 96, 160]),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-30, 15),
    eps=st.sampled_from([EPS, 2.0**-100, 1e-8, 0.25]),
    seed=st.integers(0, 2**32 - 1),
    special=st.lists(
        st.floats(-60000.0, 60000.0, allow_nan=False, width=32) | st.sampled_from([0.0, -0.0, 1e-40, -1e-45]),
        max_size=6,
    ),
)
def test_any_finite_weight(
    rows: int, groups: int, group: int, dtype: torch.dtype, exponent: int, eps: float, seed: int, special: list[float]
) -> None:
    columns = groups * group if group > 0 else groups * 32 + seed % 31
    g = torch.Generator().manual_seed(seed)
    weight = (torch.randn(rows, columns, generator=g) * 2.0**exponent).clamp(-6e4, 6e4)
    weight[-1, : len(special)] = torch.tensor(special)
    check(weight.to(dtype), QuantizerConfig(group_size=group, eps=eps))


@settings(max_examples=150, deadline=None)
@given(
    s=st.floats(2.0**-126, 2.0**126, width=32).map(lambda v: float(bf16_nearest(np.array(v)))),
    factors=st.lists(st.floats(-4.0, 4.0, width=32), min_size=32, max_size=32),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_normal_given_scale(s: float, factors: list[float], dtype: torch.dtype) -> None:
    weight = (torch.tensor([factors], dtype=torch.float64) * s).to(dtype)
    check(weight.nan_to_num(0.0), QuantizerConfig(), torch.tensor([[s]]).to(torch.bfloat16))


# ---------------------------------------------------------------------------------------------------------- scales


def test_a_mean_at_the_midpoint_of_two_bf16_values_goes_to_the_even_one() -> None:
    # Values have 9 and 16 significant bits, so that sums are exact in fp32 in any order and scales are known exactly.
    odd = torch.arange(128, 256, dtype=torch.float64) * 2 + 1
    for offset in (-(2.0**-7), 0.0, 2.0**-7):
        mean = (odd + offset) * 2.0**-9
        scales = quantize(mean.float().reshape(-1, 1).repeat(1, 64), QuantizerConfig())[1]
        assert np.array_equal(scales.double().numpy()[:, 0], bf16_nearest(mean.numpy())), offset


def test_sum_is_not_accumulated_in_16_bits() -> None:
    # A bf16 sum of 4096 ones stalls at 256; an fp16 sum of 4096 times 60 overflows.
    for dtype, value in ((torch.bfloat16, 1.0), (torch.float16, 60.0)):
        weight = torch.full((2, 4096), value, dtype=dtype)
        assert (quantize(weight, QuantizerConfig())[1] == value).all()
        assert (quantize_dequantize(weight, QuantizerConfig())[1] == value).all()


def test_the_rounded_scale_is_the_threshold() -> None:
    # The mean 1.00268 gives s = 1.0; 0.501 is between the two possible thresholds s/2 = 0.5 and mean/2 = 0.50134.
    weight = torch.full((1, 96), 1.008)
    weight[0, 0] = 0.501
    codes, scales = quantize(weight, QuantizerConfig())
    assert scales.item() == 1.0 and 1.002 < weight.mean().item() < 1.0035
    assert codes[0, 0] == 1
    assert quantize_dequantize(weight, QuantizerConfig())[0][0, 0] == 1.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_groups_take_the_bf16_of_eps(dtype: torch.dtype) -> None:
    weight = gaussian((4, 128), dtype, 0)
    weight[1] = 0.0
    weight[2, 32:64] = -0.0
    config = QuantizerConfig(group_size=32)
    check(weight, config)
    codes, scales = quantize(weight, config)
    assert (scales[1] == BF16_EPS).all() and scales[2, 1] == BF16_EPS
    assert not codes[1].any() and not codes[2, 32:64].any()
    assert (quantize(weight, QuantizerConfig(group_size=32, eps=0.5))[1][1] == 0.5).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_of_the_size_of_eps(dtype: torch.dtype) -> None:
    """A scale is never below eps, and only values beyond eps/2 are not quantized to zero."""
    factors = torch.tensor([0.0, 0.25, 0.49, 0.51, 1.0, 2.0, 30.0])
    weight = torch.zeros(7, 64)
    weight[:, 0] = factors * BF16_EPS
    weight[:, 1] = -factors * BF16_EPS
    weight = weight.to(dtype)
    check(weight, QuantizerConfig())
    codes, scales = quantize(weight, QuantizerConfig())
    assert (scales == BF16_EPS).all()
    assert codes[:, 0].tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert codes[:, 1].tolist() == [0, 0, 0, -1, -1, -1, -1]
    # One value of 32 eps among 64 has an absmean of eps/2; if all are 2 eps, so is the absmean, which is not clamped.
    assert (quantize((torch.ones(1, 64) * 2 * BF16_EPS).to(dtype), QuantizerConfig())[1] == 2 * BF16_EPS).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormal_weights(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal
    weight = (torch.randn(8, 64, generator=torch.Generator().manual_seed(1)) * tiny / 8).to(dtype)
    assert ((weight != 0) & (weight.abs() < tiny)).sum() > 400
    check(weight, QuantizerConfig(eps=2.0**-100))
    check(weight, QuantizerConfig())
    if dtype != torch.float16:
        assert not quantize(weight, QuantizerConfig())[0].any()


def test_subnormal_given_scale() -> None:
    scales = torch.tensor([[2.0**-130], [2.0**-133]], dtype=torch.float64).to(torch.bfloat16)
    steps = torch.arange(-64, 64).expand(2, -1)
    check((steps * 2.0**-134 / 16).float(), QuantizerConfig(), scales)
    check((steps * 2.0**-133).to(torch.bfloat16), QuantizerConfig(), scales)


@pytest.mark.parametrize("eps", [2.0**-100, 2.0**-30])
def test_a_value_that_underflows_fp16_is_plus_zero(eps: float) -> None:
    weight = torch.zeros(1, 4096, dtype=torch.float16)
    weight[0, 0], weight[0, 1] = -(2.0**-24), 2.0**-24
    codes, scales = quantize(weight, QuantizerConfig(eps=eps))
    assert codes[0, :3].tolist() == [-1, 1, 0] and scales.item() < 2.0**-25
    check(weight, QuantizerConfig(eps=eps))


# ------------------------------------------------------------------------------------- huge and non-finite weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_weights(dtype: torch.dtype) -> None:
    weight = torch.randn(3, 32, generator=torch.Generator().manual_seed(2)).clamp(-2, 2) * 2.0**120
    check(weight.to(dtype), QuantizerConfig())
    # With one value of 3e38 among zeros, the sum does not overflow, and w / s = 32.
    one = torch.zeros(1, 32, dtype=dtype)
    one[0, 5] = -3e38
    check(one, QuantizerConfig())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_overflow_of_the_fp32_sum_poisons_its_group(dtype: torch.dtype) -> None:
    weight = torch.ones(2, 64, dtype=dtype)
    weight[0, 32:] = 2e37  # 32 times that is 6.4e38
    weight[1, 32:] = 1e37
    config = QuantizerConfig(group_size=32)
    codes, scales = quantize(weight, config)
    assert scales.isinf().tolist() == [[False, True], [False, False]]
    assert not codes[0, 32:].any() and (codes[1] == 1).all() and (codes[0, :32] == 1).all()
    for q in (quantize_dequantize(weight, QuantizerConfig(group_size=32))[0], dequantize(codes, scales, config, dtype)):
        assert q[0, 32:].isnan().all() and q[0, :32].isfinite().all() and q[1].isfinite().all()
    assert not scales_are_finite([scales])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("group", [-1, 32])
def test_a_non_finite_weight_poisons_its_own_group(dtype: torch.dtype, bad: float, group: int) -> None:
    clean = gaussian((5, 96), dtype, 3)
    config = QuantizerConfig(group_size=group)
    codes, scales = quantize(clean, config)
    q = quantize_dequantize(clean, QuantizerConfig(group_size=group))[0]
    weight = clean.clone()
    weight[2, 40] = bad
    poisoned = torch.zeros(5, 96, dtype=torch.bool)
    poisoned[2, slice(None) if group == -1 else slice(32, 64)] = True

    bad_codes, bad_scales = quantize(weight, config)
    bad_q, fused_scales = quantize_dequantize(weight, QuantizerConfig(group_size=group))
    decoded = dequantize(bad_codes, bad_scales, config, dtype)
    for found in (bad_scales, fused_scales):
        assert torch.equal(~found.isfinite(), poisoned.reshape(5, scales.shape[1], -1).all(-1))
        assert torch.equal(found[found.isfinite()], scales[found.isfinite()])
    assert not bad_codes[poisoned].any()
    assert torch.equal(bad_codes[~poisoned], codes[~poisoned])
    for found in (bad_q, decoded):
        assert torch.equal(found.isnan(), poisoned)
        assert torch.equal(found[~poisoned], q[~poisoned])
    assert scales_are_finite([scales, scales[:1]]) and not scales_are_finite([scales, bad_scales])
    assert not scales_are_finite([fused_scales, scales])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scales_are_finite_finds_one_bad_scale(bad: float) -> None:
    clean = torch.ones(4, 3, dtype=torch.bfloat16)
    bad_one = clean.clone()
    bad_one[3, 1] = bad
    answer = scales_are_finite(s for s in (clean, clean[:1, :1]))
    assert answer.dtype == torch.bool and answer.shape == () and answer
    assert not scales_are_finite([clean, bad_one, clean])


def test_nothing_waits_for_the_device() -> None:
    # A meta tensor has no values, so that reading one for a decision on the host raises.
    weight = torch.empty(6, 64, device="meta")
    # Only functions that training does not use check given scales or codes, which waits for the device.
    _, scales = quantize(weight, QuantizerConfig(group_size=32))
    quantize_dequantize(weight, QuantizerConfig(group_size=32))
    quantize_dequantize(weight, QuantizerConfig(group_size=32), scales)
    assert scales_are_finite([scales, scales]).device.type == "meta"


@pytest.mark.parametrize("code", [-128, -2, 2, 127])
def test_a_code_that_the_space_does_not_have_is_refused(code: int) -> None:
    codes, scales = quantize(torch.linspace(-1, 1, 256).reshape(4, 64), QuantizerConfig())
    codes[1, 2] = code
    with pytest.raises(ValueError, match="those of the space ternary are -1 to 1"):
        dequantize(codes, scales, QuantizerConfig(), torch.float32)


@pytest.mark.parametrize("scale", [math.nan, math.inf, -1.0, 0.0])
def test_a_given_scale_that_is_none_is_refused(scale: float) -> None:
    weight = torch.linspace(-1, 1, 256).reshape(4, 64)
    _, scales = quantize(weight, QuantizerConfig())
    scales[1] = scale
    with pytest.raises(ValueError, match="not finite or not above 0"):
        quantize(weight, QuantizerConfig(), scales)


@pytest.mark.parametrize("group_size", [0, -2, 33, 1.5, "32", None, [32], {}, True, math.nan, 2**25, 10**30])
def test_a_group_size_that_is_none_is_refused(group_size: object) -> None:
    with pytest.raises(ValueError, match="group_size"):
        QuantizerConfig(group_size=group_size)


@pytest.mark.parametrize("eps", [0, -1.0, math.nan, math.inf, "1e-5", None, [1], {}, True, 10**400])
def test_an_eps_that_is_none_is_refused(eps: object) -> None:
    with pytest.raises(ValueError, match="eps="):
        QuantizerConfig(eps=eps)


@pytest.mark.parametrize("space", ["octal", None, [], {}, 3])
def test_a_space_that_is_none_is_refused(space: object) -> None:
    with pytest.raises(ValueError, match="unknown quantization space"):
        QuantizerConfig(space=space)


@pytest.mark.parametrize(
    "call",
    [
        lambda w, c: quantize([[1.0]], c),
        lambda w, c: quantize(None, c),
        lambda w, c: quantize(w, None),
        lambda w, c: quantize(w, {"group_size": -1}),
        lambda w, c: dequantize([[1]], [[1.0]], c, torch.float32),
        lambda w, c: dequantize(*quantize(w, c), None, torch.float32),
        lambda w, c: dequantize(*quantize(w, c), c, torch.int8),
        lambda w, c: dequantize(*quantize(w, c), c, "bf16"),
        lambda w, c: fake_quantize(w, None),
        lambda w, c: fake_quantize([[1.0]], c),
    ],
)
def test_arguments_of_another_type_are_refused_in_words(call) -> None:
    with pytest.raises(TypeError, match="tensor|QuantizerConfig|dtype"):
        call(torch.ones(2, 64), QuantizerConfig())


def test_fp16_overflow_of_the_value() -> None:
    """The scale 65536 is representable in bf16 but not in fp16; below 65408 the scale is 65280, which fp16 has."""
    weight = torch.tensor([[65376.0], [65408.0], [65504.0]], dtype=torch.float16).repeat(1, 64)
    weight[:, 1::2] *= -1
    config = QuantizerConfig()
    codes, scales = quantize(weight, config)
    assert scales[:, 0].tolist() == [65280.0, 65536.0, 65536.0]
    assert (codes[:, 0::2] == 1).all() and (codes[:, 1::2] == -1).all()
    for q in (quantize_dequantize(weight, QuantizerConfig())[0], dequantize(codes, scales, config, torch.float16)):
        assert q[0, :2].tolist() == [65280.0, -65280.0]
        assert q[1, :2].tolist() == [math.inf, -math.inf] and q[2].isinf().all()
    assert dequantize(codes, scales, config, torch.float32)[1, 0] == 65536.0


# ------------------------------------------------------------------------------------------------ shapes, layouts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "group"),
    [
        ((1, 1), -1),
        ((1, 32), 32),
        ((1, 32), -1),
        ((7, 1), -1),
        ((3, 33), -1),
        ((5, 127), -1),
        ((1, 4096), 64),
        ((9, 96), 96),
        ((9, 192), 96),
        ((2, 512), 256),
        ((130, 4097), -1),
        ((1000, 416), 32),
    ],
)
def test_shapes_and_groups(shape: tuple[int, int], group: int, dtype: torch.dtype) -> None:
    check(gaussian(shape, dtype, 4), QuantizerConfig(group_size=group))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [-1, 32])
def test_layout_and_autograd_state_do_not_matter(group: int, dtype: torch.dtype) -> None:
    config = QuantizerConfig(group_size=group)
    plain = on_boundary((96 * (1 if group == -1 else 4), 128 if group == -1 else 32), 5).reshape(96, 128).to(dtype)
    wide = torch.zeros(97, 300, dtype=dtype)
    wide[1:, 7:135] = plain
    strided = torch.zeros(192, 256, dtype=dtype)
    strided[::2, ::2] = plain
    layouts = {
        "transposed": plain.t().contiguous().t(),
        "sliced": wide[1:, 7:135],
        "strided": strided[::2, ::2],
        "parameter": torch.nn.Parameter(plain.clone()),
    }
    codes, scales = quantize(plain, config)
    q = quantize_dequantize(plain, QuantizerConfig(group_size=group))[0]
    for name, weight in layouts.items():
        check(weight, config)
        found_codes, found_scales = quantize(weight, config)
        found_q, fused_scales = quantize_dequantize(weight, QuantizerConfig(group_size=group))
        assert torch.equal(found_scales, scales) and torch.equal(fused_scales, scales), name
        assert torch.equal(found_codes, codes) and torch.equal(found_q, q), name
        assert not (found_codes.requires_grad or found_scales.requires_grad or found_q.requires_grad), name


@pytest.mark.parametrize("columns", [1023, 4096, 40000, 70000])
def test_scales_do_not_depend_on_layout_where_the_sum_decides(columns: int) -> None:
    weight = on_boundary((24, columns), 6)
    codes, scales = quantize(weight, QuantizerConfig())
    moved = assert_scales(weight.double().numpy(), scales.double().numpy()[:, 0], EPS)
    if columns >= 4096:
        assert 0 < moved < 24, "the rows no longer sit on the boundary: this test and those like it test nothing"
    transposed = weight.t().contiguous().t()
    for w in (weight, transposed):
        assert torch.equal(quantize(w, QuantizerConfig())[1], scales)
        q, fused_scales = quantize_dequantize(w, QuantizerConfig())
        assert torch.equal(fused_scales, scales)
        assert torch.equal(q, dequantize(codes, scales, QuantizerConfig(), torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "columns", "group"), [(401, 1024, -1), (1000, 1000, -1), (333, 2048, 64), (3, 50000, -1)]
)
def test_matrices_of_several_blocks_with_a_ragged_tail(rows: int, columns: int, group: int, dtype: torch.dtype) -> None:
    # The whole is compared with the oracle, and rows of the first and last blocks with the same rows alone.
    weight = gaussian((rows, columns), dtype, 7)
    check(weight, QuantizerConfig(group_size=group))
    q, scales = quantize_dequantize(weight, QuantizerConfig(group_size=group))
    for row in (0, 1, rows // 2, rows - 2, rows - 1):
        alone, alone_scales = quantize_dequantize(weight[row : row + 1], QuantizerConfig(group_size=group))
        assert torch.equal(alone, q[row : row + 1]) and torch.equal(alone_scales, scales[row : row + 1])
    check(weight, QuantizerConfig(group_size=group), scales * 2)


# --------------------------------------------------------------------------------------------------- independence


@pytest.mark.parametrize(
    ("rows", "columns", "group"), [(48, 4096, -1), (48, 33000, -1), (24, 70000, -1), (48, 1024, 32), (48, 4096, 1024)]
)
def test_column_parallel_shards_are_slices_of_the_whole(rows: int, columns: int, group: int) -> None:
    config = QuantizerConfig(group_size=group)
    size = columns if group == -1 else group
    weight = on_boundary((rows * columns // size, size), 8).reshape(rows, columns)
    codes, scales = quantize(weight, config)
    q = quantize_dequantize(weight, config)[0]
    for size in (1, 3, rows // 4):
        for start in range(0, rows, size):
            part = slice(start, start + size)
            found_codes, found_scales = quantize(weight[part], config)
            found_q, fused_scales = quantize_dequantize(weight[part], config)
            assert torch.equal(found_scales, scales[part]) and torch.equal(fused_scales, scales[part])
            assert torch.equal(found_codes, codes[part]) and torch.equal(found_q, q[part])


@pytest.mark.parametrize(("rows", "columns", "shards"), [(64, 4096, 4), (16, 96, 3), (8, 2560, 8), (10, 80000, 2)])
def test_row_parallel_shards_are_groups_of_the_whole(rows: int, columns: int, shards: int) -> None:
    group = columns // shards
    weight = on_boundary((rows * shards, group), 9).reshape(rows, columns)
    codes, scales = quantize(weight, QuantizerConfig(group_size=group))
    q, fused_scales = quantize_dequantize(weight, QuantizerConfig(group_size=group))
    assert torch.equal(scales, fused_scales)
    for i in range(shards):
        shard = weight[:, i * group : (i + 1) * group]
        found_codes, found_scales = quantize(shard, QuantizerConfig())
        found_q, shard_scales = quantize_dequantize(shard.contiguous(), QuantizerConfig())
        assert torch.equal(found_scales, scales[:, i : i + 1]) and torch.equal(shard_scales, found_scales)
        assert torch.equal(found_codes, codes[:, i * group : (i + 1) * group])
        assert torch.equal(found_q, q[:, i * group : (i + 1) * group])


@pytest.mark.parametrize("shape", [(1, 70000), (2, 40000), (7, 40000), (64, 4096), (1000, 300)])
def test_threads_do_not_matter(shape: tuple[int, int], threads: None) -> None:
    config = QuantizerConfig()
    found = []
    weights = [on_boundary(shape, seed) for seed in range(12 if shape[0] < 10 else 2)]
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        results = [(*quantize(w, config), *quantize_dequantize(w, QuantizerConfig())) for w in weights]
        assert all(torch.equal(scales, fused_scales) for _, scales, _, fused_scales in results)
        found.append([torch.cat([t.double().flatten() for t in r]) for r in results])
    for one, two, four in zip(*found, strict=True):
        assert torch.equal(one, two) and torch.equal(one, four)


# --------------------------------------------------------------------------------------- given scales, idempotence


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [-1, 32])
def test_given_scales_are_used_and_copied(group: int, dtype: torch.dtype) -> None:
    weight = gaussian((6, 128), dtype, 10)
    config = QuantizerConfig(group_size=group)
    own = quantize(weight, config)[1]
    # Given scales are used as they are, even if they are smaller than eps.
    for given_scales in (own * 4, own / 4, torch.full_like(own, 2.0**-20)):
        before = given_scales.clone()
        check(weight, config, given_scales)
        for scales in (
            quantize(weight, config, given_scales)[1],
            quantize_dequantize(weight, QuantizerConfig(group_size=group), given_scales)[1],
        ):
            assert scales.untyped_storage().data_ptr() != given_scales.untyped_storage().data_ptr()
            scales.zero_()
            assert torch.equal(given_scales, before)
    strided = (own * 2).repeat_interleave(2, 1)[:, ::2]
    check(weight, config, strided)


def test_results_do_not_alias_the_weight() -> None:
    weight = torch.ones(2, 32)  # codes, scales and quantized weights have the weight's values
    outputs = (*quantize(weight, QuantizerConfig()), *quantize_dequantize(weight, QuantizerConfig()))
    for out in outputs:
        assert out.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()
        out.zero_()
        assert (weight == 1).all()


def test_quantizing_twice_keeps_the_codes_and_shrinks_the_scale() -> None:
    """The quantizer is not idempotent: mean|Wq| is s times the share of nonzeros, about 0.69 for Gaussian weights."""
    weight = torch.randn(64, 4096, generator=torch.Generator().manual_seed(11))
    codes, scales = quantize(weight, QuantizerConfig())
    again_codes, again_scales = quantize(dequantize(codes, scales, QuantizerConfig(), torch.float32), QuantizerConfig())
    assert torch.equal(codes, again_codes)
    density = codes.numpy().astype(bool).mean(-1)
    assert np.array_equal(again_scales.double().numpy()[:, 0], bf16_nearest(scales.double().numpy()[:, 0] * density))
    assert ((again_scales / scales > 0.66) & (again_scales / scales < 0.72)).all()


# ---------------------------------------------------------------------------------------------------------- spaces


def rint_space(lowest: int, highest: int) -> Space:
    """Returns the space of integers from ``lowest`` to ``highest``, with ties rounded half to even."""
    thresholds = [level + 0.5 for level in range(lowest, highest)]
    ties = tuple("upper" if np.rint(t) > t else "lower" for t in thresholds)
    return Space("hidden", tuple(map(float, range(lowest, highest + 1))), tuple(thresholds), ties)


@pytest.mark.parametrize(("lowest", "highest"), [(-1, 1), (-2, 2), (-1, 2), (0, 1), (-7, 7)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_spaces_are_tables(lowest: int, highest: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SPACES, "hidden", rint_space(lowest, highest))
    config = QuantizerConfig(space="hidden", group_size=448)
    positive = tuple(level + 0.5 for level in range(max(-lowest, highest) + 1))
    # Scales have 4 significant bits, so that 7.5 s is exact in bf16, too.
    scales = (random_scales((8, 2), 12).view(torch.int16) & ~0xF).view(torch.bfloat16)
    weight = ties_of(scales, 448, dtype, positive).reshape(8, 896)
    s = scales.double().numpy()
    expected = np.clip(np.rint(weight.double().numpy().reshape(8, 2, 448) / s[..., None]), lowest, highest)
    assert len(np.unique(expected)) == highest - lowest + 1

    codes, found_scales = quantize(weight, config, scales)
    q = dequantize(codes, found_scales, config, dtype)
    assert np.array_equal(codes.numpy().reshape(8, 2, 448), expected)
    product = torch.from_numpy(expected * s[..., None]).reshape(8, 896).to(dtype)
    assert torch.equal(q, product) and not torch.signbit(q[q == 0]).any()
    own = quantize(weight, config)[1].double().numpy()
    assert_scales(weight.double().numpy().reshape(16, 448), own.reshape(-1), EPS)


def test_dequantize_rounds_once_whatever_the_default_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    third = Space("hidden", (-1 / 3, 0.0, 1 / 3), (-0.25, 0.25), ("upper", "lower"))
    monkeypatch.setitem(SPACES, "hidden", third)
    config = QuantizerConfig(space="hidden")
    codes, scales = quantize(gaussian((4, 64), torch.float32, 13), config)
    before = dequantize(codes, scales, config, torch.float32)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert torch.equal(dequantize(codes, scales, config, torch.float32), before)
    finally:
        torch.set_default_dtype(default)


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "cure"),
    [
        ({"space": "binary"}, "binary.*choose one of.*ternary"),
        ({"space": "hidden"}, "hidden.*choose one of.*ternary"),
        ({"group_size": 0}, "group_size=0.*use -1.*multiple of 32"),
        ({"group_size": -2}, "group_size=-2.*use -1"),
        ({"group_size": 48}, "group_size=48.*multiple of 32"),
        ({"group_size": 1}, "group_size=1 .*multiple of 32"),
        ({"group_size": True}, "group_size must be an integer.*True"),
        ({"group_size": 64.0}, "group_size must be an integer.*64.0"),
        ({"group_size": "64"}, "group_size must be an integer.*'64'"),
        ({"eps": 0.0}, "eps=0.0.*2\\*\\*-100"),
        ({"eps": -1e-5}, "eps=-1e-05.*2\\*\\*-100"),
        ({"eps": 2.0**-101}, "eps=.*2\\*\\*-100"),
        ({"eps": math.nan}, "eps=nan.*finite"),
        ({"eps": math.inf}, "eps=inf.*finite"),
        ({"eps": 1e39}, "eps=1e\\+39.*2\\*\\*100"),
        ({"eps": "1e-5"}, "eps='1e-5'.*number"),
        ({"eps": None}, "eps=None.*number"),
        ({"eps": True}, "eps=True.*number"),
        ({"statistic": "rms"}, "unknown statistic 'rms'.*'absmax', 'absmean'"),
        ({"statistic": ["absmax"]}, "unknown statistic"),
        ({"scale_multiplier": 0.0}, "scale_multiplier=0.0.*2\\*\\*-20 to 2\\*\\*20"),
        ({"scale_multiplier": 2.0**21}, "scale_multiplier=2097152.0.*2\\*\\*20"),
        ({"scale_multiplier": math.nan}, "scale_multiplier=nan.*finite"),
        ({"scale_multiplier": "1"}, "scale_multiplier='1'.*number"),
        ({"scale_multiplier": True}, "scale_multiplier=True.*number"),
    ],
)
def test_bad_configs(arguments: dict, cure: str) -> None:
    with pytest.raises(ValueError, match=cure):
        QuantizerConfig(**arguments)


def test_config_is_frozen_and_has_the_documented_defaults() -> None:
    config = QuantizerConfig()
    assert dataclasses.astuple(config) == ("ternary", -1, 1e-5, "absmean", 1.0)
    assert config == QuantizerConfig("ternary", -1, 1e-5) and len({config, QuantizerConfig()}) == 1
    assert QuantizerConfig(eps=2.0**-100).eps == 2.0**-100 and QuantizerConfig(eps=1).eps == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.eps = 1.0  # type: ignore[misc]


BAD_WEIGHTS = [
    (torch.zeros(64), -1, r"\(64,\).*matrix \[out_features, in_features\]"),
    (torch.zeros(2, 3, 64), -1, r"\(2, 3, 64\).*matrix \[out_features, in_features\]"),
    (torch.tensor(1.0), -1, r"shape \(\).*matrix"),
    (torch.zeros(0, 64), -1, r"\(0, 64\).*empty"),
    (torch.zeros(64, 0), -1, r"\(64, 0\).*empty"),
    (torch.zeros(2, 64, dtype=torch.float64), -1, r"float64.*\(2, 64\).*cast it to float32, bfloat16, float16"),
    (torch.zeros(2, 64, dtype=torch.int8), -1, r"int8.*\(2, 64\).*cast it to float32, bfloat16, float16"),
    (torch.zeros(2, 64, dtype=torch.bool), -1, r"bool.*\(2, 64\).*cast it to"),
    (torch.zeros(2, 96), 64, r"group_size=64.*96 elements: use -1 or one of \[32, 96\]"),
    (torch.zeros(2, 33), 32, r"group_size=32.*33 elements: use -1"),
    (torch.zeros(2, 32), 64, r"group_size=64.*32 elements: use -1 or one of \[32\]"),
]


@pytest.mark.parametrize(("weight", "group", "cure"), BAD_WEIGHTS)
def test_bad_weights(weight: torch.Tensor, group: int, cure: str) -> None:
    with pytest.raises(ValueError, match=cure):
        quantize(weight, QuantizerConfig(group_size=group))
    with pytest.raises(ValueError, match=cure):
        quantize_dequantize(weight, QuantizerConfig(group_size=group))


@pytest.mark.parametrize(
    "scales",
    [
        torch.ones(2, 1, dtype=torch.bfloat16),
        torch.ones(2, 3, dtype=torch.bfloat16),
        torch.ones(2, dtype=torch.bfloat16),
        torch.ones(4, 1, dtype=torch.bfloat16),
        torch.ones(2, 2),
        torch.ones(2, 2, dtype=torch.float16),
    ],
)
def test_bad_scales(scales: torch.Tensor) -> None:
    config = QuantizerConfig(group_size=32)
    message = r"scales of shape .*\(2, 64\).*pass bfloat16 of shape \(2, 2\)"
    with pytest.raises(ValueError, match=message):
        quantize(torch.ones(2, 64), config, scales)
    with pytest.raises(ValueError, match=message):
        quantize_dequantize(torch.ones(2, 64), QuantizerConfig(group_size=32), scales)
    with pytest.raises(ValueError, match=message):
        dequantize(torch.ones(2, 64, dtype=torch.int8), scales, config, torch.float32)


@pytest.mark.parametrize(
    ("codes", "cure"),
    [
        (torch.ones(2, 64), r"\(2, 64\).*float32.*int8 codes \[out, in\]"),
        (torch.ones(2, 64, dtype=torch.uint8), r"\(2, 64\).*uint8.*int8 codes"),
        (torch.ones(2, 64, dtype=torch.int32), r"\(2, 64\).*int32.*int8 codes"),
        (torch.ones(128, dtype=torch.int8), r"\(128,\).*int8 codes \[out, in\]"),
        (torch.ones(0, 64, dtype=torch.int8), r"\(0, 64\).*int8 codes"),
        (torch.ones(2, 48, dtype=torch.int8), r"group_size=32.*48 elements: use -1"),
    ],
)
def test_bad_codes(codes: torch.Tensor, cure: str) -> None:
    with pytest.raises(ValueError, match=cure):
        dequantize(codes, torch.ones(2, 2, dtype=torch.bfloat16), QuantizerConfig(group_size=32), torch.float32)

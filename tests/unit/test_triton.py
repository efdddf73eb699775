# SPDX-License-Identifier: Apache-2.0
"""Tests of the Triton kernels, run by Triton's interpreter, or on a GPU with ``TRITON_INTERPRET=0``.

    TRITON_INTERPRET=0 pytest tests/unit/test_triton.py

The interpreter takes 20 ms per program and no time per element, so that tiles are as large as possible, except in
tests of tiles. There are two oracles: numpy in float64 for the codes, given the scale that a kernel returned; and torch
in fp32, in the kernels' order of summation, for the scale itself, bit for bit.
"""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny_gpt
from support.grouped import LATENTS, Latent, check_together, same_bits
from support.integers import activations, check_products, check_quantize

from bitcpm_megatron import QuantizerConfig, fake_quantize
from bitcpm_megatron.ops import backends, registry, set_backend
from bitcpm_megatron.ops import triton as backend
from bitcpm_megatron.ops.int8 import cuda
from bitcpm_megatron.quantization import (
    SPACES,
    dequantize,
    pack,
    quantize,
    quantize_activations,
    quantize_dequantize,
)

launch = pytest.importorskip("bitcpm_megatron.ops.triton.launch", reason="triton is not installed")
DEVICE = "cpu" if launch.INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-5
SHAPES = [
    (1, 1, -1),
    (1, 31, -1),
    (3, 33, -1),
    (7, 100, -1),
    (5, 127, -1),
    (2, 1000, -1),
    (1, 4097, -1),
    (1, 32, 32),
    (9, 96, 32),
    (3, 160, 160),
    (5, 192, 96),
    (4, 256, 64),
    (6, 384, 128),
    (2, 1280, 256),
    (17, 64, 64),
]

if not launch.INTERPRETED and not torch.cuda.is_available():
    pytest.skip("TRITON_INTERPRET is off, and there is no GPU", allow_module_level=True)


def gaussian(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Returns rows of very different magnitude that contain signed zeros."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=g) * 10 ** torch.empty(rows, 1).uniform_(-3.0, 3.0, generator=g)
    w[:, 3::17] *= 0.0
    return w.to(dtype)


def run(
    weight: torch.Tensor, group: int, eps: float = EPS, scales: torch.Tensor | None = None, **options
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the kernel, and returns its results on the CPU."""
    before = weight.clone()
    given_scales = None if scales is None else scales.to(DEVICE)
    config = QuantizerConfig(group_size=group, eps=eps)
    q, s = launch.fake_quantize(weight.to(DEVICE), config, given_scales, **options)
    assert (q.dtype, s.dtype) == (weight.dtype, torch.bfloat16) and q.is_contiguous() and s.is_contiguous()
    assert same_bits(weight, before), "input changed"
    return q.cpu(), s.cpu()


def mean_in_order(weight: torch.Tensor, group: int) -> torch.Tensor:
    """Returns fp32 means ``[rows, groups]``, summed by neighbors, then pairs, padded with zeros to a power of two."""
    group = weight.shape[1] if group == -1 else group
    x = weight.float().abs().reshape(-1, group)
    x = torch.nn.functional.pad(x, (0, (1 << (group - 1).bit_length()) - group))
    while x.shape[1] > 1:
        x = x[:, 0::2] + x[:, 1::2]
    # The divisor is a tensor, because torch may multiply by the reciprocal of a number.
    return (x / torch.full_like(x, group)).reshape(weight.shape[0], -1)


def check(weight: torch.Tensor, group: int, eps: float = EPS, **options) -> None:
    """Checks everything that is promised about a finite weight."""
    size = weight.shape[1] if group == -1 else group
    q, s = run(weight, group, eps, **options)
    mean = mean_in_order(weight, group)
    assert torch.equal(s, mean.clamp(min=eps).to(torch.bfloat16)), "a scale is not that of the documented order"
    theirs = weight.float().abs().reshape(-1, size).mean(-1).reshape(mean.shape)
    # In any order, each of fewer than `size` sums, none of which cancels, and the division have errors of half an ulp.
    assert ((mean - theirs).abs() <= 2 * size * 2.0**-24 * theirs + 2.0**-149).all()
    assert torch.equal(s, quantize_dequantize(weight, QuantizerConfig(group_size=group, eps=eps))[1])

    w, s64 = weight.double().numpy().reshape(-1, size), s.double().numpy().reshape(-1, 1)
    codes = np.sign(w) * (np.abs(w) > s64 / 2)
    expected = torch.from_numpy(codes * s64).reshape(weight.shape).to(weight.dtype) + 0.0
    assert same_bits(q, expected)

    reference, _ = quantize_dequantize(weight, QuantizerConfig(group_size=group, eps=eps), s)
    q, copied = run(weight, group, eps, s, **options)
    assert same_bits(q, reference) and torch.equal(copied, s)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, columns, group = shape
    weight = gaussian(rows, columns, dtype, columns)
    weight[-1] = 0.0
    check(weight, group)


@pytest.mark.parametrize("statistic", ["absmean", "absmax"])
@pytest.mark.parametrize("space", [name for name in SPACES if name != "ternary"])
def test_other_spaces(space: str, statistic: str) -> None:
    for (group, options), dtype in zip(((64, {}), (-1, {}), (-1, {"resident": 64})), DTYPES, strict=True):
        config = QuantizerConfig(space, group, EPS, statistic, 0.9)
        weight = gaussian(8, 320, dtype)
        weight[1], weight[2, 5], weight[3, 7], weight[4] = 0.0, torch.nan, torch.inf, 1e-6
        expected, scales = quantize_dequantize(weight, config)
        q, s = (x.cpu() for x in launch.fake_quantize(weight.to(DEVICE), config, **options))
        assert same_bits(q, expected) and same_bits(s, scales)
        # Weights are at a threshold of their group, or one step of the dtype to either side.
        given = scales.nan_to_num(1.0, 1.0)
        thresholds = torch.tensor(SPACES[space].thresholds).repeat(320)[:320]
        weight = (given.float().repeat_interleave(320 // given.shape[1], 1) * thresholds).to(dtype)
        words = weight.view(torch.int32 if dtype == torch.float32 else torch.int16)
        words += (torch.arange(8)[:, None] % 3 - 1).to(words.dtype) * (weight != 0)
        given[0], given[1] = torch.inf, 2.0**-130
        q, _ = (x.cpu() for x in launch.fake_quantize(weight.to(DEVICE), config, given.to(DEVICE), **options))
        assert same_bits(q, quantize_dequantize(weight, config, given)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", [1, 128, 256, 1 << 20])
def test_tiles(tile: int, dtype: torch.dtype) -> None:
    for rows, columns, group in ((3, 33, -1), (2, 192, 96), (3, 64, 32)):
        check(gaussian(rows, columns, dtype, tile), group, tile=tile)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("resident", [32, 64])
def test_rows_that_do_not_fit_into_a_tile(resident: int, dtype: torch.dtype) -> None:
    for rows, columns, group in ((2, 65, -1), (1, 250, -1), (1, 256, 128), (1, 32, 32)):
        check(gaussian(rows, columns, dtype, columns), group, resident=resident)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
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
@pytest.mark.verifies(
    "quantizer",
    "the Triton kernels equal the reference bit for bit, and compile for compute capability 8.0, 9.0 and 10.0",
    cpu="yes, interpreted",
)
def test_any_finite_weight(
    rows: int,
    groups: int,
    group: int,
    dtype: torch.dtype,
    exponent: int,
    eps: float,
    seed: int,
    special: list[float],
) -> None:
    columns = groups * group if group > 0 else groups * 32 + seed % 31
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    weight = weight.clamp(-6e4, 6e4)
    weight[-1, : len(special)] = torch.tensor(special)
    check(weight.to(dtype), group, eps)


@pytest.mark.skipif(not launch.INTERPRETED, reason="on a GPU the tuning is the usual way")
@pytest.mark.parametrize(
    ("columns", "resident", "tiles"),
    [(64, None, {2048, 4096, 8192}), (5000, None, {8192}), (20000, None, {32768}), (40000, 65536, set())],
)
def test_tuning_tries_the_tiles_that_fit(
    columns: int, resident: int | None, tiles: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large weights are tuned like on a GPU, here with a clock that prefers the largest tile.

    A group that is longer than all tiles but must be resident has a tile of its own, and there is nothing to try.
    """
    run_as: list[int] = []
    tried = set()
    original = type(launch.quantize_resident).run

    def recorded(self, *args, **kwargs):
        run_as.append(kwargs.get("TILE"))  # the streamed kernel has no tile
        return original(self, *args, **kwargs)

    def bench(call, quantiles) -> list[float]:
        call()
        tried.add(run_as[-1])
        return [1.0 / run_as[-1]] * 3

    monkeypatch.setattr(type(launch.quantize_resident), "run", recorded)
    monkeypatch.setitem(launch._tuned.__dict__, "do_bench", bench)  # do_bench is a cached property
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "TUNED_ELEMENTS", 0)
    monkeypatch.setattr(launch, "_UNTUNED_ELEMENTS", 4096)
    weight = gaussian(3, columns, torch.bfloat16, columns)
    q, s = run(weight, -1, resident=resident)
    assert tried == tiles and run_as[-1] == max(tiles, default=resident)
    expected = run(weight, -1, tile=1)
    assert same_bits(q, expected[0]) and torch.equal(s, expected[1])


@pytest.mark.slow
def test_a_scale_at_the_midpoint_does_not_follow_the_tile() -> None:
    """The means are within rounding errors of the midpoint of two bf16 values, so that another order is noticed."""
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(1000, 384, generator=g)
    magnitude = weight.abs().double()
    s = magnitude.mean(-1).to(torch.bfloat16)
    midpoint = (s.double() + (s.view(torch.int16) + 1).view(torch.bfloat16).double()) / 2
    missing = midpoint * 384 - magnitude.sum(-1)
    weight[:, 0] = (magnitude[:, 0] + missing).float()
    other = (weight.abs().sum(-1, keepdim=True) / 384).to(torch.bfloat16)  # torch's own order
    weight = weight[(mean_in_order(weight, -1).to(torch.bfloat16) != other)[:, 0]][:40]
    assert len(weight) == 40
    expected = mean_in_order(weight, -1).to(torch.bfloat16)
    for options in ({}, {"tile": 4096}, {"tile": 512}, {"resident": 256}):
        assert torch.equal(run(weight, -1, **options)[1], expected), options


@pytest.mark.parametrize("columns", [3, 100, 384, 1000])
def test_the_mean_is_a_quotient(columns: int) -> None:
    """Equal weights halfway between two bf16 values have exact sums and quotients, but inexact products with 1/n."""
    middle = (torch.arange(128, 256) * 2 + 1) * 2.0**-9
    expected = middle.to(torch.bfloat16)  # half to even
    for weight in (middle, -middle):
        assert torch.equal(run(weight.reshape(-1, 1).repeat(1, columns), -1)[1][:, 0], expected)


def test_the_fp32_mean_of_long_rows() -> None:
    for columns in (16384, 40000):
        check(gaussian(1, columns, torch.bfloat16, columns), -1)
    # A bf16 sum of 4096 ones stalls at 256.
    assert (run(torch.ones(2, 4096, dtype=torch.bfloat16), -1)[1] == 1).all()


# --------------------------------------------------------------------------------------------------------- the edges


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [2.0**-133, 2.0**-127, 2.0**-24, 2.0**-26, EPS, 0.37, 1.0, 65280.0, 2.0**120])
def test_every_16_bit_weight_under_a_given_scale(dtype: torch.dtype, scale: float) -> None:
    weight = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).reshape(64, 1024)
    scales = torch.full((64, 1), scale, dtype=torch.float64).to(torch.bfloat16)
    q, s = run(weight, -1, EPS, scales)
    assert same_bits(q, quantize_dequantize(weight, QuantizerConfig(), scales)[0]) and torch.equal(s, scales)
    assert same_bits(run(weight.reshape(1, -1), -1, EPS, scales[:1])[0].reshape(64, -1), q)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("group", [-1, 32])
def test_a_non_finite_weight_poisons_its_own_group(dtype: torch.dtype, bad: float, group: int) -> None:
    resident = 64 if dtype == torch.bfloat16 else None
    weight = gaussian(3, 96, dtype, 3)
    weight[2, 40] = bad
    q, s = run(weight, group, resident=resident)
    poisoned = torch.zeros(3, 96, dtype=torch.bool)
    poisoned[2, slice(None) if group == -1 else slice(32, 64)] = True
    assert torch.equal(q.isnan(), poisoned)
    assert torch.equal(~s.isfinite(), poisoned.reshape(3, s.shape[1], -1).all(-1))
    assert same_bits(q, quantize_dequantize(weight, QuantizerConfig(group_size=group), s)[0])
    finite = torch.ones_like(s)
    q, _ = run(weight, group, EPS, finite, resident=resident)
    assert same_bits(q, quantize_dequantize(weight, QuantizerConfig(group_size=group), finite)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_weights(dtype: torch.dtype) -> None:
    weight = torch.ones(3, 64, dtype=dtype)
    weight[0, 32:] = 2e37  # 32 times that is 6.4e38
    weight[1, 32:] = 1e37
    weight[2] = 0
    weight[2, 5] = -3e38
    q, s = run(weight, 32)
    assert s.isinf().tolist() == [[False, True], [False, False], [False, False]]
    assert q[0, 32:].isnan().all() and q[0, :32].eq(1).all() and q[1].isfinite().all()
    check(weight[1:], 32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormal_weights_and_signed_zeros(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal
    weight = (torch.randn(8, 64, generator=torch.Generator().manual_seed(1)) * tiny / 8).to(dtype)
    weight[3], weight[4] = -0.0, 0.0
    for eps in (EPS, 2.0**-100):
        check(weight, 32, eps)
    q, s = run(weight[3:4], -1)
    assert not torch.signbit(q).any() and s.item() == 1.0013580322265625e-05


def test_fp16_values_that_overflow_and_underflow() -> None:
    weight = torch.tensor([[65376.0], [65408.0], [65504.0]], dtype=torch.float16).repeat(1, 64)
    weight[:, 1::2] *= -1
    q, s = run(weight, -1)
    assert s[:, 0].tolist() == [65280.0, 65536.0, 65536.0]
    assert q[0, :2].tolist() == [65280.0, -65280.0] and q[1, :2].tolist() == [float("inf"), -float("inf")]
    weight = torch.zeros(1, 4096, dtype=torch.float16)
    weight[0, 0] = -(2.0**-24)
    q, s = run(weight, -1, 2.0**-100)
    assert s.item() == 2.0**-36 and not q.any() and not torch.signbit(q).any()


def test_the_layout_in_memory_does_not_matter() -> None:
    weight = gaussian(64, 96, torch.float32)
    for view in (weight.t(), weight[::2], weight[:, 32:64], weight.repeat_interleave(2, 1)[:, ::2]):
        q, s = run(view, -1)
        expected = run(view.contiguous(), -1)
        assert same_bits(q, expected[0]) and torch.equal(s, expected[1])
    scales = torch.ones(64, 6, dtype=torch.bfloat16)[:, ::2]
    assert same_bits(
        run(weight, 32, EPS, scales)[0], quantize_dequantize(weight, QuantizerConfig(group_size=32), scales)[0]
    )
    # This address is not a multiple of 16.
    odd = torch.cat([torch.zeros(1), weight.flatten()])[1:].reshape(64, 96)
    assert torch.equal(run(odd, -1)[1], run(weight, -1)[1])


def test_results_do_not_alias_the_arguments() -> None:
    weight, scales = torch.ones(2, 32, device=DEVICE), torch.ones(2, 1, dtype=torch.bfloat16, device=DEVICE)
    for out in launch.fake_quantize(weight, QuantizerConfig(), scales):
        out.zero_()
        assert (weight == 1).all() and (scales == 1).all()


# ------------------------------------------------------------------------------------------------------------ packed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES[:10:2], (5, 192, 96), (4, 256, 64), (40, 130, -1), (3, 4224, 32)], ids=str)
def test_unpacked_weights(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, columns, group = shape
    config = QuantizerConfig(group_size=group)
    codes, scales = quantize(gaussian(rows, columns, dtype, columns), config)
    codes[0, : columns // 2] = 0
    unpacked = launch.unpack_weight(pack(codes).to(DEVICE), scales.to(DEVICE), columns, group, dtype).cpu()
    assert same_bits(unpacked, dequantize(codes, scales, config, dtype))


def test_unpacked_groups_of_a_scale_that_is_not_finite_are_nan() -> None:
    codes = torch.ones(2, 64, dtype=torch.int8)
    codes[0, :16] = 0
    scales = torch.tensor([[float("inf"), 1.0], [float("nan"), 1.0]], dtype=torch.bfloat16)
    for dtype in DTYPES:
        values = launch.unpack_weight(pack(codes).to(DEVICE), scales.to(DEVICE), 64, 32, dtype)
        assert values[:, :32].isnan().all() and values[:, 32:].eq(1).all()


# ------------------------------------------------------------------------------------------------------ many weights


MIXED = [(3, 33, -1), (40, 256, 32), (1, 4096, -1), (7, 1024, 128), (9, 300, -1), (5, 64, -1), (2, 128, 64)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("options", "launches"),
    [
        # Launches: groups up to 64, at addresses that are multiples of 16 and others, and groups up to 32, 4096, 128,
        # 512.
        ({}, 6),
        ({"tile": 256}, 6),
        # Groups of 4096 and of 300 elements do not fit, so that each has a launch of its own and is read twice.
        ({"resident": 128}, 6),
    ],
    ids=str,
)
def test_many_weights_together(dtype: torch.dtype, options: dict, launches: int) -> None:
    weights = [gaussian(rows, columns, dtype, columns) for rows, columns, _ in MIXED]
    groups = [group for *_, group in MIXED]
    expected = [run(w, group) for w, group in zip(weights, groups, strict=True)]
    ours = [w.to(DEVICE) for w in weights]
    for targets in ([torch.empty_like(w) for w in ours], ours):
        scales = [torch.empty_like(s, device=DEVICE) for _, s in expected]
        assert launch.fake_quantize_all(ours, targets, scales, groups, QuantizerConfig(), **options) == launches
        for q, s, (values, theirs) in zip(targets, scales, expected, strict=True):
            assert same_bits(q.cpu(), values) and torch.equal(s.cpu(), theirs)


@pytest.mark.slow
def test_weights_of_one_shape_need_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [gaussian(2, 64, torch.bfloat16, i).to(DEVICE) for i in range(37)]
    expected = [run(w.cpu(), -1)[0] for w in weights]
    scales = [torch.empty(2, 1, dtype=torch.bfloat16, device=DEVICE) for _ in weights]
    again = [w.clone() for w in weights]
    assert launch.fake_quantize_all(weights, weights, scales, [-1] * 37, QuantizerConfig()) == 1
    assert all(same_bits(w.cpu(), q) for w, q in zip(weights, expected, strict=True))
    monkeypatch.setattr(launch, "GROUPED_WEIGHTS", 16)
    assert launch.fake_quantize_all(again, again, scales, [-1] * 37, QuantizerConfig()) == 3
    assert all(same_bits(w.cpu(), q) for w, q in zip(again, expected, strict=True))


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(latents=LATENTS)
def test_together_as_each_alone(latents: list[Latent]) -> None:
    before = registry._requested
    set_backend("triton", DEVICE)
    try:
        check_together(latents, device=DEVICE)
    finally:
        set_backend(before, DEVICE)


def test_bad_input() -> None:
    weight = torch.zeros(2, 96, device=DEVICE)
    ones = torch.ones(2, 3, device=DEVICE)
    with pytest.raises(ValueError, match=r"group_size=64.*96.*use -1 or one of"):
        run(weight, 64, EPS)
    with pytest.raises(ValueError, match=r"pass bfloat16 of shape \(2, 3\)"):
        run(weight, 32, EPS, ones)
    scales = torch.ones(2, 3, dtype=torch.bfloat16)
    for packed in (torch.zeros(2, 64, dtype=torch.uint8), torch.zeros(2, 32), torch.zeros(32, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"rows of 96: pass uint8 \[out, 32\]"):
            launch.unpack_weight(packed, scales, 96, 32, torch.float32)
    packed = torch.zeros(2, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"scales of shape \(2, 3\).*pass bfloat16 of shape \(2, 1\)"):
        launch.unpack_weight(packed, scales, 96, -1, torch.float32)
    with pytest.raises(ValueError, match="dtype torch.int8"):
        launch.unpack_weight(packed, scales, 96, 32, torch.int8)


# ---------------------------------------------------------------------------------------------------- as the backend


@pytest.fixture
def active() -> Iterator[None]:
    """Selects Triton as the backend of the op."""
    before = registry._requested
    assert set_backend("triton", DEVICE).backend.name == "triton"
    yield
    set_backend(before, DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_scale", [False, True])
@pytest.mark.parametrize("group", [-1, 32])
def test_opcheck(dtype: torch.dtype, with_scale: bool, group: int, active: None) -> None:
    weight = gaussian(6, 64, dtype).to(DEVICE).requires_grad_()
    scale = torch.ones(6, 1 if group == -1 else 2, dtype=torch.bfloat16, device=DEVICE) if with_scale else None
    torch.library.opcheck(
        torch.ops.bitcpm.fake_quantize.default, (weight, *astuple(QuantizerConfig(group_size=group)), scale)
    )


def test_the_gradient_passes_unchanged(active: None) -> None:
    weight = gaussian(8, 64, torch.bfloat16).to(DEVICE).requires_grad_()
    upstream = torch.randn(8, 64, device=DEVICE).to(torch.bfloat16)
    upstream[2, :3] = torch.tensor([-0.0, float("inf"), 0.0])
    quantized = fake_quantize(weight, QuantizerConfig(group_size=32))
    assert same_bits(quantized.detach().cpu(), run(weight.detach().cpu(), 32)[0])
    quantized.backward(upstream)
    assert same_bits(weight.grad, upstream)


@pytest.mark.slow
def test_training_gives_the_losses_of_the_torch_backend(single_rank: None) -> None:
    before = registry._requested
    try:
        theirs, ours = (tiny_gpt.train(name, DEVICE, 32) for name in ("torch", "triton"))
    finally:
        set_backend(before, DEVICE)
    tiny_gpt.assert_equal(ours, theirs)


# -------------------------------------------------------------------------------------------------- who may use it


def test_the_interpreter_serves_a_cpu_by_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    registered = {b.name: b for b in backends()}["triton"]
    assert registered.priority == (None if launch.INTERPRETED else 10)
    monkeypatch.setattr(backend, "_INTERPRETED", True)
    assert backend.unavailable("cpu") is None
    assert "on the host" in backend.unavailable("cuda") and "on the host" in backend.unavailable("npu")
    monkeypatch.setattr(backend, "_INTERPRETED", False)
    assert backend.unavailable("cuda") is None
    assert "TRITON_INTERPRET=1" in backend.unavailable("cpu")
    assert "not triton-ascend" in backend.unavailable("npu")
    assert "not meant for xpu" in backend.unavailable("xpu")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install triton" in backend.unavailable("cuda")
    assert "pip install triton-ascend" in backend.unavailable("npu")


_LAZY = """
import sys, torch, bitcpm_megatron
from bitcpm_megatron.ops import active_backend, backends
from bitcpm_megatron.ops.triton import unavailable
assert "TRITON_INTERPRET=1" in unavailable("cpu")
print({b.name: b.priority for b in backends()}["triton"], active_backend("cpu").backend.name, "triton" in sys.modules)
"""

# The kernels are compiled as on a GPU machine, in a process without the interpreter; ptxas is part of the wheel.
_COMPILE = """
import re
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bitcpm_megatron.inference.kernels.packed_product import packed_product
from bitcpm_megatron.ops.triton.grouped import quantize_grouped
from bitcpm_megatron.ops.triton.launch import space_number
from bitcpm_megatron.ops.triton.resident import quantize_resident
from bitcpm_megatron.ops.triton.streamed import quantize_streamed
from bitcpm_megatron.ops.triton.packed import unpack_weight

def compile(kernel, capability, pointers, numbers, **constants):
    names = kernel.arg_names
    signature = dict(zip(names, pointers + numbers)) | {name: "constexpr" for name in constants}
    aligned = len(pointers) + 2 * (numbers[1] == "i32")
    attributes = {(i,): [["tt.divisibility", 16]] for i in range(aligned)}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4}).asm["ptx"]
    assert ".ftz" not in ptx and "div.full" not in ptx and "div.approx" not in ptx, "other arithmetic than fp32's"
    floats = re.search(r"\\b(max|min)\\.[\\w.]*f(16|32|64)", ptx)
    assert floats is None, "a GPU's max and min drop a NaN, unlike the interpreter's"
    assert "local" not in ptx, "registers are spilled"
    return ptx

ptx = compile(quantize_resident, 90, ["*i16"] * 3, ["i32", "i32", "fp32", "fp32"],
              ABSMAX=False, SPACE=0, GIVEN=False, BF16=True, SIZE=4096, LEVELS=12, TILE=4096)
# 4096 weights of 2 bytes over 128 threads: each byte moves once, in pieces of 16.
assert ptx.count("ld.global.v4.b32") == 4 and ptx.count("ld.global") == 4, ptx
assert ptx.count("st.global.v4.b32") == 4 and ptx.count("st.global") == 5, ptx
ptx = compile(quantize_grouped, 90, ["*i64"], ["i32", "fp32", "fp32"],
              ABSMAX=False, SPACE=0, STORED=tl.int16, BF16=True, ALIGNED=True, SIZE=4096, LEVELS=12, TILE=4096,
              WEIGHTS=256)
assert ptx.count("ld.global.v4.b32") == 4 and ptx.count("st.global.v4.b32") == 4, ptx
compile(quantize_grouped, 80, ["*i64"], ["i32", "fp32", "fp32"],
        ABSMAX=False, SPACE=0, STORED=tl.float32, BF16=False, ALIGNED=False, SIZE=128, LEVELS=7, TILE=4096, WEIGHTS=1)
compile(quantize_resident, 80, ["*fp16", "*fp16", "*i16"], ["i32", "i32", "fp32", "fp32"],
        ABSMAX=False, SPACE=0, GIVEN=True, BF16=False, SIZE=128, LEVELS=7, TILE=2048)
compile(quantize_resident, 90, ["*i16"] * 3, ["i32", "i32", "fp32", "fp32"],
        ABSMAX=True, SPACE=space_number("five-value"), GIVEN=False, BF16=True, SIZE=4096, LEVELS=12, TILE=4096)
compile(quantize_streamed, 100, ["*fp32", "*fp32", "*i16"], ["i32", "i32", "fp32", "fp32"],
        ABSMAX=False, SPACE=0, GIVEN=False, BF16=False, SIZE=4096, LEVELS=12, PIECES=16, PIECE_LEVELS=4)
compile(unpack_weight, 80, ["*u8", "*i16", "*fp16"], ["i32"] * 5, BF16=False, BLOCKS=32)
compile(packed_product, 90, ["*i16", "*u8", "*i16", "*fp32"], ["i32"] * 5, BF16=True, ROWS=8)
print("compiled")
"""


def python(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_triton_is_imported_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert python(_LAZY, tmp_path, monkeypatch) in ("10 cpu False", "10 torch False")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the wheel with ptxas is for Linux")
def test_the_kernels_compile_for_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert python(_COMPILE, tmp_path, monkeypatch) == "compiled"


@pytest.mark.skipif(launch.INTERPRETED, reason="needs a GPU")
def test_nothing_waits_for_the_device() -> None:
    weight = torch.randn(1024, 1024, device=DEVICE)
    scales = launch.fake_quantize(weight, QuantizerConfig())[1]  # tunes
    packed = pack(quantize(weight.cpu(), QuantizerConfig())[0]).to(DEVICE)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        launch.fake_quantize(weight, QuantizerConfig())
        launch.unpack_weight(packed, scales, 1024, -1, weight.dtype)
        launch.fake_quantize_all([weight], [weight], [scales], [-1], QuantizerConfig())
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_stands_around_an_int8_gemm_is_the_reference(dtype: torch.dtype) -> None:
    kernels = cuda.kernels()
    assert kernels.name == "triton"
    for shape in ((1, 1), (3, 37), (4, 1500)):
        check_quantize(kernels, activations(*shape, dtype).to(DEVICE))
    check_products(kernels, dtype, DEVICE)
    wild = torch.tensor([[1.0, float("nan")], [float("inf"), 2.0], [1.0, -2.0]], dtype=dtype, device=DEVICE)
    tokens = kernels.quantize(wild, 1e-5, None, True)
    assert tokens.values[:2].isnan().all() and torch.equal(tokens.values[2], quantize_activations(wild[2:], 1, 1e-5)[0])
    assert kernels.product(tokens, torch.ones(2, 3, dtype=torch.int8, device=DEVICE), None)[:2].isnan().all()

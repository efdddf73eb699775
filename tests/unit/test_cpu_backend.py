# SPDX-License-Identifier: Apache-2.0
"""Tests of the C kernel of the CPU backend: the reference's bits, for all shapes, scales and numbers of threads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitcpm_megatron.ops import active_backend, cpu, quantize_weight
from bitcpm_megatron.quantization import WEIGHT_DTYPES, QuantizerConfig, dequantize, quantize, quantize_dequantize

EPS = QuantizerConfig.eps
CHECKOUT = Path(__file__).parents[2]

needs_compiler = pytest.mark.skipif(
    cpu.unavailable("cpu") is not None, reason=f"{cpu.unavailable('cpu')}; apt-get install gcc, then make test"
)


def kernel(weight, group, eps=EPS, scales=None):
    return cpu._kernel(weight, QuantizerConfig(group_size=group, eps=eps), scales)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Asserts that two tensors are equal bit for bit; all NaNs count as equal."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    integer = torch.int32 if found.dtype == torch.float32 else torch.int16
    same = (found.view(integer) == expected.view(integer)) | (found.isnan() & expected.isnan())
    assert same.all(), (found[~same][:5], expected[~same][:5])


def assert_like_reference(weight, group, eps=EPS, scales=None) -> None:
    for ours, theirs in zip(
        kernel(weight, group, eps, scales),
        quantize_dequantize(weight, QuantizerConfig(group_size=group, eps=eps), scales),
        strict=True,
    ):
        assert_same(ours, theirs)


@needs_compiler
@settings(max_examples=300, deadline=None)
@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 3),
    group=st.sampled_from([-1, 32, 64, 96, 128, 160, 256, 512]),
    dtype=st.sampled_from(WEIGHT_DTYPES),
    exponent=st.integers(-40, 15),
    eps=st.sampled_from([EPS, 2.0**-100, 0.25]),
    seed=st.integers(0, 2**32 - 1),
    special=st.lists(st.sampled_from([0.0, -0.0, 1e-40, -6e-8, 65504.0, float("inf"), float("nan")]), max_size=3),
)
def test_any_weight(rows, groups, group, dtype, exponent, eps, seed, special) -> None:
    columns = groups * group if group > 0 else 1 + seed % 700
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=g) * 2.0**exponent
    weight.view(-1)[: len(special)] = torch.tensor(special)[: weight.numel()]
    assert_like_reference(weight.to(dtype), group, eps)


@needs_compiler
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_every_scale_that_bf16_has(dtype: torch.dtype) -> None:
    """Each of the 65,536 bf16 patterns is a given scale, including negative, subnormal, infinite and NaN ones."""
    scales = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).reshape(-1, 1)
    half = scales.float() / 2
    near = torch.stack([half.to(dtype), torch.nextafter(half, torch.zeros(())).to(dtype)], 1).reshape(-1, 2)
    weight = torch.cat([near, -near, scales.to(dtype), torch.zeros_like(half).to(dtype)], 1)
    weight = torch.cat([weight, torch.tensor([[float("inf"), float("nan")]], dtype=dtype).expand(2**16, 2)], 1)
    assert_like_reference(weight, -1, scales=scales)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.verifies(
    "quantizer",
    "the C kernel equals the reference bit for bit, for every bf16 and fp16 weight and for every bf16 scale",
    cuda="-",
    npu="-",
)
def test_every_weight_of_16_bits(dtype: torch.dtype) -> None:
    weight = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).reshape(-1, 64)
    for scale in (1e-5, 6e-8, 0.02, 1.0, 65280.0, 3e38):
        given = torch.full((weight.shape[0], 2), scale, dtype=torch.bfloat16)
        assert_like_reference(weight, 32, scales=given)


@needs_compiler
def test_threads_and_layout_change_no_bit() -> None:
    weight = torch.randn(257, 4096) * 0.02
    expected = kernel(weight, -1)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            for same in (weight, weight.t().contiguous().t()):
                for ours, theirs in zip(kernel(same, -1), expected, strict=True):
                    assert torch.equal(ours, theirs)
    finally:
        torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_threads_share_out_many_weights_and_change_no_bit(dtype: torch.dtype) -> None:
    """The shares of threads end between weights and within weights."""
    shapes = [(3, 33, -1), (257, 1024, 128), (1, 70_001, -1), (1, 1, -1), (40, 4096, 32), (9, 100, -1)]
    latent = [(torch.randn(rows, columns) * 0.02).to(dtype) for rows, columns, _ in shapes]
    groups = [group for *_, group in shapes]
    expected = [quantize_dequantize(w, QuantizerConfig(group_size=g)) for w, g in zip(latent, groups, strict=True)]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7, 13):
            torch.set_num_threads(threads)
            weights = [w.clone() for w in latent]
            for targets in ([torch.empty_like(w) for w in weights], weights):
                scales = [torch.empty_like(s) for _, s in expected]
                assert cpu._grouped(weights, targets, scales, groups, QuantizerConfig()) == 1
                for found, own, (quantized, theirs) in zip(targets, scales, expected, strict=True):
                    assert_same(found, quantized)
                    assert_same(own, theirs)
    finally:
        torch.set_num_threads(before)


@needs_compiler
def test_auto_takes_it_and_the_op_agrees_with_quantize_and_dequantize() -> None:
    assert active_backend("cpu").backend.name == "cpu"
    for dtype in WEIGHT_DTYPES:
        weight = (torch.randn(64, 1024) * 0.02).to(dtype)
        for group in (-1, 128):
            config = QuantizerConfig(group_size=group)
            found, scales = quantize_weight(weight, config)
            codes, expected = quantize(weight, config)
            assert torch.equal(scales, expected)
            assert torch.equal(found, dequantize(codes, expected, config, dtype))


def load_elsewhere(**environment: str) -> subprocess.CompletedProcess:
    """Prints, in a new process, why the CPU backend is unavailable there, and which backend would run."""
    code = (
        "from bitcpm_megatron.ops import active_backend, cpu\n"
        "print(cpu.unavailable('cpu'), '|', active_backend('cpu').backend.name)"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), **environment},
    )


@pytest.mark.slow
def test_without_a_compiler_torch_serves_and_the_report_says_why(tmp_path: Path) -> None:
    broken = tmp_path / "cc"
    broken.write_text('#!/bin/sh\nif [ "$1" = --version ]; then echo 1; else echo no space >&2; exit 1; fi\n')
    broken.chmod(0o755)
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\nif [ \"$1\" != --version ]; then printf ' \\n\\377\\n' >&2; exit 1; fi\n")
    silent.chmod(0o755)
    cache = str(tmp_path / "cache")
    for environment, why in (
        ({"CC": "absent-compiler"}, "CC=absent-compiler is not there"),
        ({"CC": str(broken)}, "could not build it: no space"),
        ({"CC": str(silent)}, "could not build it"),
        ({"BITCPM_CACHE_DIR": "/proc/none"}, "could not build it"),
    ):
        said = load_elsewhere(**{"BITCPM_CACHE_DIR": cache, **environment}).stdout
        assert why in said and said.endswith("| torch\n"), said
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.slow
@needs_compiler
def test_a_cache_that_others_may_write_to_is_not_used(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    said = load_elsewhere(BITCPM_CACHE_DIR=str(tmp_path)).stdout
    assert "can be written by others" in said and "BITCPM_CACHE_DIR" in said


@pytest.mark.slow
@needs_compiler
def test_processes_that_compile_at_once_leave_one_library(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from bitcpm_megatron.ops import cpu; print(cpu.unavailable('cpu'))"]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "BITCPM_CACHE_DIR": str(tmp_path / "cache")}
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(3)]
    assert [process.communicate()[0] for process in started] == ["None\n"] * 3
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.slow
@needs_compiler
def test_a_library_that_was_cut_short_is_built_anew_and_a_compiler_may_have_arguments(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    environment = {"BITCPM_CACHE_DIR": str(cache), "CC": "cc -O1"}
    assert load_elsewhere(**environment).stdout == "None | cpu\n"
    (library,) = cache.iterdir()
    library.write_bytes(b"")
    assert load_elsewhere(**environment).stdout == "None | cpu\n"
    assert library.stat().st_size > 1000


@needs_compiler
def test_tensors_elsewhere_never_reach_the_kernel() -> None:
    weight = torch.randn(4, 64)
    with torch.device("meta"):
        assert torch.equal(kernel(weight, -1)[0], quantize_dequantize(weight, QuantizerConfig())[0])
    with pytest.raises(RuntimeError, match="on a weight on meta"):
        kernel(weight.to("meta"), -1)
    with pytest.raises((RuntimeError, NotImplementedError)):
        kernel(weight, -1, scales=torch.ones(4, 1, dtype=torch.bfloat16, device="meta"))

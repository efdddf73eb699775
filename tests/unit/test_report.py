# SPDX-License-Identifier: Apache-2.0
"""Tests of ``python -m bitcpm_megatron``: the report, and the self-test that decides its exit status."""

import dataclasses
import re
from collections.abc import Callable

import pytest
import torch

from bitcpm_megatron import __main__ as report
from bitcpm_megatron.ops import Backend, register_backend, registry
from bitcpm_megatron.ops.self_test import self_test
from bitcpm_megatron.quantization import QuantizerConfig, quantize_dequantize

Results = tuple[torch.Tensor, torch.Tensor]
GOOD = Backend("good", quantize_dequantize, lambda device: None, 5)


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Provides a registry with only the torch backend, on a CPU; changes to it end with the test."""
    monkeypatch.setattr(registry, "_BACKENDS", {"torch": registry._BACKENDS["torch"]})
    monkeypatch.setattr(registry, "_requested", "auto")
    monkeypatch.setattr(registry, "_choices", {})
    monkeypatch.setattr(report, "_devices", lambda: ["cpu"])


def changed(change: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], Results]) -> Backend:
    """Returns a backend that is the reference, with a change to its results (weight, scales, given scales)."""

    def kernel(weight: torch.Tensor, config: QuantizerConfig, scales: torch.Tensor | None) -> Results:
        return change(*quantize_dequantize(weight, config, scales), scales)

    return dataclasses.replace(GOOD, kernel=kernel)


def steps(scales: torch.Tensor, n: int) -> torch.Tensor:
    return (scales.view(torch.int16) + n).view(torch.bfloat16)


def test_the_reference_passes() -> None:
    assert self_test(GOOD, "cpu") is None


@pytest.mark.parametrize(("n", "fails"), [(1, False), (-1, False), (2, True)])
def test_a_scale_may_lie_one_step_aside(n: int, fails: bool) -> None:
    def kernel(weight: torch.Tensor, config: QuantizerConfig, scales: torch.Tensor | None) -> Results:
        if scales is None:
            scales = steps(quantize_dequantize(weight, config)[1], n)
        return quantize_dequantize(weight, config, scales)

    wrong = self_test(dataclasses.replace(GOOD, kernel=kernel), "cpu")
    assert (wrong is not None) == fails
    assert not fails or "2 bf16 steps" in wrong


def one_other_value(q: torch.Tensor, s: torch.Tensor, given: torch.Tensor | None) -> Results:
    q[0, 0] = -q[0, 0] if q[0, 0] else s[0, 0]
    return q, s


def minus_zero(q: torch.Tensor, s: torch.Tensor, given: torch.Tensor | None) -> Results:
    return torch.where(q == 0, -torch.zeros_like(q), q), s


def nan(q: torch.Tensor, s: torch.Tensor, given: torch.Tensor | None) -> Results:
    q[-1, -1] = torch.nan
    return q, s


def other_dtype(q: torch.Tensor, s: torch.Tensor, given: torch.Tensor | None) -> Results:
    return q.double(), s


def fp32_scales(q: torch.Tensor, s: torch.Tensor, given: torch.Tensor | None) -> Results:
    return q, s.float()


def given_scales_ignored(q: torch.Tensor, s: torch.Tensor, given: torch.Tensor | None) -> Results:
    return (q, s) if given is None else (q / 2, s)


def given_scales_not_returned(q: torch.Tensor, s: torch.Tensor, given: torch.Tensor | None) -> Results:
    return (q, s) if given is None else (q, s / 2)


def crash(q: torch.Tensor, s: torch.Tensor, given: torch.Tensor | None) -> Results:
    raise OSError("no such symbol")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (one_other_value, "its own scale: 1 of 8448 weights differ"),
        (minus_zero, "differ from the reference"),
        (nan, "1 of 8448 weights differ"),
        (other_dtype, "8448 of 8448"),
        (fp32_scales, "scales of shape .*float32"),
        (given_scales_ignored, "a given scale: .* differ"),
        (given_scales_not_returned, "does not return the scale"),
        (crash, "OSError: no such symbol"),
    ],
)
def test_a_wrong_backend_is_found_and_decides_the_status(
    change: Callable, message: str, capsys: pytest.CaptureFixture
) -> None:
    wrong = self_test(changed(change), "cpu")
    assert wrong is not None and re.search(message, wrong)
    register_backend(GOOD)
    assert report.main([]) == 0
    register_backend(changed(change))
    assert report.main([]) == 3
    printed = capsys.readouterr().out
    assert f"cpu: backend good: available; self-test: FAILED: {wrong}" in printed


def test_a_wrong_grouped_kernel_is_found() -> None:
    def grouped(weights, quantized, scales, group_sizes, config) -> int:
        GOOD.together(weights, quantized, scales, group_sizes, config)
        quantized[-1][0, 0] += 1
        return 1

    def broken(*arguments: object) -> int:
        raise OSError("no such symbol")

    assert self_test(dataclasses.replace(GOOD, grouped=GOOD.together), "cpu") is None
    wrong = self_test(dataclasses.replace(GOOD, grouped=grouped), "cpu")
    assert wrong is not None and re.search(r"4 weights together, .*: 1 values and 0 scales of shape \(2, 4096\)", wrong)
    wrong = self_test(dataclasses.replace(GOOD, grouped=broken), "cpu")
    assert wrong is not None and "together" in wrong and "no such symbol" in wrong


def test_the_report(capsys: pytest.CaptureFixture) -> None:
    register_backend(dataclasses.replace(GOOD, name="emulated", priority=None))
    register_backend(Backend("chip", crash, lambda device: "needs the chip", 20))
    assert report.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("bitcpm_megatron ") and lines[1].startswith("packages: torch ")
    assert "cpu: backend chip: not available: needs the chip" in lines
    assert any(line.startswith("cpu: backend torch: available; self-test: ok") for line in lines)
    assert any(line.startswith("cpu: backend emulated: available; self-test: ok") for line in lines)
    assert lines[-1] == "cpu: would use torch (best available (not chip: needs the chip; not emulated: only by name))"

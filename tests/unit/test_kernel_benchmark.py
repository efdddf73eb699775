# SPDX-License-Identifier: Apache-2.0
"""Tests that the kernel benchmark runs, writes its results, and refuses to time an incorrect backend."""

import csv
import importlib.util
import itertools
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import bitcpm_megatron.ops.cpu
from bitcpm_megatron.cli import MismatchError
from bitcpm_megatron.ops import Backend, register_backend, registry
from bitcpm_megatron.quantization import QuantizerConfig, quantize_dequantize


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Imports the script as a module, with a registry that has only the torch backend."""
    path = Path(__file__).parents[2] / "benchmarks" / "kernel.py"
    monkeypatch.syspath_prepend(path.parent)
    spec = importlib.util.spec_from_file_location("kernel_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "kernel_benchmark", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(registry, "_BACKENDS", {"torch": registry._BACKENDS["torch"]})
    monkeypatch.setattr(registry, "_choices", {})
    return module


def run(benchmark: ModuleType, tmp_path: Path, *arguments: str) -> int:
    fixed = ["--device", "cpu", "--models", "tiny-llama", "--rounds", "2", "--ring", "1", "--groups", "-1", "32"]
    return benchmark.main([*fixed, "--output-dir", str(tmp_path), *arguments])


def test_it_measures_every_backend_and_writes_a_table(
    benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    register_backend(Backend("also", quantize_dequantize, lambda device: None, 1, grouped=lambda *lists: 1))
    register_backend(Backend("emulated", quantize_dequantize, lambda device: None, None))
    register_backend(Backend("chip", quantize_dequantize, lambda device: "needs the chip", 20))
    assert run(benchmark, tmp_path, "--layers", "fc1", "--dtypes", "bf16", "fp32") == 0
    with open(tmp_path / "kernel-cpu.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(r["backend"], r["dtype"], r["group"]) for r in rows] == [
        (name, dtype, group) for group in ("-1", "32") for dtype in ("bf16", "fp32") for name in ("also", "torch")
    ]
    for row in rows:
        assert float(row["microseconds"]) > 0 and float(row["copy_microseconds"]) > 0
        assert float(row["copies"]) == pytest.approx(
            float(row["microseconds"]) / float(row["copy_microseconds"]), rel=0.01
        )
    assert (tmp_path / "kernel-cpu.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    # There is one weight in each of 2 layers.
    for dtype, group in itertools.product(("bf16", "fp32"), ("-1", "32")):
        assert f"| tiny-llama | {dtype} | {group} | 2 | also | 1 |\n" in printed
        assert f"| tiny-llama | {dtype} | {group} | 2 | torch | 2 |\n" in printed
    assert printed.count("| tiny-llama fc1 |") == 8 and "Hardware: " in printed and "Command: `python " in printed


def test_a_backend_that_is_wrong_is_not_timed(
    benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def wrong(weight: torch.Tensor, config: QuantizerConfig, scales: torch.Tensor | None) -> tuple:
        quantized, scales = quantize_dequantize(weight, config, scales)
        return quantized.neg(), scales

    register_backend(Backend("wrong", wrong, lambda device: None, 1))
    assert run(benchmark, tmp_path) == 1
    assert "error: wrong is wrong on" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--backends", "magic"), "--backends magic: there are"),
        (("--backends", "chip"), "--backends chip cannot run on cpu: needs the chip"),
        (("--groups", "8192"), "does not divide"),
    ],
)
def test_bad_arguments(
    benchmark: ModuleType, tmp_path: Path, arguments: tuple, message: str, capsys: pytest.CaptureFixture
) -> None:
    register_backend(Backend("chip", quantize_dequantize, lambda device: "needs the chip", 20))
    assert run(benchmark, tmp_path, *arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_another_commits_kernel_is_measured_beside_ours_and_leaves_no_trace(tmp_path: Path) -> None:
    import kernel_against

    before = dict(registry._BACKENDS)
    if reason := before["cpu"].unavailable("cpu"):
        pytest.skip(f"{reason}; apt-get install gcc, then make test")
    others = []
    for number, scale in enumerate(("found", "found * 2")):
        other = shutil.copytree(Path(bitcpm_megatron.ops.cpu.__file__).parent, tmp_path / str(number))
        source = other / "fake_quantize.c"
        text = source.read_text(encoding="utf-8")
        assert text.count("quantizer->eps : found);") == 1
        text = text.replace("quantizer->eps : found);", f"quantizer->eps : {scale});")
        source.write_text(f"// another commit\n{text}", encoding="utf-8")
        others.append(kernel_against.load_kernel(other))
        shutil.rmtree(other)
    there, doubled = others
    assert before == registry._BACKENDS and there is not before["cpu"].kernel
    both = {"there": there, "here": before["cpu"].kernel}
    found = kernel_against.row((4, 64), torch.bfloat16, 32, both, 6)
    assert found.startswith("4 x 64 | bfloat16 | 32 | ") and found.count("|") == 4
    with pytest.raises(MismatchError, match="doubled and there differ"):
        kernel_against.row((4, 64), torch.bfloat16, 32, {"there": there, "doubled": doubled}, 6)
    both["here"] = lambda weight, config, scales: there(weight * 2, config, scales)
    with pytest.raises(MismatchError, match=r"here and there differ on 4 x 64 \| float32 \| -1"):
        kernel_against.row((4, 64), torch.float32, -1, both, 6)

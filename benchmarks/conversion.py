# SPDX-License-Identifier: Apache-2.0
"""Benchmark of the converters against a plain copy of the same bytes: time and memory, on a synthetic Llama.

    python benchmarks/conversion.py --size 2GiB --layers 16 --repeats 3

Each conversion runs in a process of its own, with the command line that a user would type, directly after a copy of its
source directory, which is synced to disk as the converters sync their output. Sources are in the page cache in both
cases. A pause precedes both, because a virtual machine that returns freed memory to its host has to get it again.
The goal concerns CPU time: per byte, at most three times that of the copy. The CPU time of a conversion before it
processes any bytes is measured separately, with the same conversion of a model of 2 MiB; so is the CPU time of the
quantization in a conversion that fuses. What is converted back from Megatron is compared with the original model.

The benchmark writes ``conversion.csv`` (every run) and ``conversion.png``, and prints a Markdown table of the medians.
It needs free disk space of about six times the size.

Exit status: 0 done, 1 a conversion failed, was not exact or took more memory than its bound, 2 bad arguments.
"""

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import safetensors
import torch
from hardware import check_outputs, command_line, linux, machine, versions
from random_models import CONFIG, Model, shape, write_model, write_ternary
from report.pictures import bars, level, picture
from report.tables import markdown, write_csv
from safetensors import safe_open
from tqdm import tqdm

from bitcpm_megatron import checkpoint_tools, cli, dequantize, quantize
from bitcpm_megatron.checkpoint_tools.command import one_thread
from bitcpm_megatron.checkpoint_tools.quantizer.fuse import fuse_blocks
from bitcpm_megatron.checkpoint_tools.storage.reader import ConversionError, TensorInfo
from bitcpm_megatron.checkpoint_tools.storage.safetensors_writer import parse_size
from bitcpm_megatron.checkpoint_tools.storage.torch_dist_reader import TorchDistReader
from bitcpm_megatron.checkpoints.directory import RELEASE
from bitcpm_megatron.files import publish
from bitcpm_megatron.models.architecture import MAX_LAYERS
from bitcpm_megatron.quantization.record import SCALE_SUFFIX

TOOLS = Path(checkpoint_tools.__file__).parent
_BLOCK = 2**24
MIB = 2**20
GOAL = 3.0
"""Goal for the CPU time of a conversion per byte, in units of the copy's."""
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
_LARGEST = 2**44
_POLL_SECONDS = 0.01


@dataclass(frozen=True)
class Case:
    """A conversion to measure.

    Attributes:
        name: the name of the conversion in the table.
        source: the directory to read.
        target: the directory to create.
        command: the tool and its arguments, without the two directories.
        expected: the weights expected in a Hugging Face directory, "model" or "ternary"; None if a later case checks
            the result.
    """

    name: str
    source: Path
    target: Path
    command: Sequence[str]
    expected: str | None = None


@dataclass(frozen=True)
class Result:
    """One run of a conversion and of the copy before it; memory in bytes.

    Attributes:
        repeat: the number of the repeat, from 1.
        conversion: the name of the conversion.
        source_bytes: the size of the source directory.
        copy_seconds: the duration of the copy, until it is on disk.
        copy_cpu_seconds: the CPU time of the copy.
        seconds: the duration of the conversion, from the start of its process to the end.
        start_cpu_seconds: the CPU time before any bytes are processed: that of the same conversion of a tiny model.
        quantizing_cpu_seconds: the CPU time of quantizing the same weights in memory; 0 if nothing is quantized.
        cpu_seconds: the CPU time of the conversion.
        rss_anon: the largest anonymous resident memory that was seen.
        vm_hwm: the peak resident memory, including mapped pages of files.
        memory_bound: the bound for ``rss_anon``.
    """

    repeat: int
    conversion: str
    source_bytes: int
    copy_seconds: float
    copy_cpu_seconds: float
    seconds: float
    start_cpu_seconds: float
    quantizing_cpu_seconds: float
    cpu_seconds: float
    rss_anon: int
    vm_hwm: int
    memory_bound: int

    @property
    def cpu_per_byte(self) -> float:
        """CPU time per byte without that of the start, in units of the copy's."""
        return (self.cpu_seconds - self.start_cpu_seconds) / self.copy_cpu_seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the measurements that the command line describes, and returns the exit status."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="2GiB", help="of the model's weights, about; default 2GiB")
    parser.add_argument("--layers", type=cli.Whole(1, MAX_LAYERS), default=16)
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="bf16")
    parser.add_argument("--vocab-size", type=cli.Whole(1, 2**24), default=32000)
    parser.add_argument("--repeats", type=cli.Whole(1, 1000), default=3)
    parser.add_argument(
        "--pause", type=cli.Number(0, 3600), default=5.0, metavar="SECONDS", help="before each measurement, default 5"
    )
    parser.add_argument(
        "--work-dir", type=Path, help="on the disk to measure; default the system's temporary directory"
    )
    parser.add_argument("--output-dir", type=Path, default=Path("docs/benchmarks"))
    args = parser.parse_args(argv)
    return cli.run(lambda: _measure(args, command_line("conversion", argv)))


def _measure(args: argparse.Namespace, command: str) -> int:
    check_outputs(args.output_dir)
    nbytes = parse_size(args.size)
    if nbytes > _LARGEST:
        raise ConversionError(f"--size {args.size}: at most {_LARGEST // 2**40} TiB")
    architecture = shape(nbytes, args.layers, args.vocab_size, _DTYPES[args.dtype].itemsize)
    with tempfile.TemporaryDirectory(prefix="bench-conversion-", dir=args.work_dir) as work:
        model = Model(architecture, _DTYPES[args.dtype], Path(work) / "whole" / "model")
        # The file is written after every repeat, so that an interrupted run of hours leaves results.
        for results in measure(model, Path(work), args.repeats, args.pause):
            write_csv([asdict(result) for result in results], args.output_dir / "conversion.csv", ".3f")
    draw(results, args.output_dir / "conversion.png")
    print(table(results, model, command))
    return 0 if all(r.rss_anon <= r.memory_bound for r in results) else 1


def measure(model: Model, work: Path, repeats: int, pause: float = 0.0) -> Iterator[list[Result]]:
    """Measures and checks all conversions of a model.

    Args:
        model: the model to create and convert.
        work: an empty directory.
        repeats: the number of runs of each conversion.
        pause: the seconds to wait before each conversion and each copy.

    Yields:
        The results of all runs so far, after each repeat.

    Raises:
        FailedError: if a conversion fails or is not exact.
    """
    tiny = Model(shape(2**21, 1, 256, model.dtype.itemsize), model.dtype, work / "tiny" / "model")
    results: list[Result] = []
    with tqdm(total=1 + repeats * 5, unit="step", disable=None) as bar:
        bar.set_description("making the models")
        cases, tiny_cases = _prepared(model), _prepared(tiny)
        bar.update()
        for repeat in range(1, repeats + 1):
            for case, tiny_case in zip(cases, tiny_cases, strict=True):
                bar.set_description(case.name)
                start = run_tool(tiny_case)["cpu_seconds"]
                shutil.rmtree(case.target, ignore_errors=True)  # here, so that freeing its memory is not measured
                _settle(pause)
                copied = timed_copy(case.source, work / "copy")
                _settle(pause)
                run = run_tool(case)
                size = sum(p.stat().st_size for p in case.source.rglob("*") if p.is_file())
                fuses = case.expected == "ternary"
                quantizing = quantizing_seconds(model, case.source / RELEASE) if fuses else 0.0
                taken = {"start_cpu_seconds": start, "quantizing_cpu_seconds": quantizing, **copied, **run}
                results.append(Result(repeat, case.name, size, **taken, memory_bound=model.memory_bound))
                if case.expected is not None:
                    check(model, case.target, fuses)
                    shutil.rmtree(case.target)
                bar.update()
            yield results


def _prepared(model: Model) -> list[Case]:
    """Creates a model, and the ternary checkpoint that one case reads, and returns the cases of the model."""
    place = model.directory.parent
    to_megatron, to_hf = "convert_hf_to_megatron.py", "convert_megatron_to_hf.py"
    dist, legacy, ternary, out = (place / name for name in ("torch_dist", "legacy", "ternary", "out"))
    cases = [
        Case("HF → torch_dist", model.directory, dist, [to_megatron]),
        Case("torch_dist → HF", dist, out, [to_hf, "--weights", "latent"], "model"),
        Case("HF → legacy", model.directory, legacy, [to_megatron, "--format", "legacy"]),
        Case("legacy → HF", legacy, out, [to_hf, "--weights", "latent"], "model"),
        Case("ternary torch_dist → fused HF", ternary, out, [to_hf, "--weights", "fused"], "ternary"),
    ]
    place.mkdir()
    write_model(model)
    run_tool(cases[0])
    write_ternary(model, dist, ternary)
    return cases


def quantizing_seconds(model: Model, checkpoint: Path) -> float:
    """Returns the CPU seconds of only quantizing the weights of a ternary ``torch_dist`` checkpoint with its scales.

    As in the converter, it is done block by block; the result is dropped.
    """
    reader = TorchDistReader(checkpoint)
    start = time.process_time()
    for tensor in filter(lambda t: t.quantizable, model.tensors):
        key = f"decoder.layers.{tensor.suffix}"
        weight, scales = (reader.read(name, (tensor.layer,)) for name in (key, key + SCALE_SUFFIX))
        info = TensorInfo(tuple(weight.shape), weight.dtype)
        with one_thread():
            for _ in fuse_blocks(tensor.name, weight.__getitem__, info, CONFIG, scales):
                pass
    return time.process_time() - start


def timed_copy(source: Path, target: Path) -> dict[str, float]:
    """Copies a directory, removes the copy, and returns the duration and the CPU time of the copy until it is on disk.

    Returns:
        ``copy_seconds`` and ``copy_cpu_seconds``.
    """
    start, busy = time.perf_counter(), time.process_time()
    temporary = target.with_name("copy.incomplete")
    shutil.copytree(source, temporary)
    publish(temporary, target)
    taken = {"copy_seconds": time.perf_counter() - start, "copy_cpu_seconds": time.process_time() - busy}
    shutil.rmtree(target)
    return taken


def run_tool(case: Case) -> dict[str, float]:
    """Removes the earlier output of a conversion, runs its tool, and measures the process.

    Args:
        case: the conversion.

    Returns:
        ``seconds`` from the start to the end of the process, its ``cpu_seconds``, and in bytes the largest ``rss_anon``
        that was seen and ``vm_hwm``, which includes the mapped pages of files.

    Raises:
        FailedError: if the process ends with another status than 0.
    """
    tool, *options = case.command
    shutil.rmtree(case.target, ignore_errors=True)
    command = ["--load-dir", str(case.source), "--save-dir", str(case.target), *options]
    with tempfile.TemporaryFile("w+") as output:
        before = os.times()
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, str(TOOLS / tool), *command], stdout=output, stderr=subprocess.STDOUT
        )
        rss_anon = vm_hwm = 0
        while process.poll() is None:
            anonymous, high = _memory(process.pid)
            rss_anon, vm_hwm = max(rss_anon, anonymous), max(vm_hwm, high)
            time.sleep(_POLL_SECONDS)
        seconds = time.perf_counter() - start
        after = os.times()
        if process.returncode:
            output.seek(0)
            raise cli.FailedError(f"{case.name} ended with status {process.returncode}:\n{output.read()[-2000:]}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": seconds, "cpu_seconds": cpu, "rss_anon": rss_anon, "vm_hwm": vm_hwm}


def check(model: Model, directory: Path, ternary: bool) -> None:
    """Compares a model directory with the synthetic model, read by the safetensors library, not by the tools' reader.

    Args:
        model: the synthetic model.
        directory: the model directory.
        ternary: whether the weights of linears are expected to be quantized.

    Raises:
        FailedError: if a tensor differs; the message names it.
    """
    quantized = {part for t in model.tensors if t.quantizable for part in t.parts} if ternary else set()
    expected, found = _Opened(model.directory), _Opened(directory)
    if found.files.keys() != expected.files.keys():
        raise cli.FailedError(f"other tensors came back: {sorted(found.files.keys() ^ expected.files.keys())[:5]}")
    for name, info in model.plan.items():
        rows = max(1, _BLOCK * info.shape[0] // info.nbytes)
        if found.slice(name).get_shape() != list(info.shape):
            raise cli.FailedError(f"{name} came back as {found.slice(name).get_shape()}")
        for start in range(0, info.shape[0], rows):
            ours = expected.slice(name)[start : start + rows]
            if name in quantized:
                ours = dequantize(*quantize(ours, CONFIG), CONFIG, ours.dtype)
            if not torch.equal(found.slice(name)[start : start + rows], ours):
                raise cli.FailedError(f"{name} came back with other values in the rows from {start}")


def draw(results: Sequence[Result], path: Path) -> None:
    """Draws the CPU time per byte relative to the copy, and the memory with its bound."""
    medians = {r.conversion.replace(" → ", "\n→ "): r for r in _medians(results)}
    with picture(path, 12, 4.2, panels=2) as (left, right):
        times = {name: r.cpu_per_byte for name, r in medians.items()}
        bars(left, {"": times}, "%.2f", color="#4878a8", size=7)
        level(left, 1, "plain copy of the same bytes")
        level(left, GOAL, f"the goal, {GOAL:.0f} times the copy", is_limit=True)
        left.set_title("CPU time per byte, relative to the copy")
        memory = {name: _largest(results, r) / MIB for name, r in medians.items()}
        bars(right, {"": memory}, "%.0f", color="#6aa56a", size=7)
        level(right, results[0].memory_bound / MIB, "2 x largest tensor of a layer + 1 GiB", is_limit=True)
        right.set_title("peak anonymous memory, MiB")
        for axes in (left, right):
            axes.margins(y=0.15)
            axes.legend(fontsize=8)


def table(results: Sequence[Result], model: Model, command: str) -> str:
    """Returns the medians as a Markdown table, with a description of the model, the machine and the versions."""
    a = model.architecture
    head = (
        "conversion | GB | copy + fsync: s (CPU s) | conversion: s (CPU s) | start, CPU s | quantizing, CPU s | "
        "CPU per byte, of the copy's | peak RssAnon, MiB | VmHWM, MiB"
    )
    rows = (
        f"{m.conversion} | {m.source_bytes / 1e9:.2f} | {m.copy_seconds:.1f} ({m.copy_cpu_seconds:.2f}) | "
        f"{m.seconds:.1f} ({m.cpu_seconds:.2f}) | {m.start_cpu_seconds:.2f} | "
        f"{f'{m.quantizing_cpu_seconds:.2f}' if m.quantizing_cpu_seconds else '-'} | "
        f"{m.cpu_per_byte:.2f}{'' if m.cpu_per_byte <= GOAL else f' (goal of {GOAL:g} missed)'} | "
        f"{_largest(results, m) / MIB:.0f} | {m.vm_hwm / MIB:.0f}"
        for m in _medians(results)
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"""{markdown(head, rows)}

Medians of {max(r.repeat for r in results)} interleaved runs. Model: {a.parameter_count():,} parameters, \
{str(model.dtype).removeprefix("torch.")}, {a.num_layers} layers, hidden {a.hidden_size}, ffn {a.ffn_hidden_size}, \
vocabulary {a.vocab_size}. Seconds of conversions include the start of the process; the CPU time per byte does not. \
Memory bound: {model.memory_bound / MIB:.0f} MiB of RssAnon (largest of all runs).
Hardware: {machine("cpu")}, {memory:.0f} GiB of memory, \
OMP_NUM_THREADS={os.environ.get("OMP_NUM_THREADS", "not set")}, load average at the end {os.getloadavg()[1]:.1f}. \
Versions: {versions(safetensors)}, {linux()}.
Command: `{command}`"""


class _Opened:
    """Opened safetensors files of a directory, by tensor name."""

    def __init__(self, directory: Path) -> None:
        self.files = {}
        for path in sorted(directory.glob("*.safetensors")):
            file = safe_open(path, "pt")
            self.files.update(dict.fromkeys(file.keys(), file))

    def slice(self, name: str) -> "safetensors.PySafeSlice":
        return self.files[name].get_slice(name)


def _memory(pid: int) -> tuple[int, int]:
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0, 0
    found = dict(re.findall(r"^(RssAnon|VmHWM):\s*(\d+) kB", text, re.MULTILINE))
    return int(found.get("RssAnon", 0)) * 1024, int(found.get("VmHWM", 0)) * 1024


def _medians(results: Sequence[Result]) -> list[Result]:
    """Returns the medians of the runs, one result per conversion, in order."""
    medians = []
    for name in dict.fromkeys(r.conversion for r in results):
        runs = [r for r in results if r.conversion == name]
        values = (statistics.median(getattr(r, field.name) for r in runs) for field in fields(Result)[2:])
        medians.append(Result(0, name, *values))
    return medians


def _largest(results: Sequence[Result], of: Result) -> int:
    """Returns the largest anonymous memory over all runs of the same conversion."""
    return max(r.rss_anon for r in results if r.conversion == of.conversion)


def _settle(pause: float) -> None:
    os.sync()
    time.sleep(pause)


if __name__ == "__main__":
    sys.exit(main())

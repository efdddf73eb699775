# SPDX-License-Identifier: Apache-2.0
"""Benchmark of the quantizer's backends against a copy of the same bytes, for the layer shapes of real models.

    python benchmarks/kernel.py                                 # the device that is there; on a CPU a short selection
    python benchmarks/kernel.py --device cuda --models minicpm4-0.5b bitcpm-cann-1b bitcpm-cann-3b minicpm4-8b

A fused quantizer reads a weight once and writes it once, so that it cannot be faster than `weight.clone()`, which is
measured for comparison. In every round, the copy and each backend process a ring of weights that is larger than the
caches, in turn; the medians of the rounds are compared. Results are kept in a ring, too, so that their memory rotates.
Before anything is timed, the first 512 rows of each backend's result are compared bit for bit with the reference under
the backend's scales.

On a shared CPU use one thread: then the CPU time of this thread is measured instead of the elapsed time.

The benchmark writes ``kernel-DEVICE.csv`` and ``kernel-DEVICE.png``, and prints two Markdown tables: the times, and the
number of kernel launches that quantize all weights of a model, which training does once per step.

Exit status: 0 done, 1 a backend was wrong, 2 bad arguments.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from cost.workload import preset
from hardware import best_device, check_outputs, command_line, linux, machine, versions
from report.pictures import bars, level, picture
from report.tables import markdown, write_csv
from tqdm import tqdm

from bitcpm_megatron import cli
from bitcpm_megatron.launch.launcher import presets
from bitcpm_megatron.ops import Backend, backends
from bitcpm_megatron.quantization import QuantizerConfig, check_weight, effective_group, quantize_dequantize
from bitcpm_megatron.ternary_flags import GroupSize

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
_CPU_MODELS = ("minicpm4-0.5b",)
_DEVICE_MODELS = ("minicpm4-0.5b", "bitcpm-cann-1b", "bitcpm-cann-3b", "minicpm4-8b")
_LAYERS = ("qkv", "proj", "fc1", "fc2")
_CPU_RING = 2**29


@dataclass(frozen=True)
class Case:
    """A weight to quantize.

    Attributes:
        name: the names of model and layer.
        rows: the number of output features.
        columns: the number of input features.
        dtype: the short name of the weight's dtype.
        group: the number of elements per scale, -1 for the whole row.
    """

    name: str
    rows: int
    columns: int
    dtype: str
    group: int

    @property
    def config(self) -> QuantizerConfig:
        """Configuration of the quantizer."""
        return QuantizerConfig(group_size=self.group)

    @property
    def nbytes(self) -> int:
        """Bytes that a quantization has to move: the weight twice, its scales once."""
        scales = self.rows * self.columns // effective_group(self.columns, self.group)
        return 2 * self.rows * self.columns * _DTYPES[self.dtype].itemsize + 2 * scales


@dataclass(frozen=True)
class Result:
    """Medians of one backend on one weight; the copy's fastest and slowest round show how idle the machine was.

    Attributes:
        device: the device type.
        backend: the name of the backend.
        name: the names of model and layer.
        rows: the number of output features.
        columns: the number of input features.
        dtype: the short name of the weight's dtype.
        group: the number of elements per scale, -1 for the whole row.
        rounds: the number of rounds.
        ring: the number of weights in the ring.
        microseconds: the median time of the backend per weight.
        copy_microseconds: the median time of the copy per weight.
        copy_fastest: the time of the copy's fastest round per weight, in microseconds.
        copy_slowest: the time of the copy's slowest round per weight, in microseconds.
        gigabytes_per_second: the rate at which the backend moves the bytes that have to move.
    """

    device: str
    backend: str
    name: str
    rows: int
    columns: int
    dtype: str
    group: int
    rounds: int
    ring: int
    microseconds: float
    copy_microseconds: float
    copy_fastest: float
    copy_slowest: float
    gigabytes_per_second: float

    @property
    def copies(self) -> float:
        """Time of the backend in units of the copy's."""
        return self.microseconds / self.copy_microseconds


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the measurements that the command line describes, and returns the exit status."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda", "npu"), default=best_device())
    parser.add_argument("--models", nargs="+", choices=presets.names(), metavar="MODEL")
    parser.add_argument("--layers", nargs="+", choices=_LAYERS, default=_LAYERS)
    parser.add_argument("--dtypes", nargs="+", choices=sorted(_DTYPES))
    parser.add_argument("--groups", nargs="+", type=GroupSize(), default=[-1, 128], metavar="G")
    help_text = "default: all that are available; one that runs by name only has to be named"
    parser.add_argument("--backends", nargs="+", metavar="NAME", help=help_text)
    parser.add_argument("--rounds", type=cli.Whole(1, 10**6), default=9)
    help_text = "of weights and of results each; default 512, on a GPU four times its L2 cache"
    parser.add_argument("--ring", type=cli.Whole(1, 2**20), metavar="MIB", help=help_text)
    parser.add_argument("--threads", type=cli.Whole(1, 1024), help="of the CPU")
    parser.add_argument("--output-dir", type=Path, default=Path("docs/benchmarks"))
    args = parser.parse_args(argv)
    return cli.run(lambda: _measure(args, command_line("kernel", argv)))


def _measure(args: argparse.Namespace, command: str) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    on_cpu = args.device == "cpu"
    models = args.models or (_CPU_MODELS if on_cpu else _DEVICE_MODELS)
    dtypes = args.dtypes or (["bf16", "fp32"] if on_cpu else ["bf16", "fp32", "fp16"])
    check_outputs(args.output_dir)
    if args.device not in ("cpu", best_device()):
        raise ValueError(f"--device {args.device}: there is none here, use {best_device()}")
    cases = cases_of(models, args.layers, dtypes, args.groups)
    chosen = choose(args.backends, args.device)
    ring = args.ring * 2**20 if args.ring else _ring(args.device)
    results = [r for case in tqdm(cases) for r in measure(case, chosen, args.device, args.rounds, ring)]
    rows = [{**asdict(result), "copies": result.copies} for result in results]
    write_csv(rows, args.output_dir / f"kernel-{args.device}.csv", ".3f")
    draw(results, args.output_dir / f"kernel-{args.device}.png")
    print(table(results, command))
    print()
    print(launches(cases, chosen, args.device))


def cases_of(models: Sequence[str], layers: Sequence[str], dtypes: Sequence[str], groups: Sequence[int]) -> list[Case]:
    """Returns the weights of one decoder layer of each model, without tensor parallelism.

    Args:
        models: the names of the presets.
        layers: the names of the linears, such as ``qkv``.
        dtypes: the short names of the dtypes.
        groups: the group sizes.

    Raises:
        ValueError: if a group does not divide a row.
    """
    cases = []
    for model in models:
        linears = {x.path.rpartition("linear_")[2]: x for x in preset(model, 1, 1).layout.linears(0)}
        for layer in layers:
            shape = linears[layer].out_features, linears[layer].in_features
            for group in groups:
                QuantizerConfig(group_size=group)
                check_weight(torch.empty(shape, device="meta"), group)
                cases += [Case(f"{model} {layer}", *shape, dtype, group) for dtype in dtypes]
    return cases


def choose(names: Sequence[str] | None, device: str) -> list[Backend]:
    """Returns the named backends, or for None all available ones that can be chosen automatically.

    Raises:
        ValueError: if a named backend is unknown or unavailable.
    """
    known = {b.name: b for b in backends()}
    if names is None:
        return [b for b in known.values() if b.unavailable(device) is None and b.priority is not None]
    for name in names:
        if name not in known:
            raise ValueError(f"--backends {name}: there are {sorted(known)}")
        reason = known[name].unavailable(device)
        if reason is not None:
            raise ValueError(f"--backends {name} cannot run on {device}: {reason}")
    return [known[name] for name in names]


def measure(case: Case, chosen: Sequence[Backend], device: str, rounds: int, ring: int) -> list[Result]:
    """Measures all backends on one weight, interleaved with the copy.

    Args:
        case: the weight.
        chosen: the backends.
        device: the device type to run on.
        rounds: the number of rounds.
        ring: the bytes of the ring of weights.

    Raises:
        FailedError: if a backend's result differs from the reference under the backend's scales.
    """
    dtype = _DTYPES[case.dtype]
    count = max(2, -(-ring // (case.rows * case.columns * dtype.itemsize)))
    g = torch.Generator().manual_seed(1)
    first = (torch.randn(case.rows, case.columns, generator=g) * 0.02).to(device, dtype)
    weights = [first.roll(i) for i in range(count)]
    for backend in chosen:
        _check(backend, case, first)
    kept: list[object] = [None] * count
    # The copy allocates its result as the backends do, because on a CPU fresh memory costs page faults.
    functions: dict[str, Callable[[torch.Tensor], object]] = {"copy": torch.clone}
    for backend in chosen:
        functions[backend.name] = lambda w, kernel=backend.kernel: kernel(w, case.config, None)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            taken = _timed(function, weights, kept, device)
            if turn:  # the first round fills the ring
                seconds[name].append(taken / count)
    copy = sorted(s * 1e6 for s in seconds.pop("copy"))
    copies = {"copy_microseconds": statistics.median(copy), "copy_fastest": copy[0], "copy_slowest": copy[-1]}
    results = []
    for name, taken in seconds.items():
        median = statistics.median(taken)
        speed = {"microseconds": median * 1e6, "gigabytes_per_second": case.nbytes / median / 1e9}
        results.append(Result(device, name, **vars(case), rounds=rounds, ring=count, **copies, **speed))
    return results


def _timed(
    function: Callable[[torch.Tensor], object], weights: Sequence[torch.Tensor], kept: list[object], device: str
) -> float:
    """Returns the seconds for all weights; on an accelerator between two events, so launches overlap as in training."""
    if device == "cpu":
        clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        start = clock()
        for i, weight in enumerate(weights):
            kept[i] = function(weight)
        return clock() - start
    module = torch.get_device_module(device)
    begin, end = module.Event(enable_timing=True), module.Event(enable_timing=True)
    module.synchronize()
    begin.record()
    for i, weight in enumerate(weights):
        kept[i] = function(weight)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _check(backend: Backend, case: Case, weight: torch.Tensor) -> None:
    quantized, scales = backend.kernel(weight, case.config, None)
    rows = slice(0, 512)
    expected, _ = quantize_dequantize(weight[rows].cpu(), case.config, scales[rows].cpu())
    if not torch.equal(quantized[rows].cpu(), expected):
        raise cli.FailedError(f"{backend.name} is wrong on {case}")


def draw(results: Sequence[Result], path: Path) -> None:
    """Draws the time of each backend in units of the copy's, by weight."""
    copies: dict[str, dict[str, float]] = {}
    for result in results:
        copies.setdefault(result.backend, {})[f"{result.name}\n{result.dtype} g={result.group}"] = result.copies
    with picture(path, max(6.0, 0.42 * sum(map(len, copies.values()))), 4.5) as (axes,):
        bars(axes, copies, "%.1f", 6, size=6, rotation=60, ha="right")
        level(axes, 1, "copy of the same bytes")
        axes.set_ylabel("time, in units of the copy's")
        axes.set_title(f"quantizing a weight, {machine(results[0].device)}", fontsize=9)
        axes.legend(fontsize=8)


def table(results: Sequence[Result], command: str) -> str:
    """Returns the medians as a Markdown table, with a description of the machine and the versions."""
    head = (
        "weight | shape | dtype | group | copy, us (fastest - slowest round) | backend | us | of the copy's speed | "
        "GB/s"
    )
    rows = (
        f"{r.name} | {r.rows} x {r.columns} | {r.dtype} | {r.group} | {r.copy_microseconds:.0f} "
        f"({r.copy_fastest:.0f} - {r.copy_slowest:.0f}) | {r.backend} | {r.microseconds:.0f} | {1 / r.copies:.2f} | "
        f"{r.gigabytes_per_second:.1f}"
        for r in results
    )
    ring = max(r.ring * r.rows * r.columns * _DTYPES[r.dtype].itemsize for r in results) / 2**20
    packages = versions(*(sys.modules[name] for name in ("triton",) if name in sys.modules))
    return f"""{markdown(head, rows)}

Medians of {results[0].rounds} interleaved rounds over {ring:.0f} MiB of weights. GB/s counts the weight \
read once and written once, and its scales.
Hardware: {machine(results[0].device)}, {_threads(results[0].device)}. Versions: {packages}, {linux()}.
Command: `{command}`"""


def launches(cases: Sequence[Case], chosen: Sequence[Backend], device: str) -> str:
    """Returns a Markdown table of the kernel launches with which each backend quantizes the weights of a step together.

    The number of launches depends on the lengths of rows and groups, not on the number of rows, so that only one row of
    each weight is quantized.
    """
    kinds: dict[tuple[str, str, int], list[int]] = {}
    for case in cases:
        model = case.name.split()[0]
        kinds.setdefault((model, case.dtype, case.group), []).extend([case.columns] * preset(model, 1, 1).layers)
    rows = []
    for (model, dtype, group), columns in kinds.items():
        for backend in chosen:
            weights = [torch.zeros(1, count, dtype=_DTYPES[dtype], device=device) for count in columns]
            counts = [count // effective_group(count, group) for count in columns]
            scales = [torch.empty(1, count, dtype=torch.bfloat16, device=device) for count in counts]
            made = backend.together(weights, weights, scales, [group] * len(weights), QuantizerConfig())
            rows.append(f"{model} | {dtype} | {group} | {len(weights)} | {backend.name} | {made}")
    return markdown("model | dtype | group | weights | backend | launches per step", rows)


def _threads(device: str) -> str:
    count = torch.get_num_threads()
    return "1 CPU thread, its CPU time" if device == "cpu" and count == 1 else f"{count} CPU threads"


def _ring(device: str) -> int:
    if device == "cuda":
        return 4 * torch.cuda.get_device_properties(0).L2_cache_size
    return _CPU_RING


if __name__ == "__main__":
    sys.exit(main())

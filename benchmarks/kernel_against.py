# SPDX-License-Identifier: Apache-2.0
"""Benchmark of the CPU's C kernel against that of other commits, which shows whether a change made it slower.

    python benchmarks/kernel_against.py COMMIT [MORE_COMMITS]

It builds the C kernel of each commit in addition to that of this checkout, and calls them through Python as the op
does, on one thread, whose CPU time is measured. In every round each kernel has a turn of some milliseconds over one
weight, in random order. The ratio of its time to that of the first commit is one measurement; the medians of the ratios
and their 95 % intervals are printed as a Markdown table. Before, the results are compared bit for bit.

Exit status: 0 done, 1 a commit has no such kernel, 2 bad arguments, 3 the kernels differ.
"""

import argparse
import importlib.util
import itertools
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from hardware import command_line, linux, machine, versions
from report.intervals import median_interval
from report.tables import markdown
from tqdm import tqdm

from bitcpm_megatron import cli
from bitcpm_megatron.ops import backends, register_backend
from bitcpm_megatron.ops.registry import Kernel
from bitcpm_megatron.quantization import QuantizerConfig

_CHECKOUT = Path(__file__).resolve().parents[1]
_KERNEL = "bitcpm_megatron/ops/cpu"
# A small weight, which shows the overhead of a call, and one of the size of a layer.
_SHAPES = ((64, 64), (1024, 1024))
_GROUPS = (-1, 32, 64, 128)
_DTYPES = (torch.bfloat16, torch.float32, torch.float16)
_ELEMENTS_PER_TURN = 1 << 22
_MOST_CALLS_PER_TURN = 256
_NUMBERS = itertools.count(1)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the measurements that the command line describes, and returns the exit status."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commits", nargs="+", metavar="COMMIT", help="whose kernels to compare with, the first first")
    parser.add_argument("--rounds", type=cli.Whole(6, 10**6), default=51)
    args = parser.parse_args(argv)
    return cli.run(lambda: _measure(args.commits, args.rounds, command_line("kernel_against", argv)))


def _measure(commits: Sequence[str], rounds: int, command: str) -> None:
    torch.set_num_threads(1)
    here = next(b for b in backends() if b.name == "cpu")
    if reason := here.unavailable("cpu"):
        raise cli.FailedError(f"there is nothing to measure: {reason}")
    cases = [(s, dtype, group) for s in _SHAPES for dtype in _DTYPES for group in _GROUPS if group < s[1]]
    with tempfile.TemporaryDirectory() as folder:
        kernels = {commit: load_kernel(_extracted(commit, Path(folder) / str(i))) for i, commit in enumerate(commits)}
        kernels["here"] = here.kernel
        rows = [row(*case, kernels, rounds) for case in tqdm(cases, disable=None)]
    first, *others = kernels
    print(markdown(" | ".join(["weight | dtype | group", f"{first}, us", *(f"{o} / {first}" for o in others)]), rows))
    print(f"\nMedians of {rounds} rounds in random order, with 95 % intervals; 1 CPU thread, its CPU time.")
    print(f"Hardware: {machine('cpu')}. Versions: {versions()}, {linux()}.\nCommand: `{command}`")


def _extracted(commit: str, folder: Path) -> Path:
    """Extracts the kernel's package of a commit to a folder, and returns its path.

    Raises:
        ValueError: if there is no such commit.
        FailedError: if the commit has no such kernel.
    """
    known = ["git", "rev-parse", "--verify", "--quiet", "--end-of-options", f"{commit}^{{commit}}"]
    if subprocess.run(known, cwd=_CHECKOUT, capture_output=True).returncode:
        raise ValueError(f"{commit} is no commit of {_CHECKOUT}: name one by its hash, a branch or a tag")
    archive = ["git", "archive", "--format=tar", commit, _KERNEL]
    packed = subprocess.run(archive, cwd=_CHECKOUT, capture_output=True)
    if packed.returncode:
        raise cli.FailedError(f"{' '.join(archive)}: {packed.stderr.decode(errors='replace').strip()}")
    folder.mkdir()
    subprocess.run(["tar", "-x", "-C", str(folder)], input=packed.stdout, check=True)
    return folder / _KERNEL


def load_kernel(folder: Path) -> Kernel:
    """Loads the kernel that another version of the package ``ops/cpu`` registers, and undoes the registration.

    Args:
        folder: the folder of the package, which finds the rest of ``bitcpm_megatron`` in this checkout.

    Raises:
        FailedError: if the kernel cannot run.
    """
    here = next(b for b in backends() if b.name == "cpu")
    # Each package has a name of its own: under the same name it would get the modules and the library of another one.
    name = f"bitcpm_megatron.ops.cpu_there_{next(_NUMBERS)}"
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        there = next(b for b in backends() if b.name == "cpu")
        # This call compiles the kernel, while the folder still exists.
        if reason := there.unavailable("cpu"):
            raise cli.FailedError(f"the other kernel cannot run: {reason}")
        return there.kernel
    finally:
        register_backend(here)


def row(shape: tuple[int, int], dtype: torch.dtype, group: int, kernels: Mapping[str, Kernel], rounds: int) -> str:
    """Measures kernels on one weight, and returns a row of the table, with times in units of the first kernel's.

    Args:
        shape: the shape of the weight (output features, input features).
        dtype: the dtype of the weight.
        group: the number of elements per scale, -1 for the whole row.
        kernels: the kernels by name, the reference first.
        rounds: the number of rounds.

    Raises:
        MismatchError: if the results of the kernels differ.
    """
    config = QuantizerConfig(group_size=group)
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02).to(dtype)
    label = f"{shape[0]} x {shape[1]} | {str(dtype).removeprefix('torch.')} | {group}"
    first, *others = kernels
    expected = kernels[first](weight, config, None)
    for name in others:
        if not all(map(torch.equal, kernels[name](weight, config, None), expected)):
            raise cli.MismatchError(f"{name} and {first} differ on {label}")
    calls = min(_MOST_CALLS_PER_TURN, max(1, _ELEMENTS_PER_TURN // weight.numel()))
    seconds: dict[str, list[float]] = {name: [] for name in kernels}
    for _ in range(rounds):
        for name in random.sample(list(kernels), len(kernels)):
            kernel = kernels[name]
            start = time.thread_time()
            for _ in range(calls):
                kernel(weight, config, None)
            seconds[name].append((time.thread_time() - start) / calls)
    columns = [label, f"{median_interval(seconds[first])[0] * 1e6:.1f}"]
    for name in others:
        ratios = [mine / other for mine, other in zip(seconds[name], seconds[first], strict=True)]
        columns.append("{:.3f} ({:.3f} - {:.3f})".format(*median_interval(ratios)))
    return " | ".join(columns)


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""What 8-bit activations cost a ternary model, and whether int8 GEMMs cost it anything more.

    python studies/int8_quality.py [--seeds 1 2 3] [--train-iters 2000] [--work DIR] [--output FILE]

Trains the demo's model on the demo's text with several seeds: ternary weights alone (W1.58A16), with 8-bit activations
and bf16 GEMMs, and the same with int8 GEMMs in the forward. Runs of one seed see the same initial weights and the same
batches. Reported is the last validation loss, and the mean over seeds of the difference between two kinds of a seed,
with a 95 % interval by Student's t distribution.

The same command goes on where it was stopped: a run resumes from its last checkpoint, a finished one is read. Writes
the JSON file that ``--output`` names, and a PNG beside it. Exit status: 0 done, 1 a run failed, 2 bad arguments.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(CHECKOUT), str(CHECKOUT / "benchmarks")]

from hardware import machine, versions  # noqa: E402
from report.pictures import picture  # noqa: E402

from bitcpm_megatron import cli  # noqa: E402
from bitcpm_megatron.files import write_text  # noqa: E402
from bitcpm_megatron.launch import demo  # noqa: E402
from bitcpm_megatron.training.metrics import read_metrics  # noqa: E402

_A8 = ("--ternary", "--ternary-activation-bits", "8")
KINDS = {
    "W1.58A16": ("--ternary",),
    "W1.58A8, bf16 GEMMs": _A8,
    "W1.58A8, int8 GEMMs": (*_A8, "--ternary-gemm", "int8"),
}
GAPS = {
    "int8 GEMMs - bf16 GEMMs": ("W1.58A8, int8 GEMMs", "W1.58A8, bf16 GEMMs"),
    "8-bit activations - 16-bit": ("W1.58A8, int8 GEMMs", "W1.58A16"),
}
# Two-sided 95 % quantiles of Student's t by degrees of freedom.
_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
MOST_SEEDS = 1 + len(_QUANTILES)
# The demo's model on one rank: what is compared does not depend on the layout.
_LAYOUT = {"--tensor-model-parallel-size": "1"}
_LEFT_OUT = ("--sequence-parallel",)


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        kind: a key of :data:`KINDS`.
        seed: of the initial weights and the order of the data.
        iterations: optimizer steps.
        work: directory of all runs and of their data.
    """

    kind: str
    seed: int
    iterations: int
    work: Path

    @property
    def directory(self) -> Path:
        """What it leaves behind."""
        words = "".join(c if c.isalnum() or c == "." else "-" for c in self.kind.lower())
        return self.work / f"{self.iterations}-steps" / f"{words}-seed{self.seed}"

    def command(self) -> list[str]:
        """Of the training loop."""
        flags = [flag for flag in demo.MODEL if flag not in _LEFT_OUT]
        for flag, value in {**_LAYOUT, "--seed": str(self.seed)}.items():
            flags[flags.index(flag) + 1] = value
        data = self.work / "data"
        return [
            *(sys.executable, "launch/pretrain.py", *flags, *KINDS[self.kind]),
            *("--train-iters", str(self.iterations), "--lr-wsd-decay-iters", str(self.iterations // 4)),
            *("--train-data-path", str(data / "train_text_document")),
            *("--valid-data-path", str(data / "valid_text_document")),
            *("--tokenizer-model", str(self.work / "tokenizer.model"), "--data-cache-path", str(self.work / "cache")),
            *("--eval-interval", str(max(1, self.iterations // 4)), "--eval-iters", "15", "--log-interval", "10"),
            # The same command goes on where it was stopped.
            *("--load", str(self.directory / "checkpoint"), "--save", str(self.directory / "checkpoint")),
            *("--save-interval", str(max(1, self.iterations // 8)), "--log-dir", str(self.directory)),
        ]

    def losses(self) -> dict[int, float]:
        """Validation losses so far, by iteration."""
        if not (self.directory / "metrics.jsonl").is_file():
            return {}
        return {r["iteration"]: r["lm_loss"] for r in read_metrics(self.directory) if r["kind"] == "valid"}

    def carry_out(self) -> None:
        """Trains to the end, from where it was stopped.

        Raises:
            FailedError: it did not end well.
        """
        if self.iterations in self.losses():
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / "output.txt").open("a") as output:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                self.command(), cwd=CHECKOUT, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False
            )
        if done.returncode or self.iterations not in self.losses():
            raise cli.FailedError(f"{self.kind}, seed {self.seed}: see {self.directory / 'output.txt'}")


def gap(runs: Sequence[Run], one: str, other: str) -> dict[str, float]:
    """Mean over seeds of the difference of the last validation losses of two kinds, and its 95 % interval."""
    last = {(run.kind, run.seed): run.losses()[run.iterations] for run in runs}
    differences = [last[one, seed] - last[other, seed] for seed in sorted({run.seed for run in runs})]
    mean = statistics.fmean(differences)
    half = _QUANTILES[len(differences) - 2] * statistics.stdev(differences) / math.sqrt(len(differences))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, compares and writes; returns the exit status."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=cli.Whole(1, 2**31 - 1), nargs="+", default=[1, 2, 3])
    parser.add_argument("--train-iters", type=cli.Whole(50, 10**6), default=2000)
    parser.add_argument("--at-once", type=cli.Whole(1, 1024), default=os.cpu_count(), help="runs, one core each")
    parser.add_argument("--work", type=Path, default=CHECKOUT / "runs" / "int8-quality", metavar="DIR")
    parser.add_argument("--output", type=Path, default=Path("docs/studies/int8_quality.json"), metavar="FILE")
    args = parser.parse_args(argv)
    if len(args.seeds) != len(set(args.seeds)) or not 2 <= len(args.seeds) <= MOST_SEEDS:
        parser.error(f"--seeds {' '.join(map(str, args.seeds))}: name 2 to {MOST_SEEDS} different ones")
    return cli.run(lambda: _study(args))


def _study(args: argparse.Namespace) -> None:
    work = args.work.resolve()
    if not (work / "data" / "valid_text_document.idx").is_file():
        # What a stopped one left of it.
        shutil.rmtree(work / "data", ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
        demo.prepare(work)
    runs = [Run(kind, seed, args.train_iters, work) for seed in args.seeds for kind in KINDS]
    started = time.perf_counter()
    with ThreadPoolExecutor(args.at_once) as pool, tqdm(total=len(runs) * args.train_iters, unit="step") as progress:
        pending = [pool.submit(run.carry_out) for run in runs]
        while not all(one.done() for one in pending):
            time.sleep(2)
            progress.update(sum(map(_steps, runs)) - progress.n)
            if any(one.done() and one.exception() for one in pending):
                pool.shutdown(cancel_futures=True)
        progress.update(sum(map(_steps, runs)) - progress.n)
    for one in pending:
        one.result()
    found = {
        # Of no machine: the runs' directory is left out.
        "model": " ".join(runs[0].command()[2:]).replace(f"{work}/", ""),
        "iterations": args.train_iters,
        "hours": round((time.perf_counter() - started) / 3600, 2),
        "machine": machine("cpu"),
        "versions": versions(),
        "runs": [{"kind": run.kind, "seed": run.seed, "validation": run.losses()} for run in runs],
        "gaps": {name: gap(runs, *kinds) for name, kinds in GAPS.items()},
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.output, json.dumps(found, indent=1) + "\n")
    draw(runs, args.output.with_suffix(".png"))
    for name, value in found["gaps"].items():
        print(f"{name}: {value['mean']:+.4f} nats ({value['low']:+.4f} to {value['high']:+.4f})")


def _steps(run: Run) -> int:
    if not (run.directory / "metrics.jsonl").is_file():
        return 0
    return max((r["iteration"] for r in read_metrics(run.directory)), default=0)


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draws the last validation losses, a column per kind, seeds joined by lines."""
    with picture(path, 6, 4, title="last validation loss, a line per seed") as (axes,):
        for seed in sorted({run.seed for run in runs}):
            losses = [run.losses()[run.iterations] for run in runs if run.seed == seed]
            axes.plot(list(KINDS), losses, marker="o", label=f"seed {seed}")
        axes.set_ylabel("nats per token")
        axes.legend(fontsize=8)


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""Cost of 8-bit activations in the loss of a ternary model, and any additional cost of int8 GEMMs.

    python studies/int8_quality.py [--seeds 1 2 3] [--train-iters 2000] [--work DIR] [--output FILE]

Trains the demo's model on the demo's text with several seeds in three ways: only with ternary weights (W1.58A16), also
with 8-bit activations and bf16 GEMMs, and the same with int8 GEMMs in the forward. Runs with the same seed have the
same initial weights and the same batches. The results are the last validation losses, and the mean over seeds of the
difference between two ways, with a 95 % interval by Student's t distribution.

After a stop the same command resumes: a run continues from its last checkpoint, a finished one is only read. Writes the
JSON file that ``--output`` names, and a PNG beside it. Exit status: 0 done, 1 a run failed, 2 bad arguments.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(CHECKOUT), str(CHECKOUT / "benchmarks")]

from hardware import machine, versions  # noqa: E402
from report.pictures import picture  # noqa: E402
from training_runs import MOST_SEEDS, Run, carry_out, gap, last_losses  # noqa: E402

from bitcpm_megatron import cli  # noqa: E402
from bitcpm_megatron.files import write_text  # noqa: E402

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


def runs_of(seeds: Sequence[int], iterations: int, work: Path) -> list[Run]:
    """Returns a run of every kind for every seed."""
    return [Run(kind, seed, iterations, work, flags) for seed in seeds for kind, flags in KINDS.items()]


def main(argv: Sequence[str] | None = None) -> int:
    """Trains and compares the models and writes the results; returns the exit status."""
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
    runs = runs_of(args.seeds, args.train_iters, work)
    seconds = carry_out(runs, args.at_once)
    found = {
        # The directory of the runs is left out, so that the command does not depend on the machine.
        "model": " ".join(runs[0].command()[2:]).replace(f"{work}/", ""),
        "iterations": args.train_iters,
        "hours": round(seconds / 3600, 2),
        "machine": machine("cpu"),
        "versions": versions(),
        "runs": [{"kind": run.kind, "seed": run.seed, "validation": run.losses()} for run in runs],
        "gaps": {name: gap(last_losses(runs), *kinds) for name, kinds in GAPS.items()},
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.output, json.dumps(found, indent=1) + "\n")
    draw(runs, args.output.with_suffix(".png"))
    for name, value in found["gaps"].items():
        print(f"{name}: {value['mean']:+.4f} nats ({value['low']:+.4f} to {value['high']:+.4f})")


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draws the last validation losses, one column per kind and one line per seed."""
    with picture(path, 6, 4, title="last validation loss, a line per seed") as (axes,):
        for seed in sorted({run.seed for run in runs}):
            losses = [run.losses()[run.iterations] for run in runs if run.seed == seed]
            axes.plot(list(KINDS), losses, marker="o", label=f"seed {seed}")
        axes.set_ylabel("nats per token")
        axes.legend(fontsize=8)


if __name__ == "__main__":
    sys.exit(main())

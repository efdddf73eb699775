# SPDX-License-Identifier: Apache-2.0
"""Benefit of a teacher for a ternary model: trained without one, taught in a second stage, and taught from the start.

    python studies/distillation_stages.py [--seeds 1] [--train-iters 200] [--work DIR] [--output FILE]

A BF16 teacher, three times as large as the demo's model, is trained on the demo's text, two and a half times as long as
its students. The students are ternary models of the size of the demo's; all take the same number of steps, on the same
number of tokens, in one of three ways:

- QAT: all steps by cross entropy;
- two stages: three quarters of the steps by cross entropy, until the learning rate has fallen, and the last quarter
  from the teacher, with a fresh optimizer, a fifth of the learning rate and a new warm-up;
- taught: all steps from the teacher.

The result is the last validation loss, which is always cross entropy; for several seeds also the mean difference from
QAT with a 95 % interval by Student's t distribution. The students of all seeds have the same teacher. After a stop the
same command resumes. Writes the JSON file that ``--output`` names, and a PNG beside it. The last line is
``demo-distill: ok`` if every part worked: all losses are below the entropy of the token frequencies, and every taught
student came closer to its teacher. Exit status: 0 ok, 1 a run failed, 2 bad arguments, 3 a loss is not where it should
be.
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
from bitcpm_megatron.launch import demo  # noqa: E402

TEACHER, QAT, FIRST, SECOND, TAUGHT = "teacher", "QAT", "stage 1", "QAT, then taught", "taught from the start"
STUDENTS = (QAT, SECOND, TAUGHT)
_LARGER = """
    --num-layers 6 --hidden-size 384 --ffn-hidden-size 1024 --num-attention-heads 6
""".split()
# A fifth of the demo's peak learning rate, decaying to a tenth of that.
_SECOND_RATE = ("--lr", "2e-4", "--min-lr", "2e-5")
_TERNARY = ("--ternary", "--ternary-telemetry-interval", "10")


def runs_of(seeds: int, iterations: int, work: Path) -> list[Run]:
    """Returns the runs of the teacher and of every student for every seed; each comes after the runs that it needs."""
    teacher = Run(TEACHER, 1, iterations * 5 // 2, work, tuple(_LARGER))
    learning = ("--distill-teacher", str(teacher.checkpoints))
    numbers = range(1, seeds + 1)
    alone = [Run(QAT, seed, iterations, work, _TERNARY) for seed in numbers]
    first = [Run(FIRST, seed, iterations * 3 // 4, work, _TERNARY) for seed in numbers]
    second = [
        Run(
            SECOND,
            stage.seed,
            iterations - stage.iterations,
            work,
            (*_TERNARY, *_SECOND_RATE, *learning, "--pretrained-checkpoint", str(stage.checkpoints)),
            (teacher, stage),
        )
        for stage in first
    ]
    taught = [Run(TAUGHT, seed, iterations, work, (*_TERNARY, *learning), (teacher,)) for seed in numbers]
    return [teacher, *alone, *first, *taught, *second]


def main(argv: Sequence[str] | None = None) -> int:
    """Trains and compares the models and writes the results; returns the exit status."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=cli.Whole(1, MOST_SEEDS), default=1, metavar="N", help="1 to N, of students")
    parser.add_argument("--train-iters", type=cli.Whole(100, 10**6), default=200, help="of every student")
    parser.add_argument("--at-once", type=cli.Whole(1, 1024), default=os.cpu_count(), help="runs, one core each")
    parser.add_argument("--work", type=Path, default=CHECKOUT / "runs" / "demo-distill", metavar="DIR")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default distillation_stages.json in --work")
    args = parser.parse_args(argv)
    return cli.run(lambda: _study(args))


def _study(args: argparse.Namespace) -> None:
    work = args.work.resolve()
    runs = runs_of(args.seeds, args.train_iters, work)
    seconds = carry_out(runs, args.at_once)
    losses = last_losses(runs)
    students = {kind: losses[kind] for kind in STUDENTS}
    entropy = demo.unigram_entropy(work / "data" / "valid_text_document")
    found = {
        # The directory of the runs is left out, so that the commands do not depend on the machine.
        "commands": {run.kind: " ".join(run.command()[2:]).replace(f"{work}/", "") for run in runs if run.seed == 1},
        "iterations": args.train_iters,
        "seconds": round(seconds),
        "machine": machine("cpu"),
        "versions": versions(),
        "entropy": entropy,
        "losses": losses,
        "gaps": {kind: gap(students, kind, QAT) for kind in (SECOND, TAUGHT) if args.seeds > 1},
        "divergence": {f"{run.kind}, seed {run.seed}": _divergence(run) for run in runs if _divergence(run)},
    }
    output = args.output or work / "distillation_stages.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, json.dumps(found, indent=1) + "\n")
    draw(runs, output.with_suffix(".png"))
    for line in table(losses, found["gaps"]):
        print(line)
    print(f"curves: {output.with_suffix('.png')}; data: {output}")
    _judge(runs, losses, entropy)
    print("demo-distill: ok")


def table(losses: dict[str, dict[int, float]], gaps: dict[str, dict[str, float]]) -> list[str]:
    """Returns the lines to print: means over seeds, and for several seeds the differences from QAT."""
    lines = [f"{'model':<24}{'validation loss':>16}  difference from QAT (95 %)"]
    for kind in (TEACHER, *STUDENTS):
        mean = sum(losses[kind].values()) / len(losses[kind])
        apart = gaps.get(kind)
        told = "" if apart is None else f"  {apart['mean']:+.4f} ({apart['low']:+.4f} to {apart['high']:+.4f})"
        lines.append(f"{kind:<24}{mean:>16.4f}{told}")
    return lines


def _divergence(run: Run) -> list[float]:
    """Returns the divergence from the teacher, averaged over up to five first and last records; empty without one."""
    found = [record["distill_loss"] for record in run.records("train") if "distill_loss" in record]
    count = min(5, len(found) // 2)
    return [sum(part) / count for part in (found[:count], found[-count:])] if count else []


def _judge(runs: Sequence[Run], losses: dict[str, dict[int, float]], entropy: float) -> None:
    above = [f"{kind}, seed {seed}" for kind in losses for seed, loss in losses[kind].items() if not loss < entropy]
    if above:
        raise cli.MismatchError(f"demo-distill: FAILED: no less than the entropy {entropy:.4f}: {', '.join(above)}")
    for run in (run for run in runs if run.kind in (SECOND, TAUGHT)):
        before, after = _divergence(run) or (0.0, 0.0)
        if not after < before:
            raise cli.MismatchError(f"demo-distill: FAILED: {run.kind}, seed {run.seed}: no nearer to its teacher")


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draws the validation losses of the teacher and of each student over the steps, two stages as one line."""
    with picture(path, 6, 4, title="validation loss (cross entropy)") as (axes,):
        for run in runs:
            if run.kind == FIRST:
                continue
            behind = next((earlier.iterations for earlier in run.after if earlier.kind == FIRST), 0)
            found = {
                step: loss for earlier in run.after if earlier.kind == FIRST for step, loss in earlier.losses().items()
            }
            found |= {behind + step: loss for step, loss in run.losses().items()}
            style = {"color": f"C{(TEACHER, *STUDENTS).index(run.kind)}", "marker": "o", "markersize": 3}
            axes.plot(*zip(*sorted(found.items()), strict=True), label=run.kind if run.seed == 1 else None, **style)
        axes.set_xlabel("steps")
        axes.set_ylabel("nats per token")
        axes.legend(fontsize=8)


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""The training runs of a study: the demo's model on the demo's text, several runs at a time, which can be resumed."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(CHECKOUT), str(CHECKOUT / "benchmarks")]

from bitcpm_megatron import cli  # noqa: E402
from bitcpm_megatron.launch import demo  # noqa: E402
from bitcpm_megatron.launch.sweeper.intervals import MOST_VALUES, mean_interval  # noqa: E402
from bitcpm_megatron.training.metrics import read_metrics  # noqa: E402

MOST_SEEDS = MOST_VALUES
# The demo's model runs on one rank, because the comparisons do not depend on the layout.
_LAYOUT = {"--tensor-model-parallel-size": "1"}
_LEFT_OUT = ("--sequence-parallel",)


@dataclass(frozen=True)
class Run:
    """A training run of a study.

    Attributes:
        kind: the name of the kind of run, which distinguishes runs with the same seed.
        seed: the seed of the initial weights and of the order of the data.
        iterations: the number of optimizer steps.
        work: the directory of all runs and of their data.
        flags: the flags of this kind, which override those of the demo's model.
        after: the runs that must end before this one begins.
    """

    kind: str
    seed: int
    iterations: int
    work: Path
    flags: tuple[str, ...] = ()
    after: tuple["Run", ...] = ()

    @property
    def directory(self) -> Path:
        """The directory of the run's output."""
        words = "".join(c if c.isalnum() or c == "." else "-" for c in self.kind.lower())
        return self.work / f"{self.iterations}-steps" / f"{words}-seed{self.seed}"

    @property
    def checkpoints(self) -> Path:
        """The directory of the run's checkpoints."""
        return self.directory / "checkpoint"

    def command(self) -> list[str]:
        """Returns the command of the training loop."""
        flags = [flag for flag in demo.MODEL if flag not in _LEFT_OUT]
        for flag, value in {**_LAYOUT, "--seed": str(self.seed)}.items():
            flags[flags.index(flag) + 1] = value
        data = self.work / "data"
        return [
            *(sys.executable, "launch/pretrain.py", *flags, *self.flags),
            *("--train-iters", str(self.iterations), "--lr-wsd-decay-iters", str(self.iterations // 4)),
            *("--train-data-path", str(data / "train_text_document")),
            *("--valid-data-path", str(data / "valid_text_document")),
            *("--tokenizer-model", str(self.work / "tokenizer.model"), "--data-cache-path", str(self.work / "cache")),
            *("--eval-interval", str(max(1, self.iterations // 4)), "--eval-iters", "15", "--log-interval", "10"),
            # With these flags the same command resumes the run.
            *("--load", str(self.checkpoints), "--save", str(self.checkpoints)),
            *("--save-interval", str(max(1, self.iterations // 8)), "--log-dir", str(self.directory)),
        ]

    def records(self, kind: str) -> list[dict[str, Any]]:
        """Returns the records of a kind (``train``, ``valid``) that the run has logged so far, oldest first."""
        if not (self.directory / "metrics.jsonl").is_file():
            return []
        return [record for record in read_metrics(self.directory) if record["kind"] == kind]

    def losses(self) -> dict[int, float]:
        """Returns the validation losses so far, by iteration."""
        return {record["iteration"]: record["lm_loss"] for record in self.records("valid")}

    def steps(self) -> int:
        """Returns the number of steps logged so far."""
        return max((record["iteration"] for record in self.records("train")), default=0)

    def carry_out(self) -> None:
        """Trains to the end, from the last checkpoint if there is one.

        Raises:
            FailedError: if the run does not end well.
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


def _prepare(work: Path) -> None:
    """Writes the token files of the demo's text, unless they exist already."""
    if not (work / "data" / "valid_text_document.idx").is_file():
        # A stopped command may have left an incomplete folder.
        shutil.rmtree(work / "data", ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
        demo.prepare(work)


def carry_out(runs: Sequence[Run], at_once: int) -> float:
    """Executes runs in their order, each after those that it needs, with a progress bar; returns the seconds taken.

    Raises:
        FailedError: if a run does not end well; runs that have not begun by then are left out.
    """
    _prepare(runs[0].work)
    started, total = time.perf_counter(), sum(run.iterations for run in runs)
    pending: dict[Run, Future] = {}

    def in_turn(run: Run) -> None:
        for earlier in run.after:
            # The pool takes runs in their order, so the earlier one has begun, and waiting for it cannot deadlock.
            pending[earlier].result()
        run.carry_out()

    with ThreadPoolExecutor(at_once) as pool, tqdm(total=total, unit="step") as progress:
        for run in runs:
            pending[run] = pool.submit(in_turn, run)
        failed, going = False, True
        while going and not failed:
            done, waiting = wait(pending.values(), timeout=2, return_when=FIRST_EXCEPTION)
            progress.update(sum(run.steps() for run in runs) - progress.n)
            failed, going = any(one.exception() for one in done), bool(waiting)
        if failed:
            pool.shutdown(cancel_futures=True)
    for one in pending.values():
        one.result()
    return time.perf_counter() - started


def last_losses(runs: Sequence[Run]) -> dict[str, dict[int, float]]:
    """Returns the last validation losses by kind of run and seed."""
    found: dict[str, dict[int, float]] = {}
    for run in runs:
        found.setdefault(run.kind, {})[run.seed] = run.losses()[run.iterations]
    return found


def gap(losses: Mapping[str, Mapping[int, float]], one: str, other: str) -> dict[str, float]:
    """Returns the mean over seeds of the difference of two kinds' losses, with a 95 % interval by Student's t.

    Args:
        losses: the losses by kind and seed, for at least two seeds.
        one: the kind whose losses are compared.
        other: the kind whose losses are subtracted.
    """
    return mean_interval([losses[one][seed] - losses[other][seed] for seed in sorted(losses[one])])

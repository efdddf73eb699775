# SPDX-License-Identifier: Apache-2.0
"""A sweep whose runs and runner are disturbed: its final table equals that of an undisturbed one byte for byte."""

import functools
import random
import signal
import sys
import time
from pathlib import Path

import psutil
from support.launcher import environment
from support.small_model import losses

from bitcpm_megatron.files import digest

from .processes import Disk, Started, everyone, first
from .subject import FULL_DISK, KILL, PATIENCE, TERMINATE, Subject, TooLate, demand, end_of, one_message

CHECKOUT = Path(__file__).resolve().parents[2]
_RESULTS = ("results.md", "results.json", "results.png")
_SWEEP = """
description: two arms, killed
base:
  model: {{preset: tiny-minicpm4, num-layers: 1, seq-length: 32, make-vocab-size-divisible-by: 64}}
  training: {{micro-batch-size: 2, train-iters: 9, lr: 1.0e-2, bf16: true}}
  data: {{mock-data: true, vocab-size: 300, eval-iters: 1, eval-interval: 9}}
  checkpoint: {{save-interval: 5, keep-last-n: 1}}
  logging: {{log-interval: 1}}
arms:
  BF16: {{}}
  ternary: {{ternary: true}}
seeds: {seeds}
baseline: BF16
last-records: 5
"""


class Sweep(Subject):
    """A sweep of two arms, with two runs at a time.

    Args:
        seeds: the number of seeds.
    """

    name = "sweep"
    batch = 5

    def __init__(self, seeds: int) -> None:
        self._count = 2 * seeds
        self._seeds = list(range(1, seeds + 1))

    def prepare(self, scratch: Path) -> None:
        self._file, self._said = scratch / "sweep.yaml", scratch / "sweep.txt"
        self._file.write_text(_SWEEP.format(seeds=self._seeds))
        began = time.monotonic()
        self._begin_in(scratch / "undisturbed")
        self._succeed()
        self._seconds = time.monotonic() - began
        self._whole, self._losses = self._results(), self._logged()
        demand(len(self._losses) == self._count, f"{len(self._losses)} runs have logged, expected {self._count}")

    def begin(self, place: Path, rng: random.Random) -> None:
        self._begin_in(place)

    def disturb(self, how: str, rng: random.Random, disk: Disk | None) -> str:
        before = self._finished()
        started = self._start()
        done, status = end_of(started, how, disk, functools.partial(self._act, started, how, rng, disk, len(before)))
        after = self._finished()
        lost = [name for name, log in before.items() if after.get(name) != log]
        demand(lost == [], f"{done}: runs that had finished have changed: {lost}", started.said)
        if status == 0:
            raise TooLate
        # Before its own handler is installed, a command dies of the signal.
        if how == FULL_DISK or (how == TERMINATE and status != -signal.SIGTERM):
            one_message(started.said, status, 1)
        elif how == KILL:
            # If a run was killed, it may have been the last one, so that the runner ended by itself.
            allowed = (-signal.SIGKILL, 1) if "to a run" in done else (-signal.SIGKILL,)
            demand(status in allowed, f"{done}: exit status {status}", started.said)
        return f"{done}; {len(after)} of {self._count} runs have finished"

    def _act(self, started: Started, how: str, rng: random.Random, disk: Disk | None, before: int) -> str:
        """Disturbs the sweep in the way that :meth:`disturb` is asked to; ``before`` runs have finished already."""
        # The moment depends on the finished runs, so that it also comes in time on a busy machine. The additional time
        # is at most that of two runs.
        runs = before + rng.randint(0, max(0, (self._count - before - 2) // 2))
        moment = rng.uniform(0.0, self._seconds / self._count * 2)
        while started.process.poll() is None and len(self._finished()) < runs:
            time.sleep(0.05)
        started.wait(moment)
        done = f"{moment:.1f} s after the start, or after run {runs}"
        if how == FULL_DISK:
            disk.fill()
            self._retry = True
            return f"a disk that is full {done}"
        return f"{how} to {self._signal(started, signal.Signals[how], rng)} {done}"

    def finish(self) -> None:
        before = self._finished()
        self._succeed()
        after = self._finished()
        demand(all(after[name] == log for name, log in before.items()), "a run that had finished was run again")
        demand(self._logged() == self._losses, "the losses of a run differ from those of an undisturbed one")
        different = [name for name, content in self._results().items() if content != self._whole[name]]
        demand(
            different == [], f"not those of an undisturbed sweep: {different}", (self._place / "results.md").read_text()
        )
        demand((left := [path.name for path in self._place.glob(".*")]) == [], f"left behind: {left}")

    def _begin_in(self, place: Path) -> None:
        self._place, self._retry = place, False

    def _start(self) -> Started:
        """Starts or resumes the sweep; runs that a full disk has ended have failed, and are run again on request."""
        command = [sys.executable, "launch/sweep.py", str(self._file), "--output", str(self._place), "--parallel", "2"]
        command += ["--retry-failed"] * self._retry
        return Started(command, CHECKOUT, self._said, {**environment(), "PYTHONUNBUFFERED": "1"})

    def _signal(self, started: Started, number: signal.Signals, rng: random.Random) -> str:
        """Sends a signal and returns to whom; SIGKILL to a single run is followed by one to the runner."""
        runs = [process for process in started.family() if _is_a_run(process)]
        whom = rng.choice(
            ("everyone", "the runner", "a run") if number == signal.SIGKILL and runs else ("everyone", "the runner")
        )
        if whom != "a run":
            started.signal(number, everyone if whom == "everyone" else first)
            return whom
        started.signal(number, lambda family: [rng.choice(runs)])
        pause = rng.uniform(0.0, 3.0)
        started.wait(pause)
        started.signal(number, first)
        return f"a run, and to the runner {pause:.1f} s later,"

    def _succeed(self) -> None:
        started = self._start()
        status = started.wait(PATIENCE)
        left = started.orphans()
        started.clear()
        demand(status == 0, f"the same command again ends with {status}", started.said)
        demand(left == [], f"orphans: {left}", started.said)

    def _finished(self) -> dict[str, tuple[int, str]]:
        """Returns the runs whose end the runner has recorded, with the time of the record and the digest of the log."""
        found = {}
        for path in self._place.glob("runs/*/outcome.json"):
            if "finished" in path.read_text():
                log = digest(path.with_name("metrics.jsonl"))["xxh3_128"]
                found[path.parent.name] = path.stat().st_mtime_ns, log
        return found

    def _logged(self) -> dict[str, list[tuple]]:
        return {run.name: losses(run) for run in (self._place / "runs").iterdir()}

    def _results(self) -> dict[str, bytes]:
        return {name: (self._place / name).read_bytes() for name in _RESULTS}


def _is_a_run(process: psutil.Process) -> bool:
    try:
        return any(part.endswith("pretrain.py") for part in process.cmdline())
    except psutil.Error:
        return False

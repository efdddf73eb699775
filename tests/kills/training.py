# SPDX-License-Identifier: Apache-2.0
"""Training runs that save after every step: published checkpoints are complete, and runs resume bit for bit."""

import functools
import random
import re
import signal
import sys
import time
from pathlib import Path

import torch
from support.launcher import environment
from support.small_model import MODEL, losses, tensors

from bitcpm_megatron.checkpoints.directory import iteration_of, iterations, latest
from bitcpm_megatron.files import find_damage

from .processes import Disk, Started, everyone, first, largest
from .subject import FULL_DISK, KILL, PATIENCE, TERMINATE, Subject, TooLate, demand, end_of, one_message

CHECKOUT = Path(__file__).resolve().parents[2]
FLAGS = "--tensor-model-parallel-size 2 --sequence-parallel --bf16 --ternary --eval-interval 10 --eval-iters 1".split()
LONGEST = 3.5
"""The longest time in seconds from an attempt's first step to its disturbance; a first save takes about two seconds."""


class Training(Subject):
    """A training run of two ranks under our agent.

    Args:
        asynchronous: whether the run saves asynchronously.
        distilled: whether it learns from the last checkpoint of an undisturbed run.
        steps: the number of steps of the whole run.
        batch: the largest number of disturbances of one run, which should not end before them.
    """

    _seconds: float
    """The time in seconds from the start to the first step of the undisturbed run."""

    def __init__(self, asynchronous: bool = False, distilled: bool = False, steps: int = 30, batch: int = 5) -> None:
        self.name = "train-distilled" if distilled else "train-async" if asynchronous else "train-sync"
        self.batch = batch
        self._distilled = distilled
        self._steps = steps
        self._more = ["--async-save"] if asynchronous else []

    def prepare(self, scratch: Path) -> None:
        self._scratch = scratch
        self._output = scratch / f"{self.name}.txt"
        # Losses do not depend on how a run saves: one undisturbed run serves both kinds, and teaches the third.
        whole = scratch / "train-whole"
        self._undisturbed(whole)
        if self._distilled:
            self._more += ["--distill-teacher", str(whole / "save"), "--distill-alpha", "0.5"]
            whole = scratch / "train-distilled-whole"
            self._undisturbed(whole)
        self._losses, self._names, self._end = losses(whole / "log"), _names(whole), tensors(latest(whole / "save"))
        taught = [divergence for *_, divergence in self._losses if divergence is not None]
        demand(len(self._losses) > self._steps, f"it has logged {len(self._losses)} losses")
        demand(len(taught) == self._steps * self._distilled, f"it was taught in {len(taught)} steps")

    def _undisturbed(self, place: Path) -> None:
        """Trains a whole run in ``place``, unless it exists."""
        if place.is_dir():
            return
        place.mkdir()
        self._log = place / "log"
        began = time.time()
        started = self._start(place)
        self._wait_for_step(started)
        Training._seconds = time.time() - began
        status = started.wait(PATIENCE)
        demand(status == 0, f"an undisturbed run ends with {status}", started.said)

    def begin(self, place: Path, rng: random.Random) -> None:
        self._place = place
        self._number = getattr(self, "_number", 0) + 1
        self._log = self._scratch / f"{self.name}-log{self._number}"

    def disturb(self, how: str, rng: random.Random, disk: Disk | None) -> str:
        before = self._newest()
        started = self._start(self._place)
        self._trained = False
        done, status = end_of(started, how, disk, functools.partial(self._act, started, how, rng, disk))
        said = started.said
        newest = self._newest()
        demand(newest >= before, f"{done}: iteration {before} is lost, the newest is {newest}", said)
        if newest == self._steps:
            raise TooLate
        if how == FULL_DISK:
            one_message(said, status, 1)
            demand((left := self._hidden()) == [], f"{done}: left behind: {left}", said)
        elif how == TERMINATE and self._trained:
            demand(status == 0, f"{done}: exit status {status}, expected 0", said)
            demand(newest == _reached(started), f"{done}: the newest checkpoint is {newest}", said)
            demand((left := self._hidden()) == [], f"{done}: left behind: {left}", said)
        return f"{done}; the newest checkpoint is {newest}"

    def _act(self, started: Started, how: str, rng: random.Random, disk: Disk | None) -> str:
        """Disturbs the run in the way that :meth:`disturb` is asked to, and records whether it had taken a step."""
        if how == FULL_DISK and rng.random() < 0.3:
            leave = rng.randrange(4_000_000)
            disk.fill(leave)
            return f"a disk with {leave:,} bytes free from the start"
        if rng.random() < 0.3:
            moment, where = rng.uniform(0.0, self._seconds), "after the start"
        else:
            self._wait_for_step(started)
            moment, where = rng.uniform(0.0, LONGEST), "after a step"
        ended = started.wait(moment) is not None
        self._trained = not ended and _reached(started) is not None
        if how == FULL_DISK:
            disk.fill()
            return f"a disk that is full {moment:.3f} s {where}"
        whom = rng.choice((everyone, first, largest) if how == KILL else (everyone, first))
        started.signal(signal.Signals[how], whom)
        return f"{how} to {whom.__name__} {moment:.3f} s {where}"

    def finish(self) -> None:
        started = self._start(self._place)
        status = started.wait(PATIENCE)
        left = started.orphans()
        started.clear()
        demand(status == 0, f"the same command again ends with {status}", started.said)
        demand(left == [], f"orphans: {left}", started.said)
        demand(losses(self._log) == self._losses, "the resumed run differs from the uninterrupted one", started.said)
        end = tensors(latest(self._place / "save"))
        changed = [key for key, tensor in self._end.items() if not torch.equal(tensor, end[key])]
        demand(changed == [], f"its last checkpoint differs from that of the uninterrupted one: {changed}")
        names = _names(self._place)
        different = sorted(names ^ self._names)
        demand(names == self._names, f"its files differ from those of the uninterrupted one: {different}", started.said)

    def _start(self, place: Path) -> Started:
        """Starts or resumes the run."""
        command = [sys.executable, "launch/agent.py", "--standalone", "--nproc_per_node", "2", "launch/pretrain.py"]
        command += [*MODEL, *FLAGS, "--train-iters", str(self._steps), "--exit-signal-handler"]
        command += ["--save", str(place / "save"), "--load", str(place / "save"), "--save-interval", "1"]
        command += ["--keep-last-n", "2", "--log-dir", str(self._log), *self._more]
        command += ["--data-cache-path", str(self._scratch / "cache")]
        return Started(command, CHECKOUT, self._output, {**environment(), "PYTHONUNBUFFERED": "1"})

    def _wait_for_step(self, started: Started) -> None:
        while started.process.poll() is None and _reached(started) is None:
            time.sleep(0.02)

    def _newest(self) -> int:
        """Returns the iteration of the newest checkpoint, or 0; demands that every published checkpoint is complete."""
        save = self._place / "save"
        for iteration in iterations(save):
            damage = find_damage(save / f"iter_{iteration:07d}")
            demand(damage == [], f"iteration {iteration}: {damage}")
        found = latest(save)
        return 0 if found is None else iteration_of(found)

    def _hidden(self) -> list[str]:
        return sorted(path.name for path in (self._place / "save").glob(".*"))


def _reached(started: Started) -> int | None:
    """Returns the last step that an attempt has printed, or None."""
    told = re.findall(r"iteration +(\d+)/\d+ \| loss", started.said)
    return int(told[-1]) if told else None


def _names(place: Path) -> set[str]:
    return {path.relative_to(place / "save").as_posix() for path in (place / "save").rglob("*")}

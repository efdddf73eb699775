# SPDX-License-Identifier: Apache-2.0
"""Disturbs commands at random moments, and checks that each still produces the artifact of an undisturbed run.

    cd tests && python -m kills.campaign [--what all] [--kills 100] [--seconds 3600] [--seed N]

Every command is killed (SIGKILL), asked to stop (SIGTERM) and left with a full disk, in turn; for the full disk a small
one is mounted, which needs root. Moments are drawn over the whole duration of the command, from the imports to the last
file, half of them while it writes. After each disturbance, everything with its final name must be complete, and no
process may be left. The same command, run again, must then end with the same artifact, and with nothing beside it.
Training must also resume bit for bit. Exit status: 0 all did, 1 some did not.
"""

import argparse
import contextlib
import itertools
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]

from bitcpm_megatron import cli

from .commands import converters, preprocessing, preprocessing_sft
from .processes import Disk, Started
from .subject import FULL_DISK, HOWS, Subject, TooLate
from .sweeps import Sweep
from .targets import Targets
from .training import Training

_ATTEMPTS = 8
"""The number of attempts at a disturbance that comes too late, before this counts as a fault of the campaign."""
_GROUPS = {
    "train": ("train-distilled", "train-sync", "train-async"),
    "preprocess": ("preprocess_data", "preprocess_sft"),
}
_GROUPS["targets"] = ("write_targets",)
_GROUPS["sweep"] = ("sweep",)
_GROUPS["convert"] = tuple(subject.name for subject in converters())
_GROUPS["all"] = tuple(itertools.chain.from_iterable(_GROUPS.values()))


def subjects(what: str, steps: int = 30) -> list[Subject]:
    """Returns the subjects that a word on the command line selects, large enough for five disturbances.

    A training has ``steps`` steps, and a sweep one fifth as many seeds.
    """
    everything = [
        Training(distilled=True, steps=steps),
        Training(steps=steps),
        Training(asynchronous=True, steps=steps),
        preprocessing(),
        preprocessing_sft(),
        Targets(),
        Sweep(steps // 5),
        *converters(),
    ]
    names = _GROUPS.get(what, (what,))
    return [subject for subject in everything if subject.name in names]


class Campaign:
    """A campaign of disturbances, and its results.

    Args:
        chosen: the subjects to disturb.
        kills: the total number of disturbances.
        seconds: the time after which nothing new is begun.
        seed: the seed of all random moments.
        scratch: an empty directory.
    """

    def __init__(self, chosen: Sequence[Subject], kills: int, seconds: float, seed: int, scratch: Path) -> None:
        # Only subjects that get a turn are kept: an undisturbed run takes as long as a disturbed one.
        self._chosen, self._kills, self._scratch = chosen[:kills], kills, scratch
        self._rng = random.Random(seed)
        self._seconds = seconds
        self._numbers = itertools.count(1)
        self.good: Counter[tuple[str, str]] = Counter()
        self.faults: list[str] = []
        self._disk: Disk | None = None

    def run(self) -> bool:
        """Runs the campaign; returns whether all disturbances were made and ended as they should."""
        self._began = time.monotonic()
        hows = list(HOWS)
        try:
            self._disk = Disk(self._scratch / "disk")
        except PermissionError as error:
            hows.remove(FULL_DISK)
            self._say(f"skipped: full disks ({error}). As root, or in a container that may mount: make test-kill")
        try:
            for subject in self._chosen:
                self._say(f"{subject.name}: undisturbed")
                subject.prepare(self._scratch)
            for subject, batch in self._batches(hows):
                if time.monotonic() - self._began > self._seconds:
                    self._say("the time is over")
                    break
                self._carry_out(subject, batch)
        finally:
            Started.clear_all()
            if self._disk is not None:
                self._disk.unmount()
        return not self.faults and self.good.total() == self._kills

    def _batches(self, hows: Sequence[str]) -> Iterator[tuple[Subject, list[str]]]:
        """Yields batches of disturbances: every subject gets its share of every kind.

        A short campaign covers as many subjects and kinds as it can.
        """
        waiting: dict[Subject, list[str]] = {subject: [] for subject in self._chosen}
        for number in range(self._kills):
            turn, index = divmod(number, len(self._chosen))
            waiting[self._chosen[index]].append(hows[(turn + index) % len(hows)])
        for mine in waiting.values():
            self._rng.shuffle(mine)
        while any(waiting.values()):
            for subject, mine in waiting.items():
                size = self._rng.randint(1, subject.batch) if subject.batch < 3 else subject.batch
                batch, mine[:] = mine[:size], mine[size:]
                if batch:
                    yield subject, batch

    def _carry_out(self, subject: Subject, batch: list[str]) -> None:
        """Disturbs the making of an artifact and finishes it; begins another if it was finished too early."""
        remaining = list(batch)
        for _ in range(_ATTEMPTS * len(batch)):
            place = self._place(FULL_DISK in remaining)
            done: list[str] = []
            under_way = None
            try:
                subject.begin(place, self._rng)
                with contextlib.suppress(TooLate):
                    while remaining:
                        under_way = remaining[0]
                        words = subject.disturb(under_way, self._rng, self._disk)
                        done.append(remaining.pop(0))
                        self._tell(subject, words, len(done))
                under_way = None
                subject.finish()
            except AssertionError as error:
                if under_way is not None:
                    done.append(remaining.pop(0))
                self.faults.append(f"{subject.name} ({', '.join(done)}): {error}")
                self._say(f"FAULT {self.faults[-1]}")
                done = []
            finally:
                shutil.rmtree(place)
            self.good.update((subject.name, how) for how in done)
            if not remaining:
                return
        self.faults.append(f"{subject.name}: {remaining} came too late again and again")
        self._say(f"FAULT {self.faults[-1]}")

    def _place(self, small_disk: bool) -> Path:
        root = self._disk.directory if small_disk and self._disk is not None else self._scratch
        place = root / f"case{next(self._numbers)}"
        place.mkdir()
        return place

    def _tell(self, subject: Subject, words: str, pending: int) -> None:
        made = self.good.total() + pending
        elapsed = time.monotonic() - self._began
        left = elapsed / made * (self._kills - made)
        self._say(f"{made} of {self._kills}, about {left / 60:.0f} min left: {subject.name}, {words}")

    def _say(self, words: str) -> None:
        print(f"[{time.monotonic() - self._began:6.0f} s] {words}", flush=True)

    def summary(self) -> str:
        """Returns one line with the number of disturbances of each kind that ended as they should."""
        names = [subject.name for subject in self._chosen]
        by_what = [f"{name} {sum(n for (other, _), n in self.good.items() if other == name)}" for name in names]
        by_how = [f"{how} {sum(n for (_, other), n in self.good.items() if other == how)}" for how in HOWS]
        return (
            f"kills: {self.good.total()} of {self._kills} ended with the artifact of an undisturbed run "
            f"({', '.join(by_what)}; {', '.join(by_how)})"
        )


def main() -> int:
    """Parses the command line and runs the campaign."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=sorted({*_GROUPS, *_GROUPS["all"]}), default="train")
    parser.add_argument("--kills", type=cli.Whole(1), default=30, help="in all (default: 30)")
    parser.add_argument("--seconds", type=cli.Number(1), default=3600.0, help="begin nothing after this time")
    parser.add_argument("--seed", type=cli.Whole(0), default=int(time.time()), help="of the moments, printed")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    with cli.interrupted_by_sigterm(), tempfile.TemporaryDirectory(prefix="kills-") as directory:
        campaign = Campaign(subjects(args.what), args.kills, args.seconds, args.seed, Path(directory))
        good = campaign.run()
    print(campaign.summary())
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

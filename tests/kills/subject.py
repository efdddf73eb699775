# SPDX-License-Identifier: Apache-2.0
"""What is killed, and what every kind of disturbance demands of it."""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from .processes import Disk, Started

KILL, TERMINATE, FULL_DISK = "SIGKILL", "SIGTERM", "full disk"
HOWS = (KILL, TERMINATE, FULL_DISK)
PATIENCE = 600.0
"""Seconds after which a command hangs."""


class TooLate(Exception):
    """The command had ended before it could be disturbed; nothing is wrong, and nothing was tested."""


class Subject(ABC):
    """A command that makes an artefact. A batch: :meth:`begin`, some disturbances of it, :meth:`finish`.

    Attributes:
        name: as in ``--what``.
        batch: disturbances of one artefact, at most.
    """

    name: str
    batch: int

    @abstractmethod
    def prepare(self, scratch: Path) -> None:
        """Makes the input, and the artefact that nobody disturbs."""

    @abstractmethod
    def begin(self, place: Path, rng: random.Random) -> None:
        """Chooses what to make in ``place``, an empty directory."""

    @abstractmethod
    def disturb(self, how: str, rng: random.Random, disk: Disk | None) -> str:
        """Runs the command and disturbs it; ``place`` lies on the disk where there is one.

        Returns:
            What was done, in words.

        Raises:
            AssertionError: what it left is not what it should be.
            TooLate: see there.
        """

    @abstractmethod
    def finish(self) -> None:
        """Runs the same command once more, undisturbed.

        Raises:
            AssertionError: the artefact is not the undisturbed one, or something else is left.
        """


def end_of(started: Started, how: str, disk: Disk | None, act: Callable[[], str]) -> tuple[str, int]:
    """Disturbs a command that runs, and waits for its end; whatever happens, nothing of it stays, nor a full disk.

    Args:
        started: the command.
        how: of ``HOWS``.
        disk: that ``act`` fills, where that is how.
        act: disturbs the command, and says in words what was done.

    Returns:
        These words, and the exit status.

    Raises:
        AssertionError: it hangs, or has left processes behind.
    """
    try:
        done = act()
        status = started.wait(PATIENCE)
        demand(status is not None, f"{done}: hangs", started.said)
        demand((left := started.orphans()) == [], f"{done}: orphans {left}", started.said)
        return done, status
    finally:
        started.clear()
        if how == FULL_DISK:
            disk.empty()


def demand(condition: bool, message: str, said: str = "") -> None:
    """Raises where a condition does not hold, with the end of what the command has printed."""
    if not condition:
        raise AssertionError(f"{message}\n{said[-3000:]}".rstrip())


def one_message(said: str, status: int | None, expected: int) -> None:
    """Demands an end in words: the exit code, an error and no traceback."""
    demand(status == expected, f"exit status {status}, expected {expected}", said)
    demand("Traceback (most recent call last)" not in said, "a traceback", said)
    demand("error: " in said, "no error is told", said)

# SPDX-License-Identifier: Apache-2.0
"""The subjects of disturbances, and the demands that hold for every kind of disturbance."""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from .processes import Disk, Started

KILL, TERMINATE, FULL_DISK = "SIGKILL", "SIGTERM", "full disk"
HOWS = (KILL, TERMINATE, FULL_DISK)
PATIENCE = 600.0
"""The time in seconds after which a command counts as hanging."""


class TooLate(Exception):
    """The command ended before it could be disturbed: nothing is wrong, but nothing was tested either."""


class Subject(ABC):
    """A command that makes an artifact. A batch consists of :meth:`begin`, some disturbances, and :meth:`finish`.

    Attributes:
        name: the name of the subject, as in ``--what``.
        batch: the largest number of disturbances of one artifact.
    """

    name: str
    batch: int

    @abstractmethod
    def prepare(self, scratch: Path) -> None:
        """Makes the input, and an artifact without disturbances to compare with."""

    @abstractmethod
    def begin(self, place: Path, rng: random.Random) -> None:
        """Begins an artifact in ``place``, an empty directory, and chooses how to make it."""

    @abstractmethod
    def disturb(self, how: str, rng: random.Random, disk: Disk | None) -> str:
        """Runs the command and disturbs it.

        Args:
            how: the kind of disturbance, one of :data:`HOWS`.
            rng: the source of random moments.
            disk: the disk on which ``place`` is located if a full disk is among the disturbances, else None.

        Returns:
            A description of what was done.

        Raises:
            AssertionError: if the command left something wrong.
            TooLate: if the command ended before it could be disturbed.
        """

    @abstractmethod
    def finish(self) -> None:
        """Runs the same command once more, undisturbed.

        Raises:
            AssertionError: if the artifact differs from the undisturbed one, or something else is left.
        """


def end_of(started: Started, how: str, disk: Disk | None, act: Callable[[], str]) -> tuple[str, int]:
    """Disturbs a running command and waits for its end; in any case kills the rest of it and empties a filled disk.

    Args:
        started: the command.
        how: the kind of disturbance, one of :data:`HOWS`.
        disk: the disk that ``act`` fills if a full disk is the disturbance.
        act: a function that disturbs the command and returns a description of what it did.

    Returns:
        This description, and the exit status.

    Raises:
        AssertionError: if the command hangs or leaves processes behind.
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
    """Raises AssertionError if a condition does not hold, with the end of the command's output."""
    if not condition:
        raise AssertionError(f"{message}\n{said[-3000:]}".rstrip())


def one_message(said: str, status: int | None, expected: int) -> None:
    """Demands that a command ended with an exit code and an error message, and without a traceback."""
    demand(status == expected, f"exit status {status}, expected {expected}", said)
    demand("Traceback (most recent call last)" not in said, "a traceback", said)
    demand("error: " in said, "no error is told", said)

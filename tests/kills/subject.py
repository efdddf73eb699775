# SPDX-License-Identifier: Apache-2.0
"""What is killed, and what every kind of disturbance demands of it."""

import random
from abc import ABC, abstractmethod
from pathlib import Path

from .processes import Disk

KILL, TERMINATE, FULL_DISK = "SIGKILL", "SIGTERM", "full disk"
HOWS = (KILL, TERMINATE, FULL_DISK)


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


def demand(condition: bool, message: str, said: str = "") -> None:
    """Raises where a condition does not hold, with the end of what the command has printed."""
    if not condition:
        raise AssertionError(f"{message}\n{said[-3000:]}".rstrip())


def one_message(said: str, status: int | None, expected: int) -> None:
    """Demands an end in words: the exit code, an error and no traceback."""
    demand(status == expected, f"exit status {status}, expected {expected}", said)
    demand("Traceback (most recent call last)" not in said, "a traceback", said)
    demand("error: " in said, "no error is told", said)

# SPDX-License-Identifier: Apache-2.0
"""Shared parts of all commands: the parser, flags that are numbers, one handler for errors, exit codes, quick imports.

Nothing here imports torch, so that a wrong command line is refused before anything slow is loaded.
"""

import argparse
import contextlib
import errno
import gc
import hashlib
import json
import math
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from pydantic import BeforeValidator

from .files import nearest

DONE, FAILED, BAD_INPUT, MISMATCH = 0, 1, 2, 3

# If this variable is 1, a command prints the traceback of an error above its message.
TRACEBACK = "BITCPM_TRACEBACK"
# torchrun polls its processes ten times a second, and ends all of them when one has failed.
_SECONDS_FOR_RANK_0 = 3.0
# These mean that the user named an unsuitable path; other errors of the operating system are not the user's mistake.
_BAD_PATH = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO),
}
_WHOLE = re.compile(r"[+-]?[0-9]{1,25}")
_USUALLY = gc.get_threshold()[0]
_RARELY = 10**6
"""Objects of imports that exist before the garbage collector visits them."""


def is_command() -> bool:
    """Returns whether this process is one of our commands.

    A program that imports this package is none, and neither is a helper process of multiprocessing.
    """
    main = sys.modules.get("__main__")
    script = getattr(main, "__file__", None)
    # A helper process has a command's file as well, under the name __mp_main__, and does not get to run().
    if script is None or getattr(main, "__name__", None) != "__main__":
        return False
    room = Path(script).resolve().parent
    roots = [Path(root).resolve() for root in sys.modules[__package__].__path__]
    return room.name in ("launch", "checkpoint_tools") and room.parent in roots


def begin_imports() -> None:
    """Makes the garbage collector run rarely until :func:`end_imports`, if this process is one of our commands.

    During imports the collector visits the objects of modules again and again, although they live as long as the
    process. The collector of other programs is left as it is.
    """
    if is_command():
        gc.set_threshold(_RARELY)


def end_imports() -> None:
    """Makes the garbage collector run as usual again, except on the objects that exist now, even when the process ends.

    It does nothing if :func:`begin_imports` did nothing. :func:`run` calls it.
    """
    if is_command() and gc.get_threshold()[0] == _RARELY:
        gc.freeze()
        gc.set_threshold(_USUALLY)


@contextlib.contextmanager
def late_imports() -> Iterator[None]:
    """Returns a context for imports that a command makes late, when it knows that they are needed."""
    begin_imports()
    try:
        yield
    finally:
        end_imports()


class FailedError(RuntimeError):
    """The exception for work that was requested correctly but did not succeed; exit code 1."""


class MismatchError(RuntimeError):
    """The exception for a verification that found a difference from what is expected; exit code 3."""


@contextlib.contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Makes SIGTERM raise KeyboardInterrupt within the context, like Ctrl-C, so that a canceled command cleans up.

    For commands of one process. A rank of a job may wait for others in C++, where no exception reaches it.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        # Ignore further signals: a second one must not interrupt the cleanup.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    in_main_thread = threading.current_thread() is threading.main_thread()  # only this thread may install handlers
    before = signal.signal(signal.SIGTERM, interrupt) if in_main_thread else None
    try:
        yield
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, before)


def run(work: Callable[[], int | None]) -> int:
    """Runs a command and turns what it raises into one line on stderr and an exit code.

    ValueError (all our errors about input derive from it) and unusable paths are bad input (2).
    :class:`MismatchError` is 3. :class:`FailedError`, other errors of the operating system, exhausted memory and an
    interruption are 1. Anything else is a fault of the program and keeps its traceback. The exit code is what `work`
    returns; None stands for 0.
    """
    end_imports()
    try:
        return work() or DONE
    except (Exception, KeyboardInterrupt) as error:
        status, message = _verdict(error)
        if status is None:
            raise
        if os.environ.get(TRACEBACK) == "1":
            traceback.print_exception(error)
        if isinstance(error, BrokenPipeError):
            # The reader of our output, such as ``head``, has exited, so that the message would reach nobody.
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        else:
            complain(message)
        return status


def _verdict(error: BaseException) -> tuple[int | None, str]:
    """Returns the exit code and the message for an exception; the code is None for a fault of the program."""
    said = str(error)
    match error:
        case MismatchError():
            return MISMATCH, said
        case ValueError():
            return BAD_INPUT, said
        case OSError():
            names = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
            if error.strerror is not None:
                said = f"{names}: {error.strerror}" if names else error.strerror
            return BAD_INPUT if error.errno in _BAD_PATH else FAILED, said
        case FailedError():
            return FAILED, said
        case RuntimeError() if said.startswith("Symlink loop"):  # raised by pathlib before Python 3.13
            return BAD_INPUT, said
        case MemoryError():
            return FAILED, "the memory of this machine is exhausted"
        case KeyboardInterrupt():
            return FAILED, "interrupted"
    return None, said


def complain(message: str) -> None:
    """Prints an error on stderr, only once per job if all its processes have the same error.

    Ranks other than 0 wait for a moment: if rank 0 fails too, ``torchrun`` ends them meanwhile; if it does not, they
    print the message with their rank.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        with contextlib.suppress(ValueError):  # raised outside the main thread
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_SECONDS_FOR_RANK_0)
        message = f"rank {rank}: {message}"
    # Close progress bars that the error left open, so that the message does not start at the end of one.
    tqdm = sys.modules.get("tqdm")
    for bar in list(tqdm.tqdm._instances) if tqdm is not None else ():
        bar.close()
    print(f"error: {message}", file=sys.stderr, flush=True)


def refuse_arguments(message: str) -> NoReturn:
    """Prints a mistake in the arguments and exits with code 2, without the usage text of ``argparse``'s ``error``."""
    complain(f"{message} (--help lists all flags)")
    raise SystemExit(BAD_INPUT)


class Parser(argparse.ArgumentParser):
    """An argument parser without abbreviations, which answers a mistake with one line instead of the usage text."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def parse_args(  # type: ignore[override]  # one signature in the place of overloads
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """Parses like argparse; the error for an unknown flag names the nearest known one."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = sorted(s for action in self._actions for s in action.option_strings if s.startswith("--"))
            flags = [text.partition("=")[0] for text in unknown if text.startswith("--")]
            hints = "; ".join(f"{flag}{nearest(flag, known, otherwise='')}" for flag in flags)
            self.error(f"unknown arguments: {hints or ' '.join(unknown)}")
        return found

    def error(self, message: str) -> NoReturn:
        """Prints the message and ends the process with exit code 2."""
        refuse_arguments(message)


def _read(kind: "Whole | Number", text: str) -> Any:
    """Reads a number from a command line.

    Raises:
        argparse.ArgumentTypeError: if the text is no number of that kind, is NaN or infinite, or is out of bounds.
    """
    value: float | None = None
    if isinstance(kind, Whole):
        value = int(text) if _WHOLE.fullmatch(text.strip()) else None
    elif "_" not in text:
        with contextlib.suppress(ValueError):
            value = float(text)
    if mistake := kind.mistake(value):
        shown = text if len(text) <= 40 else f"{text[:40]}..."
        raise argparse.ArgumentTypeError(f"{shown!r}: {mistake}")
    return value


def command_digest(args: argparse.Namespace, without: Collection[str]) -> str:
    """Returns the SHA-256 of a command line `without` the arguments that do not change the output.

    Equal digests mean the same command, which may finish what a killed one has left.
    """
    words = json.dumps({key: value for key, value in sorted(vars(args).items()) if key not in without}, default=str)
    return hashlib.sha256(words.encode()).hexdigest()


@dataclass(frozen=True)
class Whole:
    """The type of a flag that is a whole number within bounds, both inclusive."""

    minimum: int = 1
    maximum: int = 2**31 - 1

    __call__ = _read

    def mistake(self, value: object) -> str | None:
        """Returns what is wrong with a value, from a command line or from elsewhere; None if nothing is."""
        if isinstance(value, bool) or not isinstance(value, int):
            return "expected a whole number"
        return None if self.minimum <= value <= self.maximum else f"must be {self}"

    def __str__(self) -> str:
        return f"{self.minimum} to {self.maximum}"


@dataclass(frozen=True)
class Number:
    """The type of a flag that is a finite number within bounds; a bound is inclusive unless it is declared open."""

    minimum: float = -math.inf
    maximum: float = math.inf
    open_minimum: bool = False
    open_maximum: bool = False

    __call__ = _read

    def mistake(self, value: object) -> str | None:
        """Returns what is wrong with a value, from a command line or from elsewhere; None if nothing is."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return "expected a number"
        if not abs(value) <= sys.float_info.max:  # also refuses whole numbers too large for a float
            return "expected a finite number"
        below = value <= self.minimum if self.open_minimum else value < self.minimum
        above = value >= self.maximum if self.open_maximum else value > self.maximum
        return f"must be {self}" if below or above else None

    def __str__(self) -> str:
        parts = []
        if self.minimum > -math.inf:
            parts.append(f"{'above' if self.open_minimum else 'at least'} {self.minimum:g}")
        if self.maximum < math.inf:
            parts.append(f"{'below' if self.open_maximum else 'at most'} {self.maximum:g}")
        return " and ".join(parts) or "a finite number"


def bounded(kind: Whole | Number) -> BeforeValidator:
    """Returns a pydantic validator that refuses what a flag of that kind refuses.

    For the models of files: ``Annotated[int, bounded(Whole(1, 8))]``.
    """

    def check(value: Any) -> Any:
        mistake = kind.mistake(value)
        if mistake is not None:
            raise ValueError(f"{value!r}: {mistake}")
        return value

    return BeforeValidator(check)


def from_environment(name: str, kind: Whole | Number, default: Any, environ: Mapping[str, str] = os.environ) -> Any:
    """Returns the number in an environment variable, or the default if the variable is not set or empty.

    Raises:
        ValueError: if the variable holds something else; the message names the variable.
    """
    text = environ.get(name, "")
    if not text:
        return default
    try:
        return kind(text)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"the environment variable {name} holds {error}") from None


def ranges(numbers: Iterable[int]) -> str:
    """Formats numbers as ascending runs, each number once, such as ``0-3,5``."""
    runs: list[list[int]] = []
    for n in sorted(set(numbers)):
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)

# SPDX-License-Identifier: Apache-2.0
"""What every command shares: its parser, flags that are numbers, one handler for errors, and the exit codes.

Nothing here imports torch, so that a command line is refused before anything slow is loaded.
"""

import argparse
import contextlib
import errno
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
from types import FrameType
from typing import Any, NoReturn

from pydantic import BeforeValidator

from .files import nearest

DONE, FAILED, BAD_INPUT, MISMATCH = 0, 1, 2, 3

# Set to 1, a command prints where in the code an error arose, above the message.
TRACEBACK = "BITCPM_TRACEBACK"
# torchrun looks after its processes ten times a second, and ends all of them when one has failed.
_SECONDS_FOR_RANK_0 = 3.0
# The user named something that is not what it should be; other errors of the system are not the user's.
_BAD_PATH = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO),
}
_WHOLE = re.compile(r"[+-]?[0-9]{1,25}")


class FailedError(RuntimeError):
    """The work was asked for rightly and did not succeed; exit code 1."""


class MismatchError(RuntimeError):
    """A verification found that something is not what it should be; exit code 3."""


@contextlib.contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """While it lasts, SIGTERM does what Ctrl-C does: KeyboardInterrupt, so that a cancelled command tidies up.

    For commands of one process. A rank of a job may wait for others in C++, where no exception reaches it.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        # Once: a second one must not interrupt the tidying up.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    in_main_thread = threading.current_thread() is threading.main_thread()  # the one that may have handlers
    before = signal.signal(signal.SIGTERM, interrupt) if in_main_thread else None
    try:
        yield
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, before)


def run(work: Callable[[], int | None]) -> int:
    """Runs a command and turns what it raises into one line on stderr and an exit code.

    ValueError (all our errors about input derive from it) and paths that are not usable are bad input (2),
    :class:`MismatchError` is 3, :class:`FailedError`, other errors of the operating system, exhausted memory and an
    interruption are 1. Anything else is a fault of the program and keeps its traceback. What `work` returns is the exit
    code, None stands for 0.
    """
    try:
        return work() or DONE
    except (Exception, KeyboardInterrupt) as error:
        status, message = _verdict(error)
        if status is None:
            raise
        if os.environ.get(TRACEBACK) == "1":
            traceback.print_exception(error)
        if isinstance(error, BrokenPipeError):
            # The reader of our output has left, such as ``head``: there is nobody to tell.
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        else:
            complain(message)
        return status


def _verdict(error: BaseException) -> tuple[int | None, str]:
    """The exit code and the words for what a command raised; no code for a fault of the program."""
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
        case RuntimeError() if said.startswith("Symlink loop"):  # of pathlib, before Python 3.13
            return BAD_INPUT, said
        case MemoryError():
            return FAILED, "the memory of this machine is exhausted"
        case KeyboardInterrupt():
            return FAILED, "interrupted"
    return None, said


def complain(message: str) -> None:
    """Prints an error on stderr, once per job where all its processes meet the same one.

    The other ranks wait for a moment: where rank 0 fails too, ``torchrun`` ends them meanwhile; where it does not, they
    say who they are.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_SECONDS_FOR_RANK_0)
        message = f"rank {rank}: {message}"
    # Progress bars that the error left open: the message must not stand at the end of one.
    tqdm = sys.modules.get("tqdm")
    for bar in list(tqdm.tqdm._instances) if tqdm is not None else ():
        bar.close()
    print(f"error: {message}", file=sys.stderr, flush=True)


def refuse_arguments(message: str) -> NoReturn:
    """What a parser does with a mistake, in the place of ``argparse.ArgumentParser.error`` and its usage text."""
    complain(f"{message} (--help lists all flags)")
    raise SystemExit(BAD_INPUT)


class Parser(argparse.ArgumentParser):
    """A parser that takes no abbreviations and answers a mistake with one line instead of the usage text."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def parse_args(  # type: ignore[override]  # one signature in the place of overloads
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """As argparse's; an unknown flag is answered with the nearest known one."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = sorted(s for action in self._actions for s in action.option_strings if s.startswith("--"))
            flags = [text.partition("=")[0] for text in unknown if text.startswith("--")]
            hints = "; ".join(f"{flag}{nearest(flag, known, otherwise='')}" for flag in flags)
            self.error(f"unknown arguments: {hints or ' '.join(unknown)}")
        return found

    def error(self, message: str) -> NoReturn:
        """Ends the process with exit code 2."""
        refuse_arguments(message)


def _read(kind: "Whole | Number", text: str) -> Any:
    """Reads a number from a command line.

    Raises:
        argparse.ArgumentTypeError: it is none of that kind, is NaN or infinite, or out of bounds.
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
    """A digest of a command line, `without` the arguments that do not change the output: the same one goes on."""
    words = json.dumps({key: value for key, value in sorted(vars(args).items()) if key not in without}, default=str)
    return hashlib.sha256(words.encode()).hexdigest()


@dataclass(frozen=True)
class Whole:
    """The type of a flag that is a whole number within bounds, both included."""

    minimum: int = 1
    maximum: int = 2**31 - 1

    __call__ = _read

    def mistake(self, value: object) -> str | None:
        """What is wrong with a value, also one from elsewhere than a command line, or None."""
        if isinstance(value, bool) or not isinstance(value, int):
            return "expected a whole number"
        return None if self.minimum <= value <= self.maximum else f"must be {self}"

    def __str__(self) -> str:
        return f"{self.minimum} to {self.maximum}"


@dataclass(frozen=True)
class Number:
    """The type of a flag that is a finite number within bounds; the bounds themselves belong to it unless ``open_``."""

    minimum: float = -math.inf
    maximum: float = math.inf
    open_minimum: bool = False
    open_maximum: bool = False

    __call__ = _read

    def mistake(self, value: object) -> str | None:
        """What is wrong with a value, also one from elsewhere than a command line, or None."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return "expected a number"
        if not abs(value) <= sys.float_info.max:  # also a whole number that no float holds
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
    """For the models of files: ``Annotated[int, bounded(Whole(1, 8))]`` refuses what a flag of that kind refuses."""

    def check(value: Any) -> Any:
        mistake = kind.mistake(value)
        if mistake is not None:
            raise ValueError(f"{value!r}: {mistake}")
        return value

    return BeforeValidator(check)


def from_environment(name: str, kind: Whole | Number, default: Any, environ: Mapping[str, str] = os.environ) -> Any:
    """A number that a variable of the environment holds, or the default where it is not set or empty.

    Raises:
        ValueError: it holds something else, naming the variable.
    """
    text = environ.get(name, "")
    if not text:
        return default
    try:
        return kind(text)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"the environment variable {name} holds {error}") from None


def ranges(numbers: Iterable[int]) -> str:
    """``0-3,5``: the numbers, each once, in runs."""
    runs: list[list[int]] = []
    for n in sorted(set(numbers)):
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)

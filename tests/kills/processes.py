# SPDX-License-Identifier: Apache-2.0
"""Real processes: started with a mark that their descendants carry, signalled, and looked for when they are gone."""

import contextlib
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import psutil

_MARK = "BITCPM_KILLED"
# SIGKILL leaves nothing to wait for but the kernel, which frees the memory of a process first.
_SECONDS_TO_GO = 15.0


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to a process and all its descendants, at once."""
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    _signal(family, signal.SIGKILL)
    process.wait()
    psutil.wait_procs(family, timeout=30)


class Started:
    """A command in a session of its own, with its output in a file.

    Args:
        command: to run.
        directory: where to run it.
        output: file to which it appends.
        environment: of the process.
    """

    _all: ClassVar[set["Started"]] = set()

    def __init__(self, command: Sequence[str], directory: Path, output: Path, environment: Mapping[str, str]) -> None:
        self._mark = uuid.uuid4().hex
        self._all.add(self)
        self._output = output
        self._began = output.stat().st_size if output.exists() else 0
        with output.open("a") as stream:
            self.process = subprocess.Popen(
                command,
                cwd=directory,
                env={**environment, _MARK: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        """What this command has printed."""
        with self._output.open("rb") as stream:
            stream.seek(self._began)
            return stream.read().decode(errors="replace")

    def family(self) -> list[psutil.Process]:
        """The process and all its descendants that are alive, also those in other sessions and of dead parents."""
        mark = f"{_MARK}={self._mark}".encode()
        found = []
        for pid in psutil.pids():
            # What a process forks carries the environment that it began with; a dead one has none.
            with contextlib.suppress(OSError, psutil.NoSuchProcess):
                if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    found.append(psutil.Process(pid))
        return found

    def signal(self, number: signal.Signals, chosen: Callable[[list[psutil.Process]], list[psutil.Process]]) -> None:
        """Sends a signal to those of the family that are chosen."""
        _signal(chosen(self.family()), number)

    def wait(self, seconds: float) -> int | None:
        """The exit status, or None if it has not ended in time."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(seconds)
        return None

    def orphans(self) -> list[str]:
        """Command lines of what is still there when the command has ended."""
        family = self.family()
        psutil.wait_procs(family, timeout=_SECONDS_TO_GO)
        return [f"{process.pid} {' '.join(_command(process))[-200:]}" for process in self.family()]

    def clear(self) -> None:
        """Kills whatever is left."""
        _signal(self.family(), signal.SIGKILL)
        self.process.wait()
        self._all.discard(self)

    @classmethod
    def clear_all(cls) -> None:
        """Kills whatever is left of all commands that were started."""
        for started in list(cls._all):
            started.clear()


def everyone(family: list[psutil.Process]) -> list[psutil.Process]:
    """All of them, as a node that is switched off, or a scheduler."""
    return family


def first(family: list[psutil.Process]) -> list[psutil.Process]:
    """The one that was started first."""
    return sorted(family, key=lambda process: (process.create_time(), process.pid))[:1]


def largest(family: list[psutil.Process]) -> list[psutil.Process]:
    """The one with the most memory, as the kernel chooses when memory is exhausted."""
    sizes = []
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            sizes.append((process.memory_info().rss, process))
    return [max(sizes, key=lambda pair: pair[0])[1]] if sizes else []


def _signal(family: list[psutil.Process], number: signal.Signals) -> None:
    for process in family:
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            os.kill(process.pid, number)


def _command(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return ["?"]


class Disk:
    """A small disk of its own, in memory, that can be filled to the last byte.

    Args:
        directory: where it is mounted, which must not be there yet.

    Raises:
        PermissionError: this user may not mount; the message says what would.
    """

    SIZE = 2 * 2**30
    """It takes memory only for what lies on it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._filler = directory / ".filler"
        directory.mkdir(parents=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={self.SIZE}", "tmpfs", str(directory)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise PermissionError(f"{' '.join(command)}: {error}") from None
        if done.returncode:
            raise PermissionError(f"{' '.join(command)}: {done.stderr.strip()}")

    def free(self) -> int:
        """Bytes that can be written."""
        left = os.statvfs(self.directory)
        return left.f_bavail * left.f_frsize

    def fill(self, leave: int = 0) -> None:
        """Lets another file take all space but ``leave`` bytes, even where somebody else writes meanwhile."""
        with self._filler.open("ab") as file:
            while (excess := self.free() - leave) > 0:
                try:
                    os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, excess)
                except OSError:  # it has become less since
                    time.sleep(0)

    def empty(self) -> None:
        """Takes that file away."""
        self._filler.unlink(missing_ok=True)

    def unmount(self) -> None:
        """Gives the disk back, with what lies on it."""
        subprocess.run(["umount", "-l", str(self.directory)], check=True)

# SPDX-License-Identifier: Apache-2.0
"""Real processes: started with a mark that their descendants inherit, signaled, and searched for after their end."""

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
# After SIGKILL only the kernel has to be waited for, which first frees the memory of a process.
_SECONDS_TO_GO = 15.0


def kill(process: subprocess.Popen) -> None:
    """Sends SIGKILL to a process and all its descendants at once, and waits for their end."""
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    _signal(family, signal.SIGKILL)
    process.wait()
    psutil.wait_procs(family, timeout=30)


class Started:
    """A started command in a session of its own, with its output in a file.

    Args:
        command: the command to run.
        directory: the directory to run it in.
        output: the file to which its output is appended.
        environment: the environment variables of the process.
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
        """The output of this command so far."""
        with self._output.open("rb") as stream:
            stream.seek(self._began)
            return stream.read().decode(errors="replace")

    def family(self) -> list[psutil.Process]:
        """Returns the process and all its living descendants, also those in other sessions or with dead parents."""
        mark = f"{_MARK}={self._mark}".encode()
        found = []
        for pid in psutil.pids():
            # A forked process has the initial environment of its parent; a dead process has none.
            with contextlib.suppress(OSError, psutil.NoSuchProcess):
                if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    found.append(psutil.Process(pid))
        return found

    def signal(self, number: signal.Signals, chosen: Callable[[list[psutil.Process]], list[psutil.Process]]) -> None:
        """Sends a signal to the processes of the family that ``chosen`` selects."""
        _signal(chosen(self.family()), number)

    def wait(self, seconds: float) -> int | None:
        """Waits for the end of the process; returns its exit status, or None if it has not ended in time."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(seconds)
        return None

    def orphans(self) -> list[str]:
        """Returns the command lines of the processes that survive the end of the command."""
        family = self.family()
        psutil.wait_procs(family, timeout=_SECONDS_TO_GO)
        return [f"{process.pid} {' '.join(_command(process))[-200:]}" for process in self.family()]

    def clear(self) -> None:
        """Kills all remaining processes of the command."""
        _signal(self.family(), signal.SIGKILL)
        self.process.wait()
        self._all.discard(self)

    @classmethod
    def clear_all(cls) -> None:
        """Kills all remaining processes of all commands that were started."""
        for started in list(cls._all):
            started.clear()


def everyone(family: list[psutil.Process]) -> list[psutil.Process]:
    """Selects all processes, like a scheduler, or a node that is switched off."""
    return family


def first(family: list[psutil.Process]) -> list[psutil.Process]:
    """Selects the process that was started first."""
    return sorted(family, key=lambda process: (process.create_time(), process.pid))[:1]


def largest(family: list[psutil.Process]) -> list[psutil.Process]:
    """Selects the process with the most memory, like the kernel when memory is exhausted."""
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
    """A small separate disk in memory that can be filled to the last byte.

    Args:
        directory: the directory at which to mount the disk; it must not exist yet.

    Raises:
        PermissionError: if this user may not mount; the message has the command and its error.
    """

    SIZE = 2 * 2**30
    """The size of the disk in bytes; it takes memory only for the files on it."""

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
        """Returns the number of bytes that can still be written."""
        left = os.statvfs(self.directory)
        return left.f_bavail * left.f_frsize

    def fill(self, leave: int = 0) -> None:
        """Fills all space except for ``leave`` bytes with another file, even if others write at the same time."""
        with self._filler.open("ab") as file:
            while (excess := self.free() - leave) > 0:
                try:
                    os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, excess)
                except OSError:  # there is less space than a moment ago
                    time.sleep(0)

    def empty(self) -> None:
        """Removes the file with which :meth:`fill` filled the disk."""
        self._filler.unlink(missing_ok=True)

    def unmount(self) -> None:
        """Unmounts the disk, which discards the files on it."""
        subprocess.run(["umount", "-l", str(self.directory)], check=True)

# SPDX-License-Identifier: Apache-2.0
"""One process at a time writes a file: a lock that dies with its process, and outputs that appear together."""

import contextlib
import errno
import fcntl
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path

from .atomic import FileError, fsync, incomplete, publish

# A process that was killed with much memory takes a moment to go, and its lock goes last.
_PATIENCE_SECONDS = 5.0
_UNSUPPORTED = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}
# Of one length, so that a new description covers all of an old one in a single call.
_DESCRIPTION_BYTES = 1024


class LockedError(FileError):
    """Another process holds a lock; ``holder`` says which."""

    def __init__(self, message: str, holder: str = "") -> None:
        super().__init__(message)
        self.holder = holder


class FileLock:
    """Holds a lock file until :meth:`release` or the end of this process, also by SIGKILL.

    A POSIX record lock: it is the one kind that NFS carries from node to node, and that processes which this one forks
    do not inherit (an orphaned one would keep its restart out). Making one makes the directory and takes the lock, and
    waits for another holder for `patience` seconds; None for a few.

    Attributes:
        note: a line for the log where the file system has no locks, else None.
        left: what a holder that was killed had left unfinished, in its words, or nothing.

    Raises:
        LockedError: another process holds it, naming it.
        OSError: nothing can be written there.
    """

    def __init__(self, path: Path, patience: float | None = None) -> None:
        self._path = path
        self.note: str | None = None
        path.parent.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + (_PATIENCE_SECONDS if patience is None else patience)
        while not self._try():
            _, holder = self._read()
            os.close(self._file)
            if time.monotonic() > deadline:
                raise LockedError(f"{path}: held by another job ({holder})", holder)
            time.sleep(0.1)
        self.left, _ = self._read()
        try:
            self.describe(self.left)
        except BaseException:
            self.release(keep=bool(self.left))
            raise

    def describe(self, unfinished: str = "") -> None:
        """Writes into the lock file who holds it, and what is unfinished where this process is killed."""
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        holder = f"{_job()}, process {os.getpid()} on {socket.gethostname()}, since {since}"
        os.pwrite(self._file, f"{unfinished}\n{holder}\n".encode(errors="replace").ljust(_DESCRIPTION_BYTES), 0)

    def _read(self) -> tuple[str, str]:
        """What is unfinished, and who holds the lock, as far as the file says."""
        text = ""
        with contextlib.suppress(OSError):
            text = os.pread(self._file, _DESCRIPTION_BYTES, 0).decode(errors="replace")
        unfinished, _, holder = text.partition("\n")
        return unfinished, holder.strip() or "it does not say which"

    def release(self, keep: bool = False) -> None:
        """Gives the file free; `keep` leaves it there with its description, as a kill does."""
        if not keep:
            with contextlib.suppress(OSError):
                self._path.unlink()
        os.close(self._file)

    def _try(self) -> bool:
        """Opens the file and takes the lock, unless another process has it."""
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o644)
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before may have removed the file between our opening and our locking it.
            return os.path.samestat(os.fstat(self._file), os.stat(self._path))
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN, errno.ENOENT):
                return False
            if error.errno not in _UNSUPPORTED:
                os.close(self._file)
                raise
            self.note = (
                f"the file system of {self._path.parent} has no locks ({error.strerror}; Lustre has them with the "
                "mount option flock): nothing keeps a second job from writing there"
            )
            return True


def _job() -> str:
    for name, prefix in (("SLURM_JOB_ID", "SLURM job "), ("TORCHELASTIC_RUN_ID", "")):
        value = os.environ.get(name, "none")
        if value != "none":
            return prefix + value[:200]
    return os.path.basename(sys.argv[0])[:200]


class PendingFiles:
    """Files of one command that get their names when all of them are complete; a context manager.

    Each is written under :meth:`temporary`, a fixed name, and locked meanwhile, so that whatever a killed command left
    is known for what it is: the next one cleans it up. Killed between two names, it leaves its mark in the locks, and
    the same command may replace what it had published.

    Args:
        finals: the files, and for each what to say where it exists. The last one is what makes the others valid: it
            is removed first and published last.
        command: what the caller does, in words of one line; the same words mean the same command.
        inputs: files that the command reads.
        overwrite: whether files that exist are replaced.

    Raises:
        FileError: an output is an input, a directory, named twice, there (without `overwrite`), or being written by
            another process.
        OSError: nothing can be written there.
    """

    def __init__(
        self, finals: Sequence[tuple[Path, str]], *, command: str, inputs: Sequence[Path] = (), overwrite: bool = False
    ) -> None:
        self._finals = [final for final, _ in finals]
        self._command = command
        self._refuse_collisions(inputs)
        self._made = [d for final in self._finals for d in (final.parent, *final.parent.parents) if not d.exists()]
        self._locks: list[FileLock] = []
        self._published = False
        try:
            for final in sorted(self._finals):
                self._locks.append(_lock(final))
            unfinished = all(lock.left == command for lock in self._locks)
            for final, refusal in finals:
                if os.path.lexists(final) and not overwrite and not unfinished:
                    raise FileError(f"{final} exists; {refusal}")
            self._clean()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "PendingFiles":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    temporary = staticmethod(incomplete)

    def publish(self, first: Callable[[], None] = lambda: None) -> None:
        """Gives all files their names; each must lie at its temporary one.

        `first` is called when everything is on disk and nothing has been replaced yet.
        """
        for final in self._finals:
            fsync(self.temporary(final))
        with _undisturbed() as requests:
            for lock in self._locks:
                lock.describe(self._command)
            first()
            for final in reversed(self._finals):
                final.unlink(missing_ok=True)
            for final in self._finals:
                publish(self.temporary(final), final)
            self._published = True
            requests.clear()  # what they would have stopped is done

    def close(self) -> None:
        """Removes what has no final name, and gives the names free."""
        with _undisturbed():
            if len(self._locks) == len(self._finals):  # else they are another process's
                self._clean()
            for lock in self._locks:
                # What a killed command published in part is still only in part.
                lock.release(keep=bool(lock.left) and not self._published)
            self._locks = []
            for directory in self._made:
                with contextlib.suppress(OSError):  # there is something in it
                    directory.rmdir()

    def _clean(self) -> None:
        for final in self._finals:
            self.temporary(final).unlink(missing_ok=True)

    def _refuse_collisions(self, inputs: Sequence[Path]) -> None:
        for number, final in enumerate(self._finals):
            if final.is_dir():
                raise FileError(
                    f"{final} is a directory, and a file of that name would be written: choose another name"
                )
            if any(final.resolve() == other.resolve() for other in self._finals[:number]):
                raise FileError(f"{final} would be written twice: choose another name")
            for written in (final, self.temporary(final), _lock_path(final)):
                for path in inputs:
                    if written.exists() and path.exists() and os.path.samefile(written, path):
                        same = "" if os.fspath(written) == os.fspath(path) else f" (it is {path})"
                        raise FileError(f"{written} is an input{same}, and would be overwritten: choose another name")


def _lock_path(final: Path) -> Path:
    return final.with_name(f".{final.name}.lock")


def _lock(final: Path) -> FileLock:
    try:
        return FileLock(_lock_path(final))
    except LockedError as error:
        raise LockedError(f"{final} is being written by another job ({error.holder}): wait for it, or end it") from None
    except OSError as error:
        error.filename = os.fspath(final)  # what the user knows
        raise


@contextlib.contextmanager
def _undisturbed() -> Iterator[list[int]]:
    """Holds back requests to stop while a few files change their names; yields those that arrived.

    By Python's handlers and not by a mask: a signal may reach any thread, and its handler runs in this one.
    """
    arrived: list[int] = []
    # In other threads they never interrupt.
    numbers = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, lambda number, _: arrived.append(number)) for number in numbers}
    try:
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for missed in arrived:
            signal.raise_signal(missed)

# SPDX-License-Identifier: Apache-2.0
"""Exclusive writing of files by one process: a lock that ends with its process, and outputs that appear together."""

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

# A killed process with much memory takes a moment to exit, and it releases its lock last.
_PATIENCE_SECONDS = 5.0
_UNSUPPORTED = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}
# Descriptions have one length, so that a new one overwrites all of an old one in a single call.
_DESCRIPTION_BYTES = 1024


class LockedError(FileError):
    """The exception for a lock that another process holds; ``holder`` describes that process."""

    def __init__(self, message: str, holder: str = "") -> None:
        super().__init__(message)
        self.holder = holder


class FileLock:
    """A lock file that is held until :meth:`release` or the end of this process, also by SIGKILL.

    It is a POSIX record lock: the one kind that NFS carries from node to node, and that processes which this one forks
    do not inherit (an orphaned one would keep its restart out). The constructor makes the directory and takes the lock;
    if another process holds it, it waits for `patience` seconds, or for a few if that is None.

    Attributes:
        note: a line for the log if the file system has no locks, else None.
        left: what a killed holder left unfinished, in its words, or an empty text.

    Raises:
        LockedError: if another process holds the lock; the message names the process.
        OSError: if nothing can be written there.
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
        """Writes into the lock file who holds it, and what is unfinished if this process is killed."""
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        holder = f"{_job()}, process {os.getpid()} on {socket.gethostname()}, since {since}"
        os.pwrite(self._file, f"{unfinished}\n{holder}\n".encode(errors="replace").ljust(_DESCRIPTION_BYTES), 0)

    def _read(self) -> tuple[str, str]:
        """Returns what is unfinished, and who holds the lock, as far as the file says."""
        text = ""
        with contextlib.suppress(OSError):
            text = os.pread(self._file, _DESCRIPTION_BYTES, 0).decode(errors="replace")
        unfinished, _, holder = text.partition("\n")
        return unfinished, holder.strip() or "it does not say which"

    def release(self, keep: bool = False) -> None:
        """Releases the lock and removes its file; `keep` leaves the file with its description, as a kill does."""
        if not keep:
            with contextlib.suppress(OSError):
                self._path.unlink()
        os.close(self._file)

    def _try(self) -> bool:
        """Opens the file and takes the lock; returns whether that succeeded, or the file system has no locks."""
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o644)
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The previous holder may have removed the file between our opening and our locking it.
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
    """A context manager for the files of one command, which get their final names when all of them are complete.

    Each file is written under :meth:`temporary`, a fixed name, and locked meanwhile, so that the next command
    recognizes and removes what a killed command left. A command that is killed between two renames leaves its mark in
    the locks, so that the same command may replace what it had published.

    Args:
        finals: the files, each with the text of the refusal if it exists. The last file is the one that makes the
            others valid: it is removed first and published last.
        command: what the caller does, in one line; equal texts mean the same command.
        inputs: the files that the command reads.
        overwrite: whether to replace existing files.

    Raises:
        FileError: if an output is an input, is a directory, is named twice, exists (without `overwrite`), or is being
            written by another process.
        OSError: if nothing can be written there.
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
        """Gives all files their final names; each must be complete under its temporary one.

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
            requests.clear()  # the work that they would have stopped is done

    def close(self) -> None:
        """Removes the files without final names, and releases the locks."""
        with _undisturbed():
            if len(self._locks) == len(self._finals):  # otherwise the temporary files belong to another process
                self._clean()
            for lock in self._locks:
                # Keep the mark of a killed command whose files are still only partly published.
                lock.release(keep=bool(lock.left) and not self._published)
            self._locks = []
            for directory in self._made:
                with contextlib.suppress(OSError):  # the directory is not empty
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
        error.filename = os.fspath(final)  # the name that the user knows
        raise


@contextlib.contextmanager
def _undisturbed() -> Iterator[list[int]]:
    """Holds back requests to stop while a few files change their names; yields those that arrived.

    It replaces Python's handlers instead of masking signals: a signal may reach any thread, but its handler runs in
    this one.
    """
    arrived: list[int] = []
    # Other threads are never interrupted by signals.
    numbers = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, lambda number, _: arrived.append(number)) for number in numbers}
    try:
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for missed in arrived:
            signal.raise_signal(missed)

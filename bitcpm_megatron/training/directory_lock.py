# SPDX-License-Identifier: Apache-2.0
"""One job at a time writes into a ``--save`` directory: a lock that its process takes along when it dies."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from ..cli import FailedError
from .agreement import together
from .checkpoint_directory import CheckpointError, recover

LOCK = ".lock"
# A process that was killed with much memory takes a moment to go, and its lock goes last.
_PATIENCE_SECONDS = 5.0
_UNSUPPORTED = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}


@contextlib.contextmanager
def held(directory: str | None) -> Iterator[str | None]:
    """Holds a ``--save`` directory on rank 0, brought into order, for as long as the block runs; collective.

    Args:
        directory: is made if it is not there; None holds nothing.

    Yields:
        :attr:`DirectoryLock.note`.

    Raises:
        CheckpointError: on every rank alike; see :class:`DirectoryLock`.
    """
    lock = None
    with together():
        if directory is not None and torch.distributed.get_rank() == 0:
            lock = DirectoryLock(directory)
    try:
        with together():
            if lock is not None:
                recover(directory)
        yield None if lock is None else lock.note
    finally:
        if lock is not None:
            lock.release()


class DirectoryLock:
    """Holds ``DIR/.lock`` until :meth:`release` or the end of this process, also by SIGKILL.

    A POSIX record lock: it is the one kind that NFS carries from node to node, and that processes which this one forks
    do not inherit (an orphaned one would keep its restart out). Making one takes the lock.

    Args:
        directory: is made if it is not there.

    Attributes:
        note: a line for the log where the file system has no locks, else None.

    Raises:
        CheckpointError: another process holds it, naming it, or nothing can be written there.
        FailedError: the disk is full; nothing is left there.
    """

    def __init__(self, directory: str | Path) -> None:
        self._path = Path(directory) / LOCK
        self.note: str | None = None
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._take()
        except FileExistsError:
            raise CheckpointError(f"--save {directory} is a file: name a directory") from None
        except OSError as error:
            raise self._refusal(error) from None
        try:
            self._describe()
        except OSError as error:
            self.release()
            raise self._refusal(error) from None

    def release(self) -> None:
        """Gives the directory free, and leaves nothing there."""
        with contextlib.suppress(OSError):
            self._path.unlink()
        os.close(self._file)

    def _take(self) -> int:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o644)
            try:
                if self._try(descriptor):
                    return descriptor
                holder = _holder(descriptor)
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"--save {self._path.parent} is being written by another job ({holder}): end that one first, or "
                    "choose another --save"
                )
            time.sleep(0.1)

    def _try(self, descriptor: int) -> bool:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                self.note = (
                    f"the file system of {self._path.parent} has no locks ({error.strerror}; Lustre has them with the "
                    "mount option flock): nothing keeps a second job from writing there"
                )
                return True
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise
        # The holder before may have removed the file between our opening and our locking it.
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(descriptor), os.stat(self._path))
        return False

    def _describe(self) -> None:
        text = json.dumps(
            {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "since": datetime.now().astimezone().isoformat(timespec="seconds"),
                "job": _job(),
            }
        )
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, text.encode(), 0)

    def _refusal(self, error: OSError) -> CheckpointError | FailedError:
        said = f"--save {self._path.parent} cannot be written ({error.strerror})"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return FailedError(f"{said}: free some space and start the same command again")
        return CheckpointError(f"{said}: choose another")


def _job() -> str:
    for name, prefix in (("SLURM_JOB_ID", "SLURM job "), ("TORCHELASTIC_RUN_ID", "")):
        value = os.environ.get(name, "none")
        if value != "none":
            return prefix + value
    return os.path.basename(sys.argv[0])


def _holder(descriptor: int) -> str:
    """Who holds a lock, as far as the file says."""
    with contextlib.suppress(OSError, ValueError):
        content: Any = json.loads(os.pread(descriptor, 4096, 0))
        return "{job}, process {pid} on {host}, since {since}".format(**content)
    return "it does not say which"

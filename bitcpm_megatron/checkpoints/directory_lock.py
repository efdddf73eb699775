# SPDX-License-Identifier: Apache-2.0
"""One job at a time writes into a ``--save`` directory: a lock that its process takes along when it dies."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from ..agreement import together
from ..cli import FailedError
from ..files import disk_is_full
from ..files.lock import FileLock, LockedError
from .directory import CheckpointError, recover

LOCK = ".lock"


@contextlib.contextmanager
def held(directory: str | None) -> Iterator[str | None]:
    """Holds a ``--save`` directory on rank 0, brought into order, for as long as the block runs; collective.

    Yields:
        :attr:`FileLock.note`.

    Raises:
        CheckpointError: on every rank alike; see :func:`lock_directory`.
    """
    lock = None
    try:
        with together():
            if directory is not None and torch.distributed.get_rank() == 0:
                lock = lock_directory(directory)
                recover(directory)
        yield None if lock is None else lock.note
    finally:
        if lock is not None:
            lock.release()


def lock_directory(directory: str | Path) -> FileLock:
    """Takes the lock ``DIR/.lock`` of a ``--save`` directory, which is made if it is not there.

    Raises:
        CheckpointError: another process holds it, naming it, or nothing can be written there.
        FailedError: the disk is full; nothing is left there.
    """
    try:
        return FileLock(Path(directory) / LOCK)
    except LockedError as error:
        raise CheckpointError(
            f"--save {directory} is being written by another job ({error.holder}): end that one first, or choose "
            "another --save"
        ) from None
    except FileExistsError:
        raise CheckpointError(f"--save {directory} is a file: name a directory") from None
    except OSError as error:
        said = f"--save {directory} cannot be written ({error.strerror})"
        if disk_is_full(error):
            raise FailedError(f"{said}: free some space and start the same command again") from None
        raise CheckpointError(f"{said}: choose another") from None

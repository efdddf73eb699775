# SPDX-License-Identifier: Apache-2.0
"""Exclusive writing into a ``--save`` directory by one job, with a lock that is released when its process dies."""

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
    """Locks a ``--save`` directory on rank 0 while the block runs, and cleans it up before; collective.

    Yields:
        :attr:`FileLock.note`.

    Raises:
        CheckpointError, FailedError: on every rank alike, if :func:`lock_directory` or :func:`recover` raises.
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
    """Takes the lock ``DIR/.lock`` of a ``--save`` directory, and makes the directory if it does not exist.

    Raises:
        CheckpointError: if another process, which the message names, holds the lock, or nothing can be written there.
        FailedError: if the disk is full; nothing is left in the directory.
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

# SPDX-License-Identifier: Apache-2.0
"""Output directories and files that appear completely or not at all, with a check of the disk space they need."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ...cli import FailedError
from ...files import disk_is_full, publish
from .reader import ConversionError


@contextlib.contextmanager
def staged(final: Path, nbytes: int | None = None, one_file: bool = False) -> Iterator[Path]:
    """Yields a temporary directory beside ``final`` to write into; it is renamed to ``final`` if the block succeeds.

    Leftovers of a killed run with the same output are removed first; on any exception the directory is removed. It is
    locked while the block runs: if two commands write the same output, the second is refused.

    Args:
        final: the directory to create; it may exist if it is empty. Its parents are created.
        nbytes: the number of bytes that the block is going to write, if known; checked at the start.
        one_file: whether the single file written to the directory becomes ``final``, instead of the directory.

    Raises:
        ConversionError: if ``final`` is in use or a mount point, or another command is writing it.
        FailedError: if the disk is full.
    """
    # Symbolic links are resolved, because a rename would replace the link.
    final = Path(os.path.realpath(final))
    _check_unused(final)
    if os.path.ismount(final):
        raise ConversionError(f"{final} is a mount point, which no directory can replace: give one below it")
    with _locked(final) as temporary:
        try:
            free = shutil.disk_usage(temporary).free
            if nbytes is not None and nbytes > free:
                raise FailedError(
                    f"{final.parent}: {nbytes:,} bytes are needed and {free:,} are free: free some space, or give a "
                    "--save-dir on another disk"
                )
            yield temporary
            _check_unused(final)
            publish(next(temporary.iterdir()) if one_file else temporary, final)
        except OSError as error:
            if not disk_is_full(error):
                raise
            needed = "" if nbytes is None else f" {nbytes:,} bytes are needed,"
            raise FailedError(
                f"{final.parent}: the disk is full:{needed} {shutil.disk_usage(final.parent).free:,} were free when it "
                "failed; nothing was kept. Free some space, or give a --save-dir on another disk"
            ) from error


@contextlib.contextmanager
def _locked(final: Path) -> Iterator[Path]:
    """Yields an empty directory beside ``final`` that only this process writes into.

    The lock ends with the process, so that a killed process leaves the directory free for the next one.

    Raises:
        ConversionError: if another process has locked the directory.
    """
    temporary = final.with_name(f".{final.name}.incomplete")
    temporary.mkdir(parents=True, exist_ok=True)
    lock = os.open(temporary, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Before it released the lock, another command may have renamed the directory to its final name.
            mine = os.path.samestat(os.fstat(lock), os.stat(temporary))
        except OSError:
            mine = False
        if not mine:
            raise ConversionError(f"another command is writing {final}: wait for it, or give another name")
        try:
            for leftover in temporary.iterdir():
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            yield temporary
        finally:
            # After publication, the directory that has this name may belong to another command, and is kept then.
            if temporary.exists() and os.path.samestat(os.fstat(lock), os.stat(temporary)):
                shutil.rmtree(temporary, ignore_errors=True)
    finally:
        os.close(lock)


def _check_unused(final: Path) -> None:
    if final.is_file() or (final.is_dir() and any(final.iterdir())):
        raise ConversionError(f"{final} exists and is not empty: give another --save-dir, or delete it")

# SPDX-License-Identifier: Apache-2.0
"""Output directories that appear whole or not at all, and the disk space that they need."""

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
    """Yields a directory beside ``final`` to write into; it gets the name ``final`` when the block ends well.

    What a killed run left of the same name is removed first; on any exception the directory is removed. It is locked
    meanwhile: of two commands that write to one name the second is refused.

    Args:
        final: the directory to make; it may exist if it is empty. Its parents are made.
        nbytes: that the block is going to write, where known; checked at once.
        one_file: whether not the directory but the one file that is written there becomes ``final``.

    Raises:
        ConversionError: ``final`` is there already, or another command is writing it.
        FailedError: the disk is full.
    """
    # Where a symbolic link leads: a rename would replace the link.
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
    """Yields an empty directory beside ``final`` that this process alone writes into; a killed one leaves it free."""
    temporary = final.with_name(f".{final.name}.incomplete")
    temporary.mkdir(parents=True, exist_ok=True)
    lock = os.open(temporary, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Meanwhile the other command may have given it its final name.
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
            # Not where it was published meanwhile, and another command has begun one of its own.
            if temporary.exists() and os.path.samestat(os.fstat(lock), os.stat(temporary)):
                shutil.rmtree(temporary, ignore_errors=True)
    finally:
        os.close(lock)


def _check_unused(final: Path) -> None:
    if final.is_file() or (final.is_dir() and any(final.iterdir())):
        raise ConversionError(f"{final} exists and is not empty: give another --save-dir, or delete it")

# SPDX-License-Identifier: Apache-2.0
"""Files that are there whole or not at all: written under a temporary name, synced to disk, then renamed."""

import os
from pathlib import Path


def publish(temporary: Path, final: Path) -> None:
    """Gives a complete file or directory its final name; after a crash the name holds all of it or nothing of it.

    Args:
        temporary: what was written, on the same file system.
        final: its name from now on; a file of that name is replaced, a directory must not exist.
    """
    if temporary.is_dir():
        for path in temporary.rglob("*"):
            fsync(path)
    fsync(temporary)
    os.replace(temporary, final)
    fsync(final.parent)


def write_text(path: Path, text: str) -> None:
    """Writes a small text file, replacing what stood there."""
    temporary = path.with_name(f".{path.name}.incomplete")
    temporary.write_text(text, encoding="utf-8")
    publish(temporary, path)


def fsync(path: Path) -> None:
    """Waits until a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

# SPDX-License-Identifier: Apache-2.0
"""Files that appear completely or not at all: written under a temporary name, synced to disk, then renamed."""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_MAX_TEXT_BYTES = 64 * 2**20


class FileError(ValueError):
    """The exception for a file that is missing, damaged or not understood; the message names it and the cure."""


def publish(temporary: Path, final: Path) -> None:
    """Gives a complete file or directory its final name; after a crash the name holds all of it or nothing of it.

    Both paths must be on one file system. An existing file of the final name is replaced; a directory must not exist.
    """
    if temporary.is_dir():
        for path in temporary.rglob("*"):
            fsync(path)
    fsync(temporary)
    os.replace(temporary, final)
    fsync(final.parent)


def incomplete(final: Path) -> Path:
    """Returns the path at which a file or directory is written before it gets its final name."""
    return final.with_name(f".{final.name}.incomplete")


@contextlib.contextmanager
def replacing(final: Path) -> Iterator[Path]:
    """Yields the path to write a file to, which is published when the block ends, or removed if the block fails."""
    temporary = incomplete(final)
    try:
        yield temporary
        publish(temporary, final)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a small text file, replacing an existing one."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def directory_mistake(path: str | Path) -> str | None:
    """Returns why nothing can be written below a directory, which need not exist yet, or None; changes nothing."""
    for place in (Path(path), *Path(path).absolute().parents):
        try:
            mode = place.stat().st_mode
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            return f"{place}: {getattr(error, 'strerror', None) or error}"
        if not stat.S_ISDIR(mode):
            return f"{place} is no directory"
        return None if os.access(place, os.W_OK | os.X_OK) else f"{place} may not be written to"
    return None


def disk_is_full(error: OSError) -> bool:
    """Returns whether an error says that the file system, or the user's share of it, has no room left."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def fsync(path: Path) -> None:
    """Waits until a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_inside(name: str) -> bool:
    """Returns whether a relative path from a file stays below the directory that it is relative to."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def require_file(path: Path) -> os.stat_result:
    """Returns the status of a path, which must lead to a regular file and not to a directory, pipe or socket.

    Raises:
        FileError: if the path leads to no regular file; the message says whether it is missing or of another kind.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        raise FileError(f"{path}: there is no such file") from None
    except OSError as error:
        raise FileError(f"{path}: {error.strerror or error}") from None
    if not stat.S_ISREG(found.st_mode):
        raise FileError(f"{path}: this is no regular file")
    return found


def read_text(path: Path) -> str:
    """Returns the text of a small file.

    Raises:
        FileError: if the file is not regular, not readable, too large for a text that people write, or not UTF-8.
    """
    try:
        size = require_file(path).st_size
        if size > _MAX_TEXT_BYTES:
            raise FileError(f"{path}: {size:,} bytes are too many for such a file")
        return path.read_bytes().decode("utf-8-sig")
    except FileError:
        raise
    except UnicodeDecodeError as error:
        raise FileError(f"{path}: not UTF-8 ({error.reason} at byte {error.start:,})") from None
    except OSError as error:
        raise FileError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise FileError(f"{str(path)!r} is no path: {error}") from None

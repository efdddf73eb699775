# SPDX-License-Identifier: Apache-2.0
"""Digests of what we write, in ``DIGESTS.json`` beside it: they reveal damage, but not forgery."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

from .atomic import FileError, is_inside, write_text
from .documents import Strict, listed, read_json, validated

DIGESTS = "DIGESTS.json"
# A block of this size stays in the processor's cache between the copy and the digest of it.
_BLOCK_BYTES = 2**18
# A function that is called with the number of bytes that were just read.
_OnRead = Callable[[int], object]


class DigestError(FileError):
    """The exception for a file that differs from its recorded digest: it was damaged, cut or replaced."""


class _Digest(Strict):
    bytes: int
    xxh3_128: str


class _Digests(Strict):
    algorithm: Literal["xxh3-128"]
    files: dict[str, _Digest]


class Digester:
    """A digest of a file from its first byte to its last, computed while the file is read or written.

    Attributes:
        size: the number of bytes so far.
    """

    def __init__(self) -> None:
        import xxhash

        self.size = 0
        self._state = xxhash.xxh3_128()

    def update(self, block: bytes | bytearray | memoryview) -> None:
        """Adds the next bytes of the file."""
        self._state.update(block)
        self.size += len(block)

    def write(self, stream: BinaryIO, data: Any) -> int:
        """Writes bytes to a stream and adds them to the digest; returns their number.

        The file then need not be read again for its digest.
        """
        whole = memoryview(data).cast("B")
        for start in range(0, len(whole), _BLOCK_BYTES):
            block = whole[start : start + _BLOCK_BYTES]
            stream.write(block)
            self.update(block)
        return len(whole)

    def entry(self) -> dict[str, Any]:
        """Returns the size and the XXH3-128 of the file, as an entry of ``DIGESTS.json``."""
        return {"bytes": self.size, "xxh3_128": self._state.hexdigest()}


def digest(path: Path, on_read: _OnRead = lambda count: None) -> dict[str, Any]:
    """Returns the size and the XXH3-128 of a file, as an entry of ``DIGESTS.json``."""
    found, buffer = Digester(), memoryview(bytearray(_BLOCK_BYTES))
    # Read into the same memory each time, because the system clears every page of fresh memory.
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            found.update(buffer[:count])
            on_read(count)
    return found.entry()


def write_digests(directory: Path, known: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Writes ``DIGESTS.json`` into a directory whose files are complete.

    All files below the directory are recorded, by their path relative to it; `known` are entries that :func:`digest`,
    or a :class:`Digester` while it wrote the files, made before.
    """
    # Known files need not be visible here yet: on a network file system another node may have written them.
    files = dict(known or {})
    for path in directory.rglob("*"):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name != DIGESTS and name not in files:
            files[name] = digest(path)
    _record(directory, files)


def add_digest(entry: Mapping[str, Any], final: Path) -> None:
    """Adds the entry of a file to the ``DIGESTS.json`` of the directory that the file will be in."""
    _record(final.parent, {**(read_digests(final.parent) or {}), final.name: entry})


def _record(directory: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    content = {"algorithm": "xxh3-128", "files": {name: dict(files[name]) for name in sorted(files)}}
    write_text(directory / DIGESTS, json.dumps(content, indent=1))


def check_digests(directory: Path, names: Iterable[str] | None = None, on_read: _OnRead = lambda count: None) -> bool:
    """Compares files with their digests, as :func:`find_damage` does; returns whether there are digests.

    Directories that were not written by us have none.

    Raises:
        DigestError: if files are missing or differ; the message names them.
    """
    damage = find_damage(directory, names, on_read=on_read)
    if damage:
        raise DigestError(listed(damage))
    return damage is not None


def find_damage(
    directory: Path, names: Iterable[str] | None = None, contents: bool = True, on_read: _OnRead = lambda count: None
) -> list[str] | None:
    """Compares the files of a directory with its ``DIGESTS.json``; files that it does not name are ignored.

    This reveals damage but not forgery: whoever changes a file can change its digest, too.

    Args:
        directory: the directory of the files.
        names: the only files to compare; None for all that are recorded.
        contents: whether to read the files; otherwise only their sizes are compared.
        on_read: a function called with the number of bytes that were just read.

    Returns:
        One line per file that is missing or differs; None if there are no digests.

    Raises:
        FileError: if ``DIGESTS.json`` itself is damaged.
    """
    recorded = read_digests(directory)
    if recorded is None:
        return None
    damage = []
    for name in recorded if names is None else names:
        path, expected = directory / name, recorded.get(name)
        if expected is None:
            continue
        if not path.is_file():
            damage.append(f"{path} is missing, and {DIGESTS} names it: copy the directory again")
            continue
        # Compare the size first, because that needs no reading.
        if (size := path.stat().st_size) != expected["bytes"]:
            said = f"has {size:,} bytes and {DIGESTS} says {expected['bytes']:,}: the file is cut or changed"
        elif contents and digest(path, on_read) != expected:
            said = f"does not match its digest in {DIGESTS}: the file is damaged or changed"
        else:
            continue
        damage.append(f"{path} {said}; copy it again (or delete {DIGESTS}, if the change was yours)")
    return damage


def read_digests(directory: Path) -> dict[str, dict[str, Any]] | None:
    """Returns the entries of ``DIGESTS.json``, by path relative to the directory; None if the file does not exist.

    Raises:
        FileError: if ``DIGESTS.json`` is damaged, or names a file outside the directory.
    """
    path = directory / DIGESTS
    if not path.exists():
        return None
    files = validated(_Digests, read_json(path), str(path)).files
    for name in files:
        if not is_inside(name):
            raise FileError(f"{path}: {name!r} is no file below this directory")
    return {name: entry.model_dump() for name, entry in files.items()}

# SPDX-License-Identifier: Apache-2.0
"""``DIGESTS.json`` beside what we write: it shows damage, and no forgery."""

import json
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import field_validator

from .atomic import FileError, is_inside, write_text
from .documents import Strict, listed, read_json, validated

DIGESTS = "DIGESTS.json"


_DIGEST_BLOCK = 4 * 2**20


class DigestError(FileError):
    """A file is not the one whose digest was recorded: it was damaged, cut or replaced."""


class _Digest(Strict):
    bytes: int
    xxh3_128: str


class _Digests(Strict):
    algorithm: typing.Literal["xxh3-128"]
    files: dict[str, _Digest]

    @field_validator("files")
    @classmethod
    def _inside(cls, files: dict[str, _Digest]) -> dict[str, _Digest]:
        for name in files:
            if not is_inside(name):
                raise ValueError(f"{name!r} is no file below this directory")
        return files


def digest(path: Path, on_read: Callable[[int], object] = lambda count: None) -> dict[str, Any]:
    """Size and XXH3-128 of a file, as an entry of ``DIGESTS.json``.

    Args:
        path: the file.
        on_read: called with the number of bytes that were just read.
    """
    import xxhash

    state, size = xxhash.xxh3_128(), 0
    with path.open("rb") as stream:
        while block := stream.read(_DIGEST_BLOCK):
            state.update(block)
            size += len(block)
            on_read(len(block))
    return {"bytes": size, "xxh3_128": state.hexdigest()}


def write_digests(directory: Path, known: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Writes ``DIGESTS.json`` beside the files of a directory that nobody writes into any more.

    Args:
        directory: all files below it are recorded, by their path from here.
        known: entries that :func:`digest` made before, by path; the others are made now.
    """
    # What is known need not be visible from here yet: on a network file system another node may have written it.
    files = dict(known or {})
    files.update({name: digest(directory / name) for name in _names(directory) if name not in files})
    _write_digests(directory, files)


def _write_digests(directory: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    content = {"algorithm": "xxh3-128", "files": {name: dict(files[name]) for name in sorted(files)}}
    write_text(directory / DIGESTS, json.dumps(content, indent=1))


def add_digest(path: Path, final: Path) -> None:
    """Records a file in the ``DIGESTS.json`` of the directory that it is going to lie in, beside what stands there.

    Args:
        path: where it lies now, complete.
        final: its path from now on.
    """
    files = {**(read_digests(final.parent) or {}), final.name: digest(path)}
    _write_digests(final.parent, files)


def check_digests(
    directory: Path, names: Iterable[str] | None = None, on_read: Callable[[int], object] = lambda count: None
) -> bool:
    """Compares files with their digests; see :func:`find_damage`.

    Returns:
        Whether there are digests to compare with; files from elsewhere have none.

    Raises:
        DigestError: files are missing or differ, naming them.
    """
    damage = find_damage(directory, names, on_read=on_read)
    if damage:
        raise DigestError(listed(damage))
    return damage is not None


def find_damage(
    directory: Path,
    names: Iterable[str] | None = None,
    contents: bool = True,
    on_read: Callable[[int], object] = lambda count: None,
) -> list[str] | None:
    """Compares the files of a directory with its ``DIGESTS.json``; files that it does not name are not looked at.

    This shows damage and not forgery: whoever changes a file can change its digest.

    Args:
        directory: that holds the files.
        names: look at these alone; None for all that are recorded.
        contents: whether to read them; else only their sizes are compared.
        on_read: called with the number of bytes that were just read.

    Returns:
        One line per file that is missing or differs; None where there are no digests.

    Raises:
        FileError: ``DIGESTS.json`` itself is damaged.
    """
    recorded = read_digests(directory)
    if recorded is None:
        return None
    wanted = recorded if names is None else [name for name in names if name in recorded]
    lines = (_damage(directory / name, recorded[name], contents, on_read) for name in wanted)
    return [line for line in lines if line is not None]


def _damage(path: Path, expected: Mapping[str, Any], contents: bool, on_read: Callable[[int], object]) -> str | None:
    if not path.is_file():
        return f"{path} is missing, and {DIGESTS} names it: copy the directory again"
    # The size first: it needs no reading.
    if path.stat().st_size != expected["bytes"]:
        problem = (
            f"has {path.stat().st_size:,} bytes and {DIGESTS} says {expected['bytes']:,}: the file is cut or changed"
        )
    elif contents and digest(path, on_read) != expected:
        problem = f"does not match its digest in {DIGESTS}: the file is damaged or changed"
    else:
        return None
    return f"{path} {problem}; copy it again (or delete {DIGESTS}, if the change was yours)"


def read_digests(directory: Path) -> dict[str, dict[str, Any]] | None:
    """What ``DIGESTS.json`` records, by path from the directory; None where there is none.

    Raises:
        FileError: it is damaged.
    """
    path = directory / DIGESTS
    if not path.exists():
        return None
    return {name: entry.model_dump() for name, entry in validated(_Digests, read_json(path), str(path)).files.items()}


def _names(directory: Path) -> list[str]:
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return [name for path in paths if (name := path.relative_to(directory).as_posix()) != DIGESTS]

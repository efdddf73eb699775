# SPDX-License-Identifier: Apache-2.0
"""``DIGESTS.json`` beside what we write: it shows damage, and no forgery."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from .atomic import FileError, is_inside, write_text
from .documents import Strict, listed, read_json, validated

DIGESTS = "DIGESTS.json"
_BLOCK_BYTES = 4 * 2**20
# Is called with the number of bytes that were just read.
_OnRead = Callable[[int], object]


class DigestError(FileError):
    """A file is not the one whose digest was recorded: it was damaged, cut or replaced."""


class _Digest(Strict):
    bytes: int
    xxh3_128: str


class _Digests(Strict):
    algorithm: Literal["xxh3-128"]
    files: dict[str, _Digest]


def digest(path: Path, on_read: _OnRead = lambda count: None) -> dict[str, Any]:
    """Size and XXH3-128 of a file, as an entry of ``DIGESTS.json``."""
    import xxhash

    state, size = xxhash.xxh3_128(), 0
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            state.update(block)
            size += len(block)
            on_read(len(block))
    return {"bytes": size, "xxh3_128": state.hexdigest()}


def write_digests(directory: Path, known: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Writes ``DIGESTS.json`` beside the files of a directory that nobody writes into any more.

    All files below it are recorded, by their path from there; `known` are entries that :func:`digest` made before.
    """
    # What is known need not be visible from here yet: on a network file system another node may have written it.
    files = dict(known or {})
    for path in directory.rglob("*"):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name != DIGESTS and name not in files:
            files[name] = digest(path)
    _record(directory, files)


def add_digest(path: Path, final: Path) -> None:
    """Records a file, complete at `path`, in the ``DIGESTS.json`` of the directory that it is going to lie in."""
    _record(final.parent, {**(read_digests(final.parent) or {}), final.name: digest(path)})


def _record(directory: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    content = {"algorithm": "xxh3-128", "files": {name: dict(files[name]) for name in sorted(files)}}
    write_text(directory / DIGESTS, json.dumps(content, indent=1))


def check_digests(directory: Path, names: Iterable[str] | None = None, on_read: _OnRead = lambda count: None) -> bool:
    """Compares files with their digests, as :func:`find_damage`; returns whether there are any: not from elsewhere.

    Raises:
        DigestError: files are missing or differ, naming them.
    """
    damage = find_damage(directory, names, on_read=on_read)
    if damage:
        raise DigestError(listed(damage))
    return damage is not None


def find_damage(
    directory: Path, names: Iterable[str] | None = None, contents: bool = True, on_read: _OnRead = lambda count: None
) -> list[str] | None:
    """Compares the files of a directory with its ``DIGESTS.json``; files that it does not name are not looked at.

    This shows damage and not forgery: whoever changes a file can change its digest.

    Args:
        directory: of the files.
        names: look at these alone; None for all that are recorded.
        contents: whether to read them; else only their sizes are compared.
        on_read: told of what is read.

    Returns:
        One line per file that is missing or differs; None where there are no digests.

    Raises:
        FileError: ``DIGESTS.json`` itself is damaged.
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
        # The size first: it needs no reading.
        if (size := path.stat().st_size) != expected["bytes"]:
            said = f"has {size:,} bytes and {DIGESTS} says {expected['bytes']:,}: the file is cut or changed"
        elif contents and digest(path, on_read) != expected:
            said = f"does not match its digest in {DIGESTS}: the file is damaged or changed"
        else:
            continue
        damage.append(f"{path} {said}; copy it again (or delete {DIGESTS}, if the change was yours)")
    return damage


def read_digests(directory: Path) -> dict[str, dict[str, Any]] | None:
    """What ``DIGESTS.json`` records, by path from the directory; None where there is none.

    Raises:
        FileError: it is damaged, or names a file outside.
    """
    path = directory / DIGESTS
    if not path.exists():
        return None
    files = validated(_Digests, read_json(path), str(path)).files
    for name in files:
        if not is_inside(name):
            raise FileError(f"{path}: {name!r} is no file below this directory")
    return {name: entry.model_dump() for name, entry in files.items()}

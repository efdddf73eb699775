# SPDX-License-Identifier: Apache-2.0
"""Ways to damage a file or directory, and files that try to run code when they are read."""

import io
import json
import os
import pickle
import shutil
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MARKER = "code-was-run"
"""The name of the file that the code in a crafted file creates in the working directory."""


def damaging(name: str, function: Callable[[Path], None]) -> Callable[[Path], None]:
    """Returns a function that damages one file of the world."""
    return lambda root: function(root / name)


def text_file(name: str, text: str) -> Callable[[Path], None]:
    """Returns a function that overwrites one file of the world with a text."""
    return lambda root: (root / name).write_text(text) and None


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def missing(path: Path) -> None:
    """Removes a file or directory."""
    _remove(path)


def empty(path: Path) -> None:
    """Replaces a file with an empty one."""
    _remove(path)
    path.write_bytes(b"")


def cut(path: Path) -> None:
    """Cuts off the second half of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def garbage(path: Path) -> None:
    """Replaces a file with bytes of no format, which are the same each time."""
    _remove(path)
    path.write_bytes(bytes((i * 151 + 89) % 251 for i in range(2000)))


def directory(path: Path) -> None:
    """Replaces a file with a directory."""
    _remove(path)
    path.mkdir()


def file(path: Path) -> None:
    """Replaces a directory with a file."""
    _remove(path)
    path.write_text("this is a file\n")


def fifo(path: Path) -> None:
    """Replaces a path with a pipe without a writer, so that opening it for reading blocks forever."""
    _remove(path)
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    """Replaces a path with a socket on which no process listens."""
    _remove(path)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def loop(path: Path) -> None:
    """Replaces a path with a symbolic link to itself."""
    _remove(path)
    path.symlink_to(path.name)


FILE_DAMAGE: dict[str, Callable[[Path], None]] = {
    f.__name__: f for f in (missing, empty, cut, garbage, directory, fifo, loop)
}
DIRECTORY_DAMAGE: dict[str, Callable[[Path], None]] = {f.__name__: f for f in (missing, file, fifo, loop)}


def flip(path: Path) -> None:
    """Flips one bit in the last quarter of a file, which holds data and not the header."""
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 4
    path.write_bytes(content)


class Evil:
    """An object that creates the file :data:`MARKER` when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (MARKER, "w")


def evil_pickle(path: Path) -> None:
    """Writes a bare pickle that runs code."""
    path.write_bytes(pickle.dumps(Evil()))


def evil_torch_file(path: Path) -> None:
    """Writes a file of ``torch.save`` that runs code."""
    buffer = io.BytesIO()  # torch does not accept file names that begin with a dot
    torch.save({"model": Evil(), "args": Evil()}, buffer)
    path.write_bytes(buffer.getvalue())


def evil_object_entry(path: Path) -> None:
    """Makes a ``torch_dist`` checkpoint refer, in valid metadata, to an object that runs code when it is loaded.

    Args:
        path: the file ``.metadata`` of the checkpoint.
    """
    metadata = pickle.loads(path.read_bytes())  # trusted: made by this campaign
    stored = metadata.storage_data
    index = next(i for i, m in stored.items() if not hasattr(metadata.state_dict_metadata[i.fqn], "size"))
    buffer = io.BytesIO()
    torch.save(Evil(), buffer)
    data = path.parent / stored[index].relative_path
    offset = data.stat().st_size
    with data.open("ab") as stream:
        stream.write(buffer.getvalue())
    object.__setattr__(stored[index], "offset", offset)
    object.__setattr__(stored[index], "length", len(buffer.getvalue()))
    path.write_bytes(pickle.dumps(metadata))


def evil_numpy(path: Path) -> None:
    """Writes an ``.npy`` file that runs code if it is read with ``allow_pickle``."""
    import numpy as np

    with path.open("wb") as stream:
        np.save(stream, np.array([Evil()], dtype=object), allow_pickle=True)


def deflated_bomb(path: Path) -> None:
    """Writes a file in the format of ``torch.save`` whose pickle decompresses to two gigabytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("archive/data.pkl", "w", force_zip64=True) as stream:
            block = b"(" * 2**24
            for _ in range(128):
                stream.write(block)
        archive.writestr("archive/version", "3\n")


def forget_digests(root: Path) -> None:
    """Removes the digests of a directory, so that readers must notice damage by themselves."""
    for path in root.rglob("DIGESTS.json"):
        path.unlink()


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    """Replaces the value in a JSON file by what ``change`` makes of it."""
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def edit_safetensors(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Replaces the header of a safetensors file by what ``change`` makes of it, and keeps the data."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    text = json.dumps(change(header) or header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])

# SPDX-License-Identifier: Apache-2.0
"""Weights of Hugging Face model directories: ``model.safetensors``, its shards, and ``pytorch_model.bin``."""

import functools
import struct
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...checkpoints.safe_load import load_without_code
from ...cli import Whole
from ...files import is_inside, parse_json, read_json
from .mapped_file import MappedFile
from .reader import ConversionError, TensorInfo, TensorReader, listed
from .safetensors_writer import DTYPES, SAFETENSORS

_BIN = "pytorch_model.bin"
# In the order in which Transformers looks for them: a single file wins over an index.
_NAMES = (SAFETENSORS, f"{SAFETENSORS}.index.json", _BIN, f"{_BIN}.index.json")

_MAX_HEADER = 100_000_000  # the library's limit
_SIZES = Whole(0, 2**63 - 1)
_MAX_DIMENSIONS = 64  # PyTorch's limit


def open_tensors(path: Path, allow_pickle: bool = False) -> TensorReader:
    """A reader of a model directory, or of one ``.safetensors`` or ``.bin`` file.

    Args:
        path: the directory or file.
        allow_pickle: unpickle a ``.bin`` that PyTorch's safe loader refuses; it can then run any code.

    Raises:
        ConversionError: there is nothing to read, or it is damaged.
    """
    path = Path(path)
    return _open_file(path, allow_pickle) if path.is_file() else HfReader(path, allow_pickle)


class HfReader:
    """Tensors of a Hugging Face model directory; see :class:`~.reader.TensorReader`.

    Which file is read is Transformers' choice: ``model.safetensors``, else the shards of its index, else
    ``pytorch_model.bin``, else the shards of its index. Shards and index must agree in every name.

    Args:
        directory: with the files.
        allow_pickle: see :func:`open_tensors`.

    Raises:
        ConversionError: a file is missing or damaged, or the index does not fit the shards.
    """

    def __init__(self, directory: Path, allow_pickle: bool = False) -> None:
        directory = Path(directory)
        if not directory.exists():
            raise ConversionError(f"{directory}: there is no such directory or file")
        found = next((directory / name for name in _NAMES if (directory / name).is_file()), None)
        if found is None:
            raise ConversionError(f"{directory}: no weights: none of {', '.join(_NAMES)} is there")
        if found.suffix == ".json":
            self._files = _open_shards(found, allow_pickle)
        else:
            file = _open_file(found, allow_pickle)
            self._files = dict.fromkeys(file.tensors(), file)
        self._infos = {name: file.tensors()[name] for name, file in self._files.items()}

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor's shape and dtype; reads no data."""
        return self._infos

    def read(self, name: str, index: tuple[slice | int, ...] = ()) -> torch.Tensor:
        """A piece of a tensor, a view of its file.

        Raises:
            ConversionError: there is no such tensor.
        """
        if name not in self._files:
            raise ConversionError(f"there is no tensor {name} in the model")
        return self._files[name].read(name, index)


@dataclass(frozen=True)
class _Entry:
    info: TensorInfo
    offset: int


class _SafetensorsFile:
    """Tensors of one safetensors file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries = _header(path)
        self._infos = {name: entry.info for name, entry in self._entries.items()}

    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def read(self, name: str, index: tuple[slice | int, ...] = ()) -> torch.Tensor:
        if name not in self._entries:
            raise ConversionError(f"{self._path}: there is no tensor {name}")
        entry = self._entries[name]
        try:
            return self._mapping.read(entry.offset, entry.info.dtype, entry.info.shape, index=index)
        except ValueError as error:
            raise ConversionError(f"{self._path}: {name}: the file became shorter ({error})") from error

    @functools.cached_property
    def _mapping(self) -> MappedFile:
        return MappedFile(self._path)


class _BinFile:
    """Tensors of one ``torch.save`` file: a dict of names and tensors."""

    def __init__(self, path: Path, allow_pickle: bool) -> None:
        self._path = path
        loaded = load_without_code(path, mmap=True, allow_pickle=allow_pickle, stand_ins=False)
        others = [
            name
            for name, tensor in (loaded.items() if isinstance(loaded, dict) else [])
            if not (isinstance(name, str) and isinstance(tensor, torch.Tensor))
        ]
        if not isinstance(loaded, dict) or others:
            raise ConversionError(
                f"{path}: not a dict of names and tensors ({listed(others) or type(loaded).__name__}): "
                "a training checkpoint? Give the model's state_dict alone"
            )
        self._tensors = {name: tensor.detach() for name, tensor in loaded.items()}
        self._infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in self._tensors.items()}

    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def read(self, name: str, index: tuple[slice | int, ...] = ()) -> torch.Tensor:
        if name not in self._tensors:
            raise ConversionError(f"{self._path}: there is no tensor {name}")
        return self._tensors[name][index]


def _open_file(path: Path, allow_pickle: bool) -> "_SafetensorsFile | _BinFile":
    return _SafetensorsFile(path) if path.suffix == ".safetensors" else _BinFile(path, allow_pickle)


def _open_shards(index: Path, allow_pickle: bool) -> dict[str, "_SafetensorsFile | _BinFile"]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ConversionError(f"{index}: not an index of shards, a weight_map of names and files: copy it again")
    named = defaultdict(set)
    for name, file in weight_map.items():
        if not is_inside(file):
            raise ConversionError(f"{index}: {name} lies outside the model, in {file!r}: do not load it")
        named[file].add(name)
    if not named:
        raise ConversionError(f"{index}: names no tensors: copy the model again")
    missing = sorted(file for file in named if not (index.parent / file).is_file())
    if missing:
        first = sorted(named[missing[0]])[0]
        raise ConversionError(f"{index.parent}: missing {listed(missing)} (with {first}): copy these files again")
    files: dict[str, _SafetensorsFile | _BinFile] = {}
    holders: dict[str, str] = {}
    for file in sorted(named):
        path = index.parent / file
        opened = _open_file(path, allow_pickle)
        held = set(opened.tensors())
        twice = sorted(held & holders.keys())
        if twice:
            raise ConversionError(
                f"{path}: holds {listed(twice)}, as {holders[twice[0]]} does: delete both and copy the model again"
            )
        if absent := sorted(named[file] - held):
            raise ConversionError(
                f"{path}: does not hold {listed(absent)}, which {index.name} says it does: index and shards are not "
                "of one model, copy both again"
            )
        if ghosts := sorted(held - named[file]):
            raise ConversionError(
                f"{path}: holds {listed(ghosts)}, which {index.name} does not name: a stale index: copy both again"
            )
        holders.update(dict.fromkeys(held, path.name))
        files.update(dict.fromkeys(opened.tensors(), opened))
    return files


def _header(path: Path) -> dict[str, _Entry]:
    """What a safetensors file holds; the file must be as long as its header says."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > min(_MAX_HEADER, size - 8):
            raise ConversionError(f"{path}: no safetensors file, or truncated inside its header: copy it again")
        text = file.read(length)
    try:
        header = parse_json(text.decode(), f"{path}: its header")
    except UnicodeDecodeError as error:
        raise ConversionError(f"{path}: its header is damaged ({error.reason}): copy the file again") from None
    if not isinstance(header, dict):
        raise ConversionError(f"{path}: its header is damaged (no JSON object): copy the file again")
    header.pop("__metadata__", None)
    start = 8 + length
    entries = {name: _entry(path, name, described, start) for name, described in header.items()}
    # The format wants every byte to belong to one tensor.
    end, last = start, ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].info.nbytes)):
        if entry.offset != end:
            problem = f"overlaps {last}" if entry.offset < end else f"begins {entry.offset - end} bytes after {last}"
            raise ConversionError(f"{path}: {name} {problem}: the header is damaged, copy the file again")
        end, last = end + entry.info.nbytes, name
    if end != size:
        problem = "truncated" if size < end else "longer than its header says"
        raise ConversionError(f"{path}: {problem}: {size} bytes, {last} ends at {end}: copy the file again")
    return entries


def _entry(path: Path, name: str, described: Any, start: int) -> _Entry:
    """One line of a header; the data begin at byte ``start``."""
    keys = ("dtype", "shape", "data_offsets")
    values: list[Any] = [described.get(key) if isinstance(described, dict) else None for key in keys]
    dtype, shape, offsets = values
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ConversionError(f"{path}: {name} has dtype {dtype!r}, which cannot be read")
    for what, numbers, count in (("shape", shape, _MAX_DIMENSIONS), ("data_offsets", offsets, 2)):
        if not isinstance(numbers, list) or len(numbers) > count or any(map(_SIZES.mistake, numbers)):
            raise ConversionError(
                f"{path}: {name}: its {what} are not whole numbers of 0 or more: the header is damaged, copy the file "
                "again"
            )
    info = TensorInfo(tuple(shape), DTYPES[dtype])
    if len(offsets) != 2 or offsets[1] - offsets[0] != info.nbytes:
        raise ConversionError(f"{path}: {name}: the header contradicts itself: copy the file again")
    return _Entry(info, start + offsets[0])

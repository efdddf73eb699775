# SPDX-License-Identifier: Apache-2.0
"""Weights of Hugging Face model directories: ``model.safetensors``, its shards, and ``pytorch_model.bin``."""

import functools
import json
import re
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.safe_load import load_without_code
from ..cli import Whole
from ..files import is_inside, parse_json, read_json
from .mapped_file import MappedFile, as_bytes
from .tensors import ConversionError, TensorInfo, TensorReader

_SAFETENSORS = "model.safetensors"
_BIN = "pytorch_model.bin"
# In the order in which Transformers looks for them: a single file wins over an index.
_NAMES = (_SAFETENSORS, f"{_SAFETENSORS}.index.json", _BIN, f"{_BIN}.index.json")

# The names of the format, and PyTorch's where this version has them.
_DTYPES = {
    name: getattr(torch, attribute)
    for name, attribute in {
        "F64": "float64",
        "F32": "float32",
        "F16": "float16",
        "BF16": "bfloat16",
        "I64": "int64",
        "I32": "int32",
        "I16": "int16",
        "I8": "int8",
        "U64": "uint64",
        "U32": "uint32",
        "U16": "uint16",
        "U8": "uint8",
        "BOOL": "bool",
        "C64": "complex64",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E4M3FNUZ": "float8_e4m3fnuz",
        "F8_E5M2": "float8_e5m2",
        "F8_E5M2FNUZ": "float8_e5m2fnuz",
        "F8_E8M0": "float8_e8m0fnu",
    }.items()
    if hasattr(torch, attribute)
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # the library's limit
_SIZES = Whole(0, 2**63 - 1)
_MAX_DIMENSIONS = 64  # PyTorch's limit
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(I?)B|B)?", re.IGNORECASE)


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
    """Tensors of a Hugging Face model directory; see :class:`~.tensors.TensorReader`.

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


class SafetensorsWriter:
    """Writes a model directory of safetensors files, block by block.

    The safetensors library writes a file only from tensors that are all in memory; this one holds no more than the
    block at hand, because shapes and dtypes are known before. Tensors may be written in any order. ``with`` closes it.

    Args:
        directory: an existing directory without weights.
        plan: every tensor, in the order in which they are put into shards.
        max_shard_size: bytes of tensor data per file; a larger tensor gets a file of its own.

    Raises:
        ConversionError: a dtype that the format does not have.
    """

    def __init__(self, directory: Path, plan: Mapping[str, TensorInfo], max_shard_size: int = 5 * 10**9) -> None:
        self._directory = Path(directory)
        self._plan = dict(plan)
        self._missing = dict.fromkeys(self._plan)
        shards: list[list[str]] = [[]]
        size = 0
        for name, info in self._plan.items():
            if info.dtype not in _DTYPE_NAMES:
                raise ConversionError(f"{name}: safetensors has no dtype {info.dtype}")
            if shards[-1] and size + info.nbytes > max_shard_size:
                shards.append([])
                size = 0
            shards[-1].append(name)
            size += info.nbytes
        self._places: dict[str, tuple[Path, int]] = {}
        self._sharded = len(shards) > 1
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if self._sharded else _SAFETENSORS
            self._start_file(self._directory / file, names)

    def write(self, name: str, blocks: Iterable[torch.Tensor]) -> None:
        """Writes a tensor.

        Args:
            name: of the plan.
            blocks: its rows from first to last, contiguous, of the planned dtype; for a scalar one scalar.

        Raises:
            ConversionError: the blocks do not make up what was planned.
        """
        if name not in self._missing:
            raise ConversionError(f"{name}: {'was written already' if name in self._plan else 'is not in the plan'}")
        info = self._plan[name]
        path, offset = self._places[name]
        rows = 0
        with open(path, "r+b") as file:
            file.seek(offset)
            for block in blocks:
                shape = tuple(block.shape)
                if block.dtype != info.dtype or len(shape) != len(info.shape) or shape[1:] != info.shape[1:]:
                    raise ConversionError(
                        f"{name}: a block of {shape}, {block.dtype} in a tensor of {info.shape}, {info.dtype}"
                    )
                if not block.is_contiguous():
                    raise ConversionError(f"{name}: a block of {shape} is not contiguous")
                rows += shape[0] if shape else 1
                if rows > (info.shape[0] if info.shape else 1):
                    break  # before it runs over the next tensor
                if block.numel():
                    file.write(as_bytes(block.cpu()))
        if rows != (info.shape[0] if info.shape else 1):
            raise ConversionError(f"{name}: blocks of {rows} rows or more for a tensor of {info.shape}")
        del self._missing[name]

    def close(self) -> None:
        """Completes the directory: writes the index, if there is more than one shard.

        Raises:
            ConversionError: planned tensors were not written.
        """
        if self._missing:
            raise ConversionError(f"planned but not written: {_listed(self._missing)}")
        if self._sharded:
            index = {
                "metadata": {"total_size": sum(info.nbytes for info in self._plan.values())},
                "weight_map": {name: self._places[name][0].name for name in sorted(self._plan)},
            }
            text = json.dumps(index, indent=2) + "\n"
            (self._directory / f"{_SAFETENSORS}.index.json").write_text(text, encoding="utf-8")

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()

    def _start_file(self, path: Path, names: list[str]) -> None:
        # The format allows no gaps; wide elements first keep every tensor aligned.
        ordered = sorted(names, key=lambda name: -self._plan[name].dtype.itemsize)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in ordered:
            info = self._plan[name]
            header[name] = {
                "dtype": _DTYPE_NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [end, end + info.nbytes],
            }
            end += info.nbytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        for name in ordered:
            self._places[name] = path, start + header[name]["data_offsets"][0]
        with open(path, "xb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(start + end)


def parse_size(text: str) -> int:
    """Bytes of a size as Hugging Face writes it: "5GB", "500MB" (powers of 1000), "2GiB" (of 1024), "1000".

    Raises:
        ConversionError: it is none.
    """
    match = _SIZE.fullmatch(text.strip()) if len(text) < 40 else None
    size = 0
    if match:
        number, unit, binary = match.groups()
        size = int(float(number) * (1024 if binary else 1000) ** ("KMGT".index(unit.upper()) + 1 if unit else 0))
    if size < 1:
        raise ConversionError(f"{text!r} is no size: write for example 5GB, 500MB, 2GiB or a number of bytes")
    return size


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
                f"{path}: not a dict of names and tensors ({_listed(others) or type(loaded).__name__}): "
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
        raise ConversionError(f"{index.parent}: missing {_listed(missing)} (with {first}): copy these files again")
    files: dict[str, _SafetensorsFile | _BinFile] = {}
    holders: dict[str, str] = {}
    for file in sorted(named):
        path = index.parent / file
        opened = _open_file(path, allow_pickle)
        held = set(opened.tensors())
        twice = sorted(held & holders.keys())
        if twice:
            raise ConversionError(
                f"{path}: holds {_listed(twice)}, as {holders[twice[0]]} does: delete both and copy the model again"
            )
        if absent := sorted(named[file] - held):
            raise ConversionError(
                f"{path}: does not hold {_listed(absent)}, which {index.name} says it does: index and shards are not "
                "of one model, copy both again"
            )
        if ghosts := sorted(held - named[file]):
            raise ConversionError(
                f"{path}: holds {_listed(ghosts)}, which {index.name} does not name: a stale index: copy both again"
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
    dtype, shape, offsets = (described.get(key) if isinstance(described, dict) else None for key in keys)
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ConversionError(f"{path}: {name} has dtype {dtype!r}, which cannot be read")
    for what, numbers, count in (("shape", shape, _MAX_DIMENSIONS), ("data_offsets", offsets, 2)):
        if not isinstance(numbers, list) or len(numbers) > count or any(map(_SIZES.mistake, numbers)):
            raise ConversionError(
                f"{path}: {name}: its {what} are not whole numbers of 0 or more: the header is damaged, copy the file "
                "again"
            )
    info = TensorInfo(tuple(shape), _DTYPES[dtype])
    if len(offsets) != 2 or offsets[1] - offsets[0] != info.nbytes:
        raise ConversionError(f"{path}: {name}: the header contradicts itself: copy the file again")
    return _Entry(info, start + offsets[0])


def _listed(names: Iterable[Any], limit: int = 8) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def row_blocks(tensor: torch.Tensor, nbytes: int = 2**26) -> Iterator[torch.Tensor]:
    """A tensor as contiguous blocks of rows of about ``nbytes`` each, as :meth:`SafetensorsWriter.write` takes them."""
    if tensor.ndim == 0 or tensor.shape[0] == 0:
        yield tensor.contiguous()
        return
    rows = max(1, nbytes * tensor.shape[0] // max(1, tensor.nbytes))
    for start in range(0, tensor.shape[0], rows):
        yield tensor[start : start + rows].contiguous()

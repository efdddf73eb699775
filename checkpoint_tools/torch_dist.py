# SPDX-License-Identifier: Apache-2.0
"""megatron-core's ``torch_dist`` checkpoints, read without megatron and without process groups.

Layout of an iteration directory: ``.metadata``, a pickle of what ``torch.distributed.checkpoint`` knows of each tensor
and where its chunks lie; ``*.distcp``, chunks one behind another, each a small ``torch.save`` file; ``metadata.json``
and ``common.pt``, megatron's own. A tensor's chunks are what the ranks of the run held of it: of a layer stack
(L, out, in) at tensor parallelism 2 usually (1, out / 2, in).
"""

import collections
import functools
import io
import itertools
import os
import pathlib
import pickle
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .mapped_file import MappedFile
from .safe_load import StandIn, load_without_code, stand_in
from .tensors import ConversionError, TensorInfo

_METADATA = ".metadata"
COMMON = "common.pt"
CONFIG = "metadata.json"

# Every class that a .metadata of torch 2.1 to 2.13 or of megatron-core may name. None of them is run: all but sizes,
# dtypes and dicts become stand-ins.
_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed._shard.sharded_tensor.metadata": {"MEM_FORMAT_ENCODING", "TensorProperties"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "torch.serialization": {"_get_layout"},
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
    # Enum members, as Python 3.11 pickles them.
    "builtins": {"getattr", "set"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
}

# Typed storages, as files name them; other dtypes come with an UntypedStorage.
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True)
class _Stored:
    """A chunk and where it lies."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


class TorchDistReader:
    """Tensors of an iteration directory; see :class:`~.tensors.TensorReader`.

    Args:
        iteration_directory: with ``.metadata``.

    Raises:
        ConversionError: it is no such checkpoint, its metadata is damaged, or a file is missing or too short.
    """

    def __init__(self, iteration_directory: Path) -> None:
        self._directory = Path(iteration_directory)
        path = self._directory / _METADATA
        if not path.is_file():
            raise ConversionError(f"{self._directory}: no torch_dist checkpoint, there is no {_METADATA}")
        try:
            with open(path, "rb") as file:
                metadata = _Unpickler(file).load()
            self._infos, self._chunks, self._objects = _understand(metadata)
        except ConversionError as error:
            raise ConversionError(f"{path}: {error}") from None
        except OSError:
            raise
        except Exception as error:  # whatever a damaged pickle makes of itself
            raise ConversionError(f"{path}: the file is damaged ({error!r}): copy it again") from error
        self._check_files()
        # Bounded, because each mapping holds a file descriptor and a large run leaves thousands of files.
        self._mapping = functools.lru_cache(maxsize=64)(MappedFile)

    @property
    def objects(self) -> Sequence[str]:
        """Names of the entries that are no tensors: ``_extra_state``, random states, parts of the optimizer."""
        return self._objects

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor's shape and dtype; reads no data."""
        return self._infos

    def chunks(self, name: str) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Offsets and sizes of the pieces in which a tensor was saved, in order of their offsets."""
        return [(chunk.offsets, chunk.sizes) for chunk in self._chunks_of(name)]

    def read(self, name: str, index: tuple[slice | int, ...] = ()) -> torch.Tensor:
        """A piece of a tensor, as ``tensor[index]``; only chunks that hold some of it are touched.

        Args:
            name: of the tensor.
            index: slices of step 1 and ints.

        Returns:
            A view of the file where one chunk holds the whole piece, else a new tensor.

        Raises:
            ConversionError: a file is damaged, or there is no such tensor.
        """
        chunks = self._chunks_of(name)
        info = self._infos[name]
        starts, sizes, taken = _box(index, info.shape)
        pieces = []
        for chunk in chunks:
            overlap = [
                (max(a, b), min(a + n, b + m))
                for a, n, b, m in zip(starts, sizes, chunk.offsets, chunk.sizes, strict=True)
            ]
            if all(first < behind for first, behind in overlap):
                pieces.append((chunk, overlap))
        if 0 in sizes:
            return torch.empty(sizes, dtype=info.dtype)[taken]
        volume = sum(volume_of(behind - first for first, behind in overlap) for _, overlap in pieces)
        if volume != volume_of(sizes):
            raise ConversionError(
                f"{self._directory}: {name}: its chunks do not make up the tensor of {info.shape}: not every rank's "
                "part was saved"
            )
        if len(pieces) == 1:
            chunk, overlap = pieces[0]
            return self._read_chunk(name, chunk, _within(overlap, chunk.offsets))[taken]
        result = torch.empty(sizes, dtype=info.dtype)
        for chunk, overlap in pieces:
            result[_within(overlap, starts)] = self._read_chunk(name, chunk, _within(overlap, chunk.offsets))
        return result[taken]

    def _chunks_of(self, name: str) -> list[_Stored]:
        if name not in self._chunks:
            raise ConversionError(f"{self._directory}: there is no tensor {name}")
        return self._chunks[name]

    def _read_chunk(self, name: str, chunk: _Stored, index: tuple[slice, ...]) -> torch.Tensor:
        path = self._directory / chunk.file
        dtype = self._infos[name].dtype
        try:
            with open(path, "rb") as file:
                window = _Window(file, chunk.start, chunk.length)
                place = _elements(window)
                if place is None:
                    window.seek(0)
                    tensor = torch.load(window, map_location="cpu", weights_only=True)
                    place = 0, tensor.dtype, tuple(tensor.shape), tensor.stride()
                else:
                    tensor = None
            offset, found, shape, stride = place
            if shape != chunk.sizes or found != dtype:
                raise ValueError(f"{shape}, {found} in place of {chunk.sizes}, {dtype}")
            if tensor is not None:
                return tensor[index]
            return self._mapping(path).read(chunk.start + offset, dtype, shape, stride, index)
        except OSError:
            raise
        except Exception as error:  # from zip, pickle or torch, for whatever bytes stand there
            raise ConversionError(
                f"{path}: {name}: the chunk at byte {chunk.start} is damaged ({error}): copy the file again"
            ) from error

    def _check_files(self) -> None:
        sizes: dict[str, int] = {}
        for name, chunks in self._chunks.items():
            for chunk in chunks:
                path = self._directory / chunk.file
                if chunk.file not in sizes:
                    if not path.is_file():
                        raise ConversionError(f"{path} is missing, with {name}: copy it again")
                    sizes[chunk.file] = path.stat().st_size
                if sizes[chunk.file] < chunk.start + chunk.length:
                    raise ConversionError(
                        f"{path}: truncated: {sizes[chunk.file]} bytes, {name} ends at {chunk.start + chunk.length}: "
                        "copy the file again"
                    )


def read_common(iteration_directory: Path, allow_pickle: bool = False) -> dict[str, Any]:
    """``common.pt``: arguments of the run, iteration, checkpoint version and the like.

    Args:
        iteration_directory: of a torch_dist checkpoint.
        allow_pickle: when that cannot be read without running code from the file, run it.

    Returns:
        The dict. ``args`` is an :class:`argparse.Namespace`; objects of other classes are inert
        :class:`~.safe_load.StandIn`.

    Raises:
        ConversionError: the file is missing or damaged, or needs ``allow_pickle``.
    """
    path = Path(iteration_directory) / COMMON
    common = load_without_code(path, allow_pickle=allow_pickle)
    if not isinstance(common, dict):
        raise ConversionError(f"{path}: holds a {type(common).__name__} and no dict")
    return common


class _Unpickler(pickle.Unpickler):
    """Unpickles names of :data:`_CLASSES` as stand-ins, and no others."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("torch", "Size"):
            return torch.Size
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("collections", "defaultdict"):
            return lambda *_: {}
        if name not in _CLASSES.get(module, ()):
            raise ConversionError(
                f"names {module}.{name}, which no checkpoint needs: the file is damaged, or made to "
                "harm: do not load it"
            )
        if module.startswith("pathlib"):
            return pathlib.PurePosixPath
        return _stand_in(f"{module}.{name}")


@functools.cache
def _stand_in(path: str) -> type[StandIn]:
    return stand_in(path)


def _understand(metadata: StandIn) -> tuple[dict[str, TensorInfo], dict[str, list[_Stored]], list[str]]:
    """Tensors, their chunks, and names of other entries of an unpickled ``.metadata``."""
    places = {}
    for key, stored in metadata.state["storage_data"].items():
        offset = key.state.get("offset")  # absent for what is no tensor
        places[key.state["fqn"], None if offset is None else tuple(offset)] = stored.state
    infos: dict[str, TensorInfo] = {}
    chunks: dict[str, list[_Stored]] = {}
    objects = []
    for name, entry in metadata.state["state_dict_metadata"].items():
        if entry.path.endswith(".BytesStorageMetadata"):
            objects.append(name)
            continue
        properties = entry.state["properties"].state
        dtype = properties["dtype"] if isinstance(properties, dict) else properties[0]
        infos[name] = TensorInfo(tuple(entry.state["size"]), dtype)
        chunks[name] = []
        for chunk in entry.state["chunks"]:
            offsets, sizes = tuple(chunk.state["offsets"]), tuple(chunk.state["sizes"])
            place = places[name, offsets]
            file = pathlib.PurePosixPath(place["relative_path"])
            if file.is_absolute() or ".." in file.parts:
                raise ConversionError(f"{name} lies outside the checkpoint, in {file}")
            if place.get("transform_descriptors"):
                raise ConversionError(
                    f"{name} was saved through {place['transform_descriptors']}, which cannot be read here: "
                    "save the checkpoint again without stream extensions"
                )
            chunks[name].append(_Stored(offsets, sizes, str(file), place["offset"], place["length"]))
        chunks[name].sort(key=lambda chunk: chunk.offsets)
    return infos, chunks, objects


class _Window(io.RawIOBase):
    """Some bytes of a file as a file."""

    def __init__(self, file: io.BufferedReader, start: int, length: int) -> None:
        self._file, self._start, self._length, self._position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._position)]
        self._file.seek(self._start + self._position)
        count = self._file.readinto(view)
        self._position += count
        return count


class _TensorUnpickler(pickle.Unpickler):
    """Unpickles the ``data.pkl`` of one plain tensor, as the arguments it is rebuilt from; refuses all else."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor_v3"):
            return lambda *arguments: arguments
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module == "torch" and name in _STORAGES:
            return _stand_in(name)
        if (module, name) == ("torch.storage", "UntypedStorage"):
            return _stand_in(name)
        raise _NotPlainError

    def persistent_load(self, pid: Any) -> Any:
        return pid


class _NotPlainError(Exception):
    pass


def _elements(window: _Window) -> tuple[int, torch.dtype, tuple[int, ...], tuple[int, ...]] | None:
    """Where the elements of a tensor lie in its ``torch.save`` file, and dtype, shape and stride.

    Not by torch.load: some versions read the elements even when asked for shapes alone.

    Returns:
        None where this is no plain tensor, or its elements do not lie there as they are.
    """
    with zipfile.ZipFile(window) as archive:
        root = archive.infolist()[0].filename.split("/")[0]
        try:
            with archive.open(f"{root}/data.pkl") as file:
                storage, start, size, stride, *others = _TensorUnpickler(file).load()
        except _NotPlainError:
            return None
        _, kind, key, _, _ = storage
        dtype = others[2] if kind.path == "UntypedStorage" else _STORAGES[kind.path]
        record = archive.getinfo(f"{root}/data/{key}")
        if record.compress_type != zipfile.ZIP_STORED:
            return None
        if f"{root}/byteorder" in archive.namelist() and archive.read(f"{root}/byteorder") != b"little":
            return None
    # The local header's name and extra field (padding to 64 bytes) are its own, not those of the directory.
    window.seek(record.header_offset + 26)
    lengths = window.read(4)
    name, extra = int.from_bytes(lengths[:2], "little"), int.from_bytes(lengths[2:], "little")
    offset = record.header_offset + 30 + name + extra + start * dtype.itemsize
    return offset, dtype, tuple(size), tuple(stride)


def _box(
    index: tuple[slice | int, ...], shape: tuple[int, ...]
) -> tuple[list[int], list[int], tuple[slice | int, ...]]:
    """Begin and size of what an index takes, and the index that then drops the dimensions of ints."""
    if len(index) > len(shape):
        raise IndexError(f"{index} for a tensor of {shape}")
    starts, sizes, taken = [], [], []
    for part, size in itertools.zip_longest(index, shape, fillvalue=slice(None)):
        if isinstance(part, slice):
            first, behind, step = part.indices(size)
            if step != 1:
                raise IndexError(f"{index}: a step of {step}")
            starts.append(first)
            sizes.append(max(0, behind - first))
            taken.append(slice(None))
        else:
            if not -size <= part < size:
                raise IndexError(f"{index} for a tensor of {shape}")
            starts.append(part % size)
            sizes.append(1)
            taken.append(0)
    return starts, sizes, tuple(taken)


def _within(overlap: Sequence[tuple[int, int]], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(first - at, behind - at) for (first, behind), at in zip(overlap, origin, strict=True))


def volume_of(sizes: Iterable[int]) -> int:
    volume = 1
    for size in sizes:
        volume *= size
    return volume

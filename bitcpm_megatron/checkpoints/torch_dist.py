# SPDX-License-Identifier: Apache-2.0
"""Reader of the ``.metadata`` of a ``torch_dist`` checkpoint, which describes its contents, without running code.

``.metadata`` is a pickle of what ``torch.distributed.checkpoint`` knows of each tensor, and of where its chunks are in
the ``*.distcp`` files. Here it becomes plain values that were checked; none of the classes that it names is run.
"""

import collections
import pathlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..files import FileError, is_inside
from .safe_load import StandIn, stand_in

METADATA = ".metadata"
COMMON = "common.pt"
COMMON_ENTRY = "common_state/shard_0_1"
"""The entry in which megatron-core 0.19 stores what it stored in :data:`COMMON` before."""

# The modules of the classes that a .metadata of torch 2.1 to 2.13 or of megatron-core names. None of these classes is
# run: all except sizes, dtypes and dicts become stand-ins.
_MODULES = ("torch.distributed.checkpoint.", "torch.distributed._shard.", "megatron.core.dist_checkpointing.")
# The functions that rebuild enum members, as Python 3.11 pickles them, sets and a memory layout.
_FUNCTIONS = ("builtins.getattr", "builtins.set", "torch.serialization._get_layout")
_PLAIN = {
    "torch.Size": torch.Size,
    "collections.OrderedDict": collections.OrderedDict,
    "collections.defaultdict": lambda *_: {},
}


class Place(NamedTuple):
    """The location of an entry: a file within the checkpoint, the first byte in it, and the number of bytes."""

    file: str
    start: int
    length: int


class StoredChunk(NamedTuple):
    """A piece of a tensor, ``sizes`` elements from ``offsets`` on in each dimension, and where it is stored."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: Place


class StoredTensor(NamedTuple):
    """A tensor's shape and dtype, and its chunks in the order of their offsets."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[StoredChunk, ...]


class Contents(NamedTuple):
    """The contents of a checkpoint, by name.

    ``objects`` are not tensors: ``_extra_state``, random states, parts of the optimizer. ``megatron`` is
    megatron-core's own ``mcore_data`` about tensors; it is inert, and not checked.
    """

    tensors: Mapping[str, StoredTensor]
    objects: Mapping[str, Place]
    megatron: Mapping[str, Any]


def read_contents(directory: Path) -> Contents:
    """Reads the ``.metadata`` of a checkpoint and checks that the files that it names exist and are long enough.

    Raises:
        FileError: if there is no ``.metadata``, it is damaged or malicious, or a file is missing or too short.
    """
    path = directory / METADATA
    if not path.is_file():
        raise FileError(f"{directory}: no torch_dist checkpoint, there is no {METADATA}")
    try:
        with open(path, "rb") as file:
            contents = _understand(_Unpickler(file).load())
    except FileError as error:
        raise FileError(f"{path}: {error}") from None
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise FileError(f"{path}: the file is damaged ({error!r}): copy it again") from error
    _check_files(directory, contents)
    return contents


class _Unpickler(pickle.Unpickler):
    """An unpickler that makes stand-ins of names of :data:`_MODULES` and :data:`_FUNCTIONS`, and refuses most others.

    The exceptions are harmless: dtypes, :data:`_PLAIN` and paths.
    """

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}"
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if path in _PLAIN:
            return _PLAIN[path]
        if module in ("pathlib", "pathlib._local") and name.endswith("Path"):
            return pathlib.PurePosixPath
        if not path.startswith(_MODULES) and path not in _FUNCTIONS:
            raise FileError(
                f"names {path}, which no checkpoint needs: the file is damaged, or made to harm: do not load it"
            )
        return stand_in(path)


def _understand(metadata: StandIn) -> Contents:
    places = {}
    for key, stored in metadata.state["storage_data"].items():
        offset = key.state.get("offset")  # absent for objects that are not tensors
        name = key.state["fqn"]
        places[name, None if offset is None else _whole(name, offset)] = _place(name, stored.state)
    tensors: dict[str, StoredTensor] = {}
    objects: dict[str, Place] = {}
    for name, entry in metadata.state["state_dict_metadata"].items():
        if entry.path.endswith(".BytesStorageMetadata"):
            objects[name] = places[name, None]
            continue
        properties = entry.state["properties"].state
        dtype = properties["dtype"] if isinstance(properties, dict) else properties[0]
        if not isinstance(dtype, torch.dtype):
            raise FileError(f"{name} has no dtype: the file is damaged, copy it again")
        shape = _whole(name, entry.state["size"])
        chunks = []
        for chunk in entry.state["chunks"]:
            offsets, sizes = _whole(name, chunk.state["offsets"]), _whole(name, chunk.state["sizes"])
            if not len(offsets) == len(sizes) == len(shape) or any(
                first + count > size for first, count, size in zip(offsets, sizes, shape, strict=True)
            ):
                raise FileError(f"{name}: a chunk of {sizes} at {offsets} does not fit a tensor of {shape}")
            chunks.append(StoredChunk(offsets, sizes, places[name, offsets]))
        chunks.sort(key=lambda chunk: chunk.offsets)
        tensors[name] = StoredTensor(shape, dtype, tuple(chunks))
    return Contents(tensors, objects, metadata.state.get("mcore_data") or {})


def _place(name: str, stored: Mapping[str, Any]) -> Place:
    file = str(pathlib.PurePosixPath(stored["relative_path"]))
    if not is_inside(file):
        raise FileError(f"{name} lies outside the checkpoint, in {file}")
    if stored.get("transform_descriptors"):
        raise FileError(
            f"{name} was saved through {stored['transform_descriptors']}, which cannot be read here: "
            "save the checkpoint again without stream extensions"
        )
    start, length = _whole(name, (stored["offset"], stored["length"]))
    return Place(file, start, length)


def _whole(name: str, numbers: Any) -> tuple[int, ...]:
    numbers = tuple(numbers)
    if any(type(number) is not int or not 0 <= number < 2**63 for number in numbers):
        raise FileError(f"{name}: {numbers} are no sizes or offsets: the file is damaged, copy it again")
    return numbers


def _check_files(directory: Path, contents: Contents) -> None:
    sizes: dict[str, int] = {}
    entries = [(name, chunk.place) for name, tensor in contents.tensors.items() for chunk in tensor.chunks]
    for name, place in [*entries, *contents.objects.items()]:
        path = directory / place.file
        if place.file not in sizes:
            if not path.is_file():
                raise FileError(f"{path} is missing, with {name}: copy it again")
            sizes[place.file] = path.stat().st_size
        if sizes[place.file] < place.start + place.length:
            raise FileError(
                f"{path}: truncated: {sizes[place.file]} bytes, {name} ends at {place.start + place.length}: "
                "copy the file again"
            )

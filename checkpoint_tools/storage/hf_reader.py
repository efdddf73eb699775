# SPDX-License-Identifier: Apache-2.0
"""Reader of Hugging Face weights: ``model.safetensors`` or ``pytorch_model.bin``, whole or in shards, or one file."""

import functools
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ...checkpoints.safe_load import load_without_code
from ...files import is_inside, parse_json, read_json
from .mapped_file import MappedFile
from .reader import ConversionError, TensorInfo, listed
from .safetensors_writer import DTYPES, SAFETENSORS

_BIN = "pytorch_model.bin"
# The order in which Transformers looks for weights: a single file takes precedence over an index.
_NAMES = (SAFETENSORS, f"{SAFETENSORS}.index.json", _BIN, f"{_BIN}.index.json")


@dataclass(frozen=True)
class _Stored:
    """Description of a tensor in a file, with the function that reads ``tensor[index]``."""

    info: TensorInfo
    read: Callable[[tuple[slice | int, ...]], torch.Tensor]


class HfReader:
    """Reader of the tensors of a model directory or weight file; a :class:`~.reader.TensorReader`.

    In a directory it reads the file that Transformers would read: ``model.safetensors``, otherwise the shards of its
    index, otherwise ``pytorch_model.bin``, otherwise the shards of its index. Shards and index must name the same
    tensors.

    Args:
        path: a model directory, or one ``.safetensors`` or ``.bin`` file.
        allow_pickle: whether to unpickle a ``.bin`` that PyTorch's safe loader refuses, which can run any code.

    Raises:
        ConversionError: if a file is missing or damaged, or index and shards disagree.
    """

    def __init__(self, path: Path, allow_pickle: bool = False) -> None:
        self._path = path = Path(path)
        if not path.exists():
            raise ConversionError(f"{path}: there is no such directory or file")
        file = path if path.is_file() else next((path / name for name in _NAMES if (path / name).is_file()), None)
        if file is None:
            raise ConversionError(f"{path}: no weights: none of {', '.join(_NAMES)} is there")
        self._stored = _shards(file, allow_pickle) if file.suffix == ".json" else _open(file, allow_pickle)
        self._infos = {name: stored.info for name, stored in self._stored.items()}

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Returns the shape and dtype of every tensor; reads no data."""
        return self._infos

    def read(self, name: str, index: tuple[slice | int, ...] = ()) -> torch.Tensor:
        """Returns ``tensor[index]``, a piece of a tensor, as a view of its file.

        Raises:
            ConversionError: if there is no such tensor, or the file became shorter.
        """
        if name not in self._stored:
            raise ConversionError(f"{self._path}: there is no tensor {name}")
        return self._stored[name].read(index)


def _open(path: Path, allow_pickle: bool) -> dict[str, _Stored]:
    return _safetensors(path) if path.suffix == ".safetensors" else _bin(path, allow_pickle)


def _safetensors(path: Path) -> dict[str, _Stored]:
    """Returns the tensors of one safetensors file.

    The safetensors library checks the header. The data are mapped here, because Linux refuses the library's own mapping
    for PyTorch if the file is larger than memory.
    """
    try:
        with safe_open(path, framework="numpy") as file, open(path, "rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            # The header is parsed again for the offsets, which the library does not return. This also refuses a name
            # that occurs twice, of which the library silently takes the last entry.
            header = parse_json(raw.read(length).decode(), f"{path}: its header")
            header.pop("__metadata__", None)
            pieces = {name: file.get_slice(name) for name in header}
    except SafetensorError as error:
        raise ConversionError(
            f"{path}: truncated, longer than its header says, or its header is damaged "
            f"({str(error).removeprefix('Error while deserializing header: ')}): copy the file again"
        ) from None
    mapping = functools.cache(lambda: MappedFile(path))

    def read(name: str, info: TensorInfo, offset: int, index: tuple[slice | int, ...]) -> torch.Tensor:
        try:
            return mapping().read(offset, info.dtype, info.shape, index=index)
        except ValueError as error:
            raise ConversionError(f"{path}: {name}: the file became shorter ({error})") from error

    found = {}
    for name, piece in pieces.items():
        dtype = piece.get_dtype()
        if dtype not in DTYPES:
            raise ConversionError(f"{path}: {name} has dtype {dtype!r}, which cannot be read")
        info = TensorInfo(tuple(piece.get_shape()), DTYPES[dtype])
        found[name] = _Stored(info, functools.partial(read, name, info, 8 + length + header[name]["data_offsets"][0]))
    return found


def _bin(path: Path, allow_pickle: bool) -> dict[str, _Stored]:
    """Returns the tensors of one ``torch.save`` file, which must contain a dict of names and tensors."""
    loaded = load_without_code(path, mmap=True, allow_pickle=allow_pickle, stand_ins=False)
    found, others = {}, []
    for name, tensor in loaded.items() if isinstance(loaded, dict) else ():
        if isinstance(name, str) and isinstance(tensor, torch.Tensor):
            tensor = tensor.detach()
            found[name] = _Stored(TensorInfo(tuple(tensor.shape), tensor.dtype), tensor.__getitem__)
        else:
            others.append(name)
    if not isinstance(loaded, dict) or others:
        raise ConversionError(
            f"{path}: not a dict of names and tensors ({listed(others) or type(loaded).__name__}): "
            "a training checkpoint? Give the model's state_dict alone"
        )
    return found


def _shards(index: Path, allow_pickle: bool) -> dict[str, _Stored]:
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
        raise ConversionError(
            f"{index.parent}: missing {listed(missing)} (with {min(named[missing[0]])}): copy these files again"
        )
    found: dict[str, _Stored] = {}
    holders: dict[str, str] = {}
    for file, names in sorted(named.items()):
        path = index.parent / file
        held = _open(path, allow_pickle)
        if twice := sorted(held.keys() & holders.keys()):
            raise ConversionError(
                f"{path}: holds {listed(twice)}, as {holders[twice[0]]} does: delete both and copy the model again"
            )
        if absent := sorted(names - held.keys()):
            raise ConversionError(
                f"{path}: does not hold {listed(absent)}, which {index.name} says it does: index and shards are not "
                "of one model, copy both again"
            )
        if ghosts := sorted(held.keys() - names):
            raise ConversionError(
                f"{path}: holds {listed(ghosts)}, which {index.name} does not name: a stale index: copy both again"
            )
        found.update(held)
        holders.update(dict.fromkeys(held, path.name))
    return found

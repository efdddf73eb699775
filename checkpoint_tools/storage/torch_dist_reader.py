# SPDX-License-Identifier: Apache-2.0
"""Reader of megatron-core's ``torch_dist`` checkpoints that needs neither megatron-core nor process groups.

An iteration directory contains ``.metadata``, a pickle of what ``torch.distributed.checkpoint`` knows about each tensor
and the positions of its chunks; ``*.distcp``, files of consecutive chunks, each a small ``torch.save`` file; and
Megatron's own ``metadata.json`` and ``common.pt``. A tensor's chunks are the pieces that the ranks of the run held: for
a stack of layers (L, out, in), of L layers with ``out`` output and ``in`` input features, at tensor parallelism 2
usually (1, out / 2, in).
"""

import collections
import functools
import io
import math
import os
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...checkpoints.safe_load import load_without_code, refuse_compressed, stand_in
from ...checkpoints.torch_dist import COMMON, COMMON_ENTRY, METADATA, StoredChunk, read_contents
from .mapped_file import MappedFile
from .reader import ConversionError, TensorInfo

CONFIG = "metadata.json"

# The names of typed storages in files; other dtypes are stored with an UntypedStorage.
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


class TorchDistReader:
    """Reader of the tensors of an iteration directory; a :class:`~.reader.TensorReader`.

    Attributes:
        objects: the names of the entries that are not tensors: ``_extra_state``, random states, parts of the optimizer.

    Raises:
        FileError: if the directory is no such checkpoint, its metadata is damaged, or a file is missing or too short.
    """

    def __init__(self, iteration_directory: Path) -> None:
        self._directory = Path(iteration_directory)
        contents = read_contents(self._directory)
        self._stored = contents.tensors
        self.objects = list(contents.objects)
        self._infos = {name: TensorInfo(tensor.shape, tensor.dtype) for name, tensor in contents.tensors.items()}
        # Bounded, because each mapping holds a file descriptor and a large run writes thousands of files.
        self._mapping = functools.lru_cache(maxsize=64)(MappedFile)

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Returns the shape and dtype of every tensor; reads no data."""
        return self._infos

    def chunks(self, name: str) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Returns the offsets and sizes of the chunks in which a tensor was saved, sorted by offset."""
        return [(chunk.offsets, chunk.sizes) for chunk in self._stored[name].chunks]

    def read(self, name: str, index: tuple[slice | int, ...] = ()) -> torch.Tensor:
        """Returns ``tensor[index]``, a piece of a tensor; reads only the chunks that contain some of it.

        Returns:
            A view of the file if one chunk contains the whole piece, otherwise a new tensor.

        Raises:
            ConversionError: if a file is damaged, or there is no such tensor.
        """
        if name not in self._stored:
            raise ConversionError(f"{self._directory}: there is no tensor {name}")
        info = self._infos[name]
        wanted, taken = _box(index, info.shape)
        sizes = [len(span) for span in wanted]
        if 0 in sizes:
            return torch.empty(sizes, dtype=info.dtype)[taken]
        pieces = []
        for chunk in self._stored[name].chunks:
            spans = zip(wanted, chunk.offsets, chunk.sizes, strict=True)
            overlap = [range(max(w.start, at), min(w.stop, at + size)) for w, at, size in spans]
            if all(overlap):
                pieces.append((chunk, overlap))
        if not _make_up(sizes, [overlap for _, overlap in pieces]):
            raise ConversionError(
                f"{self._directory}: {name}: its chunks do not make up the tensor of {info.shape}: not every rank's "
                "part was saved"
            )
        read = [self._read_chunk(name, chunk, _within(overlap, chunk.offsets)) for chunk, overlap in pieces]
        if len(read) == 1:
            return read[0][taken]
        result = torch.empty(sizes, dtype=info.dtype)
        starts = [span.start for span in wanted]
        for (_, overlap), piece in zip(pieces, read, strict=True):
            result[_within(overlap, starts)] = piece
        return result[taken]

    def _read_chunk(self, name: str, chunk: StoredChunk, index: tuple[slice, ...]) -> torch.Tensor:
        path = self._directory / chunk.place.file
        dtype = self._infos[name].dtype
        try:
            with open(path, "rb") as file:
                window: Any = _Window(file, chunk.place.start, chunk.place.length)
                place = _elements(window)
                if place is None:
                    window.seek(0)
                    whole = torch.load(window, map_location="cpu", weights_only=True)
                    shape, found = tuple(whole.shape), whole.dtype
                else:
                    offset, found, shape, stride = place
            if shape != chunk.sizes or found != dtype:
                raise ValueError(f"{shape}, {found} in place of {chunk.sizes}, {dtype}")
            if place is None:
                return whole[index]
            return self._mapping(path).read(chunk.place.start + offset, dtype, shape, stride, index)
        except OSError:
            raise
        except Exception as error:  # damaged bytes make zipfile, pickle and torch raise many kinds of errors
            raise ConversionError(
                f"{path}: {name}: the chunk at byte {chunk.place.start} is damaged ({error}): copy the file again"
            ) from error


def read_common(iteration_directory: Path, allow_pickle: bool = False) -> dict[str, Any]:
    """Reads the arguments of the run, the iteration, the checkpoint version and other common values of a checkpoint.

    They are stored in ``common.pt``, or since megatron-core 0.19 as an entry of the checkpoint. ``args`` is an
    :class:`argparse.Namespace`; objects of other classes are inert
    :class:`~bitcpm_megatron.checkpoints.safe_load.StandIn`. Values that cannot be read without running code from the
    file need ``allow_pickle``.

    Raises:
        FileError: if the file is missing or damaged, or needs ``allow_pickle``.
    """
    path, place = Path(iteration_directory) / COMMON, None
    if not path.is_file() and path.with_name(METADATA).is_file():
        place = read_contents(Path(iteration_directory)).objects.get(COMMON_ENTRY)
    if place is None:
        common = load_without_code(path, allow_pickle=allow_pickle)
    else:
        path = path.with_name(place.file)
        common = load_without_code(path, allow_pickle=allow_pickle, entry=(place.start, place.length))
        # A ShardedObject is saved as a list of one value.
        common = common[0] if isinstance(common, list) and len(common) == 1 else common
    if not isinstance(common, dict):
        raise ConversionError(f"{path}: holds a {type(common).__name__} and no dict")
    return common


class _Window(io.RawIOBase):
    """File-like view of a range of bytes of another file."""

    def __init__(self, file: io.BufferedReader, start: int, length: int) -> None:
        self._file, self._start, self._length, self._position = file, start, length, 0

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
    """Unpickler of the ``data.pkl`` of one plain tensor: returns the tensor's rebuild arguments, refuses all else."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor_v3"):
            return lambda *arguments: arguments
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module == "torch" and name in _STORAGES) or (module, name) == ("torch.storage", "UntypedStorage"):
            return stand_in(name)
        raise _NotPlainError

    def persistent_load(self, pid: Any) -> Any:
        return pid


class _NotPlainError(Exception):
    pass


def _elements(window: _Window) -> tuple[int, torch.dtype, tuple[int, ...], tuple[int, ...]] | None:
    """Finds the elements of a tensor in its ``torch.save`` file.

    ``torch.load`` is not used, because some versions read the elements even if only shapes are requested.

    Returns:
        The offset of the elements in bytes, the dtype, the shape and the stride; None if the file does not contain a
        plain tensor, or its elements are not stored in little-endian order.
    """
    with zipfile.ZipFile(window) as archive:
        refuse_compressed(archive)
        root = archive.infolist()[0].filename.split("/")[0]
        try:
            with archive.open(f"{root}/data.pkl") as file:
                storage, start, size, stride, *others = _TensorUnpickler(file).load()
        except _NotPlainError:
            return None
        _, kind, key, _, _ = storage
        dtype = others[2] if kind.path == "UntypedStorage" else _STORAGES[kind.path]
        record = archive.getinfo(f"{root}/data/{key}")
        if f"{root}/byteorder" in archive.namelist() and archive.read(f"{root}/byteorder") != b"little":
            return None
    # The lengths are read from the local header: its extra field (padding to 64 bytes) differs from the directory's.
    window.seek(record.header_offset + 26)
    lengths = window.read(4)
    name, extra = int.from_bytes(lengths[:2], "little"), int.from_bytes(lengths[2:], "little")
    offset = record.header_offset + 30 + name + extra + start * dtype.itemsize
    return offset, dtype, tuple(size), tuple(stride)


def _box(index: tuple[slice | int, ...], shape: tuple[int, ...]) -> tuple[list[range], tuple[slice | int, ...]]:
    """Returns the range that an index selects in each dimension, and an index that then removes the dimensions of ints.

    Raises:
        IndexError: if the index exceeds the tensor, or a slice has a step.
    """
    if len(index) > len(shape):
        raise IndexError(f"{index} for a tensor of {shape}")
    spans: list[range] = []
    for part, size in zip((*index, *[slice(None)] * (len(shape) - len(index))), shape, strict=True):
        span = range(size)[part]
        spans.append(range(span, span + 1) if isinstance(span, int) else span)
        if spans[-1].step != 1:
            raise IndexError(f"{index}: a step of {spans[-1].step}")
    return spans, tuple(slice(None) if isinstance(part, slice) else 0 for part in index)


def _make_up(sizes: Sequence[int], boxes: Sequence[Sequence[range]]) -> bool:
    """Returns whether boxes, sorted by their starts, cover a piece of a tensor completely and without overlaps."""
    if sum(math.prod(map(len, box)) for box in boxes) != math.prod(sizes):
        return False
    for number, box in enumerate(boxes):
        for other in boxes[number + 1 :]:
            if box and other[0].start >= box[0].stop:
                break
            if all(max(a.start, b.start) < min(a.stop, b.stop) for a, b in zip(box, other, strict=True)):
                return False
    return True


def _within(box: Sequence[range], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(span.start - at, span.stop - at) for span, at in zip(box, origin, strict=True))

# SPDX-License-Identifier: Apache-2.0
"""Writer of megatron-core's ``torch_dist`` format, which holds one chunk in memory at a time.

It is a module apart from the reader, because importing PyTorch's checkpoint package takes most of a second.
"""

import collections
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from ...checkpoints.torch_dist import COMMON
from ...files import Digester
from .reader import ConversionError, TensorInfo, files_of
from .torch_dist_reader import CONFIG
from .torch_file import save_file, with_own_storage

# The content of megatron.core.dist_checkpointing.core.CheckpointingConfig for this format, the same in 0.12.1 and
# 0.16.1.
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class Chunk:
    """A piece of a tensor that is going to be written.

    Attributes:
        key: the name of the tensor.
        shape: the shape of the whole tensor.
        offsets: the position of the piece's first element in the tensor, for every dimension.
        sizes: the shape of the piece.
        dtype: the dtype of the tensor.
        produce: a function that returns the piece, of shape ``sizes``; called once, when the piece is written. The
            result may be overwritten when the next chunk is produced.
    """

    key: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    produce: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return TensorInfo(self.sizes, self.dtype).nbytes

    @property
    def item(self) -> WriteItem:
        """Description of the chunk for PyTorch's planner."""
        place = ChunkStorageMetadata(torch.Size(self.offsets), torch.Size(self.sizes))
        data = TensorWriteData(place, TensorProperties(dtype=self.dtype), torch.Size(self.shape))
        return WriteItem(MetadataIndex(self.key, self.offsets), WriteItemType.SHARD, tensor_data=data)

    def checked(self) -> torch.Tensor:
        """Produces the piece and returns it with a storage of its own.

        Raises:
            ConversionError: if its shape or dtype is not as planned.
        """
        tensor = self.produce()
        if tuple(tensor.shape) != self.sizes or tensor.dtype != self.dtype:
            raise ConversionError(
                f"{self.key}: {tuple(tensor.shape)}, {tensor.dtype} for a chunk of {self.sizes}, {self.dtype}"
            )
        return with_own_storage(tensor)


@dataclass(frozen=True)
class TorchDistWriter:
    """Writer of an iteration directory that holds one chunk in memory at a time.

    PyTorch's planner and FileSystemWriter create the ``.metadata``. FileSystemWriter would keep a chunk of every tensor
    of a file in memory until the file is complete (torch 2.13), so this class has its own writing loop.

    Attributes:
        directory: an existing, empty directory.
        common: the content of ``common.pt``: plain values, and :class:`argparse.Namespace` of plain values.
        max_file_size: the size of a ``.distcp`` file in bytes, after which the next one is begun.
        on_bytes: a function that is called with the size of each chunk after it was written, or None.
    """

    directory: Path
    common: Mapping[str, Any]
    max_file_size: int = 5 * 10**9
    on_bytes: Callable[[int], Any] | None = None

    def write(self, chunks: Iterable[Chunk], objects: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
        """Writes the checkpoint.

        Args:
            chunks: the chunks of all tensors, without gaps or overlaps; they are written in this order.
            objects: small values by megatron-core's ``ShardedObject.unique_key``, such as the ``_extra_state`` of
                modules, which megatron-core asks for when it loads.

        Returns:
            The entries of ``DIGESTS.json`` for the ``.distcp`` files, which were digested while they were written.

        Raises:
            ConversionError: if chunks are missing, overlap or contradict each other, or a produced piece is not as
                planned.
        """
        pieces = _checked(chunks)
        # megatron-core saves an object as a list with this one element.
        contents: list[Chunk | list[Any]] = [*pieces, *([value] for value in (objects or {}).values())]
        items = [chunk.item for chunk in pieces]
        items += [WriteItem(index=MetadataIndex(key), type=WriteItemType.BYTE_IO) for key in objects or {}]
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            (plan,), metadata = planner.create_global_plan([SavePlan(items)])
        except ValueError as error:
            raise ConversionError(f"the plan of the checkpoint is wrong: {error}") from None
        results: list[WriteResult] = []
        digesters = {}
        sizes = [chunk.nbytes for chunk in pieces] + [0] * (len(items) - len(pieces))
        for number, part in enumerate(files_of(sizes, self.max_file_size)):
            name = f"__0_{number}.distcp"
            digester = digesters[name] = Digester()
            with open(self.directory / name, "wb") as stream:
                for item, content in zip(plan.items[part], contents[part], strict=True):
                    results.append(self._write(stream, digester, name, item, content))
                stream.flush()
                os.fsync(stream.fileno())
        _Storage(self.directory, sync_files=True).finish(metadata, [results])
        save_file(dict(self.common), self.directory / COMMON)
        (self.directory / CONFIG).write_text(json.dumps(_FORMAT), encoding="utf-8")
        return {name: digester.entry() for name, digester in digesters.items()}

    def _write(
        self, stream: BinaryIO, digester: Digester, name: str, item: WriteItem, content: Chunk | list[Any]
    ) -> WriteResult:
        # Records are aligned within each torch.save file. The padding aligns them within the .distcp file, too, so that
        # a reader that maps the file need not copy them.
        digester.write(stream, bytes(-digester.size % 64))
        start = digester.size
        save_file(content.checked() if isinstance(content, Chunk) else content, stream, digester)
        length = digester.size - start
        if self.on_bytes is not None and isinstance(content, Chunk):
            self.on_bytes(content.nbytes)
        return WriteResult(item.index, length, _StorageInfo(name, start, length))


class _Storage(FileSystemWriter):
    def storage_meta(self) -> None:
        """Returns None: the original's random number and path, which no reader needs, would make equal files differ."""


def _checked(chunks: Iterable[Chunk]) -> list[Chunk]:
    """Returns the chunks as a list, after checking that they describe their tensors alike and fill them.

    PyTorch's planner finds overlaps, and chunks beyond the bounds of their tensor.

    Raises:
        ConversionError: if chunks of a tensor contradict each other or do not fill it.
    """
    chunks = list(chunks)
    described: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    volumes: collections.Counter[str] = collections.Counter()
    for chunk in chunks:
        if described.setdefault(chunk.key, (chunk.shape, chunk.dtype)) != (chunk.shape, chunk.dtype):
            raise ConversionError(f"{chunk.key}: its chunks disagree about shape or dtype")
        if not len(chunk.shape) == len(chunk.offsets) == len(chunk.sizes):
            raise ConversionError(f"{chunk.key}: a chunk's offsets and sizes do not fit a tensor of {chunk.shape}")
        volumes[chunk.key] += math.prod(chunk.sizes)
    # PyTorch does not detect gaps if there is only one process.
    for key, (shape, _) in described.items():
        if volumes[key] != math.prod(shape):
            raise ConversionError(
                f"{key}: its chunks have {volumes[key]} elements in all, a tensor of {shape} has {math.prod(shape)}"
            )
    return chunks

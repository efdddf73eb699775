# SPDX-License-Identifier: Apache-2.0
"""Writes megatron-core's ``torch_dist`` format, a piece at a time. Apart from its reader, for PyTorch's checkpoint
package takes most of a second to import."""

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

# What megatron.core.dist_checkpointing.core.CheckpointingConfig holds for this format, in 0.12.1 as in 0.16.1.
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class Chunk:
    """A piece of a tensor that is to be written.

    Attributes:
        key: name of the tensor.
        shape: of the whole tensor.
        offsets: where the piece begins.
        sizes: shape of the piece.
        dtype: of the tensor.
        produce: returns the piece, of shape ``sizes``; called once, when it is written. It need last no longer than
            until the next one is produced.
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
        """What PyTorch's planner wants to know of it."""
        place = ChunkStorageMetadata(torch.Size(self.offsets), torch.Size(self.sizes))
        data = TensorWriteData(place, TensorProperties(dtype=self.dtype), torch.Size(self.shape))
        return WriteItem(MetadataIndex(self.key, self.offsets), WriteItemType.SHARD, tensor_data=data)

    def checked(self) -> torch.Tensor:
        """The piece itself, with a storage of its own.

        Raises:
            ConversionError: it is not as planned.
        """
        tensor = self.produce()
        if tuple(tensor.shape) != self.sizes or tensor.dtype != self.dtype:
            raise ConversionError(
                f"{self.key}: {tuple(tensor.shape)}, {tensor.dtype} for a chunk of {self.sizes}, {self.dtype}"
            )
        return with_own_storage(tensor)


@dataclass(frozen=True)
class TorchDistWriter:
    """Writes an iteration directory; one chunk is in memory at a time.

    PyTorch's planner and its FileSystemWriter make the ``.metadata``. That writer would keep a chunk of every tensor of
    a file until the file is complete (torch 2.13), so the writing loop is ours.

    Attributes:
        directory: an existing, empty directory.
        common: what goes into ``common.pt``: plain values, and :class:`argparse.Namespace` of plain values.
        max_file_size: bytes after which the next ``.distcp`` is begun.
        on_bytes: called with the size of each chunk that was written.
    """

    directory: Path
    common: Mapping[str, Any]
    max_file_size: int = 5 * 10**9
    on_bytes: Callable[[int], Any] | None = None

    def write(self, chunks: Iterable[Chunk], objects: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
        """Writes the checkpoint.

        Args:
            chunks: that make up every tensor, without overlap; written in this order.
            objects: small values by megatron-core's ``ShardedObject.unique_key``, such as the ``_extra_state`` of
                modules, which loading asks for.

        Returns:
            Entries of ``DIGESTS.json`` of the ``.distcp`` files, which were digested as they were written.

        Raises:
            ConversionError: chunks lack, overlap or contradict each other, or a producer returned something else than
                was planned.
        """
        pieces = _checked(chunks)
        # megatron-core saves an object as the list of it.
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
        # Records are aligned inside each torch.save file; with this they are so in the whole, and whoever maps the file
        # need not copy.
        digester.write(stream, bytes(-digester.size % 64))
        start = digester.size
        save_file(content.checked() if isinstance(content, Chunk) else content, stream, digester)
        length = digester.size - start
        if self.on_bytes is not None and isinstance(content, Chunk):
            self.on_bytes(content.nbytes)
        return WriteResult(item.index, length, _StorageInfo(name, start, length))


class _Storage(FileSystemWriter):
    def storage_meta(self) -> None:
        """Nothing, and no reader asks for it: a random number and a path, so that no two files would be equal."""


def _checked(chunks: Iterable[Chunk]) -> list[Chunk]:
    """The chunks, which must describe their tensors alike and fill them; overlaps PyTorch finds, and what stands out.

    Raises:
        ConversionError: they do not.
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
    # PyTorch overlooks gaps when there is one process.
    for key, (shape, _) in described.items():
        if volumes[key] != math.prod(shape):
            raise ConversionError(
                f"{key}: its chunks have {volumes[key]} elements in all, a tensor of {shape} has {math.prod(shape)}"
            )
    return chunks

# SPDX-License-Identifier: Apache-2.0
"""Writes megatron-core's ``torch_dist`` format, a piece at a time. Apart from its reader, for PyTorch's checkpoint
package takes most of a second to import."""

import collections
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint import save as save_checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from ...checkpoints.torch_dist import COMMON
from .mapped_file import with_own_storage
from .reader import ConversionError, TensorInfo
from .torch_dist_reader import CONFIG, volume_of
from .torch_file import save_file

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
        produce: returns the piece, of shape ``sizes``; called once, when it is written.
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


class TorchDistWriter:
    """Writes an iteration directory; one chunk is in memory at a time.

    ``torch.distributed.checkpoint.save`` does it, with a planner that knows shapes only. Its own FileSystemWriter would
    keep a chunk of every tensor of a file until the file is complete (torch 2.13), so the writing loop is ours.

    Args:
        directory: an existing, empty directory.
        common: what goes into ``common.pt``: plain values, and :class:`argparse.Namespace` of plain values.
        max_file_size: bytes after which the next ``.distcp`` is begun.
        on_bytes: called with the size of each chunk that was written.
    """

    def __init__(
        self,
        directory: Path,
        common: Mapping[str, Any],
        max_file_size: int = 5 * 10**9,
        on_bytes: Callable[[int], None] | None = None,
    ) -> None:
        self._directory = Path(directory)
        self._common = dict(common)
        self._max_file_size = max_file_size
        self._on_bytes = on_bytes

    def write(self, chunks: Iterable[Chunk], objects: Mapping[str, Any] | None = None) -> None:
        """Writes the checkpoint.

        Args:
            chunks: that make up every tensor, without overlap; written in this order.
            objects: small values by megatron-core's ``ShardedObject.unique_key``, such as the ``_extra_state`` of
                modules, which loading asks for.

        Raises:
            ConversionError: chunks lack, overlap or contradict each other, or a producer returned something else than
                was planned.
        """
        storage = _Storage(self._directory, self._max_file_size, self._on_bytes)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                save_checkpoint({}, storage_writer=storage, planner=_Planner(list(chunks), objects or {}), no_dist=True)
        except CheckpointException as error:
            # A BaseException, that hides what happened: also ConversionError, full disks and Ctrl-C.
            cause = next(iter(error.failures.values()))[0]
            if isinstance(cause, ValueError) and not isinstance(cause, ConversionError):
                cause = ConversionError(f"the plan of the checkpoint is wrong: {cause}")
            raise cause from None
        save_file(self._common, self._directory / COMMON)
        (self._directory / CONFIG).write_text(json.dumps(_FORMAT), encoding="utf-8")


class _Planner(DefaultSavePlanner):
    """Plans from shapes; asks for the data when it is written."""

    def __init__(self, chunks: list[Chunk], objects: Mapping[str, Any]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._objects = objects
        self._by_place = {(chunk.key, chunk.offsets): chunk for chunk in chunks}
        described: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        volumes: collections.Counter[str] = collections.Counter()
        for chunk in self._by_place.values():
            if described.setdefault(chunk.key, (chunk.shape, chunk.dtype)) != (chunk.shape, chunk.dtype):
                raise ConversionError(f"{chunk.key}: its chunks disagree about shape or dtype")
            if not len(chunk.shape) == len(chunk.offsets) == len(chunk.sizes):
                raise ConversionError(f"{chunk.key}: a chunk's offsets and sizes do not fit a tensor of {chunk.shape}")
            volumes[chunk.key] += volume_of(chunk.sizes)
        if len(self._by_place) != len(chunks):
            place = collections.Counter((chunk.key, chunk.offsets) for chunk in chunks).most_common(1)[0][0]
            raise ConversionError(f"{place[0]}: two chunks begin at {place[1]}")
        # PyTorch looks for overlaps and for chunks that stand out; gaps it overlooks when there is one process.
        for key, (shape, _) in described.items():
            if volumes[key] != volume_of(shape):
                raise ConversionError(
                    f"{key}: its chunks have {volumes[key]} elements in all, a tensor of {shape} has {volume_of(shape)}"
                )

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(
            [
                WriteItem(
                    index=MetadataIndex(chunk.key, chunk.offsets),
                    type=WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        chunk=ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)),
                        properties=TensorProperties(dtype=chunk.dtype),
                        size=torch.Size(chunk.shape),
                    ),
                )
                for chunk in self._by_place.values()
            ]
            + [WriteItem(index=MetadataIndex(key), type=WriteItemType.BYTE_IO) for key in self._objects]
        )
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        """A tensor, or the list of one value as which megatron-core saves an object."""
        if write_item.type == WriteItemType.BYTE_IO:
            return [self._objects[write_item.index.fqn]]
        chunk = self._by_place[write_item.index.fqn, tuple(write_item.index.offset or ())]
        tensor = chunk.produce()
        if tuple(tensor.shape) != chunk.sizes or tensor.dtype != chunk.dtype:
            raise ConversionError(
                f"{chunk.key}: {tuple(tensor.shape)}, {tensor.dtype} for a chunk of {chunk.sizes}, {chunk.dtype}"
            )
        return with_own_storage(tensor)


class _Storage(FileSystemWriter):
    """Writes chunk after chunk; everything else is PyTorch's."""

    def __init__(self, directory: Path, max_file_size: int, on_bytes: Callable[[int], None] | None) -> None:
        super().__init__(directory, single_file_per_rank=True, sync_files=True, thread_count=1)
        self._directory = directory
        self._max_file_size = max_file_size
        self._on_bytes = on_bytes

    def storage_meta(self) -> None:
        """Nothing, and no reader asks for it: a random number and a path, so that no two files would be equal."""
        return None

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = []
        for number, items in enumerate(_by_size(plan.items, self._max_file_size)):
            name = f"__0_{number}.distcp"
            with open(self._directory / name, "wb") as stream:
                for item in items:
                    # Records are aligned inside each torch.save file; with this they are so in the whole, and
                    # whoever maps the file need not copy.
                    stream.write(bytes(-stream.tell() % 64))
                    start = stream.tell()
                    save_file(planner.resolve_data(item), stream)
                    length = stream.tell() - start
                    results.append(WriteResult(item.index, length, _StorageInfo(name, start, length)))
                    if self._on_bytes is not None:
                        self._on_bytes(_item_bytes(item))
                stream.flush()
                os.fsync(stream.fileno())
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future


def _item_bytes(item: WriteItem) -> int:
    if item.tensor_data is None:
        return 0
    return TensorInfo(tuple(item.tensor_data.chunk.sizes), item.tensor_data.properties.dtype).nbytes


def _by_size(items: Sequence[WriteItem], limit: int) -> Iterator[list[WriteItem]]:
    """The items in order, as lists of up to ``limit`` bytes."""
    group: list[WriteItem] = []
    size = 0
    for item in items:
        if group and size + _item_bytes(item) > limit:
            yield group
            group, size = [], 0
        group.append(item)
        size += _item_bytes(item)
    if group:
        yield group

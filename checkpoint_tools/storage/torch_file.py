# SPDX-License-Identifier: Apache-2.0
"""``torch.save`` that reports disk errors, digests what it writes, and need not have all tensors in memory."""

import collections
import functools
import mmap
import os
import tempfile
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from ...files import Digester
from .reader import TensorInfo, checked_blocks

_MAX_IN_MEMORY = 2**28
Names = tuple[str, ...]
"""Path of a tensor in the saved value: the keys of the nested dicts that contain it, from the outermost to its own."""


def save_file(value: Any, file: Path | BinaryIO, digester: Digester | None = None) -> Digester:
    """Saves a value to a new file, or to an open one at its position.

    Args:
        value: the value.
        file: the path of the new file, or the open file.
        digester: the digester of an open file, which has digested it up to its position; None for a new one.

    Returns:
        The digester, which has digested everything that was written.

    Raises:
        OSError: if the value cannot be written, for example because the disk is full.
    """
    if isinstance(file, Path):
        with open(file, "xb") as opened:
            return save_file(value, opened)
    digester = digester or Digester()
    _save(value, file, digester, lambda data: None)
    return digester


def save_in_turn(
    file: Path,
    plan: Mapping[Names, TensorInfo],
    fill: Callable[..., torch.Tensor | Iterable[torch.Tensor]],
    other: Mapping[str, Any] | None = None,
) -> Digester:
    """Saves tensors to a new file while only one of them is in memory at a time.

    ``torch.save`` takes all tensors at once, and then writes them one after another. So it is given views of one piece
    of memory, as large as the largest tensor: when it has written one tensor, the next is put in the same place.
    Tensors larger than 256 MiB, such as a vocabulary, are put in an unnamed temporary file beside the new one instead.

    Args:
        file: the path of the new file.
        plan: the shape and dtype of every tensor, by its path in the saved value.
        fill: a function that returns a tensor of the plan, given its path: the whole tensor, or its rows in blocks;
            called once for each tensor, in the order of the plan.
        other: further values, which are saved before the tensors and contain none.

    Returns:
        The digester, which has digested the file.

    Raises:
        ConversionError: if the result of ``fill`` is not as planned.
        OSError: if the file cannot be written, for example because the disk is full.
        RuntimeError: if this version of PyTorch does not write tensors one after another.
    """
    turns = _Turns(plan, fill, file.parent)
    value: dict[str, Any] = dict(other or {})
    for names, tensor in turns.tensors.items():
        functools.reduce(lambda part, name: part.setdefault(name, {}), names[:-1], value)[names[-1]] = tensor
    turns.take_place()
    digester = Digester()
    try:
        with open(file, "xb") as stream:
            _save(value, stream, digester, turns.written)
        if turns.waiting:
            raise RuntimeError(f"torch.save of PyTorch {torch.__version__} does not write tensors one after another")
    except BaseException:
        file.unlink(missing_ok=True)
        raise
    return digester


class _Turns:
    """Tensors that share one piece of memory, which contains the values of the first tensor that is not yet written.

    Attributes:
        tensors: all tensors by path, each with a storage of its own, because ``torch.save`` writes whole storages.
        waiting: the paths of the tensors that are not yet written, in order.
    """

    def __init__(
        self,
        plan: Mapping[Names, TensorInfo],
        fill: Callable[..., torch.Tensor | Iterable[torch.Tensor]],
        directory: Path,
    ) -> None:
        self._plan = plan
        self._fill = fill
        # torch.save refuses storages of different dtypes that begin at the same address; each dtype has its own start.
        starts = {dtype: 64 * number for number, dtype in enumerate({info.dtype: None for info in plan.values()})}
        large = [info.nbytes for info in plan.values() if info.nbytes > _MAX_IN_MEMORY]
        small = [info.nbytes for info in plan.values() if info.nbytes <= _MAX_IN_MEMORY]
        end = 64 * len(starts)
        memory = torch.empty(max(small, default=0) + end, dtype=torch.uint8).untyped_storage()
        on_disk = _nameless(directory, max(large) + end) if large else memory
        self.tensors: dict[Names, torch.Tensor] = {}
        for names, info in plan.items():
            tensor: Any = torch.empty(info.shape if info.nbytes == 0 else 0, dtype=info.dtype)
            if info.nbytes:
                start, place = starts[info.dtype], on_disk if info.nbytes > _MAX_IN_MEMORY else memory
                tensor.set_(place[start : start + info.nbytes], 0, info.shape)
            self.tensors[names] = tensor
        self.waiting = collections.deque(self.tensors)

    def take_place(self) -> None:
        """Puts the values of the next tensor that has elements into the shared memory."""
        while self.waiting:
            names = self.waiting[0]
            tensor, info, content = self.tensors[names], self._plan[names], self._fill(*names)
            blocks = [content] if isinstance(content, torch.Tensor) else content
            for row, block in checked_blocks(names[-1], info, blocks):
                (tensor[row : row + len(block)] if info.shape else tensor).copy_(block)
            if info.nbytes:
                return
            self.waiting.popleft()

    def written(self, data: np.ndarray) -> None:
        """Continues with the next tensor if the bytes just written are exactly those of the current one."""
        if not self.waiting:
            return
        tensor = self.tensors[self.waiting[0]]
        if (data.nbytes, data.ctypes.data) == (tensor.nbytes, tensor.data_ptr()):
            self.waiting.popleft()
            self.take_place()


def _nameless(directory: Path, nbytes: int) -> torch.UntypedStorage:
    """Returns memory backed by an unnamed file, which the system can page out; freed with the last tensor in it."""
    with tempfile.TemporaryFile(dir=directory) as file:
        # The space is allocated here to detect a full disk: a write to mapped memory without space kills the process.
        os.posix_fallocate(file.fileno(), 0, nbytes)
        return torch.frombuffer(mmap.mmap(file.fileno(), nbytes), dtype=torch.uint8).untyped_storage()


def _save(value: Any, file: BinaryIO, digester: Digester, written: Callable[[np.ndarray], None]) -> None:
    """Saves a value with ``torch.save``, digests it, and raises the original error if a write fails.

    ``written`` is called with each piece of memory after it was written, and may then change it.
    """
    failed: list[BaseException] = []

    def write(data: Any) -> int:
        try:
            count = digester.write(file, data)
            written(np.frombuffer(data, np.uint8))
            return count
        except BaseException as error:
            failed.append(error)
            raise

    stream: Any = types.SimpleNamespace(write=write, flush=file.flush)
    try:
        torch.save(value, stream)
    except Exception:
        # After a failed write, PyTorch tries to complete its zip file, finds a wrong position and raises a RuntimeError
        # about it, which hides the cause.
        if failed:
            raise failed[0] from None
        raise


class Scratch:
    """Memory that is reused for one tensor after another.

    The system clears every page of fresh memory, which costs more time than the work done in it.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Returns an uninitialized tensor in the memory of the tensor taken before, which becomes invalid."""
        nbytes = TensorInfo(shape, dtype).nbytes
        if nbytes > self._memory.numel():
            self._memory = torch.empty(nbytes, dtype=torch.uint8)
        return self._memory[:nbytes].view(dtype).view(shape)


def with_own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a contiguous CPU tensor whose storage covers exactly its elements.

    ``torch.save`` writes whole storages, not only the elements of a view. The result shares the memory of the given
    tensor, unless that is not contiguous or not on the CPU.
    """
    tensor = tensor.detach().cpu().contiguous()
    if tensor.numel() == 0:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    start = tensor.storage_offset() * tensor.itemsize
    storage = tensor.untyped_storage()
    if start == 0 and storage.nbytes() == tensor.nbytes:
        return tensor
    own: Any = torch.empty(0, dtype=tensor.dtype)
    return own.set_(storage[start : start + tensor.nbytes], 0, tensor.shape)

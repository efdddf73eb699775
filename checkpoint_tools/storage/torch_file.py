# SPDX-License-Identifier: Apache-2.0
"""``torch.save`` with the errors of the disk, a digest on the way, and tensors that are not all in memory."""

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
"""Where a tensor stands in what is saved: its name in a dict, or those of the dicts around it and its own."""


def save_file(value: Any, file: Path | BinaryIO, digester: Digester | None = None) -> Digester:
    """Saves a value into a new file, or at the position of an open one, which ``digester`` has seen up to there.

    Returns:
        What has digested all that was written.

    Raises:
        OSError: it could not be written, for example because the disk is full.
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
    """Saves tensors into a new file, of which one is in memory at a time.

    ``torch.save`` wants all tensors at once, and then writes them one behind another. So all that it gets are views of
    one piece of memory, as large as the largest: when it has written one of them, the next one takes its place. What is
    larger than 256 MiB, such as a vocabulary, has its place in a nameless file beside the new one.

    Args:
        file: the new file.
        plan: shapes and dtypes.
        fill: returns a tensor of the plan, given its names: whole, or its rows in blocks; called once for each, in
            order.
        other: what else is saved, before the tensors; it holds none.

    Returns:
        What has digested the file.

    Raises:
        ConversionError: ``fill`` gave something else than was planned.
        OSError: for example a full disk.
        RuntimeError: this PyTorch writes tensors in another way.
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
    """Tensors that share one piece of memory; the first that waits holds its values there.

    Attributes:
        tensors: all of them, with a storage each, for ``torch.save`` writes whole storages.
        waiting: those that were not written yet.
    """

    def __init__(
        self,
        plan: Mapping[Names, TensorInfo],
        fill: Callable[..., torch.Tensor | Iterable[torch.Tensor]],
        directory: Path,
    ) -> None:
        self._plan = plan
        self._fill = fill
        # PyTorch takes no storages of two dtypes that begin at one address.
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
        """Gives the memory to the next tensor; those without elements need none."""
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
        """Goes on to the next tensor where these bytes are all those of the one whose turn it is."""
        if not self.waiting:
            return
        tensor = self.tensors[self.waiting[0]]
        if (data.nbytes, data.ctypes.data) == (tensor.nbytes, tensor.data_ptr()):
            self.waiting.popleft()
            self.take_place()


def _nameless(directory: Path, nbytes: int) -> torch.UntypedStorage:
    """Memory that is a nameless file: the system can write it out, and frees it with the last tensor in it."""
    with tempfile.TemporaryFile(dir=directory) as file:
        # A full disk must show here: writing into mapped memory without space behind it would kill the process.
        os.posix_fallocate(file.fileno(), 0, nbytes)
        return torch.frombuffer(mmap.mmap(file.fileno(), nbytes), dtype=torch.uint8).untyped_storage()


def _save(value: Any, file: BinaryIO, digester: Digester, written: Callable[[np.ndarray], None]) -> None:
    """``written`` is told of each piece of memory that was written, and may change it then."""
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
        # PyTorch goes on to end its zip file, notices that the position is wrong, and raises a RuntimeError about that.
        if failed:
            raise failed[0] from None
        raise


class Scratch:
    """Memory for one tensor after another: the system clears every page of fresh memory, which costs more than what is
    done with it."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialized tensor, in the memory of the one that was taken before."""
        nbytes = TensorInfo(shape, dtype).nbytes
        if nbytes > self._memory.numel():
            self._memory = torch.empty(nbytes, dtype=torch.uint8)
        return self._memory[:nbytes].view(dtype).view(shape)


def with_own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """The same CPU memory, as a contiguous tensor whose storage ends with it: ``torch.save`` writes whole storages.

    Copies only what is not contiguous or not on the CPU.
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

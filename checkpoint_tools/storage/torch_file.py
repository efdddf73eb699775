# SPDX-License-Identifier: Apache-2.0
"""``torch.save`` with the errors of the disk, a digest on the way, and tensors that are not all in memory."""

import collections
import functools
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from ...files import Digester
from .reader import TensorInfo, checked_blocks

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
    one piece of memory, as large as the largest: when it has written one of them, the next one takes its place.

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
    # PyTorch takes no storages of two dtypes that begin at one address.
    starts = {dtype: 64 * number for number, dtype in enumerate({info.dtype: None for info in plan.values()})}
    largest = max((info.nbytes for info in plan.values()), default=0)
    memory = torch.empty(largest + 64 * len(starts), dtype=torch.uint8).untyped_storage()
    value: dict[str, Any] = dict(other or {})
    tensors: dict[Names, torch.Tensor] = {}
    for names, info in plan.items():
        # A storage for each tensor: torch.save writes whole storages.
        tensor: Any = torch.empty(info.shape if info.nbytes == 0 else 0, dtype=info.dtype)
        if info.nbytes:
            start = starts[info.dtype]
            tensor.set_(memory[start : start + info.nbytes], 0, info.shape)
        tensors[names] = tensor
        functools.reduce(lambda part, name: part.setdefault(name, {}), names[:-1], value)[names[-1]] = tensor
    waiting = collections.deque(tensors)

    def take_place() -> None:
        while waiting:
            names = waiting[0]
            tensor, info, content = tensors[names], plan[names], fill(*names)
            blocks = [content] if isinstance(content, torch.Tensor) else content
            for row, block in checked_blocks(names[-1], info, blocks):
                (tensor[row : row + len(block)] if info.shape else tensor).copy_(block)
            if info.nbytes:
                return
            waiting.popleft()

    def written(data: np.ndarray) -> None:
        if waiting and (data.nbytes, data.ctypes.data) == (plan[waiting[0]].nbytes, tensors[waiting[0]].data_ptr()):
            waiting.popleft()
            take_place()

    digester = Digester()
    take_place()
    try:
        with open(file, "xb") as stream:
            _save(value, stream, digester, written)
        if waiting:
            raise RuntimeError(f"torch.save of PyTorch {torch.__version__} does not write tensors one after another")
    except BaseException:
        file.unlink(missing_ok=True)
        raise
    return digester


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

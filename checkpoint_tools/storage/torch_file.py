# SPDX-License-Identifier: Apache-2.0
"""``torch.save`` with the errors of the disk, and tensors for it that are not in memory."""

import mmap
import os
import tempfile
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .reader import TensorInfo, checked_blocks


def save_file(value: Any, file: Path | BinaryIO) -> None:
    """Saves a value into a new file, or at the position of an open one.

    Raises:
        OSError: it could not be written, for example because the disk is full.
    """
    if isinstance(file, Path):
        with open(file, "xb") as opened:
            save_file(value, opened)
        return
    failed: list[BaseException] = []

    def write(data: Any) -> int:
        try:
            return file.write(data)
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


def filled_on_disk(
    directory: Path, plan: Mapping[str, TensorInfo], fill: Callable[[str], torch.Tensor | Iterable[torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Tensors whose memory is a nameless file in ``directory``: the system can write it out, and frees it with them.

    ``torch.save`` wants all tensors at once. This needs their space on the disk once more while it runs.

    Args:
        directory: on the disk that is to hold them.
        plan: names, shapes and dtypes.
        fill: returns a tensor of the plan, whole or its rows in blocks; called once for each, in order.

    Raises:
        ConversionError: ``fill`` gave something else than was planned.
        OSError: for example a full disk.
    """
    places, end = {}, 1
    for name, info in plan.items():
        places[name] = -(-end // 64) * 64
        end = places[name] + info.nbytes
    with tempfile.TemporaryFile(dir=directory) as file:
        # A full disk must show here: writing into mapped memory without space behind it would kill the process.
        os.posix_fallocate(file.fileno(), 0, end)
        storage = torch.frombuffer(mmap.mmap(file.fileno(), end), dtype=torch.uint8).untyped_storage()
    state = {}
    for name, info in plan.items():
        # A storage for each tensor: torch.save writes whole storages.
        tensor: Any = torch.empty(info.shape if info.nbytes == 0 else 0, dtype=info.dtype)
        if info.nbytes:
            tensor.set_(storage[places[name] : places[name] + info.nbytes], 0, info.shape)
        content = fill(name)
        for row, block in checked_blocks(name, info, [content] if isinstance(content, torch.Tensor) else content):
            (tensor[row : row + len(block)] if info.shape else tensor).copy_(block)
        state[name] = tensor
    return state


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

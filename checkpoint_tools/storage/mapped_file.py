# SPDX-License-Identifier: Apache-2.0
"""Tensors that are views of a mapped file: their pages belong to the page cache, not to the memory of the process."""

import mmap
from pathlib import Path

import torch

# Python has the name since 3.11. Without the flag, Linux refuses to map a file larger than memory, although nothing is
# copied.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


class MappedFile:
    """Private mapping of a file: writes to a view do not change the file, which must not shrink while views are used.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if the file is empty.
    """

    def __init__(self, path: Path) -> None:
        flags, protection = mmap.MAP_PRIVATE | _NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        with open(path, "rb") as file:
            self._bytes = torch.frombuffer(mmap.mmap(file.fileno(), 0, flags, protection), dtype=torch.uint8)

    def read(
        self,
        offset: int,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        stride: tuple[int, ...] | None = None,
        index: tuple[slice | int, ...] = (),
    ) -> torch.Tensor:
        """Returns a piece of a tensor that is stored in the file.

        Args:
            offset: the position of the tensor's first element in the file, in bytes.
            dtype: the dtype of the elements, which are little endian.
            shape: the shape of the whole tensor.
            stride: the strides of the tensor in elements; None if it is contiguous.
            index: the index of the piece, as in ``tensor[index]``.

        Returns:
            A view whose storage is its own and covers exactly the tensor. If the tensor's address is not a multiple of
            its element size, a copy of the piece instead: PyTorch's kernels are undefined for unaligned addresses.

        Raises:
            ValueError: if the file ends before the tensor does.
        """
        if 0 in shape:
            return torch.empty(shape, dtype=dtype)[index]
        stride = torch.empty(shape, device="meta").stride() if stride is None else stride
        extent = (1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))) * dtype.itemsize
        if offset < 0 or offset + extent > self._bytes.numel():
            raise ValueError(f"bytes {offset} to {offset + extent} of a file of {self._bytes.numel()} bytes")
        storage = self._bytes.untyped_storage()[offset : offset + extent]
        if (self._bytes.data_ptr() + offset) % dtype.itemsize == 0:
            return torch.empty(0, dtype=dtype).set_(storage, 0, shape, stride)[index]
        # Bytes need no alignment: the piece is taken as bytes of shape (..., itemsize), and its copy is aligned.
        raw = torch.empty(0, dtype=torch.uint8).set_(
            storage, 0, (*shape, dtype.itemsize), (*(step * dtype.itemsize for step in stride), 1)
        )
        return raw[index].clone(memory_format=torch.contiguous_format).view(dtype).squeeze(-1)

# SPDX-License-Identifier: Apache-2.0
"""Tensors that are views of a file: their pages come and go with the page cache and are no memory of the process."""

import mmap
from pathlib import Path

import torch

# Python 3.11 names it. Without it Linux refuses to map a file that is larger than memory, though nothing is copied.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


class MappedFile:
    """A file, mapped privately: writing into a view would not change it. It must not shrink while views are used.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is empty.
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
        """A piece of a tensor that lies in the file.

        Args:
            offset: of its first element, in bytes.
            dtype: of its elements, little endian.
            shape: of the whole tensor.
            stride: in elements; contiguous when None.
            index: the piece, as ``tensor[index]``.

        Returns:
            A view with a storage of its own, that covers the tensor and no more. Where the tensor does not lie at a
            multiple of its element size a copy of the piece: an unaligned address is undefined for PyTorch's kernels.

        Raises:
            ValueError: the file ends before the tensor does.
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
        # Bytes have no alignment: take the piece as (..., itemsize) bytes; the copy is aligned.
        raw = torch.empty(0, dtype=torch.uint8).set_(
            storage, 0, (*shape, dtype.itemsize), (*(step * dtype.itemsize for step in stride), 1)
        )
        return raw[index].clone(memory_format=torch.contiguous_format).view(dtype).squeeze(-1)

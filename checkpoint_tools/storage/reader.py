# SPDX-License-Identifier: Apache-2.0
"""Common interface of all checkpoint files: named tensors, whose rows are read when they are needed.

Because of it, a conversion never holds more than a piece of one layer in memory, whatever the size of the model.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ...cli import MismatchError
from ...files import FileError

CACHED_BYTES = 2**20
"""Size of a block of rows that is processed more than once: small enough to stay in the processor's cache."""


class ConversionError(FileError):
    """Error of a checkpoint that cannot be converted as requested; the message names file or tensor, and a remedy."""


class VerificationError(MismatchError):
    """Error of an output that differs from what should have been written, or of an input that contradicts itself."""


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor that has not been read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def row_slices(self, nbytes: int = 2**26) -> Iterator[slice]:
        """Yields slices of the rows with about ``nbytes`` each, at least one row; none for a scalar or empty tensor."""
        if self.shape and self.nbytes:
            rows = max(1, nbytes * self.shape[0] // self.nbytes)
            for start in range(0, self.shape[0], rows):
                yield slice(start, min(start + rows, self.shape[0]))


class TensorReader(Protocol):
    """Protocol of a reader of the named tensors of a checkpoint."""

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Returns the shape and dtype of every tensor; reads no data."""

    def read(self, name: str, index: tuple[slice | int, ...] = ()) -> torch.Tensor:
        """Returns ``tensor[index]``, a piece of a tensor; an int selects one layer of a stacked tensor.

        The result may be a view of a mapped file: callers that write into it must clone it first.

        Raises:
            ConversionError: if the file is damaged; the message names the file and the tensor.
        """


def is_finite(tensor: torch.Tensor) -> bool:
    """Returns whether a tensor contains neither NaN nor infinity."""
    # Integers are finite. 8-bit floats are not checked, because PyTorch does not compute in them.
    if tensor.dtype.itemsize == 1 or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    # The sum is fast, and is not finite if any value is not. Finite values may overflow in it, so each is then checked.
    return bool(tensor.sum().isfinite() or tensor.isfinite().all())


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Checks that a tensor contains neither NaN nor infinity.

    Raises:
        ConversionError: if it contains one of them.
    """
    if not is_finite(tensor):
        raise ConversionError(f"{name} holds NaN or infinity: training has diverged, or the file is damaged")


def cast(name: str, tensor: torch.Tensor, dtype: torch.dtype, exactly: bool = False) -> torch.Tensor:
    """Returns a finite tensor converted to another dtype.

    Args:
        name: the name of the tensor, for messages.
        tensor: the tensor.
        dtype: the dtype of the result.
        exactly: whether rounding of any value is an error, as for fused weights (levels times scales).

    Raises:
        ConversionError: if a value exceeds the range of the dtype, or is rounded despite ``exactly``.
    """
    if tensor.dtype == dtype:
        return tensor
    result = tensor.to(dtype)
    if exactly and not torch.equal(result.to(tensor.dtype), tensor):
        raise ConversionError(f"{name}: {dtype} cannot hold its scales exactly: choose --dtype bf16")
    if not is_finite(result):
        raise ConversionError(f"{name} holds values that {dtype} cannot: choose another --dtype")
    return result


def checked_blocks(name: str, info: TensorInfo, blocks: Iterable[torch.Tensor]) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields the blocks of rows that a tensor is written in, each with the number of its first row.

    A scalar counts as one row.

    Raises:
        ConversionError: if the blocks do not make up a tensor as described by ``info``.
    """
    rows, planned = 0, info.shape[0] if info.shape else 1
    for block in blocks:
        if block.dtype != info.dtype or block.ndim != len(info.shape) or block.shape[1:] != info.shape[1:]:
            raise ConversionError(
                f"{name}: a block of {tuple(block.shape)}, {block.dtype} in a tensor of {info.shape}, {info.dtype}"
            )
        count = block.shape[0] if block.ndim else 1
        if rows + count > planned:
            raise ConversionError(f"{name}: more than the planned {planned} rows")
        yield rows, block
        rows += count
    if rows != planned:
        raise ConversionError(f"{name}: {rows} of {planned} rows")


def files_of(sizes: Sequence[int], limit: int) -> Iterator[slice]:
    """Yields slices of a sequence, one per file: as many consecutive items as fit in ``limit`` bytes, at least one."""
    first, total = 0, 0
    for number, size in enumerate(sizes):
        if number > first and total + size > limit:
            yield slice(first, number)
            first, total = number, 0
        total += size
    yield slice(first, len(sizes))


def refuse_mistakes(what: str, lines: Sequence[str]) -> None:
    """Raises a :class:`ConversionError` that starts with ``what`` and lists the first 20 mistakes, if there are any."""
    if lines:
        more = [f"... and {len(lines) - 20} more"] if len(lines) > 20 else []
        raise ConversionError("\n  ".join([f"{what}:", *lines[:20], *more]))


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the name of a dtype in files, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def listed(names: Iterable[Any], limit: int = 8) -> str:
    """Returns the first ``limit`` names of a list as text, followed by the number of further ones."""
    names = [str(name) for name in names]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")

# SPDX-License-Identifier: Apache-2.0
"""The one view that all checkpoint files are read through: named tensors, whose rows are fetched when they are needed.

So a conversion never holds more than a piece of one layer, whatever the size of the model.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ...cli import MismatchError
from ...files import FileError

CACHED_BYTES = 2**20
"""Of a block of rows that is looked at more than once: it stays in the processor's cache from one time to the next."""


class ConversionError(FileError):
    """A checkpoint that cannot be converted as asked; the message names the file or tensor, and the cure."""


class VerificationError(MismatchError):
    """What was written is not what should have been written."""


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
        """The rows in blocks of about ``nbytes``, and of one row at least; none of a scalar and of an empty tensor."""
        if self.shape and self.nbytes:
            rows = max(1, nbytes * self.shape[0] // self.nbytes)
            for start in range(0, self.shape[0], rows):
                yield slice(start, min(start + rows, self.shape[0]))


class TensorReader(Protocol):
    """Named tensors of a checkpoint."""

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor's shape and dtype; reads no data."""

    def read(self, name: str, index: tuple[slice | int, ...] = ()) -> torch.Tensor:
        """A piece of a tensor, as ``tensor[index]``; an int takes one layer of a stacked tensor. Views of mapped files
        are welcome: whoever writes into the result clones it first.

        Raises:
            ConversionError: the file is damaged, naming it and the tensor.
        """


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity."""
    # PyTorch computes nothing in 8-bit floating point, and integers are finite.
    if tensor.dtype.itemsize == 1 or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    # The sum alone is fast and sees both; only where it overflows without reason every value has to be looked at.
    return bool(tensor.sum().isfinite() or tensor.isfinite().all())


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Checks a tensor for NaN and infinity.

    Raises:
        ConversionError: it holds one.
    """
    if not is_finite(tensor):
        raise ConversionError(f"{name} holds NaN or infinity: training has diverged, or the file is damaged")


def cast(name: str, tensor: torch.Tensor, dtype: torch.dtype, exactly: bool = False) -> torch.Tensor:
    """A finite tensor in another dtype; ``exactly`` where no value may be rounded, as in ternary times scale.

    Raises:
        ConversionError: the dtype cannot hold a value, or not ``exactly``.
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
    """The blocks of rows that a tensor is written in, each with its first row; a scalar is one row.

    Raises:
        ConversionError: they do not make up a tensor of ``info``.
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
    """What of a sequence goes into which file: as much on end as ``limit`` bytes hold, and one thing at least."""
    first, total = 0, 0
    for number, size in enumerate(sizes):
        if number > first and total + size > limit:
            yield slice(first, number)
            first, total = number, 0
        total += size
    yield slice(first, len(sizes))


def refuse_mistakes(what: str, lines: Sequence[str]) -> None:
    """Raises a :class:`ConversionError` that lists the first mistakes, if there are any."""
    if lines:
        more = [f"... and {len(lines) - 20} more"] if len(lines) > 20 else []
        raise ConversionError("\n  ".join([f"{what}:", *lines[:20], *more]))


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as files name it, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def listed(names: Iterable[Any], limit: int = 8) -> str:
    """The first names of a list that may have hundreds, and how many more there are."""
    names = [str(name) for name in names]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")

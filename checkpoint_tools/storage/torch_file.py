# SPDX-License-Identifier: Apache-2.0
"""``torch.save`` with the errors of the disk."""

from pathlib import Path
from typing import Any, BinaryIO

import torch


class _Remembering:
    """A binary file that remembers why a write failed.

    PyTorch goes on to end its zip file, notices that the position is wrong, and raises a RuntimeError about that.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: BaseException | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except BaseException as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self._file.flush()


def save_file(value: Any, file: Path | BinaryIO) -> None:
    """Saves a value into a new file, or at the position of an open one.

    Raises:
        OSError: it could not be written, for example because the disk is full.
    """
    if isinstance(file, Path):
        with open(file, "xb") as opened:
            save_file(value, opened)
        return
    remembering = _Remembering(file)
    stream: Any = remembering
    try:
        torch.save(value, stream)
    except Exception:
        if remembering.error is not None:
            raise remembering.error from None
        raise

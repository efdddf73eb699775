# SPDX-License-Identifier: Apache-2.0
"""Shared parts of the checkpoint commands: common flags, input checks, progress bars, and flat memory use."""

import argparse
import contextlib
import ctypes
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .. import cli
from ..files import check_digests, read_digests
from .storage.reader import dtype_name

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES.update({dtype_name(dtype): dtype for dtype in DTYPES.values()})
_M_MMAP_THRESHOLD = -3  # <malloc.h>
_PICKLE = (
    "load files that weights_only refuses. A pickle can run any code when it is loaded: only for files whose author "
    "you trust"
)
_FLAGS: dict[str, dict[str, Any]] = {
    "--save-dir": {"type": Path, "required": True, "help": "directory to make"},
    "--dtype": {"choices": sorted(DTYPES), "help": "of the written weights, default their own"},
    "--max-shard-size": {"default": "5GB", "metavar": "SIZE", "help": "of a safetensors file, default 5GB"},
}


class Parser(cli.Parser):
    """Argument parser of a checkpoint command: its help is a module's docstring, and it has ``--allow-pickle``.

    Args:
        doc: the docstring of the command's module.
        shared: the names of further flags of ``_FLAGS`` that the command has.
    """

    def __init__(self, doc: str | None, *shared: str) -> None:
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.add_argument("--allow-pickle", action="store_true", help=_PICKLE)
        for flag in shared:
            self.add_argument(flag, **_FLAGS[flag])


def check_input(directory: Path, names: Iterable[str] | None = None) -> None:
    """Compares the files that a command is going to read with their digests; files without a digest are accepted.

    Args:
        directory: the directory of the files.
        names: the names of the files, or None for all files that have a digest.

    Raises:
        DigestError: if files are damaged; the message names them.
    """
    names = list(read_digests(directory) or {}) if names is None else list(names)
    with progress_of_reading(directory, names) as bar:
        check_digests(directory, names, on_read=bar.update)


def progress_of_reading(directory: Path, names: Iterable[str]) -> tqdm:
    """Returns a progress bar over the bytes of the named files, for the check of their digests."""
    total = sum(path.stat().st_size for name in names if (path := directory / name).is_file())
    return progress(total, "checking digests", leave=False)


def progress(nbytes: int, doing: str, **options: Any) -> tqdm:
    """Returns a progress bar over bytes, which is shown only on a terminal."""
    return tqdm(total=nbytes, desc=doing, unit="B", unit_scale=True, disable=None, **options)


def run(work: Callable[[], None]) -> int:
    """Runs a command under :func:`~bitcpm_megatron.cli.run`, on one thread, and returns its exit status.

    SIGTERM interrupts the command.
    """
    return_freed_memory()
    with one_thread():
        return cli.run(cli.interrupted_by_sigterm()(work))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Limits PyTorch to one thread within the block.

    Blocks of rows fit into the processor's cache; on these, further threads mostly wait, and busy a core while waiting.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def return_freed_memory() -> None:
    """Makes the C library return freed blocks of 1 MB and more to the system at once; call it when a command starts.

    Otherwise glibc learns from the first freed block to keep blocks of up to 32 MB on its heap, and small objects are
    then allocated in the holes: a conversion that holds one piece of 20 MB at a time grows by about 20 MB per piece.
    Does nothing if the C library has no ``mallopt``.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)

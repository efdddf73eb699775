# SPDX-License-Identifier: Apache-2.0
"""What all commands of this room share: common flags, and memory that stays flat."""

import argparse
import contextlib
import ctypes
import gc
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
    """With a module's docstring for help, and ``--allow-pickle``.

    Args:
        doc: the docstring.
        shared: flags that several commands have.
    """

    def __init__(self, doc: str | None, *shared: str) -> None:
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.add_argument("--allow-pickle", action="store_true", help=_PICKLE)
        for flag in shared:
            self.add_argument(flag, **_FLAGS[flag])


def check_input(directory: Path, names: Iterable[str] | None = None) -> None:
    """Compares the files that a command is going to read, None for all of a directory, with their digests; what comes
    without any is taken as it is.

    Raises:
        DigestError: files are damaged, naming them.
    """
    names = list(read_digests(directory) or {}) if names is None else list(names)
    with progress_of_reading(directory, names) as bar:
        check_digests(directory, names, on_read=bar.update)


def progress_of_reading(directory: Path, names: Iterable[str]) -> tqdm:
    """A bar over the bytes of files."""
    total = sum(path.stat().st_size for name in names if (path := directory / name).is_file())
    return progress(total, "checking digests", leave=False)


def progress(nbytes: int, doing: str, **options: Any) -> tqdm:
    """A bar over bytes, where somebody can see it."""
    return tqdm(total=nbytes, desc=doing, unit="B", unit_scale=True, disable=None, **options)


def run(work: Callable[[], None]) -> int:
    """Runs a command under :func:`~bitcpm_megatron.cli.run`, on one thread; returns its exit status. SIGTERM interrupts
    it."""
    return_freed_memory()
    # What imports have made lives as long as the process: no collection need look at it again.
    gc.freeze()
    with one_thread():
        return cli.run(cli.interrupted_by_sigterm()(work))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Keeps PyTorch to one thread: on blocks that a cache holds others do little but wait, and burn a core doing so."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def return_freed_memory() -> None:
    """Makes the C library give freed blocks of 1 MB and more back at once; for the start of a command.

    glibc otherwise learns from the first freed block to keep blocks of up to 32 MB on its heap, where small objects
    come to lie in the holes: a conversion that holds one piece of 20 MB at a time grows by about 20 MB per piece. Does
    nothing where the C library is another.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)

# SPDX-License-Identifier: Apache-2.0
"""What all commands of this room share: common flags, and memory that stays flat."""

import argparse
from collections.abc import Callable

import torch

from .. import cli
from .memory import return_freed_memory

DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
}
_PICKLE = (
    "load files that weights_only refuses. A pickle can run any code when it is loaded: only for files whose author "
    "you trust"
)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds ``--dtype`` and ``--allow-pickle``."""
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="of the written weights, default their own")
    add_pickle_argument(parser)


def add_pickle_argument(parser: argparse.ArgumentParser) -> None:
    """Adds ``--allow-pickle``."""
    parser.add_argument("--allow-pickle", action="store_true", help=_PICKLE)


def dtype_of(name: str | None) -> torch.dtype | None:
    """The dtype that ``--dtype`` names."""
    return None if name is None else DTYPES[name]


def run(work: Callable[[], None]) -> int:
    """Runs a command under :func:`~bitcpm_megatron.cli.run`; returns its exit status."""
    return_freed_memory()
    return cli.run(work)

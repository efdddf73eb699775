# SPDX-License-Identifier: Apache-2.0
"""Digests of a checkpoint, made and checked by all ranks in parallel, each for its own share of the files."""

import contextlib
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..agreement import all_gathered, together
from ..files import DIGESTS, DigestError, digest, find_damage, read_digests, read_json, write_text
from .directory import CheckpointError

_Digests = dict[str, dict[str, Any]]


def with_digests(write: Callable[..., None] | None, directory: Path) -> Callable[..., None] | None:
    """Returns a function that writes this rank's files into a directory and then leaves their digests there.

    The process that writes in the background thus makes the digests, too, and training does not wait for them. `write`
    is the function of megatron-core's asynchronous request, None if this rank writes nothing.
    """
    if write is None:
        return None
    return functools.partial(_write_then_digest, write, directory, torch.distributed.get_rank())


def gather_digests(directory: Path) -> _Digests:
    """Gathers the digests of the files that all ranks wrote into a directory, by name; collective over all ranks."""
    rank = torch.distributed.get_rank()
    with together():
        left = _left_by_writer(directory, rank)
        mine = read_json(left) if left.is_file() else _digests(directory, rank)
        left.unlink(missing_ok=True)
    return {name: entry for share in all_gathered(mine) for name, entry in share.items()}


def verify_digests(checkpoint: Path) -> None:
    """Compares a checkpoint with its digests; collective over all ranks, and raises on all of them alike.

    Raises:
        CheckpointError: if there are no digests.
        DigestError: if files are damaged; the message names them.
    """
    recorded = read_digests(checkpoint)
    if recorded is None:
        raise CheckpointError(f"{checkpoint} has no {DIGESTS} to compare with: leave out --verify-digests")
    # The largest files come first, so that the shares have similar sizes.
    names = sorted(recorded, key=lambda name: (-recorded[name]["bytes"], name))
    share = names[torch.distributed.get_rank() :: torch.distributed.get_world_size()]
    try:
        damage = find_damage(checkpoint, share) or []
    except OSError as error:  # answer with it, because the other ranks wait in the gather below
        damage = [str(error)]
    lines = [line for part in all_gathered(damage) for line in part]
    if lines:
        raise DigestError("\n  ".join(lines))


def _write_then_digest(write: Callable[..., None], directory: Path, rank: int, *args: Any, **options: Any) -> None:
    write(*args, **options)
    # On a full disk the writer has already raised; if it has not, gather_digests makes the digests that are missing.
    with contextlib.suppress(OSError):
        write_text(_left_by_writer(directory, rank), json.dumps(_digests(directory, rank)))


def _digests(directory: Path, rank: int) -> _Digests:
    return {path.name: digest(path) for path in directory.glob(f"__{rank}_*.distcp")}


def _left_by_writer(directory: Path, rank: int) -> Path:
    return directory / f"digests_of_rank_{rank}.json"

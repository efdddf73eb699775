# SPDX-License-Identifier: Apache-2.0
"""Agreement among ranks on errors: an error on one rank is raised on all, so that no rank hangs in a collective."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from .cli import FailedError


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Runs a block on every rank; if it raises on any rank, every rank raises once all ranks have finished the block.

    A rank that raised re-raises its own exception; the others raise that of the lowest rank that raised. Collective
    over all ranks. The block itself must not leave other ranks in a collective operation when it raises.
    """
    mine: Exception | None = None
    try:
        yield
    except Exception as error:
        mine = error
    # Exceptions of other types may not survive being pickled and sent to other ranks.
    told = mine if mine is None or isinstance(mine, OSError | ValueError | FailedError) else FailedError(repr(mine))
    met = all_gathered(told)
    if mine is not None:
        raise mine
    for other in filter(None, met):
        raise other


def all_gathered(mine: Any, group: torch.distributed.ProcessGroup | None = None) -> list[Any]:
    """Gathers a value from every rank, in rank order; collective over the group (None: all ranks of the job)."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size(group) == 1:
        return [mine]
    found: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(found, mine, group=group)
    return found

# SPDX-License-Identifier: Apache-2.0
"""What one rank meets, every rank raises: nobody is left waiting in a collective operation."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from .cli import FailedError


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Runs a block on every rank; where it raised on one, every rank raises that, once all of them are through.

    Collective over all ranks. The block itself must not leave other ranks in a collective operation when it raises.
    """
    mine: Exception | None = None
    try:
        yield
    except Exception as error:
        mine = error
    # Other exceptions may not survive the journey.
    told = mine if mine is None or isinstance(mine, OSError | ValueError | FailedError) else FailedError(repr(mine))
    met = all_gathered(told)
    if mine is not None:
        raise mine
    for other in filter(None, met):
        raise other


def all_gathered(mine: Any, group: torch.distributed.ProcessGroup | None = None) -> list[Any]:
    """The value of every rank of a group (None: of the job), in their order; collective over them."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size(group) == 1:
        return [mine]
    found: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(found, mine, group=group)
    return found

# SPDX-License-Identifier: Apache-2.0
"""When a cached quantized weight may be used: one epoch counter per model chunk."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

_ATTRIBUTE = "_ternary_epoch"


@dataclass
class CacheEpoch:
    """The validity of all quantized weights cached in one model chunk.

    A quantized weight made in epoch ``number`` may be used again while ``number`` stands and ``open`` is true. The
    counter moves when a schedule announces its first micro-batch and when a checkpoint is loaded; the epoch is open
    from that micro-batch to the end of the schedule. Outside a schedule it is closed, and every forward quantizes anew:
    nobody there promises that the weights stand still.
    """

    number: int = 0
    scheduled: bool = False
    open: bool = False

    def start(self) -> None:
        """A schedule starts: the weights will not change until it ends."""
        self.scheduled = True

    def begin(self) -> None:
        """The first micro-batch of a step: the weights may have changed before."""
        self.number += 1
        self.open = self.scheduled

    def invalidate(self) -> None:
        """The weights changed."""
        self.number += 1

    def end(self) -> None:
        """A schedule is over."""
        self.scheduled = self.open = False


def attach_epoch(chunk: torch.nn.Module) -> CacheEpoch:
    """Gives a model chunk its epoch and connects it to ``load_state_dict``; who runs schedules tells of them below."""
    epoch = CacheEpoch()
    chunk.__dict__[_ATTRIBUTE] = epoch
    chunk.register_load_state_dict_post_hook(_invalidate_after_load)
    return epoch


def find_epoch(model: torch.nn.Module) -> CacheEpoch | None:
    """The epoch of a chunk, looking through wrappers."""
    return find_attached(model, _ATTRIBUTE)


def find_attached(model: torch.nn.Module, attribute: str) -> Any:  # noqa: ANN401
    """What a chunk holds in its instance dictionary, looking through wrappers (DDP, Float16Module) that hold the chunk
    as ``module``; None where nothing does."""
    seen: torch.nn.Module | None = model
    while seen is not None:
        found = seen.__dict__.get(attribute)
        if found is not None:
            return found
        seen = getattr(seen, "module", None)
    return None


def schedule_started(chunks: Sequence[torch.nn.Module]) -> None:
    """The weights of these chunks will not change until the schedule ends."""
    for epoch in filter(None, map(find_epoch, chunks)):
        epoch.start()


def first_micro_batch(model: torch.nn.Module) -> None:
    """A chunk starts its first micro-batch of a schedule."""
    if epoch := find_epoch(model):
        epoch.begin()


def schedule_ended(chunks: Sequence[torch.nn.Module]) -> None:
    """A schedule is over, or has raised."""
    for epoch in filter(None, map(find_epoch, chunks)):
        epoch.end()


def _invalidate_after_load(module: torch.nn.Module, incompatible_keys: object) -> None:
    if epoch := find_epoch(module):
        epoch.invalidate()

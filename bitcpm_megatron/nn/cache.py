# SPDX-License-Identifier: Apache-2.0
"""When a cached quantized weight may be used: one epoch counter per model chunk."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

if TYPE_CHECKING:
    from .linear import TernaryState

_ATTRIBUTE = "_ternary_epoch"

Cohort: TypeAlias = "Sequence[tuple[TernaryState, Any]]"
"""Layers, each with its state, whose weights are all in place when any one of them may run."""


@dataclass
class CacheEpoch:
    """The validity of all quantized weights cached in one model chunk.

    A quantized weight made in epoch ``number`` may be used again while ``number`` stands and ``open`` is true. The
    counter moves when a schedule announces its first micro-batch and when a checkpoint is loaded; the epoch is open
    from that micro-batch to the end of the schedule. Outside a schedule it is closed, and every forward quantizes anew:
    nobody there promises that the weights stand still, unless by :func:`hold_weights`.

    Attributes:
        number: of the epoch.
        scheduled: whether a schedule runs.
        open: whether quantized weights may be used again.
        ramp: how much of the quantizer the forward uses, from 0 for none of it to 1: W + ramp (Wq - W). It may change
            between schedules, and what is cached holds the blend.
        cohorts: while a schedule runs, the layers that are quantized together, by the name of each of them. Not kept
            beyond it: a copy of one layer would take all others along.
    """

    number: int = 0
    scheduled: bool = False
    open: bool = False
    ramp: float = 1.0
    cohorts: Mapping[str, Cohort] = field(default_factory=dict)

    def start(self, cohorts: Iterable[Cohort] = ()) -> None:
        """A schedule starts: the weights will not change until it ends.

        Args:
            cohorts: the layers that are quantized together; one that is in none is quantized alone.
        """
        self.scheduled = True
        self.cohorts = {state.name: cohort for cohort in cohorts for state, _ in cohort}

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
        self.cohorts = {}


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
    return next((found for seen in _unwrapped(model) if (found := seen.__dict__.get(attribute)) is not None), None)


def wrappers_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The wrappers around a chunk that has an epoch, the outermost first."""
    return list(itertools.takewhile(lambda seen: _ATTRIBUTE not in seen.__dict__, _unwrapped(model)))


def _unwrapped(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    seen: torch.nn.Module | None = model
    while seen is not None:
        yield seen
        seen = getattr(seen, "module", None)


def set_ramp(chunks: Iterable[torch.nn.Module], ramp: float) -> None:
    """Says how much of the quantizer the forwards of these chunks use from now on; not while a schedule runs."""
    for epoch in filter(None, map(find_epoch, chunks)):
        epoch.ramp = ramp


def hold_weights(chunks: Iterable[torch.nn.Module]) -> None:
    """Says that the weights of these chunks stand still, as those of a model that is only asked do.

    What was quantized once is used again until a checkpoint is loaded, or a schedule that runs the chunks is over.
    """
    for epoch in filter(None, map(find_epoch, chunks)):
        epoch.start()
        epoch.begin()


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

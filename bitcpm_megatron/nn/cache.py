# SPDX-License-Identifier: Apache-2.0
"""Validity of cached quantized weights: one epoch counter per model chunk."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

if TYPE_CHECKING:
    from .linear import TernaryState

_ATTRIBUTE = "_ternary_epoch"

Cohort: TypeAlias = "Sequence[tuple[TernaryState, Any]]"
"""Layers, each with its state, whose weights are all in place as soon as any one of the layers may run."""


@dataclass
class CacheEpoch:
    """The validity of all quantized weights cached in one model chunk.

    A quantized weight made in epoch ``number`` may be used again while ``number`` is unchanged and ``open`` is true.
    The counter advances when a schedule announces its first micro-batch and when a checkpoint is loaded; the epoch is
    open from that micro-batch to the end of the schedule. Outside a schedule it is closed, and every forward quantizes
    anew, because nothing guarantees there that the weights do not change, except :func:`hold_weights`.

    Attributes:
        number: the number of the epoch.
        scheduled: whether a schedule is running.
        open: whether quantized weights may be used again.
        ramp: how much of the quantizer the forward uses, from 0 for none of it to 1: W + ramp (Wq - W). It may change
            between schedules; the cache holds the blend.
        cohorts: the layers that are quantized together, by the name of each of them. They are kept only while a
            schedule runs, because otherwise a copy of one layer would copy all others with it.
    """

    number: int = 0
    scheduled: bool = False
    open: bool = False
    ramp: float = 1.0
    cohorts: Mapping[str, Cohort] = field(default_factory=dict)

    def start(self, cohorts: Iterable[Cohort] = ()) -> None:
        """Starts a schedule, during which the weights will not change.

        Args:
            cohorts: the layers that are quantized together; a layer that is in no cohort is quantized alone.
        """
        self.scheduled = True
        self.cohorts = {state.name: cohort for cohort in cohorts for state, _ in cohort}

    def begin(self) -> None:
        """Begins the first micro-batch of a step, before which the weights may have changed."""
        self.number += 1
        self.open = self.scheduled

    def invalidate(self) -> None:
        """Marks the cached quantized weights as stale, because the weights changed."""
        self.number += 1

    def end(self) -> None:
        """Ends a schedule."""
        self.scheduled = self.open = False
        self.cohorts = {}


def attach_epoch(chunk: torch.nn.Module) -> CacheEpoch:
    """Gives a model chunk its epoch, and lets ``load_state_dict`` invalidate it.

    Code that runs schedules reports them by :meth:`CacheEpoch.start`, :func:`first_micro_batch` and
    :func:`schedule_ended`.
    """
    epoch = CacheEpoch()
    chunk.__dict__[_ATTRIBUTE] = epoch
    chunk.register_load_state_dict_post_hook(_invalidate_after_load)
    return epoch


def find_epoch(model: torch.nn.Module) -> CacheEpoch | None:
    """Returns the epoch of a chunk, looking through wrappers; None if it has none."""
    return find_attached(model, _ATTRIBUTE)


def find_attached(model: torch.nn.Module, attribute: str) -> Any:
    """Returns an entry of a chunk's instance dictionary, looking through wrappers; None if there is none.

    Wrappers (DDP, Float16Module) hold the chunk as ``module``.
    """
    return next((found for seen in _unwrapped(model) if (found := seen.__dict__.get(attribute)) is not None), None)


def wrappers_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Returns the wrappers around a chunk that has an epoch, the outermost first."""
    return list(itertools.takewhile(lambda seen: _ATTRIBUTE not in seen.__dict__, _unwrapped(model)))


def _unwrapped(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    seen: torch.nn.Module | None = model
    while seen is not None:
        yield seen
        seen = getattr(seen, "module", None)


def set_ramp(chunks: Iterable[torch.nn.Module], ramp: float) -> None:
    """Sets how much of the quantizer the forwards of these chunks use; not to be called while a schedule runs."""
    for epoch in filter(None, map(find_epoch, chunks)):
        epoch.ramp = ramp


def hold_weights(chunks: Iterable[torch.nn.Module]) -> None:
    """Declares that the weights of these chunks do not change, as in a model that is only used for inference.

    A weight that was quantized once is used again until a checkpoint is loaded, or until a schedule that runs the
    chunks ends.
    """
    for epoch in filter(None, map(find_epoch, chunks)):
        epoch.start()
        epoch.begin()


def first_micro_batch(model: torch.nn.Module) -> None:
    """Tells a chunk that its first micro-batch of a schedule begins."""
    if epoch := find_epoch(model):
        epoch.begin()


def schedule_ended(chunks: Sequence[torch.nn.Module]) -> None:
    """Tells chunks that their schedule has ended, or has raised."""
    for epoch in filter(None, map(find_epoch, chunks)):
        epoch.end()


def _invalidate_after_load(module: torch.nn.Module, incompatible_keys: object) -> None:
    if epoch := find_epoch(module):
        epoch.invalidate()

# SPDX-License-Identifier: Apache-2.0
"""Patches of megatron-core's schedules: who wants to know hears when one starts, and when it is over."""

import functools
from collections.abc import Callable, Sequence

import torch

from .. import ORIGINAL, replace

ChunkListener = Callable[[torch.nn.Module], None]


ScheduleListener = Callable[[Sequence[torch.nn.Module]], None]


_started: list[ScheduleListener] = []


_trained: list[ScheduleListener] = []


_ended: list[ScheduleListener] = []


def announce_schedules(on_start: ScheduleListener, on_first: ChunkListener, on_end: ScheduleListener) -> None:
    """Tells when a schedule starts, when a model chunk starts its first micro-batch in it, and when it is over.

    Displaces ``megatron.core.transformer.module.MegatronModule.set_is_first_microbatch``, which acts only when fp8, fp4
    or kitchen is configured, and ``forward_backward_*`` in ``megatron.core.pipeline_parallel.schedules``
    (``get_forward_backward_func`` looks them up there at each call, so nothing else needs to change). Without the first
    a cached quantized weight would never be renewed; without the second a plain ``model(x)`` outside a schedule could
    see one that the optimizer has made stale. The originals run unchanged.

    Args:
        on_start: called with all chunks of the schedule.
        on_first: called with the chunk as the schedule holds it (wrapped in DDP and Float16Module, as the case may be).
        on_end: called with all chunks of the schedule, also when it raised.
    """
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.transformer.module import MegatronModule

    _add(_started, on_start)
    _add(_ended, on_end)

    def announce_first(original: Callable) -> Callable:
        @functools.wraps(original)
        def set_is_first_microbatch(self: torch.nn.Module) -> None:
            on_first(self)
            original(self)

        return set_is_first_microbatch

    replace(MegatronModule, "set_is_first_microbatch", announce_first)
    for name in (
        "forward_backward_no_pipelining",
        "forward_backward_pipelining_without_interleaving",
        "forward_backward_pipelining_with_interleaving",
    ):
        replace(schedules, name, announced)


def announce_training(on_start: ScheduleListener, on_trained: ScheduleListener) -> None:
    """Tells when a schedule starts, and when one that computes gradients has run all its micro-batches.

    What :func:`announce_schedules` puts in place tells it. ``on_trained`` is called neither after a forward-only
    schedule nor after one that raised.

    Args:
        on_start: called with all chunks of any schedule.
        on_trained: called with all chunks of the schedule.
    """
    _add(_started, on_start)
    _add(_trained, on_trained)


def _add(listeners: list[ScheduleListener], listener: ScheduleListener) -> None:
    if listener not in listeners:
        listeners.append(listener)


def _tell(listeners: list[ScheduleListener], chunks: Sequence[torch.nn.Module]) -> None:
    for listener in listeners:
        listener(chunks)


def announced(schedule: Callable) -> Callable:
    """A schedule that tells the listeners of :func:`announce_schedules` and :func:`announce_training`; itself if it
    does."""
    if hasattr(schedule, ORIGINAL):
        return schedule

    @functools.wraps(schedule)
    def forward_backward(*args, model: torch.nn.Module | list[torch.nn.Module], **kwargs):  # noqa: ANN202
        chunks = model if isinstance(model, list) else [model]
        _tell(_started, chunks)
        try:
            result = schedule(*args, model=model, **kwargs)
        finally:
            _tell(_ended, chunks)
        if not kwargs.get("forward_only", False):
            _tell(_trained, chunks)
        return result

    setattr(forward_backward, ORIGINAL, schedule)
    return forward_backward

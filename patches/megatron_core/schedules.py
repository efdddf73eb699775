# SPDX-License-Identifier: Apache-2.0
"""Patches of megatron-core's schedules, which announce their start and end, and let their arguments be changed."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import ORIGINAL, around, replace

ChunkListener = Callable[[torch.nn.Module], None]
ScheduleListener = Callable[[Sequence[torch.nn.Module]], None]

Change = Callable[[dict[str, Any]], dict[str, Any]]

_CHANGE = "_bitcpm_change_of_training"
_listeners: defaultdict[str, list[Callable]] = defaultdict(list)


def announce_schedules(
    on_start: ScheduleListener | None = None,
    on_first: ChunkListener | None = None,
    on_end: ScheduleListener | None = None,
    on_trained: ScheduleListener | None = None,
) -> None:
    """Registers listeners for a schedule's start, a model chunk's first micro-batch in it, and a schedule's end.

    Displaces ``megatron.core.transformer.module.MegatronModule.set_is_first_microbatch``, which acts only when fp8, fp4
    or kitchen is configured, and ``forward_backward_*`` in ``megatron.core.pipeline_parallel.schedules``
    (``get_forward_backward_func`` looks them up there at each call, so nothing else needs to change). Without the first
    replacement a cached quantized weight would never be renewed; without the second a plain ``model(x)`` outside a
    schedule could see one that the optimizer has made stale. The originals run unchanged. A listener that is registered
    several times is called once.

    Args:
        on_start: a function that is called with all chunks of the schedule.
        on_first: a function that is called with the chunk as the schedule holds it (in DDP and Float16Module, if any).
        on_end: a function that is called with all chunks of the schedule, even if the schedule raised.
        on_trained: a function that is called with all chunks of a schedule that computes gradients and has run all its
            micro-batches; neither after a forward-only schedule nor after one that raised.
    """
    for moment, listener in {"start": on_start, "first": on_first, "end": on_end, "trained": on_trained}.items():
        if listener is not None and listener not in _listeners[moment]:
            _listeners[moment].append(listener)
    replace("megatron.core.transformer.module.MegatronModule.set_is_first_microbatch", _first_micro_batch)
    _announce()


def change_training(chunks: Sequence[torch.nn.Module], change: Change) -> None:
    """Changes the arguments of schedules that compute gradients; forward-only schedules keep theirs.

    Displaces ``forward_backward_*``, as :func:`announce_schedules` does.

    Args:
        chunks: the chunks of the model that is trained, whether or not they will be wrapped later.
        change: a function that gets the schedule's arguments by name, without ``model``, and returns those to use; it
            is called on each rank before the schedule starts.
    """
    for chunk in chunks:
        setattr(chunk, _CHANGE, change)
    _announce()


def _announce() -> None:
    for kind in ("no_pipelining", "pipelining_without_interleaving", "pipelining_with_interleaving"):
        replace(f"megatron.core.pipeline_parallel.schedules.forward_backward_{kind}", _forward_backward)


def announced(schedule: Callable) -> Callable:
    """Returns a schedule that calls the listeners of :func:`announce_schedules`: itself if it already does."""
    return schedule if hasattr(schedule, ORIGINAL) else around(_forward_backward)(schedule)


def _tell(moment: str, subject: Any) -> None:
    for listener in _listeners[moment]:
        listener(subject)


def _first_micro_batch(original: Callable, chunk: torch.nn.Module) -> None:
    _tell("first", chunk)
    original(chunk)


def _forward_backward(original: Callable, *args, model: torch.nn.Module | list[torch.nn.Module], **kwargs) -> Any:
    chunks = model if isinstance(model, list) else [model]
    if not kwargs.get("forward_only", False):
        kwargs = _change_of(chunks[0])(kwargs)
    _tell("start", chunks)
    try:
        result = original(*args, model=model, **kwargs)
    finally:
        _tell("end", chunks)
    if not kwargs.get("forward_only", False):
        _tell("trained", chunks)
    return result


def _change_of(chunk: torch.nn.Module) -> Change:
    """Returns the change that was registered for a chunk, looked up through its wrappers; by default none."""
    seen: torch.nn.Module | None = chunk
    while seen is not None and _CHANGE not in seen.__dict__:
        seen = getattr(seen, "module", None)
    return (lambda arguments: arguments) if seen is None else seen.__dict__[_CHANGE]

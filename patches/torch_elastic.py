# SPDX-License-Identifier: Apache-2.0
"""Patches of torch's elastic agent, the process of ``torchrun``."""

import functools
import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

from torch.distributed.elastic.multiprocessing.api import SignalException

from . import REQUESTS_TO_STOP, end_with_parent, replace

_PROCESSES = "torch.distributed.elastic.multiprocessing"


class _Asked:
    """State of this process's agent: the signal that asked it to stop, and the context of its workers."""

    number: int | None = None
    context: Any = None


def bind_workers() -> None:
    """Lets workers die with their agent, even if it is killed (by SIGKILL, or because memory ran out).

    Displaces ``Popen`` in ``torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler``, with
    which the agent starts its workers. Otherwise they would go on training and hold the lock of ``--save``, so that the
    job that is started to replace theirs could not run.
    """
    # The agent sets this up, because a worker may be any script.
    bound = functools.partial(end_with_parent, os.getpid())
    replace(
        f"{_PROCESSES}.subprocess_handler.subprocess_handler.Popen",
        lambda original, *args, **kwargs: original(*args, preexec_fn=bound, **kwargs),
    )


def pass_signals_on() -> None:
    """Lets an agent pass a request to stop on to its workers, and wait until they have saved and ended by themselves.

    Displaces ``start`` and ``close`` of ``torch.distributed.elastic.multiprocessing.api.PContext`` and
    ``_restart_workers`` of ``torch.distributed.elastic.agent.server.api.SimpleElasticAgent``. The original agent dies
    of SIGUSR1. On SIGTERM it kills its workers, and all their helpers that write checkpoints, after 30 seconds, which
    is less than a step and a save of a large model take. It ends with a traceback and status 1 even if they end well.

    With this patch, SIGTERM and SIGUSR1 reach the workers (only them, and as SIGTERM, which every training loop knows),
    the agent waits for their end as in any other run, and no worker is restarted once the job was asked to stop. The
    scheduler decides how long that may take, by sending SIGKILL in the end.

    If the agent itself ends workers, one of them has failed, and the others can no longer save. They would take SIGTERM
    for a request to save, and therefore get SIGKILL instead.
    """
    replace(f"{_PROCESSES}.api.PContext.start", _start)
    replace(f"{_PROCESSES}.api.PContext.close", _close)
    replace("torch.distributed.elastic.agent.server.api.SimpleElasticAgent._restart_workers", _restart_workers)


def _start(original: Callable, self: Any) -> None:
    original(self)
    _Asked.context = self
    for number in REQUESTS_TO_STOP:
        signal.signal(number, _pass_on)


def _pass_on(number: int, frame: FrameType | None) -> None:
    _Asked.number = number
    processes = [handler.proc for handler in getattr(_Asked.context, "subprocess_handlers", {}).values()]
    workers = [process for process in processes if process.poll() is None]
    if not workers:
        raise _stopped(number)
    for worker in workers:
        worker.send_signal(signal.SIGTERM)


def _stopped(number: int) -> SignalException:
    name = signal.Signals(number)
    return SignalException(f"{name.name} arrived", sigval=name)


def _close(original: Callable, self: Any, death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
    original(self, signal.SIGKILL if death_sig in (None, signal.SIGTERM) else death_sig, timeout)


def _restart_workers(original: Callable, *args) -> None:
    if _Asked.number is not None:
        raise _stopped(_Asked.number)
    original(*args)

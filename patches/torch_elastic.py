# SPDX-License-Identifier: Apache-2.0
"""Patches of torch's elastic agent, the process behind ``torchrun``."""

import functools
import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

from . import end_with_parent, replace

_PASSED_ON = (signal.SIGTERM, signal.SIGUSR1)


class _Asked:
    """What the agent of this process was asked to do, and the processes that it looks after."""

    number: int | None = None
    context: Any = None


def bind_workers() -> None:
    """Lets workers die with their agent, also where that one is killed (by SIGKILL, or for its memory).

    Displaces ``Popen`` in ``torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler``, with
    which the agent starts its workers. They would train on, hold the lock of ``--save``, and so keep out the job that
    is started in the place of theirs.
    """
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    def bound(original: Callable) -> Callable:
        # Not in the worker itself: that may be any script.
        return functools.partial(original, preexec_fn=functools.partial(end_with_parent, os.getpid()))

    replace(subprocess_handler, "Popen", bound)


def pass_signals_on() -> None:
    """Lets an agent that is asked to stop ask its workers, and wait until they have saved and ended by themselves.

    Displaces ``start`` and ``close`` of ``torch.distributed.elastic.multiprocessing.api.PContext`` and
    ``_restart_workers`` of ``torch.distributed.elastic.agent.server.api.SimpleElasticAgent``. The original agent dies
    of SIGUSR1, and on SIGTERM kills its workers, with all helpers of theirs that write checkpoints, after 30 seconds:
    less than a step and a save of a large model take. It ends with a traceback and status 1 where they end well.

    Here SIGTERM and SIGUSR1 reach the workers (alone, and as SIGTERM, which every training loop knows), their end is
    waited for as in any other run, and none is started again once the job was asked to stop. How long that may last is
    for the scheduler to say, which sends SIGKILL at last.

    Where the agent itself ends workers, one of them has failed and the others cannot save any more: they take SIGTERM
    for a request to do so, and get SIGKILL instead.
    """
    from torch.distributed.elastic.agent.server.api import SimpleElasticAgent
    from torch.distributed.elastic.multiprocessing.api import PContext, SignalException

    def stopped(number: int) -> SignalException:
        name = signal.Signals(number)
        return SignalException(f"{name.name} arrived", sigval=name)

    def pass_on(number: int, frame: FrameType | None) -> None:
        _Asked.number = number
        workers = _workers_alive()
        if not workers:
            raise stopped(number)
        for worker in workers:
            worker.send_signal(signal.SIGTERM)

    def listening(original: Callable) -> Callable:
        @functools.wraps(original)
        def start(self: PContext) -> None:
            original(self)
            _Asked.context = self
            for number in _PASSED_ON:
                signal.signal(number, pass_on)

        return start

    def killing(original: Callable) -> Callable:
        @functools.wraps(original)
        def close(self: PContext, death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
            original(self, signal.SIGKILL if death_sig in (None, signal.SIGTERM) else death_sig, timeout)

        return close

    def unless_asked(original: Callable) -> Callable:
        @functools.wraps(original)
        def _restart_workers(self: SimpleElasticAgent, *args) -> None:
            if _Asked.number is not None:
                raise stopped(_Asked.number)
            original(self, *args)

        return _restart_workers

    replace(PContext, "start", listening)
    replace(PContext, "close", killing)
    replace(SimpleElasticAgent, "_restart_workers", unless_asked)


def _workers_alive() -> list[Any]:
    handlers = getattr(_Asked.context, "subprocess_handlers", {})
    return [handler.proc for handler in handlers.values() if handler.proc.poll() is None]

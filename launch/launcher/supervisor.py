# SPDX-License-Identifier: Apache-2.0
"""Commands that run as children of this process, and the signals that are passed on to them."""

import contextlib
import functools
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import IO, Any

from ...patches import REQUESTS_TO_STOP, end_with_parent

_PATIENCE_SECONDS = 0.25


class Supervisor:
    """Runs commands as children that receive this process's requests to stop (SIGTERM, SIGUSR1) and die with it.

    Use it as a context manager. On exit, remaining children are killed and the previous signal handlers restored.

    Args:
        interactive: whether Ctrl-C, too, asks the children to stop, as SIGTERM; a second one interrupts this process.

    Attributes:
        asked: whether this process was asked to stop.
    """

    def __init__(self, interactive: bool = False) -> None:
        self.asked = False
        self._requests = (*REQUESTS_TO_STOP, *([signal.SIGINT] if interactive else []))
        self._children: list[subprocess.Popen] = []

    def __enter__(self) -> "Supervisor":
        self._before = {number: signal.signal(number, self._pass_on) for number in self._requests}
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            # Ctrl-C has also reached the children in our session: give them time to end by themselves.
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_PATIENCE_SECONDS)
            child.kill()
            child.wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def start(
        self, command: Sequence[str], variables: Mapping[str, str], output: IO[Any] | None = None
    ) -> subprocess.Popen:
        """Starts a command with the given environment variables.

        A command with an ``output`` of its own also gets a session of its own: Ctrl-C reaches it only through us.
        """
        bound = functools.partial(end_with_parent, os.getpid())
        child = subprocess.Popen(
            command,
            env=dict(variables),
            preexec_fn=bound,
            stdin=None if output is None else subprocess.DEVNULL,
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
            start_new_session=output is not None,
        )
        self._children = [*(other for other in self._children if other.returncode is None), child]
        if self.asked:
            # The request came while the child was being started.
            child.terminate()
        return child

    def run(self, command: Sequence[str], variables: Mapping[str, str]) -> int:
        """Starts a command as :meth:`start` does, waits for it, and returns its exit status, negative for a signal."""
        return self.start(command, variables).wait()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.asked:
            raise KeyboardInterrupt
        self.asked = True
        for child in self._children:
            child.send_signal(signal.SIGTERM if number == signal.SIGINT else number)

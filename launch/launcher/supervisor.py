# SPDX-License-Identifier: Apache-2.0
"""Commands that run as children of this process, and who asks them to stop."""

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
    """Runs commands as children, which get what this process is asked (SIGTERM, SIGUSR1), and die with it.

    Used as a context; the handlers of signals are what they were afterwards, and no child is left.

    Args:
        interactive: whether Ctrl-C asks the children to stop, too, as SIGTERM; a second one interrupts this process.

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
            # Ctrl-C has reached those of our session, too.
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_PATIENCE_SECONDS)
            child.kill()
            child.wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def start(
        self, command: Sequence[str], variables: Mapping[str, str], output: IO[Any] | None = None
    ) -> subprocess.Popen:
        """Starts a command with these variables for its environment.

        One that prints into an `output` of its own has a session of its own, too: Ctrl-C reaches it through us alone.
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
            # That came while the child was being started.
            child.terminate()
        return child

    def run(self, command: Sequence[str], variables: Mapping[str, str]) -> int:
        """Runs a command to its end, as :meth:`start` does; its exit status, negative for a signal."""
        return self.start(command, variables).wait()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.asked:
            raise KeyboardInterrupt
        self.asked = True
        for child in self._children:
            child.send_signal(signal.SIGTERM if number == signal.SIGINT else number)

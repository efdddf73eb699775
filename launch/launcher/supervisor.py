# SPDX-License-Identifier: Apache-2.0
"""The agents of a job that trains in stages, one after the other, and who asks them to stop."""

import functools
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from types import FrameType

from ...patches import REQUESTS_TO_STOP, end_with_parent


class Supervisor:
    """Runs commands as children, which get what this process is asked (SIGTERM, SIGUSR1), and die with it.

    Used as a context; the handlers of signals are what they were afterwards.

    Attributes:
        asked: whether this process was asked to stop.
    """

    def __init__(self) -> None:
        self.asked = False
        self._child: subprocess.Popen | None = None

    def __enter__(self) -> "Supervisor":
        self._before = {number: signal.signal(number, self._pass_on) for number in REQUESTS_TO_STOP}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self, command: Sequence[str], variables: Mapping[str, str]) -> int:
        """Runs a command with these variables for its environment; its exit status, negative for a signal."""
        bound = functools.partial(end_with_parent, os.getpid())
        with subprocess.Popen(command, env=dict(variables), preexec_fn=bound) as self._child:
            if self.asked:
                # That came while the child was being started.
                self._child.terminate()
            status = self._child.wait()
        self._child = None
        return status

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if self._child is not None:
            self._child.send_signal(number)

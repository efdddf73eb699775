# SPDX-License-Identifier: Apache-2.0
"""``--exit-signal-handler``: a job that is asked to stop saves at the end of the step and leaves."""

import signal
from types import FrameType, TracebackType
from typing import Any

# SIGTERM is how schedulers preempt and end a job; SIGUSR1 what people have SLURM send before (--signal=USR1@600).
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class ExitSignals:
    """Remembers, while its block runs, that this process was asked to stop.

    Args:
        enabled: whether signals are handled at all.

    Attributes:
        received: whether one has reached this process.
        agreed: whether one has reached any process of the job, as all of them learned in the same step.
    """

    def __init__(self, enabled: bool = False) -> None:
        self._enabled = enabled
        self._before: dict[signal.Signals, Any] = {}
        self.received = False
        self.agreed = False

    def __enter__(self) -> "ExitSignals":
        if self._enabled:
            self._before = {name: signal.signal(name, self._remember) for name in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = True

# SPDX-License-Identifier: Apache-2.0
"""``torchrun`` for jobs that save when they are asked to stop: ``launch/agent.py`` takes the arguments of ``torchrun``.

SIGTERM and SIGUSR1 are passed on to the training processes, and the agent waits for their end, however long they save.
If the agent itself is killed, they end with it (``patches/torch_elastic.py``). ``launch/run.py`` starts every job
through this script.

Exit status: 0 if all training processes end well, else that of the process that failed first (1 if a signal ended it).
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    # In a bare checkout the package is not installed, and its parent directory must be on the path.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from bitcpm_megatron import cli
from bitcpm_megatron.patches import torch_elastic


def main(argv: list[str] | None = None) -> int:
    """Runs the agent of this node; returns the exit status."""
    torch_elastic.bind_workers()
    torch_elastic.pass_signals_on()
    return cli.run(lambda: _run(argv))


def _run(argv: list[str] | None) -> int:
    try:
        torchrun.main(argv)
    except ChildFailedError as error:
        # The process itself has already reported what was wrong.
        _, failure = error.get_first_failure()
        how = f"with status {failure.exitcode}" if failure.exitcode >= 0 else f"by {failure.signal_name()}"
        cli.complain(f"the process of local rank {failure.local_rank} ended {how}")
        return failure.exitcode if failure.exitcode > 0 else cli.FAILED
    except SignalException as error:
        raise cli.FailedError(f"{error}, and no process that could have saved was running any more") from None
    return cli.DONE


if __name__ == "__main__":
    sys.exit(main())

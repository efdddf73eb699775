# SPDX-License-Identifier: Apache-2.0
"""``torchrun`` for jobs that save when they are asked to stop: ``launch/agent.py`` takes its arguments.

SIGTERM and SIGUSR1 are passed on to the training processes, and their end is waited for, however long they save; where
this process is killed they end with it (``patches/torch_elastic.py``). Exit status: that of the process that failed
first, 0 where all end well.
``launch/run.py`` starts every job through this.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    # From a bare checkout the package stands two levels up.
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
        # What was wrong that process has said itself.
        _, failure = error.get_first_failure()
        how = f"with status {failure.exitcode}" if failure.exitcode >= 0 else f"by {failure.signal_name()}"
        cli.complain(f"the process of local rank {failure.local_rank} ended {how}")
        return failure.exitcode if failure.exitcode > 0 else cli.FAILED
    except SignalException as error:
        raise cli.FailedError(f"{error}, and no process that could have saved was running any more") from None
    return cli.DONE


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""Start of a distributed job on this machine, and its output."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_AGENT = Path(__file__).resolve().parents[2] / "launch" / "agent.py"


def command(processes: int, script: Path, arguments: Sequence[str]) -> list[str]:
    """Returns the command of a job, started by an agent that reports a failure in one line, not in a traceback."""
    torchrun = [sys.executable, str(_AGENT), "--standalone", "--nproc_per_node", str(processes)]
    return [*torchrun, str(script), *arguments]


def run(
    processes: int,
    script: Path,
    arguments: Sequence[str],
    variables: Mapping[str, str],
    on_line: Callable[[str], None] = lambda line: None,
) -> subprocess.CompletedProcess[str]:
    """Runs a job and returns its status and output; the stdout of the result contains stderr, too.

    Args:
        processes: the number of processes, one per device; on a CPU they share the cores.
        script: the script that each process runs.
        arguments: the arguments of the script.
        variables: environment variables of the job. Variables of the user's environment override these and the
            defaults.
        on_line: a function that is called with every line when it is printed.
    """
    defaults = {
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // processes)),
        # megatron-core's overlap of communication and GEMMs depends on it.
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    started, environment = command(processes, script, arguments), {**defaults, **variables, **os.environ}
    lines = []
    with subprocess.Popen(
        started, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
    ) as process:
        for line in process.stdout:
            lines.append(line)
            on_line(line)
    return subprocess.CompletedProcess(started, process.returncode, "".join(lines))

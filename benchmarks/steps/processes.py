# SPDX-License-Identifier: Apache-2.0
"""Starts a distributed job on this machine and waits for it."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_AGENT = Path(__file__).resolve().parents[2] / "launch" / "agent.py"


def command(processes: int, script: Path, arguments: Sequence[str]) -> list[str]:
    """The command of a job, by the agent that tells a failure in one line where torchrun prints a traceback."""
    torchrun = [sys.executable, str(_AGENT), "--standalone", "--nproc_per_node", str(processes)]
    return [*torchrun, str(script), *arguments]


def run(
    processes: int,
    script: Path,
    arguments: Sequence[str],
    variables: Mapping[str, str],
    on_line: Callable[[str], None] = lambda line: None,
) -> subprocess.CompletedProcess[str]:
    """Runs a job; its stdout holds stderr, too.

    Args:
        processes: one per device; on a CPU they share the cores.
        script: that each process runs.
        arguments: of the script.
        variables: of the environment. What the user exported stands, here and in the defaults.
        on_line: called with every line, when it is printed.
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

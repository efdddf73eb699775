# SPDX-License-Identifier: Apache-2.0
"""Starts real ``torchrun`` processes over gloo and collects what they report."""

import contextlib
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

CHECKOUT = Path(__file__).resolve().parents[2]
WORKERS = CHECKOUT / "tests" / "distributed" / "workers"


@functools.cache
def environment() -> dict[str, str]:
    """For processes under test: one thread each, unless the environment says otherwise; a megatron-core that PYTHONPATH
    puts in front stays in front."""
    paths = [p for p in (os.environ.get("PYTHONPATH"), str(CHECKOUT), str(CHECKOUT / "tests")) if p]
    return {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "PYTHONFAULTHANDLER": "1",
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONWARNINGS": "ignore",
    }


def torchrun(worker: str, processes: int, directory: Path, *arguments: str, timeout: int = 900) -> list[Any]:
    """Runs ``workers/<worker>.py DIRECTORY ARGUMENTS`` on some processes.

    Each process writes ``rank<N>.json`` into the directory.

    Returns:
        What they wrote, by rank.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    agent = subprocess.Popen(
        [*command, str(WORKERS / f"{worker}.py"), str(directory), *arguments],
        env=environment(),
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    family = [psutil.Process(agent.pid)]
    try:
        said = agent.communicate(timeout=timeout)[0]
    except BaseException:
        # Ranks outlive an agent that is killed, and those that wait for each other keep the cores busy.
        family += family[0].children(recursive=True)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        agent.wait()
        raise
    assert agent.returncode == 0, f"{worker} failed with {agent.returncode}:\n{said[-8000:]}"
    return [json.loads((directory / f"rank{r}.json").read_text(encoding="utf-8")) for r in range(processes)]

# SPDX-License-Identifier: Apache-2.0
"""Starts real ``torchrun`` processes over gloo and collects what they report."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
WORKERS = Path(__file__).parent / "workers"


@functools.cache
def environment() -> dict[str, str]:
    """For processes under test: one thread each, unless the environment says otherwise; a megatron-core that PYTHONPATH
    puts in front stays in front."""
    paths = [p for p in (os.environ.get("PYTHONPATH"), str(CHECKOUT)) if p]
    return {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "PYTHONFAULTHANDLER": "1",
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONWARNINGS": "ignore",
    }


def torchrun(worker: str, processes: int, directory: Path, *arguments: str, timeout: int = 300) -> list[Any]:
    """Runs ``workers/<worker>.py DIRECTORY ARGUMENTS`` on some processes.

    Each process writes ``rank<N>.json`` into the directory.

    Returns:
        What they wrote, by rank.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [*command, str(WORKERS / f"{worker}.py"), str(directory), *arguments],
        env=environment(),
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{worker} failed with {done.returncode}:\n{done.stdout[-8000:]}"
    return [json.loads((directory / f"rank{r}.json").read_text(encoding="utf-8")) for r in range(processes)]

# SPDX-License-Identifier: Apache-2.0
"""Launches of real ``torchrun`` processes over gloo, and their reports."""

import contextlib
import functools
import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

CHECKOUT = Path(__file__).resolve().parents[2]
WORKERS = CHECKOUT / "tests" / "distributed" / "workers"


@functools.cache
def environment() -> dict[str, str]:
    """Returns the environment of processes under test: one thread each, unless ``OMP_NUM_THREADS`` is set.

    A megatron-core that PYTHONPATH puts in front stays in front.
    """
    ours = (str(CHECKOUT / folder) for folder in ("", "tests", "benchmarks"))
    paths = [p for p in (os.environ.get("PYTHONPATH"), *ours) if p]
    return {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "PYTHONFAULTHANDLER": "1",
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONWARNINGS": "ignore",
    }


_given_ports: set[int] = set()


def free_port() -> int:
    """Returns a port on which nobody listens, outside the range that outgoing connections are given.

    Otherwise a connection of another test could take the port before the process under test listens on it.
    """
    while True:
        port = random.SystemRandom().randrange(15000, 30000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            if port not in _given_ports:
                _given_ports.add(port)
                return port


class Ranks:
    """Processes under one ``torchrun`` that run one batch after another, since imports take longer than most batches.

    They start with the first batch, and restart after one that has failed. Global state that a worker changes stays
    changed. The processes run ``workers/serve.py``.

    Args:
        count: the number of processes.
        directory: an empty directory for their orders and their output.
    """

    def __init__(self, count: int, directory: Path) -> None:
        self.count = count
        self._directory = directory
        self._agent: subprocess.Popen | None = None
        self._starts = 0

    def run(self, worker: str, directory: Path, timeout: float = 900) -> list[Any]:
        """Runs ``workers/<worker>.py`` for a directory, into which each rank writes ``rank<N>.json``.

        Returns:
            The contents of these files, by rank.

        Raises:
            AssertionError: if a rank has ended; the message has the end of the output.
            TimeoutError: if the ranks take longer than ``timeout`` seconds; the message has the end of the output.
        """
        if self._agent is None:
            self._start()
        heard = self._output.stat().st_size
        ready = [self._orders / f"{self._number}.rank{rank}" for rank in range(self.count)]
        self._order({"worker": worker, "directory": str(directory), "port": free_port()})
        deadline = time.monotonic() + timeout
        try:
            while not all(path.exists() for path in ready):
                if self._agent.poll() is not None:
                    raise AssertionError(f"{worker} failed on {self.count} ranks:\n{self._said(heard)}")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{worker} takes {timeout} s on {self.count} ranks:\n{self._said(heard)}")
                time.sleep(0.02)
        except BaseException:
            self.kill()
            raise
        return [json.loads((directory / f"rank{r}.json").read_text(encoding="utf-8")) for r in range(self.count)]

    def close(self) -> None:
        """Ends the processes."""
        if self._agent is not None:
            self._order({})
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._agent.wait(60)
            self.kill()

    def kill(self) -> None:
        """Ends the processes at once, if there are any."""
        if self._agent is not None:
            # Ranks survive the kill of their agent, and ranks that wait for each other keep the cores busy.
            with contextlib.suppress(psutil.NoSuchProcess):
                agent = psutil.Process(self._agent.pid)
                for process in [agent, *agent.children(recursive=True)]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
            self._agent.wait()
            self._agent = None

    def _start(self) -> None:
        self._starts += 1
        self._orders = self._directory / f"orders{self._starts}"
        self._orders.mkdir()
        self._output = self._orders / "output.txt"
        self._number = 0
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(self.count)]
        command += [str(WORKERS / "serve.py"), str(self._orders), str(os.getpid())]
        with self._output.open("w") as output:
            self._agent = subprocess.Popen(
                command, env=environment(), cwd=CHECKOUT, stdout=output, stderr=subprocess.STDOUT
            )

    def _said(self, heard: int) -> str:
        """Returns the end of the output after its first ``heard`` bytes."""
        return self._output.read_bytes()[heard:].decode(errors="replace")[-8000:]

    def _order(self, batch: dict) -> None:
        """Hands a batch over to the ranks, atomically by renaming a file."""
        hidden = self._orders / "next"
        hidden.write_text(json.dumps(batch))
        hidden.rename(self._orders / f"{self._number}.json")
        self._number += 1

# SPDX-License-Identifier: Apache-2.0
"""Carries runs out, several at a time, each a process of ``launch/pretrain.py`` or a launch of several."""

import os
import re
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from tqdm import tqdm

from ..launcher import environment
from ..launcher.job import Job
from ..launcher.network import choose_interface
from ..launcher.scheduler import Placement
from ..launcher.supervisor import Supervisor
from ..launcher.torchrun import environment as child_environment
from ..launcher.torchrun import host_argv, is_finished, torchrun
from .runs import FAILED, FINISHED, Run

_SECONDS = 0.2  # between two looks at the processes
_LOOKS = 10  # of them between two at what they have logged
_MOST_OUTPUT = 65536  # bytes of a run's output in which its error is looked for
_MOST_WORDS = 300  # of a reason
_OUTPUT = "output.txt"
# How others end a process; a fault of its own is none of these.
_KILLS = ("SIGHUP", "SIGINT", "SIGKILL", "SIGTERM", "SIGUSR1")
# What launch/agent.py says of the process that has failed, after it has spoken itself.
_AGENT = re.compile(r"the process of local rank \d+ ended (?:by (SIG\w+)|with status \d+)")
# Where this command itself is a process of a job, its runs are none.
_OF_A_RANK = frozenset("RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR MASTER_PORT".split())


def variables_of(job: Job) -> dict[str, str]:
    """The environment of a job's runs: that of this process, with the profile's variables.

    Raises:
        JobError, NetworkError: there is no such profile, or this machine lacks the job's network.
    """
    interface = choose_interface(job.cluster)
    profile = environment.read_profile(job.cluster.profile)
    settings = environment.resolve(profile, job.cluster, os.environ, interface)
    found = child_environment(os.environ, {s.name: s.value for s in settings})
    return {name: value for name, value in found.items() if name not in _OF_A_RANK}


def command(job: Job) -> list[str]:
    """The command of a run, which goes on where it was stopped; several processes meet at a port that is free."""
    cluster = job.cluster
    if cluster.devices_per_node == 1 and cluster.bind_cores == "none":
        return [sys.executable, *host_argv(job)]
    place = Placement("sweep", 1, 0, cluster.devices_per_node, "127.0.0.1", 0)
    return torchrun(replace(job, cluster=cluster.model_copy(update={"rendezvous": "c10d"})), place, "127.0.0.1")


class Attempt:
    """A run as a process.

    Args:
        run: to begin, or to go on with.
        supervisor: that looks after the process.
        variables: of its environment.
    """

    def __init__(self, run: Run, supervisor: Supervisor, variables: Mapping[str, str]) -> None:
        self.run = run
        run.forget_outcome()
        run.directory.mkdir(parents=True, exist_ok=True)
        self._output = run.directory / _OUTPUT
        with self._output.open("ab") as output:
            self._began = output.tell()
            self._process = supervisor.start(command(run.job), variables, output)

    def ended(self, asked: bool) -> str | None:
        """What became of it, in words, once it has ended; its run then knows, too. None while it goes on.

        A run that others ended, or asked to stop, has not failed: the next attempt goes on from what it has saved.

        Args:
            asked: whether it was asked to stop by us.
        """
        status = self._process.poll()
        if status is None:
            return None
        reason, killed = failure(status, self._said())
        if status == 0 and self.run.log_is_whole():
            self.run.end(FINISHED)
            return "finished"
        if status == 0 and is_finished(self.run.job):
            reason = "its last checkpoint is there, and metrics.jsonl lacks records: delete its directory"
        elif status == 0 or killed or asked:
            return f"not finished: {killed or 'it was asked to stop'}"
        self.run.end(FAILED, reason)
        return f"failed: {reason}"

    def _said(self) -> str:
        """The end of what this attempt has printed."""
        with self._output.open("rb") as output:
            size = output.seek(0, os.SEEK_END)
            output.seek(max(self._began, size - _MOST_OUTPUT))
            return output.read().decode(errors="replace")


def failure(status: int, said: str) -> tuple[str, str]:
    """Why a process ended with a status other than 0, in a line, and by which signal of others, if by one.

    Args:
        status: of its exit, negative for a signal.
        said: the end of its output.
    """
    said = said.replace("\r", "\n")  # of a progress bar
    errors = [" ".join(found.split()) for found in re.findall(r"(?m)^error: (.*(?:\n[ \t]+\S.*)*)", said)]
    of_agent = [found for error in errors if (found := _AGENT.fullmatch(error))]
    number = signal.Signals(-status).name if status < 0 else next((found[1] for found in of_agent if found[1]), None)
    if number is not None:
        return f"ended by {number}", number if number in _KILLS else ""
    causes = [error for error in errors if not _AGENT.fullmatch(error)]
    # A fault of the program has a traceback, which ends with its words.
    lines = [line for line in said.splitlines() if line.strip() and not line.startswith("error: ")]
    return (causes or lines or [f"exit status {status}"])[-1].strip()[:_MOST_WORDS], ""


def carry_out(
    runs: Sequence[Run], variables: Mapping[str, str], at_once: int, last_records: int, ended: Callable[[], None]
) -> bool:
    """Carries runs out in their order, with a progress bar over their steps; returns whether it was asked to stop.

    Args:
        runs: those that have not ended.
        variables: of their environment.
        at_once: how many go on at the same time.
        last_records: see :meth:`Run.result`.
        ended: is called when a run has ended, well or not.
    """
    waiting, active, look = deque(runs), list[Attempt](), 0
    steps = {run.name: run.result(last_records).steps for run in runs}
    with (
        Supervisor(interactive=True) as supervisor,
        tqdm(total=sum(run.iterations for run in runs), initial=sum(steps.values()), unit="step") as bar,
    ):
        while True:
            while waiting and len(active) < at_once and not supervisor.asked:
                run = waiting.popleft()
                bar.write(f"{run.title}: {'goes on' if steps[run.name] else 'begins'} in {run.directory}")
                active.append(Attempt(run, supervisor, variables))
            if not active:
                return supervisor.asked
            time.sleep(_SECONDS)
            look += 1
            for attempt in list(active):
                words = attempt.ended(supervisor.asked)
                if words is not None:
                    active.remove(attempt)
                    bar.write(f"{attempt.run.title}: {words}")
                    ended()
                if words is not None or look % _LOOKS == 0:
                    steps[attempt.run.name] = attempt.run.result(last_records).steps
            if look % _LOOKS == 0:
                # A run that goes on from a checkpoint takes back what it had logged behind it.
                bar.update(sum(steps.values()) - bar.n)

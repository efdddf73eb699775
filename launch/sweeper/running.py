# SPDX-License-Identifier: Apache-2.0
"""Execution of runs, several at a time, each as a process of ``launch/pretrain.py`` or a launch of several."""

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

_SECONDS = 0.2  # time between two looks at the processes
_LOOKS = 10  # number of these looks between two looks at the logs
_MOST_OUTPUT = 65536  # bytes at the end of a run's output in which its error is searched
_MOST_WORDS = 300  # characters of a reason
_OUTPUT = "output.txt"
# Signals by which others end a process; a fault of the process itself causes none of them.
_KILLS = ("SIGHUP", "SIGINT", "SIGKILL", "SIGTERM", "SIGUSR1")
# The message of launch/agent.py about a failed process, after that process's own message.
_AGENT = re.compile(r"the process of local rank \d+ ended (?:by (SIG\w+)|with status \d+)")
# Variables that are removed, because runs are not processes of the job to which this command itself may belong.
_OF_A_RANK = frozenset("RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR MASTER_PORT".split())


def variables_of(job: Job) -> dict[str, str]:
    """Returns the environment of a job's runs: that of this process, with the variables of the profile.

    Raises:
        JobError, NetworkError: if there is no such profile, or this machine lacks the job's network.
    """
    interface = choose_interface(job.cluster)
    profile = environment.read_profile(job.cluster.profile)
    settings = environment.resolve(profile, job.cluster, os.environ, interface)
    found = child_environment(os.environ, {s.name: s.value for s in settings})
    return {name: value for name, value in found.items() if name not in _OF_A_RANK}


def command(job: Job) -> list[str]:
    """Returns the command that starts or resumes a run; if it has several processes, they meet at a free port."""
    cluster = job.cluster
    if cluster.devices_per_node == 1 and cluster.bind_cores == "none":
        return [sys.executable, *host_argv(job)]
    place = Placement("sweep", 1, 0, cluster.devices_per_node, "127.0.0.1", 0)
    return torchrun(replace(job, cluster=cluster.model_copy(update={"rendezvous": "c10d"})), place, "127.0.0.1")


class Attempt:
    """An attempt at a run: its process.

    Args:
        run: the run to begin or to resume.
        supervisor: the supervisor of the process.
        variables: the environment variables of the process.
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
        """Returns the outcome in words after the process has ended, and records it; None while it is running.

        A run that others ended or asked to stop has not failed: the next attempt resumes from what it has saved.

        Args:
            asked: whether we have asked it to stop.
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
        """Returns the end of what this attempt has printed."""
        with self._output.open("rb") as output:
            size = output.seek(0, os.SEEK_END)
            output.seek(max(self._began, size - _MOST_OUTPUT))
            return output.read().decode(errors="replace")


def failure(status: int, said: str) -> tuple[str, str]:
    """Returns in one line why a process failed, and the signal by which others ended it (empty if they did not).

    Args:
        status: the exit status, not 0; negative for a signal.
        said: the end of the output.
    """
    said = said.replace("\r", "\n")  # progress bars print carriage returns
    errors = [" ".join(found.split()) for found in re.findall(r"(?m)^error: (.*(?:\n[ \t]+\S.*)*)", said)]
    of_agent = [found for error in errors if (found := _AGENT.fullmatch(error))]
    number = signal.Signals(-status).name if status < 0 else next((found[1] for found in of_agent if found[1]), None)
    if number is not None:
        return f"ended by {number}", number if number in _KILLS else ""
    causes = [error for error in errors if not _AGENT.fullmatch(error)]
    # A fault of the program has a traceback, whose last line is the message.
    lines = [line for line in said.splitlines() if line.strip() and not line.startswith("error: ")]
    return (causes or lines or [f"exit status {status}"])[-1].strip()[:_MOST_WORDS], ""


def carry_out(
    runs: Sequence[Run], variables: Mapping[str, str], at_once: int, last_records: int, ended: Callable[[], None]
) -> bool:
    """Executes runs in their order, with a progress bar over their steps; returns whether it was asked to stop.

    Args:
        runs: the runs that have not ended.
        variables: the environment variables of the runs.
        at_once: the number of runs at the same time.
        last_records: the number of records over which the training loss is averaged (:meth:`Run.result`).
        ended: a function that is called whenever a run has ended, well or not.
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
                # The sum may fall: a run that resumes from a checkpoint removes what it had logged after it.
                bar.update(sum(steps.values()) - bar.n)

# SPDX-License-Identifier: Apache-2.0
"""Jobs that are asked to stop, jobs whose ranks are killed, and jobs that want the directory of another job."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from kills.processes import kill
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from support.launcher import CHECKOUT, WORKERS, environment, free_port
from support.small_model import losses

from bitcpm_megatron.checkpoints.directory import iterations, latest
from bitcpm_megatron.launch.launcher.job import read_job
from bitcpm_megatron.launch.launcher.scheduler import Placement
from bitcpm_megatron.launch.launcher.torchrun import torchrun

STEPS = 8
# torch's own agent kills its processes 30 seconds after it was asked to stop.
LONG = 31
JOB = """
description: two processes
model: {{preset: tiny-minicpm4, seq-length: 32, make-vocab-size-divisible-by: 64}}
parallelism: {{use-distributed-optimizer: true}}
training: {{micro-batch-size: 1, global-batch-size: 4, train-iters: {steps}, lr: 1.0e-2, bf16: true, seed: 7}}
data: {{mock-data: true, vocab-size: 300, eval-iters: 0, data-cache-path: {cache}}}
ternary: {{ternary: true}}
checkpoint: {{save: {directory}/save, {checkpoint}}}
logging: {{log-interval: 1, log-dir: {directory}/log}}
cluster: {{profile: cpu, devices-per-node: 2, master-port: 0}}
"""


class Job:
    """A job in a directory, started as ``launch/run.py`` starts it, in which chosen moments can take long."""

    def __init__(self, directory: Path, checkpoint: str = "save-interval: 100") -> None:
        self.directory = directory
        directory.mkdir(exist_ok=True)
        cache = directory.parent / "cache"
        path = directory / "job.yaml"
        text = JOB.format(directory=directory, steps=STEPS, checkpoint=checkpoint, cache=cache)
        path.write_text(text.replace("master-port: 0", "master-port: 29500"))
        command = torchrun(read_job(str(path)), Placement("test", 1, 0, 2, "127.0.0.1", free_port()))
        script = command.index(str(CHECKOUT / "launch" / "pretrain.py"))
        self.command = [*command[:script], str(WORKERS / "slow.py"), str(directory), *command[script + 1 :]]

    def start(self, **plan: dict[str, float | str]) -> subprocess.Popen:
        (self.directory / "plan.json").write_text(json.dumps(plan))
        (self.directory / "moments").write_text("")
        output = (self.directory / "output.txt").open("a")
        return subprocess.Popen(self.command, cwd=CHECKOUT, env=environment(), stdout=output, stderr=subprocess.STDOUT)

    def output(self) -> str:
        return (self.directory / "output.txt").read_text()

    def wait_for(self, moment: str, process: subprocess.Popen) -> None:
        """Waits until a moment has begun on every rank that has it."""
        ranks = 2 if moment.startswith("step") else 1
        deadline = time.monotonic() + 120
        while (self.directory / "moments").read_text().splitlines().count(moment) < ranks:
            assert time.monotonic() < deadline and process.poll() is None, self.output()[-8000:]
            time.sleep(0.05)


def test_a_job_that_is_asked_to_stop_saves_however_long_that_takes_and_goes_on_bit_identically(tmp_path: Path) -> None:
    stopped, whole = Job(tmp_path / "stopped"), Job(tmp_path / "whole")
    agent = stopped.start(step={"1": LONG}, save={"1": "go on"})
    others = []
    try:
        stopped.wait_for("step 1", agent)
        agent.send_signal(signal.SIGTERM)
        # While the job waits, two others run: an undisturbed one, and one that wants the same directory.
        others = [whole.start(), second_job(stopped)]
        assert others[0].wait(240) == 0, whole.output()[-8000:]
        said = others[1].communicate(timeout=240)[0]
        assert others[1].returncode == 2
        assert f"--save {stopped.directory}/save is being written by another job (" in said, said[-8000:]
        assert "Traceback" not in said, said[-8000:]
        stopped.wait_for("save 1", agent)
        assert iterations(stopped.directory / "save") == []
        # The save ends more than LONG seconds after the request, however slow this machine is.
        (stopped.directory / "go on").touch()
        assert agent.wait(240) == 0, stopped.output()[-8000:]
        assert latest(stopped.directory / "save").name == "iter_0000002"

        agent = stopped.start(step={"1": 1.0})
        stopped.wait_for("step 1", agent)
        agent.send_signal(signal.SIGUSR1)
        assert agent.wait(240) == 0, stopped.output()[-8000:]
        assert latest(stopped.directory / "save").name == "iter_0000004"
        agent = stopped.start()
        assert agent.wait(240) == 0, stopped.output()[-8000:]
    finally:
        for process in (agent, *others):
            if process.poll() is None:
                kill(process)
    assert stopped.output().count("asked to stop by SIGTERM or SIGUSR1: the same command goes on from here") == 2
    assert losses(stopped.directory / "log") == losses(whole.directory / "log")
    assert sorted(p.name for p in (stopped.directory / "save").iterdir() if p.name.startswith(".")) == []


def second_job(job: Job) -> subprocess.Popen:
    """Starts one process with the same ``--save``."""
    script = job.command.index(str(WORKERS / "slow.py"))
    command = [*job.command[:script], str(CHECKOUT / "launch" / "pretrain.py"), *job.command[script + 2 :]]
    command[command.index("--master_port") + 1] = str(free_port())
    del command[command.index("--log-dir") : command.index("--log-dir") + 2]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=CHECKOUT, env=environment(), **options)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills a process when its parent dies")
def test_what_writes_checkpoints_dies_with_its_rank(tmp_path: Path) -> None:
    job = Job(tmp_path / "killed", "save-interval: 1, async-save: true")
    agent = job.start(write={"1": 120}, step={"2": 120})
    try:
        job.wait_for("write 1", agent)
        job.wait_for("step 2", agent)
        ranks = psutil.Process(agent.pid).children()
        assert len(ranks) == 2
        # There is one process that carries results, and others that write; they start one after the other, and not
        # every rank has something to write. From megatron-core 0.17 on, one process writes, in threads.
        processes = 2 if hasattr(FileSystemWriterAsync, "write_preloaded_data_multithread") else 3
        deadline = time.monotonic() + 60
        while len(max((rank.children(recursive=True) for rank in ranks), key=len)) < processes:
            assert time.monotonic() < deadline, [rank.children(recursive=True) for rank in ranks]
            time.sleep(0.05)
        busy = max(ranks, key=lambda rank: len(rank.children(recursive=True)))
        family = psutil.Process(agent.pid).children(recursive=True)
        os.kill(busy.pid, signal.SIGKILL)
        assert agent.wait(60) == 1
        _, alive = psutil.wait_procs(family, timeout=10)
        assert [process.cmdline() for process in alive] == []
    finally:
        if agent.poll() is None:
            kill(agent)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills a process when its parent dies")
def test_workers_die_with_their_agent(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text("import sys, time\nopen(sys.argv[1], 'w').close()\ntime.sleep(120)\n")
    command = [sys.executable, "launch/agent.py", "--standalone", "--nproc_per_node", "1", str(script)]
    agent = subprocess.Popen([*command, str(tmp_path / "started")], cwd=CHECKOUT, env=environment())
    family: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "started").exists():
            assert time.monotonic() < deadline and agent.poll() is None
            time.sleep(0.05)
        family = psutil.Process(agent.pid).children(recursive=True)
        assert any(str(script) in process.cmdline() for process in family)
        agent.kill()
        _, alive = psutil.wait_procs(family, timeout=10)
        assert [process.cmdline() for process in alive] == []
    finally:
        for process in family:
            if process.is_running():
                process.kill()
        agent.kill()
        agent.wait()

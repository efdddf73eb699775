# SPDX-License-Identifier: Apache-2.0
"""Two nodes on one machine: ``torchrun`` agents at 127.0.0.1 and 127.0.0.2, one of which is killed and restarted."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from kills.processes import kill
from support.launcher import CHECKOUT, environment, free_port
from support.small_model import losses

from bitcpm_megatron.checkpoints.directory import latest
from bitcpm_megatron.launch.checks.subject import Subject
from bitcpm_megatron.launch.estimates.quantizer import expected_record
from bitcpm_megatron.launch.launcher.job import read_job
from bitcpm_megatron.quantization.record import QuantizerRecord
from bitcpm_megatron.training.metrics import METRICS

STEPS = 40
JOB = """
description: two nodes of one process
model: {{preset: tiny-minicpm4, seq-length: 32, make-vocab-size-divisible-by: 64}}
parallelism: {{use-distributed-optimizer: true}}
training: {{micro-batch-size: 1, global-batch-size: 4, train-iters: {steps}, lr: 1.0e-2, bf16: true, seed: 7}}
data: {{mock-data: true, vocab-size: 300, eval-iters: 0, data-cache-path: {directory}/cache}}
ternary: {{ternary: true}}
checkpoint: {{save: {directory}/{name}/save, save-interval: 10}}
logging: {{log-interval: 1, log-dir: {directory}/{name}/log}}
cluster: {{profile: cpu, nodes: {nodes}, devices-per-node: {devices}, master-port: {port}, {rest}}}
"""
ELASTIC = "hosts: [127.0.0.1, 127.0.0.2], rendezvous: c10d, max-restarts: 3, keep-alive-seconds: 6"


def write_job(directory: Path, name: str, nodes: int, rest: str) -> Path:
    """Writes a job file with a port that is free at the moment; returns its path."""
    path = directory / f"{name}.yaml"
    values = {
        "steps": STEPS,
        "directory": directory,
        "name": name,
        "nodes": nodes,
        "devices": 2 // nodes,
        "port": free_port(),
    }
    path.write_text(JOB.format(**values, rest=rest))
    return path


def start(job: Path, rank: int) -> subprocess.Popen:
    """Starts the job on one node, as a cluster manager does."""
    command = [sys.executable, "launch/run.py", str(job), "--node-rank", str(rank)]
    output = open(f"{job}.{rank}.txt", "a")  # noqa: SIM115 - the process keeps it
    return subprocess.Popen(command, cwd=CHECKOUT, env=environment(), stdout=output, stderr=subprocess.STDOUT)


def iterations(log: Path) -> list[int]:
    """Returns the iterations in a log that is being written."""
    text = (log / METRICS).read_text() if (log / METRICS).is_file() else ""
    return [json.loads(line)["iteration"] for line in text.splitlines(keepends=True) if line.endswith("\n")]


@pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is an address of Linux' loopback interface alone")
@pytest.mark.verifies(
    "training",
    "after one of two `torchrun` agents is killed and restarted, the job resumes from its checkpoint with the same "
    "losses",
)
def test_a_killed_agent_comes_back_and_the_job_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    whole = write_job(tmp_path, "whole", 1, "rendezvous: static")
    job = write_job(tmp_path, "killed", 2, ELASTIC)
    save, log = tmp_path / "killed" / "save", tmp_path / "killed" / "log"
    before = psutil.Process().children(recursive=True)  # ranks of other tests
    # The uninterrupted run runs at the same time.
    uninterrupted = start(whole, 0)
    agents = [start(job, rank) for rank in range(2)]
    try:
        deadline = time.monotonic() + 240
        while latest(save) is None or max(iterations(log), default=0) < 12:
            assert time.monotonic() < deadline and all(agent.poll() is None for agent in agents), outputs(job)[-8000:]
            time.sleep(0.02)
        kill(agents[1])
        reached, checkpoint = max(iterations(log)), latest(save)
        agents[1] = start(job, 1)
        assert uninterrupted.wait(240) == 0, Path(f"{whole}.0.txt").read_text()[-8000:]
        assert [agent.wait(240) for agent in agents] == [0, 0], outputs(job)[-8000:]
    finally:
        for agent in (uninterrupted, *agents):
            if agent.poll() is None:
                kill(agent)
    assert reached < STEPS, "the kill came too late to prove anything"
    assert checkpoint is not None and f"loaded {checkpoint}, going on after" in outputs(job)
    assert f"checkpoints: goes on from {checkpoint}" in outputs(job)
    assert latest(save).name == f"iter_{STEPS:07d}"
    assert losses(log) == losses(tmp_path / "whole" / "log")
    left = [p for p in psutil.Process().children(recursive=True) if p not in before]
    assert not [p for p in left if p.status() != psutil.STATUS_ZOMBIE]

    # The record that the launcher derives without building a model must agree with the one in the checkpoint.
    subject = Subject(read_job(str(job)), node_rank=0)
    assert QuantizerRecord.read(latest(save)).contradictions(expected_record(subject.layout, subject.args, 1)) == []


def outputs(job: Path) -> str:
    """Returns the output of both agents."""
    return "".join(Path(f"{job}.{rank}.txt").read_text() for rank in range(2))

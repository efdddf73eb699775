# SPDX-License-Identifier: Apache-2.0
"""A job of two stages that is asked to stop in each stage and started again."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from kills.processes import kill
from support.launcher import CHECKOUT, environment, free_port
from support.small_model import succeeded

from bitcpm_megatron.checkpoints.directory import latest
from bitcpm_megatron.files import read_digests
from bitcpm_megatron.launch.launcher.job import read_stages
from bitcpm_megatron.launch.launcher.torchrun import host_argv

STEPS = 30
TEACHER = """
    --model tiny-minicpm4 --num-layers 4 --seq-length 32 --micro-batch-size 1 --train-iters 1 --lr 1e-3 --mock-data
    --vocab-size 300 --eval-iters 0 --make-vocab-size-divisible-by 64
""".split()
JOB = """
description: two stages of two processes
model: {{preset: tiny-minicpm4, seq-length: 32, make-vocab-size-divisible-by: 64}}
parallelism: {{use-distributed-optimizer: true}}
training: {{micro-batch-size: 1, global-batch-size: 4, train-iters: {steps}, lr: 1.0e-2, bf16: true, seed: 7}}
data: {{mock-data: true, vocab-size: 300, eval-iters: 0, data-cache-path: {directory}/cache}}
ternary: {{ternary: true}}
checkpoint: {{save: {directory}/{name}/save}}
logging: {{log-interval: 1}}
cluster: {{profile: cpu, devices-per-node: 2, master-port: {port}}}
stages:
  - name: qat
  - name: distill
    training: {{lr: 2.0e-3, min-lr: 2.0e-4, lr-warmup-iters: 4}}
    distillation: {{distill-teacher: {directory}/teacher, distill-alpha: 0.5}}
"""


class Job:
    """A job file in a directory, with the output of ``launch/run.py`` for it."""

    def __init__(self, directory: Path, name: str) -> None:
        self.save = directory / name / "save"
        self.path, self._output = directory / f"{name}.yaml", directory / f"{name}.txt"
        self.path.write_text(JOB.format(steps=STEPS, directory=directory, name=name, port=free_port()))

    def start(self) -> subprocess.Popen:
        command = [sys.executable, "launch/run.py", str(self.path)]
        with self._output.open("a") as output:
            return subprocess.Popen(command, cwd=CHECKOUT, env=environment(), stdout=output, stderr=subprocess.STDOUT)

    def said(self) -> str:
        return self._output.read_text()

    def interrupt(self, stage: str, of_agent: bool) -> None:
        """Starts the job, and asks the agent or ``launch/run.py`` to stop in the middle of a stage."""
        process, reached = self.start(), re.compile(rf"stage {stage} \(.*iteration +4/{STEPS} ", re.DOTALL)
        try:
            deadline = time.monotonic() + 120
            while not reached.search(self.said()):
                assert time.monotonic() < deadline and process.poll() is None, self.said()[-8000:]
                time.sleep(0.02)
            asked = psutil.Process(process.pid).children()[0] if of_agent else process
            asked.send_signal(signal.SIGTERM)
            assert process.wait(120) == 0, self.said()[-8000:]
        finally:
            if process.poll() is None:
                kill(process)
        assert 4 <= int(latest(self.save / stage).name.removeprefix("iter_")) < STEPS, "that came too late"


@pytest.mark.verifies(
    "training",
    "a job of two stages that is interrupted in both ends with the same checkpoints as an uninterrupted one",
)
def test_two_stages_that_are_interrupted_end_as_those_that_are_not(launch_runs: Callable, tmp_path: Path) -> None:
    whole, job = Job(tmp_path, "whole"), Job(tmp_path, "interrupted")
    stages = {str(stage.stage): host_argv(stage)[1:] for stage in read_stages(str(whole.path))}
    teacher = [*TEACHER, "--save", str(tmp_path / "teacher")]
    succeeded(launch_runs({"teacher": teacher, **stages}, 2)[0], "teacher", *stages)

    job.interrupt("qat", of_agent=True)
    assert not (job.save / "distill").exists(), "a stage that was asked to stop is not followed by the next one"
    job.interrupt("distill", of_agent=False)
    # The second time nothing is left to do.
    for _ in range(2):
        process = job.start()
        try:
            assert process.wait(120) == 0, job.said()[-8000:]
        finally:
            if process.poll() is None:
                kill(process)
    turns = [line for line in job.said().splitlines() if line.startswith(("stage ", "every stage"))]
    ends = [line for line in turns if "checkpoints:" not in line]
    stopped = "has not ended: the same command goes on from here"
    assert ends == [
        f"stage qat {stopped}",
        "stage qat has ended",
        f"stage distill {stopped}",
        "stage distill has ended",
        *["every stage has ended"] * 2,
    ]
    for stage in ("qat", "distill"):
        assert tensors(latest(job.save / stage)) == tensors(latest(whole.save / stage))
    steps = re.findall(rf"iteration +(\d+)/{STEPS} \| loss ([\d.]+) .* lr ([\d.e+-]+) ", job.said())
    assert [int(iteration) for iteration, _, _ in steps] == [*range(1, STEPS + 1)] * 2
    rates = [float(rate) for _, _, rate in steps[STEPS:]]
    assert rates[0] == 0 and rates[4] == max(rates) == 2e-3, "a warm-up of its own"
    assert float(steps[STEPS][1]) < 4, "the weights of the first stage: an untrained model has ln 300 = 5.7"


def tensors(checkpoint: Path) -> dict[str, dict]:
    """Returns the digests of the files that hold a checkpoint's tensors, including those of the optimizer."""
    digests = read_digests(checkpoint)
    assert digests is not None
    return {name: digest for name, digest in digests.items() if name.endswith(".distcp")}

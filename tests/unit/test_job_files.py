# SPDX-License-Identifier: Apache-2.0
"""Tests of the job files in the package: their exact commands, and whether they fit into memory.

``python tests/unit/test_job_files.py`` rewrites ``golden/``; look at the difference before you commit it.
"""

import contextlib
import io
import os
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest

from bitcpm_megatron.launch import run
from bitcpm_megatron.launch.checks import layout as checks_layout
from bitcpm_megatron.launch.checks import training as checks_training
from bitcpm_megatron.launch.checks.subject import Subject
from bitcpm_megatron.launch.launcher.job import JobError, names, read_job, read_stages

CHECKOUT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden"


def printed(name: str) -> str:
    """Returns the output of ``run.py NAME --print`` on the last node of a SLURM job, without this machine's paths."""
    nodes = read_stages(name)[0].cluster.nodes or 1
    environ = {
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": str(nodes),
        "SLURM_NODEID": str(nodes - 1),
        "SLURM_JOB_NODELIST": f"npu[001-{nodes:03}]" if nodes > 1 else "npu001",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": str(nodes),
    }
    output, before = io.StringIO(), Path.cwd()
    with (
        tempfile.TemporaryDirectory() as directory,
        mock.patch.dict(os.environ, environ, clear=True),
        mock.patch.object(sys, "executable", "PYTHON"),
        contextlib.redirect_stdout(output),
    ):
        # In this directory, no earlier run has saved anything.
        os.chdir(directory)
        try:
            assert run.main([name, "--print"]) == 0
        finally:
            os.chdir(before)
    return output.getvalue().replace(str(CHECKOUT), "CHECKOUT")


@pytest.mark.parametrize("name", names())
def test_a_job_prints_what_it_printed(name: str) -> None:
    assert printed(name) == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")


def test_there_is_a_job_for_every_model_and_size() -> None:
    sizes = {f"{model}-{npus}npu" for model in ("0.5b", "1b", "3b", "8b") for npus in (8, 16, 64)}
    assert sizes | {"3b-32k", "8b-32k", "sft", "tiny-cpu", "two-stage"} == set(names())


DEVICES = {name: int(name.partition("-")[2].removesuffix("npu")) for name in names() if name.endswith("npu")}
DEVICES |= {"3b-32k": 16, "8b-32k": 16, "sft": 8}


@pytest.mark.parametrize("name", DEVICES)
def test_a_job_divides_and_fits(name: str) -> None:
    subject = Subject(read_job(name, ["cluster.master-addr=127.0.0.1"]), environ={}, node_rank=0)
    found = [*checks_layout.check(subject), *checks_training.check(subject)]
    assert [f for f in found if f.status != "pass"] == []
    assert subject.layout.world == DEVICES[name]
    if name.endswith("32k"):
        assert (subject.layout.cp, subject.layout.sequence) == (8, 32768)


def test_the_jobs_of_a_model_train_the_same() -> None:
    for model in ("0.5b", "1b", "3b", "8b"):
        jobs = [read_job(f"{model}-{npus}npu") for npus in (8, 16, 64)]
        layout = ("parallel-size", "sequence-parallel", "micro-batch-size")
        plans = [{k: v for k, v in j.flags.items() if not any(part in k for part in layout)} for j in jobs]
        assert plans[0] == plans[1] == plans[2], model


SIZES = """
sizes:
  small: {cluster: {nodes: 1}}
  large: {description: all of it, cluster: {nodes: 4}, training: {lr: 1.0e-4}}
description: a part
training: {lr: 1.0e-3, train-iters: 10}
cluster: {devices-per-node: 2}
"""


def test_a_file_holds_a_job_of_every_size(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(SIZES)
    small, large = (read_job(f"{tmp_path / 'mine.yaml'}:{size}", ["training.min-lr=0"]) for size in ("small", "large"))
    assert (small.name, small.description, small.cluster.nodes) == ("mine-small", "a part", 1)
    assert (large.name, large.description, large.cluster.nodes) == ("mine-large", "all of it", 4)
    assert large.cluster.devices_per_node == 2 and small.path == large.path == tmp_path / "mine.yaml"
    assert small.flags == {"lr": 1e-3, "train-iters": 10, "min-lr": 0} and large.flags == {**small.flags, "lr": 1e-4}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("mine.yaml", SIZES, "has sizes .small, large.: name one, as FILE:small"),
        ("mine.yaml:smal", SIZES, "no size 'smal': did you mean small"),
        ("mine.yaml:small", "description: one", "no size 'small'"),
        ("mine.yaml:small", "sizes: [small]", "sizes: expected names"),
        ("mine.yaml:small", SIZES.replace("nodes: 1", "node: 1"), "unknown key cluster.node: did you mean nodes"),
        ("other.yaml:small", SIZES, "no such job file"),
    ],
)
def test_a_size_that_is_not_there(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(JobError, match=said):
        read_job(str(tmp_path / name))


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for job in names():
        (GOLDEN / f"{job}.txt").write_text(printed(job), encoding="utf-8")

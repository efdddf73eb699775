# SPDX-License-Identifier: Apache-2.0
"""Tests that upstream's warnings at every start are suppressed, and no other lines."""

import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from bitcpm_megatron.launch import pretrain
from bitcpm_megatron.patches import upstream_warnings

JOB = """
    --num-layers 1 --hidden-size 32 --num-attention-heads 2 --swiglu --normalization RMSNorm --disable-bias-linear
    --position-embedding-type rope --seq-length 16 --max-position-embeddings 16 --micro-batch-size 1
    --global-batch-size 1 --lr 1e-3 --mock-data --vocab-size 64 --eval-iters 0 --bf16 --ternary
    --use-distributed-optimizer --override-opt-param-scheduler
""".split()
# This is almost a suppressed warning, and is issued before and after all imports.
OURS = "Apex is not installed. Falling back to Torch Norm, and this is another warning"
SPEAK = f"""
import runpy, sys, warnings
del sys.argv[0]
import bitcpm_megatron.training
warnings.warn({OURS!r})
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_job_says_none_of_it(tmp_path: Path) -> None:
    for iterations in (1, 2):  # a new start, and one from a checkpoint
        command = [sys.executable, "-c", SPEAK, str(Path(pretrain.__file__)), *JOB, "--train-iters", str(iterations)]
        command += ["--save", str(tmp_path), "--load", str(tmp_path)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2])
        assert run.returncode == 0, run.stderr
        said = run.stdout + run.stderr
        assert [m for m in upstream_warnings.WARNINGS if f"{m}\n" in said] == []
        assert [line for line in said.splitlines() if "Warning" in line and OURS not in line] == []
        # The warning appears once; Python 3.13 also prints the line of the program.
        assert said.count(f"UserWarning: {OURS}") == 1
        assert "megatron.core" not in said, "a log record of megatron-core"
        assert f"saved {tmp_path}/iter_000000{iterations}" in said


@pytest.mark.parametrize("message", upstream_warnings.WARNINGS)
def test_a_warning_goes_by_its_exact_words(message: str) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        upstream_warnings.silence()
        warnings.warn(message, FutureWarning, stacklevel=1)
        warnings.warn(message, UserWarning, stacklevel=1)
        for other in (f"{message} More.", f"Note: {message}", message[:-1]):
            warnings.warn(other, UserWarning, stacklevel=1)
    assert len(seen) == 3


def test_a_record_goes_by_its_exact_words_and_its_logger(caplog: pytest.LogCaptureFixture) -> None:
    name, (message, *_) = next(iter(upstream_warnings.RECORDS.items()))
    upstream_warnings.silence()
    upstream_warnings.silence()
    logger = logging.getLogger(name)
    for speaker, words in ((logger, message), (logger, f"{message}!"), (logging.getLogger("another"), message)):
        speaker.warning(words)
    assert [r.getMessage() for r in caplog.records] == [f"{message}!", message]
    assert len(logger.filters) == 1

# SPDX-License-Identifier: Apache-2.0
"""Tests that ``pytest --fast`` leaves out slow tests, and detects every start of a process."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.launcher import environment

SAMPLE = """
import multiprocessing, os, subprocess, sys
import pytest

COMMAND = [sys.executable, "-c", ""]

def test_no_process():
    assert True

@pytest.mark.slow
def test_slow():
    subprocess.run(COMMAND, check=True)

@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(method):
    multiprocessing.get_context(method).Process(target=print).start()

def test_fork():
    if os.fork() == 0:
        os._exit(0)

def test_system():
    os.system("true")

@pytest.fixture
def helper():
    return subprocess.run(COMMAND)

def test_fixture(helper):
    assert True

def test_hidden():
    try:
        subprocess.run(COMMAND)
    except Exception:
        pass
"""
RUN = """
import sys, pytest
from pathlib import Path
from support import fast_tests
fast_tests.UNIT = Path("unit").resolve()
sys.exit(pytest.main(["-q", "-rA", "-p", "no:cacheprovider"], plugins=[fast_tests.FastTests()]))
"""


@pytest.mark.slow
def test_what_starts_a_process_fails_and_is_told_the_cure(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow\n")
    for folder in ("unit", "distributed"):
        (tmp_path / folder).mkdir()
    (tmp_path / "unit" / "test_sample.py").write_text(SAMPLE)
    (tmp_path / "distributed" / "test_ranks.py").write_text("def test_elsewhere():\n    assert True\n")
    command = [sys.executable, "-c", RUN]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    said = done.stdout
    assert done.returncode == 1, said
    failed = ["multiprocessing[fork]", "multiprocessing[spawn]", "multiprocessing[forkserver]", "fork", "system"]
    for name in (*failed, "hidden"):
        assert f"FAILED unit/test_sample.py::test_{name} - " in said, said
    assert "ERROR unit/test_sample.py::test_fixture - " in said, said
    told = re.findall(r"^E +Failed: this test starts a process \((.*)\): mark this test `slow`$", said, re.MULTILINE)
    assert len(told) == 7 and "os.fork" in told and "os.system b'true'" in told, said
    assert said.splitlines()[-1].startswith("6 failed, 1 passed, 2 deselected, 1 error in "), said

# SPDX-License-Identifier: Apache-2.0
"""Tests of what ``make kernel`` detects (the chip and CANN's version), and of the calls that kernels may use."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from ascendc.emulator import EMULATION, FLAGS, SOURCES

# The tests start a script, CMake and a compiler.
pytestmark = pytest.mark.slow

HEADER = "NPU ID                         Chip ID                        Chip Logic ID                  Chip Name"
CMAKE = pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake: pip install cmake, then this test again")


def soc_version(folder: Path, output: str | None) -> str:
    """Returns the script's answer if npu-smi prints ``output``; None stands for a machine without npu-smi."""
    if output is not None:
        table = folder / "table"
        table.write_text(output + "\n")
        program = folder / "npu-smi"
        program.write_text(f'#!/bin/sh\n[ "$*" = "info -m" ] && cat "{table}"\n')
        program.chmod(0o755)
    path = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    command = [str(SOURCES / "soc_version")]
    return subprocess.run(command, env=os.environ | path, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Ascend 910B3", "ascend910b3"),
        ("Ascend910B3", "ascend910b3"),
        ("910B3", "ascend910b3"),
        ("Ascend910_9382", "ascend910_9382"),
        ("Ascend 910B4-1", "ascend910b4-1"),
        ("Ascend 310P3", "ascend310p3"),
    ],
)
def test_the_chip_is_what_npu_smi_calls_it(tmp_path: Path, name: str, expected: str) -> None:
    rows = [
        HEADER,
        f"910                            0                              0                              {name}",
    ]
    rows.append("910                            1                              -                              Mcu")
    assert soc_version(tmp_path, "\n".join(rows)) == expected
    assert soc_version(tmp_path, "\n".join([rows[0], rows[2], rows[1] + "  "])) == expected


def test_without_npu_smi_the_chip_is_the_smallest_910b(tmp_path: Path) -> None:
    assert soc_version(tmp_path, None) == soc_version(tmp_path, "no device found") == "ascend910b1"


def run(*command: str, text: str = "") -> tuple[int, str]:
    """Returns the exit status of a command and its output, in English and on one line, because CMake wraps messages."""
    done = subprocess.run(
        command,
        input=text,
        env=os.environ | {"LC_ALL": "C"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, " ".join(done.stdout.split())


def cann_version(home: Path, *arguments: str) -> tuple[int, str]:
    return run("cmake", f"-DASCEND_HOME_PATH={home}", *arguments, "-P", str(SOURCES / "cann_version.cmake"))


@CMAKE
@pytest.mark.parametrize(
    ("file", "content", "version"),
    [
        ("share/info/asc-devkit/version.info", "Version=8.5.0-beta.1\nversion_dir=cann\n", "8.5.0"),
        ("aarch64-linux/ascend_toolkit_install.info", "package_name=Ascend-cann-toolkit\nversion=9.0.1\n", "9.0.1"),
        ("x86_64-linux/ascend_toolkit_install.info", "version=9.1.RC2\n", "9.1.0"),
        ("version.cfg", "# info\nruntime_running_version=[9.0.0.1.238:9.0.0]\n", "9.0.0"),
    ],
)
def test_a_toolkit_that_has_all_calls_is_taken(tmp_path: Path, file: str, content: str, version: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(content)
    assert cann_version(tmp_path) == (0, f"-- CANN {version}")


@CMAKE
@pytest.mark.parametrize(
    ("file", "content", "version"),
    [
        ("x86_64-linux/ascend_toolkit_install.info", "version=8.3.RC1\n", "8.3.0"),
        ("compiler/version.info", "Version=7.7.0.1.238\nversion_dir=8.3.RC1\n", "7.7.0"),
        ("version.cfg", "runtime_running_version=[7.7.0.1.238:8.3.RC1]\n", "8.3.0"),
    ],
)
def test_an_older_toolkit_is_refused(tmp_path: Path, file: str, content: str, version: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(content)
    code, said = cann_version(tmp_path)
    assert code != 0
    assert f"CANN {version} under {tmp_path}: the AscendC kernels need 8.5.0 or newer. Install one" in said
    assert cann_version(tmp_path, "-DCANN_VERSION=8.5.0")[0] == 0


@CMAKE
def test_a_toolkit_of_no_known_version_is_asked_for(tmp_path: Path) -> None:
    code, said = cann_version(tmp_path)
    assert code != 0 and "says which CANN this is: pass -DCANN_VERSION=9.0.0" in said


@CMAKE
@pytest.mark.skipif(shutil.which("g++") is None, reason="CMake asks for a C++ compiler: install g++")
def test_the_build_looks_at_the_toolkit_first(tmp_path: Path) -> None:
    home = tmp_path / "cann"
    home.mkdir()
    command = ["cmake", "-S", str(SOURCES), "-B", str(tmp_path / "build"), f"-DASCEND_HOME_PATH={home}"]
    (home / "version.info").write_text("Version=8.2.0\n")
    assert "the AscendC kernels need 8.5.0" in run(*command)[1]
    (home / "version.info").write_text("Version=8.5.0\n")
    assert "no ascendc.cmake under" in run(*command)[1]


# Toolkits newer than the oldest accepted one add these calls (CANN 9.0: Compares; 9.1: ReduceRepeat).
@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation needs g++")
@pytest.mark.parametrize(
    ("call", "missing"),
    [
        ("CompareScalar(bits, values, 0.0f, AscendC::CMPMODE::GT, 64)", None),
        ("Compares(bits, values, 0.0f, AscendC::CMPMODE::GT, 64)", "Compares"),
        ("WholeReduceSum<float>(values, values, 64, 1, 1, 1, 8)", None),
        ("ReduceRepeat<AscendC::ReduceType::SUM, float>(values, values, 64, 1, 1, 1, 8)", "ReduceRepeat"),
    ],
)
def test_the_emulation_has_the_calls_of_the_oldest_toolkit_alone(call: str, missing: str | None) -> None:
    source = f"""#include "kernel_operator.h"
void Kernel(AscendC::LocalTensor<uint8_t> bits, AscendC::LocalTensor<float> values)
{{
    (void)bits;
    AscendC::{call};
}}"""
    code, said = run("g++", *FLAGS, "-I", str(EMULATION), "-fsyntax-only", "-x", "c++", "-", text=source)
    if missing is None:
        assert code == 0, said
    else:
        assert code != 0 and f"'{missing}' is not a member of 'AscendC'" in said

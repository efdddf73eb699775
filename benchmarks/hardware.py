# SPDX-License-Identifier: Apache-2.0
"""Description of the machine, the versions and the command line of a benchmark, for its tables."""

import importlib.util
import os
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch

from bitcpm_megatron.files import directory_mistake


def check_outputs(directory: Path) -> None:
    """Checks that the results can be written and drawn, before minutes are spent on measuring them.

    Raises:
        ValueError: if nothing can be written below the directory, or matplotlib, which draws the pictures, is missing.
    """
    mistake = directory_mistake(directory)
    if mistake is not None:
        raise ValueError(f"--output-dir {directory}: {mistake}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("matplotlib is missing: pip install 'bitcpm_megatron[plot]'")


def best_device() -> str:
    """Returns the type of the accelerator of this machine, ``cuda`` or ``npu``, or ``cpu`` if there is none."""
    return next((d for d in ("cuda", "npu") if hasattr(torch, d) and getattr(torch, d).is_available()), "cpu")


def machine(device: str) -> str:
    """Returns the name of a device type's first device; for ``cpu`` with the number of cores this process may use."""
    if device != "cpu":
        return torch.get_device_module(device).get_device_name(0)
    return f"{processor()}, {len(os.sched_getaffinity(0))} cores"


def processor() -> str:
    """Returns the CPU's model name, or its architecture if the system does not report the name."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.machine()


def versions(*modules: ModuleType) -> str:
    """Returns the versions of Python, torch and further packages as text."""
    found = [f"{module.__name__.replace('.', '-')} {module.__version__}" for module in (torch, *modules)]
    return ", ".join([f"Python {platform.python_version()}", *found])


def linux() -> str:
    """Returns the release of the running Linux kernel as text."""
    return f"Linux {platform.release().split('-')[0]}"


def command_line(name: str, argv: Sequence[str] | None) -> str:
    """Returns the command line that repeats a benchmark.

    Args:
        name: the name of the benchmark.
        argv: its arguments; None for those of this process.
    """
    return " ".join([f"python benchmarks/{name}.py", *(sys.argv[1:] if argv is None else argv)])

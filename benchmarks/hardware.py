# SPDX-License-Identifier: Apache-2.0
"""What a benchmark runs on and how it was started, for its tables."""

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
    """Refuses, before minutes of measuring, what would fail after them.

    Raises:
        ValueError: nothing can be written below the directory, or matplotlib, which draws, is missing.
    """
    mistake = directory_mistake(directory)
    if mistake is not None:
        raise ValueError(f"--output-dir {directory}: {mistake}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("matplotlib is missing: pip install 'bitcpm_megatron[plot]'")


def best_device() -> str:
    """The type of an accelerator that is here, else ``cpu``."""
    return next((d for d in ("cuda", "npu") if hasattr(torch, d) and getattr(torch, d).is_available()), "cpu")


def machine(device: str) -> str:
    """The name of a device type's first device; of the CPU also how many cores this process may use."""
    if device != "cpu":
        return torch.get_device_module(device).get_device_name(0)
    return f"{processor()}, {len(os.sched_getaffinity(0))} cores"


def processor() -> str:
    """The CPU's model name, or its architecture where the system does not say."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.machine()


def versions(*modules: ModuleType) -> str:
    """Of Python, torch and more packages."""
    found = [f"{module.__name__.replace('.', '-')} {module.__version__}" for module in (torch, *modules)]
    return ", ".join([f"Python {platform.python_version()}", *found])


def linux() -> str:
    """The release of the running kernel."""
    return f"Linux {platform.release().split('-')[0]}"


def command_line(name: str, argv: Sequence[str] | None) -> str:
    """What a user would type to have the same measured again.

    Args:
        name: of the benchmark.
        argv: its arguments; None for those of this process.
    """
    return " ".join([f"python benchmarks/{name}.py", *(sys.argv[1:] if argv is None else argv)])

# SPDX-License-Identifier: Apache-2.0
"""What a benchmark runs on, for its tables."""

import os
import platform
import re
from pathlib import Path

import torch


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

# SPDX-License-Identifier: Apache-2.0
"""Runs a script on the cores next to its NPU: ``torchrun ... launch/launcher/bind_cores.py SCRIPT ARGUMENTS``.

The cores come from ``npu-smi info -t topo`` (its column "CPU Affinity"), or else from the NUMA nodes of the NPUs' PCI
devices in sysfs. NPUs with the same cores share them evenly. The process binds itself before it becomes the script, so
that every thread and data loader inherits the binding. ``CPU_AFFINITY_CONF=1`` divides all cores by card number
instead; on common 910B servers a card then gets cores of another NUMA node (cards 0 and 1 are at cores 144-167 there).
torch_npu applies that variable late and would undo the binding: ``cluster.bind-cores numa`` sets it to 0.
If no NPU is found, or none of its cores may be used (a container's limits), nothing is changed, and the script says so.
"""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

_HUAWEI = "0x19e5"
# PCI class "processing accelerator".
_ACCELERATOR = "0x1200"


def main() -> int:
    """Binds this process and becomes the script; returns 2 if none is given or LOCAL_RANK is not a number."""
    argv = sys.argv[1:]
    if not argv:
        return _refuse("bind_cores.py needs a script to run")
    local = os.environ.get("LOCAL_RANK") or "0"
    if not re.fullmatch(r"[0-9]{1,5}", local):
        return _refuse(f"the environment variable LOCAL_RANK holds {local!r}: expected a whole number from 0")
    rank = int(local)
    affinity = affinity_from_smi() or affinity_from_sysfs()
    device = visible_device(rank, os.environ)
    cores = plan(affinity, os.sched_getaffinity(0), device)
    if cores:
        os.sched_setaffinity(0, cores)
        print(f"bind_cores: local rank {rank}, NPU {device}: cores {ranges(cores)}", flush=True)
    else:
        why = f"NPU {device} has no cores that may be used" if affinity else "no NPU found"
        print(f"bind_cores: local rank {rank}: {why}, nothing bound", flush=True)
    os.execv(sys.executable, [sys.executable, *argv])


def _refuse(message: str) -> int:
    # The error handler of the other commands is not used: importing the package loads torch, which takes seconds.
    print(f"error: {message}", file=sys.stderr, flush=True)
    return 2


def plan(affinity: Mapping[int, set[int]], allowed: set[int], device: int) -> set[int]:
    """Returns the cores for a device: its share of the cores next to it; empty if nothing should be changed.

    Args:
        affinity: the cores next to each device, by device. Devices with the same cores share them evenly.
        allowed: the cores that this process may use.
        device: the number of the device.
    """
    if device not in affinity:
        return set()
    sharing = sorted(d for d in affinity if affinity[d] == affinity[device])
    usable = sorted(affinity[device] & allowed)
    share = len(usable) // len(sharing)
    start = sharing.index(device) * share
    return set(usable[start : start + share])


def visible_device(rank: int, environ: Mapping[str, str]) -> int:
    """Returns the NPU of a local rank; ``ASCEND_RT_VISIBLE_DEVICES`` may have renumbered the NPUs."""
    visible = [part for part in environ.get("ASCEND_RT_VISIBLE_DEVICES", "").split(",") if part.strip().isdecimal()]
    return int(visible[rank]) if rank < len(visible) else rank


def parse_topology(text: str) -> dict[int, set[int]]:
    """Reads the cores of each NPU from the output of ``npu-smi info -t topo``."""
    matches = (re.match(r"\s*NPU(\d+)\s.*\s([\d,-]*\d)\s*$", line) for line in text.splitlines())
    return {int(match[1]): parse_ranges(match[2]) for match in matches if match}


def affinity_from_smi() -> dict[int, set[int]]:
    """Returns the cores of each NPU according to ``npu-smi``; empty if it is missing, fails or says nothing."""
    try:
        done = subprocess.run(["npu-smi", "info", "-t", "topo"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return parse_topology(done.stdout) if done.returncode == 0 else {}


def affinity_from_sysfs(root: Path = Path("/sys")) -> dict[int, set[int]]:
    """Returns, for each NPU in the order of the PCI addresses, the cores of the NUMA node of its PCI device."""
    found: dict[int, set[int]] = {}
    for device in sorted((root / "bus/pci/devices").glob("*")):
        try:
            if _read(device / "vendor") != _HUAWEI or not _read(device / "class").startswith(_ACCELERATOR):
                continue
            node = int(_read(device / "numa_node"))
            cores = _read(root / f"devices/system/node/node{node}/cpulist") if node >= 0 else ""
        except (OSError, ValueError):
            return {}
        found[len(found)] = parse_ranges(cores)
    return found


def parse_ranges(text: str) -> set[int]:
    """Parses a list of cores in the format of Linux: ``0-3,8`` -> {0, 1, 2, 3, 8}."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def ranges(cores: set[int]) -> str:
    """Formats cores as a list in the format of Linux: the inverse of :func:`parse_ranges`."""
    parts: list[list[int]] = []
    for core in sorted(cores):
        if parts and core == parts[-1][-1] + 1:
            parts[-1].append(core)
        else:
            parts.append([core])
    return ",".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


def _read(path: Path) -> str:
    return path.read_text(encoding="ascii").strip()


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""Runs a script on the cores next to its NPU: ``torchrun ... launch/launcher/bind_cores.py SCRIPT ARGUMENTS``.

Which cores those are is what ``npu-smi info -t topo`` says (its column "CPU Affinity"), or else the NUMA nodes of the
NPUs' PCI devices in sysfs; NPUs with the same cores share them evenly. The process binds itself before it becomes the
script, so that every thread and data loader inherits it. ``CPU_AFFINITY_CONF=1`` divides all cores by card number
instead, which on common 910B servers is another NUMA node than the card's (cards 0 and 1 sit at cores 144-167 there).
torch_npu applies it late and would undo the binding: ``cluster.bind-cores numa`` sets it to 0.

Where no NPU is found, or none of its cores may be used (a container's limits), nothing is changed, and it says so.
"""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

_HUAWEI = "0x19e5"
# "Processing accelerator" in the list of PCI classes.
_ACCELERATOR = "0x1200"


def main() -> int:
    """Binds this process and becomes the script; returns 2 without one."""
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
    # Not by the handler of the other commands: importing the package would load torch, seconds before the script.
    print(f"error: {message}", file=sys.stderr, flush=True)
    return 2


def plan(affinity: Mapping[int, set[int]], allowed: set[int], device: int) -> set[int]:
    """The cores for a device: its share of those that it has in common with other devices (``affinity``, by device) and
    that this process may use; none where nothing should be changed."""
    if device not in affinity:
        return set()
    sharing = sorted(d for d in affinity if affinity[d] == affinity[device])
    usable = sorted(affinity[device] & allowed)
    share = len(usable) // len(sharing)
    start = sharing.index(device) * share
    return set(usable[start : start + share])


def visible_device(rank: int, environ: Mapping[str, str]) -> int:
    """The NPU of a local rank: ``ASCEND_RT_VISIBLE_DEVICES`` may have renumbered them."""
    visible = [part for part in environ.get("ASCEND_RT_VISIBLE_DEVICES", "").split(",") if part.strip().isdecimal()]
    return int(visible[rank]) if rank < len(visible) else rank


def parse_topology(text: str) -> dict[int, set[int]]:
    """NPU -> cores, from the output of ``npu-smi info -t topo``."""
    matches = (re.match(r"\s*NPU(\d+)\s.*\s([\d,-]*\d)\s*$", line) for line in text.splitlines())
    return {int(match[1]): parse_ranges(match[2]) for match in matches if match}


def affinity_from_smi() -> dict[int, set[int]]:
    """NPU -> cores as ``npu-smi`` knows them; empty where it is missing or silent."""
    try:
        done = subprocess.run(["npu-smi", "info", "-t", "topo"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return parse_topology(done.stdout) if done.returncode == 0 else {}


def affinity_from_sysfs(root: Path = Path("/sys")) -> dict[int, set[int]]:
    """NPU -> cores of the NUMA node that its PCI device belongs to, NPUs in the order of their PCI addresses."""
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
    """Linux' list of cores: ``0-3,8`` -> {0, 1, 2, 3, 8}."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def ranges(cores: set[int]) -> str:
    """The inverse of :func:`parse_ranges`."""
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

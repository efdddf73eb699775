# SPDX-License-Identifier: Apache-2.0
"""Measurement of the anonymous memory that some code needs, and detection of tensors that are views of files."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

MB = 2**20

_PRELUDE = """
import sys
from pathlib import Path
import torch
from bitcpm_megatron.checkpoint_tools.megatron_model import legacy
from bitcpm_megatron.checkpoint_tools.storage import hf_reader, safetensors_writer, torch_dist_reader, torch_dist_writer
from bitcpm_megatron.checkpoint_tools.command import return_freed_memory
from bitcpm_megatron.checkpoint_tools.storage.reader import TensorInfo
return_freed_memory()
path = Path(sys.argv[1])
torch.ones(8).sum()
def begin():
    print("begin", flush=True)
"""


def peak_growth(code: str, path: Path) -> int:
    """Returns the peak growth of anonymous memory, in bytes, after ``begin()`` in a process that runs ``code``.

    The process is watched from outside: inside it, a call that holds Python's global lock would hide its own peak.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", _PRELUDE + code, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout.readline() == "begin\n"
        start = peak = _anonymous(process.pid)
        while process.poll() is None:
            peak = max(peak, _anonymous(process.pid))
            time.sleep(0.001)
    assert process.returncode == 0
    return peak - start


def is_view_of(tensor: torch.Tensor, file: Path) -> bool:
    """Returns whether the memory of a tensor is a mapping of a file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, behind = (int(address, 16) for address in line.split()[0].split("-"))
        if first <= tensor.data_ptr() < behind:
            return line.endswith(str(file.resolve()))
    return False


def _anonymous(pid: int) -> int:
    try:
        found = re.search(r"RssAnon:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except ProcessLookupError:
        return 0
    return int(found[1]) * 1024 if found else 0

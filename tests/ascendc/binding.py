# SPDX-License-Identifier: Apache-2.0
"""The PyTorch binding of the AscendC kernels on a CPU, compiled against a stand-in for CANN and torch_npu.

The binding's own sources are used; the stand-in is in ``standin/``. It registers a device with torch, which cannot be
undone: load it only in a child process, with :func:`in_a_child`.
"""

import ctypes
import hashlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import traceback
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from ascendc import emulator
from ascendc.emulator import CACHE, EMULATION, SOURCES
from torch.utils import cpp_extension

from bitcpm_megatron.ops import ascendc

STANDIN = Path(__file__).parent / "standin"
FLAGS = "-std=c++17 -O0 -fPIC -Wall -Wextra -Wno-unused-parameter".split()
UNITS = (SOURCES / "binding/torch_binding.cpp", SOURCES / "op_host/tiling.cpp", STANDIN / "device.cpp")
KERNELS = [f"ternary_{kernel}_{dtype}" for kernel in ("tile", "rows") for dtype in ("bf16", "fp16", "fp32")]
# The header that the CANN toolkit generates for a kernel.
LAUNCH_HEADER = """#pragma once
#include <cstdint>
#define ACLRT_LAUNCH_KERNEL(kernel) aclrtlaunch_##kernel
extern "C" uint32_t aclrtlaunch_{kernel}(uint32_t blocks, void* stream, void* table);
"""


class Counts(ctypes.Structure):
    """Counts of what the device was asked to do: the structure ``StandinCounts`` in standin/device.h."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in "uploads waiting_uploads launches stray_launches stray_uploads queue_waits blocks".split()
    ]


class Device:
    """The stand-in, loaded as the library of ``bitcpm_megatron.ops.ascendc``; its tensors are on the device "npu"."""

    def __init__(self, library: Path) -> None:
        torch.utils.rename_privateuse1_backend("npu")
        torch._register_device_module("npu", types.ModuleType("torch.npu"))
        os.environ[ascendc.LIBRARY_VARIABLE] = str(library)
        ascendc.load()
        self._library = ctypes.CDLL(str(library))
        self._library.standin_set_stream.argtypes = [ctypes.c_int64]

    @property
    def counts(self) -> Counts:
        counts = Counts()
        self._library.standin_counts(ctypes.byref(counts))
        return counts

    def set_stream(self, stream: int) -> None:
        """Makes a stream the current one of the current device."""
        self._library.standin_set_stream(stream)

    def set_capture(self, capturing: bool, status: int = 0) -> None:
        """Sets whether the runtime reports that a graph is being captured, and the aclError of that answer."""
        self._library.standin_set_capture(status, int(capturing))

    def set_launches(self, status: int = 0, compute: bool = True) -> None:
        """Sets the status that launches return, and whether they compute anything."""
        self._library.standin_set_launches(ctypes.c_uint32(status), int(compute))


def build() -> Path:
    """Compiles the binding with the stand-in, once per content of the sources.

    Raises:
        subprocess.CalledProcessError: if the compiler fails; ``stderr`` has its message.
    """
    emulation = emulator.build()
    digest = hashlib.sha256(f"{FLAGS} {LAUNCH_HEADER} {torch.__version__} {emulation}".encode())
    for folder in (SOURCES / "binding", STANDIN):
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            digest.update(path.read_bytes())
    library = CACHE / f"libbinding-{digest.hexdigest()[:16]}.so"
    if library.exists():
        return library
    work = CACHE / f"build-binding-{os.getpid()}"
    work.mkdir(parents=True, exist_ok=True)
    for kernel in KERNELS:
        (work / f"aclrtlaunch_{kernel}.h").write_text(LAUNCH_HEADER.replace("{kernel}", kernel))
    folders = [STANDIN, work, EMULATION, SOURCES, *cpp_extension.include_paths()]
    include = [flag for folder in folders for flag in ("-isystem" if "torch" in str(folder) else "-I", str(folder))]

    def compile_unit(unit: Path) -> str:
        result = str(work / f"{unit.stem}.o")
        command = ["g++", *FLAGS, *include, "-c", str(unit), "-o", result]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return result

    with ThreadPoolExecutor(max_workers=2) as pool:
        objects = list(pool.map(compile_unit, UNITS))
    torch_libraries = cpp_extension.library_paths()[0]
    command = ["g++", "-shared", *objects, str(emulation), f"-Wl,-rpath,{emulation.parent}", "-Wl,--no-undefined"]
    command += [f"-L{torch_libraries}", "-ltorch_cpu", "-lc10", "-o", str(work / "made.so")]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (work / "made.so").replace(library)
    shutil.rmtree(work)
    return library


def in_a_child(check: Callable[[Device], None], library: Path) -> None:
    """Runs a check in a child process, the only process in which the device exists.

    Args:
        check: the check, which must be a function of a module, so that it can be sent to the child by its name.
        library: the path of the compiled binding.

    Raises:
        AssertionError: if the check fails (with the child's traceback), or the child exits abnormally.
    """
    # The child must not be a fork of this process: objects of torch would wait, when they are destroyed, for threads
    # that only the original process has.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", __name__])
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_run, args=(check, library, sender))
    child.start()
    sender.close()
    try:
        said = receiver.recv()
    except EOFError:
        said = None
    child.join()
    assert not said, said
    assert child.exitcode == 0, f"the child ended with {child.exitcode}"


def _run(check: Callable[[Device], None], library: Path, sender: Connection) -> None:
    torch.set_num_threads(1)
    try:
        check(Device(library))
    except BaseException:
        sender.send(traceback.format_exc())
    else:
        sender.send("")
    sender.close()
    # Unlike the exit of a forked process, this destroys static objects, as the exit of a training process does.
    ctypes.CDLL(None).exit(0)


if __name__ == "__main__":
    try:
        print(build())
    except subprocess.CalledProcessError as error:
        sys.exit(error.stderr)

# SPDX-License-Identifier: Apache-2.0
"""The option ``pytest --fast``: runs the unit tests for use during development, none of which starts a process."""

import functools
import multiprocessing.util
import platform
import shutil
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

UNIT = Path(__file__).resolve().parents[1] / "unit"
STARTS = {"os.fork", "os.forkpty", "os.posix_spawn", "os.system", "subprocess.Popen"}
"""Python's audit events for everything that starts a process, except for multiprocessing's ``spawn``."""


class FastTests:
    """A plugin that selects the tests of ``tests/unit`` not marked ``slow``, and fails each that starts a process.

    A start fails where it happens, fixtures included, with something that is not an ``Exception``, so that code under
    test with a fallback for programs that cannot be started does not hide it.
    """

    def __init__(self) -> None:
        self._in_a_test = False
        # An audit hook cannot be removed; between tests it lets everything through.
        sys.addaudithook(lambda event, arguments: self._refuse(event, arguments) if event in STARTS else None)
        spawn = multiprocessing.util.spawnv_passfds

        @functools.wraps(spawn)
        def guarded(path: str, arguments: list[str], descriptors: list[int]) -> int:
            self._refuse("multiprocessing", (path, arguments))
            return spawn(path, arguments, descriptors)

        multiprocessing.util.spawnv_passfds = guarded

    def _refuse(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._in_a_test:
            what = " ".join([event, *(str(argument) for argument in arguments[:2])])
            pytest.fail(f"this test starts a process ({what[:200]}): mark this test `slow`")

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        fast = [item for item in items if UNIT in item.path.parents and not item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=list(set(items) - set(fast)))
        items[:] = fast

    def pytest_collection_finish(self) -> None:
        """Starts the processes that run once for many tests; otherwise the first of these tests would fail.

        The C kernels and the emulation of the AscendC kernels are compiled here if they have changed: a guard that let
        compilers through would also let through tests that compile in every run. Python runs ``uname`` once to find
        the processor's name.
        """
        from ascendc import emulator

        from bitcpm_megatron.inference.kernels import cpu as packed
        from bitcpm_megatron.ops import cpu

        platform.processor()
        cpu.unavailable("cpu")
        packed.load()
        if shutil.which("g++") is not None:
            try:
                emulator.build()
            except subprocess.CalledProcessError as error:
                raise pytest.UsageError(f"the AscendC kernels do not compile:\n{error.stderr}") from None

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Generator[None, object, object]:
        self._in_a_test = True
        try:
            return (yield)
        finally:
            self._in_a_test = False

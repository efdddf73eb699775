# SPDX-License-Identifier: Apache-2.0
"""``torch_npu.npu`` / ``torch.npu`` of the stand-in."""

import collections
import contextlib
from collections.abc import Callable
from typing import Any

import torch


class _Generators:
    """Every device, by number or by name, draws from the CPU's generator."""

    def __getitem__(self, device: Any) -> torch.Generator:
        return torch.default_generator


default_generators = _Generators()


def __getattr__(name: str) -> Any:
    raise AttributeError(f"the CPU stand-in for torch_npu does not model torch_npu.npu.{name}")


def is_available() -> bool:
    """There is no NPU here."""
    return False


def current_device() -> torch.device:
    """The CPU."""
    return torch.device("cpu")


def get_device_name(device: Any = None) -> str:
    """MindSpeed takes operators that fit a generation by this name: those of the 910B are modeled."""
    return "Ascend910B (CPU stand-in)"


def current_stream(device: Any = None) -> "Stream":
    """Work is done when it is asked for: any stream will do."""
    return Stream()


def default_stream(device: Any = None) -> "Stream":
    """Any stream will do."""
    return Stream()


def stream(stream: "Stream") -> contextlib.AbstractContextManager:
    """A context in which a stream is current: nothing changes."""
    return contextlib.nullcontext()


def init() -> None:
    """Nothing to initialize."""


def synchronize(device: Any = None) -> None:
    """Nothing to wait for."""


def empty_cache() -> None:
    """Nothing is cached."""


def memory_stats(device: Any = None) -> dict[str, int]:
    """Nothing is counted."""
    return collections.defaultdict(int)


def memory_allocated(device: Any = None) -> int:
    """Nothing is counted."""
    return 0


max_memory_allocated = memory_allocated


def _lazy_call(call: Callable) -> None:
    call()


class device:
    """A context in which a device is current: nothing changes."""

    def __init__(self, device: Any) -> None:
        self.device = device

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc_info: object) -> None:
        pass


class Stream:
    """A stream whose work is always done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: "Stream") -> None:
        """Nothing to wait for."""

    def wait_event(self, event: "Event") -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


class Event:
    """An event that has always happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        """Nothing to record."""

    def wait(self, stream: Any = None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

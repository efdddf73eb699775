# SPDX-License-Identifier: Apache-2.0
"""The stand-in for ``torch_npu.npu``, which is also ``torch.npu``: every device is the CPU, and all work is done."""

import collections
import contextlib
from collections.abc import Callable
from typing import Any

import torch


class _Generators:
    """A table of random generators that gives the CPU's generator for every device, by number or by name."""

    def __getitem__(self, device: Any) -> torch.Generator:
        return torch.default_generator


default_generators = _Generators()


def __getattr__(name: str) -> Any:
    raise AttributeError(f"the CPU stand-in for torch_npu does not model torch_npu.npu.{name}")


def is_available() -> bool:
    """Returns False: there is no NPU here."""
    return False


def current_device() -> torch.device:
    """Returns the CPU."""
    return torch.device("cpu")


def get_device_name(device: Any = None) -> str:
    """Returns a name by which MindSpeed chooses operators of a generation; those of the 910B are modeled."""
    return "Ascend910B (CPU stand-in)"


def current_stream(device: Any = None) -> "Stream":
    """Returns a new stream; all streams are equivalent, because work is done at once."""
    return Stream()


def default_stream(device: Any = None) -> "Stream":
    """Returns a new stream; all streams are equivalent."""
    return Stream()


def stream(stream: "Stream") -> contextlib.AbstractContextManager:
    """Returns a context in which a stream is current; it changes nothing."""
    return contextlib.nullcontext()


def init() -> None:
    """Does nothing: there is nothing to initialize."""


def synchronize(device: Any = None) -> None:
    """Does nothing: there is nothing to wait for."""


def empty_cache() -> None:
    """Does nothing: no memory is cached."""


def memory_stats(device: Any = None) -> dict[str, int]:
    """Returns zeros: memory is not counted."""
    return collections.defaultdict(int)


def memory_allocated(device: Any = None) -> int:
    """Returns zero: memory is not counted."""
    return 0


max_memory_allocated = memory_allocated


def _lazy_call(call: Callable) -> None:
    call()


class device:
    """A context in which a device is current; it changes nothing."""

    def __init__(self, device: Any) -> None:
        self.device = device

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc_info: object) -> None:
        pass


class Stream:
    """A stream whose work is always completed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: "Stream") -> None:
        """Does nothing: there is nothing to wait for."""

    def wait_event(self, event: "Event") -> None:
        """Does nothing: there is nothing to wait for."""

    def synchronize(self) -> None:
        """Does nothing: there is nothing to wait for."""


class Event:
    """An event that has always occurred."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        """Does nothing: there is nothing to record."""

    def wait(self, stream: Any = None) -> None:
        """Does nothing: there is nothing to wait for."""

    def synchronize(self) -> None:
        """Does nothing: there is nothing to wait for."""

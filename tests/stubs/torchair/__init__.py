# SPDX-License-Identifier: Apache-2.0
"""A strict stand-in for ``torchair``, the NPU's graph mode; MindSpeed registers converters, which never run."""

from collections.abc import Callable
from typing import Any

from . import ge


def __getattr__(name: str) -> Any:
    raise AttributeError(f"the CPU stand-in for torch_npu does not model torchair.{name}")


def register_fx_node_ge_converter(operator: object) -> Callable[[Callable], Callable]:
    """Returns a decorator that registers nothing, because there is no graph mode here."""
    return lambda converter: converter


__all__ = ["ge", "register_fx_node_ge_converter"]

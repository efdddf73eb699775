# SPDX-License-Identifier: Apache-2.0
"""The stand-in for ``torch_npu.utils``."""

from typing import Any


def __getattr__(name: str) -> Any:
    raise AttributeError(f"the CPU stand-in for torch_npu does not model torch_npu.utils.{name}")

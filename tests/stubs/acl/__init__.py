# SPDX-License-Identifier: Apache-2.0
"""A strict stand-in for ``acl``, CANN's Python binding, which MindSpeed-LLM imports at start: it models nothing."""

from typing import Any


def __getattr__(name: str) -> Any:
    raise AttributeError(f"the CPU stand-in for torch_npu does not model acl.{name}")

# SPDX-License-Identifier: Apache-2.0
"""A strict stand-in for ``acl``, CANN's Python binding, that models nothing; MindSpeed-LLM imports it at its start."""

from typing import Any


def __getattr__(name: str) -> Any:
    raise AttributeError(f"the CPU stand-in for torch_npu does not model acl.{name}")

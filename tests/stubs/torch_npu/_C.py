# SPDX-License-Identifier: Apache-2.0
"""The stand-in for ``torch_npu._C``, with a type of HCCL options that cannot be created."""

from typing import Any


def __getattr__(name: str) -> Any:
    raise AttributeError(f"the CPU stand-in for torch_npu does not model torch_npu._C.{name}")


class _distributed_c10d:
    class ProcessGroupHCCL:
        class Options:
            def __init__(self) -> None:
                raise NotImplementedError("the CPU stand-in for torch_npu has no HCCL: run with gloo")

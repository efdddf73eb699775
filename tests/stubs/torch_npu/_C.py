# SPDX-License-Identifier: Apache-2.0
"""``torch_npu._C`` of the stand-in: the type that says there are no HCCL options."""

from typing import Any


def __getattr__(name: str) -> Any:
    raise AttributeError(f"the CPU stand-in for torch_npu does not model torch_npu._C.{name}")


class _distributed_c10d:
    class ProcessGroupHCCL:
        class Options:
            def __init__(self) -> None:
                raise NotImplementedError("the CPU stand-in for torch_npu has no HCCL: run with gloo")

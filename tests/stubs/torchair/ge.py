# SPDX-License-Identifier: Apache-2.0
"""``torchair.ge``: types that converters are annotated with."""

from typing import Any


def __getattr__(name: str) -> Any:
    raise AttributeError(f"the CPU stand-in for torch_npu does not model torchair.ge.{name}")


class Tensor:
    """A value in a graph."""


class TensorSpec:
    """What is known of such a value."""


class _DataTypes(type):
    def __getattr__(cls, name: str) -> str:
        if not name.startswith("DT_"):
            raise AttributeError(f"the CPU stand-in for torch_npu does not model torchair.ge.DataType.{name}")
        return name


class DataType(metaclass=_DataTypes):
    """Names of data types: ``DataType.DT_FLOAT16`` and so on."""

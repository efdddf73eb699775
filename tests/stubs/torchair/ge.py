# SPDX-License-Identifier: Apache-2.0
"""The stand-in for ``torchair.ge``: types in the annotations of converters."""

from typing import Any


def __getattr__(name: str) -> Any:
    raise AttributeError(f"the CPU stand-in for torch_npu does not model torchair.ge.{name}")


class Tensor:
    """A value in a graph."""


class TensorSpec:
    """The specification of a value in a graph."""


class _DataTypes(type):
    def __getattr__(cls, name: str) -> str:
        if not name.startswith("DT_"):
            raise AttributeError(f"the CPU stand-in for torch_npu does not model torchair.ge.DataType.{name}")
        return name


class DataType(metaclass=_DataTypes):
    """The names of data types, such as ``DataType.DT_FLOAT16``."""

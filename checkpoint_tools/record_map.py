# SPDX-License-Identifier: Apache-2.0
"""The quantizer record across the border: Megatron's module names on one side, Hugging Face's on the other."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..quantization.record import QuantizerRecord
from .storage.reader import ConversionError
from .tensor_map import MegatronTensor


def to_hugging_face(record: QuantizerRecord, tensors: Sequence[MegatronTensor]) -> QuantizerRecord:
    """The same record, by Hugging Face's module names.

    Raises:
        ConversionError: it names a module that the model does not have.
    """
    modules = {
        part: dict(record.modules[t.module]) for t in tensors if t.module in record.modules for part in _parts(t)
    }
    _check_known(record, {t.module for t in tensors if t.quantizable})
    return replace(record, modules=modules)


def to_megatron(record: QuantizerRecord, tensors: Sequence[MegatronTensor]) -> QuantizerRecord:
    """The same record, by Megatron's module names.

    Raises:
        ConversionError: modules that Megatron fuses into one are quantized differently, or it names unknown ones.
    """
    modules: dict[str, Mapping[str, Any]] = {}
    for tensor in tensors:
        entries = [record.modules.get(part) for part in _parts(tensor)]
        if any(entry != entries[0] for entry in entries):
            raise ConversionError(
                f"{', '.join(_parts(tensor))} are one matrix in Megatron and must be quantized alike: the quantizer "
                f"record says {entries}"
            )
        if entries[0] is not None:
            modules[tensor.module] = entries[0]
    _check_known(record, {part for t in tensors if t.quantizable for part in _parts(t)})
    return replace(record, modules=modules)


def _parts(tensor: MegatronTensor) -> list[str]:
    return [part.removesuffix(".weight") for part in tensor.parts]


def _check_known(record: QuantizerRecord, known: set[str]) -> None:
    unknown = sorted(set(record.modules) - known)
    if unknown:
        raise ConversionError(f"the quantizer record names modules that the model does not have: {', '.join(unknown)}")

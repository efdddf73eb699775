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
    by_module = {t.module: t for t in tensors if t.quantizable}
    unknown = sorted(set(record.modules) - set(by_module))
    if unknown:
        raise ConversionError(f"the quantizer record names modules that the model does not have: {', '.join(unknown)}")
    modules = {
        part.removesuffix(".weight"): dict(entry)
        for module, entry in record.modules.items()
        for part in by_module[module].parts
    }
    return replace(record, modules=modules)


def to_megatron(record: QuantizerRecord, tensors: Sequence[MegatronTensor]) -> QuantizerRecord:
    """The same record, by Megatron's module names.

    Raises:
        ConversionError: modules that Megatron fuses into one are quantized differently, or it names unknown ones.
    """
    modules: dict[str, Mapping[str, Any]] = {}
    known: set[str] = set()
    for tensor in tensors:
        parts = [part.removesuffix(".weight") for part in tensor.parts]
        known.update(parts if tensor.quantizable else ())
        entries = [record.modules.get(part) for part in parts]
        first = entries[0]
        if any(entry != first for entry in entries):
            raise ConversionError(
                f"{', '.join(parts)} are one matrix in Megatron and must be quantized alike: the quantizer record says "
                f"{entries}"
            )
        if first is not None:
            modules[tensor.module] = first
    unknown = sorted(set(record.modules) - known)
    if unknown:
        raise ConversionError(f"the quantizer record names modules that the model does not have: {', '.join(unknown)}")
    return replace(record, modules=modules)

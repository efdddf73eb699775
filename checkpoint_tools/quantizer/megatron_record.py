# SPDX-License-Identifier: Apache-2.0
"""Quantizer record of a Megatron checkpoint, checked against the saved scales and the weights."""

import sys
from collections.abc import Sequence

import torch

from ...quantization import effective_group, fused_space, quantize
from ...quantization.record import QuantizerRecord, RecordError
from ..megatron_model.checkpoint import MegatronCheckpoint
from ..storage.reader import ConversionError, dtype_name
from ..tensor_map import MegatronTensor
from .fuse import bf16_steps

_SAMPLE_ROWS = 64


def checked_record(
    checkpoint: MegatronCheckpoint, tensors: Sequence[MegatronTensor], group_size: int | None = None
) -> QuantizerRecord | None:
    """Returns the quantizer record of a checkpoint, with Megatron's module names; None if it was not quantized.

    A checkpoint without a record gets one from its saved scales, and otherwise from ``group_size``.

    Args:
        checkpoint: the checkpoint.
        tensors: the tensors of its model.
        group_size: the number of elements per scale that the user gave, -1 for whole rows, or None.

    Raises:
        ConversionError: if record, scales, weights or ``group_size`` contradict each other, or the checkpoint was saved
            while the quantizer was still being ramped up.
    """
    linears = [t for t in tensors if t.quantizable]
    record = checkpoint.record
    if record is not None:
        try:
            record.check_whole(checkpoint.path)
        except RecordError as error:
            raise ConversionError(str(error)) from None
    else:
        record = _inferred(checkpoint, linears, group_size)
    if record is not None:
        if group_size is not None:
            _check_group_size(record, linears, group_size)
        _check_record(checkpoint, record, linears)
    return record


def checked_scales(
    checkpoint: MegatronCheckpoint, record: QuantizerRecord, tensor: MegatronTensor
) -> torch.Tensor | None:
    """Returns the saved scales of a quantized tensor, bf16 ``[out, groups]``, or None if none were saved.

    ``out`` are the output features, ``groups`` the scales per row. The scales of a sample of the rows are compared with
    those computed from the weights. On another device, which may sum in another order, some scales differ by one bf16
    step; a larger difference means that the scales belong to other weights.

    Raises:
        ConversionError: if the scales do not belong to the weights.
    """
    scales = checkpoint.scales(tensor)
    if scales is None:
        return None
    config = record.config_of(tensor.module)
    rows = torch.linspace(0, tensor.shape[0] - 1, min(_SAMPLE_ROWS, tensor.shape[0])).long().unique()
    own = quantize(checkpoint.read(tensor)[rows], config)[1]
    steps = bf16_steps(scales[rows], own)
    if steps > 1:
        raise ConversionError(
            f"{checkpoint.path}: the saved scales of {tensor.module} are up to {steps} bf16 steps away from those of "
            "its weights: they belong to other weights, or to another group size"
        )
    return scales


def _inferred(
    checkpoint: MegatronCheckpoint, linears: Sequence[MegatronTensor], group_size: int | None
) -> QuantizerRecord | None:
    """Returns a record inferred from saved scales, or from ``group_size`` and the tensor-parallel size of the files."""
    modules: dict[str, dict[str, int]] = {}
    shards = checkpoint.layout["tensor"]
    saved = any(map(checkpoint.has_scales, linears))
    for tensor in linears:
        scales, columns = checkpoint.scales(tensor), tensor.shape[1]
        if scales is not None:
            groups = scales.shape[1]
        elif group_size is None:
            continue
        elif group_size == -1:
            groups = shards if tensor.kind == "row" else 1
        else:
            groups = columns // effective_group(columns, group_size)
        modules[tensor.module] = {"group_size": columns // groups if groups > 1 else -1}
    if not modules:
        return None
    sizes = [(t, modules[t.module]["group_size"]) for t in linears if t.module in modules]
    if all(size == -1 for t, size in sizes if t.kind != "row"):
        # Group size -1: the groups of a row-parallel weight are its tensor-parallel shards.
        shards = max((1 if size == -1 else t.shape[1] // size for t, size in sizes if t.kind == "row"), default=1)
    how = "its saved scales" if saved else f"group size {group_size} as given"
    if group_size == -1 and not saved:
        how += f" and the tensor-parallel size {shards} of its files"
    print(
        f"warning: {checkpoint.path} has no quantizer record: taken from {how}; assumed are eps 1e-5 and activations "
        f"in full precision. {len(modules)} of {len(linears)} linears are ternary",
        file=sys.stderr,
    )
    dtype = dtype_name(checkpoint.info(linears[0]).dtype)
    return QuantizerRecord("latent", "ternary", 1e-5, dtype, shards, 16, modules)


def _check_group_size(record: QuantizerRecord, linears: Sequence[MegatronTensor], group_size: int) -> None:
    for tensor in linears:
        if tensor.module not in record.modules:
            continue
        recorded, columns = record.config_of(tensor.module).group_size, tensor.shape[1]
        split = group_size == -1 and tensor.kind == "row" and recorded * record.row_parallel_shards == columns
        whole = -1 if group_size == columns else group_size
        if recorded not in (group_size, whole) and not split:
            raise ConversionError(
                f"--ternary-group-size {group_size} contradicts the checkpoint, which says {recorded} for "
                f"{tensor.module}: leave it out"
            )


def _check_record(checkpoint: MegatronCheckpoint, record: QuantizerRecord, linears: Sequence[MegatronTensor]) -> None:
    by_module = {tensor.module: tensor for tensor in linears}
    unknown = sorted(set(record.modules) - set(by_module))
    if unknown:
        raise ConversionError(
            f"{checkpoint.path}: its quantizer record names {unknown[0]}, which the model does not have"
        )
    if not record.modules:
        raise ConversionError(f"{checkpoint.path}: its quantizer record names no module")
    unrecorded = [t.module for t in linears if t.module not in record.modules and checkpoint.has_scales(t)]
    if unrecorded:
        raise ConversionError(
            f"{checkpoint.path}: {unrecorded[0]} ({len(unrecorded)} in all) has saved scales, and its quantizer record "
            "does not name it"
        )
    fused: list[str] = []
    latent: list[str] = []
    for module in record.modules:
        tensor = by_module[module]
        try:
            groups = tensor.shape[1] // effective_group(tensor.shape[1], record.config_of(module).group_size)
        except ValueError as error:
            raise ConversionError(f"{checkpoint.path}: its quantizer record of {module}: {error}") from None
        scales = checkpoint.scales(tensor)
        if scales is not None and tuple(scales.shape) != (tensor.shape[0], groups):
            raise ConversionError(
                f"{checkpoint.path}: {module} has scales of shape {list(scales.shape)}, its quantizer record says "
                f"{[tensor.shape[0], groups]}"
            )
        dtype = dtype_name(checkpoint.info(tensor).dtype)
        if record.state == "latent" and dtype != record.latent_dtype:
            raise ConversionError(
                f"{checkpoint.path}: {module} is {dtype}, its quantizer record says that training quantized "
                f"{record.latent_dtype}"
            )
        (fused if _is_fused(checkpoint, tensor) else latent).append(module)
    if record.state == "latent" and fused:
        raise ConversionError(
            f"{checkpoint.path}: its quantizer record says latent, and {fused[0]} ({len(fused)} in all) is ternary "
            "already: quantizing it again would shrink its scales"
        )
    if record.state != "latent" and latent:
        raise ConversionError(f"{checkpoint.path}: its quantizer record says fused, and {latent[0]} is not ternary")


def _is_fused(checkpoint: MegatronCheckpoint, tensor: MegatronTensor) -> bool:
    # The first rows suffice to recognize a latent weight.
    if fused_space(checkpoint.read(tensor, slice(_SAMPLE_ROWS))) is None:
        return False
    weight = checkpoint.read(tensor)
    return bool(weight.any()) and fused_space(weight) is not None

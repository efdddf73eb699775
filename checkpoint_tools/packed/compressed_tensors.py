# SPDX-License-Identifier: Apache-2.0
"""Writes a model directory in the format ``pack-quantized`` of compressed-tensors, which Transformers and vLLM read.

A ternary weight becomes three tensors beside each other: ``weight_packed`` int32 ``[out, in bits / 32]``,
``weight_scale`` ``[out, groups]`` in the weight's dtype, and ``weight_shape``; everything else stays as it is. The one
``quantization_config`` of this package is this format's own.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...files import write_text
from ..hf_model.config import GRANITE, LLAMA, config_for
from ..hf_model.side_files import copy_side_files
from ..storage.reader import TensorInfo, dtype_name
from ..storage.safetensors_writer import SafetensorsWriter
from .block_types import pack_int32, split_ternary
from .planner import Plan, Weight
from .source import Source


def write_compressed_tensors(
    directory: Path, source: Source, plan: Plan, max_shard_size: int, on_write: Callable[[int], object]
) -> dict[str, dict[str, Any]]:
    """Writes weights, ``config.json`` and the tokenizer's files.

    Args:
        directory: empty.
        source: the model.
        plan: of its weights, see :func:`~.planner.plan_compressed_tensors`.
        max_shard_size: bytes of a safetensors file.
        on_write: told of the bytes that were written.

    Returns:
        Entries of ``DIGESTS.json`` of the safetensors files, which were digested as they were written.

    Raises:
        ConversionError: a weight is not what its record says.
    """
    bits = bits_of(plan)
    tensors: dict[str, TensorInfo] = {}
    for weight in source.weights:
        tensors |= _stored(weight, bits)
    with SafetensorsWriter(directory, tensors, max_shard_size) as writer:
        for choice, (weight, blocks) in zip(plan.choices, source.read(), strict=True):
            assert weight == choice.weight
            if weight.group is None:
                writer.write(weight.name, blocks)
            else:
                packed, scales = [], []
                for block in blocks:
                    codes, scale = split_ternary(weight.name, block, weight.group)
                    packed.append(pack_int32(codes, bits))
                    scales.append(scale)
                writer.write(f"{weight.name}_packed", packed)
                writer.write(f"{weight.name}_scale", scales)
                writer.write(f"{weight.name}_shape", [torch.tensor(weight.info.shape)])
            on_write(choice.nbytes)
    dtypes = {weight.info.dtype for weight in source.weights}
    dtype = max(dtypes, key=lambda d: sum(w.info.nbytes for w in source.weights if w.info.dtype == d))
    kind = LLAMA if source.architecture.is_llama else GRANITE
    config = config_for(kind, source.architecture, source.config, dtype_name(dtype))
    config["quantization_config"] = quantization_config(source.weights, bits)
    write_text(directory / "config.json", json.dumps(config, indent=2) + "\n")
    if source.files is not None:
        copy_side_files(source.files, directory)
    return writer.digests


def bits_of(plan: Plan) -> int:
    """Of the codes of a plan, 2 or 4."""
    (bits,) = {int(choice.kind.split()[-1]) for choice in plan.choices if choice.weight.group is not None}
    return bits


def quantization_config(weights: Sequence[Weight], bits: int) -> dict[str, Any]:
    """What ``config.json`` says of the format: a group for every number of elements per scale.

    A row that has one scale is the strategy ``channel``; everything else, row-parallel weights of whole rows among it,
    is the strategy ``group``. Layers are named by expressions that also fit what a client fuses of them.
    """
    by_scheme: dict[int | None, list[Weight]] = {}
    for weight in weights:
        if weight.group is not None:
            by_scheme.setdefault(None if weight.group == weight.info.shape[1] else weight.group, []).append(weight)
    linears = [weight for weight in weights if weight.role in ("ternary linears", "other linears")]
    layers: dict[str, set[str]] = {}
    for weight in linears:
        layer, name = _place(weight)
        layers.setdefault(name, set()).add(layer)
    groups = {}
    for number, (size, members) in enumerate(sorted(by_scheme.items(), key=lambda item: item[0] or 0)):
        groups[f"group_{number}"] = {
            "targets": ["Linear"] if len(by_scheme) == 1 else _expressions(members, layers),
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": True,
                "strategy": "channel" if size is None else "group",
                "group_size": size,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
    others = [weight for weight in linears if weight.group is None]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ["lm_head", *(_expressions(others, layers) if others else [])],
        "config_groups": groups,
    }


def _place(weight: Weight) -> tuple[str, str]:
    """The number of a linear's layer, and its name there."""
    _, _, layer, name = weight.module.split(".", 3)
    return layer, name


def _expressions(members: Sequence[Weight], layers: Mapping[str, set[str]]) -> list[str]:
    """Regular expressions that match these linears and no others; ``layers`` are those that have a linear of a name."""
    mine: dict[str, list[str]] = {}
    for layer, name in map(_place, members):
        mine.setdefault(name, []).append(layer)
    found = []
    for name, numbers in mine.items():
        which = "[0-9]+" if set(numbers) == layers[name] else f"({'|'.join(numbers)})"
        found.append(f"re:.*layers\\.{which}\\.{re.escape(name)}$")
    return found


def _stored(weight: Weight, bits: int) -> dict[str, TensorInfo]:
    if weight.group is None:
        return {weight.name: weight.info}
    rows, columns = weight.info.shape
    return {
        f"{weight.name}_packed": TensorInfo((rows, columns * bits // 32), torch.int32),
        f"{weight.name}_scale": TensorInfo((rows, columns // weight.group), weight.info.dtype),
        f"{weight.name}_shape": TensorInfo((2,), torch.int64),
    }

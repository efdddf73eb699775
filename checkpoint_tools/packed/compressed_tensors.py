# SPDX-License-Identifier: Apache-2.0
"""Writer of model directories in compressed-tensors' format ``pack-quantized``, which Transformers and vLLM read.

A ternary weight with ``out`` output and ``in`` input features becomes three tensors: ``weight_packed``, int32
``[out, in * bits / 32]``; ``weight_scale``, ``[out, groups per row]`` in the weight's dtype; and ``weight_shape``. All
other tensors stay unchanged. This is the only export of this package with a ``quantization_config``, the one that the
format defines.
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
    """Writes weights, ``config.json`` and the tokenizer's files of a compressed-tensors export.

    Args:
        directory: an existing, empty directory.
        source: the model.
        plan: the plan of its weights, made by :func:`~.planner.plan_compressed_tensors`.
        max_shard_size: the bytes of tensor data per safetensors file.
        on_write: a function that is called with the number of bytes that were written.

    Returns:
        The entries of ``DIGESTS.json`` for the safetensors files, which were digested while they were written.

    Raises:
        ConversionError: if a weight contradicts its quantizer record.
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
    """Returns the number of bits per code of a plan, 2 or 4."""
    (bits,) = {int(choice.kind.split()[-1]) for choice in plan.choices if choice.weight.group is not None}
    return bits


def quantization_config(weights: Sequence[Weight], bits: int) -> dict[str, Any]:
    """Returns the ``quantization_config`` of a ``config.json``, with one config group for every group size.

    Weights with one scale per row have the strategy ``channel``; all others, including row-parallel weights whose rows
    were split over shards, have the strategy ``group``. Targets are regular expressions over the names of layers, which
    also match the layers that a client fuses from them.
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
    """Returns the number of a linear's layer, and the linear's name within the layer."""
    _, _, layer, name = weight.module.split(".", 3)
    return layer, name


def _expressions(members: Sequence[Weight], layers: Mapping[str, set[str]]) -> list[str]:
    """Returns regular expressions that match exactly these linears.

    Args:
        members: the weights of the linears.
        layers: name of a linear within its layer -> the numbers of all layers that have such a linear.
    """
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

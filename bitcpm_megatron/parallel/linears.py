# SPDX-License-Identifier: Apache-2.0
"""Linears of a model: which modules count as linears, their global names, and how their local shards are grouped."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding

from ..nn.linear import HostModule
from ..quantization import QuantizerConfig
from ..quantization.grouping import row_group, row_parallel_group

Kind = Literal["column", "row", "dense", "never", "unsupported"]
ParallelKind = Literal["column", "row"]

# These hold the original classes, because hosts replace the names by classes of their own that derive from them.
_COLUMN, _ROW = (ColumnParallelLinear,), (RowParallelLinear,)
_NEVER_NAMES = ("output_layer", "embedding", "word_embeddings", "position_embeddings", "lm_head")

# Low-rank adapters (PEFT's, Megatron-Bridge's) are small, and the output that they add to a ternary layer's is not part
# of its weight. Their wrappers keep the layer itself as a child with one of the names in _ADAPTED.
_ADAPTER = re.compile(r"lora_.*|adapters?")
_ADAPTED = ("base_layer", "to_wrap")

# The fast paths and functional calls of these modules read the weights of the linears inside without calling them.
_READ_WEIGHTS_DIRECTLY = (torch.nn.MultiheadAttention, torch.nn.TransformerEncoderLayer)


@dataclass(frozen=True)
class RegisteredLinear:
    """A host's parallel linear that is not a subclass of megatron-core's.

    Attributes:
        kind: how its weight is sharded.
        norm_methods: the methods that normalize the input before the GEMM, each hidden states -> hidden states; empty
            if the input is not changed.
    """

    kind: ParallelKind
    norm_methods: tuple[str, ...] = ()


_registered: dict[type, RegisteredLinear] = {}


def register_linear(linear: type, kind: ParallelKind, norm_methods: tuple[str, ...] = ()) -> None:
    """Registers a host's linear, so that a recipe may quantize it.

    The class must have ``input_size`` and ``output_size`` of the whole weight, a parameter ``weight`` ``[out, in]``
    that ``forward`` reads as ``self.weight``, and its tensor-parallel group as ``tp_group`` or ``parallel_group`` (else
    the common one is taken). The start-up probe proves the rest.

    Args:
        linear: the class; subclasses count as well.
        kind: ``column`` or ``row``.
        norm_methods: the methods that normalize the input before the GEMM, as in :class:`RegisteredLinear`.

    Raises:
        ValueError: if the class lacks one of these methods.
    """
    missing = [name for name in norm_methods if not callable(getattr(linear, name, None))]
    if missing:
        raise ValueError(f"{linear.__module__}.{linear.__name__} has no {', '.join(missing)}: another version?")
    _registered[linear] = RegisteredLinear(kind, norm_methods)


def registered_linear(module: torch.nn.Module) -> RegisteredLinear | None:
    """Returns what :func:`register_linear` registered for a module's class, or None."""
    return next((_registered[c] for c in type(module).__mro__ if c in _registered), None)


def parallel_kind(module: torch.nn.Module) -> ParallelKind | None:
    """Returns ``column`` or ``row`` for tensor-parallel linears, None for other modules."""
    if isinstance(module, _COLUMN):
        return "column"
    if isinstance(module, _ROW):
        return "row"
    registered = registered_linear(module)
    return None if registered is None else registered.kind


@dataclass(frozen=True)
class Candidate:
    """A module that holds weight matrices.

    Attributes:
        path: module path with global layer numbers.
        module: the module.
        kind: ``column`` / ``row`` parallel, ``dense`` (``torch.nn.Linear``), ``never`` (embeddings, the output layer,
            adapters), or ``unsupported``.
    """

    path: str
    module: HostModule
    kind: Kind


def candidates(chunk: torch.nn.Module) -> Iterator[Candidate]:
    """Yields every module that directly holds a parameter of two or more dimensions, and the output layer."""
    bypassed: set[torch.nn.Module] = set()
    for path, module in _globally_named(chunk):
        if isinstance(module, _READ_WEIGHTS_DIRECTLY):
            bypassed.update(module.modules())
        if any(p.dim() >= 2 for p in module.parameters(recurse=False)) or path.rpartition(".")[2] == "output_layer":
            yield Candidate(path, module, _kind(path, module) if module not in bypassed else "unsupported")


def _kind(path: str, module: torch.nn.Module) -> Kind:
    if any(part in _NEVER_NAMES or _ADAPTER.fullmatch(part) for part in path.split(".")):
        return "never"
    if isinstance(module, VocabParallelEmbedding | torch.nn.Embedding):
        return "never"
    kind = parallel_kind(module)
    if kind is not None:
        return kind
    # A subclass is excluded, because it may read its weight elsewhere than in forward().
    if type(module) is torch.nn.Linear:
        return "dense"
    return "unsupported"


def _globally_named(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yields ``named_modules`` with the names of the whole model.

    A pipeline stage counts its own layers from 0 and an expert-parallel rank its own experts; these numbers become
    global. An adapted layer has the name that it has without the adapter.
    """
    renamed: dict[str, str] = {"": ""}
    first_expert: dict[str, int] = {}
    # PEFT nests the model two levels deeper.
    adapted: Any = chunk
    base = adapted.get_base_model() if hasattr(chunk, "get_base_model") else chunk
    for local, module in base.named_modules():
        parent, _, leaf = local.rpartition(".")
        if isinstance(module, torch.nn.ModuleList) and leaf == "local_experts":
            first_expert[local] = parallel_state.get_expert_model_parallel_rank() * len(module)
        number = getattr(module, "layer_number", None)
        if leaf.isdigit() and parent.rpartition(".")[2] == "layers" and isinstance(number, int):
            leaf = str(number - 1)
        elif parent in first_expert:
            leaf = str(first_expert[parent] + int(leaf))
        renamed[local] = renamed[parent] if leaf in _ADAPTED else f"{renamed[parent]}.{leaf}".lstrip(".")
        yield renamed[local], module


def tensor_parallel_group(module: torch.nn.Module) -> torch.distributed.ProcessGroup | None:
    """Returns the group that a parallel linear is sharded over; None for other modules.

    megatron-core 0.12.1 keeps no group on the module.
    """
    if parallel_kind(module) is None:
        return None
    for name in ("tp_group", "parallel_group"):
        if getattr(module, name, None) is not None:
            return getattr(module, name)
    if getattr(module, "is_expert", False):
        return parallel_state.get_expert_tensor_parallel_group()
    return parallel_state.get_tensor_model_parallel_group()


def whole_shape(module: HostModule) -> tuple[int, ...]:
    """Returns the shape of a module's weight over all tensor-parallel shards.

    For a module with several matrices, or without an attribute ``weight``, it has one dimension: the number of
    elements.
    """
    weight = getattr(module, "weight", None)
    if weight is None:
        return (sum(p.numel() for p in module.parameters(recurse=False) if p.dim() >= 2),)
    if parallel_kind(module) is not None:
        return (module.output_size, module.input_size)
    if isinstance(module, VocabParallelEmbedding):
        return (module.num_embeddings, module.embedding_dim)
    return tuple(weight.shape)


def local_config(candidate: Candidate, config: QuantizerConfig, row_parallel_shards: int | None) -> QuantizerConfig:
    """Returns the quantizer of a local shard: ``config`` with the group size that fits the shard.

    Column-parallel shards keep whole rows; row-parallel shards split them, as in
    :func:`~bitcpm_megatron.quantization.grouping.row_parallel_group`.

    Args:
        candidate: a column, row or dense linear.
        config: the quantizer as the recipe gives it, for the whole row.
        row_parallel_shards: the number of row-parallel shards; None for the tensor-parallel size of this run.

    Raises:
        ValueError: if the group does not fit the shard, or the tensor-parallel size does not divide the shards.
    """
    local_in = candidate.module.weight.shape[1]
    try:
        if candidate.kind != "row":
            return replace(config, group_size=row_group(local_in, config.group_size))
        whole = candidate.module.input_size
        tensor_parallel = whole // local_in
        shards = tensor_parallel if row_parallel_shards is None else row_parallel_shards
        group = row_parallel_group(whole, config.group_size, tensor_parallel, shards)
        if config.group_size != -1 or group == -1:
            return config
        return replace(config, group_size=row_group(local_in, group))
    except ValueError as error:
        raise ValueError(f"{candidate.path}: {error}") from None


def activation_groups(candidate: Candidate, row_parallel_shards: int) -> int:
    """Returns the number of scales per token of a layer's local input.

    The features of row-parallel layers are split over the ranks, so that they are quantized per row-parallel shard,
    whatever the tensor-parallel size.

    Raises:
        ValueError: if the tensor-parallel size does not divide the shards, or the shards do not divide the features; or
            if the layer normalizes its input itself.
    """
    registered = registered_linear(candidate.module)
    if registered is not None and registered.norm_methods:
        raise ValueError(
            f"{candidate.path}: a {type(candidate.module).__name__} normalizes its input itself, so that it cannot be "
            "quantized to 8 bits after the norm: use --transformer-impl local, or --ternary-activation-bits 16"
        )
    if candidate.kind != "row":
        return 1
    whole, local_in = candidate.module.input_size, candidate.module.weight.shape[1]
    tensor_parallel = whole // local_in
    if row_parallel_shards % tensor_parallel or whole % row_parallel_shards:
        raise ValueError(
            f"{candidate.path}: {whole} input features cannot be quantized in {row_parallel_shards} row-parallel "
            f"shards at a tensor-parallel size of {tensor_parallel}: use a number of shards that it divides"
        )
    return row_parallel_shards // tensor_parallel

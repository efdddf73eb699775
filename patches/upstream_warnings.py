# SPDX-License-Identifier: Apache-2.0
"""What upstream packages say at every start, on every rank, and nobody here can act on: dropped by its exact words.

Every other warning stays. Importing this imports no upstream package, for most of these come of such an import.
"""

import functools
import logging
import re
import warnings
from collections.abc import Callable

_NOT_INSTALLED = "Transformer Engine and Apex are not installed. Falling back to "
_CONNECTIONS = "it is recommended to set the environment variable CUDA_DEVICE_MAX_CONNECTIONS to 1 for maximum speedup"
# torch 2.6 to 2.13.
_RENAMED = (
    ("_all_gather_base", "all_gather_into_tensor"),
    ("_all_gather_base", "all_gather_single"),
    ("_reduce_scatter_base", "reduce_scatter_tensor"),
    ("_reduce_scatter_base", "reduce_scatter_single"),
    ("all_gather_into_tensor", "all_gather_single"),
    ("reduce_scatter_tensor", "reduce_scatter_single"),
)

WARNINGS = (
    # megatron-core's optimizer, clip_grads, megatron_fsdp and layer specs. What it falls back to, and
    # megatron_core.without_te.FusedAdam, are what this package runs on.
    _NOT_INSTALLED + "Torch optimizers.",
    _NOT_INSTALLED + "local implementations of multi_tensor_applier and multi_tensor_scale",
    _NOT_INSTALLED + "local implementations of multi_tensor_applier, multi_tensor_l2norm, and multi_tensor_scale",
    "Apex is not installed. Falling back to Torch Norm",
    # TransformerConfig of 0.16.1 and 0.19, of its own default.
    "full scope is deprecated. Use empty cuda_graph_scope to capture the whole layer.",
    "full scope is deprecated. Use empty cuda_graph_modules to capture the whole layer.",
    # 0.19, of a model that is imported along.
    "MimoModelConfig is experimental and still under active development. The API may change without notice in future "
    "releases.",
    # ColumnParallelLinear. The environment profiles set the variable where it matters, and the preflight looks.
    "When using async grad allreduce " + _CONNECTIONS,
    "When using sequence parallelism " + _CONNECTIONS,
    # torch, of megatron-core's calls.
    *(f"`torch.distributed.{a}` is deprecated. Please use `torch.distributed.{b}` instead." for a, b in _RENAMED),
    "`load_state_dict` is deprecated and will be removed in future versions. Please use `load` instead.",
    "Please use DTensor instead and we are deprecating ShardedTensor.",
    # torch, where 0.19 reads a checkpoint's common state on each rank for itself.
    "torch.distributed is disabled, unavailable or uninitialized, assuming the intent is to load in a single process.",
    "The argument order of load has been changed. Please check the document to avoid future breakages.",
)  # fmt: skip
"""By ``warnings.warn``, of any category."""

RECORDS = {
    # Synthetic tokens have an index that costs nothing to make.
    "megatron.core.datasets.gpt_dataset": (
        "Unable to save MockGPTDataset indexes because path_to_cache is None",
    ),
    # Of 0.19. What they advise instead is a package (checkpointing.save_asynchronously), another model, and what DDP
    # then does itself.
    "megatron.core.dist_checkpointing.strategies.torch": (
        "MCore's async save is deprecated and will be removed in the future releases. "
        "Please, use NVRx async solution by setting `async_strategy` to `nvrx`.",
    ),
    "megatron.core.models.gpt.gpt_model": (
        "GPTModel IS DEPRECATED. GPTModel is only accepting critical bug fixes, no new features. Please reference the "
        "migration guide `docs/user-guide/hybrid-model-migration.md` for details on how to use `HybridModel`",
    ),
    "megatron.core.distributed.distributed_data_parallel": (
        "DistributedDataParallel: full_param_layout not provided with use_distributed_optimizer=True. Auto-computing "
        "layout inside DDP. Callers should pre-compute layouts via DistributedOptimizer.compute_full_param_layout() "
        "and pass them in.",
    ),
}  # fmt: skip
"""By ``logging``: logger -> messages."""


def silence() -> None:
    """Drops :data:`WARNINGS` and :data:`RECORDS`; to be called before megatron-core is imported."""
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=re.escape(message) + r"\Z")
    for logger, messages in RECORDS.items():
        drop_records(logger, *messages)


def drop_records(logger: str, *messages: str) -> None:
    """Drops what a logger says in exactly these words, once however often it is called."""
    logging.getLogger(logger).addFilter(_others_than(*messages))


@functools.cache
def _others_than(*messages: str) -> Callable[[logging.LogRecord], bool]:
    return lambda record: record.getMessage() not in messages

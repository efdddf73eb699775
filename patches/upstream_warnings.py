# SPDX-License-Identifier: Apache-2.0
"""Suppression of upstream warnings that appear at every start on every rank and call for no action, by exact wording.

All other warnings are kept. Importing this imports no upstream package, because such an import causes most of these
warnings.
"""

import functools
import logging
import re
import warnings
from collections.abc import Callable

_NOT_INSTALLED = "Transformer Engine and Apex are not installed. Falling back to "
_CONNECTIONS = "it is recommended to set the environment variable CUDA_DEVICE_MAX_CONNECTIONS to 1 for maximum speedup"
# Names that torch 2.6 to 2.13 deprecate, with their replacements.
_RENAMED = (
    ("_all_gather_base", "all_gather_into_tensor"),
    ("_all_gather_base", "all_gather_single"),
    ("_reduce_scatter_base", "reduce_scatter_tensor"),
    ("_reduce_scatter_base", "reduce_scatter_single"),
    ("all_gather_into_tensor", "all_gather_single"),
    ("reduce_scatter_tensor", "reduce_scatter_single"),
)

WARNINGS = (
    # megatron-core's optimizer, clip_grads, megatron_fsdp and layer specs. This package runs on what they fall back to,
    # and on megatron_core.without_te.FusedAdam.
    _NOT_INSTALLED + "Torch optimizers.",
    _NOT_INSTALLED + "local implementations of multi_tensor_applier and multi_tensor_scale",
    _NOT_INSTALLED + "local implementations of multi_tensor_applier, multi_tensor_l2norm, and multi_tensor_scale",
    "Apex is not installed. Falling back to Torch Norm",
    # TransformerConfig of 0.16.1 and 0.19, about its own default.
    "full scope is deprecated. Use empty cuda_graph_scope to capture the whole layer.",
    "full scope is deprecated. Use empty cuda_graph_modules to capture the whole layer.",
    # megatron-core 0.19, about a model that it imports without need.
    "MimoModelConfig is experimental and still under active development. The API may change without notice in future "
    "releases.",
    # ColumnParallelLinear. The environment profiles set the variable if it matters, and the preflight checks it.
    "When using async grad allreduce " + _CONNECTIONS,
    "When using sequence parallelism " + _CONNECTIONS,
    # torch, about megatron-core's calls.
    *(f"`torch.distributed.{a}` is deprecated. Please use `torch.distributed.{b}` instead." for a, b in _RENAMED),
    "`load_state_dict` is deprecated and will be removed in future versions. Please use `load` instead.",
    "Please use DTensor instead and we are deprecating ShardedTensor.",
    # torch, when megatron-core 0.19 reads a checkpoint's common state on each rank separately.
    "torch.distributed is disabled, unavailable or uninitialized, assuming the intent is to load in a single process.",
    "The argument order of load has been changed. Please check the document to avoid future breakages.",
)  # fmt: skip
"""The texts of dropped warnings that come from ``warnings.warn``, of any category."""

RECORDS = {
    # Indices of synthetic tokens cost nothing to make and need no cache.
    "megatron.core.datasets.gpt_dataset": (
        "Unable to save MockGPTDataset indexes because path_to_cache is None",
    ),
    # megatron-core 0.19. The messages below recommend another package (see checkpointing.save_asynchronously), another
    # model, and a computation that DDP then does itself.
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
"""The dropped messages that come from ``logging``, by logger."""


def silence() -> None:
    """Drops :data:`WARNINGS` and :data:`RECORDS`; must be called before megatron-core is imported."""
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=re.escape(message) + r"\Z")
    for logger, messages in RECORDS.items():
        drop_records(logger, *messages)


def drop_records(logger: str, *messages: str) -> None:
    """Drops a logger's messages with exactly these texts; repeated calls have no further effect."""
    logging.getLogger(logger).addFilter(_others_than(*messages))


@functools.cache
def _others_than(*messages: str) -> Callable[[logging.LogRecord], bool]:
    return lambda record: record.getMessage() not in messages

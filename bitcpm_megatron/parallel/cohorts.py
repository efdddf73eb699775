# SPDX-License-Identifier: Apache-2.0
"""Cohorts: the layers of a model chunk that are quantized together, because their weights arrive together."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.module import Float16Module

from ..nn.cache import Cohort, find_epoch, wrappers_of
from ..nn.linear import HostModule, TernaryState
from .probe import ternary_modules


def schedule_started(chunks: Sequence[torch.nn.Module]) -> None:
    """Starts a schedule in the epochs of these chunks: their weights will not change until it ends.

    Args:
        chunks: the model chunks as the schedule holds them.
    """
    for chunk in chunks:
        if epoch := find_epoch(chunk):
            epoch.start(cohorts_of(chunk))


def cohorts_of(chunk: torch.nn.Module) -> list[Cohort]:
    """Returns the cohorts of a chunk: quantized layers whose weights are all in place once one of them may run.

    All quantized layers are one cohort, unless ``DistributedDataParallel`` overlaps the gathering of parameters with
    the forward pass. Then, before a layer runs, its hook waits only for the bucket of the layer's weight. Weights that
    are in no bucket are not gathered at all.

    Args:
        chunk: a chunk as a schedule holds it, in its wrappers. If one of them is neither megatron-core's DDP nor
            Float16Module, nothing is known about it, and each layer is quantized alone.
    """
    buckets: Mapping[torch.nn.Parameter, Any] = {}
    for wrapper in wrappers_of(chunk):
        if isinstance(wrapper, DistributedDataParallel):
            if wrapper.ddp_config.overlap_param_gather:
                buckets = wrapper.param_to_bucket_group
        elif not isinstance(wrapper, Float16Module):
            return []
    cohorts: defaultdict[Any, list[tuple[TernaryState, HostModule]]] = defaultdict(list)
    for state, module in ternary_modules(chunk):
        cohorts[buckets.get(module.weight)].append((state, module))
    return list(cohorts.values())

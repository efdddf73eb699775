# SPDX-License-Identifier: Apache-2.0
"""Which layers of a model chunk are quantized together: those whose weights arrive together."""

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
    """The weights of these chunks, as the schedule holds them, will not change until it ends."""
    for chunk in chunks:
        if epoch := find_epoch(chunk):
            epoch.start(cohorts_of(chunk))


def cohorts_of(chunk: torch.nn.Module) -> list[Cohort]:
    """The quantized layers of a chunk in groups whose weights are in place as soon as one of their layers may run.

    All layers are one such group, except where ``DistributedDataParallel`` overlaps the gathering of parameters with
    the forward pass: before a layer runs, its hook waits for the bucket of the layer's weight and for no other. What
    is in no bucket is not gathered at all.

    Args:
        chunk: as a schedule holds it, in its wrappers. Of a wrapper that is not megatron-core's DDP or Float16Module
            nothing is known, and each layer is quantized alone.
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

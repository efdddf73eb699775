# SPDX-License-Identifier: Apache-2.0
"""Cleanup between two models in one process, which ends megatron-core's process groups and their threads."""

import gc
import os

import torch

# Destroyed groups of a model end only when the garbage collector frees it, which waits for their threads. A forked
# process does not have these threads and would hang in that collection, so garbage is collected before forks.
os.register_at_fork(before=gc.collect)


def leave_model_parallel() -> None:
    """Ends megatron-core's parallel state and destroys its groups; collective over the job, whose own group remains.

    ``parallel_state.destroy_model_parallel`` only forgets some forty groups, each with a thread that wakes up a hundred
    times a second until the group is destroyed: after some tens of models these threads keep a core busy.
    """
    from megatron.core import parallel_state

    torch.distributed.barrier()  # afterwards no rank needs the groups any more
    parallel_state.destroy_model_parallel()
    for group in list(torch.distributed.distributed_c10d._world.pg_map):
        if group is not torch.distributed.group.WORLD:
            torch.distributed.destroy_process_group(group)


def free_models() -> None:
    """Frees trained models that nobody needs any more, with the threads of their groups, by emptying their DDP objects.

    megatron-core's DDP is held by its hooks on autograd nodes, and holds the model, which holds these nodes. The
    garbage collector cannot see this cycle through the nodes: each trained model would leave some fifty threads.
    """
    from megatron.core.distributed import DistributedDataParallel

    for found in gc.get_objects():
        if type(found) is DistributedDataParallel:
            vars(found).clear()
    gc.collect()

# SPDX-License-Identifier: Apache-2.0
"""Between two models in one process: megatron-core's groups end, and with them their threads."""

import gc
import os

import torch

# Destroyed groups of a model that awaits the garbage collector end with it. A fork has none of the threads that this
# waits for, so that it would hang where it collects them.
os.register_at_fork(before=gc.collect)


def leave_model_parallel() -> None:
    """Ends megatron-core's parallel state and destroys its groups; collective over the job, whose own group stays.

    ``parallel_state.destroy_model_parallel`` forgets some forty groups, and each has a thread that wakes a hundred
    times a second until it is destroyed: after some tens of models they keep a core busy.
    """
    from megatron.core import parallel_state

    torch.distributed.barrier()  # nobody needs them any more
    parallel_state.destroy_model_parallel()
    for group in list(torch.distributed.distributed_c10d._world.pg_map):
        if group is not torch.distributed.group.WORLD:
            torch.distributed.destroy_process_group(group)


def free_models() -> None:
    """Empties megatron-core's DDP of models that nobody needs any more, so that they go, and their groups' threads.

    Its hooks on nodes of autograd hold it, and it holds the model that holds the nodes. The garbage collector does not
    see through nodes: each trained model would leave some fifty threads behind.
    """
    from megatron.core.distributed import DistributedDataParallel

    for found in gc.get_objects():
        if type(found) is DistributedDataParallel:
            vars(found).clear()
    gc.collect()

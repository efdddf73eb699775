# SPDX-License-Identifier: Apache-2.0
"""A process of the job: its groups, patches and seeds, and the signals that ask it to stop."""

import argparse
import contextlib
import datetime
import os
import random
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state, tensor_parallel

from ..cli import Whole, from_environment
from ..patches import cpu
from ..patches.megatron_core import checkpointing, without_te

# SIGTERM is how schedulers preempt and end a job; SIGUSR1 what people have SLURM send before (--signal=USR1@600).
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def world_size() -> int:
    """Number of processes of this job, as ``torchrun`` says; 1 without it.

    Raises:
        ValueError: what the environment says of this process's place is no number, or not of this job.
    """
    world = from_environment("WORLD_SIZE", Whole(1, 2**20), 1)
    from_environment("LOCAL_RANK", Whole(0, world - 1), 0)
    from_environment("MASTER_PORT", Whole(0, 65535), None)
    if from_environment("RANK", Whole(0, world - 1), None) is None and world > 1:
        raise ValueError(f"WORLD_SIZE is {world}, and RANK is not set: start the processes with torchrun")
    return world


def device() -> torch.device:
    """The device of this process."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # In a host on the CPU that one answers for CUDA, with a device in the place of a number.
    current: int | torch.device = torch.cuda.current_device()
    return current if isinstance(current, torch.device) else torch.device("cuda", current)


def sum_over_ranks(number: int, group: torch.distributed.ProcessGroup | None = None) -> int:
    """The sum over the ranks of a group, or of the whole job; collective."""
    total = torch.tensor([number], dtype=torch.int64, device=device())
    torch.distributed.all_reduce(total, group=group)
    return int(total)


def initialize(args: argparse.Namespace) -> None:
    """Patches the host, joins the process group, builds the parallel groups and seeds every generator."""
    if torch.cuda.is_available():
        torch.cuda.set_device(from_environment("LOCAL_RANK", Whole(0), 0))
    else:
        cpu.install()
    without_te.install()
    checkpointing.load_optimizer_under_other_rates()

    if not torch.distributed.is_initialized():
        timeout = datetime.timedelta(minutes=args.distributed_timeout_minutes)
        # Without torchrun there is no store to meet at, and nobody to meet.
        alone: dict[str, Any] = {"store": torch.distributed.HashStore(), "rank": 0, "world_size": 1}
        alone = {} if os.environ.get("RANK") else alone
        torch.distributed.init_process_group(args.distributed_backend, timeout=timeout, **alone)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=args.num_virtual_stages_per_pipeline_rank,
        expert_model_parallel_size=args.expert_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        distributed_timeout_minutes=args.distributed_timeout_minutes,
    )
    # Pipeline stages differ, as in Megatron-LM.
    seed = args.seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def shutdown() -> None:
    """Leaves the process groups."""
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@contextlib.contextmanager
def exit_signals(enabled: bool) -> Iterator[list[int]]:
    """``--exit-signal-handler``: while the block runs, requests to stop do no more than to get into the list."""
    received: list[int] = []
    before = {name: signal.signal(name, lambda number, _: received.append(number)) for name in _SIGNALS if enabled}
    try:
        yield received
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)

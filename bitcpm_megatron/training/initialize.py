# SPDX-License-Identifier: Apache-2.0
"""Set-up of a process of the job: its patches, process groups and seeds, and the signals that ask it to stop.

If this module is imported before megatron-core, a process without CUDA does not load torch's compiler with it; torch's
optimizers load a part of it in their first step.
"""

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

from ..cli import Whole, from_environment
from ..patches import cpu

with cpu.uncompiled():
    from megatron.core import parallel_state, tensor_parallel

from ..patches.megatron_core import checkpointing, without_te  # noqa: E402

# Schedulers preempt and end a job with SIGTERM; SLURM can be told to send SIGUSR1 before that (--signal=USR1@600).
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def world_size() -> int:
    """Returns the number of processes of this job as ``torchrun`` sets it; 1 without torchrun.

    Raises:
        ValueError: if a variable of the environment that places this process in the job is no number, is out of range,
            or is missing.
    """
    world = from_environment("WORLD_SIZE", Whole(1, 2**20), 1)
    from_environment("LOCAL_RANK", Whole(0, world - 1), 0)
    from_environment("MASTER_PORT", Whole(0, 65535), None)
    if from_environment("RANK", Whole(0, world - 1), None) is None and world > 1:
        raise ValueError(f"WORLD_SIZE is {world}, and RANK is not set: start the processes with torchrun")
    return world


def device() -> torch.device:
    """Returns the device of this process."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # In a host on the CPU a patched function answers here, with a device instead of a number.
    current: int | torch.device = torch.cuda.current_device()
    return current if isinstance(current, torch.device) else torch.device("cuda", current)


def sum_over_ranks(number: int, group: torch.distributed.ProcessGroup | None = None) -> int:
    """Returns the sum of a number over the ranks of a group (None: of the whole job); collective."""
    total = torch.tensor([number], dtype=torch.int64, device=device())
    torch.distributed.all_reduce(total, group=group)
    return int(total)


def initialize(args: argparse.Namespace) -> None:
    """Patches the upstream packages, joins the process group, builds the parallel groups and seeds every generator."""
    if torch.cuda.is_available():
        torch.cuda.set_device(from_environment("LOCAL_RANK", Whole(0), 0))
    else:
        cpu.install()
    without_te.install()
    checkpointing.load_optimizer_under_other_rates()

    if not torch.distributed.is_initialized():
        timeout = datetime.timedelta(minutes=args.distributed_timeout_minutes)
        # Without torchrun the job has one process and needs no rendezvous.
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
    # Each pipeline stage has its own seed, as in Megatron-LM.
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
    """Collects requests to stop in the list that it yields, for ``--exit-signal-handler``.

    While the block runs, SIGTERM and SIGUSR1 have no other effect. If not ``enabled``, they keep their handlers.
    """
    received: list[int] = []
    before = {name: signal.signal(name, lambda number, _: received.append(number)) for name in _SIGNALS if enabled}
    try:
        yield received
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)

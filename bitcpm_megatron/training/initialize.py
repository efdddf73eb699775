# SPDX-License-Identifier: Apache-2.0
"""A process of the job: its groups, patches and seeds, and the signals that ask it to stop."""

import argparse
import datetime
import os
import random
import signal
from types import FrameType, TracebackType
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
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def initialize(args: argparse.Namespace) -> None:
    """Patches the host, joins the process group, builds the parallel groups and seeds every generator."""
    if torch.cuda.is_available():
        torch.cuda.set_device(from_environment("LOCAL_RANK", Whole(0), 0))
    else:
        cpu.install()
    without_te.install()
    checkpointing.load_optimizer_under_other_rates()

    if not torch.distributed.is_initialized():
        _join(args)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=args.num_virtual_stages_per_pipeline_rank,
        expert_model_parallel_size=args.expert_model_parallel_size,
        distributed_timeout_minutes=args.distributed_timeout_minutes,
    )
    seed(args.seed)


def _join(args: argparse.Namespace) -> None:
    timeout = datetime.timedelta(minutes=args.distributed_timeout_minutes)
    if os.environ.get("RANK"):
        torch.distributed.init_process_group(args.distributed_backend, timeout=timeout)
    else:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(args.distributed_backend, store=store, rank=0, world_size=1)


def seed(value: int) -> None:
    """Seeds Python, numpy, torch and megatron-core's tracker; pipeline stages differ, as in Megatron-LM."""
    value += 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)
    tensor_parallel.model_parallel_cuda_manual_seed(value)


def shutdown() -> None:
    """Leaves the process groups."""
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


class ExitSignals:
    """``--exit-signal-handler``: remembers, while its block runs, that this process was asked to stop.

    Args:
        enabled: whether signals are handled at all.

    Attributes:
        received: whether one has reached this process.
        agreed: whether one has reached any process of the job, as all of them learned in the same step.
    """

    def __init__(self, enabled: bool = False) -> None:
        self._enabled = enabled
        self._before: dict[signal.Signals, Any] = {}
        self.received = False
        self.agreed = False

    def __enter__(self) -> "ExitSignals":
        if self._enabled:
            self._before = {name: signal.signal(name, self._remember) for name in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = True

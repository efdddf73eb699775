# SPDX-License-Identifier: Apache-2.0
"""The state of a run, to and from checkpoints in megatron-core's ``torch_dist`` format."""

import argparse
import contextlib
import errno
import os
import random
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint.api import CheckpointException

from ..agreement import together
from ..checkpoints.compatibility import changes, check_arguments, check_data
from ..checkpoints.digests import gather_digests, with_digests
from ..checkpoints.directory import (
    RELEASE,
    CheckpointError,
    incomplete_directory,
    iteration_directory,
    publish_checkpoint,
    saved_arguments,
    write_arguments,
)
from ..checkpoints.reading import read
from ..cli import FailedError
from ..files import write_digests
from ..parallel.sharded_scales import without_scales
from ..patches.megatron_core import checkpointing
from ..quantization.record import QuantizerRecord
from .initialize import device
from .model import Model

_RESHARDABLE = "fully_reshardable"
_LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "data_parallel_size",
)


@dataclass
class Progress:
    """How far a run has come: optimizer steps taken, training samples used."""

    iteration: int = 0
    consumed_samples: int = 0


class Saver:
    """Writes the checkpoints of a run; collective over all ranks.

    With ``--async-save`` a forked process writes a snapshot of this moment while training goes on, and the checkpoint
    is published at a later :meth:`poll`. A save waits for the one before it. One that fails, such as on a full disk,
    leaves nothing behind: every method then raises :class:`~bitcpm_megatron.cli.FailedError`, on every rank alike.

    Args:
        args: of the run.
        record: the quantizer record to put beside the tensors, None for a run without quantizer.
    """

    def __init__(self, args: argparse.Namespace, record: QuantizerRecord | None) -> None:
        self._args = args
        self._record = record
        self._queue = AsyncCallsQueue() if args.async_save else None
        self._unpublished: list[Path] = []
        self._bytes = 0
        checkpointing.bind_checkpoint_writers()
        checkpointing.hold_write_errors()

    def save(
        self, model: Model, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler, progress: Progress
    ) -> None:
        """Saves this moment, or begins to."""
        self.wait()
        final = iteration_directory(self._args.save, progress.iteration)
        self._unpublished.append(final)
        _gather_parameters(model)
        state = _model_state(model)
        state.update(
            progress={"iteration": progress.iteration, "consumed_samples": progress.consumed_samples},
            scheduler=scheduler.state_dict(),
            rng=_rng_state(),
        )
        if not self._args.no_save_optim:
            state["optimizer"] = optimizer.sharded_state_dict(state, metadata=_metadata())
        with self._or_nothing(final):
            self._begin(state, final)

    def poll(self) -> list[Path]:
        """The checkpoints that became complete since the last call."""
        if self._queue is not None and self._queue.get_num_unfinalized_calls():
            with self._or_nothing(self._unpublished[-1]):
                self._queue.maybe_finalize_async_calls(blocking=False)
        done = [path for path in self._unpublished if path not in self._pending()]
        self._unpublished = [path for path in self._unpublished if path not in done]
        return done

    def wait(self) -> None:
        """Waits until every checkpoint that was begun is complete.

        Raises:
            FailedError: also where the writer does not finish within ``--distributed-timeout-minutes``.
        """
        deadline = time.monotonic() + 60 * self._args.distributed_timeout_minutes
        while self._queue is not None and self._queue.get_num_unfinalized_calls():
            # Not blocking=True: upstream's writer waits for ever for a process of its own that was killed.
            with self._or_nothing(self._unpublished[-1]):
                self._queue.maybe_finalize_async_calls(blocking=False)
            if time.monotonic() > deadline:
                raise FailedError(
                    "the asynchronous writer of the checkpoint does not finish: one of its processes may have been "
                    "killed (out of memory?). The checkpoint before it is complete"
                )
            time.sleep(0.02)

    def _begin(self, state: dict[str, Any], final: Path) -> None:
        temporary = incomplete_directory(final)
        self._bytes = _bytes_of_all_ranks(state)
        with together():
            if torch.distributed.get_rank() == 0:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
                if self._bytes > shutil.disk_usage(temporary).free:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        request = checkpointing.save_asynchronously(
            state, str(temporary), content_metadata={"distrib_optim_sharding_type": _RESHARDABLE}
        )
        with together():
            checkpointing.raise_held_write_error()
        request.add_finalize_fn(lambda: self._publish(temporary, final))
        if self._queue is None:
            request.execute_sync()
        else:
            request = request._replace(async_fn=with_digests(request.async_fn, temporary))
            self._queue.schedule_async_request(request)

    def _pending(self) -> list[Path]:
        unfinished = 0 if self._queue is None else self._queue.get_num_unfinalized_calls()
        return self._unpublished[len(self._unpublished) - unfinished :]

    def _publish(self, temporary: Path, final: Path) -> None:
        with together():
            checkpointing.raise_held_write_error()
        digests = gather_digests(temporary)
        with together():
            if torch.distributed.get_rank() == 0:
                write_arguments(temporary, vars(self._args))
                if self._record is not None:
                    self._record.write(temporary)
                write_digests(temporary, digests)
                publish_checkpoint(temporary, final, self._args.keep_last_n)

    @contextlib.contextmanager
    def _or_nothing(self, final: Path) -> Iterator[None]:
        """Removes what was written of a checkpoint where its writing raises, which is on every rank alike."""
        try:
            yield
        except (OSError, CheckpointException) as error:
            told: list[str] = [""] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(told, _words(error))
            free = shutil.disk_usage(final.parent).free
            if torch.distributed.get_rank() == 0:
                shutil.rmtree(incomplete_directory(final), ignore_errors=True)
            raise FailedError(
                f"{final} cannot be written ({next(filter(None, told), 'no reason given')}): {self._bytes:,} bytes are "
                f"needed, {free:,} were free. Nothing of it was kept, and the checkpoint before it is complete: free "
                "some space and start the same command again"
            ) from error


def _words(error: OSError | CheckpointException) -> str:
    """The reason why something was not written; empty on ranks that upstream does not tell."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    causes = [str(cause) for cause, _ in error.failures.values()]
    return re.sub(r"^Worker failure: |\[Errno \d+\] ", "", causes[0]) if causes else ""


def _bytes_of_all_ranks(state: Any) -> int:
    total = torch.tensor([_bytes(state)], dtype=torch.int64, device=device())
    torch.distributed.all_reduce(total)
    return int(total)


def _bytes(state: Any) -> int:
    """What this rank writes of a sharded state dict."""
    if isinstance(state, dict):
        return sum(map(_bytes, state.values()))
    if isinstance(state, list | tuple):
        return sum(map(_bytes, state))
    if isinstance(state, ShardedTensor | ShardedTensorFactory) and is_main_replica(state.replica_id):
        return 0 if state.data is None else state.data.nbytes
    return 0


def load(
    args: argparse.Namespace,
    checkpoint: Path,
    model: Model,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
) -> tuple[Progress, list[str]]:
    """Restores weights, and unless ``--finetune`` optimizer, schedule, position and random states.

    A ``release`` holds weights alone.

    Returns:
        The progress to go on from, and lines for the log.

    Raises:
        CheckpointError: the checkpoint lacks what is asked of it.
    """
    notes = []
    saved = saved_arguments(checkpoint)
    weights_alone = args.finetune or checkpoint.name == RELEASE
    with_optimizer = not (weights_alone or args.no_load_optim)
    if with_optimizer and saved.get("no_save_optim"):
        raise CheckpointError(f"{checkpoint} holds no optimizer state: add --no-load-optim or --finetune")
    check_arguments(args, saved, checkpoint, with_optimizer)
    notes += changes(args, saved)
    if not weights_alone:
        notes += check_data(args, saved, checkpoint)
    if with_optimizer:
        _check_expert_ranks(args, saved, checkpoint)
    with_rng = not (weights_alone or args.no_load_rng)
    if with_rng and any(saved.get(name) != getattr(args, name) for name in _LAYOUT):
        with_rng = False
        notes.append("random states: seeded anew, the parallel layout differs from the checkpoint's")
    state = without_scales(_model_state(model))
    if not weights_alone:
        state.update(progress={}, scheduler={})
    if with_rng:
        state["rng"] = _rng_state()
    if with_optimizer:
        state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=True, metadata=_metadata())
    loaded = read(state, checkpoint)
    _load_chunks(model, loaded)
    if with_optimizer:
        optimizer.load_state_dict(loaded["optimizer"])
    else:
        optimizer.reload_model_params()
    if weights_alone:
        return Progress(), notes
    _load_schedule(args, checkpoint, optimizer, scheduler, loaded["scheduler"])
    if with_rng:
        _set_rng_state(loaded["rng"])
    return Progress(**loaded["progress"]), notes


def _check_expert_ranks(args: argparse.Namespace, saved: Mapping[str, Any], checkpoint: Path) -> None:
    expert_ranks = saved.get("expert_model_parallel_size", 1), args.expert_model_parallel_size
    if min(expert_ranks) == 1 < max(expert_ranks):
        raise CheckpointError(
            f"{checkpoint}: megatron-core cannot carry optimizer state from --expert-model-parallel-size "
            f"{expert_ranks[0]} to {expert_ranks[1]}: add --no-load-optim, or keep the size"
        )


def _load_schedule(
    args: argparse.Namespace,
    checkpoint: Path,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    state: dict[str, Any],
) -> None:
    try:
        scheduler.load_state_dict(state)
    except AssertionError as error:
        raise CheckpointError(
            f"{checkpoint} was trained with another learning-rate schedule ({error}): give the same --lr, --min-lr, "
            "--train-iters and --lr-... flags, or --override-opt-param-scheduler for these, or "
            "--use-checkpoint-opt-param-scheduler for the checkpoint's"
        ) from None
    if args.override_opt_param_scheduler:
        # The scheduler asks the parameter groups first, which came with the optimizer state.
        for group in optimizer.param_groups:
            group["max_lr"], group["min_lr"] = args.lr, args.min_lr
        scheduler.step(0)


def load_weights(checkpoint: Path, model: Model) -> None:
    """Restores the latent weights alone; collective over all ranks, at any parallel layout."""
    loaded = read(without_scales(_model_state(model)), checkpoint)
    _load_chunks(model, loaded)


def _load_chunks(model: Model, loaded: dict[str, Any]) -> None:
    for index, chunk in enumerate(model.bare):
        chunk.load_state_dict(loaded[_chunk_key(model, index)])


def _chunk_key(model: Model, index: int) -> str:
    return "model" if len(model.bare) == 1 else f"model{index}"


def _model_state(model: Model) -> dict[str, Any]:
    return {_chunk_key(model, i): chunk.sharded_state_dict(metadata=_metadata()) for i, chunk in enumerate(model.bare)}


def _metadata() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": _RESHARDABLE,
        "distrib_optim_fully_reshardable_mem_efficient": False,
        # With expert parallelism there are two optimizers: their keys must not depend on it.
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _rng_state() -> ShardedObject:
    """The random states of this tensor / pipeline rank, under Megatron-LM's key."""
    state = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state(),
        "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    pp, tp = parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()
    shape = (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    return ShardedObject("rng_state", [state], shape, (pp, tp), replica_id=parallel_state.get_data_parallel_rank())


def _set_rng_state(loaded: list[dict[str, Any]]) -> None:
    state = loaded[0]
    random.setstate(state["random_rng_state"])
    np.random.set_state(state["np_rng_state"])
    torch.set_rng_state(state["torch_rng_state"])
    torch.cuda.set_rng_state(state["cuda_rng_state"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["rng_tracker_states"])


def _gather_parameters(model: Model) -> None:
    """Completes the weights: with ``--overlap-param-gather`` other ranks' shards come with the next forward only."""
    for chunk in model.chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.disable_forward_pre_hook(param_sync=True)
            chunk.enable_forward_pre_hook()

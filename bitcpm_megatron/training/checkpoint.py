# SPDX-License-Identifier: Apache-2.0
"""Saving and loading the state of a run as checkpoints in megatron-core's ``torch_dist`` format."""

import argparse
import contextlib
import errno
import os
import random
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.models.gpt import GPTModel
from torch.distributed.checkpoint.api import CheckpointException

from ..agreement import all_gathered, together
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
from ..nn.cache import set_ramp
from ..parallel.resident import latents
from ..parallel.sharded_scales import without_scales
from ..patches.megatron_core import checkpointing
from ..quantization.record import QuantizerRecord
from .initialize import sum_over_ranks
from .model import Model, build_model
from .run import Run

_RESHARDABLE = "fully_reshardable"
_LAYOUT = [f"{kind}_parallel_size" for kind in ("tensor_model", "pipeline_model", "expert_model", "data", "context")]


class Saver:
    """Writes the checkpoints of a run; collective over all ranks.

    With ``--async-save`` a forked process writes a snapshot of the current state while training goes on, and the
    checkpoint is published at a later :meth:`poll`. A save waits for the one before it. A save that fails, for example
    on a full disk, leaves no files: the method that meets the failure, which may be any method, raises
    :class:`~bitcpm_megatron.cli.FailedError`, on every rank alike.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._queue = AsyncCallsQueue() if run.args.async_save else None
        self._bytes = 0
        # The checkpoint that is being written, and those that have become complete since the last poll.
        self._final = Path()
        self._complete: list[Path] = []
        self._record = run.model.record
        checkpointing.bind_checkpoint_writers()
        checkpointing.hold_write_errors()

    def save(self) -> None:
        """Saves the current state, or begins to."""
        self.wait()
        with latents(self._run.model.chunks):
            self._save()

    def _save(self) -> None:
        run, args = self._run, self._run.args
        self._final = iteration_directory(args.save, run.iteration)
        if run.model.record is not None:
            self._record = replace(run.model.record, ramp=run.ramp)
        for chunk in run.model.chunks:
            if chunk.ddp_config.overlap_param_gather:
                # Otherwise the other ranks' shards of the weights would arrive only with the next forward pass.
                chunk.disable_forward_pre_hook(param_sync=True)
                chunk.enable_forward_pre_hook()
        state = _model_state(run.model)
        state.update(
            progress={"iteration": run.iteration, "consumed_samples": run.consumed_samples},
            scheduler=run.scheduler.state_dict(),
            rng=_rng_state(args),
        )
        if not args.no_save_optim:
            state["optimizer"] = run.optimizer.sharded_state_dict(state, metadata=_metadata())
        with self._or_nothing():
            temporary = incomplete_directory(self._final)
            self._bytes = sum_over_ranks(_bytes(state))
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
            request.add_finalize_fn(lambda: self._publish(temporary))
            if self._queue is None:
                request.execute_sync()
            else:
                request = request._replace(async_fn=with_digests(request.async_fn, temporary))
                self._queue.schedule_async_request(request)

    def poll(self) -> list[Path]:
        """Returns the checkpoints that have become complete since the last call."""
        self._is_writing()
        complete, self._complete = self._complete, []
        return complete

    def wait(self) -> None:
        """Waits until every checkpoint that was begun is complete.

        Raises:
            FailedError: if a checkpoint cannot be written, or its writer does not finish within
                ``--distributed-timeout-minutes``.
        """
        deadline = time.monotonic() + 60 * self._run.args.distributed_timeout_minutes
        while self._is_writing():
            if time.monotonic() > deadline:
                raise FailedError(
                    "the asynchronous writer of the checkpoint does not finish: one of its processes may have been "
                    "killed (out of memory?). The checkpoint before it is complete"
                )
            time.sleep(0.02)

    def _is_writing(self) -> bool:
        """Returns whether a checkpoint is still being written; publishes those whose writing has finished."""
        if self._queue is None or not self._queue.get_num_unfinalized_calls():
            return False
        with self._or_nothing():
            # With blocking=True, upstream's writer would wait forever for a killed process of its own.
            self._queue.maybe_finalize_async_calls(blocking=False)
        return self._queue.get_num_unfinalized_calls() > 0

    def _publish(self, temporary: Path) -> None:
        with together():
            checkpointing.raise_held_write_error()
        digests = gather_digests(temporary)
        with together():
            if torch.distributed.get_rank() == 0:
                write_arguments(temporary, vars(self._run.args))
                if self._record is not None:
                    self._record.write(temporary)
                write_digests(temporary, digests)
                publish_checkpoint(temporary, self._final, self._run.args.keep_last_n)
        self._complete.append(self._final)

    @contextlib.contextmanager
    def _or_nothing(self) -> Iterator[None]:
        """Removes an incomplete checkpoint if writing it raises, which happens on every rank alike."""
        final = self._final
        try:
            yield
        except (OSError, CheckpointException) as error:
            told = all_gathered(_words(error))
            free = shutil.disk_usage(final.parent).free
            if torch.distributed.get_rank() == 0:
                shutil.rmtree(incomplete_directory(final), ignore_errors=True)
            raise FailedError(
                f"{final} cannot be written ({next(filter(None, told), 'no reason given')}): {self._bytes:,} bytes are "
                f"needed, {free:,} were free. Nothing of it was kept, and the checkpoint before it is complete: free "
                "some space and start the same command again"
            ) from error


def _words(error: OSError | CheckpointException) -> str:
    """Returns the reason why something was not written; empty on ranks to which upstream does not report it."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    causes = [str(cause) for cause, _ in error.failures.values()]
    return re.sub(r"^Worker failure: |\[Errno \d+\] ", "", causes[0]) if causes else ""


def _bytes(state: dict[str, Any]) -> int:
    """Returns how many bytes of a sharded state dict this rank writes."""
    tensors = (value for value in nested_values(state) if isinstance(value, ShardedTensor | ShardedTensorFactory))
    return sum(t.data.nbytes for t in tensors if is_main_replica(t.replica_id) and t.data is not None)


def load(run: Run, checkpoint: Path) -> list[str]:
    """Restores the state of a run from a checkpoint, and returns lines for the log.

    The state is the weights and, without ``--finetune``, also the optimizer, the schedule, the position in the data
    and the random states. A ``release`` holds weights only.

    Raises:
        CheckpointError: if the checkpoint lacks what is requested, or does not fit the arguments.
    """
    args, saved = run.args, saved_arguments(checkpoint)
    weights_alone = args.finetune or checkpoint.name == RELEASE
    with_optimizer = not (weights_alone or args.no_load_optim)
    if with_optimizer and saved.get("no_save_optim"):
        raise CheckpointError(f"{checkpoint} holds no optimizer state: add --no-load-optim or --finetune")
    check_arguments(args, saved, checkpoint, with_optimizer)
    notes = changes(args, saved)
    if not weights_alone:
        notes += check_data(args, saved, checkpoint)
    expert_ranks = saved.get("expert_model_parallel_size", 1), args.expert_model_parallel_size
    if with_optimizer and min(expert_ranks) == 1 < max(expert_ranks):
        raise CheckpointError(
            f"{checkpoint}: megatron-core cannot carry optimizer state from --expert-model-parallel-size "
            f"{expert_ranks[0]} to {expert_ranks[1]}: add --no-load-optim, or keep the size"
        )
    with_rng = not (weights_alone or args.no_load_rng)
    if with_rng and any(saved.get(name, 1) != getattr(args, name) for name in _LAYOUT):
        with_rng = False
        notes.append("random states: seeded anew, the parallel layout differs from the checkpoint's")
    state = without_scales(_model_state(run.model))
    if not weights_alone:
        state.update(progress={}, scheduler={})
    if with_rng:
        state["rng"] = _rng_state(args)
    if with_optimizer:
        state["optimizer"] = run.optimizer.sharded_state_dict(state, is_loading=True, metadata=_metadata())
    loaded = _load(checkpoint, run.model, state)
    if with_optimizer:
        run.optimizer.load_state_dict(loaded["optimizer"])
    else:
        run.optimizer.reload_model_params()
    if not weights_alone:
        _load_schedule(run, checkpoint, loaded["scheduler"])
        run.iteration, run.consumed_samples = (loaded["progress"][name] for name in ("iteration", "consumed_samples"))
    if with_rng:
        _set_rng_state(loaded["rng"])
    return [f"loaded {checkpoint}, going on after iteration {run.iteration}", *notes]


def _load_schedule(run: Run, checkpoint: Path, state: dict[str, Any]) -> None:
    try:
        run.scheduler.load_state_dict(state)
    except AssertionError as error:
        raise CheckpointError(
            f"{checkpoint} was trained with another schedule of learning rate or weight decay ({error}): give the same "
            "--lr, --min-lr, --train-iters, --lr-... and --...weight-decay... flags, or --override-opt-param-scheduler "
            "for these, or --use-checkpoint-opt-param-scheduler for the checkpoint's"
        ) from None
    if run.args.override_opt_param_scheduler:
        # The scheduler prefers the rates of the parameter groups, which were loaded with the optimizer state.
        for group in run.optimizer.param_groups:
            group["max_lr"], group["min_lr"] = run.args.lr, run.args.min_lr
    # load_state_dict() sets the weight decay of this moment before it has restored the checkpoint's.
    run.scheduler.step(0)


def load_weights(checkpoint: Path, model: Model) -> None:
    """Restores only the latent weights; collective over all ranks, in any parallel layout."""
    _load(checkpoint, model, without_scales(_model_state(model)))


def trained_model(args: argparse.Namespace, checkpoint: Path, padded_vocab_size: int) -> Model:
    """Returns the model of a checkpoint for inference, without gradients; collective over all ranks.

    A model that was saved during the quantizer's ramp computes what the next step of its run would compute.

    Args:
        args: the arguments from :func:`~.flags.arguments_of`, with the layout of the process groups.
        checkpoint: the checkpoint that the weights come from.
        padded_vocab_size: the rows of the embedding; the values of rows that the checkpoint lacks are undefined.
    """
    model = build_model(args, padded_vocab_size, with_ddp=False)
    load_weights(checkpoint, model)
    record = QuantizerRecord.read(checkpoint)
    set_ramp(model.bare, 1.0 if record is None else record.ramp)
    for chunk in model.chunks:
        chunk.requires_grad_(False).eval()
    return model


def _load(checkpoint: Path, model: Model, state: dict[str, Any]) -> dict[str, Any]:
    """Reads the entries of a sharded state dict from a checkpoint, and loads the weights among them into the model."""
    loaded = read(state, checkpoint)
    for key, chunk in _chunks(model).items():
        chunk.load_state_dict(loaded[key])
    return loaded


def _chunks(model: Model) -> dict[str, GPTModel]:
    """Returns the model chunks of this rank, by their names in a checkpoint."""
    return {"model" if len(model.bare) == 1 else f"model{i}": chunk for i, chunk in enumerate(model.bare)}


def _model_state(model: Model) -> dict[str, Any]:
    return {key: chunk.sharded_state_dict(metadata=_metadata()) for key, chunk in _chunks(model).items()}


def _metadata() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": _RESHARDABLE,
        "distrib_optim_fully_reshardable_mem_efficient": False,
        # With expert parallelism there are two optimizers; the keys must be the same as without it.
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _rng_state(args: argparse.Namespace) -> ShardedObject:
    """Returns the random states of this tensor- and pipeline-parallel rank, under Megatron-LM's key."""
    state = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state(),
        "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    pp, tp = parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()
    shape = args.pipeline_model_parallel_size, args.tensor_model_parallel_size
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    return ShardedObject("rng_state", [state], shape, (pp, tp), replica_id=replica)


def _set_rng_state(loaded: list[dict[str, Any]]) -> None:
    state = loaded[0]
    random.setstate(state["random_rng_state"])
    np.random.set_state(state["np_rng_state"])
    torch.set_rng_state(state["torch_rng_state"])
    torch.cuda.set_rng_state(state["cuda_rng_state"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["rng_tracker_states"])

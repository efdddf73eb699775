# SPDX-License-Identifier: Apache-2.0
"""Patches of megatron-core, for every device."""

import contextlib
import functools
import inspect
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.managers import SyncManager
from typing import Any

import torch
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from . import ORIGINAL, end_with_parent, logger, replace

ChunkListener = Callable[[torch.nn.Module], None]
ScheduleListener = Callable[[Sequence[torch.nn.Module]], None]

_started: list[ScheduleListener] = []
_trained: list[ScheduleListener] = []
_ended: list[ScheduleListener] = []


def announce_schedules(on_start: ScheduleListener, on_first: ChunkListener, on_end: ScheduleListener) -> None:
    """Tells when a schedule starts, when a model chunk starts its first micro-batch in it, and when it is over.

    Displaces ``megatron.core.transformer.module.MegatronModule.set_is_first_microbatch``, which acts only when fp8, fp4
    or kitchen is configured, and ``forward_backward_*`` in ``megatron.core.pipeline_parallel.schedules``
    (``get_forward_backward_func`` looks them up there at each call, so nothing else needs to change). Without the first
    a cached quantized weight would never be renewed; without the second a plain ``model(x)`` outside a schedule could
    see one that the optimizer has made stale. The originals run unchanged.

    Args:
        on_start: called with all chunks of the schedule.
        on_first: called with the chunk as the schedule holds it (wrapped in DDP and Float16Module, as the case may be).
        on_end: called with all chunks of the schedule, also when it raised.
    """
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.transformer.module import MegatronModule

    _add(_started, on_start)
    _add(_ended, on_end)

    def announce_first(original: Callable) -> Callable:
        @functools.wraps(original)
        def set_is_first_microbatch(self: torch.nn.Module) -> None:
            on_first(self)
            original(self)

        return set_is_first_microbatch

    replace(MegatronModule, "set_is_first_microbatch", announce_first)
    for name in (
        "forward_backward_no_pipelining",
        "forward_backward_pipelining_without_interleaving",
        "forward_backward_pipelining_with_interleaving",
    ):
        replace(schedules, name, announced)


def announce_training(on_start: ScheduleListener, on_trained: ScheduleListener) -> None:
    """Tells when a schedule starts, and when one that computes gradients has run all its micro-batches.

    What :func:`announce_schedules` puts in place tells it. ``on_trained`` is called neither after a forward-only
    schedule nor after one that raised.

    Args:
        on_start: called with all chunks of any schedule.
        on_trained: called with all chunks of the schedule.
    """
    _add(_started, on_start)
    _add(_trained, on_trained)


def _add(listeners: list[ScheduleListener], listener: ScheduleListener) -> None:
    if listener not in listeners:
        listeners.append(listener)


def _tell(listeners: list[ScheduleListener], chunks: Sequence[torch.nn.Module]) -> None:
    for listener in listeners:
        listener(chunks)


def announced(schedule: Callable) -> Callable:
    """A schedule that tells the listeners of :func:`announce_schedules` and :func:`announce_training`; itself if it
    does."""
    if hasattr(schedule, ORIGINAL):
        return schedule

    @functools.wraps(schedule)
    def forward_backward(*args, model: torch.nn.Module | list[torch.nn.Module], **kwargs):  # noqa: ANN202
        chunks = model if isinstance(model, list) else [model]
        _tell(_started, chunks)
        try:
            result = schedule(*args, model=model, **kwargs)
        finally:
            _tell(_ended, chunks)
        if not kwargs.get("forward_only", False):
            _tell(_trained, chunks)
        return result

    setattr(forward_backward, ORIGINAL, schedule)
    return forward_backward


def allow_sequence_parallel_torch_norm() -> None:
    """Lets torch's RMSNorm / LayerNorm run under sequence parallelism.

    Displaces ``megatron.core.transformer.torch_norm.WrappedTorchNorm.__new__``, which asserts that sequence parallelism
    is off, so that neither Apex nor Transformer Engine can be done without. What is missing there is only the mark
    ``sequence_parallel`` on the parameters: ``finalize_model_grads`` sums the gradients of marked parameters over the
    tensor-parallel group, and without it every rank would train its own norm weights on its own part of the sequence.
    """
    from megatron.core.transformer import torch_norm

    def marked(original: Callable) -> Callable:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def __new__(cls: type, *args, **kwargs) -> torch.nn.Module:  # noqa: N807
            config = signature.bind(cls, *args, **kwargs).arguments["config"]
            wanted, config.sequence_parallel = config.sequence_parallel, False
            try:
                norm = original(cls, *args, **kwargs)
            finally:
                config.sequence_parallel = wanted
            for parameter in norm.parameters():
                parameter.sequence_parallel = wanted
            return norm

        return __new__

    replace(torch_norm.WrappedTorchNorm, "__new__", marked)


class FusedAdam(torch.optim.Optimizer):
    """Adam with the interface of Apex's ``FusedAdam``, on torch's own fused kernel.

    The one difference from ``torch.optim.AdamW`` that matters: the step count lives in ``param_groups``, not in the
    per-parameter state, which is what megatron-core's distributed optimizer saves and restores.

    Args:
        params: parameters or groups.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to the denominator.
        weight_decay: coefficient.
        adam_w_mode: decoupled weight decay (AdamW); otherwise L2 regularisation.
        capturable: whether steps must work inside a CUDA graph; megatron-core 0.17 and newer hand it over.

    Raises:
        ValueError: a step that can be captured is asked for, which this one cannot: it makes its step counts anew.
    """

    def __init__(
        self,
        params,  # noqa: ANN001 - torch.optim's ParamsT
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if capturable:
            raise ValueError(
                "optimizer_cuda_graph: the Adam that stands in for Apex's cannot be captured in a CUDA graph: "
                "switch it off, or install Transformer Engine or Apex"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        """One update of every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("FusedAdam takes no closure: compute the gradients before step()")
        update = adamw if self.adam_w_mode else adam
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
            if not params:
                continue
            beta1, beta2 = group["betas"]
            update(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                # torch counts the step up itself, in these throw-away tensors.
                [torch.full((), group["step"] - 1.0, device=p.device) for p in params],
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


def provide_fused_adam() -> None:
    """Gives megatron-core an Apex-like Adam where neither Apex nor Transformer Engine is installed.

    Sets ``Adam`` in ``megatron.core.optimizer`` and in ``megatron.core.optimizer.distrib_optimizer``, and the flags
    there that say an Apex-like Adam is used (``USING_PYTORCH_OPTIMIZER`` and ``USING_APEX_OPTIMIZER`` are absent in
    0.12.1). With torch's AdamW the distributed optimizer asserts on one common step count when it is saved, and cannot
    be loaded on a rank that holds no shard.
    """
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    optimizer.Adam = distrib_optimizer.Adam = FusedAdam
    distrib_optimizer.HAVE_APEX_OR_TE = True
    if hasattr(optimizer, "USING_PYTORCH_OPTIMIZER"):
        optimizer.USING_PYTORCH_OPTIMIZER = False
        distrib_optimizer.USING_APEX_OPTIMIZER = True
    logger.info("patched megatron.core.optimizer.Adam")


def load_optimizer_under_other_rates() -> None:
    """Lets optimizer state be loaded by a run with another learning rate, as before megatron-core 0.19.

    Takes ``max_lr`` and ``min_lr`` out of ``param_group_identifier_keys`` in ``megatron.core.optimizer.optimizer`` and
    ``megatron.core.optimizer.distrib_optimizer``, by which a parameter group finds its saved one. With them a changed
    ``--lr`` ends in a KeyError before the scheduler is asked: neither ``--override-opt-param-scheduler`` nor
    ``--use-checkpoint-opt-param-scheduler`` can work, nor can a message name them. For our own loop alone, whose groups
    never differ by their rates. 0.12.1 has no such name: it takes the saved groups in their order.
    """
    from megatron.core.optimizer import distrib_optimizer, optimizer

    for module in (optimizer, distrib_optimizer):
        keys = getattr(module, "param_group_identifier_keys", ())
        structural = tuple(key for key in keys if key not in ("max_lr", "min_lr"))
        if structural != keys:
            module.param_group_identifier_keys = structural
            logger.info("patched %s.param_group_identifier_keys", module.__name__)


def allow_distributed_optimizer_without_te() -> None:
    """Lets the distributed optimizer of megatron-core 0.12.1 step where Transformer Engine is absent.

    Displaces ``megatron.core.optimizer.distrib_optimizer.quantize_param_shard``, which gets all fp8 parameters
    after each step and, without Transformer Engine, raises "Invalid Transformer Engine version" also when there are
    none. Later versions return at once, and so does this; with fp8 parameters the original still raises.
    """
    from megatron.core.optimizer import distrib_optimizer

    def unless_empty(original: Callable) -> Callable:
        @functools.wraps(original)
        def quantize_param_shard(model_params: Sequence[torch.Tensor], *args, **kwargs) -> None:
            if len(model_params) > 0:
                original(model_params, *args, **kwargs)

        return quantize_param_shard

    replace(distrib_optimizer, "quantize_param_shard", unless_empty)


def allow_moe_router_without_te() -> None:
    """Lets the router of a mixture of experts compute where Transformer Engine is absent.

    Sets ``megatron.core.transformer.moe.moe_utils.te_general_gemm`` to None where it is undefined. The router asks for
    "is not None" before it falls back to ``torch.mm``, and without Transformer Engine the name does not even exist
    (NameError). 0.12.1 does not know the name, and does not need it.
    """
    from megatron.core.transformer.moe import moe_utils

    if hasattr(moe_utils, "RouterGatingLinearFunction") and not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
        logger.info("patched megatron.core.transformer.moe.moe_utils.te_general_gemm")


def write_checkpoints_with_newer_torch() -> None:
    """Lets megatron-core 0.12.1 write torch_dist checkpoints with torch from 2.8 on.

    Displaces ``_write_item`` in ``megatron.core.dist_checkpointing.strategies.filesystem_async``: torch's function of
    that name takes the serialization format as one more argument, which 0.12.1 does not hand over. It gets the one that
    was meant before there was a choice, and every later version's writer passes it itself.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from torch.distributed.checkpoint import filesystem

    parameter = inspect.signature(filesystem._write_item).parameters.get("serialization_format")
    if parameter is None or parameter.default is not parameter.empty or not hasattr(filesystem_async, "_write_item"):
        return

    def with_format(original: Callable) -> Callable:
        @functools.wraps(original)
        def _write_item(*args, **kwargs):  # noqa: ANN202
            if len(args) + len(kwargs) == len(inspect.signature(original).parameters) - 1:
                kwargs["serialization_format"] = filesystem.SerializationFormat.TORCH_SAVE
            return original(*args, **kwargs)

        return _write_item

    replace(filesystem_async, "_write_item", with_format)


def save_asynchronously(state: Any, directory: str, **more: Any) -> Any:
    """``megatron.core.dist_checkpointing.save`` that leaves the writing to the caller, by megatron-core's own writer.

    From 0.17 on ``save`` hands it to the package ``nvidia-resiliency-ext`` by default, and raises where that is absent;
    neither :class:`~megatron.core.dist_checkpointing.strategies.async_utils.AsyncCallsQueue` nor
    :func:`bind_checkpoint_writers` and :func:`hold_write_errors` know its writer.

    Returns:
        The request to execute or to schedule.
    """
    from megatron.core.dist_checkpointing import save

    if "async_strategy" in inspect.signature(save).parameters:
        more["async_strategy"] = "mcore"
    return save(state, directory, async_sharded_save=True, **more)


_held_write_errors: list[Exception] = []
# What a scheduler sends to every process of a job, and what is meant for its ranks alone.
_REQUESTS_TO_STOP = (signal.SIGTERM, signal.SIGUSR1)


def hold_write_errors() -> None:
    """Keeps a rank that cannot write its file of a checkpoint from leaving the others in a collective operation.

    Displaces ``save_common`` of ``megatron.core.dist_checkpointing.strategies.common.TorchCommonSaveStrategy`` (0.17
    and 0.18 have it in ``...serialization``; with 0.19 what it wrote is an entry of rank 0's file), ``finish`` of
    ``...strategies.filesystem_async.FileSystemWriterAsync`` and ``save_config`` in ``...serialization``. Rank 0 alone
    writes there, and on a full disk raises there, while the other ranks wait for it in the plan or in a barrier until
    they time out. The error is kept instead, and :func:`raise_held_write_error` brings it up where all ranks are asked.
    """
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies import common, filesystem_async

    def holding(original: Callable) -> Callable:
        @functools.wraps(original)
        def write(*args, **kwargs) -> None:
            try:
                original(*args, **kwargs)
            except (OSError, RuntimeError) as error:
                _held_write_errors.append(error)

        return write

    for owner in (getattr(common, "TorchCommonSaveStrategy", None), serialization):
        if hasattr(owner, "save_common"):
            replace(owner, "save_common", holding)
    replace(filesystem_async.FileSystemWriterAsync, "finish", holding)
    replace(serialization, "save_config", holding)
    # Each rank would report the error of its writer; ours says it once.
    logging.getLogger(filesystem_async.__name__).setLevel(logging.CRITICAL)


def raise_held_write_error() -> None:
    """Raises the first error that :func:`hold_write_errors` has kept since the last call, if any.

    Raises:
        OSError: with the system's reason, or torch's words where its serializer does not tell the reason.
    """
    if not _held_write_errors:
        return
    error = _held_write_errors[0]
    _held_write_errors.clear()
    if isinstance(error, OSError):
        raise error
    raise OSError(f"torch.save: {error}") from error


def bind_checkpoint_writers() -> None:
    """Lets the processes that write checkpoints die with the rank that started them, and outlive signals to stop.

    Displaces ``_get_write_results_queue`` in ``megatron.core.dist_checkpointing.strategies.filesystem_async`` (from
    0.17 on ``get_write_results_queue``), whose helper process (it carries the writers' results) lives on when its rank
    is killed, with 270 MB per restart; and what the forked processes of ``FileSystemWriterAsync`` there run, which
    would go on writing into a directory that the restarted run has taken over: ``write_preloaded_data_multiproc`` and
    ``write_preloaded_data``, from 0.17 on ``write_preloaded_data_multithread`` alone, whose threads run the latter.
    SIGTERM and SIGUSR1, which a scheduler may send to every process of a job, mean that the rank shall save: its
    helpers are needed for that.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    def bound_queue(original: Callable) -> Callable:
        @functools.wraps(original)
        def get_write_results_queue(*args, **kwargs):  # noqa: ANN202
            if filesystem_async._results_queue is None:
                manager = SyncManager(ctx=torch.multiprocessing.get_context("spawn"))
                with _without_requests_to_stop():
                    manager.start(die_with_parent, (os.getpid(),))
                filesystem_async._results_queue = manager.Queue()
            return original(*args, **kwargs)

        return get_write_results_queue

    def bound_writer(original: Callable) -> Callable:
        @functools.wraps(original)
        def write(*args, **kwargs) -> None:
            if (parent := multiprocessing.parent_process()) is not None:
                die_with_parent(parent.pid)
            original(*args, **kwargs)

        return write

    writer = filesystem_async.FileSystemWriterAsync
    if hasattr(writer, "write_preloaded_data_multithread"):
        queue, processes = "get_write_results_queue", ("write_preloaded_data_multithread",)
    else:
        queue = "_get_write_results_queue"
        processes = ("write_preloaded_data_multiproc", "write_preloaded_data")
    if hasattr(filesystem_async, queue):
        replace(filesystem_async, queue, bound_queue)
    for name in processes:
        if replace(writer, name, bound_writer):
            setattr(writer, name, staticmethod(getattr(writer, name)))


def die_with_parent(parent: int) -> None:
    """Lets the kernel kill this process when its parent dies, and ignores the signals that ask a job to stop.

    Args:
        parent: its process id; where that one has died already, this process ends here. Only Linux can do this.
    """
    for number in _REQUESTS_TO_STOP:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(parent)


@contextlib.contextmanager
def _without_requests_to_stop() -> Iterator[None]:
    """Holds them back until the block ends. A process that is started in it never gets them, nor while it imports."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _REQUESTS_TO_STOP)
    try:
        # Started with the first such process; in CPython 3.11 that lets SIGTERM through again.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, _REQUESTS_TO_STOP)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def keep_sent_tensors() -> None:
    """Keeps a pipeline stage's output in memory until its backward pass, on the CPU.

    Displaces ``megatron.core.model_parallel_config.ModelParallelConfig.__post_init__`` to switch
    ``deallocate_pipeline_outputs`` off, which Megatron-LM switches on: gloo sends in the background, from memory that
    would be freed meanwhile (CUDA's streams keep the order), and interleaved stages then train on NaN.
    """
    from megatron.core.model_parallel_config import ModelParallelConfig

    def keeping(original: Callable) -> Callable:
        @functools.wraps(original)
        def __post_init__(self: ModelParallelConfig) -> None:  # noqa: N807
            original(self)
            self.deallocate_pipeline_outputs = False

        return __post_init__

    replace(ModelParallelConfig, "__post_init__", keeping)


@contextlib.contextmanager
def load_without_code(
    metadata: Any, screen: Callable[[Any], None], refused: Callable[[str, Exception], Exception]
) -> Iterator[None]:
    """While it lasts, ``megatron.core.dist_checkpointing.load`` runs no code that a checkpoint names.

    Displaces ``torch.distributed.checkpoint.FileSystemReader.read_metadata``, which unpickles ``.metadata``: it returns
    what the caller read safely. Displaces ``torch.load``, which megatron-core (``common.pt`` in 0.12.1 and 0.17.0) and
    ``DefaultLoadPlanner.load_bytes`` (entries of ``.distcp`` files that are no tensors) call with
    ``weights_only=False``: only classes that were declared safe are loaded. Displaces
    ``torch.distributed.checkpoint.utils._ReaderView.seek``, which counts from the end into the wrong direction, so that
    nobody but torch could read an entry as the archive that it is.

    Args:
        metadata: ``torch.distributed.checkpoint.metadata.Metadata`` of the checkpoint that is loaded.
        screen: raises where ``torch.load`` must not read a path or stream.
        refused: makes the error for an entry, given its name and what ``torch.load`` raised.
    """
    from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
    from torch.distributed.checkpoint.utils import _ReaderView

    load, load_bytes = torch.load, DefaultLoadPlanner.load_bytes

    def load_declared(source: Any, *args: Any, **options: Any) -> Any:
        screen(source)
        return load(source, *args, **{**options, "weights_only": True})

    def seek(self: Any, offset: int, whence: int = os.SEEK_SET, /) -> int:
        if whence == os.SEEK_CUR:
            return self.base_stream.seek(offset, whence)
        return self.base_stream.seek(self.offset + (self.len if whence == os.SEEK_END else 0) + offset)

    def load_named_bytes(self: Any, read_item: Any, value: Any) -> None:
        try:
            load_bytes(self, read_item, value)
        except Exception as error:  # whatever a damaged pickle makes of itself
            raise refused(read_item.storage_index.fqn, error) from error

    with (
        _displaced(FileSystemReader, "read_metadata", lambda *_, **__: metadata),
        _displaced(DefaultLoadPlanner, "load_bytes", load_named_bytes),
        _displaced(torch, "load", load_declared),
        _displaced(_ReaderView, "seek", seek),
    ):
        yield


@contextlib.contextmanager
def _displaced(owner: Any, attribute: str, replacement: Any) -> Iterator[None]:
    original = getattr(owner, attribute)
    setattr(owner, attribute, replacement)
    try:
        yield
    finally:
        setattr(owner, attribute, original)

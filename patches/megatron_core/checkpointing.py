# SPDX-License-Identifier: Apache-2.0
"""Patches of megatron-core's checkpoints, for newer torch, full disks, orphaned writers and loading without code.

Orphaned writers are processes that outlive their rank. Loading without code means that loading a checkpoint runs no
code that the checkpoint names.
"""

import contextlib
import inspect
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.managers import SyncManager
from typing import Any

import torch

from .. import REQUESTS_TO_STOP, end_with_parent, logger, replace

_STRATEGIES = "megatron.core.dist_checkpointing.strategies"


def write_checkpoints_with_newer_torch() -> None:
    """Lets megatron-core 0.12.1 write torch_dist checkpoints with torch 2.8 and newer.

    Displaces ``_write_item`` in ``megatron.core.dist_checkpointing.strategies.filesystem_async``: torch's function of
    that name takes the serialization format as one more argument, which 0.12.1 does not pass. The replacement passes
    ``TORCH_SAVE``, the only format of older versions of torch. Later versions of megatron-core pass it themselves.
    """

    def with_format(original: Callable, *args, **kwargs) -> Any:
        parameters = inspect.signature(original).parameters
        if "serialization_format" in parameters and len(args) + len(kwargs) == len(parameters) - 1:
            from torch.distributed.checkpoint.filesystem import SerializationFormat

            kwargs["serialization_format"] = SerializationFormat.TORCH_SAVE
        return original(*args, **kwargs)

    replace(f"{_STRATEGIES}.filesystem_async._write_item", with_format, missing_ok=True)


def save_asynchronously(state: Any, directory: str, **more: Any) -> Any:
    """Calls ``megatron.core.dist_checkpointing.save`` with megatron-core's own writer, which the caller then runs.

    From 0.17 on ``save`` gives the writing to the package ``nvidia-resiliency-ext`` by default, and raises if that is
    absent; neither :class:`~megatron.core.dist_checkpointing.strategies.async_utils.AsyncCallsQueue` nor
    :func:`bind_checkpoint_writers` and :func:`hold_write_errors` know its writer.

    Returns:
        The request, which the caller executes or schedules.
    """
    from megatron.core.dist_checkpointing import save

    if "async_strategy" in inspect.signature(save).parameters:
        more["async_strategy"] = "mcore"
    return save(state, directory, async_sharded_save=True, **more)


_held_write_errors: list[Exception] = []


def hold_write_errors() -> None:
    """Keeps a rank that cannot write its file of a checkpoint from leaving the others in a collective operation.

    Displaces ``save_common`` of ``megatron.core.dist_checkpointing.strategies.common.TorchCommonSaveStrategy`` (0.17
    and 0.18 have it in ``...serialization``; with 0.19 its content is an entry of rank 0's file), ``finish`` of
    ``...strategies.filesystem_async.FileSystemWriterAsync`` and ``save_config`` in ``...serialization``. Only rank 0
    writes in these functions, and raises there on a full disk, while the other ranks wait for it in the plan or in a
    barrier until they time out. The error is kept instead, and :func:`raise_held_write_error` raises it at a point
    where all ranks agree.
    """

    def hold(original: Callable, *args, **kwargs) -> None:
        try:
            original(*args, **kwargs)
        except (OSError, RuntimeError) as error:
            _held_write_errors.append(error)

    serialization = "megatron.core.dist_checkpointing.serialization"
    replace(f"{_STRATEGIES}.common.TorchCommonSaveStrategy.save_common", hold, missing_ok=True)
    replace(f"{serialization}.save_common", hold, missing_ok=True)
    replace(f"{serialization}.save_config", hold)
    replace(f"{_STRATEGIES}.filesystem_async.FileSystemWriterAsync.finish", hold)
    # Upstream would report the error on each rank; ours is reported once.
    logging.getLogger(f"{_STRATEGIES}.filesystem_async").setLevel(logging.CRITICAL)


def raise_held_write_error() -> None:
    """Raises the first error that :func:`hold_write_errors` has kept since the last call, if any.

    Raises:
        OSError: if an error was kept; with the system's reason, or torch's message if its serializer hides the reason.
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
    0.17 on ``get_write_results_queue``), whose helper process (it transfers the writers' results) survives when its
    rank is killed, with 270 MB per restart. Also displaces the functions that the forked processes of
    ``FileSystemWriterAsync`` there run, which would go on writing into a directory that the restarted run has taken
    over: ``write_preloaded_data_multiproc`` and ``write_preloaded_data``, from 0.17 on only
    ``write_preloaded_data_multithread``, whose threads run the latter. SIGTERM and SIGUSR1, which a scheduler may send
    to every process of a job, ask the rank to save, and its helpers are needed for that.
    """
    for name in ("_get_write_results_queue", "get_write_results_queue"):
        replace(f"{_STRATEGIES}.filesystem_async.{name}", _bound_queue, missing_ok=True)
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    threaded = hasattr(FileSystemWriterAsync, "write_preloaded_data_multithread")
    for kind in ("_multithread",) if threaded else ("_multiproc", ""):
        replace(f"{_STRATEGIES}.filesystem_async.FileSystemWriterAsync.write_preloaded_data{kind}", _bound_writer)


def _bound_queue(original: Callable, *args, **kwargs) -> Any:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=torch.multiprocessing.get_context("spawn"))
        with _without_requests_to_stop():
            manager.start(die_with_parent, (os.getpid(),))
        filesystem_async._results_queue = manager.Queue()
    return original(*args, **kwargs)


def _bound_writer(original: Callable, *args, **kwargs) -> None:
    if (parent := multiprocessing.parent_process()) is not None and parent.pid is not None:
        die_with_parent(parent.pid)
    original(*args, **kwargs)


def die_with_parent(parent: int) -> None:
    """Lets this process die with its parent and ignore the signals that ask a job to stop.

    The kernel ends the process, as :func:`~bitcpm_megatron.patches.end_with_parent` describes.
    """
    for number in REQUESTS_TO_STOP:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(parent)


@contextlib.contextmanager
def _without_requests_to_stop() -> Iterator[None]:
    """Holds back requests to stop during a block; a process that is started in it never gets them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS_TO_STOP)
    try:
        # The first such process would start the resource tracker, which unblocks SIGTERM in CPython 3.11. It is started
        # here instead, and the signals are blocked again.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS_TO_STOP)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def load_optimizer_under_other_rates() -> None:
    """Lets a run with another learning rate load optimizer state, which megatron-core 0.19 refuses.

    Removes ``max_lr`` and ``min_lr`` from ``param_group_identifier_keys`` in ``megatron.core.optimizer.optimizer`` and
    ``megatron.core.optimizer.distrib_optimizer``, by which a parameter group finds its saved one. With them a changed
    ``--lr`` ends in a KeyError before the scheduler is consulted: neither ``--override-opt-param-scheduler`` nor
    ``--use-checkpoint-opt-param-scheduler`` can work, nor can a message name them. This is only for our own loop, whose
    groups never differ in their rates. 0.12.1 has no such name: it takes the saved groups in their order.
    """
    from megatron.core.optimizer import distrib_optimizer, optimizer

    for module in (optimizer, distrib_optimizer):
        keys = getattr(module, "param_group_identifier_keys", ())
        structural = tuple(key for key in keys if key not in ("max_lr", "min_lr"))
        if structural != keys:
            module.param_group_identifier_keys = structural
            logger.info("patched %s.param_group_identifier_keys", module.__name__)


@contextlib.contextmanager
def load_without_code(
    metadata: Any, screen: Callable[[Any], None], refused: Callable[[str, Exception], Exception]
) -> Iterator[None]:
    """Keeps ``megatron.core.dist_checkpointing.load`` in a block from running code that a checkpoint names.

    Displaces ``torch.distributed.checkpoint.FileSystemReader.read_metadata``, which unpickles ``.metadata``: it returns
    what the caller has read safely. Displaces ``torch.load``, which megatron-core (``common.pt`` in 0.12.1 and 0.17.0)
    and ``DefaultLoadPlanner.load_bytes`` (entries of ``.distcp`` files that are no tensors) call with
    ``weights_only=False``: only classes that were declared safe are loaded. Displaces
    ``torch.distributed.checkpoint.utils._ReaderView.seek``, which counts from the end in the wrong direction, so that
    only torch itself could read an entry as the archive that it is.

    Args:
        metadata: the ``torch.distributed.checkpoint.metadata.Metadata`` of the checkpoint that is loaded.
        screen: a function that raises if ``torch.load`` must not read a path or stream.
        refused: a function that makes the error for an entry, from its name and the error of ``torch.load``.
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
        except Exception as error:  # A damaged pickle may raise errors of any type.
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

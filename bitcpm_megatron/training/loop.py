# SPDX-License-Identifier: Apache-2.0
"""The training loop: one pretraining run from arguments to its last checkpoint."""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func

from ..checkpoints.compatibility import check_quantizer
from ..checkpoints.digests import verify_digests
from ..checkpoints.directory import CheckpointError, check_start, latest
from ..checkpoints.directory_lock import held
from ..cli import FailedError
from ..objectives.language_modeling import LossOf, Objective, language_modeling
from ..parallel import Telemetry
from ..quantization import scales_are_finite
from ..quantization.record import QuantizerRecord
from ..ternary_flags import take_recorded_shards
from . import checkpoint
from .checkpoint import Progress
from .data import (
    Batch,
    Data,
    DataError,
    batches,
    build_data,
    build_tokenizer,
    find_files,
    refuse_unknown_tokens,
    withdraw_unknown_tokens,
)
from .initialize import ExitSignals, device
from .model import Model, build_model, parameter_count, params_dtype
from .optimizer import build_optimizer, build_scheduler, learning_rate, step
from .report import RunReport, StepResult

_CURE = "Resume from the last checkpoint with a lower --lr (and --override-opt-param-scheduler) or --clip-grad"


class TrainingError(FailedError):
    """Training cannot go on; the last checkpoint stands."""


@dataclass
class Run:
    """Everything that a training run moves, what it trains on, and what for."""

    model: Model
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    progress: Progress
    record: QuantizerRecord | None
    data: Data
    objective: Objective = language_modeling
    signals: ExitSignals = field(default_factory=ExitSignals)


def pretrain(args: argparse.Namespace) -> Progress:
    """Trains as the arguments say; the process groups must stand.

    Returns:
        How far the run has come.

    Raises:
        TrainingError, CheckpointError, RecipeError, ProbeError, ValueError: with the cure in the message.
    """
    with ExitSignals(args.exit_signal_handler) as signals, held(args.save) as note:
        return _pretrain(args, signals, note)


def _pretrain(args: argparse.Namespace, signals: ExitSignals, note: str | None) -> Progress:
    run = _prepare(args, note)
    run.signals = signals
    report = RunReport(args, run.progress, enabled=torch.distributed.get_rank() == 0)
    saver = checkpoint.Saver(args, run.record)
    try:
        _train(args, run, report, saver)
    except (TrainingError, DataError):
        # Raised on all ranks alike, so that the checkpoint that is being written can be completed.
        saver.wait()
        raise
    finally:
        report.close()
    return run.progress


def _prepare(args: argparse.Namespace, note: str | None) -> Run:
    """Builds the model, loads the checkpoint that ``--load`` names, finds the data, and prints what was decided."""
    found = _find_checkpoint(args)
    tokenizer, vocabulary = build_tokenizer(args)
    files = find_files(args)
    model = build_model(args, vocabulary)
    record = None if model.ternary is None else model.ternary.record
    optimizer = build_optimizer(args, model)
    scheduler = build_scheduler(args, optimizer)
    progress, notes = Progress(), [*model.notes, *filter(None, [note])]
    if found is not None:
        if args.verify_digests:
            notes.append(f"every file of {found} matches its digest")
        notes.append(check_quantizer(found, record, args.allow_quantizer_change))
        progress, more = checkpoint.load(args, found, model, optimizer, scheduler)
        notes += [f"loaded {found}, going on after iteration {progress.iteration}", *more]
    elif args.load is not None:
        notes.append(f"no checkpoint in {args.load}: starting anew")
    if args.save is not None:
        check_start(args.save, found, progress.iteration)
    data = build_data(args, tokenizer, files)
    notes += filter(None, [data.note])
    _introduce(args, model, vocabulary, notes)
    return Run(model, optimizer, scheduler, progress, record, data)


def _train(args: argparse.Namespace, run: Run, report: RunReport, saver: checkpoint.Saver) -> None:
    progress = run.progress
    data = batches(args, run.data.train, progress.consumed_samples)
    telemetry = Telemetry(run.model.bare) if args.ternary_telemetry_interval else None
    while progress.iteration < args.train_iters:
        observed = telemetry if _due(progress.iteration + 1, args.ternary_telemetry_interval) else None
        result = train_step(args, run, data, observed)
        progress.iteration += 1
        progress.consumed_samples += args.global_batch_size
        report.step(progress, result)
        last = progress.iteration == args.train_iters
        leaving = last or run.signals.agreed or _due(progress.iteration, args.exit_interval)
        if run.data.valid is not None and (last or _due(progress.iteration, args.eval_interval)):
            report.valid(progress, evaluate(args, run.model, batches(args, run.data.valid, 0)))
        if args.save is not None and (leaving or _due(progress.iteration, args.save_interval)):
            started = time.perf_counter()
            _refuse_broken_weights(run.model)
            saver.save(run.model, run.optimizer, run.scheduler, progress)
            report.saving(progress, time.perf_counter() - started)
        if leaving:
            saver.wait()
        report.saved(saver.poll())
        if leaving:
            if run.signals.agreed and not last:
                report.stopped(progress)
            return


def _due(iteration: int, interval: int | None) -> bool:
    return interval is not None and iteration % interval == 0


def train_step(
    args: argparse.Namespace, run: Run, data: Iterator[Batch], telemetry: Telemetry | None = None
) -> StepResult:
    """One optimizer step.

    Args:
        args: of the run; ``num_microbatches`` batches are taken.
        run: what is moved.
        data: micro-batches ``[micro_batch_size, seq_length]`` of this data-parallel rank.
        telemetry: records the codes of this step, or None.

    Raises:
        TrainingError: training has diverged; on every rank alike.
    """
    started = time.perf_counter()
    rate = learning_rate(run.optimizer)
    for chunk in run.model.chunks:
        chunk.zero_grad_buffer()
    run.optimizer.zero_grad()
    loss = _forward_backward(args, run, data)
    codes = None if telemetry is None else telemetry.record()
    taken, grad_norm = step(run.optimizer)
    if grad_norm is not None and not math.isfinite(grad_norm):
        raise TrainingError(f"the gradient norm is {grad_norm}: training has diverged. {_CURE}")
    if taken:
        run.scheduler.step(increment=args.global_batch_size)
    return StepResult(loss, grad_norm, rate, time.perf_counter() - started, codes)


@torch.no_grad()
def evaluate(args: argparse.Namespace, model: Model, data: Iterator[Batch]) -> float:
    """Mean validation loss, in nats per token, over ``--eval-iters`` global batches."""
    for chunk in model.chunks:
        chunk.eval()
    total = torch.zeros(2, dtype=torch.float64)
    for _ in range(args.eval_iters):
        total += _run_schedule(args, language_modeling, model, data, ExitSignals(), forward_only=True)[:2]
    for chunk in model.chunks:
        chunk.train()
    return float(total[0] / total[1])


def _forward_backward(args: argparse.Namespace, run: Run, data: Iterator[Batch]) -> float:
    """Gradients of one global batch; returns its loss, and raises on every rank alike where it is not finite."""
    counted = _run_schedule(args, run.objective, run.model, data, run.signals, forward_only=False)
    loss_sum, tokens, broken, asked = counted.tolist()
    run.signals.agreed = asked > 0
    if broken:
        for state in run.model.states:
            if state.scales is not None and not state.scales.isfinite().all():
                print(f"{state.name}: its weight has no finite scale", file=sys.stderr)
        raise TrainingError(
            f"a latent weight is not finite or too large to be quantized: training has diverged. {_CURE}"
        )
    loss = loss_sum / tokens
    if not math.isfinite(loss):
        raise TrainingError(f"the loss is {loss}: training has diverged. {_CURE}")
    return loss


def _run_schedule(
    args: argparse.Namespace,
    objective: Objective,
    model: Model,
    data: Iterator[Batch],
    signals: ExitSignals,
    forward_only: bool,
) -> torch.Tensor:
    """Runs megatron-core's schedule over the micro-batches of one global batch.

    Returns:
        float64 ``[loss sum, tokens, ranks with a scale that is not finite, ranks that were asked to stop]`` over the
        whole job, on the CPU. Every tensor-parallel rank counts the same loss, which the quotient does not see. This is
        the one point per step that waits for the device in any case.

    Raises:
        DataError: a micro-batch of any rank holds tokens that the vocabulary lacks; on every rank alike.
    """
    # The schedule's stages (and virtual stages) each read the same micro-batches.
    shared = list(islice(data, args.num_microbatches))
    unknown = withdraw_unknown_tokens(shared, args.vocab_size)
    iterators = [iter(shared) for _ in model.chunks]
    results = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, objective),
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=model.chunks,
        num_microbatches=args.num_microbatches,
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        forward_only=forward_only,
    )
    total = torch.zeros(5, dtype=torch.float64, device=device())
    for result in results:
        total[:2] += result["lm_loss"].to(total.dtype)
    scales = [state.scales for state in model.states if state.scales is not None]
    if scales:
        total[2] = (~scales_are_finite(scales)).to(total.dtype)
    total[3] = float(signals.received)
    total[4] = len(unknown)
    torch.distributed.all_reduce(total)
    counted = total.cpu()
    if counted[4]:
        refuse_unknown_tokens(args, unknown, training=not forward_only)
    return counted[:4]


def _forward_step(objective: Objective, data: Iterator[Batch], model: torch.nn.Module) -> tuple[torch.Tensor, LossOf]:
    return objective({name: value.to(device(), non_blocking=True) for name, value in next(data).items()}, model)


def _find_checkpoint(args: argparse.Namespace) -> Path | None:
    """The checkpoint to load; takes the recorded number of row-parallel shards where none is given."""
    found = None if args.load is None else latest(args.load)
    if found is None and args.exit_on_missing_checkpoint:
        raise CheckpointError(f"no checkpoint in {args.load}, and --exit-on-missing-checkpoint is given")
    if found is None and args.pretrained_checkpoint is not None:
        found = latest(args.pretrained_checkpoint)
        if found is None:
            raise CheckpointError(f"no checkpoint in {args.pretrained_checkpoint}, named by --pretrained-checkpoint")
        args.finetune = True
    if found is None:
        return None
    if args.verify_digests:
        verify_digests(found)
    take_recorded_shards(args, found)
    return found


def _introduce(args: argparse.Namespace, model: Model, vocabulary: int, notes: list[str]) -> None:
    parameters = parameter_count(model)
    if torch.distributed.get_rank() != 0:
        return
    print(
        f"{parameters:,} parameters, vocabulary {vocabulary:,} (padded), {params_dtype(args)}, "
        f"TP {parallel_state.get_tensor_model_parallel_world_size()} x "
        f"PP {parallel_state.get_pipeline_model_parallel_world_size()} x DP {args.data_parallel_size}, "
        f"{args.num_microbatches} micro-batches of {args.micro_batch_size} x {args.seq_length} tokens per step, "
        f"{device().type} over {args.distributed_backend}"
    )
    for note in notes:
        print(note)
    if model.ternary is not None:
        print(model.ternary.coverage.table())
    sys.stdout.flush()


def _refuse_broken_weights(model: Model) -> None:
    """A checkpoint never holds a weight that is not finite; raises on every rank alike."""
    broken = torch.zeros(1, device=device())
    for chunk in model.bare:
        for parameter in chunk.parameters():
            broken += (~parameter.detach().isfinite().all()).float()
    torch.distributed.all_reduce(broken)
    if broken.item():
        raise TrainingError(f"weights are not finite and will not be saved: training has diverged. {_CURE}")

# SPDX-License-Identifier: Apache-2.0
"""The training loop: one run from its arguments to its last checkpoint."""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from ..agreement import together
from ..checkpoints.compatibility import check_quantizer
from ..checkpoints.digests import verify_digests
from ..checkpoints.directory import CheckpointError, check_ends, check_start, kept_tokenizer, latest, saved_arguments
from ..checkpoints.directory_lock import held
from ..cli import FailedError
from ..data.target_store import StoreError
from ..nn.cache import set_ramp
from ..objectives.language_modeling import LossOf, Objective, language_modeling
from ..parallel import Telemetry, ternary_modules
from ..quantization import scales_are_finite
from ..ternary_flags import take_recorded_shards
from . import checkpoint, data
from .data import Batch, Data, DataError
from .distillation.objective import TARGETS
from .distillation.store import learn_from_targets, refuse_damage
from .distillation.teacher import learn_from_teacher
from .initialize import device, exit_signals, sum_over_ranks
from .model import Model, build_model, parameter_count, params_dtype
from .report import RunReport
from .run import Run, Step, build_run

_CURE = "Resume from the last checkpoint with a lower --lr (and --override-opt-param-scheduler) or --clip-grad"


class TrainingError(FailedError):
    """A failure after which training cannot go on; the last checkpoint remains valid."""


def pretrain(args: argparse.Namespace, on_step: Callable[[Step], None] | None = None) -> Run:
    """Trains a model as the arguments say, and returns the run in its last state; needs initialized process groups.

    Args:
        args: the arguments from :func:`~bitcpm_megatron.training.flags.parse_args`.
        on_step: a function that is called on every rank after each optimizer step, before an evaluation or a
            checkpoint that follows it. It may run collective operations, since all ranks call it. Training goes on
            with what it changes, and an exception from it ends the run.

    Raises:
        TrainingError, CheckpointError, RecipeError, ProbeError, ValueError: if the run cannot start or go on; the
            message names the cure.
    """
    with exit_signals(args.exit_signal_handler) as signals, held(args.save) as note:
        run, samples = _prepare(args, signals, note)
        report, saver = RunReport(run), checkpoint.Saver(run)
        try:
            _train(run, samples, report, saver, on_step)
        except (TrainingError, DataError, StoreError):
            # All ranks raise these errors together, so that the checkpoint that is being written can be completed.
            saver.wait()
            raise
        finally:
            report.close()
    return run


def _prepare(args: argparse.Namespace, signals: list[int], note: str | None) -> tuple[Run, Data]:
    """Builds the model, loads the checkpoint that the arguments name, finds the data and prints what was decided."""
    found = _find_checkpoint(args)
    tokenizer, vocabulary = data.build_tokenizer(args)
    if found is not None and not args.mock_data:
        check_ends(found, tokenizer.eod, args.tokenizer_model)
    files = data.find_files(args, tokenizer.eod)
    model = build_model(args, vocabulary)
    run = build_run(args, model)
    if args.distill_teacher is not None:
        learn_from_teacher(run, vocabulary)
    if args.distill_targets is not None:
        learn_from_targets(run)
    run.signals = signals
    notes = [*model.notes, *filter(None, [note])]
    if found is not None:
        if args.verify_digests:
            notes.append(f"every file of {found} matches its digest")
        notes.append(check_quantizer(found, model.record, args.allow_quantizer_change))
        notes += checkpoint.load(run, found)
    elif args.load is not None:
        notes.append(f"no checkpoint in {args.load}: starting anew")
    if args.save is not None:
        check_start(args.save, found, run.iteration)
    samples = data.build_data(args, tokenizer, files)
    if run.stored is not None:
        with together():
            samples.train = run.stored.beside(samples.train)
    _introduce(run, vocabulary, [*notes, *filter(None, [samples.note])])
    return run, samples


def _train(
    run: Run, samples: Data, report: RunReport, saver: checkpoint.Saver, on_step: Callable[[Step], None] | None
) -> None:
    args = run.args
    stream = data.batches(args, samples.train, run.consumed_samples)
    telemetry = Telemetry(run.model.bare) if args.ternary_telemetry_interval else None
    leaving = run.iteration >= args.train_iters
    while not leaving:
        step = train_step(run, stream, telemetry)
        report.step(step)
        if on_step is not None:
            on_step(step)
        last = run.iteration == args.train_iters
        leaving = last or run.stopping or _due(run.iteration, args.exit_interval)
        if samples.valid is not None and (last or _due(run.iteration, args.eval_interval)):
            report.valid(evaluate(run, data.batches(args, samples.valid, 0)))
        if args.save is not None and (leaving or _due(run.iteration, args.save_interval)):
            started = time.perf_counter()
            _refuse_broken_weights(run.model)
            saver.save()
            report.say(f"saving, training waited {time.perf_counter() - started:.2f} s")
        if leaving:
            saver.wait()
        for path in saver.poll():
            report.line(f"saved {path}")
    if run.stopping and run.iteration < args.train_iters:
        kept = "the same command goes on from here" if args.save else "nothing is kept without --save"
        report.say(f"asked to stop by SIGTERM or SIGUSR1: {kept}")


def _due(iteration: int, interval: int | None) -> bool:
    return interval is not None and iteration % interval == 0


def train_step(run: Run, batches: Iterator[Batch], telemetry: Telemetry | None = None) -> Step:
    """Takes one optimizer step.

    Args:
        run: the run to advance; ``num_microbatches`` of its arguments is the number of micro-batches taken.
        batches: the micro-batches of this data-parallel rank, ``[micro_batch_size, seq_length]`` or one packed row.
        telemetry: a recorder of the codes at the steps where ``--ternary-telemetry-interval`` is due, or None.

    Raises:
        TrainingError: if training has diverged; on every rank alike.
        DataError: if the step has no token to learn, or tokens that the vocabulary lacks; on every rank alike.
        StoreError: if the target store's record of a sample is damaged; on every rank alike.
    """
    started = time.perf_counter()
    rate = float(next(g["lr"] for g in run.optimizer.param_groups if g.get("default_config", True)))
    for chunk in run.model.chunks:
        chunk.zero_grad_buffer()
    run.optimizer.zero_grad()
    loss_sum, tokens, broken, asked, apart = _run_schedule(run, batches, run.objective).tolist()
    run.stopping = asked > 0
    if broken:
        for state in run.model.states:
            if state.scales is not None and not state.scales.isfinite().all():
                print(f"{state.name}: its weight has no finite scale", file=sys.stderr)
        raise TrainingError(
            f"a latent weight is not finite or too large to be quantized: training has diverged. {_CURE}"
        )
    if not tokens:
        raise DataError(f"step {run.iteration + 1} has no token to learn: its samples are masked as a whole")
    loss = loss_sum / tokens
    if not math.isfinite(loss):
        raise TrainingError(f"the loss is {loss}: training has diverged. {_CURE}")
    if not math.isfinite(apart):
        # The teacher is at fault: if the student's logits were not finite, the loss would not be finite either.
        raise TrainingError(
            f"the divergence from the teacher is {apart}: its weights are damaged, or it needs another precision"
        )
    due = _due(run.iteration + 1, run.args.ternary_telemetry_interval)
    codes = telemetry.record() if telemetry is not None and due else None
    taken, grad_norm, _ = run.optimizer.step()
    grad_norm = None if grad_norm is None else float(grad_norm)
    if grad_norm is not None and not math.isfinite(grad_norm):
        raise TrainingError(f"the gradient norm is {grad_norm}: training has diverged. {_CURE}")
    # The optimizer skips a step if its loss scaler finds an overflow.
    if taken:
        run.scheduler.step(increment=run.args.global_batch_size)
    run.iteration += 1
    run.consumed_samples += run.args.global_batch_size
    distilled = apart / tokens if run.args.distill_alpha else None
    return Step(run.iteration, loss, grad_norm, rate, time.perf_counter() - started, codes, run, distilled)


@torch.no_grad()
def evaluate(run: Run, batches: Iterator[Batch]) -> float:
    """Returns the mean validation loss, in nats per token, over ``--eval-iters`` global batches.

    Raises:
        DataError: if the batches have no token to learn; on every rank alike.
    """
    for chunk in run.model.chunks:
        chunk.eval()
    total = torch.zeros(2, dtype=torch.float64)
    for _ in range(run.args.eval_iters):
        total += _run_schedule(run, batches, language_modeling, forward_only=True)[:2]
    for chunk in run.model.chunks:
        chunk.train()
    if not total[1]:
        raise DataError("the validation samples have no token to learn: change --split, or give --eval-iters 0")
    return float(total[0] / total[1])


def _run_schedule(run: Run, batches: Iterator[Batch], objective: Objective, forward_only: bool = False) -> torch.Tensor:
    """Runs megatron-core's schedule over the micro-batches of one global batch.

    Returns:
        float64 ``[sum of the cross entropy, tokens, ranks with a scale that is not finite, ranks that were asked to
        stop, sum of the divergence from a teacher]`` over the whole job, on the CPU. Every tensor-parallel rank counts
        the same loss and the same tokens, which cancels in their quotient. This is the only point of a step that always
        waits for the device.

    Raises:
        DataError: if a micro-batch of any rank holds tokens that the vocabulary lacks; on every rank alike.
        StoreError: if the target store's record of a sample is damaged; on every rank alike.
    """
    args, chunks = run.args, run.model.chunks
    set_ramp(run.model.bare, run.ramp)
    teacher = None if forward_only else run.teacher

    def forward(batches: Iterator[Batch], model: torch.nn.Module) -> tuple[torch.Tensor, LossOf]:
        batch = data.on_device(next(batches))
        if teacher is not None and not teacher.runs_ahead:
            batch[TARGETS] = teacher.targets([batch])[0]
        return objective(batch, model)

    # All stages of the schedule, virtual stages included, read the same micro-batches.
    shared: list[Any] = list(islice(batches, args.num_microbatches))
    unknown = data.withdraw_unknown_tokens(shared, args.vocab_size)
    damaged = [] if run.stored is None else run.stored.attach(shared)
    if teacher is not None and teacher.runs_ahead:
        said = teacher.targets([data.on_device(batch) for batch in shared])
        shared = [{**batch, TARGETS: targets} for batch, targets in zip(shared, said, strict=True)] if said else shared
    results = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=[iter(shared) for _ in chunks] if len(chunks) > 1 else iter(shared),
        model=chunks,
        num_microbatches=args.num_microbatches,
        forward_only=forward_only,
        **data.schedule_shape(args),
    )
    total = torch.zeros(6, dtype=torch.float64, device=device())
    for result in results:
        total[:2] += result["lm_loss"].to(total.dtype)
        if "distill_loss" in result:
            total[4] += result["distill_loss"][0]
    scales = [state.scales for state in run.model.states if state.scales is not None]
    if scales:
        total[2] = (~scales_are_finite(scales)).to(total.dtype)
    total[3] = float(bool(run.signals))
    total[5] = len(unknown) + len(damaged)
    torch.distributed.all_reduce(total)
    counted = total.cpu()
    if counted[5]:
        refuse_damage(damaged)
        data.refuse_unknown_tokens(args, unknown, training=not forward_only)
    return counted[:5]


def _find_checkpoint(args: argparse.Namespace) -> Path | None:
    """Returns the checkpoint to load, or None; adopts its recorded row-parallel shards if none are given."""
    found = None if args.load is None else latest(args.load)
    if found is None and args.exit_on_missing_checkpoint:
        raise CheckpointError(f"no checkpoint in {args.load}, and --exit-on-missing-checkpoint is given")
    if found is None and args.pretrained_checkpoint is not None:
        found = latest(args.pretrained_checkpoint)
        if found is None:
            raise CheckpointError(f"no checkpoint in {args.pretrained_checkpoint}, named by --pretrained-checkpoint")
        args.finetune = True
    if found is not None:
        if args.verify_digests:
            verify_digests(found)
        take_recorded_shards(args, found)
        if args.tokenizer_model is None and not args.mock_data:
            _take_its_tokenizer(args, found)
    return found


def _take_its_tokenizer(args: argparse.Namespace, checkpoint: Path) -> None:
    """Adopts the tokenizer that a converted checkpoint contains, or that of the run which wrote the checkpoint."""
    saved = saved_arguments(checkpoint)
    kept = kept_tokenizer(checkpoint)
    args.tokenizer_model = saved.get("tokenizer_model") if kept is None else str(kept)
    args.tokenizer_type = saved.get("tokenizer_type") if kept is None else None


def _introduce(run: Run, vocabulary: int, notes: list[str]) -> None:
    args, parameters = run.args, parameter_count(run.model)
    if torch.distributed.get_rank() != 0:
        return
    said = (
        f"{parameters:,} parameters, vocabulary {vocabulary:,} (padded), {params_dtype(args)}, "
        f"TP {parallel_state.get_tensor_model_parallel_world_size()} x "
        f"PP {parallel_state.get_pipeline_model_parallel_world_size()} x DP {args.data_parallel_size}"
        f"{f' x CP {args.context_parallel_size}' if args.context_parallel_size > 1 else ''}, "
        f"{args.num_microbatches} micro-batches of {args.micro_batch_size} x {args.seq_length} tokens per step, "
        f"{device().type} over {args.distributed_backend}"
    )
    coverage = [] if run.model.ternary is None else [run.model.ternary.coverage.table()]
    print("\n".join([said, *notes, *coverage]), flush=True)


def _refuse_broken_weights(model: Model) -> None:
    """Raises on every rank if any weight is not finite, so that no checkpoint holds such a weight; collective."""
    held = {module.weight: state for state, module in ternary_modules(model.bare) if state.resident}
    parameters = [p for chunk in model.bare for p in chunk.parameters()]
    # A generator, because the values of packed weights are copies: only one exists at a time.
    weights = (held[p].held(p) if p in held else p.detach() for p in parameters)
    if sum_over_ranks(int(sum((~weight.isfinite().all()).int() for weight in weights))):
        raise TrainingError(f"weights are not finite and will not be saved: training has diverged. {_CURE}")

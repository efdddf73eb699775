# SPDX-License-Identifier: Apache-2.0
"""Preflight checks of checkpoints: whether the job can save, and whether it may resume from the existing checkpoint."""

import argparse
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ...checkpoints.compatibility import check_arguments, check_quantizer
from ...checkpoints.directory import CheckpointError, saved_arguments
from ...quantization.record import QuantizerRecord, RecordError
from ...training.mistakes import ffn_channels
from ..estimates.memory import GIB, Options, estimate
from ..estimates.quantizer import expected_record
from ..launcher.job import BUILT_IN
from ..launcher.torchrun import latest_of, resume
from .subject import Finding, Subject, failed, in_turn, passed, warned
from .training import row_parallel_shards


def _writable(subject: Subject) -> Iterator[Finding]:
    for key in ("save", "log-dir", "data-cache-path"):
        name, directory = f"{key}-writable", subject.job.flags.get(key)
        if directory is None:
            continue
        existing = _existing(Path(directory))
        if not existing.is_dir():
            yield failed(name, f"{existing} is a file", "choose another directory")
        elif not os.access(existing, os.W_OK | os.X_OK):
            yield failed(name, f"{existing} cannot be written", "choose another, or its owner")
        elif key == "save" and subject.nodes > 1 and not Path(directory).is_absolute():
            what = f"{directory} is relative, on {subject.nodes} nodes"
            yield failed(name, what, "give the absolute path of storage that all nodes share")
        else:
            yield passed(name, f"{directory} (in {existing})")


def _space(subject: Subject) -> list[Finding]:
    args, x = subject.args, subject.layout
    if args.save is None:
        return []
    # A checkpoint holds what a single rank would hold: the weights and, unless told otherwise, fp32 master weights and
    # two moments.
    alone = replace(x, tp=1, pp=1, vpp=1, cp=1, ep=1, world=1)
    padding = args.make_vocab_size_divisible_by * x.tp
    whole = estimate(alone, Options(args.bf16, False, False, make_vocab_size_divisible_by=padding))[1]
    one = whole.weights + (0 if args.no_save_optim else whole.optimizer)
    free = shutil.disk_usage(_existing(Path(args.save))).free
    every = args.save_interval or args.train_iters
    count = max(1, -(-args.train_iters // max(1, every)))
    # One more than are kept: a new checkpoint is complete before an old one is deleted.
    kept = min(count, args.keep_last_n) + 1 if args.keep_last_n else count
    said = f"{kept} checkpoints of {one / GIB:.1f} GiB = {kept * one / GIB:.1f} GiB, {free / GIB:.1f} GiB free"
    if free < one:
        return [failed("disk-space", said, "not one fits: free space, or save elsewhere")]
    if free < kept * one:
        return [warned("disk-space", said, "set keep-last-n (our loop), save less often, or clear up meanwhile")]
    return [passed("disk-space", said)]


def _resume(subject: Subject) -> list[Finding]:
    job, args = subject.job, subject.args
    first = job.flags.get("pretrained-checkpoint")
    try:
        start = resume(job)
        if start.iteration is None and first is not None and not latest_of(job, str(first)):
            if job.before is not None and first == job.before.flags["save"]:
                return [
                    passed("resume", f"starts from the weights that stage {job.before.stage} will leave in {first}")
                ]
            return [failed("resume", f"{first} holds no checkpoint", "check checkpoint.pretrained-checkpoint")]
    except (OSError, ValueError) as error:
        return [failed("resume", str(error), "repair the tracker, or choose another directory")]
    if start.iteration is not None and start.iteration >= args.train_iters:
        if job.stage is not None:
            return [passed("resume", f"stage {job.stage} has ended at iteration {start.iteration}")]
        what = f"{start.line}, and --train-iters is {args.train_iters}"
        return [warned("resume", what, "nothing is left to train: raise train-iters")]
    if start.iteration is None and args.exit_on_missing_checkpoint:
        return [failed("resume", f"{start.line}, and exit-on-missing-checkpoint is given", "leave it out at first")]
    return [passed("resume", start.line)]


def _record(subject: Subject) -> list[Finding]:
    """Compares the quantizer of the checkpoint that will be loaded with the one that the job asks for."""
    checkpoint, args, name = subject.checkpoint(), subject.args, "checkpoint-quantizer"
    if checkpoint is None:
        return []
    try:
        QuantizerRecord.read(checkpoint)
        wanted = expected_record(subject.layout, args, row_parallel_shards(subject)) if args.ternary else None
        return [passed(name, check_quantizer(checkpoint, wanted, args.allow_quantizer_change))]
    except CheckpointError as error:
        return [failed(name, " ".join(str(error).split()), "give the quantizer that it was trained with")]
    except RecordError as error:
        return [failed(name, str(error), "restore the file from where the checkpoint was copied")]
    except ValueError as error:
        return [failed(name, str(error), "see the finding on the quantizer")]


def _model(subject: Subject) -> list[Finding]:
    """Compares the model of the checkpoint that will be loaded with the one that the job asks for."""
    checkpoint, name, flags = subject.checkpoint(), "checkpoint-model", subject.job.flags
    if checkpoint is None:
        return []
    if subject.job.host.kind != BUILT_IN:
        return [passed(name, f"{checkpoint}: Megatron-LM compares its arguments when it loads")]
    if not (checkpoint / "arguments.json").is_file():
        return [warned(name, f"{checkpoint} does not say what model it holds", "loading will tell")]
    try:
        saved, args = saved_arguments(checkpoint), filled(subject)
        if "vocab-size" not in flags:
            # The run takes the size of its tokenizer.
            args.vocab_size = saved.get("vocab_size")
        # A run treats the checkpoint of --pretrained-checkpoint as with --finetune.
        args.finetune = args.finetune or checkpoint.parent != Path(str(args.load or args.save))
        check_arguments(args, saved, checkpoint, with_optimizer=not (args.finetune or args.no_load_optim))
    except (OSError, ValueError) as error:
        return [failed(name, str(error), "give the flags that the checkpoint was trained with")]
    return [passed(name, f"{checkpoint} holds this model")]


def filled(subject: Subject) -> argparse.Namespace:
    """Returns the job's arguments with those defaults that a run fills in and that determine the model."""
    args, x = argparse.Namespace(**vars(subject.args)), subject.layout
    args.ffn_hidden_size, args.kv_channels, args.num_query_groups = ffn_channels(args), x.head_dim, x.groups
    args.rotary_base = 10000 if args.rotary_base is None else args.rotary_base
    args.moe_router_topk = 2 if args.moe_router_topk is None else args.moe_router_topk
    return args


def _existing(path: Path) -> Path:
    """Returns the path, or its nearest parent that exists."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


check = in_turn(_writable, _space, _resume, _record, _model)

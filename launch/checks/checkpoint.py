# SPDX-License-Identifier: Apache-2.0
"""Preflight: can the job save, and may it go on from what is there?"""

import argparse
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ...checkpoints.compatibility import check_arguments, check_quantizer
from ...checkpoints.directory import CheckpointError, saved_arguments
from ...data.vocabulary import padded_vocab_size
from ...quantization.record import QuantizerRecord, RecordError
from ..estimates.memory import GIB
from ..estimates.quantizer import expected_record
from ..launcher.job import BUILT_IN
from ..launcher.torchrun import latest_of, resume
from .finding import Finding, failed, passed, warned
from .subject import Subject
from .training import row_parallel_shards


def check(subject: Subject) -> Iterator[Finding]:
    """All checks of this module."""
    yield from _writable(subject)
    yield from _space(subject)
    yield from _resume(subject)
    yield from _compatible(subject)


def checkpoint_bytes(subject: Subject) -> int:
    """Size of one checkpoint: bf16 (or fp32) weights, and unless told otherwise fp32 master weights and two moments."""
    x, args = subject.layout, subject.args
    layer = sum(linear.weights for linear in x.linears(0)) + 2 * x.hidden
    vocab = padded_vocab_size(x.vocab_size, args.make_vocab_size_divisible_by, x.tp) if x.vocab_size else 0
    parameters = x.layers * layer + vocab * x.hidden * (1 if x.tied else 2) + x.hidden
    return parameters * ((2 if args.bf16 else 4) + (0 if args.no_save_optim else 12 if args.bf16 else 8))


def _writable(subject: Subject) -> list[Finding]:
    found = []
    for key in ("save", "log-dir", "data-cache-path"):
        directory = subject.job.flags.get(key)
        if directory is None:
            continue
        existing = _existing(Path(directory))
        if not existing.is_dir():
            found.append(failed(f"{key}-writable", f"{existing} is a file", "choose another directory"))
        elif not os.access(existing, os.W_OK | os.X_OK):
            found.append(failed(f"{key}-writable", f"{existing} cannot be written", "choose another, or its owner"))
        elif key == "save" and subject.nodes > 1 and not Path(directory).is_absolute():
            what = f"{directory} is relative, on {subject.nodes} nodes"
            found.append(failed(f"{key}-writable", what, "give the absolute path of storage that all nodes share"))
        else:
            found.append(passed(f"{key}-writable", f"{directory} (in {existing})"))
    return found


def _space(subject: Subject) -> list[Finding]:
    args = subject.args
    if args.save is None:
        return []
    one = checkpoint_bytes(subject)
    free = shutil.disk_usage(_existing(Path(args.save))).free
    every = args.save_interval or args.train_iters
    count = max(1, -(-args.train_iters // max(1, every)))
    # One more than is kept: a new one is complete before an old one goes.
    kept = min(count, args.keep_last_n) + 1 if args.keep_last_n else count
    said = f"{kept} checkpoints of {one / GIB:.1f} GiB = {kept * one / GIB:.1f} GiB, {free / GIB:.1f} GiB free"
    if free < one:
        return [failed("disk-space", said, "not one fits: free space, or save elsewhere")]
    if free < kept * one:
        return [warned("disk-space", said, "set keep-last-n (our loop), save less often, or clear up meanwhile")]
    return [passed("disk-space", said)]


def _resume(subject: Subject) -> list[Finding]:
    job, args = subject.job, subject.args
    try:
        start = resume(job)
    except (CheckpointError, OSError, ValueError) as error:
        return [failed("resume", str(error), "repair the tracker, or choose another directory")]
    if start.iteration is not None and start.iteration >= args.train_iters:
        what = f"{start.line}, and --train-iters is {args.train_iters}"
        return [warned("resume", what, "nothing is left to train: raise train-iters")]
    first = job.flags.get("pretrained-checkpoint")
    if start.iteration is None and first is not None:
        try:
            there = latest_of(job, str(first))
        except CheckpointError as error:
            return [failed("resume", str(error), "choose another pretrained-checkpoint")]
        if not there:
            return [failed("resume", f"{first} holds no checkpoint", "check checkpoint.pretrained-checkpoint")]
    if start.iteration is None and args.exit_on_missing_checkpoint:
        return [failed("resume", f"{start.line}, and exit-on-missing-checkpoint is given", "leave it out at first")]
    return [passed("resume", start.line)]


def _compatible(subject: Subject) -> Iterator[Finding]:
    """The checkpoint that will be loaded, against the quantizer and the model that the job asks for."""
    checkpoint = _to_load(subject)
    if checkpoint is None:
        return
    args, x = subject.args, subject.layout
    try:
        QuantizerRecord.read(checkpoint)
        wanted = expected_record(x, args, row_parallel_shards(subject)) if args.ternary else None
        yield passed("checkpoint-quantizer", check_quantizer(checkpoint, wanted, args.allow_quantizer_change))
    except CheckpointError as error:
        said = " ".join(str(error).split())
        yield failed("checkpoint-quantizer", said, "give the quantizer that it was trained with")
    except RecordError as error:
        yield failed("checkpoint-quantizer", str(error), "restore the file from where the checkpoint was copied")
    except ValueError as error:
        yield failed("checkpoint-quantizer", str(error), "see the finding on the quantizer")
    if subject.job.host.kind != BUILT_IN:
        yield passed("checkpoint-model", f"{checkpoint}: Megatron-LM compares its arguments when it loads")
        return
    if not (checkpoint / "arguments.json").is_file():
        yield warned("checkpoint-model", f"{checkpoint} does not say what model it holds", "loading will tell")
        return
    try:
        saved = saved_arguments(checkpoint)
        namespace = argparse.Namespace(**vars(args))
        namespace.ffn_hidden_size, namespace.kv_channels, namespace.num_query_groups = x.ffn, x.head_dim, x.groups
        namespace.rotary_base = 10000 if args.rotary_base is None else args.rotary_base
        namespace.moe_router_topk = 2 if args.moe_router_topk is None else args.moe_router_topk
        namespace.vocab_size = saved.get("vocab_size") if x.vocab_size is None else x.vocab_size
        if "vocab-size" not in subject.job.flags and not subject.job.flags.get("mock-data"):
            # The run takes its tokenizer's size.
            namespace.vocab_size = saved.get("vocab_size")
        fresh = args.finetune or args.no_load_optim or checkpoint.parent != Path(str(_loads_from(subject)))
        check_arguments(namespace, saved, checkpoint, with_optimizer=not fresh)
    except (CheckpointError, OSError, ValueError) as error:
        yield failed("checkpoint-model", str(error), "give the flags that the checkpoint was trained with")
    else:
        yield passed("checkpoint-model", f"{checkpoint} holds this model")


def _loads_from(subject: Subject) -> str | None:
    flags = subject.job.flags
    return flags.get("load") or flags.get("save")


def _to_load(subject: Subject) -> Path | None:
    for directory in (_loads_from(subject), subject.job.flags.get("pretrained-checkpoint")):
        if directory is not None:
            try:
                found = latest_of(subject.job, str(directory))
            except (CheckpointError, OSError):
                return None
            if found is not None:
                return found
    return None


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path

# SPDX-License-Identifier: Apache-2.0
"""Preflight checks of training: whether the plan is sane, and whether the quantizer fits the layout."""

import contextlib
from collections.abc import Mapping

from ...quantization import QuantizerConfig
from ...quantization.record import QuantizerRecord
from ...training.mistakes import mistakes
from ..estimates.quantizer import expected_record, idle_matchers
from ..estimates.shapes import Layout
from ..launcher import presets
from ..launcher.job import BUILT_IN, JobError
from ..launcher.torchrun import host_argv
from .subject import Finding, Subject, failed, in_turn, judged, passed, warned

_LOW_PRECISION = ("fp8-format", "fp8", "fp4-format", "qat-scheme")
_HIGH_LR = 0.05


def row_parallel_shards(subject: Subject) -> int:
    """Returns the row-parallel shards of the run: by its flag, else by the checkpoint that it loads, else TP."""
    record, checkpoint = None, subject.checkpoint()
    with contextlib.suppress(ValueError, OSError):
        record = None if checkpoint is None else QuantizerRecord.read(checkpoint)
    recorded = subject.layout.tp if record is None else record.row_parallel_shards
    return subject.args.ternary_row_parallel_shards or recorded


def _schedule(subject: Subject) -> list[Finding]:
    args, found = subject.args, []
    decay = args.lr_decay_iters or args.train_iters
    if args.min_lr > args.lr:
        found.append((f"learning rate {args.lr:g} down to {args.min_lr:g}", "give --min-lr <= --lr"))
    if (args.lr_decay_style == "WSD") != (args.lr_wsd_decay_iters is not None):
        found.append(("--lr-decay-style WSD and --lr-wsd-decay-iters go together", "give both or none"))
    tail = args.lr_wsd_decay_iters or 0
    if args.lr_warmup_iters >= decay or args.lr_warmup_iters + tail > decay:
        what = f"warm-up of {args.lr_warmup_iters} and decay of {tail} iterations in a schedule of {decay}"
        found.append((what, "warm-up and decay must fit into --lr-decay-iters (default --train-iters)"))
    if args.lr_decay_iters is not None and args.lr_decay_iters < args.train_iters:
        what = f"the schedule ends at {args.lr_decay_iters} of {args.train_iters} iterations"
        return [warned("schedule", what, "the rest trains at --min-lr; raise --lr-decay-iters if that is not meant")]
    if not found and args.lr > _HIGH_LR:
        return [warned("schedule", f"--lr {args.lr:g}", "is a digit missing? Adam rarely learns above 1e-2")]
    said = f"{args.lr_decay_style}: {args.lr:g} to {args.min_lr:g} over {decay} iterations, {args.lr_warmup_iters} up"
    return judged("schedule", said + (f", {tail} down" if tail else ""), found)


def _saving(subject: Subject) -> list[Finding]:
    args, cluster = subject.args, subject.job.cluster
    if args.save is None:
        if cluster.max_restarts:
            what = f"up to {cluster.max_restarts} restarts, and nothing is saved to restart from"
            return [failed("saving", what, "give checkpoint.save and checkpoint.save-interval")]
        return [warned("saving", "no checkpoint will be written", "give checkpoint.save")]
    if args.save_interval is None:
        return [warned("saving", "one checkpoint, at the end", "give checkpoint.save-interval: a crash costs all")]
    if args.save_interval > args.train_iters:
        what = f"--save-interval {args.save_interval} is beyond --train-iters {args.train_iters}"
        return [warned("saving", what, "a crash costs everything: save more often")]
    if subject.job.flags.get("no-save-optim") and cluster.max_restarts:
        return [failed("saving", "restarts from checkpoints without optimizer state", "leave out no-save-optim")]
    load = subject.job.flags.get("load")
    if load is not None and load != args.save and cluster.max_restarts:
        what = f"every restart loads {load} again, not what was saved in {args.save}"
        return [failed("saving", what, "leave out checkpoint.load; pretrained-checkpoint names the first weights")]
    return [passed("saving", f"every {args.save_interval} iterations to {args.save}")]


def _precision(subject: Subject) -> list[Finding]:
    args, flags = subject.args, subject.job.host.flags
    low = [flag for flag in _LOW_PRECISION if flags.get(flag)]
    if args.ternary and low:
        what = f"{', '.join(low)} together with ternary: its GEMMs would quantize the ternary weights again"
        return [failed("precision", what, "choose one")]
    if not args.bf16 and subject.profile.device != "cpu":
        what = f"fp32 on {subject.profile.device}"
        return [warned("precision", what, "training.bf16: true halves the memory and is many times faster")]
    return [passed("precision", "bf16 with fp32 master weights" if args.bf16 else "fp32")]


def _quantizer(subject: Subject) -> list[Finding]:
    args, x = subject.args, subject.layout
    if not args.ternary:
        given = sorted(k for k, v in subject.job.flags.items() if k.startswith("ternary-") and v is not False)
        if given:
            return [failed("quantizer", f"{', '.join(given)} without ternary would do nothing", "ternary: true")]
        return [passed("quantizer", "none: full precision")]
    shards = row_parallel_shards(subject)
    try:
        record = expected_record(x, args, shards)
    except ValueError as error:
        return [failed("quantizer", str(error), "another --ternary-group-size, recipe, TP or row-parallel shards")]
    configs = {path: record.config_of(path) for path in record.modules}
    rows = [linear for linear in x.linears(0) if linear.row_parallel]
    bad = [linear.path for linear in rows if shards % x.tp or linear.in_features % shards]
    if bad and args.ternary_activation_bits == 8:
        what = f"the inputs of {bad[0]} cannot be quantized in {shards} row-parallel shards at TP {x.tp}"
        return [failed("quantizer", what, "use a number of shards that TP divides")]
    if args.ternary_gemm == "int8" and (split := _split_sums(configs, x, shards)):
        return [
            failed("quantizer", split, "group size -1 and as many row-parallel shards as TP, or ternary-gemm: bf16")
        ]
    sizes = ", ".join(sorted({str(config.group_size) for config in configs.values()}))
    said = f"{len(configs)} modules, groups of {sizes} (-1: the row), {shards} row-parallel shards"
    return [passed("quantizer", said)]


def _split_sums(configs: Mapping[str, QuantizerConfig], layout: Layout, shards: int) -> str | None:
    """Returns why an int8 GEMM, which needs one scale per local row, cannot take some layer; None if it takes all."""
    if shards != layout.tp:
        return (
            f"an int8 GEMM takes one scale per local row, and here are {shards} row-parallel shards at TP {layout.tp}"
        )
    for linear in layout.all_linears():
        if linear.path not in configs:
            continue
        config = configs[linear.path]
        if config.space != "ternary":
            return f"an int8 GEMM knows ternary codes, and {linear.path} is {config.space}"
        local = linear.in_features // layout.tp if linear.row_parallel else linear.in_features
        if config.group_size not in (-1, local):
            return (
                f"an int8 GEMM takes one scale per row, and {linear.path} has one for {config.group_size} of {local} "
                "columns"
            )
    return None


def _recipe(subject: Subject) -> list[Finding]:
    args = subject.args
    if not args.ternary or args.ternary_recipe is None:
        return []
    try:
        idle = idle_matchers(subject.layout, args)
    except ValueError as error:
        return [failed("recipe", str(error), "see the schema in docs/training.md")]
    layer = "decoder.layers.0.self_attention.linear_qkv"
    cure = f"modules are named like {layer}, layers 0 to {subject.layout.layers - 1}"
    return judged("recipe", f"{args.ternary_recipe}: every matcher fits", [(line, cure) for line in idle])


def _arguments(subject: Subject) -> list[Finding]:
    """Checks all arguments together in the same way as the built-in loop does."""
    if subject.job.host.kind != BUILT_IN:
        return []
    args = presets.parsed(presets.expand(host_argv(subject.job)[1:]), JobError)
    found = [(line, "launch/pretrain.py refuses it") for line in mistakes(args, subject.layout.world)]
    return judged("arguments", "launch/pretrain.py takes them", found)


check = in_turn(_schedule, _saving, _precision, _quantizer, _recipe, _arguments)

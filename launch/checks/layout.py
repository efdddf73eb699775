# SPDX-License-Identifier: Apache-2.0
"""Preflight checks of the layout: whether all sizes divide, and whether the job fits into the device's memory."""

import contextlib
import math
import os

from ...data.vocabulary import padded_vocab_size
from ...models.architecture import divisors
from ..estimates.memory import GIB, estimate, options_of
from ..estimates.shapes import recipe_of
from ..launcher.job import MEGATRON_LM
from .subject import Finding, Subject, failed, in_turn, judged, passed, warned

_FULL = 0.9
"""The share of the device's memory above which an estimate cannot be trusted."""
_WASTE = 0.1


def check(subject: Subject) -> list[Finding]:
    """Returns the findings of all checks of this module; if the processes cannot be split, only that finding."""
    x = subject.layout
    model = x.tp * x.pp * x.cp
    said = f"{x.world} processes = TP {x.tp} x PP {x.pp} x CP {x.cp} x DP"
    if x.world % model:
        what = f"{x.world} processes cannot be split into groups of {model} ({said} ?)"
        return [failed("world-size", what, f"use a multiple of {model} processes, or smaller parallel sizes")]
    return [passed("world-size", f"{said} {x.dp}"), *_of_the_layout(subject)]


def _heads(subject: Subject) -> list[Finding]:
    x, found = subject.layout, []
    if subject.args.kv_channels is None and x.hidden % x.heads:
        found.append((f"hidden size {x.hidden} is not divisible by {x.heads} heads", "give --kv-channels"))
    if x.heads % x.groups:
        found.append((f"{x.groups} query groups do not divide {x.heads} heads", "choose a divisor of the heads"))
    fitting = ", ".join(map(str, divisors(math.gcd(x.heads, x.groups, x.ffn))))
    for what, value in (("attention heads", x.heads), ("query groups", x.groups), ("ffn channels", x.ffn)):
        if value % x.tp:
            cure = f"use a tensor-parallel size of {fitting}"
            found.append((f"{value} {what} are not divisible by a tensor-parallel size of {x.tp}", cure))
    return judged("heads-and-ffn", f"{x.heads} heads, {x.groups} groups, ffn {x.ffn} over TP {x.tp}", found)


def _layers(subject: Subject) -> list[Finding]:
    x, found = subject.layout, []
    if subject.args.num_virtual_stages_per_pipeline_rank is not None and x.pp == 1:
        found.append(("virtual stages without pipeline parallelism", "leave them out, or use 2 stages or more"))
    if x.layers % (x.pp * x.vpp):
        cure = f"use sizes whose product divides {x.layers}"
        found.append((f"{x.layers} layers cannot be split over {x.pp} stages x {x.vpp} virtual ones", cure))
    return judged("pipeline", f"{x.layers} layers over PP {x.pp} x VPP {x.vpp}", found)


def _batch(subject: Subject) -> list[Finding]:
    x = subject.layout
    step = x.micro_batch * x.dp
    batch = step if subject.args.global_batch_size is None else subject.args.global_batch_size
    if batch % step:
        near = max(step, round(batch / step) * step)
        what = f"a global batch of {batch} is no multiple of micro-batch {x.micro_batch} x DP {x.dp}"
        return [failed("global-batch", what, f"use a multiple of {step}, such as {near}")]
    count = batch // step
    if x.vpp > 1 and count % x.pp:
        what = f"{count} micro-batches per step are no multiple of {x.pp} stages, as virtual stages need"
        return [failed("global-batch", what, f"use a multiple of {step * x.pp}")]
    said = f"{batch} = {count} micro-batches of {x.micro_batch} x DP {x.dp}"
    bubble = (x.pp - 1) / (count * x.vpp + x.pp - 1)
    if bubble > 0.2:
        said += f": {bubble:.0%} of the time the {x.pp} pipeline stages would wait"
        return [warned("global-batch", said, "more micro-batches per step, or fewer stages")]
    return [passed("global-batch", said)]


def _sequence(subject: Subject) -> list[Finding]:
    x, args, found = subject.layout, subject.args, []
    if x.sequence > args.max_position_embeddings:
        what = f"sequence {x.sequence} exceeds {args.max_position_embeddings} positions"
        found.append((what, "raise --max-position-embeddings (check the rotary scaling)"))
    if args.sequence_parallel and x.tp == 1:
        found.append(("sequence parallelism without tensor parallelism", "leave out --sequence-parallel"))
    if args.sequence_parallel and x.sequence % (x.tp * x.cp):
        found.append((f"sequence {x.sequence} is not divisible by TP {x.tp} x CP {x.cp}", "choose a multiple"))
    if x.cp > 1 and x.sequence % (2 * x.cp):
        cure = f"choose a multiple of {2 * x.cp}: each rank takes one chunk from either end"
        found.append((f"sequence {x.sequence} cannot be split over CP {x.cp}", cure))
    if x.tp > 1 and not args.sequence_parallel and not found:
        what = f"TP {x.tp} without sequence parallelism keeps norms and dropout whole on every rank"
        return [warned("sequence", what, "--sequence-parallel saves memory at the same traffic")]
    split = f", split over TP {x.tp}" if args.sequence_parallel else ""
    return judged("sequence", f"{x.sequence} tokens{split}", found)


def _experts(subject: Subject) -> list[Finding]:
    x, args, found = subject.layout, subject.args, []
    if not x.experts:
        return [failed("experts", f"expert parallelism of {x.ep} without experts", "leave it out")] if x.ep > 1 else []
    if x.experts % x.ep or x.dp % x.ep:
        what = f"{x.experts} experts over EP {x.ep} and DP {x.dp}"
        found.append((what, "use an expert-parallel size that divides both"))
    if not 1 <= x.topk <= x.experts:
        found.append((f"top-{x.topk} of {x.experts} experts", "choose a top-k from 1 to the number of experts"))
    if x.tp > 1 and not args.sequence_parallel:
        found.append(("experts with tensor parallelism", "needs --sequence-parallel"))
    return judged("experts", f"{x.experts} experts, top {x.topk}, over EP {x.ep}", found)


def _vocabulary(subject: Subject) -> list[Finding]:
    x, by = subject.layout, subject.args.make_vocab_size_divisible_by
    if x.vocab_size is None:
        return [warned("vocabulary", "its size is the tokenizer's, unknown here", "give data.vocab-size")]
    padded = padded_vocab_size(x.vocab_size, by, x.tp)
    said = f"{x.vocab_size} tokens, padded to {padded} (a multiple of {by} x TP {x.tp})"
    if padded - x.vocab_size > _WASTE * x.vocab_size and x.vocab_size > 10_000:
        return [warned("vocabulary", said, "a smaller --make-vocab-size-divisible-by wastes fewer rows")]
    return [passed("vocabulary", said)]


def _overlaps(subject: Subject) -> list[Finding]:
    args, found = subject.args, []
    if args.overlap_param_gather and not args.use_distributed_optimizer:
        found.append(("--overlap-param-gather without --use-distributed-optimizer", "give both"))
    if args.overlap_param_gather and not args.overlap_grad_reduce:
        found.append(("--overlap-param-gather without --overlap-grad-reduce", "give both"))
    if (args.recompute_granularity == "full") != (args.recompute_method is not None):
        found.append(("--recompute-granularity full and --recompute-method go together", "give both or none"))
    if (args.recompute_method is not None) != (args.recompute_num_layers is not None):
        found.append(("--recompute-method and --recompute-num-layers go together", "give both or none"))
    wanted = "CUDA_DEVICE_MAX_CONNECTIONS"
    needs = args.sequence_parallel or args.overlap_grad_reduce
    if needs and subject.profile.device != "cpu" and subject.variable(wanted) != "1":
        what = f"{wanted} is {subject.variable(wanted)}, and sequence parallelism or overlaps are on"
        found.append((what, "unset it, or set cluster.override-environment"))
    return judged("switches", "overlaps and recomputation go together", found)


def _nodes(subject: Subject) -> list[Finding]:
    x, devices = subject.layout, subject.job.cluster.devices_per_node
    if x.tp > devices or devices % x.tp:
        what = f"a tensor-parallel group of {x.tp} spans nodes of {devices} devices"
        return [warned("tensor-parallel-placement", what, "keep tensor parallelism inside a node")]
    return [passed("tensor-parallel-placement", f"groups of {x.tp} stay inside nodes of {devices}")]


def _memory(subject: Subject) -> list[Finding]:
    args, profile, cluster, flags = subject.args, subject.profile, subject.job.cluster, subject.job.host.flags
    capacity = cluster.device_memory_gib or profile.device_memory_gib
    if capacity is None:
        # The memory of this machine, divided by its processes.
        capacity = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB / cluster.devices_per_node
    recipe = None
    # The ternary checks report what is wrong with a recipe.
    with contextlib.suppress(ValueError):
        recipe = recipe_of(args) if args.ternary else None
    buffer = subject.number(profile.communicator_buffer) if profile.communicator_buffer else None
    upstream = subject.job.host.kind == MEGATRON_LM
    fused = profile.device != "npu" or bool(flags.get("use-fused-swiglu") and flags.get("use-fused-rmsnorm"))
    attention = {"flash_attention": bool(flags.get("use-flash-attn"))} if upstream else {}
    options = options_of(
        args,
        **attention,
        fused=upstream and fused,
        recipe=recipe,
        communicator_mib=2.0 * (buffer or 0),
        runtime_gib=profile.runtime_memory_gib,
        cpu=profile.device == "cpu",
        teacher=subject.teacher,
    )
    stage, need = estimate(subject.layout, options)
    said = f"stage {stage}: {need} of {capacity:.4g} GiB"
    said += "" if recipe is None else f", quantized weights: {options.cache}"
    if need.total > capacity * GIB:
        cure = "more tensor or pipeline parallelism, --use-distributed-optimizer, recomputation, a smaller micro-batch"
        if recipe is not None and options.bf16 and options.cache != "resident":
            cure += ", --ternary-cache auto (no second copy of the quantized weights)"
        return [failed("device-memory", said, cure)]
    if need.total > _FULL * capacity * GIB:
        cure = f"above {_FULL:.0%} the estimate is no promise: try a few steps, or shrink the micro-batch or recompute"
        return [warned("device-memory", said, cure)]
    if args.distill_teacher is not None and subject.teacher is None:
        what = f"{said}, and a teacher whose share is unknown until the checkpoint is there"
        return [warned("device-memory", what, "ask again when there is one, or leave room for its weights and logits")]
    return [passed("device-memory", said)]


_of_the_layout = in_turn(_heads, _layers, _batch, _sequence, _experts, _vocabulary, _overlaps, _nodes, _memory)

# SPDX-License-Identifier: Apache-2.0
"""Contradictions among the flags of a run, all found before anything starts."""

import argparse
import importlib.util
from collections.abc import Iterator

from ..data.blends import blend_of, split_bounds
from ..files import directory_mistake
from ..models import family_flags
from ..models.architecture import uneven
from ..ternary_flags import ternary_mistakes
from .metrics import missing_packages

# For each argument, those that require it.
_NEEDED_BY = {
    "load": (
        "finetune exit_on_missing_checkpoint no_load_optim no_load_rng allow_quantizer_change allow_data_change"
    ).split(),
    "save": ["save_interval", "async_save", "keep_last_n", "no_save_optim"],
    "recompute_method": ["recompute_num_layers"],
    "recompute_num_layers": ["recompute_method"],
    "use_distributed_optimizer": ["overlap_param_gather"],
    "overlap_grad_reduce": ["overlap_param_gather"],
    "vocab_size": ["mock_data"],
    "log_dir": ["ternary_telemetry_interval"],
}
AT_ENDS = ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")
"""Arguments whose effect is at the end of documents."""
WEIGHT_DECAY_STYLES = ("linear", "cosine")
"""Styles of a weight decay that changes from step to step."""


def mistakes(args: argparse.Namespace, world_size: int) -> list[str]:
    """Returns the contradictions among the arguments, one line each; empty if there are none.

    Args:
        args: the parsed arguments; gets ``data_parallel_size``, ``global_batch_size`` and ``num_microbatches``.
        world_size: the number of processes of the job.
    """
    missing = [
        f"{_flag(name)} needs {_flag(needed)}"
        for needed, names in _NEEDED_BY.items()
        for name in names
        if getattr(args, name) not in (None, False) and getattr(args, needed) in (None, False)
    ]
    found = [*_shape_mistakes(args), *_parallel_mistakes(args, world_size), *_schedule_mistakes(args), *missing]
    found += [*data_mistakes(args), *distillation_mistakes(args), *_place_mistakes(args)]
    return [*found, *ternary_mistakes(args)]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _shape_mistakes(args: argparse.Namespace) -> Iterator[str]:
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    if args.kv_channels is None and args.hidden_size % args.num_attention_heads:
        yield f"--hidden-size {args.hidden_size} is not divisible by {args.num_attention_heads} heads"
    if args.num_attention_heads % groups:
        yield f"--num-query-groups {groups} does not divide {args.num_attention_heads} heads"
    head = args.kv_channels or args.hidden_size // args.num_attention_heads
    if args.position_embedding_type == "rope" and (head % 2 or head == 0):
        yield f"heads of {head} channels (--kv-channels) cannot be rotated: rope needs an even number of them"
    if args.seq_length > args.max_position_embeddings:
        yield f"--seq-length {args.seq_length} exceeds --max-position-embeddings {args.max_position_embeddings}"
    experts, ep = args.num_experts, args.expert_model_parallel_size
    topk = 2 if args.moe_router_topk is None else args.moe_router_topk
    if experts is None and (ep != 1 or args.moe_ffn_hidden_size is not None or args.moe_router_topk is not None):
        yield "--expert-model-parallel-size, --moe-ffn-hidden-size and --moe-router-topk need --num-experts"
    if experts is not None and (experts % ep or topk > experts):
        yield f"--num-experts {experts} does not go with --expert-model-parallel-size {ep} and --moe-router-topk {topk}"
    yield from family_flags.mistakes(args)
    if args.rotary_base is not None and args.position_embedding_type != "rope":
        yield "--rotary-base needs --position-embedding-type rope"
    name = "ffn" if experts is None or args.moe_ffn_hidden_size is None else "moe-ffn"
    channels = ffn_channels(args) if name == "ffn" else args.moe_ffn_hidden_size
    parts = {"attention heads": args.num_attention_heads, "query groups": groups}
    found = uneven({**parts, f"ffn channels (--{name}-hidden-size)": channels}, args.tensor_model_parallel_size)
    if found is not None:
        yield f"--tensor-model-parallel-size {args.tensor_model_parallel_size} does not divide {found}"


def ffn_channels(args: argparse.Namespace) -> int:
    """Returns ``--ffn-hidden-size``, or Megatron-LM's default for it.

    With h the hidden size, the default is 4h; with SwiGLU it is two thirds of that, rounded down to a multiple of 64,
    so that SwiGLU's three matrices have about as many parameters as the usual two.
    """
    default = (4 * args.hidden_size * 2 // 3) // 64 * 64 if args.swiglu else 4 * args.hidden_size
    return args.ffn_hidden_size or default


def _parallel_mistakes(args: argparse.Namespace, world_size: int) -> Iterator[str]:
    tp, pp, ep = (getattr(args, f"{kind}_model_parallel_size") for kind in ("tensor", "pipeline", "expert"))
    cp, vp = args.context_parallel_size, args.num_virtual_stages_per_pipeline_rank
    if world_size % (tp * pp * cp):
        context = f" x {cp} (context)" if cp > 1 else ""
        yield f"{world_size} processes cannot be split into groups of {tp} (tensor) x {pp} (pipeline){context}"
        return
    args.data_parallel_size = world_size // (tp * pp * cp)
    if args.data_parallel_size % ep:
        yield f"--expert-model-parallel-size {ep} does not divide the {args.data_parallel_size} data-parallel ranks"
    if args.num_experts is not None and tp > 1 and not args.sequence_parallel:
        yield "--num-experts with tensor parallelism needs --sequence-parallel"
    if args.sequence_parallel and tp == 1:
        yield "--sequence-parallel needs --tensor-model-parallel-size > 1"
    if args.sequence_parallel and args.seq_length % (tp * cp):
        yield f"--sequence-parallel: --seq-length {args.seq_length} is not divisible by {tp * cp}"
    yield from _context_mistakes(args, cp, tp)
    if args.num_layers % (pp * (vp or 1)):
        yield f"--num-layers {args.num_layers} cannot be split over {pp} stages" + (f" x {vp}" if vp else "")
    if vp is not None and pp == 1:
        yield "--num-virtual-stages-per-pipeline-rank needs --pipeline-model-parallel-size > 1"
    per_step = args.micro_batch_size * args.data_parallel_size
    args.global_batch_size = per_step if args.global_batch_size is None else args.global_batch_size
    args.num_microbatches, rest = divmod(args.global_batch_size, per_step)
    if rest or args.num_microbatches < 1:
        yield (
            f"--global-batch-size {args.global_batch_size} is not a multiple of --micro-batch-size "
            f"{args.micro_batch_size} x {args.data_parallel_size} data-parallel ranks"
        )
    if vp is not None and args.num_microbatches % pp:
        yield f"virtual stages need a multiple of {pp} micro-batches per step, got {args.num_microbatches}"


def _context_mistakes(args: argparse.Namespace, cp: int, tp: int) -> Iterator[str]:
    if cp > 1 and args.seq_length % (2 * cp):
        yield f"--context-parallel-size {cp}: --seq-length {args.seq_length} is not divisible by {2 * cp}"
    if cp > 1 and args.num_attention_heads % (tp * cp):
        heads = f"{args.num_attention_heads} attention heads"
        yield f"--context-parallel-size {cp}: {heads} cannot be split over {tp} x {cp} ranks"
    shares = {"--context-parallel-size": cp > 1, "--sft": args.sft, "--reset-attention-mask": args.reset_attention_mask}
    for flag in (flag for flag, given in shares.items() if given and args.attention_dropout):
        # The random draws would depend on the documents' lengths, and other heads would drop the same weights.
        yield f"{flag} needs --attention-dropout 0"
    if cp > 1 and args.num_experts is not None:
        yield "--context-parallel-size does not go with --num-experts"
    if args.position_embedding_type == "rope" and args.reset_position_ids != args.reset_attention_mask:
        # Rotary embeddings count positions within a segment that attends to itself, and take no other positions.
        yield "with rope --reset-position-ids and --reset-attention-mask go together"


def _schedule_mistakes(args: argparse.Namespace) -> Iterator[str]:
    if (args.recompute_granularity == "full") != (args.recompute_method is not None):
        yield "--recompute-granularity full and --recompute-method go together"
    decay = args.lr_decay_iters or args.train_iters
    if args.lr_warmup_iters >= decay:
        yield f"--lr-warmup-iters {args.lr_warmup_iters} must be less than the {decay} iterations of decay"
    if args.override_opt_param_scheduler and args.use_checkpoint_opt_param_scheduler:
        yield "--override-opt-param-scheduler and --use-checkpoint-opt-param-scheduler exclude each other"
    if args.min_lr > args.lr:
        yield f"--min-lr {args.min_lr} is above --lr {args.lr}"
    if (args.lr_decay_style == "WSD") != (args.lr_wsd_decay_iters is not None):
        yield "--lr-decay-style WSD and --lr-wsd-decay-iters go together"
    elif args.lr_wsd_decay_iters is not None and args.lr_warmup_iters + args.lr_wsd_decay_iters > decay:
        yield "--lr-warmup-iters and --lr-wsd-decay-iters together exceed the iterations of decay"
    yield from _weight_decay_mistakes(args)
    if args.ternary_ramp_iters >= args.train_iters:
        yield (
            f"--ternary-ramp-iters {args.ternary_ramp_iters} of --train-iters {args.train_iters} leaves no step that "
            "uses the quantized weights as they are: give fewer"
        )


def _weight_decay_mistakes(args: argparse.Namespace) -> Iterator[str]:
    style = f"--weight-decay-incr-style {args.weight_decay_incr_style}"
    for name in ("start_weight_decay", "end_weight_decay"):
        given = getattr(args, name) is not None
        if given and args.weight_decay_incr_style not in WEIGHT_DECAY_STYLES:
            yield f"{_flag(name)} does nothing with {style}: say {' or '.join(WEIGHT_DECAY_STYLES)}"
        elif not given and args.weight_decay_incr_style in WEIGHT_DECAY_STYLES:
            yield f"{style} needs {_flag(name)}"
    if args.weight_decay is not None and args.weight_decay_incr_style in WEIGHT_DECAY_STYLES:
        yield f"--weight-decay does nothing with {style}, which goes from --start- to --end-weight-decay: leave it out"


def data_mistakes(args: argparse.Namespace) -> Iterator[str]:
    """Yields the contradictions among the flags of the data."""
    if [args.data_path is not None, args.train_data_path is not None, args.mock_data].count(True) != 1:
        yield "give the data in one way: --data-path, --train-data-path, or --mock-data"
    if args.valid_data_path is not None and args.train_data_path is None:
        yield "--valid-data-path goes with --train-data-path"
    if args.mock_data and (args.tokenizer_model or args.tokenizer_type) is not None:
        yield "--tokenizer-model and --tokenizer-type are for real data: leave them out with --mock-data"
    if not args.mock_data and args.tokenizer_model is None and (args.load or args.pretrained_checkpoint) is None:
        yield "--tokenizer-model is needed with real data, where no checkpoint has a tokenizer"
    if args.tokenizer_type is not None and args.tokenizer_model is None:
        yield "--tokenizer-type says what --tokenizer-model is: give both"
    for name in ("mock_data", *AT_ENDS):
        if args.sft and getattr(args, name):
            yield f"{_flag(name)} is for plain text: conversations that --sft trains on say where they end"
    for name in ("data_path", "train_data_path", "valid_data_path", "split"):
        try:
            if getattr(args, name) is not None:
                (split_bounds if name == "split" else blend_of)(getattr(args, name))
        except ValueError as error:
            yield str(error)


def distillation_mistakes(args: argparse.Namespace) -> Iterator[str]:
    """Yields the contradictions among the flags of distillation."""
    if args.distill_teacher is not None and args.distill_targets is not None:
        yield "--distill-teacher and --distill-targets exclude each other"
    if args.distill_teacher is None and args.distill_targets is None:
        for name in ("distill_alpha", "distill_temperature", "distill_direction"):
            if getattr(args, name) is not None:
                yield f"{_flag(name)} needs --distill-teacher or --distill-targets"
    if args.distill_targets is not None and args.distill_direction == "reverse":
        yield "--distill-direction reverse needs --distill-teacher: targets lack what the teacher says of other ids"
    if args.distill_top_k is not None and args.distill_teacher is None:
        yield "--distill-top-k needs --distill-teacher: targets hold what launch/write_targets.py kept"
    if args.distill_top_k is not None and args.distill_direction == "reverse":
        yield "--distill-direction reverse needs what the teacher says of every id: leave out --distill-top-k"


def _place_mistakes(args: argparse.Namespace) -> Iterator[str]:
    """Yields what this machine, its packages or its disk do not allow, and contradictions about checkpoints."""
    if args.distributed_backend == "nccl" and not has_cuda():
        yield "--distributed-backend nccl needs CUDA: use gloo"
    for name in ("log_dir", "data_cache_path"):
        mistake = None if getattr(args, name) is None else directory_mistake(getattr(args, name))
        if mistake is not None:
            yield f"{_flag(name)} {getattr(args, name)}: {mistake}"
    if args.log_dir is not None and missing_packages():
        yield f"--log-dir needs {' and '.join(missing_packages())}: pip install 'bitcpm_megatron[plot]'"
    if args.pretrained_checkpoint is not None and args.exit_on_missing_checkpoint:
        yield "--pretrained-checkpoint and --exit-on-missing-checkpoint exclude each other"
    if args.verify_digests and args.load is None and args.pretrained_checkpoint is None:
        yield "--verify-digests needs --load or --pretrained-checkpoint"


def teaching_mistakes(teacher: argparse.Namespace, args: argparse.Namespace) -> list[str]:
    """Returns the reasons why a teacher cannot run beside a student and teach it; empty if it can.

    Args:
        teacher: the arguments that the teacher's checkpoint records.
        args: the student's arguments. Tokenizers are compared if both have a ``tokenizer_identity``.
    """
    stages, heads = args.pipeline_model_parallel_size, args.tensor_model_parallel_size * args.context_parallel_size
    positions = teacher.max_position_embeddings
    theirs, ours = (getattr(of, "tokenizer_identity", None) for of in (teacher, args))
    # The student's vocabulary size may not be known yet: it is then that of a tokenizer that has not been read.
    ids = min(teacher.vocab_size, args.vocab_size or teacher.vocab_size)
    found = {
        f"its {teacher.num_layers} layers cannot be split over {stages} stages": teacher.num_layers % stages,
        f"its {teacher.num_attention_heads} heads cannot be split over {heads} ranks": (
            teacher.num_attention_heads % heads
        ),
        f"it knows {positions} positions, less than --seq-length {args.seq_length}": args.seq_length > positions,
        "it was trained with another tokenizer": None not in (theirs, ours) and theirs != ours,
        f"--distill-top-k {args.distill_top_k} of {ids} ids leaves no rest: use fewer": (args.distill_top_k or 0)
        >= ids,
    }
    return [said for said, wrong in found.items() if wrong]


def has_cuda() -> bool:
    """Returns whether this machine can train on CUDA; False if torch is not installed."""
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()

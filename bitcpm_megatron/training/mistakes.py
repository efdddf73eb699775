# SPDX-License-Identifier: Apache-2.0
"""Contradictions among the flags, found together before anything starts."""

import argparse
import importlib.util

from ..data.blends import blend_of, split_bounds
from ..files import directory_mistake
from ..models import family_flags
from ..models.architecture import uneven
from ..ternary_flags import ternary_mistakes
from .metrics import missing_packages


def mistakes(args: argparse.Namespace, world_size: int) -> list[str]:
    """What cannot go together, one line each; empty where all can.

    Args:
        args: as parsed. Gets ``data_parallel_size``, ``global_batch_size`` and ``num_microbatches``.
        world_size: number of processes of the job.
    """
    return [*_shape_mistakes(args), *_parallel_mistakes(args, world_size), *_other_mistakes(args)]


def _shape_mistakes(args: argparse.Namespace) -> list[str]:
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    found = []
    if args.kv_channels is None and args.hidden_size % args.num_attention_heads:
        found.append(f"--hidden-size {args.hidden_size} is not divisible by {args.num_attention_heads} heads")
    if args.num_attention_heads % groups:
        found.append(f"--num-query-groups {groups} does not divide {args.num_attention_heads} heads")
    head = args.kv_channels or args.hidden_size // args.num_attention_heads
    if args.position_embedding_type == "rope" and (head % 2 or head == 0):
        found.append(f"heads of {head} channels (--kv-channels) cannot be rotated: rope needs an even number of them")
    if args.seq_length > args.max_position_embeddings:
        found.append(f"--seq-length {args.seq_length} exceeds --max-position-embeddings {args.max_position_embeddings}")
    experts, ep = args.num_experts, args.expert_model_parallel_size
    topk = 2 if args.moe_router_topk is None else args.moe_router_topk
    if experts is None and (ep != 1 or args.moe_ffn_hidden_size is not None or args.moe_router_topk is not None):
        found.append("--expert-model-parallel-size, --moe-ffn-hidden-size and --moe-router-topk need --num-experts")
    if experts is not None and (experts % ep or topk > experts):
        found.append(
            f"--num-experts {experts} does not go with --expert-model-parallel-size {ep} and --moe-router-topk {topk}"
        )
    found += family_flags.mistakes(args)
    if args.rotary_base is not None and args.position_embedding_type != "rope":
        found.append("--rotary-base needs --position-embedding-type rope")
    return found + _tensor_parallel_mistakes(args, groups)


def _tensor_parallel_mistakes(args: argparse.Namespace, groups: int) -> list[str]:
    name = "ffn" if args.num_experts is None or args.moe_ffn_hidden_size is None else "moe-ffn"
    channels = ffn_channels(args) if name == "ffn" else args.moe_ffn_hidden_size
    parts = {"attention heads": args.num_attention_heads, "query groups": groups}
    found = uneven({**parts, f"ffn channels (--{name}-hidden-size)": channels}, args.tensor_model_parallel_size)
    flag = f"--tensor-model-parallel-size {args.tensor_model_parallel_size}"
    return [] if found is None else [f"{flag} does not divide {found}"]


def ffn_channels(args: argparse.Namespace) -> int:
    """``--ffn-hidden-size``, or Megatron-LM's default for it.

    That is two thirds of 4h, rounded down to a multiple of 64, so that SwiGLU's three matrices weigh alike; else 4h.
    """
    default = (4 * args.hidden_size * 2 // 3) // 64 * 64 if args.swiglu else 4 * args.hidden_size
    return args.ffn_hidden_size or default


def _parallel_mistakes(args: argparse.Namespace, world_size: int) -> list[str]:
    tp, pp, vp = (
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.num_virtual_stages_per_pipeline_rank,
    )
    if world_size % (tp * pp):
        return [f"{world_size} processes cannot be split into groups of {tp} (tensor) x {pp} (pipeline)"]
    found = []
    if (world_size // (tp * pp)) % args.expert_model_parallel_size:
        found.append(
            f"--expert-model-parallel-size {args.expert_model_parallel_size} does not divide the "
            f"{world_size // (tp * pp)} data-parallel ranks"
        )
    if args.num_experts is not None and tp > 1 and not args.sequence_parallel:
        found.append("--num-experts with tensor parallelism needs --sequence-parallel")
    if args.sequence_parallel and tp == 1:
        found.append("--sequence-parallel needs --tensor-model-parallel-size > 1")
    if args.sequence_parallel and args.seq_length % tp:
        found.append(f"--sequence-parallel: --seq-length {args.seq_length} is not divisible by {tp}")
    if args.num_layers % (pp * (vp or 1)):
        found.append(f"--num-layers {args.num_layers} cannot be split over {pp} stages" + (f" x {vp}" if vp else ""))
    if vp is not None and pp == 1:
        found.append("--num-virtual-stages-per-pipeline-rank needs --pipeline-model-parallel-size > 1")
    if args.overlap_param_gather and not args.use_distributed_optimizer:
        found.append("--overlap-param-gather needs --use-distributed-optimizer")
    if args.overlap_param_gather and not args.overlap_grad_reduce:
        found.append("--overlap-param-gather needs --overlap-grad-reduce")
    per_step = args.micro_batch_size * (world_size // (tp * pp))
    args.data_parallel_size = world_size // (tp * pp)
    args.global_batch_size = per_step if args.global_batch_size is None else args.global_batch_size
    args.num_microbatches, rest = divmod(args.global_batch_size, per_step)
    if rest or args.num_microbatches < 1:
        found.append(
            f"--global-batch-size {args.global_batch_size} is not a multiple of --micro-batch-size "
            f"{args.micro_batch_size} x {args.data_parallel_size} data-parallel ranks"
        )
    if vp is not None and args.num_microbatches % pp:
        found.append(f"virtual stages need a multiple of {pp} micro-batches per step, got {args.num_microbatches}")
    return found


def _other_mistakes(args: argparse.Namespace) -> list[str]:
    found = []
    if args.distributed_backend == "nccl" and not has_cuda():
        found.append("--distributed-backend nccl needs CUDA: use gloo")
    if (args.recompute_granularity == "full") != (args.recompute_method is not None):
        found.append("--recompute-granularity full and --recompute-method go together")
    if args.recompute_method is not None and args.recompute_num_layers is None:
        found.append("--recompute-method needs --recompute-num-layers")
    if args.recompute_num_layers is not None and args.recompute_method is None:
        found.append("--recompute-num-layers needs --recompute-method")
    decay = args.lr_decay_iters or args.train_iters
    if args.lr_warmup_iters >= decay:
        found.append(f"--lr-warmup-iters {args.lr_warmup_iters} must be less than the {decay} iterations of decay")
    if args.override_opt_param_scheduler and args.use_checkpoint_opt_param_scheduler:
        found.append("--override-opt-param-scheduler and --use-checkpoint-opt-param-scheduler exclude each other")
    if args.min_lr > args.lr:
        found.append(f"--min-lr {args.min_lr} is above --lr {args.lr}")
    if (args.lr_decay_style == "WSD") != (args.lr_wsd_decay_iters is not None):
        found.append("--lr-decay-style WSD and --lr-wsd-decay-iters go together")
    elif args.lr_wsd_decay_iters is not None and args.lr_warmup_iters + args.lr_wsd_decay_iters > decay:
        found.append("--lr-warmup-iters and --lr-wsd-decay-iters together exceed the iterations of decay")
    found += _data_mistakes(args)
    for name in ("log_dir", "data_cache_path"):
        mistake = None if getattr(args, name) is None else directory_mistake(getattr(args, name))
        if mistake is not None:
            found.append(f"{_flag(name)} {getattr(args, name)}: {mistake}")
    if args.log_dir is not None and missing_packages():
        found.append(f"--log-dir needs {' and '.join(missing_packages())}: pip install 'bitcpm_megatron[plot]'")
    if args.save_interval is not None and args.save is None:
        found.append("--save-interval needs --save")
    if args.save is None and (args.async_save or args.keep_last_n is not None):
        found.append("--async-save and --keep-last-n need --save")
    if args.pretrained_checkpoint is not None and args.exit_on_missing_checkpoint:
        found.append("--pretrained-checkpoint and --exit-on-missing-checkpoint exclude each other")
    if args.finetune and args.load is None:
        found.append("--finetune needs --load")
    for name in (
        "exit_on_missing_checkpoint",
        "no_load_optim",
        "no_load_rng",
        "allow_quantizer_change",
        "allow_data_change",
    ):
        if getattr(args, name) and args.load is None:
            found.append(f"{_flag(name)} needs --load")
    if args.verify_digests and args.load is None and args.pretrained_checkpoint is None:
        found.append("--verify-digests needs --load or --pretrained-checkpoint")
    if args.no_save_optim and args.save is None:
        found.append("--no-save-optim needs --save")
    if args.ternary and args.ternary_telemetry_interval is not None and args.log_dir is None:
        found.append("--ternary-telemetry-interval needs --log-dir")
    return found + ternary_mistakes(args)


def _data_mistakes(args: argparse.Namespace) -> list[str]:
    sources = [args.data_path is not None, args.train_data_path is not None, args.mock_data]
    found = []
    if sum(sources) != 1:
        found.append("give the data in one way: --data-path, --train-data-path, or --mock-data")
    if args.valid_data_path is not None and args.train_data_path is None:
        found.append("--valid-data-path goes with --train-data-path")
    if args.mock_data and args.vocab_size is None:
        found.append("--mock-data needs --vocab-size")
    if args.mock_data == (args.tokenizer_model is not None):
        found.append("--tokenizer-model is needed with real data, and only then")
    for check, name in (
        (blend_of, "data_path"),
        (blend_of, "train_data_path"),
        (blend_of, "valid_data_path"),
        (split_bounds, "split"),
    ):
        try:
            if getattr(args, name) is not None:
                check(getattr(args, name))
        except ValueError as error:
            found.append(str(error))
    return found


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def has_cuda() -> bool:
    """Whether this machine can train on CUDA; one without torch cannot train at all."""
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()

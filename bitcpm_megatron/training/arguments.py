# SPDX-License-Identifier: Apache-2.0
"""The command line of the training loop: Megatron-LM's names and meanings, and the ``--ternary`` flags.

An unknown flag is an error (also an abbreviated one), and contradictions are reported together before anything starts.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from ..arguments import add_ternary_arguments, quantizer_config, ternary_mistakes
from ..cli import Number, Parser, Whole
from ..files import directory_mistake
from ..models import arguments as family
from ..models.architecture import MAX_LAYERS, uneven
from .metrics import missing_packages
from .token_headers import blend_of, split_bounds

__all__ = ["add_ternary_arguments", "build_parser", "defaults", "params_dtype", "parse_args", "quantizer_config"]

_DECAY_STYLES = ("constant", "linear", "cosine", "inverse-square-root", "WSD")
_WSD_STYLES = ("exponential", "linear", "cosine", "minus_sqrt")

# Far above what anybody trains, and low enough that a slip of the finger is refused instead of filling the memory.
_WIDTH = Whole(1, 2**20)
_LENGTH = Whole(1, 2**24)
_LAYERS = Whole(1, MAX_LAYERS)
_RANKS = Whole(1, 2**16)
_ITERATIONS = Whole(1, 10**9)
_VOCABULARY = Whole(1, 2**24)
_PROBABILITY = Number(0, 1, open_maximum=True)
# fp32 holds it: below, a row without gradient would be divided by zero.
_EPSILON = Number(1e-30, 1)
# What Python, NumPy and torch all take.
_SEED = Whole(0, 2**32 - 1)


def build_parser() -> Parser:
    """The parser of ``launch/pretrain.py``."""
    parser = Parser(
        description=__doc__,
        epilog="--model NAME stands for the flags of launch/models/NAME.yaml (or of a file); other flags override them",
    )
    _model(parser.add_argument_group("model"))
    _parallel(parser.add_argument_group("parallelism"))
    _training(parser.add_argument_group("training"))
    _data(parser.add_argument_group("data"))
    _checkpoint(parser.add_argument_group("checkpoint"))
    _logging(parser.add_argument_group("logging"))
    return add_ternary_arguments(parser)


def _model(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--num-layers", type=_LAYERS, required=True)
    group.add_argument("--hidden-size", type=_WIDTH, required=True)
    group.add_argument("--ffn-hidden-size", type=_WIDTH, help="default 4 x hidden size, or 8/3 of it with --swiglu")
    group.add_argument("--num-attention-heads", type=_WIDTH, required=True)
    group.add_argument("--group-query-attention", action="store_true")
    group.add_argument("--num-query-groups", type=_WIDTH, default=1)
    group.add_argument("--kv-channels", type=_WIDTH, help="size of one head, default hidden size / heads")
    group.add_argument("--seq-length", type=_LENGTH, required=True)
    group.add_argument("--max-position-embeddings", type=_LENGTH, required=True)
    group.add_argument("--position-embedding-type", choices=("learned_absolute", "rope"), default="learned_absolute")
    group.add_argument("--rotary-base", type=Whole(1, 10**12), help="of rope, default 10000")
    group.add_argument("--normalization", choices=("LayerNorm", "RMSNorm"), default="LayerNorm")
    group.add_argument("--norm-epsilon", type=_EPSILON, default=1e-5)
    group.add_argument("--swiglu", action="store_true")
    group.add_argument("--disable-bias-linear", action="store_false", dest="add_bias_linear")
    group.add_argument("--untie-embeddings-and-output-weights", action="store_true")
    group.add_argument("--num-experts", type=_WIDTH, help="mixture of experts in every layer")
    group.add_argument("--moe-router-topk", type=_WIDTH, help="experts per token, default 2")
    group.add_argument("--moe-ffn-hidden-size", type=_WIDTH, help="of one expert, default --ffn-hidden-size")
    group.add_argument("--attention-dropout", type=_PROBABILITY, default=0.1)
    group.add_argument("--hidden-dropout", type=_PROBABILITY, default=0.1)
    group.add_argument("--init-method-std", type=Number(0, 10, open_minimum=True), default=0.02)
    group.add_argument("--make-vocab-size-divisible-by", type=Whole(1, 2**20), default=128)
    family.add_model_arguments(group)


def _parallel(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--tensor-model-parallel-size", type=_RANKS, default=1)
    group.add_argument("--pipeline-model-parallel-size", type=_RANKS, default=1)
    group.add_argument("--num-virtual-stages-per-pipeline-rank", type=_LAYERS)
    group.add_argument("--expert-model-parallel-size", type=_RANKS, default=1)
    group.add_argument("--sequence-parallel", action="store_true")
    group.add_argument("--use-distributed-optimizer", action="store_true")
    group.add_argument("--overlap-grad-reduce", action="store_true")
    group.add_argument("--overlap-param-gather", action="store_true")
    group.add_argument("--no-gradient-accumulation-fusion", action="store_false", dest="gradient_accumulation_fusion")
    group.add_argument("--distributed-backend", choices=("nccl", "gloo"), help="default nccl with CUDA, else gloo")
    group.add_argument("--distributed-timeout-minutes", type=Whole(1, 60 * 24 * 365), default=10)


def _training(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--micro-batch-size", type=_WIDTH, required=True)
    group.add_argument("--global-batch-size", type=_LENGTH, help="default: one micro-batch per data-parallel rank")
    group.add_argument("--train-iters", type=_ITERATIONS, required=True)
    group.add_argument(
        "--exit-interval", type=_ITERATIONS, help="stop, with a checkpoint, when the iteration divides by this"
    )
    group.add_argument(
        "--exit-signal-handler",
        action="store_true",
        help="on SIGTERM or SIGUSR1 save at the end of the step and leave with status 0",
    )
    group.add_argument("--bf16", action="store_true", help="bf16 weights and GEMMs with fp32 master weights")
    group.add_argument("--lr", type=Number(0, 100, open_minimum=True), required=True)
    group.add_argument("--min-lr", type=Number(0, 100), default=0.0)
    group.add_argument("--lr-decay-style", choices=_DECAY_STYLES, default="linear")
    group.add_argument("--lr-decay-iters", type=_ITERATIONS, help="default --train-iters")
    group.add_argument("--lr-warmup-iters", type=Whole(0, 10**9), default=0)
    group.add_argument("--lr-wsd-decay-iters", type=_ITERATIONS)
    group.add_argument("--lr-wsd-decay-style", choices=_WSD_STYLES, default="exponential")
    group.add_argument(
        "--override-opt-param-scheduler", action="store_true", help="the schedule of these flags, not the checkpoint's"
    )
    group.add_argument(
        "--use-checkpoint-opt-param-scheduler", action="store_true", help="the checkpoint's schedule, not these flags'"
    )
    group.add_argument("--weight-decay", type=Number(0, 100), default=0.01)
    group.add_argument("--adam-beta1", type=_PROBABILITY, default=0.9)
    group.add_argument("--adam-beta2", type=_PROBABILITY, default=0.999)
    group.add_argument("--adam-eps", type=_EPSILON, default=1e-8)
    group.add_argument("--clip-grad", type=Number(0), default=1.0, help="0 for none")
    group.add_argument("--seed", type=_SEED, default=1234)
    group.add_argument("--use-cpu-initialization", action="store_true", help="the same weights at every TP size")
    group.add_argument("--recompute-granularity", choices=("full", "selective"))
    group.add_argument("--recompute-method", choices=("uniform", "block"))
    group.add_argument("--recompute-num-layers", type=_LAYERS)


def _data(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--data-path", nargs="+", help="PREFIX, or WEIGHT PREFIX WEIGHT PREFIX ...; cut by --split")
    group.add_argument("--split", default="969,30,1", help="train, validation and test shares of --data-path")
    group.add_argument("--train-data-path", nargs="+", help="instead of --data-path and --split")
    group.add_argument("--valid-data-path", nargs="+")
    group.add_argument("--mock-data", action="store_true", help="synthetic tokens; needs --vocab-size")
    group.add_argument("--tokenizer-model", metavar="FILE", help="SentencePiece model")
    group.add_argument(
        "--vocab-size", type=_VOCABULARY, help="rows of the embedding before padding, default the tokenizer's"
    )
    group.add_argument("--data-cache-path", metavar="DIR", help="of the sample indices, default beside the data")
    group.add_argument("--num-workers", type=Whole(0, 1024), default=0, help="data loading processes per rank")
    group.add_argument("--eval-iters", type=Whole(0, 10**9), default=100)
    group.add_argument("--eval-interval", type=_ITERATIONS, default=1000)


def _checkpoint(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--save", metavar="DIR")
    group.add_argument("--save-interval", type=_ITERATIONS)
    group.add_argument("--async-save", action="store_true", help="write checkpoints while training goes on")
    group.add_argument("--keep-last-n", type=Whole(), metavar="N", help="delete all checkpoints but the newest N")
    group.add_argument("--load", metavar="DIR", help="resume from here; starts anew where it holds no checkpoint")
    group.add_argument(
        "--pretrained-checkpoint", metavar="DIR", help="weights to start from where --load holds no checkpoint"
    )
    group.add_argument("--exit-on-missing-checkpoint", action="store_true")
    group.add_argument(
        "--verify-digests", action="store_true", help="compare the checkpoint that is loaded with its DIGESTS.json"
    )
    group.add_argument("--allow-data-change", action="store_true", help="go on with other training data")
    group.add_argument("--finetune", action="store_true", help="load the weights alone, start at iteration 0")
    group.add_argument("--no-load-optim", action="store_true")
    group.add_argument("--no-load-rng", action="store_true")
    group.add_argument("--no-save-optim", action="store_true")


def _logging(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--log-interval", type=_ITERATIONS, default=100)
    group.add_argument("--log-dir", metavar="DIR", help="metrics.jsonl, TensorBoard events, loss.png")


def parse_args(argv: Sequence[str] | None, world_size: int) -> argparse.Namespace:
    """Parses and checks the command line.

    Args:
        argv: without the program's name; None for this process's.
        world_size: number of processes of the job.

    Returns:
        The arguments, with ``data_parallel_size``, ``num_microbatches`` and all dependent defaults filled in.

    Raises:
        SystemExit: status 2, after naming every mistake.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    mistakes = [*_shape_mistakes(args), *_parallel_mistakes(args, world_size), *_other_mistakes(args)]
    if mistakes:
        parser.error("these arguments cannot go together:\n  " + "\n  ".join(mistakes))
    _fill_in(args)
    return args


def defaults() -> dict[str, Any]:
    """Every argument of a run by name, as it is where the command line does not say otherwise; required ones absent."""
    parser = build_parser()
    return {
        action.dest: parser.get_default(action.dest)
        for action in parser._actions
        if action.dest != "help" and not action.required
    }


def params_dtype(args: argparse.Namespace) -> torch.dtype:
    """Dtype of the weights that the forward sees."""
    return torch.bfloat16 if args.bf16 else torch.float32


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
    found += family.mistakes(args)
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
    cuda = torch.cuda.is_available()
    if args.distributed_backend == "nccl" and not cuda:
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


def _fill_in(args: argparse.Namespace) -> None:
    args.ffn_hidden_size = ffn_channels(args)
    args.rotary_base = 10000 if args.rotary_base is None else args.rotary_base
    args.moe_router_topk = 2 if args.moe_router_topk is None else args.moe_router_topk
    args.kv_channels = args.kv_channels or args.hidden_size // args.num_attention_heads
    args.num_query_groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    args.lr_decay_iters = args.lr_decay_iters or args.train_iters
    args.distributed_backend = args.distributed_backend or ("nccl" if torch.cuda.is_available() else "gloo")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")

# SPDX-License-Identifier: Apache-2.0
"""The command line of the training loop: flags with Megatron-LM's names and meanings, and the ``--ternary`` flags.

An unknown or abbreviated flag is an error, and contradictions are reported together before anything starts.
"""

import argparse
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoints.directory import saved_arguments
from ..cli import Number, Parser, Whole
from ..data.vocabulary import MAX_TOP_K, TOKENIZER_TYPES
from ..models import family_flags
from ..models.architecture import MAX_LAYERS, uneven
from ..quantization.recipe import Recipe
from ..quantization.record import QuantizerRecord
from ..ternary_flags import add_ternary_arguments
from .mistakes import WEIGHT_DECAY_STYLES, ffn_channels, has_cuda, mistakes

DIRECTIONS = ("forward", "reverse")
WEIGHT_DECAY = 0.01
"""The weight decay if none is given and it is constant over the steps."""
_DECAY_STYLES = ("constant", "linear", "cosine", "inverse-square-root", "WSD")
_WSD_STYLES = ("exponential", "linear", "cosine", "minus_sqrt")

# Far above any real training run, and low enough that a typing error is refused instead of filling the memory.
_WIDTH = Whole(1, 2**20)
_LENGTH = Whole(1, 2**24)
_LAYERS = Whole(1, MAX_LAYERS)
_RANKS = Whole(1, 2**16)
_ITERATIONS = Whole(1, 10**9)
_VOCABULARY = Whole(1, 2**24)
_DECAY = Number(0, 100)
_PROBABILITY = Number(0, 1, open_maximum=True)
# fp32 can represent the minimum. A smaller value could be rounded to 0, and a row without gradient divided by 0.
_EPSILON = Number(1e-30, 1)
# Seeds that Python, NumPy and torch all accept.
_SEED = Whole(0, 2**32 - 1)
_Add = Callable[..., argparse.Action]


class _Window:
    """Type of Megatron-LM's pair ``W,0``: tokens to the left and to the right, as a list that a checkpoint records."""

    def __call__(self, text: str) -> list[int]:
        parts = text.strip("()").split(",")
        window = [int(part) for part in parts] if all(part.strip().isdecimal() for part in parts) else None
        if (mistake := self.mistake(window)) is not None:
            raise argparse.ArgumentTypeError(f"{text!r} is {mistake}")
        return window or []

    def mistake(self, window: Any) -> str | None:
        """Returns what is wrong with the pair, or None."""
        good = isinstance(window, list | tuple) and len(window) == 2 and all(type(part) is int for part in window)
        if good and _LENGTH.mistake(window[0]) is None and window[1] == 0:
            return None
        return f"no W,0 with W from 1 to {_LENGTH.maximum}: tokens before each one that it attends to, and none behind"


OF_DISTILLATION = (
    "distill_teacher distill_targets distill_alpha distill_temperature distill_direction distill_top_k"
).split()
"""The names of the arguments of distillation."""
_OF_THE_MODEL = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings")


def build_parser() -> Parser:
    """Returns the parser of ``launch/pretrain.py``."""
    parser = Parser(
        description=__doc__,
        epilog="--model NAME stands for the flags of launch/models/NAME.yaml (or of a file); other flags override them",
    )
    model = parser.add_argument_group("model")
    _model(model.add_argument)
    family_flags.add_model_arguments(model)
    _parallel(parser.add_argument_group("parallelism").add_argument)
    _training(parser.add_argument_group("training").add_argument)
    _data(parser.add_argument_group("data").add_argument)
    _checkpoint(parser.add_argument_group("checkpoint").add_argument)
    _distillation(parser.add_argument_group("distillation").add_argument)
    _logging(parser.add_argument_group("logging").add_argument)
    add_ternary_arguments(parser)
    return parser


def _model(add: _Add) -> None:
    add("--num-layers", type=_LAYERS, required=True)
    add("--hidden-size", type=_WIDTH, required=True)
    add("--ffn-hidden-size", type=_WIDTH, help="default 4 x hidden size, or 8/3 of it with --swiglu")
    add("--num-attention-heads", type=_WIDTH, required=True)
    add("--group-query-attention", action="store_true")
    add("--num-query-groups", type=_WIDTH, default=1)
    add("--kv-channels", type=_WIDTH, help="size of one head, default hidden size / heads")
    add("--seq-length", type=_LENGTH, required=True)
    add("--max-position-embeddings", type=_LENGTH, required=True)
    add("--position-embedding-type", choices=("learned_absolute", "rope"), default="learned_absolute")
    add("--rotary-base", type=Whole(1, 10**12), help="of rope, default 10000")
    add("--normalization", choices=("LayerNorm", "RMSNorm"), default="LayerNorm")
    add("--norm-epsilon", type=_EPSILON, default=1e-5)
    add("--swiglu", action="store_true")
    add("--disable-bias-linear", action="store_false", dest="add_bias_linear")
    add("--untie-embeddings-and-output-weights", action="store_true")
    add("--num-experts", type=_WIDTH, help="mixture of experts in every layer")
    add("--moe-router-topk", type=_WIDTH, help="experts per token, default 2")
    add("--moe-ffn-hidden-size", type=_WIDTH, help="of one expert, default --ffn-hidden-size")
    add("--attention-dropout", type=_PROBABILITY, default=0.1)
    add("--hidden-dropout", type=_PROBABILITY, default=0.1)
    add("--init-method-std", type=Number(0, 10, open_minimum=True), default=0.02)
    add("--make-vocab-size-divisible-by", type=Whole(1, 2**20), default=128)
    add("--window-size", type=_Window(), metavar="W,0", help="attend to this token and the W before it alone")


def _parallel(add: _Add) -> None:
    add("--tensor-model-parallel-size", type=_RANKS, default=1)
    add("--pipeline-model-parallel-size", type=_RANKS, default=1)
    add("--num-virtual-stages-per-pipeline-rank", type=_LAYERS)
    add("--expert-model-parallel-size", type=_RANKS, default=1)
    add("--context-parallel-size", type=_RANKS, default=1, help="ranks that share the tokens of a sequence")
    add("--cp-comm-type", choices=("a2a",), default="a2a", help="how they attend: over heads (Ulysses)")
    add("--sequence-parallel", action="store_true")
    add("--use-distributed-optimizer", action="store_true")
    add("--overlap-grad-reduce", action="store_true")
    add("--overlap-param-gather", action="store_true")
    add("--no-gradient-accumulation-fusion", action="store_false", dest="gradient_accumulation_fusion")
    add("--distributed-backend", choices=("nccl", "gloo"), help="default nccl with CUDA, else gloo")
    add("--distributed-timeout-minutes", type=Whole(1, 60 * 24 * 365), default=10)


def _training(add: _Add) -> None:
    add("--micro-batch-size", type=_WIDTH, required=True)
    add("--global-batch-size", type=_LENGTH, help="default: one micro-batch per data-parallel rank")
    add("--train-iters", type=_ITERATIONS, required=True)
    add("--exit-interval", type=_ITERATIONS, help="stop, with a checkpoint, when the iteration divides by this")
    add(
        "--exit-signal-handler",
        action="store_true",
        help="on SIGTERM or SIGUSR1 save at the end of the step and leave with status 0",
    )
    add("--bf16", action="store_true", help="bf16 weights and GEMMs with fp32 master weights")
    add("--lr", type=Number(0, 100, open_minimum=True), required=True)
    add("--min-lr", type=Number(0, 100), default=0.0)
    add("--lr-decay-style", choices=_DECAY_STYLES, default="linear")
    add("--lr-decay-iters", type=_ITERATIONS, help="default --train-iters")
    add("--lr-warmup-iters", type=Whole(0, 10**9), default=0)
    add("--lr-wsd-decay-iters", type=_ITERATIONS)
    add("--lr-wsd-decay-style", choices=_WSD_STYLES, default="exponential")
    add("--override-opt-param-scheduler", action="store_true", help="the schedule of these flags, not the checkpoint's")
    add("--use-checkpoint-opt-param-scheduler", action="store_true", help="the checkpoint's schedule, not these flags'")
    add("--weight-decay", type=_DECAY, help=f"default {WEIGHT_DECAY}")
    add("--start-weight-decay", type=_DECAY, help="of the first step, instead of --weight-decay")
    add("--end-weight-decay", type=_DECAY, help="after --train-iters; it may be less than at the start")
    add("--weight-decay-incr-style", choices=("constant", *WEIGHT_DECAY_STYLES), default="constant")
    add("--adam-beta1", type=_PROBABILITY, default=0.9)
    add("--adam-beta2", type=_PROBABILITY, default=0.999)
    add("--adam-eps", type=_EPSILON, default=1e-8)
    add("--clip-grad", type=Number(0), default=1.0, help="0 for none")
    add("--seed", type=_SEED, default=1234)
    add("--use-cpu-initialization", action="store_true", help="the same weights at every TP size")
    add("--recompute-granularity", choices=("full", "selective"))
    add("--recompute-method", choices=("uniform", "block"))
    add("--recompute-num-layers", type=_LAYERS)


def _data(add: _Add) -> None:
    add("--data-path", nargs="+", help="PREFIX, or WEIGHT PREFIX WEIGHT PREFIX ...; cut by --split")
    add("--split", default="969,30,1", help="train, validation and test shares of --data-path")
    add("--train-data-path", nargs="+", help="instead of --data-path and --split")
    add("--valid-data-path", nargs="+")
    add("--mock-data", action="store_true", help="synthetic tokens; needs --vocab-size")
    add("--tokenizer-type", choices=TOKENIZER_TYPES, help="default: what --tokenizer-model holds")
    add(
        "--tokenizer-model",
        metavar="PATH",
        help="a SentencePiece .model file, or a directory with a tokenizer.json; default the checkpoint's own",
    )
    add("--vocab-size", type=_VOCABULARY, help="rows of the embedding before padding, default the tokenizer's")
    add("--sft", action="store_true", help="fine-tune on conversations of launch/preprocess_sft.py, on answers alone")
    add("--reset-position-ids", action="store_true", help="positions start anew after an end-of-document token")
    add("--reset-attention-mask", action="store_true", help="documents attend to themselves alone")
    add("--eod-mask-loss", action="store_true", help="what follows an end-of-document token isn't learned")
    add("--data-cache-path", metavar="DIR", help="of the sample indices of plain text, default beside the data")
    add("--num-workers", type=Whole(0, 1024), default=0, help="data loading processes per rank")
    add("--eval-iters", type=Whole(0, 10**9), default=100)
    add("--eval-interval", type=_ITERATIONS, default=1000)


def _checkpoint(add: _Add) -> None:
    add("--save", metavar="DIR")
    add("--save-interval", type=_ITERATIONS)
    add("--async-save", action="store_true", help="write checkpoints while training goes on")
    add("--keep-last-n", type=Whole(), metavar="N", help="delete all checkpoints but the newest N")
    add("--load", metavar="DIR", help="resume from here; starts anew where it holds no checkpoint")
    add("--pretrained-checkpoint", metavar="DIR", help="weights to start from where --load holds no checkpoint")
    add("--exit-on-missing-checkpoint", action="store_true")
    add("--verify-digests", action="store_true", help="compare the checkpoint that is loaded with its DIGESTS.json")
    add("--allow-data-change", action="store_true", help="go on with other training data")
    add("--finetune", action="store_true", help="load the weights alone, start at iteration 0")
    add("--no-load-optim", action="store_true")
    add("--no-load-rng", action="store_true")
    add("--no-save-optim", action="store_true")


def _distillation(add: _Add) -> None:
    add("--distill-teacher", metavar="DIR", help="learn from this run of ours, too; its newest checkpoint")
    add("--distill-targets", metavar="DIR", help="learn from these targets, of launch/write_targets.py, too")
    add("--distill-alpha", type=Number(0, 1), help="share of the teacher in the loss, default 1")
    add(
        "--distill-temperature",
        type=Number(0, 1000, open_minimum=True),
        help="of both softmaxes, default 1 or the targets'",
    )
    add("--distill-direction", choices=DIRECTIONS, help="forward (default): KL(teacher || student)")
    add(
        "--distill-top-k",
        type=Whole(1, MAX_TOP_K),
        metavar="K",
        help="keep the likeliest ids of --distill-teacher, and the rest as one, in place of all its logits",
    )


def _logging(add: _Add) -> None:
    add("--log-interval", type=_ITERATIONS, default=100)
    add("--log-dir", metavar="DIR", help="metrics.jsonl, TensorBoard events, loss.png")


def parse_args(argv: Sequence[str] | None, world_size: int) -> argparse.Namespace:
    """Parses and checks the command line.

    Args:
        argv: the command line without the program's name; None for this process's command line.
        world_size: the number of processes of the job.

    Returns:
        The arguments, with ``data_parallel_size``, ``num_microbatches`` and all dependent defaults filled in.

    Raises:
        SystemExit: with status 2, after every mistake has been named.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    found = mistakes(args, world_size)
    if found:
        parser.error("these arguments cannot go together:\n  " + "\n  ".join(found))
    args.ffn_hidden_size = ffn_channels(args)
    args.rotary_base = 10000 if args.rotary_base is None else args.rotary_base
    args.moe_router_topk = 2 if args.moe_router_topk is None else args.moe_router_topk
    args.kv_channels = args.kv_channels or args.hidden_size // args.num_attention_heads
    args.num_query_groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    args.lr_decay_iters = args.lr_decay_iters or args.train_iters
    args.weight_decay = WEIGHT_DECAY if args.weight_decay is None else args.weight_decay
    args.distributed_backend = args.distributed_backend or ("nccl" if has_cuda() else "gloo")
    fill_in_distillation(args)
    return args


def fill_in_distillation(args: argparse.Namespace) -> None:
    """Fills in the defaults of the distillation flags that depend on there being a teacher or a target store."""
    if args.distill_teacher is not None:
        args.distill_temperature = args.distill_temperature or 1.0
    if args.distill_teacher is not None or args.distill_targets is not None:
        args.distill_alpha = 1.0 if args.distill_alpha is None else args.distill_alpha
        args.distill_direction = args.distill_direction or DIRECTIONS[0]


def add_flags_of_runs(parser: argparse.ArgumentParser, title: str, names: Collection[str]) -> None:
    """Adds a run's flags, selected by argument name, to another command's parser, with types, defaults and help."""
    group = parser.add_argument_group(title)
    for action in build_parser()._actions:
        if action.dest in names:
            group._add_action(action)


def defaults() -> dict[str, Any]:
    """Returns the default of every argument of a run, by name; required arguments are absent."""
    parser = build_parser()
    return {
        action.dest: parser.get_default(action.dest)
        for action in parser._actions
        if action.dest != "help" and not action.required
    }


def recorded(saved: Mapping[str, Any], where: str) -> argparse.Namespace:
    """Returns the arguments that the checkpoint ``where`` records of its run, with defaults for those it lacks.

    Raises:
        ValueError: if the command line would refuse a value, or a value that is needed to build the model is missing.
    """
    found = argparse.Namespace(**{**defaults(), **saved})
    for action in build_parser()._actions:
        value = getattr(found, action.dest, None)
        mistake = None if value is None or action.dest == "help" else _mistake(action, value)
        if mistake is None and value is None and action.required and action.dest in _OF_THE_MODEL:
            mistake = "missing"
        if mistake is not None:
            raise ValueError(f"{where} records {action.dest} {value!r}: {mistake}; copy the checkpoint again")
    return found


def arguments_of(checkpoint: Path, tensor_parallel: int) -> argparse.Namespace:
    """Returns the arguments that build a checkpoint's model for inference: ternary if its weights are latent.

    They request tensor parallelism only; a caller that wants other parallelism sets it.

    Args:
        checkpoint: an iteration directory, or a release.
        tensor_parallel: the number of tensor-parallel ranks.

    Raises:
        ValueError: if the ranks do not divide the model, or the checkpoint records impossible arguments.
    """
    args = recorded(saved_arguments(checkpoint), str(checkpoint))
    args.tensor_model_parallel_size = tensor_parallel
    args.pipeline_model_parallel_size = args.data_parallel_size = args.context_parallel_size = 1
    args.num_virtual_stages_per_pipeline_rank = None
    args.recompute_granularity = args.recompute_method = args.recompute_num_layers = None
    args.sequence_parallel = args.gradient_accumulation_fusion = False
    # This computes the same model up to rounding, and works at every tensor-parallel size, in fp32 and without the op.
    args.ternary_gemm = args.ternary_gemm_backward = "bf16"
    record = QuantizerRecord.read(checkpoint)
    # Fused weights are already ternary and need no quantizer.
    args.ternary = False
    if record is not None and record.state == "latent":
        args.ternary = True
        args.ternary_recipe = Recipe.of(record)
        args.ternary_row_parallel_shards = record.row_parallel_shards
        args.ternary_activation_bits = record.activation_bits
    channels = (args.num_experts and args.moe_ffn_hidden_size) or ffn_channels(args)
    found = uneven({"query groups": args.num_query_groups, "ffn channels": channels}, tensor_parallel)
    if found is not None:
        raise ValueError(f"{checkpoint}: {tensor_parallel} tensor-parallel ranks do not divide the model's {found}")
    if args.vocab_size is None:
        raise ValueError(f"{checkpoint} does not say how large its vocabulary is")
    return args


def _mistake(action: argparse.Action, value: Any) -> str | None:
    for item in value if action.nargs == "+" and isinstance(value, list) else [value]:
        if isinstance(action.type, Whole | Number | _Window) and (mistake := action.type.mistake(item)):
            return mistake
        if action.choices is not None and item not in action.choices:
            return f"none of {', '.join(map(str, action.choices))}"
        if action.nargs == 0 and not isinstance(item, bool):
            return "neither true nor false"
        if action.nargs != 0 and action.type is None and action.choices is None and not isinstance(item, str):
            return "no text"
    return None

# SPDX-License-Identifier: Apache-2.0
"""Writes what a teacher says of every training sample, once, for students to learn from.

    torchrun --nproc_per_node N launch/write_targets.py --teacher DIR --data-path PREFIX --tokenizer-model PATH \\
        --seq-length 4096 --micro-batch-size 4 --tensor-model-parallel-size TP --output TARGETS

The data flags are those of ``launch/pretrain.py``; students give the same ones, and ``--distill-targets TARGETS``. The
store serves them at any layout, micro-batch and global batch size. Of plain text it serves one pass over the data with
the same ``--seq-length``, ``--seed`` and ``--split``, however long that student trains and whatever the weights of a
blend; more passes with ``--train-samples``, to students with just so many samples. Of conversations (``--sft``) it
serves any number of epochs under any seed. It refuses everything else: another tokenizer, other data, more samples.

The same command goes on where a killed one stopped. Exit status: 0 done, 1 failed, 2 bad input or arguments.
"""

import argparse
import logging
import sys
from pathlib import Path

if __package__ in (None, ""):
    # From a bare checkout the package stands two levels up.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bitcpm_megatron import cli
from bitcpm_megatron.data.blends import blend_of
from bitcpm_megatron.data.target_records import MAX_DRAWS
from bitcpm_megatron.data.target_store import MAX_TOP_K
from bitcpm_megatron.files import directory_mistake
from bitcpm_megatron.training.flags import add_flags_of_runs, defaults
from bitcpm_megatron.training.mistakes import data_mistakes, has_cuda

_DATA = (
    "data_path split train_data_path mock_data tokenizer_type tokenizer_model vocab_size sft reset_position_ids "
    "reset_attention_mask data_cache_path num_workers seq_length seed"
).split()
_LAYOUT = (
    "tensor_model_parallel_size pipeline_model_parallel_size sequence_parallel micro_batch_size distributed_backend "
    "distributed_timeout_minutes"
).split()


def main(argv: list[str] | None = None) -> int:
    """Writes a store, or what is missing of it; returns the exit status."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--teacher", required=True, metavar="DIR", dest="distill_teacher", help="its --save directory; the newest"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="of the targets")
    kinds = parser.add_argument_group("targets").add_mutually_exclusive_group()
    kinds.add_argument(
        "--distill-draws", type=cli.Whole(1, MAX_DRAWS), default=50, metavar="N", help="per token (default: 50)"
    )
    kinds.add_argument("--distill-top-k", type=cli.Whole(1, MAX_TOP_K), metavar="K", help="in place of draws")
    parser.add_argument(
        "--distill-temperature", type=cli.Number(0, 1000, open_minimum=True), default=1.0, help="(default: 1)"
    )
    parser.add_argument(
        "--train-samples",
        type=cli.Whole(1, 2**40),
        dest="train_iters",
        help="of a student, --train-iters x --global-batch-size, where they are more than one pass over the data",
    )
    add_flags_of_runs(parser, "data", _DATA)
    add_flags_of_runs(parser, "layout", _LAYOUT)
    parsed = parser.parse_args(argv)
    args = argparse.Namespace(**{**defaults(), **vars(parsed), "eval_iters": 0, "global_batch_size": 1})
    if found := list(_mistakes(args)):
        parser.error("; ".join(found))
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    return cli.run(lambda: _write(args))


def _mistakes(args: argparse.Namespace) -> list[str]:
    found = list(data_mistakes(args))
    if args.mock_data and args.vocab_size is None:
        found.append("--mock-data needs --vocab-size")
    if args.mock_data and args.train_iters is None:
        found.append("--mock-data has no end: give --train-samples")
    if args.sequence_parallel and args.seq_length % args.tensor_model_parallel_size:
        found.append(
            f"--sequence-parallel: --seq-length {args.seq_length} is not divisible by the tensor-parallel ranks"
        )
    if args.distributed_backend == "nccl" and not has_cuda():
        found.append("--distributed-backend nccl needs CUDA: use gloo")
    if (mistake := directory_mistake(args.output)) is not None:
        found.append(f"--output {args.output}: {mistake}")
    return found


def _write(args: argparse.Namespace) -> None:
    # Only now, for they take seconds.
    from bitcpm_megatron.training.distillation.writing import write_targets
    from bitcpm_megatron.training.initialize import initialize, shutdown, world_size

    ranks, size = world_size(), args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    if ranks % size:
        raise ValueError(
            f"{ranks} processes cannot be split into groups of {args.tensor_model_parallel_size} (tensor) x "
            f"{args.pipeline_model_parallel_size} (pipeline)"
        )
    args.data_parallel_size = ranks // size
    args.distributed_backend = args.distributed_backend or ("nccl" if has_cuda() else "gloo")
    if args.train_iters is None:
        # One pass over each file, whatever their weights are.
        for name in ("data_path", "train_data_path"):
            if getattr(args, name) is not None:
                setattr(args, name, blend_of(getattr(args, name))[0])
    initialize(args)
    write_targets(args)
    shutdown()


if __name__ == "__main__":
    sys.exit(main())

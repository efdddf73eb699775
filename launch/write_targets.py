# SPDX-License-Identifier: Apache-2.0
"""Writes the outputs of a teacher for every training sample to a store, once, for students to learn from.

    torchrun --nproc_per_node N launch/write_targets.py --teacher DIR --data-path PREFIX --tokenizer-model PATH \\
        --seq-length 4096 --micro-batch-size 4 --tensor-model-parallel-size TP --output TARGETS

The data flags are those of ``launch/pretrain.py``. Students give the same ones, and ``--distill-targets TARGETS``. The
store serves them at any layout, micro-batch size and global batch size:

- plain text: one pass over the data under the same ``--seq-length``, ``--seed`` and ``--split``, however much of it a
  student takes and whatever the weights of its blend; with ``--train-samples`` more passes, for students that take
  exactly that many samples;
- conversations (``--sft``): any number of epochs under any seed.

It refuses everything else: another tokenizer, other data, more samples. After a kill the same command resumes where the
killed one stopped. Exit status: 0 done, 1 failed, 2 bad input or arguments.
"""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

if __package__ in (None, ""):
    # In a bare checkout the package is not installed, and its parent directory must be on the path.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bitcpm_megatron import cli
from bitcpm_megatron.data.blends import blend_of
from bitcpm_megatron.data.target_records import MAX_DRAWS
from bitcpm_megatron.data.vocabulary import MAX_TOP_K
from bitcpm_megatron.files import directory_mistake
from bitcpm_megatron.training.flags import add_flags_of_runs, defaults
from bitcpm_megatron.training.initialize import initialize, shutdown, world_size
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
    """Writes a store, or the missing part of one; returns the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    return cli.run(lambda: _write(argv))


def _write(argv: list[str] | None) -> None:
    # This import is not at the top, because training.initialize has to be imported before megatron-core.
    with cli.late_imports():
        from bitcpm_megatron.training.distillation.writing import write_targets

    args = parse_args(argv, world_size())
    initialize(args)
    write_targets(args)
    shutdown()


def parse_args(argv: Sequence[str] | None, ranks: int) -> argparse.Namespace:
    """Parses and checks the command line.

    Args:
        argv: the arguments without the name of the program; None for those of this process.
        ranks: the number of processes of the job.

    Returns:
        The arguments of :func:`~bitcpm_megatron.training.distillation.writing.write_targets`.

    Raises:
        SystemExit: with status 2, after naming every mistake, if there is one.
    """
    parser = _parser()
    args = argparse.Namespace(**{**defaults(), **vars(parser.parse_args(argv)), "eval_iters": 0})
    # With a global batch of one, samples are counted one by one.
    args.global_batch_size = 1
    found = list(_mistakes(args, ranks))
    if found:
        parser.error("; ".join(found))
    args.data_parallel_size = ranks // (args.tensor_model_parallel_size * args.pipeline_model_parallel_size)
    args.distributed_backend = args.distributed_backend or ("nccl" if has_cuda() else "gloo")
    if args.train_iters is None:
        # The store serves one pass over each file, whatever the weights of the files are.
        for name in ("data_path", "train_data_path"):
            if getattr(args, name) is not None:
                setattr(args, name, blend_of(getattr(args, name))[0])
    return args


def _parser() -> cli.Parser:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("targets").add_argument
    add("--teacher", required=True, metavar="DIR", dest="distill_teacher", help="a run of ours; its newest checkpoint")
    add("--output", required=True, type=Path, metavar="DIR", help="of the targets")
    add("--distill-draws", type=cli.Whole(1, MAX_DRAWS), metavar="N", help="per token, default 50")
    add("--distill-top-k", type=cli.Whole(1, MAX_TOP_K), metavar="K", help="keep the likeliest ids in place of draws")
    add("--distill-temperature", type=cli.Number(0, 1000, open_minimum=True), default=1.0, help="default 1")
    add(
        "--train-samples",
        type=cli.Whole(1, 2**40),
        dest="train_iters",
        metavar="N",
        help="--train-iters x --global-batch-size of students, where that is more than one pass over the data",
    )
    add_flags_of_runs(parser, "data", _DATA)
    add_flags_of_runs(parser, "layout", _LAYOUT)
    return parser


def _mistakes(args: argparse.Namespace, ranks: int) -> Iterator[str]:
    yield from data_mistakes(args)
    if args.distill_top_k is not None and args.distill_draws is not None:
        yield "--distill-draws and --distill-top-k exclude each other"
    if args.mock_data and args.vocab_size is None:
        yield "--mock-data needs --vocab-size"
    if args.mock_data and args.train_iters is None:
        yield "--mock-data needs --train-samples: it has no end"
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    if ranks % (tp * pp):
        yield f"{ranks} processes cannot be split into groups of {tp} (tensor) x {pp} (pipeline)"
    if args.sequence_parallel and (tp == 1 or args.seq_length % tp):
        yield f"--sequence-parallel: {tp} tensor-parallel ranks cannot share --seq-length {args.seq_length}"
    if args.distributed_backend == "nccl" and not has_cuda():
        yield "--distributed-backend nccl needs CUDA: use gloo"
    if (mistake := directory_mistake(args.output)) is not None:
        yield f"--output {args.output}: {mistake}"


if __name__ == "__main__":
    sys.exit(main())

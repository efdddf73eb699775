# SPDX-License-Identifier: Apache-2.0
"""Packs the ternary weights of a model exactly, in a format that stock clients read: GGUF or compressed-tensors.

    export_packed.py --load-dir MODEL --save-dir OUT --format {gguf,compressed-tensors} [--target-ratio 6]

MODEL is a Megatron run or a Hugging Face directory, with latent or fused weights. Ternary weights are written as codes
and scales: a client reads exactly the weights of the training forward pass, or the export is refused. For every ternary
weight the smallest type is chosen that holds it exactly and that clients compute fast with; sizes are printed before
anything is written. In a GGUF file, only the embeddings and the output layer may be rounded; the model card says by how
much.

Exit status: 0 done, 1 failed, 2 bad input or arguments.
"""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    # In a bare checkout, the package is found from the folder above this one.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bitcpm_megatron.checkpoint_tools.command import Parser, progress, run
from bitcpm_megatron.checkpoint_tools.megatron_model.export import add_arguments
from bitcpm_megatron.checkpoint_tools.packed.card import write_card
from bitcpm_megatron.checkpoint_tools.packed.compressed_tensors import write_compressed_tensors
from bitcpm_megatron.checkpoint_tools.packed.encoding import Loss
from bitcpm_megatron.checkpoint_tools.packed.gguf_file import FILE_NAME, with_factors, write_gguf
from bitcpm_megatron.checkpoint_tools.packed.planner import (
    AUTO,
    BITS,
    EMBEDDING_TYPES,
    LADDER,
    LINEAR_TYPES,
    Plan,
    plan_compressed_tensors,
    plan_gguf,
    reach,
)
from bitcpm_megatron.checkpoint_tools.packed.source import Source, open_source
from bitcpm_megatron.checkpoint_tools.packed.vocabulary import open_vocabulary
from bitcpm_megatron.checkpoint_tools.storage.reader import ConversionError
from bitcpm_megatron.checkpoint_tools.storage.safetensors_writer import parse_size
from bitcpm_megatron.checkpoint_tools.storage.staging import staged
from bitcpm_megatron.cli import Number
from bitcpm_megatron.evaluation.retention.report import card_lines
from bitcpm_megatron.files import write_digests

GGUF, COMPRESSED_TENSORS = "gguf", "compressed-tensors"
_OF_FORMAT = {GGUF: ("linear_type", "embedding_type"), COMPRESSED_TENSORS: ("bits", "max_shard_size")}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the export that the command line describes, and returns the exit status."""
    parser = Parser(__doc__, "--save-dir", "--max-shard-size")
    add_arguments(parser)
    parser.add_argument("--format", choices=(GGUF, COMPRESSED_TENSORS), required=True)
    parser.add_argument(
        "--target-ratio",
        type=Number(1, 16),
        metavar="R",
        help="take the least lossy type of embeddings whose file is R times smaller than BF16",
    )
    parser.add_argument(
        "--linear-type",
        choices=(AUTO, *LINEAR_TYPES),
        help="GGUF: of all ternary weights; default auto, which chooses for each",
    )
    parser.add_argument(
        "--embedding-type", choices=EMBEDDING_TYPES, help="GGUF: of embeddings and output layer; default F16"
    )
    parser.add_argument(
        "--bits", choices=(AUTO, *map(str, BITS)), help="compressed-tensors: per code; default auto, the fewest"
    )
    parser.add_argument(
        "--evaluation",
        type=Path,
        metavar="DIR",
        help="output of launch/evaluate.py, which asked MODEL: its scores go into the model card",
    )
    parser.set_defaults(max_shard_size=None)
    args = parser.parse_args(argv)
    return run(lambda: export(args))


def export(args: argparse.Namespace) -> None:
    """Exports a model as the parsed arguments say; the output directory appears completely or not at all.

    Raises:
        ConversionError: if the input or the arguments are unusable, or the format cannot hold a weight exactly.
    """
    _check_arguments(args)
    shard_size = parse_size(args.max_shard_size or "5GB")
    source = open_source(args)
    evaluation = {} if args.evaluation is None else {"evaluation": card_lines(args.evaluation, Path(args.load_dir))}
    plan = _plan(args, source)
    print(plan.table(), flush=True)
    vocabulary = open_vocabulary(source) if args.format == GGUF else None
    losses: dict[str, Loss] = {}
    digests: dict[str, dict[str, Any]] = {}
    with staged(args.save_dir, plan.nbytes) as directory:
        with progress(plan.nbytes, "writing") as bar:
            if vocabulary is None:
                digests = write_compressed_tensors(directory, source, plan, shard_size, bar.update)
            else:
                losses = write_gguf(directory / FILE_NAME, source, plan, vocabulary, bar.update).losses
        source.record.write(directory)
        write_card(directory, args.format, source, plan, losses, **evaluation)
        write_digests(directory, digests)
    print(f"{args.save_dir}: {source.architecture.parameter_count():,} parameters, {args.format}")
    if vocabulary is None and source.files is None:
        print("no tokenizer files were copied: give --tokenizer DIR for an export that can be used by itself")


def _check_arguments(args: argparse.Namespace) -> None:
    for form, names in _OF_FORMAT.items():
        given = [name for name in names if form != args.format and getattr(args, name) is not None]
        if given:
            raise ConversionError(f"--{given[0].replace('_', '-')} is of --format {form}: leave it out")
    if args.target_ratio is not None and args.embedding_type is not None:
        raise ConversionError(
            f"--target-ratio chooses the type of the embeddings, and --embedding-type {args.embedding_type} names one: "
            "give one of them"
        )
    if args.format == GGUF and importlib.util.find_spec("gguf") is None:
        raise ConversionError("--format gguf needs the package gguf: pip install 'bitcpm_megatron[export]'")


def _plan(args: argparse.Namespace, source: Source) -> Plan:
    if args.format == COMPRESSED_TENSORS:
        plan = plan_compressed_tensors(source.weights, args.bits or AUTO)
        if args.target_ratio is not None and plan.ratio < args.target_ratio:
            raise ConversionError(
                f"--target-ratio {args.target_ratio:g} cannot be reached: the ratio is {plan.ratio:.2f}, for "
                "embeddings keep their dtype in this format; --format gguf has smaller types for them"
            )
        return plan
    weights, linear_type = with_factors(source), args.linear_type or AUTO
    if args.target_ratio is None:
        return plan_gguf(weights, linear_type, args.embedding_type or LADDER[0])
    return reach(args.target_ratio, lambda kind: plan_gguf(weights, linear_type, kind), LADDER)[1]


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""Converts a Hugging Face model (Llama, MiniCPM, Granite or a latent export of this package) to a Megatron checkpoint.

    convert_hf_to_megatron.py --load-dir HF --save-dir OUT [--target-tensor-parallel-size N ...] [--format torch_dist]

OUT gets the directory ``release/`` (weights without optimizer state, so that training starts at iteration 0) with the
tracker file that names it, for ``--pretrained-checkpoint OUT``, and ``model.yaml``, which holds the model's flags, for
``--model OUT/model.yaml``. A ``torch_dist`` checkpoint loads at every parallel layout, a ``legacy`` checkpoint only at
the layout it was written for. Everything about the model is read from its own ``config.json``, which is copied to
``release/hf/`` together with the tokenizer's files, for the conversion back to Hugging Face.

Exit status: 0 done, 1 failed, 2 bad input or arguments.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    # In a bare checkout, the package is found from the folder above this one.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import yaml

from bitcpm_megatron.checkpoint_tools.command import DTYPES, Parser, check_input, progress, run
from bitcpm_megatron.checkpoint_tools.hf_model.config import read_config
from bitcpm_megatron.checkpoint_tools.hf_model.model import HfModel, checked_record, open_hf_model
from bitcpm_megatron.checkpoint_tools.hf_model.side_files import copy_side_files
from bitcpm_megatron.checkpoint_tools.megatron_model.writer import Layout, write_legacy, write_torch_dist
from bitcpm_megatron.checkpoint_tools.storage.reader import ConversionError
from bitcpm_megatron.checkpoint_tools.storage.staging import staged
from bitcpm_megatron.checkpoints.directory import HF_DIRECTORY, RELEASE, TRACKER, write_arguments
from bitcpm_megatron.cli import Whole
from bitcpm_megatron.files import write_digests, write_text
from bitcpm_megatron.models.from_arguments import arguments_of, flags_of


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the conversion that the command line describes, and returns the exit status."""
    parser = Parser(__doc__, "--save-dir", "--dtype")
    parser.add_argument("--load-dir", type=Path, required=True, help="Hugging Face model directory")
    parser.add_argument("--format", choices=("torch_dist", "legacy"), default="torch_dist")
    parser.add_argument("--target-tensor-parallel-size", type=Whole(), default=1, metavar="N")
    parser.add_argument("--target-pipeline-parallel-size", type=Whole(), default=1, metavar="M")
    parser.add_argument(
        "--target-virtual-pipeline-parallel-size", type=Whole(), metavar="V", help="virtual stages per rank (legacy)"
    )
    parser.add_argument("--make-vocab-size-divisible-by", type=Whole(maximum=2**20), default=128, metavar="ROWS")
    parser.add_argument(
        "--transformer-impl",
        choices=("transformer_engine", "local"),
        default="transformer_engine",
        help="legacy: whose names the norms get, of the --transformer-impl that will load it",
    )
    args = parser.parse_args(argv)
    return run(lambda: convert(args))


def convert(args: argparse.Namespace) -> None:
    """Converts a model as the parsed arguments say; the checkpoint directory appears completely or not at all.

    Raises:
        ConversionError: if the model or the arguments are unusable, or contradict each other.
    """
    layout = Layout(
        args.target_tensor_parallel_size,
        args.target_pipeline_parallel_size,
        args.target_virtual_pipeline_parallel_size,
        args.transformer_impl,
    )
    legacy = args.format == "legacy"
    if layout.vp is not None and (not legacy or layout.pp == 1):
        raise ConversionError(
            "--target-virtual-pipeline-parallel-size concerns --format legacy with several pipeline stages: "
            "torch_dist loads at every layout"
        )
    check_input(args.load_dir)
    model = open_hf_model(args.load_dir, DTYPES.get(args.dtype), args.allow_pickle)
    layout.check(model, legacy)
    multiple = args.make_vocab_size_divisible_by * layout.tp
    rows = -(-model.architecture.vocab_size // multiple) * multiple
    arguments = _arguments(model, rows, layout, args.make_vocab_size_divisible_by)
    total = sum(model.info(tensor, rows).nbytes for tensor in model.tensors)
    # The writers need the record: it says which weights are fused, and these must be cast exactly.
    record = model.record = checked_record(model)
    with staged(args.save_dir, total) as directory, progress(total, "writing") as bar:
        release = directory / RELEASE
        (release / HF_DIRECTORY).mkdir(parents=True)
        common = {"args": argparse.Namespace(**arguments), "checkpoint_version": 3.0, "iteration": 0}
        if legacy:
            digests = write_legacy(model, release, common, rows, layout, bar.update)
        else:
            digests = write_torch_dist(model, release, common, rows, layout.tp, bar.update)
        write_arguments(release, arguments)
        if record is not None:
            record.write(release)
        copy_side_files(args.load_dir, release / HF_DIRECTORY)
        write_text(release / HF_DIRECTORY / "config.json", json.dumps(read_config(args.load_dir), indent=2) + "\n")
        write_digests(release, digests)
        preset = {
            "description": f"converted from {args.load_dir.name}",
            "vocab-size": model.architecture.vocab_size,
            "flags": flags_of(model.architecture),
        }
        text = yaml.safe_dump(preset, sort_keys=False, default_flow_style=None, width=120)
        write_text(directory / "model.yaml", text)
        write_text(directory / TRACKER, RELEASE)
    stages = f", TP {layout.tp} x PP {layout.pp}" + (f" x VPP {layout.vp}" if layout.vp else "") if legacy else ""
    print(f"{args.save_dir}: {model.architecture.parameter_count():,} parameters, {args.format}{stages}")


def _arguments(model: HfModel, rows: int, layout: Layout, divisible_by: int) -> dict[str, Any]:
    dtype = model.dtype_of(next(t for t in model.tensors if t.quantizable))
    return {
        **arguments_of(model.architecture),
        "vocab_size": model.architecture.vocab_size,
        "padded_vocab_size": rows,
        "make_vocab_size_divisible_by": divisible_by,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "num_virtual_stages_per_pipeline_rank": layout.vp,
        "expert_model_parallel_size": 1,
        "data_parallel_size": 1,
        "no_save_optim": True,
        "no_save_rng": True,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
    }


if __name__ == "__main__":
    sys.exit(main())

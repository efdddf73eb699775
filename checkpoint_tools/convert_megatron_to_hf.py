# SPDX-License-Identifier: Apache-2.0
"""Converts a Megatron checkpoint to a Hugging Face model that has exactly the weights that training used.

    convert_megatron_to_hf.py --load-dir CKPT --save-dir OUT --weights {latent,fused} [--tokenizer DIR] [--verify]

``fused`` writes ternary codes times scales, with the scales stored in the checkpoint, as ordinary weights that stock
clients load. ``latent`` writes the weights that training continues from, with a modeling file that quantizes them in
the forward pass (``trust_remote_code``); a checkpoint without a quantizer is written unchanged, and stock clients load
it.

The architecture ``auto`` writes a Llama if the model is one, and otherwise a Granite, which computes exactly what
MiniCPM computes and needs no remote code.

Exit status: 0 done, 1 failed, 2 bad input or arguments, 3 ``--verify`` found a mismatch.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

if __package__ in (None, ""):
    # In a bare checkout, the package is found from the folder above this one.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tqdm import tqdm

from bitcpm_megatron.checkpoint_tools.command import DTYPES, Parser, progress, run
from bitcpm_megatron.checkpoint_tools.hf_model.config import (
    BITCPM,
    GRANITE,
    LLAMA,
    MINICPM,
    architecture_of,
    config_for,
    read_config,
)
from bitcpm_megatron.checkpoint_tools.hf_model.remote_code import write_remote_code
from bitcpm_megatron.checkpoint_tools.hf_model.side_files import copy_side_files
from bitcpm_megatron.checkpoint_tools.megatron_model.export import Export, add_arguments, open_export
from bitcpm_megatron.checkpoint_tools.storage.hf_reader import HfReader
from bitcpm_megatron.checkpoint_tools.storage.reader import (
    ConversionError,
    TensorInfo,
    VerificationError,
    dtype_name,
)
from bitcpm_megatron.checkpoint_tools.storage.safetensors_writer import SafetensorsWriter, parse_size
from bitcpm_megatron.checkpoint_tools.storage.staging import staged
from bitcpm_megatron.checkpoint_tools.tensor_map import (
    part_shapes,
    to_hugging_face,
)
from bitcpm_megatron.files import write_digests, write_text


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the conversion that the command line describes, and returns the exit status."""
    parser = Parser(__doc__, "--save-dir", "--dtype", "--max-shard-size")
    add_arguments(parser)
    parser.add_argument("--weights", choices=("latent", "fused"), required=True)
    parser.add_argument("--hf-architecture", choices=("auto", LLAMA, GRANITE, MINICPM), default="auto")
    parser.add_argument("--verify", action="store_true", help="read the export again and compare")
    args = parser.parse_args(argv)
    return run(lambda: convert(args))


def convert(args: argparse.Namespace) -> None:
    """Converts a checkpoint as the parsed arguments say; the model directory appears completely or not at all.

    Raises:
        ConversionError: if the checkpoint or the arguments are unusable, or contradict each other.
        VerificationError: with ``--verify``, if the written model differs from the checkpoint; nothing is kept.
    """
    export = open_export(args, args.weights, DTYPES.get(args.dtype))
    kind = _kind(export, args.hf_architecture)
    shard_size = parse_size(args.max_shard_size)
    plan = {
        name: TensorInfo(shape, export.dtype or export.checkpoint.info(tensor).dtype)
        for tensor in export.tensors
        for name, shape in part_shapes([tensor]).items()
    }
    total = sum(info.nbytes for info in plan.values())
    with staged(args.save_dir, total) as directory:
        with SafetensorsWriter(directory, plan, shard_size) as writer, progress(total, "writing") as bar:
            for tensor in export.tensors:
                for name, blocks in export.blocks(tensor):
                    writer.write(name, blocks)
                    bar.update(plan[name].nbytes)
        _write_side_files(export, kind, plan, directory)
        if args.verify:
            _verify(export, directory)
        write_digests(directory, writer.digests)
    state = "fused" if export.fuse else export.record.state if export.record else "unquantized"
    print(f"{args.save_dir}: {export.architecture.parameter_count():,} parameters, {kind}, {state} weights")
    if export.fuse and export.record is not None and export.record.activation_bits != 16:
        print(
            f"training also quantized activations to {export.record.activation_bits} bits, which stock clients do "
            "not: their logits will differ from training's"
        )
    if export.template is None:
        print("no tokenizer files were copied: give --tokenizer DIR for an export that can be used by itself")


def _kind(export: Export, wanted: str) -> str:
    """Returns the model type to write.

    Raises:
        ConversionError: if ``wanted`` names an architecture that would load latent weights without quantizing them.
    """
    if export.record is not None and export.record.state == "latent" and not export.fuse:
        if wanted != "auto":
            raise ConversionError(
                f"--hf-architecture {wanted} would load latent weights without quantizing them: leave it out, they are "
                "written with a modeling file of their own"
            )
        return BITCPM
    if wanted == "auto":
        return LLAMA if export.architecture.is_llama else GRANITE
    return wanted


def _write_side_files(export: Export, kind: str, plan: Mapping[str, TensorInfo], directory: Path) -> None:
    """Writes tokenizer files, quantizer record and ``config.json``, whose dtype is the one that most bytes have."""
    if export.template is not None:
        copy_side_files(export.template, directory)
    dtypes = {info.dtype for info in plan.values()}
    dtype = max(dtypes, key=lambda d: sum(i.nbytes for i in plan.values() if i.dtype == d))
    config = config_for(kind, export.architecture, export.earlier, dtype_name(dtype))
    record = None if export.record is None else to_hugging_face(export.record, export.tensors)
    if record is not None and export.fuse:
        record = replace(record, state="fused")
    if kind in (BITCPM, MINICPM):
        write_remote_code(directory, config, record)
        return
    if record is not None:
        record.write(directory)
    write_text(directory / "config.json", json.dumps(config, indent=2) + "\n")


def _verify(export: Export, directory: Path) -> None:
    """Reads the written model back and compares every value and its ``config.json`` with the checkpoint.

    Raises:
        VerificationError: if anything differs; the message lists the first 20 differences.
    """
    reader = HfReader(directory)
    wrong = []
    if not architecture_of(read_config(directory)).computes_like(export.architecture):
        wrong.append("config.json: another architecture than the checkpoint's")
    for tensor in tqdm(export.tensors, desc="verifying", disable=None):
        for name, blocks in export.blocks(tensor):
            start = 0
            for block in blocks:
                found = reader.read(name, (slice(start, start + block.shape[0]),))
                if not torch.equal(found.view(torch.uint8), block.view(torch.uint8)):
                    wrong.append(f"{name}: rows from {start} differ")
                start += block.shape[0]
            if start != reader.tensors()[name].shape[0]:
                wrong.append(f"{name}: {reader.tensors()[name].shape[0]} rows instead of {start}")
    if wrong:
        raise VerificationError("the export differs from the checkpoint:\n  " + "\n  ".join(wrong[:20]))
    print(f"verified: {len(reader.tensors())} tensors equal the checkpoint's, bit for bit")


if __name__ == "__main__":
    sys.exit(main())

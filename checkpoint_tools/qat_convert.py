# SPDX-License-Identifier: Apache-2.0
"""Fuses the quantizer into latent weights: the result equals the weights of training and loads in stock Transformers.

    python checkpoint_tools/qat_convert.py --input_bin IN --output OUT --quant_type ternary --group_size -1

IN is a Hugging Face model directory or one .safetensors / .bin file, and OUT is of the same kind. The seven projections
of each layer become ternary codes times scales; everything else is copied bit for bit. The quantizer record of IN says
which projections are quantized, and in which groups; without a record, all of them are, in groups of --group_size.
Weights that are already ternary are not changed.

Exit status: 0 done, 1 failed, 2 bad input or arguments, 3 what was written is not what should have been.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    # In a bare checkout, the package is found from the folder above this one.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tqdm import tqdm

from bitcpm_megatron.checkpoint_tools.command import Parser, check_input, progress, run
from bitcpm_megatron.checkpoint_tools.hf_model.config import (
    BITCPM,
    GRANITE,
    LLAMA,
    architecture_of,
    config_for,
    read_config,
)
from bitcpm_megatron.checkpoint_tools.hf_model.remote_code import read_record
from bitcpm_megatron.checkpoint_tools.hf_model.side_files import copy_side_files
from bitcpm_megatron.checkpoint_tools.quantizer.fuse import detected_group, fuse_blocks
from bitcpm_megatron.checkpoint_tools.quantizer.fusing_plan import NO_MERGE, Plan, make_plan
from bitcpm_megatron.checkpoint_tools.storage.hf_reader import HfReader
from bitcpm_megatron.checkpoint_tools.storage.reader import (
    ConversionError,
    TensorInfo,
    TensorReader,
    VerificationError,
    check_finite,
    dtype_name,
)
from bitcpm_megatron.checkpoint_tools.storage.safetensors_writer import SafetensorsWriter, parse_size, row_blocks
from bitcpm_megatron.checkpoint_tools.storage.staging import staged
from bitcpm_megatron.checkpoint_tools.storage.torch_file import Names, save_in_turn
from bitcpm_megatron.files import add_digest, digest, write_digests, write_text
from bitcpm_megatron.quantization import effective_group
from bitcpm_megatron.quantization.record import FILE_NAME as RECORD_FILE
from bitcpm_megatron.ternary_flags import GroupSize

_SUFFIXES = (".safetensors", ".bin")


def main(argv: list[str] | None = None) -> int:
    """Runs the conversion that the command line describes, and returns the exit status."""
    parser = Parser(__doc__, "--max-shard-size")
    parser.add_argument(
        "--input_bin", "--input", type=Path, required=True, metavar="IN", help="model directory, .safetensors or .bin"
    )
    parser.add_argument(
        "--output", "--save-dir", type=Path, required=True, metavar="OUT", help="directory or file, not there yet"
    )
    parser.add_argument(
        "--quant_type", choices=["ternary"], default="ternary", help="without a quantizer record, which decides"
    )
    parser.add_argument(
        "--group_size",
        type=GroupSize(),
        metavar="G",
        help="weights per scale, -1 for the whole row. A quantizer record decides; the flag may only agree with it. "
        "Without a record the default is -1",
    )
    args = parser.parse_args(argv)
    return run(lambda: convert(args))


def convert(args: argparse.Namespace) -> None:
    """Fuses a model or file as the parsed arguments say; the output appears completely or not at all.

    Raises:
        ConversionError: if the input or the arguments are unusable, or contradict each other.
        VerificationError: if the output, read back, is not what should have been written; nothing is kept.
    """
    source, target, whole = args.input_bin, args.output, args.input_bin.is_dir()
    _check_paths(source, target)
    shard_size = parse_size(args.max_shard_size)
    directory = source if whole else source.parent
    check_input(directory, None if whole else [source.name, RECORD_FILE, "config.json"])
    reader = HfReader(source, args.allow_pickle)
    tensors = reader.tensors()
    nbytes = sum(info.nbytes for info in tensors.values())
    plan = make_plan(reader, read_record(directory), args.group_size, whole)
    config = _config(source, tensors[next(iter(plan.quantized))].dtype) if whole else None
    _announce(plan, len(tensors))
    with staged(target, nbytes, one_file=not whole) as temporary:
        with progress(nbytes, "writing") as bar:
            if target.suffix == ".bin":
                file = temporary / "pytorch_model.bin"
                infos: dict[Names, TensorInfo] = {(name,): info for name, info in tensors.items()}
                saved = save_in_turn(file, infos, lambda name: _blocks(reader, name, plan, bar))
                digests = {file.name: saved.entry()}
            else:
                with SafetensorsWriter(temporary, tensors, shard_size if whole else nbytes + 1) as writer:
                    for name in tensors:
                        writer.write(name, _blocks(reader, name, plan, bar))
                digests = writer.digests
        _verify(temporary, reader, plan)
        if whole:
            copy_side_files(source, temporary)
            write_text(temporary / "config.json", json.dumps(config, indent=2) + "\n")
            plan.record.write(temporary)
            write_digests(temporary, digests)
        else:
            (written,) = temporary.iterdir()
            add_digest(digests.get(written.name) or digest(written), target.resolve())
    print(f"wrote {target}", flush=True)


def _check_paths(source: Path, target: Path) -> None:
    if not source.exists():
        raise ConversionError(f"--input_bin {source}: there is no such directory or file")
    if source.is_file() and source.suffix not in _SUFFIXES:
        raise ConversionError(f"--input_bin {source}: give a model directory, or a file in {' or '.join(_SUFFIXES)}")
    if (source / "adapter_config.json").is_file() and not (source / "config.json").is_file():
        raise ConversionError(f"--input_bin {source} holds adapters, and not the weights of a model: {NO_MERGE}")
    if source.is_dir() and target.suffix in _SUFFIXES:
        raise ConversionError(f"--output {target}: {source} is a directory, so the output is one, too")
    if source.is_file() and target.suffix not in _SUFFIXES:
        raise ConversionError(f"--output {target}: {source} is a file, so name a file in {' or '.join(_SUFFIXES)}")
    if target.is_file() or (target.is_dir() and (source.is_file() or any(target.iterdir()))):
        raise ConversionError(f"--output {target} is there already: name another, or delete it")


def _config(source: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the configuration of the fused model.

    A modeling file of the input may contain a fake quantizer, which would quantize the fused weights again. So the
    output has no modeling file, and names an architecture that Transformers has itself.

    Raises:
        ConversionError: if the weights are stored in a quantized format, no architecture is named, or the architecture
            exists only in the modeling file.
    """
    config = read_config(source)
    if config.get("quantization_config") is not None:
        raise ConversionError("config.json has a quantization_config: its weights are stored in a quantized format")
    if not config.get("model_type") and not config.get("architectures"):
        raise ConversionError("config.json names neither a model_type nor architectures: no client can load the result")
    if config.get("model_type") != BITCPM and not config.get("auto_map"):
        return config
    try:
        architecture = architecture_of(config)
    except ConversionError as error:
        raise ConversionError(
            f"{error}. The model comes with its own modeling file, which may quantize, too: fused weights must not be "
            "quantized again. Convert the weight file alone if it does not"
        ) from None
    return config_for(LLAMA if architecture.is_llama else GRANITE, architecture, config, dtype_name(dtype))


def _announce(plan: Plan, tensors: int) -> None:
    count = len(plan.quantized)
    groups = sorted({config.group_size for config in plan.quantized.values()})
    origin = "the quantizer record" if plan.recorded else "the command line"
    if plan.fused:
        spaces = " and ".join(sorted({config.space for config in plan.quantized.values()}))
        print(f"{count} of {tensors} tensors are {spaces} x scale already (fused): nothing is changed", flush=True)
    else:
        print(f"fusing {count} of {tensors} tensors, group sizes {groups} by {origin}", flush=True)
    if plan.record.activation_bits != 16:
        print(
            f"note: training also quantized the inputs of these layers to {plan.record.activation_bits} bits; stock "
            "clients do not",
            flush=True,
        )


def _blocks(reader: TensorReader, name: str, plan: Plan, bar: tqdm) -> Iterator[torch.Tensor]:
    """Yields the rows of an output tensor in blocks, fused if the plan says so."""
    if name in plan.quantized and not plan.fused:
        blocks = fuse_blocks(
            name,
            lambda rows: reader.read(name, (rows,)),
            reader.tensors()[name],
            plan.quantized[name],
            latent_dtype=getattr(torch, plan.record.latent_dtype),
        )
    else:
        blocks = row_blocks(reader.read(name))
    for block in blocks:
        check_finite(name, block)
        yield block
        bar.update(block.nbytes)


def _verify(directory: Path, reader: TensorReader, plan: Plan) -> None:
    """Reads the output back and checks names, shapes, dtypes, and that every planned tensor is quantized.

    Raises:
        VerificationError: if the output is not what should have been written.
    """
    written = HfReader(directory)
    if dict(written.tensors()) != dict(reader.tensors()):
        raise VerificationError("the tensors that were written differ from those of the input in name, shape or dtype")
    for name, config in tqdm(plan.quantized.items(), "verifying", unit="tensor", disable=None):
        group = detected_group(written, name, config.space)
        wanted = effective_group(reader.tensors()[name].shape[1], config.group_size)
        if group is None or group % wanted:
            raise VerificationError(
                f"{name} was written, but is not {config.space} in groups of {wanted}: is the disk sound?"
            )


if __name__ == "__main__":
    sys.exit(main())

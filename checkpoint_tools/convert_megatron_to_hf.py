# SPDX-License-Identifier: Apache-2.0
"""Makes a Hugging Face model of a Megatron checkpoint, with the very weights that training used.

    convert_megatron_to_hf.py --load-dir CKPT --save-dir OUT --weights {latent,fused} [--tokenizer DIR] [--verify]

``fused`` writes ternary times scale as ordinary weights, which stock clients load; with the scales that the checkpoint
holds. ``latent`` writes what training goes on from, with a modeling file that quantizes in the forward
(``trust_remote_code``); a checkpoint without quantizer is written as it is, and loads in stock clients.

The architecture ``auto`` writes Llama where the model is one, else Granite, which computes exactly what MiniCPM does
and needs no remote code.

Exit status: 0 done, 1 failed, 2 bad input or arguments, 3 ``--verify`` found a mismatch.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    # From a bare checkout the package stands two levels up.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tqdm import tqdm

from bitcpm_megatron.checkpoint_tools.command import DTYPES, Parser, check_input, progress, run
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
from bitcpm_megatron.checkpoint_tools.hf_model.side_files import TOKENIZER, copy_side_files, side_files, special_ids
from bitcpm_megatron.checkpoint_tools.megatron_model.checkpoint import MegatronCheckpoint, locate, open_checkpoint
from bitcpm_megatron.checkpoint_tools.quantizer.fuse import fuse_blocks
from bitcpm_megatron.checkpoint_tools.quantizer.megatron_record import checked_record, checked_scales
from bitcpm_megatron.checkpoint_tools.storage.hf_reader import HfReader
from bitcpm_megatron.checkpoint_tools.storage.reader import (
    ConversionError,
    TensorInfo,
    VerificationError,
    cast,
    check_finite,
    dtype_name,
    refuse_mistakes,
)
from bitcpm_megatron.checkpoint_tools.storage.safetensors_writer import SafetensorsWriter, parse_size
from bitcpm_megatron.checkpoint_tools.storage.staging import staged
from bitcpm_megatron.checkpoint_tools.tensor_map import (
    MegatronTensor,
    megatron_tensors,
    part_shapes,
    split,
    to_hugging_face,
)
from bitcpm_megatron.checkpoints.directory import HF_DIRECTORY, RELEASE
from bitcpm_megatron.cli import Whole
from bitcpm_megatron.data.tokenizers import open_tokenizer
from bitcpm_megatron.files import write_digests, write_text
from bitcpm_megatron.models.architecture import Architecture
from bitcpm_megatron.models.from_arguments import architecture_of as architecture_of_arguments
from bitcpm_megatron.quantization.record import QuantizerRecord
from bitcpm_megatron.ternary_flags import GroupSize


@dataclass
class Export:
    """What is going to be written, and from what.

    Attributes:
        checkpoint: the source.
        architecture: of the model.
        tensors: of the model, all present.
        record: how training quantized, by Megatron's module names, or None.
        fuse: whether to write quantized weights.
        dtype: to write, or None to keep each tensor's own.
        template: directory with the tokenizer's files, or None.
        earlier: its ``config.json``, or what one would say of its special tokens; empty where neither is known.
    """

    checkpoint: MegatronCheckpoint
    architecture: Architecture
    tensors: list[MegatronTensor]
    record: QuantizerRecord | None
    fuse: bool
    dtype: torch.dtype | None
    template: Path | None
    earlier: Mapping[str, Any]

    def blocks(self, tensor: MegatronTensor) -> Iterator[tuple[str, Iterator[torch.Tensor]]]:
        """The Hugging Face tensors of a Megatron tensor, each as blocks of rows, in the dtype to write.

        Raises:
            ConversionError: NaN, or scales that do not belong to the weights.
        """
        read = self.checkpoint.read
        if tensor.kind == "vocab":
            rows = TensorInfo(tensor.shape, self.checkpoint.info(tensor).dtype).row_slices()
            yield tensor.parts[0], self._cast(tensor.parts[0], (read(tensor, r) for r in rows), False)
            return
        channels = self.architecture.kv_channels
        record = self.record if self.record is not None and tensor.module in self.record.modules else None
        scales = None
        if record is not None and record.state == "latent":
            # Of latent exports, too: scales that contradict the record mean that it is not this model's.
            scales = checked_scales(self.checkpoint, record, tensor)
        part_scales = [None] * len(tensor.parts) if scales is None else split(tensor, scales, channels)
        for name, part, own in zip(tensor.parts, split(tensor, read(tensor), channels), part_scales, strict=True):
            blocks: Iterable[torch.Tensor] = [part]
            if record is not None and self.fuse:
                info = TensorInfo(tuple(part.shape), part.dtype)
                blocks = fuse_blocks(name, part.__getitem__, info, record.config_of(tensor.module), own)
            yield name, self._cast(name, blocks, exactly=record is not None)

    def _cast(self, name: str, blocks: Iterable[torch.Tensor], exactly: bool) -> Iterator[torch.Tensor]:
        for block in blocks:
            check_finite(name, block)
            yield cast(name, block, self.dtype or block.dtype, exactly).contiguous()


def main(argv: Sequence[str] | None = None) -> int:
    """Converts as the command line says; returns the exit status."""
    parser = Parser(__doc__, "--save-dir", "--dtype", "--max-shard-size")
    parser.add_argument(
        "--load-dir", type=Path, required=True, help="--save directory of a run, or one iteration of it"
    )
    parser.add_argument("--weights", choices=("latent", "fused"), required=True)
    parser.add_argument("--hf-architecture", choices=("auto", LLAMA, GRANITE, MINICPM), default="auto")
    parser.add_argument(
        *("--tokenizer", "--tokenizer-model"),
        type=Path,
        metavar="DIR",
        help="directory with tokenizer files and, if any, a config.json; default what came with the checkpoint, or the "
        "tokenizer.json of its run",
    )
    parser.add_argument("--vocab-size", type=Whole(), help="without padding, where the checkpoint does not say")
    parser.add_argument(
        "--ternary-group-size",
        type=GroupSize(),
        metavar="G",
        help="of a checkpoint that records no quantizer and was ternary",
    )
    parser.add_argument("--verify", action="store_true", help="read the export again and compare")
    args = parser.parse_args(argv)
    return run(lambda: convert(args))


def convert(args: argparse.Namespace) -> None:
    """Does what the command line asks for; the model directory appears whole or not at all.

    Raises:
        ConversionError: bad input or arguments.
        VerificationError: with ``--verify``, what was written differs from the checkpoint; nothing is kept.
    """
    if args.tokenizer is not None and not args.tokenizer.is_dir():
        raise ConversionError(f"--tokenizer {args.tokenizer} is no directory")
    export = _open(args)
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
        write_digests(directory)
    state = "fused" if export.fuse else export.record.state if export.record else "unquantized"
    print(f"{args.save_dir}: {export.architecture.parameter_count():,} parameters, {kind}, {state} weights")
    if export.fuse and export.record is not None and export.record.activation_bits != 16:
        print(
            f"training also quantized activations to {export.record.activation_bits} bits, which stock clients do "
            "not: their logits will differ from training's"
        )
    if export.template is None:
        print("no tokenizer files were copied: give --tokenizer DIR for an export that can be used by itself")


def _open(args: argparse.Namespace) -> Export:
    """Opens the checkpoint and decides what its export is."""
    path = locate(args.load_dir)
    check_input(path)
    checkpoint = open_checkpoint(path, args.allow_pickle)
    template = args.tokenizer or _template(checkpoint)
    if template is not None:
        check_input(template, ["config.json", *side_files(template)])
    config = read_config(template) if template is not None and (template / "config.json").is_file() else None
    architecture = _architecture(checkpoint, config, args.vocab_size)
    earlier = config if config is not None else {} if template is None else special_ids(template)
    tensors = megatron_tensors(architecture)
    refuse_mistakes(f"{path} does not hold the model that its arguments describe", checkpoint.mistakes(tensors))
    record = checked_record(checkpoint, tensors, args.ternary_group_size)
    dtype = DTYPES.get(args.dtype)
    if args.weights == "fused" and record is None:
        raise ConversionError(
            f"{path} records no quantizer: --weights fused has nothing to fuse. Give --weights latent for the weights "
            "as they are, or --ternary-group-size G if a tool that records nothing trained them ternary"
        )
    if args.weights == "latent" and record is not None and record.state == "fused":
        raise ConversionError(f"{path} holds fused weights, there are no latent ones: give --weights fused")
    if args.weights == "latent" and record is not None and dtype not in (None, getattr(torch, record.latent_dtype)):
        raise ConversionError(
            f"--dtype would change the {record.latent_dtype} latent weights, and with them what they are quantized to: "
            "leave it out, or give --weights fused, which casts after quantizing"
        )
    fuse = args.weights == "fused" and record is not None and record.state == "latent"
    return Export(checkpoint, architecture, tensors, record, fuse, dtype, template, earlier)


def _template(checkpoint: MegatronCheckpoint) -> Path | None:
    """What a conversion left, with this checkpoint or with the one that its run started from; else the run's tokenizer.

    Raises:
        ConversionError: where the run had its tokenizer there is another one by now.
    """
    arguments = checkpoint.arguments
    origin, used = arguments.get("pretrained_checkpoint"), arguments.get("tokenizer_model")
    kept = [checkpoint.path, *([] if origin is None else [Path(origin) / RELEASE, Path(origin)])]
    for directory in (path / HF_DIRECTORY for path in kept):
        if directory.is_dir():
            return directory
    # Checkpoints from before there were identities do not tell.
    identity = arguments.get("tokenizer_identity")
    if used is None or identity is None:
        return None
    directory = Path(used).parent if Path(used).name == TOKENIZER else Path(used)
    if not (directory / TOKENIZER).is_file():
        return None
    if dict(open_tokenizer(used, arguments.get("tokenizer_type")).unique_identifiers) != identity:
        raise ConversionError(
            f"{used} holds another tokenizer than when {checkpoint.path} was written: name that one by --tokenizer DIR"
        )
    return directory


def _architecture(
    checkpoint: MegatronCheckpoint, config: Mapping[str, Any] | None, vocab_size: int | None
) -> Architecture:
    """From the run's arguments; from an earlier ``config.json`` where it left none."""
    if not checkpoint.arguments:
        if config is None:
            raise ConversionError(
                f"{checkpoint.path} does not say what model it holds: give --tokenizer DIR with the model's config.json"
            )
        return architecture_of(config)
    arguments = checkpoint.arguments
    recorded = arguments.get("vocab_size")
    if vocab_size is not None and recorded not in (None, vocab_size):
        raise ConversionError(
            f"--vocab-size {vocab_size} contradicts the checkpoint, which says {recorded}: leave it out"
        )
    for known in (recorded, (config or {}).get("vocab_size")):
        vocab_size = known if vocab_size is None else vocab_size
    if vocab_size is None:
        raise ConversionError(
            f"{checkpoint.path} holds {arguments.get('padded_vocab_size', 'padded')} rows of vocabulary and does not "
            "say how many are padding: give --vocab-size N, or --tokenizer DIR with the model's config.json"
        )
    return architecture_of_arguments(arguments, int(vocab_size))


def _kind(export: Export, wanted: str) -> str:
    """The model type to write."""
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
    """The tokenizer's files, the quantizer record, and ``config.json``, which says the dtype of most bytes."""
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
    """Reads the written model again and compares every value, and its ``config.json``, with the checkpoint."""
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

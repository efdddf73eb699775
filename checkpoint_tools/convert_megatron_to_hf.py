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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    # From a bare checkout the package stands two levels up.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tqdm import tqdm

from bitcpm_megatron.checkpoint_tools.command import add_common_arguments, check_input, dtype_of, run
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
from bitcpm_megatron.checkpoint_tools.hf_model.side_files import HF_DIRECTORY, copy_side_files, side_files
from bitcpm_megatron.checkpoint_tools.megatron_model.checkpoint import MegatronCheckpoint, locate, open_checkpoint
from bitcpm_megatron.checkpoint_tools.quantizer.fuse import fuse_blocks
from bitcpm_megatron.checkpoint_tools.quantizer.megatron_record import checked_record, checked_scales
from bitcpm_megatron.checkpoint_tools.record_map import to_hugging_face
from bitcpm_megatron.checkpoint_tools.storage.hf_reader import HfReader
from bitcpm_megatron.checkpoint_tools.storage.reader import (
    ConversionError,
    TensorInfo,
    VerificationError,
    cast,
    check_finite,
)
from bitcpm_megatron.checkpoint_tools.storage.safetensors_writer import SafetensorsWriter, parse_size
from bitcpm_megatron.checkpoint_tools.storage.staging import staged
from bitcpm_megatron.checkpoint_tools.tensor_map import MegatronTensor, megatron_tensors, split
from bitcpm_megatron.checkpoints.directory import RELEASE
from bitcpm_megatron.cli import Parser, Whole
from bitcpm_megatron.files import write_digests, write_text
from bitcpm_megatron.models.architecture import Architecture
from bitcpm_megatron.models.from_arguments import architecture_of as architecture_of_arguments
from bitcpm_megatron.quantization.record import QuantizerRecord
from bitcpm_megatron.ternary_flags import GroupSize

_VOCABULARY_BLOCK = 2**26


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
    """

    checkpoint: MegatronCheckpoint
    architecture: Architecture
    tensors: list[MegatronTensor]
    record: QuantizerRecord | None
    fuse: bool
    dtype: torch.dtype | None

    def plan(self) -> dict[str, TensorInfo]:
        """Every tensor of the export."""
        return {
            name: TensorInfo((rows, *t.shape[1:]), self.dtype or self.checkpoint.info(t).dtype)
            for t in self.tensors
            for name, rows in zip(t.parts, t.rows, strict=True)
        }

    def blocks(self, tensor: MegatronTensor) -> Iterator[tuple[str, Iterator[torch.Tensor]]]:
        """The Hugging Face tensors of a Megatron tensor, each as blocks of rows, in the dtype to write.

        Raises:
            ConversionError: NaN, or scales that do not belong to the weights.
        """
        if tensor.kind == "vocab":
            yield tensor.parts[0], self._vocabulary(tensor)
            return
        channels = self.architecture.kv_channels
        whole = self.checkpoint.read(tensor)
        record = self.record if self.record is not None and tensor.module in self.record.modules else None
        scales = None
        if record is not None and record.state == "latent":
            # Of latent exports, too: scales that contradict the record mean that it is not this model's.
            checked = checked_scales(self.checkpoint, record, tensor)
            scales = checked if self.fuse else None
        part_scales = [None] * len(tensor.parts) if scales is None else split(tensor, scales, channels)
        for name, part, own in zip(tensor.parts, split(tensor, whole, channels), part_scales, strict=True):
            if record is not None and self.fuse:
                yield name, self._fused(name, part, record.config_of(tensor.module), own)
            else:
                check_finite(name, part)
                yield name, iter([cast(name, part, self.dtype or part.dtype, exactly=record is not None).contiguous()])

    def _fused(self, name: str, part: torch.Tensor, config: Any, scales: torch.Tensor | None) -> Iterator[torch.Tensor]:
        info = TensorInfo(tuple(part.shape), part.dtype)
        for block in fuse_blocks(name, lambda rows: part[rows], info, config, scales):
            yield cast(name, block, self.dtype or block.dtype, exactly=True)

    def _vocabulary(self, tensor: MegatronTensor) -> Iterator[torch.Tensor]:
        rows = max(1, _VOCABULARY_BLOCK // (tensor.shape[1] * self.checkpoint.info(tensor).dtype.itemsize))
        for start in range(0, tensor.shape[0], rows):
            block = self.checkpoint.read(tensor, start, min(start + rows, tensor.shape[0]))
            check_finite(tensor.parts[0], block)
            yield cast(tensor.parts[0], block, self.dtype or block.dtype).contiguous()


def convert(export: Export, out: Path, *, kind: str, template: Path | None, max_shard_size: int, verify: bool) -> None:
    """Writes the model directory; it appears whole or not at all.

    Raises:
        VerificationError: with ``verify``, what was written differs from the checkpoint; nothing is kept.
    """
    plan = export.plan()
    total = sum(info.nbytes for info in plan.values())
    dtypes = {info.dtype for info in plan.values()}
    dtype = str(max(dtypes, key=lambda d: sum(i.nbytes for i in plan.values() if i.dtype == d))).removeprefix("torch.")
    with staged(out, total) as directory:
        with (
            SafetensorsWriter(directory, plan, max_shard_size) as writer,
            tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar,
        ):
            for tensor in export.tensors:
                for name, blocks in export.blocks(tensor):
                    writer.write(name, blocks)
                    bar.update(plan[name].nbytes)
        template_config: dict[str, Any] = {}
        if template is not None:
            copy_side_files(template, directory)
            if (template / "config.json").is_file():
                template_config = read_config(template)
        config = config_for(kind, export.architecture, template_config, dtype)
        record = None
        if export.record is not None:
            record = to_hugging_face(export.record, export.tensors)
            if export.fuse:
                record = replace(record, state="fused")
        if kind in (BITCPM, MINICPM):
            write_remote_code(directory, config, record)
        else:
            if record is not None:
                record.write(directory)
            write_text(directory / "config.json", json.dumps(config, indent=2) + "\n")
        if verify:
            _verify(export, directory)
        write_digests(directory)


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


def open_export(
    directory: Path,
    weights: str,
    dtype: torch.dtype | None,
    config: Path | None,
    vocab_size: int | None,
    **options: Any,
) -> tuple[Export, Path | None]:
    """Opens a checkpoint and decides what its export is.

    Returns:
        The export, and the directory with the tokenizer's files and an earlier ``config.json``, or None.

    Raises:
        ConversionError: the checkpoint is damaged, contradicts itself, or cannot be exported so.
    """
    path = locate(directory)
    check_input(path)
    checkpoint = open_checkpoint(path, options.get("allow_pickle", False))
    template = config if config is not None else _kept_files(checkpoint)
    if template is not None:
        check_input(template, ["config.json", *side_files(template)])
    architecture = _architecture(checkpoint, template, vocab_size)
    tensors = megatron_tensors(architecture)
    checkpoint.check_complete(tensors)
    record = checked_record(checkpoint, tensors, options.get("group_size"))
    fuse = weights == "fused" and record is not None and record.state == "latent"
    if weights == "fused" and record is None:
        raise ConversionError(
            f"{checkpoint.path} records no quantizer: --weights fused has nothing to fuse. Give --weights latent for "
            "the weights as they are, or --ternary-group-size G if a tool that records nothing trained them ternary"
        )
    if weights == "latent" and record is not None and record.state == "fused":
        raise ConversionError(f"{checkpoint.path} holds fused weights, there are no latent ones: give --weights fused")
    if weights == "latent" and record is not None and dtype not in (None, getattr(torch, record.latent_dtype)):
        raise ConversionError(
            f"--dtype would change the {record.latent_dtype} latent weights, and with them what they are quantized to: "
            "leave it out, or give --weights fused, which casts after quantizing"
        )
    return Export(checkpoint, architecture, tensors, record, fuse, dtype), template


def _kept_files(checkpoint: MegatronCheckpoint) -> Path | None:
    """The tokenizer's files that a conversion left: with this checkpoint, or with the one that its run started from."""
    origin = checkpoint.arguments.get("pretrained_checkpoint")
    for path in (checkpoint.path, *([] if origin is None else [Path(origin) / RELEASE, Path(origin)])):
        if (path / HF_DIRECTORY).is_dir():
            return path / HF_DIRECTORY
    return None


def _architecture(checkpoint: MegatronCheckpoint, template: Path | None, vocab_size: int | None) -> Architecture:
    """From the run's arguments; from an earlier ``config.json`` where it left none."""
    config = read_config(template) if template is not None and (template / "config.json").is_file() else None
    if not checkpoint.arguments:
        if config is None:
            raise ConversionError(
                f"{checkpoint.path} does not say what model it holds: give --tokenizer DIR with the model's config.json"
            )
        return architecture_of(config)
    arguments: Mapping[str, Any] = checkpoint.arguments
    recorded = arguments.get("vocab_size")
    if vocab_size is not None and recorded not in (None, vocab_size):
        raise ConversionError(
            f"--vocab-size {vocab_size} contradicts the checkpoint, which says {recorded}: leave it out"
        )
    vocab_size = recorded if vocab_size is None else vocab_size
    if vocab_size is None and config is not None:
        vocab_size = config.get("vocab_size")
    if vocab_size is None:
        raise ConversionError(
            f"{checkpoint.path} holds {arguments.get('padded_vocab_size', 'padded')} rows of vocabulary and does not "
            "say how many are padding: give --vocab-size N, or --tokenizer DIR with the model's config.json"
        )
    return architecture_of_arguments(arguments, int(vocab_size))


def _kind(export: Export, wanted: str) -> str:
    latent = export.record is not None and export.record.state == "latent" and not export.fuse
    if latent:
        if wanted != "auto":
            raise ConversionError(
                f"--hf-architecture {wanted} would load latent weights without quantizing them: leave it out, they are "
                "written with a modeling file of their own"
            )
        return BITCPM
    if wanted == "auto":
        return LLAMA if export.architecture.is_llama else GRANITE
    return wanted


def main(argv: Sequence[str] | None = None) -> int:
    """Converts as the command line says; returns the exit status."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--load-dir", type=Path, required=True, help="--save directory of a run, or one iteration of it"
    )
    parser.add_argument("--save-dir", type=Path, required=True, help="directory to make")
    parser.add_argument("--weights", choices=("latent", "fused"), required=True)
    parser.add_argument("--hf-architecture", choices=("auto", LLAMA, GRANITE, MINICPM), default="auto")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="directory with tokenizer files and, if any, a config.json"
    )
    parser.add_argument("--vocab-size", type=Whole(), help="without padding, where the checkpoint does not say")
    parser.add_argument(
        "--ternary-group-size",
        type=GroupSize(),
        metavar="G",
        help="of a checkpoint that records no quantizer and was ternary",
    )
    parser.add_argument("--max-shard-size", default="5GB", help="of a safetensors file, default 5GB")
    parser.add_argument("--verify", action="store_true", help="read the export again and compare")
    add_common_arguments(parser)
    args = parser.parse_args(argv)

    def work() -> None:
        if args.tokenizer is not None and not args.tokenizer.is_dir():
            raise ConversionError(f"--tokenizer {args.tokenizer} is no directory")
        export, template = open_export(
            args.load_dir,
            args.weights,
            dtype_of(args.dtype),
            args.tokenizer,
            args.vocab_size,
            allow_pickle=args.allow_pickle,
            group_size=args.ternary_group_size,
        )
        kind = _kind(export, args.hf_architecture)
        convert(
            export,
            args.save_dir,
            kind=kind,
            template=template,
            max_shard_size=parse_size(args.max_shard_size),
            verify=args.verify,
        )
        state = "fused" if export.fuse else export.record.state if export.record else "unquantized"
        print(f"{args.save_dir}: {export.architecture.parameter_count():,} parameters, {kind}, {state} weights")
        if export.fuse and export.record is not None and export.record.activation_bits != 16:
            print(
                f"training also quantized activations to {export.record.activation_bits} bits, which stock clients do "
                "not: their logits will differ from training's"
            )
        if template is None:
            print("no tokenizer files were copied: give --tokenizer DIR for an export that can be used by itself")

    return run(work)


if __name__ == "__main__":
    sys.exit(main())

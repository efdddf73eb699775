# SPDX-License-Identifier: Apache-2.0
"""Export of a Megatron checkpoint: its tensors by Hugging Face's names, as latent weights or as quantized ones."""

import argparse
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ...checkpoints.directory import HF_DIRECTORY, RELEASE
from ...cli import Whole
from ...data.tokenizers import open_tokenizer
from ...models.architecture import Architecture
from ...models.from_arguments import architecture_of as architecture_of_arguments
from ...quantization.record import QuantizerRecord
from ...ternary_flags import GroupSize
from ..command import check_input
from ..hf_model.config import architecture_of, read_config
from ..hf_model.side_files import TOKENIZER, side_files, special_ids
from ..quantizer.fuse import fuse_blocks
from ..quantizer.megatron_record import checked_record, checked_scales
from ..storage.reader import ConversionError, TensorInfo, cast, check_finite, refuse_mistakes
from ..storage.safetensors_writer import row_blocks
from ..tensor_map import MegatronTensor, megatron_tensors, split
from .checkpoint import MegatronCheckpoint, locate, open_checkpoint


@dataclass
class Export:
    """An export that has been decided on but not yet written.

    Attributes:
        checkpoint: the source of the weights.
        architecture: the architecture of the model.
        tensors: the tensors of the model, all of which the checkpoint contains.
        record: the quantizer record with Megatron's module names, or None if training did not quantize.
        fuse: whether latent weights are quantized when they are written.
        dtype: the dtype to write, or None to keep each tensor's own.
        template: the directory with the tokenizer's files, or None.
        earlier: the ``config.json`` of ``template``, or its keys for special tokens; empty if neither is known.
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
        """Yields the names of the Hugging Face tensors of a Megatron tensor, each with its blocks of rows to write.

        Raises:
            ConversionError: if values are not finite or do not fit the dtype, or saved scales do not belong to the
                weights.
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
            # Scales are checked for latent exports, too: if they contradict the record, it belongs to another model.
            scales = checked_scales(self.checkpoint, record, tensor)
        part_scales = None if scales is None else split(tensor, scales, channels)
        for number, (name, pieces) in enumerate(zip(tensor.parts, split(tensor, read(tensor), channels), strict=True)):
            blocks: Iterable[torch.Tensor] = pieces
            if record is not None and self.fuse:
                part = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
                own = None if part_scales is None else torch.cat(part_scales[number])
                info = TensorInfo(tuple(part.shape), part.dtype)
                blocks = fuse_blocks(name, part.__getitem__, info, record.config_of(tensor.module), own)
            yield name, self._cast(name, blocks, exactly=record is not None)

    def _cast(self, name: str, blocks: Iterable[torch.Tensor], exactly: bool) -> Iterator[torch.Tensor]:
        for piece in blocks:
            for block in row_blocks(piece):
                check_finite(name, block)
                yield cast(name, block, self.dtype or block.dtype, exactly)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that name the checkpoint to export, and those for facts that it may not record."""
    parser.add_argument(
        "--load-dir", type=Path, required=True, help="--save directory of a run, or one iteration of it"
    )
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


def open_export(args: argparse.Namespace, weights: Literal["latent", "fused"], dtype: torch.dtype | None) -> Export:
    """Opens a checkpoint, checks it, and decides how it is exported.

    Args:
        args: the parsed arguments, with the flags of :func:`add_arguments` and ``--allow-pickle``.
        weights: the kind of weights to write.
        dtype: the dtype to write, or None to keep each tensor's own.

    Raises:
        ConversionError: if the checkpoint, its record and the arguments contradict each other.
    """
    if args.tokenizer is not None and not args.tokenizer.is_dir():
        raise ConversionError(f"--tokenizer {args.tokenizer} is no directory")
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
    if weights == "fused" and record is None:
        raise ConversionError(
            f"{path} records no quantizer: --weights fused has nothing to fuse. Give --weights latent for the weights "
            "as they are, or --ternary-group-size G if a tool that records nothing trained them ternary"
        )
    if weights == "latent" and record is not None and record.state == "fused":
        raise ConversionError(f"{path} holds fused weights, there are no latent ones: give --weights fused")
    if weights == "latent" and record is not None and dtype not in (None, getattr(torch, record.latent_dtype)):
        raise ConversionError(
            f"--dtype would change the {record.latent_dtype} latent weights, and with them what they are quantized to: "
            "leave it out, or give --weights fused, which casts after quantizing"
        )
    fuse = weights == "fused" and record is not None and record.state == "latent"
    return Export(checkpoint, architecture, tensors, record, fuse, dtype, template, earlier)


def _template(checkpoint: MegatronCheckpoint) -> Path | None:
    """Returns the directory with the model's tokenizer files, or None if it cannot be found.

    It is the one that a conversion wrote into this checkpoint, or into the checkpoint that the run started from;
    otherwise the one of the run's tokenizer.

    Raises:
        ConversionError: if the path of the run's tokenizer contains another tokenizer.
    """
    arguments = checkpoint.arguments
    origin, used = arguments.get("pretrained_checkpoint"), arguments.get("tokenizer_model")
    kept = [checkpoint.path, *([] if origin is None else [Path(origin) / RELEASE, Path(origin)])]
    for directory in (path / HF_DIRECTORY for path in kept):
        if directory.is_dir():
            return directory
    # Without a recorded identity, it is unknown whether the path still contains the tokenizer of the run.
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
    """Returns the architecture by the run's arguments, or by an earlier ``config.json`` if there are none.

    Raises:
        ConversionError: if neither states the architecture, or the vocabulary size is unknown or contradictory.
    """
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

# SPDX-License-Identifier: Apache-2.0
"""Source of a packed export: a Megatron run or a Hugging Face directory, read as weights of the training forward."""

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...checkpoints.directory import TRACKER
from ...models.architecture import Architecture
from ...quantization import effective_group
from ...quantization.record import QuantizerRecord
from ..command import check_input
from ..hf_model.config import architecture_of, read_config
from ..hf_model.model import mistakes
from ..hf_model.remote_code import read_record
from ..megatron_model.export import open_export
from ..quantizer.fuse import fuse_blocks
from ..quantizer.fusing_plan import make_plan
from ..storage.hf_reader import HfReader
from ..storage.reader import ConversionError, TensorInfo, check_finite, refuse_mistakes
from ..storage.safetensors_writer import row_blocks
from ..tensor_map import megatron_tensors, part_shapes, to_hugging_face, to_megatron
from .block_types import FLOATS
from .planner import Weight

Blocks = Iterator[torch.Tensor]


@dataclass(frozen=True)
class Source:
    """A ternary model to pack, with Hugging Face's names.

    Attributes:
        name: the name of the directory that the user gave.
        architecture: the architecture of the model.
        weights: every tensor of the model, in the order of ``read``.
        record: the quantizer record, with the state ``packed``.
        files: the directory with the tokenizer's files, or None.
        config: an earlier ``config.json`` of the model; empty if there is none.
        read: a function that yields every weight with its blocks of rows: ternary weights as in the training forward
            pass, others as stored.
    """

    name: str
    architecture: Architecture
    weights: tuple[Weight, ...]
    record: QuantizerRecord
    files: Path | None
    config: Mapping[str, Any]
    read: Callable[[], Iterator[tuple[Weight, Blocks]]]


def open_source(args: argparse.Namespace) -> Source:
    """Opens the model that ``--load-dir`` names, and checks its quantizer record against its weights.

    Args:
        args: the parsed arguments, with the flags of :func:`~..megatron_model.export.add_arguments` and
            ``--allow-pickle``.

    Raises:
        ConversionError: if the directory contains no ternary model, or its files contradict each other.
    """
    path: Path = args.load_dir
    names = (TRACKER, "metadata.json", ".metadata")
    if any((path / name).is_file() for name in names) or any(path.glob("mp_rank_*")):
        return _of_megatron(args)
    if not (path / "config.json").is_file():
        raise ConversionError(
            f"{path} holds no model: neither a Megatron checkpoint ({TRACKER}, metadata.json, mp_rank_*) nor Hugging "
            "Face's (config.json)"
        )
    return _of_hugging_face(args)


def _of_megatron(args: argparse.Namespace) -> Source:
    export = open_export(args, "fused", None)
    assert export.record is not None
    _require_ternary(export.record)
    record = replace(to_hugging_face(export.record, export.tensors), state="packed")
    weights = [
        _weight(name, TensorInfo(shape, export.checkpoint.info(tensor).dtype), record)
        for tensor in export.tensors
        for name, shape in part_shapes([tensor]).items()
    ]
    by_name = {weight.name: weight for weight in weights}

    def read() -> Iterator[tuple[Weight, Blocks]]:
        for tensor in export.tensors:
            for name, blocks in export.blocks(tensor):
                yield by_name[name], blocks

    name = args.load_dir.resolve().name
    return Source(name, export.architecture, tuple(weights), record, export.template, export.earlier, read)


def _of_hugging_face(args: argparse.Namespace) -> Source:
    path: Path = args.load_dir
    if args.vocab_size is not None:
        raise ConversionError(f"--vocab-size {args.vocab_size} is for Megatron checkpoints: {path}/config.json says it")
    if args.tokenizer is not None and not args.tokenizer.is_dir():
        raise ConversionError(f"--tokenizer {args.tokenizer} is no directory")
    config = read_config(path)
    architecture = architecture_of(config)
    check_input(path)
    reader = HfReader(path, args.allow_pickle)
    wrong = mistakes(reader, architecture)
    refuse_mistakes(f"{path} does not hold the model that its config.json describes", wrong)
    found = read_record(path)
    if found is not None:
        _require_ternary(found)
    plan = make_plan(reader, found, args.ternary_group_size, whole=True)
    if not plan.recorded and not plan.fused and args.ternary_group_size is None:
        raise ConversionError(
            f"{path} records no quantizer, and its weights are not ternary: nothing of it can be packed exactly. Give "
            "--ternary-group-size G if a tool that records nothing trained them ternary"
        )
    tensors = megatron_tensors(architecture)
    to_megatron(plan.record, tensors)  # as a check: clients fuse q, k and v, and gate and up, as Megatron does
    record = replace(plan.record, state="packed")
    infos = reader.tensors()
    weights = tuple(_weight(name, infos[name], record) for name in part_shapes(tensors))

    def read() -> Iterator[tuple[Weight, Blocks]]:
        for weight in weights:
            blocks = row_blocks(reader.read(weight.name))
            if weight.group is not None and not plan.fused:
                quantizer, latent_dtype = plan.quantized[weight.name], getattr(torch, record.latent_dtype)
                rows = _rows_of(reader, weight.name)
                blocks = fuse_blocks(weight.name, rows, weight.info, quantizer, latent_dtype=latent_dtype)
            yield weight, _finite(weight.name, blocks)

    return Source(path.resolve().name, architecture, weights, record, args.tokenizer or path, config, read)


def _rows_of(reader: HfReader, name: str) -> Callable[[slice], torch.Tensor]:
    return lambda rows: reader.read(name, (rows,))


def _finite(name: str, blocks: Blocks) -> Blocks:
    for block in blocks:
        check_finite(name, block)
        yield block


def _weight(name: str, info: TensorInfo, record: QuantizerRecord) -> Weight:
    if info.dtype not in FLOATS:
        raise ConversionError(f"{name} is {info.dtype}: weights in fp32, bf16 and fp16 can be packed")
    module = name.removesuffix(".weight")
    if module not in record.modules:
        return Weight(name, info)
    return Weight(name, info, effective_group(info.shape[1], record.config_of(module).group_size))


def _require_ternary(record: QuantizerRecord) -> None:
    for module in record.modules:
        space = record.config_of(module).space
        if space != "ternary":
            raise ConversionError(
                f"{module} is quantized in the space {space!r}, and packed exports hold the space 'ternary' alone: "
                "export it as ordinary weights by convert_megatron_to_hf.py --weights fused"
            )

# SPDX-License-Identifier: Apache-2.0
"""Opening of a path for inspection: detects a Megatron checkpoint, a Hugging Face directory, or one weight file."""

import contextlib
import re
from functools import partial
from pathlib import Path

import torch

from ...checkpoints.directory import HF_DIRECTORY, RELEASE, TRACKER
from ...files import FileError
from ...models.architecture import Architecture, ArchitectureError
from ...models.from_arguments import architecture_of as architecture_of_arguments
from ...quantization.record import QuantizerRecord, RecordError
from ..hf_model.config import architecture_of, model_type_of, read_config
from ..hf_model.model import mistakes
from ..hf_model.remote_code import read_record
from ..megatron_model.checkpoint import MegatronCheckpoint, open_checkpoint
from ..storage.hf_reader import HfReader
from ..storage.reader import ConversionError
from ..tensor_map import EMBEDDING, PROJECTION, megatron_tensors
from .inspection import Inspection, Weight


def open_inspection(path: Path, allow_pickle: bool = False) -> Inspection:
    """Opens whatever checkpoint is stored at a path; reads no tensor data except for that of tied embeddings.

    Args:
        path: a Megatron ``--save`` or iteration directory, a Hugging Face model directory, or a ``.safetensors`` or
            ``.bin`` file.
        allow_pickle: whether unsafe pickles are loaded, as in
            :func:`~bitcpm_megatron.checkpoints.safe_load.load_without_code`.

    Raises:
        ConversionError: if there is no checkpoint of these kinds, or a file is damaged.
    """
    if path.is_file():
        if path.suffix not in (".safetensors", ".bin"):
            raise ConversionError(f"{path}: give a checkpoint directory, or a .safetensors or .bin file")
        return _open_hugging_face(path, allow_pickle)
    if not path.is_dir():
        raise ConversionError(f"{path}: there is no such directory or file")
    names = (path / TRACKER, path / "metadata.json", path / ".metadata")
    if any(name.is_file() for name in names) or any(path.glob("mp_rank_*")):
        return _open_megatron(path, allow_pickle)
    if (path / "config.json").is_file() or any(path.glob("*.safetensors")) or any(path.glob("*.bin")):
        return _open_hugging_face(path, allow_pickle)
    raise ConversionError(
        f"{path} holds no checkpoint: neither Megatron's ({TRACKER}, metadata.json, mp_rank_*) nor Hugging Face's "
        "(config.json, *.safetensors, *.bin)"
    )


def _open_megatron(directory: Path, allow_pickle: bool) -> Inspection:
    checkpoint = open_checkpoint(directory, allow_pickle)
    path = checkpoint.path
    number = re.fullmatch(r"iter_(\d+)", path.name)
    found = Inspection(
        path,
        checkpoint.format,
        iteration=int(number[1]) if number else checkpoint.arguments.get("iteration"),
        layout=checkpoint.layout,
        optimizer_state=checkpoint.optimizer_state,
        record=checkpoint.record,
    )
    if path.name == RELEASE:
        found.iteration = RELEASE
    try:
        found.architecture, found.about_architecture = _architecture(checkpoint)
    except (FileError, ArchitectureError, KeyError, TypeError) as error:
        found.about_architecture = f"unknown: {error}"
        found.findings.append(f"the architecture is unknown, so its tensors cannot be told apart: {error}")
        return found
    tensors = megatron_tensors(found.architecture)
    try:
        found.findings += checkpoint.mistakes(tensors)
    except FileError as error:
        found.findings.append(str(error))
    for tensor in tensors:
        try:
            info = checkpoint.info(tensor)
        except KeyError:
            continue  # reported as missing
        if tensor.name == EMBEDDING:
            found.padded_vocabulary = info.shape[0]
        linear = tensor.quantizable and len(info.shape) == 2
        read, scales = partial(checkpoint.read, tensor), partial(checkpoint.scales, tensor)
        found.weights.append(Weight(tensor.module, info, linear, read, scales, checkpoint.has_scales(tensor)))
    return found


def _architecture(checkpoint: MegatronCheckpoint) -> tuple[Architecture, str]:
    """Returns the architecture of a Megatron checkpoint, and a description of the source that states it.

    Raises:
        ConversionError: if neither arguments nor ``config.json`` state the architecture, or its vocabulary size is
            missing.
        ArchitectureError: if the architecture is not of the supported family.
    """
    kept = checkpoint.path / HF_DIRECTORY
    config = read_config(kept) if (kept / "config.json").is_file() else None
    if not checkpoint.arguments:
        if config is None:
            raise ConversionError("it records no arguments of a run, and keeps no config.json")
        return architecture_of(config), f"{model_type_of(config)}, by its config.json"
    vocab_size = checkpoint.arguments.get("vocab_size") or (config or {}).get("vocab_size")
    about = "by the arguments of the run"
    if vocab_size is None:
        vocab_size = checkpoint.arguments.get("padded_vocab_size")
        about += ", which do not say how many rows of the vocabulary are padding"
    if vocab_size is None:
        raise ConversionError("the arguments of the run do not say how large the vocabulary is")
    found = architecture_of_arguments(checkpoint.arguments, int(vocab_size))
    return found, f"{'llama' if found.is_llama else 'minicpm / granite'}, {about}"


def _open_hugging_face(path: Path, allow_pickle: bool) -> Inspection:
    directory = path if path.is_dir() else path.parent
    found = Inspection(path, "huggingface" if path.is_dir() else path.suffix.removeprefix("."))
    reader = HfReader(path, allow_pickle)

    def read(name: str, rows: slice) -> torch.Tensor:
        return reader.read(name, (rows,))

    for name, info in reader.tensors().items():
        linear = PROJECTION.fullmatch(name) is not None and len(info.shape) == 2
        found.weights.append(Weight(name.removesuffix(".weight"), info, linear, partial(read, name)))
    try:
        found.record = read_record(directory)
    except FileError as error:
        found.findings.append(str(error))
        with contextlib.suppress(RecordError):
            found.record = QuantizerRecord.read(directory)
    if path.is_file():
        found.about_architecture = "one file"
        return found
    try:
        config = read_config(directory)
    except FileError as error:
        # The missing config.json is a finding, because no client can load the weights without it.
        found.about_architecture = "unknown"
        found.findings += [str(error)] if str(error) not in found.findings else []
        return found
    try:
        found.architecture, found.about_architecture = architecture_of(config), model_type_of(config)
        found.findings += mistakes(reader, found.architecture)
    except (FileError, ArchitectureError) as error:
        found.about_architecture = f"unknown: {error}"
    return found

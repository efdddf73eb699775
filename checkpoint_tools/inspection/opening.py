# SPDX-License-Identifier: Apache-2.0
"""Opens a checkpoint, model directory or file, whichever of them a path is, for an inspection."""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...checkpoints.directory import RELEASE, TRACKER
from ...checkpoints.safe_load import load_without_code
from ...files import FileError
from ...models.architecture import Architecture, ArchitectureError
from ...models.from_arguments import architecture_of as architecture_of_arguments
from ...quantization.record import FILE_NAME, SCALE_SUFFIX, QuantizerRecord, RecordError
from ..hf_model.config import architecture_of, model_type_of, read_config
from ..hf_model.remote_code import read_record
from ..hf_model.side_files import HF_DIRECTORY
from ..megatron_model.checkpoint import MegatronCheckpoint, locate, open_checkpoint
from ..storage.hf_reader import open_tensors
from ..storage.reader import ConversionError, TensorInfo, TensorReader
from ..storage.torch_dist_reader import TorchDistReader
from ..tensor_map import EMBEDDING, MegatronTensor, megatron_tensors
from .inspection import Inspection, Weight
from .statistics import blocks

_RANK = re.compile(r"mp_rank_(\d+)(?:_(\d+))?")


_LINEAR = re.compile(r"(.+\.)?(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight")
_OPTIMIZER = re.compile(r"(^|\.)optimizer\.")


# Constants that old Llama checkpoints hold beside the weights.
_COMPUTED = "rotary_emb.inv_freq"


_TIED = "model.embed_tokens.weight", "lm_head.weight"


def open_inspection(path: Path, allow_pickle: bool = False) -> Inspection:
    """Finds out what lies at a path; reads no tensor data but that of tied embeddings.

    Args:
        path: Megatron ``--save`` or iteration directory, Hugging Face model directory, ``.safetensors`` or ``.bin``.
        allow_pickle: see :func:`~bitcpm_megatron.checkpoints.safe_load.load_without_code`.

    Raises:
        ConversionError: there is nothing of that kind, or a file is damaged.
    """
    if path.is_file():
        if path.suffix not in (".safetensors", ".bin"):
            raise ConversionError(f"{path}: give a checkpoint directory, or a .safetensors or .bin file")
        return _open_file(path, allow_pickle)
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


def files_of(path: Path) -> tuple[Path, list[str] | None]:
    """The directory whose digests concern a path, and the names of the files there; None for all.

    Raises:
        FileError: the tracker of a ``--save`` directory names no checkpoint.
    """
    if path.is_file():
        return path.parent, [path.name, FILE_NAME]
    return (locate(path) if (path / TRACKER).is_file() else path), None


def _open_megatron(directory: Path, allow_pickle: bool) -> Inspection:
    checkpoint = open_checkpoint(directory, allow_pickle)
    path, arguments = checkpoint.path, checkpoint.arguments
    found = Inspection(path, checkpoint.format, iteration=_iteration(path, arguments), record=checkpoint.record)
    if checkpoint.format == "torch_dist":
        reader = TorchDistReader(path)
        found.optimizer_state = any(map(_OPTIMIZER.search, [*reader.tensors(), *reader.objects]))
        found.layout = {"tensor": checkpoint.tensor_parallel_size}
    else:
        found.layout, found.optimizer_state = _legacy_layout(path, allow_pickle)
    try:
        found.architecture, found.about_architecture = _architecture(checkpoint)
    except (FileError, ArchitectureError, KeyError, TypeError) as error:
        found.about_architecture = f"unknown: {error}"
        found.findings.append(f"the architecture is unknown, so its tensors cannot be told apart: {error}")
        return found
    tensors = megatron_tensors(found.architecture)
    try:
        checkpoint.check_complete(tensors)
    except FileError as error:
        found.findings += [line.strip() for line in str(error).split("\n")[1:]]
    for tensor in tensors:
        try:
            info = checkpoint.info(tensor)
        except KeyError:
            continue  # reported as missing
        if tensor.name == EMBEDDING:
            found.padded_vocabulary = info.shape[0]
        found.weights.append(_megatron_weight(checkpoint, tensor, info))
    return found


def _megatron_weight(checkpoint: MegatronCheckpoint, tensor: MegatronTensor, info: TensorInfo) -> Weight:
    return Weight(
        tensor.module,
        info,
        tensor.quantizable and len(info.shape) == 2,
        lambda rows: checkpoint.read(tensor, rows.start or 0, rows.stop),
        lambda: checkpoint.scales(tensor),
        tensor.quantizable and any(SCALE_SUFFIX in stored for stored in checkpoint.stored_as(tensor)),
    )


def _architecture(checkpoint: MegatronCheckpoint) -> tuple[Architecture, str]:
    """The architecture, and from where it is known.

    Raises:
        ConversionError: from nowhere.
        ArchitectureError: it is none of this family.
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


def _legacy_layout(path: Path, allow_pickle: bool) -> tuple[dict[str, int], bool]:
    """Parallel sizes, and whether the optimizer state is there."""
    ranks = [match for entry in path.iterdir() if (match := _RANK.fullmatch(entry.name))]
    first = min(path.glob("mp_rank_*"))
    keys = load_without_code(first / "model_optim_rng.pt", mmap=True, allow_pickle=allow_pickle).keys()
    layout = {
        "tensor": 1 + max(int(match[1]) for match in ranks),
        "pipeline": 1 + max(int(match[2] or 0) for match in ranks),
    }
    virtual = sum(1 for key in keys if re.fullmatch(r"model\d+", str(key)))
    if virtual:
        layout["virtual pipeline"] = virtual
    return layout, "optimizer" in keys or any(path.glob("mp_rank_*/distrib_optim.pt"))


def _iteration(path: Path, arguments: Mapping[str, Any]) -> int | str | None:
    if path.name == RELEASE:
        return RELEASE
    match = re.fullmatch(r"iter_(\d+)", path.name)
    return int(match[1]) if match else arguments.get("iteration")


def _open_hugging_face(directory: Path, allow_pickle: bool) -> Inspection:
    found = Inspection(directory, "huggingface")
    reader = open_tensors(directory, allow_pickle)
    found.weights = _weights_of(reader)
    try:
        found.record = read_record(directory)
    except FileError as error:
        found.findings.append(str(error))
        try:
            found.record = QuantizerRecord.read(directory)
        except RecordError:
            found.record = None
    try:
        config = read_config(directory)
    except FileError as error:
        # Without one no client can load the weights.
        found.about_architecture = "unknown"
        found.findings += [str(error)] if str(error) not in found.findings else []
        return found
    try:
        found.architecture, found.about_architecture = architecture_of(config), model_type_of(config)
    except (FileError, ArchitectureError) as error:
        found.about_architecture = f"unknown: {error}"
        return found
    _compare(found, found.architecture, reader)
    return found


def _compare(found: Inspection, architecture: Architecture, reader: TensorReader) -> None:
    """Adds findings where the files do not hold what ``config.json`` describes."""
    infos = reader.tensors()
    expected = {
        name: (rows, *tensor.shape[1:])
        for tensor in megatron_tensors(architecture)
        for name, rows in zip(tensor.parts, tensor.rows, strict=True)
    }
    found.findings += [f"{name}: missing" for name in expected if name not in infos]
    found.findings += [
        f"{name}: shape {list(infos[name].shape)}, config.json says {list(shape)}"
        for name, shape in expected.items()
        if name in infos and infos[name].shape != shape
    ]
    for name in infos:
        if name in expected or name.endswith(_COMPUTED):
            continue
        if architecture.tied and name == _TIED[1]:
            if not _same(reader, *_TIED):
                found.findings.append("config.json ties the embeddings, and lm_head.weight differs from embed_tokens")
            continue
        found.findings.append(f"{name}: not part of the model that config.json describes")


def _open_file(path: Path, allow_pickle: bool) -> Inspection:
    found = Inspection(path, path.suffix.removeprefix("."), about_architecture="one file")
    found.weights = _weights_of(open_tensors(path, allow_pickle))
    try:
        found.record = read_record(path.parent)
    except FileError as error:
        found.findings.append(str(error))
    return found


def _weights_of(reader: TensorReader) -> list[Weight]:
    return [
        Weight(
            name.removesuffix(".weight"),
            info,
            _LINEAR.fullmatch(name) is not None and len(info.shape) == 2,
            partial(_rows_of, reader, name),
        )
        for name, info in reader.tensors().items()
    ]


def _rows_of(reader: TensorReader, name: str, rows: slice) -> torch.Tensor:
    return reader.read(name, (rows,))


def _same(reader: TensorReader, one: str, other: str) -> bool:
    infos = reader.tensors()
    if one not in infos or infos[one] != infos[other]:
        return False
    pairs = zip(
        blocks(lambda rows: reader.read(one, (rows,)), infos[one]),
        blocks(lambda rows: reader.read(other, (rows,)), infos[other]),
        strict=True,
    )
    return all(torch.equal(a, b) for a, b in pairs)

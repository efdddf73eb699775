# SPDX-License-Identifier: Apache-2.0
"""A Megatron checkpoint as the whole model's tensors, whichever format and parallel layout it was written in."""

import argparse
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...checkpoints.directory import TRACKER, CheckpointError, tracked
from ...files import read_json
from ...quantization.record import SCALE_SUFFIX, QuantizerRecord
from ..storage.reader import ConversionError, TensorInfo
from ..storage.torch_dist_reader import TorchDistReader, read_common
from ..tensor_map import EMBEDDING, OTHER_NAMES, OUTPUT, MegatronTensor, unshard
from .legacy import LegacyReader

# Beside the weights a run saves how to go on; none of it is part of the model.
_LAYER = re.compile(r"decoder\.layers\.([0-9]{1,9})\.(.+)")
_NOT_WEIGHTS = re.compile(r"(^|\.)optimizer\.|_extra_state|^rng_state|^rerun_state|^opt_param_scheduler|rotary_pos_emb")


def locate(directory: Path) -> Path:
    """The checkpoint that a directory means: itself, or the one that its tracker names.

    Raises:
        ConversionError: there is none.
    """
    if (directory / "metadata.json").is_file() or any(directory.glob("mp_rank_*")):
        return directory
    try:
        name = tracked(directory)
    except CheckpointError as error:
        raise ConversionError(str(error)) from None
    if name is None:
        raise ConversionError(f"{directory} is no Megatron checkpoint: it has neither {TRACKER} nor tensors")
    found = directory / name
    if not (found / "metadata.json").is_file() and not any(found.glob("mp_rank_*")):
        raise ConversionError(
            f"{directory / TRACKER} names {found}, which is no complete checkpoint: give the directory of one"
        )
    return found


def open_checkpoint(directory: Path, allow_pickle: bool = False) -> "MegatronCheckpoint":
    """Opens a checkpoint of either format; see :func:`locate`."""
    path = locate(directory)
    if (path / "metadata.json").is_file():
        return TorchDistCheckpoint(path, allow_pickle)
    return LegacyCheckpoint(path, allow_pickle)


class MegatronCheckpoint(ABC):
    """The tensors of a checkpoint by global layer number, and what it says of itself.

    Attributes:
        path: of the iteration.
        arguments: of the run that wrote it, by Megatron-LM's names; empty where it records none.
        record: the quantizer record, or None.
        tied: whether the model's embedding is its output layer, known after :meth:`check_complete`.
    """

    format: str

    def __init__(self, path: Path, arguments: Mapping[str, Any]) -> None:
        self.path = path
        self.arguments = dict(arguments)
        self.record = QuantizerRecord.read(path)
        self.tied = False

    @abstractmethod
    def info(self, tensor: MegatronTensor) -> TensorInfo:
        """Shape and dtype of the whole tensor as stored, with padded rows."""

    @abstractmethod
    def read(self, tensor: MegatronTensor, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows ``[start, stop)`` of a whole tensor; not to be written into."""

    @abstractmethod
    def scales(self, tensor: MegatronTensor) -> torch.Tensor | None:
        """The scales that training used, bf16 ``[out, groups]``, or None where none were saved."""

    @abstractmethod
    def names(self) -> set[str]:
        """Everything stored that belongs to the model, by its name in the file."""

    @abstractmethod
    def stored_as(self, tensor: MegatronTensor) -> set[str]:
        """The names, of :meth:`names`, that hold a tensor and its scales."""

    @property
    @abstractmethod
    def tensor_parallel_size(self) -> int:
        """Of the run that wrote it, from the files themselves."""

    def check_complete(self, tensors: list[MegatronTensor]) -> None:
        """Checks that the checkpoint holds the tensors of a model, and nothing else.

        Raises:
            ConversionError: lists what is missing, what is left over, and what has another shape.
        """
        self.tied = all(tensor.name != OUTPUT for tensor in tensors)
        wrong = []
        for tensor in tensors:
            try:
                shape = self.info(tensor).shape
            except KeyError:
                wrong.append(f"{tensor.name}: missing")
                continue
            # The vocabulary is padded.
            least = shape[:1] >= tensor.shape[:1] if tensor.kind == "vocab" else shape[:1] == tensor.shape[:1]
            if len(shape) != len(tensor.shape) or not least or shape[1:] != tensor.shape[1:]:
                wrong.append(f"{tensor.name}: shape {list(shape)}, the model's arguments say {list(tensor.shape)}")
        known = set().union(*(self.stored_as(tensor) for tensor in tensors))
        wrong += [f"{name}: not part of the model" for name in sorted(self.names() - known)]
        if wrong:
            shown = "\n  ".join([*wrong[:20], *([f"... and {len(wrong) - 20} more"] if len(wrong) > 20 else [])])
            raise ConversionError(f"{self.path} does not hold the model that its arguments describe:\n  {shown}")


class TorchDistCheckpoint(MegatronCheckpoint):
    """megatron-core's ``torch_dist``: layers stacked, or (with uneven layers) one by one."""

    format = "torch_dist"

    def __init__(self, path: Path, allow_pickle: bool = False) -> None:
        self._reader = TorchDistReader(path)
        self._infos = self._reader.tensors()
        super().__init__(path, _run_arguments(path, allow_pickle))

    def info(self, tensor: MegatronTensor) -> TensorInfo:
        key, index = self._key(tensor)
        stored = self._infos[key]
        return TensorInfo(stored.shape[len(index) :], stored.dtype)

    def read(self, tensor: MegatronTensor, start: int = 0, stop: int | None = None) -> torch.Tensor:
        key, index = self._key(tensor)
        return self._reader.read(key, (*index, slice(start, stop)))

    def scales(self, tensor: MegatronTensor) -> torch.Tensor | None:
        key = self._scale_key(tensor)
        if key is None:
            return None
        stacked = len(self._infos[key].shape) == 3
        return self._reader.read(key, (tensor.layer,) if stacked and tensor.layer is not None else ())

    def names(self) -> set[str]:
        return {name for name in self._infos if not _NOT_WEIGHTS.search(name)}

    def stored_as(self, tensor: MegatronTensor) -> set[str]:
        try:
            found = {self._key(tensor)[0]}
        except KeyError:
            found = set()
        scale = self._scale_key(tensor) if tensor.quantizable else None
        return found if scale is None else {*found, scale}

    @property
    def tensor_parallel_size(self) -> int:
        """From how the columns of a row-parallel weight are cut into chunks."""
        for name in self._infos:
            if name.endswith("self_attention.linear_proj.weight"):
                return len({offsets[-1] for offsets, _ in self._reader.chunks(name)})
        return 1

    def _key(self, tensor: MegatronTensor) -> tuple[str, tuple[int, ...]]:
        """Where a tensor lies: key, and layer number within it.

        Raises:
            KeyError: nowhere.
        """
        candidates: list[tuple[str, tuple[int, ...]]] = []
        if tensor.layer is None:
            candidates.append((tensor.name, ()))
        else:
            for suffix in (tensor.suffix, OTHER_NAMES.get(tensor.suffix)):
                if suffix is not None:
                    candidates.append((f"decoder.layers.{suffix}", (tensor.layer,)))
                    candidates.append((f"decoder.layers.{tensor.layer}.{suffix}", ()))
        for key, index in candidates:
            if key in self._infos and (not index or index[0] < self._infos[key].shape[0]):
                return key, index
        raise KeyError(tensor.name)

    def _scale_key(self, tensor: MegatronTensor) -> str | None:
        stacked = f"decoder.layers.{tensor.suffix}{SCALE_SUFFIX}"
        for key in (stacked, f"{stacked}.{tensor.layer}"):
            if key in self._infos:
                return key
        return None


class LegacyCheckpoint(MegatronCheckpoint):
    """One ``model_optim_rng.pt`` per tensor- and pipeline-parallel rank, each with its layers counted from 0."""

    format = "legacy"

    def __init__(self, path: Path, allow_pickle: bool = False) -> None:
        self._reader = LegacyReader(path, allow_pickle)
        super().__init__(path, self._reader.args)
        # (stage's place in the model) -> (pipeline rank, model key), virtual stages outermost.
        pipeline = range(self._reader.pipeline_parallel_size)
        keys = sorted(self._reader.ranks[0, 0], key=lambda key: int(key.removeprefix("model") or 0))
        self._stages = [(rank, key) for key in keys for rank in pipeline]
        # global name -> (pipeline rank, model key, local name)
        self._where: dict[str, tuple[int, str, str]] = {}
        first = 0
        for rank, key in self._stages:
            local_layers = 0
            for name in self._reader.ranks[0, rank].get(key, {}):
                if _NOT_WEIGHTS.search(name):
                    continue
                layer = _LAYER.fullmatch(name)
                if layer is not None:
                    local_layers = max(local_layers, int(layer[1]) + 1)
                whole = name if layer is None else f"decoder.layers.{int(layer[1]) + first}.{layer[2]}"
                self._where[whole] = (rank, key, name)
            first += local_layers

    def info(self, tensor: MegatronTensor) -> TensorInfo:
        shards = self._shards(tensor)
        if len({(shard.shape, shard.dtype) for shard in shards}) > 1:
            raise ConversionError(
                f"{self.path}: {tensor.name} has other shapes or dtypes on other tensor-parallel ranks: of two runs?"
            )
        if shards[0].ndim != len(tensor.shape):
            return TensorInfo(tuple(shards[0].shape), shards[0].dtype)
        rows, *columns = shards[0].shape
        size = len(shards)
        if size > 1 and tensor.kind == "row":
            columns[-1] *= size
        elif tensor.kind != "replicated":
            rows *= size
        return TensorInfo((rows, *columns), shards[0].dtype)

    def read(self, tensor: MegatronTensor, start: int = 0, stop: int | None = None) -> torch.Tensor:
        shards = self._shards(tensor)
        if tensor.kind == "replicated" and any(not torch.equal(s, shards[0]) for s in shards[1:]):
            raise ConversionError(f"{self.path}: {tensor.name} differs between tensor-parallel ranks")
        if tensor.kind == "vocab":
            return self._vocabulary_rows(tensor, shards, start, stop)
        return unshard(tensor.kind, shards)[start:stop]

    def scales(self, tensor: MegatronTensor) -> torch.Tensor | None:
        return None

    def names(self) -> set[str]:
        return set(self._where)

    def stored_as(self, tensor: MegatronTensor) -> set[str]:
        found = {name for name in self._spellings(tensor) if name in self._where}
        # The last stage of a tied model holds a copy of the embedding as its output layer.
        return found | ({OUTPUT} if tensor.name == EMBEDDING and self._tied_copy() else set())

    @property
    def tensor_parallel_size(self) -> int:
        return self._reader.tensor_parallel_size

    def _tied_copy(self) -> bool:
        return self.tied and OUTPUT in self._where

    def _spellings(self, tensor: MegatronTensor) -> list[str]:
        other = OTHER_NAMES.get(tensor.suffix)
        return [tensor.name] + ([f"decoder.layers.{tensor.layer}.{other}"] if other else [])

    def _shards(self, tensor: MegatronTensor) -> list[torch.Tensor]:
        for name in self._spellings(tensor):
            if name in self._where:
                return self._tensors(name)
        raise KeyError(tensor.name)

    def _tensors(self, name: str) -> list[torch.Tensor]:
        rank, key, local = self._where[name]
        return [self._reader.ranks[tp, rank][key][local] for tp in range(self._reader.tensor_parallel_size)]

    def _vocabulary_rows(
        self, tensor: MegatronTensor, shards: list[torch.Tensor], start: int, stop: int | None
    ) -> torch.Tensor:
        if tensor.name == EMBEDDING and self._tied_copy() and start == 0:
            copies = self._tensors(OUTPUT)
            if any(not torch.equal(a, b) for a, b in zip(shards, copies, strict=True)):
                raise ConversionError(f"{self.path}: the embedding and the output layer are tied and differ")
        rows = shards[0].shape[0]
        stop = rows * len(shards) if stop is None else stop
        pieces = [s[max(0, start - i * rows) : max(0, stop - i * rows)] for i, s in enumerate(shards)]
        pieces = [piece for piece in pieces if piece.shape[0]]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _run_arguments(path: Path, allow_pickle: bool) -> dict[str, Any]:
    """The arguments beside a ``torch_dist`` checkpoint: of our loop in JSON, of Megatron-LM in ``common.pt``."""
    file = path / "arguments.json"
    if file.is_file():
        found = read_json(file)
        if not isinstance(found, dict):
            raise ConversionError(f"{file}: expected a JSON object of arguments: copy it again")
        return found
    found = read_common(path, allow_pickle).get("args")
    if not isinstance(found, argparse.Namespace | None):
        raise ConversionError(f"{path}: its args are a {type(found).__name__} and no argparse.Namespace")
    return {} if found is None else dict(vars(found))

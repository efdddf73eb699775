# SPDX-License-Identifier: Apache-2.0
"""Reader of Megatron checkpoints of every format and parallel layout, which returns the tensors of the whole model."""

import argparse
import contextlib
import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...checkpoints.directory import TRACKER, CheckpointError, tracked
from ...files import read_json
from ...quantization.record import SCALE_SUFFIX, QuantizerRecord
from ..storage.reader import ConversionError, TensorInfo
from ..storage.torch_dist_reader import TorchDistReader, read_common
from ..tensor_map import EMBEDDING, OUTPUT, MegatronTensor, unshard
from .legacy import LegacyReader

_LAYER = re.compile(r"decoder\.layers\.([0-9]{1,9})\.(.+)")
_OPTIMIZER = re.compile(r"(^|\.)optimizer\.")
# Besides the weights, a run saves state for continuing the training, which is not part of the model.
_NOT_WEIGHTS = re.compile(r"(^|\.)optimizer\.|_extra_state|^rng_state|^rerun_state|^opt_param_scheduler|rotary_pos_emb")


def locate(directory: Path) -> Path:
    """Returns the checkpoint that a directory stands for: itself, or the one that its tracker file names.

    Raises:
        ConversionError: if there is no complete checkpoint.
    """
    if _is_checkpoint(directory):
        return directory
    try:
        name = tracked(directory)
    except CheckpointError as error:
        raise ConversionError(str(error)) from None
    if name is None:
        raise ConversionError(f"{directory} is no Megatron checkpoint: it has neither {TRACKER} nor tensors")
    found = directory / name
    if not _is_checkpoint(found):
        raise ConversionError(
            f"{directory / TRACKER} names {found}, which is no complete checkpoint: give the directory of one"
        )
    return found


def _is_checkpoint(directory: Path) -> bool:
    return (directory / "metadata.json").is_file() or any(directory.glob("mp_rank_*"))


def open_checkpoint(directory: Path, allow_pickle: bool = False) -> "MegatronCheckpoint":
    """Opens a checkpoint of either format, which is found by :func:`locate`."""
    path = locate(directory)
    if (path / "metadata.json").is_file():
        return TorchDistCheckpoint(path, allow_pickle)
    return LegacyCheckpoint(path, allow_pickle)


class MegatronCheckpoint(ABC):
    """Base class of opened checkpoints: their tensors by global layer number, and their metadata.

    Attributes:
        format: ``torch_dist`` or ``legacy``.
        path: the iteration directory.
        arguments: the arguments of the run that wrote it, by Megatron-LM's names; empty if none are recorded.
        record: the quantizer record, or None.
        layout: the parallel sizes by name, derived from the files themselves; ``tensor`` is always present.
        optimizer_state: whether the checkpoint contains the optimizer's state.
        tied: whether the model's output layer is its embedding; set by :meth:`mistakes`, False before.
    """

    format: str

    def __init__(
        self, path: Path, arguments: Mapping[str, Any], layout: Mapping[str, int], optimizer_state: bool
    ) -> None:
        self.path = path
        self.arguments = dict(arguments)
        self.layout = dict(layout)
        self.optimizer_state = optimizer_state
        self.record = QuantizerRecord.read(path)
        self.tied = False

    @abstractmethod
    def info(self, tensor: MegatronTensor) -> TensorInfo:
        """Returns the shape and dtype of the whole tensor as stored, with padded rows.

        Raises:
            KeyError: if there is no such tensor.
        """

    @abstractmethod
    def read(self, tensor: MegatronTensor, rows: slice = slice(None)) -> torch.Tensor:
        """Returns rows of the whole tensor, which the caller must not write into."""

    def has_scales(self, tensor: MegatronTensor) -> bool:
        """Returns whether the scales that training used were saved; the legacy format does not save them."""
        return False

    def scales(self, tensor: MegatronTensor) -> torch.Tensor | None:
        """Returns the scales that training used, bf16 ``[out features, groups per row]``, or None if not saved."""
        return None

    @abstractmethod
    def leftover(self, tensors: Sequence[MegatronTensor]) -> set[str]:
        """Returns the names in the file of stored model tensors that are none of the given tensors."""

    def mistakes(self, tensors: Sequence[MegatronTensor]) -> list[str]:
        """Describes the tensors of a model that are missing, have another shape, or are left over; sets ``tied``."""
        self.tied = all(tensor.name != OUTPUT for tensor in tensors)
        wrong = []
        for tensor in tensors:
            try:
                shape = self.info(tensor).shape
            except KeyError:
                wrong.append(f"{tensor.name}: missing")
                continue
            # A vocabulary may have more rows than the model, because it is padded.
            least = shape[:1] >= tensor.shape[:1] if tensor.kind == "vocab" else shape[:1] == tensor.shape[:1]
            if len(shape) != len(tensor.shape) or not least or shape[1:] != tensor.shape[1:]:
                wrong.append(f"{tensor.name}: shape {list(shape)}, the model's arguments say {list(tensor.shape)}")
        return wrong + [f"{name}: not part of the model" for name in sorted(self.leftover(tensors))]


class TorchDistCheckpoint(MegatronCheckpoint):
    """Checkpoint in megatron-core's ``torch_dist`` format: layers are stacked, or one by one if non-homogeneous."""

    format = "torch_dist"

    def __init__(self, path: Path, allow_pickle: bool = False) -> None:
        self._reader = TorchDistReader(path)
        self._infos = self._reader.tensors()
        stored = [*self._infos, *self._reader.objects]
        layout = {"tensor": self._tensor_parallel_size()}
        super().__init__(path, _run_arguments(path, allow_pickle), layout, any(map(_OPTIMIZER.search, stored)))

    def info(self, tensor: MegatronTensor) -> TensorInfo:
        key, index = self._key(tensor)
        stored = self._infos[key]
        return TensorInfo(stored.shape[len(index) :], stored.dtype)

    def read(self, tensor: MegatronTensor, rows: slice = slice(None)) -> torch.Tensor:
        key, index = self._key(tensor)
        return self._reader.read(key, (*index, rows))

    def has_scales(self, tensor: MegatronTensor) -> bool:
        return self._scale_key(tensor) is not None

    def scales(self, tensor: MegatronTensor) -> torch.Tensor | None:
        key = self._scale_key(tensor)
        if key is None:
            return None
        stacked = len(self._infos[key].shape) == 3
        return self._reader.read(key, (tensor.layer,) if stacked and tensor.layer is not None else ())

    def leftover(self, tensors: Sequence[MegatronTensor]) -> set[str]:
        names = {name for name in self._infos if not _NOT_WEIGHTS.search(name)}
        for tensor in tensors:
            with contextlib.suppress(KeyError):
                names.discard(self._key(tensor)[0])
            names.discard(self._scale_key(tensor) or "")
        return names

    def _tensor_parallel_size(self) -> int:
        """Returns the number of chunks into which the columns of a row-parallel weight are cut."""
        for name in self._infos:
            if name.endswith("self_attention.linear_proj.weight"):
                return len({offsets[-1] for offsets, _ in self._reader.chunks(name)})
        return 1

    def _key(self, tensor: MegatronTensor) -> tuple[str, tuple[int, ...]]:
        """Returns the key of a tensor in the file, and its index there: the layer number in a stack, otherwise ().

        Raises:
            KeyError: if the tensor is not stored.
        """
        for name in tensor.spellings:
            if tensor.layer is not None:
                stack = self._infos.get(stacked := name.replace(f".{tensor.layer}.", ".", 1))
                if stack is not None and stack.shape and tensor.layer < stack.shape[0]:
                    return stacked, (tensor.layer,)
            if name in self._infos:
                return name, ()
        raise KeyError(tensor.name)

    def _scale_key(self, tensor: MegatronTensor) -> str | None:
        if not tensor.quantizable:
            return None
        stacked = f"decoder.layers.{tensor.suffix}{SCALE_SUFFIX}"
        return next((key for key in (stacked, f"{stacked}.{tensor.layer}") if key in self._infos), None)


class LegacyCheckpoint(MegatronCheckpoint):
    """Checkpoint in the legacy format: a ``model_optim_rng.pt`` per tensor- and pipeline-parallel rank.

    Every file counts the layers of each of its model parts from 0.
    """

    format = "legacy"

    def __init__(self, path: Path, allow_pickle: bool = False) -> None:
        self._reader = LegacyReader(path, allow_pickle)
        layout = {"tensor": self._reader.tensor_parallel_size, "pipeline": self._reader.pipeline_parallel_size}
        # The global layer order visits all pipeline ranks for every virtual stage, so virtual stages vary slowest.
        keys = sorted(self._reader.ranks[0, 0], key=lambda key: int(key.removeprefix("model") or 0))
        if "model" not in keys:
            layout["virtual pipeline"] = len(keys)
        super().__init__(path, self._reader.args, layout, self._reader.optimizer_state)
        # global name -> (pipeline rank, model key, local name)
        self._where: dict[str, tuple[int, str, str]] = {}
        first = 0
        for key, rank in itertools.product(keys, range(self._reader.pipeline_parallel_size)):
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
        shape = list(shards[0].shape)
        if len(shape) == len(tensor.shape) and tensor.kind != "replicated":
            shape[-1 if tensor.kind == "row" else 0] *= len(shards)
        return TensorInfo(tuple(shape), shards[0].dtype)

    def read(self, tensor: MegatronTensor, rows: slice = slice(None)) -> torch.Tensor:
        shards = self._shards(tensor)
        if tensor.kind == "replicated" and any(not torch.equal(s, shards[0]) for s in shards[1:]):
            raise ConversionError(f"{self.path}: {tensor.name} differs between tensor-parallel ranks")
        if tensor.kind != "vocab":
            return unshard(tensor.kind, shards)[rows]
        height = len(shards[0])
        start, stop, _ = rows.indices(height * len(shards))
        if tensor.name == EMBEDDING and self.tied and OUTPUT in self._where and start == 0:
            copies = self._tensors(OUTPUT)
            if any(not torch.equal(a, b) for a, b in zip(shards, copies, strict=True)):
                raise ConversionError(f"{self.path}: the embedding and the output layer are tied and differ")
        pieces = [s[max(0, start - i * height) : max(0, stop - i * height)] for i, s in enumerate(shards)]
        pieces = [piece for piece in pieces if len(piece)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def leftover(self, tensors: Sequence[MegatronTensor]) -> set[str]:
        # The last pipeline stage of a tied model holds a copy of the embedding as its output layer.
        copied = {OUTPUT} if self.tied else set()
        return set(self._where) - copied - {name for tensor in tensors for name in tensor.spellings}

    def _shards(self, tensor: MegatronTensor) -> list[torch.Tensor]:
        for name in tensor.spellings:
            if name in self._where:
                return self._tensors(name)
        raise KeyError(tensor.name)

    def _tensors(self, name: str) -> list[torch.Tensor]:
        rank, key, local = self._where[name]
        return [self._reader.ranks[tp, rank][key][local] for tp in range(self._reader.tensor_parallel_size)]


def _run_arguments(path: Path, allow_pickle: bool) -> dict[str, Any]:
    """Reads the arguments of a ``torch_dist`` checkpoint, from our training loop's JSON or Megatron-LM's common values.

    Raises:
        ConversionError: if they are not a JSON object or an :class:`argparse.Namespace`.
    """
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

# SPDX-License-Identifier: Apache-2.0
"""Reader of Hugging Face models as Megatron's tensors, checked against their own ``config.json``."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ...models.architecture import Architecture
from ...models.from_arguments import arguments_of
from ...quantization import WEIGHT_DTYPES
from ...quantization.record import QuantizerRecord
from ..quantizer.fuse import fused_group
from ..storage.hf_reader import HfReader
from ..storage.reader import (
    CACHED_BYTES,
    ConversionError,
    TensorInfo,
    TensorReader,
    cast,
    check_finite,
    dtype_name,
    refuse_mistakes,
)
from ..storage.torch_file import Scratch
from ..tensor_map import MegatronTensor, join, megatron_tensors, part_shapes, to_megatron
from .config import architecture_of, read_config
from .remote_code import read_record

_TIED = "model.embed_tokens.weight", "lm_head.weight"
# Old Llama checkpoints contain these constants, which are computed from config.json.
_COMPUTED = "rotary_emb.inv_freq"


@dataclass
class HfModel:
    """A Hugging Face model that is read as Megatron's tensors, checked against its own ``config.json``.

    Attributes:
        reader: the reader of its files.
        architecture: the architecture that its ``config.json`` describes.
        tensors: the Megatron tensors that it is converted to.
        dtype: the dtype to convert to, or None to keep each tensor's own.
        record: the quantizer record with Megatron's module names, or None.
    """

    reader: TensorReader
    architecture: Architecture
    tensors: list[MegatronTensor]
    dtype: torch.dtype | None
    record: QuantizerRecord | None
    _scratch: Scratch = field(default_factory=Scratch, init=False, repr=False)

    def dtype_of(self, tensor: MegatronTensor) -> torch.dtype:
        """Returns the dtype of a Megatron tensor as written."""
        return self.dtype or self.reader.tensors()[tensor.parts[0]].dtype

    def info(self, tensor: MegatronTensor, rows: int) -> TensorInfo:
        """Returns the shape and dtype of a Megatron tensor as written, with a vocabulary padded to ``rows``."""
        shape = (rows, *tensor.shape[1:]) if tensor.kind == "vocab" else tensor.shape
        return TensorInfo(shape, self.dtype_of(tensor))

    def read(self, tensor: MegatronTensor, rank: int = 0, size: int = 1) -> torch.Tensor:
        """Returns the shard of a Megatron tensor, not of a vocabulary, on one of ``size`` tensor-parallel ranks.

        The result is a view of a file, or of memory that the next call reuses.

        Raises:
            ConversionError: if a value is NaN or infinite, or does not fit the dtype to write.
        """
        parts, dtype = self._parts(tensor, rank, size), self.dtype_of(tensor)
        if len(parts) == 1 and parts[0].dtype == dtype and parts[0].is_contiguous():
            check_finite(tensor.parts[0], parts[0])
            return parts[0]
        shape = (sum(map(len, parts)), *parts[0].shape[1:])
        whole, row = self._scratch.take(shape, dtype), 0
        for block in self.blocks(tensor, rank, size):
            whole[row : row + len(block)] = block
            row += len(block)
        return whole

    def blocks(self, tensor: MegatronTensor, rank: int = 0, size: int = 1) -> Iterator[torch.Tensor]:
        """Yields the same shard as :meth:`read` in consecutive blocks of rows."""
        parts = self._parts(tensor, rank, size)
        for number, piece in enumerate(join(tensor, parts, self.architecture.kv_channels)):
            for rows in TensorInfo(tuple(piece.shape), piece.dtype).row_slices(CACHED_BYTES):
                check_finite(tensor.parts[number % len(parts)], piece[rows])
                yield self._cast(tensor, piece[rows])

    def _parts(self, tensor: MegatronTensor, rank: int, size: int) -> list[torch.Tensor]:
        """Returns a rank's shards of the Hugging Face tensors of a Megatron tensor, as views of the files."""
        parts = []
        for name, rows in zip(tensor.parts, tensor.rows, strict=True):
            index: tuple[slice, ...] = ()
            if tensor.kind == "row":
                index = (slice(None), _share(tensor.shape[1], rank, size))
            elif tensor.kind != "replicated":
                # Each rank has its own heads of q, k and v, and its own channels of gate and up.
                index = (_share(rows, rank, size),)
            parts.append(self.reader.read(name, index))
        return parts

    def read_rows(self, tensor: MegatronTensor, start: int, stop: int) -> torch.Tensor:
        """Returns rows of a vocabulary tensor, with zeros for the padding beyond the vocabulary."""
        (name,) = tensor.parts
        rows = self.reader.read(name, (slice(start, min(stop, tensor.shape[0])),))
        check_finite(name, rows)
        missing = stop - max(start, tensor.shape[0])
        if missing > 0:
            rows = torch.cat((rows, rows.new_zeros(missing, tensor.shape[1])))
        return self._cast(tensor, rows)

    def _cast(self, tensor: MegatronTensor, whole: torch.Tensor) -> torch.Tensor:
        fused = self.record is not None and self.record.state == "fused" and tensor.module in self.record.modules
        return cast(tensor.name, whole, self.dtype_of(tensor), exactly=fused)


def open_hf_model(directory: Path, dtype: torch.dtype | None, allow_pickle: bool) -> HfModel:
    """Opens a model directory and checks that it contains exactly the tensors that its ``config.json`` describes.

    Raises:
        ConversionError: if a tensor is missing, unexpected or of another shape or dtype; the message lists the tensors.
    """
    architecture = architecture_of(read_config(directory))
    arguments_of(architecture)
    reader = HfReader(directory, allow_pickle)
    refuse_mistakes(
        f"{directory} does not hold the model that its config.json describes", mistakes(reader, architecture)
    )
    tensors = megatron_tensors(architecture)
    found = read_record(directory)
    model = HfModel(reader, architecture, tensors, dtype, None if found is None else to_megatron(found, tensors))
    _check_dtypes(model)
    return model


def mistakes(reader: TensorReader, architecture: Architecture) -> list[str]:
    """Describes the tensors of a model that are missing, have another shape, are left over, or are tied but differ."""
    infos, expected = reader.tensors(), part_shapes(megatron_tensors(architecture))
    wrong = [f"{name}: missing" for name in expected if name not in infos]
    wrong += [
        f"{name}: shape {list(infos[name].shape)}, config.json says {list(shape)}"
        for name, shape in expected.items()
        if name in infos and infos[name].shape != shape
    ]
    for name in infos:
        if architecture.tied and name == _TIED[1]:
            if not _equal(reader, *_TIED):
                wrong.append("config.json ties the embeddings, and lm_head.weight differs from embed_tokens.weight")
        elif name not in expected and not name.endswith(_COMPUTED):
            wrong.append(f"{name}: not part of the model that config.json describes")
    return wrong


def _equal(reader: TensorReader, one: str, other: str) -> bool:
    infos = reader.tensors()
    return infos.get(one) == infos[other] and all(
        torch.equal(reader.read(one, (rows,)), reader.read(other, (rows,))) for rows in infos[other].row_slices()
    )


def _share(length: int, rank: int, size: int) -> slice:
    return slice(rank * length // size, (rank + 1) * length // size)


def _check_dtypes(model: HfModel) -> None:
    """Raises if tensors that Megatron stores in one tensor have several dtypes, or latent weights a wrong one.

    ``torch_dist`` stacks layers, and one Megatron tensor is made of several Hugging Face tensors.
    """
    by_name: dict[str, set[torch.dtype]] = {}
    for tensor in model.tensors:
        by_name.setdefault(tensor.suffix, set()).update(model.reader.tensors()[part].dtype for part in tensor.parts)
    mixed = [name for name, dtypes in by_name.items() if len(dtypes) > 1]
    if mixed and model.dtype is None:
        raise ConversionError(
            f"{', '.join(mixed)} come in several dtypes, which Megatron stores in one tensor: choose one with --dtype"
        )
    if model.record is None or model.record.state != "latent":
        return
    latent = getattr(torch, model.record.latent_dtype)
    for tensor in model.tensors:
        if tensor.module in model.record.modules and model.dtype_of(tensor) != latent:
            raise ConversionError(
                f"{tensor.module}: training quantized its weight as {model.record.latent_dtype}, and as "
                f"{dtype_name(model.dtype_of(tensor))} it would be quantized to something else: "
                f"give --dtype {model.record.latent_dtype}"
            )


def checked_record(model: HfModel) -> QuantizerRecord | None:
    """Returns the quantizer record of a model, with Megatron's module names, checked against its weights.

    If there is no record but weights are already ternary, a record is made from them. None for ordinary weights.

    Raises:
        ConversionError: if the record contradicts the weights, or only some parts of one Megatron tensor are ternary.
    """
    record = model.record
    groups = {}
    for tensor in filter(lambda t: t.quantizable, model.tensors):
        recorded = record is not None and tensor.module in record.modules
        space = record.config_of(tensor.module).space if record is not None and recorded else "ternary"
        if (group := _fused_group(model, tensor, space)) is not None:
            groups[tensor.module] = group
    if record is None:
        if not groups:
            return None
        print("the weights are ternary already (fused): recorded so, and not to be trained as latents")
        row = {t.module: t.shape[1] for t in model.tensors if t.kind == "row"}
        shards = max((row[m] // g for m, g in groups.items() if m in row and g != -1), default=1)
        columns = any(g != -1 for m, g in groups.items() if m not in row)
        linear = next(t for t in model.tensors if t.quantizable)
        dtype = dtype_name(model.dtype_of(linear))
        modules = {module: {"group_size": group} for module, group in groups.items()}
        return QuantizerRecord("fused", "ternary", 1e-5, dtype, 1 if columns else shards, 16, modules)
    quantized = [t for t in model.tensors if t.module in record.modules]
    # An all-zero weight counts as latent and as fused.
    zero = {t.module for t in quantized if t.module in groups and not any(model.reader.read(p).any() for p in t.parts)}
    wrong = [t.module for t in quantized if (record.state == "latent") == (t.module in groups) and t.module not in zero]
    if wrong:
        what = "ternary already" if record.state == "latent" else "not ternary"
        raise ConversionError(
            f"the quantizer record says {record.state}, and {wrong[0]} ({len(wrong)} in all) is {what}: take the "
            "record that belongs to these weights"
        )
    return record


def _fused_group(model: HfModel, tensor: MegatronTensor, space: str) -> int | None:
    """Returns the smallest group size among the parts of a tensor that is already quantized, or None if it is not.

    Raises:
        ConversionError: if only some of the parts are quantized, or a dtype is not supported.
    """
    found = {}
    for name in tensor.parts:
        weight = model.reader.read(name)
        if weight.dtype not in WEIGHT_DTYPES:
            raise ConversionError(f"{name} is {weight.dtype}: weights in fp32, bf16 and fp16 can be converted")
        try:
            size = fused_group(name, weight, space)
        except ValueError as error:
            raise ConversionError(str(error)) from None
        if size is not None:
            found[name] = size
    if not found:
        return None
    if len(found) < len(tensor.parts):
        raise ConversionError(
            f"{', '.join(found)} is ternary already and the rest of {tensor.module} is not: is this a damaged export?"
        )
    return min(found.values(), key=lambda size: tensor.shape[1] if size == -1 else size)

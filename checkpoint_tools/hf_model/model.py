# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face model as the tensors that Megatron wants, checked against its own ``config.json``."""

from dataclasses import dataclass
from pathlib import Path

import torch

from ...models.architecture import Architecture
from ...models.from_arguments import arguments_of
from ...quantization import WEIGHT_DTYPES, fused_group_size
from ...quantization.record import QuantizerRecord
from ..record_map import to_megatron
from ..storage.hf_reader import HfReader
from ..storage.reader import ConversionError, TensorInfo, TensorReader, cast, check_finite
from ..tensor_map import MegatronTensor, join, megatron_tensors
from .config import architecture_of, read_config
from .remote_code import read_record

_BLOCK = 2**26
# Old Llama checkpoints hold these constants, which are computed from config.json.
_COMPUTED = "rotary_emb.inv_freq"


@dataclass
class HfModel:
    """A Hugging Face model, checked against its own ``config.json``.

    Attributes:
        reader: its files.
        architecture: of its ``config.json``.
        tensors: what it becomes.
        dtype: to write, or None to keep each tensor's own.
        record: of its quantizer, by Megatron's module names, or None.
    """

    reader: TensorReader
    architecture: Architecture
    tensors: list[MegatronTensor]
    dtype: torch.dtype | None
    record: QuantizerRecord | None

    def dtype_of(self, tensor: MegatronTensor) -> torch.dtype:
        """Of the written tensor."""
        return self.dtype or self.reader.tensors()[tensor.parts[0]].dtype

    def read(self, tensor: MegatronTensor, rank: int = 0, size: int = 1) -> torch.Tensor:
        """A Megatron tensor of a layer, or what one of ``size`` tensor-parallel ranks holds of it.

        Raises:
            ConversionError: it holds NaN or infinity.
        """
        parts = []
        for name, rows in zip(tensor.parts, tensor.rows, strict=True):
            index: tuple[slice, ...] = ()
            if tensor.kind == "row":
                index = (slice(None), _share(tensor.shape[1], rank, size))
            elif tensor.kind != "replicated":
                # Each rank has its heads of q, k and v, and its channels of gate and up.
                index = (_share(rows, rank, size),)
            parts.append(self.reader.read(name, index))
            check_finite(name, parts[-1])
        return self._cast(tensor, join(tensor, parts, self.architecture.kv_channels))

    def read_rows(self, tensor: MegatronTensor, start: int, stop: int) -> torch.Tensor:
        """Rows of a vocabulary tensor; zeros beyond the vocabulary."""
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
    """Opens a model directory and checks that it holds what its ``config.json`` describes, and nothing else.

    Raises:
        ConversionError: lists every missing, unexpected or misshapen tensor.
    """
    config = read_config(directory)
    architecture = architecture_of(config)
    arguments_of(architecture)
    reader = HfReader(directory, allow_pickle)
    infos = reader.tensors()
    tensors = megatron_tensors(architecture)
    expected = {
        name: TensorInfo((rows, *t.shape[1:]), torch.float32)
        for t in tensors
        for name, rows in zip(t.parts, t.rows, strict=True)
    }
    wrong = [f"{name}: missing" for name in expected if name not in infos]
    wrong += [
        f"{name}: shape {list(infos[name].shape)}, config.json says {list(info.shape)}"
        for name, info in expected.items()
        if name in infos and infos[name].shape != info.shape
    ]
    leftover = [name for name in infos if name not in expected and not name.endswith(_COMPUTED)]
    if architecture.tied and "lm_head.weight" in leftover:
        leftover.remove("lm_head.weight")
        _check_tied(reader)
    wrong += [f"{name}: not part of the model that config.json describes" for name in leftover]
    if wrong:
        shown = "\n  ".join([*wrong[:20], *([f"... and {len(wrong) - 20} more"] if len(wrong) > 20 else [])])
        raise ConversionError(f"{directory} does not hold the model that its config.json describes:\n  {shown}")
    found = read_record(directory)
    model = HfModel(reader, architecture, tensors, dtype, None if found is None else to_megatron(found, tensors))
    _check_dtypes(model)
    return model


def _share(length: int, rank: int, size: int) -> slice:
    return slice(rank * length // size, (rank + 1) * length // size)


def _check_dtypes(model: HfModel) -> None:
    """``torch_dist`` stacks layers, and one Megatron tensor is made of several: these must have one dtype."""
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
                f"{str(model.dtype_of(tensor)).removeprefix('torch.')} it would be quantized to something else: "
                f"give --dtype {model.record.latent_dtype}"
            )


def _check_tied(reader: TensorReader) -> None:
    names = "model.embed_tokens.weight", "lm_head.weight"
    infos = [reader.tensors()[name] for name in names]
    rows = max(1, _BLOCK // max(1, infos[0].nbytes // max(1, infos[0].shape[0])))
    same = infos[0] == infos[1]
    for start in range(0, infos[0].shape[0], rows):
        piece = (slice(start, start + rows),)
        same = same and torch.equal(reader.read(names[0], piece), reader.read(names[1], piece))
    if not same:
        raise ConversionError("config.json ties the embeddings, and lm_head.weight differs from embed_tokens.weight")


def checked_record(model: HfModel) -> QuantizerRecord | None:
    """The record of a model, by Megatron's module names, held against its weights; made of them where they are ternary
    already and say so nowhere. None for ordinary weights.

    Raises:
        ConversionError: the record contradicts the weights, or one Megatron tensor would be half ternary.
    """
    groups = {t.module: group for t in model.tensors if t.quantizable and (group := _fused_group(model, t)) is not None}
    record = model.record
    if record is None:
        if not groups:
            return None
        print("the weights are ternary already (fused): recorded so, and not to be trained as latents")
        row = {t.module: t.shape[1] for t in model.tensors if t.kind == "row"}
        shards = max((row[m] // g for m, g in groups.items() if m in row and g != -1), default=1)
        columns = any(g != -1 for m, g in groups.items() if m not in row)
        linear = next(t for t in model.tensors if t.quantizable)
        dtype = str(model.dtype_of(linear)).removeprefix("torch.")
        modules = {module: {"group_size": group} for module, group in groups.items()}
        return QuantizerRecord("fused", "ternary", 1e-5, dtype, 1 if columns else shards, 16, modules)
    quantized = [t for t in model.tensors if t.module in record.modules]
    # An all-zero weight is both.
    zero = {t.module for t in quantized if t.module in groups and not any(model.reader.read(p).any() for p in t.parts)}
    wrong = [t.module for t in quantized if (record.state == "latent") == (t.module in groups) and t.module not in zero]
    if wrong:
        what = "ternary already" if record.state == "latent" else "not ternary"
        raise ConversionError(
            f"the quantizer record says {record.state}, and {wrong[0]} ({len(wrong)} in all) is {what}: take the "
            "record that belongs to these weights"
        )
    return record


def _fused_group(model: HfModel, tensor: MegatronTensor) -> int | None:
    """The group size of weights that are ternary already, None for others; the smallest of the parts."""
    found = {name: size for name in tensor.parts if (size := _group_of(name, model.reader.read(name))) is not None}
    if not found:
        return None
    if len(found) < len(tensor.parts):
        raise ConversionError(
            f"{', '.join(found)} is ternary already and the rest of {tensor.module} is not: is this a damaged export?"
        )
    return min(found.values(), key=lambda size: tensor.shape[1] if size == -1 else size)


def _group_of(name: str, weight: torch.Tensor) -> int | None:
    if weight.dtype not in WEIGHT_DTYPES:
        raise ConversionError(f"{name} is {weight.dtype}: weights in fp32, bf16 and fp16 can be converted")
    return fused_group_size(weight)

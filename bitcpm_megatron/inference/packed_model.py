# SPDX-License-Identifier: Apache-2.0
"""Loading of our compressed-tensors exports as Transformers models whose ternary linears stay packed in memory."""

import importlib.util
import logging
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..files import FileError, check_digests, is_inside, read_digests, read_json
from ..quantization import effective_group, pack, packed_size
from ..quantization.record import QuantizerRecord
from .packed_linear import PackedTernaryLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)
_MADE_BY = "export_packed.py --format compressed-tensors --bits 2"
_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = (torch.bfloat16, torch.float32)
_BITS, _LOWEST = 2, 2
"""The bits of a code in the format, and the number that it adds to a code."""
_ELEMENTS = 1 << 18
"""The number of a weight's codes that are rearranged at a time."""


def load_packed_model(
    directory: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> "PreTrainedModel":
    """Opens an export of ``export_packed.py --format compressed-tensors`` with codes of 2 bits.

    The model has Transformers' own class, so that ``generate``, the cache, LongRoPE and multipliers are those of
    Transformers; its ternary linears are :class:`~.packed_linear.PackedTernaryLinear`. Tensors are read one at a time,
    and nothing is expanded: memory holds the packed bytes, and everything that is not ternary in ``dtype``. Files are
    first compared with their digests, if there are any. Code in the directory is never run.

    Args:
        directory: the directory of the export.
        device: the device to compute on.
        dtype: the dtype of activations, embeddings, norms and output layer: bfloat16 or float32. Scales stay bf16.

    Returns:
        The model, in evaluation mode, with no parameter that requires a gradient.

    Raises:
        FileError: if this is no such export, a file is damaged, or the tensors are not those of the model: one is
            missing, left over, of another shape, or not ternary.
        ValueError: if another dtype is requested, or Transformers or Accelerate is not installed.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype}: packed models compute in bfloat16 or float32")
    for package in ("transformers", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"packed models need the package {package}: pip install 'bitcpm_megatron[hf]'")
    directory, device = Path(directory), torch.device(device)
    record = _checked_record(directory)
    check_model_files(directory)
    if record.activation_bits != 16:
        logger.warning(
            "%s: training also quantized activations to %d bits, which this model does not, as stock clients do not",
            directory,
            record.activation_bits,
        )
    model = _empty_model(directory, dtype)
    with ExitStack() as stack:
        tensors = _Tensors(directory, stack)
        _put_linears(model, tensors, record, directory, device)
        _put_others(model, tensors, directory, device, dtype)
        if left := sorted(tensors.names()):
            raise FileError(f"{directory}: the model has no place for {_some(left)}: export it again by {_MADE_BY}")
    model.tie_weights()
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    if model.config.tie_word_embeddings and (
        model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    ):
        raise FileError(f"{directory}: config.json ties the output layer to the embeddings, and Transformers did not")
    return model.eval().requires_grad_(False)


def check_model_files(directory: Path) -> None:
    """Compares the files of a model with their digests, if there are any, except for its card, which may be edited.

    Raises:
        DigestError: if files are damaged; the message names them.
    """
    check_digests(directory, [name for name in read_digests(directory) or {} if not name.endswith(".md")])


class _Tensors:
    """The tensors of an export's safetensors files; each can be taken once."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        from safetensors import SafetensorError, safe_open

        self._directory = directory
        self._files: dict[str, Any] = {}
        for name, expected in _files(directory).items():
            path = directory / name
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise FileError(f"{path} cannot be read ({error}): copy it again") from None
            found = set(file.keys())
            if expected is not None and found != expected or found & self._files.keys():
                raise FileError(f"{path}: other tensors than {_INDEX} says: index and shards are not of one model")
            self._files.update(dict.fromkeys(found, file))

    def names(self) -> set[str]:
        """Returns the names of the tensors that have not been taken."""
        return set(self._files)

    def take(self, name: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """Returns a tensor as a view of its file.

        Raises:
            FileError: if there is no tensor of this name and shape.
        """
        if name not in self._files:
            raise FileError(f"{self._directory}: there is no tensor {name}: export the model again by {_MADE_BY}")
        tensor = self._files.pop(name).get_tensor(name)
        if shape is not None and tuple(tensor.shape) != shape:
            raise FileError(
                f"{self._directory}: {name} has the shape {tuple(tensor.shape)}, and the model that config.json "
                f"describes has {shape}"
            )
        return tensor


def _files(directory: Path) -> Mapping[str, set[str] | None]:
    """Returns the safetensors files of an export, each with its tensors by the index; None for a file without index."""
    if (directory / _FILE).is_file():
        return {_FILE: None}
    index = directory / _INDEX
    if not index.is_file():
        raise FileError(f"{directory}: no weights: neither {_FILE} nor {_INDEX} is there")
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise FileError(f"{index}: not an index of shards, a weight_map of names and files: copy it again")
    found: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        if not is_inside(name):
            raise FileError(f"{index}: {tensor} lies outside the model, in {name!r}: do not load it")
        found.setdefault(name, set()).add(tensor)
    return found


def _checked_record(directory: Path) -> QuantizerRecord:
    """Returns the quantizer record of an export, after checking that it is ours and can be opened."""
    if not (directory / "config.json").is_file():
        raise FileError(f"{directory} holds no model (config.json): give a directory of {_MADE_BY}")
    config = read_json(directory / "config.json")
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    record = QuantizerRecord.read(directory)
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "compressed-tensors":
        raise FileError(f"{directory} is no packed export: make one by {_MADE_BY}")
    if record is None or record.state != "packed":
        raise FileError(
            f"{directory} has no record of a packed ternary model: it is of another tool, or was copied in part. "
            f"Make an export by {_MADE_BY}, or load it by Transformers, which expands it"
        )
    groups = quantization.get("config_groups")
    bits = {
        group["weights"]["num_bits"] if isinstance(group, dict) and isinstance(group.get("weights"), dict) else None
        for group in (groups.values() if isinstance(groups, dict) else [None])
    }
    spaces = {record.config_of(module).space for module in record.modules}
    if bits != {_BITS} or quantization.get("format") != "pack-quantized" or spaces != {"ternary"}:
        said = " and ".join(sorted(str(count) for count in bits))
        raise FileError(f"{directory} has codes of {said} bits, and ternary ones of 2 are read: use {_MADE_BY}")
    return record


def _empty_model(directory: Path, dtype: torch.dtype) -> "PreTrainedModel":
    """Builds Transformers' model of the configuration, with parameters that have no memory."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        del config.quantization_config
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        if (directory / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # Unexpected keys and values in a file raise errors of any type.
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise FileError(
            f"{directory}: Transformers cannot make a causal language model of its configuration: {said[0]}"
        ) from error
    return model


def _put_linears(
    model: "PreTrainedModel", tensors: _Tensors, record: QuantizerRecord, directory: Path, device: torch.device
) -> None:
    found = dict(model.named_modules())
    for name in record.modules:
        linear = found.get(name)
        if not isinstance(linear, torch.nn.Linear) or linear.bias is not None:
            raise FileError(f"{directory}: the model of config.json has no linear {name} without a bias")
        rows, columns = linear.weight.shape
        if columns * _BITS % 32:
            raise FileError(f"{directory}: {name} has rows of {columns}, which words of 16 codes do not fill")
        words = tensors.take(f"{name}.weight_packed", (rows, columns * _BITS // 32))
        scales = tensors.take(f"{name}.weight_scale")
        if tensors.take(f"{name}.weight_shape", (2,)).tolist() != [rows, columns]:
            raise FileError(f"{directory}: {name}.weight_shape is not {rows} x {columns}, as config.json has it")
        group = effective_group(columns, record.config_of(name).group_size)
        if tuple(scales.shape) != (rows, columns // group):
            raise FileError(
                f"{directory}: {name} has scales of shape {tuple(scales.shape)}, and the quantizer record groups of "
                f"{group}: they are not of one model"
            )
        where = f"{directory}: {name}"
        packed = PackedTernaryLinear(_repacked(words, where, device), _bf16(scales, where, device), columns)
        model.set_submodule(name, packed)


def _put_others(
    model: "PreTrainedModel", tensors: _Tensors, directory: Path, device: torch.device, dtype: torch.dtype
) -> None:
    tied = model.get_output_embeddings().weight if model.config.tie_word_embeddings else None
    for path, module in model.named_modules():
        for own, parameter in list(module.named_parameters(recurse=False)):
            if parameter is tied and module is model.get_output_embeddings():
                continue
            name = f"{path}.{own}" if path else own
            tensor = tensors.take(name, tuple(parameter.shape))
            if not tensor.is_floating_point():
                raise FileError(f"{directory}: {name} is {tensor.dtype}: export the model again by {_MADE_BY}")
            # A copy, because a view of the file would change, or fail, together with the file.
            copied = tensor.to(device=device, dtype=dtype, copy=True)
            module.register_parameter(own, torch.nn.Parameter(copied, requires_grad=False))


def _repacked(words: torch.Tensor, where: str, device: torch.device) -> torch.Tensor:
    """Rearranges codes from the format's order, int32 ``[rows, in / 16]``, to that of :mod:`..quantization.packing`."""
    if words.dtype != torch.int32:
        raise FileError(f"{where}.weight_packed is {words.dtype}, not int32: export the model again by {_MADE_BY}")
    columns = words.shape[1] * 32 // _BITS
    packed = torch.empty(words.shape[0], packed_size(columns), dtype=torch.uint8)
    rows = max(1, _ELEMENTS // columns)
    for piece, target in zip(words.split(rows), packed.split(rows), strict=True):
        fields = piece.contiguous().view(torch.uint8).unsqueeze(-1) >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)
        codes = fields.bitwise_and_(3).view(torch.int8).flatten(1).sub_(_LOWEST)
        try:
            target.copy_(pack(codes))
        except ValueError as error:
            raise FileError(f"{where}.weight_packed holds what is not ternary: {error}") from None
    return packed.to(device)


def _bf16(scales: torch.Tensor, where: str, device: torch.device) -> torch.Tensor:
    stored = scales.to(torch.bfloat16)
    if not torch.equal(stored.to(scales.dtype), scales) or not bool(stored.isfinite().all()):
        raise FileError(f"{where}.weight_scale holds what bf16 does not, and ternary training makes bf16 scales alone")
    return stored.to(device, copy=True)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

# SPDX-License-Identifier: Apache-2.0
"""Plan of ``qat_convert.py``: which weights it quantizes, and how, decided before anything is written."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from tqdm import tqdm

from ...quantization import QuantizerConfig, effective_group
from ...quantization.record import QuantizerRecord
from ..storage.reader import ConversionError, TensorReader, check_finite, dtype_name, listed
from ..tensor_map import PROJECTION
from .fuse import detected_group

_ADAPTER = re.compile(r"(^|\.)(base_layer|lora_\w+)(\.|$)")
NO_MERGE = (
    "they cannot become part of a ternary weight, for the latent weight plus an adapter is quantized to another weight "
    "than was trained. Fuse the latent export that they were trained on, and load the adapter beside it"
)
_ROW_PARALLEL = ("o_proj", "down_proj")


@dataclass(frozen=True)
class Plan:
    """Plan of the fusing of a model's weights.

    Attributes:
        quantized: tensor name -> quantizer, for every weight that is ternary in the output.
        fused: whether these weights are already ternary in the input, so that nothing is changed.
        record: the quantizer record of the output.
        recorded: whether the input has a quantizer record, too.
    """

    quantized: Mapping[str, QuantizerConfig]
    fused: bool
    record: QuantizerRecord
    recorded: bool


def make_plan(
    reader: TensorReader,
    record: QuantizerRecord | None,
    group_size: int | None,
    whole: bool,
) -> Plan:
    """Decides which weights are quantized, and how; reads the weights to detect those that are already quantized.

    Args:
        reader: the reader of the model, or of one shard of it.
        record: the quantizer record of the input, with Hugging Face's module names; None if it has none.
        group_size: the group size given on the command line, or None.
        whole: whether ``reader`` has the whole model, not only one shard of it.

    Raises:
        ConversionError: if record, command line and weights contradict each other.
    """
    tensors = reader.tensors()
    adapters = [name for name in tensors if _ADAPTER.search(name)]
    if adapters:
        raise ConversionError(f"there are adapters ({listed(adapters)}): {NO_MERGE}")
    if record is None:
        wanted = _by_name(reader, -1 if group_size is None else group_size)
    else:
        wanted = _by_record(reader, record, whole)
        _check_group_size(reader, record, wanted, group_size)
    groups = {name: _effective(reader, name, config) for name, config in wanted.items()}
    found = _found(reader, wanted)
    fused = {name: group for name, group in found.items() if group}
    latent = [name for name, group in found.items() if group is None]
    if latent and fused:
        for name in latent:
            check_finite(name, reader.read(name))
        raise ConversionError(
            f"{len(fused)} projections are ternary already and {len(latent)} are not: this is no model of one kind. "
            f"Ternary: {listed(fused)}. Latent: {listed(latent)}"
        )
    other = {name: group for name, group in fused.items() if group % groups[name]}
    if record is not None:
        if latent and record.state != "latent":
            raise ConversionError(
                f"the quantizer record says that the weights are fused, but these are not ternary: {listed(latent)}. "
                "If they were trained further, start again from the latent checkpoint: fused weights must not be "
                "trained"
            )
        if other:
            lines = (f"{name} is ternary in groups of {group}, not {groups[name]}" for name, group in other.items())
            raise ConversionError(f"the quantizer record contradicts the weights: {listed(lines)}")
        return Plan(wanted, bool(fused), replace(record, state="fused"), True)
    shards = 1
    if other:
        # Without a record, the group sizes found in the weights replace the default.
        groups.update(other)
        columns = {name: tensors[name].shape[1] for name in wanted}
        wanted = {n: replace(c, group_size=-1 if groups[n] == columns[n] else groups[n]) for n, c in wanted.items()}
        ratios = {columns[n] // groups[n] for n in wanted if _is_row_parallel(n)}
        shards = ratios.pop() if len(ratios) == 1 else 1
    modules = {n.removesuffix(".weight"): {"group_size": c.group_size} for n, c in wanted.items()}
    dtype, eps = dtype_name(tensors[next(iter(wanted))].dtype), QuantizerConfig().eps
    return Plan(wanted, bool(fused), QuantizerRecord("fused", "ternary", eps, dtype, shards, 16, modules), False)


def _found(reader: TensorReader, wanted: Mapping[str, QuantizerConfig]) -> dict[str, int | None]:
    """Returns the result of :func:`~.fuse.detected_group` for every weight."""
    bar = tqdm(wanted.items(), "checking", unit="tensor", disable=None)
    return {name: detected_group(reader, name, config.space) for name, config in bar}


def _by_name(reader: TensorReader, group_size: int) -> dict[str, QuantizerConfig]:
    names = list(filter(PROJECTION.fullmatch, reader.tensors()))
    if not names:
        raise ConversionError(
            "there is no *.self_attn.{q,k,v,o}_proj.weight and no *.mlp.{gate,up,down}_proj.weight to quantize: is "
            "this a model of the Llama, MiniCPM or Granite family?"
        )
    return dict.fromkeys(names, QuantizerConfig(group_size=group_size))


def _by_record(reader: TensorReader, record: QuantizerRecord, whole: bool) -> dict[str, QuantizerConfig]:
    tensors = reader.tensors()
    if not record.modules:
        raise ConversionError("the quantizer record lists no modules: nothing of this model is ternary")
    missing = [module for module in record.modules if f"{module}.weight" not in tensors]
    if missing and (whole or len(missing) == len(record.modules)):
        raise ConversionError(
            f"the quantizer record lists modules that are not there: {listed(missing)}. Record and weights are not of "
            "one model"
        )
    try:
        return {
            f"{module}.weight": record.config_of(module) for module in record.modules if f"{module}.weight" in tensors
        }
    except (TypeError, ValueError) as error:
        raise ConversionError(f"the quantizer record: {error}") from None


def _check_group_size(
    reader: TensorReader, record: QuantizerRecord, wanted: Mapping[str, QuantizerConfig], asked: int | None
) -> None:
    """Raises if the group size asked for contradicts the record.

    With group size -1, a row of a row-parallel weight has as many groups as there are row-parallel shards.
    """
    if asked is None:
        return
    lines = []
    for name, config in wanted.items():
        columns = reader.tensors()[name].shape[-1]
        group = columns if config.group_size == -1 else config.group_size
        expected = columns if asked == -1 else asked
        if asked == -1 and _is_row_parallel(name):
            expected = columns // record.row_parallel_shards
        if group != expected:
            lines.append(f"{name} was trained in groups of {group}, not {expected}")
    if lines:
        raise ConversionError(
            f"--group_size {asked} contradicts the quantizer record: {listed(lines)}. Leave --group_size out: the "
            "weights that were trained are those of the record"
        )


def _effective(reader: TensorReader, name: str, config: QuantizerConfig) -> int:
    try:
        return effective_group(reader.tensors()[name].shape[-1], config.group_size)
    except (ValueError, IndexError) as error:
        raise ConversionError(f"{name}: {error}") from None


def _is_row_parallel(name: str) -> bool:
    return name.removesuffix(".weight").rpartition(".")[2] in _ROW_PARALLEL

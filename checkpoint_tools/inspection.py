# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint holds, whatever it is: its facts, its weights one by one, and where it contradicts itself."""

import contextlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.safe_load import load_without_code
from ..files import FileError
from ..models.architecture import Architecture, ArchitectureError
from ..models.arguments import architecture_of as architecture_of_arguments
from ..quantization import QuantizerConfig, effective_group, fused_group_size, quantize
from ..quantization.record import FILE_NAME, SCALE_SUFFIX, QuantizerRecord, RecordError
from ..training.checkpoint_directory import RELEASE, TRACKER
from .hf_config import architecture_of, model_type_of, read_config
from .hf_files import open_tensors
from .latent_export import read_record
from .megatron_checkpoint import MegatronCheckpoint, locate, open_checkpoint
from .side_files import HF_DIRECTORY
from .tensors import ConversionError, TensorInfo, TensorReader
from .torch_dist import TorchDistReader
from .weights import EMBEDDING, MegatronTensor, megatron_tensors

_RANK = re.compile(r"mp_rank_(\d+)(?:_(\d+))?")
_LINEAR = re.compile(r"(.+\.)?(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight")
_OPTIMIZER = re.compile(r"(^|\.)optimizer\.")
# Constants that old Llama checkpoints hold beside the weights.
_COMPUTED = "rotary_emb.inv_freq"
# Small enough for the cache, and for the C library to use the same memory again for the next block.
_BLOCK_ELEMENTS = 1 << 17
_TIED = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Weight:
    """A tensor of the model.

    Attributes:
        name: of its module, with the layer number; by the names of the checkpoint.
        info: shape and dtype.
        linear: whether it is one of a layer's linears, which can be ternary.
        read: rows of it; all of them where it is linear.
        scales: saved beside it, bf16 ``[out, groups]``, or None.
        has_scales: whether there are some.
    """

    name: str
    info: TensorInfo
    linear: bool
    read: Callable[[slice], torch.Tensor]
    scales: Callable[[], torch.Tensor | None] = lambda: None
    has_scales: bool = False


@dataclass(frozen=True)
class Statistics:
    """What the values of a weight say.

    Attributes:
        state: ``fused`` (ternary times scale already), ``latent`` (the record says that it is to be quantized),
            ``full precision`` (the record leaves it out), ``ordinary`` (no record), ``not read``, or "" for what is
            never quantized.
        group_size: elements per scale along a row, -1 for the row; of a fused weight as its values show it, else as the
            record says, else -1; None where that does not apply.
        zeros: share of zeros in the ternary weight; of a weight that is not fused, in its quantization.
        scale_min: smallest scale; of a fused weight, of groups that are not all zero.
        scale_mean: mean of the scales.
        scale_max: largest scale.
    """

    state: str
    group_size: int | None = None
    zeros: float | None = None
    scale_min: float | None = None
    scale_mean: float | None = None
    scale_max: float | None = None


@dataclass
class Inspection:
    """What was found.

    Attributes:
        path: of the checkpoint meant: an iteration directory, a model directory or a file.
        format: ``torch_dist``, ``legacy``, ``huggingface``, ``safetensors`` or ``bin``.
        weights: of the model, in its order.
        iteration: a number, "release", or None.
        layout: parallel sizes, by name; empty where there are none.
        architecture: None where it is not known.
        about_architecture: the model type, or why the architecture is not known.
        padded_vocabulary: rows of the embedding as stored, or None.
        optimizer_state: whether it is there.
        record: the quantizer record, by the module names of the checkpoint, or None.
        digests: whether the files match their ``DIGESTS.json``; None where there is none.
        findings: contradictions.
    """

    path: Path
    format: str
    weights: list[Weight] = field(default_factory=list)
    iteration: int | str | None = None
    layout: dict[str, int] = field(default_factory=dict)
    architecture: Architecture | None = None
    about_architecture: str = ""
    padded_vocabulary: int | None = None
    optimizer_state: bool = False
    record: QuantizerRecord | None = None
    digests: bool | None = None
    findings: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Of the model's tensors as stored, without optimizer state."""
        return sum(w.info.nbytes for w in self.weights)

    @property
    def parameters(self) -> int:
        """Of the model; without padding of the vocabulary where the architecture is known."""
        if self.architecture is not None:
            return self.architecture.parameter_count()
        return sum(w.info.nbytes // w.info.dtype.itemsize for w in self.weights)

    def dtypes(self) -> dict[str, int]:
        """Bytes of each dtype."""
        found: Counter[str] = Counter()
        for weight in self.weights:
            found[str(weight.info.dtype).removeprefix("torch.")] += weight.info.nbytes
        return dict(found)

    def facts(self) -> dict[str, Any]:
        """Everything but the weights' values, as plain data."""
        a = self.architecture
        return {
            "path": str(self.path),
            "format": self.format,
            "iteration": self.iteration,
            "layout": self.layout or None,
            "architecture": None if a is None else asdict(a),
            "about_architecture": self.about_architecture,
            "parameters": self.parameters,
            "dtypes": self.dtypes(),
            "bytes": self.nbytes,
            "tied": None if a is None else a.tied,
            "padded_vocabulary": self.padded_vocabulary,
            "optimizer_state": self.optimizer_state,
            "quantizer": None if self.record is None else asdict(self.record),
            "digests": self.digests,
            "saved_scales": sum(w.has_scales for w in self.weights),
        }


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


def check_record(inspection: Inspection) -> None:
    """Adds findings about the quantizer record that need no tensor data."""
    record = inspection.record
    if record is None:
        return
    linears = {w.name: w for w in inspection.weights if w.linear}
    whole = inspection.format not in ("safetensors", "bin")
    unknown = sorted(set(record.modules) - set(linears))
    if unknown and whole:
        inspection.findings.append(
            f"the quantizer record names {_listed(unknown)}, which {'is' if len(unknown) == 1 else 'are'} no linear of "
            "this model"
        )
    other = [n for n, w in linears.items() if n in record.modules and _dtype(w) != record.latent_dtype]
    # Hugging Face trainers keep wider masters, and quantize them rounded to the recorded dtype.
    if other and record.state == "latent" and inspection.format in ("torch_dist", "legacy"):
        inspection.findings.append(
            f"the quantizer record says that {record.latent_dtype} weights were quantized, and {_listed(other)} "
            f"{'is' if len(other) == 1 else 'are'} {_dtype(linears[other[0]])}"
        )
    bare = [n for n, w in linears.items() if w.has_scales and n not in record.modules]
    if bare:
        inspection.findings.append(f"there are saved scales of {_listed(bare)}, which the quantizer record leaves out")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Keeps PyTorch to one thread: on blocks this small others do little but wait, and burn a core doing so."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def not_read(weight: Weight, record: QuantizerRecord | None) -> Statistics:
    """What is known of a weight without reading it."""
    if not weight.linear:
        return Statistics("")
    entry = None if record is None else record.modules.get(weight.name)
    return Statistics("not read", None if entry is None else entry.get("group_size"))


def statistics_of(weight: Weight, record: QuantizerRecord | None, findings: list[str]) -> Statistics:
    """Reads a weight, in blocks of rows.

    Args:
        weight: to read.
        record: of the checkpoint.
        findings: gets what contradicts record or scales, and tensors that are damaged.

    Returns:
        What its values say.
    """
    try:
        if not weight.linear:
            finite = all(_finite(block) for block in _blocks(weight.read, weight.info))
            if not finite:
                findings.append(f"{weight.name} holds NaN or infinity")
            return Statistics("")
        return _of_linear(weight, record, findings)
    except ValueError as error:
        findings.append(f"{weight.name}: {error}" if weight.name not in str(error) else str(error))
        return Statistics("not read")


def _of_linear(weight: Weight, record: QuantizerRecord | None, findings: list[str]) -> Statistics:
    name, columns = weight.name, weight.info.shape[1]
    # Once: of several tensor-parallel ranks this is a copy, of at most one tensor of one layer.
    whole = weight.read(slice(None))
    recorded = None if record is None or name not in record.modules else record.config_of(name)
    if recorded is not None:
        effective_group(columns, recorded.group_size)  # raises
    found = fused_group_size(whole)
    if found is not None:
        if recorded is not None and record.state == "latent":
            if whole.any():
                findings.append(f"{name} is ternary already (fused), and the quantizer record says latent")
        elif recorded is not None and effective_group(columns, found) % effective_group(columns, recorded.group_size):
            findings.append(
                f"{name} is ternary in groups of {effective_group(columns, found)}, the quantizer record says "
                f"{effective_group(columns, recorded.group_size)}"
            )
        return _of_fused(whole, found)
    if recorded is not None and record.state == "fused":
        findings.append(f"{name} is not ternary, and the quantizer record says fused")
    config = recorded or QuantizerConfig()
    scales = weight.scales()
    state = "ordinary" if record is None else "full precision" if recorded is None else "latent"
    if recorded is None and scales is not None:
        # No record: the scales themselves say how many groups there are.
        config = QuantizerConfig(group_size=columns // scales.shape[1] if scales.shape[1] > 1 else -1)
        state = "latent"
    dtype = (
        getattr(torch, record.latent_dtype, weight.info.dtype) if state == "latent" and record else weight.info.dtype
    )
    return _of_latent(weight, whole, dtype, config, scales, state, findings)


def _of_fused(whole: torch.Tensor, group_size: int) -> Statistics:
    zeros, scales = 0, []
    group = effective_group(whole.shape[1], group_size)
    for block in _row_blocks(whole):
        zeros += int((block == 0).sum())
        largest = block.abs().reshape(-1, group).amax(1).double()
        scales.append(largest[largest > 0])
    return Statistics("fused", group_size, zeros / whole.numel(), *_spread(scales))


def _of_latent(
    weight: Weight,
    whole: torch.Tensor,
    dtype: torch.dtype,
    config: QuantizerConfig,
    saved: torch.Tensor | None,
    state: str,
    findings: list[str],
) -> Statistics:
    groups = whole.shape[1] // effective_group(whole.shape[1], config.group_size)
    if saved is not None and (tuple(saved.shape) != (whole.shape[0], groups) or saved.dtype != torch.bfloat16):
        findings.append(
            f"{weight.name} has saved scales {list(saved.shape)}, {saved.dtype}; its weights and its groups need "
            f"{[whole.shape[0], groups]}, torch.bfloat16"
        )
        saved = None
    if saved is not None and not bool(((saved > 0) & saved.isfinite()).all()):
        findings.append(f"{weight.name} has saved scales that are not finite or not above 0")
        saved = None
    zeros, steps, start, used = 0, 0, 0, []
    for block in _row_blocks(whole):
        block = block.to(dtype)
        mine = None if saved is None else saved[start : start + block.shape[0]]
        start += block.shape[0]
        codes, scales = quantize(block, config)
        if mine is not None and not torch.equal(mine, scales):
            # Neighbouring bf16 values of one sign are neighbouring integers.
            steps = max(steps, int((mine.view(torch.int16).int() - scales.view(torch.int16).int()).abs().amax()))
            codes, scales = quantize(block, config, mine)
        zeros += int((codes == 0).sum())
        used.append(scales.double().flatten())
    # Another device may sum in another order, and is then one step off.
    if steps > 1:
        findings.append(
            f"{weight.name}: its saved scales are up to {steps} bf16 steps away from those of its weights: they belong "
            "to other weights, or to another group size"
        )
    spread = _spread(used)
    if not all(map(math.isfinite, spread)):
        findings.append(f"{weight.name} holds NaN or infinity")
        return Statistics(state, config.group_size)
    return Statistics(state, config.group_size, zeros / whole.numel(), *spread)


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
    _compare(found, reader)
    return found


def _compare(found: Inspection, reader: TensorReader) -> None:
    """Adds findings where the files do not hold what ``config.json`` describes."""
    infos = reader.tensors()
    expected = {
        name: (rows, *tensor.shape[1:])
        for tensor in megatron_tensors(found.architecture)
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
        if found.architecture.tied and name == _TIED[1]:
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
            lambda rows, name=name: reader.read(name, (rows,)),
        )
        for name, info in reader.tensors().items()
    ]


def _same(reader: TensorReader, one: str, other: str) -> bool:
    infos = reader.tensors()
    if one not in infos or infos[one] != infos[other]:
        return False
    pairs = zip(
        _blocks(lambda rows: reader.read(one, (rows,)), infos[one]),
        _blocks(lambda rows: reader.read(other, (rows,)), infos[other]),
        strict=True,
    )
    return all(torch.equal(a, b) for a, b in pairs)


def _blocks(read: Callable[[slice], torch.Tensor], info: TensorInfo) -> Iterator[torch.Tensor]:
    if not info.shape or 0 in info.shape:
        return
    rows = max(1, _BLOCK_ELEMENTS * info.shape[0] * info.dtype.itemsize // info.nbytes)
    for start in range(0, info.shape[0], rows):
        yield read(slice(start, min(start + rows, info.shape[0])))


def _row_blocks(whole: torch.Tensor) -> Iterator[torch.Tensor]:
    return _blocks(lambda rows: whole[rows], TensorInfo(tuple(whole.shape), whole.dtype))


def _finite(block: torch.Tensor) -> bool:
    # PyTorch computes nothing in 8-bit floating point, and integers are finite.
    if not block.is_floating_point() or block.dtype.itemsize == 1:
        return True
    return bool(block.sum().isfinite() or block.isfinite().all())


def _spread(parts: Iterable[torch.Tensor]) -> tuple[float, float, float] | tuple[None, None, None]:
    values = torch.cat(list(parts))
    if values.numel() == 0:
        return None, None, None
    return values.min().item(), values.mean().item(), values.max().item()


def _dtype(weight: Weight) -> str:
    return str(weight.info.dtype).removeprefix("torch.")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

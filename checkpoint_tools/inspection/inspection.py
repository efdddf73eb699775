# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint holds, whatever it is: its facts, its weights one by one, and where it contradicts itself."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ...models.architecture import Architecture
from ...quantization.record import QuantizerRecord
from ..storage.reader import TensorInfo, dtype_name, listed


@dataclass(frozen=True)
class Statistics:
    """What the values of a weight say.

    Attributes:
        state: ``fused`` (levels times scale already), ``latent`` (the record says that it is to be quantized),
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
class Weight:
    """A tensor of the model.

    Attributes:
        name: of its module, with the layer number; by the names of the checkpoint.
        info: shape and dtype.
        linear: whether it is one of a layer's linears, which can be ternary.
        read: rows of it; all of them where it is linear.
        scales: saved beside it, bf16 ``[out, groups]``, or None.
        has_scales: whether there are some.
        statistics: of its values, once it was read.
    """

    name: str
    info: TensorInfo
    linear: bool
    read: Callable[[slice], torch.Tensor]
    scales: Callable[[], torch.Tensor | None] = lambda: None
    has_scales: bool = False
    statistics: Statistics = Statistics("")


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
    def of_megatron(self) -> bool:
        """Whether it is a Megatron checkpoint."""
        return self.format in ("torch_dist", "legacy")

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
            found[dtype_name(weight.info.dtype)] += weight.info.nbytes
        return dict(found)

    def check_record(self) -> None:
        """Adds findings about the quantizer record that need no tensor data."""
        record = self.record
        if record is None:
            return
        dtypes = {w.name: dtype_name(w.info.dtype) for w in self.weights if w.linear}
        unknown = sorted(set(record.modules) - set(dtypes))
        if unknown and (self.of_megatron or self.format == "huggingface"):
            self.findings.append(
                f"the quantizer record names {listed(unknown, 3)}, which {_are(unknown)} no linear of this model"
            )
        other = [n for n, dtype in dtypes.items() if n in record.modules and dtype != record.latent_dtype]
        # Hugging Face trainers keep wider masters, and quantize them rounded to the recorded dtype.
        if other and record.state == "latent" and self.of_megatron:
            self.findings.append(
                f"the quantizer record says that {record.latent_dtype} weights were quantized, and {listed(other, 3)} "
                f"{_are(other)} {dtypes[other[0]]}"
            )
        bare = [w.name for w in self.weights if w.has_scales and w.name not in record.modules]
        if bare:
            self.findings.append(f"there are saved scales of {listed(bare, 3)}, which the quantizer record leaves out")


def _are(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"

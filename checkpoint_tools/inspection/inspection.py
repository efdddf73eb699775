# SPDX-License-Identifier: Apache-2.0
"""Data types of an inspection: the facts about a checkpoint of any format, its weights, and its contradictions."""

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
    """Statistics of the values of one weight.

    Attributes:
        state: ``fused`` (already levels times scale), ``latent`` (the quantizer record or saved scales say that it is
            quantized in the forward pass), ``full precision`` (the record leaves it out), ``ordinary`` (no record),
            ``not read``, or "" for a weight that is never quantized.
        group_size: the number of elements per scale along a row, -1 for the whole row: for a fused weight as its values
            show it, otherwise as the record or the saved scales say, otherwise -1. None if it does not apply.
        zeros: the share of zeros in the quantized weight; a weight that is not fused is quantized for it.
        scale_min: the smallest scale; for a fused weight, of the groups that are not all zero (as the next two).
        scale_mean: the mean of the scales.
        scale_max: the largest scale.
    """

    state: str
    group_size: int | None = None
    zeros: float | None = None
    scale_min: float | None = None
    scale_mean: float | None = None
    scale_max: float | None = None


@dataclass
class Weight:
    """A tensor of the inspected model, which is read when its statistics are computed.

    Attributes:
        name: the name of its module in the checkpoint, with the layer number.
        info: its shape and dtype.
        linear: whether it is the weight of one of a layer's linears, which can be ternary.
        read: a function that reads some of its rows; a linear is read as a whole.
        scales: a function that reads the scales saved with it, bf16 ``[out, groups]`` (output features, scales per
            row), or returns None.
        has_scales: whether scales were saved with it.
        statistics: the statistics of its values, after it was read.
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
    """Result of the inspection of one checkpoint, model directory or file.

    Attributes:
        path: the path of the inspected checkpoint: an iteration directory, a model directory or a file.
        format: ``torch_dist``, ``legacy``, ``huggingface``, ``safetensors`` or ``bin``.
        weights: the weights of the model, in the order of the model.
        iteration: the iteration number, "release", or None if unknown.
        layout: the parallel sizes by name; empty if there are none.
        architecture: the architecture of the model, or None if unknown.
        about_architecture: the model type and its source, or the reason why the architecture is unknown.
        padded_vocabulary: the number of rows of the embedding as stored, or None.
        optimizer_state: whether the checkpoint contains the optimizer's state.
        record: the quantizer record with the module names of the checkpoint, or None.
        digests: whether the files match their ``DIGESTS.json``; None if there is none.
        findings: descriptions of damage and contradictions.
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
        """True if the inspected checkpoint is a Megatron checkpoint."""
        return self.format in ("torch_dist", "legacy")

    @property
    def nbytes(self) -> int:
        """Size in bytes of the model's tensors as stored, without optimizer state."""
        return sum(w.info.nbytes for w in self.weights)

    @property
    def parameters(self) -> int:
        """Number of parameters, without padding of the vocabulary if the architecture is known."""
        if self.architecture is not None:
            return self.architecture.parameter_count()
        return sum(w.info.nbytes // w.info.dtype.itemsize for w in self.weights)

    def dtypes(self) -> dict[str, int]:
        """Returns the number of bytes stored in each dtype."""
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
        # Only Megatron checkpoints: Hugging Face trainers keep wider masters and round them to the recorded dtype.
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

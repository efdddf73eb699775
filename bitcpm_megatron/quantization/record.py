# SPDX-License-Identifier: Apache-2.0
"""The quantizer record: how the weights of a checkpoint were quantized, in ``ternary_quantizer.json`` beside them."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..files import write_text
from .config import WEIGHT_DTYPES, QuantizerConfig

FILE_NAME = "ternary_quantizer.json"
SCALE_SUFFIX = ".ternary_scale"
"""In a checkpoint the scales that training used stand beside each ternary weight, as ``<weight key>.ternary_scale``."""
_VERSION = 1


class RecordError(ValueError):
    """A quantizer record that cannot be read, or that contradicts what was asked for."""


@dataclass(frozen=True)
class QuantizerRecord:
    """How a checkpoint's weights were quantized.

    Attributes:
        state: ``latent`` weights still to be quantized, or ``fused`` ones that are ternary times scale already.
        space: quantization space.
        eps: lower bound of the scales.
        latent_dtype: dtype of the weights that the forward quantized, such as ``bfloat16``.
        row_parallel_shards: groups per whole row of row-parallel weights under group size -1.
        activation_bits: 16 for none.
        modules: module path -> ``{"group_size": elements per scale along the whole row, or -1}``, with ``space`` and
            ``eps`` where they differ from the ones above.
        version: of this format.
    """

    state: Literal["latent", "fused"]
    space: str
    eps: float
    latent_dtype: str
    row_parallel_shards: int
    activation_bits: int = 16
    modules: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    version: int = _VERSION

    @classmethod
    def read(cls, directory: str | Path) -> "QuantizerRecord | None":
        """The record in an iteration directory or export, or None where there is none.

        Raises:
            RecordError: it cannot be understood.
        """
        path = Path(directory) / FILE_NAME
        if not path.is_file():
            return None
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            record = cls(**content)
        except (OSError, ValueError, TypeError) as error:
            raise RecordError(f"{path}: not a quantizer record ({error})") from error
        if record.version != _VERSION:
            raise RecordError(
                f"{path}: version {record.version} is unknown here (known: {_VERSION}); update the package"
            )
        try:
            record.check()
        except RecordError as error:
            raise RecordError(f"{path}: not a quantizer record ({error})") from None
        return record

    def check(self) -> None:
        """Checks the content.

        Raises:
            RecordError: a value that no quantizer has.
        """
        if self.state not in ("latent", "fused"):
            raise RecordError(f"state {self.state!r} is neither latent nor fused")
        if self.latent_dtype not in [str(d).removeprefix("torch.") for d in WEIGHT_DTYPES]:
            raise RecordError(f"latent_dtype {self.latent_dtype!r} is unknown")
        if type(self.row_parallel_shards) is not int or self.row_parallel_shards < 1:
            raise RecordError(f"row_parallel_shards {self.row_parallel_shards!r}: must be 1 or more")
        if self.activation_bits not in (8, 16):
            raise RecordError(f"activation_bits {self.activation_bits!r}: must be 8, or 16 for none")
        if not isinstance(self.modules, Mapping):
            raise RecordError("modules is no mapping")
        for path, entry in self.modules.items():
            if not isinstance(entry, Mapping) or "group_size" not in entry:
                raise RecordError(f"{path}: needs a group_size")
            try:
                self.config_of(path)
            except (TypeError, ValueError) as error:
                raise RecordError(f"{path}: {error}") from None

    def write(self, directory: str | Path) -> None:
        """Writes the record into a directory, whole or not at all."""
        write_text(Path(directory) / FILE_NAME, json.dumps(asdict(self), indent=1))

    def contradictions(self, other: "QuantizerRecord") -> list[str]:
        """Where two records quantize the same weights differently, one line each; empty if nowhere."""
        lines = [
            f"{name}: {getattr(self, name)!r} in the checkpoint, {getattr(other, name)!r} asked for"
            for name in ("state", "latent_dtype", "row_parallel_shards", "activation_bits")
            if getattr(self, name) != getattr(other, name)
        ]
        for path in sorted(set(self.modules) | set(other.modules)):
            if path not in self.modules or path not in other.modules:
                where = ("ternary", "full precision") if path in self.modules else ("full precision", "ternary")
                lines.append(f"{path}: {where[0]} in the checkpoint, {where[1]} asked for")
                continue
            mine, theirs = self.config_of(path), other.config_of(path)
            for name in ("space", "group_size", "eps"):
                a, b = getattr(mine, name), getattr(theirs, name)
                if a != b:
                    lines.append(f"{path}: {name} {a} in the checkpoint, {b} asked for")
        return lines

    def config_of(self, path: str) -> QuantizerConfig:
        """How one of the recorded modules is quantized; the group size counts along the whole row."""
        return QuantizerConfig(**{"space": self.space, "eps": self.eps, **self.modules[path]})


def check_change(where: Path, found: QuantizerRecord | None, wanted: QuantizerRecord | None, allow_change: bool) -> str:
    """Compares a checkpoint's quantizer record with what a run wants.

    Args:
        where: the checkpoint, for messages.
        found: its record, None for a checkpoint without quantizer.
        wanted: the run's, None for a run without quantizer.
        allow_change: whether they may contradict each other.

    Returns:
        One line for the log.

    Raises:
        RecordError: they contradict each other and ``allow_change`` is false.
    """
    if found is None:
        return "quantizer: the checkpoint records none" + (", starting ternary training from it" if wanted else "")
    if wanted is None:
        lines = ["the checkpoint was trained with a quantizer, and --ternary is not given"]
    else:
        lines = found.contradictions(wanted)
    if lines and not allow_change:
        shown = "\n  ".join(lines[:12] + ([f"... and {len(lines) - 12} more"] if len(lines) > 12 else []))
        raise RecordError(
            f"{where} was trained with another quantizer:\n  {shown}\n"
            "give the recorded one, or --allow-quantizer-change to go on with the new one"
        )
    return "quantizer: changed on request: " + "; ".join(lines) if lines else "quantizer: as the checkpoint records"

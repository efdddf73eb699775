# SPDX-License-Identifier: Apache-2.0
"""The quantizer record: how the weights of a checkpoint were quantized, in the file ``ternary_quantizer.json``."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import model_validator

from ..cli import Number, Whole, bounded
from ..files import FileError, Strict, read_json, validated, write_text
from .config import QuantizerConfig

FILE_NAME = "ternary_quantizer.json"
CONFIG_KEY = "ternary_quantizer"
"""The key of the record's copy in the ``config.json`` of a Hugging Face directory with latent weights."""
SCALE_SUFFIX = ".ternary_scale"
"""The suffix of the scales that training used: a checkpoint holds them as ``<weight key>.ternary_scale``."""
_VERSION = 2
_ABSMEAN = {"statistic": "absmean", "scale_multiplier": 1.0}
"""The fields that a record of version 1 does not have; absmean and 1 were the only possible values."""
_QUANTIZER = ("space", "statistic", "scale_multiplier", "eps")
"""The fields of a quantizer that a record holds once for all modules, and a module only if its value differs."""
_FIRST_LOSSES = (
    ", starting ternary training from it. Weights that were not trained ternary: expect the first losses above that of "
    "uniform guessing and gradient norms in the hundreds, and both to fall within tens of steps "
    "(docs/training.md, From published weights)"
)


class RecordError(FileError):
    """A quantizer record that cannot be read, or that contradicts the requested quantizer."""


class _Module(Strict):
    group_size: int
    space: str | None = None
    statistic: str | None = None
    scale_multiplier: float | None = None
    eps: float | None = None


class _File(Strict):
    state: Literal["latent", "fused", "packed"]
    space: str
    statistic: str
    scale_multiplier: float
    eps: float
    latent_dtype: Literal["float32", "bfloat16", "float16"]
    row_parallel_shards: Annotated[int, bounded(Whole(1, 2**16))]
    activation_bits: Literal[8, 16] = 16
    ramp: Annotated[float, bounded(Number(0, 1))] = 1.0
    modules: dict[str, _Module] = {}
    version: int

    @model_validator(mode="after")
    def _quantizers_exist(self) -> "_File":
        own = {name: getattr(self, name) for name in _QUANTIZER}
        QuantizerConfig(**own)
        for path, module in self.modules.items():
            try:
                QuantizerConfig(**{**own, **module.model_dump(exclude_none=True)})
            except ValueError as error:
                raise ValueError(f"modules.{path}: {error}") from None
        return self


@dataclass(frozen=True)
class QuantizerRecord:
    """The record of how a checkpoint's weights were quantized.

    Attributes:
        state: the form of the stored weights: ``latent`` weights are still to be quantized, ``fused`` ones are already
            levels times scale, and ``packed`` ones are codes and scales in the layout of a packed export.
        space: the quantization space.
        eps: the lower bound of the scales.
        latent_dtype: the dtype of the weights that the forward quantized, such as ``bfloat16``.
        row_parallel_shards: the number of groups per whole row of row-parallel weights under group size -1.
        activation_bits: the bits of quantized activations; 16 means that activations are not quantized.
        modules: module path -> ``{"group_size": elements per scale along the whole row, or -1}``, with ``space``,
            ``statistic``, ``scale_multiplier`` and ``eps`` if they differ from those of the record.
        statistic: the statistic that the scales are made of.
        scale_multiplier: the factor of this statistic.
        version: the version of this format. Version 1 had neither statistic nor multiplier, which were absmean and 1.
        ramp: how much of the quantizer the forward used when the checkpoint was saved: W + ramp (Wq - W). It is written
            only if it is less than 1, in the middle of a ramp.
    """

    state: Literal["latent", "fused", "packed"]
    space: str
    eps: float
    latent_dtype: str
    row_parallel_shards: int
    activation_bits: int = 16
    modules: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    statistic: str = "absmean"
    scale_multiplier: float = 1.0
    version: int = _VERSION
    ramp: float = 1.0

    @classmethod
    def read(cls, directory: str | Path) -> "QuantizerRecord | None":
        """Reads the record of an iteration directory or export; returns None if there is none.

        Raises:
            RecordError: if the record cannot be understood.
        """
        path = Path(directory) / FILE_NAME
        if not path.exists() and not path.is_symlink():
            return None
        try:
            content = read_json(path)
        except FileError as error:
            raise RecordError(str(error)) from None
        return cls.from_mapping(content, str(path))

    @classmethod
    def from_mapping(cls, content: Any, where: str) -> "QuantizerRecord":
        """Builds a record from the parsed content of a record file.

        Args:
            content: the parsed content, not checked yet.
            where: the name of the file, for error messages.

        Raises:
            RecordError: if the content cannot be understood, or was written by a newer version.
        """
        version = content.get("version") if isinstance(content, dict) else None
        if isinstance(version, int) and version not in (1, _VERSION):
            raise RecordError(f"{where}: version {version} is unknown here (known: 1, {_VERSION}); update the package")
        if version == 1:
            content = {**_ABSMEAN, **content, "version": _VERSION}
        try:
            checked = validated(_File, content, f"{where}: not a quantizer record")
        except FileError as error:
            raise RecordError(str(error)) from None
        return cls(**checked.model_dump(exclude_unset=True))

    def write(self, directory: str | Path) -> None:
        """Writes the record into a directory; the file appears completely or not at all."""
        write_text(Path(directory) / FILE_NAME, json.dumps(self.content(), indent=1))

    def content(self) -> dict[str, Any]:
        """Returns the content of the record's file."""
        content = asdict(self)
        if self.ramp == 1.0:
            del content["ramp"]
        return content

    def check_whole(self, where: str | Path) -> None:
        """Checks that the forward used the quantized weights as they are, so that they can be exported.

        Args:
            where: the name of the checkpoint, for the error message.

        Raises:
            RecordError: if the checkpoint was saved in the middle of a ramp.
        """
        if self.ramp < 1.0:
            raise RecordError(
                f"{where} was saved in the middle of a ramp, whose forward used {self.ramp:.3g} of the quantizer: its "
                "ternary weights are not those of the model that was trained. Train on until --ternary-ramp-iters are "
                "over, or convert a later checkpoint"
            )

    def contradictions(self, other: "QuantizerRecord") -> list[str]:
        """Returns one line for each difference between how two records quantize the same weights."""
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
            for name in (*_QUANTIZER, "group_size"):
                a, b = getattr(mine, name), getattr(theirs, name)
                if a != b:
                    lines.append(f"{path}: {name} {a} in the checkpoint, {b} asked for")
        return lines

    def config_of(self, path: str) -> QuantizerConfig:
        """Returns the quantizer of one recorded module; its group size counts elements along the whole row."""
        return QuantizerConfig(**{**{name: getattr(self, name) for name in _QUANTIZER}, **self.modules[path]})

    @staticmethod
    def of_module(config: QuantizerConfig, default: QuantizerConfig, group_size: int) -> dict[str, Any]:
        """Returns a module's entry: its group size along the whole row, and the fields that differ from the default."""
        pairs = [(name, getattr(config, name), getattr(default, name)) for name in _QUANTIZER]
        differs = {name: own for name, own, usual in pairs if own != usual}
        return {"group_size": group_size, **differs}


def record_of_model(directory: str | Path) -> QuantizerRecord | None:
    """Reads the quantizer record of a Hugging Face directory, from its file, its ``config.json`` or both.

    Returns:
        The record; None if the directory has none.

    Raises:
        RecordError: if a record cannot be understood or is of the middle of a ramp, or if the two contradict each
            other.
        FileError: if ``config.json`` is damaged.
    """
    directory = Path(directory)
    in_file, in_config, config = QuantizerRecord.read(directory), None, directory / "config.json"
    if config.is_file():
        content = read_json(config)
        if not isinstance(content, dict):
            raise RecordError(f"{config}: expected a JSON object")
        if (found := content.get(CONFIG_KEY)) is not None:
            in_config = QuantizerRecord.from_mapping(found, f"{config}: {CONFIG_KEY}")
    for record in filter(None, (in_file, in_config)):
        record.check_whole(directory)
    if in_file is None or in_config is None:
        return in_file or in_config
    lines = in_file.contradictions(in_config)
    if lines:
        shown = "; ".join(lines[:5]) + ("; ..." if len(lines) > 5 else "")
        raise RecordError(
            f"{directory}: {FILE_NAME} (here: the checkpoint) and config.json (here: asked for) contradict each other: "
            f"{shown}. Trainers rewrite config.json: delete {FILE_NAME} if it is left over from an earlier model"
        )
    return in_config


def check_change(where: Path, found: QuantizerRecord | None, wanted: QuantizerRecord | None, allow_change: bool) -> str:
    """Compares a checkpoint's quantizer record with the one that a run wants.

    Args:
        where: the checkpoint, for error messages.
        found: the record of the checkpoint; None if it was trained without a quantizer.
        wanted: the record of the run; None for a run without a quantizer.
        allow_change: whether the two may contradict each other.

    Returns:
        One line for the log.

    Raises:
        RecordError: if the two contradict each other and ``allow_change`` is false.
    """
    if found is None:
        return "quantizer: the checkpoint records none" + ("" if wanted is None else _FIRST_LOSSES)
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

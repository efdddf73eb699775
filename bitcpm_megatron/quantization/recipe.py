# SPDX-License-Identifier: Apache-2.0
"""Which module is quantized how: named configs, and ordered glob matchers on module paths.

The YAML schema is the one of megatron-core's ``quantization/quant_config.py`` (not imported: 0.12.1 lacks it)::

    configs:
      fine: {group_size: 64}          # space, statistic, scale_multiplier, group_size, eps
      keep: full-precision
    matchers:
      last_layer: {config: keep, type: glob, pattern: "*.layers.23.*", enabled: true}
      linears:    {config: fine, type: glob, pattern: "*.linear_*", enabled: true}

What a config leaves out comes from the command line; but of another space or statistic than this says, the statistic
and the multiplier are its own. The first matcher whose pattern fits a module decides; a module that none fits stays in
full precision. Layer numbers are global and count from 0, whatever the pipeline stage.
"""

import fnmatch
import glob
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..files import FileError, Strict, nearest, read_yaml, validated
from .config import QuantizerConfig
from .record import QuantizerRecord

FULL_PRECISION = "full-precision"


class RecipeError(FileError):
    """A recipe that cannot be carried out as written."""


class _Config(Strict):
    space: str | None = None
    statistic: str | None = None
    scale_multiplier: float | None = None
    group_size: int | None = None
    eps: float | None = None


class _Matcher(Strict):
    config: str
    pattern: str
    type: Literal["glob"] = "glob"
    enabled: bool = True


class _File(Strict):
    configs: dict[str, Any] = {}
    matchers: dict[str, _Matcher] = {}


@dataclass(frozen=True)
class Matcher:
    """One rule: modules whose path fits ``pattern`` (fnmatch) get ``config``; None means full precision."""

    name: str
    pattern: str
    config: QuantizerConfig | None

    def fits(self, path: str) -> bool:
        """Whether a module path with global layer numbers fits."""
        return fnmatch.fnmatchcase(path, self.pattern)


@dataclass(frozen=True)
class Recipe:
    """Ordered matchers; the first that fits decides."""

    matchers: tuple[Matcher, ...]

    @classmethod
    def all_linears(cls, default: QuantizerConfig) -> "Recipe":
        """The recipe used when none is given: every linear of the decoder layers (q, k, v, o, gate, up, down)."""
        return cls((Matcher("linears", "*.linear_*", default),))

    @classmethod
    def of(cls, record: QuantizerRecord) -> "Recipe":
        """Quantizes exactly the recorded modules exactly so, at any tensor-parallel size that fits."""
        return cls(tuple(Matcher(path, glob.escape(path), record.config_of(path)) for path in record.modules))

    @classmethod
    def from_yaml(cls, path: str | Path, default: QuantizerConfig) -> "Recipe":
        """Reads a recipe file.

        Raises:
            RecipeError: unreadable or malformed, naming the file, the entry and what is expected.
        """
        try:
            return cls.from_mapping(read_yaml(Path(path)), default, str(path))
        except FileError as error:
            raise RecipeError(str(error)) from None

    @classmethod
    def from_mapping(cls, content: Any, default: QuantizerConfig, where: str = "the recipe") -> "Recipe":
        """Same, from the parsed content of such a file.

        Args:
            content: as it was read.
            default: what a config leaves out.
            where: file, for the message.
        """
        try:
            file = validated(_File, content, where)
            configs = {
                name: _config(f"{where}: config {name!r}", entry, default) for name, entry in file.configs.items()
            }
        except FileError as error:
            raise RecipeError(str(error)) from None
        for name, matcher in file.matchers.items():
            if matcher.config not in configs:
                raise RecipeError(
                    f"{where}: matcher {name!r}: unknown config {matcher.config!r}{nearest(matcher.config, [*configs])}"
                )
        matchers = tuple(Matcher(n, m.pattern, configs[m.config]) for n, m in file.matchers.items() if m.enabled)
        if not any(m.config is not None for m in matchers):
            raise RecipeError(f"{where}: no enabled matcher quantizes anything: add one, or train without --ternary")
        return cls(matchers)

    def decide(self, path: str) -> Matcher | None:
        """The first matcher that fits a module path, or None."""
        return next((m for m in self.matchers if m.fits(path)), None)


def _config(where: str, entry: Any, default: QuantizerConfig) -> QuantizerConfig | None:
    if entry == FULL_PRECISION:
        return None
    if isinstance(entry, str):
        keys = ", ".join(_Config.model_fields)
        raise RecipeError(f"{where}: write a mapping of {keys}, or the word {FULL_PRECISION}, not {entry!r}")
    given = validated(_Config, entry, where).model_dump(exclude_none=True)
    if given.get("space", default.space) != default.space:
        given = {"statistic": None, "scale_multiplier": None, **given}
    elif given.get("statistic", default.statistic) != default.statistic:
        given = {"scale_multiplier": None, **given}
    try:
        return replace(default, **given)
    except ValueError as error:
        raise RecipeError(f"{where}: {error}") from None

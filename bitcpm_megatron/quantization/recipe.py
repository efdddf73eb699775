# SPDX-License-Identifier: Apache-2.0
"""Quantization recipes: which module is quantized how, as named configs and ordered glob matchers on module paths.

The YAML schema is the one of megatron-core's ``quantization/quant_config.py`` (not imported: 0.12.1 lacks it)::

    configs:
      fine: {group_size: 64}          # space, statistic, scale_multiplier, group_size, eps
      keep: full-precision
    matchers:
      last_layer: {config: keep, type: glob, pattern: "*.layers.23.*", enabled: true}
      linears:    {config: fine, type: glob, pattern: "*.linear_*", enabled: true}

Fields that a config leaves out come from the command line. There are two exceptions: a config with another space than
the command line's takes the statistic and the multiplier of that space, and a config with another statistic takes the
multiplier that belongs to that statistic. The first matcher whose pattern fits a module decides; a module that no
pattern fits stays in full precision. Layer numbers are global and count from 0, whatever the pipeline stage.
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
    """One rule of a recipe: modules whose path fits ``pattern`` (fnmatch) get ``config``; None means full precision."""

    name: str
    pattern: str
    config: QuantizerConfig | None

    def fits(self, path: str) -> bool:
        """Returns whether a module path with global layer numbers fits the pattern."""
        return fnmatch.fnmatchcase(path, self.pattern)


@dataclass(frozen=True)
class Recipe:
    """An ordered list of matchers; the first one that fits a module decides how it is quantized."""

    matchers: tuple[Matcher, ...]

    @classmethod
    def all_linears(cls, default: QuantizerConfig) -> "Recipe":
        """Returns the recipe that is used when none is given: every linear of the decoder layers is quantized.

        These are the projections q, k, v, o, gate, up and down.
        """
        return cls((Matcher("linears", "*.linear_*", default),))

    @classmethod
    def of(cls, record: QuantizerRecord) -> "Recipe":
        """Returns the recipe that quantizes exactly the recorded modules, at any fitting tensor-parallel size."""
        return cls(tuple(Matcher(path, glob.escape(path), record.config_of(path)) for path in record.modules))

    @classmethod
    def from_yaml(cls, path: str | Path, default: QuantizerConfig) -> "Recipe":
        """Reads a recipe file.

        Raises:
            RecipeError: if the file is unreadable or malformed; the message names the file, the entry and what is
                expected.
        """
        try:
            return cls.from_mapping(read_yaml(Path(path)), default, str(path))
        except FileError as error:
            raise RecipeError(str(error)) from None

    @classmethod
    def from_mapping(cls, content: Any, default: QuantizerConfig, where: str = "the recipe") -> "Recipe":
        """Builds a recipe from the parsed content of a recipe file.

        Args:
            content: the parsed content, not checked yet.
            default: the quantizer that supplies the fields a config leaves out.
            where: the name of the file, for error messages.

        Raises:
            RecipeError: if the content is malformed, a matcher names an unknown config, or no enabled matcher
                quantizes.
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
        """Returns the first matcher that fits a module path, or None."""
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

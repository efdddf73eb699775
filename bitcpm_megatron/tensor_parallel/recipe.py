# SPDX-License-Identifier: Apache-2.0
"""Which module is quantized how: named configs, and ordered glob matchers on module paths.

The YAML schema is the one of megatron-core's ``quantization/quant_config.py`` (not imported: 0.12.1 lacks it)::

    configs:
      fine: {group_size: 64}          # space, group_size, eps; what is left out comes from the command line
      keep: full-precision
    matchers:
      last_layer: {config: keep, type: glob, pattern: "*.layers.23.*", enabled: true}
      linears:    {config: fine, type: glob, pattern: "*.linear_*", enabled: true}

The first matcher whose pattern fits a module decides; a module that none fits stays in full precision. Layer numbers
are global and count from 0, whatever the pipeline stage.
"""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ..quantization import QuantizerConfig

FULL_PRECISION = "full-precision"
_CONFIG_KEYS = ("space", "group_size", "eps")
_MATCHER_KEYS = ("config", "type", "pattern", "enabled")


class RecipeError(ValueError):
    """A recipe that cannot be carried out as written."""


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
    def from_yaml(cls, path: str | Path, default: QuantizerConfig) -> "Recipe":
        """Reads a recipe file.

        Raises:
            RecipeError: unreadable or malformed, naming the file, the entry and what is expected.
        """
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise RecipeError(f"{path}: {error}") from error
        try:
            return cls.from_mapping(content, default)
        except RecipeError as error:
            raise RecipeError(f"{path}: {error}") from None

    @classmethod
    def from_mapping(cls, content: Any, default: QuantizerConfig) -> "Recipe":
        """Same, from the parsed content of such a file."""
        _expect_keys("the recipe", content, ("configs", "matchers"))
        configs = {
            str(name): _config(str(name), entry, default)
            for name, entry in _mapping("configs", content.get("configs", {})).items()
        }
        matchers = []
        for name, entry in _mapping("matchers", content.get("matchers", {})).items():
            _expect_keys(f"matcher {name!r}", entry, _MATCHER_KEYS)
            if entry.get("type", "glob") != "glob":
                raise RecipeError(f"matcher {name!r}: type {entry['type']!r} is unknown, only glob is")
            if not isinstance(entry.get("pattern"), str) or entry.get("config") not in configs:
                raise RecipeError(
                    f"matcher {name!r}: needs a pattern (text) and a config out of {sorted(configs)}, got {entry}"
                )
            if not isinstance(entry.get("enabled", True), bool):
                raise RecipeError(f"matcher {name!r}: enabled must be true or false")
            if entry.get("enabled", True):
                matchers.append(Matcher(str(name), entry["pattern"], configs[entry["config"]]))
        if not any(m.config is not None for m in matchers):
            raise RecipeError("no enabled matcher quantizes anything: add one, or train without --ternary")
        return cls(tuple(matchers))

    def decide(self, path: str) -> Matcher | None:
        """The first matcher that fits a module path, or None."""
        return next((m for m in self.matchers if m.fits(path)), None)


def _mapping(what: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RecipeError(f"{what} must be a mapping, got {type(value).__name__}")
    return value


def _expect_keys(what: str, value: Any, known: tuple[str, ...]) -> None:
    unknown = set(_mapping(what, value)) - set(known)
    if unknown:
        raise RecipeError(f"{what}: unknown keys {sorted(map(str, unknown))}, known are {list(known)}")


def _config(name: str, entry: Any, default: QuantizerConfig) -> QuantizerConfig | None:
    if entry == FULL_PRECISION:
        return None
    if isinstance(entry, str):
        raise RecipeError(f"config {name!r}: write a mapping of {list(_CONFIG_KEYS)}, or the word {FULL_PRECISION}")
    _expect_keys(f"config {name!r}", entry, _CONFIG_KEYS)
    try:
        if isinstance(entry.get("eps"), str):
            # YAML 1.1 reads 1e-5, without a point, as text.
            entry = {**entry, "eps": float(entry["eps"])}
        return replace(default, **entry)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"config {name!r}: {error}") from None

# SPDX-License-Identifier: Apache-2.0
"""Model presets: ``--model NAME`` stands for the flags in ``launch/models/NAME.yaml`` (or in a file of that form).

Run by itself, it prints all presets with their numbers of parameters: ``python launch/presets.py``.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    # From a bare checkout the package stands two levels up.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import yaml

from bitcpm_megatron.models.architecture import Architecture
from bitcpm_megatron.models.arguments import architecture_of

DIRECTORY = Path(__file__).parent / "models"


class PresetError(ValueError):
    """A preset that is not there or not understood."""


def names() -> list[str]:
    """The presets that come with the package."""
    return sorted(path.stem for path in DIRECTORY.glob("*.yaml"))


def read(name: str) -> dict[str, Any]:
    """A preset by name or file: ``description``, ``vocab-size`` and ``flags``.

    Raises:
        PresetError: not there, or not of that form.
    """
    path = DIRECTORY / f"{name}.yaml" if name in names() else Path(name)
    if not path.is_file():
        raise PresetError(
            f"--model {name}: no such file, and no preset of that name: choose one of {', '.join(names())}"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PresetError(f"--model {path}: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("flags"), dict):
        raise PresetError(f"--model {path}: expected a mapping with flags")
    unknown = set(content) - {"description", "vocab-size", "flags"}
    if unknown:
        raise PresetError(f"--model {path}: unknown keys {sorted(unknown)}")
    return content


def flags(name: str) -> list[str]:
    """The command line that a preset stands for."""
    return arguments(read(name)["flags"], name)


def arguments(flags: Mapping[str, Any], name: str) -> list[str]:
    """A command line from flags as presets hold them.

    Args:
        flags: without dashes; true for a flag alone.
        name: of the preset, for messages.

    Raises:
        PresetError: a value that is none of a flag.
    """
    argv: list[str] = []
    for flag, value in flags.items():
        if value is True:
            argv.append(f"--{flag}")
        elif isinstance(value, list):
            argv += [f"--{flag}", *map(str, value)]
        elif isinstance(value, bool) or value is None:
            raise PresetError(f"--model {name}: {flag}: write true, a value or a list, or leave it out")
        else:
            argv += [f"--{flag}", str(value)]
    return argv


def expand(argv: Sequence[str]) -> list[str]:
    """A command line with ``--model NAME`` replaced by the preset's flags, in front: what follows overrides them.

    Raises:
        PresetError: see :func:`read`; also ``--model`` twice or without a name.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--model", action="append", default=[])
    try:
        found, rest = finder.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise PresetError(str(error)) from None
    if len(found.model) > 1:
        raise PresetError("--model is given twice")
    return [*(flag for name in found.model for flag in flags(name)), *rest]


def architecture(name: str) -> Architecture:
    """The model that a preset describes."""
    from bitcpm_megatron.training.arguments import build_parser

    run = "--seq-length 1 --micro-batch-size 1 --train-iters 1 --lr 1".split()
    args = build_parser().parse_args([*flags(name), *run])
    return architecture_of(vars(args), int(read(name)["vocab-size"]))


def main() -> int:
    """Prints the presets; returns the exit status."""
    for name in names():
        a = architecture(name)
        print(
            f"{name:16} {a.parameter_count():>14,} parameters  {a.num_layers} layers, hidden {a.hidden_size}, "
            f"heads {a.num_attention_heads}:{a.num_query_groups} x {a.kv_channels}, ffn {a.ffn_hidden_size}, "
            f"{'tied' if a.tied else 'untied'}{', LongRoPE' if a.longrope else ''}"
            f"{'' if a.is_llama else ', multipliers'}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

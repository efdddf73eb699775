# SPDX-License-Identifier: Apache-2.0
"""Model presets: ``--model NAME`` stands for the flags in ``launch/models/NAME.yaml`` (or in a file of that form)."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

from pydantic import Field

from ... import cli
from ...files import FileError, Strict, read_yaml, validated
from ...models.architecture import Architecture
from ...models.from_arguments import architecture_of

DIRECTORY = Path(__file__).parents[1] / "models"


class PresetError(FileError):
    """A preset that is not there or not understood."""


class Preset(Strict):
    """A preset file: one line for people, its tokenizer's size, and flags as they are, without dashes."""

    description: str = ""
    vocab_size: Annotated[int, cli.bounded(cli.Whole(1, 2**24))] | None = Field(None, alias="vocab-size")
    flags: dict[str, Any]


def names() -> list[str]:
    """The presets that come with the package."""
    return sorted(path.stem for path in DIRECTORY.glob("*.yaml"))


def read(name: str) -> Preset:
    """A preset by name or file.

    Raises:
        PresetError: not there, or not of that form.
    """
    path = DIRECTORY / f"{name}.yaml" if name in names() else Path(name)
    try:
        if not path.exists():
            raise FileError(f"{path}: no such file, and no preset of that name: choose one of {', '.join(names())}")
        return validated(Preset, read_yaml(path), str(path))
    except (FileError, OSError) as error:
        raise PresetError(f"--model {error}") from None


def vocab_size(name: str) -> int:
    """Tokens of a preset's tokenizer.

    Raises:
        PresetError: see :func:`read`; also where it does not say.
    """
    size = read(name).vocab_size
    if size is None:
        raise PresetError(f"--model {name}: vocab-size is missing")
    return size


def flags(name: str) -> list[str]:
    """The command line that a preset stands for."""
    return arguments(read(name).flags, name)


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
            continue
        values = value if isinstance(value, list) else [value]
        for item in values:
            if isinstance(item, bool) or not isinstance(item, str | int | float) or str(item).startswith("--"):
                raise PresetError(f"--model {name}: {flag}: write true, a value or a list of values, got {value!r}")
        argv += [f"--{flag}", *map(str, values)]
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
    """The model that a preset describes.

    Raises:
        PresetError: see :func:`read`; also without ``vocab-size``, and with flags that training refuses.
    """
    from ...training.flags import build_parser

    def refuse(message: str) -> NoReturn:
        raise PresetError(f"--model {name}: {message}")

    parser = build_parser()
    parser.error = refuse  # type: ignore[method-assign]
    run = "--seq-length 1 --micro-batch-size 1 --train-iters 1 --lr 1".split()
    return architecture_of(vars(parser.parse_args([*flags(name), *run])), vocab_size(name))

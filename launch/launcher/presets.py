# SPDX-License-Identifier: Apache-2.0
"""Model presets: ``--model NAME`` stands for the flags in ``launch/models/NAME.yaml`` or in a file of that format."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NoReturn

from pydantic import AfterValidator, Field

from ... import cli
from ...files import FileError, Strict
from ...models.architecture import Architecture
from ...models.from_arguments import architecture_of
from ...training.flags import build_parser
from . import packaged


class PresetError(FileError):
    """The error that a preset does not exist or cannot be understood."""


def reads_as_flag(item: Any) -> bool:
    """Returns whether a value would turn into a flag on a command line, or truncate it at a NUL character."""
    return isinstance(item, str) and (item.startswith("-") or "\0" in item)


def _flag_value(value: Any) -> Any:
    items = value if isinstance(value, list) else [value]
    if not items or not all(isinstance(item, str | int | float) for item in items):
        raise ValueError(f"expected true, a value or a list of values, got {value!r}")
    if any(map(reads_as_flag, items)):
        raise ValueError(f"{value!r} would be taken for a flag")
    return value


# The value of a flag in a file: true for the flag without a value, false to omit it.
FlagValue = Annotated[Any, AfterValidator(_flag_value)]


class Preset(Strict):
    """A preset file: a description for people, the size of the tokenizer, and flags by their names without dashes."""

    description: str = ""
    vocab_size: Annotated[int, cli.bounded(cli.Whole(1, 2**24))] | None = Field(None, alias="vocab-size")
    flags: dict[str, FlagValue]


def names() -> list[str]:
    """Returns the names of the presets that come with the package."""
    return list(packaged.files("models"))


def read(name: str) -> Preset:
    """Reads a preset by its name or its file.

    Raises:
        PresetError: if it does not exist, or does not have the format of a preset.
    """
    try:
        return packaged.load(Preset, "models", "preset", name)
    except FileError as error:
        raise PresetError(f"--model {error}") from None


def vocab_size(name: str) -> int:
    """Returns the vocabulary size of a preset's tokenizer.

    Raises:
        PresetError: if the preset cannot be read (:func:`read`), or does not give a ``vocab-size``.
    """
    size = read(name).vocab_size
    if size is None:
        raise PresetError(f"--model {name}: vocab-size is missing")
    return size


def flags(name: str) -> list[str]:
    """Returns the command-line arguments that a preset stands for."""
    return arguments(read(name).flags)


def arguments(flags: Mapping[str, Any]) -> list[str]:
    """Returns flags, given as in a file, as command-line arguments; a flag whose value is false is left out."""
    argv: list[str] = []
    for flag, value in flags.items():
        if value is not False:
            argv += [f"--{flag}", *map(str, [] if value is True else value if isinstance(value, list) else [value])]
    return argv


def expand(argv: Sequence[str]) -> list[str]:
    """Replaces ``--model NAME`` on a command line by the preset's flags, in front, so that all others override them.

    Raises:
        PresetError: if the preset cannot be read (:func:`read`), or ``--model`` is given twice or without a name.
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


def parsed(argv: Sequence[str], mistake: Callable[[str], Exception]) -> argparse.Namespace:
    """Parses a command line with the parser of the built-in training loop.

    Args:
        argv: the command line.
        mistake: turns the parser's message into the exception that is raised if the parser refuses the command line.
    """

    def refuse(message: str) -> NoReturn:
        raise mistake(message)

    parser = build_parser()
    parser.error = refuse  # type: ignore[method-assign]
    return parser.parse_args(argv)


def architecture(name: str) -> Architecture:
    """Returns the architecture that a preset describes.

    Raises:
        PresetError: if the preset cannot be read (:func:`read`), has no ``vocab-size``, or has flags that training
            refuses.
    """
    run = "--seq-length 1 --micro-batch-size 1 --train-iters 1 --lr 1".split()
    args = parsed([*flags(name), *run], lambda message: PresetError(f"--model {name}: {message}"))
    return architecture_of(vars(args), vocab_size(name))

# SPDX-License-Identifier: Apache-2.0
"""The YAML files that come with the package, by name: ``launch/models``, ``environments``, ``jobs`` and ``sweeps``."""

from collections.abc import Sequence
from pathlib import Path

from ...files import FileError, read_yaml, validated
from ...files.documents import Model

_LAUNCH = Path(__file__).parents[1]


def files(folder: str) -> dict[str, Path]:
    """Returns the YAML files in a folder by their names, in the order of the names."""
    return {path.stem: path for path in sorted((_LAUNCH / folder).glob("*.yaml"))}


def missing(name: str, what: str, known: Sequence[str]) -> FileError:
    """Returns the error for a name that is neither a file nor one of the known names."""
    return FileError(f"{name}: no such {what} file, and no {what} of that name: choose one of {', '.join(known)}")


def load(kind: type[Model], folder: str, what: str, name: str) -> Model:
    """Reads a file by its name in a folder of the package, or else by its path.

    Raises:
        FileError: if the name is neither, or the file cannot be read or is not of that kind.
    """
    known = files(folder)
    path = known.get(name, Path(name))
    try:
        if not path.exists():
            raise missing(name, what, list(known))
        return validated(kind, read_yaml(path), str(path))
    except OSError as error:
        raise FileError(str(error)) from None

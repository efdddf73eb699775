# SPDX-License-Identifier: Apache-2.0
"""Files that are there whole or not at all, digests that show damage, and readers that believe nothing.

What is written gets a temporary name, is synced to disk, then renamed. JSON and YAML are read here and nowhere else:
whatever a file holds, a reader returns plain values or raises :class:`FileError`.
"""

import difflib
import errno
import json
import os
import re
import stat
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import xxhash
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

DIGESTS = "DIGESTS.json"

_MAX_TEXT_BYTES = 64 * 2**20
_MAX_DEPTH = 100
# With its aliases written out; the files that people write have some hundred.
_MAX_YAML_NODES = 1_000_000
_DIGEST_BLOCK = 4 * 2**20


class FileError(ValueError):
    """A file that is not there, damaged or not understood; the message names it and the cure."""


class DigestError(FileError):
    """A file is not the one whose digest was recorded: it was damaged, cut or replaced."""


# ------------------------------------------------------------------------------------------------ writing


def publish(temporary: Path, final: Path) -> None:
    """Gives a complete file or directory its final name; after a crash the name holds all of it or nothing of it.

    Args:
        temporary: what was written, on the same file system.
        final: its name from now on; a file of that name is replaced, a directory must not exist.
    """
    if temporary.is_dir():
        for path in temporary.rglob("*"):
            fsync(path)
    fsync(temporary)
    os.replace(temporary, final)
    fsync(final.parent)


def write_text(path: Path, text: str) -> None:
    """Writes a small text file, replacing what stood there."""
    temporary = path.with_name(f".{path.name}.incomplete")
    try:
        temporary.write_text(text, encoding="utf-8")
        publish(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def directory_mistake(path: str | Path) -> str | None:
    """Why nothing can be written below a directory that may have to be made yet, or None; nothing is changed."""
    for place in (Path(path), *Path(path).absolute().parents):
        try:
            mode = place.stat().st_mode
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            return f"{place}: {getattr(error, 'strerror', None) or error}"
        if not stat.S_ISDIR(mode):
            return f"{place} is no directory"
        return None if os.access(place, os.W_OK | os.X_OK) else f"{place} may not be written to"
    return None


def disk_is_full(error: OSError) -> bool:
    """Whether an error says that the file system, or the user's share of it, has no room left."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def fsync(path: Path) -> None:
    """Waits until a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------ digests


def digest(path: Path, on_read: Callable[[int], None] = lambda count: None) -> dict[str, Any]:
    """Size and XXH3-128 of a file, as an entry of ``DIGESTS.json``.

    Args:
        path: the file.
        on_read: called with the number of bytes that were just read.
    """
    state, size = xxhash.xxh3_128(), 0
    with path.open("rb") as stream:
        while block := stream.read(_DIGEST_BLOCK):
            state.update(block)
            size += len(block)
            on_read(len(block))
    return {"bytes": size, "xxh3_128": state.hexdigest()}


def write_digests(directory: Path, known: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Writes ``DIGESTS.json`` beside the files of a directory that nobody writes into any more.

    Args:
        directory: all files below it are recorded, by their path from here.
        known: entries that :func:`digest` made before, by path; the others are made now.
    """
    # What is known need not be visible from here yet: on a network file system another node may have written it.
    files = dict(known or {})
    files.update({name: digest(directory / name) for name in _names(directory) if name not in files})
    _write_digests(directory, files)


def _write_digests(directory: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    content = {"algorithm": "xxh3-128", "files": {name: dict(files[name]) for name in sorted(files)}}
    write_text(directory / DIGESTS, json.dumps(content, indent=1))


def add_digest(path: Path, final: Path) -> None:
    """Records a file in the ``DIGESTS.json`` of the directory that it is going to lie in, beside what stands there.

    Args:
        path: where it lies now, complete.
        final: its path from now on.
    """
    files = {**(read_digests(final.parent) or {}), final.name: digest(path)}
    _write_digests(final.parent, files)


def check_digests(
    directory: Path, names: Iterable[str] | None = None, on_read: Callable[[int], None] = lambda count: None
) -> bool:
    """Compares files with their digests; see :func:`find_damage`.

    Returns:
        Whether there are digests to compare with; files from elsewhere have none.

    Raises:
        DigestError: files are missing or differ, naming them.
    """
    damage = find_damage(directory, names, on_read=on_read)
    if damage:
        raise DigestError(_listed(damage))
    return damage is not None


def find_damage(
    directory: Path,
    names: Iterable[str] | None = None,
    contents: bool = True,
    on_read: Callable[[int], None] = lambda count: None,
) -> list[str] | None:
    """Compares the files of a directory with its ``DIGESTS.json``; files that it does not name are not looked at.

    This shows damage and not forgery: whoever changes a file can change its digest.

    Args:
        directory: that holds the files.
        names: look at these alone; None for all that are recorded.
        contents: whether to read them; else only their sizes are compared.
        on_read: called with the number of bytes that were just read.

    Returns:
        One line per file that is missing or differs; None where there are no digests.

    Raises:
        FileError: ``DIGESTS.json`` itself is damaged.
    """
    recorded = read_digests(directory)
    if recorded is None:
        return None
    wanted = recorded if names is None else [name for name in names if name in recorded]
    lines = (_damage(directory / name, recorded[name], contents, on_read) for name in wanted)
    return [line for line in lines if line is not None]


def _damage(path: Path, expected: Mapping[str, Any], contents: bool, on_read: Callable[[int], None]) -> str | None:
    if not path.is_file():
        return f"{path} is missing, and {DIGESTS} names it: copy the directory again"
    # The size first: it needs no reading.
    if path.stat().st_size != expected["bytes"]:
        problem = (
            f"has {path.stat().st_size:,} bytes and {DIGESTS} says {expected['bytes']:,}: the file is cut or changed"
        )
    elif contents and digest(path, on_read) != expected:
        problem = f"does not match its digest in {DIGESTS}: the file is damaged or changed"
    else:
        return None
    return f"{path} {problem}; copy it again (or delete {DIGESTS}, if the change was yours)"


def _listed(lines: Sequence[str], limit: int = 5) -> str:
    more = [f"and {len(lines) - limit} more"] if len(lines) > limit else []
    return "\n  ".join([*lines[:limit], *more])


def read_digests(directory: Path) -> dict[str, dict[str, Any]] | None:
    """What ``DIGESTS.json`` records, by path from the directory; None where there is none.

    Raises:
        FileError: it is damaged.
    """
    path = directory / DIGESTS
    if not path.exists():
        return None
    return {name: entry.model_dump() for name, entry in validated(_Digests, read_json(path), str(path)).files.items()}


def is_inside(name: str) -> bool:
    """Whether a relative name that a file holds stays below the directory that it is relative to."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def _names(directory: Path) -> list[str]:
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return [name for path in paths if (name := path.relative_to(directory).as_posix()) != DIGESTS]


# ------------------------------------------------------------------------------------------------ reading


def require_file(path: Path) -> os.stat_result:
    """Makes sure that a path leads to a regular file: a directory, pipe or socket is read by nobody here.

    Raises:
        FileError: it does not, in words that tell what is there from what is missing.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        raise FileError(f"{path}: there is no such file") from None
    except OSError as error:
        raise FileError(f"{path}: {error.strerror or error}") from None
    if not stat.S_ISREG(found.st_mode):
        raise FileError(f"{path}: this is no regular file")
    return found


def read_text(path: Path) -> str:
    """The text of a small file.

    Raises:
        FileError: not a regular file, not readable, too large for a text that people write, or not UTF-8.
    """
    try:
        size = require_file(path).st_size
        if size > _MAX_TEXT_BYTES:
            raise FileError(f"{path}: {size:,} bytes are too many for such a file")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError(f"{path}: not UTF-8 ({error.reason} at byte {error.start:,})") from None
    except OSError as error:
        raise FileError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{str(path)!r} is no path: {error}") from None


def read_json(path: Path) -> Any:
    """The value of a JSON file, under the promises of :func:`parse_json`."""
    return parse_json(read_text(path), str(path))


def parse_json(text: str, where: str, allow_nan: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        text: to parse.
        where: file or place, for the message.
        allow_nan: whether NaN and infinities are numbers, as Python writes them.

    Raises:
        FileError: not JSON, a key twice, NaN or infinity, or nested beyond reason.
    """
    try:
        constant = float if allow_nan else _refuse_constant
        return json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=constant)
    except RecursionError:
        raise FileError(f"{where}: nested too deeply to be meant") from None
    except ValueError as error:
        raise FileError(f"{where}: not valid JSON ({error})") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands there twice")
    return found


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


def read_yaml(path: Path) -> Any:
    """The value of a YAML file, under the promises of :func:`parse_yaml`."""
    return parse_yaml(read_text(path), str(path))


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text, by the core schema of YAML 1.2.

    So ``1e-4`` is a number, ``on`` and ``no`` are text, and dates are text.

    Args:
        text: to parse.
        where: file or place, for the message.

    Raises:
        FileError: not YAML, a key twice, an alias that contains itself, or nested or large beyond reason.
    """
    try:
        value = yaml.load(text, Loader=_Loader)  # a SafeLoader
        _count(value, {})
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark is not None else ""
        raise FileError(f"{where}{place}: {error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        raise FileError(f"{where}: character {error.position + 1:,}: {error.reason}") from None
    except RecursionError:
        raise FileError(f"{where}: nested too deeply to be meant") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise FileError(f"{where}: {error}") from None
    return value


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: typing.ClassVar[dict[str, Any]] = {}
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="nested too deeply to be meant", problem_mark=mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        if isinstance(node, yaml.MappingNode):
            seen: set[Any] = set()
            for key_node, _ in node.value:
                if key_node.tag == "tag:yaml.org,2002:merge":
                    continue
                key = self.construct_object(key_node, deep=True)
                if not isinstance(key, str | int | float | bool | None):
                    raise yaml.MarkedYAMLError(problem="this cannot be a key", problem_mark=key_node.start_mark)
                if key in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key!r} stands there twice", problem_mark=key_node.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: Any) -> int | float:
        text = self.construct_scalar(node)
        if len(text) > 40:
            raise yaml.MarkedYAMLError(problem="a number of so many digits", problem_mark=node.start_mark)
        if node.tag.endswith("float"):
            return float(re.sub(r"\.(inf|nan)$", r"\1", text.lower()))
        return int(text, 0) if text[:2] in ("0x", "0o") else int(text)


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("int", r"[-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
):
    _letters = [letter if letter != "\0" else "" for letter in _first]
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _letters)
for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_number)


def _count(value: Any, known: dict[int, int]) -> int:
    """Nodes of a value with its aliases written out; raises where they are too many or contain themselves."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) in known:
        if known[id(value)] == 0:
            raise ValueError("an alias contains itself")
        return known[id(value)]
    known[id(value)] = 0
    children = value.values() if isinstance(value, dict) else value
    known[id(value)] = total = 1 + sum(_count(child, known) for child in children)
    if total > _MAX_YAML_NODES:
        raise ValueError("its aliases stand for more values than can be meant")
    return total


# ------------------------------------------------------------------------------------------------ understanding


class Strict(BaseModel):
    """Base of the models of our files: unknown keys are errors, and no value is converted into another type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Digest(Strict):
    bytes: int
    xxh3_128: str


class _Digests(Strict):
    algorithm: typing.Literal["xxh3-128"]
    files: dict[str, _Digest]

    @field_validator("files")
    @classmethod
    def _inside(cls, files: dict[str, _Digest]) -> dict[str, _Digest]:
        for name in files:
            if not is_inside(name):
                raise ValueError(f"{name!r} is no file below this directory")
        return files


Model = TypeVar("Model", bound=BaseModel)


def validated(kind: type[Model], content: Any, where: str) -> Model:
    """Content of a file as the model that describes it.

    Args:
        kind: the model.
        content: as a reader returned it.
        where: file, for the message.

    Raises:
        FileError: the first mistakes, a line each, with the path of its key; an unknown key with the nearest known one.
    """
    try:
        # By the names that the file has: a model may have another spelling of them for Python.
        return kind.model_validate(content, by_alias=True, by_name=False)
    except ValidationError as error:
        # Unknown keys first: what is missing is often what was misspelt.
        entries = sorted(error.errors(include_url=False), key=lambda entry: entry["type"] != "extra_forbidden")
        lines = [_mistake(kind, entry) for entry in entries]
    raise FileError(f"{where}: {_listed(lines)}")


def _mistake(kind: type[BaseModel], entry: Any) -> str:
    location = [str(part) for part in entry["loc"]]
    path = ".".join(location) or "the whole"
    if entry["type"] == "extra_forbidden":
        return f"unknown key {path}{nearest(location[-1], _keys(kind, entry['loc'][:-1]))}"
    if entry["type"] == "missing":
        return f"{path} is missing"
    if entry["type"] == "value_error":
        return f"{path}: {entry['ctx']['error']}"
    expected = _EXPECTED.get(entry["type"]) or entry["msg"].replace("Input should be", "expected")
    return f"{path}: {expected}, got {_short(entry['input'])}"


# pydantic's types of mistakes -> our words; the others are told in its own.
_EXPECTED = {
    "model_type": "expected a mapping",
    "dict_type": "expected a mapping",
    "list_type": "expected a list",
    "tuple_type": "expected a list",
    "string_type": "expected text",
    "int_type": "expected a whole number",
    "float_type": "expected a number",
    "bool_type": "expected true or false",
}


def _keys(kind: Any, location: Sequence[Any]) -> list[str]:
    """The keys that a model knows at a place inside of it."""
    for part in location:
        fields = getattr(kind, "model_fields", {})
        annotation = next((f.annotation for n, f in fields.items() if part in (n, f.alias)), None)
        kind = next(iter(_models(annotation)), kind) if annotation is not None else kind
    return [field.alias or name for name, field in getattr(kind, "model_fields", {}).items()]


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in typing.get_args(annotation) for model in _models(argument)]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def nearest(key: str, known: Sequence[str], otherwise: str | None = None) -> str:
    """``: did you mean ...?``, or the list of what is known where nothing is near.

    Args:
        key: that is not known.
        known: what there is.
        otherwise: instead of that list.
    """
    close = difflib.get_close_matches(key.replace("_", "-"), known, n=1) or difflib.get_close_matches(key, known, n=1)
    if close:
        return f": did you mean {close[0]}?"
    return f": known are {', '.join(known)}" if otherwise is None else otherwise

# SPDX-License-Identifier: Apache-2.0
"""JSON and YAML, read here and nowhere else: plain values, or one :class:`FileError`."""

import difflib
import json
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from .atomic import FileError, read_text

_MAX_DEPTH = 100


# With its aliases written out; the files that people write have some hundred.
_MAX_YAML_NODES = 1_000_000


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
    yaml_implicit_resolvers: typing.ClassVar[dict[str, Any]] = {}  # type: ignore[misc]
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


class Strict(BaseModel):
    """Base of the models of our files: unknown keys are errors, and no value is converted into another type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


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
    raise FileError(f"{where}: {listed(lines)}")


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


def listed(lines: Sequence[str], limit: int = 5) -> str:
    """The first lines of a message that may have hundreds, and how many more there are."""
    more = [f"and {len(lines) - limit} more"] if len(lines) > limit else []
    return "\n  ".join([*lines[:limit], *more])

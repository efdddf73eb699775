# SPDX-License-Identifier: Apache-2.0
"""The only readers of JSON and YAML: they return plain values, or raise one :class:`FileError`."""

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
# The limit counts nodes with aliases written out; the files that people write have some hundred.
_MAX_YAML_NODES = 1_000_000


def read_json(path: Path) -> Any:
    """Returns the value of a JSON file, under the rules of :func:`parse_json`."""
    return parse_json(read_text(path), str(path))


def parse_json(text: str, where: str, allow_nan: bool = False) -> Any:
    """Returns the value of a JSON text; `allow_nan` accepts NaN and infinities, as Python writes them.

    Raises:
        FileError: if the text is not JSON, has a key twice or NaN or an infinity without `allow_nan`, or is nested
            beyond reason; the message begins with `where`.
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
    """Returns the value of a YAML file, under the rules of :func:`parse_yaml`."""
    return parse_yaml(read_text(path), str(path))


def parse_yaml(text: str, where: str) -> Any:
    """Returns the value of a YAML text, by the core schema of YAML 1.2.

    By this schema ``1e-4`` is a number, ``on`` and ``no`` are text, and dates are text.

    Raises:
        FileError: if the text is not YAML, has a key twice or an alias that contains itself, or is nested or large
            beyond reason; the message begins with `where`.
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
            raise _yaml_mistake("nested too deeply to be meant", self.peek_event())
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool | None):
                raise _yaml_mistake("this cannot be a key", key_node)
            if key in seen:
                raise _yaml_mistake(f"the key {key!r} stands there twice", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: Any) -> int | float:
        text = self.construct_scalar(node)
        if len(text) > 40:
            raise _yaml_mistake("a number of so many digits", node)
        if node.tag.endswith("float"):
            return float(re.sub(r"\.(inf|nan)$", r"\1", text.lower()))
        return int(text, 0) if text[:2] in ("0x", "0o") else int(text)


def _yaml_mistake(problem: str, place: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)


for _kind, _pattern in {
    "bool": r"true|True|TRUE|false|False|FALSE",
    "null": r"~|null|Null|NULL|",
    "int": r"[-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    "merge": r"<<",
}.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_pattern})\Z"), None)
for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_number)


def _count(value: Any, known: dict[int, int]) -> int:
    """Counts the nodes of a value with its aliases written out; raises if they are too many or contain themselves."""
    if not isinstance(value, dict | list):
        return 1
    total = known.get(id(value))
    if total is None:
        known[id(value)] = 0
        children = value.values() if isinstance(value, dict) else value
        known[id(value)] = total = 1 + sum(_count(child, known) for child in children)
    if not 0 < total <= _MAX_YAML_NODES:
        raise ValueError("its aliases stand for more values than can be meant" if total else "an alias contains itself")
    return total


class Strict(BaseModel):
    """The base of the models of our files: unknown keys are errors, and no value is converted to another type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


Model = TypeVar("Model", bound=BaseModel)


def validated(kind: type[Model], content: Any, where: str) -> Model:
    """Validates the content of a file, as a reader returned it, and returns the model that describes it.

    Raises:
        FileError: if the content has mistakes: the message lists the first ones, a line each, with the path of its key,
            and for an unknown key the nearest known one.
    """
    try:
        # By the names that the file uses, because a model may spell them differently for Python.
        return kind.model_validate(content, by_alias=True, by_name=False)
    except ValidationError as error:
        # Unknown keys come first, because a missing key is often a misspelled one.
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
    got = repr(entry["input"])
    return f"{path}: {expected}, got {got if len(got) <= 80 else f'{got[:80]}...'}"


# pydantic's types of mistakes -> our words; other types keep pydantic's message.
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


def _keys(kind: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """Returns the keys that a model knows at a location inside it."""
    for part in location:
        annotation = next((f.annotation for n, f in kind.model_fields.items() if part in (n, f.alias)), None)
        kind = next(iter(_models(annotation)), kind)
    return [field.alias or name for name, field in kind.model_fields.items()]


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Returns the models that a type annotation contains."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in typing.get_args(annotation) for model in _models(argument)]


def nearest(key: str, known: Sequence[str], otherwise: str | None = None) -> str:
    """Returns ``: did you mean ...?`` for an unknown key; if no key is near, `otherwise` or the list of known keys."""
    close = difflib.get_close_matches(key.replace("_", "-"), known, n=1) or difflib.get_close_matches(key, known, n=1)
    if close:
        return f": did you mean {close[0]}?"
    return f": known are {', '.join(known)}" if otherwise is None else otherwise


def listed(lines: Sequence[str], limit: int = 5) -> str:
    """Joins the first lines of a message that may have hundreds, and says how many more there are."""
    more = [f"and {len(lines) - limit} more"] if len(lines) > limit else []
    return "\n  ".join([*lines[:limit], *more])

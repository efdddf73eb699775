# SPDX-License-Identifier: Apache-2.0
"""Reader of conversations: JSON Lines with ``messages``, or with ``instruction``, ``input`` and ``output``."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..corpus import read_lines
from .answers import REASONING

ROLES = ("system", "developer", "user", "assistant", "tool")
# What chat templates read of a message. Any other field, such as a weight of the turn, would have no effect.
_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id", *REASONING)
_INSTRUCTION, _MESSAGES = "instruction", "messages"


@dataclass(frozen=True)
class Conversation:
    """A conversation of people, tools and the model.

    Attributes:
        messages: the messages in order, each with ``role``, ``content`` and the other known fields of the line.
        tools: the JSON schemas of the functions that the model may call, or None.
        place: ``file:line`` of the conversation, for error messages.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    place: str

    @property
    def text(self) -> str:
        """The contents of all messages, a line each, for code that needs only the words."""
        return "\n".join(message.get("content") or "" for message in self.messages)


def read_conversations(
    paths: Iterable[str | os.PathLike[str]], on_read: Callable[[int], object] = lambda count: None
) -> Iterator[Conversation]:
    """Yields the conversations of files, in order, holding one in memory at a time.

    A line is a JSON object with ``messages`` (and ``tools``), or with ``instruction`` and ``output`` (and ``input``,
    which follows the instruction after a blank line, and ``system``). Other keys of the object are not read.

    Args:
        paths: UTF-8 files in JSON Lines, plain or ``.gz``.
        on_read: a function called with the number of bytes that were just read from disk (for a progress bar).

    Raises:
        ValueError: if a file cannot be read, or a line is no conversation; the message begins with file and line.
    """
    for path in map(Path, paths):
        for number, line in read_lines(path, on_read):
            if line.strip():
                place = f"{path}:{number}"
                try:
                    yield _conversation(_parsed(line), place)
                except ValueError as error:
                    raise ValueError(f"{place}: {error}") from None


def _parsed(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
        # JSON escapes may spell lone surrogates, which have no UTF-8 form.
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair (\\ud800 to \\udfff); repair the escape") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error}); every line must be one JSON object") from None
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}; every line must be one JSON object")
    return record


def _conversation(record: dict[str, Any], place: str) -> Conversation:
    if (_MESSAGES in record) == (_INSTRUCTION in record):
        raise ValueError(
            f"the object has {', '.join(map(repr, record)) or 'no keys'}; give it either {_MESSAGES!r}, or "
            f"{_INSTRUCTION!r} and 'output'"
        )
    if _INSTRUCTION in record:
        return Conversation(_from_instruction(record), None, place)
    messages, tools = record[_MESSAGES], record.get("tools")
    if "system" in record:
        raise ValueError(f"'system' beside {_MESSAGES!r}; make it the first message, of the role system")
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{_MESSAGES!r} must be a list of at least one message")
    # Data sets in table form write every field of every message, even if the field is empty.
    messages = [
        {key: value for key, value in message.items() if key == "content" or value not in (None, "")}
        if isinstance(message, dict)
        else message
        for message in messages
    ]
    for number, message in enumerate(messages, start=1):
        if mistake := _mistake(message):
            raise ValueError(f"message {number} {mistake}")
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError("no message of the assistant, so that there is nothing to learn; leave the line out")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError("'tools' must be a list of JSON objects (a string that holds one is not)")
    return Conversation(messages, tools or None, place)


def _mistake(message: Any) -> str | None:
    """Returns what is wrong with a message, or None."""
    if not isinstance(message, dict):
        return f"is a JSON {type(message).__name__}, not an object"
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    if role not in ROLES:
        return f"has the role {role!r}; known are {', '.join(ROLES)}"
    if unknown := [key for key in message if key not in _FIELDS]:
        return f"has {unknown[0]!r}, which would have no effect; known are {', '.join(_FIELDS)}"
    if calls is not None and not (role == "assistant" and isinstance(calls, list) and calls):
        return "has 'tool_calls' that are no list, or not of the assistant; leave them out where there are none"
    if isinstance(content, str) and content.strip():
        return None
    if calls and content in (None, ""):
        return None
    return f"({role}) has no text in 'content'; it must be a string that is not empty"


def _from_instruction(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    if record.get("history"):
        raise ValueError("'history' is not read; write such conversations with 'messages'")
    for key in (_INSTRUCTION, "output"):
        if not isinstance(record.get(key), str) or not record[key].strip():
            raise ValueError(f"{key!r} must be a string that is not empty")
    for key in ("input", "system"):
        if not isinstance(record.get(key) or "", str):
            raise ValueError(f"{key!r} must be a string")
    asked, system = record[_INSTRUCTION], record.get("system") or ""
    if (more := record.get("input") or "").strip():
        asked += f"\n\n{more}"
    said = [("system", system)] if system.strip() else []
    said += [("user", asked), ("assistant", record["output"])]
    return [{"role": role, "content": content} for role, content in said]

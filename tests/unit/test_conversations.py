# SPDX-License-Identifier: Apache-2.0
"""Tests of reading conversations from JSON Lines, and of invalid lines."""

import gzip
import json
from pathlib import Path

import pytest

from bitcpm_megatron.data.sft.conversations import Conversation, read_conversations

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
TOOL = {"type": "function", "function": {"name": "look"}}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}


def read(path: Path, *records: object) -> list[Conversation]:
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    text = "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogatepass")
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return list(read_conversations([path]))


@pytest.mark.parametrize("name", ["talk.jsonl", "talk.jsonl.gz", "talk"])
def test_messages_are_taken_as_they_are(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    calling = [USER, CALL, {"role": "tool", "content": "blue", "tool_call_id": "1", "name": "look"}, ANSWER]
    records = [{"messages": [USER, ANSWER], "id": 7}, "", {"tools": [TOOL], "messages": calling}]
    assert read(path, *records) == [
        Conversation([USER, ANSWER], None, f"{path}:1"),
        Conversation(calling, [TOOL], f"{path}:3"),
    ]


def test_fields_with_nothing_in_them_are_none(tmp_path: Path) -> None:
    """Exports of tables have every field in every message."""
    full = [{**message, "tool_calls": None, "name": "", "reasoning_content": None} for message in (USER, ANSWER)]
    (found,) = read(tmp_path / "talk.jsonl", {"messages": full, "tools": None})
    assert found.messages == [USER, ANSWER] and found.tools is None


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"instruction": "Add.", "output": "3"}, [("user", "Add."), ("assistant", "3")]),
        ({"instruction": "Add.", "input": "", "output": "3"}, [("user", "Add."), ("assistant", "3")]),
        ({"instruction": "Add.", "input": "1, 2", "output": "3"}, [("user", "Add.\n\n1, 2"), ("assistant", "3")]),
        (
            {"system": "Brief.", "instruction": "Add.", "input": None, "output": " 3\n", "history": []},
            [("system", "Brief."), ("user", "Add."), ("assistant", " 3\n")],
        ),
    ],
)
def test_an_instruction_is_one_turn(tmp_path: Path, record: dict, said: list[tuple[str, str]]) -> None:
    [found] = read(tmp_path / "talk.jsonl", record)
    assert [(message["role"], message["content"]) for message in found.messages] == said
    assert found.text == "\n".join(content for _, content in said)


@pytest.mark.parametrize(
    ("record", "mistake"),
    [
        ("{", "not valid JSON .*; every line must be one JSON object"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "a JSON list; every line must be one JSON object"),
        ({"text": "a"}, "the object has 'text'; give it either 'messages', or 'instruction' and 'output'"),
        ({}, "the object has no keys; give it either"),
        ({"messages": [USER, ANSWER], "instruction": "a"}, "the object has 'messages', 'instruction'; give it either"),
        ({"messages": []}, "'messages' must be a list of at least one message"),
        ({"messages": "a"}, "'messages' must be a list"),
        ({"messages": [USER, "a"]}, "message 2 is a JSON str, not an object"),
        ({"messages": [USER, {**ANSWER, "role": "bot"}]}, "message 2 has the role 'bot'; known are system, developer"),
        ({"messages": [{"content": "a"}, ANSWER]}, "message 1 has the role None"),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "message 2 has 'weight', which would have no effect; known"),
        ({"messages": [USER, {**ANSWER, "content": " \n"}]}, r"message 2 \(assistant\) has no text in 'content'"),
        ({"messages": [{"role": "user"}, ANSWER]}, r"message 1 \(user\) has no text in 'content'"),
        (
            {"messages": [{**USER, "content": [{"type": "text"}]}, ANSWER]},
            r"message 1 \(user\) has no text .* a string",
        ),
        ({"messages": [{**CALL, "role": "user"}, ANSWER]}, "message 1 has 'tool_calls' that are no list, or not of"),
        ({"messages": [USER, {**CALL, "tool_calls": []}]}, "message 2 has 'tool_calls' that are no list"),
        ({"messages": [USER, {**CALL, "content": 3}]}, r"message 2 \(assistant\) has no text in 'content'"),
        ({"messages": [USER]}, "no message of the assistant, so that there is nothing to learn"),
        ({"messages": [USER, ANSWER], "system": "a"}, "'system' beside 'messages'; make it the first message"),
        ({"messages": [USER, ANSWER], "tools": "[]"}, "'tools' must be a list of JSON objects"),
        ({"messages": [USER, ANSWER], "tools": ["look"]}, "'tools' must be a list of JSON objects"),
        ({"messages": [USER, {**ANSWER, "content": "\ud800"}]}, "half of a surrogate pair"),
        ({"instruction": "a"}, "'output' must be a string that is not empty"),
        ({"instruction": " ", "output": "b"}, "'instruction' must be a string that is not empty"),
        ({"instruction": "a", "output": "b", "input": 3}, "'input' must be a string"),
        (
            {"instruction": "a", "output": "b", "history": [["c", "d"]]},
            "'history' is not read; write such conversations",
        ),
    ],
)
def test_a_line_that_is_no_conversation_is_refused_with_its_place(tmp_path: Path, record: object, mistake: str) -> None:
    with pytest.raises(ValueError, match=rf"talk.jsonl:2: {mistake}"):
        read(tmp_path / "talk.jsonl", {"messages": [USER, ANSWER]}, record)


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: No such file"):
        list(read_conversations([tmp_path / "nowhere"]))
    (tmp_path / "latin.jsonl").write_bytes(b'{"messages": "\xe9"}\n')
    with pytest.raises(ValueError, match="latin.jsonl:1: not UTF-8"):
        list(read_conversations([tmp_path / "latin.jsonl"]))
    (tmp_path / "no.gz").write_bytes(b"text")
    with pytest.raises(ValueError, match="no.gz: reading stopped after line 0"):
        list(read_conversations([tmp_path / "no.gz"]))

# SPDX-License-Identifier: Apache-2.0
"""Tests of the readers of JSON, YAML and digests, which return plain values or raise one clear error for any file."""

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from bitcpm_megatron.files import (
    DIGESTS,
    DigestError,
    FileError,
    Strict,
    check_digests,
    parse_json,
    parse_yaml,
    read_json,
    read_text,
    read_yaml,
    validated,
    write_digests,
)

LAUGHS = "a0: &a0 [1, 2]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "f:3:1: the key 'a' stands there twice"),
        ("x:\n  a: 1\n  a: 2\n", "f:3:3: the key 'a' stands there twice"),
        ("a: [1, 2", "f:1:9"),
        ("? [1, 2]\n: x\n", "this cannot be a key"),
        ("a: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("a: " + "9" * 5000, "so many digits"),
        ("a: &x [*x]", "contains itself"),
        (LAUGHS, "more values than can be meant"),
        ("a: !!python/object/apply:os.system ['true']", "f:1:4: could not determine a constructor"),
        ("a: \x00", "special characters are not allowed"),
        ("a: 'x", "f:1:"),
        ("a: *nowhere", "found undefined alias"),
    ],
)
def test_yaml_that_cannot_be_meant(text, message):
    with pytest.raises(FileError) as error:
        parse_yaml(text, "f")
    assert message in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 200


def test_yaml_by_the_core_schema():
    text = (
        "{a: 1e-4, b: on, c: no, d: 2024-13-45, e: 1:30, f: 010, g: ~, h: true, i: 0x10, j: .5, k: -3, l: 1., m: 1_0}"
    )
    assert parse_yaml(text, "f") == {
        **{"a": 1e-4, "b": "on", "c": "no", "d": "2024-13-45", "e": "1:30", "f": 10, "g": None, "h": True, "i": 16},
        **{"j": 0.5, "k": -3, "l": 1.0, "m": "1_0"},
    }
    assert parse_yaml("a:\nb: ''", "f") == {"a": None, "b": ""}
    assert parse_yaml("base: &b {x: 1}\nmore: {<<: *b, y: 2}", "f")["more"] == {"x": 1, "y": 2}


@given(st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_value_or_one_error(text):
    for parse in (parse_yaml, parse_json):
        try:
            parse(text, "f")
        except FileError as error:
            assert str(error).startswith("f")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' stands there twice"),
        ("[" * 100_000, "nested too deeply"),
        ("[NaN]", "NaN is no number of JSON"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
        ("{", "not valid JSON"),
    ],
)
def test_json_that_cannot_be_meant(text, message):
    with pytest.raises(FileError, match="f: ") as error:
        parse_json(text, "f")
    assert message in str(error.value) and len(str(error.value)) < 200


def test_what_is_no_file_to_read(tmp_path: Path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "latin").write_bytes(b"\xff\xfe\x00")
    with (tmp_path / "huge").open("wb") as stream:
        stream.truncate(2**31)
    for name in ("fifo", "loop", "latin", "huge", "absent", ".", "a\0b"):
        with pytest.raises(FileError) as error:
            read_text(tmp_path / name)
        assert str(tmp_path) in str(error.value)
    (tmp_path / "good").write_text('{"a": 1}')
    assert read_json(tmp_path / "good") == read_yaml(tmp_path / "good") == {"a": 1}


class Inner(Strict):
    group_size: int = -1


class Outer(Strict):
    inner: dict[str, Inner]
    rate: float = Field(1.0, gt=0)
    one: Inner | None = None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"inner": {"x": {"group_siz": 3}}}, "f: unknown key inner.x.group_siz: did you mean group_size?"),
        ({"inner": {}, "one": {"zz": 3}}, "unknown key one.zz: known are group_size"),
        ({"inner": {}, "rat": 2}, "unknown key rat: did you mean rate?"),
        ({"inner": {"x": {"group_size": "3"}}}, "inner.x.group_size: expected a whole number, got '3'"),
        ({"inner": {}, "rate": -1.0}, "rate: expected greater than 0, got -1.0"),
        ({}, "inner is missing"),
        ([], "the whole: expected a mapping"),
        (None, "the whole: "),
    ],
)
def test_a_mistake_is_named_by_its_path(content: Any, message: str):
    with pytest.raises(FileError) as error:
        validated(Outer, content, "f")
    assert message in str(error.value)


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.bin").write_bytes(os.urandom(1000))
    (tmp_path / "sub" / "b.bin").write_bytes(b"")
    write_digests(tmp_path)
    return tmp_path


def test_digests_of_an_intact_directory(recorded: Path):
    assert check_digests(recorded)
    (recorded / "README.md").write_text("added by hand")
    assert check_digests(recorded)
    (recorded / DIGESTS).unlink()
    assert not check_digests(recorded)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "grow"])
def test_digests_show_damage(recorded: Path, damage: str):
    path = recorded / "a.bin"
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    {
        "flip": lambda: path.write_bytes(content),
        "cut": lambda: path.write_bytes(content[:-1]),
        "remove": path.unlink,
        "grow": lambda: path.write_bytes(content + b"\0"),
    }[damage]()
    with pytest.raises(DigestError, match="a.bin"):
        check_digests(recorded)
    assert check_digests(recorded, ["sub/b.bin"])


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", ""])
def test_digests_name_no_file_outside(recorded: Path, name: str):
    entry = '{"bytes": 1, "xxh3_128": ""}'
    (recorded / DIGESTS).write_text(f'{{"algorithm": "xxh3-128", "files": {{"{name}": {entry}}}}}')
    with pytest.raises(FileError, match="is no file below this directory"):
        check_digests(recorded)


def test_damaged_digests(recorded: Path):
    (recorded / DIGESTS).write_text("{")
    with pytest.raises(FileError, match=DIGESTS):
        check_digests(recorded)

# SPDX-License-Identifier: Apache-2.0
"""Tests of readers of text and JSON Lines, and of the split into training and validation documents."""

import gzip
import json
from pathlib import Path

import pytest

from bitcpm_megatron.data.corpus import document_split, read_documents

TEXTS = [f"Document {n}.\n\nIt has {n} parts, “quotes”, and\ta tab.\n    三值 weights: -1, 0, 1." for n in range(60)]


@pytest.fixture
def corpus_file(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text, "id": n}) + "\n" for n, text in enumerate(TEXTS)))
    return path


def read(path: Path, **options: object) -> list[str]:
    return [document["text"] for document in read_documents([path], **options)]


def test_json_lines_take_the_named_keys(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"title": "A", "text": "first\\nline", "n": 1}\n\n{"text": "", "title": "B"}')
    assert list(read_documents([path], keys=["title", "text"])) == [
        {"title": "A", "text": "first\nline"},
        {"title": "B", "text": ""},
    ]


def test_gzip_holds_the_same_documents_and_progress_counts_stored_bytes(tmp_path: Path, corpus_file: Path) -> None:
    packed = tmp_path / "corpus.jsonl.gz"
    packed.write_bytes(gzip.compress(corpus_file.read_bytes()))
    for path in (corpus_file, packed):
        counts: list[int] = []
        assert read(path, on_read=counts.append) == TEXTS
        assert sum(counts) == path.stat().st_size


def test_a_text_file_is_one_document_whatever_its_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes("\ufeff\nChapter 1\r\n\r\n\r\n  It was a dark\fnight.\n\n".encode())
    assert read(path) == ["Chapter 1\n\n\n  It was a dark\fnight."]


@pytest.mark.parametrize(
    ("separator", "line"),
    [("\f", "\f"), ("<|endoftext|>", "<|endoftext|>"), ("<|endoftext|>", "  <|endoftext|>\r"), ("", "")],
)
def test_separator_lines_split_a_text_file(tmp_path: Path, separator: str, line: str) -> None:
    path = tmp_path / "stories.txt"
    path.write_bytes(f"{line}\none\ntwo <|endoftext|> not a line\n{line}\n{line}\nthree\n{line}\n".encode())
    assert read(path, separator=separator) == ["one\ntwo <|endoftext|> not a line", "three"]


def test_the_suffix_tells_the_format_and_the_flag_overrides_it(tmp_path: Path) -> None:
    for name, option, expected in [
        ("a.TXT.GZ", "auto", ['{"text": "x"}']),
        ("a.v2.jsonl", "auto", ["x"]),
        ("part-000", "jsonl", ["x"]),
        ("a.jsonl", "text", ['{"text": "x"}']),
    ]:
        path = tmp_path / name
        content = b'{"text": "x"}'
        path.write_bytes(gzip.compress(content) if name.endswith("GZ") else content)
        assert read(path, input_format=option) == expected
    with pytest.raises(ValueError, match="part-000: the suffix '' does not tell.*--input-format"):
        read(tmp_path / "part-000")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', r"bad\.jsonl:3: not valid JSON .*--input-format text"),
        ('["text"]', r"bad\.jsonl:3: a JSON list; every line must be one JSON object"),
        ('{"content": "x", "id": 1}', r"bad\.jsonl:3: no key 'text', the object has 'content', 'id'.*--json-keys"),
        ('{"text": ["x"]}', r"bad\.jsonl:3: 'text' holds a list, not a string"),
        ('{"text": "\\ud83d"}', r"bad\.jsonl:3: 'text' holds half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_named_with_a_cure(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n")
    documents = read_documents([path])
    assert next(documents) == {"text": "good"}
    with pytest.raises(ValueError, match=message):
        next(documents)


def test_bytes_that_are_no_utf8_are_named(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("first\ncaf\xe9\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt:2: not UTF-8 .*iconv"):
        read(path)


def test_a_truncated_archive_is_an_error(tmp_path: Path, corpus_file: Path) -> None:
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(gzip.compress(corpus_file.read_bytes())[:-200])
    with pytest.raises(ValueError, match=r"cut\.jsonl\.gz: reading stopped after line \d+"):
        read(path)


def test_what_is_no_readable_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(ValueError, match="folder.txt: a directory"):
        read(tmp_path / "folder.txt")
    with pytest.raises(ValueError, match="absent.txt: No such file"):
        read(tmp_path / "absent.txt")


def test_keys_of_plain_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="plain text has no keys"):
        read(tmp_path / "a.txt", keys=["content"])


def test_a_text_without_separators_that_fills_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitcpm_megatron.data.corpus._MAX_TEXT_CHARACTERS", 100)
    path = tmp_path / "dump.txt"
    path.write_text("short\n\f\n" + "a line of text\n" * 50)
    with pytest.raises(ValueError, match=r"dump\.txt:3: .*longer than 100 characters.*--document-separator"):
        read(path)


def test_the_split_is_fixed_for_good() -> None:
    """The split must never change: new training data would contain validation documents of old runs."""
    sides = [document_split(f"document {n}", 0.25) for n in range(16)]
    assert "".join(side[0] for side in sides) == "tttttttttttvtttv"
    rewrapped = [document_split(f" document\n\t{n} ", 0.25) for n in range(16)]
    assert rewrapped == sides, "line breaks must not move a document"


def test_the_split_takes_about_the_fraction_and_grows_with_it() -> None:
    small, large = (
        {n for n in range(4000) if document_split(f"text {n}", fraction) == "valid"} for fraction in (0.05, 0.2)
    )
    assert small < large
    assert 0.04 < len(small) / 4000 < 0.06 and 0.18 < len(large) / 4000 < 0.22
    assert document_split("x", 0.0) == "train" and document_split("x", 1.0) == "valid"

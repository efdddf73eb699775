# SPDX-License-Identifier: Apache-2.0
"""Tests of the built-in corpus, which is prose from the documentation in CPython."""

import sys
import sysconfig
from pathlib import Path

import pytest

from bitcpm_megatron.data.corpus import document_split
from bitcpm_megatron.data.python_prose import python_prose

LONG = "This paragraph tells in plain words, and at some length, what the function next to it does. " * 3


FIRST_REST = f"""
    Use:
    >>> f(1)
    2

    rule ::= "x"

    Heading
    =======

    {"| 1 -> 2 " * 20}
"""


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes a small standard library, whose sources would raise if they were imported."""
    monkeypatch.setattr(
        "bitcpm_megatron.data.python_prose._pydoc_topics",
        lambda: {"b": f"Topic.b {LONG}", "a": f"Topic.a {LONG}", "0": "Short."},
    )
    sources = {
        "z.py": f'raise SystemExit\ndef f():\n    """Second. {LONG}"""\nclass C:\n    """Third. {LONG}"""\n',
        "a.py": f'"""First. {LONG}\n\n{FIRST_REST}"""\n',
        "m.py": "".join(f"    # {line}\n" for line in ("Comment.", *LONG.split(", "))) + "#\nx = 1 # not whole\n",
        "copy.py": f'"""First. {LONG}"""\n',
        "broken.py": f'"""Broken. {LONG}"""\nprint "python 2"\n',
        "test/t.py": f'"""Test. {LONG}"""\n',
        "pkg/tests/t.py": f'"""Tests. {LONG}"""\n',
        "site-packages/s.py": f'"""Site. {LONG}"""\n',
    }
    for name, source in sources.items():
        path = tmp_path / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return tmp_path / "lib"


def test_prose_comes_in_order_without_code_tests_and_copies(library: Path) -> None:
    documents = list(python_prose(library))
    assert [document.split()[0] for document in documents] == [
        "Topic.a",
        "Topic.b",
        "First.",
        "Comment.",
        "Second.",
        "Third.",
    ]
    assert documents[2] == f"First. {LONG.strip()}\n\nUse:\n\nHeading"
    assert documents[3].startswith("Comment.\nThis paragraph") and "not whole" not in documents[3]


@pytest.mark.slow
def test_no_paragraph_of_the_real_texts_stands_on_both_sides() -> None:
    """pydoc's topics contain each other; one package represents the library, which would take seconds to parse."""
    documents = list(python_prose(Path(sysconfig.get_path("stdlib"), "email")))
    assert sum(map(len, documents)) > 300_000
    assert min(map(len, documents)) >= 200
    sides: dict[str, set[str]] = {"train": set(), "valid": set()}
    for document in documents:
        paragraphs = (" ".join(paragraph.split()) for paragraph in document.split("\n\n"))
        sides[document_split(document)].update(words for words in paragraphs if len(words) >= 60)
    assert sides["train"] and sides["valid"]
    assert not sides["train"] & sides["valid"]


def test_a_python_without_the_texts_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no Python sources of the standard library"):
        list(python_prose(tmp_path))
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ValueError, match="has no pydoc_data.topics"):
        list(python_prose())

# SPDX-License-Identifier: Apache-2.0
"""A corpus without a download: the English prose in the documentation that every CPython contains, about 2 MB."""

import ast
import os
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from inspect import cleandoc
from pathlib import Path

from .corpus import normalized

_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_MIN_DOCUMENT_CHARACTERS = 200
# Shorter paragraphs (headings, "Changed in version 3.8: ...") may recur; longer ones that recur are copies.
_LONG_PARAGRAPH = 60
# A paragraph of that length with a smaller share of letters is a formula, a table or a diagram.
_MIN_LETTERS = 0.65


def python_prose(stdlib: str | os.PathLike[str] | None = None) -> Iterator[str]:
    """Yields English prose that every CPython contains: pydoc's language reference, docstrings and block comments.

    The modules are parsed, not imported. Test packages and site-packages are left out, interpreter sessions, grammar
    rules and diagrams are cut, and a paragraph of 60 characters or more is yielded only the first time it occurs, so
    that none is on both sides of `document_split`. The order is the same on every run of one Python version. The
    documents have at least 200 characters and are dedented, their paragraphs separated by blank lines. `stdlib` is the
    folder of the library's sources, by default that of the running Python.

    Raises:
        ValueError: if this Python has no ``pydoc_data.topics`` or no sources of its library.
    """
    seen: set[str] = set()
    for text in _raw_prose(Path(stdlib or sysconfig.get_path("stdlib"))):
        paragraphs = [
            paragraph
            for paragraph in map(_prose_of, cleandoc(text).split("\n\n"))
            if (words := normalized(paragraph)) and (len(words) < _LONG_PARAGRAPH or words not in seen)
        ]
        document = "\n\n".join(paragraphs)
        if len(document) >= _MIN_DOCUMENT_CHARACTERS:
            seen.update(map(normalized, paragraphs))
            yield document


def _raw_prose(root: Path) -> Iterator[str]:
    topics = _pydoc_topics()
    for name in sorted(topics):
        yield topics[name]
    sources = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = set(subfolders) - _SKIPPED_FOLDERS
        sources += [Path(folder, name) for name in names if name.endswith(".py")]
    if not sources:
        raise ValueError(
            f"{root}: no Python sources of the standard library; use a CPython that carries them as .py files"
        )
    for path in sorted(sources, key=lambda path: path.relative_to(root).as_posix()):
        try:
            with tokenize.open(path) as stream:
                source = stream.read()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in old modules do not concern us
                tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            continue  # templates and samples that are not Python code of this version
        yield from _docstrings(tree)
        yield from _block_comments(source)


def _pydoc_topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ValueError(
            "this Python has no pydoc_data.topics, which some distributions package apart; install the full standard "
            "library, use another CPython, or give your own text with --input"
        ) from error
    return topics


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Yields docstrings in the order of the source."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield ast.get_docstring(node, clean=False) or ""
    for child in ast.iter_child_nodes(node):
        yield from _docstrings(child)


def _block_comments(source: str) -> Iterator[str]:
    """Yields runs of whole-line comments without their ``#`` signs."""
    block: list[str] = []
    for line in [*source.splitlines(), ""]:
        stripped = line.strip()
        if stripped.startswith("#"):
            block.append(stripped.lstrip("#"))
        elif block:
            yield "\n".join(["", *block])  # cleandoc ignores the first line when it looks for the common indent
            block = []


def _prose_of(paragraph: str) -> str:
    """Returns a paragraph without rulers, up to its first interpreter prompt; nothing for grammar and diagrams."""
    if "::=" in paragraph:
        return ""
    lines = []
    for line in paragraph.split("\n"):
        if line.lstrip().startswith(">>>"):
            break
        if any(map(str.isalnum, line)):
            lines.append(line.rstrip())
    marks = [mark for line in lines for mark in line if not mark.isspace()]
    if len(marks) >= _LONG_PARAGRAPH and sum(map(str.isalpha, marks)) < _MIN_LETTERS * len(marks):
        return ""
    return "\n".join(lines)

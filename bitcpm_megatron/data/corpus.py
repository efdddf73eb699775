# SPDX-License-Identifier: Apache-2.0
"""Streaming readers of plain text and JSON Lines, and the split into training and validation documents.

A document is a ``dict`` from key to text. A JSON Lines file has one document per line. A plain text file is one
document under the key ``text``, like a book or an article, unless lines that hold only a separator (by default a form
feed) split it. Blank lines do not split: they separate paragraphs, and a model should see paragraphs in their context.
"""

import argparse
import hashlib
import io
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from gzip import GzipFile
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from ..cli import Number

FORM_FEED = "\f"
TEXT_KEY = "text"
_JSON_SUFFIXES = {".jsonl", ".ndjson", ".json"}
_TEXT_SUFFIXES = {".txt", ".text", ".md", ".rst"}
# SentencePiece needs about 50 bytes of memory per character; a longer document probably has an unknown separator.
_MAX_TEXT_CHARACTERS = 64_000_000
_BUFFER_BYTES = 2**18
_VALID_FRACTION = 0.05


def read_documents(
    paths: Iterable[str | os.PathLike[str]],
    *,
    keys: Sequence[str] = (TEXT_KEY,),
    input_format: str = "auto",
    separator: str = FORM_FEED,
    on_read: Callable[[int], object] = lambda count: None,
) -> Iterator[dict[str, str]]:
    """Yields the documents of files, in order, holding one document in memory at a time.

    Args:
        paths: UTF-8 files, plain or ``.gz``.
        keys: the keys to take from each JSON object; plain text has the key ``text`` only.
        input_format: ``jsonl``, ``text``, or ``auto``, which goes by the suffix.
        separator: the line of plain text, ignoring spaces around it, that ends a document. The empty string stands for
            blank lines.
        on_read: a function called with the number of bytes that were just read from disk (for a progress bar).

    Raises:
        ValueError: if a file cannot be read or lacks what was asked for; the message names file, line and cure.
    """
    for path in map(Path, paths):
        if detect_format(path, input_format) == "jsonl":
            for number, line in read_lines(path, on_read):
                if line.strip():
                    yield _select(line, keys, f"{path}:{number}")
        elif list(keys) == [TEXT_KEY]:
            yield from _read_text(path, separator, on_read)
        else:
            raise ValueError(
                f"{path}: plain text has no keys, {', '.join(keys)} cannot be taken from it; leave out --json-keys, or "
                "pass --input-format jsonl if the file holds JSON Lines"
            )


def detect_format(path: Path, input_format: str = "auto") -> str:
    """Returns `input_format`, or if it is ``auto`` the format ``jsonl`` or ``text`` by the suffix before any ``.gz``.

    Raises:
        ValueError: if the suffix does not tell the format.
    """
    if input_format != "auto":
        return input_format
    suffix = next((suffix for suffix in map(str.lower, reversed(path.suffixes)) if suffix != ".gz"), "")
    if suffix in _JSON_SUFFIXES:
        return "jsonl"
    if suffix in _TEXT_SUFFIXES:
        return "text"
    raise ValueError(f"{path}: the suffix {suffix!r} does not tell the format; pass --input-format jsonl or text")


def _select(line: str, keys: Sequence[str], place: str) -> dict[str, str]:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(
            f"{place}: not valid JSON ({error}); every line must be one JSON object, and plain text needs "
            "--input-format text"
        ) from error
    if not isinstance(record, dict):
        raise ValueError(f"{place}: a JSON {type(record).__name__}; every line must be one JSON object")
    texts = {}
    for key in keys:
        if key not in record:
            raise ValueError(
                f"{place}: no key {key!r}, the object has {', '.join(map(repr, record)) or 'no keys'}; name the key "
                "that holds the text with --json-keys"
            )
        text = record[key]
        if not isinstance(text, str):
            raise ValueError(f"{place}: {key!r} holds a {type(text).__name__}, not a string; name another --json-keys")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(
                f"{place}: {key!r} holds half of a surrogate pair (\\ud800 to \\udfff); repair the escape"
            ) from None
        texts[key] = text
    return texts


def _read_text(path: Path, separator: str, on_read: Callable[[int], object]) -> Iterator[dict[str, str]]:
    separator = separator.strip(" \t")
    lines: list[str] = []
    size = first = 0
    for number, line in read_lines(path, on_read):
        if line.strip(" \t\n") == separator:
            if lines:
                yield {TEXT_KEY: "".join(lines).strip("\n")}
            lines, size = [], 0
            continue
        first = first if lines else number
        lines.append(line)
        size += len(line)
        if size > _MAX_TEXT_CHARACTERS:
            raise ValueError(
                f"{path}:{first}: the document that begins here is longer than {_MAX_TEXT_CHARACTERS:,} characters; "
                "say what separates documents with --document-separator ('' for blank lines)"
            )
    if lines:
        yield {TEXT_KEY: "".join(lines).strip("\n")}


def read_lines(path: Path, on_read: Callable[[int], object]) -> Iterator[tuple[int, str]]:
    """Yields the lines of a UTF-8 file, plain or ``.gz``, as (number from 1, line with its newline).

    ``\\r\\n`` becomes ``\\n``, and a byte order mark is removed. `on_read` is called with the number of bytes that were
    just read from disk.

    Raises:
        ValueError: if the file cannot be read, is not UTF-8 or is damaged; the message names file and cure.
    """
    if path.is_dir():
        raise ValueError(f"{path}: a directory; name the files in it")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: no regular file, and a file may be read twice; write it to a disk first")
    try:
        file = io.BufferedReader(io.FileIO(path), _BUFFER_BYTES)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; check the path and the permissions") from error
    number = told = 0
    with file:
        try:
            for number, raw in enumerate(GzipFile(fileobj=file) if path.suffix.lower() == ".gz" else file, start=1):
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                yield number, line[:-2] + "\n" if line.endswith("\r\n") else line
                # Compressed bytes count as stored, so that the estimated time of arrival is right.
                if (read := file.raw.tell()) != told:
                    on_read(read - told)
                    told = read
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}:{number}: not UTF-8 ({error.reason}); convert the file, for instance with iconv -t utf-8"
            ) from error
        except (EOFError, zlib.error, OSError) as error:
            raise ValueError(
                f"{path}: reading stopped after line {number} ({error}); fetch the file again, or "
                "rename it if it is not what its suffix says"
            ) from error


def reading_progress(paths: Sequence[Path], title: str) -> "tqdm[NoReturn]":
    """Returns a progress bar on stderr for the bytes of files; its ``update`` is an `on_read` function."""
    total = sum(path.stat().st_size for path in paths)
    # A terminal gets a live bar, a log file a line every half minute.
    interval = 0.1 if sys.stderr.isatty() else 30.0
    return tqdm(total=total, unit="B", unit_scale=True, desc=title, mininterval=interval, file=sys.stderr)


def add_split_arguments(group: argparse._ArgumentGroup, what: str) -> None:
    """Adds ``--split`` and ``--valid-fraction``, whose help names `what`; :func:`settle_split` reads them."""
    group.add_argument(
        "--split",
        choices=["all", "train", "valid"],
        default="all",
        help=f"take all {what}, or one side of a fixed split by the hash of their words (default: all)",
    )
    group.add_argument(
        "--valid-fraction",
        type=Number(0, 1, open_minimum=True, open_maximum=True),
        metavar="F",
        help=f"share of the {what} in --split valid (default: {_VALID_FRACTION})",
    )


def settle_split(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fills in the default of ``--valid-fraction``; the flag without a split is an error of the parser."""
    if args.valid_fraction is not None and args.split == "all":
        parser.error("--valid-fraction needs --split train or --split valid")
    args.valid_fraction = _VALID_FRACTION if args.valid_fraction is None else args.valid_fraction


def require_files(paths: Iterable[Path]) -> None:
    """Raises if a file of ``--input`` does not exist, before any work begins.

    Raises:
        ValueError: if a file does not exist; the message names its path.
    """
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path}: no such file; check --input")


def document_split(text: str, valid_fraction: float = _VALID_FRACTION) -> str:
    """Returns ``train`` or ``valid`` for a document, by a hash of its words.

    The result depends only on the words (not on the place in a file, the line breaks or the Python version), so that a
    document and all its copies always stay on one side. About `valid_fraction` of all documents are ``valid``.
    """
    digest = hashlib.blake2b(normalized(text).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return "valid" if int.from_bytes(digest, "big") < valid_fraction * 2**64 else "train"


def normalized(text: str) -> str:
    """Returns the words of `text` with one space between them, which is what `document_split` hashes."""
    return " ".join(text.split())

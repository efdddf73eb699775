# SPDX-License-Identifier: Apache-2.0
"""Text in, Megatron's ``.bin`` / ``.idx`` out: streaming readers, the writer and a corpus that every CPython carries.

A document is a ``dict`` from key to text. A JSON Lines file holds one per line; a plain text file is ONE document under
the key ``text``, as a book or an article would be, unless lines that hold nothing but a separator (by default a form
feed) split it. Blank lines do not split: they separate paragraphs, and a model should see paragraphs in their context.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import os
import shutil
import sysconfig
import tokenize
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from gzip import GzipFile
from inspect import cleandoc
from pathlib import Path
from types import ModuleType
from typing import Protocol

from .tokenizer import publish

FORM_FEED = "\f"
TEXT_KEY = "text"
_JSON_SUFFIXES = {".jsonl", ".ndjson", ".json"}
_TEXT_SUFFIXES = {".txt", ".text", ".md", ".rst"}
# SentencePiece needs about 50 bytes of memory per character of a document; a longer one has an unknown separator.
_MAX_TEXT_CHARACTERS = 64_000_000
# Enough documents per call that native threads have work, few enough that memory stays flat.
_BATCH_DOCUMENTS = 512
_BATCH_CHARACTERS = 4_000_000


# --------------------------------------------------------------------------------------------------------- readers


def read_documents(
    paths: Iterable[str | os.PathLike[str]],
    *,
    keys: Sequence[str] = (TEXT_KEY,),
    input_format: str = "auto",
    separator: str = FORM_FEED,
    on_read: Callable[[int], None] | None = None,
) -> Iterator[dict[str, str]]:
    """Yield the documents of files, in order, holding one document in memory at a time.

    Args:
        paths: UTF-8 files, plain or ``.gz``.
        keys: what to take from each JSON object; plain text has the key ``text`` only.
        input_format: ``jsonl``, ``text``, or ``auto``, which goes by the suffix.
        separator: a plain text line that equals this, spaces around it aside, ends a document. The empty string stands
            for blank lines.
        on_read: called with the number of bytes that were just read from disk (for a progress bar).

    Raises:
        ValueError: a file cannot be read or does not hold what was asked for; names file, line and cure.
    """
    for path in map(Path, paths):
        if detect_format(path, input_format) == "jsonl":
            yield from _read_json_lines(path, keys, on_read)
        elif list(keys) == [TEXT_KEY]:
            yield from _read_text(path, separator, on_read)
        else:
            raise ValueError(
                f"{path}: plain text has no keys, {', '.join(keys)} cannot be taken from it; leave out --json-keys, or "
                "pass --input-format jsonl if the file holds JSON Lines"
            )


def detect_format(path: Path, input_format: str = "auto") -> str:
    """Return ``jsonl`` or ``text`` for a file by its suffix (``.gz`` aside), or `input_format` if that says so.

    Raises:
        ValueError: the suffix says nothing, or the format is none of the three.
    """
    if input_format in ("jsonl", "text"):
        return input_format
    if input_format != "auto":
        raise ValueError(f"unknown input format {input_format!r}; choose auto, jsonl or text")
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    suffix = suffixes[-1] if suffixes else ""
    if suffix in _JSON_SUFFIXES:
        return "jsonl"
    if suffix in _TEXT_SUFFIXES:
        return "text"
    raise ValueError(f"{path}: the suffix {suffix!r} does not tell the format; pass --input-format jsonl or text")


def _read_json_lines(
    path: Path, keys: Sequence[str], on_read: Callable[[int], None] | None
) -> Iterator[dict[str, str]]:
    for number, line in _lines(path, on_read):
        if line.strip():
            yield _select(line, keys, f"{path}:{number}")


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
        if not _is_utf8(text):
            raise ValueError(f"{place}: {key!r} holds half of a surrogate pair (\\ud800 to \\udfff); repair the escape")
        texts[key] = text
    return texts


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _read_text(path: Path, separator: str, on_read: Callable[[int], None] | None) -> Iterator[dict[str, str]]:
    separator = separator.strip(" \t")
    lines: list[str] = []
    size = first = 0
    for number, line in _lines(path, on_read):
        if line.strip(" \t\n") == separator:
            if lines:
                yield {TEXT_KEY: _joined(lines)}
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
        yield {TEXT_KEY: _joined(lines)}


def _joined(lines: list[str]) -> str:
    return "".join(lines).strip("\n")


def _lines(path: Path, on_read: Callable[[int], None] | None) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line with its newline); ``\\r\\n`` becomes ``\\n``, a byte order mark goes."""
    number = 0
    with _opened(path, on_read) as stream:
        try:
            for number, raw in enumerate(stream, start=1):
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                yield number, line[:-2] + "\n" if line.endswith("\r\n") else line
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}:{number}: not UTF-8 ({error.reason}); convert the file, for instance with iconv -t utf-8"
            ) from error
        except (EOFError, zlib.error, OSError) as error:
            raise ValueError(
                f"{path}: reading stopped after line {number} ({error}); fetch the file again, or "
                "rename it if it is not what its suffix says"
            ) from error


@contextmanager
def _opened(path: Path, on_read: Callable[[int], None] | None) -> Iterator[io.BufferedIOBase]:
    if path.is_dir():
        raise ValueError(f"{path}: a directory; name the files in it")
    try:
        raw = _CountedFile(path, on_read)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; check the path and the permissions") from error
    with raw, io.BufferedReader(raw, 1 << 18) as stream:
        yield GzipFile(fileobj=stream) if path.suffix.lower() == ".gz" else stream


class _CountedFile(io.FileIO):
    """A file that tells how many bytes were read from it; compressed ones count as stored, so that an ETA is right."""

    def __init__(self, path: Path, on_read: Callable[[int], None] | None) -> None:
        super().__init__(path, "r")
        self._on_read = on_read

    def readinto(self, buffer: memoryview) -> int | None:
        count = super().readinto(buffer)
        if self._on_read is not None and count:
            self._on_read(count)
        return count


# ---------------------------------------------------------------------------------------------------------- writer


class Tokenizer(Protocol):
    """What the writer needs; `bitcpm_megatron.training.tokenizer.SentencePieceTokenizer` has it."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eod(self) -> int: ...

    def tokenize_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]: ...


@dataclass
class CorpusSummary:
    """What one ``.bin`` / ``.idx`` pair holds. `text_bytes` is the UTF-8 size; `tokens` includes the eod tokens."""

    prefix: Path
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    empty_documents: int = 0

    def __str__(self) -> str:
        skipped = f", {self.empty_documents:,} empty documents skipped" if self.empty_documents else ""
        return (
            f"{self.prefix}: {self.documents:,} documents, {self.tokens:,} tokens, {self.text_bytes:,} bytes of text, "
            f"{self.text_bytes / max(self.tokens, 1):.2f} bytes per token{skipped}"
        )


def write_corpus(
    documents: Iterable[Mapping[str, str]],
    output_prefix: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    keys: Sequence[str] = (TEXT_KEY,),
    append_eod: bool = True,
    threads: int = 1,
    overwrite: bool = False,
) -> dict[str, CorpusSummary]:
    """Tokenize documents into ``<output_prefix>_<key>_document.bin`` and ``.idx``, one pair per key.

    Tokens are uint16 for vocabularies below 65500, else int32 (megatron-core's ``DType.optimal_dtype``); each document
    is one sequence. Everything goes to temporary names beside the outputs, which are renamed when all of it is on disk:
    after an error or a kill there is no output, at most (after SIGKILL) ``*.tmp-<pid>`` files to delete.

    Args:
        documents: mappings that have all `keys`; a text of white space only is skipped and counted.
        output_prefix: leading part of the file names; missing directories are created.
        tokenizer: gives ids, ``eod`` and ``vocab_size``.
        keys: which texts to write.
        append_eod: end every document with ``tokenizer.eod``.
        threads: native tokenizer threads; the output does not depend on their number.
        overwrite: replace outputs that exist, and drop the sample indices that megatron-core cached for them.

    Returns:
        A summary per key.

    Raises:
        ValueError: an output exists (without `overwrite`), or there was not one document to write for a key.
        ModuleNotFoundError: megatron-core is not installed.
    """
    dtype = _token_dtype(tokenizer.vocab_size)
    if not overwrite:
        refuse_existing(output_prefix, keys)
    datasets: dict[str, _PendingDataset] = {}
    try:
        for key, prefix in _prefixes(output_prefix, keys).items():
            datasets[key] = _PendingDataset(prefix, dtype)
        for batch in _batches(documents):
            for key, dataset in datasets.items():
                _add(dataset, [document[key] for document in batch], tokenizer, append_eod, threads)
        for key, dataset in datasets.items():
            _require_documents(key, dataset.summary)
        for dataset in datasets.values():
            dataset.finish()
        for dataset in datasets.values():
            dataset.publish()
    finally:
        for dataset in datasets.values():
            dataset.discard()
    return {key: dataset.summary for key, dataset in datasets.items()}


def _add(dataset: _PendingDataset, texts: list[str], tokenizer: Tokenizer, append_eod: bool, threads: int) -> None:
    filled = [text for text in texts if text.strip()]
    for text, ids in zip(filled, tokenizer.tokenize_batch(filled, threads), strict=True):
        dataset.add(ids + [tokenizer.eod] if append_eod else ids, len(text.encode("utf-8")))
    dataset.summary.empty_documents += len(texts) - len(filled)


def _require_documents(key: str, summary: CorpusSummary) -> None:
    if summary.documents == 0:
        found = f"only {summary.empty_documents} empty documents" if summary.empty_documents else "no documents"
        raise ValueError(f"{found} for {key!r}, nothing was written; give input with text (and check --split)")


def _batches(documents: Iterable[Mapping[str, str]]) -> Iterator[list[Mapping[str, str]]]:
    batch: list[Mapping[str, str]] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += sum(map(len, document.values()))
        if len(batch) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def refuse_existing(output_prefix: str | os.PathLike[str], keys: Sequence[str] = (TEXT_KEY,)) -> None:
    """Raise `ValueError` if `write_corpus` would replace a file."""
    for prefix in _prefixes(output_prefix, keys).values():
        for path in (_with_suffix(prefix, ".bin"), _with_suffix(prefix, ".idx")):
            if path.exists():
                raise ValueError(f"{path} exists; choose another --output-prefix, or pass --overwrite to replace it")


def _prefixes(output_prefix: str | os.PathLike[str], keys: Sequence[str]) -> dict[str, Path]:
    return {key: Path(f"{os.fspath(output_prefix)}_{key}_document") for key in keys}


def _with_suffix(prefix: Path, suffix: str) -> Path:
    # Path.with_suffix would cut a prefix such as "corpus.v2".
    return prefix.with_name(prefix.name + suffix)


def _token_dtype(vocab_size: int) -> type:
    return _indexed_dataset().DType.optimal_dtype(vocab_size)


def _indexed_dataset() -> ModuleType:
    # Imported on use: reading a corpus needs no Megatron, and the import takes seconds. Its warnings about absent
    # accelerator packages do not concern a tool that writes files.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from megatron.core.datasets import indexed_dataset
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "writing .bin/.idx needs megatron-core: pip install 'bitcpm-megatron[standalone]', or put your Megatron-LM "
            "checkout on PYTHONPATH"
        ) from error
    return indexed_dataset


class _PendingDataset:
    """One .bin/.idx pair under temporary names."""

    def __init__(self, prefix: Path, dtype: type) -> None:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self.summary = CorpusSummary(prefix)
        self._final = {suffix: _with_suffix(prefix, suffix) for suffix in (".bin", ".idx")}
        self._temporary = {suffix: Path(f"{path}.tmp-{os.getpid()}") for suffix, path in self._final.items()}
        self._builder = _indexed_dataset().IndexedDatasetBuilder(str(self._temporary[".bin"]), dtype=dtype)

    def add(self, ids: list[int], text_bytes: int) -> None:
        self._builder.add_document(ids, [len(ids)])
        self.summary.documents += 1
        self.summary.tokens += len(ids)
        self.summary.text_bytes += text_bytes

    def finish(self) -> None:
        self._builder.finalize(str(self._temporary[".idx"]))

    def publish(self) -> None:
        # The index makes a dataset: an old one must not meet new tokens, so it goes first and the new one comes last.
        self._final[".idx"].unlink(missing_ok=True)
        # megatron-core names its cached sample indices by the path of the dataset and would reuse those of the old one.
        shutil.rmtree(self.summary.prefix / "cache" / "GPTDataset_indices", ignore_errors=True)
        for suffix in (".bin", ".idx"):
            publish(self._temporary[suffix], self._final[suffix])

    def discard(self) -> None:
        """Remove what is still under a temporary name."""
        self._builder.data_file.close()
        for path in self._temporary.values():
            path.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------- split


def document_split(text: str, valid_fraction: float = 0.05) -> str:
    """Return ``train`` or ``valid`` for a document, by a hash of its words.

    It depends on the text alone (not on its place in a file, its line breaks or the Python version), so that a
    document, and every copy of it, stays on one side for good. About `valid_fraction` of all documents are ``valid``.

    Raises:
        ValueError: `valid_fraction` is not between 0 and 1.
    """
    if not 0.0 <= valid_fraction <= 1.0:
        raise ValueError(f"the validation fraction is {valid_fraction}; give one between 0 and 1 (--valid-fraction)")
    digest = hashlib.blake2b(_normalized(text).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return "valid" if int.from_bytes(digest, "big") < valid_fraction * 2**64 else "train"


def _normalized(text: str) -> str:
    return " ".join(text.split())


# --------------------------------------------------------------------------------------- the corpus inside of CPython

_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_MIN_DOCUMENT_CHARACTERS = 200
# Shorter paragraphs (headings, "Changed in version 3.8: ...") may recur; longer ones that do are copies.
_LONG_PARAGRAPH = 60
# Share of letters below which a paragraph of that length is a formula, a table or a diagram.
_MIN_LETTERS = 0.65


def python_prose(stdlib: str | os.PathLike[str] | None = None) -> Iterator[str]:
    """Yield English prose that every CPython carries: pydoc's language reference, docstrings and block comments.

    The modules are parsed, not imported. Test packages and site-packages are left out, interpreter sessions, grammar
    rules and diagrams are cut, and a paragraph of 60 characters or more is yielded only the first time it occurs, so
    that none stands on both sides of `document_split`. The order is the same on every run of one Python version.

    Args:
        stdlib: folder of the standard library's sources, default that of the running Python.

    Yields:
        Documents of at least 200 characters, dedented, paragraphs separated by blank lines.

    Raises:
        ValueError: this Python has no ``pydoc_data.topics`` or no sources of its library.
    """
    root = Path(stdlib if stdlib is not None else sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    for text in _raw_prose(root):
        paragraphs = _new_paragraphs(text, seen)
        document = "\n\n".join(paragraphs)
        if len(document) >= _MIN_DOCUMENT_CHARACTERS:
            seen.update(map(_normalized, paragraphs))
            yield document


def _raw_prose(root: Path) -> Iterator[str]:
    topics = _pydoc_topics()
    for name in sorted(topics):
        yield topics[name]
    sources = _source_files(root)
    if not sources:
        raise ValueError(
            f"{root}: no Python sources of the standard library; use a CPython that carries them as .py files"
        )
    for path in sources:
        try:
            with tokenize.open(path) as stream:
                source = stream.read()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in old modules are none of our business
                tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            continue  # templates and samples that are no Python of this version
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


def _source_files(root: Path) -> list[Path]:
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in _SKIPPED_FOLDERS)
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Yield docstrings in the order of the source."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node, clean=False)
        if text:
            yield text
    for child in ast.iter_child_nodes(node):
        yield from _docstrings(child)


def _block_comments(source: str) -> Iterator[str]:
    """Yield runs of whole-line comments without their signs."""
    block: list[str] = []
    for line in [*source.splitlines(), ""]:
        stripped = line.strip()
        if stripped.startswith("#"):
            block.append(stripped.lstrip("#"))
        elif block:
            yield "\n".join(["", *block])  # cleandoc leaves the first line out when it looks for the common indent
            block = []


def _new_paragraphs(text: str, seen: set[str]) -> list[str]:
    """Return the prose paragraphs of `text`, dedented, without long ones that `seen` has."""
    paragraphs = []
    for block in cleandoc(text).split("\n\n"):
        paragraph = _prose_of(block)
        words = _normalized(paragraph)
        if words and (len(words) < _LONG_PARAGRAPH or words not in seen):
            paragraphs.append(paragraph)
    return paragraphs


def _prose_of(paragraph: str) -> str:
    """Return a paragraph without rulers, up to its first interpreter prompt; nothing for grammar and diagrams."""
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

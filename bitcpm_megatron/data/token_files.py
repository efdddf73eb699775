# SPDX-License-Identifier: Apache-2.0
"""Token files out: documents, tokenized, as the ``.bin`` / ``.idx`` pairs that Megatron reads.

The files get their names when all of them are on disk, and existing ones are replaced only on demand.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Protocol

from ..files.lock import PendingFiles
from .corpus import TEXT_KEY

# Enough documents per call that native threads have work, few enough that memory stays flat.
_BATCH_DOCUMENTS = 512
_BATCH_CHARACTERS = 4_000_000


class Tokenizer(Protocol):
    """What the writer needs; `bitcpm_megatron.data.tokenizer.SentencePieceTokenizer` has it."""

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
    pending: PendingFiles | None = None,
) -> dict[str, CorpusSummary]:
    """Tokenize documents into ``<output_prefix>_<key>_document.bin`` and ``.idx``, one pair per key.

    Tokens are uint16 for vocabularies below 65500, else int32 (megatron-core's ``DType.optimal_dtype``); each document
    is one sequence. After an error or a kill there is no output, at most (after SIGKILL) hidden files that the next run
    removes; see :class:`~bitcpm_megatron.files.lock.PendingFiles`.

    Args:
        documents: mappings that have all `keys`; a text of white space only is skipped and counted.
        output_prefix: leading part of the file names; missing directories are created.
        tokenizer: gives ids, ``eod`` and ``vocab_size``.
        keys: which texts to write.
        append_eod: end every document with ``tokenizer.eod``.
        threads: native tokenizer threads; the output does not depend on their number.
        pending: what :func:`outputs` names, and more files that are ready by then; None refuses to overwrite.

    Returns:
        A summary per key.

    Raises:
        ValueError: an output exists, or there was not one document to write for a key.
        ModuleNotFoundError: megatron-core is not installed.
    """
    if pending is None:
        with PendingFiles(outputs(output_prefix, keys), command="write_corpus") as own:
            return write_corpus(
                documents, output_prefix, tokenizer, keys=keys, append_eod=append_eod, threads=threads, pending=own
            )
    dtype = _token_dtype(tokenizer.vocab_size)
    with contextlib.ExitStack() as stack:
        datasets = {
            key: stack.enter_context(_PendingDataset(prefix, dtype))
            for key, prefix in _prefixes(output_prefix, keys).items()
        }
        for batch in _batches(documents):
            for key, dataset in datasets.items():
                _add(dataset, [document[key] for document in batch], tokenizer, append_eod, threads)
        for key, dataset in datasets.items():
            _require_documents(key, dataset.summary)
        for dataset in datasets.values():
            dataset.finish()

    def drop_indices() -> None:
        # megatron-core names its cached sample indices by the path of the dataset and would reuse those of the old one.
        for dataset in datasets.values():
            shutil.rmtree(dataset.summary.prefix / "cache" / "GPTDataset_indices", ignore_errors=True)

    pending.publish(drop_indices)
    return {key: dataset.summary for key, dataset in datasets.items()}


def _add(dataset: _PendingDataset, texts: list[str], tokenizer: Tokenizer, append_eod: bool, threads: int) -> None:
    filled = [text for text in texts if text.strip()]
    for text, ids in zip(filled, tokenizer.tokenize_batch(filled, threads), strict=True):
        dataset.add(ids + [tokenizer.eod] if append_eod else ids, len(text.encode("utf-8")))
    dataset.summary.empty_documents += len(texts) - len(filled)


def _require_documents(key: str, summary: CorpusSummary) -> None:
    if summary.documents == 0:
        found = f"only {summary.empty_documents} empty documents" if summary.empty_documents else "no documents"
        raise ValueError(
            f"{found} for {key!r}, nothing was written; give --input files that hold text (and check --split)"
        )


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


def outputs(output_prefix: str | os.PathLike[str], keys: Sequence[str] = (TEXT_KEY,)) -> list[tuple[Path, str]]:
    """The files that `write_corpus` writes, and what to say where one exists: for `PendingFiles`."""
    # The index makes a dataset: it must not meet the tokens of another.
    paths = [
        _with_suffix(prefix, end) for prefix in _prefixes(output_prefix, keys).values() for end in (".bin", ".idx")
    ]
    return [(path, "choose another --output-prefix, or pass --overwrite to replace it") for path in paths]


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
    """One .bin/.idx pair under temporary names; a context manager, which closes the first."""

    def __init__(self, prefix: Path, dtype: type) -> None:
        self.summary = CorpusSummary(prefix)
        self._index = PendingFiles.temporary(_with_suffix(prefix, ".idx"))
        tokens = PendingFiles.temporary(_with_suffix(prefix, ".bin"))
        self._builder = _indexed_dataset().IndexedDatasetBuilder(str(tokens), dtype=dtype)

    def __enter__(self) -> _PendingDataset:
        return self

    def __exit__(self, *error: object) -> None:
        self._builder.data_file.close()

    def add(self, ids: list[int], text_bytes: int) -> None:
        self._builder.add_document(ids, [len(ids)])
        self.summary.documents += 1
        self.summary.tokens += len(ids)
        self.summary.text_bytes += text_bytes

    def finish(self) -> None:
        self._builder.finalize(str(self._index))

# SPDX-License-Identifier: Apache-2.0
"""Writer of token files: tokenizes documents into the ``.bin`` / ``.idx`` pairs that Megatron reads.

The files get their final names when all of them are on disk, and existing ones are replaced only on demand.
"""

import argparse
import contextlib
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..cli import Whole
from ..files.lock import PendingFiles
from .corpus import TEXT_KEY
from .tokenizers import Tokenizer

# Enough documents per call to keep native threads busy, few enough to keep memory use constant.
_BATCH_DOCUMENTS = 512
_BATCH_CHARACTERS = 4_000_000


@dataclass
class CorpusSummary:
    """The content of one ``.bin`` / ``.idx`` pair. `text_bytes` is the UTF-8 size; `tokens` includes the eod tokens."""

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


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds ``--output-prefix``, ``--overwrite`` and ``--workers``, which all writers of token files have."""
    output = parser.add_argument_group("output")
    output.add_argument("--output-prefix", required=True, metavar="PREFIX", help="leading part of the output names")
    output.add_argument("--overwrite", action="store_true", help="replace existing outputs")
    output.add_argument("--workers", type=Whole(1, 1024), default=1, metavar="N", help="tokenizer threads (default: 1)")


def write_corpus(
    documents: Iterable[Mapping[str, str]],
    output_prefix: str | os.PathLike[str],
    tokenizer: Tokenizer,
    pending: PendingFiles,
    *,
    keys: Sequence[str] = (TEXT_KEY,),
    append_eod: bool = True,
    threads: int = 1,
) -> dict[str, CorpusSummary]:
    """Tokenizes documents into ``<output_prefix>_<key>_document.bin`` and ``.idx``, one pair and summary per key.

    Tokens are uint16 for vocabularies below 65500, else int32 (megatron-core's ``DType.optimal_dtype``). Each document
    is one sequence, and ends with ``tokenizer.eod`` if `append_eod` is true. A text of only white space is skipped and
    counted. The output does not depend on the number of native `threads`. After an error or a kill there is no output;
    after SIGKILL there may be hidden files, which the next run removes.

    Args:
        documents: mappings that have all `keys`.
        output_prefix: the leading part of the file names.
        tokenizer: the tokenizer; its ``tokenize_batch``, ``eod`` and ``vocab_size`` are used.
        pending: the files that :func:`outputs` names, and others that are ready by the end of this call.
        keys: the keys of the texts that are written, each into a pair of its own.
        append_eod: whether every document ends with ``tokenizer.eod``.
        threads: the number of native threads of the tokenizer.

    Raises:
        ValueError: if there is no document to write for a key.
        ModuleNotFoundError: if megatron-core is not installed.
    """
    summaries = {key: CorpusSummary(prefix) for key, prefix in _prefixes(output_prefix, keys).items()}
    with contextlib.ExitStack() as stack:
        builders = {}
        for key, summary in summaries.items():
            builders[key] = open_builder(PendingFiles.temporary(Path(f"{summary.prefix}.bin")), tokenizer.vocab_size)
            stack.callback(builders[key].data_file.close)
        for batch in _batches(documents):
            for key, summary in summaries.items():
                filled = [document[key] for document in batch if document[key].strip()]
                for text, ids in zip(filled, tokenizer.tokenize_batch(filled, threads), strict=True):
                    ids = [*ids, tokenizer.eod] if append_eod else ids
                    builders[key].add_document(ids, [len(ids)])
                    summary.tokens += len(ids)
                    summary.text_bytes += len(text.encode("utf-8"))
                summary.documents += len(filled)
                summary.empty_documents += len(batch) - len(filled)
        for key, summary in summaries.items():
            _require_documents(key, summary)
            builders[key].finalize(str(PendingFiles.temporary(Path(f"{summary.prefix}.idx"))))

    def drop_indices() -> None:
        # megatron-core names its cached sample indices by the path of the dataset and would reuse those of the old one.
        for summary in summaries.values():
            shutil.rmtree(summary.prefix / "cache" / "GPTDataset_indices", ignore_errors=True)

    pending.publish(drop_indices)
    return summaries


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
    """Returns the files that `write_corpus` writes, each with the refusal if it exists, for `PendingFiles`."""
    refusal = "choose another --output-prefix, or pass --overwrite to replace it"
    prefixes = _prefixes(output_prefix, keys).values()
    # The index comes last and makes a dataset valid: it must never be combined with the tokens of another one.
    return [(Path(f"{prefix}{suffix}"), refusal) for prefix in prefixes for suffix in (".bin", ".idx")]


def _prefixes(output_prefix: str | os.PathLike[str], keys: Sequence[str]) -> dict[str, Path]:
    return {key: Path(f"{os.fspath(output_prefix)}_{key}_document") for key in keys}


def open_builder(path: Path, vocab_size: int | None = None, dtype: type[np.generic] | None = None) -> Any:
    """Returns megatron-core's writer of a ``.bin`` file named `path`; its ``finalize`` writes the index.

    It writes tokens of `dtype`, or by default of the dtype that megatron-core chooses for a vocabulary.

    Raises:
        ModuleNotFoundError: if megatron-core is not installed.
    """
    # Imported on use: reading a corpus needs no Megatron, and the import takes seconds. Its warnings about absent
    # accelerator packages do not matter to a tool that only writes files.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "writing .bin/.idx needs megatron-core: pip install 'bitcpm-megatron[standalone]', or put your Megatron-LM "
            "checkout on PYTHONPATH"
        ) from error
    return IndexedDatasetBuilder(str(path), dtype=dtype or DType.optimal_dtype(vocab_size))

# SPDX-License-Identifier: Apache-2.0
"""Turns text into the token files that training reads.

Documents come from plain text and JSON Lines files (also ``.gz``), or from the English prose inside CPython. They are
tokenized with a SentencePiece model, either given or trained by this command, or with a Hugging Face tokenizer. The
output is ``<prefix>_<key>_document.bin`` and ``.idx``, in the format of Megatron-LM; training then takes
``--data-path <prefix>_text_document``.

    python launch/preprocess_data.py --input corpus.jsonl --tokenizer-model tokenizer.model --append-eod \\
        --output-prefix data/corpus

If no data is at hand, these commands make a small corpus with a tokenizer and a held-out part:

    python launch/preprocess_data.py --builtin-corpus python-prose --split train --append-eod \\
        --train-tokenizer data/tokenizer.model --vocab-size 4096 --output-prefix data/train
    python launch/preprocess_data.py --builtin-corpus python-prose --split valid --append-eod \\
        --tokenizer-model data/tokenizer.model --output-prefix data/valid

Exit codes: 0 done, 1 failed, 2 bad input or arguments.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

try:
    import bitcpm_megatron  # noqa: F401
except ModuleNotFoundError:  # started as a script from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bitcpm_megatron import cli
from bitcpm_megatron.data.corpus import (
    FORM_FEED,
    TEXT_KEY,
    add_split_arguments,
    detect_format,
    document_split,
    read_documents,
    reading_progress,
    require_files,
    settle_split,
)
from bitcpm_megatron.data.python_prose import python_prose
from bitcpm_megatron.data.token_files import add_output_arguments, outputs, write_corpus
from bitcpm_megatron.data.tokenizers import (
    LARGEST_VOCABULARY,
    SentencePieceTokenizer,
    open_tokenizer,
    train_sentencepiece,
)
from bitcpm_megatron.data.vocabulary import TOKENIZER_TYPES
from bitcpm_megatron.files.lock import PendingFiles

Document = dict[str, str]


def _parser() -> cli.Parser:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_argument_group("input").add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", type=Path, metavar="FILE", help="text or JSON Lines files, plain or .gz")
    source.add_argument(
        "--builtin-corpus",
        choices=["python-prose"],
        help="about 2 MB of English from the documentation inside of CPython",
    )
    reading = parser.add_argument_group("reading")
    reading.add_argument(
        "--input-format", choices=["auto", "jsonl", "text"], default="auto", help="default: by the suffix of each file"
    )
    reading.add_argument(
        "--json-keys", nargs="+", metavar="KEY", help=f"keys of the texts, each to its own output (default: {TEXT_KEY})"
    )
    reading.add_argument(
        "--document-separator",
        metavar="LINE",
        help="a plain text line that ends a document, '' for blank lines (default: a form feed); a file without any is "
        "one document",
    )
    add_split_arguments(reading, "documents")
    tokens = parser.add_argument_group("tokenizer")
    model = tokens.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--tokenizer-model",
        type=Path,
        metavar="PATH",
        help="to use: a SentencePiece .model file, or a directory with a tokenizer.json",
    )
    model.add_argument(
        "--train-tokenizer", type=Path, metavar="MODEL", help="train one on the documents and write it here"
    )
    tokens.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES, help="default: what --tokenizer-model holds")
    tokens.add_argument(
        "--vocab-size",
        type=cli.Whole(1, LARGEST_VOCABULARY),
        metavar="N",
        help="number of pieces for --train-tokenizer",
    )
    tokens.add_argument("--append-eod", action="store_true", help="end every document with the end-of-document token")
    add_output_arguments(parser)
    return parser


def prepare(args: argparse.Namespace) -> None:
    """Carries out what the command line asks for and prints one line per output.

    Raises:
        ValueError: if the input is bad; the message says where, and what to do.
    """
    documents = _documents(args)
    tokenizer = open_tokenizer(args.tokenizer_model, args.tokenizer_type) if args.tokenizer_model else None
    refusal = "what was tokenized with it needs it; pass it as --tokenizer-model, or --overwrite to replace it"
    written = [(args.train_tokenizer, refusal)] if args.train_tokenizer else []
    written += outputs(args.output_prefix, args.json_keys)
    inputs = [*(args.input or []), *([args.tokenizer_model] if args.tokenizer_model else [])]
    command = cli.command_digest(args, without=("workers", "overwrite"))
    with PendingFiles(written, command=command, inputs=inputs, overwrite=args.overwrite) as pending:
        if tokenizer is None:
            texts = (text for document in documents("reading for the tokenizer") for text in document.values())
            model = train_sentencepiece(texts, args.vocab_size)
            PendingFiles.temporary(args.train_tokenizer).write_bytes(model)
            tokenizer = SentencePieceTokenizer(args.train_tokenizer, model)
        if not args.append_eod:
            print("note: documents run into one another without --append-eod", file=sys.stderr)
        summaries = write_corpus(
            documents("tokenizing"),
            args.output_prefix,
            tokenizer,
            pending,
            keys=args.json_keys,
            append_eod=args.append_eod,
            threads=args.workers,
        )
    for summary in summaries.values():
        print(summary, flush=True)


def _documents(args: argparse.Namespace) -> Callable[[str], Iterator[Document]]:
    """Returns a function that iterates over the chosen documents; its argument is the title of the progress bar."""

    def chosen(document: Document) -> bool:
        return document_split("\n".join(document.values()), args.valid_fraction) == args.split

    if args.builtin_corpus:
        # Collecting these two megabytes takes seconds, so that they are held in memory for both passes.
        prose = [{TEXT_KEY: text} for text in python_prose()]
    elif args.document_separator != FORM_FEED and "text" not in {
        detect_format(p, args.input_format) for p in args.input
    }:
        raise ValueError("--document-separator is for plain text, and no --input is; leave it out")
    require_files(args.input or ())

    def corpus(title: str) -> Iterator[Document]:
        documents = iter(prose) if args.builtin_corpus else _read_with_progress(args, title)
        return documents if args.split == "all" else filter(chosen, documents)

    return corpus


def _read_with_progress(args: argparse.Namespace, title: str) -> Iterator[Document]:
    with reading_progress(args.input, title) as bar:
        yield from read_documents(
            args.input,
            keys=args.json_keys,
            input_format=args.input_format,
            separator=args.document_separator,
            on_read=bar.update,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0 done, 1 failed, 2 bad input (bad arguments also exit with 2)."""
    parser = _parser()
    args = parser.parse_args(argv)
    # An argument that would have no effect is an error.
    if (args.train_tokenizer is None) != (args.vocab_size is None):
        parser.error("--train-tokenizer and --vocab-size go together; a given --tokenizer-model has its own size")
    if args.tokenizer_type is not None and args.tokenizer_model is None:
        parser.error("--tokenizer-type says what --tokenizer-model is: give both")
    settle_split(parser, args)
    if args.builtin_corpus and (args.json_keys or args.document_separator is not None or args.input_format != "auto"):
        parser.error("--json-keys, --document-separator and --input-format are for --input, not for --builtin-corpus")
    args.document_separator = FORM_FEED if args.document_separator is None else args.document_separator
    args.json_keys = args.json_keys or [TEXT_KEY]
    with cli.interrupted_by_sigterm():
        return cli.run(lambda: prepare(args))


if __name__ == "__main__":
    # os._exit skips the interpreter's shutdown, which would pull memory from under a thread in which SentencePiece may
    # still be training.
    os._exit(main())

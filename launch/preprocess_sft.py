# SPDX-License-Identifier: Apache-2.0
"""Turns conversations into the token files that supervised fine-tuning reads.

Conversations come from JSON Lines files (also ``.gz``) with ``messages`` (and ``tools``) or with ``instruction``,
``input`` and ``output``. The tokenizer's chat template renders each conversation as one text, and several conversations
share a sample. Only the tokens of the answers and of their ends are learned. A template from which these cannot be told
is refused.

    python launch/preprocess_sft.py --input conversations.jsonl --tokenizer-model MiniCPM4-0.5B --seq-length 4096 \\
        --output-prefix data/sft

The command writes ``.bin`` and ``.idx`` files of ``data/sft_tokens``, ``data/sft_answers`` and ``data/sft_ends``.

Exit codes: 0 done, 1 failed, 2 bad input or arguments.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

try:
    import bitcpm_megatron  # noqa: F401
except ModuleNotFoundError:  # started as a script from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bitcpm_megatron import cli
from bitcpm_megatron.data.corpus import (
    add_split_arguments,
    document_split,
    reading_progress,
    require_files,
    settle_split,
)
from bitcpm_megatron.data.sft.chat_template import open_chat_template, require_chat_tokenizer
from bitcpm_megatron.data.sft.conversations import Conversation, read_conversations
from bitcpm_megatron.data.sft.samples import outputs, write_samples
from bitcpm_megatron.data.token_files import add_output_arguments
from bitcpm_megatron.data.tokenizers import open_tokenizer
from bitcpm_megatron.data.vocabulary import TOKENIZER_TYPES
from bitcpm_megatron.files.lock import PendingFiles


def _parser() -> cli.Parser:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reading = parser.add_argument_group("input")
    reading.add_argument(
        "--input", nargs="+", type=Path, required=True, metavar="FILE", help="JSON Lines files, plain or .gz"
    )
    add_split_arguments(reading, "conversations")
    tokens = parser.add_argument_group("tokens")
    tokens.add_argument(
        "--tokenizer-model", type=Path, required=True, metavar="DIR", help="a directory with a tokenizer.json"
    )
    tokens.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES, help="default: what --tokenizer-model holds")
    tokens.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="a template in Jinja (default: the tokenizer's own)"
    )
    tokens.add_argument(
        "--seq-length", type=cli.Whole(2, 2**24), required=True, metavar="N", help="the most tokens of a sample"
    )
    add_output_arguments(parser)
    return parser


def prepare(args: argparse.Namespace) -> None:
    """Carries out what the command line asks for and prints one line about the output.

    Raises:
        ValueError: if the input is bad; the message says where, and what to do.
    """
    require_files(args.input)
    opened = open_tokenizer(args.tokenizer_model, args.tokenizer_type)
    tokenizer = require_chat_tokenizer(opened, str(args.tokenizer_model))
    template = open_chat_template(tokenizer, args.chat_template)
    inputs = [*args.input, args.tokenizer_model, *([args.chat_template] if args.chat_template else [])]
    command = cli.command_digest(args, without=("workers", "overwrite"))
    with PendingFiles(outputs(args.output_prefix), command=command, inputs=inputs, overwrite=args.overwrite) as pending:
        summary = write_samples(
            _conversations(args),
            args.output_prefix,
            tokenizer,
            template,
            pending,
            seq_length=args.seq_length,
            threads=args.workers,
        )
    print(summary, flush=True)


def _conversations(args: argparse.Namespace) -> Iterator[Conversation]:
    with reading_progress(args.input, "tokenizing") as bar:
        for conversation in read_conversations(args.input, on_read=bar.update):
            if args.split == "all" or document_split(conversation.text, args.valid_fraction) == args.split:
                yield conversation


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0 done, 1 failed, 2 bad input (bad arguments also exit with 2)."""
    parser = _parser()
    args = parser.parse_args(argv)
    settle_split(parser, args)
    with cli.interrupted_by_sigterm():
        return cli.run(lambda: prepare(args))


if __name__ == "__main__":
    sys.exit(main())

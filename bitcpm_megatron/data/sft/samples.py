# SPDX-License-Identifier: Apache-2.0
"""Samples of supervised fine-tuning out: conversations, tokenized and packed, as three token files."""

import contextlib
import itertools
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ...files.lock import PendingFiles
from ..sft_files import ANSWERS, ENDS, TOKENS, sft_prefixes
from ..token_files import open_builder
from ..tokenizers.hugging_face import HuggingFaceTokenizer
from .answers import AnswerFinder, Span, answer_mask
from .chat_template import ChatTemplate
from .conversations import Conversation
from .packing import pack

# Enough per call that native threads have work.
_BATCH = 512


@dataclass
class SftSummary:
    """What the files of one prefix hold, and what of the input they do not.

    Attributes:
        prefix: leading part of their names.
        seq_length: tokens that a sample has room for.
        conversations: in the samples.
        samples: sequences of each file.
        tokens: in all samples.
        answer_tokens: of them, those that are learned as targets.
        truncated: conversations of which only the beginning is in the samples.
        dropped: conversations whose first `seq_length` tokens hold no token of an answer; they are in no sample.
    """

    prefix: str
    seq_length: int
    conversations: int = 0
    samples: int = 0
    tokens: int = 0
    answer_tokens: int = 0
    truncated: int = 0
    dropped: int = 0

    @property
    def efficiency(self) -> float:
        """The share of the room in the samples that tokens take."""
        return self.tokens / (self.samples * self.seq_length)

    def __str__(self) -> str:
        return (
            f"{self.prefix}: {self.conversations:,} conversations in {self.samples:,} samples, {self.tokens:,} tokens, "
            f"{self.answer_tokens:,} of them answers, packing efficiency {self.efficiency:.1%}; {self.truncated:,} "
            f"conversations truncated to {self.seq_length:,} tokens, {self.dropped:,} dropped without an answer in them"
        )


def outputs(prefix: str | os.PathLike[str]) -> list[tuple[Path, str]]:
    """The files that `write_samples` writes, and what to say where one exists: for `PendingFiles`."""
    refusal = "choose another --output-prefix, or pass --overwrite to replace it"
    return [(Path(f"{path}{suffix}"), refusal) for path in sft_prefixes(prefix).values() for suffix in (".bin", ".idx")]


def write_samples(
    conversations: Iterable[Conversation],
    prefix: str | os.PathLike[str],
    tokenizer: HuggingFaceTokenizer,
    template: ChatTemplate,
    pending: PendingFiles,
    *,
    seq_length: int,
    threads: int = 1,
) -> SftSummary:
    """Tokenize conversations, pack them into samples and write the files of :mod:`~..sft_files`.

    A conversation that is longer than a sample is cut at its end, and dropped where no token of an answer is left. The
    conversations of a sample keep their order, and samples have the order of their first ones. Until they are packed,
    the tokens lie in a nameless file beside the output. After an error or a kill there is no output.

    Args:
        conversations: in the order that they are to be numbered.
        prefix: leading part of the file names.
        tokenizer: gives the ids.
        template: renders the conversations.
        pending: what :func:`outputs` names.
        seq_length: the most tokens of a sample.
        threads: native ones of the tokenizer; they change nothing.

    Raises:
        ValueError: the template does not serve a conversation, with its place; or nothing was left to write.
        ModuleNotFoundError: megatron-core is not installed.
    """
    summary = SftSummary(os.fspath(prefix), seq_length)
    with contextlib.ExitStack() as stack:
        directory = Path(prefix).parent
        tokens = stack.enter_context(tempfile.TemporaryFile(dir=directory))
        spool = _Spool(tokens, stack.enter_context(tempfile.TemporaryFile(dir=directory)))
        finder = AnswerFinder(template, tokenizer.added_tokens)
        for ids, learned in _tokenized(conversations, finder, tokenizer, threads):
            within = learned[:seq_length]
            if not within.any():
                summary.dropped += 1
                continue
            summary.truncated += len(ids) > seq_length
            spool.add(ids[:seq_length], within)
        summary.conversations = len(spool.lengths)
        if not summary.conversations:
            raise ValueError(
                f"no conversations to write, {summary.dropped:,} were dropped without an answer in their first "
                f"{seq_length:,} tokens; give other --input files, a larger --seq-length, or another --split"
            )
        _write(spool, tokenizer.vocab_size, summary, stack)
    pending.publish()
    return summary


def _tokenized(
    conversations: Iterable[Conversation], finder: AnswerFinder, tokenizer: HuggingFaceTokenizer, threads: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ids (int32) of each conversation, and whether each of them is learned (uint8)."""
    remaining = iter(conversations)
    while batch := list(itertools.islice(remaining, _BATCH)):
        found = [_found(finder, conversation) for conversation in batch]
        tokenized = tokenizer.tokenize_with_offsets([text for text, _ in found], threads)
        for (text, spans), (ids, offsets) in zip(found, tokenized, strict=True):
            learned = answer_mask(offsets, spans, len(text))
            learned[:1] = 0  # nothing stands in front of it that could ask for it
            yield np.array(ids, np.int32), learned


def _found(finder: AnswerFinder, conversation: Conversation) -> tuple[str, list[Span]]:
    try:
        return finder.find(conversation.messages, conversation.tools)
    except ValueError as error:
        raise ValueError(f"{conversation.place}: {error}") from None


class _Spool:
    """Conversations on disk until all lengths are known: there may be more than memory holds."""

    def __init__(self, tokens: IO[bytes], learned: IO[bytes]) -> None:
        self._tokens, self._learned = tokens, learned
        self.lengths: list[int] = []

    def add(self, ids: np.ndarray, learned: np.ndarray) -> None:
        self._tokens.write(ids.tobytes())
        self._learned.write(learned.tobytes())
        self.lengths.append(len(ids))

    def mapped(self) -> tuple[np.ndarray, np.ndarray]:
        """All ids, int32 [tokens], and whether each is learned, uint8 [tokens]."""
        self._tokens.flush()
        self._learned.flush()
        return np.memmap(self._tokens, np.int32, "r"), np.memmap(self._learned, np.uint8, "r")


def _write(spool: _Spool, vocab_size: int, summary: SftSummary, stack: contextlib.ExitStack) -> None:
    paths = {part: Path(path) for part, path in sft_prefixes(summary.prefix).items()}
    dtypes = {TOKENS: None, ANSWERS: np.uint8, ENDS: np.int32}
    builders: dict[str, Any] = {}
    for part, path in paths.items():
        builders[part] = open_builder(PendingFiles.temporary(Path(f"{path}.bin")), vocab_size, dtypes[part])
        stack.callback(builders[part].data_file.close)
    tokens, learned = spool.mapped()
    begins = np.cumsum([0, *spool.lengths])
    for items in pack(spool.lengths, summary.seq_length):
        ends = list(itertools.accumulate(spool.lengths[item] for item in items))
        places = np.concatenate([np.arange(begins[item], begins[item + 1]) for item in items])
        for part, values in ((TOKENS, tokens[places]), (ANSWERS, learned[places]), (ENDS, ends)):
            builders[part].add_document(values, [len(values)])
        summary.samples += 1
        summary.tokens += len(places)
        summary.answer_tokens += int(learned[places].sum())
    for part, path in paths.items():
        builders[part].finalize(str(PendingFiles.temporary(Path(f"{path}.idx"))))

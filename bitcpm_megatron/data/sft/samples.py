# SPDX-License-Identifier: Apache-2.0
"""Writer of samples for supervised fine-tuning: conversations, tokenized and packed, as three token files."""

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

# Enough conversations per call to keep native threads busy.
_BATCH = 512


@dataclass
class SftSummary:
    """The contents of the files of one prefix, and the parts of the input that are not in them.

    Attributes:
        prefix: the leading part of the file names.
        seq_length: the number of tokens that a sample has room for.
        conversations: the number of conversations in the samples.
        samples: the number of sequences of each file.
        tokens: the number of tokens of all samples.
        answer_tokens: the number of those tokens that are learned as targets.
        truncated: the number of conversations of which only the beginning is in the samples.
        dropped: the number of conversations whose first `seq_length` tokens have no token of an answer; they are in no
            sample.
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
        """The share of the room in the samples that tokens occupy."""
        return self.tokens / (self.samples * self.seq_length)

    def __str__(self) -> str:
        return (
            f"{self.prefix}: {self.conversations:,} conversations in {self.samples:,} samples, {self.tokens:,} tokens, "
            f"{self.answer_tokens:,} of them answers, packing efficiency {self.efficiency:.1%}; {self.truncated:,} "
            f"conversations truncated to {self.seq_length:,} tokens, {self.dropped:,} dropped without an answer in them"
        )


def outputs(prefix: str | os.PathLike[str]) -> list[tuple[Path, str]]:
    """Returns the files that `write_samples` writes, each with the refusal if it exists, for `PendingFiles`."""
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
    """Tokenizes conversations, packs them into samples and writes the files of :mod:`~..sft_files`.

    A conversation that is longer than a sample is cut at its end, and dropped if no token of an answer is left. The
    conversations of a sample keep their order, and samples have the order of their first ones. Until they are packed,
    the tokens are stored in nameless files beside the output. After an error or a kill there is no output.

    Args:
        conversations: the conversations in the order in which they are numbered.
        prefix: the leading part of the file names.
        tokenizer: the tokenizer that gives the ids.
        template: the chat template that renders the conversations.
        pending: the files that :func:`outputs` names.
        seq_length: the largest number of tokens of a sample.
        threads: the number of native threads of the tokenizer, which does not affect the output.

    Raises:
        ValueError: if the template cannot render a conversation properly (the message names its place), or if nothing
            is left to write.
        ModuleNotFoundError: if megatron-core is not installed.
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
    """Yields the ids (int32) of each conversation, and whether each id is learned (uint8)."""
    remaining = iter(conversations)
    while batch := list(itertools.islice(remaining, _BATCH)):
        found = [_found(finder, conversation) for conversation in batch]
        tokenized = tokenizer.tokenize_with_offsets([text for text, _ in found], threads)
        for (text, spans), (ids, offsets) in zip(found, tokenized, strict=True):
            learned = answer_mask(offsets, spans, len(text))
            learned[:1] = 0  # no token is in front of the first one to predict it from
            yield np.array(ids, np.int32), learned


def _found(finder: AnswerFinder, conversation: Conversation) -> tuple[str, list[Span]]:
    try:
        return finder.find(conversation.messages, conversation.tools)
    except ValueError as error:
        raise ValueError(f"{conversation.place}: {error}") from None


class _Spool:
    """Conversations on disk until all lengths are known, since they may be larger than the memory."""

    def __init__(self, tokens: IO[bytes], learned: IO[bytes]) -> None:
        self._tokens, self._learned = tokens, learned
        self.lengths: list[int] = []

    def add(self, ids: np.ndarray, learned: np.ndarray) -> None:
        self._tokens.write(ids.tobytes())
        self._learned.write(learned.tobytes())
        self.lengths.append(len(ids))

    def mapped(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns all ids, int32 [tokens], and whether each is learned, uint8 [tokens]."""
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

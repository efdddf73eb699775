# SPDX-License-Identifier: Apache-2.0
"""SentencePiece models: a tokenizer that uses one, and the training of one on text."""

import errno
import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import sentencepiece

from ...cli import FailedError
from .common import identifiers, outside_of_vocabulary, require_utf8

_WITHOUT_TEXT = 3 + 256
LARGEST_VOCABULARY = 1_000_000
"""Limit of ``--vocab-size`` in training: far above any real vocabulary, and SentencePiece answers within seconds."""
# The trainer silently drops sentences above its own limit, so longer lines are cut into chunks of this many characters.
_MAX_LINE_CHARACTERS = 2000
# The number of lines that are held in memory to train on.
_MAX_LINES = 2_000_000


class SentencePieceTokenizer:
    """A SentencePiece model as megatron-core's datasets and our generation use it.

    Documents end with the model's end-of-sentence piece, as in Megatron-LM's ``GPTSentencePieceTokenizer``; no
    beginning-of-sentence piece is added.

    Args:
        model_path: a ``.model`` file written by SentencePiece.
        model: the content of that file, if it is known already.

    Attributes:
        vocab_size: pieces of the model, special ones included, padding for tensor parallelism excluded.
        eod: the id of the token that ends a document, the end-of-sentence piece; the same as ``eos``.
        pad: the id of the padding piece, -1 if the model has none (then ``GPTDataset`` masks padding by -1, too).
        unique_identifiers: what megatron-core hashes into the name of its index cache: the content of the model, not
            its path.

    Raises:
        ValueError: if the file is missing, is no SentencePiece model or has no end-of-sentence piece.
    """

    def __init__(self, model_path: str | os.PathLike[str], model: bytes | None = None) -> None:
        path = Path(model_path)
        if model is None:
            try:
                if not path.is_file():
                    raise FileNotFoundError(errno.ENOENT, "no such tokenizer model")
                model = path.read_bytes()
            except OSError as error:
                raise ValueError(f"{path}: {error.strerror}; give the path of a SentencePiece .model file") from None
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.vocab_size = self._processor.get_piece_size()
        except RuntimeError:
            self.vocab_size = 0
        if not self.vocab_size:  # an empty file loads as a model without pieces
            raise ValueError(f"{path}: not a SentencePiece model; give the .model file that SentencePiece wrote")
        self.eod = self.eos = self._processor.eos_id()
        if self.eod < 0:
            raise ValueError(f"{path}: the model has no end-of-sentence piece to end documents with; train it with one")
        self.pad = self._processor.pad_id()
        self.unique_identifiers = identifiers(self, sha256=hashlib.sha256(model).hexdigest())

    def tokenize(self, text: str) -> list[int]:
        """Returns the ids of `text`, without ``eod``. Special pieces written out in the text stay plain text."""
        return self.tokenize_batch([text])[0]

    def tokenize_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """Returns the ids of each text, in order, computed by `threads` native threads.

        Raises:
            ValueError: if a text has lone surrogates, which have no UTF-8 form.
        """
        for text in texts:
            require_utf8(text)
        return self._processor.encode(list(texts), num_threads=threads)

    def detokenize(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids` (a list, an array or a 1-D tensor); special pieces such as ``eod`` are left out.

        For models of `train_sentencepiece` this inverts `tokenize`, except that U+2581, the character by which
        SentencePiece writes a space, comes back as a space.

        Raises:
            ValueError: if an id is outside of the vocabulary.
        """
        values = [int(token) for token in ids]
        outside_of_vocabulary(values, self.vocab_size)
        return self._processor.decode(values)


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> bytes:
    """Trains a byte-fallback BPE model on `texts` and returns the content of its ``.model`` file.

    The model keeps text exactly: no normalization, no dummy prefix, runs of spaces survive, and characters that the
    vocabulary lacks, including newlines, are spelled in bytes. Digits are single pieces. Ids: 0 unknown, 1 ``<s>``,
    2 ``</s>`` (``eod``), no padding piece; `vocab_size` includes the 3 special ones and 256 bytes. The texts are
    streamed, and a fixed random sample of their lines is held in memory: the same texts give the same model, byte for
    byte, under one version of SentencePiece. A request to stop (SIGINT, SIGTERM) is answered at once.

    Raises:
        ValueError: if the texts are too few for the vocabulary, or the vocabulary cannot hold bytes and characters.
        Exception: whatever iterating `texts` raises, unchanged.
    """
    if not 1 <= vocab_size <= LARGEST_VOCABULARY:
        raise ValueError(f"a vocabulary of {vocab_size} pieces: give a --vocab-size from 1 to {LARGEST_VOCABULARY}")
    lines = _TrainingLines(texts)
    model = io.BytesIO()
    # In a thread of its own, because Python's signal handlers would have to wait for native code in the main thread.
    thread = ThreadPoolExecutor(max_workers=1)
    training = thread.submit(
        sentencepiece.SentencePieceTrainer.train,
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=0.9995,  # of all characters; the rest is spelled in bytes
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        input_sentence_size=_MAX_LINES,
        shuffle_input_sentence=True,
        max_sentence_length=4 * _MAX_LINE_CHARACTERS,
        minloglevel=2,
    )
    thread.shutdown(wait=False)
    try:
        training.result()
    except RuntimeError as error:
        # The trainer turns an exception of the iterator into its own RuntimeError; raise the original.
        if lines.error is not None:
            raise lines.error from None
        raise _explained(error, vocab_size, lines.count) from error
    finally:
        lines.stopped = True
    return model.getvalue()


class _TrainingLines:
    """The lines of texts as the trainer takes them, until `stopped`; it records their number and the first error."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self.count = 0
        self.error: Exception | None = None
        self.stopped = False

    def __iter__(self) -> Iterator[str]:
        try:
            for text in self._texts:
                require_utf8(text)
                for line in text.split("\n"):
                    for start in range(0, 0 if self.stopped else len(line), _MAX_LINE_CHARACTERS):
                        self.count += 1
                        yield line[start : start + _MAX_LINE_CHARACTERS]
        except Exception as error:
            self.error = error
            raise


def _explained(error: RuntimeError, vocab_size: int, lines: int) -> Exception:
    """Returns a `ValueError` with a cure for a known message of the trainer, else a `FailedError` that quotes it."""
    message = str(error)
    if lines == 0 or "sentences_.empty()" in message:
        return ValueError("no text to train a tokenizer on; give input that is not empty")
    if match := re.search(r"set it to a value <= (\d+)", message):
        return ValueError(
            f"the text ({lines} lines) is too small for a vocabulary of {vocab_size} pieces: it supports at most "
            f"{match[1]}; lower the vocabulary size (--vocab-size {match[1]}) or give more text"
        )
    match = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    # For a vocabulary smaller than its own special pieces the trainer does not mention characters.
    if match or vocab_size < _WITHOUT_TEXT:
        return ValueError(
            f"a vocabulary of {vocab_size} pieces cannot hold 256 bytes, the special pieces and the characters of the "
            f"text; give {f'at least {match[1]}' if match else f'more than {_WITHOUT_TEXT}'} (--vocab-size)"
        )
    return FailedError(f"SentencePiece could not train the tokenizer: {message}")

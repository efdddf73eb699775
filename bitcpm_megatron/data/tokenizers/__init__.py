# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F401  # these names are for the other floors
"""The tokenizers that data preparation, training and generation share.

All have the attributes that megatron-core's ``GPTDataset`` and ``MockGPTDataset`` read from
``GPTDatasetConfig.tokenizer``. megatron-core 0.16 has wrappers too (``megatron.core.tokenizers``), but those are
identified by their path, so that a model retrained in place would silently get the sample indices cached for the old
one, and importing them imports transformers wherever that is installed.
"""

import os
from pathlib import Path

from ..vocabulary import HUGGING_FACE, SENTENCE_PIECE, TOKENIZER_TYPES
from .common import NullTokenizer, Tokenizer
from .sentence_piece import LARGEST_VOCABULARY, SentencePieceTokenizer, train_sentencepiece

_MODEL, _JSON = "tokenizer.model", "tokenizer.json"


def open_tokenizer(path: str | os.PathLike[str], kind: str | None = None) -> Tokenizer:
    """The tokenizer of a file or directory.

    Args:
        path: a SentencePiece ``.model`` file; or a directory as Hugging Face has it, or the ``tokenizer.json`` in it.
        kind: one of :data:`~..vocabulary.TOKENIZER_TYPES`; None for what the path holds, and of a directory that has
            both its ``tokenizer.json``.

    Raises:
        ValueError: it is none, with the cure.
    """
    found = Path(path)
    if kind is None:
        kind = HUGGING_FACE if found.name == _JSON or (found / _JSON).is_file() else SENTENCE_PIECE
    if kind == HUGGING_FACE:
        # Not before it is needed.
        from .hugging_face import HuggingFaceTokenizer

        return HuggingFaceTokenizer(found)
    if kind != SENTENCE_PIECE:
        raise ValueError(f"--tokenizer-type {kind} is not known here: use {' or '.join(TOKENIZER_TYPES)}")
    return SentencePieceTokenizer(found / _MODEL if found.is_dir() else found)

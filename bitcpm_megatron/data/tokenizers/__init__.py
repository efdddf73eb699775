# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F401  # these names are for the other floors
"""The tokenizers that data preparation, training and generation share.

All have the attributes that megatron-core's ``GPTDataset`` and ``MockGPTDataset`` read from
``GPTDatasetConfig.tokenizer``. megatron-core 0.16 also has wrappers (``megatron.core.tokenizers``), but it identifies
them by their path, so that a model retrained in place would silently get the sample indices cached for the old one.
Importing them also imports transformers wherever it is installed.
"""

import os
from pathlib import Path

from ..vocabulary import HUGGING_FACE, SENTENCE_PIECE, TOKENIZER_TYPES
from .common import NullTokenizer, Tokenizer
from .sentence_piece import LARGEST_VOCABULARY, SentencePieceTokenizer, train_sentencepiece

_MODEL, _JSON = "tokenizer.model", "tokenizer.json"


def open_tokenizer(path: str | os.PathLike[str], kind: str | None = None) -> Tokenizer:
    """Opens the tokenizer in a file or directory.

    Args:
        path: a SentencePiece ``.model`` file; or a directory in Hugging Face's layout, or the ``tokenizer.json`` in it.
        kind: one of :data:`~..vocabulary.TOKENIZER_TYPES`; None to go by what the path holds, which prefers
            ``tokenizer.json`` in a directory that has both.

    Raises:
        ValueError: if the path holds no such tokenizer; the message names the cure.
    """
    found = Path(path)
    if kind is None:
        kind = HUGGING_FACE if found.name == _JSON or (found / _JSON).is_file() else SENTENCE_PIECE
    if kind == HUGGING_FACE:
        # Imported here because only this kind needs the library tokenizers.
        from .hugging_face import HuggingFaceTokenizer

        return HuggingFaceTokenizer(found)
    if kind != SENTENCE_PIECE:
        raise ValueError(f"--tokenizer-type {kind} is not known here: use {' or '.join(TOKENIZER_TYPES)}")
    return SentencePieceTokenizer(found / _MODEL if found.is_dir() else found)

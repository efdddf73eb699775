# SPDX-License-Identifier: Apache-2.0
"""The padded size of a vocabulary, and other bounds that flags are checked with."""

SENTENCE_PIECE, HUGGING_FACE = "GPTSentencePieceTokenizer", "HuggingFaceTokenizer"
TOKENIZER_TYPES = (SENTENCE_PIECE, HUGGING_FACE)
"""The values of ``--tokenizer-type``, which are Megatron-LM's names."""
MAX_TOP_K = 1024
"""The largest number of ids that are kept as the targets of a token."""


def padded_vocab_size(vocab_size: int, make_divisible_by: int = 128, tensor_parallel: int = 1) -> int:
    """Returns `vocab_size` rounded up to a multiple of ``make_divisible_by * tensor_parallel`` (Megatron-LM's rule).

    Raises:
        ValueError: if an argument is not positive.
    """
    if min(vocab_size, make_divisible_by, tensor_parallel) < 1:
        raise ValueError(
            "vocabulary size, --make-vocab-size-divisible-by and the tensor parallel size must be positive, got "
            f"{vocab_size}, {make_divisible_by} and {tensor_parallel}"
        )
    multiple = make_divisible_by * tensor_parallel
    return -(-vocab_size // multiple) * multiple

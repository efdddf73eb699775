# SPDX-License-Identifier: Apache-2.0
"""What all tokenizers share, and the one of numbers."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Protocol


class Tokenizer(Protocol):
    """What data preparation, training and generation need, and megatron-core's ``GPTDataset`` reads.

    Attributes:
        vocab_size: rows of an embedding for all ids, special ones included, padding for tensor parallelism excluded.
        eod: id of the token that ends a document.
        eos: the same.
        pad: id of the padding token, -1 without one (then ``GPTDataset`` masks padding by -1, too).
        unique_identifiers: what megatron-core hashes into the name of its index cache: the content of the tokenizer,
            not its path.
    """

    vocab_size: int
    eod: int
    eos: int
    pad: int
    unique_identifiers: OrderedDict[str, str]

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text, without ``eod``."""

    def tokenize_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """The ids of each text, in order, computed by native threads."""

    def detokenize(self, ids: Iterable[int]) -> str:
        """The text of ids; special ones vanish."""


def identifiers(tokenizer: object, **values: str) -> OrderedDict[str, str]:
    """See :class:`Tokenizer`."""
    return OrderedDict({"class": type(tokenizer).__qualname__, **values})


def require_utf8(text: str) -> None:
    """Checks that a text has a UTF-8 form.

    Raises:
        ValueError: it has lone surrogates.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has a lone surrogate at character {error.start}, which UTF-8 cannot express; repair the text at "
            'its source, or pass it through text.encode("utf-8", "replace").decode()'
        ) from error


def outside_of_vocabulary(ids: Sequence[int], vocab_size: int) -> None:
    """Checks ids.

    Raises:
        ValueError: one is outside of the vocabulary.
    """
    outside = [token for token in ids if not 0 <= token < vocab_size]
    if outside:
        raise ValueError(
            f"token id {outside[0]} is outside of the vocabulary of {vocab_size} pieces; cut the logits of a padded "
            "vocabulary to tokenizer.vocab_size before choosing a token"
        )


class NullTokenizer:
    """A tokenizer for ``--mock-data``: its "text" is numbers separated by spaces.

    As with Megatron-LM's ``NullTokenizer``, the argument `vocab_size` counts the ordinary ids; the end-of-document
    token comes on top, so that the attribute is one larger. There is no padding token.

    Raises:
        ValueError: `vocab_size` is not positive.
    """

    pad = -1

    def __init__(self, vocab_size: int) -> None:
        if vocab_size < 1:
            raise ValueError(f"vocab_size is {vocab_size}; the null tokenizer needs at least 1 (--vocab-size)")
        self.eod = self.eos = vocab_size
        self.vocab_size = vocab_size + 1
        self.unique_identifiers = identifiers(self, vocab_size=str(vocab_size))

    def tokenize(self, text: str) -> list[int]:
        """Return the numbers in `text`.

        Raises:
            ValueError: a word is no id of the vocabulary.
        """
        words = text.split()
        wrong = [word for word in words if not (word.isdecimal() and int(word) < self.vocab_size)]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is no id below {self.vocab_size}; the null tokenizer reads numbers only")
        return [int(word) for word in words]

    def tokenize_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """Return the numbers in each text."""
        return [self.tokenize(text) for text in texts]

    def detokenize(self, ids: Iterable[int]) -> str:
        """Return `ids` as numbers separated by spaces."""
        return " ".join(str(int(token)) for token in ids)

# SPDX-License-Identifier: Apache-2.0
"""The interface and the checks that all tokenizers share, and the null tokenizer for mock data."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Protocol


class Tokenizer(Protocol):
    """The tokenizer interface of data preparation, training and generation, and of megatron-core's ``GPTDataset``.

    Attributes:
        vocab_size: rows of an embedding for all ids, special ones included, padding for tensor parallelism excluded.
        eod: the id of the token that ends a document.
        eos: the same id as ``eod``.
        pad: the id of the padding token, -1 without one (then ``GPTDataset`` masks padding by -1, too).
        unique_identifiers: what megatron-core hashes into the name of its index cache: the content of the tokenizer,
            not its path.
    """

    vocab_size: int
    eod: int
    eos: int
    pad: int
    unique_identifiers: OrderedDict[str, str]

    def tokenize(self, text: str) -> list[int]:
        """Returns the ids of a text, without ``eod``."""

    def tokenize_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """Returns the ids of each text, in order, computed by `threads` native threads."""

    def detokenize(self, ids: Iterable[int]) -> str:
        """Returns the text of ids; special tokens are left out."""


def identifiers(tokenizer: object, **values: str) -> OrderedDict[str, str]:
    """Builds the ``unique_identifiers`` of a tokenizer (:class:`Tokenizer`): the name of its class, and `values`."""
    return OrderedDict({"class": type(tokenizer).__qualname__, **values})


def require_utf8(text: str) -> None:
    """Raises if a text has no UTF-8 form.

    Raises:
        ValueError: if the text has lone surrogates.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has a lone surrogate at character {error.start}, which UTF-8 cannot express; repair the text at "
            'its source, or pass it through text.encode("utf-8", "replace").decode()'
        ) from error


def outside_of_vocabulary(ids: Sequence[int], vocab_size: int) -> None:
    """Raises if an id is outside of the vocabulary.

    Raises:
        ValueError: if an id is negative, or `vocab_size` or more.
    """
    outside = [token for token in ids if not 0 <= token < vocab_size]
    if outside:
        raise ValueError(
            f"token id {outside[0]} is outside of the vocabulary of {vocab_size} pieces; cut the logits of a padded "
            "vocabulary to tokenizer.vocab_size before choosing a token"
        )


class NullTokenizer:
    """A tokenizer for ``--mock-data``: its "text" is numbers separated by spaces.

    Like Megatron-LM's ``NullTokenizer``, it takes the number of ordinary ids as the argument `vocab_size` and adds an
    end-of-document token, so that the attribute is one larger. There is no padding token.

    Raises:
        ValueError: if `vocab_size` is not positive.
    """

    pad = -1

    def __init__(self, vocab_size: int) -> None:
        if vocab_size < 1:
            raise ValueError(f"vocab_size is {vocab_size}; the null tokenizer needs at least 1 (--vocab-size)")
        self.eod = self.eos = vocab_size
        self.vocab_size = vocab_size + 1
        self.unique_identifiers = identifiers(self, vocab_size=str(vocab_size))

    def tokenize(self, text: str) -> list[int]:
        """Returns the numbers in `text`.

        Raises:
            ValueError: if a word is no id of the vocabulary.
        """
        words = text.split()
        wrong = [word for word in words if not (word.isdecimal() and int(word) < self.vocab_size)]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is no id below {self.vocab_size}; the null tokenizer reads numbers only")
        return [int(word) for word in words]

    def tokenize_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """Returns the numbers in each text."""
        return [self.tokenize(text) for text in texts]

    def detokenize(self, ids: Iterable[int]) -> str:
        """Returns `ids` as numbers separated by spaces."""
        return " ".join(str(int(token)) for token in ids)

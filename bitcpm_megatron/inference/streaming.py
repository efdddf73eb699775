# SPDX-License-Identifier: Apache-2.0
"""Streaming of text: tokens become text as they are generated."""

from ..data.tokenizers import Tokenizer

_INCOMPLETE = "\ufffd"


class TextStream:
    """Converter of tokens to text, one by one, which holds back characters of which some bytes are still missing.

    The concatenated parts equal the text that the tokenizer makes of all tokens at once. The one exception is a
    character whose last bytes never come: it becomes U+FFFD, once per token of it.

    Args:
        tokenizer: the tokenizer of the tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._said: list[int] = []
        self._held: list[int] = []

    def put(self, token: int) -> str:
        """Takes one more token, and returns the text that it completes, which is often empty."""
        self._held.append(token)
        # Tokens are decoded together with those before them, because the first token of a text may lose its space.
        before = self._tokenizer.detokenize(self._said)
        text = self._tokenizer.detokenize(self._said + self._held)
        if text.endswith(_INCOMPLETE) or len(text) <= len(before):
            return ""
        self._said, self._held = self._held, []
        return text[len(before) :]

    def end(self) -> str:
        """Returns the text that was held back, and resets the stream."""
        held = self._tokenizer.detokenize(self._held)
        self._said, self._held = [], []
        return held

# SPDX-License-Identifier: Apache-2.0
"""Text of tokens as they come."""

from ..data.tokenizers import Tokenizer

_INCOMPLETE = "\ufffd"


class TextStream:
    """Turns tokens into text, one by one, and holds back what may still change: characters that lack some bytes.

    All parts together are what the tokenizer makes of all the tokens at once; only a character whose last bytes never
    come is U+FFFD, once per token of it.

    Args:
        tokenizer: of the tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._said: list[int] = []
        self._held: list[int] = []

    def put(self, token: int) -> str:
        """The text that is complete with one more token; often empty."""
        self._held.append(token)
        # Tokens are read behind those before them: the first of a text may lose its space.
        before = self._tokenizer.detokenize(self._said)
        text = self._tokenizer.detokenize(self._said + self._held)
        if text.endswith(_INCOMPLETE) or len(text) <= len(before):
            return ""
        self._said, self._held = self._held, []
        return text[len(before) :]

    def end(self) -> str:
        """What was held back; the stream starts anew."""
        held = self._tokenizer.detokenize(self._held)
        self._said, self._held = [], []
        return held

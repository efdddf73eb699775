# SPDX-License-Identifier: Apache-2.0
"""Generation of text with any causal model: a key-value cache that reuses common beginnings, and drawing of tokens."""

import abc
from collections.abc import Collection, Iterator, Sequence

import torch


class NextToken(abc.ABC):
    """A model's prediction of the token that follows others, with a cache of keys and values.

    If a call's tokens begin like those of the call before, only the rest is computed: one more token while a text
    grows, or the next turn of a conversation. The result is always that of a model without a cache.

    Args:
        original: the length beyond which a LongRoPE uses its long factors, for all tokens of a text, so that the cache
            of a shorter text is invalid for it; None for a model without LongRoPE.
    """

    def __init__(self, original: int | None = None) -> None:
        self._original = original
        self._seen: list[int] = []

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """Returns the logits of the next token, ``[rows]``; rows may exceed the vocabulary, because of padding.

        Args:
            tokens: the ids of the tokens so far, at least one, and no more than the model's context.
        """
        if self._is_long(tokens) != self._is_long(self._seen):
            self._seen = []
        kept = 0
        while kept < min(len(self._seen), len(tokens) - 1) and self._seen[kept] == tokens[kept]:
            kept += 1
        # If the forward pass is interrupted, the contents of the cache are unknown.
        self._seen = []
        logits = self._forward(list(tokens), kept)
        self._seen = list(tokens)
        return logits

    def _is_long(self, tokens: Sequence[int]) -> bool:
        return self._original is not None and len(tokens) > self._original

    @abc.abstractmethod
    def _forward(self, tokens: list[int], kept: int) -> torch.Tensor:
        """Computes the logits of the token after ``tokens``, ``[rows]``.

        The cache holds the first ``kept`` of them, and possibly entries after those, which are not valid. ``kept`` is 0
        if the previous forward pass did not finish.
        """


def generate(
    model: NextToken,
    prompt: Sequence[int],
    count: int,
    context: int,
    vocab_size: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    ends: Collection[int] = (),
) -> Iterator[int]:
    """Returns an iterator over the tokens that follow a prompt, at most ``count``.

    A token of ``ends`` is the last one. Every tensor-parallel rank must call this with the same arguments, and gets the
    same tokens.

    Args:
        model: the model that predicts the next token.
        prompt: the ids of the prompt's tokens, at least one.
        count: the maximum number of tokens.
        context: the longest input of the model. Tokens that do not fit are dropped from the beginning. Since this
            shifts the positions of all others, every token beyond the context costs a forward pass of the whole
            context.
        vocab_size: the size of the vocabulary without padding; padded entries are never drawn.
        temperature: the temperature of the draws; 0 takes the likeliest token.
        generator: the generator of the draws, on the CPU; None for torch's default.
        ends: the ids of tokens after which nothing is drawn.

    Raises:
        ValueError: if the prompt has no token or one outside the vocabulary; or, while tokens are drawn, if the model
            computes logits that are not finite.
    """
    if not prompt or not all(0 <= token < vocab_size for token in prompt):
        raise ValueError(f"a prompt of {len(prompt)} tokens: give one or more, from 0 to {vocab_size - 1}")

    def drawn() -> Iterator[int]:
        tokens = list(prompt)
        for _ in range(count):
            logits = model.logits(tokens[-context:])[:vocab_size].double().cpu()
            tokens.append(_draw(logits, temperature, generator))
            yield tokens[-1]
            if tokens[-1] in ends:
                return

    return drawn()


def _draw(logits: torch.Tensor, temperature: float, generator: torch.Generator | None) -> int:
    if not logits.isfinite().all():
        raise ValueError("the model computes NaN or infinity: its weights are damaged, or too large for its dtype")
    if temperature == 0:
        return int(logits.argmax())
    # The largest logit is subtracted first, so that it does not overflow, however small the temperature is.
    likelihood = ((logits - logits.max()) / temperature).softmax(-1)
    return int(torch.multinomial(likelihood, 1, generator=generator))

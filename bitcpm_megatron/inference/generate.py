# SPDX-License-Identifier: Apache-2.0
"""Text of any causal model, token by token: a key-value cache that follows what is asked, and one way to draw."""

import abc
from collections.abc import Collection, Iterator, Sequence

import torch


class NextToken(abc.ABC):
    """What a model says of the token behind others, with a cache of keys and values.

    Asked for tokens that begin as those before did, it computes the others alone: one more token while a text grows, or
    the next turn of a conversation. Whatever else it is asked, the answer is that of a model without a cache.

    Args:
        original: the length beyond which a LongRoPE takes its long factors, for all tokens of a text, so that what was
            kept of a shorter one is of another model; None without one.
    """

    def __init__(self, original: int | None = None) -> None:
        self._original = original
        self._seen: list[int] = []

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """The logits of what follows: ``[rows]``, which may be more than the vocabulary has entries.

        Args:
            tokens: at least one, and no more than the model's context.
        """
        if self._is_long(tokens) != self._is_long(self._seen):
            self._seen = []
        kept = 0
        while kept < min(len(self._seen), len(tokens) - 1) and self._seen[kept] == tokens[kept]:
            kept += 1
        # Of a forward that is interrupted nothing is known.
        self._seen = []
        logits = self._forward(list(tokens), kept)
        self._seen = list(tokens)
        return logits

    def _is_long(self, tokens: Sequence[int]) -> bool:
        return self._original is not None and len(tokens) > self._original

    @abc.abstractmethod
    def _forward(self, tokens: list[int], kept: int) -> torch.Tensor:
        """The logits behind ``tokens``, of which the cache holds the first ``kept``, and maybe others behind them.

        ``kept`` is 0 where the forward before this one did not end.
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
    """The next ``count`` tokens of a prompt, or fewer where one of ``ends`` comes, which is then the last of them.

    Every tensor-parallel rank must call this alike, and gets the same.

    Args:
        model: says what follows.
        prompt: token ids, at least one.
        count: of tokens, at most.
        context: longest input of the model. Earlier tokens are dropped, and since all others then stand elsewhere,
            every token beyond it costs a forward of the whole context.
        vocab_size: without padding; padded entries are never drawn.
        temperature: 0 takes the likeliest token.
        generator: of the draws, on the CPU; None for torch's own.
        ends: ids of tokens behind which nothing is drawn.

    Raises:
        ValueError: a prompt without tokens, or with one that is none of the vocabulary; or, while tokens are drawn, a
            model that computes no number.
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
    # Of the differences to the largest: however small the temperature is, that one is no infinity.
    likelihood = ((logits - logits.max()) / temperature).softmax(-1)
    return int(torch.multinomial(likelihood, 1, generator=generator))

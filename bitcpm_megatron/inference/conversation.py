# SPDX-License-Identifier: Apache-2.0
"""Conversations with a model, turn by turn."""

from collections.abc import Generator, Iterator

import torch

from ..data.sft.questions import Questioner
from .generate import generate
from .streaming import TextStream
from .text_model import TextModel


class Conversation:
    """A conversation between a user and a model, which answers one message after the other.

    The prompt of a turn is the whole conversation, formatted by the chat template. The tokens with which it repeats the
    turns before are already in the model's cache and are not computed again.

    Args:
        model: the model that answers.
        questioner: formats the conversation for the model.
        system: the system message with which the conversation begins; None for none.
        count: the maximum number of tokens of an answer.
        temperature: the temperature of the draws; 0 takes the likeliest token.
        seed: the seed of the draws.

    Attributes:
        messages: the messages of the conversation so far; an answer that was stopped is kept up to where it stopped.
        full: whether the last answer was cut off because it reached the end of the model's context.

    Raises:
        ValueError: if the template refuses a conversation with this system message.
    """

    def __init__(
        self,
        model: TextModel,
        questioner: Questioner,
        system: str | None = None,
        count: int = 512,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        self._model, self._questioner = model, questioner
        self._count, self._temperature = count, temperature
        self._ends = model.ends | questioner.ends
        self._generator = torch.Generator().manual_seed(seed)
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self.full = False
        questioner.ask("?", self.messages)

    def say(self, text: str) -> Generator[str, None, None]:
        """Returns an iterator over the answer to a user's message, in parts, one per token; many parts are empty.

        Message and answer become part of the conversation when the answer ends or the iterator is closed, up to the
        last token drawn. A message that raises leaves the conversation unchanged.

        Raises:
            ValueError: if the conversation would leave no room in the model's context, or the text cannot be tokenized.
        """
        prompt = self._questioner.ask(text, self.messages)
        room = self._model.context - len(prompt)
        if room < 1:
            raise ValueError(
                f"with this the conversation has {len(prompt):,} tokens, and the model's context is "
                f"{self._model.context:,}: say less, or begin a new one"
            )
        count = min(self._count, room)
        vocabulary = self._model.tokenizer.vocab_size
        drawn = generate(
            self._model.tokens,
            prompt,
            count,
            self._model.context,
            vocabulary,
            self._temperature,
            self._generator,
            self._ends,
        )
        self.full = False
        return self._answer(text, drawn, full=count == room)

    def _answer(self, text: str, drawn: Iterator[int], full: bool) -> Generator[str, None, None]:
        stream, said = TextStream(self._model.tokenizer), list[int]()
        try:
            for token in drawn:
                said.append(token)
                yield stream.put(token)
            yield stream.end()
            self.full = full and said[-1] not in self._ends
        finally:
            # A message whose answer was stopped before its first token is left out of the conversation.
            if said:
                answer = self._model.tokenizer.detokenize(said)
                self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]

# SPDX-License-Identifier: Apache-2.0
"""A conversation with a model, turn by turn."""

from collections.abc import Generator, Iterator

import torch

from ..data.sft.questions import Questioner
from .generate import generate
from .streaming import TextStream
from .text_model import TextModel


class Conversation:
    """What was said so far, and what the model answers to more of it.

    A turn is asked with the whole conversation, by the chat template. As far as its tokens are those that the model saw
    or wrote in the turns before, they are in its cache.

    Args:
        model: that is asked.
        questioner: writes the conversation for it.
        system: what the conversation begins with, as the system says; None without.
        count: tokens of an answer, at most.
        temperature: 0 takes the likeliest token.
        seed: of the draws.

    Attributes:
        messages: of the conversation, answers that were stopped as far as they came.
        full: whether the last answer ended where the model's context does.

    Raises:
        ValueError: the template refuses such a conversation.
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
        """The answer to what a user says, in parts, one per token as it comes; many are empty.

        It becomes part of the conversation when it ends or the iterator is closed, as far as it came; what the model
        cannot be asked leaves the conversation as it was.

        Raises:
            ValueError: the conversation is longer than the model's context, or the text cannot be tokenized.
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
            # A user who stopped an answer before its first token has said something, and heard nothing.
            if said:
                answer = self._model.tokenizer.detokenize(said)
                self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]

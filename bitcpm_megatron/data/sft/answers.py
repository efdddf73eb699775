# SPDX-License-Identifier: Apache-2.0
"""Location of the answers in a rendered conversation, proved or refused, and the tokens of them that are learned."""

import itertools
import re
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from .chat_template import ChatTemplate, Message

Span = tuple[int, int]
REASONING = ("reasoning_content", "thinking")
_CURE = "give one with {% generation %} blocks around what the model writes: --chat-template FILE"
_NO_END = "so that no model would learn to stop: give one that writes eos_token there (--chat-template FILE)"
_LEFT_OUT = "give one that writes it (--chat-template FILE), or leave it out of the data"


class AnswerFinder:
    """A finder of what a model must learn to write in a conversation: each assistant message and its end-of-turn.

    The end-of-turn is the first added token after the message, with only white space in between. If the template has
    ``{% generation %}`` blocks, they locate the messages, and the end-of-turn is the first added token after a plain
    answer, in its block or after it. Otherwise a message is the part of the text that changes if another message
    replaces it; the text before and after it must stay the same. If the template begins that other message
    differently (reasoning and tool calls have their own words), the message is what follows the text that asks for it.
    The text is never searched for the words of an answer.

    Args:
        template: the chat template that renders the conversations.
        added_tokens: the texts that the tokenizer reads as one token wherever they are written.
    """

    def __init__(self, template: ChatTemplate, added_tokens: Collection[str]) -> None:
        self._template = template
        # Some vocabularies have runs of white space as added tokens, which end no turn.
        longest_first = sorted(filter(str.strip, added_tokens), key=len, reverse=True)
        token = "|".join(map(re.escape, longest_first)) or "(?!)"
        self._token = re.compile(token)
        self._token_behind = re.compile(rf"\s*(?:{token})")
        self._token_at_end = re.compile(rf"(?:{token})\s*\Z")

    def find(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> tuple[str, list[Span]]:
        """Returns the text of a conversation and the (start, end) of each answer in it, in characters and in order.

        Raises:
            ValueError: if the template refuses the conversation, leaves out a part of it, or writes it so that answers
                and their ends cannot be told from the rest for certain; the message names the cure.
        """
        text = self._template.render(messages, tools)
        self._require_whole(text, messages, tools)
        if self._template.has_generation:
            spans = self._generated(text, messages, tools)
        else:
            answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
            spans = [self._locate(text, messages, number, tools) for number in answers]
        if not spans or any(end > start for (_, end), (start, _) in itertools.pairwise(spans)):
            raise ValueError(f"the chat template writes no answers one after another: {_CURE}")
        return text, spans

    def _require_whole(self, text: str, messages: Sequence[Message], tools: Sequence[Any] | None) -> None:
        """Refuses a template that silently drops parts of the conversation, which are in the data for a reason."""
        word = _unused_word(text)
        words = {number: f"{word}n{number}n" for number, message in enumerate(messages) if message.get("content")}
        replaced = [{**message, "content": words.get(n, message.get("content"))} for n, message in enumerate(messages)]
        # A template that refuses such words at least looks at them.
        written = self._rendered(replaced, tools)
        for number, one in words.items():
            if written is not None and one not in written:
                where = f"the content of message {number + 1} ({messages[number]['role']})"
                raise ValueError(f"the chat template leaves out {where}: {_LEFT_OUT}")
        if tools and self._rendered(messages, None) == text:
            raise ValueError(f"the chat template leaves out the tools: {_LEFT_OUT}")
        without = [_without(message, "tool_calls") for message in messages]
        if without != list(messages) and self._rendered(without, tools) == text:
            raise ValueError(f"the chat template leaves out tool_calls: {_LEFT_OUT}")
        for field in REASONING:
            if holding := [number for number, message in enumerate(messages) if field in message]:
                # Templates may drop reasoning once the user goes on, as they also will at inference.
                goes_on = (n for n in range(holding[-1], len(messages)) if messages[n]["role"] == "user")
                asked = list(messages[: next(goes_on, len(messages))])
                written = self._rendered(asked, tools)
                asked[holding[-1]] = _without(asked[holding[-1]], field)
                if written is not None and written == self._rendered(asked, tools):
                    raise ValueError(f"the chat template leaves out {field}: {_LEFT_OUT}")

    def _locate(self, text: str, messages: Sequence[Message], number: int, tools: Sequence[Any] | None) -> Span:
        """Returns the span of an assistant message and its end-of-turn."""
        where = f"message {number + 1} (assistant)"
        word = _unused_word(text)
        so_far, another = list(messages[:number]), {"role": "assistant", "content": word}
        instead = self._rendered([*so_far, another, *messages[number + 1 :]], tools) or ""
        before, found, behind = instead.partition(word)
        # If a template writes the word twice, this test fails too, because the text does not contain the word.
        if found and text.startswith(before) and text.endswith(behind):
            start, end = len(before), len(text) - len(behind)
            if start >= end:
                raise ValueError(f"the chat template leaves out {where}: {_LEFT_OUT}")
            token = self._token_behind.match(text, end)
            if token is None:
                raise ValueError(f"the chat template writes no end-of-turn token behind {where}, {_NO_END}")
            return start, token.end()
        asked = self._rendered(so_far, tools, prompt=True)
        given = self._rendered(messages[: number + 1], tools)
        if asked is not None and given is not None and text.startswith(asked) and text.startswith(given):
            # If nothing in the text asks for a message, the message may have a header, which must not be learned.
            begun, _, _ = (self._rendered([*so_far, another], tools) or "").partition(word)
            asks = asked != self._rendered(so_far, tools) or asked.rstrip() == begun.rstrip()
            token = self._token_at_end.search(given, len(asked))
            if asks and token is not None and given[len(asked) : token.start()].strip():
                return len(asked), len(given.rstrip())
        raise ValueError(f"the chat template writes {where} so that it cannot be told from the rest: {_CURE}")

    def _rendered(self, messages: Sequence[Message], tools: Sequence[Any] | None, prompt: bool = False) -> str | None:
        """Renders a conversation that is not in the data; returns None if the template refuses it."""
        try:
            return self._template.render(messages, tools, prompt)
        except ValueError:
            return None

    def _generated(self, text: str, messages: Sequence[Message], tools: Sequence[Any] | None) -> list[Span]:
        """Returns the spans of the generation blocks, each with the end-of-turn in it or after it."""
        blocks = self._template.generated(messages, tools)
        if not blocks:
            return []
        token, within = self._end_of_turn(text, messages, tools)
        at_end, after = re.compile(rf"{re.escape(token)}\s*\Z"), re.compile(rf"\s*{re.escape(token)}")
        spans = []
        for number, (start, end) in enumerate(blocks, start=1):
            ended, behind = at_end.search(text, start, end), after.match(text, end)
            # The content of a message may end with such a token, and the next turn may begin with one.
            if behind is not None and not (within and ended):
                end = behind.end()
            elif not ended:
                where = f"its generation block {number}"
                raise ValueError(f"the chat template writes no end-of-turn token behind {where}, {_NO_END}")
            spans.append((start, end))
        return spans

    def _end_of_turn(self, text: str, messages: Sequence[Message], tools: Sequence[Any] | None) -> tuple[str, bool]:
        """Returns the token that ends a plain answer in place of the first one, and whether its block contains it."""
        number = next((n for n, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
        word = _unused_word(text)
        said = [*messages[:number], {"role": "assistant", "content": word}]
        instead = self._rendered(said, tools) or ""
        for start, end in self._template.generated(said, tools) if instead else ():
            if (place := instead.find(word, start, end)) >= 0:
                token = self._token.search(instead, place + len(word))
                if token is None:
                    raise ValueError(f"the chat template writes no end-of-turn token behind a plain answer, {_NO_END}")
                return token[0], token.end() <= end
        raise ValueError(f"the chat template writes no plain answer in a generation block: {_CURE}")


def answer_mask(offsets: Sequence[Span], spans: Sequence[Span], size: int) -> np.ndarray:
    """Returns which tokens are learned: those that have at least one character of an answer.

    Args:
        offsets: the (start, end) of each token, in characters.
        spans: the (start, end) of each answer, in characters.
        size: the length of the text, in characters.

    Returns:
        uint8 [tokens], 1 for a token that is learned as a target.
    """
    answers_until = np.zeros(size + 1, np.int64)
    for start, end in spans:
        answers_until[start + 1 : end + 1] = 1
    answers_until = np.cumsum(answers_until)
    starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
    return (answers_until[ends] > answers_until[starts]).astype(np.uint8)


def _without(message: Message, field: str) -> Message:
    return {key: value for key, value in message.items() if key != field}


def _unused_word(text: str) -> str:
    return next(word for n in itertools.count() if (word := f"answer{n}") not in text)

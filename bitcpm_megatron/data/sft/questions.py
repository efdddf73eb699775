# SPDX-License-Identifier: Apache-2.0
"""The prompts for a model that was trained on conversations, and the tokens that end its answers."""

from collections.abc import Sequence

from ..tokenizers.hugging_face import HuggingFaceTokenizer
from .answers import AnswerFinder
from .chat_template import ChatTemplate, Message


class Questioner:
    """A writer of prompts: what a user says, in the form of training, up to where the answer begins.

    Args:
        tokenizer: the model's tokenizer.
        template: the tokenizer's chat template.

    Attributes:
        ends: the ids of the tokens that end an answer: the one that the template writes after answers, and the
            tokenizer's ``eos_token``.

    Raises:
        ValueError: if the template does not show where answers begin and end.
    """

    def __init__(self, tokenizer: HuggingFaceTokenizer, template: ChatTemplate) -> None:
        self._tokenizer, self._template = tokenizer, template
        said = [{"role": role, "content": role} for role in ("user", "assistant")]
        text, spans = AnswerFinder(template, tokenizer.added_tokens).find(said)
        answer = text[slice(*spans[-1])].rstrip()
        ends = [token for token in tokenizer.added_tokens if token and answer.endswith(token)]
        self.ends = {tokenizer.eod, *(tokenizer.tokenize(token)[0] for token in ends)}

    def ask(self, question: str, before: Sequence[Message] = ()) -> list[int]:
        """Returns the ids of a conversation whose last message is the user's `question`.

        Args:
            question: what the user says.
            before: the earlier messages.

        Raises:
            ValueError: if the template refuses the conversation.
        """
        messages = [*before, {"role": "user", "content": question}]
        text = self._template.render(messages, add_generation_prompt=True)
        return self._tokenizer.tokenize(text)

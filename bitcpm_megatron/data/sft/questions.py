# SPDX-License-Identifier: Apache-2.0
"""What a model that was trained on conversations is asked with, and what ends its answers."""

from collections.abc import Sequence

from ..tokenizers.hugging_face import HuggingFaceTokenizer
from .answers import AnswerFinder
from .chat_template import ChatTemplate, Message


class Questioner:
    """Writes what a user says as training saw it, up to where the answer begins.

    Args:
        tokenizer: of the model.
        template: its chat template.

    Attributes:
        ends: ids of the tokens that end an answer: the one that the template writes behind answers, and the tokenizer's
            ``eos_token``.

    Raises:
        ValueError: the template does not show where answers stand and end.
    """

    def __init__(self, tokenizer: HuggingFaceTokenizer, template: ChatTemplate) -> None:
        self._tokenizer, self._template = tokenizer, template
        said = [{"role": role, "content": role} for role in ("user", "assistant")]
        text, spans = AnswerFinder(template, tokenizer.added_tokens).find(said)
        answer = text[slice(*spans[-1])].rstrip()
        ends = [token for token in tokenizer.added_tokens if token and answer.endswith(token)]
        self.ends = {tokenizer.eod, *(tokenizer.tokenize(token)[0] for token in ends)}

    def ask(self, question: str, before: Sequence[Message] = ()) -> list[int]:
        """The ids of a conversation in which a user says `question` now.

        Args:
            question: what the user says.
            before: what was said before it.

        Raises:
            ValueError: the template refuses it.
        """
        messages = [*before, {"role": "user", "content": question}]
        text = self._template.render(messages, add_generation_prompt=True)
        return self._tokenizer.tokenize(text)

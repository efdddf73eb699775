# SPDX-License-Identifier: Apache-2.0
"""What a model that was trained on conversations is asked with, and what ends its answers."""

from ..tokenizers.hugging_face import HuggingFaceTokenizer
from .answers import AnswerFinder
from .chat_template import ChatTemplate


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

    def ask(self, question: str) -> list[int]:
        """The ids of a conversation of which a user said `question`, and nobody anything yet.

        Raises:
            ValueError: the template refuses it.
        """
        text = self._template.render([{"role": "user", "content": question}], add_generation_prompt=True)
        return self._tokenizer.tokenize(text)

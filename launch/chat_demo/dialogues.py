# SPDX-License-Identifier: Apache-2.0
"""Generated dialogues whose answers depend on the questions, and held-out questions that occur in none of them."""

import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from bitcpm_megatron.data.sft.chat_template import Message

SYSTEM = "Answer in one line."
_SYLLABLES = "be da ki lo mi na po ra su te vo zi".split()
_WORDS = (
    "apple banana cherry date elder fig grape hazel iris juniper kiwi lemon mango nettle olive pear quince rose "
    "sage thyme"
).split()
_ORDER = "order"
_KINDS = {
    "hello": ("Say hello to {}.", "Hello, {}!", r"Hello, [A-Z][a-z]+!"),
    "goodbye": ("Say goodbye to {}.", "Goodbye, {}!", r"Goodbye, [A-Z][a-z]+!"),
    "who": ("I am {}. Who am I?", "You are {}.", r"You are [A-Z][a-z]+\."),
    _ORDER: ("Put in order: {}, {}.", "First {}, then {}.", r"First [a-z]+, then [a-z]+\."),
}
KINDS = tuple(_KINDS)
"""The kinds of questions: to repeat a name in one of three sentences, or to put two words in alphabetical order."""


@dataclass(frozen=True)
class Question:
    """A question of a user, with its right answer.

    Attributes:
        kind: the kind of the question, one of :data:`KINDS`.
        prompt: the message of the user.
        answer: the right answer.
    """

    kind: str
    prompt: str
    answer: str

    def is_answer(self, text: str) -> bool:
        """Returns whether a text has the form of an answer to this kind of question, right or not."""
        return re.fullmatch(_KINDS[self.kind][2], text) is not None


def _about_name(kind: str, name: str) -> Question:
    prompt, answer, _ = _KINDS[kind]
    return Question(kind, prompt.format(name), answer.format(name))


def _about_words(pair: tuple[str, str]) -> Question:
    prompt, answer, _ = _KINDS[_ORDER]
    return Question(_ORDER, prompt.format(*pair), answer.format(*sorted(pair)))


@dataclass(frozen=True)
class _Subjects:
    """The subjects of questions: names, and pairs of words in either order."""

    names: list[str]
    pairs: list[tuple[str, str]]

    def question(self, kind: str, chosen: random.Random) -> Question:
        """Returns a question of a kind about a randomly chosen subject."""
        if kind == _ORDER:
            return _about_words(chosen.choice(self.pairs))
        return _about_name(kind, chosen.choice(self.names))


def _subjects() -> tuple[_Subjects, _Subjects]:
    """Returns the subjects of the dialogues and the held-out ones: names and pairs (in either order) in no dialogue."""
    chosen = random.Random(0)
    names = ["".join(parts).capitalize() for n in (2, 3) for parts in itertools.product(_SYLLABLES, repeat=n)]
    pairs = list(itertools.combinations(_WORDS, 2))
    chosen.shuffle(names)
    chosen.shuffle(pairs)
    turned = [pair if chosen.random() < 0.5 else pair[::-1] for pair in pairs[:20]]
    both = [pair for a, b in pairs[20:] for pair in ((a, b), (b, a))]
    return _Subjects(names[30:], both), _Subjects(names[:30], turned)


def held_out() -> list[Question]:
    """Returns 50 questions about subjects that are in no dialogue: 10 of each kind about names, 20 about words."""
    subjects = _subjects()[1]
    kinds = [kind for kind in KINDS if kind != _ORDER]
    names = [_about_name(kinds[number // 10], name) for number, name in enumerate(subjects.names)]
    return [*names, *map(_about_words, subjects.pairs)]


def dialogues(count: int) -> Iterator[list[Message]]:
    """Yields ``count`` conversations of one to six turns, with questions of all kinds; some have a system message."""
    chosen = random.Random(1)
    subjects = _subjects()[0]
    for _ in range(count):
        messages: list[Message] = [{"role": "system", "content": SYSTEM}] if chosen.random() < 0.2 else []
        for _ in range(chosen.randint(1, 6)):
            question = subjects.question(chosen.choice(KINDS), chosen)
            messages.append({"role": "user", "content": question.prompt})
            messages.append({"role": "assistant", "content": question.answer})
        yield messages

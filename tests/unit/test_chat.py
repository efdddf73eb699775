# SPDX-License-Identifier: Apache-2.0
"""Tests of conversations: what the model is asked, what is kept, and the command ``chat``."""

import io
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.chat import CHATML, GEMMA, chat_tokenizer
from support.next_tokens import Follows

from bitcpm_megatron.data.tokenizers import open_tokenizer
from bitcpm_megatron.inference.conversation import Conversation
from bitcpm_megatron.inference.text_model import TextModel, open_questioner
from bitcpm_megatron.launch import chat as command

CONTEXT = 200


class Answers(Follows):
    """A model that answers ``AB`` after the start of an assistant's turn, and ``Hm`` to a question mark."""

    def __init__(self, directory: Path) -> None:
        tokenizer = open_tokenizer(directory)
        line, a, b, end, self.mark, h, m = tokenizer.tokenize("\nAB<|im_end|>?Hm")
        super().__init__({line: a, a: b, b: end, h: m, m: end}, tokenizer.vocab_size)
        # The number of tokens between the user's last word and the answer.
        self.between = len(tokenizer.tokenize("<|im_end|>\n<|im_start|>assistant\n"))
        self.question = h
        self.interrupt_behind: int | None = None

    def _forward(self, tokens: list[int], kept: int) -> torch.Tensor:
        if self.interrupt_behind == tokens[-1]:
            signal.raise_signal(signal.SIGINT)
        if len(tokens) > self.between and tokens[-1 - self.between] == self.mark and len(tokens) - kept > 1:
            self.computed.append(tokens[kept:])
            logits = torch.zeros(self.rows)
            logits[self.question] = 1
            return logits
        return super()._forward(tokens, kept)


@pytest.fixture
def model(tmp_path: Path) -> TextModel:
    directory = chat_tokenizer(tmp_path / "tokenizer", CHATML)
    tokenizer = open_tokenizer(directory)
    return TextModel(directory, Answers(directory), tokenizer, CONTEXT, frozenset({tokenizer.eod}))


def talk(model: TextModel, **options: object) -> Conversation:
    return Conversation(model, open_questioner(model), **options)


@pytest.mark.verifies(
    "checkpoints",
    "chat: every turn is answered in the context of all previous turns, and an answer that is stopped is kept up to "
    "that point",
)
def test_a_turn_is_asked_with_all_before_it(model: TextModel) -> None:
    conversation = talk(model, system="Be brief.")
    assert ["".join(conversation.say(text)) for text in ("Hi!", "Who?", "So")] == ["AB", "Hm", "AB"]
    assert [m["content"] for m in conversation.messages] == ["Be brief.", "Hi!", "AB", "Who?", "Hm", "So", "AB"]
    asked = [model.tokenizer.tokenize(text) for text in (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>\n<|im_start|>user\nSo<|im_end|>\n<|im_start|>assistant\n",
    )]  # fmt: skip
    # Later turns compute only new tokens. These begin with the end of the answer, which the model drew but has not
    # read.
    assert [tokens for tokens in model.tokens.computed if len(tokens) > 1] == asked


def test_an_answer_that_is_stopped_stays_as_far_as_it_came(model: TextModel) -> None:
    conversation = talk(model)
    answer = conversation.say("Hi!")
    assert next(answer) == "A"
    answer.close()
    assert conversation.messages == [
        {"role": "user", "content": "Hi!"},
        {"role": "assistant", "content": "A"},
    ]
    assert "".join(conversation.say("Go on")) == "AB"
    assert len(conversation.messages) == 4


def test_a_conversation_beyond_the_context_is_refused_and_stays(model: TextModel) -> None:
    conversation = talk(model)
    "".join(conversation.say("Hi!"))
    before = list(conversation.messages)
    with pytest.raises(ValueError, match=r"has 2\d\d tokens, and the model's context is 200: say less"):
        conversation.say("x" * 180)
    with pytest.raises(ValueError, match="surrogate"):
        conversation.say("\udc80")
    assert conversation.messages == before
    assert "".join(conversation.say("Hi!")) == "AB"
    assert not conversation.full
    # The context has room for one token of the answer.
    used = len(open_questioner(model).ask("", conversation.messages))
    assert "".join(conversation.say("x" * (CONTEXT - used - 1))) == "A"
    assert conversation.full
    # Whether the context is full is not known until the next answer ends.
    conversation.messages.clear()
    answer = conversation.say("Hi!")
    assert not conversation.full
    next(answer)
    answer.close()
    assert not conversation.full


def test_a_template_that_refuses_is_found_before_anything_is_said(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(chat_tokenizer(tmp_path, GEMMA))
    model = TextModel(tmp_path, Follows({}, 300), tokenizer, 64, frozenset({tokenizer.eod}))
    with pytest.raises(ValueError, match="no system role"):
        talk(model, system="Be brief.")


@pytest.fixture
def chat(model: TextModel, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.setattr(command, "open_text_model", lambda path, **options: model)

    def run(said: str, *flags: str) -> int:
        stdin = io.TextIOWrapper(io.BytesIO(said.encode("utf-8", "surrogateescape")), encoding="ascii")
        monkeypatch.setattr("sys.stdin", stdin)
        return command.main(["run", *flags])

    return run


def test_lines_are_turns(chat: Callable[..., int], model: TextModel, capsys: pytest.CaptureFixture) -> None:
    assert chat("Hi!\n\n  Who?  \n/new\nSo\n/exit\nnever\n") == 0
    assert capsys.readouterr().out == "AB\nHm\nAB\n"
    assert model.tokens.computed[-3][:1] == model.tokenizer.tokenize("S"), "anew, of which the beginning is known"
    assert chat("Hi!", "--system", "Ça va?") == 0
    assert capsys.readouterr().out == "AB\n"


def test_what_cannot_be_asked_does_not_end_the_chat(chat: Callable[..., int], capsys: pytest.CaptureFixture) -> None:
    assert chat("x" * 300 + "\n\udcff\nHi!\n") == 0
    written = capsys.readouterr()
    assert written.out == "AB\n"
    lines = written.err.splitlines()
    assert len(lines) == 2
    assert "the model's context is 200" in lines[0] and "/new" in lines[0]
    assert "lone surrogate" in lines[1]


def test_ctrl_c_stops_an_answer_and_not_the_chat(
    chat: Callable[..., int], model: TextModel, capsys: pytest.CaptureFixture
) -> None:
    before = signal.getsignal(signal.SIGINT)
    a, b = model.tokenizer.tokenize("AB")
    end = model.tokens.follows[b]
    model.tokens.interrupt_behind, model.tokens.follows[b] = a, a
    asked = []
    original = Conversation.say

    def say(self: Conversation, text: str) -> object:
        asked.append([m["content"] for m in self.messages])
        if text == "Go on":
            model.tokens.interrupt_behind, model.tokens.follows[b] = None, end
        return original(self, text)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Conversation, "say", say)
        assert chat("Hi!\nGo on\n") == 0
    written = capsys.readouterr()
    # The model wrote B after A and was stopped there; it would have continued forever.
    assert written.out == "AB\nAB\n"
    assert written.err == "(stopped)\n"
    assert asked == [[], ["Hi!", "AB"]]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_full_context_is_told(chat: Callable[..., int], model: TextModel, capsys: pytest.CaptureFixture) -> None:
    used = len(open_questioner(model).ask(""))
    assert chat("x" * (CONTEXT - used - 1) + "\n") == 0
    written = capsys.readouterr()
    assert written.out == "A\n" and "context is full: /new" in written.err


def test_the_command_refuses(
    chat: Callable[..., int], model: TextModel, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setenv("WORLD_SIZE", "2")
        assert chat("Hi!\n") == 2
        assert "start it without torchrun" in capsys.readouterr().err
    chat_tokenizer(model.path)
    object.__setattr__(model, "tokenizer", open_tokenizer(model.path))
    assert chat("Hi!\n") == 2
    assert "no chat template" in (said := capsys.readouterr().err) and "--chat-template FILE" in said
    (model.path / "own.jinja").write_text(CHATML)
    assert chat("Hi!\n", "--chat-template", str(model.path / "own.jinja")) == 0
    assert capsys.readouterr().out == "AB\n"
    with pytest.raises(SystemExit):
        chat("Hi!\n", "--tokenizer-type", "HuggingFaceTokenizer")
    assert "--tokenizer-type says what --tokenizer-model is" in capsys.readouterr().err


def test_answers_are_drawn_with_the_seed(chat: Callable[..., int], capsys: pytest.CaptureFixture) -> None:
    said = {}
    for seed in ("1", "1 again", "2"):
        flags = ["--temperature", "1", "--num-tokens", "20", "--seed", seed.split()[0]]
        assert chat("Hi!\nWho?\n", *flags) == 0
        said[seed] = capsys.readouterr().out
    assert said["1"] == said["1 again"] != said["2"]

# SPDX-License-Identifier: Apache-2.0
"""Tests of the chat demo: its dialogues, its tokenizer, the commands that it starts, and how it judges answers."""

import random
import re
from pathlib import Path

import pytest

from bitcpm_megatron.data.sft.chat_template import open_chat_template
from bitcpm_megatron.data.tokenizers import open_tokenizer
from bitcpm_megatron.launch import demo_chat, generate, preprocess_sft
from bitcpm_megatron.launch.chat_demo.dialogues import KINDS, Question, dialogues, held_out
from bitcpm_megatron.launch.chat_demo.tokenizer import write_chat_tokenizer
from bitcpm_megatron.training.flags import parse_args

CHECKOUT = Path(__file__).resolve().parents[2]


def names(text: str) -> set[str]:
    return set(re.findall(r"[A-Z][a-z]+", text))


def pair(prompt: str) -> frozenset[str]:
    return frozenset(prompt.removeprefix("Put in order: ").removesuffix(".").split(", "))


def test_names_and_pairs_that_are_asked_for_occur_in_no_dialogue() -> None:
    questions = held_out()
    assert len({question.prompt for question in questions}) == 50
    said = [m["content"] for messages in dialogues(demo_chat.CONVERSATIONS) for m in messages]
    known = names(" ".join(said))
    pairs = {pair(text) for text in said if text.startswith("Put in order")}
    for question in questions:
        unknown = pair(question.prompt) not in pairs if question.kind == "order" else names(question.answer) - known
        assert unknown, question
    assert {"Hello", "First"} <= known and len(pairs) == 170


def test_dialogues_are_the_same_every_time_and_of_every_sort() -> None:
    first = list(dialogues(300))
    random.seed(5)
    assert list(dialogues(300)) == first
    assert {len(messages) // 2 for messages in first} == set(range(1, 7))
    assert 20 < sum(messages[0]["role"] == "system" for messages in first) < 100
    assert all(messages[-1]["role"] == "assistant" for messages in first)


def test_each_answer_has_the_form_of_its_kind_alone() -> None:
    answers = {question.kind: question.answer for question in held_out()}
    assert set(answers) == set(KINDS)
    for kind in KINDS:
        question = Question(kind, "", "")
        assert [other for other, answer in answers.items() if question.is_answer(answer)] == [kind]
        assert not question.is_answer(answers[kind] + " ") and not question.is_answer(answers[kind][:-1])


def test_the_right_answer_of_each_kind() -> None:
    found = {question.kind: question for question in held_out()}
    words = pair(found["order"].prompt)
    assert found["order"].answer == f"First {min(words)}, then {max(words)}."
    name = found["who"].prompt.split()[2].rstrip(".")
    assert found["who"].answer == f"You are {name}."


def test_transformers_reads_the_tokenizer_as_we_do(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    texts = [m["content"] for messages in dialogues(200) for m in messages]
    write_chat_tokenizer(tmp_path / "tokenizer", texts, 400)
    ours = open_tokenizer(tmp_path / "tokenizer")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert ours.vocab_size == len(theirs) == 400
    assert (ours.eod, ours.pad) == (theirs.eos_token_id, theirs.pad_token_id)
    template = open_chat_template(ours)
    for messages in dialogues(20):
        text = template.render(messages, add_generation_prompt=True)
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert ours.tokenize(text) == ids
        assert theirs.decode(ids, skip_special_tokens=True) == ours.detokenize(ids)


def test_the_steps_are_commands_that_take_their_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitcpm_megatron.checkpoint_tools import convert_megatron_to_hf

    started: dict[str, list[str]] = {}

    def note(title: str, command: list[str], log: Path) -> str:
        place = next(i for i, word in enumerate(command) if word.endswith(".py") and word != "launch/agent.py")
        started[command[place]] = command[place + 1 :]
        return ""

    monkeypatch.setattr(demo_chat, "run", note)
    monkeypatch.setattr(demo_chat, "CONVERSATIONS", 100)
    demo_chat.prepare(tmp_path)
    demo_chat.train(tmp_path, 100)
    (tmp_path / "answers.jsonl").write_text("")
    demo_chat.ask(tmp_path)
    demo_chat.export(tmp_path)
    modules = {
        "launch/preprocess_sft.py": (preprocess_sft.cli, preprocess_sft),
        "launch/generate.py": (generate.cli, generate),
        "checkpoint_tools/convert_megatron_to_hf.py": (convert_megatron_to_hf, convert_megatron_to_hf),
    }
    assert set(started) == {*modules, "launch/pretrain.py"}
    assert all((CHECKOUT / script).is_file() for script in started)
    parsed = parse_args(started.pop("launch/pretrain.py"), 2)
    assert parsed.sft and parsed.ternary and parsed.data_parallel_size == 2
    for script, argv in started.items():
        where, module = modules[script]
        with monkeypatch.context() as patched:
            patched.setattr(where, "run", lambda work: 0)
            assert module.main(argv) == 0


def test_answers_are_judged() -> None:
    right = [{"prompt": q.prompt, "text": q.answer, "ended": True} for q in held_out()]
    every = {"answered": True, "exact": True, "same": True}
    assert all({name: line[name] for name in every} == every for line in demo_chat.judge(right, right))
    others = [dict(answer) for answer in right]
    others[0]["text"] = "Hello, Other!"
    others[1]["ended"] = False
    lines = demo_chat.judge(others, right)
    assert [lines[0][name] for name in every] == [True, False, False]
    assert [lines[1][name] for name in every] == [False, False, False]
    assert [lines[2][name] for name in every] == [True, True, True]

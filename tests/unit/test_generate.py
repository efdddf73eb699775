# SPDX-License-Identifier: Apache-2.0
"""Generation: where it stops, and questions by a chat template. The model is a table of what follows what."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.chat import STYLES, chat_tokenizer

from bitcpm_megatron.data.sft.chat_template import ChatTemplate, open_chat_template
from bitcpm_megatron.data.sft.questions import Questioner
from bitcpm_megatron.data.tokenizers import open_tokenizer
from bitcpm_megatron.inference.generate import generate
from bitcpm_megatron.launch import generate as command

ENDS = {"chatml": "<|im_end|>", "llama-3": "<|eot|>", "mistral": "</s>", "gemma": "<end>"}
BLOCKS = """{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<end>\\n' }}
{%- endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"""


def model(follows: dict[int, int], vocab_size: int) -> SimpleNamespace:
    """Writes behind each token the one that follows it."""

    def forward(inputs: torch.Tensor, positions: torch.Tensor, mask: None) -> torch.Tensor:
        following = torch.tensor([follows.get(token, 0) for token in inputs[0].tolist()])
        return torch.nn.functional.one_hot(following, vocab_size).float().unsqueeze(0)

    return SimpleNamespace(chunks=[forward])


def test_it_stops_behind_the_first_end(single_rank: None) -> None:
    counts = model({i: i + 1 for i in range(20)}, 30)
    assert generate(counts, [1], 5, 8, 30) == [2, 3, 4, 5, 6]
    assert generate(counts, [1], 5, 8, 30, ends={9, 4}) == [2, 3, 4]
    assert generate(counts, [1, 4], 3, 8, 30, ends={4}) == [5, 6, 7], "an end in the prompt is none"
    assert generate(counts, [1], 3, 8, 30, ends={9}) == [2, 3, 4]


@pytest.fixture
def tokenizer(tmp_path: Path):
    return open_tokenizer(chat_tokenizer(tmp_path / "tokenizer"))


@pytest.mark.parametrize("style", STYLES)
def test_questions_are_what_transformers_writes(style: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    directory = chat_tokenizer(tmp_path / "tokenizer", STYLES[style][0])
    opened = open_tokenizer(directory)
    questioner = Questioner(opened, open_chat_template(opened))
    file, special = str(directory / "tokenizer.json"), {"bos_token": "<s>", "eos_token": "</s>"}
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=file, chat_template=STYLES[style][0], **special)
    said = [{"role": "user", "content": "Who, me?"}]
    expected = theirs.apply_chat_template(said, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert questioner.ask("Who, me?") == expected
    assert questioner.ends == {opened.eod, theirs.convert_tokens_to_ids(ENDS[style])}


def test_white_space_behind_the_end_of_a_generation_block(tokenizer) -> None:
    ends = Questioner(tokenizer, ChatTemplate(BLOCKS, "blocks", tokenizer.special_tokens)).ends
    assert ends == {tokenizer.eod, *tokenizer.tokenize("<end>")}


@pytest.fixture
def asked(single_rank: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Runs the command with the chatml tokenizer, and a model that writes ``AB`` behind a line, ends, and goes on."""
    directory = chat_tokenizer(tmp_path / "tokenizer", STYLES["chatml"][0])
    opened = open_tokenizer(directory)
    line, a, b, end = opened.tokenize("\nAB<|im_end|>")
    follows = {line: a, a: b, b: end, end: opened.eod}
    run = argparse.Namespace(
        tokenizer_model=str(directory),
        tokenizer_type=None,
        vocab_size=opened.vocab_size,
        mock_data=False,
        seq_length=64,
        make_vocab_size_divisible_by=1,
        tensor_model_parallel_size=1,
    )

    def load(path: Path, fp32: bool) -> tuple[argparse.Namespace, SimpleNamespace]:
        main.fp32 = fp32
        return run, model(follows, opened.vocab_size)

    monkeypatch.setattr(command, "latest", lambda directory: tmp_path)
    monkeypatch.setattr(command, "load_for_inference", load)
    monkeypatch.setattr(command, "shutdown", lambda: None)
    output = tmp_path / "made" / "answers.jsonl"

    def main(*flags: str) -> list[dict]:
        argv = ["--load", "run", "--prompt", "Hi!", "So\n", *flags, "--output", str(output)]
        assert command.main(argv) == 0
        return [json.loads(line) for line in output.read_text().splitlines()]

    main.directory, main.run = directory, run
    return main


def test_a_chat_prints_answers_alone_and_says_whether_they_ended(asked, capsys: pytest.CaptureFixture) -> None:
    answers = asked("--chat")
    assert capsys.readouterr().out == "AB\nAB\n"
    assert answers == [{"prompt": prompt, "text": "AB", "ended": True} for prompt in ("Hi!", "So\n")]
    assert not asked.fp32
    assert asked("--chat", "--num-tokens", "2", "--fp32")[0] == {"prompt": "Hi!", "text": "AB", "ended": False}
    assert asked.fp32


def test_plain_text_goes_on_unless_it_is_to_stop(asked) -> None:
    assert asked("--num-tokens", "6")[1]["ended"] is False
    stopped = asked("--num-tokens", "6", "--stop-at-end")[1]
    assert stopped == {"prompt": "So\n", "text": "So\nAB", "ended": True}


def test_a_chat_without_a_template_is_refused_with_the_cure(
    asked, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    chat_tokenizer(asked.directory)
    argv = ["--load", "run", "--prompt", "Hi!", "--chat"]
    assert command.main(argv) == 2
    assert "no chat template" in (said := capsys.readouterr().err) and "--chat-template FILE" in said
    (tmp_path / "chat.jinja").write_text(STYLES["chatml"][0])
    assert command.main([*argv, "--chat-template", str(tmp_path / "chat.jinja")]) == 0
    assert capsys.readouterr().out == "AB\n"
    with pytest.raises(SystemExit):
        command.main([*argv[:-1], "--chat-template", str(tmp_path / "chat.jinja")])
    assert "--chat-template needs --chat" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main([*argv, "--tokenizer-type", "HuggingFaceTokenizer"])
    assert "--tokenizer-type says what --tokenizer-model is" in capsys.readouterr().err


def test_a_tokenizer_with_other_tokens_is_refused_however_alike(asked, tmp_path: Path, capsys) -> None:
    """Of the same size and ends: its content alone tells."""
    asked.run.tokenizer_identity = dict(open_tokenizer(asked.directory).unique_identifiers)
    argv = ["--load", "run", "--prompt", "Hi!", "--tokenizer-model"]
    assert command.main([*argv, str(chat_tokenizer(tmp_path / "own"))]) == 0, "a copy elsewhere is the same"
    other = chat_tokenizer(tmp_path / "other")
    described = json.loads((other / "tokenizer.json").read_text())
    words = described["model"]["vocab"]
    words["A"], words["B"] = words["B"], words["A"]
    (other / "tokenizer.json").write_text(json.dumps(described))
    capsys.readouterr()
    assert command.main([*argv, str(other)]) == 2
    written = capsys.readouterr()
    assert f"{tmp_path} was trained with another tokenizer than {other}: give its own" in written.err
    assert not written.out


def test_a_tokenizer_that_can_have_no_template_is_refused(asked, monkeypatch, capsys) -> None:
    from bitcpm_megatron.data.tokenizers import NullTokenizer

    monkeypatch.setattr(command, "_tokenizer", lambda *given: NullTokenizer(9))
    assert command.main(["--load", "run", "--prompt", "1", "--chat"]) == 2
    assert "give a directory with a tokenizer.json" in capsys.readouterr().err

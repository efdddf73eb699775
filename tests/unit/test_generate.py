# SPDX-License-Identifier: Apache-2.0
"""Tests of generation: where it stops, and prompts with a chat template. The model is a table of next tokens."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from support.chat import STYLES, chat_tokenizer
from support.next_tokens import Follows

from bitcpm_megatron.data.sft.chat_template import ChatTemplate, open_chat_template
from bitcpm_megatron.data.sft.questions import Questioner
from bitcpm_megatron.data.tokenizers import open_tokenizer
from bitcpm_megatron.inference.generate import NextToken, generate
from bitcpm_megatron.inference.megatron_run import tokenizer_of
from bitcpm_megatron.inference.text_model import TextModel
from bitcpm_megatron.launch import generate as command

ENDS = {"chatml": "<|im_end|>", "llama-3": "<|eot|>", "mistral": "</s>", "gemma": "<end>"}
BLOCKS = """{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<end>\\n' }}
{%- endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"""


def said(model: NextToken, prompt: list[int], count: int, **options) -> list[int]:
    return list(generate(model, prompt, count, 8, 30, **options))


def test_it_stops_behind_the_first_end() -> None:
    counts = Follows({i: i + 1 for i in range(20)}, 30)
    assert said(counts, [1], 5) == [2, 3, 4, 5, 6]
    assert said(counts, [1], 5, ends={9, 4}) == [2, 3, 4]
    assert said(counts, [1, 4], 3, ends={4}) == [5, 6, 7], "an end in the prompt is none"
    assert said(counts, [1], 3, ends={9}) == [2, 3, 4]


def test_what_was_seen_is_not_computed_again() -> None:
    counts = Follows({i: i + 1 for i in range(20)}, 30)
    said(counts, [1, 2, 3], 3)
    assert counts.computed == [[1, 2, 3], [4], [5]]
    # The texts are a longer one, one that differs from the middle on, the same again, and a prefix of it.
    for tokens in ([1, 2, 3, 4, 5, 6, 7], [1, 2, 9], [1, 2, 9], [1]):
        counts.logits(tokens)
    assert counts.computed[3:] == [[6, 7], [9], [9], [1]]
    # Beyond the context, the oldest tokens are dropped, and all others change their positions.
    assert said(counts, list(range(1, 9)), 2) == [9, 10]
    assert counts.computed[-2:] == [[2, 3, 4, 5, 6, 7, 8], [2, 3, 4, 5, 6, 7, 8, 9]]


def test_a_forward_that_was_interrupted_leaves_nothing() -> None:
    counts = Follows({}, 30)
    counts.logits([1, 2, 3])
    counts.interrupted = True
    with pytest.raises(KeyboardInterrupt):
        counts.logits([1, 2, 3, 4])
    counts.interrupted = False
    counts.logits([1, 2, 3, 4])
    assert counts.computed[-1] == [1, 2, 3, 4]


def test_beyond_longropes_original_length_it_is_another_model() -> None:
    counts = Follows({}, 30, original=3)
    for tokens in ([1, 2], [1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4, 5], [1, 2, 3]):
        counts.logits(tokens)
    assert counts.computed == [[1, 2], [3], [1, 2, 3, 4], [5], [1, 2, 3]]


def test_draws_are_those_of_the_seed_and_never_of_the_padding() -> None:
    even = Follows({}, 40, spread=True)
    drawn = said(even, [1], 400, temperature=1.0, generator=torch.Generator().manual_seed(1))
    assert drawn == said(even, [1], 400, temperature=1.0, generator=torch.Generator().manual_seed(1))
    assert drawn != said(even, [1], 400, temperature=1.0, generator=torch.Generator().manual_seed(2))
    # 10 of the 40 rows of logits are padding, which has the largest logits.
    assert max(drawn) < 30 and len(set(drawn)) == 30


def test_what_is_no_prompt_or_no_number_is_refused() -> None:
    counts = Follows({1: 2}, 30)
    for prompt in ([], [30], [-1]):
        with pytest.raises(ValueError, match="give one or more, from 0 to 29"):
            said(counts, prompt, 1)
    counts.scale = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        said(counts, [1], 1)


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
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Runs the command with a ChatML tokenizer and a model that writes ``AB``, an end of turn, and the end token."""
    directory = chat_tokenizer(tmp_path / "tokenizer", STYLES["chatml"][0])
    opened = open_tokenizer(directory)
    line, a, b, end = opened.tokenize("\nAB<|im_end|>")
    follows = Follows({line: a, a: b, b: end, end: opened.eod}, opened.vocab_size)
    run = argparse.Namespace(
        tokenizer_model=str(directory),
        tokenizer_type=None,
        vocab_size=opened.vocab_size,
        mock_data=False,
        seq_length=64,
        make_vocab_size_divisible_by=1,
        tensor_model_parallel_size=1,
    )

    def opens(path: Path, *, fp32: bool, tokenizer: str | None, tokenizer_type: str | None) -> TextModel:
        main.fp32 = fp32
        own = tokenizer_of(run, tmp_path, tokenizer, tokenizer_type)
        return TextModel(tmp_path, follows, own, 64, frozenset({own.eod}))

    monkeypatch.setattr(command, "open_text_model", opens)
    output = tmp_path / "made" / "answers.jsonl"

    def main(*flags: str) -> list[dict]:
        argv = ["run", "--prompt", "Hi!", "So\n", *flags, "--output", str(output)]
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


def test_a_prompt_beyond_the_context_is_refused(asked, capsys: pytest.CaptureFixture) -> None:
    assert command.main(["run", "--prompt", "word " * 64]) == 2
    assert "tokens, and the model's context is 64: give a shorter one" in capsys.readouterr().err


def test_plain_text_goes_on_unless_it_is_to_stop(asked) -> None:
    assert asked("--num-tokens", "6")[1]["ended"] is False
    stopped = asked("--num-tokens", "6", "--stop-at-end")[1]
    assert stopped == {"prompt": "So\n", "text": "So\nAB", "ended": True}


def test_a_chat_without_a_template_is_refused_with_the_cure(
    asked, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    chat_tokenizer(asked.directory)
    argv = ["run", "--prompt", "Hi!", "--chat"]
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
    """The other tokenizer has the same size and the same end tokens, so that only its contents differ."""
    asked.run.tokenizer_identity = dict(open_tokenizer(asked.directory).unique_identifiers)
    argv = ["run", "--prompt", "Hi!", "--tokenizer-model"]
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

    monkeypatch.setitem(globals(), "tokenizer_of", lambda *given: NullTokenizer(9))
    assert command.main(["run", "--prompt", "1", "--chat"]) == 2
    assert "give a directory with a tokenizer.json" in capsys.readouterr().err

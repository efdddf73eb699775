# SPDX-License-Identifier: Apache-2.0
"""Tests of the command preprocess_sft: its three files, what is left out, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.chat import STYLES, chat_tokenizer, chatml

from bitcpm_megatron.data.sft_files import read_sft_files, sft_prefixes
from bitcpm_megatron.data.token_files import open_builder
from bitcpm_megatron.data.token_headers import TokenFileError
from bitcpm_megatron.data.tokenizers import open_tokenizer, train_sentencepiece
from bitcpm_megatron.launch.preprocess_sft import main

pytest.importorskip("megatron.core")
from megatron.core.datasets.indexed_dataset import IndexedDataset

CHECKOUT = Path(__file__).resolve().parents[2]
NAMES = [f"out_{part}{suffix}" for part in ("answers", "ends", "tokens") for suffix in (".bin", ".idx")]


def talk(number: int, words: int) -> list[dict]:
    """Returns a conversation of two turns."""
    return [
        {"role": "user", "content": f"Question {number}"},
        {"role": "assistant", "content": f"Answer {number}"},
        {"role": "user", "content": "More </s>"},
        {"role": "assistant", "content": "word " * words},
    ]


TALKS = [talk(number, number * 7 % 11) for number in range(1, 40) if number % 11]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_tokenizer(tmp_path_factory.mktemp("chat") / "hf", STYLES["chatml"][0])


@pytest.fixture
def command(tmp_path: Path, model: Path) -> list[str]:
    source = tmp_path / "talks.jsonl"
    source.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in TALKS))
    line = f"--input {source} --tokenizer-model {model} --seq-length 512 --output-prefix {tmp_path}/out"
    return line.split()


def written(prefix: Path) -> list[tuple[list[int], list[int], list[int]]]:
    """Reads the tokens, answers and ends of each sample."""
    files = [IndexedDataset(path) for path in sft_prefixes(prefix).values()]
    assert [file.index.dtype for file in files] == [np.uint16, np.uint8, np.int32]
    assert all(file.document_indices.tolist() == list(range(len(file) + 1)) for file in files)
    return [tuple(part.tolist() for part in parts) for parts in zip(*files, strict=True)]


def conversations(tokens: list[int], answers: list[int], ends: list[int]) -> list[tuple[list[int], list[int]]]:
    """Returns the tokens and answers of each conversation of a sample."""
    assert ends[-1] == len(tokens) == len(answers) and ends == sorted(set(ends))
    return [(tokens[start:end], answers[start:end]) for start, end in zip([0, *ends], ends, strict=False)]


def expected(model: Path, messages: list[dict]) -> tuple[list[int], list[int]]:
    """Returns expected tokens and answers; the tokenizer has no merges, so that pieces can be tokenized separately."""
    pieces = [(open_tokenizer(model).tokenize(piece), answer) for piece, answer in chatml(messages)]
    tokens = [token for ids, _ in pieces for token in ids]
    return tokens, [int(answer) for ids, answer in pieces for _ in ids]


def test_every_conversation_is_there_with_its_answers(tmp_path: Path, model: Path, command, capsys) -> None:
    assert main(command) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*NAMES, "talks.jsonl"])
    samples, wanted = written(tmp_path / "out"), [expected(model, talk) for talk in TALKS]
    assert sorted(one for sample in samples for one in conversations(*sample)) == sorted(wanted)
    assert any(len(ends) > 1 for _, _, ends in samples) and all(len(tokens) <= 512 for tokens, _, _ in samples)
    # Conversations keep their order within a sample, and samples are in the order of their first conversations.
    numbers = [[wanted.index(one) for one in conversations(*sample)] for sample in samples]
    assert numbers == sorted(sorted(of_sample) for of_sample in numbers)
    tokens, answers = (sum(len(ids) for ids, _ in wanted), sum(sum(mask) for _, mask in wanted))
    assert capsys.readouterr().out == (
        f"{tmp_path}/out: {len(TALKS)} conversations in {len(samples)} samples, {tokens:,} tokens, {answers:,} of them "
        f"answers, packing efficiency {tokens / (512 * len(samples)):.1%}; 0 conversations truncated to 512 tokens, "
        "0 dropped without an answer in them\n"
    )


def test_neither_threads_nor_batches_nor_a_repetition_change_a_byte(tmp_path: Path, command, monkeypatch) -> None:
    assert main(command) == 0
    before = {name: (tmp_path / name).read_bytes() for name in NAMES}
    monkeypatch.setattr("bitcpm_megatron.data.sft.samples._BATCH", 7)
    assert main([*command, "--workers", "2", "--overwrite"]) == 0
    assert before == {name: (tmp_path / name).read_bytes() for name in NAMES}


def test_ends_of_turns_are_learned_where_padding_is_the_same_token(tmp_path: Path, model: Path, command) -> None:
    (tmp_path / "mistral.jinja").write_text(STYLES["mistral"][0])
    assert main([*command, "--chat-template", str(tmp_path / "mistral.jinja")]) == 0
    tokenizer = open_tokenizer(model)
    assert tokenizer.pad == tokenizer.eod
    ones = [one for sample in written(tmp_path / "out") for one in conversations(*sample)]
    # Of the three end tokens in each conversation, one is a word of the user.
    marks = [[mark for token, mark in zip(*one, strict=True) if token == tokenizer.eod] for one in ones]
    assert marks == [[1, 0, 1]] * len(TALKS)
    assert all(ids[-1] == tokenizer.eod for ids, _ in ones), "no padding"


def test_long_conversations_are_cut_or_dropped_and_counted(tmp_path: Path, model: Path, command, capsys) -> None:
    talks = [talk(1, 2), talk(2, 200), [{"role": "user", "content": "word " * 99}, *talk(3, 1)]]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    assert main([*command, "--seq-length", "120"]) == 0
    wanted = [expected(model, talk) for talk in talks[:2]]
    assert [len(ids) > 120 for ids, _ in wanted] == [False, True]
    found = [one for sample in written(tmp_path / "out") for one in conversations(*sample)]
    assert found == [(ids[:120], mask[:120]) for ids, mask in wanted]
    assert "2 conversations in 2 samples, " in (out := capsys.readouterr().out)
    assert "; 1 conversations truncated to 120 tokens, 1 dropped without an answer in them" in out
    assert main([*command, "--seq-length", "20", "--overwrite"]) == 2
    assert "no conversations to write, 3 were dropped without an answer in their first 20" in capsys.readouterr().err
    assert len(written(tmp_path / "out")) == 2, "what was there stays"


def test_the_first_token_is_no_target(tmp_path: Path, model: Path, command) -> None:
    (tmp_path / "bare.jinja").write_text("{% for m in messages %}{{ m.content }}<end>{% endfor %}")
    (tmp_path / "talks.jsonl").write_text(json.dumps({"messages": [{"role": "assistant", "content": "Hi"}]}))
    assert main([*command, "--chat-template", str(tmp_path / "bare.jinja")]) == 0
    assert written(tmp_path / "out") == [(open_tokenizer(model).tokenize("Hi<end>"), [0, 1, 1], [3])]


def test_a_split_has_every_conversation_on_one_side(tmp_path: Path, command) -> None:
    counts = {}
    for split in ("train", "valid"):
        side = ["--split", split, "--valid-fraction", "0.4", "--output-prefix", f"{tmp_path}/{split}"]
        assert main([*command, *side]) == 0
        counts[split] = [one for sample in written(tmp_path / split) for one in conversations(*sample)]
    assert main(command) == 0
    assert min(map(len, counts.values())) > 5
    assert sorted([*counts["train"], *counts["valid"]]) == sorted(
        one for sample in written(tmp_path / "out") for one in conversations(*sample)
    )


# ----------------------------------------------------------------------------------------------- refusals


def test_bad_input_is_one_message_with_its_place_and_no_file(tmp_path: Path, model: Path, command, capsys) -> None:
    def says(*more: str) -> str:
        assert main([*command, *more]) == 2
        assert not list(tmp_path.glob("*out*"))
        [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        return line

    source = tmp_path / "talks.jsonl"
    doubt = tmp_path / "doubt.jinja"
    doubt.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert "talks.jsonl:1: the chat template writes no end-of-turn token" in says("--chat-template", str(doubt))
    assert "nowhere: there is no such file" in says("--chat-template", "nowhere")
    assert "nowhere: no such file; check --input" in says("--input", "nowhere")
    bare = chat_tokenizer(tmp_path / "bare")
    assert f"{bare}: no chat template" in says("--tokenizer-model", str(bare))
    (tmp_path / "t.model").write_bytes(train_sentencepiece(["one two three four " * 9], 270))
    message = says("--tokenizer-model", f"{tmp_path}/t.model", "--chat-template", str(doubt))
    assert "t.model: SentencePiece models have no chat template" in message and "tokenizer.json" in message
    with source.open("a") as stream:
        stream.write('{"messages": []}\n')
    assert f"talks.jsonl:{len(TALKS) + 1}: 'messages' must be a list of at least one message" in says()
    source.write_text("")
    assert "no conversations to write, 0 were dropped" in says()


def test_what_would_have_no_effect_is_refused(command, capsys) -> None:
    for more, said in (
        (["--valid-fraction", "0.1"], "--valid-fraction needs --split"),
        (["--seq-length", "1"], "'1': must be 2 to"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main([*command, *more])
        assert said in capsys.readouterr().err


def test_what_is_there_is_replaced_on_demand_alone(tmp_path: Path, command, capsys) -> None:
    (tmp_path / "out_ends.idx").write_text("mine")
    assert main(command) == 2
    assert "out_ends.idx exists; choose another --output-prefix, or pass --overwrite" in capsys.readouterr().err
    assert (tmp_path / "out_ends.idx").read_text() == "mine"
    assert main([*command, "--overwrite"]) == 0
    read_sft_files(tmp_path / "out")


@pytest.mark.slow
def test_the_script_runs_from_a_checkout(tmp_path: Path, command) -> None:
    script = [sys.executable, str(CHECKOUT / "launch" / "preprocess_sft.py"), *command]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{len(TALKS)} conversations" in done.stdout


# ----------------------------------------------------------------------------------------------- reading


def test_the_reader_returns_what_each_file_says(tmp_path: Path, command) -> None:
    assert main(command) == 0
    found, samples = read_sft_files(tmp_path / "out"), written(tmp_path / "out")
    assert list(found) == list(sft_prefixes(tmp_path / "out")) == ["tokens", "answers", "ends"]
    assert {file.sequences for file in found.values()} == {len(samples)}
    assert found["tokens"].lengths().tolist() == [len(tokens) for tokens, _, _ in samples]
    assert found["ends"].tokens == len(TALKS)


@pytest.fixture
def two_samples(tmp_path: Path, command) -> tuple[Path, list[int]]:
    """Makes files with two samples of one conversation each; returns their prefix and the lengths of the samples."""
    talks = [talk(1, 2), talk(2, 3)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    assert main([*command, "--seq-length", "150"]) == 0
    return tmp_path / "out", read_sft_files(tmp_path / "out")["tokens"].lengths().tolist()


def rewrite(path: str, sequences: list[list[int]], dtype: type) -> None:
    builder = open_builder(Path(f"{path}.bin"), dtype=dtype)
    for sequence in sequences:
        builder.add_document(sequence, [len(sequence)])
    builder.finalize(f"{path}.idx")


@pytest.mark.parametrize(
    ("ends", "wrong"),
    [
        ([[3, 5, "a"], [1, "b"]], None),
        ([["a"], ["b", 1]], 1),
        ([["a", 4], ["b"]], 0),
        ([["a"], [9]], 1),
        ([[0, "a"], ["b"]], 0),
        ([["a"], [5, 3, "b"]], 1),
        ([["a"], [7, 7, "b"]], 1),
        ([["a"], []], 1),
        ([[-1, "a"], ["b"]], 0),
    ],
)
def test_ends_ascend_to_the_length_of_their_sample(two_samples, ends: list[list], wrong: int | None) -> None:
    prefix, (a, b) = two_samples
    named = {"a": a, "b": b}
    rewrite(f"{prefix}_ends", [[named.get(end, end) for end in of_sample] for of_sample in ends], np.int32)
    if wrong is None:
        read_sft_files(prefix)
    else:
        with pytest.raises(TokenFileError, match=f"the conversations of sample {wrong} do not end where it does"):
            read_sft_files(prefix)


def test_files_that_do_not_belong_together_are_refused(two_samples) -> None:
    prefix, (a, b) = two_samples
    for part, sequences, dtype, said in (
        ("answers", [[1] * a, [0] * (b - 1) + [2]], np.uint8, "_answers.bin holds 2, neither 0 nor 1: write all three"),
        ("answers", [[1] * a, [1] * (b + 1)], np.uint8, "_answers: sample 1 has another length than its tokens"),
        ("answers", [[1] * a], np.uint8, "_answers has 1 samples, .*out_tokens 2"),
        ("answers", [[1] * a, [1] * b], np.int8, "_answers.bin holds int8 in the place of uint8"),
        ("answers", [[1] * a, [0] * b], np.uint8, None),
        ("ends", [[a], [b], [3]], np.int32, "_ends has 3 samples, .*out_tokens 2"),
        ("ends", [[a], [b]], np.int64, "_ends.bin holds int64 in the place of int32"),
        ("ends", [[a], [b]], np.int32, None),
    ):
        rewrite(f"{prefix}_{part}", sequences, dtype)
        if said is None:
            read_sft_files(prefix)
        else:
            with pytest.raises(TokenFileError, match=said):
                read_sft_files(prefix)
    Path(f"{prefix}_ends.idx").unlink()
    with pytest.raises(TokenFileError, match="_ends.idx is not there"):
        read_sft_files(prefix)

# SPDX-License-Identifier: Apache-2.0
"""Tests of the samples of --sft: which tokens are learned, their order, and what is refused."""

import pickle
from itertools import islice
from pathlib import Path

import pytest
from support.token_data import EOD, write_conversations, write_samples, write_tokenizer

from bitcpm_megatron.attention.documents import CUMULATIVE
from bitcpm_megatron.training.data import DataError, batches, build_data, build_tokenizer, find_files
from bitcpm_megatron.training.flags import parse_args
from bitcpm_megatron.training.loop import pretrain

LENGTHS = [[5, 3], [8], [2, 2, 2], [7]]


def arguments(directory: Path, *more: str):
    argv = f"""--num-layers 1 --hidden-size 32 --num-attention-heads 2 --seq-length 10 --max-position-embeddings 10
    --micro-batch-size 1 --train-iters 6 --lr 1e-3 --eval-iters 0 --bf16 --attention-dropout 0 --sft --split 1,0,0
    --tokenizer-model {directory}/tokenizer""".split()
    return parse_args([*argv, *(more or ["--data-path", f"{directory}/chat"])], 1)


@pytest.fixture
def place(tmp_path: Path, single_rank: None) -> Path:
    write_tokenizer(tmp_path / "tokenizer")
    write_conversations(tmp_path / "chat", LENGTHS)
    return tmp_path


def stream(args, consumed: int = 0):
    tokenizer, _ = build_tokenizer(args)
    built = build_data(args, tokenizer, find_files(args, tokenizer.eod))
    return batches(args, built.train, consumed)


def test_answers_and_their_ends_are_asked_for_and_nothing_else(place: Path) -> None:
    """Padding is the token that ends answers, as in many models, so that its position must identify it."""
    sample = {"tokens": [1, 2, 3, EOD, 4, 5, 6, EOD], "answers": [0, 0, 1, 1, 1, 0, 1, 1], "ends": [4, 8]}
    write_samples(place / "one", [sample])
    (batch,) = islice(stream(arguments(place, "--data-path", f"{place}/one")), 1)
    assert batch["tokens"].tolist() == [[1, 2, 3, EOD, 4, 5, 6, EOD, EOD, EOD]]
    asked = {
        position: (int(batch["tokens"][0, position]), int(batch["labels"][0, position]))
        for position in batch["loss_mask"][0].nonzero().flatten().tolist()
    }
    # Token 4 begins a conversation, so that the token before it belongs to another one.
    assert asked == {1: (2, 3), 2: (3, EOD), 5: (5, 6), 6: (6, EOD)}
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 0, 1]]
    assert batch[CUMULATIVE].tolist() == [0, 4, 8, 10]


def test_a_full_sample_has_no_padding(place: Path) -> None:
    write_samples(place / "full", [dict(tokens=list(range(10)), answers=[0] * 9 + [1], ends=[10])])
    (batch,) = islice(stream(arguments(place, "--data-path", f"{place}/full")), 1)
    assert batch[CUMULATIVE].tolist() == [0, 10]
    assert batch["loss_mask"].tolist() == [[0.0] * 8 + [1.0, 0.0]]


def test_every_epoch_has_an_order_of_its_own_that_does_not_depend_on_how_long_training_is(place: Path) -> None:
    def told(count: int, consumed: int = 0, *more: str) -> list[tuple]:
        args = arguments(place, "--data-path", f"{place}/chat", *more)
        return [tuple(batch["tokens"][0].tolist()) for batch in islice(stream(args, consumed), count)]

    long = told(24, 0, "--train-iters", "24")
    epochs = [long[i : i + 4] for i in range(0, 24, 4)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 4 for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1
    assert told(6) == long[:6]
    assert told(5, 3) == long[3:8]
    assert told(6, 0, "--seed", "1") != long[:6]


def test_several_prefixes_are_blended_and_split(place: Path) -> None:
    write_conversations(place / "more", [[6], [9], [4, 4]], seed=9)
    blend = ["--data-path", "3", f"{place}/chat", "1", f"{place}/more", "--train-iters", "20"]
    seen = {tuple(batch["tokens"][0].tolist()) for batch in islice(stream(arguments(place, *blend)), 20)}
    assert len(seen) == 7
    args = arguments(place, "--data-path", f"{place}/chat", "--split", "3,1,0", "--eval-iters", "1")
    tokenizer, _ = build_tokenizer(args)
    built = build_data(args, tokenizer, find_files(args, tokenizer.eod))
    train, valid = (
        {tuple(data[i]["tokens"].tolist()) for i in range(len(data))} for data in (built.train, built.valid)
    )
    assert len(train) == 3 and len(valid) == 1 and not train & valid


def test_what_cannot_be_trained_on_is_refused(place: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(ValueError, match="chat has samples of up to 8 tokens: give --seq-length 8, or pack them again"):
        find_files(arguments(place, "--data-path", f"{place}/chat", "--seq-length", "7"), EOD)
    with pytest.raises(ValueError, match="absent_tokens.idx is not there"):
        find_files(arguments(place, "--data-path", f"{place}/absent"), EOD)
    with pytest.raises(SystemExit):
        arguments(place, "--data-path", f"{place}/chat", "--reset-attention-mask")
    assert "--reset-attention-mask is for plain text" in capsys.readouterr().err


def test_a_step_or_an_evaluation_without_anything_to_learn_is_refused(place: Path) -> None:
    write_conversations(place / "mute", LENGTHS, answers=(0.0,))
    with pytest.raises(DataError, match="step 1 has no token to learn"):
        pretrain(arguments(place, "--data-path", f"{place}/mute"))
    valid = ["--valid-data-path", f"{place}/mute", "--eval-iters", "1", "--eval-interval", "1"]
    with pytest.raises(DataError, match="the validation samples have no token to learn: change --split"):
        pretrain(arguments(place, "--train-data-path", f"{place}/chat", *valid))


def test_a_dataset_goes_to_other_processes(place: Path) -> None:
    """The dataset is pickled if workers of a loader are started as new processes."""
    args = arguments(place)
    tokenizer, _ = build_tokenizer(args)
    train = build_data(args, tokenizer, find_files(args, tokenizer.eod)).train
    expected = [train[i]["tokens"].tolist() for i in range(6)]
    assert [pickle.loads(pickle.dumps(train))[i]["tokens"].tolist() for i in range(6)] == expected


def test_a_split_that_leaves_a_file_without_samples_is_refused(place: Path) -> None:
    write_conversations(place / "single", [[6]], seed=9)
    for weights in ((), ("3", "1")):
        paths = [f"{place}/chat", f"{place}/single"]
        blend = [word for pair in zip(weights, paths, strict=True) for word in pair] if weights else paths
        args = arguments(place, "--data-path", *blend, "--split", "3,1,0", "--eval-iters", "2")
        with pytest.raises(ValueError, match="leaves no validation data of the 1 documents in .*single_tokens"):
            find_files(args, EOD)


@pytest.mark.parametrize("flag", ["--sft", "--context-parallel-size 2"])
def test_attention_dropout_is_refused_where_ranks_would_draw_unlike_numbers(flag: str, place: Path, capsys) -> None:
    argv = f"""--num-layers 1 --hidden-size 32 --num-attention-heads 2 --seq-length 12 --max-position-embeddings 12
    --micro-batch-size 1 --train-iters 6 --lr 1e-3 --data-path x --tokenizer-model y {flag}""".split()
    with pytest.raises(SystemExit):
        parse_args(argv, 2)
    assert f"{flag.split()[0]} needs --attention-dropout 0" in capsys.readouterr().err

# SPDX-License-Identifier: Apache-2.0
"""Tests of micro-batches of packed pretraining and of --sft, as a model gets them: boundaries, positions, readers."""

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from support.token_data import EOD, write_conversations, write_documents, write_tokenizer

from bitcpm_megatron.attention.documents import CUMULATIVE
from bitcpm_megatron.training.data import batches, build_data, build_tokenizer, find_files
from bitcpm_megatron.training.flags import parse_args

ROWS, LENGTH = 2, 12
KINDS = {
    "documents": ["--reset-position-ids", "--reset-attention-mask", "--eod-mask-loss"],
    "chat": ["--sft"],
}


@pytest.fixture
def place(tmp_path: Path, single_rank: None) -> Path:
    write_tokenizer(tmp_path / "tokenizer")
    write_documents(tmp_path / "documents", [9, 1, 30, 3, 1, 1, 7] * 4)
    write_conversations(tmp_path / "chat", [[5, 3], [8], [2, 2, 2], [12]] * 3)
    return tmp_path


def stream(place: Path, kind: str, consumed: int = 0, workers: int = 0, steps: int = 6):
    """Returns an iterator over micro-batches of ROWS samples of LENGTH tokens."""
    argv = f"""--num-layers 1 --hidden-size 32 --num-attention-heads 2 --seq-length {LENGTH} --lr 1e-3 --eval-iters 0
    --max-position-embeddings {LENGTH} --micro-batch-size {ROWS} --train-iters {steps} --attention-dropout 0
    --tokenizer-model {place}/tokenizer --split 1,0,0 --data-path {place}/{kind} --num-workers {workers}""".split()
    args = parse_args([*argv, *KINDS[kind]], 1)
    tokenizer, _ = build_tokenizer(args)
    return batches(args, build_data(args, tokenizer, find_files(args, tokenizer.eod)).train, consumed)


def test_documents_of_a_micro_batch_begin_at_position_0_behind_each_end(place: Path) -> None:
    lengths = set()
    for batch in islice(stream(place, "documents"), 6):
        tokens, bounds = batch["tokens"][0].tolist(), batch[CUMULATIVE].tolist()
        assert len(tokens) == ROWS * LENGTH
        begins = [i for i in range(len(tokens)) if i % LENGTH == 0 or tokens[i - 1] == EOD]
        assert bounds == [*begins, len(tokens)]
        parts = batch[CUMULATIVE].diff().tolist()
        assert batch["position_ids"][0].tolist() == [position for length in parts for position in range(length)]
        # The token after the end of a document is the first of another one, and is not learned.
        assert batch["loss_mask"][0].tolist() == [float(token != EOD) for token in tokens]
        assert all(value.numel() <= len(tokens) for value in batch.values()), "a mask would be larger"
        lengths |= set(parts)
    assert {1, LENGTH} <= lengths


def test_ends_of_documents_are_seen_and_learned_where_padding_is_the_same_token(place: Path) -> None:
    """Many published models pad with the end token; GPTDataset finds padding by its token if it has no other role."""
    described = json.loads((place / "tokenizer" / "tokenizer_config.json").read_text())
    plain = list(islice(stream(place, "documents"), 6))
    (place / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({**described, "pad_token": "<eod>"}))
    padded = list(islice(stream(place, "documents"), 6))
    assert any((batch["tokens"] == EOD).any() for batch in plain)
    for mine, other in zip(plain, padded, strict=True):
        assert all(torch.equal(mine[name], other[name]) for name in mine)
    learned = torch.cat([batch["labels"][batch["loss_mask"] > 0] for batch in padded])
    assert (learned == EOD).any()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_processes_that_load_read_the_same_micro_batches(kind: str, place: Path) -> None:
    here = list(islice(stream(place, kind, 4), 5))
    there = list(islice(stream(place, kind, 4, workers=2), 5))
    for mine, other in zip(here, there, strict=True):
        assert sorted(mine) == sorted(other)
        assert all(torch.equal(mine[name], other[name]) for name in mine)
    assert len({tuple(batch["tokens"][0].tolist()) for batch in here}) == 5, "each is another one"

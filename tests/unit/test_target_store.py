# SPDX-License-Identifier: Apache-2.0
"""Tests of target stores on disk: records that are restored, their size, and errors that name every kind of damage."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitcpm_megatron.checkpoint_tools import inspect_checkpoint
from bitcpm_megatron.data.target_records import decode_draws, decode_top_k, encode_draws, encode_top_k, is_of
from bitcpm_megatron.data.target_store import (
    Description,
    Part,
    StoreError,
    TargetStore,
    begin,
    read_description,
    samples_per_shard,
    shard_path,
    write_shard,
)
from bitcpm_megatron.files import write_digests

LENGTH, DRAWS, VOCABULARY = 24, 50, 500


def description(**changes: object) -> Description:
    said = {
        "kind": "sampled",
        "width": DRAWS,
        "temperature": 1.0,
        "vocab_size": VOCABULARY,
        "seq_length": LENGTH,
        "seed": 1,
        "samples_per_shard": 4,
        "teacher": {"checkpoint": "iter_0000001", "digest": "0"},
        "tokenizer": {"class": "NullTokenizer"},
        "data": {},
        "parts": [Part(name="a", digest="1", samples=6), Part(name="b", digest="2", samples=3)],
    }
    return Description(**{**said, **changes})


def sample(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens and draws of a sample."""
    drawn = np.random.default_rng(number)
    return drawn.integers(0, VOCABULARY, LENGTH), drawn.zipf(1.5, (LENGTH, DRAWS)).clip(1, VOCABULARY).astype(int) - 1


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Makes a store of nine samples in three shards."""
    about = description()
    begin(tmp_path / "store", about)
    for shard, numbers in enumerate(about.shards):
        records = [encode_draws(*sample(number), VOCABULARY) for number in numbers]
        write_shard(shard_path(tmp_path / "store", shard), records)
    write_digests(tmp_path / "store")
    return tmp_path / "store"


@settings(max_examples=50, deadline=None)
@given(
    length=st.integers(1, 9),
    draws=st.sampled_from([1, 2, 50, 128, 255]),
    vocab_size=st.sampled_from([1, 2, 500, 131072, 335544, 335545, 2**24]),
    seed=st.integers(0, 2**20),
)
def test_draws_come_back_counted(length: int, draws: int, vocab_size: int, seed: int) -> None:
    drawn = np.random.default_rng(seed)
    # There are few ids, so that some repeat, and the last one is among them.
    ids = (vocab_size - 1 - drawn.integers(0, min(vocab_size, draws), (length, draws))).astype(np.int32)
    tokens = drawn.integers(0, vocab_size, length)
    found, counts = decode_draws(encode_draws(tokens, ids, vocab_size), length, draws, vocab_size)
    assert found.dtype == np.int32 and counts.dtype == np.uint8 and found.shape == counts.shape == (length, draws)
    for row in range(length):
        wanted = dict(zip(*np.unique(ids[row], return_counts=True), strict=True))
        used = counts[row] > 0
        assert dict(zip(found[row, used].tolist(), counts[row, used].tolist(), strict=True)) == wanted
        assert not found[row, ~used].any()


def test_top_k_comes_back_in_fp16() -> None:
    drawn = np.random.default_rng(1)
    ids = drawn.integers(0, 2**24, (LENGTH, 8)).astype(np.int32)
    log_p = np.log(drawn.dirichlet(np.ones(9), LENGTH)[:, :8]).astype(np.float32)
    record = encode_top_k(ids[:, 0], ids, log_p)
    found, logarithms = decode_top_k(record, LENGTH, 8)
    assert np.array_equal(found, ids) and np.array_equal(logarithms, log_p.astype(np.float16))
    assert len(record) == 8 + LENGTH * 8 * 5


def test_twelve_distinct_ids_take_37_bytes_of_a_token() -> None:
    ids = np.tile(np.arange(DRAWS) % 12, (4096, 1)) * 6000
    assert len(encode_draws(np.zeros(4096, np.int64), ids, 73448)) == 8 + 4096 * 37


def test_a_record_knows_its_tokens() -> None:
    tokens, ids = sample(0)
    record = encode_draws(tokens, ids, VOCABULARY)
    other = tokens.copy()
    other[-1] ^= 1
    assert is_of(record, tokens) and not is_of(record, other)


def test_every_sample_is_found(store: Path) -> None:
    found = TargetStore(store)
    for number in range(9):
        assert found.record(number) == encode_draws(*sample(number), VOCABULARY)


def test_shards_are_neither_many_nor_large() -> None:
    assert samples_per_shard(10, 32) == 512
    assert samples_per_shard(2_400_000, 4096) == 256
    assert samples_per_shard(2_400_000, 2**22) == 1


def test_one_shard_more_than_the_most_is_refused(store: Path) -> None:
    for samples, good in ((4 * 2**20, True), (4 * 2**20 + 1, False)):
        edit(store, parts=[{"name": "a", "digest": "1", "samples": samples}])
        if good:
            assert len(read_description(store).shards) == 2**20
        else:
            with pytest.raises(StoreError, match="4,194,305 samples in shards of 4 cannot be"):
                read_description(store)


@pytest.mark.parametrize("shard", range(3))
def test_a_flipped_bit_is_found_wherever_it_is(shard: int, store: Path) -> None:
    path = shard_path(store, shard)
    whole = path.read_bytes()
    for place in {*range(0, len(whole), 97), *range(len(whole) - 96, len(whole))}:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        found, told = TargetStore(store), []
        for number in found.description.shards[shard]:
            try:
                assert found.record(number) == encode_draws(*sample(number), VOCABULARY)
            except StoreError as error:
                told.append(str(error))
        assert told and all(f"{path} is damaged" in message for message in told), place
    path.write_bytes(whole)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda store: (store / "targets-00001.bin").write_bytes(b""), "targets-00001.bin has 0 bytes and DIGESTS"),
        (lambda store: (store / "targets-00002.bin").unlink(), "targets-00002.bin is missing"),
        (lambda store: (store / "DIGESTS.json").unlink(), r"is not complete \(0 shards are missing\)"),
        (lambda store: (store / "DIGESTS.json").write_text("{"), "DIGESTS.json: not valid JSON"),
        (lambda store: (store / "store.json").unlink(), "is no target store: it has no store.json"),
        (lambda store: edit(store, temperature=2.0), "store.json .*DIGESTS.json"),
        (lambda store: edit(store, temperature=-1.0), "temperature: -1.0: must be above 0"),
        (lambda store: edit(store, draws=3), "unknown key draws"),
        (lambda store: edit(store, width=256), "256 draws are more than 255"),
    ],
)
def test_damage_is_found_when_a_store_is_opened(damage, said: str, store: Path) -> None:
    damage(store)
    with pytest.raises(StoreError, match=said):
        TargetStore(store)


def edit(store: Path, **changes: object) -> None:
    path = store / "store.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_shard_that_is_cut_meanwhile_is_found(store: Path) -> None:
    found = TargetStore(store)
    found.record(0)
    path = shard_path(store, 0)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(StoreError, match=f"{path} is damaged"):
        found.record(3)
    with pytest.raises(StoreError, match=f"{path} is damaged"):
        TargetStore.record(found, 0)


def test_nothing_of_a_shard_is_left_where_it_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "targets-00000.bin").mkdir()
    with pytest.raises(OSError):
        write_shard(tmp_path / "targets-00000.bin", [b"12345678"])
    assert [path.name for path in tmp_path.iterdir()] == ["targets-00000.bin"]


def test_another_store_is_not_gone_on_with(store: Path, tmp_path: Path) -> None:
    begin(store, description())
    with pytest.raises(StoreError, match=r"holds targets with temperature 1.0 \(now 2.0\): choose another --output"):
        begin(store, description(temperature=2.0))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").touch()
    with pytest.raises(StoreError, match="is not empty, and no target store"):
        begin(tmp_path / "notes", description())
    assert read_description(store) == description()


def test_inspection_says_what_a_store_is(store: Path, capsys: pytest.CaptureFixture) -> None:
    assert inspect_checkpoint.main([str(store)]) == 0
    said = capsys.readouterr().out
    for words in ("50 draws of 500 ids", "9 of 24 tokens", "a (6), b (3)", "complete:     yes", "iter_0000001"):
        assert words in said
    shutil.copytree(store, other := store.with_name("other"))
    (other / "DIGESTS.json").unlink()
    shard_path(other, 1).unlink()
    assert inspect_checkpoint.main([str(other), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert not found["complete"] and found["missing_shards"] == 1 and found["digests"] is None
    shard = shard_path(store, 1)
    shard.write_bytes(shard.read_bytes().replace(b"BITCPMT1", b"BITCPMT2"))
    assert inspect_checkpoint.main([str(store)]) == 3
    assert inspect_checkpoint.main([str(store), "--fast"]) == 0

# SPDX-License-Identifier: Apache-2.0
"""Tests of the cache of sample indices (damage, code or other data in it, kills while it is built), and bad tokens."""

import io
import os
import pickle
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from test_token_headers import write

from bitcpm_megatron.checkpoints.compatibility import check_data
from bitcpm_megatron.checkpoints.directory import CheckpointError
from bitcpm_megatron.data import sample_cache as module
from bitcpm_megatron.data.sample_cache import key_of, sample_cache
from bitcpm_megatron.data.token_headers import TokenFile
from bitcpm_megatron.data.tokenizers import train_sentencepiece
from bitcpm_megatron.training import data
from bitcpm_megatron.training.data import DataError, batches, build_data, build_tokenizer, find_files
from bitcpm_megatron.training.flags import parse_args

VOCAB = 290  # the size of the tokenizer


class Evil:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple:
        return (open, (str(self._path), "w"))


def arguments(directory: Path, *more: str, paths: str = "--data-path {d}/corpus --split 90,10"):
    argv = f"""--num-layers 1 --hidden-size 32 --num-attention-heads 2 --seq-length 16 --max-position-embeddings 16
    --micro-batch-size 2 --train-iters 3 --lr 1e-3 --eval-iters 1
    --tokenizer-model {directory}/t.model --data-cache-path {directory}/cache --bf16""".split()
    return parse_args([*argv, *paths.format(d=directory).split(), *more], 1)


@pytest.fixture
def place(tmp_path: Path, single_rank: None) -> Path:
    write(tmp_path / "corpus", np.arange(2600, dtype=np.uint16) % VOCAB)
    (tmp_path / "t.model").write_bytes(train_sentencepiece(["the quick brown fox jumps over the lazy dog"] * 50, VOCAB))
    return tmp_path


def samples(directory: Path, *more: str) -> tuple[list[list[int]], str | None]:
    """Returns the first batches, and the note about the cache."""
    args = arguments(directory, *more)
    tokenizer, _ = build_tokenizer(args)
    data = build_data(args, tokenizer, find_files(args, 2))
    stream = batches(args, data.train, 0)
    return [next(stream)["tokens"].tolist() for _ in range(3)], data.note


def indices(directory: Path) -> dict[str, tuple[int, int]]:
    files = [path for path in (directory / "cache").rglob("*") if path.is_file()]
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def test_the_cache_is_built_once_and_leaves_nothing_else(place: Path) -> None:
    first = samples(place)
    built = indices(place)
    assert len([name for name in built if name.endswith("_index.npy")]) == 6
    assert samples(place) == first and indices(place) == built
    assert first[1] is None and len(list((place / "cache").iterdir())) == 1


@pytest.mark.parametrize("index", ["document_index", "sample_index", "shuffle_index"])
@pytest.mark.parametrize("way", ["pickle", "object array", "cut", "empty", "flipped", "missing", "text"])
def test_a_damaged_cache_is_built_again_and_runs_no_code(place: Path, index: str, way: str) -> None:
    first, _ = samples(place)
    path = next((place / "cache").rglob(f"*train-{index}.npy"))
    content = path.read_bytes()
    whole = io.BytesIO()
    np.save(whole, np.array([Evil(place / "ran")], object), allow_pickle=True)
    path.unlink()
    if way != "missing":
        path.write_bytes(
            {
                "pickle": pickle.dumps(Evil(place / "ran")),
                "object array": whole.getvalue(),
                "cut": content[:-9],
                "empty": b"",
                "flipped": content[:-1] + bytes([content[-1] ^ 1]),
                "text": b"text",
            }[way]
        )
    again, note = samples(place)
    assert not (place / "ran").exists()
    assert again == first
    assert path.name in note and "built again" in note
    assert samples(place) == (first, None)


def test_code_runs_not_even_with_a_digest(place: Path) -> None:
    first, _ = samples(place)
    path = next((place / "cache").rglob("*train-shuffle_index.npy"))
    path.write_bytes(pickle.dumps(Evil(place / "ran")))
    module.write_digests(path.parent)
    again, note = samples(place)
    assert again == first and "no whole array of numbers" in note and not (place / "ran").exists()


def test_other_data_under_the_same_name_has_indices_of_its_own(place: Path) -> None:
    samples(place)
    write(place / "corpus", np.arange(2600, dtype=np.uint16) % 7, documents=13)
    other, note = samples(place)
    assert note is None and max(max(sum(batch, [])) for batch in other) < 7
    assert len(list((place / "cache").iterdir())) == 2


def test_other_arguments_have_indices_of_their_own(place: Path) -> None:
    for more in ((), ("--seed", "7"), ("--train-iters", "5"), ("--split", "80,20"), ("--eval-iters", "0")):
        samples(place, *more)
    assert len(list((place / "cache").iterdir())) == 5


@pytest.mark.slow
@pytest.mark.parametrize("place", ["first array", "second array", "digests", "name"])
def test_a_kill_while_it_is_built_breaks_no_later_start(tmp_path: Path, single_rank: None, place: str) -> None:
    def build(directory: Path) -> None:
        for name in ("first", "second"):
            np.save(directory / f"{name}_index.npy", np.arange(1000))

    child = os.fork()
    if child == 0:
        original = np.save

        def save(path: Path, array: np.ndarray) -> None:
            original(path, array)
            if path.name.startswith(place.split()[0]):
                os.truncate(path, 1000)
                os.kill(os.getpid(), signal.SIGKILL)

        np.save = save
        setattr(module, {"digests": "write_digests"}.get(place, "publish"), lambda *_: os.kill(os.getpid(), 9))
        module._ensure(tmp_path, "key", build)  # rank 0 does this
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.iterdir()) == [".key.incomplete", ".key.lock"]
    directory, note = sample_cache(tmp_path, "key", build)
    assert note is None and list(tmp_path.iterdir()) == [directory]
    assert np.array_equal(np.load(directory / "second_index.npy"), np.arange(1000))


def test_a_failure_leaves_nothing_and_is_told(tmp_path: Path, single_rank: None) -> None:
    def fail(directory: Path) -> None:
        (directory / "half").touch()
        raise OSError(28, os.strerror(28))

    with pytest.raises(module.FailedError, match="No space left.*--data-cache-path"):
        sample_cache(tmp_path / "cache", "key", fail)
    assert list((tmp_path / "cache").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="choose another --data-cache-path"):
        sample_cache(tmp_path / "file", "key", lambda directory: None)


def test_keys_tell_values_apart() -> None:
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1}) != key_of({"a": 1, "b": "2"})


# ----------------------------------------------------------------------------------- splits, tokens and other data


@pytest.fixture
def patience() -> Iterator[None]:
    def too_long(*_: object) -> None:
        raise AssertionError("upstream counts the epochs of nothing for ever")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(100)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("more", [("--eval-iters", "0"), ("--split", "2,1,0"), ("--split", "60,39,1")])
def test_a_part_that_nobody_asks_for_may_have_no_document(place: Path, patience: None, more: tuple[str, ...]) -> None:
    write(place / "corpus", np.arange(300, dtype=np.uint16) % VOCAB, documents=3)
    assert len(samples(place, *more)[0]) == 3


def test_the_default_split_of_few_documents_is_refused(place: Path, patience: None) -> None:
    write(place / "corpus", np.arange(300, dtype=np.uint16) % VOCAB, documents=3)
    with pytest.raises(ValueError, match="leaves no validation data of the 3 documents.*--eval-iters 0"):
        samples(place, "--split", "969,30,1")


def test_a_token_beyond_the_vocabulary_is_refused_before_training(place: Path) -> None:
    write(place / "corpus", np.full(2600, 5000, np.uint16))
    with pytest.raises(ValueError, match=r"corpus.bin holds token 5000, and the vocabulary ends at 289"):
        samples(place)


def test_a_token_beyond_the_vocabulary_is_refused_in_the_step_that_reads_it(place: Path, monkeypatch) -> None:
    from bitcpm_megatron.training import loop

    write(place / "corpus", np.full(2600, 5000, np.uint16))
    monkeypatch.setattr(TokenFile, "mistake", lambda *_: None)  # the token is between the blocks that are checked
    with pytest.raises(DataError, match=r"corpus\) hold token 5000, and the vocabulary ends at 289"):
        loop.pretrain(arguments(place))


@pytest.mark.parametrize(
    "flag", ["--reset-position-ids --reset-attention-mask --attention-dropout 0", "--eod-mask-loss"]
)
def test_documents_without_ends_are_refused_where_they_are_asked_for(place: Path, flag: str) -> None:
    args = arguments(place, *flag.split())
    args.vocab_size = VOCAB
    first = flag.split()[0]
    with pytest.raises(ValueError, match=rf"corpus: its documents do not end with token 7, for {first}.*--append-eod"):
        find_files(args, 7)
    write(place / "corpus", np.full(2600, 7, np.uint16))
    find_files(args, 7)


def test_a_run_goes_on_with_its_own_data_alone(place: Path) -> None:
    args = arguments(place, "--load", str(place / "save"))
    args.vocab_size = VOCAB
    find_files(args, 2)
    saved = dict(vars(args))
    assert check_data(args, saved, place) == [] == check_data(args, {}, place)
    write(place / "corpus", np.arange(2600, dtype=np.uint16) % 7)
    find_files(args, 2)
    with pytest.raises(CheckpointError, match="corpus holds now: .*--allow-data-change"):
        check_data(args, saved, place)
    args.allow_data_change = True
    assert "--allow-data-change" in check_data(args, saved, place)[0]


@pytest.mark.parametrize(
    "paths",
    [
        "--data-path {d}/corpus {d}/other --split 90,10",
        "--data-path 3 {d}/corpus 1 {d}/other --split 90,10",
        "--train-data-path 1 {d}/other 2 {d}/corpus --valid-data-path {d}/corpus",
        "--train-data-path {d}/corpus {d}/other --valid-data-path {d}/corpus {d}/other",
    ],
)
def test_a_blend_gives_the_samples_that_megatron_core_gives(place: Path, paths: str) -> None:
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset

    write(place / "other", np.arange(1300, dtype=np.uint16) % 11, documents=13)
    args = arguments(place, paths=paths)
    tokenizer, _ = build_tokenizer(args)
    ours = build_data(args, tokenizer, find_files(args, 2))
    config = data._config(args, tokenizer, None)
    upstream = BlendedMegatronDatasetBuilder(GPTDataset, [6, 2, 0], lambda: True, config).build()
    for mine, theirs, wanted in ((ours.train, upstream[0], 6), (ours.valid, upstream[1], 2)):
        assert len(mine) == len(theirs) >= wanted
        assert all(np.array_equal(mine[n]["tokens"], theirs[n]["tokens"]) for n in range(len(mine)))

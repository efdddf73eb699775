# SPDX-License-Identifier: Apache-2.0
"""Tests of students with a target store: they learn the same as from the teacher, and other stores are refused."""

from pathlib import Path

import pytest
import torch
from megatron.core import tensor_parallel
from support.token_data import write_conversations, write_documents, write_tokenizer

from bitcpm_megatron.checkpoints.directory import CheckpointError, saved_arguments
from bitcpm_megatron.data import target_store
from bitcpm_megatron.data.target_store import StoreError, read_description, shard_path
from bitcpm_megatron.launch.write_targets import parse_args as parse_writer
from bitcpm_megatron.training.distillation import writing
from bitcpm_megatron.training.distillation.writing import write_targets
from bitcpm_megatron.training.flags import parse_args
from bitcpm_megatron.training.loop import pretrain
from bitcpm_megatron.training.run import Step

MODEL = """
    --max-position-embeddings 16 --lr 1e-3 --attention-dropout 0 --hidden-dropout 0 --eval-iters 0 --swiglu
    --position-embedding-type rope --disable-bias-linear --init-method-std 0.3 --num-layers 1 --hidden-size 32
    --num-attention-heads 2 --global-batch-size 4
""".split()
LARGER = "--num-layers 2 --hidden-size 48 --num-attention-heads 4 --untie-embeddings-and-output-weights".split()
# One pass over the data has 46 samples of 16 tokens.
PLAIN = "--data-path {d}/text --split 1,0,0"
KINDS = {
    "plain": PLAIN,
    "packed": f"{PLAIN} --reset-attention-mask --reset-position-ids",
    "blend": "--data-path 0.3 {d}/text 0.7 {d}/more --split 1,0,0",
    "files": "--train-data-path {d}/text {d}/more",
    "sft": "--data-path {d}/chat --split 1,0,0 --sft",
}


@pytest.fixture(scope="module")
def place(_model_parallel: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes data, a tokenizer, and an untrained teacher."""
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    directory = tmp_path_factory.mktemp("targets")
    write_tokenizer(directory / "tokenizer")
    write_documents(directory / "text", [9, 30, 5, 61, 12, 44, 80, 7] * 3, seed=1)
    write_documents(directory / "more", [20, 33, 70, 8] * 8, seed=2)
    write_conversations(directory / "chat", [[5, 9], [16], [3, 3, 4], [11], [2, 14], [8, 8], [12]], seed=3)
    teaching = ["--train-iters", "1", "--save", str(directory / "teacher")]
    pretrain(parse_args([*MODEL, *LARGER, *shared(directory, "plain"), *teaching], 1))
    return directory


def shared(place: Path, kind: str, *more: str) -> list[str]:
    """Returns the flags that determine samples."""
    data = KINDS[kind].format(d=place).split()
    return [*data, *f"--seq-length 16 --micro-batch-size 2 --tokenizer-model {place}/tokenizer".split(), *more]


def write(place: Path, output: Path, kind: str = "plain", *more: str) -> Path:
    write_targets(
        parse_writer([*shared(place, kind), "--teacher", f"{place}/teacher", "--output", str(output), *more], 1)
    )
    return output


def steps(place: Path, kind: str, *more: str, train_iters: int = 5) -> list[Step]:
    found: list[Step] = []
    torch.manual_seed(1)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    argv = [*MODEL, *shared(place, kind), "--train-iters", str(train_iters), *more]
    pretrain(parse_args(argv, 1), on_step=found.append)
    return found


def said(found: list[Step]) -> list[tuple[float, float | None, float | None]]:
    return [(step.loss, step.divergence, step.grad_norm) for step in found]


@pytest.fixture(scope="module")
def store(place: Path) -> Path:
    return write(place, place / "store")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_who_keeps_almost_all_teaches_as_the_teacher_itself(
    kind: str, place: Path, tmp_path: Path, single_rank: None
) -> None:
    """The store has the likeliest 299 of 300 ids in fp16, so that every token must meet its own targets."""
    store = write(place, tmp_path / "store", kind, *"--distill-top-k 299 --distill-temperature 2".split())
    online = steps(place, kind, *f"--distill-teacher {place}/teacher --distill-temperature 2".split())
    stored = steps(place, kind, "--distill-targets", str(store))
    for one, other in zip(online, stored, strict=True):
        assert other.divergence == pytest.approx(one.divergence, rel=2e-3)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=2e-3)
        assert other.loss == pytest.approx(one.loss, rel=1e-4)


@pytest.mark.slow
def test_the_micro_batch_size_of_the_writer_is_not_seen(place: Path, store: Path, tmp_path: Path, single_rank) -> None:
    other = write(place, tmp_path / "other", "plain", "--micro-batch-size", "3")
    assert content(other) == content(store)


@pytest.mark.slow
def test_every_sample_is_drawn_for_with_numbers_of_its_own(
    place: Path, tmp_path: Path, single_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, original = [], writing.draws

    def watch(logits: torch.Tensor, uniform: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.append(uniform)
        return original(logits, uniform, *rest)

    monkeypatch.setattr(writing, "draws", watch)
    for name, seed in (("one", "1"), ("other", "2")):
        write(place, tmp_path / name, "plain", "--seed", seed, "--train-samples", "4", "--distill-draws", "3")
    numbers = torch.cat([uniform.flatten() for uniform in seen])
    # Two of so few fp32 numbers are equal by chance in at most about one of a thousand cases.
    assert len(numbers) == 2 * 4 * 16 * 3 and len(numbers.unique()) >= len(numbers) - 1


def content(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.iterdir()}


@pytest.mark.slow
def test_a_writer_goes_on_where_it_stopped(
    place: Path, tmp_path: Path, single_rank: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(target_store, "_LEAST_TOKENS", 7 * 16)
    whole = write(place, tmp_path / "whole")
    assert len(read_description(whole).shards) == 7
    taught, original = [], writing.write_shard

    def full_disk(path: Path, records: list[bytes]) -> None:
        if len(taught) == 2:
            raise OSError(28, "No space left on device")
        taught.append(path.name)
        original(path, records)

    monkeypatch.setattr(writing, "write_shard", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write(place, tmp_path / "killed")
    assert sorted(content(tmp_path / "killed")) == ["store.json", "targets-00000.bin", "targets-00001.bin"]
    with pytest.raises(StoreError, match=r"is not complete \(5 shards are missing\): start the write_targets.py"):
        steps(place, "plain", "--distill-targets", str(tmp_path / "killed"))
    monkeypatch.setattr(writing, "write_shard", original)
    before = shard_path(tmp_path / "killed", 0).stat().st_mtime_ns
    write(place, tmp_path / "killed")
    assert content(tmp_path / "killed") == content(whole)
    assert shard_path(tmp_path / "killed", 0).stat().st_mtime_ns == before
    write(place, tmp_path / "killed")
    assert "is complete: 46 samples" in capsys.readouterr().out
    assert not list(tmp_path.glob(".*")), "no lock is left"


@pytest.mark.slow
def test_a_store_serves_every_length_batch_and_blend_of_one_pass(place: Path, tmp_path: Path, single_rank) -> None:
    store = write(place, tmp_path / "store", "blend")
    for flags in ("--global-batch-size 2", "--micro-batch-size 1", "--data-path 0.9 {d}/more 0.1 {d}/text"):
        found = steps(place, "blend", *flags.format(d=place).split(), "--distill-targets", str(store), train_iters=4)
        assert all(step.divergence > 0 for step in found)


@pytest.mark.slow
def test_conversations_are_served_in_every_epoch_and_under_every_seed(place: Path, tmp_path: Path, single_rank) -> None:
    store = write(place, tmp_path / "store", "sft")
    assert read_description(store).samples == 7
    assert len(steps(place, "sft", "--seed", "5", "--distill-targets", str(store), train_iters=5)) == 5


@pytest.mark.slow
def test_more_than_one_pass_needs_its_samples(place: Path, store: Path, tmp_path: Path, single_rank: None) -> None:
    assert len(steps(place, "plain", "--distill-targets", str(store), train_iters=10)) == 10
    with pytest.raises(StoreError, match="more passes over them than the writer did .*--train-samples 60"):
        steps(place, "plain", "--distill-targets", str(store), train_iters=15)
    longer = write(place, tmp_path / "longer", "plain", "--train-samples", "60")
    assert len(steps(place, "plain", "--distill-targets", str(longer), train_iters=15)) == 15
    with pytest.raises(StoreError, match="says nothing of the samples of text"):
        steps(place, "plain", "--distill-targets", str(longer), train_iters=5)
    part = write(place, tmp_path / "part", "plain", "--train-samples", "20")
    with pytest.raises(StoreError, match="holds 20 samples of text, and the run takes 24"):
        steps(place, "plain", "--distill-targets", str(part), train_iters=6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ("--seed 5", r"of the samples of text: it was written with --seed 1234 \(now 5\)"),
        ("--seq-length 8", r"--seq-length 16 \(now 8\)"),
        ("--split 9,1,0", r"--split 1,0,0 \(now 9,1,0\)"),
        ("--reset-attention-mask --reset-position-ids", r"--reset-attention-mask False \(now True\)"),
        ("--data-path {d}/more", "of the samples of more: its files are others"),
        ("--data-path {d}/chat --sft", "of the samples of chat"),
        ("--distill-temperature 2", "written at a temperature of 1, and serve no other"),
        ("--tokenizer-model {d}/other", "cut by another tokenizer"),
    ],
)
def test_others_are_refused_by_name(changes: str, words: str, place: Path, store: Path, single_rank: None) -> None:
    if "other" in changes and not (place / "other").exists():
        write_tokenizer(place / "other")
        path = place / "other" / "tokenizer.json"
        path.write_text(path.read_text().replace('"w1"', '"v1"'))
    with pytest.raises(StoreError, match=words):
        steps(place, "plain", "--distill-targets", str(store), *changes.format(d=place).split(), train_iters=3)


@pytest.mark.slow
def test_a_vocabulary_that_is_too_small_is_refused(place: Path, tmp_path: Path, single_rank: None) -> None:
    argv = [
        *shared(place, "plain"),
        "--vocab-size",
        "320",
        "--teacher",
        f"{place}/large",
        "--output",
        str(tmp_path / "s"),
    ]
    pretrain(
        parse_args(
            [*MODEL, *shared(place, "plain"), *f"--vocab-size 320 --train-iters 1 --save {place}/large".split()], 1
        )
    )
    write_targets(parse_writer(argv, 1))
    with pytest.raises(StoreError, match="are of 320 ids and the model has 300: give --vocab-size 320"):
        steps(place, "plain", "--distill-targets", str(tmp_path / "s"))


@pytest.mark.slow
def test_damage_is_told_before_it_is_trained_on(place: Path, tmp_path: Path, single_rank: None) -> None:
    store, save = write(place, tmp_path / "store"), tmp_path / "save"
    path = shard_path(store, 0)
    whole = bytearray(path.read_bytes())
    # The damage is in the middle, so that some samples come before it.
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)
    flags = ["--distill-targets", str(store), "--save", str(save), "--save-interval", "1"]
    with pytest.raises(StoreError, match=f"{path} is damaged: what it says of sample") as raised:
        steps(place, "plain", *flags, train_iters=10)
    number = int(str(raised.value).split(" of sample ")[1].split()[0])
    assert (save / "latest_checkpointed_iteration.txt").read_text() == str(number // 4)


@pytest.mark.slow
def test_other_tokens_than_the_teacher_saw_are_told(place: Path, tmp_path: Path, single_rank, monkeypatch) -> None:
    """This is checked whatever the reason is for taking one sample for another."""
    store = write(place, tmp_path / "store")
    from bitcpm_megatron.training.distillation import store as module

    monkeypatch.setattr(module._Taught, "_number", lambda self, index: index + 1)
    with pytest.raises(StoreError, match="has other tokens in sample 1 than the data"):
        steps(place, "plain", "--distill-targets", str(store))


@pytest.mark.slow
def test_another_store_is_refused_by_name_where_a_run_goes_on(
    place: Path, store: Path, tmp_path: Path, single_rank: None
) -> None:
    saving = ["--save", str(tmp_path / "save")]
    steps(place, "plain", "--distill-targets", str(store), *saving, "--exit-interval", "1")
    saved = saved_arguments(tmp_path / "save" / "iter_0000001")
    assert saved["distill_targets"] == str(store) and saved["distill_identity"]["checkpoint"] == "iter_0000001"
    other = write(place, tmp_path / "other", "plain", "--distill-draws", "20")
    going_on = [*saving, "--load", str(tmp_path / "save")]
    with pytest.raises(CheckpointError, match=r"with the targets .*store \(iter_0000001\): .*other .* is another one"):
        steps(place, "plain", "--distill-targets", str(other), *going_on)
    with pytest.raises(CheckpointError, match=r"the targets .*store .*: .*teacher \(iter_0000001\) is another one"):
        steps(place, "plain", "--distill-teacher", f"{place}/teacher", *going_on)
    # The same store may be at another place, and continues with the next sample.
    moved = tmp_path / "moved"
    moved.mkdir()
    for name, data in content(store).items():
        (moved / name).write_bytes(data)
    whole = said(steps(place, "plain", "--distill-targets", str(store)))
    assert said(steps(place, "plain", "--distill-targets", str(moved), *going_on)) == whole[1:]


@pytest.mark.slow
def test_loader_processes_read_the_same(place: Path, store: Path, single_rank: None) -> None:
    flags = ["--distill-targets", str(store)]
    assert said(steps(place, "plain", *flags, "--num-workers", "2")) == said(steps(place, "plain", *flags))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--distill-teacher a --distill-targets b", "--distill-teacher and --distill-targets exclude each other"),
        ("--distill-targets b --distill-direction reverse", "--distill-direction reverse needs --distill-teacher"),
        ("--distill-targets b --distill-top-k 3", "--distill-top-k needs --distill-teacher: targets hold what"),
        ("--distill-teacher a --distill-top-k 3 --distill-direction reverse", "leave out --distill-top-k"),
        ("--distill-teacher a --distill-top-k 1025", "must be 1 to 1024"),
        ("--distill-teacher a --distill-draws 3", "unknown arguments: --distill-draws"),
        ("--distill-alpha 0.5", "--distill-alpha needs --distill-teacher or --distill-targets"),
    ],
)
def test_contradictions_are_refused(flags: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    mock = "--mock-data --vocab-size 300 --seq-length 16 --micro-batch-size 2 --train-iters 1"
    with pytest.raises(SystemExit) as leaving:
        parse_args([*MODEL, *mock.split(), *flags.split()], 1)
    assert leaving.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--mock-data --vocab-size 300", "--mock-data needs --train-samples"),
        ("--mock-data --train-samples 3", "--mock-data needs --vocab-size"),
        ("--data-path a --tokenizer-model b --distill-draws 3 --distill-top-k 3", "exclude each other"),
        ("--data-path a --tokenizer-model b --distill-draws 256", "must be 1 to 255"),
        ("--data-path a", "--tokenizer-model is needed"),
        ("--data-path a --tokenizer-model b --tensor-model-parallel-size 2", "1 processes cannot be split"),
        ("--data-path a --tokenizer-model b --sequence-parallel", "cannot share --seq-length 16"),
    ],
)
def test_a_writer_refuses_contradictions(flags: str, words: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as leaving:
        parse_writer([*"--teacher t --output o --seq-length 16 --micro-batch-size 1".split(), *flags.split()], 1)
    assert leaving.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.slow
def test_what_cannot_be_kept_is_refused(place: Path, tmp_path: Path, single_rank: None) -> None:
    with pytest.raises(ValueError, match="--distill-top-k 300 of 300 ids leaves no rest: use fewer"):
        write(place, tmp_path / "store", "plain", "--distill-top-k", "300")
    assert not (tmp_path / "store").exists()

# SPDX-License-Identifier: Apache-2.0
"""Tests of the .bin/.idx writer, of megatron-core's datasets of its files, and of the command preprocess_data."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

from bitcpm_megatron.data.token_files import CorpusSummary, outputs, write_corpus
from bitcpm_megatron.data.tokenizers import NullTokenizer, SentencePieceTokenizer, train_sentencepiece
from bitcpm_megatron.files.lock import FileLock, PendingFiles
from bitcpm_megatron.launch.preprocess_data import main

pytest.importorskip("megatron.core")
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset

CHECKOUT = Path(__file__).resolve().parents[2]
TEXTS = [f"Document {n}.\n\nIt has {n} parts, “quotes”, and\ta tab.\n    三值 weights: -1, 0, 1." for n in range(60)]


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    return SentencePieceTokenizer("a.model", train_sentencepiece(TEXTS, 320))


@pytest.fixture
def corpus_file(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text, "id": n}) + "\n" for n, text in enumerate(TEXTS)))
    return path


def stored(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(str(prefix))
    return [dataset[n].tolist() for n in range(len(dataset))]


def write(
    documents: Iterable[dict[str, str]], prefix: Path, tokenizer: object, overwrite: bool = False, **options: object
) -> dict[str, CorpusSummary]:
    finals = outputs(prefix, options.get("keys", ("text",)))
    with PendingFiles(finals, command="write", overwrite=overwrite) as pending:
        return write_corpus(documents, prefix, tokenizer, pending, **options)


# ----------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("append_eod", [True, False])
def test_text_survives_the_way_to_disk(tmp_path: Path, tokenizer: SentencePieceTokenizer, append_eod: bool) -> None:
    prefix = tmp_path / "new folder" / "corpus.v2"
    summary = write(({"text": text} for text in TEXTS), prefix, tokenizer, append_eod=append_eod)["text"]
    assert summary.prefix == tmp_path / "new folder" / "corpus.v2_text_document"
    documents = stored(summary.prefix)
    assert [tokenizer.detokenize(ids) for ids in documents] == TEXTS
    assert [ids.count(tokenizer.eod) for ids in documents] == [int(append_eod)] * len(TEXTS)
    assert all(ids[-1] == tokenizer.eod for ids in documents) == append_eod
    assert summary.documents == len(TEXTS)
    assert summary.tokens == sum(map(len, documents))
    assert summary.text_bytes == sum(len(text.encode()) for text in TEXTS)


def test_each_document_is_one_sequence_and_the_dtype_fits_the_vocabulary(
    tmp_path: Path, tokenizer: SentencePieceTokenizer
) -> None:
    write([{"text": TEXTS[0]}, {"text": TEXTS[1]}], tmp_path / "small", tokenizer)
    small = IndexedDataset(str(tmp_path / "small_text_document"))
    assert small.document_indices.tolist() == [0, 1, 2]
    assert small.index.dtype == np.uint16

    class Wide:  # a real model of this size has megabytes
        vocab_size, eod = 70_000, 69_999

        def tokenize_batch(self, texts: list[str], threads: int = 1) -> list[list[int]]:
            return [[69_998]] * len(texts)

    write([{"text": "x"}], tmp_path / "wide", Wide())
    assert stored(tmp_path / "wide_text_document") == [[69_998, 69_999]]


def test_every_key_gets_its_own_files_and_empty_texts_are_skipped(
    tmp_path: Path, tokenizer: SentencePieceTokenizer
) -> None:
    documents = [{"q": "Document 1", "a": " \n"}, {"q": "Document 2", "a": "weights"}]
    summaries = write(documents, tmp_path / "qa", tokenizer, keys=["q", "a"], append_eod=False)
    assert [tokenizer.detokenize(ids) for ids in stored(tmp_path / "qa_q_document")] == ["Document 1", "Document 2"]
    assert [tokenizer.detokenize(ids) for ids in stored(tmp_path / "qa_a_document")] == ["weights"]
    assert (summaries["q"].empty_documents, summaries["a"].empty_documents) == (0, 1)
    assert "1 empty documents skipped" in str(summaries["a"])


def test_batches_keep_order_and_threads_do_not_matter(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitcpm_megatron.data.token_files._BATCH_DOCUMENTS", 7)
    write(({"text": text} for text in TEXTS), tmp_path / "corpus", tokenizer, append_eod=False, threads=2)
    assert [tokenizer.detokenize(ids) for ids in stored(tmp_path / "corpus_text_document")] == TEXTS


@pytest.mark.parametrize("texts", [[], ["", " \n\t"]])
def test_nothing_to_write_is_an_error_without_output(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, texts: list[str]
) -> None:
    with pytest.raises(ValueError, match="nothing was written"):
        write([{"text": text} for text in texts], tmp_path / "corpus", tokenizer)
    assert not list(tmp_path.iterdir())


def test_an_error_half_way_leaves_nothing(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    def documents() -> Iterator[dict[str, str]]:
        yield from ({"text": text} for text in TEXTS * 20)  # more than a batch, so that tokens have been written
        raise ValueError("corpus.jsonl:1201: not valid JSON")

    with pytest.raises(ValueError, match="1201"):
        write(documents(), tmp_path / "corpus", tokenizer)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_kill_half_way_leaves_no_output(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    def documents() -> Iterator[dict[str, str]]:
        yield from ({"text": f"document {n}"} for n in range(1500))  # more than a batch
        os.kill(os.getpid(), signal.SIGKILL)

    output = tmp_path / "output"
    # A fork has already imported megatron-core, which takes seconds, and does not need torch's threads.
    process = multiprocessing.get_context("fork").Process(
        target=write, args=(documents(), output / "corpus", tokenizer), daemon=True
    )
    process.start()
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGKILL
    names = sorted(path.name for path in output.iterdir())
    assert any(name.endswith(".incomplete") for name in names), "the kill must come while files are open"
    assert all(name.startswith(".") for name in names)
    write([{"text": "document"}], output / "corpus", tokenizer)
    assert sorted(path.name for path in output.iterdir()) == ["corpus_text_document.bin", "corpus_text_document.idx"]


def test_existing_output_is_kept_unless_overwritten(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    prefix = tmp_path / "corpus_text_document"
    write([{"text": "Document 1"}], tmp_path / "corpus", tokenizer, append_eod=False)
    with pytest.raises(ValueError, match="corpus_text_document.bin exists.*--overwrite"):
        write([{"text": "Document 2"}], tmp_path / "corpus", tokenizer, append_eod=False)
    assert tokenizer.detokenize(stored(prefix)[0]) == "Document 1"
    write([{"text": "Document 2"}], tmp_path / "corpus", tokenizer, overwrite=True, append_eod=False)
    assert tokenizer.detokenize(stored(prefix)[0]) == "Document 2"
    assert len(list(tmp_path.iterdir())) == 2


# --------------------------------------------------------------------------- what megatron-core makes of it


def build(kind: type[GPTDataset], tokenizer: object, prefix: Path | None) -> GPTDataset:
    """Builds 40 training samples like Megatron-LM; torch.distributed is not initialized."""
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=16,
        blend=None if prefix is None else ([str(prefix)], None),
        split="1,0,0",
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=True,
    )
    return BlendedMegatronDatasetBuilder(kind, [40, 0, 0], lambda: True, config).build()[0]


def test_gpt_dataset_samples_are_our_tokens(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    write(({"text": text} for text in TEXTS), tmp_path / "corpus", tokenizer)
    prefix = tmp_path / "corpus_text_document"
    dataset = build(GPTDataset, tokenizer, prefix)
    documents = stored(prefix)
    stream = " ".join(str(token) for n in dataset.document_index for token in documents[n])
    eods = 0
    for n in range(40):
        sample = dataset[n]
        assert sample["tokens"].shape == sample["labels"].shape == (16,)
        assert sample["tokens"][1:].equal(sample["labels"][:-1])
        assert f" {' '.join(map(str, sample['tokens'].tolist()))} " in f" {stream} "
        is_eod = sample["tokens"] == tokenizer.eod
        assert sample["loss_mask"].bool().equal(~is_eod), "eod_mask_loss must find our eod, and no padding"
        eods += int(is_eod.sum())
    assert eods > 0


def test_megatron_core_finds_its_index_cache_by_the_tokenizer_and_overwriting_drops_it(
    tmp_path: Path, tokenizer: SentencePieceTokenizer
) -> None:
    prefix = tmp_path / "corpus_text_document"
    write([{"text": text} for text in TEXTS], tmp_path / "corpus", tokenizer)
    build(GPTDataset, tokenizer, prefix)
    cache = prefix / "cache" / "GPTDataset_indices"
    first = set(cache.iterdir())
    build(GPTDataset, tokenizer, prefix)
    assert set(cache.iterdir()) == first
    build(GPTDataset, SentencePieceTokenizer("other.model", train_sentencepiece(TEXTS, 310)), prefix)
    assert set(cache.iterdir()) > first
    write([{"text": text} for text in TEXTS[:50]], tmp_path / "corpus", tokenizer, overwrite=True)
    assert set(build(GPTDataset, tokenizer, prefix).document_index) == set(range(50))


def test_mock_dataset_takes_the_null_tokenizer() -> None:
    dataset = build(MockGPTDataset, NullTokenizer(127), None)
    tokens = np.concatenate([dataset[n]["tokens"] for n in range(40)])
    assert tokens.min() == 0 and tokens.max() == 127


# --------------------------------------------------------------------------------------------- the command


def command(path: Path, *more: str) -> list[str]:
    return ["--input", str(path), "--output-prefix", str(path.with_name("out")), *more]


def test_command_trains_a_tokenizer_and_splits(corpus_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = corpus_file.parent / "new folder" / "tokenizer.model"
    options = ["--append-eod", "--valid-fraction", "0.3"]
    train = ["--split", "train", "--train-tokenizer", str(model), "--vocab-size", "310"]
    assert main([*command(corpus_file, *options, *train)]) == 0
    valid = [
        "--split",
        "valid",
        "--tokenizer-model",
        str(model),
        "--output-prefix",
        str(corpus_file.with_name("valid")),
    ]
    assert main(["--input", str(corpus_file), *options, *valid, "--workers", "2"]) == 0
    tokenizer = SentencePieceTokenizer(model)
    train_texts, valid_texts = (
        [tokenizer.detokenize(ids) for ids in stored(corpus_file.with_name(f"{name}_text_document"))]
        for name in ("out", "valid")
    )
    assert tokenizer.vocab_size == 310
    assert all(ids[-1] == tokenizer.eod for ids in stored(corpus_file.with_name("out_text_document")))
    assert sorted(train_texts + valid_texts) == sorted(TEXTS)
    assert 0 < len(valid_texts) < len(train_texts)
    first, second = capsys.readouterr().out.splitlines()
    assert f"out_text_document: {len(train_texts)} documents, " in first and first.endswith(" bytes per token")
    assert f"valid_text_document: {len(valid_texts)} documents, " in second


def test_command_reports_bad_input_with_code_2_and_writes_nothing(
    corpus_file: Path, tokenizer: SentencePieceTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus_file.write_text('{"text": "fine"}\n{"text": 7}\n')
    model = str(corpus_file.with_name("tokenizer.model"))
    assert main(command(corpus_file, "--train-tokenizer", model, "--vocab-size", "300")) == 2
    assert f"error: {corpus_file}:2: 'text' holds a int" in capsys.readouterr().err
    assert list(corpus_file.parent.iterdir()) == [corpus_file]


def test_command_refuses_a_place_where_it_cannot_write(corpus_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(corpus_file / "tokenizer.model")  # a file is where a folder is needed
    assert main(command(corpus_file, "--train-tokenizer", model, "--vocab-size", "310")) == 2
    assert "error: " in capsys.readouterr().err


def test_command_keeps_an_existing_tokenizer(corpus_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = corpus_file.with_name("tokenizer.model")
    model.write_bytes(b"precious")
    assert main(command(corpus_file, "--train-tokenizer", str(model), "--vocab-size", "310")) == 2
    assert "--overwrite" in capsys.readouterr().err and model.read_bytes() == b"precious"


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--tokenizer-model", "m", "--vocab-size", "300"],
        ["--train-tokenizer", "m"],
        ["--tokenizer-model", "m", "--valid-fraction", "0.1"],
        ["--tokenizer-model", "m", "--workers", "0"],
        ["--tokenizer-model", "m", "--builtin-corpus", "python-prose"],
        ["--tokenizer-model", "m", "--no-such-flag"],
        ["--tokenizer-model", "m", "--append"],
    ],
)
def test_command_refuses_arguments_that_have_no_effect(corpus_file: Path, more: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(command(corpus_file, *more))
    assert caught.value.code == 2


@pytest.mark.parametrize("more", [["--json-keys", "text"], ["--document-separator", ""], ["--input-format", "text"]])
def test_command_refuses_reading_options_for_the_builtin_corpus(more: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--builtin-corpus", "python-prose", "--tokenizer-model", "m", "--output-prefix", "p", *more])
    assert caught.value.code == 2


def test_command_refuses_a_separator_for_json_lines(corpus_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(corpus_file, "--tokenizer-model", "m", "--document-separator", "***")) == 2
    assert "--document-separator is for plain text" in capsys.readouterr().err


TRAIN = ("--train-tokenizer", "t.model", "--vocab-size", "310", "--append-eod")
SCRIPT = [sys.executable, str(CHECKOUT / "launch" / "preprocess_data.py")]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("make", [None, os.link, os.symlink], ids=["itself", "hard link", "symlink"])
@pytest.mark.parametrize("place", ["out_text_document.bin", "t.model", ".out_text_document.idx.incomplete"])
def test_command_never_overwrites_its_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, make: Callable[[str, str], None] | None, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(place if make is None else "corpus.txt").write_text("\n\f\n".join(TEXTS))
    if make is not None:
        make("corpus.txt", place)
    before = contents(tmp_path)
    arguments = ["--input-format", "text", "--output-prefix", "out", *TRAIN, "--overwrite"]
    assert main(["--input", place if make is None else "corpus.txt", *arguments]) == 2
    assert f"{place} is an input" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_command_names_no_output_twice_and_no_directory(corpus_file: Path, capsys) -> None:
    bin_file = str(corpus_file.with_name("out_text_document.bin"))
    assert main(command(corpus_file, "--train-tokenizer", bin_file, "--vocab-size", "310")) == 2
    assert "would be written twice" in capsys.readouterr().err
    Path(bin_file).mkdir()
    model = str(corpus_file.with_name("t.model"))
    assert main(command(corpus_file, "--train-tokenizer", model, "--vocab-size", "310", "--overwrite")) == 2
    assert "is a directory" in capsys.readouterr().err
    assert len(list(corpus_file.parent.iterdir())) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "after"),
    [("data.token_files._batches", 0), *(("files.lock.publish", after) for after in range(3))],
)
@pytest.mark.parametrize("more", [(), ("--overwrite",)], ids=["new", "overwrite"])
def test_command_goes_again_after_a_kill(
    corpus_file: Path, monkeypatch: pytest.MonkeyPatch, after: int, place: str, more: tuple[str, ...]
) -> None:
    """The command is killed while it tokenizes, or before its first, second or third file gets its name."""
    directory = corpus_file.parent
    monkeypatch.chdir(directory)
    argv = command(corpus_file, *TRAIN)
    if more:
        assert main([*argv[:-2], "300", "--append-eod"]) == 0  # other files, which will be replaced
    calls = []

    def die(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) > after:
            os._exit(9)
        original(*arguments)

    module, _, attribute = f"bitcpm_megatron.{place}".rpartition(".")
    original = getattr(sys.modules[module], attribute)
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(f"{module}.{attribute}", die)
        main([*argv, *more])
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.waitstatus_to_exitcode(status) == 9
    assert main([*argv, *more]) == 0
    after_kill = contents(directory)
    assert sorted(after_kill) == ["corpus.jsonl", "out_text_document.bin", "out_text_document.idx", "t.model"]
    assert main([*argv, "--overwrite"]) == 0
    assert contents(directory) == after_kill


def test_another_command_does_not_replace_what_a_killed_one_published(
    corpus_file: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(corpus_file.parent)
    finals = [(Path(name), "keep it") for name in ("t.model", "out_text_document.bin", "out_text_document.idx")]
    with PendingFiles(finals, command="one") as pending:
        for final, _ in finals:
            PendingFiles.temporary(final).write_bytes(b"precious")
        monkeypatch.setattr(FileLock, "release", lambda lock, keep: os.close(lock._file))  # like a kill
        pending.publish()
    monkeypatch.undo()
    monkeypatch.chdir(corpus_file.parent)
    assert main(command(corpus_file, *TRAIN)) == 2
    assert "t.model exists" in capsys.readouterr().err
    assert all(final.read_bytes() == b"precious" for final, _ in finals)
    with PendingFiles(finals, command="one"):
        pass


@pytest.mark.slow
def test_two_commands_do_not_write_one_output(corpus_file: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(corpus_file.parent)
    monkeypatch.setattr("bitcpm_megatron.files.lock._PATIENCE_SECONDS", 0.2)
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        with PendingFiles(outputs("out"), command="one"):
            PendingFiles.temporary(Path("out_text_document.bin")).write_bytes(b"its")
            os.write(writer, b"held")
            signal.pause()
    try:
        assert os.read(reader, 4) == b"held"
        assert main(command(corpus_file, *TRAIN)) == 2
        assert (
            f"out_text_document.bin is being written by another job ({sys.argv[0].split('/')[-1]}, process {child}"
            in (capsys.readouterr().err)
        )
        assert PendingFiles.temporary(Path("out_text_document.bin")).read_bytes() == b"its"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["reading for the tokenizer", "tokenizing"])
def test_command_that_is_asked_to_stop_leaves_nothing(tmp_path: Path, moment: str, number: int) -> None:
    def start(name: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*SCRIPT, "--input", "corpus.txt", "--output-prefix", f"{name}/out", *TRAIN, "--document-separator", ""],
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
        )

    # The corpus is so long that the command does not end before it is asked to stop.
    (tmp_path / "corpus.txt").write_text("\n\n".join(f"{n} {text}" for n in range(2000) for text in TEXTS))
    process = start("a")
    seen = ""
    while moment not in seen:
        seen += process.stderr.read(1)
    process.send_signal(number)
    _, rest = process.communicate(timeout=30)
    assert process.returncode == 1 and rest.count("error: interrupted\n") == 1 and "Traceback" not in rest, rest
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.txt"]


def test_a_fifo_is_no_input(tmp_path: Path, capsys) -> None:
    os.mkfifo(tmp_path / "corpus.jsonl")
    model = str(tmp_path / "t.model")
    assert main(command(tmp_path / "corpus.jsonl", "--train-tokenizer", model, "--vocab-size", "310")) == 2
    assert "no regular file" in capsys.readouterr().err


def test_a_size_that_no_vocabulary_has_is_refused_at_once(corpus_file: Path, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(command(corpus_file, "--train-tokenizer", "m", "--vocab-size", "2000000000"))
    assert caught.value.code == 2 and "1 to 1000000" in capsys.readouterr().err


@pytest.mark.slow
def test_command_runs_from_a_bare_checkout(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("\n\f\n".join(TEXTS))
    arguments = ["--train-tokenizer", "t.model", "--vocab-size", "310", "--append-eod"]
    script = [sys.executable, str(CHECKOUT / "launch" / "preprocess_data.py")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [*script, "--input", "book.txt", "--output-prefix", "out", *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("out_text_document: 60 documents, ") and result.stdout.count("\n") == 1
    assert "100%" in result.stderr, "progress reaches the end of the file"
    assert len(stored(tmp_path / "out_text_document")) == 60

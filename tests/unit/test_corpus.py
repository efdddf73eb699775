# SPDX-License-Identifier: Apache-2.0
"""Readers, the .bin/.idx writer, the built-in corpus, the split and the preprocess_data command."""

import gzip
import json
import os
import pickle
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bitcpm_megatron.launch.preprocess_data import main
from bitcpm_megatron.training.corpus import document_split, python_prose, read_documents, write_corpus
from bitcpm_megatron.training.tokenizer import NullTokenizer, SentencePieceTokenizer, train_sentencepiece

pytest.importorskip("megatron.core")
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder  # noqa: E402
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset  # noqa: E402
from megatron.core.datasets.indexed_dataset import IndexedDataset  # noqa: E402

CHECKOUT = Path(__file__).resolve().parents[2]
TEXTS = [f"Document {n}.\n\nIt has {n} parts, “quotes”, and\ta tab.\n    三值 weights: -1, 0, 1." for n in range(60)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    return train_sentencepiece(TEXTS, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", 320)


@pytest.fixture
def corpus_file(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text, "id": n}) + "\n" for n, text in enumerate(TEXTS)))
    return path


def read(path: Path, **options: object) -> list[str]:
    return [document["text"] for document in read_documents([path], **options)]


def stored(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(str(prefix))
    return [dataset[n].tolist() for n in range(len(dataset))]


# ----------------------------------------------------------------------------------------------- reading


def test_json_lines_take_the_named_keys(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"title": "A", "text": "first\\nline", "n": 1}\n\n{"text": "", "title": "B"}')
    assert list(read_documents([path], keys=["title", "text"])) == [
        {"title": "A", "text": "first\nline"},
        {"title": "B", "text": ""},
    ]


def test_gzip_holds_the_same_documents_and_progress_counts_stored_bytes(tmp_path: Path, corpus_file: Path) -> None:
    packed = tmp_path / "corpus.jsonl.gz"
    packed.write_bytes(gzip.compress(corpus_file.read_bytes()))
    for path in (corpus_file, packed):
        counts: list[int] = []
        assert read(path, on_read=counts.append) == TEXTS
        assert sum(counts) == path.stat().st_size


def test_a_text_file_is_one_document_whatever_its_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes("\ufeff\nChapter 1\r\n\r\n\r\n  It was a dark\fnight.\n\n".encode())
    assert read(path) == ["Chapter 1\n\n\n  It was a dark\fnight."]


@pytest.mark.parametrize(
    ("separator", "line"),
    [("\f", "\f"), ("<|endoftext|>", "<|endoftext|>"), ("<|endoftext|>", "  <|endoftext|>\r"), ("", "")],
)
def test_separator_lines_split_a_text_file(tmp_path: Path, separator: str, line: str) -> None:
    path = tmp_path / "stories.txt"
    path.write_bytes(f"{line}\none\ntwo <|endoftext|> not a line\n{line}\n{line}\nthree\n{line}\n".encode())
    assert read(path, separator=separator) == ["one\ntwo <|endoftext|> not a line", "three"]


def test_the_suffix_tells_the_format_and_the_flag_overrides_it(tmp_path: Path) -> None:
    for name, option, expected in [
        ("a.TXT.GZ", "auto", ['{"text": "x"}']),
        ("a.v2.jsonl", "auto", ["x"]),
        ("part-000", "jsonl", ["x"]),
        ("a.jsonl", "text", ['{"text": "x"}']),
    ]:
        path = tmp_path / name
        content = b'{"text": "x"}'
        path.write_bytes(gzip.compress(content) if name.endswith("GZ") else content)
        assert read(path, input_format=option) == expected
    with pytest.raises(ValueError, match="part-000: the suffix '' does not tell.*--input-format"):
        read(tmp_path / "part-000")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', r"bad\.jsonl:3: not valid JSON .*--input-format text"),
        ('["text"]', r"bad\.jsonl:3: a JSON list; every line must be one JSON object"),
        ('{"content": "x", "id": 1}', r"bad\.jsonl:3: no key 'text', the object has 'content', 'id'.*--json-keys"),
        ('{"text": ["x"]}', r"bad\.jsonl:3: 'text' holds a list, not a string"),
        ('{"text": "\\ud83d"}', r"bad\.jsonl:3: 'text' holds half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_named_with_a_cure(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n")
    documents = read_documents([path])
    assert next(documents) == {"text": "good"}
    with pytest.raises(ValueError, match=message):
        next(documents)


def test_bytes_that_are_no_utf8_are_named(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("first\ncaf\xe9\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt:2: not UTF-8 .*iconv"):
        read(path)


def test_a_truncated_archive_is_an_error(tmp_path: Path, corpus_file: Path) -> None:
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(gzip.compress(corpus_file.read_bytes())[:-200])
    with pytest.raises(ValueError, match=r"cut\.jsonl\.gz: reading stopped after line \d+"):
        read(path)


def test_what_is_no_readable_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(ValueError, match="folder.txt: a directory"):
        read(tmp_path / "folder.txt")
    with pytest.raises(ValueError, match="absent.txt: No such file"):
        read(tmp_path / "absent.txt")


def test_keys_of_plain_text_and_unknown_formats_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="plain text has no keys"):
        read(tmp_path / "a.txt", keys=["content"])
    with pytest.raises(ValueError, match="unknown input format 'csv'"):
        read(tmp_path / "a.txt", input_format="csv")


def test_a_text_without_separators_that_fills_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitcpm_megatron.training.corpus._MAX_TEXT_CHARACTERS", 100)
    path = tmp_path / "dump.txt"
    path.write_text("short\n\f\n" + "a line of text\n" * 50)
    with pytest.raises(ValueError, match=r"dump\.txt:3: .*longer than 100 characters.*--document-separator"):
        read(path)


# ----------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("append_eod", [True, False])
def test_text_survives_the_way_to_disk(tmp_path: Path, tokenizer: SentencePieceTokenizer, append_eod: bool) -> None:
    prefix = tmp_path / "new folder" / "corpus.v2"
    summary = write_corpus(({"text": text} for text in TEXTS), prefix, tokenizer, append_eod=append_eod)["text"]
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
    write_corpus([{"text": TEXTS[0]}, {"text": TEXTS[1]}], tmp_path / "small", tokenizer)
    small = IndexedDataset(str(tmp_path / "small_text_document"))
    assert small.document_indices.tolist() == [0, 1, 2]
    assert small.index.dtype == np.uint16

    class Wide:  # real models of this size are megabytes
        vocab_size, eod = 70_000, 69_999

        def tokenize_batch(self, texts: list[str], threads: int = 1) -> list[list[int]]:
            return [[69_998]] * len(texts)

    write_corpus([{"text": "x"}], tmp_path / "wide", Wide())
    assert stored(tmp_path / "wide_text_document") == [[69_998, 69_999]]


def test_every_key_gets_its_own_files_and_empty_texts_are_skipped(
    tmp_path: Path, tokenizer: SentencePieceTokenizer
) -> None:
    documents = [{"q": "Document 1", "a": " \n"}, {"q": "Document 2", "a": "weights"}]
    summaries = write_corpus(documents, tmp_path / "qa", tokenizer, keys=["q", "a"], append_eod=False)
    assert [tokenizer.detokenize(ids) for ids in stored(tmp_path / "qa_q_document")] == ["Document 1", "Document 2"]
    assert [tokenizer.detokenize(ids) for ids in stored(tmp_path / "qa_a_document")] == ["weights"]
    assert (summaries["q"].empty_documents, summaries["a"].empty_documents) == (0, 1)
    assert "1 empty documents skipped" in str(summaries["a"])


def test_batches_keep_order_and_threads_do_not_matter(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitcpm_megatron.training.corpus._BATCH_DOCUMENTS", 7)
    write_corpus(({"text": text} for text in TEXTS), tmp_path / "corpus", tokenizer, append_eod=False, threads=2)
    assert [tokenizer.detokenize(ids) for ids in stored(tmp_path / "corpus_text_document")] == TEXTS


@pytest.mark.parametrize("texts", [[], ["", " \n\t"]])
def test_nothing_to_write_is_an_error_without_output(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, texts: list[str]
) -> None:
    with pytest.raises(ValueError, match="nothing was written"):
        write_corpus([{"text": text} for text in texts], tmp_path / "corpus", tokenizer)
    assert not list(tmp_path.iterdir())


def test_an_error_half_way_leaves_nothing(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    def documents() -> Iterator[dict[str, str]]:
        yield from ({"text": text} for text in TEXTS * 20)  # more than a batch, so that tokens are on disk
        raise ValueError("corpus.jsonl:1201: not valid JSON")

    with pytest.raises(ValueError, match="1201"):
        write_corpus(documents(), tmp_path / "corpus", tokenizer)
    assert not list(tmp_path.iterdir())


def test_a_kill_half_way_leaves_no_output(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    script = """
import os, pickle, signal, sys
from bitcpm_megatron.training.corpus import write_corpus
def documents():
    yield from ({"text": f"document {n}"} for n in range(1500))
    os.kill(os.getpid(), signal.SIGKILL)
write_corpus(documents(), sys.argv[1], pickle.load(open(sys.argv[2], "rb")))
"""
    (tmp_path / "tokenizer.pickle").write_bytes(pickle.dumps(tokenizer))
    output = tmp_path / "output"
    command = [sys.executable, "-c", script, str(output / "corpus"), str(tmp_path / "tokenizer.pickle")]
    result = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(CHECKOUT)})
    assert result.returncode == -signal.SIGKILL
    names = sorted(path.name for path in output.iterdir())
    assert names and all(".tmp-" in name for name in names), "the kill must come while files are open"


def test_existing_output_is_kept_unless_overwritten(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    prefix = tmp_path / "corpus_text_document"
    write_corpus([{"text": "Document 1"}], tmp_path / "corpus", tokenizer, append_eod=False)
    with pytest.raises(ValueError, match="corpus_text_document.bin exists.*--overwrite"):
        write_corpus([{"text": "Document 2"}], tmp_path / "corpus", tokenizer, append_eod=False)
    assert tokenizer.detokenize(stored(prefix)[0]) == "Document 1"
    write_corpus([{"text": "Document 2"}], tmp_path / "corpus", tokenizer, append_eod=False, overwrite=True)
    assert tokenizer.detokenize(stored(prefix)[0]) == "Document 2"
    assert [path.name for path in tmp_path.iterdir() if ".tmp-" in path.name] == []


# --------------------------------------------------------------------------- what megatron-core makes of it


def build(kind: type[GPTDataset], tokenizer: object, prefix: Path | None) -> GPTDataset:
    """Build 40 training samples as Megatron-LM does; torch.distributed is not initialised."""
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
    write_corpus(({"text": text} for text in TEXTS), tmp_path / "corpus", tokenizer)
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
    write_corpus([{"text": text} for text in TEXTS], tmp_path / "corpus", tokenizer)
    build(GPTDataset, tokenizer, prefix)
    cache = prefix / "cache" / "GPTDataset_indices"
    first = set(cache.iterdir())
    build(GPTDataset, tokenizer, prefix)
    assert set(cache.iterdir()) == first
    build(GPTDataset, train_sentencepiece(TEXTS, tmp_path / "other.model", 310), prefix)
    assert set(cache.iterdir()) > first
    write_corpus([{"text": text} for text in TEXTS[:50]], tmp_path / "corpus", tokenizer, overwrite=True)
    assert set(build(GPTDataset, tokenizer, prefix).document_index) == set(range(50))


def test_mock_dataset_takes_the_null_tokenizer() -> None:
    dataset = build(MockGPTDataset, NullTokenizer(127), None)
    tokens = np.concatenate([dataset[n]["tokens"] for n in range(40)])
    assert tokens.min() == 0 and tokens.max() == 127


# --------------------------------------------------------------------------------- the split and the prose


def test_the_split_is_fixed_for_good() -> None:
    """These sides are a promise: a change would put validation documents of old runs into new training data."""
    sides = [document_split(f"document {n}", 0.25) for n in range(16)]
    assert "".join(side[0] for side in sides) == "tttttttttttvtttv"
    rewrapped = [document_split(f" document\n\t{n} ", 0.25) for n in range(16)]
    assert rewrapped == sides, "line breaks must not move a document"


def test_the_split_takes_about_the_fraction_and_grows_with_it() -> None:
    small, large = (
        {n for n in range(4000) if document_split(f"text {n}", fraction) == "valid"} for fraction in (0.05, 0.2)
    )
    assert small < large
    assert 0.04 < len(small) / 4000 < 0.06 and 0.18 < len(large) / 4000 < 0.22
    assert document_split("x", 0.0) == "train" and document_split("x", 1.0) == "valid"
    with pytest.raises(ValueError, match="between 0 and 1"):
        document_split("x", 5)


LONG = "This paragraph tells in plain words, and at some length, what the function next to it does. " * 3


FIRST_REST = f"""
    Use:
    >>> f(1)
    2

    rule ::= "x"

    Heading
    =======

    {"| 1 -> 2 " * 20}
"""


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small standard library; its sources raise when they are imported."""
    monkeypatch.setattr(
        "bitcpm_megatron.training.corpus._pydoc_topics",
        lambda: {"b": f"Topic.b {LONG}", "a": f"Topic.a {LONG}", "0": "Short."},
    )
    sources = {
        "z.py": f'raise SystemExit\ndef f():\n    """Second. {LONG}"""\nclass C:\n    """Third. {LONG}"""\n',
        "a.py": f'"""First. {LONG}\n\n{FIRST_REST}"""\n',
        "m.py": "".join(f"    # {line}\n" for line in ("Comment.", *LONG.split(", "))) + "#\nx = 1 # not whole\n",
        "copy.py": f'"""First. {LONG}"""\n',
        "broken.py": f'"""Broken. {LONG}"""\nprint "python 2"\n',
        "test/t.py": f'"""Test. {LONG}"""\n',
        "pkg/tests/t.py": f'"""Tests. {LONG}"""\n',
        "site-packages/s.py": f'"""Site. {LONG}"""\n',
    }
    for name, source in sources.items():
        path = tmp_path / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return tmp_path / "lib"


def test_prose_comes_in_order_without_code_tests_and_copies(library: Path) -> None:
    documents = list(python_prose(library))
    assert [document.split()[0] for document in documents] == [
        "Topic.a",
        "Topic.b",
        "First.",
        "Comment.",
        "Second.",
        "Third.",
    ]
    assert documents[2] == f"First. {LONG.strip()}\n\nUse:\n\nHeading"
    assert documents[3].startswith("Comment.\nThis paragraph") and "not whole" not in documents[3]


def test_no_paragraph_of_the_real_texts_stands_on_both_sides() -> None:
    """pydoc's topics contain one another; one package stands for the library, which takes seconds to parse."""
    documents = list(python_prose(Path(sysconfig.get_path("stdlib"), "email")))
    assert sum(map(len, documents)) > 300_000
    assert min(map(len, documents)) >= 200
    sides: dict[str, set[str]] = {"train": set(), "valid": set()}
    for document in documents:
        paragraphs = (" ".join(paragraph.split()) for paragraph in document.split("\n\n"))
        sides[document_split(document)].update(words for words in paragraphs if len(words) >= 60)
    assert sides["train"] and sides["valid"]
    assert not sides["train"] & sides["valid"]


def test_a_python_without_the_texts_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no Python sources of the standard library"):
        list(python_prose(tmp_path))
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ValueError, match="has no pydoc_data.topics"):
        list(python_prose())


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


def test_command_fails_with_code_1_where_it_cannot_write(corpus_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(corpus_file / "tokenizer.model")  # a file where a folder must be
    assert main(command(corpus_file, "--train-tokenizer", model, "--vocab-size", "310")) == 1
    assert "failed: " in capsys.readouterr().err


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

# SPDX-License-Identifier: Apache-2.0
"""Cases of bad token files, splits, corpora, chat templates and tokenizers."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from .. import damage
from ..commands import COMMANDS
from ..damage import damaging
from .case import Case, Prepare


def data(world: Path) -> Iterator[Case]:
    """Yields cases of bad token files, splits, corpora, chat templates and tokenizers."""
    train = COMMANDS["pretrain"].good
    prefix = "data/corpus_text_document"
    for command, argv in (("pretrain", train), ("preflight", ("job.yaml",))):
        for suffix in (".bin", ".idx"):
            for way, function in damage.FILE_DAMAGE.items():
                yield Case(
                    "data",
                    f"{command} {suffix}: {way}",
                    command,
                    argv,
                    prepare=damaging(prefix + suffix, function),
                    says=(f"corpus_text_document{suffix}", "corpus_text_document"),
                    status=(2, 3),
                )
        for offset, what in (
            (0, "magic"),
            (9, "version"),
            (17, "dtype"),
            (18, "count"),
            (26, "documents"),
            (34, "lengths"),
        ):
            yield Case(
                "data",
                f"{command} .idx: {what}",
                command,
                argv,
                prepare=_overwrite_bytes(prefix + ".idx", offset),
                says=("corpus_text_document",),
                status=(2, 3),
            )
    yield Case(
        "data",
        "pretrain tokens beyond the vocabulary",
        "pretrain",
        train,
        prepare=_fill(prefix + ".bin"),
        says=("corpus_text_document", "vocabulary"),
    )
    for split in (
        "",
        "a,b,c",
        "1,2,3,4,5",
        "-1,1,1",
        "nan,1,1",
        "0,0,0",
        "inf,0,0",
        "0,100,0",
        "100,0,0",
        "99.9,0.1,0",
    ):
        yield Case(
            "data",
            f"pretrain --split={split}",
            "pretrain",
            (*train, f"--split={split}"),
            says=("split",),
            accepts=split == "99.9,0.1,0",
        )
    yield Case(
        "data",
        "pretrain default split of few documents",
        "pretrain",
        (*train, "--split=969,30,1"),
        prepare=_few,
        says=("split",),
        accepts=True,
    )
    for path in (
        "nowhere/x",
        "data",
        "0.5",
        "0.5 data/corpus_text_document 0.5",
        "nan data/corpus_text_document 1 data/corpus_text_document",
        "-1 data/corpus_text_document 2 data/corpus_text_document",
    ):
        yield Case(
            "data",
            f"pretrain --data-path {path}",
            "pretrain",
            (*train, "--data-path", *path.split()),
            says=("data", "weight", path.split()[0]),
        )
    yield from _lines(
        "preprocess_data",
        "--tokenizer-model tokenizer.model --append-eod --output-prefix out/c --input x.jsonl",
        ("x.jsonl", "documents"),
        {
            "no key": '{"txt": "a"}\n',
            "a number": '{"text": 3}\n',
            "a list": "[1]\n",
            "half a line": '{"text": "a\n',
            "nested": '{"text": ' + "[" * 100_000 + "\n",
            "nothing": "",
            "white space": '{"text": "  "}\n',
            "half a surrogate": '{"text": "\\ud800"}\n',
            "latin": '{"text": "\xe9"}\n',
            "a word": "word\n",
        },
    )
    talks = "--input x.jsonl --tokenizer-model chat --seq-length 900 --output-prefix out/c"
    yield from _lines(
        "preprocess_sft",
        talks,
        ("x.jsonl:1", "no conversations"),
        {
            "no messages": '{"text": "a"}\n',
            "no message": '{"messages": []}\n',
            "a stranger": '{"messages": [{"role": "bot", "content": "a"}]}\n',
            "no answer": '{"messages": [{"role": "user", "content": "a"}]}\n',
            "an answer of nothing": '{"instruction": "a", "output": " "}\n',
            "nested": '{"messages": ' + "[" * 100_000 + "\n",
            "half a surrogate": '{"instruction": "a", "output": "\\ud800"}\n',
            "latin": '{"instruction": "\xe9", "output": "a"}\n',
            "nothing": "",
        },
    )
    for what, template in {
        "an endless text": "{{ 'a' * 10 ** 12 }}",
        "no answers": "{{ messages[0].content }}",
        "half a block": "{% for m in messages %}",
        "code": "{{ ''.__class__.__base__.__subclasses__() }}",
        "a file": "{% include 'talks.jsonl' %}",
        "deep": "{{ " + "(" * 100_000 + " }}",
    }.items():
        yield Case(
            "data",
            f"preprocess_sft with a template of {what}",
            "preprocess_sft",
            (*COMMANDS["preprocess_sft"].good, "--chat-template", "x.jinja"),
            prepare=_latin("x.jinja", template),
            says=("x.jinja", "talks.jsonl:1"),
            status=(1, 2),
        )
    for name, content in (("x.txt.gz", b"no gzip"), ("x.unknown", b"text"), ("x.txt", b"\xff\xfe")):
        argv = tuple(f"--tokenizer-model tokenizer.model --append-eod --output-prefix out/c --input {name}".split())
        yield Case(
            "data", f"preprocess_data {name}", "preprocess_data", argv, prepare=_bytes(name, content), says=(name,)
        )
    size = tuple(
        "--input corpus.jsonl --train-tokenizer new.model --append-eod --output-prefix out/c --vocab-size".split()
    )
    for text in ("1", "5", "1000000", "2000000000"):
        yield Case(
            "data",
            f"preprocess_data --vocab-size {text}",
            "preprocess_data",
            (*size, text),
            says=("vocab", "--vocab-size"),
        )
    # The tokenizer does not fit the model of a run, or of a converted checkpoint, which names no tokenizer.
    for root, pieces in (("run", 290), ("run", 301), ("start", 288), ("start", 301)):
        yield Case(
            "data",
            f"generate {root} with a tokenizer of {pieces} pieces",
            "generate",
            tuple(f"{root} --prompt fox --num-tokens 2 --tokenizer-model other.model".split()),
            prepare=_tokenizer(pieces),
            says=("tokenizer other.model", "another tokenizer than other.model"),
            accepts=(root, pieces) == ("start", 288),  # fits into the padding of the converted vocabulary
        )


def _lines(command: str, flags: str, says: tuple[str, ...], texts: dict[str, str]) -> Iterator[Case]:
    """Yields cases of input files with lines that are not documents of a command."""
    for what, text in texts.items():
        prepare = _latin("x.jsonl", text)
        yield Case("data", f"{command} {what}", command, tuple(flags.split()), prepare=prepare, says=says)


def _tokenizer(pieces: int) -> Prepare:
    def prepare(root: Path) -> None:
        from bitcpm_megatron.data.tokenizers import train_sentencepiece

        texts = [json.loads(line)["text"] for line in (root / "corpus.jsonl").read_text().splitlines()]
        (root / "other.model").write_bytes(train_sentencepiece(iter(texts), pieces))

    return prepare


def _few(root: Path) -> None:
    """Replaces the sixty documents of the token files with the first three."""
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    prefix = root / "data" / "corpus_text_document"
    # The documents are copied, because access to a memory map that has been closed would crash this process.
    source = IndexedDataset(str(prefix))
    documents = [np.array(source[i]) for i in range(3)]
    del source
    for path in (root / "data").glob("*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=documents[0].dtype.type)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")


def _overwrite_bytes(name: str, offset: int) -> Prepare:
    def prepare(root: Path) -> None:
        content = bytearray((root / name).read_bytes())
        content[offset : offset + 8] = b"\xfe" * len(content[offset : offset + 8])
        (root / name).write_bytes(content)

    return prepare


def _fill(name: str) -> Prepare:
    return lambda root: (root / name).write_bytes(b"\xff\xfe" * ((root / name).stat().st_size // 2)) and None


def _latin(name: str, text: str) -> Prepare:
    return lambda root: (root / name).write_bytes(text.encode("latin-1")) and None


def _bytes(name: str, content: bytes) -> Prepare:
    return lambda root: (root / name).write_bytes(content) and None

# SPDX-License-Identifier: Apache-2.0
"""Preflight: are the token files and the tokenizer there, whole, and of the vocabulary that the model has?"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ...data.blends import blend_of, split_bounds
from ..launcher.job import BUILT_IN
from .finding import Finding, failed, judged, passed, warned
from .subject import Subject

if TYPE_CHECKING:
    from ...data.token_headers import TokenFile

# Of the files' readers. A login node may have none of them.
_READ_BY = ("numpy", "xxhash", "sentencepiece")
_KEYS = ("data-path", "train-data-path", "valid-data-path")
_EPOCHS = 4


def check(subject: Subject) -> Iterator[Finding]:
    """All checks of this module."""
    flags = subject.job.flags
    given = [key for key in ("data-path", "train-data-path") if key in flags] + ["mock-data"] * bool(
        flags.get("mock-data")
    )
    if len(given) != 1:
        what = f"data comes from {' and '.join(given) or 'nowhere'}"
        yield failed("data-source", what, "give one of data-path, train-data-path, mock-data")
        return
    if given == ["mock-data"]:
        what = "synthetic tokens"
        if "vocab-size" not in flags:
            yield failed("data-source", what, "mock-data needs data.vocab-size")
        else:
            yield passed("data-source", what)
        return
    missing = [name for name in _READ_BY if importlib.util.find_spec(name) is None]
    if missing:
        what = f"without {', '.join(missing)} neither token files nor tokenizer can be read here"
        yield warned("data-files", what, "run the preflight on a node of the job, too")
        return
    files: list[TokenFile] = []
    for key in _KEYS:
        if key in flags:
            yield from _files(key, list(map(str, flags[key])), files)
    yield from _split(subject, files)
    yield from _vocabulary(subject, files)
    yield from _amount(subject, files)


def _files(key: str, paths: list[str], files: "list[TokenFile]") -> Iterator[Finding]:
    from ...data.token_headers import TokenFileError, read_token_file

    try:
        prefixes = blend_of(paths)[0]
    except ValueError as error:
        yield failed(key, str(error), "PREFIX, or WEIGHT PREFIX WEIGHT PREFIX ...")
        return
    for prefix in prefixes:
        try:
            found = read_token_file(prefix)
        except (TokenFileError, OSError) as error:
            yield failed(key, str(error), "launch/preprocess_data.py writes such a pair; is the storage mounted here?")
            continue
        if mistake := found.mistake():
            yield failed(key, *mistake.rsplit(": ", 1))
            continue
        files.append(found)
        yield passed(key, f"{prefix}: {found.tokens:,} tokens ({found.dtype}) in {found.documents:,} documents")


def _split(subject: Subject, files: "list[TokenFile]") -> list[Finding]:
    from ...data.token_headers import split_mistake

    flags, text = subject.job.flags, str(subject.args.split)
    if "data-path" not in flags:
        return []
    try:
        parts = dict(zip(("training", "validation", "test"), split_bounds(text), strict=True))
        needed = {"training"} | ({"validation"} if subject.args.eval_iters else set())
        if subject.job.host.kind != BUILT_IN:
            # Megatron-LM builds every part that has a share, and counts epochs for ever where it has no document.
            needed |= {name for name, part in parts.items() if part is not None}
        prefixes, weights = blend_of(list(map(str, flags["data-path"])))
        if len(files) != len(prefixes):
            return []  # and what is wrong with the others is said
        mistake = split_mistake(files, text, needed, subject.layout.sequence, weights is not None)
    except ValueError as error:
        mistake = str(error)
    return [passed("split", text)] if mistake is None else [failed("split", *mistake.rsplit(": ", 1))]


def _vocabulary(subject: Subject, files: "list[TokenFile]") -> Iterator[Finding]:
    from ...data.tokenizer import SentencePieceTokenizer

    size = subject.layout.vocab_size
    model = subject.job.flags.get("tokenizer-model")
    kind = str(subject.job.host.flags.get("tokenizer-type", ""))
    if model is None:
        if subject.job.host.kind == BUILT_IN or not kind or "SentencePiece" in kind or kind == "Llama2Tokenizer":
            yield failed("tokenizer", "none is named", "give data.tokenizer-model")
        else:
            yield warned("tokenizer", f"{kind} names no file", "make sure that every node has it")
    elif not Path(model).exists():
        yield failed("tokenizer", f"{model} is not there", "is the storage mounted here?")
    elif Path(model).is_file() and (subject.job.host.kind == BUILT_IN or str(model).endswith(".model")):
        try:
            pieces = SentencePieceTokenizer(model).vocab_size
        except ValueError as error:
            yield failed("tokenizer", str(error), "give the .model file that the data was written with")
        else:
            if size is not None and pieces > size:
                what = f"{model} has {pieces} pieces, the model's vocabulary {size}"
                yield failed("tokenizer", what, "raise data.vocab-size, or take the preset's tokenizer")
            else:
                yield passed("tokenizer", f"{model}: {pieces} pieces")
    else:
        yield passed("tokenizer", f"{model} is there, its size was not read")
    if size is None or not files:
        return
    found = [
        (f"{f.prefix} holds token {f.largest}, the vocabulary ends at {size - 1}", "another tokenizer wrote this data")
        for f in files
        if f.largest >= size
    ]
    narrow = [f for f in files if f.dtype in ("uint8", "int8", "int16") or (f.dtype == "uint16" and size > 65536)]
    found += [
        (f"{f.prefix} holds {f.dtype} tokens, too narrow for a vocabulary of {size}", "write it again")
        for f in narrow
        if size > {"uint8": 256, "int8": 128, "int16": 32768, "uint16": 65536}[f.dtype]
    ]
    looked = sum(f.looked_at for f in files)
    yield from judged("token-range", f"the largest of {looked:,} tokens is {max(f.largest for f in files)}", found)


def _amount(subject: Subject, files: "list[TokenFile]") -> list[Finding]:
    x, args = subject.layout, subject.args
    batch = args.global_batch_size or x.micro_batch * x.dp
    wanted = args.train_iters * batch * x.sequence
    have = sum(f.tokens for f in files)
    if not have:
        return []
    said = (
        f"{wanted / 1e9:,.2f} billion tokens to train on, {have / 1e9:,.2f} billion there: {wanted / have:.2f} epochs"
    )
    if have < x.sequence + 1:
        return [failed("data-amount", said, "not one sample: give more text, or a shorter --seq-length")]
    if wanted > _EPOCHS * have:
        return [warned("data-amount", said, f"above {_EPOCHS} epochs repeated text teaches little")]
    return [passed("data-amount", said)]

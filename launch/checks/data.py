# SPDX-License-Identifier: Apache-2.0
"""Preflight checks of the data: whether the token files exist, are complete, fit the model's vocabulary and suffice."""

import functools
import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ...data.blends import blend_of, split_bounds
from ..launcher.job import BUILT_IN
from . import tokenizer
from .subject import Finding, Subject, failed, passed, warned

if TYPE_CHECKING:
    from ...data.token_headers import TokenFile

# Packages that the readers of the files import. A login node may have none of them.
_READ_BY = ("numpy", "xxhash", "sentencepiece", "tokenizers")
_KEYS = ("data-path", "train-data-path", "valid-data-path")
_EPOCHS = 4
# Number of token ids that each of the narrow dtypes can hold.
_IDS = {"uint8": 256, "int8": 128, "int16": 32768, "uint16": 65536}


def check(subject: Subject) -> list[Finding]:
    """Returns the findings of all checks of this module."""
    flags = subject.job.flags
    given = [key for key in ("data-path", "train-data-path", "mock-data") if flags.get(key)]
    if len(given) != 1:
        what = f"data comes from {' and '.join(given) or 'nowhere'}"
        return [failed("data-source", what, "give one of data-path, train-data-path, mock-data")]
    if given == ["mock-data"]:
        if "vocab-size" not in flags:
            return [failed("data-source", "synthetic tokens", "mock-data needs data.vocab-size")]
        return [passed("data-source", "synthetic tokens")]
    missing = [name for name in _READ_BY if importlib.util.find_spec(name) is None]
    if missing:
        what = f"without {', '.join(missing)} neither token files nor tokenizer can be read here"
        return [warned("data-files", what, "run the preflight on a node of the job, too")]
    files: list[TokenFile] = []
    found = [finding for key in _KEYS if key in flags for finding in _files(subject, key, files)]
    found += [*_split(subject, files), *tokenizer.check(subject, files)]
    return [*found, *_tokens(subject, files), *_amount(subject, files)]


def _files(subject: Subject, key: str, files: "list[TokenFile]") -> Iterator[Finding]:
    from ...data.sft_files import read_samples
    from ...data.token_headers import read_token_file

    paths, command, read = list(map(str, subject.job.flags[key])), "preprocess_data.py", read_token_file
    if subject.args.sft:
        command, read = "preprocess_sft.py", functools.partial(read_samples, subject.layout.sequence)
    try:
        prefixes = blend_of(paths)[0]
    except ValueError as error:
        yield failed(key, str(error), "PREFIX, or WEIGHT PREFIX WEIGHT PREFIX ...")
        return
    for prefix in prefixes:
        try:
            found = read(prefix)
        except (ValueError, OSError) as error:
            yield failed(key, str(error), f"launch/{command} writes such files; is the storage mounted here?")
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
            # Megatron-LM builds every part that has a share, and counts epochs forever if the part has no document.
            needed |= {name for name, part in parts.items() if part is not None}
        prefixes, weights = blend_of(list(map(str, flags["data-path"])))
        if len(files) != len(prefixes):
            return []  # the other files have findings of their own
        length = 0 if subject.args.sft else subject.layout.sequence
        mistake = split_mistake(files, text, needed, length, weights is not None)
    except ValueError as error:
        mistake = str(error)
    return [passed("split", text)] if mistake is None else [failed("split", *mistake.rsplit(": ", 1))]


def _tokens(subject: Subject, files: "list[TokenFile]") -> list[Finding]:
    size = subject.layout.vocab_size
    if size is None or not files:
        return []
    found = [failed("token-range", *mistake.rsplit(": ", 1)) for f in files if (mistake := f.mistake(size))]
    for f in files:
        if size > _IDS.get(f.dtype, size):
            what = f"{f.prefix} holds {f.dtype} tokens, too narrow for a vocabulary of {size}"
            found.append(failed("token-range", what, "write it again"))
    looked, largest = sum(f.looked_at for f in files), max(f.largest for f in files)
    return found or [passed("token-range", f"the largest of {looked:,} tokens is {largest}")]


def _amount(subject: Subject, files: "list[TokenFile]") -> list[Finding]:
    x, args = subject.layout, subject.args
    batch = args.global_batch_size or x.micro_batch * x.dp
    wanted = args.train_iters * batch * x.sequence
    have = sum(f.tokens for f in files)
    if not have:
        return []
    if args.sft:
        samples = sum(f.sequences for f in files)
        epochs = args.train_iters * batch / samples
        return [passed("data-amount", f"{samples:,} samples of conversations, {epochs:.2f} epochs of them")]
    said = (
        f"{wanted / 1e9:,.2f} billion tokens to train on, {have / 1e9:,.2f} billion there: {wanted / have:.2f} epochs"
    )
    if have < x.sequence + 1:
        return [failed("data-amount", said, "not one sample: give more text, or a shorter --seq-length")]
    if wanted > _EPOCHS * have:
        return [warned("data-amount", said, f"above {_EPOCHS} epochs repeated text teaches little")]
    return [passed("data-amount", said)]

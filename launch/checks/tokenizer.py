# SPDX-License-Identifier: Apache-2.0
"""Preflight checks of the tokenizer: whether it exists and fits the model, the token files and the checkpoint."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...checkpoints.directory import CheckpointError, check_ends, kept_tokenizer, saved_arguments
from ...data.vocabulary import HUGGING_FACE, TOKENIZER_TYPES
from ...training.mistakes import AT_ENDS
from ..launcher.job import BUILT_IN
from .subject import Finding, Subject, failed, passed, warned

if TYPE_CHECKING:
    from ...data.token_headers import TokenFile
    from ...data.tokenizers import Tokenizer


def check(subject: Subject, files: "Sequence[TokenFile]") -> Iterator[Finding]:
    """Yields the findings of all checks of this module, for the token files that could be read."""
    from ...data.tokenizers import open_tokenizer

    ours, size = subject.job.host.kind == BUILT_IN, subject.layout.vocab_size
    try:
        model, kind = named(subject)
    except CheckpointError as error:
        yield failed("tokenizer", str(error), "give data.tokenizer-model")
        return
    if model is None:
        if ours or not kind or "SentencePiece" in kind or kind == "Llama2Tokenizer":
            yield failed("tokenizer", "none is named", "give data.tokenizer-model")
        else:
            yield warned("tokenizer", f"{kind} names no file", "make sure that every node has it")
        return
    if not Path(model).exists():
        yield failed("tokenizer", f"{model} is not there", "is the storage mounted here?")
        return
    if not (ours or model.endswith(".model") or kind == HUGGING_FACE):
        yield passed("tokenizer", f"{model} is there, its size was not read")
        return
    try:
        tokenizer = open_tokenizer(model, kind if kind in TOKENIZER_TYPES else None)
    except ValueError as error:
        yield failed("tokenizer", str(error), "give the tokenizer that the data was written with")
        return
    pieces = tokenizer.vocab_size
    if size is not None and pieces > size:
        what = f"{model} has {pieces} pieces, the model's vocabulary {size}"
        yield failed("tokenizer", what, "raise data.vocab-size, or take the preset's tokenizer")
    else:
        yield passed("tokenizer", f"{model}: {pieces} pieces")
    yield from _of_the_files(subject, files, tokenizer)
    yield from _of_the_checkpoint(subject, model, tokenizer)


def named(subject: Subject) -> tuple[str | None, str]:
    """Returns the path (None if unknown) and the type (empty if unknown) of the tokenizer that the job will use."""
    model = subject.job.flags.get("tokenizer-model")
    kind = str({**subject.job.flags, **subject.job.host.flags}.get("tokenizer-type", ""))
    if model is None and subject.job.host.kind == BUILT_IN and (checkpoint := subject.checkpoint()) is not None:
        # A run takes the tokenizer kept in the checkpoint, or the path that one of its own checkpoints records.
        model, kind = kept_tokenizer(checkpoint) or saved_arguments(checkpoint).get("tokenizer_model"), ""
    return None if model is None else str(model), kind


def _of_the_files(subject: Subject, files: "Sequence[TokenFile]", tokenizer: "Tokenizer") -> Iterator[Finding]:
    """Checks that documents end with the token that separates them, if the job needs their ends."""
    asked = [f"--{name.replace('_', '-')}" for name in AT_ENDS if getattr(subject.args, name)]
    if not asked or not files:
        return
    wrong = [file.prefix for file in files if not file.ends_with(tokenizer.eod)]
    if wrong:
        what = f"documents of {', '.join(wrong)} do not end with token {tokenizer.eod}, for {asked[0]}"
        yield failed("document-ends", what, "tokenize the text with --append-eod, and with this tokenizer")
    else:
        yield passed("document-ends", f"documents end with token {tokenizer.eod}")


def _of_the_checkpoint(subject: Subject, model: str, tokenizer: "Tokenizer") -> Iterator[Finding]:
    """Checks that the checkpoint that will be loaded was trained with the tokens of this tokenizer."""
    checkpoint, name, args = subject.checkpoint(), "checkpoint-tokenizer", subject.args
    if checkpoint is None:
        return
    told = (checkpoint / "arguments.json").is_file()
    try:
        check_ends(checkpoint, tokenizer.eod, model)
        identity = saved_arguments(checkpoint).get("tokenizer_identity") if told else None
    except ValueError as error:
        yield failed(name, str(error), "give the model's own tokenizer")
        return
    first = checkpoint.parent != Path(str(args.load or args.save))
    if identity not in (None, dict(tokenizer.unique_identifiers)) and not (args.finetune or first):
        what = f"{checkpoint} was trained with other tokens than those of {model}"
        yield failed(name, what, "give its tokenizer, or --finetune to begin with these")
    else:
        yield passed(name, f"{checkpoint} goes with {model}")

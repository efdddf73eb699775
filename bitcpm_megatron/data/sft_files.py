# SPDX-License-Identifier: Apache-2.0
"""The three token files of supervised fine-tuning, which belong together.

Sequence `n` of each describes sample `n`: its tokens; whether each token is learned as a target (uint8, 0 or 1); and
the ends of its conversations (int32, in tokens from the beginning of the sample; the last one is its length).
"""

import dataclasses
import os

import numpy as np

from .token_headers import TokenFile, TokenFileError, read_token_file

TOKENS, ANSWERS, ENDS = "tokens", "answers", "ends"
_CURE = "write all three again, with launch/preprocess_sft.py"


def sft_prefixes(prefix: str | os.PathLike[str]) -> dict[str, str]:
    """Returns the prefixes, without ``.bin`` and ``.idx``, of the files ``tokens``, ``answers`` and ``ends``."""
    return {part: f"{os.fspath(prefix)}_{part}" for part in (TOKENS, ANSWERS, ENDS)}


def read_sft_files(prefix: str | os.PathLike[str]) -> dict[str, TokenFile]:
    """Checks the three files as :func:`~.token_headers.read_token_file` does, and against one another.

    Returns:
        The descriptions of the files, by the keys of :func:`sft_prefixes`.

    Raises:
        TokenFileError: if a file is damaged or does not fit the others; the message names the file and its fault.
    """
    found = {part: read_token_file(path) for part, path in sft_prefixes(prefix).items()}
    tokens, answers, ends = (found[part] for part in (TOKENS, ANSWERS, ENDS))
    for file, dtype in ((answers, "uint8"), (ends, "int32")):
        if file.dtype != dtype:
            raise TokenFileError(f"{file.prefix}.bin holds {file.dtype} in the place of {dtype}: {_CURE}")
        if file.sequences != tokens.sequences:
            counts = f"{file.prefix} has {file.sequences} samples, {tokens.prefix} {tokens.sequences}"
            raise TokenFileError(f"{counts}: {_CURE}")
    lengths = tokens.lengths()
    if (wrong := np.flatnonzero(answers.lengths() != lengths)).size:
        raise TokenFileError(f"{answers.prefix}: sample {wrong[0]} has another length than its tokens: {_CURE}")
    if answers.largest > 1:
        raise TokenFileError(f"{answers.prefix}.bin holds {answers.largest}, neither 0 nor 1: {_CURE}")
    if (sample := _wrong_ends(ends, lengths)) is not None:
        raise TokenFileError(f"{ends.prefix}: the conversations of sample {sample} do not end where it does: {_CURE}")
    return found


def read_samples(seq_length: int, prefix: str | os.PathLike[str]) -> TokenFile:
    """Returns the description of the tokens of the three files, with a digest of all three.

    Raises:
        TokenFileError: if :func:`read_sft_files` raises it, or a sample has more than `seq_length` tokens.
    """
    files = read_sft_files(prefix)
    longest = int(files[TOKENS].lengths().max(initial=0))
    if longest > seq_length:
        cure = f"give --seq-length {longest}, or pack them again for {seq_length}"
        raise TokenFileError(f"{prefix} has samples of up to {longest} tokens: {cure}")
    digest = "-".join(file.digest for file in files.values())
    return dataclasses.replace(files[TOKENS], digest=digest)


def _wrong_ends(file: TokenFile, lengths: np.ndarray) -> int | None:
    """Returns the first sample whose ends do not ascend from above 0 to its length, or None."""
    counts = file.lengths()
    if not counts.all():
        return int(np.argmin(counts))
    values = np.fromfile(f"{file.prefix}.bin", np.int32)
    last = np.cumsum(counts, dtype=np.int64) - 1
    segments = np.diff(values, prepend=np.int32(0))
    # The first segment of a sample counts from the beginning of the sample, not from the last end of the one before.
    segments[last[:-1] + 1] = values[last[:-1] + 1]
    samples = np.repeat(np.arange(len(counts)), counts)
    wrong = [*np.flatnonzero(values[last] != lengths)[:1], *samples[segments <= 0][:1]]
    return int(min(wrong)) if wrong else None

# SPDX-License-Identifier: Apache-2.0
"""Checks of ``.bin`` / ``.idx`` token files without megatron-core, before megatron-core trusts their headers."""

import os
import struct
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from .blends import split_bounds

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<QBQQ")
_HEADER_BYTES = len(_MAGIC) + _HEADER.size
_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
_BLOCK_BYTES = 2**20
_BLOCKS = 256
_ENTRIES = 4_000_000
_DOCUMENTS = 256
_CURES = {
    "training": "give more documents, or another --split",
    "validation": "give more documents or another --split, or --eval-iters 0",
    "test": "give more documents, or no share such as --split 97,3,0",
}


class TokenFileError(ValueError):
    """The exception for a token file that is missing, damaged, of another format, or unfit for its purpose."""


@dataclass(frozen=True)
class TokenFile:
    """The description of one pair of ``.bin`` and ``.idx`` files.

    Attributes:
        prefix: the path without ``.bin`` and ``.idx``.
        dtype: the dtype of the tokens.
        sequences: the number of entries of the index.
        documents: the number of documents that the sequences make up.
        tokens: the number of tokens of all sequences.
        smallest: the smallest token of those that were looked at.
        largest: the largest token of those that were looked at.
        looked_at: the number of those tokens: all of a file up to 256 MiB, else 256 blocks of 1 MiB, evenly spread.
        digest: XXH3-128 of the whole index, the size of the ``.bin`` file and the tokens that were looked at: other
            documents, other lengths and another tokenizer change it, a few tokens between the blocks do not.
    """

    prefix: str
    dtype: str
    sequences: int
    documents: int
    tokens: int
    smallest: int
    largest: int
    looked_at: int
    digest: str

    def tokens_between(self, begin: int, end: int) -> int:
        """Counts the tokens of the sequences from ``begin`` up to, but not including, ``end``."""
        return int(np.sum(self.lengths()[begin:end], dtype=np.int64))

    def lengths(self) -> np.ndarray:
        """Returns the number of tokens of each sequence, int32 [sequences], mapped from the index."""
        return _mapped(Path(f"{self.prefix}.idx"), "<i4", _HEADER_BYTES, self.sequences)

    def ends_with(self, token: int) -> bool:
        """Returns whether documents end with a token: all of up to 256, else 256 of them, evenly spread.

        The last document is among them. Empty sequences are skipped.
        """
        index, tokens = Path(f"{self.prefix}.idx"), Path(f"{self.prefix}.bin")
        if not (self.tokens and self.documents):
            return False
        ends = _mapped(index, "<i8", _HEADER_BYTES + 12 * self.sequences, self.documents + 1)[1:]
        looked = np.linspace(0, self.documents - 1, min(self.documents, _DOCUMENTS)).round().astype(np.int64)
        last = np.array(ends[looked]) - 1
        last = last[last >= 0]
        starts = _mapped(index, "<i8", _HEADER_BYTES + 4 * self.sequences, self.sequences)
        lengths = np.array(self.lengths()[last], np.int64)
        at = np.array(starts[last])[lengths > 0] // np.dtype(self.dtype).itemsize + lengths[lengths > 0] - 1
        return bool((np.memmap(tokens, self.dtype, "r")[at] == token).all())

    def mistake(self, vocab_size: int | None = None) -> str | None:
        """Returns why nothing can be trained on the file, or None; `vocab_size` is the model's, if it is known."""
        if self.dtype.startswith("float"):
            return f"{self.prefix}.bin holds {self.dtype}, which are no tokens: write it again"
        if self.tokens == 0:
            return f"{self.prefix}.bin holds no token: write it again"
        if vocab_size is not None and (self.largest >= vocab_size or self.smallest < 0):
            token = self.largest if self.largest >= vocab_size else self.smallest
            return (
                f"{self.prefix}.bin holds token {token}, and the vocabulary ends at {vocab_size - 1}: another "
                "tokenizer wrote this data; give that one, or tokenize the text again"
            )
        return None


def split_mistake(
    files: Sequence[TokenFile], split: str, needed: Collection[str], sequence: int, weighted: bool
) -> str | None:
    """Returns why ``--split`` leaves a needed part (``training``, ``validation``, ``test``) without data, or None.

    Samples have `sequence` tokens. Without weights (`weighted` is false) each of several files contributes the samples
    that it has, and must have at least one.

    Raises:
        ValueError: if ``--split`` does not hold shares.
    """
    for part, (name, cure) in zip(split_bounds(split), _CURES.items(), strict=True):
        if name not in needed:
            continue
        if part is None:
            return f"--split {split} leaves no {name} data: {cure}"
        for file in files:
            begin, end = (int(round(bound * float(file.sequences))) for bound in part)
            tokens = file.tokens_between(begin, end)
            if tokens == 0:
                have = f"of the {file.sequences} documents in {file.prefix}"
                return f"--split {split} leaves no {name} data {have}: {cure}"
            if len(files) > 1 and not weighted and tokens <= sequence:
                have = f"{tokens} tokens of {file.prefix} for {name}, less than a sample of {sequence} + 1"
                return f"--split {split} leaves {have}: {cure}, or weights"
    return None


def read_token_file(prefix: str) -> TokenFile:
    """Reads a pair of files; checks the index against itself and the size of the tokens, and looks at the tokens.

    Raises:
        TokenFileError: if a file is missing, damaged or of another format; the message names the file and its fault.
    """
    if prefix.endswith((".bin", ".idx")) and Path(prefix).is_file():
        raise TokenFileError(f"{prefix} is a file: give the prefix, without .bin and .idx")
    index, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (index, tokens):
        if not path.is_file():
            raise TokenFileError(f"{path} is not there" if not path.exists() else f"{path} is no regular file")
        if not os.access(path, os.R_OK):
            raise TokenFileError(f"{path} cannot be read")
    with index.open("rb") as stream:
        head = stream.read(_HEADER_BYTES)
    if len(head) < _HEADER_BYTES or not head.startswith(_MAGIC):
        raise TokenFileError(f"{index} is no index of Megatron's (its first bytes are not {_MAGIC!r})")
    version, code, sequences, documents = _HEADER.unpack(head[len(_MAGIC) :])
    if version != 1 or code not in _DTYPES:
        raise TokenFileError(f"{index} has version {version} and dtype code {code}, which are unknown")
    expected = _HEADER_BYTES + sequences * (4 + 8) + documents * 8
    size = index.stat().st_size
    if size < expected:
        raise TokenFileError(f"{index} is cut off: {size} bytes, its header promises {expected}")
    if size not in (expected, expected + sequences):  # multimodal data has one byte more per sequence, its mode
        raise TokenFileError(f"{index} has {size} bytes, its header promises {expected}: one of them is damaged")
    dtype = np.dtype(_DTYPES[code])
    state = xxhash.xxh3_128(head)
    total = _check_index(index, tokens, sequences, documents, dtype.itemsize, state)
    looked_at = _look(tokens, dtype, state)
    return TokenFile(prefix, dtype.name, sequences, max(0, documents - 1), total, *looked_at, digest=state.hexdigest())


def _mapped(path: Path, dtype: str, offset: int, count: int) -> np.ndarray:
    return np.memmap(path, dtype, "r", offset, (count,)) if count else np.zeros(0, dtype)


def _check_index(
    index: Path, tokens: Path, sequences: int, documents: int, itemsize: int, state: xxhash.xxh3_128
) -> int:
    """Checks that sequences are within the tokens and documents in order; returns the number of tokens of all."""
    lengths = _mapped(index, "<i4", _HEADER_BYTES, sequences)
    pointers = _mapped(index, "<i8", _HEADER_BYTES + 4 * sequences, sequences)
    ends = _mapped(index, "<i8", _HEADER_BYTES + 12 * sequences, documents)
    size, total = tokens.stat().st_size, int(np.sum(lengths, dtype=np.int64))
    if size != total * itemsize:
        raise TokenFileError(f"{tokens} holds {size} bytes, its index counts {total} tokens of {itemsize} bytes")
    for start in range(0, sequences, _ENTRIES):
        length = np.array(lengths[start : start + _ENTRIES], np.int64)
        pointer = np.array(pointers[start : start + _ENTRIES])
        state.update(length.tobytes())
        state.update(pointer.tobytes())
        # Compare a difference and not a sum, which may overflow.
        wrong = (length < 0) | (pointer < 0) | (pointer > size) | (length * itemsize > size - pointer)
        if wrong.any():
            n = int(np.argmax(wrong))
            raise TokenFileError(
                f"{index}: sequence {start + n} has {length[n]} tokens from byte {pointer[n]}, and {tokens} has {size} "
                "bytes: the index is damaged, or of other tokens"
            )
    before = 0
    for start in range(0, documents, _ENTRIES):
        end = np.array(ends[start : start + _ENTRIES])
        state.update(end.tobytes())
        if end[0] < before or end[-1] > sequences or (np.diff(end) < 0).any():
            raise TokenFileError(f"{index}: its documents are not in order, or end beyond its {sequences} sequences")
        before = int(end[-1])
    return total


def _look(path: Path, dtype: np.dtype, state: xxhash.xxh3_128) -> tuple[int, int, int]:
    """Returns the smallest and the largest token, and the number of tokens that were looked at."""
    extremes: list[int] = []
    looked_at = 0
    state.update(str(path.stat().st_size).encode())
    for block in _blocks(path):
        state.update(block)
        data = np.frombuffer(block, dtype)
        if data.size and dtype.kind in "iu":
            extremes += [int(data.min()), int(data.max())]
            looked_at += data.size
    return min(extremes, default=0), max(extremes, default=-1), looked_at


def _blocks(path: Path) -> Iterator[bytes]:
    """Yields the whole of a file, or blocks of it from its beginning to its end; no block cuts a token."""
    size = path.stat().st_size
    starts: Sequence[int] = range(0, size, _BLOCK_BYTES)
    if len(starts) > _BLOCKS:
        starts = [number * (size - _BLOCK_BYTES) // (_BLOCKS - 1) // 8 * 8 for number in range(_BLOCKS)]
    with path.open("rb") as stream:
        for start in starts:
            stream.seek(start)
            # The last block reaches to the end of the file, in spite of the rounding of its start.
            yield stream.read(-1 if start == starts[-1] else _BLOCK_BYTES)

# SPDX-License-Identifier: Apache-2.0
"""What a ``.bin`` / ``.idx`` pair says about itself, read in milliseconds and without megatron-core."""

import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<QBQQ")
_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
_SAMPLE_TOKENS = 4_000_000


class TokenFileError(ValueError):
    """A token file that is missing, damaged or not of that format."""


@dataclass(frozen=True)
class TokenFile:
    """One pair.

    Attributes:
        prefix: without ``.bin`` and ``.idx``.
        dtype: of the tokens.
        sequences: entries of the index.
        documents: documents.
        tokens: tokens in all.
        largest: the largest token of those that were looked at.
        looked_at: how many those are, from the beginning and the end.
    """

    prefix: str
    dtype: str
    sequences: int
    documents: int
    tokens: int
    largest: int
    looked_at: int


def prefixes_of(paths: list[str]) -> list[str]:
    """The prefixes in ``--data-path``: one, several, or weights and prefixes in turn (megatron-core's rule)."""
    if len(paths) > 1 and len(paths) % 2 == 0 and all(_is_number(weight) for weight in paths[::2]):
        return [str(prefix) for prefix in paths[1::2]]
    return [str(prefix) for prefix in paths]


def read_token_file(prefix: str) -> TokenFile:
    """Reads the header of the index, compares sizes, and looks at up to four million tokens.

    Raises:
        TokenFileError: with the file and what is wrong with it.
    """
    index, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (index, tokens):
        if not path.is_file():
            raise TokenFileError(f"{path} is not there")
        if not os.access(path, os.R_OK):
            raise TokenFileError(f"{path} cannot be read")
    with index.open("rb") as stream:
        head = stream.read(len(_MAGIC) + _HEADER.size)
    if len(head) < len(_MAGIC) + _HEADER.size or not head.startswith(_MAGIC):
        raise TokenFileError(f"{index} is no index of Megatron's (its first bytes are not {_MAGIC!r})")
    version, code, sequences, documents = _HEADER.unpack(head[len(_MAGIC) :])
    if version != 1 or code not in _DTYPES:
        raise TokenFileError(f"{index} has version {version} and dtype code {code}, which are unknown")
    expected = len(head) + sequences * (4 + 8) + documents * 8
    if index.stat().st_size < expected:
        raise TokenFileError(f"{index} is cut off: {index.stat().st_size} bytes, its header promises {expected}")
    dtype = np.dtype(_DTYPES[code])
    lengths = np.memmap(index, np.int32, "r", offset=len(head), shape=(sequences,)) if sequences else np.zeros(0, int)
    total = int(np.sum(lengths, dtype=np.int64))
    if tokens.stat().st_size != total * dtype.itemsize:
        raise TokenFileError(
            f"{tokens} holds {tokens.stat().st_size} bytes, its index counts {total} tokens of {dtype.itemsize} bytes"
        )
    largest, looked_at = _largest(tokens, dtype, total)
    return TokenFile(prefix, dtype.name, sequences, max(0, documents - 1), total, largest, looked_at)


def _largest(path: Path, dtype: np.dtype, total: int) -> tuple[int, int]:
    if total == 0:
        return -1, 0
    data = np.memmap(path, dtype, "r")
    half = _SAMPLE_TOKENS // 2
    parts = [data] if total <= _SAMPLE_TOKENS else [data[:half], data[-half:]]
    return max(int(part.max()) for part in parts), sum(part.size for part in parts)


def _is_number(text: object) -> bool:
    try:
        float(str(text))
    except ValueError:
        return False
    return True

# SPDX-License-Identifier: Apache-2.0
"""Records of a teacher's targets for one sample, as bytes: the distinct draws of each token, or its likeliest ids.

A record begins with the XXH3-64 of the sample's tokens (8 bytes, little-endian like all numbers here), so that no other
sample is ever trained on it. With s the number of tokens of the sample and k the number of ids kept per token, this is
followed by:

    sampled    uint8 [s]: the number of distinct ids of each token; then for each of these ids, in ascending order, the
               number id * draws + count - 1, in 3 bytes if vocabulary * draws <= 2^24 (335,544 ids at 50 draws), else 4
    top-k      ids [s, k] in 3 bytes each, the likeliest first; then float16 [s, k]: natural logarithms of the
               probabilities

A token takes 37 bytes with 50 draws and 12 distinct ids, and 320 bytes with top-64.
"""

import numpy as np
import xxhash

_TOKENS_BYTES = 8
_ID_BYTES = 3
MAX_VOCABULARY = 2**24
"""The exclusive upper bound of ids."""
MAX_DRAWS = 255
"""The largest number of draws, since counts and numbers of distinct ids are stored in one byte."""


def encode_draws(tokens: np.ndarray, ids: np.ndarray, vocab_size: int) -> bytes:
    """Encodes drawn ids ``[s, draws]``, in any order, as the record of a sample with the tokens ``[s]``."""
    length, draws = ids.shape
    ordered = np.sort(ids, -1)
    begins = np.ones(ids.shape, bool)
    begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    places = np.flatnonzero(begins)
    counts = np.diff(places, append=length * draws)
    codes = ordered.ravel()[places].astype(np.int64) * draws + counts - 1
    distinct = begins.sum(-1, dtype=np.uint8)
    return digest_of(tokens) + distinct.tobytes() + _packed(codes, _code_bytes(vocab_size, draws))


def decode_draws(record: bytes, length: int, draws: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Decodes ids int32 and counts uint8, both ``[length, draws]``; unused places hold 0 in both."""
    distinct = np.frombuffer(record, np.uint8, length, _TOKENS_BYTES)
    codes = _unpacked(record[_TOKENS_BYTES + length :], _code_bytes(vocab_size, draws))
    used = np.arange(draws) < distinct[:, None]
    ids, counts = np.zeros((length, draws), np.int32), np.zeros((length, draws), np.uint8)
    ids[used], before = np.divmod(codes, draws)
    counts[used] = before + 1
    return ids, counts


def encode_top_k(tokens: np.ndarray, ids: np.ndarray, log_probabilities: np.ndarray) -> bytes:
    """Encodes ids and log-probabilities, both ``[s, k]``, as the record of a sample with the tokens ``[s]``."""
    return digest_of(tokens) + _packed(ids.ravel(), _ID_BYTES) + log_probabilities.astype("<f2").tobytes()


def decode_top_k(record: bytes, length: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Decodes ids int32 and log-probabilities float16, both ``[length, k]``."""
    end = _TOKENS_BYTES + _ID_BYTES * length * k
    ids = _unpacked(record[_TOKENS_BYTES:end], _ID_BYTES).astype(np.int32)
    return ids.reshape(length, k), np.frombuffer(record, "<f2", length * k, end).reshape(length, k).copy()


def digest_of(tokens: np.ndarray) -> bytes:
    """Returns the XXH3-64 of a sample's tokens, the first bytes of its record."""
    return xxhash.xxh3_64_intdigest(tokens.astype("<i4").tobytes()).to_bytes(_TOKENS_BYTES, "little")


def is_of(record: bytes, tokens: np.ndarray) -> bool:
    """Returns whether a record was written for these tokens."""
    return record[:_TOKENS_BYTES] == digest_of(tokens)


def _code_bytes(vocab_size: int, draws: int) -> int:
    return 3 if vocab_size * draws <= 2**24 else 4


def _packed(numbers: np.ndarray, size: int) -> bytes:
    return np.ascontiguousarray(numbers.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :size]).tobytes()


def _unpacked(packed: bytes, size: int) -> np.ndarray:
    whole = np.zeros((len(packed) // size, 4), np.uint8)
    whole[:, :size] = np.frombuffer(packed, np.uint8).reshape(-1, size)
    return whole.view("<u4").ravel()

# SPDX-License-Identifier: Apache-2.0
"""Tests of reading .bin / .idx pairs, of what is refused, and of the meaning of ``--split`` and ``--data-path``."""

import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bitcpm_megatron.data import token_headers
from bitcpm_megatron.data.blends import blend_of, split_bounds
from bitcpm_megatron.data.token_headers import TokenFileError, read_token_file, split_mistake

HEAD = 34
DOCUMENTS = 26


def write(prefix: Path, tokens: np.ndarray, code: int = 8, documents: int = DOCUMENTS) -> str:
    """Writes a .bin / .idx pair with documents of equal length, and returns its prefix."""
    tokens.tofile(f"{prefix}.bin")
    lengths = np.full(documents, len(tokens) // documents, np.int32)
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, documents, documents + 1)
    ends = np.arange(documents + 1, dtype=np.int64)
    parts = lengths, starts * tokens.itemsize, ends
    Path(f"{prefix}.idx").write_bytes(head + b"".join(part.tobytes() for part in parts))
    return str(prefix)


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return write(tmp_path / "corpus", np.arange(2600, dtype=np.uint16) % 290)


def at(offset: int, kind: str, value: int) -> Callable[[bytearray], None]:
    return lambda content: struct.pack_into(kind, content, offset, value)


def test_a_pair_is_what_it_says(prefix: str) -> None:
    found = read_token_file(prefix)
    assert (found.dtype, found.sequences, found.documents, found.tokens) == ("uint16", 26, 26, 2600)
    assert (found.smallest, found.largest, found.looked_at) == (0, 289, 2600)
    assert found.mistake(290) is None and found.tokens_between(1, 4) == 300


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (at(0, "<B", 0), "is no index"),
        (at(9, "<Q", 2), "version 2"),
        (at(17, "<B", 77), "dtype code 77"),
        (at(18, "<Q", 25), "its header promises"),
        (at(18, "<Q", 27), "is cut off"),
        (at(18, "<Q", 2**63), "is cut off"),
        (at(26, "<Q", 28), "is cut off"),
        (at(26, "<Q", 26), "its header promises"),
        (at(HEAD + 4 * 3, "<q", (300 << 32) + (2**32 - 100)), "sequence 3 has -100 tokens"),  # the next one has 300
        (at(HEAD + 4 * 25, "<i", 2**31 - 1), "its index counts 2147486147 tokens"),
        (at(HEAD + 4 * 3, "<i", -1), "its index counts 2499 tokens"),
        (at(HEAD + 4 * 3, "<i", 99), "its index counts 2599 tokens"),
        (at(HEAD + 4 * 26 + 8 * 2, "<q", -8), "sequence 2 has 100 tokens from byte -8"),
        (at(HEAD + 4 * 26 + 8 * 2, "<q", 2**63 - 1), "sequence 2 has 100 tokens from byte 9223372036854775807"),
        (at(HEAD + 4 * 26 + 8 * 2, "<q", 5002), "sequence 2 has 100 tokens from byte 5002"),
        (at(HEAD + 12 * 26 + 8 * 4, "<q", 2), "not in order"),
        (at(HEAD + 12 * 26, "<q", -1), "not in order"),
        (at(HEAD + 12 * 26 + 8 * 26, "<q", 27), "end beyond its 26 sequences"),
        (lambda content: content.append(0), "its header promises"),
        (lambda content: content.clear(), "is no index"),
    ],
)
def test_a_damaged_index_is_one_line_that_names_it(prefix: str, change, said: str, monkeypatch) -> None:
    monkeypatch.setattr(token_headers, "_ENTRIES", 4)  # so that there are several parts
    content = bytearray(Path(f"{prefix}.idx").read_bytes())
    change(content)
    Path(f"{prefix}.idx").write_bytes(content)
    with pytest.raises(TokenFileError, match=said) as caught:
        read_token_file(prefix)
    assert prefix in str(caught.value) and "\n" not in str(caught.value)


def test_tokens_that_are_none_are_refused(tmp_path: Path) -> None:
    high = read_token_file(write(tmp_path / "high", np.full(260, 300, np.uint16)))
    assert "holds token 300, and the vocabulary ends at 299" in high.mistake(300) and high.mistake(301) is None
    low = read_token_file(write(tmp_path / "low", np.full(260, -1, np.int32), code=4))
    assert "holds token -1" in low.mistake(300)
    floats = read_token_file(write(tmp_path / "floats", np.ones(260, np.float32), code=7))
    assert "holds float32, which are no tokens" in floats.mistake()
    assert "holds no token" in read_token_file(write(tmp_path / "none", np.zeros(0, np.uint16))).mistake()


def test_other_tokens_and_other_documents_have_another_digest(prefix: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(token_headers, "_BLOCK_BYTES", 64)
    monkeypatch.setattr(token_headers, "_BLOCKS", 8)  # only parts of a file of 5,200 bytes are read
    first = read_token_file(prefix)
    assert first.looked_at == 8 * 32
    tokens = np.fromfile(f"{prefix}.bin", np.uint16)
    moved = read_token_file(write(tmp_path / "moved", tokens))
    assert moved.digest == first.digest, "the same data at another place"
    for name, changed in {"other": (tokens + 1) % 290, "last": np.append(tokens[:-1], 5).astype(np.uint16)}.items():
        assert read_token_file(write(tmp_path / name, changed)).digest != first.digest
    assert read_token_file(write(tmp_path / "longer", tokens, documents=13)).digest != first.digest
    whole, pointers, ends = Path(f"{prefix}.idx").read_bytes(), HEAD + 4 * DOCUMENTS, HEAD + 12 * DOCUMENTS
    for offset, values in (
        (HEAD + 4 * 3, struct.pack("<ii", 50, 150)),  # only lengths: sequences overlap
        (pointers + 8 * 3, struct.pack("<qq", 800, 600)),  # only pointers: two sequences are exchanged
        (ends + 8 * 3, struct.pack("<q", 4)),  # only boundaries: a document is joined to the one before
    ):
        index = bytearray(whole)
        index[offset : offset + len(values)] = values
        Path(f"{prefix}.idx").write_bytes(index)
        assert read_token_file(prefix).digest != first.digest
    monkeypatch.setattr(token_headers, "_BLOCKS", 10**6)
    assert read_token_file(prefix).looked_at == 2600


@pytest.mark.parametrize("split", ["969,30,1", "90/10/0", "1", "1,0,0", "0.7,0.2,0.1", "98,2", "3,1,4"])
def test_a_split_is_cut_where_megatron_core_cuts_it(split: str) -> None:
    config = pytest.importorskip("megatron.core.datasets.blended_megatron_dataset_config")
    shares = config.parse_and_normalize_split(split)
    assert split_bounds(split) == config.convert_split_vector_to_split_matrix(shares)


@pytest.mark.parametrize("split", ["", "train", "1,2,3,4", "-1,2", "nan,1", "inf,1,1", "0,1", "1;2", "1e308,1e308"])
def test_a_split_that_is_none_is_refused(split: str) -> None:
    with pytest.raises(ValueError, match="write train,validation,test shares"):
        split_bounds(split)


def test_a_part_that_gets_no_document_is_refused(prefix: str, tmp_path: Path) -> None:
    files = [read_token_file(prefix)]
    both = ("training", "validation")
    assert split_mistake(files, "969,30,1", both, 32, weighted=False) is None
    assert "leaves no test data of the 26 documents" in split_mistake(files, "969,30,1", (*both, "test"), 32, False)
    few = [read_token_file(write(tmp_path / "few", np.arange(300, dtype=np.uint16), documents=3))]
    assert "leaves no validation data of the 3 documents" in split_mistake(few, "969,30,1", both, 32, False)
    assert split_mistake(few, "969,30,1", ("training",), 32, False) is None
    assert "leaves no validation data: " in split_mistake(files, "1,0,1", both, 32, False)
    # Several files without weights give as many samples as they have.
    assert "100 tokens" in split_mistake([*files, *few], "2,1", both, 100, weighted=False)
    assert split_mistake([*files, *few], "2,1", both, 100, weighted=True) is None


def test_a_blend_is_what_megatron_core_takes_it_for() -> None:
    upstream = pytest.importorskip("megatron.core.datasets.utils").get_blend_from_list
    for paths in (["a"], ["a", "b"], ["a", "b", "c"], ["1", "a"], ["0.3", "a", "7", "b"]):
        prefixes, weights = upstream(paths)
        assert blend_of(paths) == (list(prefixes), weights)
    for paths in (["1", "a", "b", "c"], ["0", "a"], ["-1", "a", "2", "b"], ["nan", "a"], ["inf", "a"]):
        with pytest.raises(ValueError, match="weight"):
            blend_of(paths)


@pytest.mark.slow
def test_the_reader_needs_no_megatron_core() -> None:
    """A login node has no megatron-core."""
    command = "import sys, bitcpm_megatron.data.token_headers; sys.exit('megatron' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command]).returncode == 0

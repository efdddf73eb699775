# SPDX-License-Identifier: Apache-2.0
"""Tests of digests, which the writing process computes, and whose verification is divided among the ranks."""

import errno
import os
from pathlib import Path

import pytest
import torch

from bitcpm_megatron.checkpoints import digests as checkpoint_digests
from bitcpm_megatron.checkpoints.digests import gather_digests, verify_digests, with_digests
from bitcpm_megatron.files import DigestError, digest, write_digests


def write(path: Path, content: bytes, after: list[str]) -> None:
    path.write_bytes(content)
    after.append(path.name)


def test_the_writer_leaves_the_digests_and_nobody_reads_the_files_again(
    single_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    with_digests(write, tmp_path)(tmp_path / "__0_0.distcp", b"weights", after=called)
    expected = {"__0_0.distcp": digest(tmp_path / "__0_0.distcp")}
    monkeypatch.setattr(checkpoint_digests, "digest", lambda path: pytest.fail(f"{path} is read while training waits"))
    assert gather_digests(tmp_path) == expected and called == ["__0_0.distcp"]
    assert [path.name for path in tmp_path.iterdir()] == ["__0_0.distcp"]


def test_a_full_disk_is_the_writers_to_report(
    single_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with_digests(write, tmp_path)(tmp_path / "__0_0.distcp", b"weights", after=[])
    assert [path.name for path in tmp_path.iterdir()] == ["__0_0.distcp"]
    assert gather_digests(tmp_path) == {"__0_0.distcp": digest(tmp_path / "__0_0.distcp")}


def test_a_rank_that_writes_nothing_has_no_writer(single_rank: None, tmp_path: Path) -> None:
    assert with_digests(None, tmp_path) is None
    assert gather_digests(tmp_path) == {}


def test_each_rank_makes_the_digests_of_its_own_files(single_rank: None, tmp_path: Path) -> None:
    for name in ("__0_0.distcp", "__0_1.distcp", "__10_0.distcp"):
        (tmp_path / name).write_bytes(name.encode())
    assert gather_digests(tmp_path) == {name: digest(tmp_path / name) for name in ("__0_0.distcp", "__0_1.distcp")}


def test_the_ranks_share_out_all_files(single_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(7):
        (tmp_path / f"{number}.bin").write_bytes(bytes(100 + number))
    write_digests(tmp_path)
    looked_at: list[str] = []
    monkeypatch.setattr(checkpoint_digests, "find_damage", lambda directory, names: looked_at.extend(names))
    monkeypatch.setattr(checkpoint_digests, "all_gathered", lambda mine: [mine])
    for rank in range(3):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
        verify_digests(tmp_path)
    assert sorted(looked_at) == [f"{number}.bin" for number in range(7)]


def test_damage_that_another_rank_found_is_raised_here(
    single_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.bin").write_bytes(b"a")
    write_digests(tmp_path)
    verify_digests(tmp_path)
    monkeypatch.setattr(checkpoint_digests, "all_gathered", lambda mine: [mine, ["b.bin is damaged"]])
    with pytest.raises(DigestError, match="b.bin is damaged"):
        verify_digests(tmp_path)

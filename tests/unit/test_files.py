# SPDX-License-Identifier: Apache-2.0
"""Tests of files and directories that appear completely or not at all."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from bitcpm_megatron.files import atomic, directory_mistake, publish, write_text

NEW = "new\n三值\n"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "tracker.txt"
    path.write_text("old")
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "iter_7.incomplete"
    (folder / "shards" / "empty").mkdir(parents=True)
    (folder / "common.json").write_text("{}")
    (folder / "shards" / "0.bin").write_bytes(b"\x00\x01")
    return folder


def crash(*_: object) -> None:
    raise OSError("the machine went down")


def crash_at_call(number: int, function: Callable[..., object]) -> Callable[..., object]:
    """Returns a function like ``function`` whose call ``number``, counted from 0, raises before it does anything."""
    calls = iter(range(number + 1))

    def limited(*args: object) -> object:
        if next(calls) == number:
            crash()
        return function(*args)

    return limited


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# ----------------------------------------------------------------------------------------------- one file


def test_write_text_replaces_and_leaves_no_other_name(old: Path) -> None:
    for text in (NEW, ""):
        write_text(old, text)
        assert old.read_bytes() == text.encode("utf-8")
        assert names(old.parent) == ["tracker.txt"]


def test_write_text_leaves_no_other_name_when_it_is_interrupted(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic, "publish", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_text(old, NEW)
    assert old.read_text() == "old" and os.listdir(old.parent) == [old.name]


def test_write_text_creates(tmp_path: Path) -> None:
    write_text(tmp_path / "tracker.txt", NEW)
    assert (tmp_path / "tracker.txt").read_text(encoding="utf-8") == NEW
    assert names(tmp_path) == ["tracker.txt"]


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_a_crash_before_the_rename_leaves_the_old_file(old: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, step, crash)
        with pytest.raises(OSError, match="went down"):
            write_text(old, NEW)
    assert old.read_text() == "old" and names(old.parent) == ["tracker.txt"]
    write_text(old, NEW)
    assert old.read_text(encoding="utf-8") == NEW
    assert names(old.parent) == ["tracker.txt"]


def test_a_crash_after_the_rename_leaves_the_whole_new_file(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", crash_at_call(1, os.fsync))
    with pytest.raises(OSError, match="went down"):
        write_text(old, NEW)
    assert old.read_text(encoding="utf-8") == NEW
    assert names(old.parent) == ["tracker.txt"]


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_a_failed_publish_keeps_both_files(old: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    temporary = old.with_name("written")
    temporary.write_text(NEW, encoding="utf-8")
    monkeypatch.setattr(os, step, crash)
    with pytest.raises(OSError, match="went down"):
        publish(temporary, old)
    assert (old.read_text(), temporary.read_text(encoding="utf-8")) == ("old", NEW)


def test_a_failed_sync_keeps_no_descriptor_open(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    descriptors = []

    def crash_with(descriptor: int) -> None:
        descriptors.append(descriptor)
        crash()

    monkeypatch.setattr(os, "fsync", crash_with)
    with pytest.raises(OSError, match="went down"):
        publish(old, old.with_name("final"))
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptors[0])


# --------------------------------------------------------------------------------------------- a directory


def test_a_directory_is_published_whole(checkpoint: Path) -> None:
    content = names(checkpoint)
    final = checkpoint.with_name("iter_7")
    publish(checkpoint, final)
    assert names(final) == content == ["common.json", "shards", "shards/0.bin", "shards/empty"]
    assert (final / "common.json").read_text() == "{}"
    assert (final / "shards" / "0.bin").read_bytes() == b"\x00\x01"
    assert [path.name for path in final.parent.iterdir()] == ["iter_7"]


def test_a_directory_in_use_is_not_replaced(checkpoint: Path) -> None:
    final = checkpoint.with_name("iter_7")
    final.mkdir()
    (final / "precious").write_text("old")
    with pytest.raises(OSError, match="not empty"):
        publish(checkpoint, final)
    assert names(final) == ["precious"]
    assert checkpoint.is_dir()


@pytest.mark.parametrize("number", range(5))
def test_a_crash_while_a_directory_is_synced_leaves_no_final_name(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """There are five calls, for four entries and the directory itself."""
    monkeypatch.setattr(os, "fsync", crash_at_call(number, os.fsync))
    with pytest.raises(OSError, match="went down"):
        publish(checkpoint, checkpoint.with_name("iter_7"))
    assert [path.name for path in checkpoint.parent.iterdir()] == ["iter_7.incomplete"]


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_all_content_is_synced_before_the_rename_and_the_name_after(
    old: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """If a rename reached the disk before the data, a power failure could leave a name without content."""
    temporary = old if kind == "file" else checkpoint
    inodes = {path.stat().st_ino: path.name for path in (temporary, *temporary.rglob("*"))}
    inodes[temporary.parent.stat().st_ino] = "parent"
    events: list[str] = []
    replace = os.replace

    def renamed(source: Path, target: Path) -> None:
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append(inodes[os.fstat(descriptor).st_ino]))
    monkeypatch.setattr(os, "replace", renamed)
    publish(temporary, temporary.with_name("final"))
    content = {"file": ["tracker.txt"], "directory": ["0.bin", "common.json", "empty", "iter_7.incomplete", "shards"]}
    assert sorted(events[:-2]) == content[kind]
    assert events[-2:] == ["rename", "parent"]


# ------------------------------------------------------------------------------- where something can be written


def test_a_directory_that_can_be_made_is_no_mistake(tmp_path: Path) -> None:
    assert directory_mistake(tmp_path) is None
    assert directory_mistake(tmp_path / "a" / "b") is None
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "said"), [("file", "file is no directory"), ("file/x", "Not a directory"), ("fifo", "no directory")]
)
def test_a_directory_that_cannot_be_made(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "fifo")
    assert said in directory_mistake(tmp_path / name)


def test_a_loop_and_a_name_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert "symbolic links" in directory_mistake(tmp_path / "loop" / "x")
    assert "too long" in directory_mistake(tmp_path / ("x" * 300))
    assert "null" in directory_mistake("a\0b")

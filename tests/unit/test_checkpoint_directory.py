# SPDX-License-Identifier: Apache-2.0
"""Tests of checkpoint directories: how they are interpreted, what is refused, and which runs may write into them."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bitcpm_megatron.checkpoints.directory import (
    TRACKER,
    CheckpointError,
    check_start,
    iteration_directory,
    latest,
    publish_checkpoint,
    recover,
    saved_arguments,
)
from bitcpm_megatron.checkpoints.directory_lock import LOCK, lock_directory
from bitcpm_megatron.cli import FailedError
from bitcpm_megatron.files import lock as file_lock

HOLD = """
import os, sys, time
from bitcpm_megatron.checkpoints.directory_lock import lock_directory
lock = lock_directory(sys.argv[1])
if os.fork() == 0:  # what a data loader does; it lives on when its parent is killed
    time.sleep(20)
    os._exit(0)
print("held", flush=True)
time.sleep(60)
"""


def checkpoint(path: Path, content: str = "{}") -> Path:
    path.mkdir(parents=True)
    (path / "metadata.json").write_text(content)
    return path


def everything(directory: Path) -> list[tuple]:
    """Returns the names and inodes of everything in a directory."""
    return sorted((str(path), path.lstat().st_ino) for path in directory.rglob("*"))


def test_a_query_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / TRACKER).write_text("2")
    aside = checkpoint(tmp_path / ".iter_0000002.aside")
    checkpoint(tmp_path / ".iter_0000004.incomplete")
    before = everything(tmp_path)
    assert latest(tmp_path) == aside
    assert everything(tmp_path) == before
    recover(tmp_path)
    assert latest(tmp_path) == tmp_path / "iter_0000002"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000002", TRACKER]


@pytest.mark.parametrize("text", ["", "²", "9" * 30, "0", "-1", "1.5", "iter_2", "2\n4"])
def test_a_damaged_tracker_is_refused_with_the_cure(text: str, tmp_path: Path) -> None:
    for iteration in (2, 4):
        checkpoint(iteration_directory(tmp_path, iteration))
    (tmp_path / TRACKER).write_text(text)
    with pytest.raises(CheckpointError, match=rf"write 4 into {TRACKER} \(complete are 2, 4\)"):
        latest(tmp_path)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to(path.name)])
def test_a_tracker_that_is_no_file_is_refused(make, tmp_path: Path) -> None:
    checkpoint(iteration_directory(tmp_path, 2))
    make(tmp_path / TRACKER)
    with pytest.raises(CheckpointError, match=f"write 2 into {TRACKER}"):
        latest(tmp_path)


def test_a_lost_tracker_is_refused_while_checkpoints_stand(tmp_path: Path) -> None:
    checkpoint(iteration_directory(tmp_path, 2))
    with pytest.raises(CheckpointError, match=f"{TRACKER} is missing: .* write 2 into {TRACKER}"):
        latest(tmp_path)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (Path.touch, "is a file: name the directory"),
        (os.mkfifo, "is a file: name the directory"),
        (lambda path: path.symlink_to(path.name), "symbolic links"),
        (lambda path: path.symlink_to("nowhere"), "link to nothing"),
        (lambda path: checkpoint(path), "is a checkpoint itself .* write 6 into"),
    ],
)
def test_what_is_no_directory_of_checkpoints_is_refused(make, said: str, tmp_path: Path) -> None:
    make(tmp_path / "iter_0000006")
    with pytest.raises(CheckpointError, match=said):
        latest(tmp_path / "iter_0000006")


def test_a_kill_between_the_renames_of_a_first_checkpoint_loses_nothing(tmp_path: Path, monkeypatch) -> None:
    temporary = checkpoint(tmp_path / ".iter_0000002.incomplete")
    replace = os.replace

    def crash(source: Path, target: Path) -> None:
        if Path(target).name == TRACKER:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        publish_checkpoint(temporary, iteration_directory(tmp_path, 2), None)
    monkeypatch.setattr(os, "replace", replace)
    assert latest(tmp_path) == iteration_directory(tmp_path, 2)
    recover(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000002", TRACKER]
    # The tracker is valid afterwards, whatever its temporary file contained.
    assert (tmp_path / TRACKER).read_text() == "2"


def test_a_start_that_would_write_over_checkpoints_is_refused(tmp_path: Path) -> None:
    save, elsewhere = tmp_path / "save", tmp_path / "elsewhere"
    for iteration in (2, 4):
        checkpoint(iteration_directory(save, iteration))
    loaded = checkpoint(iteration_directory(elsewhere, 3))
    with pytest.raises(CheckpointError, match="up to iteration 4, and this run starts at iteration 0 and would"):
        check_start(save, None, 0)
    with pytest.raises(CheckpointError, match=f"starts at iteration 3 from {loaded}"):
        check_start(save, loaded, 3)
    with pytest.raises(CheckpointError, match="without --finetune"):
        check_start(save, iteration_directory(save, 4), 0)
    check_start(save, iteration_directory(save, 2), 2)  # a restart from an earlier checkpoint of the same directory
    check_start(save, loaded, 4)
    check_start(tmp_path / "new", None, 0)


@pytest.mark.parametrize("text", ["{", "[]", '"text"', "", None])
def test_damaged_arguments_are_refused(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "arguments.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"arguments\.json"):
        saved_arguments(tmp_path)


@pytest.mark.slow
def test_a_second_job_is_told_who_writes_there_and_a_killed_one_lets_go(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(file_lock, "_PATIENCE_SECONDS", 0.3)
    environment = {**os.environ, "SLURM_JOB_ID": "4711"}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "save")],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match=rf"SLURM job 4711, process {holder.pid} on \S+, since 20\d\d-"):
            lock_directory(tmp_path / "save")
        holder.kill()
        holder.wait()
        lock_directory(tmp_path / "save").release()
        assert not (tmp_path / "save" / LOCK).exists()
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.stdout.close()


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch) -> None:
    def unsupported(*args: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(file_lock.fcntl, "lockf", unsupported)
    lock = lock_directory(tmp_path)
    assert "has no locks" in lock.note and f"process {os.getpid()} on " in (tmp_path / LOCK).read_text()
    lock.release()


@pytest.mark.parametrize("make", [Path.touch, os.mkfifo, lambda path: path.symlink_to(path.name)])
@pytest.mark.parametrize("below", ["", "below"])
def test_a_place_that_cannot_be_written_is_refused_before_training(make, below: str, tmp_path: Path) -> None:
    make(tmp_path / "save")
    with pytest.raises(CheckpointError, match="--save .*: (name a directory|choose another)"):
        lock_directory(tmp_path / "save" / below)


def test_where_nobody_may_write_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"--save /proc/\S+ cannot be written"):
        lock_directory("/proc/bitcpm-checkpoints")


def test_on_a_full_disk_a_lock_says_so_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(file_lock.os, "pwrite", full)
    with pytest.raises(FailedError, match="No space left on device.*free some space"):
        lock_directory(tmp_path / "save")
    assert list((tmp_path / "save").iterdir()) == []

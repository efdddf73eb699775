# SPDX-License-Identifier: Apache-2.0
import errno
import os
import signal
import subprocess
import sys

import pytest

from bitcpm_megatron.checkpoint_tools.storage import staging
from bitcpm_megatron.checkpoint_tools.storage.reader import ConversionError
from bitcpm_megatron.checkpoint_tools.storage.staging import staged
from bitcpm_megatron.cli import FailedError


def test_directory_appears_with_the_end_of_the_block(tmp_path):
    final = tmp_path / "a" / "b"
    with staged(final, 10) as directory:
        assert directory == tmp_path / "a" / ".b.incomplete"
        (directory / "sub").mkdir()
        (directory / "sub" / "file").write_text("x")
        assert not final.exists()
    assert (final / "sub" / "file").read_text() == "x"
    assert os.listdir(tmp_path / "a") == ["b"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_of_a_failure(tmp_path, error):
    with pytest.raises(error), staged(tmp_path / "a") as directory:
        (directory / "file").write_text("x")
        raise error
    assert os.listdir(tmp_path) == []


def test_existing_directories(tmp_path):
    final = tmp_path / "a"
    final.mkdir()
    (tmp_path / "link").symlink_to(final)
    with staged(tmp_path / "link") as directory:
        (directory / "file").write_text("x")
    assert (tmp_path / "link" / "file").read_text() == "x"
    with pytest.raises(ConversionError, match="--save-dir"), staged(final):
        raise AssertionError
    with pytest.raises(ConversionError, match="--save-dir"), staged(final / "file"):
        raise AssertionError
    assert (final / "file").read_text() == "x"


def test_mount_points(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(staging.os.path, "ismount", lambda path: path == tmp_path / "disk")
    with pytest.raises(ConversionError, match="mount point"), staged(tmp_path / "disk"):
        raise AssertionError


def test_directory_that_appears_meanwhile(tmp_path):
    final = tmp_path / "a"
    with pytest.raises(ConversionError, match="not empty"), staged(final) as directory:
        (directory / "file").write_text("mine")
        final.mkdir()
        (final / "file").write_text("theirs")
    assert os.listdir(tmp_path) == ["a"] and (final / "file").read_text() == "theirs"


def test_leftovers_are_removed(tmp_path):
    (tmp_path / ".a.incomplete").mkdir()
    (tmp_path / ".a.incomplete" / "old").write_text("x")
    with staged(tmp_path / "a") as directory:
        assert os.listdir(directory) == []
    assert os.listdir(tmp_path) == ["a"]


def test_full_disk(tmp_path):
    message = r"the disk is full: 1,234 bytes are needed, [\d,]+ were free"
    with pytest.raises(FailedError, match=message) as error, staged(tmp_path / "a", 1234) as directory:
        (directory / "file").write_text("x")
        with open("/dev/full", "w") as file:
            file.write("x")
    assert error.value.__cause__.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == []


def test_other_errors_of_the_system_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError), staged(tmp_path / "a") as directory:
        (directory / "nothing").read_text()


def test_free_space_is_checked_first(tmp_path):
    message = r"10,000,000,000,000,000 bytes are needed and [\d,]+ are free"
    for final in (tmp_path / "a", tmp_path / "not" / "yet" / "there"):
        with pytest.raises(FailedError, match=message), staged(final, 10**16):
            raise AssertionError
        assert not any(path.is_file() or path == final for path in tmp_path.rglob("*"))
        assert os.listdir(final.parent) == []


@pytest.mark.slow
@pytest.mark.verifies(
    "trust",
    "a conversion that is killed leaves no partial directory: the output appears completely or not at all",
    cuda="-",
    npu="-",
)
def test_kill(tmp_path):
    """A process that is killed while it writes leaves no directory, and the next one succeeds."""
    code = f"""
import sys, time
from pathlib import Path
from bitcpm_megatron.checkpoint_tools.storage.staging import staged
with staged(Path({str(tmp_path / "a")!r})) as directory:
    (directory / "half").write_text("x")
    print("half", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "a").exists()
    with staged(tmp_path / "a") as directory:
        (directory / "whole").write_text("x")
    assert os.listdir(tmp_path) == ["a"] and os.listdir(tmp_path / "a") == ["whole"]


def test_it_is_synced_before_it_gets_its_name(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(staging, "publish", lambda temporary, final: seen.append((temporary.name, final.name)))
    with staged(tmp_path / "a"):
        pass
    assert seen == [(".a.incomplete", "a")]

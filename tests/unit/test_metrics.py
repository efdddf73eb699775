# SPDX-License-Identifier: Apache-2.0
"""Tests of the metrics, plots and logs that a run writes."""

import math
import os
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bitcpm_megatron.files import FileError
from bitcpm_megatron.training.metrics import METRICS, MetricsLog, plot_losses, read_metrics


def record(iteration: int, loss: float, kind: str = "train") -> dict:
    return {"kind": kind, "iteration": iteration, "lm_loss": loss}


def write(directory: Path, losses: dict[int, float], resumed_from: int = 0) -> None:
    log = MetricsLog(directory, resumed_from)
    for iteration, loss in losses.items():
        log.write(record(iteration, loss))
    log.close()


def test_a_resumed_run_holds_every_iteration_once(tmp_path: Path) -> None:
    write(tmp_path, {1: 5.0, 2: 4.0, 3: 3.5})
    write(tmp_path, {3: 3.0, 4: 2.0}, resumed_from=2)
    assert read_metrics(tmp_path) == [record(1, 5.0), record(2, 4.0), record(3, 3.0), record(4, 2.0)]
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(s.step, s.value) for s in events.Scalars("train/lm_loss")] == [(1, 5.0), (2, 4.0), (3, 3.0), (4, 2.0)]


def test_a_killed_run_leaves_an_unfinished_line(tmp_path: Path) -> None:
    write(tmp_path, {1: 5.0, 2: 4.0})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "itera')
    write(tmp_path, {3: 3.0}, resumed_from=2)
    assert read_metrics(tmp_path) == [record(1, 5.0), record(2, 4.0), record(3, 3.0)]


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    write(tmp_path, {1: 5.0, 2: 4.0})
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    plot_losses({"a": tmp_path, "b": tmp_path}, tmp_path / "both.png", {"entropy": 6.0})
    assert (tmp_path / "both.png").stat().st_size > (tmp_path / "loss.png").stat().st_size


def test_without_a_directory_nothing_is_written(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(None, {1: 5.0})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("half a li", "line 2: not valid JSON"),
        ("[1]", "line 2: no record of a run"),
        ('{"kind": "train"}', "line 2: no record of a run"),
        ('{"kind": 3, "iteration": 2}', "line 2: no record of a run"),
        ('{"kind": "train", "iteration": "2"}', "line 2: no record of a run"),
        ("[" * 100_000, "line 2: nested too deeply"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    good = '{"kind": "valid", "iteration": 1, "lm_loss": NaN}\n'
    (tmp_path / METRICS).write_text(f"{good}{line}\n{good}")
    with pytest.raises(FileError) as caught:
        read_metrics(tmp_path)
    assert said in str(caught.value) and METRICS in str(caught.value)


def test_a_last_line_without_an_end_is_none_and_nan_is_read(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text('{"kind": "valid", "iteration": 1, "lm_loss": NaN}\n{"kind": "tr')
    (record,) = read_metrics(tmp_path)
    assert record["iteration"] == 1 and math.isnan(record["lm_loss"])


@pytest.mark.parametrize("package", ["matplotlib", "tensorboard"])
def test_a_package_that_is_not_there_is_missed_before_the_run(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"a log needs {package}: pip install 'bitcpm_megatron\[plot\]'"):
        MetricsLog(tmp_path / "log")
    assert not (tmp_path / "log").exists()
    MetricsLog(None).close()


def test_a_log_that_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / METRICS)
    with pytest.raises(FileError, match="this is no regular file"):
        MetricsLog(tmp_path)

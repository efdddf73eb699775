# SPDX-License-Identifier: Apache-2.0
"""What a run leaves to be looked at."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bitcpm_megatron.training.metrics import MetricsLog, plot_losses, read_metrics


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

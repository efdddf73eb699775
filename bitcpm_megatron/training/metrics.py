# SPDX-License-Identifier: Apache-2.0
"""The metrics of a run, written as ``metrics.jsonl``, TensorBoard events and pictures."""

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..cli import Whole
from ..files import FileError, parse_json, require_file, write_text

METRICS = "metrics.jsonl"


def read_metrics(directory: str | Path) -> list[dict[str, Any]]:
    """Returns all records of a run's ``metrics.jsonl``, oldest first, without a last line that a killed run cut short.

    Raises:
        FileError: if there is no such regular file, or a line of it is no record; the message has the line's number.
    """
    path = Path(directory) / METRICS
    require_file(path)
    with path.open(encoding="utf-8") as file:
        try:
            return [_record(line, f"{path}, line {i}") for i, line in enumerate(file, 1) if line.endswith("\n")]
        except UnicodeDecodeError:
            raise FileError(f"{path}: not UTF-8: delete what is damaged, or choose another --log-dir") from None


def _record(line: str, where: str) -> dict[str, Any]:
    # A validation loss may be NaN, and every written record must be readable.
    record = parse_json(line, where, allow_nan=True)
    good = isinstance(record, dict) and isinstance(record.get("kind"), str)
    if not good or Whole(0, 2**63).mistake(record.get("iteration")) is not None:
        raise FileError(f"{where}: no record of a run: delete the line, or choose another --log-dir")
    return record


class MetricsLog:
    """Writer of the records of one run; only rank 0 gives it a directory.

    A resumed run appends to the same files. Records after the iteration that it resumes from are dropped first, so that
    every iteration is recorded once.

    Args:
        directory: the directory to write to, or None to write nothing.
        resumed_from: the iteration that training goes on from.

    Raises:
        ImportError: if a directory is given, and a package that it needs (:func:`missing_packages`) is not installed.
    """

    def __init__(self, directory: str | Path | None, resumed_from: int = 0) -> None:
        self._directory = None if directory is None else Path(directory)
        self._events: Any = None
        if self._directory is None:
            return
        if missing := missing_packages():
            raise ImportError(f"a log needs {' and '.join(missing)}: pip install 'bitcpm_megatron[plot]'")
        from torch.utils.tensorboard import SummaryWriter

        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / METRICS
        if path.exists() or path.is_symlink():
            kept = [r for r in read_metrics(self._directory) if r["iteration"] <= resumed_from]
            write_text(path, "".join(json.dumps(r) + "\n" for r in kept))
        self._events = SummaryWriter(str(self._directory), purge_step=resumed_from + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record; numbers become TensorBoard scalars ``<kind>/<name>``, nested ones ``<kind>/<path>``."""
        if self._directory is None:
            return
        with open(self._directory / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        scalars = _scalars({k: v for k, v in record.items() if k not in ("kind", "iteration")})
        for name, value in scalars.items():
            self._events.add_scalar(f"{record['kind']}/{name}", value, record["iteration"])

    def close(self) -> None:
        """Flushes the events and draws ``loss.png``, and ``ternary.png`` if there is telemetry."""
        if self._directory is None:
            return
        self._events.close()
        if (self._directory / METRICS).is_file():
            plot_losses({"": self._directory}, self._directory / "loss.png")
            if any(r["kind"] == "ternary" for r in read_metrics(self._directory)):
                plot_telemetry(self._directory, self._directory / "ternary.png")


def plot_losses(runs: Mapping[str, str | Path], picture: str | Path, levels: Mapping[str, float] | None = None) -> None:
    """Draws training (line) and validation (dots) losses of one or more runs.

    Args:
        runs: the directories with a ``metrics.jsonl``, by the name in the legend.
        picture: the PNG to write.
        levels: the losses, in nats per token and by name, at which horizontal lines are drawn for comparison.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, (name, directory) in enumerate(runs.items()):
        records = read_metrics(directory)
        for kind, style in (("train", {"linewidth": 1, "alpha": 0.6}), ("valid", {"marker": "o", "linewidth": 2})):
            points = [(r["iteration"], r["lm_loss"]) for r in records if r["kind"] == kind]
            if points:
                axes.plot(*zip(*points, strict=True), color=f"C{index}", label=f"{name} {kind}".strip(), **style)
    for name, value in (levels or {}).items():
        axes.axhline(value, color="gray", linestyle="--", linewidth=1, label=f"{name} {value:.2f}")
    axes.set(xlabel="iteration", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120)


def plot_telemetry(directory: str | Path, picture: str | Path) -> None:
    """Draws a run's zeros, changed codes and mean scales as a PNG, with a line per kind of module and one for all."""
    from matplotlib.figure import Figure

    records = [r for r in read_metrics(directory) if r["kind"] == "ternary"]
    kinds = sorted({name.rpartition(".")[2] for r in records for name in r["modules"]})
    panels = {"zeros": "fraction of zeros", "changed": "fraction of codes changed", "scale_mean": "mean scale"}
    figure = Figure(figsize=(13, 4), layout="constrained")
    all_axes = figure.subplots(1, len(panels))
    for axes, (field, title) in zip(all_axes, panels.items(), strict=True):
        for kind in (*kinds, "total"):
            points = []
            for r in records:
                each = {**r["modules"], "total": r["total"]}.items()
                values = [m[field] for name, m in each if name.rpartition(".")[2] == kind and m[field] is not None]
                if values:
                    points.append((r["iteration"], sum(values) / len(values)))
            if points:
                axes.plot(*zip(*points, strict=True), marker=".", label=kind, linewidth=2 if kind == "total" else 1)
        axes.set(xlabel="iteration", title=title)
        axes.grid(alpha=0.3)
    all_axes[0].legend(fontsize="small")
    figure.savefig(picture, dpi=120)


def _scalars(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            found.update(_scalars(value, f"{prefix}{name}/"))
        elif isinstance(value, int | float):
            found[f"{prefix}{name}"] = value
    return found


def missing_packages() -> list[str]:
    """Returns the packages that a log directory needs and this environment lacks."""
    return [name for name in ("matplotlib", "tensorboard") if importlib.util.find_spec(name) is None]

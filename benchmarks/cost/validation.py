# SPDX-License-Identifier: Apache-2.0
"""Validation of the cost model: its predictions next to the measurements that ``throughput.py`` wrote."""

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hardware import best_device, machine
from report.tables import markdown, number
from steps.plan import model_flags
from steps.variants import CACHES

from bitcpm_megatron.launch.launcher.presets import PresetError
from bitcpm_megatron.ops import active_backend
from cost.calibration import calibrate
from cost.model import Prediction, predict
from cost.workload import MACHINES, BadInput, Machine, Workload, layout_of

# Variant -> cache. "ternary" names no cache: --ternary by itself takes resident weights, which a BF16 model with fp32
# masters can always have.
_VARIANTS = {"bf16": "step", **{cache: cache for cache in CACHES}, "ternary": "resident"}
_SIZES = ("tp", "pp", "dp", "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
_WHOLE = (*_SIZES, "kv_channels", "vocab_size", "seq_length", "micro_batch_size", "tokens", "micro_batches")
_WORDS = ("layout", "device", "model", "recompute", "variant")
_MEASURED = ("step_ms", "ratio", "ratio_low", "ratio_high", "peak_bytes", "resident_bytes", "collective_bytes")
_CHECKED = ("quantized_weights", "quantizations")
COLUMNS = (*_WORDS, *_WHOLE, *_MEASURED, *_CHECKED)

Row = Mapping[str, str]
Calibrate = Callable[[Workload, str], Machine]


@dataclass(frozen=True)
class Comparison:
    """A measured row next to its prediction.

    Attributes:
        row: the row of the file.
        workload: the workload that was measured.
        prediction: the prediction for the workload.
        measured: the numbers of the row by column, None for an empty cell; ``more_peak_bytes`` and
            ``more_resident_bytes`` are the differences from BF16's.
    """

    row: Row
    workload: Workload
    prediction: Prediction
    measured: Mapping[str, float | None]

    @property
    def step_ms(self) -> float:
        """Predicted step time of the row's variant in milliseconds."""
        ternary = self.row["variant"] != "bf16"
        return 1e3 * (self.prediction.ternary_seconds if ternary else self.prediction.bf16_seconds)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Reads the rows of a throughput file.

    Raises:
        BadInput: if the file cannot be read, is not CSV with the columns :data:`COLUMNS`, or has no rows.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{path}: {error}") from None
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise BadInput(f"{path}: no column {', '.join(missing)}")
    if not rows:
        raise BadInput(f"{path}: no rows")
    for i, row in enumerate(rows):
        if None in row or None in row.values():
            raise BadInput(f"{path}, row {i + 1}: {len(reader.fieldnames)} cells expected")
    return rows


def workload_of(row: Row) -> Workload:
    """Returns the workload of a measured row; settings that the file lacks have the defaults of our training loop.

    The layout's name says whether sequence parallelism and the distributed optimizer are used (``TP2xDP2+SP+DO``); the
    model's flags say whether embeddings are tied.

    Raises:
        BadInput: if a cell is not a number, or numbers contradict each other.
    """
    size = {name: _number(row, name, int) for name in _WHOLE}
    empty = [name for name, value in size.items() if value is None]
    if empty:
        raise BadInput(f"{_label(row)}: nothing in {', '.join(empty)}")
    if size["tokens"] != size["seq_length"] * size["micro_batch_size"]:
        raise BadInput(f"{_label(row)}: tokens {size['tokens']} are not seq_length x micro_batch_size")
    options = row["layout"].upper().split("+")[1:]
    return Workload(
        row["model"],
        layout_of(size, _tied(row["model"])),
        size["micro_batches"],
        cache=_VARIANTS[row["variant"]],
        group_size=-1,
        sequence_parallel="SP" in options,
        recompute=row["recompute"] if row["recompute"] not in ("", "none", "None") else None,
        distributed_optimizer="DO" in options,
        fused_kernels=False,
    )


def _tied(model: str) -> bool:
    try:
        return "--untie-embeddings-and-output-weights" not in model_flags(model, None, None)
    except PresetError:
        raise BadInput(f"model {model!r} is neither a preset nor 0.5b-layers") from None


def validate(path: Path, calibrator: Calibrate = calibrate) -> tuple[list[Comparison], list[str], list[Machine]]:
    """Predicts every row of a throughput file.

    Args:
        path: the file.
        calibrator: a function that returns the machine for a workload and a device type.

    Returns:
        The comparisons in the order of the file; notes on rows that are left out or contradict the model; the machines
        of the predictions.

    Raises:
        BadInput: if the file cannot be used, or a device is neither present nor among :data:`MACHINES`.
    """
    rows = read_rows(path)
    left = dict.fromkeys(row["variant"] for row in rows if row["variant"] not in _VARIANTS)
    notes = [f"Not predicted: {', '.join(left)}."] if left else []
    rows = [row for row in rows if row["variant"] in _VARIANTS]
    machines: dict[tuple, Machine] = {}
    found = []
    for row in rows:
        workload = workload_of(row)
        # The rates depend on shapes and ranks, not on the number of micro-batches, the cache or recomputation.
        key = (row["device"], replace(workload, micro_batches=1, cache="step", recompute=None))
        if key not in machines:
            machines[key] = _machine_of(row["device"], workload, calibrator)
        prediction = predict(machines[key], workload)
        baseline = next((r for r in rows if r["variant"] == "bf16" and _same(r, row)), None)
        found.append(Comparison(row, workload, prediction, _measured(row, baseline)))
        notes += _contradictions(row, workload, prediction)
    return found, notes, list(machines.values())


def _machine_of(device: str, workload: Workload, calibrator: Calibrate) -> Machine:
    here = best_device()
    if device == "cpu" or (here != "cpu" and device in (here, machine(here))):
        return calibrator(workload, "cpu" if device == "cpu" else here)
    for name, published in MACHINES.items():
        if name in device:
            return published
    raise BadInput(f"device {device!r} is neither here nor one of {', '.join(MACHINES)}")


def _measured(row: Row, baseline: Row | None) -> dict[str, float | None]:
    found = {name: _number(row, name) for name in _MEASURED}
    base = {name: _number(baseline, name) if baseline else None for name in _MEASURED}
    for name in ("peak_bytes", "resident_bytes"):
        known = None not in (found[name], base[name])
        found[f"more_{name}"] = found[name] - base[name] if known else None
    if found["ratio"] is None and found["step_ms"] is not None and base["step_ms"]:
        found["ratio"] = found["step_ms"] / base["step_ms"]
    return found


def _contradictions(row: Row, workload: Workload, prediction: Prediction) -> list[str]:
    """Returns notes on contradictions: another backend, or other numbers of weights or quantizations than predicted."""
    if row["variant"] == "bf16":
        return []
    notes = []
    backend, here = row.get("backend"), active_backend("cpu").backend.name
    if row["device"] == "cpu" and backend and backend != here:
        notes.append(f"{_label(row)}: measured with the backend {backend}, predicted with {here}.")
    weights = _number(row, "quantized_weights")
    if weights is not None and weights != workload.quantized_weights:
        notes.append(f"{_label(row)}: {weights:.0f} quantized weights, the model has {workload.quantized_weights:.0f}.")
    expected = prediction.quantizations * len(workload.linears)
    made = _number(row, "quantizations")
    if made is not None and made != expected:
        notes.append(f"{_label(row)}: {made:.0f} quantizations, the model has {expected}.")
    return notes


def _same(row: Row, other: Row) -> bool:
    return all(row[name] == other[name] for name in ("layout", "device", "model", "recompute", *_WHOLE))


def _number(row: Row, name: str, kind: type = float) -> float | None:
    text = row[name].strip()
    if not text:
        return None
    try:
        number = kind(text)
    except ValueError:
        raise BadInput(f"{_label(row)}: {name} is {text!r}, not a number") from None
    if math.isinf(number) and name in ("ratio_low", "ratio_high"):
        return None  # too few pairs for an interval
    if not math.isfinite(number) or number < 0:
        raise BadInput(f"{_label(row)}: {name} is {text!r}")
    return number


def _label(row: Row) -> str:
    return f"{row['layout']}, T={row['tokens']}, n={row['micro_batches']}, {row['variant']}"


def validation_table(comparisons: Sequence[Comparison]) -> str:
    """Returns a Markdown table of predicted / measured numbers."""
    head = (
        "model | layout | device | T | n | variant | step, ms: predicted / measured "
        "| overhead, %: predicted / measured (interval) | more memory, MB: predicted / measured at peak / staying "
        "| collectives, MB: predicted / measured"
    )
    lines = []
    for c in comparisons:
        overhead, memory, p, m = "-", "-", c.prediction, c.measured
        if c.row["variant"] != "bf16":
            ratio, low, high = (None if m[k] is None else m[k] - 1 for k in ("ratio", "ratio_low", "ratio_high"))
            interval = "" if low is None else f" ({1e2 * low:.2f} ... {1e2 * high:.2f})"
            overhead = _show(1e2, p.overhead, ratio) + interval
            memory = _show(1e-6, p.extra_bytes, m["more_peak_bytes"], m["more_resident_bytes"])
        measured = number(m["step_ms"], missing="-")
        lines.append(
            f"{c.row['model']} | {c.row['layout']} | {c.row['device']} | {c.workload.tokens} "
            f"| {c.workload.micro_batches} | {c.row['variant']} | {c.step_ms:.1f} / {measured} "
            f"| {overhead} | {memory} | {_show(1e-6, p.communication_bytes, m['collective_bytes'])}"
        )
    return markdown(head, lines)


def _show(scale: float, *values: float | None) -> str:
    return " / ".join(number(value, 2, scale=scale, missing="-") for value in values)

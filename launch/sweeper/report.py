# SPDX-License-Identifier: Apache-2.0
"""Results of a sweep as files: a table for people, the same for programs, and a picture, without times or paths."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...files import replacing, write_text
from .results import Results, Row
from .runs import FAILED, FINISHED, UNFINISHED
from .sweep_file import name_of

TABLE, DATA, PICTURE = "results.md", "results.json", "results.png"


def write(results: Results, output: Path) -> None:
    """Writes the three files into the directory of a sweep, each completely or not at all."""
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / DATA, json.dumps(content(results), indent=1) + "\n")
    draw(results, output / PICTURE)
    write_text(output / TABLE, "\n".join(table(results)) + "\n")


def table(results: Results) -> list[str]:
    """Returns the lines of the Markdown file: the arms, the meaning of the numbers, and every run."""
    counts = ", ".join(f"{results.count(state)} {state}" for state in (FINISHED, UNFINISHED, FAILED))
    description = results.sweep.description
    return [
        *(f"# {results.sweep.path.stem}", "", *([description, ""] if description else [])),
        *(f"{len(results.runs)} runs: {counts}.", "", *arms(results), ""),
        "Nats per token: means over seeds and, of two or more, 95 % intervals by Student's t distribution; differences "
        "are taken seed by seed.",
        *("", *_runs(results)),
    ]


def arms(results: Results) -> list[str]:
    """Returns the lines of the table of arms."""
    head = ["arm", "seeds", f"training loss, last {results.sweep.last_records} records"]
    head += ["validation loss"] * _validates(results)
    head += [f"{results.judged} loss: difference"] * (results.sweep.baseline is not None)
    return _grid([*head, ""], [_cells(row, results) for row in results.rows])


def _runs(results: Results) -> list[str]:
    cells = []
    for run in results.runs:
        result = results.of(run)
        losses = [result.training, *([result.validation] if _validates(results) else [])]
        said = f"{result.steps} of {run.iterations} steps" if result.state == UNFINISHED else result.reason
        cells.append([run.name, run.arm.name, str(run.seed), result.state, *map(_number, losses), said])
    head = ["run", "arm", "seed", "state", "training loss", *["validation loss"] * _validates(results), ""]
    return _grid(head, cells)


def _validates(results: Results) -> bool:
    return any(run.evaluates for run in results.runs)


def _cells(row: Row, results: Results) -> list[str]:
    done = sum(result.state == FINISHED for result in row.results.values())
    cells = [row.arm.name, str(done) if done == len(row.results) else f"{done} of {len(row.results)}"]
    cells += [_interval(row.training)]
    cells += [_interval(row.validation)] * _validates(results)
    if results.sweep.baseline is not None:
        cells.append("baseline" if row.reference is None else _interval(row.difference, "+"))
    return [*cells, "; ".join(_remarks(row, results))]


def _remarks(row: Row, results: Results) -> list[str]:
    found = [f"at the edge of {results.sweep.optimum}"] if row.at_the_edge else []
    reasons: dict[str, list[int]] = {}
    for seed, result in row.results.items():
        if result.state == FAILED:
            reasons.setdefault(result.reason, []).append(seed)
    for reason, seeds in reasons.items():
        which = "seed" if len(seeds) == 1 else "seeds"
        found.append(f"{which} {', '.join(map(str, seeds))} failed: {reason}")
    return found


def _interval(found: Mapping[str, float] | None, sign: str = "") -> str:
    if found is None:
        return "-"
    ends = f" ({found['low']:{sign}.4f} to {found['high']:{sign}.4f})" if "low" in found else ""
    return f"{found['mean']:{sign}.4f}{ends}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def content(results: Results) -> dict[str, Any]:
    """Returns the content of the JSON file; a loss that is not finite is null."""
    return {
        "description": results.sweep.description,
        "last_records": results.sweep.last_records,
        "judged": results.judged,
        "baseline": results.sweep.baseline,
        "optimum": results.sweep.optimum,
        "arms": [
            {
                "name": row.arm.name,
                "values": row.arm.values,
                "flags": row.arm.flags,
                "training": _finite(row.training),
                "validation": _finite(row.validation),
                "reference": row.reference and row.reference.name,
                "difference": _finite(row.difference),
                "at_the_edge": row.at_the_edge,
            }
            for row in results.rows
        ],
        "runs": [
            {"run": run.name, "arm": run.arm.name, "seed": run.seed, **_finite(vars(results.of(run)))}
            for run in results.runs
        ],
    }


def _finite(values: Mapping[str, Any] | None) -> Any:
    if values is None:
        return None
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def draw(results: Results, path: Path) -> None:
    """Draws the judged loss: for each arm a dot per seed, and the mean with its interval.

    If an axis should have an optimum, that is the horizontal axis, with a line for every combination of the others.
    """
    from matplotlib.figure import Figure

    axis = results.sweep.optimum
    lines: dict[str, list[tuple[Any, Row]]] = {}
    for position, row in enumerate(results.rows):
        others = name_of({k: v for k, v in row.arm.values.items() if k != axis}) if axis else ""
        lines.setdefault(others, []).append((row.arm.values[axis] if axis else position, row))
    figure = Figure(figsize=(min(30.0, max(6.0, 0.6 * len(results.rows))), 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (name, points) in enumerate(lines.items()):
        ordered = sorted(points, key=lambda point: point[0]) if axis else points
        _draw_line(axes, ordered, results.judged, axis is not None, f"C{number}", name)
    if axis:
        values = sorted({row.arm.values[axis] for row in results.rows})
        axes.set(xlabel=axis, xscale="log" if values[0] > 0 else "linear")
        axes.set_xticks(values, map(str, values))
        axes.minorticks_off()
    else:
        axes.set_xticks(range(len(results.rows)), [row.arm.name for row in results.rows], rotation=30, ha="right")
    axes.set_ylabel(f"{results.judged} loss (nats per token)")
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend(fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def _draw_line(axes: Any, points: Sequence[tuple[Any, Row]], loss: str, is_axis: bool, color: str, label: str) -> None:
    for place, row in points:
        seeds = [getattr(result, loss) for result in row.results.values() if result.state == FINISHED]
        axes.plot([place] * len(seeds), seeds, ".", color=color, alpha=0.5)
    means = [(place, found) for place, row in points if (found := getattr(row, loss))]
    if means:
        middle = [found["mean"] for _, found in means]
        ends = [[abs(found.get(end, found["mean"]) - found["mean"]) for _, found in means] for end in ("low", "high")]
        joined = "-o" if is_axis else "o"
        axes.errorbar([at for at, _ in means], middle, yerr=ends, fmt=joined, color=color, capsize=3, label=label)

# SPDX-License-Identifier: Apache-2.0
"""The retention table as files: Markdown for people, CSV for programs, and a picture; none contains a time."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...files import FileError, read_text, replacing, write_text
from .comparing import MEAN, Row, Table, table_of
from .scores import DIRECTORY, model_digest, read_scores
from .statistics import LEAST_ITEMS, RESAMPLES

REPORT, DATA, PICTURE = "retention.md", "retention.csv", "retention.png"
NOT_SIGNIFICANT = "not significant"
_COLUMNS = (
    "model task metric items skipped score base_model base_score retention retention_low retention_high difference "
    "difference_low difference_high significant chance majority remarks"
).split()


def write(table: Table, output: Path) -> None:
    """Writes the three files into the directory of an evaluation, each completely or not at all."""
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / DATA, _csv(table))
    draw(table, output / PICTURE)
    write_text(output / REPORT, "\n".join(lines(table)) + "\n")


def lines(table: Table) -> list[str]:
    """Returns the lines of the Markdown file."""
    base, *others = table.models
    said = [f"# {' and '.join(m.name for m in others)} beside {base.name}" if others else f"# {base.name}", ""]
    said += [*summary(table), ""]
    if others:
        said += [_reading(base.name, others[0].name if len(others) == 1 else "a model"), ""]
    return [*said, "## How it was asked", "", *_provenance(table)]


def summary(table: Table) -> list[str]:
    """Returns the lines of the tables only: of every model compared with the first, or of a single model."""
    base, *others = table.models
    sections = [_section(table, model.name) for model in others or [base]]
    return [line for section in sections for line in ("", *section)][1:]


def _reading(base: str, model: str) -> str:
    return (
        f"Scores and differences are in points of 100. Retention is {model} / {base}; that of the mean is the ratio of "
        "the two means, not the mean of ratios. Intervals: 95 %, paired bootstrap over items (texts: over documents), "
        f"{RESAMPLES:,} resamples. A difference whose interval holds 0, or of fewer than {LEAST_ITEMS} items, "
        f"is called {NOT_SIGNIFICANT}; of twenty tasks without any difference one is expected to be called different."
    )


def _section(table: Table, model: str) -> list[str]:
    base = table.models[0].name
    compared = model != base
    found: list[str] = []
    for rows, scale, digits in ((table.tasks, 100, 1), (table.texts, 1, 4)):
        mine = [row for row in rows if row.model == model]
        if not mine:
            continue
        what = "task" if scale == 100 else "text"
        head = [what, "metric", "items" if scale == 100 else "documents"]
        head += ["skipped"] if scale == 100 else []
        head += [base, model, f"{model} / {base}", "difference (95 %)", ""] if compared else [base, "95 %", ""]
        cells = [_cells(row, compared, scale, digits) for row in mine]
        found += ["", *_grid(head, cells)] if found else _grid(head, cells)
    return found


def _cells(row: Row, compared: bool, scale: int, digits: int) -> list[str]:
    cells = [row.task, row.metric, str(row.items)] + ([str(row.skipped)] if scale == 100 else [])
    if not compared:
        ends = "-" if row.interval is None else " to ".join(f"{scale * end:.{digits}f}" for end in row.interval)
        return [*cells, _number(row.score, scale, digits), ends, "; ".join(row.remarks)]
    c = row.comparison
    if c is None:
        return [*cells, "-", "-", "-", "-", "; ".join(row.remarks)]
    retention = "-" if c.retention is None else f"{100 * c.retention:.1f} %"
    if c.retention_interval is not None:
        retention += f" ({100 * c.retention_interval[0]:.1f} to {100 * c.retention_interval[1]:.1f})"
    apart = f"{scale * c.difference:+.{digits}f} ({' to '.join(f'{scale * end:+.{digits}f}' for end in c.interval)})"
    remarks = [*row.remarks, *([] if c.significant else [NOT_SIGNIFICANT])]
    scores = [_number(c.base, scale, digits), _number(c.score, scale, digits)]
    return [*cells, *scores, retention, apart, "; ".join(remarks)]


def _number(value: float | None, scale: int, digits: int) -> str:
    return "-" if value is None else f"{scale * value:.{digits}f}"


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells]


def _provenance(table: Table) -> list[str]:
    cells = [
        [task, versions_of(scores.versions), str(scores.shots), scores.data]
        for task, scores in table.models[0].tasks.items()
    ]
    said = [*_grid(["task", "version", "shots", "digest of the items"], cells), ""] if cells else []
    for model in table.models:
        said += [f"- {model.name}: {_words(model.model)}; {_words(model.settings)}"]
    return said


def versions_of(versions: Mapping[str, Any]) -> str:
    """Returns the versions of the harness's tasks that make up a benchmark, as text."""
    different = sorted({str(version) for version in versions.values()})
    return ", ".join(different) + (f" ({len(versions)} tasks)" if len(versions) > 1 else "")


def _words(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{k.replace('_', ' ')} {v if isinstance(v, str) else json.dumps(v)}" for k, v in values.items())


def card_lines(output: Path, model: Path) -> list[str]:
    """Returns the evaluation section of a model's card: its rows of the table, computed from the scores.

    The model is compared with the first model of ``retention.csv``.

    Args:
        output: the directory of an evaluation.
        model: the path of the model, which the evaluation must include.

    Raises:
        FileError: if the evaluation does not include the model as it is, or a file is missing or damaged.
        ValueError: if the two models were not asked the same questions.
    """
    wanted = model_digest(model)
    asked = {path.stem: read_scores(output, path.stem) for path in sorted((output / DIRECTORY).glob("*.json"))}
    found = [scores for scores in asked.values() if scores.model.get("digest") == wanted]
    if not found:
        known = ", ".join(f"{name} ({scores.model.get('path')})" for name, scores in asked.items()) or "none"
        raise FileError(f"{output} is no evaluation of {model}, as it is now: it asked {known}")
    scores = found[0]
    first = next(csv.DictReader(io.StringIO(read_text(output / DATA))), {}).get("model")
    if first not in asked:
        raise FileError(
            f"{output / DATA} names no model that was asked: launch/evaluate.py --report-only writes it anew"
        )
    table = table_of([scores] if first == scores.name else [asked[first], scores])
    rows = [row for row in _records(table) if row["model"] == scores.name]
    base = "" if first == scores.name else first
    head = ["", "metric", "items", "skipped", "score", *([f"of {base}", "retention"] if base else []), ""]
    settings = _words(scores.settings)
    return [
        "\n".join(_grid(head, [_card_row(row, bool(base)) for row in rows])),
        f"Asked before packing, by {settings}.",
    ]


def _card_row(row: Mapping[str, str], compared: bool) -> list[str]:
    cells = [row[name] for name in ("task", "metric", "items", "skipped", "score")]
    if compared:
        cells += [row["base_score"], row["retention"]]
    said = [row["remarks"], NOT_SIGNIFICANT if row["significant"] == "False" else ""]
    return [*cells, "; ".join(filter(None, said))]


def _csv(table: Table) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_records(table))
    return text.getvalue()


def _records(table: Table) -> list[dict[str, str]]:
    """Returns the rows as they are written, by column."""
    base, found = table.models[0].name, []
    for row in (*table.tasks, *table.texts):
        c = row.comparison
        values: dict[str, Any] = dict.fromkeys(_COLUMNS) | {name: getattr(row, name) for name in _COLUMNS[:6]}
        values |= {"chance": row.chance, "majority": row.majority, "remarks": "; ".join(row.remarks)}
        if c is not None:
            low, high = c.retention_interval or (None, None)
            values |= {"base_model": base, "base_score": c.base, "retention": c.retention}
            values |= {"retention_low": low, "retention_high": high, "difference": c.difference}
            values |= {"difference_low": c.interval[0], "difference_high": c.interval[1], "significant": c.significant}
        found.append({k: _cell(v) for k, v in values.items()})
    return found


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.6f}" if isinstance(value, float) else str(value)


def draw(table: Table, path: Path) -> None:
    """Draws the retention of every task with its interval, or the scores of a single model."""
    from matplotlib.figure import Figure

    base, *others = table.models
    names = [row.task for row in table.tasks if row.model == base.name]
    figure = Figure(figsize=(min(30.0, max(5.0, 1.5 + 0.8 * len(names))), 4.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / max(1, len(others))
    for number, model in enumerate(others or [base]):
        for place, task in enumerate(names):
            height, ends = _height(table.of(model.name, task))
            axes.bar(place + number * width, 100 * (height or 0.0), width, color=f"C{number}")
            if height is None:
                axes.text(place + number * width, 0, "none", ha="center", va="bottom", color="gray", fontsize="small")
            if height is not None and ends is not None:
                errors = [[100 * abs(end - height)] for end in ends]
                axes.errorbar(place + number * width, 100 * height, errors, color="black", capsize=3)
            if task == MEAN:
                axes.axvline(place - 0.6, color="gray", linewidth=0.8)
        axes.bar(0, 0, color=f"C{number}", label=model.name)
    if others:
        axes.axhline(100, color="gray", linestyle="--", linewidth=1)
    axes.set_ylabel(f"% of {base.name}'s score" if others else "score")
    axes.set_xticks([place + width * (max(1, len(others)) - 1) / 2 for place in range(len(names))], names, rotation=30)
    axes.legend(fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def _height(row: Row | None) -> tuple[float | None, tuple[float, float] | None]:
    if row is None:
        return None, None
    if row.comparison is not None:
        return row.comparison.retention, row.comparison.retention_interval
    return row.score, row.interval

# SPDX-License-Identifier: Apache-2.0
"""Tables of numbers as CSV files and in Markdown."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path, fractions: str) -> None:
    """Writes rows to a CSV file with the columns of the first row; None becomes an empty cell.

    Args:
        rows: the rows, at least one.
        path: the path of the file; its directory is created.
        fractions: the format of floats, as for ``format``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({k: format(v, fractions) if isinstance(v, float) else v for k, v in row.items()})


def markdown(head: str, rows: Iterable[str]) -> str:
    """Returns a Markdown table; its head and rows are given without the outer bars, as ``a | b``."""
    rule = "|" + "---|" * (head.count("|") + 1)
    return "\n".join([f"| {head} |", rule, *(f"| {row} |" for row in rows)])


def number(value: float | None, digits: int = 1, unit: str = "", scale: float = 1.0, missing: str = "") -> str:
    """Returns a number as a table shows it, multiplied by ``scale`` and with its unit; ``missing`` if it is None."""
    return missing if value is None else f"{value * scale:.{digits}f}{unit}"

# SPDX-License-Identifier: Apache-2.0
"""Rows of numbers as a CSV file and as a Markdown table."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path, fractions: str) -> None:
    """A line per row, in the columns of the first; an empty cell where a value is None.

    Args:
        rows: one at least.
        path: of the file; its directory is made.
        fractions: how a float is written, as ``format`` takes it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({k: format(v, fractions) if isinstance(v, float) else v for k, v in row.items()})


def markdown(head: str, rows: Iterable[str]) -> str:
    """A table; its head and rows come without the outer bars, as ``a | b``."""
    rule = "|" + "---|" * (head.count("|") + 1)
    return "\n".join([f"| {head} |", rule, *(f"| {row} |" for row in rows)])


def number(value: float | None, digits: int = 1, unit: str = "", scale: float = 1.0, missing: str = "") -> str:
    """A number of a table: times ``scale``, with its unit; ``missing`` where there is none."""
    return missing if value is None else f"{value * scale:.{digits}f}{unit}"

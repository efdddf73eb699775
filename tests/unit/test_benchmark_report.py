# SPDX-License-Identifier: Apache-2.0
"""Tests of the benchmarks' tables and pictures."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from report.pictures import bars, level, picture
from report.tables import markdown, number, write_csv

CHECKOUT = Path(__file__).parents[2]


def test_rows_are_written_with_what_was_not_measured_left_empty(tmp_path: Path) -> None:
    rows = [{"name": "a, b", "count": 3, "time": 1.23456}, {"name": "c", "count": None, "time": None}]
    path = tmp_path / "made" / "t.csv"
    write_csv(rows, path, ".3f")
    assert path.read_bytes() == b'name,count,time\r\n"a, b",3,1.235\r\nc,,\r\n'
    with open(path, newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == ["a, b", "c"]


def test_a_table_has_as_many_columns_as_its_head() -> None:
    assert markdown("a | b", ["1 | 2", "3 | "]) == "| a | b |\n|---|---|\n| 1 | 2 |\n| 3 |  |"
    # The last column has no heading.
    assert markdown("a |", []) == "| a | |\n|---|---|"


def test_numbers_have_a_unit_or_are_missing() -> None:
    assert (number(None), number(None, missing="-"), number(0)) == ("", "-", "0.0")
    assert (number(0.1234, unit=" %", scale=100), number(8, 0), number(3 * 2**20, 2, scale=2**-20)) == (
        "12.3 %",
        "8",
        "3.00",
    )


def test_bars_stand_side_by_side_over_their_labels(tmp_path: Path) -> None:
    with picture(tmp_path / "made" / "p.png", 6, 4, title="title") as (axes,):
        bars(axes, {"one": {"x": 1.0, "y": 2.0}, "two": {"y": 4.0}}, "%.1f", 6, rotation=60)
        level(axes, 3, "limit", is_limit=True)
        assert [(round(bar.get_center()[0], 3), bar.get_height()) for bar in axes.patches] == [
            (-0.2, 1.0),
            (0.8, 2.0),
            (1.2, 4.0),
        ]
        assert [text.get_text() for text in axes.get_xticklabels()] == ["x", "y"]
        assert [text.get_text() for text in axes.texts] == ["1.0", "2.0", "4.0"]
        assert axes.lines[0].get_label() == "limit" and axes.lines[0].get_linestyle() == "--"
    assert (tmp_path / "made" / "p.png").stat().st_size > 1000


def test_texts_on_bars_may_be_given(tmp_path: Path) -> None:
    with picture(tmp_path / "p.png", 6, 4, panels=2) as (left, right):
        bars(left, {"": {"x": 1.0}}, ["2 s"], color="#4878a8")
        assert [text.get_text() for text in left.texts] == ["2 s"] and not right.patches


def test_a_picture_that_cannot_be_drawn_is_not_there(tmp_path: Path) -> None:
    from matplotlib import pyplot

    with pytest.raises(ZeroDivisionError), picture(tmp_path / "p.png", 6, 4) as (axes,):
        axes.plot([1 / 0])
    assert not list(tmp_path.iterdir()) and not pyplot.get_fignums()


@pytest.mark.slow
def test_commands_start_without_matplotlib() -> None:
    program = (
        "import sys; import conversion, kernel, memory, packed_inference, roofline, throughput; "
        "sys.exit('matplotlib' in sys.modules)"
    )
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, cwd=CHECKOUT / "benchmarks", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

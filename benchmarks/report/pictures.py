# SPDX-License-Identifier: Apache-2.0
"""Bars and lines as a PNG.

Matplotlib is imported when something is drawn: a command refuses its arguments and measures without it.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def picture(path: Path, width: float, height: float, panels: int = 1, title: str | None = None) -> Iterator[list[Any]]:
    """Gives the axes of panels side by side to draw on, and writes them at the end of the ``with``.

    Args:
        path: of the PNG; its directory is made.
        width: of all panels, in inches.
        height: in inches.
        panels: how many.
        title: above all of them.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, panels, figsize=(width, height), layout="constrained", squeeze=False)
    try:
        yield list(axes[0])
        if title is not None:
            figure.suptitle(title, fontsize=9)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    finally:
        plt.close(figure)


def bars(
    axes: Any,
    series: Mapping[str, Mapping[str, float]],
    texts: str | Sequence[str],
    fontsize: float | None = None,
    color: str | None = None,
    **ticks: Any,
) -> None:
    """Bars over labels, those of one label side by side.

    Args:
        axes: to draw on.
        series: name in the legend -> label -> height.
        texts: on the bars, or the format of their heights.
        fontsize: of the texts.
        color: of the bars; by default one for each series.
        ticks: how the labels look, in matplotlib's words.
    """
    labels = list(dict.fromkeys(label for heights in series.values() for label in heights))
    width = 0.8 / len(series)
    for i, (name, heights) in enumerate(series.items()):
        places = [labels.index(label) + (i - (len(series) - 1) / 2) * width for label in heights]
        drawn = axes.bar(places, list(heights.values()), width, label=name, color=color)
        written = {"fmt": texts} if isinstance(texts, str) else {"labels": texts}
        axes.bar_label(drawn, **written, fontsize=fontsize)
    axes.set_xticks(range(len(labels)), labels, **ticks)


def level(axes: Any, height: float, label: str, is_limit: bool = False) -> None:
    """A horizontal line to compare with: what is normal, or a limit."""
    style = {"color": "#c44e52", "linestyle": "--"} if is_limit else {"color": "black"}
    axes.axhline(height, linewidth=1, label=label, **style)

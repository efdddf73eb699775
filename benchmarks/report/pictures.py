# SPDX-License-Identifier: Apache-2.0
"""Bar charts and lines as PNG files.

Matplotlib is imported only when something is drawn, so that commands check their arguments and measure without it.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def picture(path: Path, width: float, height: float, panels: int = 1, title: str | None = None) -> Iterator[list[Any]]:
    """Yields the axes of panels side by side, and writes the picture if the ``with`` block succeeds.

    Args:
        path: the path of the PNG; its directory is created.
        width: the width of all panels together, in inches.
        height: the height in inches.
        panels: the number of panels.
        title: a title above all panels, or None.
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
    """Draws bars over labels, with the bars of one label side by side.

    Args:
        axes: the axes to draw on.
        series: name in the legend -> label -> height.
        texts: the texts on the bars, or the format of their heights.
        fontsize: the font size of the texts.
        color: the color of the bars; None for one color per series.
        ticks: matplotlib's text properties of the labels.
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
    """Draws a horizontal line to compare with: a reference, or with ``is_limit`` a dashed red limit."""
    style = {"color": "#c44e52", "linestyle": "--"} if is_limit else {"color": "black"}
    axes.axhline(height, linewidth=1, label=label, **style)

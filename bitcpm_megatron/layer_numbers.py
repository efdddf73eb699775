# SPDX-License-Identifier: Apache-2.0
"""Layer numbers, for tables that have one line for all layers that are alike."""

from collections.abc import Iterable


def ranges(numbers: Iterable[int]) -> str:
    """``0-3,5``: the numbers, each once, in runs."""
    runs: list[list[int]] = []
    for n in sorted(set(numbers)):
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)

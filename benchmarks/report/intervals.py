# SPDX-License-Identifier: Apache-2.0
"""Confidence interval of a median for measurements of any distribution."""

import math
import statistics
from collections.abc import Sequence

_CONFIDENCE = 0.95


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns the median, and the order statistics that enclose the true median with at least 95 % confidence.

    The number of values below the true median is binomial with p = 1/2 (David and Nagaraja, Order Statistics, 7.1).

    Args:
        values: independent measurements.

    Returns:
        ``(median, low, high)``. Fewer than 6 values have no such interval at 95 %; the bounds are then infinite.

    Raises:
        ValueError: if there are no values.
    """
    if not values:
        raise ValueError("no values: there is no median")
    ordered, n = sorted(values), len(values)
    tail, below = 0.0, 0
    # Finds the largest k such that fewer than k values are below the true median with at most half of the allowed
    # probability of error.
    while below < n and tail + math.comb(n, below) / 2**n <= (1 - _CONFIDENCE) / 2:
        tail += math.comb(n, below) / 2**n
        below += 1
    middle = statistics.median(ordered)
    if below == 0:
        return middle, -math.inf, math.inf
    return middle, ordered[below - 1], ordered[n - below]

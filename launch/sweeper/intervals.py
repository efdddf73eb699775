# SPDX-License-Identifier: Apache-2.0
"""The mean over a few seeds, and its 95 % confidence interval by Student's t distribution."""

import math
import statistics
from collections.abc import Sequence

# Two-sided 95 % quantiles of Student's t by degrees of freedom.
_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
MOST_VALUES = 1 + len(_QUANTILES)


def mean_interval(values: Sequence[float]) -> dict[str, float]:
    """Returns the ``mean`` of 1 to 10 values and, for two or more finite ones, its interval: ``low`` and ``high``."""
    mean = statistics.fmean(values)
    if len(values) == 1 or not math.isfinite(mean):
        return {"mean": mean}
    half = _QUANTILES[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half}

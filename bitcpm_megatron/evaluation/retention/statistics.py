# SPDX-License-Identifier: Apache-2.0
"""Statistics of two models on the same items: retention as a ratio of means, and a paired bootstrap over items."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
# With fewer items the resampled means take too few values for their quantiles to be a 95 % interval.
LEAST_ITEMS = 10
_ENDS = (0.025, 0.975)
_AT_ONCE = 2**24
_SEED = 0
"""The seed of the resamples: the same scores give the same interval on every machine."""


@dataclass(frozen=True)
class Comparison:
    """The comparison of two models on the same items.

    Attributes:
        base: the mean score of the model that the other is compared with.
        score: the mean score of the other model.
        difference: the difference ``score - base``.
        interval: the ends of the 95 % interval of the difference.
        retention: the ratio ``score / base``; None if ``base`` is 0.
        retention_interval: the ends of the 95 % interval of the retention; None if ``base`` is 0, or is 0 in so many
            resamples that an end has no value.
        significant: whether the interval of the difference excludes 0, with at least :data:`LEAST_ITEMS` items.
    """

    base: float
    score: float
    difference: float
    interval: tuple[float, float]
    retention: float | None
    retention_interval: tuple[float, float] | None
    significant: bool


def compare(tasks: Sequence[np.ndarray]) -> Comparison:
    """Compares two models by the mean over tasks of their mean scores.

    The paired bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, chapter 8; Koehn 2004) draws the items
    of every task with replacement, both models' scores of an item together; the ends are percentiles of
    :data:`RESAMPLES` resamples.

    Args:
        tasks: the scores of each task, ``[items, 2]``: of the base model and of the other one.
    """
    generator = np.random.default_rng(_SEED)
    base, score = np.mean([task.mean(0) for task in tasks], 0)
    drawn = np.mean([_resampled(task, np.ones(len(task)), generator) for task in tasks], 0)
    return _comparison(base, score, drawn, sum(map(len, tasks)))


def compare_rates(totals: np.ndarray, sizes: np.ndarray) -> Comparison:
    """Compares two models by a sum over documents divided by the documents' total size, such as nats per byte.

    Resamples draw whole documents.

    Args:
        totals: the totals of the documents, ``[documents, 2]``: of the base model and of the other one.
        sizes: the sizes of the documents, ``[documents]``.
    """
    base, score = totals.sum(0) / sizes.sum()
    drawn = _resampled(totals, sizes, np.random.default_rng(_SEED))
    return _comparison(base, score, drawn, len(totals))


def interval(scores: np.ndarray) -> tuple[float, float]:
    """Returns the 95 % interval of the mean of one model's scores ``[items]``, by the same bootstrap."""
    both = np.stack([scores, scores], 1)
    return _ends(_resampled(both, np.ones(len(scores)), np.random.default_rng(_SEED))[:, 0])


def _comparison(base: float, score: float, drawn: np.ndarray, count: int) -> Comparison:
    ends = _ends(drawn[:, 1] - drawn[:, 0])
    ratios = np.divide(drawn[:, 1], drawn[:, 0], out=np.full(len(drawn), np.inf), where=drawn[:, 0] > 0)
    # The nearest rank is taken, because there is no value between a number and infinity.
    low, high = np.quantile(ratios, _ENDS, method="nearest")
    return Comparison(
        base=float(base),
        score=float(score),
        difference=float(score - base),
        interval=ends,
        retention=float(score / base) if base else None,
        retention_interval=(float(low), float(high)) if base and np.isfinite(high) else None,
        significant=count >= LEAST_ITEMS and not ends[0] <= 0 <= ends[1],
    )


def _ends(drawn: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(drawn, _ENDS)
    return float(low), float(high)


def _resampled(totals: np.ndarray, sizes: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Draws rows of ``[n, 2]`` with replacement; returns their sums over the sums of their sizes, ``[RESAMPLES, 2]``.

    Equal rows are counted together, and how often each kind is drawn is multinomial. Most tasks have four kinds: each
    of the two models is right or wrong.
    """
    kinds, counts = np.unique(np.column_stack([totals, sizes]), axis=0, return_counts=True)
    rows = max(1, _AT_ONCE // len(kinds))
    parts = []
    for first in range(0, RESAMPLES, rows):
        drawn = generator.multinomial(len(totals), counts / len(totals), min(rows, RESAMPLES - first))
        sums = drawn @ kinds
        parts.append(sums[:, :-1] / sums[:, -1:])
    return np.concatenate(parts)

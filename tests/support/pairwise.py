# SPDX-License-Identifier: Apache-2.0
"""Pairwise covers: a few settings out of many that contain every possible pair of values."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import astuple
from typing import Any, TypeVar

T = TypeVar("T")


def pairs(setting: Any) -> set[tuple]:
    """Returns every pair of values of a dataclass, each value with the index of its field."""
    return set(itertools.combinations(enumerate(astuple(setting)), 2))


def cover(possible: Sequence[T], cost: Callable[[T], float] = lambda setting: 1.0) -> list[T]:
    """Returns settings that together contain every pair of values that occurs in a possible setting.

    The choice is greedy for new pairs per cost, and the same on every machine.
    """
    of_each = [pairs(setting) for setting in possible]
    left = set().union(*of_each)
    chosen = []
    while left:
        best = max(range(len(possible)), key=lambda number: len(of_each[number] & left) / cost(possible[number]))
        chosen.append(possible[best])
        left -= of_each[best]
    return chosen

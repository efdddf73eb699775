# SPDX-License-Identifier: Apache-2.0
"""Few settings out of many, in which every two values that go together meet."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import astuple
from typing import Any, TypeVar

T = TypeVar("T")


def pairs(setting: Any) -> set[tuple]:
    """Every two values of a dataclass, each with the place of its field."""
    return set(itertools.combinations(enumerate(astuple(setting)), 2))


def cover(possible: Sequence[T], cost: Callable[[T], float] = lambda setting: 1.0) -> list[T]:
    """Settings so that every two values that stand together in a possible one do in one of them.

    Greedy for pairs at their cost, the same on every machine.
    """
    of_each = [pairs(setting) for setting in possible]
    left = set().union(*of_each)
    chosen = []
    while left:
        best = max(range(len(possible)), key=lambda number: len(of_each[number] & left) / cost(possible[number]))
        chosen.append(possible[best])
        left -= of_each[best]
    return chosen

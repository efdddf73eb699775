# SPDX-License-Identifier: Apache-2.0
"""Quantization spaces as tables: the levels a weight may take, and where the decision between two levels falls."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Space:
    """One quantization space. Levels and thresholds are in units of the group's scale.

    Attributes:
        name: what users type after ``--ternary-space``.
        levels: the values, ascending.
        thresholds: one between each two neighbouring levels, ascending. A weight w takes the level whose index is
            the number of thresholds it lies beyond.
        ties: for each threshold, the neighbouring level a weight exactly on it takes.
    """

    name: str
    levels: tuple[float, ...]
    thresholds: tuple[float, ...]
    ties: tuple[Literal["lower", "upper"], ...]

    @property
    def lowest_code(self) -> int:
        """Code of the lowest level. Codes count levels so that code 0 is the level nearest to zero."""
        return -min(range(len(self.levels)), key=lambda i: abs(self.levels[i]))


# round_half_even sends both ties of the ternary space (+-s/2) to the level 0.
TERNARY = Space("ternary", (-1.0, 0.0, 1.0), (-0.5, 0.5), ("upper", "lower"))

SPACES: dict[str, Space] = {TERNARY.name: TERNARY}

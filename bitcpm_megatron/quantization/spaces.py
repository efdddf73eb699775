# SPDX-License-Identifier: Apache-2.0
"""Quantization spaces as tables: the levels of a weight, the thresholds between them, and the scale.

The five spaces and their scales are those of the BitCPM-CANN technical report; the thresholds are half-way between the
levels. ParetoQ's quantizer of 1.58 bits (arXiv:2502.02631, SEQ) with the step alpha is ``ternary`` with s = 2 alpha /
3, and its quantizer of 2 bits is ``half-integer-4`` with s = alpha / 2.
"""

from dataclasses import dataclass
from typing import Literal

Tie = Literal["lower", "upper"]
Statistic = Literal["absmean", "absmax"]

STATISTICS: tuple[Statistic, ...] = ("absmean", "absmax")
"""The statistics that a scale can be made of: ``mean(|w|)`` or ``max(|w|)`` over its group."""


@dataclass(frozen=True)
class Space:
    """One quantization space, with levels and thresholds in units of the group's scale.

    Attributes:
        name: the name that users type after ``--ternary-space``.
        levels: the values that a weight may take, ascending.
        thresholds: the bounds between neighboring levels, ascending, one fewer than levels. A weight w takes the level
            whose index is the number of thresholds it is beyond.
        ties: for each threshold, the neighboring level that a weight exactly on the threshold takes.
        statistic: the statistic that a scale is made of, unless a configuration says otherwise.
        scale_multiplier: the factor of this statistic, unless a configuration says otherwise.
    """

    name: str
    levels: tuple[float, ...]
    thresholds: tuple[float, ...]
    ties: tuple[Tie, ...]
    statistic: Statistic = "absmean"
    scale_multiplier: float = 1.0

    @property
    def lowest_code(self) -> int:
        """The code of the lowest level; code 0 is the level nearest to zero, of two such levels the positive one."""
        return -min(range(len(self.levels)), key=lambda i: (abs(self.levels[i]), -self.levels[i]))

    @property
    def code_bits(self) -> int:
        """The number of bits of a packed code, a power of two: 2 for up to four levels, else 4."""
        return 2 if len(self.levels) <= 4 else 4

    @property
    def smallest_magnitude(self) -> float:
        """The smallest magnitude of a non-zero level; times a scale it is exact, unless it underflows in fp16."""
        return min(abs(level) for level in self.levels if level)


# round_half_even sends both ties of the ternary space (+-s/2) to the level 0. The ties of the other spaces follow the
# ternary ones at equal thresholds, and round_half_even(w / s - 0.5) + 0.5 in the half-integer space. In a space without
# a level for zero, zero itself is on a threshold and takes the positive level.
TERNARY = Space("ternary", (-1.0, 0.0, 1.0), (-0.5, 0.5), ("upper", "lower"))
ASYMMETRIC_4 = Space(
    "asymmetric-4", (-2.0, -1.0, 0.0, 1.0), (-1.5, -0.5, 0.5), ("lower", "upper", "lower"), "absmax", 1 / 1.5
)
HALF_INTEGER_4 = Space(
    "half-integer-4", (-1.5, -0.5, 0.5, 1.5), (-1.0, 0.0, 1.0), ("lower", "upper", "lower"), "absmax", 1 / 1.5
)
INTEGER_4 = Space("integer-4", (-2.0, -1.0, 1.0, 2.0), (-1.5, 0.0, 1.5), ("lower", "upper", "upper"), "absmax", 1 / 2)
FIVE_VALUE = Space(
    "five-value",
    (-2.0, -1.0, 0.0, 1.0, 2.0),
    (-1.5, -0.5, 0.5, 1.5),
    ("lower", "upper", "lower", "upper"),
    "absmax",
    1 / 2,
)

SPACES: dict[str, Space] = {
    space.name: space for space in (TERNARY, ASYMMETRIC_4, HALF_INTEGER_4, INTEGER_4, FIVE_VALUE)
}
"""The spaces by name, with every space after those whose levels it contains.

Detection of a fused weight's space tries them in this order.
"""

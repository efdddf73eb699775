# SPDX-License-Identifier: Apache-2.0
"""The configuration of the quantizer: one frozen dataclass, and the check of a group size against a row."""

from dataclasses import dataclass

from ..cli import Number
from .spaces import SPACES, STATISTICS

GROUP_MULTIPLE = 32
"""The number that every group size is a multiple of: kernels move 32-byte blocks, packed formats count in 32s."""
LARGEST_GROUP = 2**24
"""The upper bound of a group size, far above the length of any row."""
SMALLEST_EPS = 2.0**-100
"""The lower bound of eps: it keeps the threshold s/2 of an all-zero group in the normal range of fp32 and bf16."""
LARGEST_EPS = 2.0**100
"""The upper bound of eps, far above any use and far below the largest number of fp32 and bf16."""
SMALLEST_MULTIPLIER = 2.0**-20
LARGEST_MULTIPLIER = 2.0**20
"""The upper bound of a multiplier: outside these two bounds, every weight of a group takes one level."""


@dataclass(frozen=True)
class QuantizerConfig:
    """Configuration of the quantizer of a weight matrix ``[out_features, in_features]``.

    Args:
        space: the name of the quantization space, one of those in :mod:`bitcpm_megatron.quantization.spaces`;
            ``"ternary"`` is {-1, 0, 1} times the scale.
        group_size: the number of elements along ``in_features`` that share one scale: -1 for the whole row, or a
            multiple of 32 that divides the row.
        eps: the lower bound of a scale, so that an all-zero group stays finite.
        statistic: the statistic that a scale is made of; ``"absmean"`` is ``mean(|w|)`` over the group, ``"absmax"`` is
            ``max(|w|)``. None is replaced by the space's own statistic.
        scale_multiplier: the factor of the statistic, rounded to fp32. None is replaced by the space's own multiplier
            if the statistic is the space's own, else by 1.0.

    Raises:
        ValueError: if the space, group size, eps, statistic or multiplier is not possible; the message names the cure.
    """

    space: str = "ternary"
    group_size: int = -1
    eps: float = 1e-5
    # None is allowed only as an argument: __post_init__ replaces it, so that readers never see it.
    statistic: str = None  # type: ignore[assignment]
    scale_multiplier: float = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if not isinstance(self.space, str) or self.space not in SPACES:
            raise ValueError(f"unknown quantization space {self.space!r}: choose one of {sorted(SPACES)}")
        if isinstance(self.group_size, bool) or not isinstance(self.group_size, int):
            raise ValueError(f"group_size must be an integer, got {self.group_size!r}")
        if self.group_size != -1 and (not 0 < self.group_size <= LARGEST_GROUP or self.group_size % GROUP_MULTIPLE):
            raise ValueError(
                f"group_size={self.group_size} is not possible: use -1 (one scale per row) or a multiple of "
                f"{GROUP_MULTIPLE} that divides the row"
            )
        if Number(SMALLEST_EPS, LARGEST_EPS).mistake(self.eps) is not None:
            raise ValueError(
                f"eps={self.eps!r} is not possible: use a finite number from 2**-100 to 2**100 (default 1e-5)"
            )
        own = SPACES[self.space]
        if self.statistic is None:
            object.__setattr__(self, "statistic", own.statistic)
        if not isinstance(self.statistic, str) or self.statistic not in STATISTICS:
            raise ValueError(f"unknown statistic {self.statistic!r}: choose one of {sorted(STATISTICS)}")
        if self.scale_multiplier is None:
            multiplier = own.scale_multiplier if self.statistic == own.statistic else 1.0
            object.__setattr__(self, "scale_multiplier", multiplier)
        if Number(SMALLEST_MULTIPLIER, LARGEST_MULTIPLIER).mistake(self.scale_multiplier) is not None:
            raise ValueError(
                f"scale_multiplier={self.scale_multiplier!r} is not possible: use a finite number from 2**-20 to 2**20 "
                "(1.0 takes the statistic itself)"
            )

    @property
    def scale(self) -> str:
        """The scale in words, such as ``1.55 absmean``."""
        return f"{self.scale_multiplier:g} {self.statistic}"

    @property
    def of_absmean(self) -> bool:
        """Whether a scale is the mean magnitude itself, with a multiplier of 1."""
        return self.statistic == "absmean" and self.scale_multiplier == 1.0


def check_config(config: object) -> None:
    """Checks that a quantizer is a :class:`QuantizerConfig`.

    Raises:
        TypeError: if it is something else, such as a mapping.
    """
    if not isinstance(config, QuantizerConfig):
        raise TypeError(
            f"the quantizer is a QuantizerConfig, such as QuantizerConfig(group_size=128), not {config!r:.80}"
        )


def effective_group(in_features: int, group_size: int) -> int:
    """Returns the number of elements per scale of a row of ``in_features`` under ``group_size`` (-1: the whole row).

    Raises:
        ValueError: if the group size does not divide the row.
    """
    if group_size == -1:
        return in_features
    if group_size <= 0 or in_features % group_size:
        divisors = [g for g in range(GROUP_MULTIPLE, in_features + 1, GROUP_MULTIPLE) if in_features % g == 0]
        raise ValueError(
            f"group_size={group_size} does not divide a row of {in_features} elements: use -1 or one of {divisors}"
        )
    return group_size

# SPDX-License-Identifier: Apache-2.0
"""The meaning of ``--data-path`` and ``--split``."""

import math
from collections.abc import Sequence


def blend_of(paths: Sequence[str]) -> tuple[list[str], list[float] | None]:
    """Returns the prefixes and the weights of ``--data-path``: one prefix, several, or weights and prefixes in turn.

    The weights are None if none are given. The rule is that of ``get_blend_from_list`` in
    ``megatron.core.datasets.utils``.

    Raises:
        ValueError: if some weights are missing, or one is no positive number.
    """
    numbers = [_number(path) for path in paths[::2]]
    weights = [number for number in numbers if number is not None]
    if len(paths) % 2 or not weights:
        return list(paths), None
    if None in numbers:
        raise ValueError(f"data path {' '.join(paths)}: give every prefix a weight, or none")
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ValueError(f"data path {' '.join(paths)}: weights must be positive numbers")
    return list(paths[1::2]), weights


def split_bounds(split: str) -> list[tuple[float, float] | None]:
    """Returns the ranges of the data, each within 0 to 1, that ``--split`` gives to training, validation and test.

    The range of an empty part is None. The arithmetic is that of
    ``megatron.core.datasets.blended_megatron_dataset_config``.

    Raises:
        ValueError: if `split` is not one to three shares, or the first share is 0.
    """
    shares = [_number(part) for part in split.replace("/", ",").split(",")]
    known = [share for share in shares if share is not None and math.isfinite(share) and share >= 0]
    if not 1 <= len(shares) <= 3 or len(known) != len(shares) or not known[0] > 0 or not math.isfinite(sum(known)):
        raise ValueError(f"--split {split}: write train,validation,test shares, such as 969,30,1")
    bounds: list[tuple[float, float] | None] = []
    begin = 0.0
    for share in (*known, *[0.0] * (3 - len(known))):
        end = begin + share / sum(known)
        bounds.append((begin, end) if end > begin else None)
        begin = end
    return bounds


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None

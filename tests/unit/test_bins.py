# SPDX-License-Identifier: Apache-2.0
"""Tests of packing conversations into samples."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitcpm_megatron.data.sft.packing import pack

CAPACITY = 50


@given(st.lists(st.integers(1, CAPACITY), max_size=120))
def test_every_item_is_in_one_bin_and_no_two_bins_fit_into_one(lengths: list[int]) -> None:
    bins = pack(lengths, CAPACITY)
    assert sorted(itertools.chain.from_iterable(bins)) == list(range(len(lengths)))
    sizes = sorted(sum(lengths[item] for item in items) for items in bins)
    assert all(1 <= size <= CAPACITY for size in sizes)
    assert len(sizes) < 2 or sizes[0] + sizes[1] > CAPACITY
    assert bins == sorted(sorted(items) for items in bins)
    assert bins == pack(list(lengths), CAPACITY)


@pytest.mark.parametrize(
    ("lengths", "bins"),
    [
        ([], []),
        ([10], [[0]]),
        ([4, 4, 4], [[0, 1], [2]]),
        # Long conversations are packed first; in the order of the input, three bins would be needed.
        ([3, 3, 7, 7], [[0, 3], [1, 2]]),
        # The fullest bin with enough room is chosen: the last fits into both, and the bin of 7 has less room.
        ([6, 7, 3], [[0], [1, 2]]),
        # Nothing is added to bins that are exactly full.
        ([10, 1, 10, 1], [[0], [1, 3], [2]]),
    ],
)
def test_best_fit_decreasing(lengths: list[int], bins: list[list[int]]) -> None:
    assert pack(lengths, 10) == bins


def test_what_fits_into_no_bin_is_refused() -> None:
    for lengths in ([11], [5, 0], [-1]):
        with pytest.raises(ValueError, match=rf"length {lengths[-1]} for bins of 10"):
            pack(lengths, 10)


def test_short_conversations_fill_long_samples() -> None:
    chosen = random.Random(0)
    lengths = [min(4096, int(chosen.lognormvariate(5.5, 1.0)) + 1) for _ in range(20_000)]
    assert sum(lengths) / (4096 * len(pack(lengths, 4096))) > 0.999

# SPDX-License-Identifier: Apache-2.0
"""Packing: the choice of the conversations that share a sample."""

import bisect
from collections import defaultdict
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Puts items into few bins by best-fit decreasing: the longest first, each into the fullest bin that has room.

    No two bins would fit into one, so that all but one are more than half full. The same lengths give the same bins.

    Args:
        lengths: the lengths of the items, each from 1 to `capacity`.
        capacity: the capacity of a bin.

    Returns:
        The numbers of the items in each bin, ascending; bins in the order of their first items.

    Raises:
        ValueError: if an item fits into no bin, or has no length.
    """
    bins: list[list[int]] = []
    with_room: defaultdict[int, list[int]] = defaultdict(list)  # the bins with a given remaining room
    rooms: list[int] = []  # the keys of `with_room`, ascending
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        length = lengths[item]
        if not 1 <= length <= capacity:
            raise ValueError(f"an item of length {length} for bins of {capacity}")
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            room, chosen = capacity, len(bins)
            bins.append([])
        else:
            room = rooms[place]
            chosen = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        bins[chosen].append(item)
        if left := room - length:
            if left not in with_room:
                bisect.insort(rooms, left)
            with_room[left].append(chosen)
    return sorted(sorted(items) for items in bins)

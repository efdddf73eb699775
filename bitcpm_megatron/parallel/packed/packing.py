# SPDX-License-Identifier: Apache-2.0
"""Packing of a bucket of quantized and other values: codes of 2 or 4 bits, scales, and raw values.

A group of a ternary weight has three values: 0 and plus and minus its scale. The codes of a shard are stored in planes:
code ``e`` is in byte ``e % code_bytes``, and its bits at position ``e // code_bytes`` of that byte, so that neighbors
stay neighbors. Codes are signed numbers of 2 bits, or of 4 if a weight of the bucket has more than four levels.

Codes and scales of ternary weights are found from the quantized values themselves. If a shard's edge cuts a group, each
piece reports its largest magnitude, which is 0 for a piece of zeros; the largest of these is the scale, because all
members of the group that are not zero have this magnitude. In the other spaces a piece may leave open which levels its
values are: the scales are those that it was quantized with, and the codes follow from both. Nothing here waits for a
device.

In shapes, ``length`` is the number of elements of a bucket, ``ranks`` the number of its shards, ``shard`` the elements
of a shard, ``pieces`` those of groups in it, and ``groups`` all groups of the bucket; ``code_bytes``, ``words`` and
``message`` are attributes of :class:`Packing`.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ...quantization import SPACES, codes_under

_TERNARY = "ternary"
# Codes are unpacked into one byte each before they are multiplied, this many elements or one shard at a time.
_UNPACKED_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class Weight:
    """A quantized weight in a bucket.

    Attributes:
        start: its first element in the bucket.
        count: its number of elements.
        group: the number of elements per scale.
        space: its quantization space.
    """

    start: int
    count: int
    group: int
    space: str = _TERNARY

    @property
    def end(self) -> int:
        """The end of its elements in the bucket, exclusive."""
        return self.start + self.count


@dataclass(frozen=True)
class Rows:
    """Neighboring pieces of groups of one weight, equally wide: whole groups, or one piece of a group.

    Attributes:
        start: the first element in the bucket.
        count: the number of pieces.
        width: the number of elements of each piece.
        group: the index of the first piece's group among all groups of the bucket.
        space: the quantization space of the weight.
    """

    start: int
    count: int
    width: int
    group: int
    space: str = _TERNARY

    @property
    def end(self) -> int:
        """The end of the elements in the bucket, exclusive."""
        return self.start + self.count * self.width

    def of(self, values: torch.Tensor, origin: int) -> torch.Tensor:
        """Returns these pieces ``[count, width]`` of a flat tensor that begins with the bucket's element ``origin``."""
        return values[self.start - origin : self.end - origin].view(self.count, self.width)


def rows_between(weights: Sequence[Weight], low: int, high: int) -> Iterator[Rows]:
    """Yields all pieces of groups between two elements of a bucket, in its order."""
    groups = 0
    for weight in weights:
        start, end = (min(max(edge - weight.start, 0), weight.count) for edge in (low, high))
        first = min(-(-start // weight.group) * weight.group, end)
        last = max(end // weight.group * weight.group, first)
        for a, b, width in ((start, first, first - start), (first, last, weight.group), (last, end, end - last)):
            if a < b:
                yield Rows(weight.start + a, (b - a) // width, width, groups + a // weight.group, weight.space)
        groups += weight.count // weight.group


class Shard:
    """The part of a bucket that one data-parallel rank holds.

    Attributes:
        start: the first element in the bucket.
        end: the end of the elements, exclusive.
        rows: the pieces of quantized weights, in order.
        raw: the ranges between them, each by its first element and its exclusive end.
        scales: the number of pieces of groups.
        words: the number of 16-bit words in its message, for scales and raw values.
    """

    def __init__(self, weights: Sequence[Weight], start: int, end: int) -> None:
        self.start, self.end = start, end
        self.rows = tuple(rows_between(weights, start, end))
        edges = [start, *itertools.chain.from_iterable((rows.start, rows.end) for rows in self.rows), end]
        self.raw = tuple((a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b)
        self.scales = sum(rows.count for rows in self.rows)
        self.words = self.scales + sum(b - a for a, b in self.raw)


@dataclass(frozen=True)
class Traffic:
    """The bytes that a gather delivers to every rank.

    Attributes:
        packed: the bytes of the messages.
        plain: the bytes of the ordinary gather.
        weights: the number of quantized weights.
    """

    packed: int = 0
    plain: int = 0
    weights: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


class Packing:
    """The layout in which the shards of one bucket are packed, with the functions that pack and unpack them.

    Args:
        weights: the quantized weights in the bucket, in its order.
        length: the number of elements of the bucket.
        ranks: the number of equal shards that it is cut into.
        device: the device of the bucket.

    Attributes:
        bits: the number of bits of a code.
        needs_scales: whether the values alone do not determine their scales.
        code_bytes: the number of bytes for the codes of a shard.
        words: the number of 16-bit words for scales and raw values of the fullest shard.
        message: the number of bytes of both together.
        groups: the number of scales of the bucket.
        traffic: the traffic of one gather of the bucket.
    """

    def __init__(self, weights: Sequence[Weight], length: int, ranks: int, device: torch.device) -> None:
        self.ranks, self.shard = ranks, length // ranks
        self.shards = [Shard(weights, rank * self.shard, (rank + 1) * self.shard) for rank in range(ranks)]
        self.weights = tuple(weights)
        self.bits = max((SPACES[weight.space].code_bits for weight in weights), default=2)
        self.needs_scales = any(weight.space != _TERNARY for weight in weights)
        # Levels are exact in bf16. Ternary needs no table, because its codes are the levels themselves.
        self._levels = {
            weight.space: torch.tensor(SPACES[weight.space].levels, dtype=torch.bfloat16, device=device)
            for weight in weights
            if weight.space != _TERNARY
        }
        # The number is even, so that the words after the codes are aligned.
        self.code_bytes = -(-self.shard // (2 * (8 // self.bits))) * 2
        self.words = max(shard.words for shard in self.shards)
        self.message = self.code_bytes + 2 * self.words
        self.groups = sum(weight.count // weight.group for weight in weights)
        at_once = max(1, _UNPACKED_ELEMENTS // self.shard)
        edges = [*range(0, ranks, at_once), ranks]
        self._blocks = [
            (a * self.shard, b * self.shard, tuple(rows_between(weights, a * self.shard, b * self.shard)))
            for a, b in itertools.pairwise(edges)
        ]
        quantized = sum(weight.count for weight in weights)
        self.traffic = Traffic(self.message * ranks, 2 * length, quantized)
        self._place_scales(device)

    @property
    def pays(self) -> bool:
        """Whether the messages are shorter than the shards, and there is another rank to send them to."""
        return self.ranks > 1 and self.traffic.packed < self.traffic.plain

    def _place_scales(self, device: torch.device) -> None:
        """Finds which words of each shard are scales that no earlier shard has, and which belong to shared groups.

        A shared group is one of which several shards hold pieces.
        """
        self._fresh: list[tuple[int, int]] = []
        places: dict[int, list[tuple[int, int]]] = {}
        known = 0
        for rank, shard in enumerate(self.shards):
            first = shard.rows[0].group if shard.rows else known
            last = first + shard.scales
            self._fresh.append((known - first, shard.scales))
            known = last
            for group in dict.fromkeys((first, last - 1) if shard.rows else ()):
                places.setdefault(group, []).append((rank, group - first))
        cuts = {group: found for group, found in places.items() if len(found) > 1}
        most = max(map(len, cuts.values()), default=0)
        filled = [found + found[:1] * (most - len(found)) for found in cuts.values()]
        self._cut_groups = torch.tensor(list(cuts), dtype=torch.int64, device=device)
        self._cut_words = torch.tensor(filled, dtype=torch.int64, device=device).view(len(cuts), most, 2).unbind(2)

    def pack(self, values: torch.Tensor, rank: int, own: torch.Tensor | None = None) -> torch.Tensor:
        """Returns the message of a rank: codes of its shard, a scale for each piece of a group, and raw values.

        Args:
            values: the rank's shard of the bucket, bf16 ``[shard]``, whose weights are quantized.
            rank: the rank that holds the shard.
            own: the scales that all pieces were quantized with, as for :func:`scales_in`; ternary weights need none.

        Returns:
            The message, uint8 ``[message]``.
        """
        shard = self.shards[rank]
        message = values.new_zeros(self.message, dtype=torch.uint8)
        scales = scales_in(shard.rows, values, shard.start, own)
        self.add_codes(message[: self.code_bytes], shard.rows, values, shard.start, scales, 0)
        raw = [values[a - shard.start : b - shard.start] for a, b in shard.raw]
        words = message[self.code_bytes :].view(values.dtype)[: shard.words]
        torch.cat([*scales, *raw], out=words)
        return message

    def unpack(self, messages: torch.Tensor, bucket: torch.Tensor) -> None:
        """Writes the values that all ranks have packed.

        Args:
            messages: the messages, uint8 ``[ranks, message]``.
            bucket: the bucket, bf16 ``[length]``, which is overwritten; the own shard keeps its values.
        """
        codes, words = messages[:, : self.code_bytes], messages.view(bucket.dtype)[:, self.code_bytes // 2 :]
        for shard, own in zip(self.shards, words, strict=True):
            lengths = [b - a for a, b in shard.raw]
            for (a, b), raw in zip(shard.raw, own[shard.scales : shard.words].split(lengths), strict=True):
                bucket[a:b].copy_(raw)
        scales = self.merged_scales(words)
        for start, end, rows in self._blocks:
            self.multiply(codes, scales, rows, bucket[start:end], start)

    def merged_scales(self, words: torch.Tensor) -> torch.Tensor:
        """Returns the scales ``[groups]`` of a bucket from the words ``[ranks, words]`` of all ranks."""
        scales = torch.cat([own[a:b] for own, (a, b) in zip(words, self._fresh, strict=True)])
        if self._cut_groups.numel():
            scales.index_copy_(0, self._cut_groups, words[self._cut_words].amax(1))
        return scales

    def multiply(
        self, codes: torch.Tensor, scales: torch.Tensor, rows: Sequence[Rows], values: torch.Tensor, start: int
    ) -> None:
        """Writes quantized values, the products of codes and scales.

        Args:
            codes: the codes, uint8 ``[ranks, code_bytes]``.
            scales: the scales, bf16 ``[groups]``.
            rows: the pieces to write.
            values: neighboring elements of the bucket that contain the pieces, bf16; written.
            start: the position of the first of these elements in the bucket.
        """
        codes_here = self.codes(codes, start, start + values.numel()) if rows else values
        for piece in rows:
            own, codes_there = scales[piece.group : piece.group + piece.count, None], piece.of(codes_here, start)
            if piece.space != _TERNARY:
                index = codes_there.int().sub_(SPACES[piece.space].lowest_code)
                codes_there = self._levels[piece.space][index]
            torch.mul(codes_there, own, out=piece.of(values, start))

    def codes(self, codes: torch.Tensor, start: int, end: int) -> torch.Tensor:
        """Returns the codes of neighboring elements of the bucket, one byte each.

        Args:
            codes: the packed codes, uint8 ``[ranks, code_bytes]``.
            start: the first element.
            end: the end of the elements, exclusive.

        Returns:
            The codes, int8 ``[end - start]``, with arbitrary values for elements that are not quantized.
        """
        fields, size = codes.view(torch.int8), self.code_bytes
        made = torch.empty(end - start, dtype=torch.int8, device=codes.device)
        done = 0
        for first, last, low, high in self._pieces(start, end):
            piece = made[done : (done := done + (last - first) * (high - low))].view(last - first, high - low)
            for j, a, b in _planes(low, high, size):
                # The bits are shifted to the top of the byte, and later down again with their sign.
                field = fields[first:last, a - j * size : b - j * size]
                torch.bitwise_left_shift(field, 8 - self.bits * (j + 1), out=piece[:, a - low : b - low])
        return made.bitwise_right_shift_(8 - self.bits)

    def add_codes(
        self,
        codes: torch.Tensor,
        rows: Sequence[Rows],
        values: torch.Tensor,
        origin: int,
        scales: Sequence[torch.Tensor],
        start: int,
    ) -> None:
        """Adds the codes of neighboring elements of a shard to its other codes.

        Args:
            codes: the codes of the shard, uint8 ``[code_bytes]``; those of the elements are 0.
            rows: the pieces of weights among the elements; needed if some are not ternary.
            values: the quantized values of the elements, bf16.
            origin: the position of the first of the elements in the bucket.
            scales: the scales of the pieces, as :func:`scales_in` returns them.
            start: the position of the first of the elements in the shard.
        """
        # These are the signs of ternary values. NaN has code 0 and a scale of NaN, every multiple of which is NaN.
        new = (values > 0).view(torch.int8).sub_((values < 0).view(torch.int8))
        for piece, own in zip(rows, scales, strict=True) if self.needs_scales else ():
            if piece.space != _TERNARY:
                found = codes_under(piece.of(values, origin).float(), own[:, None].float(), SPACES[piece.space])
                piece.of(new, origin).copy_(found)
        fields = new.view(torch.uint8).bitwise_and_((1 << self.bits) - 1)
        size, end = codes.numel(), start + values.numel()
        for j, a, b in _planes(start, end, size):
            codes[a - j * size : b - j * size] |= fields[a - start : b - start] << self.bits * j

    def _pieces(self, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Yields neighboring elements of the bucket as ranges of shards, each with a range of elements in these shards.

        The ranges are the part before the first whole shard, all whole shards, and the part after them.
        """
        first, last = -(-start // self.shard), end // self.shard
        if first > last:
            yield last, first, start - last * self.shard, end - last * self.shard
            return
        if start < first * self.shard:
            yield first - 1, first, start - (first - 1) * self.shard, self.shard
        if first < last:
            yield first, last, 0, self.shard
        if last * self.shard < end:
            yield last, last + 1, 0, end - last * self.shard


def scales_in(
    rows: Sequence[Rows], values: torch.Tensor, origin: int, own: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Returns the scales of all pieces, ``[count]`` for each of ``rows``.

    The scale of a ternary piece is its largest magnitude, which is 0 if the piece does not show the scale of its group.

    Args:
        rows: the pieces.
        values: neighboring elements of the bucket that contain the pieces, bf16, quantized.
        origin: the position of the first of these elements in the bucket.
        own: the scales that all pieces were quantized with, bf16 ``[pieces]``; None if all are ternary.
    """
    found, first = [], 0
    for piece in rows:
        if piece.space == _TERNARY:
            found.append(piece.of(values, origin).abs().amax(1))
        else:
            assert own is not None
            scales = own[first : first + piece.count]
            # Every multiple of NaN is NaN, which is not true of infinity.
            found.append(torch.where(scales.isfinite(), scales, torch.nan))
        first += piece.count
    return found


def _planes(start: int, end: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Yields the planes that elements of a shard are in, each with the range of elements there (exclusive end)."""
    for j in range(start // size, -(-end // size)):
        yield j, max(start, j * size), min(end, (j + 1) * size)

# SPDX-License-Identifier: Apache-2.0
"""Shards of quantized weights: which data-parallel rank quantizes which part, if the optimizer is sharded over ranks.

The shards of the distributed optimizer's flat buffers ignore rows, so that a shard's edge may cut a group. All ranks
that hold a piece of such a group send each other the raw bf16 piece, and each sums the whole group in the order that
all backends use; a sum of partial sums would not be exact.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..nn.linear import TernaryState, per_row
from ..ops import quantize_in_place
from ..quantization import QuantizerConfig, effective_group


def places_of(part: Any) -> dict[torch.nn.Parameter, tuple[int, int]]:
    """Returns the start of every parameter of a distributed optimizer in its bucket, and the bucket's length.

    Both count elements; the result is empty for another optimizer.

    The positions are taken from the map of the buffer, as the optimizer takes them, because the map of a bucket leaves
    out the padding before a parameter.
    """
    if not hasattr(part, "gbuf_ranges"):
        return {}
    found = {}
    for buffer in part.buffers:
        for parameter, (start, _, index) in buffer.param_index_map.items():
            bucket = buffer.buckets[index]
            found[parameter] = start - bucket.offset, bucket.param_data.numel()
    return found


@dataclass(frozen=True)
class Span:
    """Neighboring elements of one group, in one data-parallel rank's shard; offsets count in the flat weight."""

    rank: int
    start: int
    end: int


@dataclass(frozen=True)
class Share:
    """The part of one weight that a data-parallel rank quantizes.

    Attributes:
        state: the state of the module.
        parameter: its weight, ``[out, in]``.
        group: the number of elements per scale.
        start: the first element of the flat weight in this rank's shard.
        end: the end of the shard's elements, exclusive; equal to ``start`` if the shard holds nothing of the weight.
        cuts: the spans of each group of which the shard holds a piece and other shards the rest, in order of the
            shards.
    """

    state: TernaryState
    parameter: torch.nn.Parameter
    group: int
    start: int
    end: int
    cuts: tuple[tuple[Span, ...], ...] = ()

    @property
    def whole(self) -> tuple[int, int]:
        """The range of the shard's elements that are whole groups, ``(start, end)``."""
        first, last = -(-self.start // self.group) * self.group, self.end // self.group * self.group
        return (first, last) if first < last else (self.start, self.start)

    @property
    def scales(self) -> torch.Tensor:
        """The scales ``[pieces]`` of all groups of which the shard holds a piece, in their order."""
        made = self.state.scales
        if made is None or self.start == self.end:
            return self.parameter.new_empty(0, dtype=torch.bfloat16, requires_grad=False)
        # If the whole weight was quantized at once, the state has the scales of all its groups, ``[out, groups]``.
        return made if made.dim() == 1 else made.flatten()[self.start // self.group : -(-self.end // self.group)]


def share_of(
    state: TernaryState, parameter: torch.nn.Parameter, first: int, shard: int, rank: int, ranks: int
) -> Share:
    """Returns the share of one rank in a weight in a buffer that is cut into equal shards.

    Args:
        state: the state of the module.
        parameter: its weight, ``[out, in]``.
        first: the position in the buffer where the weight begins.
        shard: the number of elements of one shard.
        rank: the data-parallel rank whose share is returned.
        ranks: the number of shards of the buffer.
    """
    count = parameter.numel()
    group = effective_group(parameter.shape[1], state.config.group_size)
    edges = [0, *(e for r in range(1, ranks) if 0 < (e := r * shard - first) < count), count]
    start, end = (min(max(r * shard - first, 0), count) for r in (rank, rank + 1))
    cuts = []
    for cut in sorted({edge // group for edge in edges[1:-1] if edge % group}):
        low, high = cut * group, (cut + 1) * group
        inside = [low, *(edge for edge in edges if low < edge < high), high]
        spans = [Span((first + a) // shard, a, b) for a, b in zip(inside, inside[1:], strict=False)]
        if any(span.rank == rank for span in spans):
            cuts.append(tuple(spans))
    return Share(state, parameter, group, start, end, tuple(cuts))


class Shares:
    """The quantized weights of one of megatron-core's optimizers, as this data-parallel rank holds them.

    Args:
        optimizer: a ``DistributedOptimizer`` or ``Float16OptimizerWithFloat16Params``.
        weights: the states and weights of the quantized modules that it trains.

    Attributes:
        group: the data-parallel group that the optimizer is sharded over; None if it is not sharded.
        shares: this rank's share of every weight.
    """

    def __init__(self, optimizer: Any, weights: Sequence[tuple[TernaryState, torch.nn.Parameter]]) -> None:
        places = places_of(optimizer)
        self.group: torch.distributed.ProcessGroup | None = optimizer.data_parallel_group if places else None
        self._rank = 0 if self.group is None else self.group.rank()
        ranks = 1 if self.group is None else self.group.size()
        self.shares: list[Share] = []
        for state, parameter in weights:
            first, shard = 0, parameter.numel()
            if self.group is not None:
                first, length = places[parameter]
                shard = length // ranks
            self.shares.append(share_of(state, parameter, first, shard, self._rank, ranks))

    @property
    def cut_groups(self) -> int:
        """The number of groups of which this rank holds only a piece."""
        return sum(len(share.cuts) for share in self.shares)

    @property
    def scales(self) -> torch.Tensor:
        """The scales of all shares in turn, each as in :attr:`Share.scales`."""
        return torch.cat([share.scales for share in self.shares])

    @torch.no_grad()
    def quantize(self, flat: Callable[[Share], torch.Tensor]) -> None:
        """Quantizes this rank's shard in place, and keeps its scales; collective over the data-parallel group.

        Args:
            flat: a function from a share to its latent weight ``[end - start]``, contiguous, which becomes the
                quantized one.
        """
        pieces = [flat(share) for share in self.shares]
        kinds: defaultdict[QuantizerConfig, list[tuple[int, torch.Tensor]]] = defaultdict(list)
        for i, (share, piece) in enumerate(zip(self.shares, pieces, strict=True)):
            start, end = (offset - share.start for offset in share.whole)
            if start < end:
                kinds[per_row(share.state)].append((i, piece[start:end].view(-1, share.group)))
        completed = self._complete(pieces)
        for i, groups in completed.items():
            kinds[per_row(self.shares[i].state)].append((i, groups))
        scales: list[list[torch.Tensor]] = [[] for _ in self.shares]
        for config, rows in kinds.items():
            for (i, _), made in zip(rows, quantize_in_place([row for _, row in rows], config), strict=True):
                scales[i].append(made.flatten())
        for i, groups in completed.items():
            share = self.shares[i]
            for spans, group in zip(share.cuts, groups, strict=True):
                for span in (s for s in spans if s.rank == self._rank):
                    own = group[span.start % share.group :][: span.end - span.start]
                    pieces[i][span.start - share.start : span.end - share.start] = own
        for i, (share, parts) in enumerate(zip(self.shares, scales, strict=True)):
            if i in completed and share.start % share.group:
                # Here the first group is cut, and possibly the last one; the whole groups come between them.
                *whole, cut = parts
                parts = [cut[:1], *whole, cut[1:]]
            share.state.scales = torch.cat(parts) if parts else None
            share.state.count += 1

    def _complete(self, pieces: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
        """Completes the groups that the shard's edges cut; returns them ``[cuts, group]`` by index of the share."""
        groups: dict[int, torch.Tensor] = {}
        sent: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
        wanted: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
        for i, (share, piece) in enumerate(zip(self.shares, pieces, strict=True)):
            if not share.cuts:
                continue
            groups[i] = piece.new_empty(len(share.cuts), share.group)
            for spans, group in zip(share.cuts, groups[i], strict=True):
                for span in spans:
                    place = group[span.start % share.group :][: span.end - span.start]
                    if span.rank != self._rank:
                        wanted[span.rank].append(place)
                        continue
                    own = piece[span.start - share.start : span.end - share.start]
                    place.copy_(own)
                    for peer in {s.rank for s in spans} - {self._rank}:
                        sent[peer].append(own)
        # Two ranks exchange one message each way; both list the groups in the order of the buffers.
        received = {peer: torch.cat(places) for peer, places in wanted.items()}
        operations = []
        for peer in sorted(sent):
            there = torch.distributed.get_global_rank(self.group, peer)  # type: ignore[arg-type] # with peers there is one
            for call, tensor in (
                (torch.distributed.isend, torch.cat(sent[peer])),
                (torch.distributed.irecv, received[peer]),
            ):
                operations.append(torch.distributed.P2POp(call, tensor, there, self.group))
        if operations:
            for work in torch.distributed.batch_isend_irecv(operations):
                work.wait()
        for peer, places in wanted.items():
            for place, values in zip(places, received[peer].split([p.numel() for p in places]), strict=True):
                place.copy_(values)
        return groups

# SPDX-License-Identifier: Apache-2.0
"""A bucket of megatron-core's DDP without its bf16 values: codes of all shards, scales, and values not quantized."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from ...nn.linear import TernaryState
from ...quantization import effective_group
from ..resident import check_held
from ..shards import Share, Shares
from .gather import Outgoing
from .packing import Packing, Rows, Weight, rows_between, scales_in

# While a shard is quantized, this many of its elements, or one weight, are bf16 values at a time.
_BLOCK_ELEMENTS = 1 << 24

Masters: TypeAlias = Mapping[torch.nn.Parameter, torch.Tensor]


@dataclass(frozen=True)
class _Block:
    """Neighboring weights of a bucket, which are quantized together.

    Attributes:
        low: the first element of the bucket in this rank's shard of the block.
        high: the end of these elements, exclusive; equal to ``low`` if the shard holds nothing of the block.
        rows: the pieces of groups between the two.
        shares: this rank's shares of the weights.
        starts: the first element in the bucket of each weight.
    """

    low: int
    high: int
    rows: tuple[Rows, ...]
    shares: Shares
    starts: Mapping[torch.nn.Parameter, int]

    def of(self, share: Share, values: torch.Tensor) -> torch.Tensor:
        """Returns the part of ``values``, the elements from ``low`` to ``high``, that belongs to one weight."""
        start = self.starts[share.parameter] - self.low
        return values[start + share.start : start + share.end] if share.start < share.end else values[:0]


@dataclass(frozen=True)
class _Raw:
    """Neighboring elements ``[start, end)`` of a parameter that is not quantized, and their words in a message."""

    parameter: torch.nn.Parameter
    start: int
    end: int
    word: int

    @property
    def values(self) -> torch.Tensor:
        return self.parameter.detach().view(-1)[self.start : self.end]

    @property
    def words(self) -> slice:
        return slice(self.word, self.word + self.end - self.start)


class PackedBucket:
    """The packed content of one bucket that a rank keeps.

    Until :meth:`pack` is called, and again after :meth:`restore`, the bucket is as megatron-core made it.

    Args:
        part: megatron-core's distributed optimizer that trains the parameters of the bucket.
        bucket: the bucket of megatron-core's DDP.
        starts: the parameters of the bucket, and where each begins in it.
        modules: the states of the quantized modules and their weights, which are among the parameters.

    Attributes:
        packing: the packing of the bucket.
        parameters: all parameters of the bucket.
    """

    def __init__(
        self,
        part: Any,
        bucket: Any,
        starts: Mapping[torch.nn.Parameter, int],
        modules: Sequence[tuple[TernaryState, torch.nn.Parameter]],
    ) -> None:
        group, data = part.data_parallel_group, bucket.param_data
        self.parameters = list(starts)
        self._data, self._rank, self._starts = data, group.rank(), starts
        self._modules = sorted(modules, key=lambda module: starts[module[1]])
        weights = [
            Weight(starts[p], p.numel(), effective_group(p.shape[1], state.config.group_size), state.config.space)
            for state, p in self._modules
        ]
        self.packing = Packing(weights, data.numel(), group.size(), data.device)
        # One entry per weight, because each weight consists of whole groups.
        self._rows = list(rows_between(weights, 0, data.numel()))
        self._blocks = list(self._blocks_of(part, weights))
        quantized = {parameter for _, parameter in modules}
        self._plain = sorted((p for p in starts if p not in quantized), key=lambda p: starts[p])
        self._raw = [list(self._raw_of(rank)) for rank in range(self.packing.ranks)]
        self._codes, self._scales = data.new_empty(0, dtype=torch.uint8), data.new_empty(0)

    def _blocks_of(self, part: Any, weights: Sequence[Weight]) -> Iterator[_Block]:
        shard = self.packing.shards[self._rank]
        first = 0
        for last, weight in enumerate(weights, start=1):
            if last < len(weights) and weights[last].end - weights[first].start <= _BLOCK_ELEMENTS:
                continue
            low, high = (min(max(e, shard.start), shard.end) for e in (weights[first].start, weight.end))
            rows = tuple(rows for rows in shard.rows if low <= rows.start < high)
            yield _Block(low, high, rows, Shares(part, self._modules[first:last]), self._starts)
            first = last

    def _raw_of(self, rank: int) -> Iterator[_Raw]:
        """Yields the places in the words of a rank of the values that are not quantized, except for padding."""
        shard = self.packing.shards[rank]
        word = shard.scales
        for a, b in shard.raw:
            for parameter in self._plain:
                first = self._starts[parameter]
                start, end = (min(max(edge - first, 0), parameter.numel()) for edge in (a, b))
                if start < end:
                    yield _Raw(parameter, start, end, word + first + start - a)
            word += b - a

    def pack(self) -> None:
        """Packs the values of the bucket, whose weights are quantized; its memory is not needed after that."""
        packing, data = self.packing, self._data
        self._codes = data.new_zeros(packing.ranks, packing.code_bytes, dtype=torch.uint8)
        # Every rank has quantized all weights here, and so has all of their scales.
        own = None
        if packing.needs_scales:
            own = torch.cat([state.scales.flatten() for state, _ in self._modules if state.scales is not None])
        self._scales = torch.cat(scales_in(self._rows, data, 0, own))
        for shard, codes in zip(packing.shards, self._codes, strict=True):
            for low in range(shard.start, shard.end, _BLOCK_ELEMENTS):
                high = min(low + _BLOCK_ELEMENTS, shard.end)
                rows = tuple(rows_between(packing.weights, low, high)) if packing.needs_scales else ()
                scales = [self._scales[piece.group : piece.group + piece.count] for piece in rows]
                packing.add_codes(codes, rows, data[low:high], low, scales, low - shard.start)
        for parameter in self._plain:
            parameter.data = parameter.detach().clone()
        nothing = torch.full((), torch.nan, dtype=data.dtype, device=data.device)
        for number, (state, parameter) in enumerate(self._modules):
            parameter.data = nothing.expand(parameter.shape)
            state.unpack = functools.partial(self.unpack, number)

    def restore(self) -> None:
        """Makes the parameters views of the bucket again, which has memory, but no values yet."""
        self._codes, self._scales = self._codes.new_empty(0), self._scales.new_empty(0)
        for parameter, start in self._starts.items():
            parameter.data = self._data[start : start + parameter.numel()].view(parameter.shape)
        for state, _ in self._modules:
            state.unpack = None

    @torch.no_grad()
    def unpack(self, number: int, out: torch.Tensor) -> None:
        """Writes one quantized weight.

        Args:
            number: the index of the weight in the bucket.
            out: the tensor to write to, bf16 ``[out, in]``, contiguous.
        """
        rows = self._rows[number]
        self.packing.multiply(self._codes, self._scales, [rows], out.view(-1), rows.start)

    @torch.no_grad()
    def write(self, masters: Masters) -> None:
        """Writes this rank's shard from the optimizer's fp32 masters; collective over its data-parallel group."""
        shard, codes = self.packing.shards[self._rank], self._codes[self._rank].zero_()
        for block in self._blocks:
            values = self._quantized(block, masters)
            found = scales_in(block.rows, values, block.low, block.shares.scales if self.packing.needs_scales else None)
            self.packing.add_codes(codes, block.rows, values, block.low, found, block.low - shard.start)
            for rows, scales in zip(block.rows, found, strict=True):
                self._scales[rows.group : rows.group + rows.count] = scales
        for raw in self._raw[self._rank]:
            raw.values.copy_(masters[raw.parameter].view(-1))

    @torch.no_grad()
    def check(self, masters: Masters) -> None:
        """Checks this rank's shard against the masters, and that parameters read as NaN.

        It is collective over the data-parallel group of the optimizer.

        Raises:
            StaleCacheError: if other code has written to a parameter.
        """
        for block in self._blocks:
            kept = [(share.state.scales, share.state.count) for share in block.shares.shares]
            fresh, found = self._quantized(block, masters), self._scales.new_empty(block.high - block.low)
            self.packing.multiply(self._codes, self._scales, block.rows, found, block.low)
            for share, (scales, count) in zip(block.shares.shares, kept, strict=True):
                share.state.scales, share.state.count = scales, count
                check_held(share.state, block.of(share, fresh), block.of(share, found))
        for state, parameter in self._modules:
            # All elements of the parameter share the memory of this one. Filling the parameter is the only way to write
            # to it.
            check_held(state, torch.ones(1), parameter.detach()[0, :1].isnan().float().cpu())

    def _quantized(self, block: _Block, masters: Masters) -> torch.Tensor:
        """Returns this rank's quantized values from ``low`` to ``high`` of a block, with zeros outside of weights."""
        values = self._scales.new_zeros(block.high - block.low)

        def latent(share: Share) -> torch.Tensor:
            piece = block.of(share, values)
            if piece.numel():
                piece.copy_(masters[share.parameter].detach().view(-1))
            return piece

        block.shares.quantize(latent)
        return values

    def send(self) -> Outgoing:
        """Returns what the gather sends: codes, which arrive where they are kept, and words."""
        shard = self.packing.shards[self._rank]
        words = self._scales.new_zeros(self.packing.words)
        first = shard.rows[0].group if shard.rows else 0
        words[: shard.scales] = self._scales[first : first + shard.scales]
        for raw in self._raw[self._rank]:
            words[raw.words] = raw.values
        everything = words.new_empty(self.packing.ranks, self.packing.words)
        messages = [(self._codes, self._codes[self._rank]), (everything, words)]
        return messages, functools.partial(self._arrived, everything)

    def _arrived(self, words: torch.Tensor) -> None:
        self._scales.copy_(self.packing.merged_scales(words))
        for own, raws in zip(words, self._raw, strict=True):
            for raw in raws:
                raw.values.copy_(own[raw.words])

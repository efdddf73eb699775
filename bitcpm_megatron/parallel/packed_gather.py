# SPDX-License-Identifier: Apache-2.0
"""Quantized weights travel between data-parallel ranks as 2-bit codes and scales, and arrive bit for bit.

Where the parameters hold the quantized weights (:mod:`.resident`), the all-gather of the distributed optimizer moves
values of which a group has three: 0 and plus and minus its scale. Here each rank sends, per bucket, a message instead
of its shard:

    2-bit codes of the whole shard, in the order of the bucket, as many bytes on every rank
    a bf16 scale for each group of which the shard holds an element
    raw bf16 for what is not quantized: norms, embeddings, what the buffer is padded with

All are as long as that of the fullest shard, and go in one uniform all-gather. Two, for codes and for raw values, would
have two such maxima, which can only be more. What arrives is unpacked into the buffer behind the wait. A shard that is
raw from end to end would make the messages longer than the shards: such a bucket is gathered as always.

Codes and scales are read off the shard itself. Of a group that a shard's edge cuts, each piece says its largest
magnitude; the largest of these is the scale, which all members of the group that are not zero have. A piece of zeros
says 0. Nothing here waits for a device.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..nn.linear import HostModule
from ..quantization import effective_group
from .probe import ternary_modules
from .resident import Resident, ResidentError, find_resident

_CODES_PER_BYTE = 4
# Codes are unpacked into a byte each before they are multiplied: of so many elements at a time, or of one shard.
_UNPACKED_ELEMENTS = 1 << 26
_CURE = "leave --ternary-param-gather out"


@dataclass(frozen=True)
class Weight:
    """Where a quantized weight lies in a bucket: first element, elements, and elements per scale."""

    start: int
    count: int
    group: int


@dataclass(frozen=True)
class Rows:
    """Neighbouring pieces of groups of one weight, equally wide: whole groups, or one piece of a group.

    Attributes:
        start: first element in the bucket.
        count: pieces.
        width: elements of each.
        group: number of the first piece's group among all groups of the bucket.
    """

    start: int
    count: int
    width: int
    group: int

    @property
    def end(self) -> int:
        """Behind the last element."""
        return self.start + self.count * self.width

    def of(self, values: torch.Tensor, origin: int) -> torch.Tensor:
        """These pieces ``[count, width]`` of a flat tensor that begins with an element of the bucket."""
        return values[self.start - origin : self.end - origin].view(self.count, self.width)


def rows_between(weights: Sequence[Weight], low: int, high: int) -> Iterator[Rows]:
    """All pieces of groups that lie between two elements of a bucket, in its order."""
    groups = 0
    for weight in weights:
        start, end = (min(max(edge - weight.start, 0), weight.count) for edge in (low, high))
        first = min(-(-start // weight.group) * weight.group, end)
        last = max(end // weight.group * weight.group, first)
        for a, b, width in ((start, first, first - start), (first, last, weight.group), (last, end, end - last)):
            if a < b:
                yield Rows(weight.start + a, (b - a) // width, width, groups + a // weight.group)
        groups += weight.count // weight.group


class Shard:
    """What one data-parallel rank holds of a bucket.

    Attributes:
        start: first element in the bucket.
        end: behind the last one.
        rows: of quantized weights, in order.
        raw: what lies between them, each by its first element and the one behind its last.
        scales: pieces of groups.
        words: of 16 bits in its message, for scales and raw values.
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
    """Bytes that a gather hands to every rank.

    Attributes:
        packed: those of the messages.
        plain: those of the ordinary gather.
        raw: those of values that are not quantized, in the ordinary gather.
        weights: quantized ones.
    """

    packed: int = 0
    plain: int = 0
    raw: int = 0
    weights: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    @property
    def per_weight(self) -> float:
        """Bytes per quantized weight, without the raw values."""
        return (self.packed - self.raw) / self.weights


class Packing:
    """How the shards of one bucket are packed into messages, and unpacked.

    Args:
        weights: the quantized ones in the bucket, in its order.
        length: elements of the bucket.
        ranks: equal shards that it is cut into.
        device: of the bucket.
    """

    def __init__(self, weights: Sequence[Weight], length: int, ranks: int, device: torch.device) -> None:
        self.ranks, self.shard = ranks, length // ranks
        self.shards = [Shard(weights, rank * self.shard, (rank + 1) * self.shard) for rank in range(ranks)]
        # Even, so that the words behind the codes are aligned.
        self.code_bytes = -(-self.shard // (2 * _CODES_PER_BYTE)) * 2
        self.message = self.code_bytes + 2 * max(shard.words for shard in self.shards)
        at_once = max(1, _UNPACKED_ELEMENTS // self.shard)
        self._blocks = [
            (first, last, tuple(rows_between(weights, first * self.shard, last * self.shard)))
            for first, last in ((r, min(r + at_once, ranks)) for r in range(0, ranks, at_once))
        ]
        quantized = sum(weight.count for weight in weights)
        self.traffic = Traffic(self.message * ranks, 2 * length, 2 * (length - quantized), quantized)
        self._place_scales(device)

    @property
    def pays(self) -> bool:
        """Whether the messages are shorter than the shards, and there is somebody to send them to."""
        return self.ranks > 1 and self.traffic.packed < self.traffic.plain

    def _place_scales(self, device: torch.device) -> None:
        """Finds which words of each message are scales that no message before has, and those of groups that several
        shards hold pieces of."""
        self._fresh: list[tuple[int, int]] = []
        places: dict[int, list[int]] = {}
        known = 0
        for rank, shard in enumerate(self.shards):
            first = shard.rows[0].group if shard.rows else known
            last = first + shard.scales
            self._fresh.append((known - first, shard.scales))
            known = last
            word = (rank * self.message + self.code_bytes) // 2
            for group in dict.fromkeys((first, last - 1) if shard.rows else ()):
                places.setdefault(group, []).append(word + group - first)
        cuts = {group: words for group, words in places.items() if len(words) > 1}
        most = max(map(len, cuts.values()), default=0)
        filled = [words + words[:1] * (most - len(words)) for words in cuts.values()]
        self._cut_groups = torch.tensor(list(cuts), dtype=torch.int64, device=device)
        self._cut_words = torch.tensor(filled, dtype=torch.int64, device=device)

    def pack(self, values: torch.Tensor, rank: int) -> torch.Tensor:
        """The message of a rank.

        Args:
            values: bf16 ``[shard]``, the rank's shard of the bucket, whose weights are quantized.
            rank: whose it is.

        Returns:
            uint8 ``[message]``.
        """
        shard = self.shards[rank]
        message = values.new_empty(self.message, dtype=torch.uint8)
        scales = [rows.of(values, shard.start).abs().amax(1) for rows in shard.rows]
        raw = [values[a - shard.start : b - shard.start] for a, b in shard.raw]
        words = message[self.code_bytes :].view(values.dtype)[: shard.words]
        torch.cat([*scales, *raw], out=words)
        # 0, 1 and, as -1 in two bits, 3. NaN has code 0 and a scale of NaN, of which any multiple is NaN.
        fields = message.new_zeros(_CODES_PER_BYTE, self.code_bytes)
        codes = fields.view(-1)[: self.shard]
        codes.copy_(values > 0).add_((values < 0).view(torch.uint8), alpha=3)
        packed = message[: self.code_bytes].copy_(fields[0])
        for j in range(1, _CODES_PER_BYTE):
            packed |= fields[j] << 2 * j
        return message

    def unpack(self, messages: torch.Tensor, bucket: torch.Tensor) -> None:
        """Writes what all ranks have packed.

        Args:
            messages: uint8 ``[ranks, message]``.
            bucket: bf16 ``[length]``, which is overwritten, the own shard with what it holds.
        """
        words = messages.view(bucket.dtype)
        behind = words[:, self.code_bytes // 2 :]
        for shard, own in zip(self.shards, behind, strict=True):
            lengths = [b - a for a, b in shard.raw]
            for (a, b), raw in zip(shard.raw, own[shard.scales : shard.words].split(lengths), strict=True):
                bucket[a:b].copy_(raw)
        scales = torch.cat([own[a:b] for own, (a, b) in zip(behind, self._fresh, strict=True)])
        if self._cut_groups.numel():
            scales.index_copy_(0, self._cut_groups, words.view(-1)[self._cut_words].amax(1))
        for first, last, rows in self._blocks:
            codes = messages[first:last, : self.code_bytes].view(torch.int8)
            # The two bits go to the top, and come down again with their sign.
            fields = torch.stack([codes << (6 - 2 * j) for j in range(_CODES_PER_BYTE)], 1).bitwise_right_shift_(6)
            levels = fields.view(last - first, -1)[:, : self.shard].reshape(-1)
            for piece in rows:
                own = scales[piece.group : piece.group + piece.count, None]
                torch.mul(piece.of(levels, first * self.shard), own, out=piece.of(bucket, 0))


@dataclass
class _Handle:
    """What megatron-core waits for: the collectives of a bucket group, and then their unpacking."""

    works: list[torch.distributed.Work] = field(default_factory=list)
    arrived: list[Callable[[], None]] = field(default_factory=list)

    @torch.no_grad()
    def wait(self) -> None:
        for work in self.works:
            work.wait()
        for unpack in self.arrived:
            unpack()


class PackedGather:
    """The packed gather of a training run's parameters.

    While the parameters hold latent weights, the ordinary gather runs.

    Args:
        chunks: the model chunks of this rank, wrapped in megatron-core's DDP with the distributed optimizer.
        resident: that keeps quantized weights in their parameters.

    Attributes:
        traffic: of one gather of every bucket of this rank, those that are gathered as always included.
        buckets: how many there are.
        packed: how many of them are packed.

    Raises:
        ResidentError: there is no gather of parameters, with the cure.
    """

    def __init__(self, chunks: Sequence[HostModule], resident: Resident) -> None:
        self._resident = resident
        self.traffic, self.buckets, self.packed = Traffic(), 0, 0
        groups = {m.weight: effective_group(m.weight.shape[1], s.config.group_size) for s, m in ternary_modules(chunks)}
        for chunk in chunks:
            config = getattr(chunk, "ddp_config", None)
            if config is None or not config.use_distributed_optimizer:
                raise ResidentError(
                    "--ternary-param-gather packed: no parameters are gathered without megatron-core's DDP and the "
                    f"distributed optimizer: use --use-distributed-optimizer, or {_CURE}"
                )
            weights = _weights_of([*chunk.buffers, *chunk.expert_parallel_buffers], groups)
            for group in [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]:
                self._take(group, weights)

    def _take(self, group: Any, weights: dict[int, list[Weight]]) -> None:
        """Packs what a bucket group gathers, where that is less."""
        ranks = group.intra_distributed_optimizer_instance_size
        packings: list[Packing | None] = []
        for bucket in group.buckets:
            data, packing = bucket.param_data, None
            size = data.numel() * data.element_size()
            traffic = Traffic(packed=size, plain=size, raw=size)
            if id(bucket) in weights:
                packing = Packing(weights[id(bucket)], data.numel(), ranks, data.device)
                traffic = packing.traffic
                if not packing.pays:
                    packing, traffic = None, replace(traffic, packed=size)
            packings.append(packing)
            self.traffic += traffic
            self.buckets, self.packed = self.buckets + 1, self.packed + (packing is not None)
        if any(packings):
            group.start_param_sync = functools.partial(self._start, group, packings, group.start_param_sync)

    @torch.no_grad()
    def _start(
        self, group: Any, packings: Sequence[Packing | None], original: Callable[..., None], force_sync: bool = False
    ) -> None:
        """Stands for ``_ParamAndGradBucketGroup.start_param_sync`` (megatron-core 0.12.1 to 0.19).

        ``finish_param_sync``, and a start that is forced, wait for the handle that this leaves.
        """
        if group.param_gather_handle is not None or not self._resident.holds:
            original(force_sync=force_sync)
            return
        handle = _Handle()
        rank = group.intra_distributed_optimizer_instance_rank
        for bucket, packing in zip(group.buckets, packings, strict=True):
            everything: torch.Tensor = bucket.param_data
            own = everything.view(group.intra_distributed_optimizer_instance_size, -1)[rank]
            if packing is not None:
                everything = own.new_empty(packing.ranks, packing.message, dtype=torch.uint8)
                own = packing.pack(own, rank)
                handle.arrived.append(functools.partial(packing.unpack, everything, bucket.param_data))
            work = torch.distributed.all_gather_into_tensor(
                everything.view(-1), own, group=group.intra_distributed_optimizer_instance_group, async_op=True
            )
            handle.works.append(work)
        if group.ddp_config.overlap_param_gather and not force_sync:
            group.param_gather_handle = handle
        else:
            handle.wait()
        group.param_gather_dispatched = True


def gather_packed(chunks: Sequence[torch.nn.Module], gather: str) -> str | None:
    """Lets the parameters be gathered as ``--ternary-param-gather`` asks.

    To be called behind :func:`~.resident.hold_in_parameters`.

    Args:
        chunks: as for :class:`PackedGather`.
        gather: ``packed``; ``bf16`` does nothing.

    Returns:
        One line for the log, None where nothing was asked for.

    Raises:
        ResidentError: it is not possible.
    """
    if gather != "packed" or not ternary_modules(chunks):
        return None
    resident = find_resident(chunks[0])
    if resident is None:
        raise ResidentError(
            "--ternary-param-gather packed: the parameters do not hold the quantized weights: use --ternary-cache "
            f"resident, or {_CURE}"
        )
    made = PackedGather(chunks, resident)
    return (
        f"parameter gather: packed in {made.packed} of {made.buckets} buckets, {made.traffic.packed:,} bytes instead "
        f"of {made.traffic.plain:,}"
    )


def _weights_of(buffers: Sequence[Any], groups: dict[torch.nn.Parameter, int]) -> dict[int, list[Weight]]:
    """The quantized weights of every bucket by its ``id``, in its order.

    By the map of the buffer: that of a bucket leaves out what a parameter's start is padded with.
    """
    found: dict[int, list[Weight]] = {}
    for buffer in buffers:
        for parameter, (start, _, index) in buffer.param_index_map.items():
            if parameter in groups:
                bucket = buffer.buckets[index]
                weight = Weight(start - bucket.offset, parameter.numel(), groups[parameter])
                found.setdefault(id(bucket), []).append(weight)
    return {bucket: sorted(weights, key=lambda weight: weight.start) for bucket, weights in found.items()}

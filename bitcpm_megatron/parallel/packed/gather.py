# SPDX-License-Identifier: Apache-2.0
"""Quantized weights travel between data-parallel ranks as codes and scales, and arrive bit for bit.

Where the parameters hold the quantized weights (:mod:`..resident`), the all-gather of the distributed optimizer moves
values of which a group has three to five, such as 0 and plus and minus its scale. Here each rank sends, per bucket, a
message instead of its shard:

    codes of the whole shard in 2 bits (4 in a space of five levels), in the order of the bucket, as many bytes on
    every rank
    a bf16 scale for each group of which the shard holds an element
    raw bf16 for what is not quantized: norms, embeddings, what the buffer is padded with

All are as long as that of the fullest shard, and go in one uniform all-gather. What arrives is unpacked into the buffer
behind the wait. A shard that is raw from end to end would make the messages longer than the shards: such a bucket is
gathered as always. :mod:`.packing` says what codes and scales are.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch

from ...nn.linear import HostModule
from ...quantization import effective_group
from ..probe import ternary_modules
from ..resident import Resident, ResidentError, find_resident
from ..shards import Share
from .packing import Packing, Traffic, Weight

Outgoing: TypeAlias = tuple[list[tuple[torch.Tensor, torch.Tensor]], Callable[[], None] | None]
"""What a bucket's gather sends: pairs of what is to hold that of all ranks and of the own, and what to do behind it."""
_Placed: TypeAlias = tuple[Weight, torch.nn.Parameter]
_CURE = "leave --ternary-param-gather out"


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
        kinds = {
            m.weight: (effective_group(m.weight.shape[1], s.config.group_size), s.config.space)
            for s, m in ternary_modules(chunks)
        }
        for chunk in chunks:
            config = getattr(chunk, "ddp_config", None)
            if config is None or not config.use_distributed_optimizer:
                raise ResidentError(
                    "--ternary-param-gather packed: no parameters are gathered without megatron-core's DDP and the "
                    f"distributed optimizer: use --use-distributed-optimizer, or {_CURE}"
                )
            weights = _weights_of([*chunk.buffers, *chunk.expert_parallel_buffers], kinds)
            for group in [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]:
                self._take(group, weights)

    def _take(self, group: Any, weights: dict[int, list[_Placed]]) -> None:
        """Packs what a bucket group gathers, where that is less."""
        ranks = group.intra_distributed_optimizer_instance_size
        packed, sends = 0, []
        for bucket in group.buckets:
            data = bucket.param_data
            size = data.numel() * data.element_size()
            send: Callable[[], Outgoing] = functools.partial(send_plain, group, bucket)
            traffic = Traffic(packed=size, plain=size, raw=size)
            if id(bucket) in weights:
                placed = weights[id(bucket)]
                packing = Packing([weight for weight, _ in placed], data.numel(), ranks, data.device)
                traffic = packing.traffic if packing.pays else replace(packing.traffic, packed=size)
                if packing.pays:
                    packed += 1
                    shares = self._shares_of(placed) if packing.needs_scales else []
                    send = functools.partial(_send_message, group, bucket, packing, shares)
            sends.append(send)
            self.traffic += traffic
        self.buckets, self.packed = self.buckets + len(sends), self.packed + packed
        if packed:
            replace_gather(group, self._resident, sends)

    def _shares_of(self, placed: Sequence[_Placed]) -> list[Share]:
        found = {share.parameter: share for share in self._resident.shares}
        return [found[parameter] for _, parameter in placed]


def _send_message(group: Any, bucket: Any, packing: Packing, shares: Sequence[Share]) -> Outgoing:
    rank = group.intra_distributed_optimizer_instance_rank
    scales = torch.cat([share.scales for share in shares]) if shares else None
    own = packing.pack(bucket.param_data.view(packing.ranks, -1)[rank], rank, scales)
    everything = own.new_empty(packing.ranks, packing.message)
    return [(everything, own)], functools.partial(packing.unpack, everything, bucket.param_data)


def send_plain(group: Any, bucket: Any) -> Outgoing:
    """What the ordinary gather of a bucket sends."""
    everything = bucket.param_data
    shards = everything.view(group.intra_distributed_optimizer_instance_size, -1)
    return [(everything, shards[group.intra_distributed_optimizer_instance_rank])], None


def replace_gather(group: Any, resident: Resident, sends: Sequence[Callable[[], Outgoing]]) -> None:
    """Lets a bucket group gather what its buckets send; while the parameters hold latent weights, as always.

    Displaces ``_ParamAndGradBucketGroup.start_param_sync`` (megatron-core 0.12.1 to 0.19) of the group.
    ``finish_param_sync``, and a start that is forced, wait for the handle that it leaves.

    Args:
        group: of buckets.
        resident: that knows what the parameters hold.
        sends: of each bucket, called when its gather starts.
    """
    group.start_param_sync = functools.partial(_start, group, resident, sends, group.start_param_sync)


@torch.no_grad()
def _start(
    group: Any,
    resident: Resident,
    sends: Sequence[Callable[[], Outgoing]],
    original: Callable[..., None],
    force_sync: bool = False,
) -> None:
    if group.param_gather_handle is not None or not resident.holds:
        original(force_sync=force_sync)
        return
    handle = _Handle()
    for send in sends:
        messages, arrived = send()
        for everything, own in messages:
            work = torch.distributed.all_gather_into_tensor(
                everything.view(-1), own, group=group.intra_distributed_optimizer_instance_group, async_op=True
            )
            handle.works.append(work)
        if arrived is not None:
            handle.arrived.append(arrived)
    if group.ddp_config.overlap_param_gather and not force_sync:
        group.param_gather_handle = handle
    else:
        handle.wait()
    group.param_gather_dispatched = True


def gather_packed(chunks: Sequence[torch.nn.Module], gather: str) -> str | None:
    """Lets the parameters be gathered as ``--ternary-param-gather`` asks.

    To be called behind :func:`~..resident.hold_in_parameters`.

    Args:
        chunks: as for :class:`PackedGather`.
        gather: ``packed``; ``bf16`` does nothing.

    Returns:
        One line for the log, None where nothing was asked for, or weights that are packed for good travel so anyhow.

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
    if resident.gathers_packed:
        return None
    made = PackedGather(chunks, resident)
    return (
        f"parameter gather: packed in {made.packed} of {made.buckets} buckets, {made.traffic.packed:,} bytes instead "
        f"of {made.traffic.plain:,}"
    )


def _weights_of(buffers: Sequence[Any], kinds: dict[torch.nn.Parameter, tuple[int, str]]) -> dict[int, list[_Placed]]:
    """The quantized weights of every bucket by its ``id``, in its order; ``kinds`` are their groups and spaces.

    By the map of the buffer: that of a bucket leaves out what a parameter's start is padded with.
    """
    found: dict[int, list[_Placed]] = {}
    for buffer in buffers:
        for parameter, (start, _, index) in buffer.param_index_map.items():
            if parameter in kinds:
                bucket = buffer.buckets[index]
                weight = Weight(start - bucket.offset, parameter.numel(), *kinds[parameter])
                found.setdefault(id(bucket), []).append((weight, parameter))
    return {bucket: sorted(placed, key=lambda pair: pair[0].start) for bucket, placed in found.items()}

# SPDX-License-Identifier: Apache-2.0
"""The packed gather: quantized weights are sent between data-parallel ranks as codes and scales, bit for bit.

If the parameters hold the quantized weights (:mod:`..resident`), the all-gather of the distributed optimizer moves
groups of only three to five different values, such as 0 and plus and minus the scale. Here each rank sends, for each
bucket, a message instead of its shard:

    codes of the whole shard in 2 bits (4 in a space of five levels), in the order of the bucket, as many bytes on
    every rank
    a bf16 scale for each group of which the shard holds an element
    raw bf16 for values that are not quantized: norms, embeddings, the padding of the buffer

All messages are as long as that of the fullest shard, and are sent in one uniform all-gather. They are unpacked into
the buffer after the wait. A shard that is raw from end to end would make the messages longer than the shards: such a
bucket is gathered as always. :mod:`.packing` describes codes and scales.
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
"""What a bucket's gather sends: pairs of tensors, and a function to call after the wait, or None.

Each pair consists of the tensor that receives the values of all ranks, and this rank's own values.
"""
_Placed: TypeAlias = tuple[Weight, torch.nn.Parameter]
_CURE = "leave --ternary-param-gather out"


@dataclass
class _Handle:
    """The handle that megatron-core waits for: the collectives of a bucket group, and then their unpacking."""

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
        resident: the :class:`~..resident.Resident` that keeps quantized weights in the parameters.

    Attributes:
        traffic: the traffic of one gather of every bucket of this rank, including those that are gathered as always.
        buckets: the number of buckets.
        packed: the number of buckets that are packed.

    Raises:
        ResidentError: if there is no gather of parameters; the message has the cure.
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
        """Makes a bucket group gather packed messages, for buckets whose traffic they reduce."""
        ranks = group.intra_distributed_optimizer_instance_size
        packed, sends = 0, []
        for bucket in group.buckets:
            data = bucket.param_data
            size = data.numel() * data.element_size()
            send: Callable[[], Outgoing] = functools.partial(send_plain, group, bucket)
            traffic = Traffic(packed=size, plain=size)
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
    """Returns what the ordinary gather of a bucket sends."""
    everything = bucket.param_data
    shards = everything.view(group.intra_distributed_optimizer_instance_size, -1)
    return [(everything, shards[group.intra_distributed_optimizer_instance_rank])], None


def replace_gather(group: Any, resident: Resident, sends: Sequence[Callable[[], Outgoing]]) -> None:
    """Makes a bucket group gather what its buckets send; as always, while the parameters hold latent weights.

    It displaces ``_ParamAndGradBucketGroup.start_param_sync`` (megatron-core 0.12.1 to 0.19) of the group.
    ``finish_param_sync``, and a forced start, wait for the handle that it sets.

    Args:
        group: the bucket group.
        resident: the :class:`~..resident.Resident` that knows what the parameters hold.
        sends: for each bucket, a function that is called when its gather starts, and returns what to send.
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
    """Makes the parameters be gathered as ``--ternary-param-gather`` asks.

    Call it after :func:`~..resident.hold_in_parameters`.

    Args:
        chunks: the model chunks of this rank, as for :class:`PackedGather`.
        gather: ``packed``, or ``bf16``, which does nothing.

    Returns:
        One line for the log; None if nothing was requested, or if the weights are kept packed and so are gathered
        packed in any case.

    Raises:
        ResidentError: if it is not possible.
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
    """Returns the quantized weights of every bucket, by its ``id`` and in its order.

    ``kinds`` holds their group sizes and spaces. The positions are taken from the map of the buffer, because the map of
    a bucket leaves out the padding before a parameter.
    """
    found: dict[int, list[_Placed]] = {}
    for buffer in buffers:
        for parameter, (start, _, index) in buffer.param_index_map.items():
            if parameter in kinds:
                bucket = buffer.buckets[index]
                weight = Weight(start - bucket.offset, parameter.numel(), *kinds[parameter])
                found.setdefault(id(bucket), []).append((weight, parameter))
    return {bucket: sorted(placed, key=lambda pair: pair[0].start) for bucket, placed in found.items()}

# SPDX-License-Identifier: Apache-2.0
"""Quantized weights that a rank keeps only as packed codes and scales; a layer's weight is unpacked when it runs.

As with :mod:`..resident`, the latent weights are in the optimizer's fp32 masters. But the bf16 buffer of DDP, which
would hold quantized values, has no memory: for each bucket there are the codes of all shards, the scales of all groups,
and separate tensors for values that are not quantized. A parameter that is quantized reads as NaN, and cannot be
written to. After a step each rank quantizes its own shard block by block and writes its own codes. The gather
distributes the codes to where they are kept, and the scales with raw values in one message. Every bit is that of
``--ternary-cache resident``.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ...nn.linear import HostModule
from ..probe import ternary_modules
from ..resident import Resident, ResidentError, masters_of
from ..shards import Shares
from .bucket import PackedBucket
from .gather import Outgoing, replace_gather, send_plain

_CURE = "use --ternary-cache resident"
_MASTERS = "model_float16_groups", "shard_fp32_from_float16_groups"


class PackedWeights(Resident):
    """The quantized weights of a training run that are kept as codes and scales.

    They are packed when the first schedule starts. Until then, and inside :meth:`latents`, everything is as
    megatron-core made it, bf16 buffers included.

    Args:
        chunks: the model chunks of this rank, as for :class:`~..resident.Resident`, wrapped in megatron-core's DDP with
            the distributed optimizer.
        optimizer: the optimizer that trains them, as ``get_megatron_optimizer`` builds it.

    Attributes:
        packed_bytes: the bytes of codes and scales that this rank keeps.
        weights: the number of quantized weights that it keeps as codes and scales.

    Raises:
        ResidentError: if this is not possible; the message has the reason.
    """

    gathers_packed = True

    def __init__(self, chunks: Sequence[HostModule], optimizer: Any) -> None:
        _check_buffers(chunks)
        super().__init__(chunks, optimizer)
        # The buffers that hold a quantized weight, with their sizes in bytes.
        self._buffers: list[tuple[Any, int]] = []
        self._buckets: dict[int, PackedBucket] = {}
        self._of_part: list[tuple[Any, list[PackedBucket]]] = []
        for part, _ in self._shares:
            packed = [self._take(part, buffer) for buffer in getattr(part, "buffers", ())]
            self._of_part.append((part, list(itertools.chain.from_iterable(packed))))
        self._groups = [g for chunk in chunks for g in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups)]
        for group in self._groups:
            if any(id(bucket) in self._buckets for bucket in group.buckets):
                replace_gather(group, self, [self._sender(group, bucket) for bucket in group.buckets])
        packings = [bucket.packing for bucket in self._buckets.values()]
        self.packed_bytes = sum(packing.ranks * packing.code_bytes + 2 * packing.groups for packing in packings)
        self.weights = sum(packing.traffic.weights for packing in packings)

    def verify(self) -> None:
        """Checks this rank's shard against the masters; collective over all ranks.

        Raises:
            StaleCacheError: if other code has written to a parameter.
        """
        for part, buckets in self._of_part:
            masters = masters_of(part)
            for bucket in buckets:
                bucket.check(masters)

    def _take(self, part: Any, buffer: Any) -> list[PackedBucket]:
        """Returns the packed buckets of a buffer; none if it holds no quantized weight."""
        states = {module.weight: state for state, module in self._modules}
        starts: dict[int, dict[torch.nn.Parameter, int]] = {number: {} for number in range(len(buffer.buckets))}
        # The map of the buffer is used, because that of a bucket leaves out the padding before a parameter.
        for parameter, (start, _, number) in buffer.param_index_map.items():
            starts[number][parameter] = start - buffer.buckets[number].offset
        packed = []
        for bucket, inside in zip(buffer.buckets, starts.values(), strict=True):
            if modules := [(states[parameter], parameter) for parameter in inside if parameter in states]:
                packed.append(PackedBucket(part, bucket, inside, modules))
                self._buckets[id(bucket)] = packed[-1]
        if packed:
            self._buffers.append((buffer, buffer.param_data.nbytes))
        return packed

    def _sender(self, group: Any, bucket: Any) -> Callable[[], Outgoing]:
        found = self._buckets.get(id(bucket))
        return functools.partial(send_plain, group, bucket) if found is None else found.send

    def _copy(self, part: Any, original: Callable[[], None], shares: Shares) -> None:
        if not self.holds:
            original()
            return
        buckets = next(buckets for owner, buckets in self._of_part if owner is part)
        with _without(part, {parameter for bucket in buckets for parameter in bucket.parameters}):
            original()
        masters = masters_of(part)
        for bucket in buckets:
            bucket.write(masters)

    @torch.no_grad()
    def _set(self, holds: bool) -> None:
        if holds == self.holds:
            return
        for buffer, size in self._buffers:
            storage = buffer.param_data.untyped_storage()
            if not holds:
                storage.resize_(size)
                # This also clears the padding between parameters, which is gathered with them.
                buffer.param_data.zero_()
            for bucket in buffer.buckets:
                packed = self._buckets.get(id(bucket))
                if packed is not None:
                    packed.pack() if holds else packed.restore()
                elif holds and _shares(bucket.param_data, storage):
                    self._move(buffer, bucket)
            if holds:
                storage.resize_(0)
        super()._set(holds)

    def _move(self, buffer: Any, bucket: Any) -> None:
        """Gives a bucket without a quantized weight memory of its own, for good, which everything upstream uses."""
        bucket.param_data = bucket.param_data.clone()
        for parameter in bucket.params_list:
            start = buffer.param_index_map[parameter][0] - bucket.offset
            parameter.data = bucket.param_data[start : start + parameter.numel()].view(parameter.shape)
        for group in self._groups:
            if bucket in group.buckets and hasattr(group, "cached_param_buffer_shard_list"):
                group.cached_param_buffer_shard_list[group.buckets.index(bucket)] = None


def pack_weights(chunks: Sequence[torch.nn.Module], optimizer: Any) -> str | None:
    """Makes a rank keep its quantized weights packed, as ``--ternary-cache packed`` asks.

    Call it after the optimizer is built, before or after a checkpoint is loaded: it takes effect with the first
    schedule.

    Returns:
        One line for the log; None for a model without quantized weights.

    Raises:
        ResidentError: if it is not possible; the message has the reason.
    """
    if not ternary_modules(chunks):
        return None
    made = PackedWeights(chunks, optimizer)
    return (
        f"cache: packed, {made.packed_bytes:,} bytes of codes and scales for the {made.weights:,} quantized weights of "
        "a rank, which are gathered packed, too; the optimizer's masters hold the latent ones"
    )


@contextlib.contextmanager
def _without(part: Any, parameters: set[torch.nn.Parameter]) -> Iterator[None]:
    """Context in which some bf16 parameters are hidden from a distributed optimizer."""
    kept = [getattr(part, name) for name in _MASTERS]
    every = [list(zip(*groups, strict=True)) for groups in zip(*kept, strict=True)]
    pairs = [[pair for pair in group if pair[0] not in parameters] for group in every]
    for i, name in enumerate(_MASTERS):
        setattr(part, name, [[pair[i] for pair in group] for group in pairs])
    try:
        yield
    finally:
        for name, groups in zip(_MASTERS, kept, strict=True):
            setattr(part, name, groups)


def _shares(tensor: torch.Tensor, storage: torch.UntypedStorage) -> bool:
    return tensor.untyped_storage().data_ptr() == storage.data_ptr()


def _check_buffers(chunks: Sequence[HostModule]) -> None:
    for chunk in chunks:
        config = getattr(chunk, "ddp_config", None)
        if config is None or not config.use_distributed_optimizer:
            raise ResidentError(
                "there is no buffer of parameters to free without megatron-core's DDP and the distributed optimizer: "
                f"use --use-distributed-optimizer, or {_CURE}"
            )
        if getattr(config, "nccl_ub", False):
            raise ResidentError(f"buffers that NCCL registered cannot be freed: leave --use-nccl-ub out, or {_CURE}")
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            storage = buffer.param_data.untyped_storage()
            if not storage.resizable() or storage.nbytes() != buffer.param_data.nbytes:
                raise ResidentError(f"the buffer of the parameters has no memory of its own that can be freed: {_CURE}")

# SPDX-License-Identifier: Apache-2.0
"""Tests that shards that are packed, gathered and unpacked are equal bit for bit, and that messages are short."""

import argparse
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitcpm_megatron.nn.cache import CacheEpoch
from bitcpm_megatron.nn.linear import TernaryState
from bitcpm_megatron.parallel.packed.gather import PackedGather, gather_packed
from bitcpm_megatron.parallel.packed.packing import Packing, Weight, rows_between, scales_in
from bitcpm_megatron.parallel.resident import ResidentError
from bitcpm_megatron.quantization import SPACES, QuantizerConfig, quantize_dequantize
from bitcpm_megatron.ternary_flags import add_ternary_arguments, ternary_mistakes

GATHER = "bitcpm_megatron.parallel.packed.gather"
PACKED = "--ternary-param-gather packed"
COLUMNS_AND_GROUPS = [(32, 32), (33, 33), (64, 32), (96, 32), (96, 96), (7, 7), (1, 1)]
SHAPES = st.tuples(st.integers(1, 9), st.sampled_from(COLUMNS_AND_GROUPS))


def bucket_of(
    shapes: list[tuple[int, tuple[int, int]]],
    gaps: list[int],
    rest: int,
    ranks: int,
    seed: int,
    spaces: tuple[str, ...] = ("ternary",),
):
    """Returns a bucket with quantized weights and other values between them, the weights' places, and all scales."""
    generator = torch.Generator().manual_seed(seed)
    values, weights, scales, place = [], [], [torch.empty(0, dtype=torch.bfloat16)], 0
    for number, ((rows, (columns, group)), gap) in enumerate(zip(shapes, gaps, strict=True)):
        values.append(torch.randn(gap, generator=generator).to(torch.bfloat16))
        latent = (torch.randn(rows, columns, generator=generator) * 10.0 ** -(seed % 7)).to(torch.bfloat16)
        # Some rows are zeros, as long as a shard may be, and in some groups only one value is not quantized to zero.
        latent[:: 2 + seed % 3] = 0.0
        latent[1::4, 0] = 2e-5
        if seed % 5 == 0:
            latent[-1, -1] = torch.inf if seed % 2 else torch.nan
        space = spaces[number % len(spaces)]
        # With the mean as scale, many groups have only the highest level; with far more, only the lowest magnitude.
        config = QuantizerConfig(space, statistic="absmean", scale_multiplier=(1.0, 0.25, 5.0)[(seed + number) % 3])
        quantized, made = quantize_dequantize(latent.view(-1, group), config)
        values.append(quantized.flatten())
        scales.append(made.flatten())
        weights.append(Weight(place + gap, latent.numel(), group, space))
        place += gap + latent.numel()
    values.append(torch.randn(rest + -(place + rest) % ranks, generator=generator).to(torch.bfloat16))
    return torch.cat(values), weights, torch.cat(scales)


def packed(packing: Packing, bucket: torch.Tensor, scales: torch.Tensor) -> list[torch.Tensor]:
    """Returns the messages of all ranks, each of which knows the scales of the groups that it has a part of."""
    rows = [piece for shard in packing.shards for piece in shard.rows]
    assert bool(rows) == bool(packing.weights)
    return [
        packing.pack(values, rank, torch.cat([scales[:0], *(scales[r.group : r.group + r.count] for r in shard.rows)]))
        for rank, (values, shard) in enumerate(zip(bucket.view(packing.ranks, -1), packing.shards, strict=True))
    ]


def bits(values: torch.Tensor) -> torch.Tensor:
    """Returns the bits of bf16 values, with the same bits for all NaNs."""
    return values.masked_fill(values.isnan(), torch.nan).view(torch.int16)


LAYOUTS = {
    "shapes": st.lists(SHAPES, max_size=5),
    "gaps": st.lists(st.integers(0, 70), min_size=5, max_size=5),
    "rest": st.integers(1, 200),
    "ranks": st.integers(1, 9),
    "seed": st.integers(0, 1000),
    "spaces": st.one_of(st.sampled_from([(name,) for name in SPACES]), st.permutations(list(SPACES)).map(tuple)),
}


@settings(max_examples=300, deadline=None)
@given(**LAYOUTS, at_once=st.sampled_from([1, 100, 1 << 20]))
def test_what_is_unpacked_is_what_was_packed(shapes, gaps, rest, ranks, seed, spaces, at_once) -> None:
    bucket, weights, scales = bucket_of(shapes, gaps[: len(shapes)], rest, ranks, seed, spaces)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bitcpm_megatron.parallel.packed.packing._UNPACKED_ELEMENTS", at_once)
        packing = Packing(weights, bucket.numel(), ranks, bucket.device)
    messages = packed(packing, bucket, scales)
    assert {message.numel() for message in messages} == {packing.message}
    found = torch.full_like(bucket, 123.0)
    packing.unpack(torch.stack(messages), found)
    assert torch.equal(bits(found), bits(bucket))


@settings(max_examples=200, deadline=None)
@given(**LAYOUTS, data=st.data())
def test_codes_may_be_added_piece_by_piece(shapes, gaps, rest, ranks, seed, spaces, data) -> None:
    bucket, weights, scales = bucket_of(shapes, gaps[: len(shapes)], rest, ranks, seed, spaces)
    packing = Packing(weights, bucket.numel(), ranks, bucket.device)
    rank = data.draw(st.integers(0, ranks - 1))
    shard = bucket.view(ranks, -1)[rank]
    whole, pieces = packed(packing, bucket, scales)[rank][: packing.code_bytes], torch.zeros(packing.code_bytes)
    pieces = pieces.to(torch.uint8)
    edges = sorted({0, shard.numel(), *data.draw(st.lists(st.integers(0, shard.numel()), max_size=4))})
    for start, end in itertools.pairwise(edges):
        first, values = rank * shard.numel() + start, shard[start:end]
        rows = list(rows_between(weights, first, first + end - start))
        own = torch.cat([scales[:0], *(scales[piece.group : piece.group + piece.count] for piece in rows)])
        packing.add_codes(pieces, rows, values, first, scales_in(rows, values, first, own), start)
    assert torch.equal(pieces, whole)


@settings(max_examples=200, deadline=None)
@given(**LAYOUTS)
def test_one_weight_is_unpacked_as_the_whole_bucket_is(shapes, gaps, rest, ranks, seed, spaces) -> None:
    bucket, weights, own = bucket_of(shapes, gaps[: len(shapes)], rest, ranks, seed, spaces)
    packing = Packing(weights, bucket.numel(), ranks, bucket.device)
    messages = torch.stack(packed(packing, bucket, own))
    codes = messages[:, : packing.code_bytes].contiguous()
    scales = packing.merged_scales(messages.view(bucket.dtype)[:, packing.code_bytes // 2 :])
    assert scales.numel() == packing.groups
    for weight, rows in zip(weights, rows_between(weights, 0, bucket.numel()), strict=True):
        assert (rows.start, rows.end, rows.width) == (weight.start, weight.end, weight.group)
        found = torch.full((weight.count,), 123.0, dtype=bucket.dtype)
        packing.multiply(codes, scales, [rows], found, weight.start)
        assert torch.equal(bits(found), bits(bucket[weight.start : weight.end]))


def test_packing_waits_for_no_device() -> None:
    for spaces in (("ternary",), ("half-integer-4", "five-value", "ternary")):
        bucket, weights, _ = bucket_of([(16, (512, 512)), (9, (33, 33)), (16, (512, 512))], [0, 64, 3], 5, 3, 1, spaces)
        nowhere = bucket.to("meta")
        packing = Packing(weights, bucket.numel(), 3, nowhere.device)
        # Tensors on the device "meta" have no values, so that any access to a value fails.
        own = torch.empty(packing.shards[1].scales, dtype=torch.bfloat16, device="meta")
        message = packing.pack(nowhere.view(3, -1)[1], 1, own)
        packing.unpack(torch.stack([message] * 3), nowhere)


@settings(max_examples=300, deadline=None)
@given(**LAYOUTS)
def test_rows_cover_the_weights_and_know_their_groups(shapes, gaps, rest, ranks, seed, spaces) -> None:
    bucket, weights, _ = bucket_of(shapes, gaps[: len(shapes)], rest, ranks, seed, spaces)
    group_of, groups = {}, 0
    for weight in weights:
        group_of |= {weight.start + i: groups + i // weight.group for i in range(weight.count)}
        groups += weight.count // weight.group
    seen = []
    shard = bucket.numel() // ranks
    for low in range(0, bucket.numel(), shard):
        for rows in rows_between(weights, low, low + shard):
            assert low <= rows.start < rows.end <= low + shard
            for i in range(rows.end - rows.start):
                assert group_of[rows.start + i] == rows.group + i // rows.width
                seen.append(rows.start + i)
    assert seen == sorted(group_of)


class Wire:
    """A double of ``all_gather_into_tensor`` for ranks that are simulated one after another; counts gathered bytes."""

    def __init__(self, ranks: int) -> None:
        self.ranks, self.calls = ranks, [[] for _ in range(ranks)]
        self.bytes = 0

    def gather(self, everything: torch.Tensor, own: torch.Tensor, group: Any, async_op: bool) -> SimpleNamespace:
        """Gathers for the rank of the group; the result is available only after ``wait``."""
        assert async_op and everything.numel() == self.ranks * own.numel() and everything.dtype == own.dtype
        calls = self.calls[group.rank]
        calls.append(own.clone())
        number = len(calls) - 1
        self.bytes += everything.numel() * everything.element_size()
        return SimpleNamespace(wait=lambda: everything.copy_(torch.cat([c[number] for c in self.calls])))


def chunk_of(rank: int, ranks: int, buckets: list[tuple[torch.Tensor, list[Weight]]], overlap: bool):
    """Returns one rank's chunk, wrapped as by megatron-core with only its own shard in each bucket, and its modules."""
    config = SimpleNamespace(use_distributed_optimizer=True, overlap_param_gather=overlap)
    modules, made, index, offset = [], [], {}, 0
    for number, (values, weights) in enumerate(buckets):
        data = torch.full_like(values, 99.0)
        data.view(ranks, -1)[rank] = values.view(ranks, -1)[rank]
        made.append(SimpleNamespace(param_data=data, offset=offset))
        for weight in weights:
            view = data[weight.start : weight.start + weight.count].view(-1, weight.group)
            module = SimpleNamespace(weight=torch.nn.Parameter(view))
            index[module.weight] = (offset + weight.start, offset + weight.start + weight.count, number)
            modules.append((TernaryState("layer", QuantizerConfig(), CacheEpoch()), module))
        offset += values.numel()
    buffer = SimpleNamespace(param_index_map=index, buckets=made)
    group = SimpleNamespace(
        buckets=made,
        ddp_config=config,
        intra_distributed_optimizer_instance_size=ranks,
        intra_distributed_optimizer_instance_rank=rank,
        intra_distributed_optimizer_instance_group=SimpleNamespace(rank=rank),
        param_gather_handle=None,
        param_gather_dispatched=False,
        ordinary=[],
    )
    group.start_param_sync = lambda force_sync=False: group.ordinary.append(force_sync)
    chunk = SimpleNamespace(
        ddp_config=config,
        buffers=[buffer],
        expert_parallel_buffers=[],
        bucket_groups=[group],
        expert_parallel_bucket_groups=[],
    )
    return chunk, modules


def played(monkeypatch: pytest.MonkeyPatch, ranks: int, buckets: list, overlap: bool):
    """Returns all ranks' chunks, their packed gathers, the wire, and the double of resident weights."""
    wire, resident = Wire(ranks), SimpleNamespace(holds=True, gathers_packed=False)
    monkeypatch.setattr(torch.distributed, "all_gather_into_tensor", wire.gather)
    chunks, gathers = [], []
    for rank in range(ranks):
        chunk, modules = chunk_of(rank, ranks, buckets, overlap)
        monkeypatch.setattr(f"{GATHER}.ternary_modules", lambda chunks, modules=modules: modules)
        chunks.append(chunk)
        gathers.append(PackedGather([chunk], resident))
    return chunks, gathers, wire, resident


def buckets_of(ranks: int) -> list[tuple[torch.Tensor, list[Weight]]]:
    """Returns a bucket of weights that shards cut, with a norm; a bucket of an embedding; and a bucket of both."""
    wide, odd = (16, (512, 512)), (9, (33, 33))
    return [
        bucket_of([wide, odd, wide, wide], [0, 64, 3, 0], 5, ranks, 1)[:2],
        bucket_of([], [], 4096, ranks, 2)[:2],
        bucket_of([wide, wide], [0, 5000], 1, ranks, 3)[:2],
    ]


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_an_asynchronous_gather_unpacks_behind_its_wait(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    buckets = buckets_of(ranks)
    chunks, gathers, wire, resident = played(monkeypatch, ranks, buckets, overlap=True)
    groups = [chunk.bucket_groups[0] for chunk in chunks]
    for group in groups:
        group.start_param_sync()
        assert group.param_gather_dispatched and group.param_gather_handle is not None
    # The gather is in flight; the current state of the parameters must not decide how messages are unpacked.
    resident.holds = False
    for rank, group in enumerate(groups):
        other = (rank + 1) % ranks
        assert (group.buckets[0].param_data.view(ranks, -1)[other] == 99.0).all()
        group.param_gather_handle.wait()
        for bucket, (values, _) in zip(group.buckets, buckets, strict=True):
            assert torch.equal(bits(bucket.param_data), bits(values))
        assert group.ordinary == []
    assert wire.bytes == sum(gather.traffic.packed for gather in gathers)


def test_a_gather_that_is_on_its_way_or_of_latent_weights_is_the_ordinary_one(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks, _, wire, resident = played(monkeypatch, 2, buckets_of(2), overlap=True)
    group = chunks[0].bucket_groups[0]
    resident.holds = False
    group.start_param_sync()
    group.start_param_sync(force_sync=True)
    resident.holds = True
    group.param_gather_handle = object()
    group.start_param_sync(force_sync=True)
    assert group.ordinary == [False, True, True] and wire.bytes == 0


def test_bytes_on_the_wire(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, matrix = 4, (32, (512, 512))
    norms = [bucket_of([matrix] * 6, [0, 64, 0, 64, 0, 64], 0, ranks, 1)[:2]]
    _, gathers, wire, _ = played(monkeypatch, ranks, norms, overlap=False)
    for gather in gathers:
        assert gather.packed == gather.buckets == 1
        assert gather.traffic.weights == 6 * 32 * 512
        # Three norms of 64 elements are in the same bucket.
        assert 0.25 < (gather.traffic.packed - 2 * 3 * 64) / gather.traffic.weights <= 0.27
        assert gather.traffic.packed < gather.traffic.plain / 7


def test_a_bucket_without_gain_is_gathered_as_always(monkeypatch: pytest.MonkeyPatch) -> None:
    # The second of two shards consists only of an embedding.
    buckets = [bucket_of([(8, (32, 32))], [0], 600, 2, 1)[:2], bucket_of([], [], 64, 2, 1)[:2]]
    chunks, gathers, wire, _ = played(monkeypatch, 2, buckets, overlap=False)
    assert [gather.packed for gather in gathers] == [0, 0]
    assert gathers[0].traffic.packed == gathers[0].traffic.plain == sum(2 * values.numel() for values, _ in buckets)
    chunks[0].bucket_groups[0].start_param_sync()
    assert chunks[0].bucket_groups[0].ordinary == [False] and wire.bytes == 0


def test_one_rank_packs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _, (gather,), _, _ = played(monkeypatch, 1, buckets_of(1), overlap=False)
    assert gather.packed == 0 and gather.traffic.packed == gather.traffic.plain


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    chunk, modules = chunk_of(0, 2, buckets_of(2), overlap=False)
    chunk.module = None
    monkeypatch.setattr(f"{GATHER}.ternary_modules", lambda chunks: modules)
    assert gather_packed([chunk], "bf16") is None
    with pytest.raises(ResidentError, match="do not hold the quantized.*: use --ternary-cache resident, or leave"):
        gather_packed([chunk], "packed")
    chunk._ternary_resident = SimpleNamespace(holds=True, gathers_packed=False)
    assert "packed in 2 of 3 buckets" in gather_packed([chunk], "packed")
    chunk.ddp_config.use_distributed_optimizer = False
    with pytest.raises(ResidentError, match="use --use-distributed-optimizer, or leave"):
        gather_packed([chunk], "packed")


@pytest.mark.parametrize(
    ("flags", "distributed", "mistakes"),
    [
        ("--ternary", False, []),
        (f"--ternary {PACKED} --ternary-cache auto", True, []),
        (f"--ternary {PACKED} --ternary-cache resident", True, []),
        (f"--ternary {PACKED} --ternary-cache step", True, ["--ternary-cache step does not keep there: use resident"]),
        (f"--ternary {PACKED} --ternary-cache none", False, ["use resident", "needs --use-distributed-optimizer"]),
        (PACKED, True, ["--ternary-param-gather without --ternary would do nothing"]),
    ],
)
def test_flags(flags: str, distributed: bool, mistakes: list[str]) -> None:
    args = add_ternary_arguments(argparse.ArgumentParser()).parse_args(flags.split())
    args.use_distributed_optimizer = distributed
    found = ternary_mistakes(args)
    assert len(found) == len(mistakes)
    assert all(wanted in said for wanted, said in zip(mistakes, found, strict=True))

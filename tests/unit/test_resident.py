# SPDX-License-Identifier: Apache-2.0
"""Tests of resident weights: which rank quantizes which part of a sharded weight, and recovering scales from one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitcpm_megatron.nn.cache import CacheEpoch
from bitcpm_megatron.nn.linear import StaleCacheError, TernaryState
from bitcpm_megatron.ops import Backend
from bitcpm_megatron.parallel.resident import Resident
from bitcpm_megatron.parallel.shards import Share, Shares, share_of
from bitcpm_megatron.quantization import QuantizerConfig, quantize_dequantize, scales_of


def state(group: int = -1) -> TernaryState:
    return TernaryState("layer", QuantizerConfig(group_size=group), CacheEpoch())


def shares(rows: int, columns: int, group: int, first: int, shard: int, ranks: int) -> list[Share]:
    weight = torch.nn.Parameter(torch.empty(rows, columns, device="meta"))
    return [share_of(state(group), weight, first, shard, rank, ranks) for rank in range(ranks)]


@settings(max_examples=300, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.sampled_from([32, 33, 64, 96, 160]),
    group=st.sampled_from([-1, 32, 64]),
    first=st.integers(0, 400),
    ranks=st.integers(1, 9),
    rest=st.integers(0, 300),
)
def test_every_group_is_quantized_whole_by_whoever_holds_any_of_it(rows, columns, group, first, ranks, rest) -> None:
    if group != -1 and columns % group:
        group = -1
    count = rows * columns
    shard = -(-(first + count + rest) // ranks)
    size = columns if group == -1 else group
    held: dict[int, list[tuple[int, int]]] = {}
    for rank, share in enumerate(shares(rows, columns, group, first, shard, ranks)):
        assert (share.start, share.end) == tuple(min(max(r * shard - first, 0), count) for r in (rank, rank + 1))
        low, high = share.whole
        covered = set(range(low, high))
        assert low % size == high % size == 0 or low == high
        for spans in share.cuts:
            own = [span for span in spans if span.rank == rank]
            assert len(own) == 1 and len(spans) > 1
            # The pieces of a group are consecutive and make up the whole group.
            assert [span.start for span in spans[1:]] == [span.end for span in spans[:-1]]
            assert spans[0].start % size == 0 and spans[-1].end == spans[0].start + size
            for span in spans:
                assert (first + span.start) // shard == (first + span.end - 1) // shard == span.rank
            covered |= set(range(own[0].start, own[0].end))
        # Exactly the shard is covered.
        assert covered == set(range(share.start, share.end))
        for element in covered:
            held.setdefault(element, []).append((rank, share.start))
    assert sorted(held) == list(range(count)) and all(len(owners) == 1 for owners in held.values())


def test_a_group_over_three_shards() -> None:
    found = shares(1, 96, -1, 8, 40, 3)
    assert [(s.rank, s.start, s.end) for s in found[0].cuts[0]] == [(0, 0, 32), (1, 32, 72), (2, 72, 96)]
    assert found[0].cuts == found[1].cuts == found[2].cuts and all(s.whole[0] == s.whole[1] for s in found)


@pytest.mark.parametrize("group", [-1, 32])
def test_a_quantized_weight_tells_its_scales(group: int) -> None:
    config = QuantizerConfig(group_size=group)
    weight = (torch.randn(64, 96, generator=torch.Generator().manual_seed(0)) * 0.02).to(torch.bfloat16)
    weight[3] = 0.0
    # These groups are below eps, with and without a value that is not quantized to zero.
    weight[4], weight[4, ::32] = 0.0, 2e-5
    weight[5] = 1e-6
    weight[6, 5] = torch.inf
    quantized, scales = quantize_dequantize(weight, config)
    found = scales_of(quantized, config)
    finite = scales.isfinite()
    assert torch.equal(found[finite], scales[finite]) and not found[~finite].isfinite().any()
    assert (scales[3] == torch.tensor(1e-5, dtype=torch.bfloat16)).all()


def test_a_quantized_weight_is_never_quantized_again() -> None:
    resident = state()
    weight = torch.randn(4, 64).to(torch.bfloat16)
    quantized, scales = resident.in_use(weight)
    resident.resident = True
    found, recovered = resident.in_use(quantized)
    assert torch.equal(found, quantized) and torch.equal(recovered, scales)
    with pytest.raises(StaleCacheError, match=r"layer: its parameter holds the quantized weight.*latents\(\)"):
        resident.quantize(quantized)


@pytest.mark.parametrize("begins", [False, True])
def test_all_weights_of_a_step_are_quantized_together(begins: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend is called once for all weights, which may have different group sizes, and quantizes them in place."""
    calls = []
    original = Backend.together

    def recorded(self: Backend, weights, *arguments) -> int:
        calls.append(len(weights))
        return original(self, weights, *arguments)

    monkeypatch.setattr(Backend, "together", recorded)
    linears = [torch.nn.Linear(64, rows, bias=False, dtype=torch.bfloat16) for rows in (3, 5, 96)]
    modules = list(zip([state(), state(32), state(64)], linears, strict=True))
    expected = [quantize_dequantize(m.weight.detach().clone(), s.config) for s, m in modules]
    places = [m.weight.data_ptr() for m in linears]
    if begins:
        resident = Resident.__new__(Resident)
        resident.holds, resident._modules = False, modules
        resident.begin()
        assert resident.holds and all(s.resident for s, _ in modules)
    else:
        # The optimizer has no shards, so that every rank has all of every weight.
        Shares(object(), [(s, m.weight) for s, m in modules]).quantize(
            lambda share: share.parameter.detach().view(-1)[share.start : share.end]
        )
    assert calls == [3] and places == [m.weight.data_ptr() for m in linears]
    for (s, m), (quantized, scales) in zip(modules, expected, strict=True):
        assert torch.equal(m.weight, quantized) and torch.equal(s.scales.flatten(), scales.flatten()) and s.count == 1

# SPDX-License-Identifier: Apache-2.0
"""Target stores over two ranks: written at one layout and read at others; damage is reported by every rank."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.launcher import Ranks

from bitcpm_megatron.data.target_records import decode_draws
from bitcpm_megatron.data.target_store import TargetStore

LAYOUTS = ("TP2", "PP2", "PP2+VPP2", "CP2")


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("targets")


@pytest.fixture(scope="module")
def results(shared_ranks: Callable[[int], Ranks], where: Path) -> list[dict]:
    """The reports of two ranks."""
    return shared_ranks(2).run("targets", where)


@pytest.mark.parametrize("kind", ["sampled", "top-k"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.verifies("training", "a store of a teacher's targets gives the same losses at every layout (1e-6)")
def test_a_store_of_two_tensor_parallel_ranks_is_read_alike_at_every_layout(
    layout: str, kind: str, results: list[dict]
) -> None:
    for result in results:
        assert len(result[f"{layout} {kind}"]) == 3
        for step, other in zip(result[f"{layout} {kind}"], result[f"DP2 {kind}"], strict=True):
            assert step == pytest.approx(other, rel=1e-6)


@pytest.mark.parametrize("layout", ["PP2", "DP2"])
def test_a_store_is_the_same_whoever_writes_it(layout: str, results: list[dict], where: Path) -> None:
    """Stores are equal except for the rounding of logits, which may change one draw of some thousand."""
    one, other = (TargetStore(where / f"{name} --distill-draws 50") for name in ("TP2", layout))
    assert one.description == other.description and one.description.samples == 23
    for number in range(23):
        drawn = [decode_draws(store.record(number), 32, 50, 300) for store in (one, other)]
        counts = [np.zeros((32, 300), int) for _ in drawn]
        for count, (ids, times) in zip(counts, drawn, strict=True):
            np.add.at(count, (np.arange(32)[:, None], ids), times)
        assert counts[0].sum() == 32 * 50 and np.abs(counts[0] - counts[1]).sum() <= 4


def test_what_one_rank_finds_damaged_every_rank_tells(results: list[dict]) -> None:
    for result in results:
        assert "targets-00000.bin is damaged: what it says of sample 0" in result["damaged"]


@pytest.mark.parametrize("vocab_size", [100, 60])
def test_draws_and_likeliest_ids_over_two_ranks_are_those_of_one(vocab_size: int, results: list[dict]) -> None:
    """With 60 ids the second rank has only padding."""
    for result in results:
        assert result[f"draws of {vocab_size}"] <= 1e-4 and result[f"likeliest of {vocab_size}"] <= 1e-5

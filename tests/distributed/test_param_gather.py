# SPDX-License-Identifier: Apache-2.0
"""Quantized weights in the parameters, gathered packed or also kept packed, train the same model bit for bit."""

from pathlib import Path

import pytest
from support.small_model import MODEL, losses, succeeded

from bitcpm_megatron.checkpoints.directory import iteration_directory

# Rows of 72 and 130 elements are cut by shards, and never fill whole bytes or messages.
ODD = ["--hidden-size", "72", "--ffn-hidden-size", "130", "--num-attention-heads", "4"]
STEPS = ["--bf16", "--ternary", "--train-iters", "6", "--eval-interval", "4", "--eval-iters", "1"]
OVERLAPS = ["--overlap-grad-reduce", "--overlap-param-gather"]
EXPERTS = ["--num-experts", "4", "--moe-ffn-hidden-size", "64", "--expert-model-parallel-size", "2"]
STAGES = ["--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2"]
# Number of ranks and flags by name.
CASES = {
    "plain": (2, ODD),
    "groups": (2, ["--ternary-group-size", "32"]),
    # Multiples of half a level are rounded, and a piece of a group does not determine which values the group has.
    "half integers": (2, [*ODD, "--ternary-space", "half-integer-4", "--ternary-statistic", "absmean"]),
    "overlaps": (2, [*ODD, *OVERLAPS]),
    "stages": (4, [*STAGES, *OVERLAPS]),
    "experts": (4, [*EXPERTS, *OVERLAPS]),
}
SEVERAL_BUCKETS = ("overlaps", "experts")
WAYS = {
    "packed": ["--ternary-cache", "resident", "--ternary-param-gather", "packed"],
    "kept packed": ["--ternary-cache", "packed"],
    "resident": ["--ternary-cache", "resident"],
    "step": ["--ternary-cache", "step"],
}
# Ways by number of ranks: fewer for four ranks, which are slow.
WAYS_OF = {2: tuple(WAYS), 4: ("packed", "kept packed", "step")}


@pytest.fixture(scope="module")
def runs(launch_runs, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """Runs every case in every way; returns rank 0's reports, and the directory of logs and checkpoints."""
    where, report = tmp_path_factory.mktemp("gathers"), {}
    for ranks in (2, 4):
        wanted, sizes = {}, {}
        for case in (case for case, (count, _) in CASES.items() if count == ranks):
            for way in WAYS_OF[ranks]:
                name = f"{case} {way}"
                kept = ["--log-dir", str(where / f"log {name}"), "--save", str(where / name), "--save-interval", "3"]
                wanted[name] = [*MODEL, *STEPS, *CASES[case][1], *WAYS[way], *kept]
                if case in SEVERAL_BUCKETS:
                    sizes[name] = 50_000
        report |= launch_runs(wanted, ranks, bucket_size=sizes)[0]
    return report, where


@pytest.mark.parametrize(("case", "way"), [(c, w) for c in CASES for w in WAYS_OF[CASES[c][0]] if w != "step"])
def test_wherever_the_weights_are_the_run_is_the_same(case: str, way: str, runs: tuple[dict, Path]) -> None:
    report, where = runs
    succeeded(report, f"{case} {way}", f"{case} step")
    found, expected = (losses(where / f"log {case} {w}") for w in (way, "step"))
    assert len(expected) == 8 and found == expected
    for iteration in (3, 6):
        mine, other = (iteration_directory(where / f"{case} {w}", iteration) for w in (way, "step"))
        weights = sorted(path.name for path in other.glob("*.distcp"))
        assert weights and weights == sorted(path.name for path in mine.glob("*.distcp"))
        for name in [*weights, "common.pt", "ternary_quantizer.json"]:
            assert (mine / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize("case", CASES)
def test_packed_weights_did_travel(case: str, runs: tuple[dict, Path]) -> None:
    report, _ = runs
    messages = report[f"{case} packed"]["gathered"]
    # After each of six steps there is at least one message per bucket.
    assert len(messages) >= 6 * (1 + (case in SEVERAL_BUCKETS))
    assert (len(set(messages)) > 1) == (case in SEVERAL_BUCKETS)
    # Packed weights that stay packed have messages of their own, at least as many: scales and raw values are gathered
    # separately.
    assert len(report[f"{case} kept packed"]["gathered"]) >= len(messages)
    plain = [way for way in WAYS_OF[CASES[case][0]] if "packed" not in way]
    assert not any(report[f"{case} {way}"]["gathered"] for way in plain)

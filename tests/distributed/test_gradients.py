# SPDX-License-Identifier: Apache-2.0
"""Gradients of a ternary pair of column-parallel and row-parallel linears, compared with a plain PyTorch
straight-through reference, and planted bugs."""

import contextlib

import pytest
from support.launcher import Ranks

from bitcpm_megatron.quantization import SPACES
from bitcpm_megatron.quantization.spaces import STATISTICS

CASES = [
    f"{layout} fusion={fusion} sp={sp} overlap={overlap} do={do}"
    for layout in ("TP1", "TP2", "DP2")
    for fusion in (0, 1)
    for sp in ((0, 1) if layout == "TP2" else (0,))
    for overlap in (0, 1)
    for do in (0, 1)
]
# Bound relative to the largest element. There are some 20 operations, each a sum of at most 128 terms. Independent
# roundings add up like the root of their number, to 3e-6; in the two GEMMs of a gradient, terms also partly cancel.
EXACT = 1e-5


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    """The reports of all ranks by case.

    They run on ranks of their own, because the stand-in must exist before megatron-core is imported.
    """
    merged: dict[str, list] = {}
    for count in (1, 2):
        with contextlib.closing(Ranks(count, tmp_path_factory.mktemp("ranks"))) as ranks:
            reports = ranks.run("gradients", tmp_path_factory.mktemp(f"gradients{count}"))
        for report in reports:
            for name, result in report.items():
                merged.setdefault(name, []).append(result)
    return merged


@pytest.mark.parametrize("case", CASES)
@pytest.mark.verifies(
    "training",
    "weight gradients equal those of a straight-through reference (1e-5) at TP1, TP2 and DP2, in all combinations of"
    " gradient accumulation fusion, SP (at TP2), communication overlap and distributed optimizer",
    cpu="yes¹",
)
def test_weight_gradients_equal_the_straight_through_reference(case: str, results: dict[str, list]) -> None:
    for result in results[case]:
        assert result["error"] < EXACT
        assert result["moved"] > 1e-3, "weights that stand still cannot show a stale cache"
        assert result["versus_latent"] > 0.1, "a full-precision reference must be told apart"
        assert result["quantizations"] == [3, 3], "once per optimizer step"
        # Both weights are quantized together, or each when its bucket arrives.
        assert result["calls"] == (6 if case.endswith("overlap=1 do=1") else 3)


@pytest.mark.parametrize("layout", ["TP1", "TP2", "DP2"])
def test_without_cache_every_micro_batch_quantizes(layout: str, results: dict[str, list]) -> None:
    for result in results[f"{layout} no cache"]:
        assert result["error"] < EXACT
        assert result["quantizations"] == [9, 9] and result["calls"] == 18


@pytest.mark.parametrize("layout", ["TP1", "TP2", "DP2"])
def test_a_frozen_weight_is_quantized_like_any_other(layout: str, results: dict[str, list]) -> None:
    # The gradient of the first weight flows through the second, which is frozen.
    for result in results[f"{layout} frozen"]:
        assert result["error"] < EXACT
        assert result["versus_latent"] > 0.1


@pytest.mark.parametrize("layout", ["TP1", "TP2", "DP2"])
@pytest.mark.parametrize("case", ["overlap=1 do=1", "overlap=0 do=1", "overlap=0 do=0"])
def test_weights_that_live_in_the_parameters_change_no_bit(layout: str, case: str, results: dict[str, list]) -> None:
    for places in results[f"{layout} {case} places"]:
        step, resident = places["step"], places["resident"]
        assert step["held"] is None and resident["held"].startswith("cache: resident")
        assert resident["digest"] == step["digest"]
        assert (resident["cuts"] > 0) == (layout == "DP2" and case.endswith("do=1"))
        # These calls would turn quantized weights into latent ones, in part or as a whole.
        assert [words.partition(":")[0] for words in resident["refused"]] == [
            "the parameters hold quantized weights, and what is loaded would stand among them as one",
            "the optimizer's masters would be overwritten with quantized weights",
        ]
        assert step["refused"] == []


@pytest.mark.parametrize("layout", ["TP1", "TP2", "DP2"])
@pytest.mark.parametrize("case", [f"fusion={f} overlap={o} do={d}" for f in (0, 1) for o in (0, 1) for d in (0, 1)])
@pytest.mark.verifies(
    "training",
    "with `--ternary-estimator clipped`, gradients equal those of clamped weights (1e-5) at TP1, TP2 and DP2, "
    "wherever gradients are accumulated",
    cpu="yes¹",
)
def test_clipped_gradients_equal_those_of_clamped_weights(layout: str, case: str, results: dict[str, list]) -> None:
    for result in results[f"{layout} clipped {case}"]:
        assert result["error"] < EXACT
        assert result["versus_identity"] > 0.1, "the straight-through gradients must be told apart"
        assert all(0.1 < share < 0.9 for share in result["clipped"]), "of the weights, in both layers"


@pytest.mark.parametrize("layout", ["TP1", "TP2", "DP2"])
def test_gradients_on_a_ramp_are_those_of_the_blend(layout: str, results: dict[str, list]) -> None:
    for result in results[f"{layout} ramp"]:
        assert result["error"] < EXACT
        assert min(result["versus_identity"], result["beside"]) > 0.1, "the blend must be told apart"


@pytest.mark.parametrize("fusion", [0, 1])
@pytest.mark.parametrize("layout", ["TP1", "TP2", "DP2"])
def test_a_mask_in_the_straight_through_function_is_lost_under_fusion(
    layout: str, fusion: int, results: dict[str, list]
) -> None:
    """Plants a bug: the same mask in the backward of the function between the latent weight and its stand-in."""
    for result in results[f"{layout} fusion={fusion} planted mask in the function"]:
        assert (result["error"] < EXACT) == (not fusion)
        assert (result["versus_identity"] < EXACT) == bool(fusion)


@pytest.mark.parametrize("layout", ["TP1", "TP2", "DP2"])
def test_the_estimator_identity_changes_no_bit(layout: str, results: dict[str, list]) -> None:
    with_it, without = (results[f"{layout} {name}"] for name in ("identity", "no estimator"))
    assert [r["gradients"] for r in with_it] == [r["gradients"] for r in without]
    clipped = results[f"{layout} clipped fusion=1 overlap=1 do=1"]
    assert {r["gradients"] for r in with_it}.isdisjoint(r["gradients"] for r in clipped)


@pytest.mark.parametrize("layout", ["TP1", "TP2", "DP2"])
def test_clipped_steps_are_the_same_wherever_quantized_weights_are(layout: str, results: dict[str, list]) -> None:
    others = results[f"{layout} overlap=1 do=1 places"]
    for places, straight in zip(results[f"{layout} clipped places"], others, strict=True):
        assert places["step"]["digest"] == places["resident"]["digest"] == places["packed"]["digest"]
        assert (places["resident"]["cuts"] > 0) == (layout == "DP2")
        assert places["packed"]["held"].startswith("cache: packed")
        assert places["step"]["digest"] != straight["step"]["digest"]


@pytest.mark.parametrize("group", [-1, 32])
@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("space", SPACES)
def test_a_space_is_the_same_at_every_tensor_parallel_size(
    space: str, statistic: str, group: int, results: dict[str, list]
) -> None:
    found = {layout: results[f"{layout} {space} {statistic} {group}"] for layout in ("TP1", "TP2")}
    assert [len(found[layout]) for layout in found] == [1, 2]
    runs = [run for ranks in found.values() for of_rank in ranks for run in of_rank]
    assert len({run["quantized"] for run in runs}) == 1
    for run in runs:
        assert run["slices"] and run["levels"] == 2 * [len(SPACES[space].levels)]
        assert run["forward"] < EXACT and run["error"] < EXACT
        assert run["versus_latent"] > 0.1, "a full-precision reference must be told apart"


def test_spaces_statistics_and_groups_are_told_apart(results: dict[str, list]) -> None:
    names = [name for name in results if name.split()[1] in SPACES]
    assert len(names) == 2 * len(SPACES) * len(STATISTICS) * 2
    assert len({results[name][0][0]["quantized"] for name in names}) == len(names) / 2, "TP1 and TP2 alone are alike"
    # Without shards a group is a whole row at TP1, and half a row at TP2.
    whole, halves = (results[f"{layout} planted whole rows"][0][0] for layout in ("TP1", "TP2"))
    assert not whole["slices"] and halves["slices"] and whole["error"] > EXACT


@pytest.mark.parametrize("fusion", [0, 1])
@pytest.mark.parametrize("layout", ["TP1 sp=0", "TP2 sp=0", "TP2 sp=1"])
def test_int8_gemms_are_exact_and_their_gradients_those_of_bf16_gemms(
    layout: str, fusion: int, results: dict[str, list]
) -> None:
    name, sp = layout.split()
    for result in results[f"{name} int8 gemm fusion={fusion} {sp}"]:
        assert result["different"] == [] and result["fused"] == bool(fusion)
        # The reference is float64 with the quantized inputs. Only main_grad is fp32: without fusion a gradient is
        # rounded to bf16.
        assert result["error"] < (EXACT if fusion else 2**-8)


@pytest.mark.parametrize("layout", ["TP1", "TP2", "DP2"])
def test_int8_inputs_are_rounded_per_row_parallel_shard(layout: str, results: dict[str, list]) -> None:
    assert results[f"{layout} int8"] == ["equal"] * len(results[f"{layout} int8"])


@pytest.mark.parametrize("layout", ["TP1", "TP2", "DP2"])
def test_the_probe_proves_both_layers(layout: str, results: dict[str, list]) -> None:
    assert results[f"{layout} probe"] == ["proved 2"] * len(results[f"{layout} probe"])


@pytest.mark.parametrize("layout", ["TP1", "TP2", "DP2"])
@pytest.mark.parametrize(
    ("bug", "seen_by"),
    [
        ("stale cache", "gradients"),
        ("unquantized forward", "both"),
        ("residual form", "probe"),
        ("gradient to the wrong tensor", "gradients"),
        ("flag not carried back", "gradients"),
    ],
)
def test_planted_bugs_are_caught(layout: str, bug: str, seen_by: str, results: dict[str, list]) -> None:
    for result in results[f"{layout} planted {bug}"]:
        assert (not result["error"] < EXACT) == (seen_by in ("gradients", "both"))
        assert result["probe"].startswith("ProbeError") == (seen_by in ("probe", "both"))


def test_a_bucket_that_has_not_arrived_must_not_be_quantized(results: dict[str, list]) -> None:
    """Plants a bug: with overlapped gathering, all weights of the chunk are quantized at its first layer."""
    for result in results["DP2 planted early bucket"]:
        assert result["calls"] == 3 and not result["error"] < EXACT
    # Without gathering, the bug does no harm.
    assert all(result["error"] < EXACT for result in results["TP2 planted early bucket"])

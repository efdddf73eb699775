# SPDX-License-Identifier: Apache-2.0
"""Distillation losses over two tensor-parallel ranks: values, gradients and traffic, and two planted mistakes."""

from collections.abc import Callable

import pytest
from support.launcher import Ranks

CASES = [
    f"{form} {where} T={temperature}{chunks}"
    for form in ("forward", "reverse", "top-k", "sampled")
    for where in ("padded", "full", "one rank")
    for temperature in (1, 2)
    for chunks in ("", " in chunks")
]
# Against float64, relative to the largest element. fp32 has 2^-24 per rounding.
EXACT = 1e-5
TOKENS = 12
# fp32 numbers that are reduced per token: two maxima and three sums; one and ten with nine ids; one and two.
NUMBERS = {"forward": 5, "reverse": 5, "top-k": 11, "sampled": 3}


@pytest.fixture(scope="module")
def results(shared_ranks: Callable[[int], Ranks], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """Case -> what each of two ranks reports."""
    reports = shared_ranks(2).run("distillation", tmp_path_factory.mktemp("distillation"))
    return {name: [report[name] for report in reports] for name in reports[0]}


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_one_rank(case: str, results: dict[str, list[dict]]) -> None:
    for result in results[case]:
        assert result["loss"] < EXACT and result["gradient"] < EXACT
        assert result["reductions"] == (6 if case.endswith("in chunks") else 2), "two for each chunk of tokens"
        assert result["collectives"] == {"allreduce_": 4 * TOKENS * NUMBERS[case.split()[0]]}, "nothing is gathered"


@pytest.mark.parametrize("alpha", ["0", "0.25", "1"])
def test_the_mix_is_that_of_one_rank(alpha: str, results: dict[str, list[dict]]) -> None:
    for result in results[f"alpha={alpha}"]:
        assert result["loss"] < EXACT and result["gradient"] < EXACT
        # Three are megatron-core's, of the cross entropy.
        assert result["reductions"] == (3 if alpha == "0" else 5) and set(result["collectives"]) == {"allreduce_"}


@pytest.mark.parametrize("mutant", ["plain_all_reduce", "all_gather_of_logits"])
def test_right_losses_with_wrong_gradients_are_told_apart(mutant: str, results: dict[str, list[dict]]) -> None:
    for result in results[mutant]:
        assert result["loss"] < EXACT
        assert result["gradient"] > 0.3

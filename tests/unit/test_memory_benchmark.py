# SPDX-License-Identifier: Apache-2.0
"""Tests of memory by storage of quantized weights: the formula, and its comparison with two training ranks."""

from pathlib import Path

import memory
import pytest
from steps.layouts import Layout

CHECKOUT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.verifies(
    "trust",
    "the memory formula of the preflight check is within 2 % of what two training ranks need, wherever quantized "
    "weights are stored",
)
def test_the_formula_is_what_two_ranks_need() -> None:
    """Every mode is within 2 % of the formula, and resident weights within 1 %, plus their scales, of BF16."""
    peaks = {peak.mode: peak for peak in memory.measured(memory.measured_job(Layout.parse("DP2+DO")))}
    assert list(peaks) == ["bf16", "none", "step", "resident", "packed"]
    assert [peak.mistake() for peak in peaks.values()] == [None] * len(peaks)
    # The comparison would detect a copy of the quantized weights, which is larger than the tolerance.
    assert peaks["step"].measured > 1.08 * peaks["bf16"].measured


def test_a_peak_that_is_off_is_told() -> None:
    right = {"layout": "TP1", "mode": "step", "measured": 1000, "expected": 1000.0, "baseline": 900, "scales": 5.0}
    assert memory.Peak(**right).mistake() is None
    assert "+3.0% off" in memory.Peak(**right | {"measured": 1030}).mistake()
    assert "-3.0% off" in memory.Peak(**right | {"measured": 970}).mistake()
    resident = right | {"mode": "resident", "baseline": 990}
    assert memory.Peak(**resident).mistake() is None
    assert "resident: 1.5% more than BF16" in memory.Peak(**resident | {"baseline": 980}).mistake()


def test_eight_billion_parameters_by_formula() -> None:
    """A parameter takes 2 bytes, its gradient 4, its optimizer state 12 / DP, and a cached quantized weight 2."""
    for dp in (8, 64):
        need = {mode: memory.needed("minicpm4-8b", 4096, 1, dp, mode) for mode in (*memory.MODES, memory.PACKED)}
        bf16 = need["bf16"]
        parameters = bf16.weights / 2
        assert (bf16.gradients, bf16.optimizer, bf16.quantized) == (4 * parameters, 12 * parameters / dp, 0)
        assert need["step"].quantized == pytest.approx(2 * 7_580_000_000, rel=0.01)
        assert need["resident"].total <= 1.001 * bf16.total
        state = {mode: memory.state_of(found) for mode, found in need.items()}
        assert 1.6 < (state["bf16"] - state["packed"]) / 7_580_000_000 < 1.75
        assert need["resident"].total < need["none"].total < need["step"].total


def test_the_documented_table_is_what_the_command_prints(capsys: pytest.CaptureFixture) -> None:
    assert memory.main([]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() in (CHECKOUT / "docs" / "memory.md").read_text()
    assert memory.main(["--model", "minicpm4-0.5b", "--tp", "3"]) == 2
    assert "TP 3 does not divide" in capsys.readouterr().err

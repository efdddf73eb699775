# SPDX-License-Identifier: Apache-2.0
"""Tests that telemetry counts exactly what happened to the codes."""

from types import SimpleNamespace

import pytest
import torch

from bitcpm_megatron import QuantizerConfig, apply_recipe
from bitcpm_megatron.parallel import Recipe, Telemetry, find_epoch, ternary_state
from bitcpm_megatron.training.report import RunReport
from bitcpm_megatron.training.run import Step

pytestmark = pytest.mark.usefixtures("single_rank")
DEFAULT = QuantizerConfig(group_size=32)


def model() -> torch.nn.Module:
    chunk = torch.nn.Sequential(torch.nn.Linear(64, 300, bias=False), torch.nn.Linear(300, 8, bias=False))
    recipe = {"configs": {"q": {}}, "matchers": {"first": {"config": "q", "pattern": "0"}}}
    apply_recipe(chunk, Recipe.from_mapping(recipe, DEFAULT), default=DEFAULT)
    with torch.no_grad():
        # A group of 32 has 8 zeros and 24 values of magnitude 1, so that the scale is 0.75.
        pattern = torch.tensor([0.0] * 8 + [1.0, -1.0] * 12).repeat(2)
        chunk[0].weight.copy_(pattern.expand(300, 64))
    return chunk


@pytest.mark.parametrize("cached", [True, False])
def test_zeros_changed_codes_and_scales(cached: bool) -> None:
    chunk = model()
    telemetry = Telemetry([chunk])

    def record() -> dict:
        find_epoch(chunk).start()
        find_epoch(chunk).begin()
        if cached:
            chunk(torch.randn(2, 64))
        else:
            ternary_state(chunk[0]).quantized = None
        return telemetry.record()

    first = record()
    assert sorted(first) == ["0", "total"]
    expected = {"zeros": 0.25, "changed": None, "scale_mean": 0.75, "scale_min": 0.75, "scale_max": 0.75}
    assert first["0"] == first["total"] == expected
    assert record()["0"]["changed"] == 0
    with torch.no_grad():
        chunk[0].weight[:3, 9].neg_()
        chunk[0].weight[299, 33] = 1.0
    third = record()["0"]
    assert third["changed"] == 4 / (300 * 64)
    assert third["zeros"] == 0.25 - 1 / (300 * 64)
    assert third["scale_max"] == pytest.approx(25 / 32, rel=2**-8)
    assert record()["0"]["changed"] == 0, "compared with the last record, not with the first"


def test_every_level_is_counted() -> None:
    config = QuantizerConfig("half-integer-4", statistic="absmean")
    chunk = torch.nn.Sequential(torch.nn.Linear(64, 300, bias=False))
    recipe = {"configs": {"q": {}}, "matchers": {"first": {"config": "q", "pattern": "0"}}}
    apply_recipe(chunk, Recipe.from_mapping(recipe, config), default=config)
    with torch.no_grad():
        # The mean is 1.5. Of 64 values, 16 and 8 are beyond it, and 8 are equal to it, a tie that goes to the lower
        # level.
        row = torch.tensor([1.0] * 16 + [-1.0] * 16 + [1.5] * 8 + [2.0] * 16 + [-2.5] * 8)
        chunk[0].weight.copy_(row.expand(300, 64))
    telemetry = Telemetry([chunk])
    found = telemetry.record()["0"]
    assert found["scale_mean"] == 1.5 and found["zeros"] == 0.0
    assert found["levels"] == {"half-integer-4": {"-1.5": 0.125, "-0.5": 0.25, "0.5": 0.375, "1.5": 0.25}}
    with torch.no_grad():
        chunk[0].weight[0, 0] = 10.0
    found = telemetry.record()
    assert found["total"]["changed"] > 0 and sum(found["total"]["levels"]["half-integer-4"].values()) == 1


def test_a_level_that_is_hardly_used_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    args = SimpleNamespace(log_dir=None, train_iters=5, global_batch_size=1, seq_length=1, log_interval=10)
    run = SimpleNamespace(args=args, iteration=1, consumed_samples=1)
    levels = {
        "asymmetric-4": {"-2": 0.001, "-1": 0.01, "0": 0.689, "1": 0.3},
        "five-value": {"-2": 0.1, "-1": 0.2, "0": 0.4, "1": 0.2, "2": 0.1},
    }
    report = RunReport(run)
    report.step(Step(1, 1.0, None, 1e-3, 1.0, {"total": {"zeros": 0.689, "levels": levels}}, run))
    report.close()
    said = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(said) == 1 and "level -2 is used by 0.1 % of the asymmetric-4 weights" in said[0]
    assert "--ternary-scale-multiplier" in said[0]

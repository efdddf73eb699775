# SPDX-License-Identifier: Apache-2.0
"""Telemetry counts exactly what happened to the codes."""

import pytest
import torch

from bitcpm_megatron import QuantizerConfig, apply_recipe
from bitcpm_megatron.parallel import Recipe, Telemetry, find_epoch, ternary_state

pytestmark = pytest.mark.usefixtures("single_rank")
DEFAULT = QuantizerConfig(group_size=32)


def model() -> torch.nn.Module:
    chunk = torch.nn.Sequential(torch.nn.Linear(64, 300, bias=False), torch.nn.Linear(300, 8, bias=False))
    recipe = {"configs": {"q": {}}, "matchers": {"first": {"config": "q", "pattern": "0"}}}
    apply_recipe(chunk, Recipe.from_mapping(recipe, DEFAULT), default=DEFAULT)
    with torch.no_grad():
        # Per group of 32: 8 zeros, 24 of magnitude 1, so that the scale is 0.75.
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

# SPDX-License-Identifier: Apache-2.0
"""Tests that a checkpoint never contains a weight that is not finite."""

import math
from types import SimpleNamespace

import pytest
import torch

from bitcpm_megatron.training import loop


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(single_rank: None, value: float) -> None:
    model = SimpleNamespace(bare=[torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)])
    loop._refuse_broken_weights(model)
    with torch.no_grad():
        model.bare[1].weight[3, 2] = value
    with pytest.raises(loop.TrainingError, match="will not be saved"):
        loop._refuse_broken_weights(model)

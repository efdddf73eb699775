# SPDX-License-Identifier: Apache-2.0
"""Tests of gradient estimators: their results bit for bit, and the cases in which there is nothing to clip."""

import types
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitcpm_megatron import QuantizerConfig, apply_recipe, quantize
from bitcpm_megatron.nn.cache import CacheEpoch
from bitcpm_megatron.nn.linear import TernaryState
from bitcpm_megatron.nn.settings import Estimator
from bitcpm_megatron.parallel import Recipe, estimators, ternary_state
from bitcpm_megatron.parallel.estimators import ESTIMATORS, EstimatorError, clipped, shape_gradients
from bitcpm_megatron.quantization.spaces import SPACES, TERNARY
from bitcpm_megatron.training.flags import build_parser

DEFAULT = QuantizerConfig(group_size=32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_bounds_are_exact_and_keep_their_gradient(dtype: torch.dtype) -> None:
    # These are all significands of a bf16 scale; 1.5 times one of them may have one bit more than bf16 has.
    s = (torch.arange(128, 256) / 128).to(torch.bfloat16)
    bound = (s.float() * 1.5).to(dtype)
    assert bool((bound.float() == s.float() * 1.5).all()) == (dtype == torch.float32)
    for w in (bound, -bound):
        expected = w.double().abs() <= s.double() * 1.5
        assert torch.equal(clipped(w.float(), s.float(), TERNARY), expected)
        outside = torch.nextafter(w, w * 2)
        assert torch.equal(clipped(outside.float(), s.float(), TERNARY), outside.double().abs() <= s.double() * 1.5)
        assert dtype != torch.float32 or (bool(expected.all()) and not clipped(outside, s.float(), TERNARY).any())


def test_the_mask_is_that_of_torchs_fake_quantization() -> None:
    w = torch.randn(64, 4096, generator=torch.Generator().manual_seed(3))
    # Scales are powers of two, because torch multiplies by the reciprocal.
    s = torch.exp2(torch.arange(-16.0, 16.0).repeat(2) / 8).log2().round().exp2()
    leaf = w.clone().requires_grad_()
    torch.fake_quantize_per_channel_affine(leaf, s, torch.zeros(64, dtype=torch.int32), 0, -1, 1).sum().backward()
    mask = clipped(w.flatten(), s.repeat_interleave(4096), TERNARY).reshape(w.shape)
    # torch rounds half to even, so that it maps a bound to the next level outside.
    inside = w.abs() != s.unsqueeze(1) * 1.5
    assert torch.equal(mask[inside], leaf.grad.bool()[inside])
    assert 0.05 < float(mask.float().mean()) < 0.95


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    columns=st.sampled_from([32, 96, 160]),
    group=st.sampled_from([-1, 32]),
    cut=st.tuples(st.integers(0, 800), st.integers(0, 800)),
    block=st.integers(1, 300),
    dtypes=st.sampled_from([(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16,) * 2]),
)
def test_a_shard_is_multiplied_by_its_slice_of_the_factors(rows, columns, group, cut, block, dtypes) -> None:
    generator = torch.Generator().manual_seed(rows * columns)
    master = torch.randn(rows, columns, generator=generator)
    weight = torch.nn.Parameter(master.to(dtypes[0]))
    start, end = sorted(min(edge, weight.numel()) for edge in cut)
    before = torch.randn(rows, columns, generator=generator).to(dtypes[1])
    weight.main_grad = before.clone()
    state = TernaryState("layer", QuantizerConfig(group_size=group), CacheEpoch())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimators, "_BLOCK_ELEMENTS", block)
        estimators._shape(state, weight, master.flatten()[start:end], start, clipped)
    scales = quantize(weight, state.config)[1].double()
    reach = (1.5 * scales).repeat_interleave(columns // scales.shape[1], 1)
    mask = (weight.detach().double().abs() <= reach).flatten()
    mask[:start] = mask[end:] = True
    assert torch.equal(weight.main_grad.flatten(), before.flatten() * mask)


def test_what_is_not_finite_does_not_vanish_with_the_gradient_of_a_clipped_weight() -> None:
    weight = torch.nn.Parameter(torch.ones(1, 32))
    with torch.no_grad():
        weight[0, 0] = 100.0
    weight.main_grad = torch.full((1, 32), torch.nan)
    estimators._shape(TernaryState("layer", DEFAULT, CacheEpoch()), weight, weight.detach().flatten(), 0, clipped)
    assert weight.main_grad.isnan().all()


def test_the_flag_knows_the_estimators_that_there_are() -> None:
    (flag,) = (a for a in build_parser()._actions if a.dest == "ternary_estimator")
    assert tuple(flag.choices) == get_args(Estimator) == ("identity", *ESTIMATORS) and flag.default == "identity"


class Optimizer:
    """An optimizer whose ``step`` uses the gradient in ``main_grad``, like megatron-core's."""

    def __init__(self, weight: torch.nn.Parameter) -> None:
        self.weight = weight
        self.seen: list[torch.Tensor] = []

    def prepare_grads(self) -> bool:
        return False

    def step(self) -> str:
        self.seen.append(self.weight.main_grad.clone())
        return "stepped"


Optimizer.prepare_grads.__module__ = "megatron.core.optimizer.optimizer"


@pytest.fixture
def chunk(single_rank: None) -> torch.nn.Module:
    made = torch.nn.Sequential(torch.nn.Linear(64, 8, bias=False), torch.nn.Linear(8, 8, bias=False))
    recipe = {"configs": {"q": {}}, "matchers": {"first": {"config": "q", "pattern": "0"}}}
    apply_recipe(made, Recipe.from_mapping(recipe, DEFAULT), default=DEFAULT)
    for layer in made:
        layer.weight.main_grad = torch.randn(layer.weight.shape)
    return made


@pytest.mark.parametrize("cache", ["step", "none"])
def test_a_step_takes_the_shaped_gradient_of_quantized_weights_alone(chunk: torch.nn.Module, cache: str) -> None:
    ternary_state(chunk[0]).cache = cache
    optimizer, weight = Optimizer(chunk[0].weight), chunk[0].weight
    before = [layer.weight.main_grad.clone() for layer in chunk]
    assert shape_gradients([chunk], optimizer, "clipped").startswith("estimator: clipped")
    assert optimizer.step() == "stepped"
    reach = quantize(weight, DEFAULT)[1].double().repeat_interleave(32, 1) * 1.5
    assert torch.equal(optimizer.seen[0], before[0] * (weight.detach().double().abs() <= reach))
    assert not torch.equal(optimizer.seen[0], before[0])
    assert torch.equal(chunk[1].weight.main_grad, before[1]), "a layer in full precision"


def test_identity_leaves_the_optimizer_alone(chunk: torch.nn.Module) -> None:
    optimizer = Optimizer(chunk[0].weight)
    assert shape_gradients([chunk], optimizer, "identity") is None
    assert "step" not in vars(optimizer)


@pytest.mark.parametrize("space", [name for name in SPACES if name != "ternary"])
def test_levels_that_reach_every_weight_leave_nothing_to_clip(chunk: torch.nn.Module, space: str) -> None:
    """With the report's scales of the other spaces, which are made from the maximum, levels reach every weight."""
    state, weight = ternary_state(chunk[0]), chunk[0].weight
    state.config = QuantizerConfig(space, group_size=32)
    with pytest.raises(
        EstimatorError, match=f"0: the levels of {space} reach all weights.*--ternary-statistic absmean"
    ):
        shape_gradients([chunk], Optimizer(weight), "clipped")
    for others in ({"statistic": "absmean", "scale_multiplier": 0.5}, {"statistic": "absmax", "scale_multiplier": 0.2}):
        state.config = QuantizerConfig(space, group_size=32, **others)
        optimizer = Optimizer(weight)
        shape_gradients([chunk], optimizer, "clipped")
        weight.main_grad.fill_(1.0)
        optimizer.step()
        assert 0 < int((optimizer.seen[-1] == 0).sum()) < weight.numel()


def test_what_cannot_be_shaped_is_refused(chunk: torch.nn.Module) -> None:
    optimizer = Optimizer(chunk[0].weight)
    with pytest.raises(EstimatorError, match="'soft' is unknown: use identity or one of clipped"):
        shape_gradients([chunk], optimizer, "soft")
    chained = types.SimpleNamespace(chained_optimizers=[optimizer, torch.optim.SGD(chunk.parameters())])
    with pytest.raises(
        EstimatorError, match="SGD takes gradients in a way of its own.*use --ternary-estimator identity"
    ):
        shape_gradients([chunk], chained, "clipped")
    del chunk[0].weight.main_grad
    with pytest.raises(EstimatorError, match="0: its gradient is in no buffer .*use --ternary-estimator identity"):
        shape_gradients([chunk], optimizer, "clipped")
    assert "step" not in vars(optimizer)

# SPDX-License-Identifier: Apache-2.0
"""Tests of all spaces, against closed forms in double precision, and on every backend that runs here."""

import argparse
import math

import numpy as np
import pytest
import torch
from support.grouped import same_bits

from bitcpm_megatron import QuantizerConfig, dequantize, fake_quantize, quantize
from bitcpm_megatron.ops import backends, registry
from bitcpm_megatron.ops.registry import Backend
from bitcpm_megatron.quantization import (
    SPACES,
    WEIGHT_DTYPES,
    fused_group_size,
    fused_space,
    pack,
    packed_size,
    quantize_dequantize,
    scales_of,
    unpack,
)
from bitcpm_megatron.quantization.recipe import Recipe
from bitcpm_megatron.ternary_flags import add_ternary_arguments, ternary_mistakes, ternary_settings

ROWS, COLUMNS = 40, 192
OTHERS = [name for name in SPACES if name != "ternary"]
CPU = next(backend for backend in backends() if backend.name == "cpu")
SERVING = ["torch", pytest.param("cpu", marks=pytest.mark.skipif(CPU.unavailable("cpu") is not None, reason="no cc"))]
# The level of the quotient w / s in double precision, by space, computed without thresholds.
CLOSED_FORMS = {
    "ternary": lambda q: np.clip(np.rint(q), -1, 1),
    "asymmetric-4": lambda q: np.clip(np.rint(q), -2, 1),
    "half-integer-4": lambda q: np.clip(np.rint(q - 0.5) + 0.5, -1.5, 1.5),
    "integer-4": lambda q: np.where(q < 0, -1, 1) * np.clip(np.rint(np.abs(q)), 1, 2),
    "five-value": lambda q: np.clip(np.rint(q), -2, 2),
}
SCALES = {"own": (None, None), "mean": ("absmean", 1.25), "maximum": ("absmax", 0.4)}


def latent(dtype: torch.dtype, seed: int, smallest: float = -5.0) -> torch.Tensor:
    """Returns rows of very different magnitude, with zeros of both signs, an all-zero group, and values around eps."""
    generator = torch.Generator().manual_seed(seed)
    magnitudes = 10 ** torch.empty(ROWS, 1).uniform_(smallest, 3.0, generator=generator)
    w = torch.randn(ROWS, COLUMNS, generator=generator) * magnitudes
    w[:, ::13] *= 0.0
    w[3] = 0.0
    w[4, :32] = 0.0
    w[5] = torch.randn(COLUMNS, generator=generator) * 1e-5
    return w.to(dtype)


def at_thresholds(space: str, scales: torch.Tensor, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Returns weights at thresholds of their groups, or one step of the dtype next to them; next to zero, +-2**-20."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.tensor(SPACES[space].thresholds)
    picked = table[torch.randint(len(table), (ROWS, COLUMNS), generator=generator)]
    w = (picked.view(ROWS, scales.shape[1], -1) * scales.float()[..., None]).view(ROWS, COLUMNS).to(dtype)
    bits = w.view(torch.int32 if dtype == torch.float32 else torch.int16)
    steps = torch.randint(-1, 2, w.shape, generator=generator).to(bits.dtype)
    return torch.where(w == 0, steps.to(dtype) * 2.0**-20, (bits + steps).view(dtype))


def given_scales(groups: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(ROWS, groups, generator=generator).abs() + 0.01).to(torch.bfloat16)


@pytest.mark.parametrize("group", [-1, 32, 64])
@pytest.mark.parametrize("space", SPACES)
def test_codes_and_values_are_those_of_the_closed_form(space: str, group: int) -> None:
    table, config = SPACES[space], QuantizerConfig(space, group)
    for dtype in WEIGHT_DTYPES:
        groups = 1 if group == -1 else COLUMNS // group
        given = given_scales(groups, 1)
        for weight, scales in ((latent(dtype, 0), None), (at_thresholds(space, given, dtype, 2), given)):
            codes, used = quantize(weight, config, scales)
            s = used.double().numpy().repeat(COLUMNS // groups, 1)
            levels = CLOSED_FORMS[space](weight.double().numpy() / s)
            found = np.array(table.levels)[codes.numpy() - table.lowest_code]
            assert np.array_equal(found, levels)
            product = torch.from_numpy(levels * s).to(dtype) + 0.0
            assert same_bits(dequantize(codes, used, config, dtype), product)
        assert set(np.unique(levels)) == set(table.levels), "the weights at thresholds take every level"


@pytest.mark.parametrize("name", SERVING)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.verifies(
    "quantizer",
    "in all five [spaces](spaces.md), with both scale statistics and with scale multipliers, the PyTorch and C "
    "backends equal the reference bit for bit; all backends share one table of levels",
)
def test_backends_are_the_reference(space: str, scale: str, name: str) -> None:
    backend = next(b for b in backends() if b.name == name)
    for group in (-1, 32, 64):
        config = QuantizerConfig(space, group, 1e-5, *SCALES[scale])
        for dtype in WEIGHT_DTYPES:
            weight = latent(dtype, 3)
            weight[6, 7], weight[7, 100], weight[8, 0] = math.nan, math.inf, -math.inf
            codes, scales = quantize(weight, config)
            expected = dequantize(codes, scales, config, dtype)
            values, own = backend.kernel(weight, config, None)
            assert same_bits(own.float(), scales.float()) and same_bits(values, expected)
            together, made = weight.clone(), torch.empty_like(scales)
            backend.together([together], [together], [made], [group], config)
            assert same_bits(together, expected) and same_bits(made.float(), scales.float())

            given = given_scales(scales.shape[1], 4)
            weight = at_thresholds(space, given, dtype, 5)
            expected = dequantize(*quantize(weight, config, given), config, dtype)
            values, copied = backend.kernel(weight, config, given)
            assert same_bits(values, expected) and torch.equal(copied, given)


@pytest.mark.skipif(CPU.unavailable("cpu") is not None, reason="no cc")
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("scale", [math.nan, math.inf, 3e38, 2.0**-126, 2.0**-133, 0.0])
def test_scales_that_training_never_makes(space: str, scale: float) -> None:
    config = QuantizerConfig(space)
    for dtype in WEIGHT_DTYPES:
        weight = latent(dtype, 6)
        weight[0, :4] = torch.tensor([math.nan, math.inf, -math.inf, torch.finfo(dtype).max])
        given = torch.full((ROWS, 1), scale, dtype=torch.bfloat16)
        expected, _ = quantize_dequantize(weight, config, given)
        assert same_bits(CPU.kernel(weight, config, given)[0], expected)
        assert expected[0, 0].isnan() and (math.isfinite(scale) or expected.isnan().all())


@pytest.mark.parametrize("statistic", ["absmean", "absmax"])
def test_the_multiplier_comes_before_the_rounding_of_the_scale(statistic: str) -> None:
    weight = latent(torch.float32, 7)
    weight[4, :32] = 1.0  # no group is below eps
    weight[3], weight[5] = 1.0, 2.0
    plain = QuantizerConfig("five-value", 32, 2.0**-100, statistic, 1.0)
    found = torch.from_numpy(weight.numpy().reshape(ROWS, -1, 32)).abs()
    exact = found.amax(-1) if statistic == "absmax" else None
    for multiplier in (0.5, 1 / 1.5, 1.55):
        config = QuantizerConfig("five-value", 32, 2.0**-100, statistic, multiplier)
        scales = quantize(weight, config)[1]
        if exact is not None:
            assert torch.equal(scales, torch.from_numpy(exact.numpy() * np.float32(multiplier)).to(torch.bfloat16))
        if multiplier == 0.5:
            assert torch.equal(scales, quantize(weight, plain)[1] / 2)
        else:
            # The mean has an error of half an fp32 ulp in each of 5 additions, the quotient and the product.
            mean = found.double().mean(-1) if exact is None else exact.double()
            assert ((scales.double() / (mean * multiplier) - 1).abs() <= 2**-8 + 8 * 2.0**-24).all()


def test_what_a_configuration_leaves_out_is_the_spaces_own() -> None:
    own = {name: (config.statistic, config.scale_multiplier) for name in SPACES if (config := QuantizerConfig(name))}
    assert own == {
        "ternary": ("absmean", 1.0),
        "asymmetric-4": ("absmax", 1 / 1.5),
        "half-integer-4": ("absmax", 1 / 1.5),
        "integer-4": ("absmax", 0.5),
        "five-value": ("absmax", 0.5),
    }
    assert QuantizerConfig("five-value", statistic="absmean").scale_multiplier == 1.0
    assert QuantizerConfig(statistic="absmax").scale_multiplier == 1.0
    assert QuantizerConfig("five-value", scale_multiplier=0.7).statistic == "absmax"


def test_a_recipe_mixes_spaces() -> None:
    default = QuantizerConfig("ternary", 64, statistic="absmean", scale_multiplier=1.5)
    configs = {"five": {"space": "five-value"}, "max": {"statistic": "absmax"}, "half": {"scale_multiplier": 0.5}}
    matchers = {name: {"config": name, "pattern": f"*{name}"} for name in configs}
    recipe = Recipe.from_mapping({"configs": configs, "matchers": matchers}, default)
    found = {name: recipe.decide(f"layer.{name}").config for name in configs}
    assert found["five"] == QuantizerConfig("five-value", 64)
    assert found["max"] == QuantizerConfig("ternary", 64, statistic="absmax", scale_multiplier=1.0)
    assert found["half"] == QuantizerConfig("ternary", 64, statistic="absmean", scale_multiplier=0.5)


@pytest.mark.parametrize("space", SPACES)
def test_zeros(space: str) -> None:
    """A zero has code 0, which is level zero or else the smallest positive level; the scale of zeros is eps."""
    config = QuantizerConfig(space)
    weight = torch.zeros(2, 64)
    weight[1, 0], weight[1, 1] = 1.0, -0.0
    codes, scales = quantize(weight, config)
    level = {"half-integer-4": 0.5, "integer-4": 1.0}.get(space, 0.0)
    assert not codes[0].any() and not codes[1, 1:].any()
    assert scales[0, 0] == torch.tensor(1e-5).to(torch.bfloat16)
    values = fake_quantize(weight, config)
    assert torch.equal(values[:, 1:], (level * scales.float()).expand(2, 63)) and not torch.signbit(values[:, 1:]).any()


@pytest.mark.parametrize("space", OTHERS)
def test_shards_are_slices_of_the_whole(space: str) -> None:
    weight, config = latent(torch.bfloat16, 8), QuantizerConfig(space)
    whole, scales = quantize_dequantize(weight, config)
    for rows in (slice(0, 20), slice(20, 40)):  # column-parallel
        assert same_bits(quantize_dequantize(weight[rows], config)[0], whole[rows])
    halves, scales = quantize_dequantize(weight, QuantizerConfig(space, COLUMNS // 2))
    for i, columns in enumerate((slice(0, 96), slice(96, 192))):  # row-parallel, group size -1 in two shards
        part, own = quantize_dequantize(weight[:, columns].contiguous(), config)
        assert same_bits(part, halves[:, columns]) and same_bits(own[:, 0], scales[:, i])


@pytest.mark.parametrize("space", SPACES)
def test_the_gradient_is_the_identity(space: str) -> None:
    weight = latent(torch.float32, 9).requires_grad_()
    gradient = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(10))
    fake_quantize(weight, QuantizerConfig(space, 32)).backward(gradient)
    assert torch.equal(weight.grad, gradient)


def paretoq(w: np.ndarray, alpha: np.ndarray, bits: int) -> np.ndarray:
    """Computes ParetoQ's stretched elastic quantizer (arXiv:2502.02631, equation 4); 0 bits stands for 1.58 bits."""
    levels, shift = (1.5, 0.0) if bits == 0 else (2.0 ** (bits - 1), 0.5)
    clip = 1 - 1e-2
    return (np.rint(np.clip(w / alpha, -clip, clip) * levels - shift) + shift) / levels * alpha


@pytest.mark.parametrize(("space", "bits", "alpha"), [("ternary", 0, 1.5), ("half-integer-4", 2, 2.0)])
def test_paretoq_is_a_table_and_a_scale(space: str, bits: int, alpha: float) -> None:
    """ParetoQ's 1.58 bits are ternary with s = 2 alpha / 3, and its 2 bits half-integer-4 with s = alpha / 2."""
    generator = torch.Generator().manual_seed(11)
    scales = (torch.rand(1000, 1, generator=generator) + 0.5).to(torch.bfloat16)
    weight = torch.randn(1000, 1000, generator=generator) * 1.5
    table = torch.tensor(SPACES[space].thresholds)
    weight[:, : len(table)] = table * scales.float()
    codes, _ = quantize(weight, QuantizerConfig(space), scales)
    s = scales.double().numpy()
    levels = np.array(SPACES[space].levels)[codes.numpy() - SPACES[space].lowest_code]
    # ParetoQ rounds its quotients by 1.5 and by the number of levels.
    assert np.abs(paretoq(weight.double().numpy(), alpha * s, bits) - levels * s).max() <= 4 * 2.0**-52


@pytest.mark.parametrize("space", SPACES)
def test_packed_codes_come_back(space: str) -> None:
    table = SPACES[space]
    for columns in (1, 63, 64, 65, 200):
        codes = torch.randint(len(table.levels), (7, columns), generator=torch.Generator().manual_seed(columns))
        codes = (codes + table.lowest_code).to(torch.int8)
        packed = pack(codes, table)
        assert packed.shape == (7, packed_size(columns, table)) and torch.equal(unpack(packed, columns, table), codes)
    per_block = 64 if space == "five-value" else 128
    assert packed_size(per_block, table) == 32 and packed_size(per_block + 1, table) == 64
    highest = table.lowest_code + len(table.levels)
    with pytest.raises(ValueError, match=f"to {highest}: only {table.lowest_code}, "):
        pack(torch.full((1, 9), highest, dtype=torch.int8), table)


def test_a_pattern_that_is_no_code_of_five_is_damage() -> None:
    packed = pack(torch.zeros(1, 64, dtype=torch.int8), SPACES["five-value"])
    packed[0, 3] |= 5
    with pytest.raises(ValueError, match="bit pattern 7.*damaged"):
        unpack(packed, 64, SPACES["five-value"])


@pytest.mark.parametrize("group", [-1, 32, 96])
@pytest.mark.parametrize("space", SPACES)
def test_fused_weights_are_recognized(space: str, group: int) -> None:
    config = QuantizerConfig(space, group, statistic="absmean", scale_multiplier=1.1)
    for dtype in WEIGHT_DTYPES:
        weight = latent(dtype, 12, smallest=-2.0)
        weight[:, :32], weight[3:6] = weight[:, 32:64] * 0.625, weight[6:9]
        fused, scales = quantize_dequantize(weight, config)
        assert fused_space(weight) is None and fused_group_size(weight, space) is None
        assert fused_space(fused) == space and fused_group_size(fused, space) == group
        if dtype == torch.bfloat16:
            assert torch.equal(scales_of(fused, config), scales)
            # The weight is then stored in a wider dtype, in which 1.5 s would have been exact.
            assert fused_group_size(fused.float(), space) == group
        other = fused.clone()
        other[7, 40] = other[7].abs().max() * 1.0625
        assert fused_group_size(other, space) is None


def test_a_backend_that_does_not_know_a_space_or_a_scale_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_BACKENDS", dict(registry._BACKENDS))
    monkeypatch.setattr(registry, "_choices", {})
    registry.register_backend(Backend("narrow", quantize_dequantize, lambda device_type: None, priority=99))
    weight = latent(torch.float32, 13)
    assert same_bits(fake_quantize(weight, QuantizerConfig()), quantize_dequantize(weight, QuantizerConfig())[0])
    cure = r"use --ternary-backend (cpu or )?torch( or triton)?$"
    with pytest.raises(ValueError, match=rf"backend narrow quantizes to ternary, not to 'integer-4': {cure}"):
        fake_quantize(weight, QuantizerConfig("integer-4"))
    for refused in (QuantizerConfig(statistic="absmax"), QuantizerConfig(scale_multiplier=1 + 2.0**-40)):
        with pytest.raises(ValueError, match=rf"backend narrow makes scales of absmean alone, not of 1 abs\w+: {cure}"):
            fake_quantize(weight, refused)
    for backend in backends():
        assert backend.name == "narrow" or all(map(backend.knows, map(QuantizerConfig, OTHERS)))


def test_flags() -> None:
    parser = add_ternary_arguments(argparse.ArgumentParser())

    def default(flags: str) -> QuantizerConfig:
        return ternary_settings(parser.parse_args(["--ternary", *flags.split()])).default

    assert default("") == QuantizerConfig()
    assert default("--ternary-space five-value --ternary-group-size 64") == QuantizerConfig("five-value", 64)
    scale = default("--ternary-statistic absmax --ternary-scale-multiplier 0.36")
    assert scale == QuantizerConfig(statistic="absmax", scale_multiplier=0.36)
    args = parser.parse_args(
        "--ternary --ternary-activation-bits 8 --ternary-gemm int8 --ternary-space integer-4".split()
    )
    assert any("ternary codes only, not --ternary-space integer-4" in said for said in ternary_mistakes(args))
    idle = ternary_mistakes(parser.parse_args("--ternary-scale-multiplier 2".split()))
    assert idle == ["--ternary-scale-multiplier without --ternary would do nothing"]

# SPDX-License-Identifier: Apache-2.0
"""A comparison of the emulated kernels with the reference quantizer, on several hundred thousand values.

It covers every space, statistic and multiplier. Shapes are (rows, columns, group), where ``group`` is the number of
elements per scale.
"""

import itertools
from dataclasses import replace

import torch
from ascendc import golden
from ascendc.cases import DTYPES, beside
from ascendc.emulator import Emulator, Weight

from bitcpm_megatron.quantization import SPACES, STATISTICS, QuantizerConfig, quantize_dequantize

MULTIPLIERS = (1.0, 1 / 1.5, 1.55)
# These shapes reach both kernels: several groups per tile, groups that span tiles with and without a tail, whole rows.
SHAPES = (
    (36, 512, 32),
    (24, 512, 128),
    (12, 1024, 512),
    (8, 1024, 1024),
    (4, 2112, 1056),
    (2, 4224, 4224),
    (1, 10007, 10007),
)


def quantizers() -> list[QuantizerConfig]:
    """Returns a quantizer for every space, statistic and multiplier."""
    every = itertools.product(SPACES, STATISTICS, MULTIPLIERS)
    return [QuantizerConfig(space, -1, 1e-5, statistic, multiplier) for space, statistic, multiplier in every]


def latent(shape: tuple[int, int, int], dtype: torch.dtype, config: QuantizerConfig, seed: int) -> torch.Tensor:
    """Returns a weight with rows of very different magnitude, zeros of both signs, and special groups.

    There are groups of zeros, of values as small as eps, and with NaN or an infinity. In one row in four, each group
    begins with 1, and its other values are on the thresholds of the scale that the statistic 1 gives, or one step next
    to them, clamped to [-1, 1].
    """
    rows, columns, group = shape
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=g) * 10 ** torch.empty(rows, 1).uniform_(-5.0, 3.0, generator=g)
    w[:, ::13] *= 0.0
    w = w.to(dtype)
    thresholds = torch.tensor(SPACES[config.space].thresholds)
    s = torch.tensor(config.scale_multiplier).bfloat16().float()
    for row in range(0, rows, 4):
        picked = beside((thresholds[torch.randint(len(thresholds), (columns,), generator=g)] * s).to(dtype), g)
        w[row] = picked.clamp(-1.0, 1.0)
        w[row, ::group] = 1.0
    groups = w.view(-1, group)
    if len(groups) > 8:
        groups[1] = 0.0
        groups[2] = (torch.randn(group, generator=g) * config.eps / config.scale_multiplier).to(dtype)
        groups[3, 5], groups[4, group - 1], groups[5, 0] = torch.nan, torch.inf, -torch.inf
        groups[6] = 0.3 * config.eps / config.scale_multiplier
        groups[7, 3:] = 0.0
    return w


def given_scales(rows: int, groups: int, seed: int) -> torch.Tensor:
    """Returns bf16 scales with few bits, so that 1.5 times each is exact in every dtype; the last may be infinite."""
    g = torch.Generator().manual_seed(seed)
    scales = torch.exp2(torch.randint(-8, 5, (rows, groups), generator=g).float())
    scales *= 1 + torch.randint(0, 16, scales.shape, generator=g) / 16
    if scales.numel() > 8:
        scales.view(-1)[-1] = torch.inf
    return scales.to(torch.bfloat16)


def on_thresholds(shape: tuple[int, int, int], dtype: torch.dtype, scales: torch.Tensor, space: str) -> torch.Tensor:
    """Returns a weight of which two thirds are on a threshold of their group or a step next to it, and one is NaN."""
    rows, columns, group = shape
    g = torch.Generator().manual_seed(columns)
    thresholds = torch.tensor(SPACES[space].thresholds)
    picked = thresholds[torch.randint(len(thresholds), (rows, columns), generator=g)]
    s = scales.float().nan_to_num(posinf=1.0).repeat_interleave(group, 1)
    near = beside((picked * s).to(dtype), g)
    w = torch.where(torch.rand(rows, columns, generator=g) < 1 / 3, (torch.randn(rows, columns, generator=g) * s), near)
    w.view(-1)[7] = torch.nan
    return w.to(dtype)


def check(emulator: Emulator, config: QuantizerConfig, dtype: torch.dtype) -> tuple[int, int]:
    """Quantizes all shapes, with scales of their own and with given ones, and compares them with the reference.

    Returns:
        The number of values, and the number of values that were exactly on a threshold of their scale.

    Raises:
        AssertionError: if a bit differs from the reference.
    """
    values = ties = 0
    for given in (False, True):
        weights = []
        for seed, (rows, columns, group) in enumerate(SHAPES):
            scales = given_scales(rows, columns // group, seed) if given else None
            shape = (rows, columns, group)
            w = (
                latent(shape, dtype, config, seed)
                if scales is None
                else on_thresholds(shape, dtype, scales, config.space)
            )
            weights.append(Weight(w, group, scales, config))
        emulator.run(weights, 5, late=given)
        for weight in weights:
            group = -1 if weight.group == weight.shape[1] else weight.group
            expected, scales = quantize_dequantize(
                weight.latent, replace(config, group_size=group), weight.scales if given else None
            )
            assert golden.same_bits(weight.scales, scales), f"scales of {weight.shape}, {config}, {dtype}"
            assert golden.same_bits(weight.quantized, expected), f"values of {weight.shape}, {config}, {dtype}"
            values += expected.numel()
            ties += _ties(weight.latent, scales, config.space)
    return values, ties


def _ties(weight: torch.Tensor, scales: torch.Tensor, space: str) -> int:
    s = scales.float().repeat_interleave(weight.shape[1] // scales.shape[1], 1)
    return sum(int((weight.float() == s * threshold).sum()) for threshold in SPACES[space].thresholds)


def check_all(emulator: Emulator) -> tuple[int, int]:
    """Checks all quantizers in all dtypes.

    Returns:
        The smallest number of values that a quantizer had, and the smallest number of values on a threshold.

    Raises:
        AssertionError: if a bit differs from the reference.
    """
    fewest, ties = 10**9, 10**9
    for config in quantizers():
        found = [check(emulator, config, dtype) for dtype in DTYPES]
        fewest, ties = min(fewest, sum(f[0] for f in found)), min(ties, sum(f[1] for f in found))
    return fewest, ties

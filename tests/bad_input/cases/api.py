# SPDX-License-Identifier: Apache-2.0
"""Calls of the public API that must raise ValueError or TypeError with a clear message."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from bitcpm_megatron import QuantizerConfig, apply_recipe, dequantize, fake_quantize, quantize

from .case import Case

_WEIGHT = torch.linspace(-1, 1, 256).reshape(4, 64)
_CONFIG = QuantizerConfig()
_CODES, _SCALES = quantize(_WEIGHT, _CONFIG)


def _codes(value: int) -> torch.Tensor:
    codes = _CODES.clone()
    codes[1, 2] = value
    return codes


def _scales(value: float) -> torch.Tensor:
    scales = _SCALES.clone()
    scales[1] = value
    return scales


CALLS: dict[str, Callable[[], object]] = {
    **{
        f"QuantizerConfig(group_size={v!r})": lambda v=v: QuantizerConfig(group_size=v)
        for v in (0, -2, 31, 33, 1.5, "32", None, [32], {}, True, math.nan, 10**30)
    },
    **{
        f"QuantizerConfig(eps={v!r})": lambda v=v: QuantizerConfig(eps=v)
        for v in (0, -1.0, math.nan, math.inf, "1e-5", None, [1], {}, True)
    },
    **{f"QuantizerConfig(space={v!r})": lambda v=v: QuantizerConfig(space=v) for v in ("octal", None, [], {}, 3)},
    **{
        f"dequantize code {v}": lambda v=v: dequantize(_codes(v), _SCALES, _CONFIG, torch.float32)
        for v in (-2, 2, -128, 127)
    },
    **{
        f"dequantize dtype {v}": lambda v=v: dequantize(_CODES, _SCALES, _CONFIG, v) for v in (torch.int8, "bf16", None)
    },
    **{
        f"quantize scale {v}": lambda v=v: quantize(_WEIGHT, _CONFIG, _scales(v))
        for v in (math.nan, -1.0, 0.0, math.inf)
    },
    "dequantize codes of another dtype": lambda: dequantize(_CODES.float(), _SCALES, _CONFIG, torch.float32),
    "dequantize scales of another shape": lambda: dequantize(_CODES, _SCALES[:2], _CONFIG, torch.float32),
    "dequantize scales of another dtype": lambda: dequantize(_CODES, _SCALES.float(), _CONFIG, torch.float32),
    "dequantize a list": lambda: dequantize([[1]], _SCALES, _CONFIG, torch.float32),
    "quantize a list": lambda: quantize([[1.0]], _CONFIG),
    "quantize None": lambda: quantize(None, _CONFIG),
    "quantize one dimension": lambda: quantize(torch.ones(64), _CONFIG),
    "quantize three dimensions": lambda: quantize(torch.ones(2, 2, 64), _CONFIG),
    "quantize nothing": lambda: quantize(torch.ones(0, 64), _CONFIG),
    "quantize integers": lambda: quantize(torch.ones(2, 64, dtype=torch.int32), _CONFIG),
    "quantize booleans": lambda: quantize(torch.ones(2, 64, dtype=torch.bool), _CONFIG),
    "quantize complex": lambda: quantize(torch.ones(2, 64, dtype=torch.complex64), _CONFIG),
    "quantize groups that do not divide": lambda: quantize(torch.ones(2, 80), QuantizerConfig(group_size=32)),
    "quantize without a config": lambda: quantize(_WEIGHT, None),
    "quantize with a dict": lambda: quantize(_WEIGHT, {"group_size": -1}),
    "fake_quantize a list": lambda: fake_quantize([[1.0]], _CONFIG),
    "fake_quantize without a config": lambda: fake_quantize(_WEIGHT, None),
    "fake_quantize integers": lambda: fake_quantize(torch.ones(2, 64, dtype=torch.int32), _CONFIG),
    "fake_quantize groups that do not divide": lambda: fake_quantize(torch.ones(2, 80), QuantizerConfig(group_size=32)),
    "apply_recipe to None": lambda: apply_recipe(None),
    "apply_recipe to a list of numbers": lambda: apply_recipe([1, 2]),
    "apply_recipe to a model without linears": lambda: apply_recipe(torch.nn.Linear(4, 4), default=_CONFIG),
    "apply_recipe with a default that is none": lambda: apply_recipe(
        torch.nn.Linear(64, 64), default={"group_size": -1}
    ),
    "apply_recipe with a cache that is none": lambda: apply_recipe(
        torch.nn.Linear(64, 64), default=_CONFIG, cache="sometimes"
    ),
    "apply_recipe with 0 shards": lambda: apply_recipe(torch.nn.Linear(64, 64), default=_CONFIG, row_parallel_shards=0),
    "apply_recipe with 7 bits": lambda: apply_recipe(torch.nn.Linear(64, 64), default=_CONFIG, activation_bits=7),
}


def api(world: Path) -> Iterator[Case]:
    """Yields a case for every call."""
    for name, call in CALLS.items():
        yield Case("api", f"api: {name}", call=call)

# SPDX-License-Identifier: Apache-2.0
"""Timing of the int8 GEMM of a layer on this machine, and of the GEMM that it replaces."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import codes_of, int8_kernels, int8_linear, quantize_tokens


@dataclass(frozen=True)
class GemmTimes:
    """The shortest times of a layer's forward, in milliseconds.

    Attributes:
        kernels: the name of the kernels of the int8 GEMM.
        tokens: the number of tokens of the input.
        plain: the time of the GEMM of the quantized weight as it is stored.
        int8: the time of the int8 GEMM with quantization and scaling.
        integers: the part of ``int8`` that is the product of the integers with its scaling.
        quantization: the part of ``int8`` that is the quantization of the input.
    """

    kernels: str
    tokens: int
    plain: float
    int8: float
    integers: float
    quantization: float


_REPEATS = 5
"""The number of rounds of measurements; the shortest time of each GEMM counts."""


@torch.no_grad()
def time_gemms(weight: torch.Tensor, tokens: int = 256) -> GemmTimes:
    """Measures the GEMMs of a weight in turns, after one round that does not count.

    Args:
        weight: the weight, ``[out, in]``; its values do not matter.
        tokens: the number of tokens of the input.
    """
    weight = weight.detach()
    x = torch.ones(tokens, weight.shape[1], dtype=weight.dtype, device=weight.device)
    codes, scales = codes_of(torch.ones_like(weight))
    quantized = quantize_tokens(x)
    work: tuple[Callable[[], object], ...] = (
        lambda: torch.nn.functional.linear(x, weight),
        lambda: int8_linear(quantize_tokens(x), codes, scales),
        lambda: int8_linear(quantized, codes, scales),
        lambda: quantize_tokens(x),
    )
    wait = getattr(getattr(torch, weight.device.type), "synchronize", lambda: None)
    times: list[list[float]] = [[] for _ in work]
    for _ in range(_REPEATS + 1):
        for each, taken in zip(work, times, strict=True):
            wait()
            start = time.perf_counter()
            each()
            wait()
            taken.append(1000 * (time.perf_counter() - start))
    return GemmTimes(int8_kernels(weight.device.type).name, tokens, *(min(taken[1:]) for taken in times))

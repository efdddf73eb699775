# SPDX-License-Identifier: Apache-2.0
"""A backend of ``bitcpm::fake_quantize`` that emulates the AscendC kernels on a CPU: slow, chosen only by name."""

import functools
from collections.abc import Sequence

import torch
from ascendc.emulator import Emulator, Weight

from bitcpm_megatron.ops import Backend, register_backend
from bitcpm_megatron.quantization import SPACES, QuantizerConfig, check_weight

NAME = "ascendc-emulated"
CORES = 4


@functools.cache
def _emulator() -> Emulator:
    return Emulator()


def kernel(
    weight: torch.Tensor, config: QuantizerConfig, scales: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes one weight like :func:`bitcpm_megatron.quantization.quantize_dequantize`."""
    group = check_weight(weight, config.group_size, scales)
    given = None if scales is None else scales.contiguous().clone()
    item = Weight(weight.detach().contiguous(), group, given, config)
    _emulator().run([item], CORES, late=True)
    return item.quantized, item.scales


def grouped(
    weights: Sequence[torch.Tensor],
    quantized: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    group_sizes: Sequence[int],
    config: QuantizerConfig,
) -> int:
    """Quantizes several weights like :meth:`bitcpm_megatron.ops.Backend.together`; returns the number of launches."""
    items = []
    for weight, out, own, group_size in zip(weights, quantized, scales, group_sizes, strict=True):
        item = Weight(weight.detach().contiguous(), check_weight(weight, group_size, own), config=config)
        item.quantized, item.scales = out, own
        items.append(item)
    return _emulator().run(items, CORES, late=True).launches


def unavailable(device_type: str) -> str | None:
    """Returns why the backend cannot run on a type of device, or None if it can."""
    return None if device_type == "cpu" else "emulates on a CPU only"


def register() -> None:
    """Adds the backend to the registry."""
    register_backend(
        Backend(NAME, kernel, unavailable, priority=None, spaces=tuple(SPACES), any_scale=True, grouped=grouped)
    )

# SPDX-License-Identifier: Apache-2.0
"""The AscendC kernels as a backend of ``bitcpm::fake_quantize`` on a CPU: slow, never chosen but by name."""

import functools

import torch
from ascendc.emulator import Emulator, Weight

from bitcpm_megatron.ops import Backend, register_backend
from bitcpm_megatron.quantization import QuantizerConfig, check_weight

NAME = "ascendc-emulated"
CORES = 4


@functools.cache
def _emulator() -> Emulator:
    return Emulator()


def kernel(
    weight: torch.Tensor, config: QuantizerConfig, scales: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`bitcpm_megatron.quantization.quantize_dequantize`."""
    group = check_weight(weight, config.group_size, scales)
    given = None if scales is None else scales.contiguous().clone()
    item = Weight(weight.detach().contiguous(), group, given, config.eps)
    _emulator().run([item], CORES, late=True)
    return item.quantized, item.scales


def register() -> None:
    """Adds the backend to the registry."""
    register_backend(
        Backend(NAME, kernel, lambda device: None if device == "cpu" else "emulates on a CPU only", priority=None)
    )

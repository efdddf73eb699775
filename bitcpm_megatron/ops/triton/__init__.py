# SPDX-License-Identifier: Apache-2.0
"""The Triton backend: importing this module registers it; triton itself is imported for the first weight.

The kernels use only features that triton-ascend and upstream share: plain masked loads and stores of blocks,
elementwise arithmetic, comparisons and selections in fp32 and int32, bit casts, reshapes, sums along an axis, and, for
many weights in one launch, pointers made of integers. They use no inline assembly, no libdevice, no atomics, no block
pointers and no descriptors. Only the tile and the number of warps are tuned; on an NPU nothing is tuned, and as many
programs run as there are vector cores.

================  =============================================================
``arithmetic``    bf16 as bits, the ordered sum, the scale, the values of a space
``resident``      groups and rows that fit into a tile: one read, one write
``grouped``       the same for many weights in one launch
``streamed``      longer rows: two reads, one write
``packed``        codes in 2 bits, and their statistics
``int8``          the passes around an int8 GEMM
``launch``        the host's side, with the functions to call
================  =============================================================
"""

import importlib.util
import os
from collections.abc import Sequence

import torch

from ...quantization import SPACES, QuantizerConfig
from ..registry import Backend, register_backend

_VARIABLE = "TRITON_INTERPRET"
# Triton reads the variable when it is imported; a later change has no reliable effect.
_INTERPRETED = os.environ.get(_VARIABLE, "").lower() in ("1", "true", "yes", "on", "y")


def unavailable(device_type: str) -> str | None:
    """Returns the reason why the kernels cannot run on a device type, or None."""
    if importlib.util.find_spec("triton") is None:
        package = "triton-ascend" if device_type == "npu" else "triton"
        return f"triton is not installed: pip install {package}"
    if device_type == "cpu":
        return None if _INTERPRETED else f"Triton has no CPU backend; {_VARIABLE}=1 would interpret the kernels, slowly"
    if _INTERPRETED:
        return f"{_VARIABLE}=1 is set: the kernels would be interpreted on the host"
    if device_type == "npu" and importlib.util.find_spec("triton.backends.ascend") is None:
        return "the installed triton is not triton-ascend: pip uninstall triton, pip install triton-ascend"
    if device_type not in ("cuda", "npu"):
        return f"the kernels are not meant for {device_type}"
    return None


def _kernel(
    weight: torch.Tensor, config: QuantizerConfig, scales: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    from .launch import fake_quantize

    return fake_quantize(weight, config, scales)


def _grouped(
    weights: Sequence[torch.Tensor],
    quantized: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    group_sizes: Sequence[int],
    config: QuantizerConfig,
) -> int:
    from .launch import fake_quantize_all

    return fake_quantize_all(weights, quantized, scales, group_sizes, config)


# The interpreter is for debugging kernels and not for training, so that it is never chosen automatically.
_PRIORITY = None if _INTERPRETED else 10
register_backend(
    Backend("triton", _kernel, unavailable, _PRIORITY, spaces=tuple(SPACES), any_scale=True, grouped=_grouped)
)

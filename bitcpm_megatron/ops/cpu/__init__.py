# SPDX-License-Identifier: Apache-2.0
"""The CPU backend: one pass over the weight in C, bit for bit the reference; importing this module registers it.

``fake_quantize.c`` is compiled for the local machine when it is first needed, and kept in the user's cache. If there is
no C compiler, the torch backend is used instead, several times slower and with the same bits.
"""

import ctypes
import functools
from array import array
from collections.abc import Sequence

import torch

from ...quantization import SPACES, QuantizerConfig, check_weight, effective_group
from ..registry import Backend, register_backend
from .library import load, threads_for

_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_THRESHOLDS = 4


class _Quantizer(ctypes.Structure):
    """The struct Quantizer of the C source."""

    _fields_ = (
        ("eps", ctypes.c_float),
        ("multiplier", ctypes.c_float),
        ("absmax", ctypes.c_int32),
        ("count", ctypes.c_int32),
        ("levels", ctypes.c_float * (_THRESHOLDS + 1)),
        ("thresholds", ctypes.c_float * _THRESHOLDS),
        ("upper", ctypes.c_int32 * _THRESHOLDS),
    )


@functools.lru_cache(maxsize=64)
def _quantizer(config: QuantizerConfig) -> _Quantizer:
    table = _Quantizer(config.eps, config.scale_multiplier, config.statistic == "absmax")
    if config.space != "ternary":
        space = SPACES[config.space]
        table.count = len(space.thresholds)
        table.levels[: len(space.levels)] = space.levels
        table.thresholds[: table.count] = space.thresholds
        table.upper[: table.count] = [tie == "upper" for tie in space.ties]
    return table


def unavailable(device_type: str) -> str | None:
    """Returns the reason why the kernel cannot run on a device type, or None; compiles it the first time."""
    if device_type != "cpu":
        return "runs on a CPU only"
    return load()[1]


def _kernel(
    weight: torch.Tensor, config: QuantizerConfig, scales: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    group = check_weight(weight, config.group_size, scales)
    library = _library_for(weight)
    w = weight.detach().contiguous()
    quantized = torch.empty_like(w)
    own = torch.empty(w.shape[0], w.shape[1] // group, dtype=torch.bfloat16, device="cpu")
    if scales is not None:
        own.copy_(scales)
    groups = w.numel() // group
    threads, scratch = _threads(groups, w.numel(), group)
    library.bitcpm_fake_quantize(
        w.data_ptr(),
        quantized.data_ptr(),
        own.data_ptr(),
        groups,
        group,
        scratch.data_ptr(),
        _DTYPES[w.dtype],
        scales is not None,
        ctypes.addressof(_quantizer(config)),
        threads,
    )
    return quantized, own


def _grouped(
    weights: Sequence[torch.Tensor],
    quantized: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    group_sizes: Sequence[int],
    config: QuantizerConfig,
) -> int:
    library = _library_for(weights[0])
    latent = [w.detach().contiguous() for w in weights]
    table = array("q")  # structs Weight of the C source
    groups = elements = longest = 0
    for weight, result, scale, group_size in zip(latent, quantized, scales, group_sizes, strict=True):
        group = effective_group(weight.shape[1], group_size)
        count = weight.numel() // group
        table.extend((weight.data_ptr(), result.data_ptr(), scale.data_ptr(), count, group))
        groups, elements, longest = groups + count, elements + weight.numel(), max(longest, group)
    threads, scratch = _threads(groups, elements, longest)
    how = (_DTYPES[latent[0].dtype], False, ctypes.addressof(_quantizer(config)), threads)
    library.bitcpm_fake_quantize_all(table.buffer_info()[0], len(latent), scratch.data_ptr(), longest + 2, *how)
    return 1


def _library_for(weight: torch.Tensor) -> ctypes.CDLL:
    library, why = load()
    if library is None:
        raise RuntimeError(f"the CPU kernel cannot run: {why}")
    if not weight.is_cpu:
        raise RuntimeError(f"the CPU kernel cannot run on a weight on {weight.device}")
    return library


def _threads(groups: int, elements: int, longest: int) -> tuple[int, torch.Tensor]:
    """Returns how many threads pay off, and their scratch: 2 elements more than the longest group for each."""
    threads = threads_for(groups, elements)
    return threads, torch.empty(threads * (longest + 2), dtype=torch.float32, device="cpu")


register_backend(
    Backend("cpu", _kernel, unavailable, priority=5, spaces=tuple(SPACES), any_scale=True, grouped=_grouped)
)

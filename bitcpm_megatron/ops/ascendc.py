# SPDX-License-Identifier: Apache-2.0
"""The AscendC backend, for Ascend NPUs: importing this module registers it; the library is loaded for the first weight.

The kernels and their binding are built where CANN is installed, by ``make kernel``, into ``libbitcpm_ascendc.so``; see
docs/kernels.md. The schemas of its ops are defined here; the library adds their implementations for the device.
"""

import functools
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..quantization import SPACES, QuantizerConfig, check_weight, effective_group, packed_size
from .registry import Backend, register_backend

LIBRARY_VARIABLE = "BITCPM_ASCENDC_LIBRARY"
"""The environment variable that names a library outside the build folder of the checkout."""
STATISTICS_KINDS = 2
"""The number of counts per weight: codes that are not zero, and codes that changed."""
MOST_LAUNCHES = 2
"""The largest number of launches per call, for any number of weights."""

# Each list has one entry per weight, or is empty if its tensors are absent. If `weights` is empty, `quantized` holds
# latent weights, which are quantized in place. Scales are read if `given`, else written. A space has thresholds,
# levels, and in `upper_ties` a bit for each threshold whose tie goes up; ternary has none of them. The op returns the
# counts and the number of launches.
torch.library.define(
    "bitcpm::ascendc_quantize",
    "(Tensor[] weights, Tensor(a!)[] quantized, Tensor(b!)[] scales, Tensor(c!)[] packed, Tensor[] previous, "
    "int[] groups, float eps, float scale_multiplier, bool absmax, float[] thresholds, float[] levels, int upper_ties, "
    "bool given, bool count) -> (Tensor[], int)",
)
torch.library.define(
    "bitcpm::ascendc_unpack", "(Tensor packed, Tensor scales, int columns, ScalarType dtype) -> Tensor"
)


@torch.library.register_fake("bitcpm::ascendc_quantize")
def _(
    weights: list[torch.Tensor],
    quantized: list[torch.Tensor],
    scales: list[torch.Tensor],
    packed: list[torch.Tensor],
    previous: list[torch.Tensor],
    groups: list[int],
    eps: float,
    scale_multiplier: float,
    absmax: bool,
    thresholds: list[float],
    levels: list[float],
    upper_ties: int,
    given: bool,
    count: bool,
) -> tuple[list[torch.Tensor], int]:
    counts = [q.new_empty((STATISTICS_KINDS,), dtype=torch.int64) for q in quantized] if count or previous else []
    return counts, MOST_LAUNCHES


@torch.library.register_fake("bitcpm::ascendc_unpack")
def _(packed: torch.Tensor, scales: torch.Tensor, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return packed.new_empty((packed.shape[0], columns), dtype=dtype)


@dataclass(frozen=True)
class QuantizedWeights:
    """The results of one grouped call; each list has one entry per weight, or is empty if it was not requested.

    Attributes:
        quantized: the quantized weights, ``[out, in]`` in the weight's dtype.
        scales: the scales, bf16 ``[out, groups]``.
        packed: the packed codes, uint8 ``[out, bytes]``, in the layout of :func:`bitcpm_megatron.quantization.pack`.
        counts: int64 ``[2]`` counts: codes that are not zero, codes that differ from the previous ones.
        launches: the number of kernel launches.
    """

    quantized: list[torch.Tensor]
    scales: list[torch.Tensor]
    packed: list[torch.Tensor]
    counts: list[torch.Tensor]
    launches: int


def library_path() -> Path:
    """Returns the path where the library is expected."""
    named = os.environ.get(LIBRARY_VARIABLE)
    return Path(named) if named else Path(__file__).parents[2] / "build" / "ascendc" / "libbitcpm_ascendc.so"


def unavailable(device_type: str) -> str | None:
    """Returns the reason why the kernels cannot run on a device type, or None."""
    if device_type != "npu":
        return "runs on an NPU only"
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed"
    if not library_path().is_file():
        return f"{library_path()} is not built: make kernel, or set {LIBRARY_VARIABLE}"
    return None


@functools.cache
def load() -> None:
    """Loads the library once; call it after the device is set, because its initialization binds to the current device.

    Raises:
        OSError: if the library does not exist, or does not fit this torch, torch_npu or CANN.
    """
    torch.ops.load_library(str(library_path()))


def quantize_weights(
    weights: Sequence[torch.Tensor],
    group_sizes: Sequence[int],
    config: QuantizerConfig,
    scales: Sequence[torch.Tensor] = (),
    previous: Sequence[torch.Tensor] = (),
    pack: bool = False,
    count: bool = False,
) -> QuantizedWeights:
    """Quantizes all weights of a step in one or two launches, so that small ones do not wait for launches.

    Args:
        weights: the latent weights, ``[out, in]`` each, of one dtype on one NPU.
        group_sizes: the elements per scale of each weight, -1 for the row.
        config: the quantizer of all of them; its group size is ignored.
        scales: given bf16 scales ``[out, groups]`` of each weight, or empty for the weights' own.
        previous: packed codes of each weight to compare with, or empty.
        pack: whether to return packed codes as well; ternary weights only.
        count: whether to return counts as well; ternary weights only, and implied by ``previous``.

    Raises:
        ValueError: if :func:`~bitcpm_megatron.quantization.weights.check_weight` refuses a weight, or codes of another
            space than ternary are to be packed, counted or compared.
        RuntimeError: if a launch failed, or a graph is being captured whose table is not on the device yet.
    """
    if config.space != "ternary" and (previous or pack or count):
        raise ValueError(
            f"the AscendC kernels pack, count and compare ternary codes, not those of {config.space!r}: leave out "
            "previous, pack and count (bitcpm_megatron.quantization.pack packs codes of any space)"
        )
    given: Sequence[torch.Tensor | None] = list(scales) or [None] * len(weights)
    groups = [check_weight(w, g, s) for w, g, s in zip(weights, group_sizes, given, strict=True)]
    quantized = [torch.empty_like(w, memory_format=torch.contiguous_format) for w in weights]
    # A launch may write to its scales, so it gets a copy of given ones.
    own = [s.clone(memory_format=torch.contiguous_format) for s in scales] or [
        w.new_empty((w.shape[0], w.shape[1] // g), dtype=torch.bfloat16) for w, g in zip(weights, groups, strict=True)
    ]
    packed = [w.new_empty((w.shape[0], packed_size(w.shape[1])), dtype=torch.uint8) for w in weights] if pack else []
    load()
    latent, before = ([t.detach().contiguous() for t in tensors] for tensors in (weights, previous))
    counts, launches = torch.ops.bitcpm.ascendc_quantize(
        latent, quantized, own, packed, before, groups, *_quantizer(config), bool(scales), count
    )
    return QuantizedWeights(quantized, own, packed, counts, launches)


def _quantizer(config: QuantizerConfig) -> tuple[float, float, bool, list[float], list[float], int]:
    """Returns a quantizer in the form of the op's arguments, from ``eps`` to ``upper_ties``."""
    how = (config.eps, config.scale_multiplier, config.statistic == "absmax")
    if config.space == "ternary":
        return *how, [], [], 0
    space = SPACES[config.space]
    upper = sum(1 << k for k, tie in enumerate(space.ties) if tie == "upper")
    return *how, list(space.thresholds), list(space.levels), upper


def unpack_weight(
    packed: torch.Tensor, scales: torch.Tensor, columns: int, group_size: int, dtype: torch.dtype
) -> torch.Tensor:
    """Returns the weight ``[out, columns]`` that packed ternary codes and scales represent.

    Args:
        packed: the packed codes, uint8 ``[out, bytes]``.
        scales: the scales, bf16 ``[out, groups]``.
        columns: the number of columns of the weight.
        group_size: the elements per scale, -1 for the row.
        dtype: the dtype of the weight.

    Raises:
        ValueError: if the scales do not fit.
        RuntimeError: if the launch failed, or a graph is being captured whose table is not on the device yet.
    """
    groups = columns // effective_group(columns, group_size)
    if tuple(scales.shape) != (packed.shape[0], groups):
        raise ValueError(f"scales of shape {tuple(scales.shape)}: pass {(packed.shape[0], groups)}")
    load()
    return torch.ops.bitcpm.ascendc_unpack(packed.contiguous(), scales.contiguous(), columns, dtype)


def _kernel(
    weight: torch.Tensor, config: QuantizerConfig, scales: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    result = quantize_weights([weight], [config.group_size], config, [] if scales is None else [scales])
    return result.quantized[0], result.scales[0]


def _grouped(
    weights: Sequence[torch.Tensor],
    quantized: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    group_sizes: Sequence[int],
    config: QuantizerConfig,
) -> int:
    groups = [check_weight(w, g, s) for w, g, s in zip(weights, group_sizes, scales, strict=True)]
    in_place = all(w is q for w, q in zip(weights, quantized, strict=True))
    load()
    latent = [] if in_place else [w.detach().contiguous() for w in weights]
    launches: int = torch.ops.bitcpm.ascendc_quantize(
        latent, list(quantized), list(scales), [], [], groups, *_quantizer(config), False, False
    )[1]
    return launches


register_backend(
    Backend("ascendc", _kernel, unavailable, priority=20, spaces=tuple(SPACES), any_scale=True, grouped=_grouped)
)

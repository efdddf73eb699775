# SPDX-License-Identifier: Apache-2.0
"""The host's side of the kernels: checks, tiles, tuning, launch. Importing it imports triton."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton

from ...quantization import check_weight, packed_size
from ...quantization.packing import BLOCK_BYTES
from .packed import pack_codes
from .packed import unpack_weight as unpack_weight_kernel
from .resident import quantize_resident
from .streamed import quantize_streamed

INTERPRETED = not isinstance(quantize_resident, triton.JITFunction)
RESIDENT_ELEMENTS = {"npu": 4096}
"""Longest group that is quantized in one tile. A 910B core has 192 KiB for a tile and all that is computed from it."""
RESIDENT_ELEMENTS_ELSEWHERE = 32768
STREAMED_ELEMENTS = 4096
PACKED_BLOCKS = 32
TUNED_ELEMENTS = 1 << 20
"""Smaller weights take less time than their launch: there is nothing to tune."""
_INTERPRETED_ELEMENTS = 1 << 17
"""The interpreter's cost is per program, hardly per element."""
_CONFIGS = [
    triton.Config({"TILE": tile}, num_warps=warps, num_stages=1)
    for tile, warps in (
        (2048, 4),
        (4096, 4),
        (4096, 8),
        (8192, 8),
        (8192, 16),
        (16384, 8),
        (16384, 16),
        (32768, 16),
        (32768, 32),
    )
]


def _fitting(configs: Sequence[triton.Config], named_args: dict[str, Any], **kwargs: Any) -> list[triton.Config]:
    """The configurations whose tile holds a unit: of those with several units in a tile, not the largest ones."""
    size = kwargs["SIZE"]
    smallest = min(c.kwargs["TILE"] for c in configs if c.kwargs["TILE"] >= size)
    return [c for c in configs if size <= c.kwargs["TILE"] <= max(smallest, 8192)]


# Results do not depend on what is chosen: see arithmetic.ordered_sum.
_tuned = triton.autotune(_CONFIGS, key=["units", "unit"], prune_configs_by={"early_config_prune": _fitting})(
    quantize_resident
)


def fake_quantize(
    weight: torch.Tensor,
    group_size: int,
    eps: float,
    scales: torch.Tensor | None = None,
    *,
    tile: int | None = None,
    resident: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`bitcpm_megatron.quantization.quantize_dequantize`; scales may lie one bf16 step beside its own.

    Nothing waits for the device, except that the first call for a shape tries the launch configurations.

    Args:
        weight: ``[out, in]`` in fp32, bf16 or fp16; one that is not contiguous is copied first.
        group_size: elements per scale, -1 for the row.
        eps: lower bound of the scales.
        scales: given bf16 scales ``[out, groups]``.
        tile: elements per program instead of the tuned number: a power of two.
        resident: longest group that is quantized in one tile, instead of the device's number: a power of two.

    Returns:
        The quantized weight ``[out, in]`` and the bf16 scales ``[out, groups]``.

    Raises:
        ValueError: see :func:`~bitcpm_megatron.quantization.check_weight`.
    """
    group = check_weight(weight, group_size, scales)
    weight = weight.detach().contiguous()
    units = weight.numel() // group
    quantized = torch.empty_like(weight)
    own = scales.clone(memory_format=torch.contiguous_format) if scales is not None else None
    if own is None:
        own = torch.empty(weight.shape[0], weight.shape[1] // group, dtype=torch.bfloat16, device=weight.device)
    arguments = (_stored(weight), _stored(quantized), _stored(own), units, group, eps)
    kind = weight.device.type
    constants: dict[str, Any] = {"GIVEN": scales is not None, "BF16": weight.dtype == torch.bfloat16}
    if resident is None:
        resident = RESIDENT_ELEMENTS.get(kind, RESIDENT_ELEMENTS_ELSEWHERE)
    size = triton.next_power_of_2(group)
    with _on(weight.device):
        if size > resident:
            piece = min(STREAMED_ELEMENTS, resident)
            pieces = size // piece
            constants |= {"SIZE": piece, "LEVELS": piece.bit_length() - 1}
            constants |= {"PIECES": pieces, "PIECE_LEVELS": pieces.bit_length() - 1}
            quantize_streamed[(_programs(units, weight.device),)](*arguments, **constants, num_warps=8)
            return quantized, own
        constants |= {"SIZE": size, "LEVELS": size.bit_length() - 1}
        if tile is None and (INTERPRETED or kind == "npu" or weight.numel() < TUNED_ELEMENTS):
            tile = _INTERPRETED_ELEMENTS if INTERPRETED else 4096
        grid = _grid(units, size, weight.device)
        if tile is None:
            _tuned[grid](*arguments, **constants)
        else:
            # No tile needs to be larger than the weight.
            tile = max(size, min(tile, triton.next_power_of_2(units) * size))
            quantize_resident[grid](*arguments, **constants, TILE=tile, num_warps=min(16, max(4, tile // 1024)))
    return quantized, own


def quantize_packed(
    weight: torch.Tensor,
    group_size: int,
    eps: float,
    scales: torch.Tensor | None = None,
    previous: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The codes of a weight in 2 bits, and statistics of them.

    Nothing waits for the device. With given scales a weight is read once; without, it is quantized first.

    Args:
        weight: as for :func:`fake_quantize`.
        group_size: see there.
        eps: see there.
        scales: see there.
        previous: packed codes of an earlier time, to compare with.

    Returns:
        - packed codes, uint8 ``[out, ceil(in / 128) * 32]``, as :func:`bitcpm_megatron.quantization.pack`;
        - bf16 scales ``[out, groups]``; the codes of a group whose scale is not finite are 0;
        - int64 ``[2]`` on the device: codes that are not zero, codes that differ from ``previous`` (0 without it).

    Raises:
        ValueError: see :func:`~bitcpm_megatron.quantization.check_weight`; or previous codes of another shape.
    """
    group = check_weight(weight, group_size, scales)
    weight = weight.detach().contiguous()
    rows, columns = weight.shape
    width = packed_size(columns)
    if previous is not None and (tuple(previous.shape) != (rows, width) or previous.dtype != torch.uint8):
        raise ValueError(
            f"previous codes of shape {tuple(previous.shape)}, {previous.dtype} do not fit a weight of shape "
            f"{tuple(weight.shape)}: pass uint8 {(rows, width)}"
        )
    own = fake_quantize(weight, group_size, eps)[1] if scales is None else scales.clone()
    own = own.contiguous()
    packed = torch.empty(rows, width, dtype=torch.uint8, device=weight.device)
    before = packed if previous is None else previous.contiguous()
    blocks = width // BLOCK_BYTES
    programs = _programs(triton.cdiv(rows * blocks, PACKED_BLOCKS), weight.device)
    counts = torch.empty(programs, 2, dtype=torch.int32, device=weight.device)
    with _on(weight.device):
        pack_codes[(programs,)](
            _stored(weight),
            _stored(own),
            packed,
            before,
            counts,
            rows,
            columns,
            blocks,
            own.shape[1],
            group,
            BF16=weight.dtype == torch.bfloat16,
            COMPARE=previous is not None,
            BLOCKS=PACKED_BLOCKS,
        )
    return packed, own, counts.sum(0)


def unpack_weight(
    packed: torch.Tensor, scales: torch.Tensor, columns: int, group_size: int, dtype: torch.dtype
) -> torch.Tensor:
    """The weight that packed codes and scales stand for.

    Damage is not looked for, because that would wait for the device: see :func:`bitcpm_megatron.quantization.unpack`.

    Args:
        packed: uint8 ``[out, ceil(columns / 128) * 32]``.
        scales: bf16 ``[out, groups]``.
        columns: of the weight.
        group_size: elements per scale, -1 for the row.
        dtype: of the weight: fp32, bf16 or fp16.

    Returns:
        ``[out, columns]``, as :func:`bitcpm_megatron.quantization.dequantize`.

    Raises:
        ValueError: another shape or dtype.
    """
    width = packed_size(columns)
    if packed.dim() != 2 or packed.dtype != torch.uint8 or packed.numel() == 0 or packed.shape[1] != width:
        raise ValueError(
            f"packed codes of shape {tuple(packed.shape)}, {packed.dtype} do not hold rows of {columns}: pass "
            f"uint8 [out, {width}]"
        )
    packed = packed.contiguous()
    rows, blocks = packed.shape[0], width // BLOCK_BYTES
    quantized = torch.empty(rows, columns, dtype=dtype, device=packed.device)
    group = check_weight(quantized, group_size, scales)
    with _on(packed.device):
        unpack_weight_kernel[(_programs(triton.cdiv(rows * blocks, PACKED_BLOCKS), packed.device),)](
            packed,
            _stored(scales.contiguous()),
            _stored(quantized),
            rows,
            columns,
            blocks,
            scales.shape[1],
            group,
            BF16=dtype == torch.bfloat16,
            BLOCKS=PACKED_BLOCKS,
        )
    return quantized


def _stored(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Kernels are launched on the current device, which need not be the weight's."""
    return contextlib.nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def _grid(units: int, size: int, device: torch.device) -> Callable[[dict[str, Any]], tuple[int]]:
    return lambda meta: (_programs(triton.cdiv(units, meta["TILE"] // size), device),)


def _programs(steps: int, device: torch.device) -> int:
    """Programs for so many steps: on an NPU one per vector core, for there more programs than cores run in turn."""
    if device.type != "npu" or INTERPRETED:
        return steps
    properties = triton.runtime.driver.active.utils.get_device_properties(torch.npu.current_device())  # type: ignore[attr-defined]
    return min(steps, properties["num_vectorcore"])

# SPDX-License-Identifier: Apache-2.0
"""The host's side of the Triton kernels: checks, tiles, tuning and launches; importing it imports triton."""

import contextlib
import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import triton
import triton.language as tl

from ...quantization import SPACES, QuantizerConfig, check_weight, packed_size
from ...quantization.packing import BLOCK_BYTES
from .grouped import TABLE_ROWS, quantize_grouped
from .packed import unpack_weight as unpack_weight_kernel
from .resident import quantize_resident
from .streamed import quantize_streamed

INTERPRETED = not isinstance(quantize_resident, triton.JITFunction)
RESIDENT_ELEMENTS = {"npu": 4096}
"""The length of the longest group that is quantized in one tile, by device type.

A 910B core has 192 KiB for a tile and everything that is computed from it.
"""
RESIDENT_ELEMENTS_ELSEWHERE = 32768
STREAMED_ELEMENTS = 4096
PACKED_BLOCKS = 32
TUNED_ELEMENTS = 1 << 20
"""The smallest weight that is tuned; smaller ones take less time than their launch."""
_UNTUNED_ELEMENTS = 1 << 17 if INTERPRETED else 4096
"""The tile without tuning; it is large in the interpreter, whose cost is per program and hardly per element."""
GROUPED_WEIGHTS = 512
"""The largest number of weights in one launch, because every program searches all of them for its own."""
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
    """Returns the configurations whose tile holds a unit; of those with several units per tile, not the largest."""
    size = kwargs["SIZE"]
    smallest = min(c.kwargs["TILE"] for c in configs if c.kwargs["TILE"] >= size)
    return [c for c in configs if size <= c.kwargs["TILE"] <= max(smallest, 8192)]


# Results do not depend on the choice, because arithmetic.ordered_sum adds in a fixed order.
_tuned = triton.autotune(_CONFIGS, key=["units", "unit"], prune_configs_by={"early_config_prune": _fitting})(
    quantize_resident
)


def space_number(name: str) -> int:
    """Returns the table of a space as one number, for kernels that are compiled for it.

    From the lowest bit on, it has 3 bits for the number of thresholds and 4 for the lowest level. Then, for each
    threshold, it has 4 bits for the threshold itself, 1 for whether a tie goes to the upper level, and 4 for the level
    above. Levels and thresholds x are multiples of a half, and encoded as 2 (x + 4). The number is 0 for ternary, which
    needs no table.
    """
    if name == "ternary":
        return 0
    space = SPACES[name]
    number = len(space.thresholds) | int(2 * (space.levels[0] + 4)) << 3
    for k, (threshold, tie, level) in enumerate(zip(space.thresholds, space.ties, space.levels[1:], strict=True)):
        field = int(2 * (threshold + 4)) | (tie == "upper") << 4 | int(2 * (level + 4)) << 5
        number |= field << 7 + 9 * k
    return number


def _constants(config: QuantizerConfig) -> dict[str, Any]:
    return {"ABSMAX": config.statistic == "absmax", "SPACE": space_number(config.space)}


def fake_quantize(
    weight: torch.Tensor,
    config: QuantizerConfig,
    scales: torch.Tensor | None = None,
    *,
    tile: int | None = None,
    resident: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes one weight like :func:`bitcpm_megatron.quantization.quantize_dequantize`.

    Its own scales may differ from the reference's by one bf16 step. Nothing waits for the device, except that the first
    call for a shape tries the launch configurations.

    Args:
        weight: the latent weight, ``[out, in]`` in fp32, bf16 or fp16; it is copied first if it is not contiguous.
        config: the quantizer.
        scales: given bf16 scales ``[out, groups]``, or None for the weight's own.
        tile: the number of elements per program instead of the tuned one: a power of two.
        resident: the length of the longest group that is quantized in one tile, instead of the device's: a power of
            two.

    Returns:
        The quantized weight ``[out, in]`` and the bf16 scales ``[out, groups]``.

    Raises:
        ValueError: if :func:`~bitcpm_megatron.quantization.check_weight` refuses the weight.
    """
    group = check_weight(weight, config.group_size, scales)
    weight = weight.detach().contiguous()
    quantized = torch.empty_like(weight)
    own = scales.clone(memory_format=torch.contiguous_format) if scales is not None else None
    if own is None:
        own = torch.empty(weight.shape[0], weight.shape[1] // group, dtype=torch.bfloat16, device=weight.device)
    _quantize(weight, quantized, own, group, config, scales is not None, tile, resident)
    return quantized, own


def fake_quantize_all(
    weights: Sequence[torch.Tensor],
    quantized: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    group_sizes: Sequence[int],
    config: QuantizerConfig,
    *,
    tile: int | None = None,
    resident: int | None = None,
) -> int:
    """Quantizes weights of one dtype, in place or not, with one launch for all groups of about the same length.

    Groups have about the same length if they round up to the same power of two and agree on alignment: whether their
    addresses and length are multiples of 16. More than GROUPED_WEIGHTS such weights take several launches. Groups that
    do not fit into a tile take one launch per weight. Nothing waits for the device, and nothing is tuned. A graph must
    not be captured meanwhile, because a launch's table is copied from the host.

    Args:
        weights: the latent weights, ``[out, in]`` each; one that is not contiguous is copied first.
        quantized: the tensors to write the quantized weights to, of the same shapes and dtype, contiguous; each may be
            the weight itself.
        scales: the tensors to write the scales to, bf16 ``[out, groups]`` each, contiguous.
        group_sizes: the elements per scale of each weight, -1 for the row.
        config: the quantizer of all of them; its group size is ignored.
        tile: the number of elements per program and step instead of the device's: a power of two.
        resident: the length of the longest group that is quantized in one tile, instead of the device's: a power of
            two.

    Returns:
        The number of launches.

    Raises:
        ValueError: if :func:`~bitcpm_megatron.quantization.check_weight` refuses a weight.
    """
    launches = 0
    # The list keeps contiguous copies alive until the last launch.
    latent = [weight.detach().contiguous() for weight in weights]
    kinds: defaultdict[tuple[int, bool], list[_Entry]] = defaultdict(list)
    for weight, out, own, group_size in zip(latent, quantized, scales, group_sizes, strict=True):
        group = check_weight(weight, group_size, own)
        size = triton.next_power_of_2(group)
        if size > _resident(resident, weight.device):
            _quantize(weight, out, own, group, config, False, tile, resident)
            launches += 1
            continue
        entry = (weight.data_ptr(), out.data_ptr(), own.data_ptr(), weight.numel() // group, group)
        kinds[size, all(number % 16 == 0 for number in (*entry[:2], group))].append(entry)
    for (size, aligned), entries in kinds.items():
        for start in range(0, len(entries), GROUPED_WEIGHTS):
            _launch_grouped(entries[start : start + GROUPED_WEIGHTS], latent[0], config, size, aligned, tile)
            launches += 1
    return launches


def _quantize(
    weight: torch.Tensor,
    quantized: torch.Tensor,
    own: torch.Tensor,
    group: int,
    config: QuantizerConfig,
    given: bool,
    tile: int | None,
    resident: int | None,
) -> None:
    """Quantizes one weight in one launch; the scales ``own`` are read if ``given``, else written."""
    units = weight.numel() // group
    arguments = (_stored(weight), _stored(quantized), _stored(own), units, group, config.eps, config.scale_multiplier)
    kind = weight.device.type
    constants: dict[str, Any] = {"GIVEN": given, "BF16": weight.dtype == torch.bfloat16, **_constants(config)}
    resident = _resident(resident, weight.device)
    size = triton.next_power_of_2(group)
    with _on(weight.device):
        if size > resident:
            piece = min(STREAMED_ELEMENTS, resident)
            pieces = size // piece
            constants |= {"SIZE": piece, "LEVELS": piece.bit_length() - 1}
            constants |= {"PIECES": pieces, "PIECE_LEVELS": pieces.bit_length() - 1}
            quantize_streamed[(_programs(units, weight.device),)](*arguments, **constants, num_warps=8)
            return
        constants |= {"SIZE": size, "LEVELS": size.bit_length() - 1}
        untuned = INTERPRETED or kind == "npu" or weight.numel() < TUNED_ELEMENTS
        if tile is None and (untuned or size > _CONFIGS[-1].kwargs["TILE"]):
            tile = _UNTUNED_ELEMENTS
        grid = _grid(units, size, weight.device)
        if tile is None:
            _tuned[grid](*arguments, **constants)
        else:
            # A tile that is larger than the weight would only add padding.
            tile = max(size, min(tile, triton.next_power_of_2(units) * size))
            quantize_resident[grid](*arguments, **constants, TILE=tile, num_warps=_warps(tile))


_Entry: TypeAlias = tuple[int, int, int, int, int]
"""One weight of a grouped launch: the addresses of weight, quantized weight and scales; ``units``; ``unit``."""


def _launch_grouped(
    entries: Sequence[_Entry], like: torch.Tensor, config: QuantizerConfig, size: int, aligned: bool, tile: int | None
) -> None:
    """Launches one grouped kernel for weights of the dtype and device of ``like``."""
    longest = max(units for *_, units, _ in entries)
    tile = max(size, min(tile or _UNTUNED_ELEMENTS, triton.next_power_of_2(longest) * size))
    tiles = [triton.cdiv(units, tile // size) for *_, units, _ in entries]
    firsts = [0, *itertools.accumulate(tiles)]
    width = triton.next_power_of_2(len(entries))
    table = torch.zeros(TABLE_ROWS, width, dtype=torch.int64, pin_memory=like.device.type != "cpu")
    table[0] = firsts[-1]
    table[:, : len(entries)] = torch.tensor([firsts[:-1], *zip(*entries, strict=True)])
    bf16 = like.dtype == torch.bfloat16
    with _on(like.device):
        quantize_grouped[(_programs(firsts[-1], like.device),)](
            table.to(like.device, non_blocking=True),
            firsts[-1],
            config.eps,
            config.scale_multiplier,
            **_constants(config),
            STORED=tl.int16 if bf16 else {torch.float16: tl.float16, torch.float32: tl.float32}[like.dtype],
            BF16=bf16,
            ALIGNED=aligned,
            SIZE=size,
            LEVELS=size.bit_length() - 1,
            TILE=tile,
            WEIGHTS=width,
            num_warps=_warps(tile),
        )


def unpack_weight(
    packed: torch.Tensor, scales: torch.Tensor, columns: int, group_size: int, dtype: torch.dtype
) -> torch.Tensor:
    """Returns the weight that packed codes and scales represent.

    It does not look for damage, because that would wait for the device; :func:`bitcpm_megatron.quantization.unpack`
    does.

    Args:
        packed: the packed codes, uint8 ``[out, ceil(columns / 128) * 32]``.
        scales: the scales, bf16 ``[out, groups]``.
        columns: the number of columns of the weight.
        group_size: the elements per scale, -1 for the row.
        dtype: the dtype of the weight: fp32, bf16 or fp16.

    Returns:
        The quantized weight, ``[out, columns]``, as from :func:`bitcpm_megatron.quantization.dequantize`.

    Raises:
        ValueError: if packed codes or scales have another shape or dtype.
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


def _resident(given: int | None, device: torch.device) -> int:
    return RESIDENT_ELEMENTS.get(device.type, RESIDENT_ELEMENTS_ELSEWHERE) if given is None else given


def _warps(tile: int) -> int:
    return min(16, max(4, tile // 1024))


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes a device the current one, because kernels are launched there, and the weight's device need not be it."""
    return contextlib.nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def _grid(units: int, size: int, device: torch.device) -> Callable[[dict[str, Any]], tuple[int]]:
    return lambda meta: (_programs(triton.cdiv(units, meta["TILE"] // size), device),)


def _programs(steps: int, device: torch.device) -> int:
    """Returns the number of programs for a number of steps.

    On an NPU it is at most one per vector core, because further programs would run after the first ones.
    """
    if device.type != "npu" or INTERPRETED:
        return steps
    properties = triton.runtime.driver.active.utils.get_device_properties(torch.npu.current_device())  # type: ignore[attr-defined]
    return min(steps, properties["num_vectorcore"])

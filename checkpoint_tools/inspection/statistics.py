# SPDX-License-Identifier: Apache-2.0
"""Statistics of a model's weights: which are quantized, in which groups, and the distribution of codes and scales."""

import math
from collections.abc import Iterable, Iterator

import torch

from ...quantization import SPACES, QuantizerConfig, effective_group, fused_group_size, fused_space, quantize, scales_of
from ...quantization.record import QuantizerRecord
from ..quantizer.fuse import bf16_steps
from ..storage.reader import TensorInfo, is_finite
from .inspection import Statistics, Weight

# Blocks fit into the cache, and are so small that the C library reuses the memory of one block for the next.
_BLOCK_ELEMENTS = 1 << 17


def statistics_of(weight: Weight, record: QuantizerRecord | None, findings: list[str]) -> Statistics:
    """Reads a weight and returns its statistics.

    Args:
        weight: the weight to read.
        record: the quantizer record of the checkpoint, or None.
        findings: a list that receives descriptions of damage, and of contradictions to the record or the saved scales.
    """
    try:
        if weight.linear:
            # Read once: shards of several tensor-parallel ranks are copied, at most one tensor of one layer at a time.
            whole = weight.read(slice(None))
            recorded = record is not None and weight.name in record.modules
            space = record.config_of(weight.name).space if record is not None and recorded else "ternary"
            if fused_group_size(whole, space) is None:
                space = fused_space(whole) or space
            group_size = fused_group_size(whole, space)
            if group_size is not None:
                return _of_fused(weight.name, whole, QuantizerConfig(space, group_size), record, findings)
            return _of_latent(weight, whole, record, findings)
        if not all(is_finite(weight.read(rows)) for rows in _rows(weight.info)):
            findings.append(f"{weight.name} holds NaN or infinity")
        return Statistics("")
    except ValueError as error:
        findings.append(f"{weight.name}: {error}" if weight.name not in str(error) else str(error))
        return Statistics("not read")


def _of_fused(
    name: str, whole: torch.Tensor, found: QuantizerConfig, record: QuantizerRecord | None, findings: list[str]
) -> Statistics:
    group = effective_group(whole.shape[1], found.group_size)
    if record is not None and name in record.modules:
        recorded = effective_group(whole.shape[1], record.config_of(name).group_size)
        if record.state == "latent" and whole.any():
            findings.append(f"{name} is {found.space} already (fused), and the quantizer record says latent")
        if record.state == "fused" and group % recorded:
            findings.append(f"{name} is {found.space} in groups of {group}, the quantizer record says {recorded}")
        if (space := record.config_of(name).space) != found.space:
            findings.append(f"{name} holds values of the space {found.space}, the quantizer record says {space}")
    zeros, scales = 0, []
    for block in _blocks(whole):
        zeros += int((block == 0).sum())
        largest = block.abs().reshape(-1, group).amax(1)
        scales.append(scales_of(block, found).flatten()[largest > 0].double())
    return Statistics("fused", found.group_size, zeros / whole.numel(), *_spread(scales))


def _of_latent(weight: Weight, whole: torch.Tensor, record: QuantizerRecord | None, findings: list[str]) -> Statistics:
    name, (rows, columns) = weight.name, weight.info.shape
    saved = weight.scales()
    state, config, dtype = "ordinary" if record is None else "full precision", QuantizerConfig(), whole.dtype
    if record is not None and name in record.modules:
        state, config = "latent", record.config_of(name)
        if record.state == "fused":
            findings.append(f"{name} is not ternary, and the quantizer record says fused")
    elif saved is not None:
        # Without an entry in a record, the shape of the saved scales says how many groups there are.
        state, config = "latent", QuantizerConfig(group_size=columns // saved.shape[1] if saved.shape[1] > 1 else -1)
    if record is not None and state == "latent":
        dtype = getattr(torch, record.latent_dtype)
    groups = columns // effective_group(columns, config.group_size)
    if saved is not None and (tuple(saved.shape) != (rows, groups) or saved.dtype != torch.bfloat16):
        findings.append(
            f"{name} has saved scales {list(saved.shape)}, {saved.dtype}; its weights and its groups need "
            f"{[rows, groups]}, torch.bfloat16"
        )
        saved = None
    if saved is not None and not bool(((saved > 0) & saved.isfinite()).all()):
        findings.append(f"{name} has saved scales that are not finite or not above 0")
        saved = None
    zeros, steps, start, used = 0, 0, 0, []
    for block in _blocks(whole):
        block = block.to(dtype)
        mine = None if saved is None else saved[start : start + len(block)]
        start += len(block)
        codes, scales = quantize(block, config)
        if mine is not None and not torch.equal(mine, scales):
            steps = max(steps, bf16_steps(mine, scales))
            codes, scales = quantize(block, config, mine)
        zeros += int((codes == 0).sum()) if 0.0 in SPACES[config.space].levels else 0
        used.append(scales.double().flatten())
    # A device that sums in another order may produce scales that differ by one bf16 step.
    if steps > 1:
        findings.append(
            f"{name}: its saved scales are up to {steps} bf16 steps away from those of its weights: they belong to "
            "other weights, or to another group size"
        )
    spread = _spread(used)
    if not all(value is None or math.isfinite(value) for value in spread):
        findings.append(f"{name} holds NaN or infinity")
        return Statistics(state, config.group_size)
    return Statistics(state, config.group_size, zeros / whole.numel(), *spread)


def _rows(info: TensorInfo) -> Iterator[slice]:
    return info.row_slices(_BLOCK_ELEMENTS * info.dtype.itemsize)


def _blocks(whole: torch.Tensor) -> Iterator[torch.Tensor]:
    return (whole[rows] for rows in _rows(TensorInfo(tuple(whole.shape), whole.dtype)))


def _spread(parts: Iterable[torch.Tensor]) -> tuple[float, float, float] | tuple[None, None, None]:
    values = torch.cat(list(parts))
    if values.numel() == 0:
        return None, None, None
    return values.min().item(), values.mean().item(), values.max().item()

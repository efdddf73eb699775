# SPDX-License-Identifier: Apache-2.0
"""Statistics of a model's weights: what is ternary, in which groups, and how it is spread."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator

import torch

from ...quantization import QuantizerConfig, effective_group, fused_group_size, quantize
from ...quantization.record import QuantizerRecord
from ..storage.reader import TensorInfo
from .inspection import Statistics, Weight

# Small enough for the cache, and for the C library to use the same memory again for the next block.
_BLOCK_ELEMENTS = 1 << 17


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Keeps PyTorch to one thread: on blocks this small others do little but wait, and burn a core doing so."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def not_read(weight: Weight, record: QuantizerRecord | None) -> Statistics:
    """What is known of a weight without reading it."""
    if not weight.linear:
        return Statistics("")
    entry = None if record is None else record.modules.get(weight.name)
    return Statistics("not read", None if entry is None else entry.get("group_size"))


def statistics_of(weight: Weight, record: QuantizerRecord | None, findings: list[str]) -> Statistics:
    """Reads a weight, in blocks of rows.

    Args:
        weight: to read.
        record: of the checkpoint.
        findings: gets what contradicts record or scales, and tensors that are damaged.

    Returns:
        What its values say.
    """
    try:
        if not weight.linear:
            finite = all(_finite(block) for block in blocks(weight.read, weight.info))
            if not finite:
                findings.append(f"{weight.name} holds NaN or infinity")
            return Statistics("")
        return _of_linear(weight, record, findings)
    except ValueError as error:
        findings.append(f"{weight.name}: {error}" if weight.name not in str(error) else str(error))
        return Statistics("not read")


def _of_linear(weight: Weight, record: QuantizerRecord | None, findings: list[str]) -> Statistics:
    name, columns = weight.name, weight.info.shape[1]
    # Once: of several tensor-parallel ranks this is a copy, of at most one tensor of one layer.
    whole = weight.read(slice(None))
    recorded = None if record is None or name not in record.modules else record.config_of(name)
    said = None if record is None else record.state
    if recorded is not None:
        effective_group(columns, recorded.group_size)  # raises
    found = fused_group_size(whole)
    if found is not None:
        if recorded is not None and said == "latent":
            if whole.any():
                findings.append(f"{name} is ternary already (fused), and the quantizer record says latent")
        elif recorded is not None and effective_group(columns, found) % effective_group(columns, recorded.group_size):
            findings.append(
                f"{name} is ternary in groups of {effective_group(columns, found)}, the quantizer record says "
                f"{effective_group(columns, recorded.group_size)}"
            )
        return _of_fused(whole, found)
    if recorded is not None and said == "fused":
        findings.append(f"{name} is not ternary, and the quantizer record says fused")
    config = recorded or QuantizerConfig()
    scales = weight.scales()
    state = "ordinary" if record is None else "full precision" if recorded is None else "latent"
    if recorded is None and scales is not None:
        # No record: the scales themselves say how many groups there are.
        config = QuantizerConfig(group_size=columns // scales.shape[1] if scales.shape[1] > 1 else -1)
        state = "latent"
    dtype = (
        getattr(torch, record.latent_dtype, weight.info.dtype) if state == "latent" and record else weight.info.dtype
    )
    return _of_latent(weight, whole, dtype, config, scales, state, findings)


def _of_fused(whole: torch.Tensor, group_size: int) -> Statistics:
    zeros, scales = 0, []
    group = effective_group(whole.shape[1], group_size)
    for block in _row_blocks(whole):
        zeros += int((block == 0).sum())
        largest = block.abs().reshape(-1, group).amax(1).double()
        scales.append(largest[largest > 0])
    return Statistics("fused", group_size, zeros / whole.numel(), *_spread(scales))


def _of_latent(
    weight: Weight,
    whole: torch.Tensor,
    dtype: torch.dtype,
    config: QuantizerConfig,
    saved: torch.Tensor | None,
    state: str,
    findings: list[str],
) -> Statistics:
    groups = whole.shape[1] // effective_group(whole.shape[1], config.group_size)
    if saved is not None and (tuple(saved.shape) != (whole.shape[0], groups) or saved.dtype != torch.bfloat16):
        findings.append(
            f"{weight.name} has saved scales {list(saved.shape)}, {saved.dtype}; its weights and its groups need "
            f"{[whole.shape[0], groups]}, torch.bfloat16"
        )
        saved = None
    if saved is not None and not bool(((saved > 0) & saved.isfinite()).all()):
        findings.append(f"{weight.name} has saved scales that are not finite or not above 0")
        saved = None
    zeros, steps, start, used = 0, 0, 0, []
    for block in _row_blocks(whole):
        block = block.to(dtype)
        mine = None if saved is None else saved[start : start + block.shape[0]]
        start += block.shape[0]
        codes, scales = quantize(block, config)
        if mine is not None and not torch.equal(mine, scales):
            # Neighbouring bf16 values of one sign are neighbouring integers.
            steps = max(steps, int((mine.view(torch.int16).int() - scales.view(torch.int16).int()).abs().amax()))
            codes, scales = quantize(block, config, mine)
        zeros += int((codes == 0).sum())
        used.append(scales.double().flatten())
    # Another device may sum in another order, and is then one step off.
    if steps > 1:
        findings.append(
            f"{weight.name}: its saved scales are up to {steps} bf16 steps away from those of its weights: they belong "
            "to other weights, or to another group size"
        )
    spread = _spread(used)
    if not all(value is None or math.isfinite(value) for value in spread):
        findings.append(f"{weight.name} holds NaN or infinity")
        return Statistics(state, config.group_size)
    return Statistics(state, config.group_size, zeros / whole.numel(), *spread)


def blocks(read: Callable[[slice], torch.Tensor], info: TensorInfo) -> Iterator[torch.Tensor]:
    if not info.shape or 0 in info.shape:
        return
    rows = max(1, _BLOCK_ELEMENTS * info.shape[0] * info.dtype.itemsize // info.nbytes)
    for start in range(0, info.shape[0], rows):
        yield read(slice(start, min(start + rows, info.shape[0])))


def _row_blocks(whole: torch.Tensor) -> Iterator[torch.Tensor]:
    return blocks(lambda rows: whole[rows], TensorInfo(tuple(whole.shape), whole.dtype))


def _finite(block: torch.Tensor) -> bool:
    # PyTorch computes nothing in 8-bit floating point, and integers are finite.
    if not block.is_floating_point() or block.dtype.itemsize == 1:
        return True
    return bool(block.sum().isfinite() or block.isfinite().all())


def _spread(parts: Iterable[torch.Tensor]) -> tuple[float, float, float] | tuple[None, None, None]:
    values = torch.cat(list(parts))
    if values.numel() == 0:
        return None, None, None
    return values.min().item(), values.mean().item(), values.max().item()

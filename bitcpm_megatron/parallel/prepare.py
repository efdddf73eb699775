# SPDX-License-Identifier: Apache-2.0
"""Preparation of bare model chunks, which become ternary and are proved to be so, in our loop and every host."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..nn.coverage import CoverageReport
from ..nn.linear import HostModule, TernaryState
from ..nn.settings import TernarySettings
from ..ops import set_backend
from ..ops.int8.timing import time_gemms
from ..quantization.record import QuantizerRecord
from .apply import apply_recipe
from .probe import probe, ternary_modules, watch_use


@dataclass(frozen=True)
class Prepared:
    """A ternary model.

    Attributes:
        coverage: the report of what was quantized and what was not, in the whole model.
        record: the quantizer record for every checkpoint.
        states: the states of the quantized modules of this rank.
        notes: the decisions that were taken, one line each.
    """

    coverage: CoverageReport
    record: QuantizerRecord
    states: list[TernaryState]
    notes: list[str]


def prepare_ternary(
    chunks: Sequence[torch.nn.Module],
    settings: TernarySettings,
    *,
    will_train: bool = True,
    fill: Callable[[Sequence[torch.nn.Parameter]], None] | None = None,
) -> Prepared:
    """Makes a model ternary, and proves that every quantized layer computes ``y = x Wq^T``.

    It is collective over all ranks. Call it before DDP and the optimizer are built, when the weights have the dtype
    that the forward uses.

    Args:
        chunks: all model chunks of this rank, without wrappers.
        settings: the settings of the quantization.
        will_train: whether the first training step has to prove that every quantized layer is used.
        fill: gives the latent weights values for the proof, if they have none yet.

    Raises:
        RecipeError, ValueError, TypeError: as in :func:`~.apply.apply_recipe`; ValueError also if the weights have
            several dtypes.
        RuntimeError: if the backend cannot be used on this device.
        ProbeError: if a layer is not ternary.
    """
    choice = set_backend(settings.backend, next(chunks[0].parameters()).device.type)
    coverage = apply_recipe(
        chunks,
        settings.recipe,
        default=settings.default,
        row_parallel_shards=settings.row_parallel_shards,
        # Whether parameters hold quantized weights depends on the optimizer, which does not exist yet.
        cache="none" if settings.cache == "none" else "step",
        verify_cache=settings.verify_cache,
        activation_bits=settings.activation_bits,
        gemm=settings.gemm,
        gemm_backward=settings.gemm_backward,
    )
    modules = ternary_modules(chunks)
    if fill is not None:
        fill([module.weight for _, module in modules])
    notes = [f"quantizer backend: {choice.backend.name} ({choice.reason})"]
    notes.append(f"probe: y = x Wq^T holds bit for bit in {probe(chunks)} layers of this rank")
    notes += _int8_notes([module for state, module in modules if state.gemm == "int8"])
    if will_train:
        watch_use(chunks)
    dtypes = {module.weight.dtype for _, module in modules}
    if len(dtypes) > 1:
        names = ", ".join(sorted(map(_name, dtypes)))
        raise ValueError(f"the weights to quantize have several dtypes ({names}): use one")
    # A stage without a ternary layer takes the dtype of its parameters: all stages have the same one.
    dtype = dtypes.pop() if dtypes else next(chunks[0].parameters()).dtype
    record = coverage.record(settings.default, _name(dtype), settings.activation_bits)
    return Prepared(coverage, record, [state for state, _ in modules], notes)


def _int8_notes(modules: Sequence[HostModule]) -> list[str]:
    """Returns a note on the speed of the int8 GEMM of the largest layer.

    An int8 GEMM is used only on request, and never chosen for its speed.
    """
    if not modules:
        return []
    weight = max((module.weight for module in modules), key=lambda w: w.numel())
    found = time_gemms(weight)
    slower = "; --ternary-gemm bf16 would be faster here" if found.int8 > found.plain else ""
    return [
        f"int8 GEMM ({found.kernels}): {found.int8:.2f} ms for {found.tokens} tokens x {weight.shape[1]} x "
        f"{weight.shape[0]}, quantization and scaling included; {found.plain:.2f} ms in {_name(weight.dtype)}{slower}"
    ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

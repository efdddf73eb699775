# SPDX-License-Identifier: Apache-2.0
"""What the quantizer does while a model trains: zeros, changed codes, scales; per module and in total.

Nothing is kept or computed between records, except one byte per weight of this rank: the codes of the last record.
"""

import functools
import math
import operator
from collections.abc import Sequence

import torch
from megatron.core import parallel_state

from ..agreement import all_gathered
from ..nn.linear import HostModule, TernaryState
from .probe import ternary_modules

# Codes are made, counted and compared block by block, so that the weights are read once.
_BLOCK_ROWS = 256


Counts = dict[str, float]
"""Of the codes of a module, or of several: ``weights``, ``zeros``, ``changed`` (codes that differ from the last record,
NaN at the first one), ``scales``, and ``scale_sum``, ``scale_min`` and ``scale_max`` of these."""
_MERGED = {"scale_min": min, "scale_max": max}


def merged(counts: Counts, others: Counts) -> Counts:
    """The counts of both together."""
    return {name: _MERGED.get(name, operator.add)(value, others[name]) for name, value in counts.items()}


def as_record(counts: Counts) -> dict[str, float | None]:
    """As fractions and means, for the log."""
    changed = counts["changed"] / counts["weights"]
    return {
        "zeros": counts["zeros"] / counts["weights"],
        "changed": None if math.isnan(changed) else changed,
        "scale_mean": counts["scale_sum"] / counts["scales"],
        "scale_min": counts["scale_min"],
        "scale_max": counts["scale_max"],
    }


class Telemetry:
    """Makes the records of one run; every rank holds one.

    Args:
        chunks: the model chunks of this rank, after :func:`~bitcpm_megatron.parallel.apply_recipe`.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        self._modules = ternary_modules(chunks)
        self._codes: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def record(self) -> dict[str, dict[str, float | None]] | None:
        """Statistics of the weights that the last training forward used; collective over all ranks.

        Call it between the schedule and the optimizer step.

        Returns:
            On rank 0, module path -> statistics of the whole weight, and ``"total"``; None elsewhere.
        """
        mine = {state.name: self._measure(state, module) for state, module in self._modules}
        # Tensor-parallel shards add up; pipeline stages and expert-parallel ranks complete each other.
        whole: dict[str, Counts] = {}
        for part in all_gathered(mine, parallel_state.get_tensor_model_parallel_group()):
            for name, counts in part.items():
                whole[name] = merged(whole[name], counts) if name in whole else counts
        for group in (
            parallel_state.get_pipeline_model_parallel_group(),
            parallel_state.get_expert_model_parallel_group(),
        ):
            whole = {name: counts for part in all_gathered(whole, group) for name, counts in part.items()}
        if torch.distributed.get_rank() != 0:
            return None
        whole["total"] = functools.reduce(merged, whole.values())
        return {name: as_record(counts) for name, counts in whole.items()}

    def _measure(self, state: TernaryState, module: HostModule) -> Counts:
        quantized, scales = state.in_use(module.weight)
        last = self._codes.get(state.name)
        codes = torch.empty(quantized.shape, dtype=torch.int8, device=quantized.device) if last is None else last
        zeros: torch.Tensor | int = 0
        changed: torch.Tensor | int = 0
        for block, kept in zip(quantized.split(_BLOCK_ROWS), codes.split(_BLOCK_ROWS), strict=True):
            new = block.sign().to(torch.int8)
            zeros += new.numel() - torch.count_nonzero(new)
            if last is not None:
                changed += torch.count_nonzero(new != kept)
            kept.copy_(new)
        self._codes[state.name] = codes
        s = scales.float()
        return {
            "weights": codes.numel(),
            "zeros": int(zeros),
            "changed": math.nan if last is None else int(changed),
            "scales": s.numel(),
            "scale_sum": float(s.sum()),
            "scale_min": float(s.min()),
            "scale_max": float(s.max()),
        }

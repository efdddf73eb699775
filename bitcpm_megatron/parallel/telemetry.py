# SPDX-License-Identifier: Apache-2.0
"""Statistics of the quantizer during training: zeros, changed codes, levels and scales, per module and in total.

Between records nothing is kept or computed, except one byte per weight of this rank: the codes of the last record.
"""

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state

from ..agreement import all_gathered
from ..nn.linear import HostModule, TernaryState
from ..quantization import SPACES, codes_under
from ..quantization.spaces import TERNARY
from .probe import ternary_modules

# Codes are computed, counted and compared block by block, so that the weights are read once.
_BLOCK_ROWS = 256


Counts = dict[str, float]
"""Counts of the codes and scales of one module, or of several.

``weights``, ``zeros`` and ``changed`` count codes; ``changed`` are those that differ from the last record, NaN in the
first one. ``scales``, ``scale_sum``, ``scale_min`` and ``scale_max`` describe the scales. In spaces other than ternary,
for which the zeros suffice, ``level <space> -2`` and so on count the codes of every level.
"""
_MERGED = {"scale_min": min, "scale_max": max}
_LEVEL = "level "


def merged(counts: Counts, others: Counts) -> Counts:
    """Merges two sets of counts: adds them, and takes the extremes of ``scale_min`` and ``scale_max``."""
    names = {**counts, **others}
    return {name: _MERGED.get(name, operator.add)(counts.get(name, 0), others.get(name, 0)) for name in names}


def as_record(counts: Counts) -> dict[str, Any]:
    """Converts counts to fractions and means, for the log.

    ``levels`` are shares of the weights of each space except ternary.
    """
    changed = counts["changed"] / counts["weights"]
    levels: dict[str, dict[str, float]] = {}
    for name, count in counts.items():
        if name.startswith(_LEVEL):
            space, level = name.removeprefix(_LEVEL).split()
            levels.setdefault(space, {})[level] = count
    shares = {space: {level: count / sum(of.values()) for level, count in of.items()} for space, of in levels.items()}
    return {
        "zeros": counts["zeros"] / counts["weights"],
        "changed": None if math.isnan(changed) else changed,
        "scale_mean": counts["scale_sum"] / counts["scales"],
        "scale_min": counts["scale_min"],
        "scale_max": counts["scale_max"],
        **({"levels": shares} if shares else {}),
    }


class Telemetry:
    """The telemetry of one run, which makes its records; every rank holds one.

    Args:
        chunks: the model chunks of this rank, after :func:`~bitcpm_megatron.parallel.apply_recipe`.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        self._modules = ternary_modules(chunks)
        self._codes: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def record(self) -> dict[str, dict[str, Any]] | None:
        """Returns statistics of the weights that the last training forward used; collective over all ranks.

        Call it between the schedule and the optimizer step.

        Returns:
            On rank 0, the statistics of the whole weight for each module path, and ``"total"``; None on other ranks.
        """
        mine = {state.name: self._measure(state, module) for state, module in self._modules}
        # Counts of tensor-parallel shards are added; pipeline stages and expert-parallel ranks hold different modules.
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
        space = SPACES[state.config.space]
        zeros: torch.Tensor | int = 0
        changed: torch.Tensor | int = 0
        levels: list[torch.Tensor | int] = [0] * len(space.levels)
        blocks = (tensor.split(_BLOCK_ROWS) for tensor in (quantized, codes, scales))
        for block, kept, own in zip(*blocks, strict=True):
            if space is TERNARY:
                new = block.sign().to(torch.int8)
            else:
                groups = block.reshape(own.numel(), -1).float()
                new = codes_under(groups, own.reshape(-1, 1).float(), space).view(block.shape)
                for i in range(len(levels)):
                    levels[i] += torch.count_nonzero(new == space.lowest_code + i)
            zeros += new.numel() - torch.count_nonzero(new if space is TERNARY else block)
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
            **(
                {}
                if space is TERNARY
                else {f"{_LEVEL}{space.name} {level:g}": int(n) for level, n in zip(space.levels, levels, strict=True)}
            ),
        }

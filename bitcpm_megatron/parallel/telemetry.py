# SPDX-License-Identifier: Apache-2.0
"""What the quantizer does while a model trains: zeros, changed codes, scales; per module and in total.

Nothing is kept or computed between records, except one byte per weight of this rank: the codes of the last record.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state

from ..nn.linear import HostModule, TernaryState
from .probe import ternary_modules

# Codes are made, counted and compared block by block, so that the weights are read once.
_BLOCK_ROWS = 256


@dataclass
class CodeStatistics:
    """Counts over the codes of one module, or of several.

    Attributes:
        weights: number of codes.
        zeros: how many are zero.
        changed: how many differ from the last record; None at the first one.
        scales: number of scales.
        scale_sum: their sum.
        scale_min: the smallest.
        scale_max: the largest.
    """

    weights: int
    zeros: int
    changed: int | None
    scales: int
    scale_sum: float
    scale_min: float
    scale_max: float

    def merged(self, other: "CodeStatistics") -> "CodeStatistics":
        """The statistics of both together."""
        return CodeStatistics(
            self.weights + other.weights,
            self.zeros + other.zeros,
            None if self.changed is None or other.changed is None else self.changed + other.changed,
            self.scales + other.scales,
            self.scale_sum + other.scale_sum,
            min(self.scale_min, other.scale_min),
            max(self.scale_max, other.scale_max),
        )

    def as_record(self) -> dict[str, float | None]:
        """As fractions and means, for the log."""
        return {
            "zeros": self.zeros / self.weights,
            "changed": None if self.changed is None else self.changed / self.weights,
            "scale_mean": self.scale_sum / self.scales,
            "scale_min": self.scale_min,
            "scale_max": self.scale_max,
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
        merged: dict[str, CodeStatistics] = {}
        for part in _gathered(mine, parallel_state.get_tensor_model_parallel_group()):
            for name, statistics in part.items():
                merged[name] = merged[name].merged(statistics) if name in merged else statistics
        for group in (
            parallel_state.get_pipeline_model_parallel_group(),
            parallel_state.get_expert_model_parallel_group(),
        ):
            merged = {name: s for part in _gathered(merged, group) for name, s in part.items()}
        if torch.distributed.get_rank() != 0:
            return None
        whole = list(merged.values())
        total = whole[0]
        for statistics in whole[1:]:
            total = total.merged(statistics)
        return {name: s.as_record() for name, s in {**merged, "total": total}.items()}

    def _measure(self, state: TernaryState, module: HostModule) -> CodeStatistics:
        quantized, scales = state.quantized, state.scales
        if quantized is None or scales is None:
            quantized, scales = state.quantize(module.weight)
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
        return CodeStatistics(
            weights=codes.numel(),
            zeros=int(zeros),
            changed=None if last is None else int(changed),
            scales=s.numel(),
            scale_sum=float(s.sum()),
            scale_min=float(s.min()),
            scale_max=float(s.max()),
        )


def _gathered(
    mine: dict[str, CodeStatistics], group: torch.distributed.ProcessGroup
) -> list[dict[str, CodeStatistics]]:
    if group.size() == 1:
        return [mine]
    parts: list[dict[str, CodeStatistics]] = [{}] * group.size()
    torch.distributed.all_gather_object(parts, mine, group=group)
    return parts

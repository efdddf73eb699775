# SPDX-License-Identifier: Apache-2.0
"""Parallel layouts in the notation of the benchmarks, such as ``TP2xDP2+SP``."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """Parallel layout of a job.

    Attributes:
        tensor: the tensor-parallel size.
        pipeline: the pipeline-parallel size.
        data: the data-parallel size.
        sequence_parallel: whether the activations between the linears are split, too.
        distributed_optimizer: whether the optimizer state is split over the data-parallel ranks.
        context: the context-parallel size.
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    context: int = 1

    @classmethod
    def parse(cls, text: str) -> "Layout":
        """Returns the layout with a given name, such as ``TP2xDP2+SP``.

        Raises:
            ValueError: if the text is not the name of a layout.
        """
        sizes, *options = text.upper().split("+")
        found = dict(re.findall(r"(TP|PP|CP|DP)(\d{1,5})", sizes))
        if "X".join(f"{k}{v}" for k, v in found.items()) != sizes or not set(options) <= {"SP", "DO"}:
            raise ValueError(f"layout {text!r}: write it as TP2, TP2xPP2xCP2xDP2, TP2+SP or DP2+DO")
        tp, pp, cp, dp = (int(found.get(name, 1)) for name in ("TP", "PP", "CP", "DP"))
        if min(tp, pp, cp, dp) < 1:
            raise ValueError(f"layout {text!r}: sizes are 1 or more")
        return cls(tp, pp, dp, "SP" in options, "DO" in options, cp)

    @property
    def processes(self) -> int:
        """Number of processes of the whole job, one per device."""
        return self.tensor * self.pipeline * self.context * self.data

    def flags(self) -> list[str]:
        """Returns the flags of the layout, for our training loop and for Megatron-LM."""
        line = ["--tensor-model-parallel-size", str(self.tensor)]
        line += ["--pipeline-model-parallel-size", str(self.pipeline)]
        line += ["--context-parallel-size", str(self.context)] if self.context > 1 else []
        line += ["--sequence-parallel"] * self.sequence_parallel
        return line + ["--use-distributed-optimizer"] * self.distributed_optimizer

    def __str__(self) -> str:
        sizes = {"TP": self.tensor, "PP": self.pipeline, "CP": self.context, "DP": self.data}
        options = "+SP" * self.sequence_parallel + "+DO" * self.distributed_optimizer
        return ("x".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "TP1") + options
